import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict
from guided_diffusion_vae.data.cache_writer import LatentCacheConfig, write_cache
from guided_diffusion_vae.data import DataConfig, ImageFolder
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.latent_datasets import LatentCache, LatentConfig, LatentFolder
from guided_diffusion_vae.runs import loading, spaces, training
from guided_diffusion_vae.runs.factories import build_classifier, create_model_and_diffusion_vae
from guided_diffusion_vae.runs.flags import parse_explicit
from guided_diffusion_vae.runs.run import Run, RunConfig
from guided_diffusion_vae.runs.spaces import Space
from guided_diffusion_vae.sampling.sampler import SamplingConfig
from guided_diffusion_vae.train_util import DiffusionTrainConfig, seed_initialization
from guided_diffusion_vae.unet import POOLS, ClassifierConfig, ModelConfig
from guided_diffusion_vae.vae_wrapper import NormalizerConfig, VAEConfig, create_vae

SAMPLING = (SamplingConfig, VAEConfig, NormalizerConfig, DataConfig, ModelConfig, DiffusionConfig,
            RunConfig)
MODEL = ModelConfig(num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="", in_channels=3)
PROCESS = DiffusionConfig(diffusion_steps=20, noise_schedule="cosine")
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_process")


# --- Latents and autoencoders ---


def save_autoencoder(path, seed=0, **header):
    config = AutoencoderConfig(in_channels=1, num_channels=(4, 4), norm_num_groups=2, latent_channels=3)
    torch.manual_seed(seed)
    network = create_autoencoder(config)
    checkpoint_util.save_weights(path, network.state_dict(),
                                 {"kind": "autoencoder", "autoencoder": as_dict(config), **header})
    return path


@pytest.fixture
def images(tmp_path):
    """Write four images of two classes; return their DataConfig."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{'ab'[i % 2]}_{i}.png")
    return DataConfig(data_dir=str(folder), image_size=8)


@pytest.fixture
def cache(tmp_path, images):
    codec = create_vae(VAEConfig(vae_path=str(save_autoencoder(tmp_path / "vae.pt"))), CPU)
    config = LatentCacheConfig(str(tmp_path / "cache"), latent_dtype="float32")
    return write_cache(ImageFolder(images), codec, config)


def create_run(*configs, folder=None, **explicit):
    """Return a Run with these configs and default ones of other classes, whose normalizer accepts any std."""
    defaults = LatentConfig(), VAEConfig(), DataConfig(), NormalizerConfig("none", True), DiffusionTrainConfig()
    kinds = {type(config) for config in configs}
    others = [config for config in defaults if type(config) not in kinds]
    return Run("script", [*configs, *others], explicit, folder)


def open_latents(*configs, **settings):
    """Return (source, codec) of the latents that a run trains on."""
    source, space = spaces.open_latent_data(create_run(*configs, **settings))
    return source, space.codec


def open_cache(cache, **vae):
    return open_latents(LatentConfig(str(cache.folder)), VAEConfig(**vae))


def test_open_cache_finds_the_autoencoder_at_its_recorded_path(cache):
    source, codec = open_cache(cache)
    assert isinstance(source, LatentCache) and codec.fingerprint == cache.autoencoder["sha256"]


def test_require_same_space_tolerates_statistics_of_a_subset(cache):
    header = {"autoencoder": None, "latent_shape": [3, 4, 4], "normalizer": {"shift": [0.0], "std": [0.1790]}}
    close, far = ({**header, "normalizer": {"shift": [0.0], "std": [std]}} for std in (0.181, 0.190))
    spaces.require_same_space(header, close, "other", "--classifier_path")
    with pytest.raises(ValueError, match="does not match the diffusion model: expected normalizer"):
        spaces.require_same_space(header, far, "other", "--classifier_path")


def test_open_cache_autoencoder_missing_on_one_rank_is_used_on_none(cache, monkeypatch):
    monkeypatch.setattr(spaces.dist_util, "any_rank", lambda flag: True)
    assert open_cache(cache)[1] is None


def test_open_cache_finds_a_moved_autoencoder_at_vae_path(cache, tmp_path):
    (tmp_path / "vae.pt").rename(tmp_path / "moved.pt")
    assert open_cache(cache)[1] is None
    with pytest.raises(FileNotFoundError,
                       match="vae.pt does not exist .*; set --vae_path to the autoencoder of the latents"):
        spaces.open_codec(cache.autoencoder, VAEConfig())
    assert open_cache(cache, vae_path=str(tmp_path / "moved.pt"))[1].fingerprint == cache.autoencoder["sha256"]


def test_open_cache_rejects_another_autoencoder_by_name(cache, tmp_path):
    other = save_autoencoder(tmp_path / "other.pt", seed=1)
    with pytest.raises(ValueError, match=f"other.pt does not match the latents: expected autoencoder "
                                         f"{cache.autoencoder['sha256'][:16]} .*vae.pt.*, got [0-9a-f]{{16}}; set"):
        open_cache(cache, vae_path=str(other))


def test_open_cache_ignores_a_replaced_autoencoder(cache, tmp_path, capsys):
    save_autoencoder(tmp_path / "vae.pt", seed=1)
    assert open_cache(cache)[1] is None
    sha256 = cache.autoencoder["sha256"][:16]
    assert f"vae.pt no longer contains the autoencoder {sha256} of the latents" in capsys.readouterr().out
    with pytest.raises(ValueError, match="does not match the latents: expected autoencoder"):
        spaces.open_codec(cache.autoencoder, VAEConfig())


@pytest.mark.parametrize("flag, requested, recorded", [
    ("image_size", 16, 8), ("random_flip", True, False), ("crop", "none", "center"), ("pad", True, False),
])
def test_open_cache_rejects_flags_that_conflict_with_its_preprocessing(cache, flag, requested, recorded):
    latents = LatentConfig(str(cache.folder))
    assert open_latents(latents, **{flag: recorded, "lr": 0.1})[0].count == cache.count
    with pytest.raises(ValueError, match=f"--{flag} {requested} conflicts with the cache {cache.folder}, whose images "
                                         f"were read with {flag}={recorded}; omit the flag or re-encode"):
        open_latents(latents, **{flag: requested})


def test_require_same_preprocessing_accepts_any_flag_for_a_plain_folder(tmp_path):
    np.save(tmp_path / "a_1.npy", np.ones((3, 4, 4), np.float32))
    spaces.require_same_preprocessing(LatentFolder(tmp_path), {"image_size": 16, "random_flip": True})


def test_open_cache_and_plain_folder_stay_on_cpu_if_the_gpu_is_full(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (400, 400))
    (tmp_path / "vae.pt").unlink()  # it could not be opened on the simulated GPU
    (tmp_path / "plain").mkdir()
    np.save(tmp_path / "plain" / "a_1.npy", np.ones((3, 4, 4), np.float32))
    for folder, kind in ((cache.folder, LatentCache), (tmp_path / "plain", LatentFolder)):
        monkeypatch.setattr(spaces.dist_util, "dev", lambda: torch.device("cuda"))
        source, codec = open_latents(LatentConfig(str(folder)))
        assert type(source) is kind and codec is None and source.batch([0])[0].device == CPU


def test_open_cache_detects_corrupt_labels(cache):
    labels = cache.folder / "labels.npy"
    labels.write_bytes(labels.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match="labels.npy is corrupt"):
        open_cache(cache)


def test_initial_weights_depend_on_the_seed_and_not_on_the_autoencoder(cache, tmp_path):
    def weights(seed):
        source, codec = open_cache(cache)
        seed_initialization(seed)
        network, _ = create_model_and_diffusion_vae(source.latent_shape, MODEL, PROCESS)
        return torch.cat([p.detach().flatten() for p in network.parameters()]), codec

    (first, codec), (other, _) = weights(0), weights(1)
    (tmp_path / "vae.pt").unlink()
    repeated, missing_codec = weights(0)
    assert codec is not None and missing_codec is None
    assert torch.equal(first, repeated) and not torch.equal(first, other)


def test_open_cache_rejects_another_scale_factor(cache):
    with pytest.raises(ValueError, match="expected scale_factor 0.18215 .*, got 0.5"):
        open_cache(cache, scale_factor=0.5)


@pytest.mark.parametrize("cache_dir, data_dir", [("", ""), ("a", "b")])
def test_open_latents_requires_either_a_cache_or_images(cache_dir, data_dir):
    with pytest.raises(ValueError, match=f"--cache_dir '{cache_dir}' and --data_dir '{data_dir}': specify one"):
        open_latents(LatentConfig(cache_dir), DataConfig(data_dir))


def test_open_latents_encoding_on_the_fly_equals_the_cache(cache, images, tmp_path):
    fly, codec = open_latents(VAEConfig(str(tmp_path / "vae.pt")), images)
    assert fly.statistics["std"] == pytest.approx(cache.statistics["std"], rel=1e-5)
    torch.testing.assert_close(fly.batch([2, 0])[0], cache.batch([2, 0])[0])
    assert codec.fingerprint == fly.autoencoder["sha256"]


def test_open_latents_resumed_run_keeps_its_first_statistics(images, cache, tmp_path):
    vae, folder = VAEConfig(str(tmp_path / "vae.pt")), tmp_path / "run"
    folder.mkdir()
    open_with = lambda count: open_latents(LatentConfig(stats_samples=count), vae, images, folder=folder)
    source, codec = open_with(1)
    normalizer = spaces.fit_normalizer(NormalizerConfig(), source)
    header = training.diffusion_header(source, Space(codec, normalizer), MODEL, PROCESS)
    create_run(folder=folder).save_config(header)
    assert open_with(4)[0].statistics != source.statistics  # config.json alone is not a resumed run
    checkpoint_util.commit(folder, 1, [], {})
    assert open_with(4)[0].statistics == source.statistics
    (folder / "config.json").write_text("{")
    assert open_with(4)[0].statistics["channel_std"] == pytest.approx(cache.statistics["channel_std"], rel=1e-5)


def test_require_same_preprocessing_accepts_a_shorter_spacing():
    cache = SimpleNamespace(folder="cache", preprocessing={"spacing": "2,2,2"})
    spaces.require_same_preprocessing(cache, {"spacing": "2"})
    spaces.require_same_preprocessing(cache, {"spacing": "2.0,2,2"})
    with pytest.raises(ValueError, match="--spacing 2,2,3 conflicts with the cache"):
        spaces.require_same_preprocessing(cache, {"spacing": "2,2,3"})


def test_apply_trained_preprocessing_explicit_flags_take_precedence():
    trained = {**vars(DataConfig(image_size="8x16", crop="none", value_range="0,1", spacing="9")), "data_dir": "there"}
    data = spaces.apply_trained_preprocessing(DataConfig("here", crop="center"), {"crop": "center"}, trained)
    assert data == DataConfig("here", image_size="8x16", value_range="0,1", crop="center")


@pytest.mark.parametrize("image_size, crop", [("8x16", "center"), ("8x16x4", "grid")])
def test_apply_trained_preprocessing_replaces_random_crops(image_size, crop):
    trained = vars(DataConfig(image_size=image_size, crop="random"))
    apply = spaces.apply_trained_preprocessing
    assert apply(DataConfig("here"), {}, trained).crop == crop
    assert apply(DataConfig("here", crop="random"), {"crop": "random"}, trained).crop == "random"


def test_fit_normalizer_fixed_value_must_match_the_statistics(cache):
    std = cache.statistics["std"]
    assert spaces.fit_normalizer(NormalizerConfig(), cache).std == [std]
    assert spaces.fit_normalizer(NormalizerConfig("channel"), cache).std == cache.statistics["channel_std"]
    assert spaces.fit_normalizer(NormalizerConfig(f"{std * 1.05}"), cache).std == [pytest.approx(std * 1.05)]
    with pytest.raises(ValueError, match=f"deviation of 2 with --normalizer .*; set --normalizer auto or {std:.5g}"):
        spaces.fit_normalizer(NormalizerConfig(f"{std / 2}"), cache)
    with pytest.raises(ValueError, match="with --normalizer none: expected 0.9 to 1.1"):
        spaces.fit_normalizer(NormalizerConfig("none"), cache)
    assert spaces.fit_normalizer(NormalizerConfig("none", allow_latent_std=True), cache).std == [1]


def test_infer_model_config_takes_the_classes_of_the_data(cache):
    assert training.infer_model_config(dataclasses.replace(MODEL, class_cond=True), cache).num_classes == 2
    assert training.infer_model_config(MODEL, cache).num_classes == 0
    with pytest.raises(ValueError, match="--num_classes 7 conflicts with .*cache, which has 2; omit the flag"):
        training.infer_model_config(dataclasses.replace(MODEL, class_cond=True, num_classes=7), cache)
    cache.class_names = None
    with pytest.raises(ValueError, match="--class_cond True requires classes, .*cache has none: name the files"):
        training.infer_model_config(dataclasses.replace(MODEL, class_cond=True), cache)


# --- Models from checkpoints ---


@pytest.fixture
def model_path(tmp_path, cache):
    """Return a weights file of a diffusion model on the cache, as written by training."""
    model = training.infer_model_config(dataclasses.replace(MODEL, class_cond=True, dropout=0.1), cache)
    torch.manual_seed(0)
    network, _ = create_model_and_diffusion_vae(cache.latent_shape, model, PROCESS)
    normalizer = spaces.fit_normalizer(NormalizerConfig(), cache)
    header = training.diffusion_header(cache, Space(None, normalizer), model, PROCESS)
    path = tmp_path / "ema_0.9_000001.pt"
    checkpoint_util.save_weights(path, network.state_dict(), {**header, "step": 1})
    return path


def load(path, *flags):
    configs, explicit = parse_explicit("doc", *SAMPLING, argv=["--model_path", str(path), *map(str, flags)])
    run = Run("script", configs, explicit)
    return loading.load_sampler(run, scale=run[NormalizerConfig])


def test_load_sampler_needs_only_a_weights_file(model_path, cache):
    sampler = load(model_path)
    assert sampler.shape == (3, 4, 4) and sampler.image_shape == (1, 8, 8) and sampler.diffusion.num_timesteps == 20
    assert sampler.class_names == ["a", "b"] and sampler.num_classes == 2
    assert sampler.normalizer.std == [cache.statistics["std"]]
    assert not sampler.model.training


def test_sample_dtype_bfloat16_equals_float32_up_to_rounding(model_path):
    float32, bfloat16 = load(model_path), load(model_path, "--sample_dtype", "bfloat16")
    assert bfloat16.model.torso_dtype == torch.bfloat16 and float32.settings != bfloat16.settings
    for sampler in (float32, bfloat16):
        torch.manual_seed(1)
        for parameter in sampler.model.parameters():    # many are initialized to zero, which hides differences
            torch.nn.init.normal_(parameter, std=0.1)
    one, other = (sampler.sample_x0(range(4), (0, 1), "cpu") for sampler in (float32, bfloat16))
    assert one.dtype == other.dtype == torch.float32
    assert 0 < (one - other).abs().max() and (one - other).std() < 0.05 * one.std()
    with pytest.raises(ValueError, match="--sample_dtype bfloat16 and --use_fp16 are mutually exclusive"):
        load(model_path, "--sample_dtype", "bfloat16", "--use_fp16", True)


@pytest.mark.parametrize("flags, match", [
    (["--num_channels", 64], "--num_channels 64 conflicts with .*ema_0.9_000001.pt, trained with num_channels 32"),
    (["--diffusion_steps", 100], "--diffusion_steps 100 conflicts with .* with diffusion_steps 20"),
    (["--noise_schedule", "linear"], "--noise_schedule linear conflicts with .* with noise_schedule cosine"),
    (["--num_classes", 3], "--num_classes 3 conflicts with .* with num_classes 2"),
    (["--class_cond", False], "--class_cond False conflicts with .* with class_cond True"),
    (["--normalizer", "none"], "--normalizer none conflicts with .* with normalizer auto"),
    (["--image_size", 16], "--image_size 16 conflicts with .* with image_size 8"),
    (["--image_channels", 3], "--image_channels 3 conflicts with .* with image_channels 1"),
    (["--scale_factor", 0.5], "expected scale_factor 0.18215 .*, got 0.5"),
])
def test_load_sampler_rejects_a_flag_that_conflicts_with_the_header(model_path, flags, match):
    with pytest.raises(ValueError, match=match):
        load(model_path, *flags)


def test_load_sampler_accepts_matching_and_overridable_flags(model_path, yaml_file):
    path = yaml_file("model: {num_channels: 32, class_cond: true, dropout: 0.3}\ndata: {image_size: 8}\n"
                     "latents: {normalizer: auto}\ndiffusion: {diffusion_steps: 20}\ntraining: {lr: 1.0}")
    sampler = load(model_path, "--config", path, "--timestep_respacing", "ddim5", "--use_checkpoint", True)
    assert sampler.diffusion.num_timesteps == 5 and sampler.model.num_classes == 2


def test_load_sampler_bare_state_dict_is_described_by_flags(model_path, tmp_path):
    sampler = load(model_path)
    weights, _ = checkpoint_util.load_weights(model_path)
    torch.save(dict(weights), tmp_path / "bare.pt")
    flags = ["--vae_path", tmp_path / "vae.pt", "--image_size", 8, "--num_channels", 32, "--channel_mult", "1",
             "--num_res_blocks", 1, "--attention_resolutions", "", "--class_cond", True, "--num_classes", 2,
             "--diffusion_steps", 20, "--noise_schedule", "cosine", "--normalizer", sampler.normalizer.std[0]]
    bare = load(tmp_path / "bare.pt", *flags)
    assert (bare.shape, bare.image_shape, bare.num_classes) == (sampler.shape, sampler.image_shape, 2)
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([3, 7]), torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(bare.model(x, t, y=y), sampler.model(x, t, y=y))
    torch.testing.assert_close(bare.decode(x), sampler.decode(x))


@pytest.mark.parametrize("missing, error, match", [
    ("--vae_path", FileNotFoundError, "no autoencoder is specified; --vae_path expects one of"),
    ("--normalizer", ValueError, "bare.pt is a bare state dict without the statistics of --normalizer auto; set it to"),
    ("--num_channels", ValueError, r"bare.pt does not match the model \(.* differ; .*\); check --model_path and"),
    ("--channel_mult", ValueError, "no default width multipliers for a grid of 4: .*; set --channel_mult"),
])
def test_load_sampler_bare_state_dict_names_the_missing_flag(model_path, tmp_path, missing, error, match):
    torch.save(dict(checkpoint_util.load_weights(model_path)[0]), tmp_path / "bare.pt")
    flags = {"--vae_path": tmp_path / "vae.pt", "--image_size": 8, "--num_channels": 32, "--channel_mult": "1",
             "--num_res_blocks": 1, "--attention_resolutions": "", "--class_cond": True, "--num_classes": 2,
             "--normalizer": 0.2}
    del flags[missing]
    with pytest.raises(error, match=match):
        load(tmp_path / "bare.pt", *(word for pair in flags.items() for word in pair))


def test_load_sampler_run_folder_uses_the_largest_decay_of_the_last_step(model_path, tmp_path, capsys):
    folder = tmp_path / "training"
    folder.mkdir()
    weights, header = checkpoint_util.load_weights(model_path)
    for step in (1, 2):
        names = [checkpoint_util.model_name(step), *(checkpoint_util.ema_name(rate, step) for rate in (0.9, 0.99))]
        for name in names:
            checkpoint_util.save_weights(folder / name, weights, {**header, "step": step, "classes": [name, "b"]})
        checkpoint_util.commit(folder, step, names, {})
    assert load(folder).class_names == ["ema_0.99_000002.pt", "b"]
    assert f"--model_path {folder}: using ema_0.99_000002.pt" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--num_heads 7 conflicts with .*training/ema_0.99_000002.pt, trained"):
        load(folder, "--num_heads", 7)
    with pytest.raises(ValueError, match="ema_0.99_000002.pt: --classifier_path expects .*, got 'diffusion'"):
        loading.load_classifier(loading.open_weights(folder))
    with pytest.raises(FileNotFoundError, match="images contains no complete checkpoint .*check --model_path"):
        load(tmp_path / "images")


def test_load_sampler_run_folder_hashes_and_opens_one_file_once(model_path, tmp_path, monkeypatch):
    folder, calls = tmp_path / "training", []
    folder.mkdir()
    weights, header = checkpoint_util.load_weights(model_path)
    names = ["model000001.pt", "ema_0.9_000001.pt", "opt000001.pt"]
    for name in names:
        checkpoint_util.save_weights(folder / name, weights, header)
    checkpoint_util.commit(folder, 1, names, {})
    for function in ("sha256_of_file", "load"):
        original = getattr(checkpoint_util, function)
        monkeypatch.setattr(checkpoint_util, function, lambda path, *args, name=function, original=original: (
            calls.append((name, path)) or original(path, *args)))
    sampler = load(folder)
    path = folder / "ema_0.9_000001.pt"
    assert [call for call in calls if call[1].parent == folder] == [("sha256_of_file", path), ("load", path)]
    marker = json.loads((folder / "state000001.json").read_text())
    assert sampler.settings["model"] == marker["files"][path.name]["sha256"]


# --- Classifiers ---


CLASSIFIER = ClassifierConfig(classifier_width=32, classifier_depth=1, classifier_attention_resolutions="8",
                              classifier_in_channels=1, classifier_num_classes=3)


@pytest.mark.parametrize("pool", POOLS)
def test_build_classifier_accepts_images_that_are_not_square(pool):
    flags = dataclasses.replace(CLASSIFIER, classifier_pool=pool)
    model, _ = build_classifier(flags, PROCESS, (1, 16, 64))
    assert model.image_size == (16, 64)
    assert model(torch.zeros(2, 1, 16, 64), torch.tensor([0, 7])).shape == (2, 3)


def test_load_classifier_rebuilds_from_run_folder_or_file(tmp_path):
    torch.manual_seed(0)
    model, _ = build_classifier(CLASSIFIER, PROCESS, (1, 16, 64))
    header = {"kind": "classifier", "latent_shape": [1, 16, 64], "model": as_dict(CLASSIFIER),
              "diffusion": as_dict(PROCESS), "classes": ["a", "b", "c"], "data": {}}
    checkpoint_util.save_weights(tmp_path / "model000001.pt", model.state_dict(), header)
    checkpoint_util.commit(tmp_path, 1, ["model000001.pt"], {})
    for path in (tmp_path, tmp_path / "model000001.pt"):
        weights = loading.open_weights(path, "--classifier_path")
        loaded = loading.load_classifier(weights)
        assert weights.header["classes"] == ["a", "b", "c"] and not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_loading_rejects_weights_of_another_kind(model_path, tmp_path):
    with pytest.raises(ValueError, match="vae.pt: --model_path expects .* 'diffusion', got 'autoencoder'"):
        load(tmp_path / "vae.pt")
    with pytest.raises(ValueError, match="ema_0.9_000001.pt: --vae_path expects .* 'autoencoder', got 'diffusion'"):
        load(model_path, "--vae_path", model_path)
    with pytest.raises(ValueError, match="000001.pt: --classifier_path expects .*'classifier', got 'diffusion'"):
        loading.load_classifier(loading.open_weights(model_path))
    torch.save(dict(checkpoint_util.load_weights(model_path)[0]), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="bare.pt has no header; --classifier_path expects a checkpoint"):
        loading.load_classifier(loading.open_weights(tmp_path / "bare.pt"))


def test_load_sampler_names_a_missing_or_corrupt_file(model_path, tmp_path):
    with pytest.raises(FileNotFoundError, match="--model_path is not set: expected a run folder"):
        load("")
    with pytest.raises(FileNotFoundError, match="gone.pt.*check --model_path"):
        load(tmp_path / "gone.pt")
    model_path.write_bytes(model_path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="ema_0.9_000001.pt is corrupt .*check --model_path"):
        load(model_path)


def test_load_sampler_rejects_an_autoencoder_replaced_after_training(model_path, tmp_path):
    save_autoencoder(tmp_path / "vae.pt", seed=1)
    with pytest.raises(ValueError, match="vae.pt does not match the latents: expected autoencoder"):
        load(model_path)
