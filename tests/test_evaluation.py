import json
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig, ImageFolder, open_npz, to_uint8, write_npz
from guided_diffusion_vae.evaluation import (
    PAIRED_METRICS, EvaluateConfig, EvaluationClassifier, Features, FeatureStatistics, HeldOutData, ImageSet,
    LikelihoodConfig, RoundtripConfig, SampleFile, bicubic_baseline, comparison, evaluate, failed_thresholds,
    frechet_distance, inception_score, likelihood, open_sample_file, roundtrip, set_metrics,
)
from guided_diffusion_vae.nn import keyed_seed
from guided_diffusion_vae.runs import loading, tstr
from guided_diffusion_vae.runs.run import Run
from guided_diffusion_vae.runs.spaces import Space
from guided_diffusion_vae.train_util import ClassifierTrainConfig
from guided_diffusion_vae.unet import ClassifierConfig
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec

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


@pytest.fixture
def on_two_ranks(monkeypatch):
    """Call a function in two threads, each of which is a rank; return the results by rank."""
    this, meeting, items = threading.local(), threading.Barrier(2, timeout=60), [None, None]

    def gather(item):
        items[this.rank] = pickle.dumps(item)
        meeting.wait()
        gathered = list(map(pickle.loads, items))
        meeting.wait()
        return gathered

    def on_rank(function, rank):
        this.rank = rank
        return function()

    def call(function):
        for name, value in (("rank", lambda: this.rank), ("world_size", lambda: 2), ("gather_objects", gather)):
            monkeypatch.setattr(dist_util, name, value)
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(on_rank, [function] * 2, range(2)))
    return call


def flat(report, at=""):
    """Return the numbers of a nested report by their path."""
    if isinstance(report, (dict, list)):
        pairs = report.items() if isinstance(report, dict) else enumerate(report)
        return {path: value for key, item in pairs for path, value in flat(item, f"{at}/{key}").items()}
    return {at: report}


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


def test_reconstructions_of_a_subset_have_the_labels_and_axes_of_their_images(tmp_path):
    (tmp_path / "data").mkdir()
    for i, label in enumerate("aababbbab"):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{label}_{i}.png")
    source = ImageFolder(DataConfig(image_size="8x16"), data_dir=str(tmp_path / "data"))
    codec = PixelCodec(3)
    report = roundtrip(codec, source, RoundtripConfig(max_samples=5, save_npz=True), tmp_path, CPU)
    written, chosen = open_npz(tmp_path / "reconstructions_5x8x16x3.npz"), [0, 2, 4, 6, 8]
    assert written.labels.tolist() == source.labels[chosen].tolist() != source.labels[:5].tolist()
    images = source.batch(chosen)
    assert np.array_equal(written.images, to_uint8(images).transpose(0, 2, 3, 1)) and report["num_images"] == 5
    x0 = 2 * images - 1
    assert report["latent_std"] == pytest.approx(x0.std(correction=0).item(), rel=1e-5)
    assert report["channel_mean"] == pytest.approx(x0.mean((0, 2, 3)).tolist(), abs=1e-6)


@pytest.mark.parametrize("std, dead", [(2e-3, []), (5e-4, [1])])
def test_channels_below_a_thousandth_of_the_largest_are_dead(tmp_path, std, dead):
    class Codec(HalvingCodec):
        def encode_batch(self, images, eps=None):
            wave = torch.tensor([-1.0, 1.0]).repeat(4).expand(len(images), 1, 8, 8)
            return torch.cat([wave, std * wave], 1)

    source = ImageFolder(DATA, data_dir=write_folder(tmp_path / "data", count=2))
    assert roundtrip(Codec(), source, RoundtripConfig(), tmp_path, CPU)["dead_channels"] == dead


def test_roundtrip_crops_the_padding(tmp_path):
    folder = write_folder(tmp_path / "data", size=(15, 16))
    source = ImageFolder(DATA, multiple=(2, 2), data_dir=folder, image_size="15x16", pad=True)
    assert source.shape == (1, 16, 16)
    report = roundtrip(HalvingCodec(), source, RoundtripConfig(), tmp_path, CPU)
    images = source.batch(range(12))
    decoded = HalvingCodec().decode_batch(HalvingCodec().encode_batch(images))
    assert report["l1"] == pytest.approx((images - decoded)[:, :, :15].abs().mean().item(), rel=1e-5)
    bicubic = torch.from_numpy(bicubic_baseline(images, 2))
    assert report["bicubic_l1"] == pytest.approx((images - bicubic)[:, :, :15].abs().mean().item(), rel=1e-5)


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
    def run(data=DATA, extract_features=extract, image_shape=None, seed=0, **fields):
        config = EvaluateConfig(**{"samples": samples, "reference": str(tmp_path / "val"), "batch_size": 4, **fields})
        loading.require_sets(config)
        sets = loading.open_sets(Run("evaluate", [config, data], {}))
        classifier = EvaluationClassifier(extract, NAMES, image_shape)
        return evaluate(config, sets, extract_features, tmp_path / "run", classifier, seed)
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
    names = {"confusion_samples.png", "confusion_reference.png", "nearest_neighbors.png", "nearest_neighbors.npz"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    old = {"median_distance_of_samples": "median_distance_samples", "shown_samples": "example_indices",  # alias
           "median_distance_of_reference": "median_distance_reference", "shown_pixel_l1": "example_pixel_l1",  # alias
           "share_suspiciously_near": "memorized_fraction"}  # alias
    assert written(tmp_path / "run", report) == {
        **report, "neighbours": {name: nearest[key] for name, key in old.items()},  # alias
    }


def by_definition(real, generated, k=3):
    """Return the distances of two sets of features [N x 2] by the definitions, with loops."""
    a, b = np.cov(real.T), np.cov(generated.T)
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))     # trace of the root of a 2x2 matrix
    frechet = ((real.mean(0) - generated.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    kernel = lambda x, y: (x @ y / 2 + 1) ** 3
    within = [np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
              for x in (real, generated)]
    between = np.mean([kernel(x, y) for x in real for y in generated])

    def covered(points, centers):
        radii = [sorted(np.linalg.norm(centers - center, axis=1))[k] for center in centers]
        return np.mean([(np.linalg.norm(centers - point, axis=1) <= radii).any() for point in points])
    return {"frechet": frechet, "kernel": sum(within) - 2 * between, "precision": covered(generated, real),
            "recall": covered(real, generated)}


def varied_images(count, seed):
    """Return images [N x 1 x 16 x 16] uint8 of different intensity and contrast, and random labels."""
    rng = np.random.default_rng(seed)
    low, width = rng.integers(0, 120, (count, 1, 1, 1)), rng.integers(10, 130, (count, 1, 1, 1))
    return (low + width * rng.random((count, 1, 16, 16))).astype(np.uint8), rng.integers(0, 2, count)


@pytest.fixture
def varied(tmp_path):
    """Write sets of different sizes, with copies of training images among the samples; return {flag: path}."""
    sets = {"reference": varied_images(23, 5), "samples": varied_images(30, 2), "train_dir": varied_images(17, 4)}
    sets["samples"][0][[4, 9, 20]] = sets["train_dir"][0][[16, 2, 2]]
    for name, (images, labels) in sets.items():
        (tmp_path / name).mkdir()
        samples_file(tmp_path / name, images, labels)
    return {name: str(next((tmp_path / name).iterdir())) for name in sets}


def test_evaluate_reports_numbers_of_the_definitions(run, varied, monkeypatch):
    report = run(**varied)
    images = {name: open_sample_file(path).images for name, path in varied.items()}
    pixels = {name: source.batch(range(len(source))) for name, source in images.items()}
    features, logits = ({name: extract(x)[i].double().numpy() for name, x in pixels.items()} for i in (0, 1))
    real, generated, training = (features[name] for name in ("reference", "samples", "train_dir"))
    expected = by_definition(real, generated)
    assert 0 < expected["precision"] != expected["recall"] < 1
    assert {name: report[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    expected = {"num_training": 17, **by_definition(real, training)}
    assert report["training_to_reference"] == pytest.approx(expected, rel=1e-5, abs=1e-6)

    distances, held_out = (np.linalg.norm(x[:, None] - training, axis=2) for x in (generated, real))
    nearest, rows = report["nearest_neighbors"], [round(i * 29 / 11) for i in range(12)]
    assert nearest["median_distance_samples"] == pytest.approx(np.median(distances.min(1)), rel=1e-5)
    assert nearest["median_distance_reference"] == pytest.approx(np.median(held_out.min(1)), rel=1e-5)
    expected = np.mean(distances.min(1) < np.quantile(held_out.min(1), 0.01))
    assert 3 / 30 <= expected < 0.5 and nearest["memorized_fraction"] == pytest.approx(expected)
    assert nearest["example_indices"] == rows
    expected = [(pixels["samples"][i] - pixels["train_dir"][distances[i].argmin()]).abs().mean().item() for i in rows]
    assert nearest["example_pixel_l1"] == pytest.approx(expected, rel=1e-5)

    for key, name in (("classifier_accuracy", "reference"), ("class_agreement", "samples")):
        pairs = list(zip(images[name].labels, logits[name].argmax(1)))
        expected = [[pairs.count((row, column)) for column in range(2)] for row in range(2)]
        assert report[key]["confusion"] == expected and expected[0][1] != expected[1][0]
        assert report[key]["count"] == len(pairs)
    monkeypatch.setattr(set_metrics, "kernel_distance", lambda a, b, seed, progress: seed)
    assert run(**varied, seed=7)["kernel"] == 7


@pytest.mark.parametrize("distinct", [False, True])
def test_two_ranks_report_the_numbers_of_one(run, varied, on_two_ranks, distinct):
    # Classifier and features are one function, or two that are applied separately.
    features = inception if distinct else extract
    one = flat(run(extract_features=features, batch_size=3, **varied))
    first, second = on_two_ranks(lambda: run(extract_features=features, batch_size=3, **varied))
    assert flat(first) == pytest.approx(one, rel=1e-6, abs=1e-9)
    assert flat(second) == pytest.approx({key: one[key] for key in flat(second)}, rel=1e-6, abs=1e-9)
    assert not distinct or {"/fid", "/sfid", "/kid", "/inception_score"} <= set(one)
    images = open_sample_file(varied["samples"]).images     # classes are those of the classifier in both cases
    predicted = extract(images.batch(range(30))).logits.argmax(1).numpy()
    assert one["/class_agreement/accuracy"] == np.mean(predicted == images.labels)


def test_images_are_read_once_for_features_and_classes(run, varied, monkeypatch):
    read, batch = [], SampleFile.batch
    monkeypatch.setattr(SampleFile, "batch", lambda self, rows: read.extend((self.folder, row) for row in rows)
                        or batch(self, rows))
    monkeypatch.setattr(comparison, "_nearest_neighbor_report", lambda *args: {})
    report = run(extract_features=inception, **varied)
    assert {"inception_score", "class_agreement", "classifier_accuracy"} <= set(report)
    counts = {varied["reference"]: 23, varied["samples"]: 30, varied["train_dir"]: 17}
    assert sorted(read) == sorted((path, row) for path, count in counts.items() for row in range(count))


def test_radii_of_a_set_are_computed_once(run, varied, monkeypatch):
    lengths, radii = [], set_metrics.ball_radii
    monkeypatch.setattr(set_metrics, "ball_radii", lambda x, **kwargs: lengths.append(len(x)) or radii(x, **kwargs))
    run(**varied)
    assert sorted(lengths) == [17, 23, 30]


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


def test_paired_scores_are_means_over_all_samples(run, tmp_path):
    real, labels = varied_images(10, 1)
    shifted = (real + np.arange(10)[:, None, None, None] ** 2).astype(np.uint8)
    (tmp_path / "shifted").mkdir()
    files = samples_file(tmp_path / "shifted", shifted, labels), samples_file(tmp_path, real, labels)
    report = run(samples=files[0], reference=files[1], paired=True)
    errors = [(i / 255) ** 2 for i in (j**2 for j in range(10))]
    assert report["l1"] == pytest.approx(np.mean([j**2 for j in range(10)]) / 255, rel=1e-6)
    assert report["psnr"] == pytest.approx(np.mean([100, *(-10 * math.log10(e) for e in errors[1:])]), rel=1e-6)


def test_samples_of_any_shape_are_read_in_unit_range(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", images)
    source = open_sample_file(str(tmp_path / "samples.npz")).images
    assert source.shape == (3, 4, 6)
    assert torch.equal(source.batch([2, 0]), torch.from_numpy(images[[2, 0]] / np.float32(255)).permute(0, 3, 1, 2))


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


def test_statistics_of_a_reference_file_do_not_apply_to_other_features(run, tmp_path):
    images, labels = images_and_labels(10, seed=5)
    np.savez(tmp_path / "reference.npz", np.moveaxis(images, 1, -1), mu=np.full(2, 9.0), sigma=np.eye(2))
    assert run(reference=str(tmp_path / "reference.npz"))["frechet"] == pytest.approx(0, abs=1e-6)


def test_spatial_statistics_require_the_pooled_ones(samples, tmp_path):
    np.savez(tmp_path / "part.npz", mu_s=np.zeros(4), sigma_s=np.eye(4))
    with pytest.raises(ValueError, match="part.npz: expected statistics mu and sigma with mu_s and sigma_s, got mu_s, "
                                         "sigma_s; use another file"):
        open_sample_file(tmp_path / "part.npz")
    statistics = FeatureStatistics.from_moments(np.zeros(4), np.eye(4))
    sets = {"samples": open_sample_file(samples), "reference": ImageSet("part.npz", None, {"spatial": statistics})}
    with pytest.raises(ValueError, match="part.npz: expected statistics mu and sigma"):
        evaluate(EvaluateConfig(inception_path="weights"), sets, inception, tmp_path)


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


# --- Classifiers of samples ---


@pytest.fixture
def utility(tmp_path, monkeypatch):
    """Measure `run_tstr` with classifiers of random weights; return (report, what was trained on, networks)."""
    trained, networks = [], []
    train_classifier, load_classifier = tstr.train_classifier, tstr.load_classifier

    def train(run, source, space):
        trained.append((run, source))
        train_classifier(run, source, space)

    def load(weights):
        network = load_classifier(weights)
        torch.manual_seed(len(networks))
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        networks.append((network, weights.header))
        return network

    def measure(**paths):
        config = EvaluateConfig(**{name: str(path) for name, path in paths.items()}, tstr_iterations=2,
                                tstr_batch_size=5, batch_size=6)
        classifier = ClassifierConfig(classifier_width=64, classifier_depth=1, classifier_channel_mult="1",
                                      classifier_attention_resolutions="")
        train_config = ClassifierTrainConfig(val_data_dir="nowhere", seed=3)
        data = DataConfig(image_size=16, value_range="0,300")       # of folders; samples have 8 bits
        run = Run("evaluate", [config, data, classifier, train_config], {}, tmp_path / "run")
        trained.clear()
        networks.clear()
        report = tstr.run_tstr(run, tstr.open_tstr_datasets(run, loading.open_sets(run)))
        return report, list(trained), list(networks)

    monkeypatch.setattr(tstr, "train_classifier", train)
    monkeypatch.setattr(tstr, "load_classifier", load)
    return measure


def test_classifiers_of_samples_and_training_images_are_tested_on_real_ones(utility, varied, tmp_path):
    report, trained, networks = utility(**varied)
    assert list(report) == ["train_on_samples_test_on_real", "train_on_training_test_on_real"]
    for name, result, (inner, source), (network, header) in zip(("samples", "train_dir"), report.values(), trained,
                                                                networks, strict=True):
        expected = open_npz(varied[name])
        assert torch.equal(source.batch([3, 1])[0], torch.from_numpy(expected.images[[3, 1]] / np.float32(127.5) - 1
                                                                     ).permute(0, 3, 1, 2))
        train = inner[ClassifierTrainConfig]
        assert (train.iterations, train.batch_size, train.noised, train.seed) == (2, 5, False, 3)
        assert train.val_data_dir == ""
        assert header["step"] == 2 and header["noised"] is False and header["classes"] == NAMES
        real = open_npz(varied["reference"])
        with torch.no_grad():
            x0 = torch.from_numpy(real.images / np.float32(127.5) - 1).permute(0, 3, 1, 2)
            predicted = network(x0, torch.zeros(23, dtype=torch.long)).argmax(1).numpy()
        confusion = [[int(((real.labels == row) & (predicted == column)).sum()) for column in (0, 1)] for row in (0, 1)]
        assert result["confusion"] == confusion and result["count"] == 23 and confusion[0][1] != confusion[1][0]


def test_classifiers_are_matched_by_name_and_trained_again_for_other_samples(utility, varied, tmp_path):
    report = utility(**varied)[0]
    renamed = open_npz(varied["reference"])     # the same classes, numbered in the other order
    write_npz(tmp_path / "renamed.npz", renamed.images.shape, [renamed.images], 1 - renamed.labels, NAMES[::-1])
    assert utility(**{**varied, "reference": tmp_path / "renamed.npz"})[0] == report
    folders = sorted((tmp_path / "run").iterdir())
    assert len(folders) == 2    # the same samples: nothing was trained again
    utility(samples=varied["reference"], reference=varied["reference"])
    assert len(list((tmp_path / "run").glob("trained_on_samples_*"))) == 2


def test_sets_without_enough_images_or_with_volumes_are_rejected(utility, varied, tmp_path, monkeypatch):
    np.savez(tmp_path / "volumes.npz", np.zeros((8, 4, 4, 4, 1), np.uint8), np.zeros(8, int))
    with pytest.raises(ValueError, match="volumes.npz contains volumes: --tstr_iterations expects images"):
        utility(**{**varied, "samples": tmp_path / "volumes.npz"})
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match="statistics.npz contains statistics: --tstr_iterations expects images"):
        utility(**{**varied, "reference": tmp_path / "statistics.npz"})
    monkeypatch.setattr(dist_util, "world_size", lambda: 5)
    monkeypatch.setattr(dist_util, "broadcast_object", lambda source: source)
    with pytest.raises(ValueError, match="train_dir.* has 17 images: expected at least 25, one training step"):
        utility(**varied)


# --- Likelihood ---


class Latents:
    """Latent source of five items, whose latents [N x 1 x 2] are their indices."""

    folder = "latents"

    def __len__(self):
        return 5

    def read(self, items):
        return items

    def latents(self, items, device):
        return torch.as_tensor(items, dtype=torch.float32, device=device).view(-1, 1, 1).repeat(1, 1, 2)


class Bound:
    """Process whose bound depends on x0, class, clipping and noise."""

    def __init__(self, noise=1.0):
        self.noise = noise

    def calc_bpd_loop(self, model, x_start, clip_denoised, model_kwargs):
        rows = x_start.flatten(1) + 10 * clip_denoised
        total = rows.sum(1) + 100 * model_kwargs.get("y", 0) + self.noise * torch.randn(len(x_start))
        return {"total_bpd": total, "vb": rows, "mse": rows + 1, "xstart_mse": rows + 2}


LABELS = np.array([2, 0, 1, 1, 2])
NORMALIZER = LatentNormalizer([-1.0], [0.5], "channel")


def measure(folder, pixels=False, labels=LABELS, noise=1.0, **config):
    """Return the report of `likelihood` and the means of its terms."""
    folder.mkdir(exist_ok=True)
    space = Space(SimpleNamespace(is_pixels=pixels), NORMALIZER)
    config = LikelihoodConfig(**{"batch_size": 2, "num_samples": 9, "clip_denoised": False, **config})
    report = likelihood(None, Bound(noise), HeldOutData(Latents(), space, labels), config, folder)
    terms = {path.name: np.load(path)["arr_0"] for path in folder.iterdir()} if dist_util.rank() == 0 else {}
    return report, terms


@pytest.mark.parametrize("pixels, clip, labels, seed", [
    (True, True, None, 0), (False, False, LABELS, 0), (False, True, LABELS, 3),
])
def test_likelihood_is_the_mean_of_the_bounds_in_its_unit(tmp_path, pixels, clip, labels, seed):
    report, terms = measure(tmp_path, pixels, labels, clip_denoised=clip, seed=seed)
    noise = []
    for start, count in ((0, 2), (2, 2), (4, 1)):     # batches
        torch.manual_seed(keyed_seed(seed, 11, start))
        noise += torch.randn(count).tolist()
    x0 = (np.arange(5) + 1) / 0.5 + 10 * clip
    unit = 1 if pixels else math.log(2)     # bits to nats
    bounds = unit * (2 * x0 + (0 if labels is None else 100 * labels) + noise)
    expected = {"bits_per_dim" if pixels else "nats_per_latent_dim": bounds.mean(),
                "standard_error": bounds.std() / math.sqrt(5), "count": 5}
    assert report == pytest.approx(expected, rel=1e-5)
    expected = {"vb_terms.npz": unit * x0.mean(), "mse_terms.npz": x0.mean() + 1, "xstart_mse_terms.npz": x0.mean() + 2}
    assert {name: values.tolist() for name, values in terms.items()} == {
        name: pytest.approx([value] * 2) for name, value in expected.items()}


def test_likelihood_of_two_ranks_equals_that_of_one(tmp_path, on_two_ranks):
    # Threads share one generator of noise, so that there is none.
    report, terms = measure(tmp_path / "one", noise=0.0)
    (first, both), (second, _) = on_two_ranks(lambda: measure(tmp_path / "two", noise=0.0))
    assert first == second == pytest.approx(report)
    assert all(both[name] == pytest.approx(values) for name, values in terms.items())


def test_likelihood_of_a_subset_is_evenly_spaced(tmp_path):
    report, terms = measure(tmp_path, num_samples=3, batch_size=3)
    assert report["count"] == 3 and terms["mse_terms.npz"].tolist() == pytest.approx([(2 + 6 + 10) / 3 + 1] * 2)
