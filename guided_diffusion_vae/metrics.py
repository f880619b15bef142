"""Measure pictures against pictures, sets of pictures against sets, and labels against labels.

Pictures are arrays or tensors [N x C x ...] in [0, 1] with one to three spatial axes; features are [N x D]. Sums are
taken in float64. What is per sample comes back as a tensor beside the pictures, all else as arrays and floats.
"""

import itertools
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import Conv1d, Conv2d, Conv3d, Linear

from .files import sha256_of_file
from .unet import AttentionPool2d

# ---- picture against picture ----


def psnr(a, b):
    """Return the peak signal-to-noise ratio in dB per sample, [N] float64; at most 100, where two pictures are equal.

    The peak is 1 and the squared error is averaged over channels and positions of one sample. A set is reported by
    the mean over its samples, which one equal pair (a patch of air) must not make infinite. Raises ValueError where the
    shapes differ.
    """
    mean_square = (_difference(a, b) ** 2).mean(1)
    return -10 * torch.log10(mean_square.clamp(min=1e-10))


def l1(a, b):
    """Return the mean absolute difference per sample, [N] float64."""
    return _difference(a, b).abs().mean(1)


def max_error(a, b):
    """Return the largest absolute difference per sample, [N] float64."""
    return _difference(a, b).abs().amax(1)


def ssim(a, b, window=11, sigma=1.5, k1=0.01, k2=0.03):
    """Return the structural similarity per sample, [N] float64 (Wang et al. 2004, equation 13, averaged as in 17).

    Local moments are weighted by a Gaussian of `window` points and standard deviation `sigma` along every spatial
    axis, only where the window lies inside the picture. An axis shorter than the window takes the largest odd window
    that fits; ValueError where that leaves one point on every axis. Channels are compared one by one and averaged.
    """
    a, b = _paired(a, b)
    sizes = [min(window, n - 1 + n % 2) for n in a.shape[2:]]
    if max(sizes) < 3:
        raise ValueError(f"pictures of {_by(a.shape[2:])} are too small for SSIM; one axis must have 3 points or more")
    kernels = [_gaussian(size, sigma, a.device) for size in sizes]
    # One sample after the other: five float64 maps of a volume are as much as should be in memory.
    one_by_one = zip(a, b)
    return torch.stack([_ssim_of_one(x.double(), y.double(), kernels, k1**2, k2**2) for x, y in one_by_one])


def _ssim_of_one(x, y, kernels, c1, c2):
    mean_x, mean_y, square_x, square_y, product = (_smooth(m, kernels) for m in (x, y, x * x, y * y, x * y))
    both_means = mean_x * mean_y
    sum_of_squares = mean_x**2 + mean_y**2
    variances = square_x + square_y - sum_of_squares
    luminance = (2 * both_means + c1) / (sum_of_squares + c1)
    structure = (2 * (product - both_means) + c2) / (variances + c2)
    return (luminance * structure).mean()


def _gaussian(size, sigma, device):
    offsets = torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def _smooth(x, kernels):
    """Average [C x ...] under one kernel per spatial axis, at the positions where the window fits."""
    for axis, kernel in enumerate(kernels, start=1):
        inside = x.shape[axis] - len(kernel) + 1
        # Shifted sums rather than a convolution call: the same line serves one, two and three axes.
        x = sum(weight * x.narrow(axis, shift, inside) for shift, weight in enumerate(kernel))
    return x


def bicubic_baseline(images, factor):
    """Return `images` shrunk by `factor` and enlarged again with Pillow's bicubic filter, float32 in [0, 1].

    This is what a picture keeps when only its size is reduced: the bar for an autoencoder of the same total stride.
    `factor` is an integer or one per spatial axis. Pictures are rounded to 8 bits first and after every pass, as
    Pillow does to pictures read from files (Keys 1981 with a = -1/2, widened when shrinking); volumes go through the
    same filter axis by axis. Raises ValueError where `factor` does not divide the size.
    """
    images = _tensor(images)
    sizes = tuple(images.shape[2:])
    factors = (factor,) * len(sizes) if isinstance(factor, int) else tuple(factor)
    if len(factors) != len(sizes) or any(n % f for n, f in zip(sizes, factors)):
        raise ValueError(f"a factor of {_by(factors)} does not divide pictures of {_by(sizes)}; crop or choose another")
    levels = _bytes(images)
    for wanted in ([n // f for n, f in zip(sizes, factors)], sizes):
        for axis in reversed(range(len(sizes))):
            levels = _resize_axis(levels, axis + 2, wanted[axis])
    return levels.astype(np.float32) / 255


def _resize_axis(levels, axis, size):
    rows = np.moveaxis(levels, axis, -1)
    flat = Image.fromarray(np.ascontiguousarray(rows).reshape(-1, rows.shape[-1]))
    resized = np.asarray(flat.resize((size, flat.height), Image.Resampling.BICUBIC))
    return np.moveaxis(resized.reshape(*rows.shape[:-1], size), -1, axis)


# ---- set against set ----


class FeatureStatistics:
    """Gather the mean and covariance of features in float64, batch after batch.

    Batches are combined by the update of Chan, Golub and LeVeque (1979), so a mean that is large beside the spread
    costs no digits and how the set was cut into batches changes nothing but the last one.
    """

    def __init__(self):
        self.count = 0
        self.mean = None
        self._scatter = None

    def update(self, features):
        """Take in features [n x D] and return self; ValueError where they are not finite or D changes."""
        features = _features(features)
        batch = FeatureStatistics()
        batch.count, batch.mean = len(features), features.mean(0)
        centred = features - batch.mean
        batch._scatter = centred.T @ centred
        return self.merge(batch)

    def merge(self, other):
        """Take in the statistics of further features and return self."""
        if not other.count:
            return self
        if self.count and self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(other.mean)} numbers among features of {len(self.mean)}; use one "
                             "extractor")
        if not self.count:
            self.count, self.mean, self._scatter = other.count, other.mean.clone(), other._scatter.clone()
            return self
        step = other.mean - self.mean
        total = self.count + other.count
        self._scatter += other._scatter + torch.outer(step, step) * (self.count * other.count / total)
        self.mean += step * (other.count / total)
        self.count = total
        return self

    @classmethod
    def given(cls, mean, covariance, count=10**6):
        """Return statistics that were computed elsewhere, over many features unless their `count` is known."""
        one = cls()
        one.count, one.mean = count, _tensor(np.asarray(mean, np.float64))
        one._scatter = _tensor(np.asarray(covariance, np.float64)) * (count - 1)
        if one.mean.ndim != 1 or one._scatter.shape != (len(one.mean),) * 2:
            raise ValueError(f"a mean of shape {list(one.mean.shape)} and a covariance of {list(one._scatter.shape)}; "
                             "needed are [D] and [D x D]")
        return one

    @property
    def covariance(self):
        """The unbiased covariance [D x D]; ValueError with fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 samples or more, found {self.count}")
        return self._scatter / (self.count - 1)


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
    return (_share_covered(samples, reference, k, block), _share_covered(reference, samples, k, block))


def _share_covered(points, centres, k, block):
    # Every point is its own nearest at distance 0, so column k holds the k-th neighbour among the others.
    radii = _nearest(centres, centres, k + 1, block)[0][:, k]
    covered = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for rows, columns, squared in _distance_blocks(points, centres, block):
        covered[rows] |= (squared <= radii[columns]).any(1)
    return covered.double().mean().item()


def nearest_neighbours(queries, bank, k=1, block=2048):
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


# ---- features ----


class Features(NamedTuple):
    """What an extractor reads off pictures: features [n x D], logits [n x K] or None, spatial ones [n x S] or None."""

    pooled: torch.Tensor
    logits: torch.Tensor | None = None
    spatial: torch.Tensor | None = None


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7    # as many of a layer's channels as guided-diffusion's evaluator compares


def inception_features(path, device=None, sha256=INCEPTION_SHA256):
    """Return a function from pictures [n x C x H x W] in [0, 1] to `Features` of the Inception network of FID.

    torch-fidelity's port of the network of Heusel et al. 2017, from a local weights file: 2048 pooled features, logits
    without bias [n x 1008], and for sFID (Nash et al. 2021) the first 7 channels of `mixed_6/conv`, 17 x 17 positions.
    Grey pictures are repeated. 8-bit levels go in, as from files.

    :raises FileNotFoundError, ValueError: no such file, or another than the one with this SHA-256.
    :raises ImportError: without torch-fidelity (the extra `eval`).
    """
    wanted = f"{INCEPTION_FILE} (SHA-256 {sha256}), from {INCEPTION_URL}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there; --inception_path wants {wanted}")
    found = sha256_of_file(path)
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}; --inception_path wants {wanted}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
        raise ImportError("Inception features need torch-fidelity, with a torchvision that fits torch "
                          f"({error}): pip install 'guided-diffusion-vae[eval]'") from error
    network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    network.to(device or "cpu").eval()
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))

    @torch.no_grad()
    def extract(images):
        levels = torch.from_numpy(_bytes(_tensor(images))).to(next(network.parameters()).device)
        seen.clear()
        pooled, logits = network(levels.expand(-1, 3, -1, -1))
        return Features(pooled.float(), logits.float(), seen[0][:, :SPATIAL_CHANNELS].flatten(1).float())

    return extract


def classifier_features(model, prepare=None):
    """Return a function from images [n x C x ...] in [0, 1] to `Features` with logits, float32.

    `model` is an EncoderUNetModel; it is put into evaluation mode and sees what `prepare` makes of the images (x0 of
    latents; by default the images in [-1, 1]) at time step 0, where a classifier of noisy data meets clean ones. The
    features are what its last layer turns into logits: the
    average over positions (pool adaptive) or the hidden units (spatial, spatial_v2). An attention pool reads a whole
    grid, of which the average is taken, so that features do not shrink to the number of classes.
    """
    last = [layer for layer in model.out if isinstance(layer, (Linear, Conv1d, Conv2d, Conv3d, AttentionPool2d))][-1]
    model.eval()

    @torch.no_grad()
    def extract(images):
        x0 = prepare(_tensor(images).float()) if prepare else _tensor(images).float() * 2 - 1
        x0 = x0.to(next(model.parameters()).device)
        if x0.shape[1] != model.in_channels:
            raise ValueError(f"the classifier reads {model.in_channels} channels, the pictures have {x0.shape[1]}; "
                             "give a classifier that was trained on such pictures")
        seen = []
        hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = model(x0, torch.zeros(len(x0), dtype=torch.long, device=x0.device))
        finally:
            hook.remove()
        read = seen[0].float()                                  # [n x D], or [n x D x ...] with positions
        return Features(read if read.ndim == 2 else read.flatten(2).mean(2), logits.float())

    return extract


def latent_features(codec, grid=2):
    """Return a function from images [n x C x ...] in [0, 1] to `Features` without logits, float32.

    Per channel of the codec's latent (posterior mode, scaled): the mean in every cell of a grid of `grid` cells an
    axis, and the standard deviation over the whole; D = Z (grid^axes + 1), 20 for 4 channels in 2D. The overall mean
    is left out because it is the cells' average and would make every covariance singular. Blind to finer detail
    than a cell, so a coarse measure beside a classifier's features; it asks for no labels.
    """

    def extract(images):
        with torch.no_grad():
            latents = codec.encode_batch(codec.fitted(_tensor(images).float())).float()
        cells = latents
        for axis in range(2, latents.ndim):
            parts = cells.tensor_split(min(grid, cells.shape[axis]), axis)
            cells = torch.stack([part.mean(axis) for part in parts], axis)
        spread = latents.flatten(2).std(2, correction=0)
        return Features(torch.cat([cells.flatten(1), spread], 1))

    return extract


def collect_features(extract, batches):
    """Return `Features` over an iterable of image batches: NumPy arrays, but of the spatial ones the statistics alone.

    The images are not kept, and of spatial features neither is anything that would grow with their number.
    """
    pooled, logits, spatial = [], [], None
    for batch in batches:
        read = extract(batch)
        pooled.append(read.pooled.cpu().numpy())
        logits += [] if read.logits is None else [read.logits.cpu().numpy()]
        if read.spatial is not None:
            spatial = (spatial or FeatureStatistics()).update(read.spatial.cpu())
    if not pooled:
        raise ValueError("no images to take features from; the set is empty")
    return Features(np.concatenate(pooled), np.concatenate(logits) if logits else None, spatial)


# ---- labels against labels ----


def confusion_matrix(predicted, asked, num_classes):
    """Return counts [C x C] int64: row = the class that was asked for (or true), column = the predicted one.

    Raises ValueError where the lengths differ or a label is outside 0 ... num_classes - 1.
    """
    predicted, asked = _labels(predicted), _labels(asked)
    if len(predicted) != len(asked):
        raise ValueError(f"{len(predicted)} predictions for {len(asked)} labels")
    both = np.concatenate([predicted, asked])
    if both.size and not 0 <= both.min() <= both.max() < num_classes:
        found = f"labels {both.min()} to {both.max()}"
        raise ValueError(f"{found} among {num_classes} classes; check that both come from the same class names")
    pairs = np.bincount(asked * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes).astype(np.int64)


def class_agreement(predicted, asked):
    """Return the share, 0 to 1, of samples whose predicted class is the asked one; ValueError where there are none."""
    predicted, asked = _labels(predicted), _labels(asked)
    if len(predicted) != len(asked) or not len(asked):
        raise ValueError(f"{len(predicted)} predictions for {len(asked)} labels; need as many, and one at least")
    return float((predicted == asked).mean())


def classification_report(predicted, labels, class_names):
    """Return {"accuracy", "count", "per_class", "confusion"}, plain numbers that JSON can hold.

    `per_class` maps every name to its share of right answers, None for a class without samples; `confusion` is
    `confusion_matrix` as lists, in the order of `class_names`.
    """
    matrix = confusion_matrix(predicted, labels, len(class_names))
    right_and_all = zip(class_names, matrix.diagonal().tolist(), matrix.sum(1).tolist())
    return {
        "accuracy": class_agreement(predicted, labels),
        "count": int(matrix.sum()),
        "per_class": {name: right / total if total else None for name, right, total in right_and_all},
        "confusion": matrix.tolist(),
    }


# ---- arguments ----


def _tensor(values):
    if isinstance(values, torch.Tensor):
        return values.detach()
    # Torch warns of arrays it could write to but must not, such as a memory-mapped cache: only those are copied.
    return torch.from_numpy(np.require(values, requirements="W"))


def _paired(a, b):
    a, b = _tensor(a), _tensor(b)
    if a.shape != b.shape or a.ndim < 3:
        raise ValueError(f"pictures {list(a.shape)} against {list(b.shape)}; both must be the same [N x C x ...]")
    return a, b.to(a.device)


def _difference(a, b):
    a, b = _paired(a, b)
    return (a.double() - b.double()).flatten(1)


def _bytes(images):
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


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


def _labels(values):
    return np.asarray(_tensor(values).cpu()).astype(np.int64)


def _by(sizes):
    return "x".join(map(str, sizes))
