"""Running mean and variance."""

import numpy as np


class RunningMoments:
    """Accumulate mean and variance per channel in float64 (Chan, Golub and LeVeque 1979, pairwise update)."""

    def __init__(self, count=0, mean=0.0, squares=0.0):
        self.count, self.mean, self.squares = count, np.asarray(mean, np.float64), np.asarray(squares, np.float64)

    def add(self, values, variances=None):
        """Take in values [n x C x ...]; `variances`, alike, is spread around them that counts too (a posterior's)."""
        flat = np.moveaxis(np.asarray(values, np.float64), 1, 0).reshape(values.shape[1], -1)
        mean = flat.mean(1)
        squares = ((flat - mean[:, None]) ** 2).sum(1)
        if variances is not None:
            squares = squares + np.moveaxis(variances, 1, 0).reshape(len(mean), -1).sum(1)
        self.merge(RunningMoments(flat.shape[1], mean, squares))

    def merge(self, other):
        total = self.count + other.count
        apart = other.mean - self.mean
        self.squares = self.squares + other.squares + apart**2 * (self.count * other.count / total)
        self.mean = self.mean + apart * (other.count / total)
        self.count = total

    def to_dict(self):
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    def statistics(self):
        """Return mean and standard deviation over all values and per channel."""
        variance = self.squares / self.count
        overall = self.mean.mean()
        return {"mean": float(overall), "std": float(np.sqrt((variance + (self.mean - overall) ** 2).mean())),
                "channel_mean": self.mean.tolist(), "channel_std": np.sqrt(variance).tolist()}
