"""Anomaly detection: metrics by their definitions, partial denoising with exact networks, and the script's steps."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.data import DataConfig, open_folder
from guided_diffusion_vae.evaluation import anomaly
from guided_diffusion_vae.evaluation.anomaly import (
    AnomalyConfig, Detector, auprc, auroc, bootstrap_interval, detect_anomalies, find_anomalous,
)
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.interfaces import ImageSource
from guided_diffusion_vae.runs import spaces, training
from guided_diffusion_vae.runs.factories import create_diffusion, create_model_and_diffusion_vae
from guided_diffusion_vae.sampling import Sampler
from guided_diffusion_vae.sampling.editing import levels
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec

CPU = torch.device("cpu")
STEPS = DiffusionConfig(diffusion_steps=200)
MEAN, STD = 0.1, 0.3    # of pixels in [-1, 1] of normal images


# --- Metrics ---


def test_auroc_and_auprc_of_constructed_scores():
    flags = np.array([False, False, True, False, True])
    assert auroc([1, 2, 3, 4, 5], flags) == 5 / 6       # one of six pairs is in the wrong order
    assert auprc([1, 2, 3, 4, 5], flags) == pytest.approx((1 + 2 / 3) / 2)
    for metric in (auroc, auprc):
        assert metric([0, 0, 1, 0, 1], flags) == 1
    assert auroc([1, 1, 0, 1, 0], flags) == 0
    assert auroc(np.zeros(5), flags) == 0.5 and auprc(np.zeros(5), flags) == 2 / 5


def test_auroc_of_exponential_scores_has_its_closed_form():
    # Scores of density a e^(-as) and b e^(-bs): the second is larger with probability a / (a + b).
    uniform = (np.arange(2000) + 0.5) / 2000
    scores = np.concatenate([-np.log(uniform) / 3, -np.log(uniform)])
    assert auroc(scores, np.arange(4000) >= 2000) == pytest.approx(3 / 4, abs=1e-3)


def test_metrics_equal_their_definitions_with_ties():
    rng = np.random.default_rng(0)
    scores, flags = rng.integers(0, 6, 60), rng.random(60) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in scores[flags] for b in scores[~flags]]
    assert auroc(scores, flags) == pytest.approx(np.mean(pairs))
    area = recall = 0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        area += flags[chosen].mean() * (flags[chosen].sum() / flags.sum() - recall)
        recall = flags[chosen].sum() / flags.sum()
    assert auprc(scores, flags) == pytest.approx(area)


def test_interval_contains_the_metric_and_narrows_with_more_images():
    rng = np.random.default_rng(0)
    widths = []
    for count in (40, 640):
        flags = np.arange(count) % 2 == 0
        scores = rng.normal(flags, 1)
        low, high = bootstrap_interval(auroc, scores, flags, 200)
        assert low < auroc(scores, flags) < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)
    assert bootstrap_interval(auprc, np.arange(6.0), np.arange(6) > 2, 20) == [1, 1]


# --- Scores ---


class Images(ImageSource):
    """Arrays [N x C x ...] as an image source with classes."""

    folder, class_names, preprocessing, fingerprint = "images", ["normal", "other"], {}, "f"

    def __init__(self, values, labels=None):
        self.values, self.labels = values, labels
        self.shape = self.unpadded_shape = tuple(values.shape[1:])
        self.names = [f"folder/{i}.png" for i in range(len(values))]

    def batch(self, indices, flips=None, rngs=None):
        return self.values[torch.as_tensor(indices)]


def exact(config):
    """Return the exact network of pixels that are independent and normal."""
    signal, noise = (torch.tensor(values) for values in levels(create_diffusion(config)))

    def network(x, t, **conditioning):
        a, b = (values[t].view(-1, *(1,) * (x.dim() - 1)) for values in (signal, noise))
        x_0 = MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (x - a * MEAN)
        return ((x - x_0) / b if config.process == "rectified_flow" else (x - a * x_0) / b).to(x.dtype)
    return network


def detector(images, labels=None, config=STEPS, levels=(0.3, 1.0), **fields):
    shape, process = tuple(images.shape[1:]), create_diffusion(config)
    sampler = Sampler(exact(config), process, shape, PixelCodec(shape[0], len(shape) - 1),
                      LatentNormalizer([0], [1], "none"), shape, clip_denoised=False)
    timesteps = {level: int(np.abs(np.log(process.noise_levels() / level)).argmin()) for level in levels}
    return Detector(sampler, Images(images, labels), timesteps, bound=False, **fields)


@pytest.mark.parametrize("process, stochastic", [("gaussian", True), ("rectified_flow", False)])
def test_partial_denoising_of_normal_pixels_has_the_exact_error(process, stochastic):
    # x0 given x_t is normal: its mean keeps r = STD^2 / (STD^2 + s^2) of a deviation, its variance is r s^2.
    pixels = torch.tensor([MEAN, MEAN + 0.5, MEAN - 0.8])
    images = ((pixels + 1) / 2).view(3, 1, 1, 1).expand(3, 1, 48, 48)
    part = detector(images, config=DiffusionConfig(process=process, diffusion_steps=200))
    scores, restored = part.score(range(3), CPU)
    for level, timestep in part.timesteps.items():
        s = part.sampler.diffusion.noise_levels()[timestep]
        assert s == pytest.approx(level, rel=0.1)
        r, away = STD**2 / (STD**2 + s**2), pixels.double() - MEAN
        kept = r if stochastic else r**0.5      # the exact path keeps the quantile
        error = (1 - kept) ** 2 * away**2 + kept**2 * s**2 + (r * s**2 if stochastic else 0)
        assert scores[f"denoising_{level:g}"] == pytest.approx(error.numpy() / 4, rel=0.08)     # of images in [0, 1]
        assert (2 * restored[level] - 1 - MEAN).mean((1, 2, 3)).tolist() == pytest.approx(
            (kept * away).tolist(), abs=0.05)


def test_scores_do_not_depend_on_the_batch():
    part = detector(torch.rand(3, 1, 6, 6))
    whole, single = part.score([0, 1, 2], CPU)[0], part.score([1], CPU)[0]
    assert all(single[name][0] == pytest.approx(values[1], rel=1e-5) for name, values in whole.items())


def test_neighbors_are_a_mean_distance_in_x0():
    images = torch.rand(4, 1, 2, 2)
    bank = torch.rand(9, 4)
    scores, _ = detector(images, bank=bank, neighbors=3).score(range(4), CPU)
    distances = torch.cdist(images.flatten(1) * 2 - 1, bank).sort(1).values[:, :3].mean(1)
    assert scores["neighbors"] == pytest.approx(distances.numpy(), rel=1e-5)
    assert "autoencoder" not in scores and "bound" not in scores


def test_bound_is_higher_for_images_unlike_normal_ones():
    pixels = torch.tensor([MEAN, MEAN + 0.9]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    noise = STD * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    part = dataclasses.replace(detector(((pixels + noise + 1) / 2).clamp(0, 1)), bound=True)
    normal, other = part.score([0, 1], CPU)[0]["bound"]
    assert other > normal + 1


# --- Files ---


def run(folder, part, **config):
    return detect_anomalies(part, AnomalyConfig(**{"batch_size": 2, "bootstrap": 20, "normal_classes": "normal",
                                                   **config}), folder, CPU)


def read(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("sides", [(6, 8), (4, 6, 4)])
def test_scores_maps_and_report_are_written(sides, tmp_path):
    images = torch.full((5, 1, *sides), (MEAN + 1) / 2)
    images[3:, ..., :3] = 1.0
    part = detector(images, np.array([0, 0, 0, 1, 1]), levels=(0.3,))
    report = run(tmp_path, part)
    assert report["num_images"] == 5 and report["num_anomalies"] == 2 and report["denoising_0.3"]["auroc"] == 1
    table = read(tmp_path / "scores.csv")
    assert [row["name"] for row in table] == part.source.names and [row["class"] for row in table][2:4] == [
        "normal", "other"]
    assert [row["anomaly"] for row in table] == list("00011")
    scores = np.array([float(row["denoising_0.3"]) for row in table])
    assert scores == pytest.approx(part.score(range(5), CPU)[0]["denoising_0.3"], rel=1e-5)
    kinds = {path.name.partition(".")[2] for path in (tmp_path / "maps").iterdir()}
    assert kinds == ({"png"} if len(sides) == 2 else {"png", "nii.gz"}) and (tmp_path / "anomalies.png").exists()
    if len(sides) == 3:
        nibabel = pytest.importorskip("nibabel")
        heat = nibabel.load(tmp_path / "maps" / "000003_3.nii.gz").get_fdata()
        assert heat.shape == sides and heat[..., :3].mean() > 1.5 * heat[..., 3:].mean()
    assert not (tmp_path / "scores").exists()


def test_interrupted_scores_are_resumed(tmp_path, monkeypatch):
    part = detector(torch.rand(5, 1, 4, 4), np.array([0, 0, 1, 0, 1]))
    complete = run(tmp_path / "complete", part)
    score, calls = Detector.score, []

    def fails(self, indices, device):
        calls.append(list(indices))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, indices, device)
    monkeypatch.setattr(Detector, "score", fails)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", part)
    with pytest.raises(ValueError, match="scores contains unfinished scores with another neighbors; use the same"):
        run(tmp_path / "resumed", part, neighbors=4)
    assert run(tmp_path / "resumed", part) == complete
    assert calls[:4] == [[0, 1], [2, 3], [2, 3], [4]]
    assert read(tmp_path / "resumed" / "scores.csv") == read(tmp_path / "complete" / "scores.csv")


def test_scores_are_complete_before_the_sheet(tmp_path, monkeypatch):
    monkeypatch.setattr(anomaly, "_sheet", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, detector(torch.rand(3, 1, 4, 4), np.array([0, 0, 1])))
    assert len(read(tmp_path / "scores.csv")) == 3


def test_scores_that_are_not_finite_raise(tmp_path):
    part = detector(torch.rand(2, 1, 4, 4))
    part = dataclasses.replace(part, sampler=dataclasses.replace(part.sampler, model=lambda x, t: x * float("nan")))
    with pytest.raises(FloatingPointError, match="scores of images 0 to 1 are not finite"):
        run(tmp_path, part, normal_classes="")


@pytest.mark.parametrize("labels, classes, match", [
    (None, "normal", "images has no classes; omit --normal_classes normal"),
    ([0, 1], "normal,big", "--normal_classes normal,big: images has no class big: expected some of: normal, other"),
    ([0, 1], "normal,other", "expected normal and other images in images, got 2 and 0"),
])
def test_normal_classes_that_do_not_fit_are_named(labels, classes, match):
    source = Images(torch.rand(2, 1, 2, 2), None if labels is None else np.array(labels))
    assert find_anomalous(source, "") is None
    with pytest.raises(ValueError, match=match):
        find_anomalous(source, classes)


# --- The script ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with images of two classes, and tiny models of them without and with classes."""
    folder = tmp_path_factory.mktemp("anomalies")
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (6, 8, 8), np.uint8), labels=np.arange(6) % 2,
             class_names=np.array(["a", "b"]))
    source, space = spaces.open_pixels(open_folder(DataConfig(data_dir=str(folder / "images.npz"), image_size=8)))
    process = DiffusionConfig(diffusion_steps=6, noise_schedule="cosine", predict_v=True)
    for name, fields in {"plain": {}, "classes": {"class_cond": True},
                         "dropout": {"class_cond": True, "class_dropout": 0.1}}.items():
        model = ModelConfig(num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="", **fields)
        model = training.infer_model_config(model, source)
        network, _ = create_model_and_diffusion_vae((1, 8, 8), model, process)
        header = training.diffusion_header(source, space, model, process)
        checkpoint_util.save_weights(folder / f"{name}.pt", network.state_dict(), {**header, "step": 1})
        if name == "plain":
            header = {**header, "model": {**header["model"], "condition_on": "speed"}}
            checkpoint_util.save_weights(folder / "attributes.pt", network.state_dict(), {**header, "step": 1})
    return folder


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("model", ["plain", "dropout"])
def test_script_scores_a_folder(model, trained, call, tmp_path):
    images = trained / "images.npz"
    status, _, err = call("detect_anomalies", model_path=trained / f"{model}.pt", data_dir=images, reference_dir=images,
                          neighbors=2, normal_classes="a", batch_size=4, logdir=tmp_path, noise_levels="0.5,1",
                          bootstrap=10)
    assert status == 0, err
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert {"denoising_0.5", "denoising_1", "bound", "neighbors"} <= set(report) and report["num_anomalies"] == 3
    assert len(read(tmp_path / "scores.csv")) == 6 and len(list((tmp_path / "maps").iterdir())) == 6


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("flags, match", [
    ({"model": "classes"}, "has classes and was trained without --class_dropout"),
    ({"model": "attributes"}, "was trained with --condition_on speed: the attributes of images to examine are unknown"),
    ({"noise_levels": "1e9"}, "--noise_levels 1e9: expected levels of"),
    ({"neighbors": 7}, "(--reference_dir) has 6 images: expected at least --neighbors 7; lower it"),
    ({"data_dir": ""}, "--data_dir is not set: expected images to examine"),
    ({"image_size": 4}, "conflicts with"),
])
def test_script_rejects_what_does_not_fit(flags, match, trained, call, tmp_path):
    images, model = trained / "images.npz", flags.pop("model", "plain")
    paths = {"model_path": trained / f"{model}.pt", "data_dir": images, "reference_dir": images, "logdir": tmp_path}
    status, _, err = call("detect_anomalies", **{**paths, **flags})
    assert status and match in err
