"""Compare sets of images by their features."""

import itertools
import warnings

import numpy as np
import torch

from ..data.statistics import RunningMoments
from .image_metrics import _tensor


class FeatureStatistics(RunningMoments):
    """Mean [D] and covariance [D x D] of features in float64, accumulated over batches."""

    product = staticmethod(lambda delta: torch.outer(delta, delta))

    def update(self, features):
        """Add features [n x D] and return self.

        :raises ValueError: if they are not finite, or D differs from that of the features before.
        """
        features = _features(features)
        mean = features.mean(0)
        centered = features - mean
        return self.merge(FeatureStatistics(len(features), mean, centered.T @ centered))

    def merge(self, other):
        """Add the features of other statistics and return self."""
        if self.count and other.count and self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(other.mean)} numbers among features of {len(self.mean)}; use one "
                             "extractor")
        return super().merge(other)

    @classmethod
    def from_moments(cls, mean, covariance, count=10**6):
        """Return statistics that were computed elsewhere, over many features unless their `count` is known."""
        mean, covariance = (_tensor(np.asarray(values, np.float64)) for values in (mean, covariance))
        if mean.ndim != 1 or covariance.shape != (len(mean),) * 2:
            raise ValueError(f"a mean of shape {list(mean.shape)} and a covariance of {list(covariance.shape)}; "
                             "needed are [D] and [D x D]")
        return cls(count, mean, covariance * (count - 1))

    @property
    def covariance(self):
        """The unbiased covariance [D x D].

        :raises ValueError: with fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 samples or more, found {self.count}")
        return self.squares / (self.count - 1)


def frechet_distance(a, b):
    """Return the squared Fréchet distance of two Gaussians with the statistics `a` and `b` (FeatureStatistics).

    |m_a - m_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 (Dowson and Landau 1982; on features: Heusel et al. 2017).
    With A = F F^T and B = G G^T from eigen-decompositions the last trace is the sum of the singular values of F^T G:
    real, the same for (a, b) and (b, a), and sound for singular covariances. Nothing is added to the diagonals.
    With no more samples than features the estimate is far too high; a warning says so and the number stands.
    """
    if a.count and b.count and len(a.mean) != len(b.mean):
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} numbers; use one extractor for both sets")
    covariance_a, covariance_b = a.covariance, b.covariance
    fewest = min(a.count, b.count)
    if fewest <= len(a.mean):
        warnings.warn(
            f"Fréchet distance from {fewest} samples of {len(a.mean)} features: the covariance is singular and the "
            "distance biased upwards; compare it only with sets of the same size, or use more samples",
            stacklevel=2,
        )
    cross = torch.linalg.svdvals(_factor(covariance_a).T @ _factor(covariance_b)).sum()
    shift = ((a.mean - b.mean) ** 2).sum()
    distance = shift + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _factor(covariance):
    """Return F with F F^T = covariance; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def kernel_distance(reference, samples, subsets=100, subset_size=1000, seed=0):
    """Return the kernel distance (KID on Inception features): the unbiased MMD^2, averaged over random subsets.

    Kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4). Subsets are drawn without replacement, of
    `subset_size` or the smaller set's size; where both sets are no larger than that, one pass over all is exact and
    replaces the subsets. Unbiased, so around 0 and also negative for equal distributions, at any number of samples.
    """
    reference, samples = _feature_pair(reference, samples)
    size = min(subset_size, len(reference), len(samples))
    if size < 2:
        raise ValueError(f"kernel distance of {len(reference)} and {len(samples)} samples; both need 2 or more")
    if max(len(reference), len(samples)) <= subset_size:
        return _mmd_squared(reference, samples)
    draw = np.random.default_rng(seed)

    def subset(features):
        return features[torch.from_numpy(draw.permutation(len(features))[:size]).to(features.device)]

    return float(np.mean([_mmd_squared(subset(reference), subset(samples)) for _ in range(subsets)]))


def _mmd_squared(x, y):
    within = 0.0
    for p in (x, y):
        gram = _cubic_kernel(p, p)
        within += ((gram.sum() - gram.trace()) / (len(p) * (len(p) - 1))).item()
    return within - 2 * _cubic_kernel(x, y).mean().item()


def _cubic_kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(reference, samples, k=3, block=2048):
    """Return (precision, recall) in [0, 1] of a set of samples (Kynkäänniemi et al. 2019, equations 1 and 2).

    Precision is the share of samples inside a ball of the reference set, recall the share of references inside a
    ball of the samples; a ball reaches from a point to its k-th nearest neighbour in its own set. Distances are
    formed `block` by `block`. Raises ValueError where a set has no k neighbours.
    """
    reference, samples = _feature_pair(reference, samples)
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"{len(reference)} references and {len(samples)} samples; {k} neighbours need {k + 1} or more")
    return (_fraction_covered(samples, reference, k, block), _fraction_covered(reference, samples, k, block))


def _fraction_covered(points, centers, k, block):
    # Every point is its own nearest at distance 0, so column k holds the k-th neighbour among the others.
    radii = _nearest(centers, centers, k + 1, block)[0][:, k]
    covered = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for rows, columns, squared in _distance_blocks(points, centers, block):
        covered[rows] |= (squared <= radii[columns]).any(1)
    return covered.double().mean().item()


def nearest_neighbors(queries, bank, k=1, block=2048):
    """Return (distances [Q x k] float64, indices [Q x k] int64) of the k nearest entries of `bank`, nearest first.

    Euclidean, over everything after the first axis, so pictures and features will do. Memory grows with `block`
    squared, not with the bank. Raises ValueError where the bank has fewer than k entries.
    """
    queries, bank = _tensor(queries).flatten(1), _tensor(bank).flatten(1)
    if len(bank) < k:
        raise ValueError(f"{k} neighbours were asked of a bank of {len(bank)}")
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries of {queries.shape[1]} numbers and a bank of {bank.shape[1]} cannot be compared")
    squared, indices = _nearest(queries, bank, k, block)
    return squared.sqrt().cpu().numpy(), indices.cpu().numpy()


def _nearest(queries, bank, k, block):
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=queries.device)
    indices = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
    for rows, columns, squared in _distance_blocks(queries, bank, block):
        numbers = torch.arange(len(bank), device=queries.device)[columns].expand(len(squared), -1)
        candidates = torch.cat([best[rows], squared], 1)
        best[rows], order = candidates.topk(k, dim=1, largest=False)
        indices[rows] = torch.cat([indices[rows], numbers], 1).gather(1, order)
    return best, indices


def _distance_blocks(a, b, block):
    """Yield (rows of a, rows of b, squared distances between them), one block at a time."""
    for i, j in itertools.product(range(0, len(a), block), range(0, len(b), block)):
        rows, columns = slice(i, i + block), slice(j, j + block)
        p, q = a[rows].double(), b[columns].double()
        norms = (p * p).sum(1)[:, None] + (q * q).sum(1)
        squared = norms - 2 * p @ q.T
        # Below rounding nothing can be told apart: a copy must be at distance 0, not at the square root of noise.
        yield rows, columns, torch.where(squared < 1e-13 * norms, 0, squared)


def inception_score(logits, split_size=5000):
    """Return the Inception Score of logits [N x K] (Salimans et al. 2016, equation 1), from 1 to K; higher is better.

    exp of the mean divergence of a picture's classes from the set's, averaged over parts of `split_size` pictures as
    guided-diffusion's evaluator does.
    """
    log_p = torch.log_softmax(_features(logits), dim=1)
    scores = []
    for part in log_p.split(split_size):
        log_mean = part.logsumexp(0) - np.log(len(part))
        scores.append((part.exp() * (part - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def _features(values):
    values = _tensor(values).double()
    if values.ndim != 2 or not len(values):
        raise ValueError(f"features must be [N x D] with N >= 1, found {list(values.shape)}")
    if not torch.isfinite(values).all():
        raise ValueError("features hold NaN or infinite numbers; look at the samples, or take them in float32")
    return values


def _feature_pair(reference, samples):
    reference, samples = _features(reference), _features(samples)
    lengths = [reference.shape[1], samples.shape[1]]
    if lengths[0] != lengths[1]:
        raise ValueError(f"features of {lengths[0]} and of {lengths[1]} numbers; use one extractor for both sets")
    return reference, samples.to(reference.device)
