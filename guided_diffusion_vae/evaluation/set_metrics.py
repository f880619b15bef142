"""Compare sets of images by their features, and classes by their labels.

Features are processed in blocks of rows, so that the memory beyond them does not grow with their number. `progress` of
long computations is a function of (items, description) that returns an iterator over the items, such as
`logger.progress`.
"""

import warnings

import numpy as np
import torch

from ..config import require
from ..data.statistics import RunningMoments
from .image_metrics import to_tensor

BLOCK = 2048    # rows of features that are processed at once
_silently = lambda items, description: items
_SPARE = 4      # neighbors that a search in float32 keeps beyond those that are needed


class FeatureStatistics(RunningMoments):
    """Mean [D] and covariance [D x D] of features in float64, accumulated over batches."""

    product = staticmethod(lambda delta: torch.outer(delta, delta))

    def update(self, features):
        """Add features [n x D] and return self.

        :raises ValueError: if they are not finite, or D differs from that of the features before.
        """
        for part in _features(features).split(BLOCK):
            mean = part.double().mean(0)
            centered = part - mean
            self.merge(FeatureStatistics(len(part), mean, centered.T @ centered))
        return self

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


def kernel_distance(reference, samples, subsets=100, subset_size=1000, seed=0, progress=_silently) -> float:
    """Return the kernel distance (KID on Inception features): the unbiased MMD^2, averaged over random subsets.

    Kernel (x.y / D + 1)^3 (Binkowski et al. 2018, Sec. 4). Subsets are sampled without replacement, of `subset_size` or
    the size of the smaller set. If neither set is larger, one exact pass over all samples replaces the subsets.
    Unbiased for any number of samples: near 0, and possibly negative, for equal distributions.
    """
    reference, samples = _feature_pair(reference, samples)
    size = min(subset_size, len(reference), len(samples))
    require((size >= 2, f"kernel distance: expected at least 2 samples, got {len(reference)} and {len(samples)}"))
    if max(len(reference), len(samples)) <= subset_size:
        return _mmd_squared(reference.double(), samples.double())
    rng = np.random.default_rng(seed)

    def subset(features):
        return features[torch.from_numpy(rng.permutation(len(features))[:size]).to(features.device)].double()

    return float(np.mean([_mmd_squared(subset(reference), subset(samples))
                          for _ in progress(range(subsets), "kernel distance")]))


def _mmd_squared(x, y):
    within = 0.0
    for p in (x, y):
        gram = _cubic_kernel(p, p)
        within += ((gram.sum() - gram.trace()) / (len(p) * (len(p) - 1))).item()
    return within - 2 * _cubic_kernel(x, y).mean().item()


def _cubic_kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(reference, samples, k=3, block=BLOCK, radii=None, progress=_silently) -> tuple[float, float]:
    """Return (precision, recall) in [0, 1] of a set of samples (Kynkäänniemi et al. 2019, equations 1 and 2).

    Precision is the fraction of samples inside a ball of the reference set, recall the fraction of references inside a
    ball of the samples. The radius of a ball is the distance of its center to the k-th nearest neighbor in its own set.
    Distances are computed `block` by `block` in float32, and again in float64 where rounding could change the result.

    :param radii: `ball_radii` of both sets with the same `k`, if they are known.
    :raises ValueError: if a set has at most k entries.
    """
    reference, samples = pair = _feature_pair(reference, samples)
    require((min(map(len, pair)) > k, f"precision and recall: expected more than {k} references and samples, got "
             f"{len(reference)} and {len(samples)}"))
    radii = radii or [ball_radii(features, k, block, progress) for features in pair]
    covered = [torch.zeros(len(features), dtype=torch.bool, device=features.device) for features in pair]
    rounded = [_Rounded(features, reference.mean(0)) for features in pair]
    slices = progress(_slices(len(reference), block), "precision and recall")
    for rows, columns, squared, error in _rounded_distances(rounded[0], rounded[1], slices, block):
        _mark_covered(covered[0][rows], reference[rows], samples[columns], radii[1][columns], squared, error)
        _mark_covered(covered[1][columns], samples[columns], reference[rows], radii[0][rows], squared.T, error)
    recall, precision = (flags.double().mean().item() for flags in covered)
    return precision, recall


def ball_radii(features, k=3, block=BLOCK, progress=_silently) -> torch.Tensor:
    """Return the squared distances float64 [N] of features [N x D] to their k-th nearest neighbors among the others.

    The neighbors are searched in float32, and their distances computed in float64. Where rounding could have hidden a
    neighbor, the search is repeated in float64.

    :raises ValueError: if there are at most k features.
    """
    features = _features(features)
    require((len(features) > k, f"radii of balls: expected more than {k} features, got {len(features)}"))
    # Every point is its own nearest at distance 0, so that column k is the k-th neighbor among the others.
    best, indices = _no_neighbors(features, min(k + 1 + _SPARE, len(features)), torch.float32)
    errors, rounded = torch.zeros_like(best[:, 0]), _Rounded(features, features.mean(0))
    slices = progress(_slices(len(features), block), "radii")
    for rows, columns, squared, error in _rounded_distances(rounded, rounded, slices, block):
        for points, others, distances in ((rows, columns, squared), (columns, rows, squared.T))[:1 + (rows != columns)]:
            _keep_nearest(best[points], indices[points], distances, others.start)
            errors[points] = errors[points].clamp(min=error)
    radii = torch.empty(len(features), dtype=torch.float64, device=features.device)
    for rows in _slices(len(features), block):
        points = features[rows].double()
        exact = torch.stack([((features[column] - points) ** 2).sum(1) for column in indices[rows].T], 1)
        radii[rows] = exact.sort(1).values[:, k]
    hidden = ~(best[:, -1] - errors > radii) if best.shape[1] < len(features) else torch.zeros_like(radii).bool()
    if hidden.any():
        radii[hidden] = _nearest(features[hidden], features, k + 1, block)[0][:, k]
    return radii


class _Rounded:
    """Features [N x D] rounded to float32 on access, after a shift that makes their squared norms [N] small."""

    def __init__(self, features, shift):
        self.features, self.shift = features, shift
        self.norms = torch.cat([(self[rows] ** 2).sum(1) for rows in _slices(len(features), BLOCK)])

    def __getitem__(self, rows):
        return (self.features[rows] - self.shift).float()


def _rounded_distances(a, b, slices, block):
    """Yield (rows of a, rows of b, squared distances float32 between them, bound of their error) for slices of rows.

    Of one set with itself these are the blocks on the diagonal of the matrix and above.
    """
    limits = torch.finfo(torch.float32)
    for rows in slices:
        p = a[rows]
        for columns in _slices(len(b.norms), block, rows.start if a is b else 0):
            squared = torch.addmm(b.norms[columns], p, b[columns].T, alpha=-2).add_(a.norms[rows, None])
            # A sum of D rounded products is off by at most D eps / 2 of its magnitudes (Higham 2002, Sec. 3.1), that of
            # the norms and that of the product; 8 more for the shift, the remaining sums, and a radius to compare with.
            largest = a.norms[rows].max() + b.norms[columns].max()
            yield rows, columns, squared, ((p.shape[1] + 8) * (limits.eps * largest + limits.tiny)).item()


def _mark_covered(covered, points, centers, radii, squared, error):
    """Set the flags [n] of points that are in a ball, from rounded squared distances [n x m] to its centers."""
    margins = (squared - radii.float()).amin(1)     # a comparison with NaN, of an overflow, is uncertain
    inside, outside = margins < -error, margins > error
    uncertain = ~(covered | inside | outside)
    covered |= inside
    if uncertain.any():
        exact = _squared_distances(points[uncertain].double(), centers.double())
        covered[uncertain] = (exact <= radii).any(1)


def nearest_neighbors(queries, bank, k=1, block=BLOCK, progress=_silently) -> tuple[np.ndarray, np.ndarray]:
    """Return (distances [Q x k] float64, indices [Q x k] int64) of the k nearest entries of `bank`, nearest first.

    Euclidean, over all axes after the first one, for images and features. Memory grows with `block` squared, not with
    the bank.

    :raises ValueError: if the bank has fewer than k entries, or the lengths differ.
    """
    queries, bank = to_tensor(queries).flatten(1), to_tensor(bank).flatten(1)
    require((len(bank) >= k, f"nearest neighbors: expected a bank of at least {k} entries, got {len(bank)}"),
            (queries.shape[1] == bank.shape[1], f"nearest neighbors: expected equal lengths of queries and bank, got "
             f"{queries.shape[1]} and {bank.shape[1]}"))
    squared, indices = _nearest(queries, bank, k, block, progress)
    return squared.sqrt().cpu().numpy(), indices.cpu().numpy()


def _nearest(queries, bank, k, block, progress=_silently):
    best, indices = _no_neighbors(queries, k, torch.float64)
    for rows in progress(_slices(len(queries), block), "nearest neighbors"):
        points = queries[rows].double()
        for columns in _slices(len(bank), block):
            squared = _squared_distances(points, bank[columns].double())
            _keep_nearest(best[rows], indices[rows], squared, columns.start)
    return best, indices


def _no_neighbors(queries, k, dtype):
    """Return (squared distances [Q x k], indices [Q x k]) before a search."""
    best = torch.full((len(queries), k), torch.inf, dtype=dtype, device=queries.device)
    return best, torch.zeros(best.shape, dtype=torch.int64, device=queries.device)


def _keep_nearest(best, indices, squared, first):
    """Update the nearest neighbors [n x k] in place by squared distances [n x m] to the entries from `first` on."""
    nearest, order = squared.topk(min(best.shape[1], squared.shape[1]), dim=1, largest=False)
    values, chosen = torch.cat([best, nearest], 1).topk(best.shape[1], dim=1, largest=False)
    indices.copy_(torch.cat([indices, order + first], 1).gather(1, chosen))
    best.copy_(values)


def _slices(count, block, start=0):
    return [slice(i, min(i + block, count)) for i in range(start, count, block)]


def _squared_distances(p, q):
    """Return squared distances [n x m] of float64 features [n x D] and [m x D]."""
    norms = (p * p).sum(1)[:, None] + (q * q).sum(1)
    squared = norms - 2 * p @ q.T
    # Differences below rounding are 0: otherwise copies had the square root of the rounding error as distance.
    return torch.where(squared < 1e-13 * norms, 0, squared)


def inception_score(logits, split_size=5000) -> float:
    """Return the Inception Score of logits [N x K] (Salimans et al. 2016, equation 1), from 1 to K; higher is better.

    exp of the mean divergence of the class distribution of an image from that of the set, averaged over splits of
    `split_size` images, as in guided-diffusion's evaluator.
    """
    scores = []
    for part in _features(logits).split(split_size):
        log_p = torch.log_softmax(part.double(), dim=1)
        log_mean = log_p.logsumexp(0) - np.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def _features(values):
    values = to_tensor(values)
    values = values if values.dtype in (torch.float32, torch.float64) else values.double()
    require((values.ndim == 2 and len(values) > 0, f"features: expected shape [N x D], got {list(values.shape)}"),
            (all(torch.isfinite(part).all() for part in values.split(BLOCK)),
             "features contain NaN or infinity; check the samples, or use float32"))
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


def macro_f1(matrix) -> float:
    """Return the mean over classes of F1, the harmonic mean of precision and recall, of a confusion matrix [K x K].

    Rows are true classes. Classes that neither occur nor are predicted are not counted.
    """
    matrix = np.asarray(matrix, np.float64)
    counted = matrix.sum(1) + matrix.sum(0)
    return float((2 * matrix.diagonal()[counted > 0] / counted[counted > 0]).mean())


def calibration_error(probabilities, labels, bins: int = 15) -> float:
    """Return the expected calibration error, 0 to 1 (Guo et al. 2017, arXiv:1706.04599, Eq. 5); lower is better.

    The mean over samples of |accuracy - confidence| of their bin, for `bins` equal intervals of the confidence.

    :param probabilities: of the classes, [N x K]; `labels`: int64 [N].
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    rows = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(rows, correct - confidence, bins)).sum() / len(labels))


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
