"""Every script from end to end on tiny data: the main pipeline in processes, most errors within this process.

Its first run of each step is under mpiexec; other runs on several ranks are forks.
"""

import collections
import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict
from guided_diffusion_vae.data import open_npz
from guided_diffusion_vae.files import read_record
from guided_diffusion_vae.latent_datasets import LatentCache
from guided_diffusion_vae.locks import locked_folder
from guided_diffusion_vae.programs import NAMES
from guided_diffusion_vae.resample import LossSecondMomentResampler
from guided_diffusion_vae.runs import training
from guided_diffusion_vae.runs.factories import create_model
from guided_diffusion_vae.train_util import TrainLoop
from conftest import ROOT, to_words
from forks import FORKS, LAUNCHER_NAMES
from test_docs import command_main

BIN = Path(sys.executable).parent
COUNT = 12
PIPELINE = """
autoencoder: {num_channels: [8, 8, 8], norm_num_groups: 4, latent_channels: 3, attention_levels: [false, false, true]}
autoencoder.training: {batch_size: 2}
model: {num_channels: 32, channel_mult: "1", num_res_blocks: 1, attention_resolutions: "16", class_cond: true}
diffusion: {diffusion_steps: 8, noise_schedule: cosine}
training: {batch_size: 2, ema_rate: "0.9"}
sampling: {num_samples: 5, batch_size: 2}
classifier: {classifier_width: 32, classifier_depth: 1, classifier_attention_resolutions: ""}
"""


pytestmark = pytest.mark.usefixtures("one_process")


def command(script, ranks, flags):
    if ranks > 1 and not (BIN / "mpiexec").exists():
        pytest.skip(f"no mpiexec next to {sys.executable}")
    launcher = [BIN / "mpiexec", "-n", str(ranks)] if ranks > 1 else []
    return [*launcher, sys.executable, ROOT / "scripts" / f"{script}.py", *to_words(flags)]


def environment():
    environ = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
    return {**environ, "OMP_NUM_THREADS": "1"}


def launch(script, ranks=1, **flags):
    """Run a script in one process, or in several under mpiexec; return the completed process."""
    return subprocess.run(command(script, ranks, flags), env=environment(), capture_output=True, text=True, timeout=240)


def fork(script, ranks=1, **flags):
    """Run a script like `launch`, in forks."""
    return FORKS.run([ROOT / "scripts" / f"{script}.py", *to_words(flags)], ranks)


def run(script, ranks=1, start=fork, **flags):
    """Run a script, assert that it succeeds, and return its standard output."""
    process = start(script, ranks, **flags)
    assert process.returncode == 0, process.stdout + process.stderr
    assert not error_lines(process.stderr) and "Traceback" not in process.stderr, process.stderr
    return process.stdout


def error_lines(stderr):
    return [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]


def write_image(path, seed, size=64, mode="L"):
    """Write noisy bars, vertical if the seed is odd, else horizontal."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    bars = 120 + 90 * np.sin((x if seed % 2 else y) / 5 + seed) + rng.normal(0, 8, (size, size))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(bars.clip(0, 255).astype(np.uint8)).convert(mode).save(path)
    return path


def write_images(folder, count=COUNT, size=64):
    for i in range(count):
        write_image(folder / f"{'ab'[i % 2]}_{i:02d}.png", i, size)
    return folder


def listing(folder):
    """Return {relative path: modification time} of the files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def kill_after(text, count, script, ranks=1, **flags):
    """Run a script of which the first rank to rename `count` files named *text* kills itself."""
    interrupted = [ROOT / "tests" / "interrupted.py", text, count, ROOT / "scripts" / f"{script}.py", *to_words(flags)]
    process = FORKS.run(interrupted, ranks)
    assert process.returncode != 0 and "Traceback" not in process.stderr, process.stderr


class Chain:
    """Folders and flags of the main pipeline: autoencoder, cache by two ranks, diffusion model by two ranks.

    A step runs when its folder is used first, so that a step that fails does not fail the tests of others.
    """

    def __init__(self, root):
        self._root, self._failed, self.printed = root, {}, {}
        self.config = root / "pipeline.yaml"
        self.config.write_text(PIPELINE)
        self.data = write_images(root / "data")

    def _run_once(self, name, script, ranks=1, **flags):
        """Run a script into the folder `name` at the first call and return the folder; raise its failure again."""
        if name in self._failed:
            raise AssertionError(f"{script} has failed before") from self._failed[name]
        if name not in self.printed:
            try:
                self.printed[name] = run(script, ranks, launch, **flags)
            except Exception as error:
                self._failed[name] = error
                raise
        return self._root / name

    @property
    def train_autoencoder(self):
        return {"config": self.config, "data_dir": self.data, "logdir": self._root / "autoencoder"}

    @property
    def autoencoder(self):
        return self._run_once("autoencoder", "train_autoencoder", **self.train_autoencoder, max_steps=2)

    @property
    def encode(self):
        return {"config": self.config, "vae_path": self.autoencoder, "data_dir": self.data,
                "cache_dir": self._root / "cache", "shard_size": 5}

    @property
    def cache(self):
        return self._run_once("cache", "encode_dataset", ranks=2, **self.encode)

    @property
    def train(self):
        return {"config": self.config, "cache_dir": self.cache, "logdir": self._root / "diffusion"}

    @property
    def diffusion(self):
        return self._run_once("diffusion", "image_train_vae", ranks=2, **self.train, max_steps=2)

    @property
    def model(self):
        return self.diffusion / "ema_0.9_000002.pt"

    def __getitem__(self, name):
        return getattr(self, name)


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    return Chain(tmp_path_factory.mktemp("chain"))


def read_rows(folder):
    with open(folder / "progress.csv", newline="") as stream:
        return list(csv.DictReader(stream))


# --- The main pipeline ---


def test_training_prints_and_fills_the_run_folder(chain):
    for name, folder in (("autoencoder", chain.autoencoder), ("diffusion", chain.diffusion)):
        lines = [line for line in chain.printed[name].splitlines() if line == f"run folder: {folder}"]
        assert len(lines) == 2 and chain.printed[name].rstrip().endswith(lines[0])
        assert {"config.json", "log.txt", "progress.csv", "previews/000002.png", "model000002.pt", "opt000002.pt",
                "state000002.json"} <= set(listing(folder))
        assert not [name for name in listing(folder) if name.endswith(".part")]
    assert float(read_rows(chain.autoencoder)[-1]["val_psnr"]) > 0
    assert {"loss", "grad_norm", "samples", "steps_per_second"} <= set(read_rows(chain.diffusion)[-1])
    assert "all-reduce of 4 MiB over 2 ranks" in chain.printed["diffusion"]
    assert read_rows(chain.diffusion)[-1]["samples"] == "8"


def test_training_same_command_resumes(chain, call):
    before = listing(chain.autoencoder)
    status, out, err = call("train_autoencoder", **chain.train_autoencoder, max_steps=3)
    assert status == 0, err
    assert f"resuming from step 2 in {chain.autoencoder}" in out and "saving step 3" in out
    assert [row["step"] for row in read_rows(chain.autoencoder)] == ["2", "3"]
    assert listing(chain.autoencoder)["model000002.pt"] == before["model000002.pt"]
    (chain.autoencoder / "state000003.json").unlink()   # step 2, with which the cache was encoded, stays the latest


def test_training_two_ranks_resume(chain, tmp_path):
    flags = {**chain.train, "logdir": tmp_path / "run"}
    shutil.copytree(chain.diffusion, tmp_path / "run")
    out = run("image_train_vae", ranks=2, **flags, max_steps=3)
    assert "resuming from step 2" in out and (tmp_path / "run" / "state000003.json").exists()
    assert checkpoint_util.load_weights(tmp_path / "run" / "model000003.pt")[1]["step"] == 3


def test_training_finished_run_does_nothing(chain, call):
    status, out, err = call("image_train_vae", **chain.train, max_steps=2)
    assert status == 0 and "resuming from step 2" in out and "saving" not in out, err


def test_check_roundtrip_reports_metrics_and_checks_thresholds(chain, call, tmp_path):
    flags = {"vae_path": chain.autoencoder, "data_dir": chain.data, "logdir": tmp_path}
    status, out, err = call("check_roundtrip", **flags)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert status == 0 and f"psnr: {report['psnr']:.5g}" in out and (tmp_path / "roundtrip.png").exists(), err
    status, out, err = call("check_roundtrip", **flags, min_psnr=90, max_l1=0.001)
    assert status == 1
    assert "round trip failed: psnr " in err and " must be >= 90.0 (--min_psnr); l1 " in err


def test_encode_dataset_two_ranks_write_and_reuse_one_cache(chain, call):
    cache = LatentCache(chain.cache)
    cache.verify()
    assert len(cache) == COUNT and cache.latent_shape == (3, 16, 16) and cache.class_names == ["a", "b"]
    assert f"{COUNT} latents 3x16x16 in {chain.cache}; classes: a 6, b 6" in chain.printed["cache"]
    before = listing(chain.cache)
    status, out, err = call("encode_dataset", **chain.encode)
    assert status == 0 and listing(chain.cache) == before, err


def test_encode_dataset_resumes_after_being_killed(chain, call, tmp_path):
    many = tmp_path / "many.npz"
    np.savez(many, images=np.random.default_rng(0).integers(0, 256, (40, 16, 16), np.uint8))
    flags = {"vae_path": chain.autoencoder, "data_dir": many, "image_size": 16, "shard_size": 2}
    cache = tmp_path / "cache"
    kill_after("latents-00005", 1, "encode_dataset", **flags, cache_dir=cache)
    shards = {name: time for name, time in listing(cache).items() if name.endswith(".npy") and not name.startswith(".")}
    assert 5 <= len(shards) < 20 and not (cache / "manifest.json").exists()
    check_error(call("image_train_vae", **{**chain.train, "cache_dir": cache, "logdir": tmp_path / "run"}, max_steps=1),
                "is not a latent cache: it contains no manifest.json")
    status, out, err = call("encode_dataset", **flags, cache_dir=cache)
    assert status == 0, err
    after = listing(cache)
    assert not [name for name in after if name.endswith(".part")]   # those of the killed process are removed
    reused = sum(after[name] == time for name, time in shards.items())
    assert reused >= len(shards) - 1    # the last shard may lack its record
    LatentCache(cache).verify()
    assert len(LatentCache(cache)) == 40 and [name for name in after if name.endswith(".json")] == ["manifest.json"]


def test_sampling_needs_only_a_model_file_and_two_ranks_equal_one(chain, call, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "one"))
    status, one, err = call("image_sample_vae", model_path=chain.model)
    assert status == 0, err
    run("image_sample_vae", ranks=2, config=chain.config, model_path=chain.diffusion, logdir=tmp_path / "two")
    assert f"saved 64 samples to {tmp_path}/one/samples_64x64x64x1.npz" in one
    first, second = (open_npz(tmp_path / path) for path in ("one/samples_64x64x64x1.npz", "two/samples_5x64x64x1.npz"))
    images = first.images[:5].astype(int)
    # A rounding error may cross the boundary between two 8-bit values.
    assert np.abs(images - second.images).max() <= 1 and (images != second.images).mean() < 1e-3
    assert first.labels[:5].tolist() == [0, 1, 0, 1, 0] and first.class_names == ["a", "b"] and images.std() > 3
    assert {"contact_sheet.png", "png/a_000000.png", "png/b_000003.png"} <= set(listing(tmp_path / "one"))
    record = read_record(tmp_path / "one/sampling.json")    # by which augmentation_study.py finds the networks
    assert record["samples"] == "samples_64x64x64x1.npz" and record["paths"] == {"model_path": str(chain.model)}
    assert record["settings"]["model"] == checkpoint_util.find_weights(chain.model)[1]


def test_sampling_requested_classes_with_fewer_steps(chain, call, tmp_path):
    status, out, err = call("image_sample_vae", model_path=chain.model, logdir=tmp_path, num_samples=3, classes="b",
                            timestep_respacing="ddim4", use_ddim=True)
    assert status == 0 and "2 classes, 4 steps" in out, err
    assert open_npz(tmp_path / "samples_3x64x64x1.npz").labels.tolist() == [1, 1, 1]


def test_weights_file_loads_with_plain_load_state_dict(chain):
    bare = torch.load(chain.model, weights_only=True)
    network = create_model(16, 32, 1, channel_mult="1", class_cond=True, num_classes=2, in_channels=3,
                                       num_heads=4, use_scale_shift_norm=True, attention_resolutions="16")
    assert str(network.load_state_dict(bare)) == "<All keys matched successfully>"


@pytest.fixture(scope="session")
def classifier(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    run("classifier_train", config=chain.config, data_dir=chain.data, val_data_dir=chain.data, noised=False,
        iterations=2, eval_interval=2, logdir=folder)
    return folder


def test_classifier_train_clean_images_trains_and_validates(classifier):
    assert checkpoint_util.load_weights(classifier / "model000002.pt")[1]["classes"] == ["a", "b"]
    assert 0 <= float(read_rows(classifier)[-1]["val_acc@1"]) <= 1


@pytest.mark.filterwarnings("ignore:Fréchet distance from 12 samples")
def test_evaluate_uses_features_of_classifier_or_autoencoder(chain, classifier, call, tmp_path):
    flags = {"samples": chain.data, "reference": chain.data, "train_dir": chain.data, "logdir": tmp_path}
    status, out, err = call("evaluate", classifier_path=classifier, **flags)
    assert status == 0, err
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert abs(report["frechet"]) < 1e-3 and report["class_agreement"]["count"] == COUNT and "frechet: " in out
    status, out, err = call("evaluate", vae_path=chain.autoencoder, **flags)
    assert status == 0, err
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert "class_agreement" not in report and report["nearest_neighbors"]["median_distance_samples"] == 0


@pytest.mark.filterwarnings("ignore:Fréchet distance from 12 samples")
def test_evaluate_two_ranks_equal_one(chain, classifier, call, tmp_path):
    flags = {"samples": chain.data, "reference": chain.data, "train_dir": chain.data, "classifier_path": classifier,
             "batch_size": 5}
    run("evaluate", ranks=2, **flags, logdir=tmp_path / "two")
    status, out, err = call("evaluate", **flags, logdir=tmp_path / "one")
    assert status == 0, err
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys() and one["class_agreement"] == two["class_agreement"]
    assert one["nearest_neighbors"]["example_indices"] == two["nearest_neighbors"]["example_indices"]
    assert all(one[name] == pytest.approx(two[name], abs=1e-6) for name in ("frechet", "kernel", "precision", "recall"))


@pytest.mark.filterwarnings("ignore:Fréchet distance from 12 samples")
def test_evaluate_tstr_trains_on_samples_and_tests_on_real_images(chain, call, tmp_path):
    path = tmp_path / "samples.npz"
    files = sorted(chain.data.iterdir())
    copies = np.stack([np.asarray(Image.open(file)) for file in files])[..., None]
    labels = [file.name[0] == "b" for file in files]
    np.savez(path, copies, np.array(labels, int), class_names=np.array(["a", "b"]))
    status, out, err = call("evaluate", config=chain.config, vae_path=chain.autoencoder, samples=path,
                            reference=chain.data, train_dir=chain.data, tstr_iterations=3, tstr_batch_size=4,
                            logdir=tmp_path / "run")
    assert status == 0, err
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    samples, training = (report[f"train_on_{name}_test_on_real"] for name in ("samples", "training"))
    assert samples == training and samples["count"] == COUNT    # the samples are copies of the training images
    assert len(list((tmp_path / "run").glob("trained_on_samples_*/state000003.json"))) == 1
    np.savez(path, copies, 1 - np.array(labels, int), class_names=np.array(["a", "b"]))
    status, out, err = call("evaluate", config=chain.config, vae_path=chain.autoencoder, samples=path, reference=path,
                            tstr_iterations=3, tstr_batch_size=4, logdir=tmp_path / "run")
    assert status == 0, err     # other samples train another classifier instead of resuming the first
    assert len(list((tmp_path / "run").glob("trained_on_samples_*/state000003.json"))) == 2
    assert f"run folder: {tmp_path / 'run'}" in out.strip().splitlines()[-1]


def test_training_on_the_fly_equals_the_cache_within_half_precision(chain, call, tmp_path):
    flags = {**chain.train, "logdir": tmp_path, "max_steps": 2, "preview_interval": 2}
    del flags["cache_dir"]
    status, out, err = call("image_train_vae", **flags, data_dir=chain.data, vae_path=chain.autoencoder, batch_size=4)
    assert status == 0, err
    cached, _ = checkpoint_util.load_weights(chain.diffusion / "model000002.pt")
    header = checkpoint_util.load_weights(tmp_path / "model000002.pt")[1]
    on_the_fly = checkpoint_util.load_weights(tmp_path / "model000002.pt")[0]
    assert header["autoencoder"]["sha256"] == checkpoint_util.load_weights(chain.model)[1]["autoencoder"]["sha256"]
    # The model on the cache was trained by two ranks with half the batch each.
    assert max((on_the_fly[k].float() - cached[k].float()).abs().max().item() for k in cached) < 1e-3


def test_classifier_train_noised_by_default(chain, call, tmp_path):
    status, out, err = call("classifier_train", config=chain.config, data_dir=chain.data, iterations=1, logdir=tmp_path)
    assert status == 0 and (tmp_path / "state000001.json").exists(), err


@pytest.mark.parametrize("script, flags, expected", [
    ("train_autoencoder", ["train_autoencoder"], "initial=1, layers=(2, 2), total downsampling: 4x: images (1, 64"),
    ("image_train_vae", ["train"], "12 latents 3x16x16"),
    ("image_sample_vae", [], "latents 3x16x16 -> images 1x64x64, 2 classes, 8 steps"),
    ("check_roundtrip", [], "images (1, 64, 64) -> latents (3, 16, 16)"),
    ("classifier_train", [], "12 images 1x64x64 in "),
])
def test_dry_run_reports_the_plan_and_writes_nothing(chain, call, tmp_path, script, flags, expected):
    options = getattr(chain, flags[0]) if flags else {
        "image_sample_vae": {"model_path": chain.model},
        "check_roundtrip": {"vae_path": chain.autoencoder, "data_dir": chain.data},
        "classifier_train": {"config": chain.config, "data_dir": chain.data},
    }[script]
    before = listing(tmp_path), listing(chain.diffusion), listing(chain.autoencoder)
    status, out, err = call(script, **{**options, "logdir": tmp_path / "run"}, dry_run=True)
    assert status == 0 and expected in out and '  dry_run: true' in out, err
    assert ("M parameters; " in out) == ("train" in script)
    assert (listing(tmp_path), listing(chain.diffusion), listing(chain.autoencoder)) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Fréchet distance from 4 samples")
def test_pad_extends_indivisible_sizes_and_samples_are_cropped_back(chain, call, tmp_path):
    odd = {"data_dir": write_images(tmp_path / "data", 4, size=18), "image_size": 18, "pad": True}
    flags = {"config": chain.config, "channel_mult": "1", "batch_size": 2, "attention_resolutions": "", "max_steps": 1}
    status, out, err = call("train_autoencoder", config=chain.config, **odd, max_steps=1, logdir=tmp_path / "vae")
    assert status == 0 and "images (1, 20, 20) -> latents (3, 5, 5)" in out, err
    status, out, err = call("encode_dataset", vae_path=tmp_path / "vae", **odd, cache_dir=tmp_path / "cache")
    assert status == 0, err
    status, out, err = call("image_train_vae", **flags, cache_dir=tmp_path / "cache", logdir=tmp_path / "run")
    assert status == 0, err
    status, out, err = call("image_sample_vae", model_path=tmp_path / "run" / "model000001.pt", num_samples=4,
                            logdir=tmp_path / "samples")
    samples = tmp_path / "samples" / "samples_4x18x18x1.npz"
    assert status == 0 and samples.exists(), err
    status, out, err = call("evaluate", samples=samples, reference=odd["data_dir"], image_size=18,
                            vae_path=tmp_path / "vae", logdir=tmp_path / "measured")
    assert status == 0, err


@pytest.fixture(scope="session")
def trained_on_floats(tmp_path_factory):
    """Return (autoencoder, data): images of -80 to 0 dB, and the weights of an autoencoder trained on them."""
    folder = tmp_path_factory.mktemp("floats")
    rng = np.random.default_rng(0)
    for i in range(4):
        np.save(folder / f"{'ab'[i % 2]}_{i}.npy", rng.uniform(-80, 0, (16, 16)).astype(np.float32))
    config = AutoencoderConfig(in_channels=1, num_channels=(4, 4), norm_num_groups=2)
    data = {"image_size": 8, "value_range": "-80,0"}
    torch.manual_seed(0)
    checkpoint_util.save_weights(folder / "vae.pt", create_autoencoder(config).state_dict(), {
        "kind": "autoencoder", "autoencoder": as_dict(config), "image_shape": [1, 8, 8], "data": data})
    return folder / "vae.pt", folder


@pytest.mark.parametrize("script, folder_flag", [("check_roundtrip", "logdir"), ("encode_dataset", "cache_dir")])
def test_images_are_preprocessed_as_in_training_of_the_autoencoder(trained_on_floats, call, tmp_path, script,
                                                                   folder_flag):
    path, data = trained_on_floats
    flags = {"vae_path": path, "data_dir": data}
    status, out, err = call(script, **flags, **{folder_flag: tmp_path / "trained"})
    assert status == 0 and "4 images 1x8x8 (4 float32)" in out, err
    status, out, err = call(script, **flags, image_size=16, **{folder_flag: tmp_path / "explicit"})
    assert status == 0 and "4 images 1x16x16 (4 float32)" in out, err
    check_error(call(script, **flags, value_range="0,1", **{folder_flag: tmp_path / "conflicting"}), "a_0.npy")
    if script == "encode_dataset":
        assert LatentCache(tmp_path / "trained").preprocessing["value_range"] == "-80,0"


def test_encode_dataset_again_detects_a_corrupt_cache(trained_on_floats, call, tmp_path):
    path, data = trained_on_floats
    flags = {"vae_path": path, "data_dir": data, "cache_dir": tmp_path}
    assert call("encode_dataset", **flags)[0] == 0
    shard = tmp_path / "latents-00000-of-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-2] + b"??")
    check_error(call("encode_dataset", **flags), "latents-00000-of-00001.npy is corrupt")


def test_make_microdoppler_writes_once(call, tmp_path):
    flags = {"out_dir": tmp_path / "data", "num_train": 1, "num_val": 0, "classes": "tapin,tapout"}
    status, out, err = call("make_microdoppler", **flags)
    assert status == 0 and "2 images written" in out, err
    before = listing(tmp_path)
    assert "already exists" in call("make_microdoppler", **flags)[1] and listing(tmp_path) == before
    assert "data: 2 recordings written" in call("make_microdoppler", **flags, baseband=True)[1]
    flags["out_dir"] = tmp_path / "both"
    assert "both: 2 images and 2 recordings written" in call("make_microdoppler", **flags, baseband=True)[1]


def test_baseband_becomes_spectrograms_once(call, tmp_path):
    flags = {"out_dir": tmp_path / "data", "num_train": 1, "num_val": 1, "classes": "tapin,tapout", "baseband": True}
    assert call("make_microdoppler", **flags)[0] == 0
    flags = {"data_dir": tmp_path / "data/baseband", "out_dir": tmp_path / "made", "sample_rate_hz": 1000}
    check_error(call("make_spectrograms", **flags, val_recordings="none"), "--val_recordings none: expected to find it")
    status, out, err = call("make_spectrograms", **flags, val_recordings="val")
    assert status == 0 and "2 images in train/, 2 images in val/" in out, err
    assert "already exists" in call("make_spectrograms", **flags, val_recordings="val")[1]


# --- Tasks of guided-diffusion, in pixels and in latents ---


SMALL = {"num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "", "channel_mult": "1,1", "batch_size": 2,
         "diffusion_steps": 8, "noise_schedule": "cosine"}
# With random weights, predictions of x0 stay in range, while those of noise or velocity let sampling diverge.
STABLE = {**SMALL, "predict_xstart": True}


@pytest.fixture(scope="session")
def pixels(chain, tmp_path_factory):
    """Train a class-conditional model of 16x16 images with learned variances on two ranks; return its flags."""
    folder = tmp_path_factory.mktemp("pixels")
    flags = {"data_dir": chain.data, "image_size": 16, "class_cond": True, "learn_sigma": True, "ema_rate": "0.9",
             "class_dropout": 0.5, **STABLE, "logdir": folder}
    run("image_train", ranks=2, **flags, max_steps=2)
    return flags


def test_image_train_trains_and_resumes(pixels, chain, tmp_path):
    folder = shutil.copytree(pixels["logdir"], tmp_path / "run")
    assert {"loss", "mse", "vb", "loss_q0", "grad_norm", "param_norm", "samples"} <= set(read_rows(folder)[-1])
    assert {"previews/000002.png", "model000002.pt", "ema_0.9_000002.pt", "opt000002.pt"} <= set(listing(folder))
    out = run("image_train", ranks=2, **{**pixels, "logdir": folder}, max_steps=3)
    assert "resuming from step 2" in out and f"{COUNT} images 1x16x16 in {chain.data}; classes: a 6, b 6" in out
    assert checkpoint_util.load_weights(folder / "model000003.pt")[1]["autoencoder"]["config"]["class"] == "PixelCodec"


def test_image_sample_two_ranks_equal_one(pixels, call, tmp_path):
    flags = {"model_path": pixels["logdir"], "num_samples": 5, "batch_size": 2}
    status, out, err = call("image_sample", **flags, logdir=tmp_path / "one")
    assert status == 0 and "latents 1x16x16 -> images 1x16x16, 2 classes, 8 steps of ddpm" in out, err
    run("image_sample", ranks=2, **flags, logdir=tmp_path / "two")
    one, two = ((tmp_path / name / "samples_5x16x16x1.npz").read_bytes() for name in ("one", "two"))
    assert one == two and "created 2 samples" in out


def test_image_sample_killed_run_resumes_to_the_same_bytes(pixels, tmp_path):
    flags = {"model_path": pixels["logdir"], "num_samples": 12, "batch_size": 1, "timestep_respacing": "4"}
    kill_after(".npy", 5, "image_sample", ranks=2, **flags, logdir=tmp_path / "killed")
    shards = tmp_path / "killed" / "shards"
    assert len(list(shards.glob("0*.npy"))) >= 5 and not list((tmp_path / "killed").glob("*.npz"))
    out = run("image_sample", ranks=2, **flags, logdir=tmp_path / "killed")
    assert "of 12 batches, which already exist" in out
    run("image_sample", **flags, logdir=tmp_path / "uninterrupted")
    one, other = ((tmp_path / name / "samples_12x16x16x1.npz").read_bytes() for name in ("killed", "uninterrupted"))
    assert one == other and not shards.exists()


@pytest.mark.parametrize("flags", [
    {"sampler": "unipc", "timestep_respacing": "logsnr4"}, {"sampler": "dpmpp", "timestep_respacing": "4"},
    {"cfg_scale": 2}, {"cfg_scale": 2, "cfg_interval": "0.2,5", "use_ddim": True},
])
def test_image_sample_with_solvers_and_classifier_free_guidance(pixels, call, tmp_path, flags):
    status, out, err = call("image_sample", model_path=pixels["logdir"], num_samples=2, logdir=tmp_path, **flags)
    assert status == 0 and (tmp_path / "samples_2x16x16x1.npz").exists(), err


def test_image_sample_bare_checkpoint_is_described_by_flags(pixels, call, tmp_path):
    torch.save(dict(checkpoint_util.load_weights(pixels["logdir"] / "model000002.pt")[0]), tmp_path / "bare.pt")
    flags = {name: pixels[name] for name in (*STABLE, "image_size", "class_cond", "learn_sigma", "class_dropout")}
    flags.update(image_channels=1, num_classes=2, num_samples=2)
    status, out, err = call("image_sample", model_path=tmp_path / "bare.pt", **flags, logdir=tmp_path / "bare")
    assert status == 0, err
    call("image_sample", model_path=pixels["logdir"] / "model000002.pt", num_samples=2, batch_size=2,
         logdir=tmp_path / "own")
    bare, own = (open_npz(tmp_path / name / "samples_2x16x16x1.npz").images for name in ("bare", "own"))
    assert np.array_equal(bare, own)


def test_image_nll_reports_bits_for_pixels_and_nats_for_latents(pixels, chain, call, tmp_path):
    run("image_nll", ranks=2, model_path=pixels["logdir"], data_dir=chain.data, num_samples=6, batch_size=2,
        logdir=tmp_path / "two")
    status, out, err = call("image_nll", model_path=pixels["logdir"], data_dir=chain.data, num_samples=6, batch_size=2,
                            logdir=tmp_path / "one")
    assert status == 0 and "bpd=" in out, err
    two, one = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one"))
    assert one["bits_per_dim"] == pytest.approx(two["bits_per_dim"], rel=1e-5) and one["count"] == 6
    with np.load(tmp_path / "one" / "vb_terms.npz") as terms:
        assert terms["arr_0"].shape == (8,) and 0 < terms["arr_0"].sum() < one["bits_per_dim"] + 1e-6
    for data in ({"cache_dir": chain.cache}, {"data_dir": chain.data}):
        flags = {"model_path": chain.model, "num_samples": 3, "logdir": tmp_path / "latents"}
        status, out, err = call("image_nll", **flags, **data)
        report = json.loads((tmp_path / "latents" / "metrics.json").read_text())
        assert status == 0 and "nats_per_latent_dim" in report and "bits_per_dim" not in report, err


@pytest.fixture(scope="session")
def noisy_classifier(chain, tmp_path_factory):
    """Train a classifier of noised latents of the cache on two ranks; return its folder."""
    folder = tmp_path_factory.mktemp("noisy_classifier")
    run("classifier_train", ranks=2, cache_dir=chain.cache, val_data_dir=chain.cache, classifier_channel_mult="1,2",
        classifier_width=32, classifier_depth=1, classifier_attention_resolutions="", diffusion_steps=8, batch_size=2,
        noise_schedule="cosine", iterations=2, eval_interval=2, logdir=folder)
    return folder


def test_classifier_train_noisy_latents_logs_the_reference_keys(noisy_classifier):
    last = read_rows(noisy_classifier)[-1]
    assert {"train_loss", "train_acc@1", "train_acc@5", "train_loss_q0", "val_loss", "val_acc@1"} <= set(last)
    header = checkpoint_util.load_weights(noisy_classifier / "model000002.pt")[1]
    assert header["latent_shape"] == [3, 16, 16] and header["noised"] is True and header["classes"] == ["a", "b"]


def test_classifier_sample_latents_two_ranks_equal_one(chain, noisy_classifier, call, tmp_path):
    flags = {"model_path": chain.model, "classifier_path": noisy_classifier, "num_samples": 4, "batch_size": 2}
    status, out, err = call("classifier_sample", **flags, classifier_scale=3, logdir=tmp_path / "one")
    assert status == 0, err
    run("classifier_sample", ranks=2, **flags, classifier_scale=3, logdir=tmp_path / "two")
    status, _, err = call("classifier_sample", **flags, classifier_scale=0, logdir=tmp_path / "none")
    assert status == 0, err
    one, two, none = (open_npz(tmp_path / name / "samples_4x64x64x1.npz").images.astype(int)
                      for name in ("one", "two", "none"))
    assert np.array_equal(one, two) and (one != none).any()


def test_classifier_sample_guides_an_unconditional_model(pixels, chain, call, tmp_path):
    flags = {name: value for name, value in pixels.items() if not name.startswith("class_")}
    status, _, err = call("image_train", **{**flags, "logdir": tmp_path / "run", "learn_sigma": False}, max_steps=1)
    assert status == 0, err
    status, _, err = call("classifier_train", data_dir=chain.data, image_size=16, classifier_channel_mult="1,2",
                          classifier_width=32, classifier_depth=1, classifier_attention_resolutions="",
                          diffusion_steps=8, noise_schedule="cosine", batch_size=2, iterations=1,
                          logdir=tmp_path / "classifier")
    assert status == 0, err
    status, out, err = call("classifier_sample", model_path=tmp_path / "run", classifier_path=tmp_path / "classifier",
                            classes="b", num_samples=2, use_ddim=True, logdir=tmp_path / "samples")
    samples = open_npz(tmp_path / "samples" / "samples_2x16x16x1.npz")
    assert status == 0 and samples.labels.tolist() == [1, 1] and samples.class_names == ["a", "b"], err


def test_classifier_sample_rejects_another_space_or_noise_schedule(pixels, chain, noisy_classifier, classifier, call,
                                                                    tmp_path):
    flags = {"num_samples": 1, "logdir": tmp_path}
    check_error(call("classifier_sample", model_path=pixels["logdir"], classifier_path=noisy_classifier, **flags),
                "does not match the diffusion model: expected autoencoder")
    check_error(call("classifier_sample", model_path=pixels["logdir"], classifier_path=classifier, **flags),
                "was trained on clean data (--noised False)")
    weights, header = checkpoint_util.load_weights(noisy_classifier / "model000002.pt")
    header["diffusion"]["diffusion_steps"] = 9
    checkpoint_util.save_weights(tmp_path / "model000002.pt", weights, header)
    check_error(call("classifier_sample", model_path=chain.model, classifier_path=tmp_path / "model000002.pt", **flags),
                "was trained with --diffusion_steps 9, the diffusion model with 8")


@pytest.fixture(scope="session")
def upsampler(chain, tmp_path_factory):
    """Train an upsampler from 8x8 to 16x16 with noised low-resolution images on two ranks; return its flags."""
    folder = tmp_path_factory.mktemp("upsampler")
    flags = {"data_dir": chain.data, "large_size": 16, "small_size": 8, "cond_noise_steps": 4, "class_cond": True,
             "ema_rate": "0.9", **STABLE, "logdir": folder}
    run("super_res_train", ranks=2, **flags, max_steps=2)
    return flags


@pytest.fixture
def base_samples(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "base.npz", images, np.array([1, 0, 1]))
    return tmp_path / "base.npz"


def test_super_res_sample_maps_and_checks_classes_of_base_samples(upsampler, call, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    flags = {"model_path": upsampler["logdir"], "base_samples": tmp_path / "base.npz", "num_samples": 3}
    check_error(call("super_res_sample", **flags),
                "base.npz is not a file: expected an .npz of low-resolution samples; check --base_samples")
    np.savez(tmp_path / "base.npz", images, np.array([1, 0, 1]), class_names=np.array(["b", "a"]))
    status, _, err = call("super_res_sample", **flags, logdir=tmp_path / "run")
    assert status == 0, err
    assert open_npz(tmp_path / "run" / "samples_3x16x16x1.npz").labels.tolist() == [0, 1, 0]     # by name
    np.savez(tmp_path / "base.npz", images, np.array([1, 0, 2]))
    check_error(call("super_res_sample", **flags, logdir=tmp_path / "run"),
                "labels (arr_1) must be in [0, 1], the classes of the upsampler, got 0 to 2")
    np.savez(tmp_path / "base.npz", images, np.array([1, 0, 1]), class_names=np.array(["b", "c"]))
    check_error(call("super_res_sample", **flags, logdir=tmp_path / "run"),
                "has classes c that the model does not have")


def test_super_res_resumes_and_upsamples(upsampler, base_samples, call, tmp_path):
    folder = shutil.copytree(upsampler["logdir"], tmp_path / "run")
    status, out, err = call("super_res_train", **{**upsampler, "logdir": folder, "batch_size": 4}, max_steps=3)
    assert status == 0 and "resuming from step 2" in out, err
    flags = {"model_path": folder, "base_samples": base_samples, "num_samples": 4, "batch_size": 2}
    status, out, err = call("super_res_sample", **flags, logdir=tmp_path / "one")
    assert status == 0, err
    run("super_res_sample", ranks=2, **flags, cond_noise_level=3, logdir=tmp_path / "two")
    one, two = (open_npz(tmp_path / name / "samples_4x16x16x1.npz") for name in ("one", "two"))
    assert one.labels.tolist() == [1, 0, 1, 1] and (one.images != two.images).any()


@pytest.mark.parametrize("cached", [True, False])
def test_super_res_between_two_latent_grids(chain, call, tmp_path, cached):
    flags = {**SMALL, "max_steps": 2, "logdir": tmp_path / "run"}
    if cached:
        status, _, err = call("encode_dataset", vae_path=chain.autoencoder, data_dir=chain.data, image_size=32,
                              cache_dir=tmp_path / "low_res")
        assert status == 0, err
        flags.update(cache_dir=chain.cache, low_res_cache_dir=tmp_path / "low_res")
    else:
        flags.update(vae_path=chain.autoencoder, data_dir=chain.data, large_size=64, small_size=32)
    status, out, err = call("super_res_train", **flags)
    assert status == 0, err
    header = checkpoint_util.load_weights(tmp_path / "run" / "model000002.pt")[1]
    assert (header["super_res"]["large_size"], header["super_res"]["small_size"]) == (64, 32)
    np.savez(tmp_path / "base.npz", np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8))
    status, out, err = call("super_res_sample", model_path=tmp_path / "run", base_samples=tmp_path / "base.npz",
                            num_samples=2, clip_denoised=True, logdir=tmp_path / "samples")
    assert status == 0 and "latents 3x16x16 -> images 1x64x64" in out, err
    assert open_npz(tmp_path / "samples" / "samples_2x64x64x1.npz").images.std() > 0


# --- Flags of training ---


@pytest.fixture
def captured(monkeypatch):
    """Keep the arguments of TrainLoop.from_config instead of training: model, data, config, task, use_fp16."""
    captured = types.SimpleNamespace()

    def from_config(model, data, config, task, use_fp16=False):
        data.close()
        vars(captured).update(model=model, data=data, config=config, task=task, use_fp16=use_fp16)
        return types.SimpleNamespace(run_loop=lambda: None, stopped=False)

    monkeypatch.setattr(TrainLoop, "from_config", from_config)
    return captured


def first_weights(network):
    return next(p for p in network.parameters() if p.dim() > 1 and p.any()).detach().clone()


def test_flags_of_image_train_reach_the_loop(chain, call, captured, tmp_path):
    flags = {**SMALL, "data_dir": chain.data, "image_size": 16, "class_cond": True, "class_dropout": 0.25,
             "dropout": 0.3, "schedule_sampler": "loss-second-moment"}
    weights = []
    for seed in (7, 7, 8):
        torch.rand(seed)    # other random numbers do not change the weights
        status, _, err = call("image_train", **flags, seed=seed, logdir=tmp_path / f"{len(weights)}")
        assert status == 0, err
        weights.append(first_weights(captured.model))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    objective = captured.task.objective
    assert {layer.p for layer in captured.model.modules() if isinstance(layer, torch.nn.Dropout)} == {0.3}
    assert (objective.class_dropout, objective.null_label, objective.cond_noise_steps) == (0.25, 2, 0)
    assert isinstance(objective.schedule_sampler, LossSecondMomentResampler) and objective.diffusion.discrete_data
    assert captured.data.plan.seed == 8 and captured.data.with_labels and captured.data.plan.count == COUNT
    assert captured.use_fp16 is False
    status, _, err = call("image_train", **flags, use_fp16=True, logdir=tmp_path / "half")
    assert status == 0 and captured.use_fp16 is True, err


def test_flags_of_latent_training_reach_the_loop(trained_on_floats, call, captured, tmp_path):
    path, data = trained_on_floats
    flags = {**SMALL, "channel_mult": "1", "vae_path": path, "data_dir": data}
    status, _, err = call("image_train_vae", **flags, logdir=tmp_path / "run")
    assert status == 0 and not captured.task.objective.diffusion.discrete_data, err
    assert captured.task.objective.null_label == 0 and not captured.data.with_labels
    assert captured.task.header["autoencoder"]["path"] == str(path)


def test_flags_of_super_res_train_reach_the_loop(chain, call, captured, tmp_path):
    flags = {**SMALL, "data_dir": chain.data, "large_size": 16, "small_size": 8, "cond_noise_steps": 4, "seed": 3}
    status, _, err = call("super_res_train", **flags, logdir=tmp_path)
    assert status == 0 and captured.task.objective.cond_noise_steps == 4, err
    assert captured.model.noised_condition and captured.data.low_res.latent_shape == (1, 8, 8)
    assert captured.task.header["super_res"]["cond_noise_steps"] == 4 and captured.data.plan.seed == 3


def test_flags_of_classifier_train_reach_the_loop(chain, call, captured, tmp_path):
    flags = {"data_dir": chain.data, "val_data_dir": chain.data, "image_size": 16, "classifier_width": 32,
             "classifier_depth": 1, "classifier_channel_mult": "1,2", "classifier_attention_resolutions": "",
             "diffusion_steps": 8, "noise_schedule": "cosine", "batch_size": 2, "iterations": 5, "lr": 0.25,
             "weight_decay": 0.125, "microbatch": 1, "log_interval": 3, "save_interval": 4, "eval_interval": 6}
    weights = []
    for seed in (7, 7, 8):
        torch.rand(seed)
        status, _, err = call("classifier_train", **flags, seed=seed, anneal_lr=seed == 7, noised=seed == 7,
                              schedule_sampler="loss-second-moment", logdir=tmp_path / f"{len(weights)}")
        assert status == 0, err
        weights.append(first_weights(captured.model))
        assert captured.config.lr_anneal_steps == (5 if seed == 7 else 0)
        assert captured.task.objective.noised is captured.task.header["noised"] is (seed == 7)
        assert captured.task.objective.prefix == "train" and captured.task.preview.objective.prefix == "val"
        assert captured.task.preview.objective.noised is (seed == 7)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    same = ("lr", "weight_decay", "batch_size", "microbatch", "log_interval", "save_interval")
    assert {name: getattr(captured.config, name) for name in same} == {name: flags[name] for name in same}
    assert (captured.config.max_steps, captured.config.preview_interval, captured.config.ema_rates) == (5, 6, ())
    assert isinstance(captured.task.objective.schedule_sampler, LossSecondMomentResampler)
    assert captured.data.plan.seed == 8 and captured.data.with_labels and captured.config.seed == 8


def test_flags_of_train_autoencoder_reach_the_loop(chain, call, captured, tmp_path, monkeypatch):
    distance = types.SimpleNamespace(check_input_shape=lambda shape: None, to=lambda device: None)
    build = lambda config, image_range: vars(distance).update(image_range=image_range) or distance
    monkeypatch.setattr(training, "PerceptualLoss", build)
    held_out = write_images(tmp_path / "held_out", 2)
    flags = {"config": chain.config, "data_dir": chain.data, "val_data_dir": held_out, "image_size": 16,
             "image_range": "0,1", "kl_weight": 0.125, "recon_loss": "l2", "use_perceptual_loss": True,
             "perceptual_weight": 0.25, "discriminator_weight": 0.5, "discriminator_layers": 1, "stop_at_psnr": 40,
             "discriminator_channels": 8, "stop_at_l1": 0.5, "discriminator_lr": 0.75, "grad_clip": 2.0,
             "augment_spectrogram": 0.25}
    weights = []
    for seed in (7, 7, 8):
        torch.rand(seed)
        status, _, err = call("train_autoencoder", **flags, seed=seed, logdir=tmp_path / f"{len(weights)}")
        assert status == 0, err
        weights.append(first_weights(captured.model))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    objective = captured.task.objective
    assert (objective.config.kl_weight, objective.config.recon_loss) == (0.125, "l2")
    assert tuple(objective.image_range) == tuple(distance.image_range) == (0.0, 1.0)
    assert objective.train.augment_spectrogram == 0.25 and objective.colormap is None
    assert objective.perceptual == (0.25, distance) and objective.network is captured.model
    assert captured.task.early_stop == {"val_psnr": 40, "val_l1": 0.5} and captured.task.monitor == "val_psnr"
    trainer = objective.discriminator
    assert (trainer.config.discriminator_weight, trainer.lr, trainer.mp_trainer.grad_clip) == (0.5, 0.75, 2.0)
    assert captured.task.preview.batch_size == 2 and captured.data.plan.seed == 8
    assert [len(source) for source in (captured.data.source, captured.task.preview.source)] == [COUNT, 2]


# --- Export ---



def test_export_on_two_ranks(chain, tmp_path):
    out = run("export", ranks=2, model_path=chain.diffusion, out=tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").exists() and "wrote" in out


@pytest.mark.filterwarnings("ignore:Fréchet distance from 12 samples")
def test_scripts_without_training_do_not_change_curves(chain, call, tmp_path):
    folder = shutil.copytree(chain.diffusion, tmp_path / "run")
    before = (folder / "progress.csv").read_bytes()
    status, _, err = call("image_sample_vae", model_path=folder, num_samples=1, timestep_respacing="2", logdir=folder)
    assert status == 0, err
    status, _, err = call("evaluate", samples=chain.data, reference=chain.data, vae_path=chain.autoencoder,
                          logdir=folder)
    assert status == 0, err
    assert (folder / "progress.csv").read_bytes() == before and b"step" in before


@pytest.mark.filterwarnings("ignore:Fréchet distance from 12 samples")
def test_evaluate_accepts_an_npz_file_as_reference(chain, call, tmp_path):
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(chain.data.iterdir())])
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(len(images)) % 2)
    status, out, err = call("evaluate", samples=chain.data, reference=tmp_path / "data.npz", vae_path=chain.autoencoder,
                            logdir=tmp_path / "run")
    assert status == 0 and "frechet: " in out, err


def test_export_safetensors_samples_the_same_bytes(chain, call, tmp_path):
    for name, path in (("vae", chain.autoencoder), ("diffusion", chain.model)):
        status, out, err = call("export", model_path=path, out=tmp_path / f"{name}.safetensors")
        assert status == 0 and f"wrote {tmp_path}/{name}.safetensors: " in out, err
    for name, flags in (("own", {"model_path": chain.model}),
                        ("exported", {"model_path": tmp_path / "diffusion.safetensors",
                                      "vae_path": tmp_path / "vae.safetensors"})):
        status, _, err = call("image_sample_vae", **flags, num_samples=2, logdir=tmp_path / name)
        assert status == 0, err
    own, exported = ((tmp_path / name / "samples_2x64x64x1.npz").read_bytes() for name in ("own", "exported"))
    assert own == exported


def test_export_refuses_weights_that_do_not_fit_their_header(chain, call, tmp_path):
    weights, header = checkpoint_util.load_weights(chain.model)
    name, value = next(iter(weights.items()))
    for wrong, problem in ((value[:-1], f"does not match the model (1 of {len(weights)} entries"),
                           (value * float("nan"), f"not finite, such as {name}")):
        checkpoint_util.save_weights(tmp_path / "model.pt", {**weights, name: wrong}, header)
        check_error(call("export", model_path=tmp_path / "model.pt", out=tmp_path / "out.safetensors"), problem)
    checkpoint_util.save_weights(tmp_path / "model.pt", weights, {**header, "kind": "discriminator"})
    check_error(call("export", model_path=tmp_path / "model.pt", out=tmp_path / "out.safetensors"),
                "model.pt contains a discriminator: expected one of: diffusion, super_res, classifier, autoencoder")
    assert list(listing(tmp_path)) == ["model.pt"]


@pytest.mark.filterwarnings("ignore")   # those of diffusers
def test_export_diffusers_pipeline_samples(chain, call, tmp_path):
    import diffusers

    flags = {"config": chain.config, "cache_dir": chain.cache, "class_cond": False, "logdir": tmp_path / "run"}
    status, _, err = call("image_train_vae", **flags, max_steps=1)
    assert status == 0, err
    status, out, err = call("export", model_path=tmp_path / "run", format="diffusers", out=tmp_path / "pipeline")
    assert status == 0 and "LDMPipeline" in out, err
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=4, output_type="np").images
    assert images.shape == (1, 64, 64, 1) and 0 <= images.min() < images.max() <= 1


def test_export_diffusers_loads_a_class_conditional_pixel_model(pixels, call, tmp_path):
    import diffusers

    status, out, err = call("export", model_path=pixels["logdir"], format="diffusers", out=tmp_path / "pipeline")
    assert status == 0 and "DDPMPipeline" in out, err
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline", low_cpu_mem_usage=False)
    assert loaded.unet.config.num_class_embeds == 3 and loaded.scheduler.config.variance_type == "learned_range"


# --- Errors ---


def bad_data(kind, folder):
    """Create a folder of images with one fault."""
    if kind == "missing":
        return folder
    folder.mkdir()
    if kind == "empty":
        return folder
    write_images(folder, 4)
    if kind == "truncated":
        last = folder / "a_02.png"
        last.write_bytes(last.read_bytes()[:-300])
    elif kind == "text":
        (folder / "a_02.png").write_text("not an image")
    elif kind == "small":
        write_image(folder / "b_03.png", 3, size=40)
    elif kind == "mixed":
        write_image(folder / "b_03.png", 3, mode="RGB")
    return folder


BAD_DATA = {
    "missing": "data does not exist; check --data_dir",
    "empty": "data contains no image",
    "truncated": "a_02.png: cannot be read",
    "text": "a_02.png: cannot be read (not an image format",
    "small": "b_03.png: size 40x40 is smaller than --image_size 64x64",
    "mixed": "b_03.png is RGB; set --image_channels 1 or --image_channels 3",
}


def check_error(result, message):
    """Assert that a script failed with one line that contains the message."""
    status, out, err = result
    assert status not in (0, None), out
    lines = error_lines(err)
    assert len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err and "Warning" not in err


@pytest.mark.parametrize("script", ["train_autoencoder", "encode_dataset", "image_train_vae", "classifier_train"])
@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_images_are_named_in_the_error(chain, call, tmp_path, script, kind):
    flags = {"config": chain.config, "data_dir": bad_data(kind, tmp_path / "data")}
    if script != "encode_dataset":
        flags.update(logdir=tmp_path / "run", batch_size=2, **{"iterations" if "class" in script else "max_steps": 4})
    else:
        flags.update(cache_dir=tmp_path / "cache")
    if script in ("encode_dataset", "image_train_vae"):
        flags.update(vae_path=chain.autoencoder)
    check_error(call(script, **flags), BAD_DATA[kind])
    assert not list(tmp_path.rglob("state*.json")) and not list(tmp_path.rglob("manifest.json"))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("script, flag, flags", [
    ("train_autoencoder", "logdir", {"config": "{config}", "data_dir": "{data}"}),
    ("image_train_vae", "logdir", {"config": "{config}", "cache_dir": "{cache}"}),
    ("image_sample_vae", "logdir", {"config": "{config}", "model_path": "{diffusion}"}),
    ("check_roundtrip", "logdir", {"vae_path": "{autoencoder}", "data_dir": "{data}"}),
    ("encode_dataset", "cache_dir", {"config": "{config}", "vae_path": "{autoencoder}", "data_dir": "{data}"}),
    ("make_microdoppler", "out_dir", {"num_train": 1}),
])
def test_folder_in_use_is_refused_and_left_as_it_is(chain, call, tmp_path, script, flag, flags):
    folder = tmp_path / "folder"
    folder.mkdir()
    flags = {name: str(value).format_map(chain) for name, value in flags.items()}
    with locked_folder(folder, "--logdir", "image_train_vae"):
        holder = f"image_train_vae (process {os.getpid()} on {socket.gethostname()}, started "
        check_error(call(script, **flags, **{flag: folder}), f"error: {folder} is in use by {holder}")
        assert list(listing(folder)) == [".lock"]
    assert not listing(folder)


WITH_RUN_FOLDER = [name for name in NAMES if "--logdir" in command_main(name).argparser().words]


@pytest.mark.parametrize("script", WITH_RUN_FOLDER)
def test_command_that_refuses_to_start_leaves_no_folder(call, tmp_path, script):
    check_error(call(script, logdir=tmp_path / "runs" / "a"), "--")
    assert not list(tmp_path.iterdir())


def test_refused_setting_leaves_a_folder_as_it_was_and_the_corrected_command_starts(chain, call, tmp_path, monkeypatch):
    flags = {"config": chain.config, "data_dir": chain.data, "max_steps": 1, "report": False}
    used = shutil.copytree(chain.autoencoder, tmp_path / "used")
    for folder in (tmp_path / "new", used):
        before = listing(used)
        check_error(call("train_autoencoder", **flags, logdir=folder, image_size=128),
                    "is smaller than --image_size 128x128")
        changed = {name for name, time in listing(used).items() if before.get(name) != time}
        assert not (tmp_path / "new").exists() and changed <= {"log.txt", "commands.json"}
    monkeypatch.chdir(tmp_path)
    check_error(call("train_autoencoder", **flags, image_size=128), "--image_size")
    assert not list((tmp_path / "runs").iterdir())      # nor the default folder
    assert call("train_autoencoder", **flags, logdir=tmp_path / "new")[0] == 0


@pytest.mark.parametrize("damage, message", [
    (lambda cache: (cache / "manifest.json").write_text("{"), "manifest.json: invalid JSON"),
    (lambda cache: (cache / "manifest.json").write_text('{"format": "other"}'),
     "manifest.json: expected format 'guided_diffusion_vae latent cache', version 1, got format 'other'"),
    (lambda cache: (cache / "manifest.json").unlink(), "is not a latent cache: it contains no manifest.json"),
    (lambda cache: os.truncate(cache / "latents-00001-of-00003.npy", 500),
     "latents-00001-of-00003.npy: cannot be read"),
    (lambda cache: (cache / "labels.npy").unlink(), "labels.npy: cannot be read"),
])
def test_corrupt_cache_is_named_in_the_error(chain, call, tmp_path, damage, message):
    cache = Path(shutil.copytree(chain.cache, tmp_path / "cache"))
    damage(cache)
    flags = {**chain.train, "cache_dir": cache, "logdir": tmp_path / "run"}
    check_error(call("image_train_vae", **flags, max_steps=1), message)
    assert not list(tmp_path.rglob("state*.json"))


# --- Volumes, other ways to train an autoencoder, the memory planner ---


VOLUMES = """
data: {voxel_size: [8, 16, 12], spacing: "2,1,1"}
autoencoder: {num_channels: [8, 8], norm_num_groups: 4, latent_channels: 3, downsample_factors: [2]}
autoencoder.training: {batch_size: 2}
model: {num_channels: 32, channel_mult: "1,1", num_res_blocks: 1, attention_resolutions: "", resample_depth: true}
diffusion: {diffusion_steps: 8, noise_schedule: cosine}
training: {batch_size: 2, ema_rate: "0.9"}
"""


@pytest.mark.filterwarnings("ignore:Fréchet distance from 4 samples")
def test_pipeline_on_volumes(call, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    for i in range(3):
        (tmp_path / "data").mkdir(exist_ok=True)
        np.save(tmp_path / f"data/{i}.npy", rng.integers(0, 256, (10, 18, 24), np.uint8))
    config = tmp_path / "volumes.yaml"
    config.write_text(VOLUMES)
    common = {"config": config, "data_dir": tmp_path / "data"}
    for script, ranks, flags, expected in (
        ("train_autoencoder", 1, {**common, "crop": "random", "patches_per_volume": 2, "max_steps": 2,
                                  "logdir": tmp_path / "ae"}, "total downsampling: 2x: images (1, 8, 16, 12)"),
        ("check_roundtrip", 1, {**common, "crop": "grid", "vae_path": tmp_path / "ae", "logdir": tmp_path / "trip"},
         "psnr"),
        ("encode_dataset", 2, {**common, "crop": "grid", "vae_path": tmp_path / "ae",
                               "cache_dir": tmp_path / "cache"}, "24 latents"),
        ("image_train_vae", 2, {"config": config, "cache_dir": tmp_path / "cache", "max_steps": 2,
                                "logdir": tmp_path / "diffusion"}, "24 latents 3x4x8x6"),
        ("image_sample_vae", 1, {"model_path": tmp_path / "diffusion", "num_samples": 4, "logdir": tmp_path / "out",
                                 "sampler": "unipc", "timestep_respacing": "logsnr4"}, "saved 4 samples"),
        ("evaluate", 1, {"samples": tmp_path / "out/samples_4x8x16x12x1.npz", "reference": tmp_path / "data",
                         "vae_path": tmp_path / "ae", "crop": "grid", "logdir": tmp_path / "eval"}, "frechet"),
    ):
        if ranks > 1:
            printed = run(script, ranks, **flags)
        else:
            status, printed, err = call(script, **flags)
            assert status == 0, err
        assert expected in printed, printed
    written = nibabel.load(tmp_path / "out/volumes/000003.nii.gz")
    assert written.shape == (8, 16, 12) and np.allclose(written.header.get_zooms(), (2, 1, 1))
    assert (tmp_path / "out/contact_sheet.png").exists() and (tmp_path / "trip/roundtrip.png").exists()


def test_adversarial_autoencoder_resumes_and_initializes_another(chain, call, tmp_path):
    flags = {"config": chain.config, "data_dir": chain.data, "discriminator_weight": 0.1, "discriminator_start": 1,
             "discriminator_channels": 8, "discriminator_layers": 1, "adaptive_weight": True, "save_interval": 1}
    assert call("train_autoencoder", **flags, max_steps=2, logdir=tmp_path / "adversarial")[0] == 0
    status, out, err = call("train_autoencoder", **flags, max_steps=3, logdir=tmp_path / "adversarial")
    assert status == 0 and (tmp_path / "adversarial/discriminator000003.pt").exists(), err
    assert {"adversarial_loss", "discriminator_loss", "logits_fake"} <= set(read_rows(tmp_path / "adversarial")[-1])

    larger = {"config": chain.config, "data_dir": chain.data, "max_steps": 1, "logdir": tmp_path / "next",
              "init_from": tmp_path / "adversarial", "downsample_factors": "2,4"}
    status, out, err = call("train_autoencoder", **larger)
    assert status == 0 and "  not used: " in out, out + err


def test_fast_dev_run_reaches_the_discriminator_in_its_own_folder(chain, call, tmp_path):
    flags = {"config": chain.config, "data_dir": chain.data, "discriminator_weight": 0.1, "discriminator_channels": 8,
             "discriminator_layers": 1, "logdir": tmp_path / "run"}
    folder = tmp_path / "run/fast_dev_run"
    for steps in (2, 1):
        status, _, err = call("train_autoencoder", **flags, fast_dev_run=True, fast_dev_run_batches=steps)
        assert status == 0, err
        assert "discriminator_loss" in read_rows(folder)[-1] and [p.name for p in folder.glob("state*")] == [
            f"state{steps:06d}.json"]
    status, out, err = call("train_autoencoder", **flags, max_steps=1)
    assert status == 0 and "resuming" not in out and (tmp_path / "run/state000001.json").exists(), out + err


@pytest.mark.parametrize("path, size", [("very_high", 32), ("initial_512", 32), ("factors_4x2x2", 16)])
def test_shipped_configuration_trains(call, tmp_path, path, size):
    (tmp_path / "data").mkdir()
    for i in range(2):
        np.save(tmp_path / "data" / f"{i}.npy", np.random.default_rng(i).random((size,) * 3, np.float32))
    status, out, err = call("train_autoencoder", config=ROOT / f"configs/volumes/{path}.yaml", value_range="0,1",
                            data_dir=tmp_path / "data", image_size=f"{size}x{size}x{size}", batch_size=1,
                            gradient_accumulation_steps=1, fast_dev_run=True, fast_dev_run_batches=1,
                            logdir=tmp_path / "run")
    assert status == 0, err
    assert float(read_rows(tmp_path / "run/fast_dev_run")[-1]["loss"]) > 0


@pytest.mark.parametrize("flags, expected", [
    ({"out_channels": 3}, "--out_channels 3 conflicts with"),
    ({"use_perceptual_loss": True, "perceptual_path": "nowhere.pth"},
     "--perceptual_path nowhere.pth: expected a file with torchvision's weights of vgg"),
    ({"discriminator_weight": 1, "discriminator_layers": 5}, "lower --discriminator_layers"),
])
def test_dry_run_rejects_configurations_that_cannot_train(chain, call, tmp_path, flags, expected):
    status, _, err = call("train_autoencoder", config=chain.config, data_dir=chain.data, dry_run=True, **flags)
    assert status != 0 and expected in err


def test_plan_memory_uses_the_padded_size(call, monkeypatch):
    monkeypatch.setattr(training, "report", lambda plan, *_: [plan.summary()])      # the first line of many
    status, out, err = call("plan_memory", image_size="31x30x16", pad=True, num_channels="8,8", downsample_factors="4",
                            norm_num_groups=4, plan_batch_sizes="1")
    assert status == 0 and "1x32x32x16" in out, err


def test_plan_memory_needs_only_a_configuration(call):
    status, out, err = call("plan_memory", config=ROOT / "configs/volumes/low.yaml", budget_gb="1.5,12",
                            plan_batch_sizes="1")
    assert status == 0, err
    for expected in ("initial=1, layers=(2, 2), total downsampling: 4x: 1x64x64x32", "saved for backward",
                     "least lossy within 1.5 GiB: --", "least lossy within 12 GiB: as configured"):
        assert expected in out, out


@pytest.fixture(scope="session")
def other_autoencoder(chain, tmp_path_factory):
    """Return a run like the autoencoder of the pipeline, with other weights."""
    folder = tmp_path_factory.mktemp("other")
    weights, header = checkpoint_util.load_weights(chain.autoencoder / "model000002.pt")
    for value in weights.values():
        value.mul_(1.1)
    saved = checkpoint_util.save_weights(folder / "model000001.pt", weights, {**header, "step": 1})
    checkpoint_util.commit(folder, 1, {"model000001.pt": saved}, {})
    return folder


@pytest.mark.parametrize("script", ["image_train_vae", "encode_dataset", "image_sample_vae"])
def test_another_autoencoder_is_rejected_with_its_fingerprint(chain, other_autoencoder, call, tmp_path, script):
    flags = {
        "image_train_vae": {**chain.train, "logdir": tmp_path / "run", "max_steps": 1},
        "encode_dataset": chain.encode,
        "image_sample_vae": {"model_path": chain.model, "logdir": tmp_path / "samples"},
    }[script]
    before = listing(chain.cache)
    result = call(script, **{**flags, "vae_path": other_autoencoder})
    check_error(result, LatentCache(chain.cache).autoencoder["sha256"][:16])
    assert str(other_autoencoder) in result[2] and listing(chain.cache) == before


def test_training_rejects_resuming_with_another_configuration(chain, call):
    before = listing(chain.diffusion)
    check_error(call("image_train_vae", **chain.train, max_steps=3, num_res_blocks=2, batch_size=4),
                "model.num_res_blocks is 2 now, 1 in the checkpoint")
    assert {k: v for k, v in listing(chain.diffusion).items() if k.endswith((".pt", "state000002.json"))} == {
        k: v for k, v in before.items() if k.endswith((".pt", "state000002.json"))}


@pytest.mark.parametrize("script, flags, message", [
    ("image_sample_vae", {"model_path": "{autoencoder}/model000002.pt"}, "kind 'diffusion', got 'autoencoder'"),
    ("image_sample_vae", {"model_path": "{diffusion}/opt000002.pt"}, "opt000002.pt is not a state dict"),
    ("image_sample_vae", {"model_path": "{tmp}/cut.pt"}, "cut.pt is corrupt"),
    ("image_sample_vae", {}, "--model_path is not set: expected"),
    ("image_sample_vae", {"model_path": "{diffusion}/model000002.pt", "num_channels": 64},
     "--num_channels 64 conflicts with"),
    ("image_sample_vae", {"model_path": "{diffusion}/model000002.pt", "classes": "c"},
     "no class 'c': expected one of: a, b"),
    ("check_roundtrip", {"vae_path": "{diffusion}", "data_dir": "{data}"},
     "--vae_path expects a model of kind 'autoencoder', got 'diffusion'"),
    ("check_roundtrip", {"vae_path": "{tmp}/cut.pt", "data_dir": "{data}"}, "cut.pt is corrupt"),
    ("check_roundtrip", {"vae_path": "{data}", "data_dir": "{data}"}, "data is neither a run of train_autoencoder.py"),
    ("check_roundtrip", {"vae_path": "{autoencoder}", "data_dir": "{data}", "image_channels": 3}, "3 channels"),
    ("evaluate", {"samples": "{data}", "reference": "{data}", "classifier_path": "{diffusion}/model000002.pt"},
     "--classifier_path expects a model of kind 'classifier', got 'diffusion'"),
    ("evaluate", {"samples": "{tmp}/cut.npz", "reference": "{data}", "vae_path": "{autoencoder}"},
     "cut.npz: cannot be read as an .npz archive"),
    ("evaluate", {"samples": "{data}", "vae_path": "{autoencoder}"}, "--reference is not set"),
    ("train_autoencoder", {"data_dir": "{data}", "image_size": "64x62"},
     "axis 1 has size 62, which the autoencoder's total downsampling factor 4"),
    ("train_autoencoder", {"data_dir": "{data}", "config": "{tmp}/typo.yaml"},
     "typo.yaml: unknown key 'autoencoder.num_chanels'; did you mean 'num_channels'?"),
    ("train_autoencoder", {"data_dir": "{data}", "num_chanels": 3}, "did you mean 'num_channels'?"),
    ("train_autoencoder", {"data_dir": "{data}", "batch_size": 13}, "12 items are fewer than one step requires"),
    ("train_autoencoder", {"data_dir": "{data}", "logdir": "{tmp}/cut.pt/run"},
     "cannot write into {tmp}/cut.pt/run (Not a directory); set --logdir to a writable folder"),
    ("image_train_vae", {"cache_dir": "{cache}", "compile": True, "recompute_norms": True}, "mutually exclusive"),
    ("image_train_vae", {"cache_dir": "{cache}", "batch_size": 13}, "12 items are fewer than one step requires"),
    ("image_train_vae", {"cache_dir": "{cache}", "normalizer": "none"}, "x0 has a measured standard deviation of"),
    ("image_train_vae", {"cache_dir": "{cache}", "data_dir": "{data}"}, "specify one of them"),
    ("image_train_vae", {"cache_dir": "{cache}", "logdir": "{autoencoder}"},
     "checkpoints of another"),
    ("encode_dataset", {"vae_path": "{autoencoder}", "data_dir": "{data}", "cache_dir": "{tmp}/cut.pt/cache"},
     "set --cache_dir to a writable folder"),
    ("encode_dataset", {"vae_path": "{autoencoder}", "data_dir": "{data}", "cache_dir": "{cache}", "store": "mode"},
     "contains a cache of other images or settings"),
    ("classifier_train", {"data_dir": "{data}", "batch_size": 13, "iterations": 1}, "12 items are fewer"),
    ("classifier_train", {"data_dir": "{data}", "image_size": 32, "iterations": 1}, "for a grid of 32"),
    ("make_microdoppler", {"out_dir": "{tmp}/cut.pt/data"}, "cut.pt"),
    ("image_train", {"data_dir": "{data}", "class_dropout": 0.1}, "--class_dropout 0.1 requires --class_cond True"),
    ("image_train", {"data_dir": "{data}", "predict_v": True, "predict_xstart": True}, "mutually exclusive"),
    ("image_train", {"data_dir": "{data}", "noise_schedule": "linear_zero_snr"}, "ends in pure noise"),
    ("image_sample", {"model_path": "{diffusion}/model000002.pt", "cfg_scale": 2}, "--class_dropout > 0"),
    ("image_sample", {"model_path": "{diffusion}/model000002.pt", "cfg_interval": "1,2"}, "has no effect with"),
    ("image_sample", {"model_path": "{diffusion}/model000002.pt", "sampler": "unipc", "use_ddim": True}, "exclusive"),
    ("image_sample", {"model_path": "{diffusion}/model000002.pt", "timestep_respacing": "logsnr99"},
     "logsnr99: N must be in [2, "),
    ("classifier_sample", {"model_path": "{diffusion}/model000002.pt"}, "--classifier_path is not set: expected"),
    ("classifier_sample", {"model_path": "{diffusion}", "classifier_path": "{diffusion}"}, "of kind 'classifier'"),
    ("super_res_train", {"cache_dir": "{cache}"}, "set --low_res_cache_dir to a cache of its low-resolution"),
    ("super_res_train", {"cache_dir": "{cache}", "low_res_cache_dir": "{cache}"}, "set --small_size below"),
    ("super_res_train", {"data_dir": "{data}", "large_size": 64, "small_size": 64}, "set --small_size below"),
    ("super_res_sample", {"model_path": "{diffusion}/model000002.pt"}, "kind 'super_res', got 'diffusion'"),
    ("encode_dataset", {"vae_path": "{autoencoder}", "data_dir": "{data}"}, "no folder specified for the cache"),
    ("train_autoencoder", {"data_dir": "{data}", "val_data_dir": "{color}", "batch_size": 4},
     "(--val_data_dir): expected 1 channels"),
    ("train_autoencoder", {"data_dir": "{data}", "max_val_samples": 0, "batch_size": 4},
     "--max_val_samples must be >= 1, got 0"),
    ("train_autoencoder", {"data_dir": "{data}", "image_size": 16, "discriminator_weight": 0.5, "batch_size": 4},
     "too small for the discriminator: expected at least 24"),
    ("classifier_train", {"data_dir": "{data}", "val_data_dir": "{plain}", "iterations": 1}, "has no classes"),
    ("evaluate", {"samples": "{data}", "reference": "{data}", "vae_path": "{autoencoder}", "tstr_iterations": 3,
                  "tstr_batch_size": 13}, "expected at least 13, one training step; lower --tstr_batch_size"),
    ("evaluate", {"samples": "{data}", "reference": "{data}", "vae_path": "{autoencoder}", "image_size": 32,
                  "tstr_iterations": 3}, "for a grid of 32"),
    ("evaluate", {"samples": "{data}", "reference": "{data}", "vae_path": "{autoencoder}", "train_dir": "{tmp}/none"},
     "{tmp}/none does not exist; check --train_dir"),
    ("evaluate", {"samples": "{data}", "reference": "{tmp}/statistics.npz", "vae_path": "{autoencoder}"},
     "contains statistics of Inception features; set --inception_path"),
    ("super_res_train", {"data_dir": "{data}", "large_size": 16, "small_size": 8, "channel_mult": "1",
                         "diffusion_steps": 100, "cond_noise_steps": 250},
     "--cond_noise_steps must be <= 100, the steps of the process, got 250"),
    ("image_train_vae", {"cache_dir": "{cache}", "num_channels": 32, "channel_mult": "1,1,1,1,1,1"},
     "fewer levels (--channel_mult), or data of size 32"),
    ("super_res_train", {"cache_dir": "{cache}", "low_res_cache_dir": "{flipped}"},
     "was encoded with --random_flip True"),
    ("image_nll", {"model_path": "{diffusion}/model000002.pt", "cache_dir": "{cache}", "data_dir": "{data}"},
     "conflicts with --data_dir"),
    ("train_autoencoder", {"config": "{config}", "data_dir": "{color}", "image_size": 16, "augment_spectrogram": 1},
     "RGB images whose colormap is unknown: --augment_spectrogram requires levels; set --colormap"),
    ("export", {"model_path": "{diffusion}"}, "no output path is specified; set --out"),
    ("export", {"model_path": "{diffusion}", "out": "{tmp}/x.pt"}, "expected a file name that ends in .safetensors"),
    ("export", {"model_path": "{tmp}/cut.pt", "out": "{tmp}/x.safetensors"}, "cut.pt is corrupt"),
    ("image_nll", {"model_path": "{diffusion}/model000002.pt", "cache_dir": "{data}"},
     "contains neither manifest.json"),
    ("image_nll", {"model_path": "{diffusion}/model000002.pt", "data_dir": "{data}", "image_size": 32},
     "expected x0 shape"),
])
def test_user_error_ends_with_one_line_that_names_it(chain, call, tmp_path, script, flags, message):
    checkpoint_util.save_weights(tmp_path / "whole.pt", {"weight": torch.zeros(999)}, {"kind": "autoencoder"})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4 and no more")
    (tmp_path / "typo.yaml").write_text("autoencoder: {num_chanels: [8, 8]}")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    write_image(tmp_path / "color" / "0.png", 0, mode="RGB")
    write_image(tmp_path / "plain" / "0.png", 0)
    if "{flipped}" in str(flags):
        call("encode_dataset", vae_path=chain.autoencoder, data_dir=chain.data, image_size=32, random_flip=True,
             cache_dir=tmp_path / "flipped")
    named = {"tmp": tmp_path, **{name: tmp_path / name for name in ("color", "plain", "flipped")}}
    folders = collections.ChainMap(named, chain)
    options = {} if script in ("encode_dataset", "export", "make_microdoppler") else {"logdir": tmp_path / "run"}
    trains = ("train_autoencoder", "image_train_vae", "image_train", "super_res_train")
    options.update({"max_steps": 1} if script in trains else {})
    fill = lambda value: value.format_map(folders) if isinstance(value, str) else value
    options.update({key: fill(value) for key, value in flags.items()})
    result = call(script, **options)
    check_error(result, fill(message) if "{tmp}" in message else message)
    assert not list(tmp_path.rglob("state*.json")) and not list(tmp_path.rglob("*.part"))


# --- Errors in separate processes ---


def test_unknown_flag_ends_all_ranks_before_the_rendezvous():
    process = launch("image_train_vae", ranks=2, learning_rate=1)
    assert process.returncode != 0 and "Traceback" not in process.stderr
    assert all("unrecognized arguments: --learning_rate 1" in line for line in error_lines(process.stderr))
    assert error_lines(process.stderr)


@pytest.mark.parametrize("script, kind", [("encode_dataset", "truncated"), ("image_train_vae", "missing")])
def test_bad_images_end_both_ranks(chain, tmp_path, script, kind):
    flags = {"vae_path": chain.autoencoder, "data_dir": bad_data(kind, tmp_path / "data"), "config": chain.config}
    output = {"cache_dir": tmp_path / "cache", "shard_size": 2} if "encode" in script else {"logdir": tmp_path / "run"}
    process = fork(script, ranks=2, **flags, **output)
    assert process.returncode != 0 and "Traceback" not in process.stderr
    assert any(BAD_DATA[kind] in line for line in error_lines(process.stderr)), process.stderr
    assert not list(tmp_path.rglob("manifest.json")) and not list(tmp_path.rglob("state*.json"))


def test_single_process_error_exits_with_status_1(tmp_path):
    process = launch("train_autoencoder", data_dir=tmp_path / "nowhere", logdir=tmp_path / "run")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert error_lines(process.stderr) == [f"error: {tmp_path}/nowhere does not exist; check --data_dir"]
