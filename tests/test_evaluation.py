import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from guided_diffusion_vae.data import DataConfig, ImageFolder, open_npz, to_uint8, write_npz
from guided_diffusion_vae.evaluation import comparison, image_metrics
from guided_diffusion_vae.evaluation.comparison import EvaluateConfig, evaluate
from guided_diffusion_vae.evaluation.features import Features
from guided_diffusion_vae.evaluation.image_metrics import bicubic_baseline
from guided_diffusion_vae.evaluation.roundtrip import RoundtripConfig, failed_thresholds, roundtrip
from guided_diffusion_vae.evaluation.set_metrics import FeatureStatistics, frechet_distance, inception_score
from guided_diffusion_vae.vae_wrapper import PixelCodec

CPU = torch.device("cpu")
NAMES = ["dark", "light"]
DATA = DataConfig(image_size=16)


class HalvingCodec(PixelCodec):
    """A codec that keeps the averages of 2 x 2 pixels, and a second channel of nothing."""

    factors, latent_channels, scale_factor = (2, 2), 2, 0.5

    def __init__(self):
        self.in_channels = 1

    def encode_moments(self, images):
        z = 0.5 * F.avg_pool2d(images, 2)
        return torch.cat([z, torch.zeros_like(z), torch.full_like(z, -30), torch.full_like(z, -30)], 1)

    def decode_batch(self, latents, channels=None):
        return F.interpolate(2 * latents[:, :1], scale_factor=2)


def levels(count, seed, size=(16, 16)):
    """Return pictures [N x 1 x H x W] uint8, dark and light ones in turn, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    return (rng.integers(0, 60, (count, 1, *size)) + 150 * labels[:, None, None, None]).astype(np.uint8), labels


def folder_of(path, count=12, seed=0, size=(16, 16)):
    path.mkdir()
    for i, (pixels, label) in enumerate(zip(*levels(count, seed, size))):
        Image.fromarray(pixels[0]).save(path / f"{NAMES[label]}_{i:02d}.png")
    return str(path)


def samples_file(folder, images, labels, names=NAMES):
    """Write pictures [N x 1 x H x W] as a file of samples; return its path."""
    last = np.moveaxis(images, 1, -1)
    path = folder / f"samples_{len(last)}.npz"
    write_npz(path, last.shape, [last], labels, names)
    return str(path)


def extract(images):
    """Return features [n x 2] and the logits of a classifier that looks at the mean level."""
    mean = images.mean((1, 2, 3))
    return Features(torch.stack([mean, images.std((1, 2, 3))], 1), torch.stack([0.4 - mean, mean - 0.4], 1))


# the round trip


def test_the_report_holds_the_means_over_all_pictures(tmp_path):
    pictures = ImageFolder(DATA, data_dir=folder_of(tmp_path / "data"))
    codec = HalvingCodec()
    report = roundtrip(codec, pictures, RoundtripConfig(batch_size=5), tmp_path / "run", CPU)
    images = pictures.batch(range(12))
    latents = codec.encode_batch(images)
    decoded, baseline = codec.decode_batch(latents), bicubic_baseline(images, 2)
    for name in ("psnr", "ssim", "l1"):
        for prefix, candidate in (("", decoded), ("bicubic_", baseline)):
            expected = getattr(image_metrics, name)(images, candidate).mean().item()
            assert report[prefix + name] == pytest.approx(expected, rel=1e-5)
    assert report["max_error"] == pytest.approx((images - decoded).abs().max().item())
    assert report["latent_mean"] == pytest.approx(latents.mean().item(), rel=1e-5)
    assert report["channel_std"] == pytest.approx([latents[:, 0].std(correction=0).item(), 0], rel=1e-5)
    assert report["dead_channels"] == [1] and report["pictures"] == 12 and report["latent_shape"] == [2, 8, 8]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == report
    assert (tmp_path / "run" / "roundtrip.png").is_file()


def test_reconstructions_are_samples_that_can_be_evaluated(tmp_path):
    pictures = ImageFolder(DATA, data_dir=folder_of(tmp_path / "data"))
    roundtrip(HalvingCodec(), pictures, RoundtripConfig(batch_size=5, save_npz=True), tmp_path / "run", CPU)
    made = open_npz(tmp_path / "run" / "reconstructions_12x16x16x1.npz")
    decoded = HalvingCodec().decode_batch(HalvingCodec().encode_batch(pictures.batch(range(12))))
    assert np.array_equal(np.moveaxis(made.images, -1, 1), to_uint8(decoded))
    assert made.labels.tolist() == pictures.labels.tolist() and made.class_names == pictures.class_names


def test_a_part_of_the_pictures_is_spread_over_the_folder(tmp_path):
    pictures = ImageFolder(DATA, data_dir=folder_of(tmp_path / "data"))
    report = roundtrip(HalvingCodec(), pictures, RoundtripConfig(num_pictures=3), tmp_path, CPU)
    assert report["pictures"] == 3
    half = [(image - HalvingCodec().decode_batch(HalvingCodec().encode_batch(image))).abs().mean().item()
            for image in pictures.batch([0, 6, 11])[:, None]]
    assert report["l1"] == pytest.approx(np.mean(half), rel=1e-5)


def test_padding_is_cropped_back_before_anything_is_measured(tmp_path):
    folder = folder_of(tmp_path / "data", size=(15, 16))
    pictures = ImageFolder(DATA, multiple=(2, 2), data_dir=folder, image_size="15x16", pad=True)
    assert pictures.shape == (1, 16, 16)
    report = roundtrip(HalvingCodec(), pictures, RoundtripConfig(), tmp_path, CPU)
    images = pictures.batch(range(12))
    decoded = HalvingCodec().decode_batch(HalvingCodec().encode_batch(images))
    assert report["l1"] == pytest.approx((images - decoded)[:, :, :15].abs().mean().item(), rel=1e-5)


def test_a_run_stands_for_the_samples_that_it_has_drawn(tmp_path):
    images = np.zeros((2, 4, 4, 1), np.uint8)
    for count in (2, 1):
        write_npz(tmp_path / f"samples_{count}x4x4x1.npz", (count, 4, 4, 1), [images[:count]])
        Image.fromarray(images[0, ..., 0]).save(tmp_path / "contact_sheet.png")
        if count == 2:
            assert len(comparison.open_images(tmp_path, DATA, "--samples")) == 2
    with pytest.raises(ValueError, match="samples_1x4x4x1.npz, samples_2x4x4x1.npz; give one of them as --samples"):
        comparison.open_images(tmp_path, DATA, "--samples")


def test_every_missed_threshold_is_named():
    report = {"psnr": 20.0, "ssim": 0.5, "l1": 0.1, "dead_channels": []}
    assert failed_thresholds(report, RoundtripConfig(min_psnr=20, min_ssim=0.5, max_l1=0.1)) == []
    assert failed_thresholds(report, RoundtripConfig(min_psnr=20.5, min_ssim=0.6, max_l1=0.05)) == [
        "psnr is 20.0000, --min_psnr asks for at least 20.5", "ssim is 0.5000, --min_ssim asks for at least 0.6",
        "l1 is 0.1000, --max_l1 asks for at most 0.05",
    ]
    nothing = failed_thresholds({"psnr": np.nan, "ssim": np.nan, "l1": np.nan, "dead_channels": []}, RoundtripConfig())
    assert [line.split(",")[0] for line in nothing] == ["psnr is nan", "ssim is nan", "l1 is nan"]
    dead, = failed_thresholds({**report, "dead_channels": [2]}, RoundtripConfig())
    assert dead.startswith("latent channels [2] are dead")


# samples against pictures


@pytest.fixture
def samples(tmp_path):
    images, labels = levels(10, seed=5)
    return samples_file(tmp_path, images, labels)


@pytest.fixture
def run(tmp_path, samples):
    def run(data=DATA, **fields):
        config = {"samples": samples, "reference": str(tmp_path / "val"), "batch_size": 4, **fields}
        return evaluate(EvaluateConfig(**config), data, extract, tmp_path / "run", extract, NAMES)
    folder_of(tmp_path / "val", seed=1)
    return run


def test_samples_are_held_against_pictures_classes_and_training_set(run, tmp_path):
    report = run(train_dir=folder_of(tmp_path / "train", seed=2))
    assert report["num_samples"] == 10 and report["num_reference"] == 12
    assert report["frechet"] < 0.01 and report["classifier_accuracy"]["accuracy"] == 1
    assert report["class_agreement"]["confusion"] == [[5, 0], [0, 5]]
    assert report["training_to_reference"]["num_training"] == 12
    assert report["neighbours"]["median_distance_of_samples"] > 0 and len(report["neighbours"]["shown_samples"]) == 10
    names = {"metrics.json", "confusion_samples.png", "confusion_reference.png", "neighbours.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == report


def test_copies_of_training_pictures_are_at_distance_nothing(run, tmp_path):
    images, labels = levels(12, seed=2)
    copies = samples_file(tmp_path, images, labels)
    report = run(samples=copies, train_dir=folder_of(tmp_path / "train", seed=2))
    assert report["neighbours"]["median_distance_of_samples"] == 0
    assert report["neighbours"]["shown_pixel_l1"] == [0] * 12
    assert report["neighbours"]["median_distance_of_reference"] > 0


def test_samples_of_the_wrong_class_lower_the_agreement(run, tmp_path):
    images, labels = levels(10, seed=5)
    report = run(samples=samples_file(tmp_path, images, 1 - labels))
    assert report["class_agreement"]["accuracy"] == 0 and report["classifier_accuracy"]["accuracy"] == 1


def test_classes_are_matched_by_name_and_not_by_number(run, tmp_path):
    images, labels = levels(10, seed=5)
    report = run(samples=samples_file(tmp_path, images, 1 - labels, NAMES[::-1]))
    assert report["class_agreement"]["accuracy"] == 1


def test_paired_samples_get_the_round_trips_scores(run, tmp_path):
    images, labels = levels(12, seed=1)
    itself = samples_file(tmp_path, images, labels)
    report = run(samples=itself, reference=itself, paired=True)
    assert report["l1"] == 0 and report["ssim"] == pytest.approx(1) and report["frechet"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="--paired True wants as many .*, found 10 and 12"):
        run(paired=True)


def test_a_folder_of_pictures_is_judged_like_an_npz(run, tmp_path):
    from_folder, from_npz = run(samples=folder_of(tmp_path / "made", count=10, seed=5)), run()
    assert from_folder["class_agreement"] == from_npz["class_agreement"]
    assert from_folder["kernel"] == pytest.approx(from_npz["kernel"])  # but for the order


@pytest.mark.parametrize("fields, error, match", [
    ({"samples": ""}, FileNotFoundError, "--samples is not given; it wants a folder of pictures or an .npz"),
    ({"reference": ""}, FileNotFoundError, "--reference is not given"),
    ({"reference": "nowhere"}, FileNotFoundError, "nowhere does not exist"),
    ({"samples": "nowhere.npz"}, FileNotFoundError, "nowhere.npz does not exist; check --samples"),
])
def test_what_is_missing_is_named(run, fields, error, match):
    with pytest.raises(error, match=match):
        run(**fields)


def test_pictures_of_another_shape_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"holds pictures of shape \(1, 16, 16\), .*val of \(1, 8, 8\)"):
        run(data=DataConfig(image_size=8))
    config = EvaluateConfig(samples=str(tmp_path / "val"), reference=str(tmp_path / "val"), classifier_path="model.pt")
    with pytest.raises(ValueError, match=r"val holds .* \(1, 16, 16\), model.pt was trained on \(1, 32, 32\)"):
        evaluate(config, DATA, extract, tmp_path, extract, NAMES, (1, 32, 32))


def blurred(images, width):
    """Return pictures [N x 1 x H x W] averaged over squares of `width` (odd) pixels."""
    padded = F.pad(images, (width // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, width, stride=1)


def bars(count, seed):
    """Return pictures [N x 1 x 16 x 16] in [0, 1] of bars at random angles, distances and places."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16]
    angle, period, shift = (rng.uniform(low, high, (count, 1, 1)) for low, high in ((0, np.pi), (3, 8), (0, 6)))
    along = x * np.cos(angle) + y * np.sin(angle)
    return torch.from_numpy(0.5 + 0.4 * np.sin(2 * np.pi * along / period + shift))[:, None]


def levels_and_edges(images):
    """Return features [n x 12]: levels and slopes in every quarter of the picture."""
    maps = [images[..., 1:, 1:], images.diff(dim=2)[..., 1:].abs(), images.diff(dim=3)[..., 1:, :].abs()]
    return Features(F.adaptive_avg_pool2d(torch.cat(maps, 1), 2).flatten(1))


@pytest.mark.parametrize("spoil, amounts", [
    (blurred, [1, 3, 5, 9]),
    (lambda x, s: (x + s * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)).clamp(0, 1),
     [0, 0.1, 0.3, 0.9]),
])
def test_every_distance_grows_with_blur_and_with_noise(tmp_path, spoil, amounts):
    reference, clean = bars(300, 0), bars(300, 1)
    reports = []
    for name, images in [("reference", reference), *((f"{a}", spoil(clean, a)) for a in amounts)]:
        levels = (images * 255).round().numpy().astype(np.uint8)
        write_npz(tmp_path / f"{name}.npz", (300, 16, 16, 1), [np.moveaxis(levels, 1, -1)])
    for amount in amounts:
        config = EvaluateConfig(samples=str(tmp_path / f"{amount}.npz"), reference=str(tmp_path / "reference.npz"))
        reports.append(evaluate(config, DATA, levels_and_edges, tmp_path))
    for name in ("frechet", "kernel"):
        values = [report[name] for report in reports]
        assert values == sorted(values) and values[-1] > 10 * abs(values[0])
    assert reports[0]["precision"] > 0.5 > reports[-1]["precision"]


def as_inception(images):
    """Return features [n x 2], logits [n x 3] and spatial features [n x 4] as the Inception network would."""
    corners = images[:, 0, ::8, ::8].flatten(1)
    return Features(extract(images).pooled, images[:, 0, 0, :3], corners)


def test_features_of_inception_go_by_the_names_of_fid(run, samples, tmp_path):
    config = EvaluateConfig(samples=samples, reference=str(tmp_path / "val"), batch_size=4)
    report = evaluate(config, DATA, as_inception, tmp_path / "run", extract, NAMES)
    assert {"fid", "sfid", "kid", "inception_score", "precision", "recall", "class_agreement"} <= set(report)
    images = (ImageFolder(DATA, data_dir=str(tmp_path / "val")).batch(range(12)),
              torch.from_numpy(levels(10, 5)[0] / 255))
    spatial = [FeatureStatistics().update(as_inception(x.float()).spatial) for x in images]
    assert report["sfid"] == pytest.approx(frechet_distance(*spatial), rel=1e-4)
    logits = as_inception(images[1].float()).logits
    assert report["inception_score"] == pytest.approx(inception_score(logits), rel=1e-5)


@pytest.mark.parametrize("with_images", [False, True])
def test_statistics_of_a_reference_file_are_taken_as_they_are(samples, tmp_path, with_images):
    images = torch.from_numpy(levels(10, 5)[0] / 255).float()
    read = as_inception(images)
    pooled, spatial = (FeatureStatistics().update(x) for x in (read.pooled, read.spatial))
    arrays = {"mu": pooled.mean + 3, "sigma": pooled.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if with_images:
        arrays["arr_0"] = np.moveaxis(levels(10, 5)[0], 1, -1)
    np.savez(tmp_path / "reference.npz", **arrays)
    config = EvaluateConfig(samples=samples, reference=str(tmp_path / "reference.npz"), inception_path="weights")
    report = evaluate(config, DATA, as_inception, tmp_path)
    assert report["fid"] == pytest.approx(2 * 9, rel=1e-6) and report["sfid"] == pytest.approx(0, abs=1e-6)
    assert ("precision" in report) == ("kid" in report) == with_images


def test_statistics_alone_cannot_be_judged(run, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match="statistics.npz holds statistics and no pictures; --samples wants"):
        run(samples=str(tmp_path / "statistics.npz"))


def test_classes_that_the_classifier_does_not_know_are_refused(run, tmp_path):
    images, labels = levels(10, seed=5)
    samples = samples_file(tmp_path, images, labels, ["dark", "grey"])
    with pytest.raises(ValueError, match=f"{samples} has classes grey that the model does not have; expected some of: dark, "
                                         "light"):
        run(samples=str(samples))
    (tmp_path / "val" / "dark_00.png").rename(tmp_path / "val" / "black_00.png")
    with pytest.raises(ValueError, match=f"{tmp_path}/val has classes black that"):
        run()
