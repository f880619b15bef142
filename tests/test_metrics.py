import itertools
import hashlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from guided_diffusion_vae.evaluation import (
    Features, FeatureStatistics, bicubic_baseline, class_agreement, classification_report, classifier_features,
    collect_features, confusion_matrix, frechet_distance, inception_features, inception_score, kernel_distance, l1,
    latent_features, max_error, nearest_neighbors, precision_recall, psnr, set_metrics, ssim,
)
from guided_diffusion_vae.evaluation.set_metrics import calibration_error, macro_f1

SHARED = Path(__file__).parents[2] / "shared" / "data" / "spectrograms"


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def gaussian(count, dimension, seed=0, mean=0.0, std=1.0):
    return np.random.default_rng(seed).normal(mean, std, (count, dimension))


def statistics(features):
    return FeatureStatistics().update(features)


# --- Image pairs ---


@pytest.mark.parametrize("shape", [(2, 1, 16), (2, 3, 16, 16), (2, 1, 12, 8, 9)])
def test_errors_of_a_known_offset_in_1d_2d_and_3d(shape):
    a = random_images(*shape) * 0.5
    b = a + np.float32(0.1)
    assert psnr(a, b).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert l1(a, b).tolist() == pytest.approx([0.1, 0.1], abs=1e-6)
    assert max_error(a, b).tolist() == pytest.approx([0.1, 0.1], abs=1e-6)


def test_errors_are_computed_per_sample():
    a = np.zeros((2, 1, 4, 4))
    b = a.copy()
    b[1, 0, 0, 0] = 1.0
    assert psnr(a, b).tolist() == [100.0, pytest.approx(10 * math.log10(16))]
    assert l1(a, b).tolist() == [0, 1 / 16]
    assert max_error(a, b).tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(2, 1, 16), (2, 3, 16, 12), (2, 1, 12, 8, 9)])
def test_ssim_of_identical_images_is_one(shape):
    a = random_images(*shape)
    assert ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_ssim_of_constant_images_is_the_luminance_term():
    a = np.full((1, 1, 16, 16), 0.4)
    expected = (2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4)
    assert ssim(a, a + 0.2).tolist() == pytest.approx([expected], abs=1e-10)


@pytest.mark.parametrize("height, width, window", [(13, 14, (11, 11)), (8, 12, (7, 11)), (9, 3, (9, 3))])
def test_ssim_equals_the_formula_evaluated_window_by_window(height, width, window):
    a, b = random_images(1, 1, height, width), random_images(1, 1, height, width, seed=1)
    tall, wide = window
    y, x = np.arange(tall) - tall // 2, np.arange(wide) - wide // 2
    weights = np.exp(-(y[:, None] ** 2 + x**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for i, j in itertools.product(range(height - tall + 1), range(width - wide + 1)):
        x, y = (p[0, 0, i : i + tall, j : j + wide].astype(np.float64) for p in (a, b))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        cov = (weights * (x - mx) * (y - my)).sum()
        values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b).tolist() == pytest.approx([np.mean(values)], abs=1e-10)


def test_ssim_decreases_with_noise():
    a = random_images(1, 1, 24, 24)
    noise = gaussian(24, 24).reshape(1, 1, 24, 24)
    values = [ssim(a, a + s * noise).item() for s in (0, 0.05, 0.1, 0.3)]
    assert values == sorted(values, reverse=True) and values[-1] < 0.8


def test_ssim_window_fits_short_axes_and_rejects_tiny_images():
    a = random_images(1, 1, 1, 8, 20)
    assert ssim(a, a).tolist() == pytest.approx([1])
    with pytest.raises(ValueError, match="SSIM of size 2x2: at least one axis must have 3 points"):
        ssim(a[:, 0, :, :2, :2], a[:, 0, :, :2, :2])


def test_images_of_different_shapes_raise():
    with pytest.raises(ValueError, match=r"expected equal shapes .*, got \[1, 1, 4, 4\] and \[1, 1, 4, 5\]"):
        psnr(np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 4, 5)))


def test_tensors_arrays_and_read_only_arrays_give_the_same_numbers():
    a, b = random_images(2, 1, 12, 12), random_images(2, 1, 12, 12, seed=1)
    expected = ssim(a, b)
    assert torch.equal(ssim(torch.from_numpy(a).requires_grad_(), torch.from_numpy(b)), expected)
    a.flags.writeable = False
    assert torch.equal(ssim(a, b), expected)


# --- Bicubic baseline ---


def test_bicubic_baseline_equals_pillow_on_eight_bit_random_images():
    levels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    small = Image.fromarray(levels).resize((6, 4), Image.Resampling.BICUBIC)
    expected = np.asarray(small.resize((24, 16), Image.Resampling.BICUBIC))
    found = bicubic_baseline(levels.transpose(2, 0, 1)[None] / 255, 4)
    assert np.array_equal(np.rint(found[0] * 255).astype(np.uint8).transpose(1, 2, 0), expected)


def test_bicubic_baseline_of_a_volume_that_varies_in_a_plane_equals_the_plane():
    plane = random_images(1, 1, 8, 12)
    volume = np.repeat(plane[:, :, None], 4, axis=2)
    assert np.array_equal(bicubic_baseline(volume, (2, 2, 2))[:, :, 1], bicubic_baseline(plane, 2))


def test_bicubic_baseline_with_factor_one_only_rounds_to_eight_bits():
    a = random_images(1, 3, 8, 8)
    assert np.abs(bicubic_baseline(a, 1) - a).max() <= 0.5 / 255 + 1e-6


def test_bicubic_baseline_clips_values_outside_the_unit_interval():
    a = 3 * random_images(1, 1, 8, 8) - 1
    assert np.array_equal(bicubic_baseline(a, 2), bicubic_baseline(a.clip(0, 1), 2))


def test_bicubic_baseline_rejects_factors_that_do_not_divide():
    with pytest.raises(ValueError, match="factor 4x4 does not divide size 10x8"):
        bicubic_baseline(random_images(1, 1, 10, 8), 4)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared recordings are not here")
def test_bicubic_baseline_of_radar_recordings_has_recorded_values():
    files = sorted((SHARED / "radar_gesture_64" / "val").glob("*.png"))
    images = np.stack([np.asarray(Image.open(f)) for f in files]).transpose(0, 3, 1, 2) / 255
    blurred = bicubic_baseline(images, 4)
    assert psnr(images, blurred).mean().tolist() == pytest.approx(15.3, abs=0.05)
    assert l1(images, blurred).mean().tolist() == pytest.approx(0.100, abs=0.0005)


# ---- set against set ----


def test_statistics_in_batches_equal_statistics_at_once_despite_a_large_mean():
    features = gaussian(101, 5, mean=1e6)
    gathered = FeatureStatistics()
    for part in np.array_split(features, 7):
        gathered.update(part)
    assert gathered.count == 101
    assert np.allclose(gathered.mean, features.mean(0), rtol=1e-14)
    assert np.allclose(gathered.covariance, np.cov(features.T), rtol=1e-9, atol=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    a = statistics(gaussian(200, 16))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_equals_the_closed_form_of_commuting_gaussians():
    # Diagonal covariances: sum of (m - n)^2 + (s - t)^2 over the axes.
    features = gaussian(400, 4)
    features = np.linalg.qr(features - features.mean(0))[0] * math.sqrt(399)  # mean 0, covariance exactly 1
    scale, shift = np.array([1.0, 2.0, 0.5, 3.0]), np.array([0.0, 1.0, -2.0, 0.5])
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()
    distance = frechet_distance(statistics(features), statistics(features * scale + shift))
    assert distance == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_equals_the_closed_form_of_general_covariances():
    linalg = pytest.importorskip("scipy.linalg")
    mix = np.random.default_rng(1).normal(size=(6, 6))
    a, b = statistics(gaussian(300, 6)), statistics(gaussian(300, 6, seed=2) @ mix + 1)
    root = linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    expected = ((a.mean - b.mean) ** 2).sum() + a.covariance.trace() + b.covariance.trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_too_few_samples_warns():
    few = gaussian(8, 16)
    with pytest.warns(UserWarning, match="8 samples of 16 features"):
        assert frechet_distance(statistics(few), statistics(few)) == pytest.approx(0, abs=1e-10)
    many, equal = statistics(gaussian(40, 16)), statistics(gaussian(16, 16))
    for a, b in ((many, equal), (equal, many)):     # the smaller set decides
        with pytest.warns(UserWarning, match="16 samples of 16 features"):
            frechet_distance(a, b)


def test_statistics_reject_nan_other_lengths_and_single_samples():
    gathered = FeatureStatistics().update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="covariance: expected at least 2 samples, got 1"):
        frechet_distance(gathered, gathered)
    with pytest.raises(ValueError, match="features: expected equal lengths, got 3 and 4"):
        gathered.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="NaN"):
        gathered.update(np.full((2, 3), np.nan))


def test_kernel_distance_of_one_distribution_is_near_zero_and_of_two_is_not():
    a, b = gaussian(300, 8), gaussian(300, 8, seed=1)
    assert abs(kernel_distance(a, b)) < 0.05  # its spread over seeds is 0.014
    assert kernel_distance(a, b + 1) > 1


def test_kernel_distance_is_unbiased_over_draws():
    values = [kernel_distance(gaussian(12, 3, seed=2 * i), gaussian(12, 3, seed=2 * i + 1)) for i in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))


def test_kernel_distance_equals_the_definition_on_three_points():
    x, y = np.array([[1.0], [2.0]]), np.array([[0.0], [3.0]])
    expected = 3**3 + 1 - (1 + 4**3 + 1 + 7**3) / 2
    assert kernel_distance(x, y) == pytest.approx(expected)


def test_kernel_distance_over_subsets_agrees_with_the_whole_and_keeps_to_its_seed():
    a, b = gaussian(300, 4), gaussian(250, 4, seed=1, mean=0.5)
    subsets = kernel_distance(a, b, subsets=60, subset_size=100)
    assert subsets == pytest.approx(kernel_distance(a, b), rel=0.15)
    assert subsets == kernel_distance(a, b, subsets=60, subset_size=100)
    assert subsets != kernel_distance(a, b, subsets=60, subset_size=100, seed=1)


def test_kernel_distance_averages_random_subsets_without_replacement(monkeypatch):
    measured = []
    monkeypatch.setattr(set_metrics, "_mmd_squared", lambda x, y: measured.append((x, y)) or len(measured))
    assert kernel_distance(np.arange(1200.0)[:, None], np.arange(1100.0)[:, None]) == np.mean(range(1, 101))
    for parts, count in zip(zip(*measured), (1200, 1100)):
        assert all(len(part) == len(part.unique()) == 1000 for part in parts)
        assert len(torch.cat(parts).unique()) == count and not torch.equal(parts[0], parts[1])


def clusters(*centers, count=30, seed=0):
    draw = np.random.default_rng(seed)
    return np.concatenate([np.array(center) + draw.uniform(-1, 1, (count, 2)) for center in centers])


def test_precision_and_recall_of_a_set_with_itself_are_one():
    a = clusters((0, 0), (100, 0))
    assert precision_recall(a, a) == (1, 1)


def test_precision_and_recall_separate_missing_and_extra_modes():
    two = clusters((0, 0), (100, 0))
    one = two[:30]
    assert precision_recall(two, one) == (1, 0.5)
    assert precision_recall(one, two) == (0.5, 1)
    assert precision_recall(clusters((0, 0)), clusters((50, 50))) == (0, 0)


def test_radius_of_a_ball_is_the_distance_to_the_third_neighbor():
    reference, samples = np.array([[0.0], [1], [3], [6], [10]]), np.array([[-6.0], [-6.5], [-5], [100]])
    # The ball of 0 has radius 6 (2 neighbors: 3, 4 neighbors: 10); all others end above -5.
    assert precision_recall(reference, samples)[0] == 0.5


def test_precision_and_recall_do_not_depend_on_the_block():
    a, b = gaussian(70, 3), gaussian(50, 3, seed=1, mean=0.7)
    whole = precision_recall(a, b)
    assert 0 < whole[0] < 1 and 0 < whole[1] < 1
    assert precision_recall(a, b, block=16) == whole


def test_exact_copies_are_covered_by_balls_of_radius_zero():
    a = np.full((10, 50), 1e3 / 3)
    assert precision_recall(a, a) == (1, 1)


def features_of_kind(kind, seed):
    """Return features float32 [N x 40] whose distances float32 resolves well, badly or not at all."""
    features = gaussian(230 - 40 * seed, 40, seed=seed, std=1 + 0.1 * seed)
    if kind == "far from zero":
        features += 3e3
    elif kind == "a few points many times":
        features = np.round(gaussian(12, 40))[np.random.default_rng(seed).integers(0, 12, len(features))]
    elif kind == "on a coarse grid":
        features = np.random.default_rng(seed).integers(0, 2, features.shape) / 4
    elif kind == "almost one point":
        features = 1 + 1e-4 * features
    elif kind == "on two scales":
        features[::2] *= 1e-4
    return (features * {"too small to square": 1e-24, "too large to square": 1e24}.get(kind, 1)).astype(np.float32)


@pytest.mark.parametrize("kind", [
    "ordinary", "far from zero", "a few points many times", "on a coarse grid", "almost one point", "on two scales",
    "too small to square", "too large to square",
])
def test_precision_and_recall_equal_a_direct_computation_in_float64(kind):
    a, b = (features_of_kind(kind, seed) for seed in (0, 1))
    distances = lambda x, y: np.stack([((y.astype(float) - row) ** 2).sum(1) for row in x.astype(float)])
    covered = lambda x, y: (distances(x, y) <= np.sort(distances(y, y), 1)[:, 3]).any(1).mean()
    assert precision_recall(a, b, block=64) == (covered(b, a), covered(a, b))


def test_radii_of_balls_are_exact_where_neighbors_are_almost_equally_far():
    corners = np.concatenate([np.eye(5) + 10 * center for center in range(30)])     # in groups of five, all at sqrt(2)
    features = corners + 1e-7 * gaussian(150, 5)
    expected = np.sort([((features - row) ** 2).sum(1) for row in features], 1)[:, 3]
    assert np.allclose(set_metrics.ball_radii(features), expected, rtol=1e-12)


def test_few_distances_are_computed_again_in_float64(monkeypatch):
    exact, rows = set_metrics._squared_distances, []
    monkeypatch.setattr(set_metrics, "_squared_distances", lambda p, q: rows.append(len(p)) or exact(p, q))
    precision_recall(gaussian(500, 20, mean=100), gaussian(500, 20, seed=1, mean=100))
    assert sum(rows) < 50


def test_set_distances_have_recorded_values():
    # Recorded with every distance in float64 and statistics of all features at once.
    a = gaussian(700, 24, seed=3, mean=5).astype(np.float32)
    b = gaussian(500, 24, seed=4, mean=5.2, std=0.9).astype(np.float32)
    assert precision_recall(a, b) == (0.866, 0.47285714285714286)
    assert precision_recall(a, b, k=5) == (0.926, 0.5771428571428572)
    assert kernel_distance(a, b, subsets=20, subset_size=200) == pytest.approx(279.8292656566176, rel=1e-12)
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(1.803913466645227, rel=1e-12)


class Operators(TorchFunctionMode):
    """Records the entries of matrix products in float32, and the bytes of the largest tensor that is not a view."""

    products = largest = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        owners = [each.untyped_storage().data_ptr() for each in (result, *args) if isinstance(each, torch.Tensor)]
        if isinstance(result, torch.Tensor) and owners[0] not in owners[1:]:
            self.largest = max(self.largest, result.nbytes)
        if function is torch.addmm:
            self.products += result.numel()
        return result


def test_every_pair_of_features_is_multiplied_once():
    with Operators() as operators:
        precision_recall(gaussian(320, 8), gaussian(256, 8, seed=1), block=64)
    triangles = sum(count * (count + 64) // 2 for count in (320, 256))     # with the blocks on the diagonal
    assert operators.products == 320 * 256 + triangles


@pytest.mark.parametrize("measure", [
    lambda a, b: frechet_distance(statistics(a), statistics(b)),
    lambda a, b: kernel_distance(a, b, subsets=2, subset_size=100),
    lambda a, b: precision_recall(a, b, block=100),
    lambda a, b: nearest_neighbors(a, b, block=100),
    lambda a, b: inception_score(a, split_size=100),
], ids=["frechet", "kernel", "precision and recall", "nearest neighbors", "inception score"])
def test_no_tensor_grows_with_the_product_of_count_and_length(measure, monkeypatch):
    monkeypatch.setattr(set_metrics, "BLOCK", 100)
    a, b = (gaussian(1000, 100, seed=seed).astype(np.float32) for seed in (0, 1))
    with Operators() as operators:
        measure(a, b)
    assert operators.largest <= 100 * 100 * 8 < a.nbytes / 4


def test_progress_of_long_computations_is_shown():
    labels, (a, b) = [], (gaussian(300, 3), gaussian(200, 3, seed=1))
    progress = lambda items, label: labels.append((label, len(items))) or items
    precision_recall(a, b, block=100, progress=progress)
    nearest_neighbors(a, b, block=100, progress=progress)
    kernel_distance(a, b, subsets=9, subset_size=50, progress=progress)
    assert labels == [("radii", 3), ("radii", 2), ("precision and recall", 3), ("nearest neighbors", 3),
                      ("kernel distance", 9)]


def test_precision_rejects_sets_without_k_neighbors():
    with pytest.raises(ValueError, match="expected more than 3 references and samples, got 3 and 9"):
        precision_recall(gaussian(3, 2), gaussian(9, 2))


@pytest.mark.parametrize("block", [7, 4096])
def test_nearest_neighbors_equal_a_full_sort(block):
    queries, bank = random_images(9, 1, 4, 4), random_images(40, 1, 4, 4, seed=1)
    full = np.linalg.norm(queries.reshape(9, 1, -1).astype(float) - bank.reshape(1, 40, -1), axis=2)
    distances, indices = nearest_neighbors(queries, bank, k=5, block=block)
    assert np.array_equal(indices, np.argsort(full, 1)[:, :5])
    assert np.allclose(distances, np.sort(full, 1)[:, :5])


def test_nearest_neighbor_of_a_copy_is_at_distance_zero():
    bank = random_images(20, 3, 8, 8) + 100
    distances, indices = nearest_neighbors(bank[4:9], bank)
    assert indices[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert not distances.any()


def test_small_distances_are_not_rounded_to_zero():
    bank = np.full((1, 4), 1.0)
    distances, _ = nearest_neighbors(bank + 1e-5, bank)
    assert distances[0, 0] == pytest.approx(2e-5, rel=1e-3)


def test_nearest_neighbors_reject_a_small_bank():
    with pytest.raises(ValueError, match="expected a bank of at least 4 entries, got 3"):
        nearest_neighbors(np.zeros((2, 2)), np.zeros((3, 2)), k=4)


def test_inception_score_runs_from_one_to_the_number_of_classes():
    sure = 100.0 * np.eye(4)[np.arange(40) % 4]
    assert inception_score(sure) == pytest.approx(4)
    assert inception_score(np.zeros((40, 4))) == pytest.approx(1)
    assert inception_score(sure[:1].repeat(40, 0)) == pytest.approx(1)  # sure, but always of the same


def test_inception_score_equals_its_definition_by_parts_of_5000():
    logits = 2 * gaussian(5003, 3)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    entropy = lambda q: -(q * np.log(q)).sum(-1)
    parts = [np.exp(entropy(part.mean(0)) - entropy(part).mean()) for part in (p[:5000], p[5000:])]
    assert parts[0] > 1.2 and inception_score(logits) == pytest.approx(np.mean(parts), rel=1e-9)


def test_inception_score_is_averaged_over_parts():
    logits = gaussian(30, 5)
    parts = [inception_score(logits[i:i + 10]) for i in (0, 10, 20)]
    assert inception_score(logits, split_size=10) == pytest.approx(np.mean(parts))


def test_merged_statistics_are_those_of_all_features():
    features = gaussian(50, 4) + 1000
    parts = [FeatureStatistics().update(features[i:j]) for i, j in ((0, 7), (7, 20), (20, 50))]
    merged = FeatureStatistics()
    for part in parts:
        merged.merge(part)
    whole = FeatureStatistics().update(features)
    assert merged.count == 50 and np.allclose(merged.mean, whole.mean, rtol=1e-12)
    assert np.allclose(merged.covariance, whole.covariance, rtol=1e-7)
    assert merged.merge(FeatureStatistics()).count == 50
    with pytest.raises(ValueError, match="features: expected equal lengths, got 4 and 3"):
        merged.merge(FeatureStatistics().update(gaussian(5, 3)))


def test_precomputed_statistics_are_compared_unchanged():
    mean, covariance = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    given = FeatureStatistics.from_moments(mean, covariance)
    assert np.allclose(given.covariance, covariance, rtol=1e-12, atol=0)
    moved = FeatureStatistics.from_moments(mean + 2, covariance)
    assert frechet_distance(given, moved) == pytest.approx(12)
    with pytest.raises(ValueError, match=r"expected shapes \[D\] and \[D x D\], got \[3\] and \[2, 2\]"):
        FeatureStatistics.from_moments(mean, np.eye(2))


# ---- features ----


def classifier(pool, channels=1):
    from guided_diffusion_vae.unet import EncoderUNetModel

    torch.manual_seed(0)
    model = EncoderUNetModel(
        image_size=16, in_channels=channels, model_channels=32, out_channels=5, num_res_blocks=1,
        attention_resolutions=(2,), channel_mult=(1, 1), num_head_channels=16, pool=pool, use_scale_shift_norm=True,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)   # far from 0: logits depend on images and timesteps
    return model


def test_classifier_of_latents_receives_prepared_images():
    model, images = classifier("adaptive", channels=2).train(), random_images(3, 1, 16, 16)
    to_x0 = lambda x: torch.cat([x, -x], 1)
    read = classifier_features(model, to_x0)(images)
    assert not model.training
    expected = model.eval()(to_x0(torch.from_numpy(images)), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(read.logits, expected)


@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_classifier_features_are_inputs_of_the_last_layer(pool):
    model = classifier(pool)
    features, logits, _ = classifier_features(model)(random_images(3, 1, 16, 16))
    assert len(features) == 3 and logits.shape == (3, 5)
    expected = model(torch.from_numpy(random_images(3, 1, 16, 16)) * 2 - 1, torch.zeros(3, dtype=torch.long))
    assert torch.equal(logits, expected)
    last = [layer for layer in model.out if any(True for _ in layer.parameters())][-1]
    assert torch.allclose(last(features[:, :, None, None] if pool == "adaptive" else features).flatten(1), logits)


def test_classifier_features_average_the_input_of_an_attention_pool():
    model = classifier("attention")
    read = []
    model.out[1].register_forward_hook(lambda *call: read.append(call[2]))
    features, logits, _ = classifier_features(model)(random_images(3, 1, 16, 16))
    assert features.shape == (3, 32) and logits.shape == (3, 5)
    assert torch.allclose(features, read[0].mean((2, 3)))


def test_classifier_features_reject_other_channels():
    with pytest.raises(ValueError, match="the classifier requires 1 channels, got 3"):
        classifier_features(classifier("adaptive"))(random_images(1, 3, 16, 16))


class Identity:
    """Codec whose latents are the images."""

    def encode_batch(self, images, eps=None):
        return images

    pad_to_factors = encode_batch


@pytest.mark.parametrize(
    "shape, dimension", [((5, 4, 8), 12), ((5, 4, 8, 8), 20), ((5, 1, 4, 6, 5), 9), ((5, 2, 1, 8), 6)]
)
def test_latent_features_have_documented_length(shape, dimension):
    features, logits, _ = latent_features(Identity())(random_images(*shape))
    assert features.shape == (5, dimension) and logits is None


def test_latent_features_are_cell_means_and_standard_deviation():
    images = np.zeros((1, 1, 4, 4), np.float32)
    images[0, 0, :2, 2:] = 1.0
    features, _, _ = latent_features(Identity())(images)
    assert features[0].tolist() == [0, 1, 0, 0, pytest.approx(math.sqrt(3 / 16))]


def test_latent_features_of_padded_autoencoders_are_those_of_padded_images():
    class Padding(Identity):
        def pad_to_factors(self, images):
            return torch.nn.functional.pad(images, (0, 1, 0, 1))

    images = random_images(2, 1, 3, 3)
    padded = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 1)))
    assert torch.equal(latent_features(Padding())(images)[0], latent_features(Identity())(padded)[0])


def test_latent_features_of_many_images_have_full_rank():
    features, _, _ = latent_features(Identity())(random_images(200, 2, 8, 8))
    assert torch.linalg.matrix_rank(statistics(features).covariance) == features.shape[1]


def test_features_in_batches_equal_features_at_once():
    images, extract = random_images(7, 2, 8, 8), latent_features(Identity())
    features, logits, _ = collect_features(extract, [images[:3], images[3:6], images[6:]])
    assert np.allclose(features, extract(images)[0], atol=1e-6) and logits is None
    with pytest.raises(ValueError, match="expected at least one image, got an empty set"):
        collect_features(extract, [])


def test_spatial_features_in_batches_have_the_statistics_of_all():
    images = random_images(7, 1, 2, 2)
    extract = lambda x: Features(torch.from_numpy(x).flatten(1), spatial=2 * torch.from_numpy(x).flatten(1))
    spatial = collect_features(extract, [images[:3], images[3:]]).spatial
    assert spatial.count == 7
    assert np.allclose(spatial.covariance, np.cov(2 * images.reshape(7, -1).T), rtol=1e-6)


def test_inception_rejects_missing_and_other_weights(tmp_path):
    named = "w.pth does not exist; --inception_path expects weights-inception-2015-12-05-6726825d.pth .SHA-256 6726825d"
    with pytest.raises(FileNotFoundError, match=f"{named}.*, from https://"):
        inception_features(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"something else")
    with pytest.raises(ValueError, match="w.pth has SHA-256 .*; --inception_path expects weights-inception-2015-12-05"):
        inception_features(tmp_path / "w.pth")


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """The extractor with random weights, and the network behind it; skipped without torch-fidelity."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as module
    except Exception as error:  # RuntimeError if the versions of torchvision and torch do not match
        pytest.skip(f"no torch-fidelity that works here: {error}")
    torch.manual_seed(0)
    with monkeypatch.context() as patched:
        patched.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patched.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    torch.save(network.state_dict(), tmp_path / "w.pth")
    sha256 = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    return inception_features(tmp_path / "w.pth", sha256=sha256), network


def test_inception_reads_8_bit_and_single_channel_images(inception):
    extract, network = inception
    gray = random_images(2, 1, 32, 32)
    read = extract(gray)
    levels = torch.from_numpy(np.rint(gray * 255).astype(np.uint8)).expand(-1, 3, -1, -1)
    pooled, logits = network(levels)
    torch.testing.assert_close(read.pooled, pooled)
    torch.testing.assert_close(read.logits, logits)
    assert read.spatial.shape == (2, 7 * 17 * 17) and (read.spatial >= 0).all() and read.spatial.std() > 0
    again = extract(np.repeat(gray, 3, 1))
    torch.testing.assert_close(again.spatial, read.spatial)


class FakeInception(torch.nn.Module):
    """Network with the interface of torch-fidelity's, whose features are sums of its input."""

    def __init__(self, name, features, feature_extractor_weights_path):
        super().__init__()
        assert features == ["2048", "logits_unbiased"] and Path(feature_extractor_weights_path).read_bytes() == b"w"
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.Mixed_6d = torch.nn.Module()
        self.Mixed_6d.branch1x1 = torch.nn.Conv2d(3, 9, 1, bias=False)
        torch.nn.init.constant_(self.Mixed_6d.branch1x1.weight, 1.0)
        self.Mixed_6d.branch1x1.weight.data *= torch.arange(9.0).view(9, 1, 1, 1)

    def forward(self, values):
        assert values.dtype == torch.uint8 and values.shape[1] == 3
        self.Mixed_6d.branch1x1(values.float())
        return values.double().sum((1, 2, 3))[:, None], -values.double().sum((1, 2, 3))[:, None]


def test_inception_features_are_outputs_of_the_layers_for_every_batch(tmp_path, monkeypatch):
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "w.pth").write_bytes(b"w")
    extract = inception_features(tmp_path / "w.pth", sha256=hashlib.sha256(b"w").hexdigest())
    for seed in (0, 1):
        images = 1.2 * random_images(2, 1, 3, 3, seed=seed) - 0.1
        levels = np.rint(255 * images.clip(0, 1)).astype(np.float64)
        read = extract(images)
        assert read.pooled[:, 0].tolist() == (3 * levels.sum((1, 2, 3))).tolist() == (-read.logits[:, 0]).tolist()
        positions = 3 * levels.reshape(2, 1, 9) * np.arange(7)[:, None]     # the first 7 of 9 channels
        assert np.allclose(read.spatial, positions.reshape(2, 63), rtol=1e-6)
        assert read.pooled.dtype == read.logits.dtype == read.spatial.dtype == torch.float32


# ---- labels against labels ----


def test_confusion_matrix_counts_target_by_predicted():
    matrix = confusion_matrix(predicted=[0, 1, 1, 2], target=[0, 0, 1, 2], num_classes=3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_classification_report_has_accuracy_per_class():
    report = classification_report([0, 1, 1], [0, 0, 1], ["tapin", "tapout", "wiggle"])
    assert report["accuracy"] == pytest.approx(2 / 3) and report["count"] == 3
    assert report["per_class"] == {"tapin": 0.5, "tapout": 1.0, "wiggle": None}
    assert json.loads(json.dumps(report)) == report


def test_labels_out_of_range_or_of_other_length_raise():
    with pytest.raises(ValueError, match="labels: expected 0 to 2, got 0 to 3"):
        confusion_matrix([0, 3], [0, 1], 3)
    with pytest.raises(ValueError, match="expected equal counts, got 1 predictions for 2 labels"):
        class_agreement([0], [0, 1])


def test_macro_f1_averages_over_classes_that_occur():
    assert macro_f1([[3, 0], [0, 2]]) == 1
    # Precision 3/4 and recall 3/5; precision 1/3 and recall 1/2; a class that neither occurs nor is predicted.
    assert macro_f1([[3, 2, 0], [1, 1, 0], [0, 0, 0]]) == pytest.approx((2 * 3 / 9 + 2 * 1 / 5) / 2)
    assert macro_f1([[1, 1], [0, 0]]) == pytest.approx(2 / 3 / 2)   # predicted, but never right


def test_calibration_error_is_the_mean_gap_of_confidence_and_accuracy():
    assert calibration_error(np.eye(3), [0, 1, 2]) == 0
    assert calibration_error(np.eye(2)[[0, 0, 1, 1]], [0, 1, 1, 0]) == 0.5
    # In one bin gaps of both signs cancel, in different ones they do not.
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]]
    assert calibration_error(probabilities, [0, 1, 1, 1]) == pytest.approx((0.4 + 0.4) / 2)
    assert calibration_error(probabilities, [0, 1, 1, 1], bins=1) == pytest.approx(0)
