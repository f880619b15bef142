"""Running mean and variance, and the choice of the items that are measured."""

import numpy as np


def evenly_spaced(total, count):
    """Return the indices int64 [min(count, total)] of evenly spaced ones of `total` items, the ends among them."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


def evenly_spaced_per_class(labels, total, count):
    """Return sorted indices int64 of evenly spaced ones of `total` items: at most `count`, equally many of each class.

    Of a smaller class these are all items. With more classes than `count` there is one item of evenly spaced classes.

    :param labels: int64 [total], or None without classes.
    """
    if labels is None:
        return evenly_spaced(total, count)
    classes = np.unique(labels)
    classes = classes[evenly_spaced(len(classes), count)]
    members = [np.flatnonzero(labels == label) for label in classes]
    return np.sort(np.concatenate([rows[evenly_spaced(len(rows), count // len(classes))] for rows in members]))


class RunningMoments:
    """Mean and sum of squared deviations of a stream of values, in float64 and per channel.

    Parts are merged by the update of Chan, Golub and LeVeque (1979): a mean that is large compared with the standard
    deviation costs no precision, and how the values were split into parts changes only the rounding.
    """

    def __init__(self, count=0, mean=0.0, squares=0.0):
        self.count, self.mean, self.squares = count, mean, squares

    def add(self, values, variances=None):
        """Add values [n x C x ...], means of posteriors with `variances` [n x C x ...] if given; return self."""
        flat = np.moveaxis(np.asarray(values, np.float64), 1, 0).reshape(values.shape[1], -1)
        mean = flat.mean(1)
        squares = ((flat - mean[:, None]) ** 2).sum(1)
        if variances is not None:
            squares = squares + np.moveaxis(variances, 1, 0).reshape(len(mean), -1).sum(1)
        return self.merge(RunningMoments(flat.shape[1], mean, squares))

    def merge(self, other):
        """Add the values of other moments and return self."""
        if other.count:
            total, delta = self.count + other.count, other.mean - self.mean
            self.squares = self.squares + other.squares + self.product(delta) * (self.count * other.count / total)
            self.mean = self.mean + delta * (other.count / total)
            self.count = total
        return self

    @staticmethod
    def product(delta):
        """Return the squares of deviations; a subclass that tracks a covariance returns their outer product."""
        return delta**2

    def to_dict(self):
        """Return the moments as JSON-able numbers; the inverse is `from_dict`."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_dict(cls, moments):
        """Return the moments of a dictionary from `to_dict`."""
        return cls(moments["count"], *(np.asarray(moments[name], np.float64) for name in ("mean", "squares")))

    def statistics(self):
        """Return mean and standard deviation over all values and per channel."""
        variance = self.squares / self.count
        overall = self.mean.mean()
        return {"mean": float(overall), "std": float(np.sqrt((variance + (self.mean - overall) ** 2).mean())),
                "channel_mean": self.mean.tolist(), "channel_std": np.sqrt(variance).tolist()}
