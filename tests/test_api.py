"""The interface for notebooks: it does what the commands do, and every setting that is given has an effect."""

import os
import re
import shutil
import signal
import threading
import types
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import guided_diffusion_vae
from guided_diffusion_vae import LatentCache, Sampler, VAEInterface, api, evaluate, run_command, train
from guided_diffusion_vae.autoencoder import AutoencoderConfig
from guided_diffusion_vae.config import changed_fields
from guided_diffusion_vae.data import open_npz, voxel_affine, write_nifti
from guided_diffusion_vae.files import read_record
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.latent_datasets import EncodedImages
from guided_diffusion_vae.runs import loading
from guided_diffusion_vae.runs.configs import ModelConfig, NormalizerConfig, SamplingConfig, VAEConfig
from guided_diffusion_vae.runs.run import Run
from guided_diffusion_vae.train_util import DiffusionTrainConfig, TrainLoop

nibabel.imageglobals.logger.setLevel("ERROR")
AUTOENCODER = AutoencoderConfig(num_channels=(8, 8), attention_levels=(False, False), num_res_blocks=1,
                                norm_num_groups=4)
PROCESS = DiffusionConfig(diffusion_steps=8, noise_schedule="cosine")
NETWORK = ModelConfig(num_channels=32, num_res_blocks=1, attention_resolutions="", channel_mult="1")
STEP = dict(max_steps=1, batch_size=4, ema_rate="0.9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images of two classes, tiny models of them, a cache, and samples of the command."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, [16, 16], np.uint8)).save(folder / "data" / f"{'ab'[i % 2]}_{i}.png")
    train(AUTOENCODER, data=folder / "data", logdir=folder / "vae", model="autoencoder", image_size=16, **STEP)
    assert run_command("encode-dataset", vae_path=folder / "vae", data_dir=folder / "data",
                       cache_dir=folder / "cache") is None
    run = train([NETWORK, PROCESS], data=LatentCache.open(folder / "cache"),
                logdir=folder / "diffusion", class_cond=True, **STEP)
    assert run == folder / "diffusion" and (run / "ema_0.9_000001.pt").exists()
    return folder


@pytest.fixture(scope="module")
def sampler(folder):
    return Sampler.open(folder / "diffusion", steps=3, batch_size=2)


def test_package_offers_the_interface_and_nothing_else():
    assert {name: getattr(guided_diffusion_vae, name) for name in api.__all__} == {
        name: getattr(api, name) for name in guided_diffusion_vae.__all__}
    with pytest.raises(AttributeError, match="has no attribute 'Samplers'"):
        guided_diffusion_vae.Samplers  # noqa: B018


@pytest.mark.filterwarnings("ignore:Fréchet distance from 8 samples")
def test_page_on_run_folders_names_every_file(folder, call, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "run_folder.md").read_text()
    cells = " ".join(re.findall(r"^\|([^|]+)\|", page, re.MULTILINE))
    named = "|".join(re.sub("NxHxWxC|[A-Z]{2,}|…", ".+", name.replace(".", r"\.").rstrip("/"))
                     for name in re.findall("`([^`]+)`", cells))
    for script, flags in {
        "image_sample_vae": dict(model_path=folder / "diffusion", num_samples=2, timestep_respacing=2),
        "check_roundtrip": dict(vae_path=folder / "vae", data_dir=folder / "data", save_npz=True),
        "evaluate": dict(samples=folder / "data", reference=folder / "data", train_dir=folder / "data", image_size=16,
                         vae_path=folder / "vae"),
    }.items():
        status, _, error = call(script, **flags, logdir=tmp_path / script)
        assert status == 0, error
    written = [path.relative_to(root) for root in (folder, tmp_path) for path in root.glob("*/**/*")
               if path.is_file() and path.relative_to(root).parts[0] != "data"]
    assert len(written) > 40
    assert [str(path) for path in written if not any(
        re.fullmatch(named, part) for part in (*path.parts[1:], "/".join(path.parts[1:])))] == []


# --- Samples ---


def test_samples_are_those_of_the_command(folder, sampler, call):
    flags = dict(model_path=folder / "diffusion", num_samples=3, batch_size=2, timestep_respacing=3, classes="b,a",
                 logdir=folder / "samples")
    assert call("image_sample_vae", **flags)[0] == 0
    expected = open_npz(folder / "samples" / "samples_3x16x16x1.npz").images
    images = sampler.images(classes=["b", "a"], n=3)
    assert images.dtype == np.uint8 and np.array_equal(images, expected)
    assert np.array_equal(images, sampler.images(classes=[1, 0], n=3)) and sampler.class_names == ["a", "b"]
    assert np.array_equal(images, np.stack([np.asarray(image)[..., None] for image in
                                            sampler.images(["b", "a"], 3, pil=True)]))
    assert not np.array_equal(images, sampler.images(classes=["b", "a"], n=3, seed=1))


def test_settings_of_open_are_the_defaults_of_images(folder, sampler):
    opened = Sampler.open(folder / "diffusion", 3, SamplingConfig(classes="b", num_samples=3, seed=5), batch_size=2)
    assert np.array_equal(opened.images(), sampler.images(["b"], 3, seed=5)) and opened.affine is None


def test_sampler_rejects_settings_without_effect(folder):
    for settings, match in (
        ({"logdir": "runs/x"}, "^logdir: has no effect on samples that are returned"),
        ({"save_individual": False}, "^save_individual: has no effect"),
        ({"dry_run": True}, "^dry_run: has no effect"), ({"save_db": True}, "^save_db: has no effect"),
        ({"stepz": 3}, "^unknown setting 'stepz'; "), ({"clas": "a"}, "unknown setting 'clas'; did you mean 'classes'"),
        ({"cfg_scale": 2.0}, "requires a model trained with --class_dropout"),
        ({"config": DiffusionTrainConfig(lr=1.0)}, "unknown setting 'lr'"),
        ({"config": ModelConfig(num_channels=64)}, "--num_channels 64 conflicts with .*num_channels 32"),
        ({"seed": "many"}, "--seed"),
    ):
        with pytest.raises(ValueError, match=match):
            Sampler.open(folder / "diffusion", **settings)


@pytest.mark.parametrize("arguments, match", [({"n": 0}, "^n: expected at least 1"),
                                              ({"classes": ["c"]}, "there is no class 'c'")])
def test_images_rejects_wrong_arguments(sampler, arguments, match):
    with pytest.raises(ValueError, match=match):
        sampler.images(**arguments)


def test_setting_of_a_config_object_is_honored(folder):
    respaced = DiffusionConfig(timestep_respacing="5")
    assert Sampler.open(folder / "diffusion", config=respaced).sampler.diffusion.num_timesteps == 5
    assert Sampler.open(folder / "diffusion", 7, respaced).sampler.diffusion.num_timesteps == 7
    configs = SamplingConfig(str(folder / "diffusion")), VAEConfig(), NormalizerConfig(), ModelConfig(), respaced
    run = Run("image_sample_vae", configs)
    assert loading.load_sampler(run).diffusion.num_timesteps == 5
    # A config that a command derives from its data is not a setting, which could conflict with a model.
    derived = run.override(DiffusionConfig(timestep_respacing="6"))
    assert derived.explicit == run.explicit == {"model_path": str(folder / "diffusion"), "timestep_respacing": "5"}


def test_volumes_have_an_affine(tmp_path):
    (tmp_path / "data").mkdir()
    volume = np.random.default_rng(0).integers(0, 255, [8, 8, 8], np.uint8)
    write_nifti(tmp_path / "data" / "a.nii.gz", volume, (1.0, 2.0, 3.0))
    train([NETWORK, PROCESS], data=tmp_path / "data", logdir=tmp_path / "run", model="pixels", image_size="8x8x8",
          **{**STEP, "batch_size": 1})
    sampler = Sampler.open(tmp_path / "run", steps=2)
    assert sampler.images(n=1).shape == (1, 8, 8, 8, 1)
    assert np.array_equal(sampler.affine, nibabel.load(tmp_path / "data" / "a.nii.gz").affine)
    assert np.array_equal(sampler.affine, np.diag([1.0, 2.0, 3.0, 1.0]))
    with pytest.raises(ValueError, match="^pil: expected images, got a model of volumes; use the array"):
        sampler.images(n=1, pil=True)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAL", "PIR"])
def test_voxel_affine_has_the_orientation(orientation):
    affine = voxel_affine((1.0, 2.0, 3.0), orientation)
    assert "".join(nibabel.aff2axcodes(affine)) == orientation
    assert np.array_equal(nibabel.affines.voxel_sizes(affine), [1, 2, 3])


# --- Autoencoders and caches ---


def test_autoencoder_encodes_arrays_pil_images_and_tensors_alike(folder):
    vae = VAEInterface(folder / "vae")
    arrays = np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "data").iterdir())])[..., None]
    unit = torch.from_numpy(np.moveaxis(arrays, -1, 1)).float() / 255
    latents = vae.encode(arrays)
    cached = LatentCache.open(folder / "cache")
    torch.testing.assert_close(latents, cached.latents(cached.read(range(8))), atol=2e-3, rtol=0)   # in float16
    for same in (unit, arrays.astype(np.float32) / 255, [Image.fromarray(image[..., 0]) for image in arrays]):
        torch.testing.assert_close(vae.encode(same), latents)
    for first in (arrays[0], Image.fromarray(arrays[0, ..., 0])):
        torch.testing.assert_close(vae.encode(first), vae.encode(arrays[:1]))
    decoded = vae.decode(latents)
    expected = np.moveaxis((vae.decode_batch(latents) * 255).round().byte().numpy(), 1, -1)
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, expected)
    assert np.array_equal(vae.decode(latents.numpy()), decoded)
    assert np.array_equal(np.stack(vae.decode(latents, pil=True))[..., None], decoded)


@pytest.mark.parametrize("images, match", [
    (Image.new("RGBA", [16, 16]), "PIL images in mode L or RGB, got RGBA; convert them"), (["a.png"], "got str; "),
    (np.zeros([16, 16], np.uint8), r"an array of 3 or 4 axes, the channels last, got \(16, 16\)"),
    (np.full([1, 16, 16, 1], 9.0), r"expected values in \[0, 1\]"), (np.zeros([1, 16, 16, 3], np.uint8), "channels"),
])
def test_autoencoder_rejects_other_images(folder, images, match):
    with pytest.raises(ValueError, match=match):
        VAEInterface(folder / "vae").encode(images)


def test_pil_images_of_volumes_are_rejected():
    codec = types.SimpleNamespace(decode_batch=lambda latents: latents)
    with pytest.raises(ValueError, match="^pil: expected images .* use the array"):
        VAEInterface.decode(codec, torch.zeros(1, 1, 2, 2, 2), pil=True)


# --- Training, evaluation and other commands ---


def test_run_command_returns_the_run_folder(folder, tmp_path):
    settings = dict(vae_path=folder / "vae", data_dir=folder / "data", logdir=tmp_path / "run")
    assert run_command("check-roundtrip", **settings) == tmp_path / "run" and (tmp_path / "run/metrics.json").is_file()
    for name, changed, match in (("check-roundtrips", {}, "unknown command .*did you mean 'check_roundtrip'"),
                                 ("check_roundtrip", {"vae": "x"}, "unknown setting 'vae'")):
        with pytest.raises(ValueError, match=match):
            run_command(name, **{**settings, **changed})


def test_train_resumes_and_names_unknown_models_and_settings(folder, tmp_path):
    shutil.copytree(folder / "diffusion", tmp_path / "diffusion")
    settings = dict(data=folder / "cache", logdir=tmp_path / "diffusion", class_cond=True, **STEP)
    configs = [NETWORK, PROCESS]
    train(configs, **{**settings, "max_steps": 2})
    assert (tmp_path / "diffusion" / "model000002.pt").exists()
    for changed, match in (({"model": "pixel"}, "unknown value 'pixel'; did you mean 'pixels'"),
                           ({"batchsize": 2}, "unknown setting 'batchsize'; did you mean 'batch_size'"),
                           ({"model": "autoencoder"}, "unknown setting '"), ({"batch_size": 0}, "--batch_size")):
        with pytest.raises(ValueError, match=match):
            train(configs, **{**settings, **changed})


def test_quiet_calls_print_nothing_and_write_their_log(folder, tmp_path, capfd):
    train([NETWORK, PROCESS], data=folder / "cache", logdir=tmp_path, quiet=True, **STEP)
    assert run_command("encode_dataset", vae_path=folder / "vae", data_dir=folder / "data",
                       cache_dir=tmp_path / "cache", quiet=True) is None
    images = np.zeros([8, 16, 16, 1], np.uint8)
    with pytest.warns(UserWarning, match="Fréchet distance from 8 samples"):
        report = evaluate(images, folder / "data", features=folder / "vae", image_size=16)
    assert capfd.readouterr() == ("", "")
    assert "8 latents 4x8x8" in (tmp_path / "log.txt").read_text()
    with pytest.warns(UserWarning, match="Fréchet distance from 8 samples"):
        assert evaluate(images, folder / "data", features=folder / "vae", image_size=16, quiet=False) == report
    assert f"frechet: {report['frechet']:.5g}" in capfd.readouterr().out


@pytest.fixture
def signal_at(monkeypatch):
    """Send this process a signal before a training takes a step."""
    run_step = TrainLoop.run_step

    def arrange(number, step):
        def run_and_signal(loop, *batch):
            if loop.step == step:
                os.kill(os.getpid(), number)
            run_step(loop, *batch)

        monkeypatch.setattr(TrainLoop, "run_step", run_and_signal)
    return arrange


def test_training_that_a_signal_ends_raises_and_the_same_call_resumes_it(folder, tmp_path, signal_at, call):
    settings = {"config": [NETWORK, PROCESS], "data": folder / "cache", "logdir": tmp_path / "run",
                **STEP, "max_steps": 5, "preview_interval": -1}
    for number, step in ((signal.SIGTERM, 0), (signal.SIGUSR1, 1)):
        signal_at(number, step)
        with pytest.raises(KeyboardInterrupt, match=f"; step {step + 1} is saved in .*run, from which the same call"):
            train(**settings)
    record = read_record(tmp_path / "run" / "commands.json")["commands"][-1]
    assert record["seconds"] > 0
    flags = {name: value for name, value in settings.items() if name not in ("config", "data")}
    signal_at(signal.SIGTERM, 3)
    network = {name: vars(each)[name] for each in (NETWORK, PROCESS) for name in changed_fields(each)}
    status, out, error = call("image_train_vae", cache_dir=settings["data"], **flags, **network)
    assert status == 0 and "saved step 4; rerun the same command to resume" in out, error
    assert train(**settings) == tmp_path / "run" and (tmp_path / "run" / "model000005.pt").exists()


def test_threads_that_read_ahead_end_with_an_interrupted_training(folder, tmp_path, monkeypatch):
    def interrupt(loop, *batch):
        raise KeyboardInterrupt

    reading = lambda: [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    monkeypatch.setattr(TrainLoop, "run_step", interrupt)
    with pytest.raises(KeyboardInterrupt) as traceback:    # which keeps the loop
        train([NETWORK, PROCESS], data=folder / "cache", logdir=tmp_path, **STEP | {"max_steps": 99})
    for thread in reading():
        thread.join(10)
    assert traceback.value and not reading()


@pytest.mark.parametrize("model, settings, match", [
    ("diffusion", {"condition_on": "speed"}, "has no attribute speed"),
    ("diffusion", {"batch_size": 9}, "8 items are fewer than one step requires"),
    ("diffusion", {"init_from": "nowhere"}, "nowhere does not exist; check --init_from"),
    ("diffusion", {"num_channels": 48}, "do not divide"),
    ("diffusion", {"channel_mult": "1,2,4,8,16"}, "a multiple of"),
    ("diffusion", {"noise_schedule": "cosine_zero_snr"}, "ends in pure noise"),
    ("diffusion", {"condition_dir": "{folder}/vae/previews"}, "has no condition for 8 of 8 items"),
    ("classifier", {"classifier_width": 48}, "do not divide"), ("classifier", {"val_data_dir": "nowhere"}, "nowhere"),
    ("classifier", {"val_data_dir": "{folder}/vae/previews", "image_size": 16}, "has no classes"),
])
def test_settings_are_checked_before_latents_are_measured(folder, tmp_path, monkeypatch, model, settings, match):
    def measure(*arguments, **keywords):
        raise AssertionError("measured")

    monkeypatch.setattr(EncodedImages, "measure", measure)
    settings = {name: value.format(folder=folder) if isinstance(value, str) else value
                for name, value in settings.items()}
    classifier = {"classifier_width": 64, "classifier_attention_resolutions": "", "classifier_channel_mult": "1"}
    defaults = {"batch_size": 2, "vae_path": folder / "vae", **(classifier if model == "classifier" else {})}
    with pytest.raises((ValueError, OSError), match=match):
        train(None if model == "classifier" else NETWORK, data=folder / "data", model=model, logdir=tmp_path / "run",
              **{**defaults, **settings})
    with pytest.raises(AssertionError, match="measured"):
        train(None if model == "classifier" else NETWORK, data=folder / "data", model=model, logdir=tmp_path / "run",
              **defaults)


def test_training_in_another_thread_needs_no_signals(folder, tmp_path):
    settings = {"data": folder / "cache", "logdir": tmp_path / "run", **STEP, "preview_interval": -1}
    thread = threading.Thread(target=train, args=([NETWORK, PROCESS],), kwargs=settings)
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "model000001.pt").exists()


@pytest.mark.filterwarnings("ignore:Fréchet distance from 8 samples")
def test_evaluation_ends_with_the_training_that_a_signal_ends(folder, tmp_path, signal_at):
    arguments = {"samples": folder / "data", "reference": folder / "data", "training": folder / "data",
                 "features": folder / "vae", "logdir": tmp_path / "e", "image_size": 16, "tstr_iterations": 3,
                 "classifier_width": 64, "classifier_depth": 1, "classifier_attention_resolutions": "",
                 "classifier_channel_mult": "1", "tstr_batch_size": 4, "report": False}
    signal_at(signal.SIGTERM, 1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(**arguments)
    assert not (tmp_path / "e" / "metrics.json").exists()
    signal_at(signal.SIGTERM, 9)
    assert "train_on_samples_test_on_real" in evaluate(**arguments)


@pytest.mark.filterwarnings("ignore:Fréchet distance from 8 samples")
def test_evaluation_of_arrays_equals_that_of_files(folder, tmp_path):
    arrays = np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "data").iterdir())])[..., None]
    inverted = 255 - arrays
    report = evaluate(inverted, arrays, folder / "vae", training=arrays)
    assert (report["num_samples"], report["num_reference"]) == (8, 8) and report["frechet"] > 0
    np.savez(tmp_path / "inverted.npz", inverted)
    saved = evaluate(tmp_path / "inverted.npz", folder / "data", features=folder / "vae", logdir=tmp_path / "run")
    assert saved["frechet"] == pytest.approx(report["frechet"], rel=1e-4)
    assert (tmp_path / "run" / "metrics.json").is_file() and report["training_to_reference"]["frechet"] < 1e-4


@pytest.mark.filterwarnings("ignore:Fréchet distance from 8 samples")
def test_features_of_a_classifier_are_recognized(folder, tmp_path):
    train(data=folder / "data", logdir=tmp_path / "classifier", model="classifier", noised=False, image_size=16,
          classifier_width=64, classifier_depth=1, classifier_channel_mult="1", classifier_attention_resolutions="",
          iterations=1, batch_size=4)
    report = evaluate(folder / "data", folder / "data", features=tmp_path / "classifier")
    assert report["class_agreement"]["count"] == 8
    assert api._features_flag("weights-inception-2015-12-05-6726825d.pth") == "inception_path"


def test_evaluation_rejects_arrays_of_floats(folder):
    with pytest.raises(ValueError, match="^samples: expected 8-bit images, got float64"):
        evaluate(np.zeros([2, 16, 16, 1]), folder / "data", folder / "vae")
