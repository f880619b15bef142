"""Compare sets of images by their features, and classes by their labels."""

import itertools
import warnings

import numpy as np
import torch

from ..config import require
from ..data.statistics import RunningMoments
from .image_metrics import to_tensor


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
        _require_same_length(self, other)
        return super().merge(other)

    @classmethod
    def from_moments(cls, mean, covariance, count=10**6):
        """Return statistics that were computed elsewhere, from `count` features."""
        mean, covariance = (to_tensor(np.asarray(values, np.float64)) for values in (mean, covariance))
        require((mean.ndim == 1 and covariance.shape == (len(mean),) * 2, "mean and covariance: expected shapes [D] "
                 f"and [D x D], got {list(mean.shape)} and {list(covariance.shape)}"))
        return cls(count, mean, covariance * (count - 1))

    @property
    def covariance(self):
        """The unbiased covariance [D x D].

        :raises ValueError: with fewer than two samples.
        """
        require((self.count >= 2, f"covariance: expected at least 2 samples, got {self.count}"))
        return self.squares / (self.count - 1)


def _require_same_length(a, b):
    require((not a.count or not b.count or len(a.mean) == len(b.mean),
             f"features: expected equal lengths, got {a.count and len(a.mean)} and {b.count and len(b.mean)}; use the "
             "same extractor for all"))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the squared Fréchet distance of two Gaussians with the statistics `a` and `b` (FeatureStatistics).

    |m_a - m_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 (Dowson and Landau 1982; on features: Heusel et al. 2017).
    With A = F F^T and B = G G^T from eigendecompositions the last trace is the sum of the singular values of F^T G:
    real, symmetric in a and b, and correct for singular covariances. Nothing is added to the diagonals. With at most
    as many samples as features the estimate is strongly biased; a warning reports it.
    """
    _require_same_length(a, b)
    covariance_a, covariance_b = a.covariance, b.covariance
    count = min(a.count, b.count)
    if count <= len(a.mean):
        warnings.warn(
            f"Fréchet distance from {count} samples of {len(a.mean)} features: the covariance is singular and the "
            "distance biased upward; compare it only with sets of the same size, or use more samples", stacklevel=2,
        )
    cross = torch.linalg.svdvals(_factor(covariance_a).T @ _factor(covariance_b)).sum()
    shift = ((a.mean - b.mean) ** 2).sum()
    distance = shift + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _factor(covariance):
    """Return F with F F^T = covariance; eigenvalues that are negative by rounding count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def kernel_distance(reference, samples, subsets=100, subset_size=1000, seed=0) -> float:
    """Return the kernel distance (KID on Inception features): the unbiased MMD^2, averaged over random subsets.

    Kernel (x.y / D + 1)^3 (Binkowski et al. 2018, Sec. 4). Subsets are sampled without replacement, of `subset_size` or
    the size of the smaller set. If neither set is larger, one exact pass over all samples replaces the subsets.
    Unbiased for any number of samples: near 0, and possibly negative, for equal distributions.
    """
    reference, samples = _feature_pair(reference, samples)
    size = min(subset_size, len(reference), len(samples))
    require((size >= 2, f"kernel distance: expected at least 2 samples, got {len(reference)} and {len(samples)}"))
    if max(len(reference), len(samples)) <= subset_size:
        return _mmd_squared(reference, samples)
    rng = np.random.default_rng(seed)

    def subset(features):
        return features[torch.from_numpy(rng.permutation(len(features))[:size]).to(features.device)]

    return float(np.mean([_mmd_squared(subset(reference), subset(samples)) for _ in range(subsets)]))


def _mmd_squared(x, y):
    within = 0.0
    for p in (x, y):
        gram = _cubic_kernel(p, p)
        within += ((gram.sum() - gram.trace()) / (len(p) * (len(p) - 1))).item()
    return within - 2 * _cubic_kernel(x, y).mean().item()


def _cubic_kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(reference, samples, k=3, block=2048) -> tuple[float, float]:
    """Return (precision, recall) in [0, 1] of a set of samples (Kynkäänniemi et al. 2019, equations 1 and 2).

    Precision is the fraction of samples inside a ball of the reference set, recall the fraction of references inside a
    ball of the samples. The radius of a ball is the distance of its center to the k-th nearest neighbor in its own set.
    Distances are computed `block` by `block`.

    :raises ValueError: if a set has at most k entries.
    """
    reference, samples = _feature_pair(reference, samples)
    require((min(len(reference), len(samples)) > k, f"precision and recall: expected more than {k} references and "
             f"samples, got {len(reference)} and {len(samples)}"))
    return (_fraction_covered(samples, reference, k, block), _fraction_covered(reference, samples, k, block))


def _fraction_covered(points, centers, k, block):
    # Every point is its own nearest at distance 0, so that column k is the k-th neighbor among the others.
    radii = _nearest(centers, centers, k + 1, block)[0][:, k]
    covered = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for rows, columns, squared in _distance_blocks(points, centers, block):
        covered[rows] |= (squared <= radii[columns]).any(1)
    return covered.double().mean().item()


def nearest_neighbors(queries, bank, k=1, block=2048) -> tuple[np.ndarray, np.ndarray]:
    """Return (distances [Q x k] float64, indices [Q x k] int64) of the k nearest entries of `bank`, nearest first.

    Euclidean, over all axes after the first one, for images and features. Memory grows with `block` squared, not with
    the bank.

    :raises ValueError: if the bank has fewer than k entries, or the lengths differ.
    """
    queries, bank = to_tensor(queries).flatten(1), to_tensor(bank).flatten(1)
    require((len(bank) >= k, f"nearest neighbors: expected a bank of at least {k} entries, got {len(bank)}"),
            (queries.shape[1] == bank.shape[1], f"nearest neighbors: expected equal lengths of queries and bank, got "
             f"{queries.shape[1]} and {bank.shape[1]}"))
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
        # Differences below rounding are 0: otherwise copies had the square root of the rounding error as distance.
        yield rows, columns, torch.where(squared < 1e-13 * norms, 0, squared)


def inception_score(logits, split_size=5000) -> float:
    """Return the Inception Score of logits [N x K] (Salimans et al. 2016, equation 1), from 1 to K; higher is better.

    exp of the mean divergence of the class distribution of an image from that of the set, averaged over splits of
    `split_size` images, as in guided-diffusion's evaluator.
    """
    log_p = torch.log_softmax(_features(logits), dim=1)
    scores = []
    for part in log_p.split(split_size):
        log_mean = part.logsumexp(0) - np.log(len(part))
        scores.append((part.exp() * (part - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def _features(values):
    values = to_tensor(values).double()
    require((values.ndim == 2 and len(values) > 0, f"features: expected shape [N x D], got {list(values.shape)}"),
            (torch.isfinite(values).all(), "features contain NaN or infinity; check the samples, or use float32"))
    return values


def _feature_pair(reference, samples):
    reference, samples = _features(reference), _features(samples)
    require((reference.shape[1] == samples.shape[1], f"features: expected equal lengths, got {reference.shape[1]} and "
             f"{samples.shape[1]}; use the same extractor for both sets"))
    return reference, samples.to(reference.device)


# --- Labels ---


def confusion_matrix(predicted, target, num_classes: int) -> np.ndarray:
    """Return counts int64 [K x K]: row = the target (or true) class, column = the predicted one.

    :raises ValueError: if the lengths differ or a label is not in [0, num_classes).
    """
    predicted, target = _labels(predicted, target)
    both = np.concatenate([predicted, target])
    low, high = (both.min(), both.max()) if both.size else (0, 0)
    require((0 <= low <= high < num_classes or not both.size, f"labels: expected 0 to {num_classes - 1}, got {low} to "
             f"{high}; check that both have the same class names"))
    pairs = np.bincount(target * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes).astype(np.int64)


def class_agreement(predicted, target) -> float:
    """Return the fraction of samples, 0 to 1, that are classified as their target class.

    :raises ValueError: if the lengths differ or there are no samples.
    """
    predicted, target = _labels(predicted, target)
    require((len(target) > 0, "class agreement: expected at least one sample"))
    return float((predicted == target).mean())


def classification_report(predicted, labels, class_names: list[str]) -> dict:
    """Return {"accuracy", "count", "per_class", "confusion"}, JSON-able.

    `per_class` maps every name to its accuracy, None for a class without samples. `confusion` is `confusion_matrix` as
    lists, in the order of `class_names`.
    """
    matrix = confusion_matrix(predicted, labels, len(class_names))
    rows = zip(class_names, matrix.diagonal().tolist(), matrix.sum(1).tolist())
    return {
        "accuracy": class_agreement(predicted, labels),
        "count": int(matrix.sum()),
        "per_class": {name: correct / total if total else None for name, correct, total in rows},
        "confusion": matrix.tolist(),
    }


def _labels(predicted, target):
    pair = [np.asarray(to_tensor(values).cpu()).astype(np.int64) for values in (predicted, target)]
    require((len(pair[0]) == len(pair[1]), f"labels: expected equal counts, got {len(pair[0])} predictions for "
             f"{len(pair[1])} labels"))
    return pair
