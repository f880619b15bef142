"""The augmentation study: shares by recordings, arms with paired seeds, and samples of models that saw too much."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import checkpoint_util, dist_util, logger
from guided_diffusion_vae.commands import augmentation_study
from guided_diffusion_vae.data import DataConfig, open_colormap, open_folder, write_npz
from guided_diffusion_vae.data.labels import read_column
from guided_diffusion_vae.evaluation import study
from guided_diffusion_vae.evaluation.study import (
    Arm, Images, Share, StudyConfig, find_share, interval, list_arms, run_study, split_validation, summarize,
)
from guided_diffusion_vae.files import read_record, write_record
from guided_diffusion_vae.runs.study import find_groups, fingerprint_of_rows
from guided_diffusion_vae.runs.study_models import find_fingerprint
from guided_diffusion_vae.vae_wrapper import PixelCodec

CPU = torch.device("cpu")
TINY = StudyConfig(seeds=2, steps=8, batch_size=8, width=2, strengths="1", ratios="1")


# --- Shares ---


def recordings():
    """Return (groups, labels): class 0 has recordings a_2 (4 images) and a_10 (6), class 1 has b (10)."""
    return np.array(["a_10"] * 6 + ["a_2"] * 4 + ["b"] * 10), np.array([0] * 10 + [1] * 10)


@pytest.mark.parametrize("text, rows", [
    ("all", range(20)), ("2", range(20)), ("7", range(20)), ("1", range(6, 20)), ("100%", range(20)),
    ("50%", [0, 1, 2, 6, 7, 10, 11, 12, 13, 14]), ("1:50%", [6, 7, 10, 11, 12, 13, 14]), ("1%", [0, 6, 10]),
])
def test_shares_are_first_recordings_and_first_parts_of_each(text, rows):
    assert find_share(text, *recordings()).tolist() == list(rows)


@pytest.mark.parametrize("text", ["", "%", "0", "0%", "101%", "half", "1:", "1:2", "1%2", ":5%"])
def test_shares_of_another_form_are_rejected(text):
    with pytest.raises(ValueError, match=f"--shares {re.escape(text)}: expected N "):
        find_share(text, *recordings())


def test_last_recording_or_last_fifth_of_a_class_validates():
    groups, labels = recordings()
    fitted, validation = split_validation(groups, labels, np.arange(20))
    assert validation.tolist() == [*range(6), 18, 19] and fitted.tolist() == [*range(6, 18)]
    fitted, validation = split_validation(groups, labels, np.arange(6, 20))
    assert validation.tolist() == [9, 18, 19] and fitted.tolist() == [6, 7, 8, *range(10, 18)]
    with pytest.raises(ValueError, match="one image of a class"):
        split_validation(groups, labels, np.array([6, 10, 11]))


# --- Trainings ---


def images(count, seed=0, level=0.3):
    """Return `Images` of noise, which are brighter on the left or on the right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    values = rng.random((count, 1, 32, 32), np.float32) / 2
    for value, label in zip(values, labels):
        value[:, :, 16 * label:16 * label + 16] += level
    return Images(torch.from_numpy(values), torch.from_numpy(labels))


@pytest.mark.parametrize("arm, synthetic", [
    (Arm(), 0), (Arm(1, 0, "s"), 4), (Arm(3, 0, "s"), 6), (Arm(1 / 3, 0, "s"), 2), (Arm(math.inf, 0, "s"), 8)])
def test_batches_have_the_ratio_of_their_arm_and_the_classes_of_their_seed(arm, synthetic, monkeypatch):
    seen, labels = [], []

    class Recorder(torch.nn.Linear):
        def forward(self, batch):
            seen.append(batch[:, 0, 0, 0])
            return super().forward(batch[:, 0, 0, :1])

    class Functional:
        def cross_entropy(self, logits, target):
            labels.append(target)
            return torch.nn.functional.cross_entropy(logits, target)

    monkeypatch.setattr(study, "create_network", lambda *_: Recorder(1, 2))
    monkeypatch.setattr(study, "F", Functional())
    real, samples = (Images(torch.full((6, 1, 8, 8), value), torch.arange(6) % 2) for value in (0.0, 1.0))
    for seed in (3, 3, 4):
        next(study.train(real, samples, arm, seed, TINY, [8], CPU))
    next(study.train(real, None, Arm(), 3, TINY, [8], CPU))
    values, classes = torch.stack(seen).view(4, 8, 8), torch.stack(labels).view(4, 8, 8)
    assert torch.equal((values[:3] == 1).sum(2), torch.full((3, 8), synthetic)) and (values.abs() == 1).all()
    assert torch.equal(classes[0], classes[1]) and not torch.equal(classes[0], classes[2])
    assert torch.equal(classes[0], classes[3]) and (values[3] == -1).all()      # another arm has the same classes
    assert classes.float().mean() == pytest.approx(0.5, abs=0.15)
    next(study.train(real, samples.select(samples.labels == 0), arm, 3, TINY, [8], CPU))     # none of class 1
    assert torch.equal(torch.stack(seen[-8:]) == 1, (classes[0] == 0) & (torch.arange(8) < synthetic))


def test_labels_of_samples_alone_are_smoothed(monkeypatch):
    targets = []
    monkeypatch.setattr(study.F, "cross_entropy", lambda logits, target: targets.append(target) or logits.sum())
    config = dataclasses.replace(TINY, label_smoothing=0.2)
    next(study.train(images(8), images(8), Arm(1, 0, "s"), 0, config, [1], CPU))
    assert torch.allclose(targets[0].amax(1), torch.tensor([0.9] * 4 + [1.0] * 4))
    assert torch.allclose(targets[0].sum(1), torch.ones(8))


def test_filter_omits_samples_of_wrong_classes_and_counts_them(tmp_path, monkeypatch):
    trained, lines = [], []

    def train(real, samples, arm, seed, config, stops, device):
        trained.append((arm, seed, samples))
        return (study.create_network(1, 2, 2) for _ in stops)

    brighter = lambda network, values, device: torch.stack([values[..., :16].mean((1, 2, 3)),
                                                            values[..., 16:].mean((1, 2, 3))], 1).double()
    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "predict", brighter)
    monkeypatch.setattr(study, "log_rank0", lines.append)
    samples = images(8, 2)
    samples = samples._replace(labels=torch.tensor([0, 1, 0, 1, 0, 1, 1, 1]))   # the seventh one has a wrong class
    share = Share("all", np.arange(8), {"s": samples}, {"s": "1"})
    run = lambda **settings: run_study(dataclasses.replace(TINY, **settings), images(8), np.array(["a", "b"] * 4),
                                       images(8, 1), [share], ["left", "right"], tmp_path, "s", CPU)
    report = run(filter_samples=True)
    assert report["shares"]["all"]["filtered"] == {"s": {"left": [3, 3], "right": [4, 5]}}
    assert "share all: 7 of 8 samples of s are kept: left 3 of 3, right 4 of 5" in lines
    filters = [arm for arm, seed, _ in trained if seed == study.FILTER_SEED]
    assert filters == [Arm(0, 1, "s")] and share.samples == {"s": samples}
    used = [part for arm, _, part in trained if arm.ratio]
    assert used and all(torch.equal(part.images, samples.images[[0, 1, 2, 3, 4, 5, 7]]) for part in used)
    for settings in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.2, "filter_samples": True}):
        trained.clear()     # other settings of samples: others are trained again, with their results apart
        assert ("filtered" in run(**settings)["shares"]["all"]) == ("filter_samples" in settings)
        assert len(trained) == 6 and all(arm.source == "s" for arm, *_ in trained)
    trained.clear()
    assert run(filter_samples=True) == report and not trained
    share.samples["s"] = samples._replace(labels=1 - images(8).labels)
    share.digests["s"] = "2"
    with pytest.raises(ValueError, match="--filter_samples True omits all samples of left, right of s in share all: "):
        run(filter_samples=True)


def test_scalars_of_a_colormap_are_augmented(monkeypatch):
    seen = []
    monkeypatch.setattr(study, "create_network", lambda *_: torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2)))
    monkeypatch.setattr(torch.nn.AdaptiveAvgPool2d, "forward", lambda _, x: seen.append(x) or x[..., :1, :1])
    gray, jet = images(8), open_colormap("jet")
    colors = torch.from_numpy(jet.to_colors(gray.images[:, 0].numpy())).movedim(-1, 1) / 255
    for colormap in (jet, None):
        next(study.train(Images(colors, gray.labels, colormap).select(range(8)), None, Arm(0, 1), 0, TINY, [1], CPU))
    far = [jet.to_scalars((127.5 * (batch + 1)).round().byte().movedim(1, -1).numpy())[1].max() for batch in seen]
    assert far[0] == 0 < far[1]


def test_trainings_of_a_seed_start_equal_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    networks = [next(study.train(images(20), None, Arm(strength=strength), seed, dataclasses.replace(TINY, lr=1e-12),
                                 [1], CPU)) for strength, seed in ((0, 1), (1, 1), (0, 2))]
    weights = [network[0].weight.detach() for network in networks]
    assert torch.allclose(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_measured_metrics_are_those_of_the_predictions():
    class Fixed(torch.nn.Module):
        def forward(self, batch):
            return 40 * batch.mean((1, 2, 3))[:, None] * torch.tensor([[1.0, -1.0, 0.0]])   # class 0 of bright images

    values = torch.tensor([1.0, 1, 0, 0, 0]).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    report = study.measure(Fixed(), Images(values, torch.tensor([0, 1, 1, 1, 0])), CPU)
    assert report["accuracy"] == pytest.approx(0.6) and report["error"] == pytest.approx(0.4)
    assert report["recall"] == [0.5, pytest.approx(2 / 3), None]
    assert report["macro_f1"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert report["calibration_error"] == pytest.approx(0.4) and report["cross_entropy"] == pytest.approx(0.4 * 80)


def test_interval_is_that_of_students_t():
    assert interval([1, 2, 3, 4]) == pytest.approx([2.5, 2.5 - 3.1824463 * 0.6454972, 2.5 + 3.1824463 * 0.6454972])
    assert interval([2, 2]) == [2, 2, 2]


def test_differences_are_paired_with_the_chosen_and_the_best_strength():
    result = lambda error: {**dict.fromkeys(study.METRICS, 0.0), "error": error, "recall": [1 - error]}
    errors = {"real": [0.5, 0.6], "classical 0.5": [0.3, 0.4], "classical 1": [0.2, 0.2],
              "classical + synthetic 1:1": [0.25, 0.37]}
    report = summarize({name: list(map(result, values)) for name, values in errors.items()}, 0.5)
    assert (report["baseline"], report["best_classical"]) == ("classical 0.5", "classical 1")
    both = report["arms"]["classical + synthetic 1:1"]
    assert both["difference"] == pytest.approx(interval([-0.05, -0.03]))
    assert both["relative_difference"][0] == pytest.approx(-0.04 / 0.35)
    assert both["difference_to_best"][0] == pytest.approx(0.11)
    table = study.verdict({"shares": {"1": report}})
    assert table == [f"share 1: classical + synthetic 1:1: error 31.00% instead of 35.00% with classical 0.5 alone: "
                     f"-11% [{(-0.04 - 12.7062 * 0.01) / 0.35:+.0%}, {(-0.04 + 12.7062 * 0.01) / 0.35:+.0%}], "
                     "not significantly different"]


def test_arms_are_all_mixtures_of_their_share():
    arms = list_arms(StudyConfig(strengths="0.5,1", ratios="1,2"), 0.5, ["s"])
    assert arms == {
        "real": Arm(), "classical 0.5": Arm(0, 0.5), "classical 1": Arm(0, 1), "synthetic": Arm(math.inf, 0, "s"),
        "real + synthetic 1:1": Arm(1, 0, "s"), "real + synthetic 1:2": Arm(2, 0, "s"),
        "classical + synthetic 1:1": Arm(1, 0.5, "s"), "classical + synthetic 1:2": Arm(2, 0.5, "s")}
    assert list(list_arms(TINY, 1.0, [])) == ["real", "classical 1"]
    assert list_arms(TINY, 1.0, ["s"]).keys() - list_arms(TINY, 1.0, ["s"], incomplete=["s"]) == {"synthetic"}
    assert "synthetic of b" in list_arms(TINY, 1.0, ["a", "b"])


def test_study_finds_what_samples_are_worth_and_repeats_no_training(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, steps=14, batch_size=16, width=4, lr=0.01)
    real, test, good = images(8), images(64, 1), images(64, 2)
    bad = Images(good.images, 1 - good.labels)
    shares = [Share("all", np.arange(8), {"good": good, "bad": bad}, {"good": "1", "bad": "2"})]
    run = lambda config=config, settings="s": run_study(
        config, real, np.array(["a", "b"] * 4), test, shares, ["left", "right"], tmp_path, settings, CPU)
    report = run()
    share = report["shares"]["all"]
    error = {name: values["error"][0] for name, values in share["arms"].items()}
    assert error["synthetic of good"] < 0.1 < 0.9 < error["synthetic of bad"] and share["strength"] == 1
    assert json.loads((tmp_path / "study.json").read_text()) == report and (tmp_path / "study.png").exists()
    rows = list(csv.DictReader((tmp_path / "study.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(error) and set(rows[0]) >= {"share", "arm", "seed", "error", "recall_left"}
    for name, value in error.items():
        assert np.mean([float(row["error"]) for row in rows if row["arm"] == name]) == pytest.approx(value, abs=1e-5)

    trained = []

    def train(real, samples, arm, seed, config, stops, device):
        trained.append((arm, seed))
        return (study.create_network(1, 2, 2) for _ in stops)

    lines = []
    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "log_rank0", lines.append)
    assert run() == report and trained == []
    run(dataclasses.replace(config, seeds=3))
    reused = f"trainings: {2 * len(error)} trainings are reused from {tmp_path / 'trainings'}, {len(error)} are new"
    assert reused in lines
    assert {seed for _, seed in trained} == {2} and len(trained) == len(error)
    trained.clear()
    shares[0].digests["bad"] = "3"
    run()
    assert {arm.source for arm, _ in trained} == {"bad"}    # other samples
    trained.clear()
    run(settings="t")
    assert len(trained) == 2 * len(error) + study.SELECTION_SEEDS   # other images
    record = next((tmp_path / "trainings").iterdir())
    record.write_text(record.read_text().replace("0.", "1.", 1))
    with pytest.raises(ValueError, match="is corrupt or was edited.*remove it: the training is repeated"):
        run(), run(settings="t")


def test_ranks_share_the_trainings(tmp_path, monkeypatch):
    tasks, done = [(Share("all", np.arange(2), {}, {}), Arm(), seed) for seed in range(5)], []
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    monkeypatch.setattr(dist_util, "gather_objects", lambda own: done.append(own) or done)
    for rank in (0, 1):
        monkeypatch.setattr(dist_util, "rank", lambda rank=rank: rank)
        with monkeypatch.context() as context:
            context.setattr(study, "progress", lambda items, _: items)
            if rank == 0:
                with pytest.raises(KeyError):   # before the other rank has added its results
                    study._run("trainings", tasks, lambda share, arm, seed: seed, [], tmp_path)
            else:
                assert study._run("trainings", tasks, lambda share, arm, seed: seed, [], tmp_path) == [0, 1, 2, 3, 4]
    assert [sorted(own) for own in done] == [[0, 2, 4], [1, 3]]


# --- Images and samples of the command ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with train/ (recordings 1 and 3 of two classes) and val/ (recording 2), of four images each."""
    folder = tmp_path_factory.mktemp("study")
    for split, numbers in (("train", (1, 3)), ("val", (2,))):
        (folder / split).mkdir()
        for label, name in enumerate(("left", "right")):
            for number in numbers:
                for i, image in enumerate(images(8, number).images[label::2]):
                    Image.fromarray((255 * image[0]).clamp(0, 255).byte().numpy()).save(
                        folder / split / f"{name}_r{number}_{i:03d}.png")
    return folder


def command(folders, tmp_path, config=(TINY,), **settings):
    """Run the command and return its report."""
    run = augmentation_study.main.create_run(config, **{
        "data_dir": folders / "train", "val_data_dir": folders / "val", "image_size": 32, "group_by": r"_r(\d+)_",
        "shares": "1,all", "logdir": tmp_path / "study", "report": False, **settings})
    try:
        return augmentation_study.main.execute(run)
    finally:
        logger.reset()


def network(path, source, fingerprint, autoencoder=None, **header):
    """Save weights whose header has a fingerprint of images, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint_util.save_weights(path, {"w": torch.zeros(1)}, {
        "kind": "diffusion", "autoencoder": autoencoder or PixelCodec(1).describe(), "data": source.preprocessing,
        "data_count": 4, "data_fingerprint": fingerprint, **header})
    return path


def sampled(folder, **paths):
    """Write samples of networks {flag: path} into a folder, as a sampling script does, and return the folder."""
    folder.mkdir()
    made = images(12, 5)
    pixels = (255 * made.images).byte().numpy().transpose(0, 2, 3, 1)
    write_npz(folder / "samples_12x32x32x1.npz", pixels.shape, [pixels], made.labels.numpy(), ["left", "right"])
    sha256 = {{"model_path": "model", "guide_model_path": "guide_model"}[flag]: checkpoint_util.find_weights(path)[1]
              for flag, path in paths.items()}
    write_record(folder / "sampling.json", {
        "samples": "samples_12x32x32x1.npz", "paths": {flag: str(path) for flag, path in paths.items()},
        "settings": sha256})
    return folder


def test_samples_belong_to_the_share_that_their_networks_saw(folders, tmp_path):
    command(folders, tmp_path, dry_run=True)
    assert not (tmp_path / "study").exists()
    report = command(folders, tmp_path)     # creates the folder on which a model of the first share is trained
    assert [len(share["arms"]) for share in report["shares"].values()] == [2, 2]
    shared = open_folder(DataConfig(data_dir=str(tmp_path / "study/shares/1"), image_size=32))
    source = open_folder(DataConfig(data_dir=str(folders / "train"), image_size=32))
    assert sorted(shared.names) == [name for name in source.names if "_r1_" in name]
    assert fingerprint_of_rows(source, find_share("1", np.array(find_groups(source, r"_r(\d+)_")), source.labels)) == (
        shared.fingerprint)
    one = sampled(tmp_path / "one", model_path=network(tmp_path / "m1/model000002.pt", source, shared.fingerprint))
    both = sampled(tmp_path / "both", model_path=network(tmp_path / "m2/model000002.pt", source, source.fingerprint),
                   guide_model_path=network(tmp_path / "m3/model000001.pt", source, shared.fingerprint))
    report = command(folders, tmp_path, samples=f"{one},{both}")
    assert report["num_test"] == 8 and report["shares"]["1"]["images"] == 8
    assert all("classical + synthetic 1:1" in share["arms"] for share in report["shares"].values())
    with pytest.raises(ValueError, match=r"m2/model000002.pt \(--model_path of .*both\) was trained on 4 other images.*"
                                         r"--shares 1 \(8 images\); train it on .*--allow_networks"):
        command(folders, tmp_path, samples=both, shares="1")

    # A copy of the images has other times: it is known by its content, if the run states where it is.
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "study/shares/1", copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    copied = open_folder(DataConfig(data_dir=str(copy), image_size=32))
    assert copied.fingerprint != shared.fingerprint
    path = network(tmp_path / "m4/model000002.pt", source, copied.fingerprint)
    samples = sampled(tmp_path / "copied", model_path=path)
    with pytest.raises(ValueError, match="m4/model000002.pt.* was trained on 4 other images"):
        command(folders, tmp_path, samples=samples)
    write_record(tmp_path / "m4/config.json", {"flags": {"data": {"data_dir": str(copy)}}})
    assert "synthetic" in command(folders, tmp_path, samples=samples)["shares"]["1"]["arms"]
    (copy / "left_r1_000.png").write_bytes((folders / "train/right_r1_000.png").read_bytes())
    with pytest.raises(ValueError, match="m4/model000002.pt.* was trained on 4 other images"):
        command(folders, tmp_path, samples=samples)


@pytest.mark.parametrize("fault, message", [
    ("guide", r"guide/model000001.pt \(--guide_model_path of .*\) was trained on 4 other images"),
    ("init_from", r"start/model000001.pt \(--init_from of .*\) was trained on 4 other images"),
    ("resumed", r"start/model000001.pt \(--resume_checkpoint of .*\) was trained on 4 other images"),
    ("teacher", r"start/model000001.pt \(--teacher_path of .*\) was trained on 4 other images"),
    ("unknown", r"model/model000002.pt \(--model_path of .*\) was trained on unknown images"),
    ("chosen", r"model/model000002.pt .*: its best step was chosen by the test images, .*val"),
    ("retrained", r"model/model000002.pt \(--model_path\) has other weights than the samples were made with"),
    ("edited", r"photos \(--images of .*\) was trained on None other images"),
    ("autoencoder", "does not exist"),
    ("no record", "has no sampling.json, which names the networks of samples"),
])
def test_samples_of_networks_that_saw_other_images_are_rejected(fault, message, folders, tmp_path):
    source = open_folder(DataConfig(data_dir=str(folders / "train"), image_size=32))
    other = network(tmp_path / "start/model000001.pt", source, "b" * 64)
    about = {}
    if fault == "teacher":
        about["distillation"] = {"teacher": {"path": str(other), "sha256": checkpoint_util.find_weights(other)[1]}}
    if fault == "autoencoder":
        about["autoencoder"] = {"config": {"class": "AutoencoderKL"}, "path": str(tmp_path / "gone"),
                                "sha256": "c" * 64, "scale_factor": 1.0}
    fingerprint = None if fault == "unknown" else source.fingerprint
    path = network(tmp_path / "model/model000002.pt", source, fingerprint, **about)
    paths = {"model_path": path}
    if fault == "guide":
        paths["guide_model_path"] = network(tmp_path / "guide/model000001.pt", source, "b" * 64)
    samples = sampled(tmp_path / "samples", **paths)
    flags = {"init_from": {"init_from": str(other)}, "resumed": {"resume_checkpoint": str(other)},
             "chosen": {"val_data_dir": str(folders / "val")}}.get(fault)
    if flags:
        write_record(path.parent / "config.json", {"flags": {"training": flags}})
    if fault == "retrained":
        checkpoint_util.save_weights(path, {"w": torch.ones(1)}, {"kind": "diffusion"})
    record = read_record(samples / "sampling.json")
    if fault == "edited":
        record["settings"]["images"], record["paths"]["data_dir"] = "d" * 64, "photos"
        write_record(samples / "sampling.json", record)
    if fault == "no record":
        (samples / "sampling.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command(folders, tmp_path, samples=samples)
    if fault in ("init_from", "chosen"):
        allowed = other if fault == "init_from" else path.parent
        if fault == "init_from":
            assert "synthetic" in command(folders, tmp_path, samples=samples, allow_networks=allowed)["shares"]["all"][
                "arms"]
        else:   # no network is left that was trained on a share
            with pytest.raises(ValueError, match="all of its networks are in --allow_networks"):
                command(folders, tmp_path, samples=samples, allow_networks=allowed)


def test_settings_of_samples_require_samples(folders, tmp_path):
    with pytest.raises(ValueError, match="--filter_samples and --label_smoothing: expected samples, got none; set"):
        command(folders, tmp_path, filter_samples=True, label_smoothing=0.1)


def test_simulated_images_belong_to_all_shares_and_may_lack_classes(folders, tmp_path):
    simulated = tmp_path / "sim/train"
    simulated.mkdir(parents=True)
    for path in folders.glob("val/left_*"):
        shutil.copy(path, simulated)
    with pytest.raises(FileNotFoundError, match="sim/train has no sampling.json, .* or name it in --allow_networks"):
        command(folders, tmp_path, samples=simulated)
    command(folders, tmp_path, samples=simulated, allow_networks=simulated, dry_run=True)
    write_record(tmp_path / "sim/dataset.json", {"simulation": 1})
    for split in ("train", "val"):      # colors, beside which simulated images are gray
        (tmp_path / "jet" / split).mkdir(parents=True)
        for path in (folders / split).iterdir():
            colors = open_colormap("jet").to_colors(np.asarray(Image.open(path)) / 255)
            Image.fromarray(colors).save(tmp_path / "jet" / split / path.name)
    report = command(tmp_path / "jet", tmp_path, samples=simulated, colormap="jet")
    for share in report["shares"].values():
        assert list(share["arms"]) == ["real", "classical 1", "real + synthetic 1:1", "classical + synthetic 1:1"]
    with pytest.raises(ValueError, match=r"sim/train \(--samples\): expected images of shape 3x32x32, got 1x32x32"):
        command(tmp_path / "jet", tmp_path, samples=simulated)


# --- Models of the command ---


MODELS = """
study: {seeds: 2, steps: 8, batch_size: 8, width: 2, strengths: "1", ratios: "1"}
autoencoder:
  num_channels: [8, 8]
  initial_downsample_factor: 4
  num_res_blocks: 1
  norm_num_groups: 4
  latent_channels: 2
  training: {batch_size: 4, lr_anneal_steps: 2, save_interval: 2, max_val_samples: 2}
latents: {allow_latent_std: true}
model: {num_channels: 32, channel_mult: "1", num_res_blocks: 1, attention_resolutions: "", class_cond: true}
diffusion: {diffusion_steps: 20, predict_v: true}
training: {batch_size: 4, lr_anneal_steps: 2, save_interval: 2, ema_rate: ""}
"""
FAST = {"sampler": "ddim", "timestep_respacing": "ddim2", "save_individual": False}


@pytest.fixture(scope="module")
def models(folders):
    """Return a run folder of the command that trained and sampled a model of each share, with its models.yaml."""
    folder = folders / "models"
    folder.mkdir()
    (folder / "models.yaml").write_text(MODELS)
    report = command(folders, folder, folder / "models.yaml", train_models=True, **FAST)
    assert all("classical + synthetic 1:1" in share["arms"] for share in report["shares"].values())
    return folder


def no_computation(monkeypatch):
    """Make every step of a training and every sample an error."""
    for target in ("train_util.TrainLoop.run_step", "sampling.generate._sample_batches", "evaluation.study.train"):
        monkeypatch.setattr(f"guided_diffusion_vae.{target}", lambda *_: pytest.fail("computed again"))


def test_models_are_trained_on_their_share_alone_and_not_again(folders, models, monkeypatch):
    source = open_folder(DataConfig(data_dir=str(folders / "train"), image_size=32))
    for name, rows in (("1", np.flatnonzero(["_r1_" in name for name in source.names])), ("all", range(16))):
        path, _ = checkpoint_util.find_weights(models / f"study/models/{name}/diffusion")
        header = checkpoint_util.load_weights(path)[1]
        assert find_fingerprint(header) == fingerprint_of_rows(source, rows)
        assert header["autoencoder"]["path"].startswith(str(models / f"study/models/{name}/autoencoder"))
        archive, = (models / "study/samples").glob(f"{name}_*/samples_*.npz")
        assert archive.name == f"samples_{len(rows)}x32x32x1.npz"
    report = json.loads((models / "study/study.json").read_text())
    no_computation(monkeypatch)
    assert command(folders, models, models / "models.yaml", train_models=True, **FAST) == report
    other = models / "other.yaml"
    other.write_text(MODELS.replace("predict_v", "noise_schedule: cosine, predict_v"))
    with pytest.raises(ValueError, match=r"models/1/diffusion was trained with other settings \(noise_schedule\): "
                                         "restore them in --config, remove the folder"):
        command(folders, models, other, train_models=True, **FAST)
    config = models / "study/models/1/autoencoder/config.json"
    record = read_record(config)
    with monkeypatch.context() as context:
        context.setattr("guided_diffusion_vae.runs.study_models.read_config_file",
                        lambda *_: {"header": {"data_fingerprint": "b" * 64}})
        with pytest.raises(ValueError, match="models/1/autoencoder was trained on other images than those of its"):
            command(folders, models, models / "models.yaml", train_models=True, **FAST)
    assert read_record(config) == record


def test_given_models_are_checked_and_sampled_once_for_each_setting(folders, models, tmp_path, monkeypatch):
    model = models / "study/models/1/diffusion"
    study_of = lambda **settings: command(folders, tmp_path, model_path=model, **{**FAST, "shares": "1", **settings})
    assert study_of(dry_run=True) is None and not (tmp_path / "study").exists()
    report = study_of(num_samples=4)
    first, = (tmp_path / "study/samples").iterdir()
    assert "synthetic" in report["shares"]["1"]["arms"] and (first / "samples_4x32x32x1.npz").exists()
    time = (first / "sampling.json").stat().st_mtime_ns
    with monkeypatch.context() as context:
        no_computation(context)
        assert study_of(num_samples=4, save_individual=True) == report
    (first / "sampling.json").unlink()      # as if it was interrupted
    assert study_of(num_samples=4) == report and (first / "sampling.json").stat().st_mtime_ns > time
    study_of(num_samples=4, seed=1)
    second, = {*(tmp_path / "study/samples").iterdir()} - {first}
    shares = [dict(line) for line in csv.DictReader((tmp_path / "study/study.csv").read_text().splitlines())]
    assert sampling_seed(first) == 0 and sampling_seed(second) == 1 and {row["share"] for row in shares} == {"1"}


def sampling_seed(folder):
    """Return the --seed of a set of samples, from commands.json."""
    return read_record(folder / "commands.json")["commands"][-1]["flags"]["sampling"]["seed"]


@pytest.mark.parametrize("fault, message", [
    ("larger", r"models/all/.* \(--model_path of .*\) was trained on 16 other images.*--shares 1 \(8 images\)"),
    ("guide", r"models/all/.* \(--guide_model_path of .*\) was trained on 16 other images"),
    ("shape", r"model000001.pt \(--model_path\): expected a model of images of shape 1x32x32, got "),
    ("classes", r"model000001.pt \(--model_path\): expected a model of the classes of .*, has none of left, right"),
    ("start", r"would start from a network that was trained on share all, which has more images"),
    ("no config", r"--train_models True requires the settings .*: set --config"),
    ("endless", r"--train_models True would not end: .* in the section autoencoder.training, got neither"),
    ("no classes", r"requires models with classes: expected class_cond: true in the section model"),
    ("archive", r"--train_models True trains on folders of the files of a share, but its images have no files"),
])
def test_models_that_cannot_belong_to_a_share_are_rejected_before_any_computation(fault, message, folders, models,
                                                                                  tmp_path, monkeypatch):
    no_computation(monkeypatch)
    small, large = (models / f"study/models/{name}" for name in ("1", "all"))
    source = open_folder(DataConfig(data_dir=str(folders / "train"), image_size=32))
    settings, config = {"shares": "1"}, [TINY]
    if fault in ("larger", "guide"):
        settings |= {"model_path": large / "diffusion" if fault == "larger" else small / "diffusion"}
        settings |= {"guide_model_path": large / "diffusion"} if fault == "guide" else {}
    elif fault in ("shape", "classes"):
        shape = {"image_shape": [1, 32, 32]} if fault == "classes" else {}
        settings = {"model_path": network(tmp_path / "m/model000001.pt", source, source.fingerprint, **shape)}
    else:
        text = MODELS.replace("class_cond: true", "class_cond: false") if fault == "no classes" else (
            MODELS.replace("training: {batch_size: 4, lr_anneal_steps: 2", "training: {batch_size: 4")
            if fault == "endless" else MODELS)
        config = tmp_path / "models.yaml"
        config.write_text(text)
        settings = {"train_models": True, "shares": "1,all"}
        if fault == "no config":
            config = [TINY]
        if fault == "start":
            settings["vae_path"] = large / "autoencoder"
        if fault == "archive":
            pixels = (255 * images(8).images).byte().numpy().transpose(0, 2, 3, 1)
            write_npz(tmp_path / "train.npz", pixels.shape, [pixels], images(8).labels.numpy(), ["left", "right"])
            settings |= {"data_dir": tmp_path / "train.npz", "group_by": "", "shares": "50%,all"}
    with pytest.raises(ValueError, match=message):
        command(folders, tmp_path, config, **settings)
    assert not list(tmp_path.glob("study/*/*"))
    if fault == "start":    # of the share itself, or named
        command(folders, tmp_path, config, **{**settings, "vae_path": small / "autoencoder"}, dry_run=True)
        command(folders, tmp_path, config, **settings, allow_networks=large / "autoencoder", dry_run=True)


def test_recordings_in_both_sets_are_rejected_unless_allowed(folders, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(folders / "val", mixed)
    shutil.copy(folders / "train/left_r3_003.png", mixed)
    with pytest.raises(ValueError, match=r"mixed \(--val_data_dir\) and .*train \(--data_dir\) both have images of 3 "
                                         r"\(--group_by _r\(\\d\+\)_\).*--allow_groups"):
        command(folders, tmp_path, val_data_dir=mixed)
    command(folders, tmp_path, val_data_dir=mixed, allow_groups="3", dry_run=True)
    command(folders, tmp_path, val_data_dir=mixed, group_by=r"^(\w+)_\d+\.", allow_groups="left_r3", dry_run=True)
    with pytest.raises(ValueError, match=r"train \(--val_data_dir\) has the images of .*train: expected images of "):
        command(folders, tmp_path, val_data_dir=folders / "train")


def test_random_split_of_windows_is_warned_about(folders, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logger, "warn", warnings.append)
    command(folders, tmp_path, group_by="", shares="all", dry_run=True)
    assert warnings == []       # recording 2 is not in the training images
    mixed = tmp_path / "mixed"
    shutil.copytree(folders / "val", mixed)
    shutil.copy(folders / "train/left_r3_003.png", mixed)
    command(folders, tmp_path, val_data_dir=mixed, group_by="", shares="all", dry_run=True)
    assert len(warnings) == 1 and "left_r3" in warnings[0] and "set --group_by" in warnings[0]


def test_recordings_are_those_of_a_column_or_of_names(folders, tmp_path):
    source = open_folder(DataConfig(data_dir=str(folders / "train"), image_size=32))
    assert {*find_groups(source, r"_r\d")} == {"_r1", "_r3"} and {*find_groups(source, "")} == {"left", "right"}
    assert {*find_groups(source, r"^([a-z]+)_r(\d)")} == {"left_1", "left_3", "right_1", "right_3"}
    with pytest.raises(ValueError, match=r"--group_by r3 is no column .* not found in 8 of 16 names \(first left_r1"):
        find_groups(source, "r3")
    with pytest.raises(ValueError, match=r"--group_by \(: expected a regular expression or a column"):
        find_groups(source, "(")
    labeled = tmp_path / "labeled"
    shutil.copytree(folders / "train", labeled)
    rows = [f"{name},{name.split('_')[0]},person {i % 3}" for i, name in enumerate(source.names)]
    (labeled / "labels.csv").write_text("\n".join(["file,label,subject", *rows]))
    source = open_folder(DataConfig(data_dir=str(labeled), image_size=32))
    assert find_groups(source, "subject") == [f"person {i % 3}" for i in range(16)]
    assert read_column(source.names, source.folder, "age") is None
