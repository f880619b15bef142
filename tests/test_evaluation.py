import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from guided_diffusion_vae.data import DataConfig, ImageFolder, open_npz, to_uint8, write_npz
from guided_diffusion_vae.evaluation import (
    PAIRED_METRICS, EvaluateConfig, EvaluationClassifier, Features, FeatureStatistics, RoundtripConfig,
    bicubic_baseline, evaluate, failed_thresholds, frechet_distance, inception_score, open_sample_file, roundtrip,
)
from guided_diffusion_vae.runs import loading
from guided_diffusion_vae.runs.run import Run
from guided_diffusion_vae.vae_wrapper import PixelCodec

CPU = torch.device("cpu")
NAMES = ["dark", "light"]
DATA = DataConfig(image_size=16)


class HalvingCodec(PixelCodec):
    """Codec of the averages of 2 x 2 pixels, with a second channel of zeros."""

    factors, latent_channels, scale_factor = (2, 2), 2, 0.5

    def __init__(self):
        self.in_channels = 1

    def encode_moments(self, images):
        z = 0.5 * F.avg_pool2d(images, 2)
        return torch.cat([z, torch.zeros_like(z), torch.full_like(z, -30), torch.full_like(z, -30)], 1)

    def decode_batch(self, latents, channels=None):
        return F.interpolate(2 * latents[:, :1], scale_factor=2)


def images_and_labels(count, seed, size=(16, 16)):
    """Return images [N x 1 x H x W] uint8, alternating dark and light, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    return (rng.integers(0, 60, (count, 1, *size)) + 150 * labels[:, None, None, None]).astype(np.uint8), labels


def write_folder(path, count=12, seed=0, size=(16, 16)):
    path.mkdir()
    for i, (pixels, label) in enumerate(zip(*images_and_labels(count, seed, size))):
        Image.fromarray(pixels[0]).save(path / f"{NAMES[label]}_{i:02d}.png")
    return str(path)


def samples_file(folder, images, labels, names=NAMES):
    """Write images [N x 1 x H x W] as a file of samples; return its path."""
    last = np.moveaxis(images, 1, -1)
    path = folder / f"samples_{len(last)}.npz"
    write_npz(path, last.shape, [last], labels, names)
    return str(path)


def extract(images):
    """Return features [n x 2] and the logits of a classifier of the mean intensity."""
    mean = images.mean((1, 2, 3))
    return Features(torch.stack([mean, images.std((1, 2, 3))], 1), torch.stack([0.4 - mean, mean - 0.4], 1))


# --- Round trip ---


def test_roundtrip_reports_means_over_all_images(tmp_path):
    source = ImageFolder(DATA, data_dir=write_folder(tmp_path / "data"))
    codec = HalvingCodec()
    report = roundtrip(codec, source, RoundtripConfig(batch_size=5), tmp_path / "run", CPU)
    images = source.batch(range(12))
    latents = codec.encode_batch(images)
    decoded, baseline = codec.decode_batch(latents), bicubic_baseline(images, 2)
    for name, metric in PAIRED_METRICS.items():
        for prefix, candidate in (("", decoded), ("bicubic_", baseline)):
            expected = metric(images, candidate).mean().item()
            assert report[prefix + name] == pytest.approx(expected, rel=1e-5)
    assert report["max_error"] == pytest.approx((images - decoded).abs().max().item())
    assert report["latent_mean"] == pytest.approx(latents.mean().item(), rel=1e-5)
    assert report["channel_std"] == pytest.approx([latents[:, 0].std(correction=0).item(), 0], rel=1e-5)
    assert report["dead_channels"] == [1] and report["num_images"] == 12 and report["latent_shape"] == [2, 8, 8]
    assert written(tmp_path / "run", report) == {**report, "pictures": 12}  # alias
    assert (tmp_path / "run" / "roundtrip.png").is_file()


def test_a_new_paired_metric_is_one_function_and_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setitem(PAIRED_METRICS, "bias", lambda a, b: (b - a).flatten(1).mean(1).double())
    images, labels = images_and_labels(12, seed=1)
    itself = samples_file(tmp_path, images, labels)
    assert run(samples=itself, reference=itself, paired=True)["bias"] == 0
    source = ImageFolder(DATA, data_dir=str(tmp_path / "val"))
    report = roundtrip(HalvingCodec(), source, RoundtripConfig(), tmp_path / "run", CPU)
    assert {"bias", "bicubic_bias"} <= set(report)


def test_reconstructions_are_samples_that_can_be_evaluated(tmp_path):
    source = ImageFolder(DATA, data_dir=write_folder(tmp_path / "data"))
    roundtrip(HalvingCodec(), source, RoundtripConfig(batch_size=5, save_npz=True), tmp_path / "run", CPU)
    reconstructions = open_npz(tmp_path / "run" / "reconstructions_12x16x16x1.npz")
    decoded = HalvingCodec().decode_batch(HalvingCodec().encode_batch(source.batch(range(12))))
    assert np.array_equal(np.moveaxis(reconstructions.images, -1, 1), to_uint8(decoded))
    assert reconstructions.labels.tolist() == source.labels.tolist()
    assert reconstructions.class_names == source.class_names


def test_roundtrip_of_a_subset_is_evenly_spaced(tmp_path):
    source = ImageFolder(DATA, data_dir=write_folder(tmp_path / "data"))
    report = roundtrip(HalvingCodec(), source, RoundtripConfig(max_samples=3), tmp_path, CPU)
    assert report["num_images"] == 3
    half = [(image - HalvingCodec().decode_batch(HalvingCodec().encode_batch(image))).abs().mean().item()
            for image in source.batch([0, 6, 11])[:, None]]
    assert report["l1"] == pytest.approx(np.mean(half), rel=1e-5)


def test_roundtrip_crops_the_padding(tmp_path):
    folder = write_folder(tmp_path / "data", size=(15, 16))
    source = ImageFolder(DATA, multiple=(2, 2), data_dir=folder, image_size="15x16", pad=True)
    assert source.shape == (1, 16, 16)
    report = roundtrip(HalvingCodec(), source, RoundtripConfig(), tmp_path, CPU)
    images = source.batch(range(12))
    decoded = HalvingCodec().decode_batch(HalvingCodec().encode_batch(images))
    assert report["l1"] == pytest.approx((images - decoded)[:, :, :15].abs().mean().item(), rel=1e-5)


def test_a_run_folder_means_its_samples(tmp_path):
    images = np.zeros((2, 4, 4, 1), np.uint8)
    for count in (2, 1):
        write_npz(tmp_path / f"samples_{count}x4x4x1.npz", (count, 4, 4, 1), [images[:count]])
        Image.fromarray(images[0, ..., 0]).save(tmp_path / "contact_sheet.png")
        if count == 2:
            assert len(loading.open_set(tmp_path, DATA, "--samples")) == 2
    with pytest.raises(ValueError, match="samples_1x4x4x1.npz, samples_2x4x4x1.npz; use one of them as --samples"):
        loading.open_set(tmp_path, DATA, "--samples")


def test_generated_images_are_read_with_8_bits_whatever_the_real_range(tmp_path):
    folder, data = write_folder(tmp_path / "png", count=2), DataConfig(image_size=16, value_range="0,100")
    ranged = loading.open_set(folder, data, "--samples").images.batch([0])
    (tmp_path / "png" / ".sampling").touch()
    generated = loading.open_set(folder, data, "--samples").images.batch([0])
    torch.testing.assert_close(generated * 2.55, ranged)


def test_failed_thresholds_are_listed():
    report = {"psnr": 20.0, "ssim": 0.5, "l1": 0.1, "dead_channels": []}
    assert failed_thresholds(report, RoundtripConfig(min_psnr=20, min_ssim=0.5, max_l1=0.1)) == []
    assert failed_thresholds(report, RoundtripConfig(min_psnr=20.5, min_ssim=0.6, max_l1=0.05)) == [
        "psnr 20.0000 must be >= 20.5 (--min_psnr)", "ssim 0.5000 must be >= 0.6 (--min_ssim)",
        "l1 0.1000 must be <= 0.05 (--max_l1)",
    ]
    nothing = failed_thresholds({"psnr": np.nan, "ssim": np.nan, "l1": np.nan, "dead_channels": []}, RoundtripConfig())
    assert [line.split(" must")[0] for line in nothing] == ["psnr nan", "ssim nan", "l1 nan"]
    dead, = failed_thresholds({**report, "dead_channels": [2]}, RoundtripConfig())
    assert dead.startswith("latent channels [2] are dead")


# --- Samples and real images ---


def written(folder, report):
    """Return metrics.json of a run with a report."""
    Run("evaluate", [], {}, folder).write_report(report)
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def samples(tmp_path):
    images, labels = images_and_labels(10, seed=5)
    return samples_file(tmp_path, images, labels)


@pytest.fixture
def run(tmp_path, samples):
    def run(data=DATA, extract_features=extract, image_shape=None, **fields):
        config = EvaluateConfig(**{"samples": samples, "reference": str(tmp_path / "val"), "batch_size": 4, **fields})
        loading.require_sets(config)
        sets = loading.open_sets(Run("evaluate", [config, data], {}))
        classifier = EvaluationClassifier(extract, NAMES, image_shape)
        return evaluate(config, sets, extract_features, tmp_path / "run", classifier)
    write_folder(tmp_path / "val", seed=1)
    return run


def test_evaluate_compares_images_classes_and_training_set(run, tmp_path):
    report = run(train_dir=write_folder(tmp_path / "train", seed=2))
    assert report["num_samples"] == 10 and report["num_reference"] == 12
    assert report["frechet"] < 0.01 and report["classifier_accuracy"]["accuracy"] == 1
    assert report["class_agreement"]["confusion"] == [[5, 0], [0, 5]]
    assert report["training_to_reference"]["num_training"] == 12
    nearest = report["nearest_neighbors"]
    assert nearest["median_distance_samples"] > 0 and len(nearest["example_indices"]) == 10
    assert nearest["memorized_fraction"] < 0.5
    names = {"confusion_samples.png", "confusion_reference.png", "nearest_neighbors.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    old = {"median_distance_of_samples": "median_distance_samples", "shown_samples": "example_indices",  # alias
           "median_distance_of_reference": "median_distance_reference", "shown_pixel_l1": "example_pixel_l1",  # alias
           "share_suspiciously_near": "memorized_fraction"}  # alias
    assert written(tmp_path / "run", report) == {
        **report, "neighbours": {name: nearest[key] for name, key in old.items()},  # alias
    }


def test_copies_of_training_images_are_at_distance_zero(run, tmp_path):
    images, labels = images_and_labels(12, seed=2)
    copies = samples_file(tmp_path, images, labels)
    report = run(samples=copies, train_dir=write_folder(tmp_path / "train", seed=2))
    assert report["nearest_neighbors"]["median_distance_samples"] == 0
    assert report["nearest_neighbors"]["example_pixel_l1"] == [0] * 12
    assert report["nearest_neighbors"]["memorized_fraction"] == 1
    assert report["nearest_neighbors"]["median_distance_reference"] > 0


def test_samples_of_the_wrong_class_lower_the_agreement(run, tmp_path):
    images, labels = images_and_labels(10, seed=5)
    report = run(samples=samples_file(tmp_path, images, 1 - labels))
    assert report["class_agreement"]["accuracy"] == 0 and report["classifier_accuracy"]["accuracy"] == 1


def test_classes_are_matched_by_name(run, tmp_path):
    images, labels = images_and_labels(10, seed=5)
    report = run(samples=samples_file(tmp_path, images, 1 - labels, NAMES[::-1]))
    assert report["class_agreement"]["accuracy"] == 1


def test_paired_samples_have_scores_of_the_round_trip(run, tmp_path):
    images, labels = images_and_labels(12, seed=1)
    itself = samples_file(tmp_path, images, labels)
    report = run(samples=itself, reference=itself, paired=True)
    assert report["l1"] == 0 and report["ssim"] == pytest.approx(1) and report["frechet"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="--paired True: expected 12 samples, .*, got 10"):
        run(paired=True)


def test_a_folder_is_evaluated_like_an_npz(run, tmp_path):
    from_folder, from_npz = run(samples=write_folder(tmp_path / "made", count=10, seed=5)), run()
    assert from_folder["class_agreement"] == from_npz["class_agreement"]
    assert from_folder["kernel"] == pytest.approx(from_npz["kernel"])  # up to the order


@pytest.mark.parametrize("fields, error, match", [
    ({"samples": ""}, FileNotFoundError, "--samples is not set: expected a folder of images or an .npz"),
    ({"reference": ""}, FileNotFoundError, "--reference is not set"),
    ({"reference": "nowhere"}, FileNotFoundError, "nowhere does not exist"),
    ({"samples": "nowhere.npz"}, FileNotFoundError, "nowhere.npz does not exist; check --samples"),
])
def test_missing_paths_raise_with_their_flag(run, fields, error, match):
    with pytest.raises(error, match=match):
        run(**fields)


def test_images_of_another_shape_raise(run, tmp_path):
    with pytest.raises(ValueError, match=r"contains images of shape \(1, 16, 16\), but .*val requires \(1, 8, 8\)"):
        run(data=DataConfig(image_size=8))
    with pytest.raises(ValueError, match=r"val contains .* \(1, 16, 16\), but model.pt requires \(1, 32, 32\)"):
        run(samples=str(tmp_path / "val"), classifier_path="model.pt", image_shape=(1, 32, 32))


def blurred(images, width):
    """Return images [N x 1 x H x W] averaged over squares of `width` (odd) pixels."""
    padded = F.pad(images, (width // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, width, stride=1)


def bars(count, seed):
    """Return images [N x 1 x 16 x 16] in [0, 1] of bars at random angles, distances and offsets."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16]
    angle, period, shift = (rng.uniform(low, high, (count, 1, 1)) for low, high in ((0, np.pi), (3, 8), (0, 6)))
    along = x * np.cos(angle) + y * np.sin(angle)
    return torch.from_numpy(0.5 + 0.4 * np.sin(2 * np.pi * along / period + shift))[:, None]


def intensities_and_edges(images):
    """Return features [n x 12]: intensities and slopes in every quarter of the image."""
    maps = [images[..., 1:, 1:], images.diff(dim=2)[..., 1:].abs(), images.diff(dim=3)[..., 1:, :].abs()]
    return Features(F.adaptive_avg_pool2d(torch.cat(maps, 1), 2).flatten(1))


@pytest.mark.parametrize("degrade, amounts", [
    (blurred, [1, 3, 5, 9]),
    (lambda x, s: (x + s * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)).clamp(0, 1),
     [0, 0.1, 0.3, 0.9]),
])
def test_distances_increase_with_blur_and_noise(tmp_path, degrade, amounts):
    reference, clean = bars(300, 0), bars(300, 1)
    reports = []
    for name, images in [("reference", reference), *((f"{a}", degrade(clean, a)) for a in amounts)]:
        values = (images * 255).round().numpy().astype(np.uint8)
        write_npz(tmp_path / f"{name}.npz", (300, 16, 16, 1), [np.moveaxis(values, 1, -1)])
    for amount in amounts:
        sets = {name: open_sample_file(str(tmp_path / f"{file}.npz"))
                for name, file in (("samples", amount), ("reference", "reference"))}
        reports.append(evaluate(EvaluateConfig(), sets, intensities_and_edges, tmp_path))
    for name in ("frechet", "kernel"):
        values = [report[name] for report in reports]
        assert values == sorted(values) and values[-1] > 10 * abs(values[0])
    assert reports[0]["precision"] > 0.5 > reports[-1]["precision"]


def inception(images):
    """Return features [n x 2], logits [n x 3] and spatial features [n x 4] like those of the Inception network."""
    corners = images[:, 0, ::8, ::8].flatten(1)
    return Features(extract(images).pooled, images[:, 0, 0, :3], corners)


def test_inception_features_are_reported_as_fid(run, tmp_path):
    report = run(extract_features=inception)
    assert {"fid", "sfid", "kid", "inception_score", "precision", "recall", "class_agreement"} <= set(report)
    images = (ImageFolder(DATA, data_dir=str(tmp_path / "val")).batch(range(12)),
              torch.from_numpy(images_and_labels(10, 5)[0] / 255))
    spatial = [FeatureStatistics().update(inception(x.float()).spatial) for x in images]
    assert report["sfid"] == pytest.approx(frechet_distance(*spatial), rel=1e-4)
    logits = inception(images[1].float()).logits
    assert report["inception_score"] == pytest.approx(inception_score(logits), rel=1e-5)


@pytest.mark.parametrize("with_images", [False, True])
def test_statistics_of_a_reference_file_are_used_unchanged(samples, tmp_path, with_images):
    images = torch.from_numpy(images_and_labels(10, 5)[0] / 255).float()
    read = inception(images)
    pooled, spatial = (FeatureStatistics().update(x) for x in (read.pooled, read.spatial))
    arrays = {"mu": pooled.mean + 3, "sigma": pooled.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if with_images:
        arrays["arr_0"] = np.moveaxis(images_and_labels(10, 5)[0], 1, -1)
    np.savez(tmp_path / "reference.npz", **arrays)
    sets = {"samples": open_sample_file(samples), "reference": open_sample_file(tmp_path / "reference.npz")}
    report = evaluate(EvaluateConfig(inception_path="weights"), sets, inception, tmp_path)
    assert report["fid"] == pytest.approx(2 * 9, rel=1e-6) and report["sfid"] == pytest.approx(0, abs=1e-6)
    assert ("precision" in report) == ("kid" in report) == with_images


def test_statistics_without_images_are_rejected_as_samples(run, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match="statistics.npz contains statistics and no images, which --samples and"):
        run(samples=str(tmp_path / "statistics.npz"))


def test_unknown_classes_raise(run, tmp_path):
    images, labels = images_and_labels(10, seed=5)
    samples = samples_file(tmp_path, images, labels, ["dark", "gray"])
    with pytest.raises(ValueError, match=f"{samples} has classes gray that the model does not have; expected some of: "
                                         "dark, light"):
        run(samples=str(samples))
    (tmp_path / "val" / "dark_00.png").rename(tmp_path / "val" / "black_00.png")
    with pytest.raises(ValueError, match=f"{tmp_path}/val has classes black that"):
        run()
