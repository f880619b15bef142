import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from guided_diffusion_vae import metrics
from guided_diffusion_vae.evaluation import EvaluateConfig, RoundtripConfig, evaluate, failures, roundtrip
from guided_diffusion_vae.image_datasets import DataConfig, PictureFolder
from guided_diffusion_vae.sampling import write_npz
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


def extract(images):
    """Return features [n x 2] and the logits of a classifier that looks at the mean level."""
    mean = images.mean((1, 2, 3))
    return torch.stack([mean, images.std((1, 2, 3))], 1), torch.stack([0.4 - mean, mean - 0.4], 1)


# the round trip


def test_the_report_holds_the_means_over_all_pictures(tmp_path):
    pictures = PictureFolder(DATA, data_dir=folder_of(tmp_path / "data"))
    codec = HalvingCodec()
    report = roundtrip(codec, pictures, RoundtripConfig(batch_size=5), tmp_path / "run", CPU)
    images = pictures.batch(range(12))
    latents = codec.encode_batch(images)
    decoded, baseline = codec.decode_batch(latents), metrics.bicubic_baseline(images, 2)
    for name in ("psnr", "ssim", "l1"):
        for prefix, rival in (("", decoded), ("bicubic_", baseline)):
            expected = getattr(metrics, name)(images, rival).mean().item()
            assert report[prefix + name] == pytest.approx(expected, rel=1e-5)
    assert report["max_error"] == pytest.approx((images - decoded).abs().max().item())
    assert report["latent_mean"] == pytest.approx(latents.mean().item(), rel=1e-5)
    assert report["channel_std"] == pytest.approx([latents[:, 0].std(correction=0).item(), 0], rel=1e-5)
    assert report["dead_channels"] == [1] and report["pictures"] == 12 and report["latent_shape"] == [2, 8, 8]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == report
    assert (tmp_path / "run" / "roundtrip.png").is_file()


def test_a_part_of_the_pictures_is_spread_over_the_folder(tmp_path):
    pictures = PictureFolder(DATA, data_dir=folder_of(tmp_path / "data"))
    report = roundtrip(HalvingCodec(), pictures, RoundtripConfig(num_pictures=3), tmp_path, CPU)
    assert report["pictures"] == 3
    half = [(image - HalvingCodec().decode_batch(HalvingCodec().encode_batch(image))).abs().mean().item()
            for image in pictures.batch([0, 6, 11])[:, None]]
    assert report["l1"] == pytest.approx(np.mean(half), rel=1e-5)


def test_padding_is_cropped_back_before_anything_is_measured(tmp_path):
    folder = folder_of(tmp_path / "data", size=(15, 16))
    pictures = PictureFolder(DATA, multiple=(2, 2), data_dir=folder, image_size="15x16", pad=True)
    assert pictures.shape == (1, 16, 16)
    report = roundtrip(HalvingCodec(), pictures, RoundtripConfig(), tmp_path, CPU)
    images = pictures.batch(range(12))
    decoded = HalvingCodec().decode_batch(HalvingCodec().encode_batch(images))
    assert report["l1"] == pytest.approx((images - decoded)[:, :, :15].abs().mean().item(), rel=1e-5)


def test_every_missed_threshold_is_named():
    report = {"psnr": 20.0, "ssim": 0.5, "l1": 0.1, "dead_channels": []}
    assert failures(report, RoundtripConfig(min_psnr=20, min_ssim=0.5, max_l1=0.1)) == []
    assert failures(report, RoundtripConfig(min_psnr=20.5, min_ssim=0.6, max_l1=0.05)) == [
        "psnr is 20.0000, --min_psnr asks for at least 20.5", "ssim is 0.5000, --min_ssim asks for at least 0.6",
        "l1 is 0.1000, --max_l1 asks for at most 0.05",
    ]
    nothing = failures({"psnr": np.nan, "ssim": np.nan, "l1": np.nan, "dead_channels": []}, RoundtripConfig())
    assert [line.split(",")[0] for line in nothing] == ["psnr is nan", "ssim is nan", "l1 is nan"]
    dead, = failures({**report, "dead_channels": [2]}, RoundtripConfig())
    assert dead.startswith("latent channels [2] are dead")


# samples against pictures


@pytest.fixture
def samples(tmp_path):
    images, labels = levels(10, seed=5)
    return str(write_npz(tmp_path, images, labels, NAMES))


@pytest.fixture
def run(tmp_path, samples):
    def run(data=DATA, **fields):
        config = {"samples": samples, "reference": str(tmp_path / "val"), "batch_size": 4, **fields}
        return evaluate(EvaluateConfig(**config), data, extract, tmp_path / "run", NAMES)
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
    copies = str(write_npz(tmp_path, images, labels, NAMES))
    report = run(samples=copies, train_dir=folder_of(tmp_path / "train", seed=2))
    assert report["neighbours"]["median_distance_of_samples"] == 0
    assert report["neighbours"]["shown_pixel_l1"] == [0] * 12
    assert report["neighbours"]["median_distance_of_reference"] > 0


def test_samples_of_the_wrong_class_lower_the_agreement(run, tmp_path):
    images, labels = levels(10, seed=5)
    report = run(samples=str(write_npz(tmp_path, images, 1 - labels, NAMES)))
    assert report["class_agreement"]["accuracy"] == 0 and report["classifier_accuracy"]["accuracy"] == 1


def test_classes_are_matched_by_name_and_not_by_number(run, tmp_path):
    images, labels = levels(10, seed=5)
    report = run(samples=str(write_npz(tmp_path, images, 1 - labels, NAMES[::-1])))
    assert report["class_agreement"]["accuracy"] == 1


def test_paired_samples_get_the_round_trips_scores(run, tmp_path):
    images, labels = levels(12, seed=1)
    itself = str(write_npz(tmp_path, images, labels, NAMES))
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
    ({"reference": "nowhere"}, FileNotFoundError, "nowhere is not there"),
    ({"samples": "nowhere.npz"}, ValueError, "nowhere.npz is no batch of samples"),
])
def test_what_is_missing_is_named(run, fields, error, match):
    with pytest.raises(error, match=match):
        run(**fields)


def test_pictures_of_another_shape_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"holds pictures of shape \(1, 16, 16\), .*val of \(1, 8, 8\)"):
        run(data=DataConfig(image_size=8))
    config = EvaluateConfig(samples=str(tmp_path / "val"), reference=str(tmp_path / "val"), classifier_path="model.pt")
    with pytest.raises(ValueError, match=r"val holds .* \(1, 16, 16\), model.pt was trained on \(1, 32, 32\)"):
        evaluate(config, DATA, extract, tmp_path, NAMES, (1, 32, 32))


def test_classes_that_the_classifier_does_not_know_are_refused(run, tmp_path):
    images, labels = levels(10, seed=5)
    samples = write_npz(tmp_path, images, labels, ["dark", "grey"])
    with pytest.raises(ValueError, match=f"of {samples} have classes grey that the model does not know; it knows dark, "
                                         "light"):
        run(samples=str(samples))
    (tmp_path / "val" / "dark_00.png").rename(tmp_path / "val" / "black_00.png")
    with pytest.raises(ValueError, match=f"the pictures of {tmp_path}/val have classes black that"):
        run()
