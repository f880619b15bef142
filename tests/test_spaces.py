import dataclasses
import hashlib
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
from guided_diffusion_vae.data import DataConfig, ImageFolder, SmallCacheConfig, open_npz
from guided_diffusion_vae.evaluation import EvaluateConfig, LikelihoodConfig
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.latent_datasets import EncodedImages, LatentCache, LatentConfig, LatentFolder
from guided_diffusion_vae.nn import keyed_randn
from guided_diffusion_vae.resample import LossSecondMomentResampler
from guided_diffusion_vae.runs import loading, spaces, training
from guided_diffusion_vae.runs.factories import build_classifier, create_diffusion, create_model_and_diffusion_vae
from guided_diffusion_vae.runs.flags import parse_explicit
from guided_diffusion_vae.runs.run import Run, RunConfig
from guided_diffusion_vae.runs.spaces import Space
from guided_diffusion_vae.sampling import (
    BaseConfig, CompiledNetwork, GuidanceConfig, SamplingConfig, generate_samples,
)
from guided_diffusion_vae.train_util import (
    ClassifierTrainConfig, DiffusionTrainConfig, TrainLoop, seed_initialization,
)
from guided_diffusion_vae.unet import POOLS, ClassifierConfig, ModelConfig, SuperResConfig
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, NormalizerConfig, PixelCodec, VAEConfig, create_vae

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
def encode(tmp_path, images):
    """Encode the images into a cache; return it."""
    save_autoencoder(tmp_path / "vae.pt")

    def encode(name, scale_factor=0.0, vae="vae.pt", store="moments", **data):
        codec = create_vae(VAEConfig(vae_path=str(tmp_path / vae), scale_factor=scale_factor), CPU)
        config = LatentCacheConfig(str(tmp_path / name), store, latent_dtype="float32")
        return write_cache(ImageFolder(dataclasses.replace(images, **data)), codec, config)
    return encode


@pytest.fixture
def cache(encode):
    return encode("cache")


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
    close, far = ({**header, "normalizer": {"shift": [0.0], "std": [std]}} for std in (0.181, 0.184))
    spaces.require_same_space(header, close, "other", "--classifier_path")
    with pytest.raises(ValueError, match="does not match the diffusion model: expected normalizer"):
        spaces.require_same_space(header, far, "other", "--classifier_path")


@pytest.mark.parametrize("change, name", [
    ({"normalizer": {"shift": [1.0, 0.0], "std": [1.0, 2.5]}}, "normalizer"),
    ({"normalizer": {"shift": [1.1, 0.0], "std": [1.0, 2.0]}}, "normalizer"),
    ({"normalizer": {"shift": [0.0], "std": [1.0]}}, "normalizer"),
    ({"latent_shape": [2, 4, 8]}, "x0 shape"), ({"autoencoder": {"sha256": "b"}}, "autoencoder"),
])
def test_require_same_space_compares_every_channel_and_fact(change, name):
    header = {"autoencoder": {"sha256": "a"}, "latent_shape": [2, 4, 4],
              "normalizer": {"shift": [1.0, 0.0], "std": [1.0, 2.0]}}
    spaces.require_same_space(header, dict(header), "other", "--classifier_path")
    with pytest.raises(ValueError, match=f"other .--classifier_path. does not match .*: expected {name} "):
        spaces.require_same_space(header, {**header, **change}, "other", "--classifier_path")


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
    ("alpha", "white", "refuse"),   # alias
])
def test_open_cache_rejects_flags_that_conflict_with_its_preprocessing(cache, flag, requested, recorded):
    latents = LatentConfig(str(cache.folder))
    assert open_latents(latents, **{flag: recorded, "lr": 0.1})[0].count == cache.count
    with pytest.raises(ValueError, match=f"--{flag} {requested} conflicts with the cache {cache.folder}, whose images "
                                         f"were read with {flag}={recorded}; omit the flag or re-encode"):
        open_latents(latents, **{flag: requested})


def test_require_same_preprocessing_accepts_any_flag_for_a_plain_folder(tmp_path):
    np.save(tmp_path / "a_1.npy", np.ones((3, 4, 4), np.float32))
    spaces.require_same_preprocessing(LatentFolder(tmp_path), {"image_size": 16, "alpha": "white"})


def test_open_cache_and_plain_folder_stay_on_cpu_if_the_gpu_is_full(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (400, 10**9))   # free, total
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
    checkpoint_util.commit(folder, 1, {}, {})
    assert open_with(4)[0].statistics == source.statistics
    text = (folder / "config.json").read_text()
    for corrupt, problem in (("{", "invalid JSON"), (text.replace('"channel_std"', '"channel_sTd"'), "is corrupt")):
        (folder / "config.json").write_text(corrupt)
        with pytest.raises(ValueError, match=f"config.json:? {problem}.*remove it"):
            open_with(4)
    (folder / "config.json").unlink()
    assert open_with(4)[0].statistics["channel_std"] == pytest.approx(cache.statistics["channel_std"], rel=1e-5)


def test_require_same_preprocessing_accepts_a_shorter_spacing():
    cache = SimpleNamespace(folder="cache", preprocessing={"spacing": "2,2,2"})
    spaces.require_same_preprocessing(cache, {"spacing": "2"})
    spaces.require_same_preprocessing(cache, {"spacing": "2.0,2,2"})
    with pytest.raises(ValueError, match="--spacing 2,2,3 conflicts with the cache"):
        spaces.require_same_preprocessing(cache, {"spacing": "2,2,3"})


def test_require_same_preprocessing_compares_voxel_size_with_the_image_size():
    image_size = DataConfig(voxel_size=(4, 4, 8)).image_size
    cache = SimpleNamespace(folder="cache", preprocessing={"image_size": image_size})
    spaces.require_same_preprocessing(cache, {"voxel_size": (4, 4, 8)})
    with pytest.raises(ValueError, match="--image_size .* conflicts with the cache"):
        spaces.require_same_preprocessing(cache, {"voxel_size": (4, 4, 4)})


def test_apply_trained_preprocessing_explicit_flags_take_precedence():
    trained = {**vars(DataConfig(image_size="8x16", crop="none", value_range="0,1", spacing="9")), "data_dir": "there",
               "random_flip": True}
    data = spaces.apply_trained_preprocessing(DataConfig("here", crop="center"), {"crop": "center"}, trained)
    assert data == DataConfig("here", image_size="8x16", value_range="0,1", crop="center")
    voxels = DataConfig("here", voxel_size=(4, 4, 4))
    data = spaces.apply_trained_preprocessing(voxels, {"voxel_size": (4, 4, 4)}, trained)
    assert data.image_size == voxels.image_size


@pytest.mark.parametrize("image_size, crop", [("8x16", "center"), ("8x16x4", "grid")])
def test_apply_trained_preprocessing_replaces_random_crops(image_size, crop):
    trained = vars(DataConfig(image_size=image_size, crop="random"))
    apply = spaces.apply_trained_preprocessing
    assert apply(DataConfig("here"), {}, trained).crop == crop
    assert apply(DataConfig("here", crop="random"), {"crop": "random"}, trained).crop == "random"


def test_open_codec_uses_the_recorded_scale_factor(encode):
    cache = encode("scaled", scale_factor=0.5)
    assert spaces.open_codec(cache.autoencoder, VAEConfig()).scale_factor == 0.5


def test_on_the_fly_statistics_are_of_the_requested_images_and_seed(images, tmp_path):
    vae = VAEConfig(str(save_autoencoder(tmp_path / "vae.pt")))

    def statistics(count, seed):
        configs = LatentConfig(stats_samples=count), vae, images, DiffusionTrainConfig(seed=seed)
        return open_latents(*configs)[0].statistics

    codec = create_vae(vae, CPU)
    for count, seed in ((1, 0), (1, 3), (3, 0)):
        assert statistics(count, seed) == EncodedImages(ImageFolder(images), codec, count, seed).statistics
    assert statistics(1, 0) != statistics(1, 3)


def test_space_encodes_padded_images_to_normalized_latents():
    codec = PixelCodec(1)
    codec.factors, codec.preprocessing = (2, 2), {"pad": True}
    images = torch.rand(2, 1, 3, 4)
    x0 = Space(codec, LatentNormalizer([0.5], [2.0], "channel")).encode(images)
    assert x0.shape == (2, 1, 4, 4) and torch.equal(x0[:, :, 3], x0[:, :, 2])
    torch.testing.assert_close(x0[:, :, :3], (2 * images - 1.5) / 2)


def test_space_header_describes_data_without_their_padding(cache, tmp_path):
    (tmp_path / "odd").mkdir()
    Image.new("L", (8, 7)).save(tmp_path / "odd" / "a_0.png")
    codec = create_vae(VAEConfig(str(tmp_path / "vae.pt"), scale_factor=0.5), CPU)
    padded = ImageFolder(DataConfig(str(tmp_path / "odd"), "7x8", pad=True), multiple=codec.factors)
    space = Space(codec, LatentNormalizer([0], [1], "none"))
    header = spaces.space_header(EncodedImages(padded, codec, statistics={}), space)
    assert header["image_shape"] == [1, 7, 8] and header["latent_shape"] == [3, 4, 4]
    assert header["scale_factor"] == 0.5 == header["autoencoder"]["scale_factor"]
    (tmp_path / "plain").mkdir()
    np.save(tmp_path / "plain" / "a_1.npy", np.ones((3, 4, 4), np.float32))
    header = spaces.space_header(LatentFolder(tmp_path / "plain"), space)
    assert header["autoencoder"] == codec.describe() and header["scale_factor"] == 0.5


# --- Validation data ---


def open_validation(path, source, space, *configs, **explicit):
    run = create_run(*configs, ClassifierTrainConfig(val_data_dir=str(path)), **explicit)
    return spaces.open_validation(run, source, space)


@pytest.mark.parametrize("with_codec", [True, False])
def test_validation_cache_must_have_the_autoencoder_and_scale_of_the_run(encode, cache, tmp_path, with_codec):
    save_autoencoder(tmp_path / "other.pt", seed=1)
    codec = create_vae(VAEConfig(str(tmp_path / "vae.pt")), CPU) if with_codec else None
    space = Space(codec, LatentNormalizer([0], [1], "none"))
    assert open_validation(cache.folder, cache, space).count == 4
    other, scaled = encode("other", vae="other.pt"), encode("scaled", scale_factor=0.5)
    with pytest.raises(ValueError, match=r"other: expected latents of the autoencoder of this run \(.*vae.pt\), got a "
                                         ".*other.pt; set --val_data_dir to images or another cache"):
        open_validation(other.folder, cache, space)
    with pytest.raises(ValueError, match="scaled: expected latents scaled by 0.18215 as those of this run, got 0.5"):
        open_validation(scaled.folder, cache, space)


def test_validation_latents_must_have_the_shape_of_the_training_latents(encode, cache, images, tmp_path):
    codec = create_vae(VAEConfig(str(tmp_path / "vae.pt")), CPU)
    space = Space(codec, LatentNormalizer([0], [1], "none"))
    smaller = encode("smaller", image_size=4)
    message = r"\(--val_data_dir\): expected latents of shape \(.*\) as in .*, got \(.*\); set --val_data_dir to images"
    with pytest.raises(ValueError, match=f"smaller {message}"):
        open_validation(smaller.folder, cache, space)
    with pytest.raises(ValueError, match=f"images {message}"):
        open_validation(images.data_dir, smaller, space, images)


def test_validation_images_are_encoded_in_the_space_without_flips(encode, cache, images, tmp_path):
    codec = create_vae(VAEConfig(str(tmp_path / "vae.pt")), CPU)
    data = dataclasses.replace(images, data_dir="elsewhere", random_flip=True, crop="random")
    source = open_validation(images.data_dir, cache, Space(codec, None), data, crop="random")
    assert source.random_flip is False and source.random_crop is True and source.codec is codec
    torch.testing.assert_close(source.batch([2])[0], cache.batch([2])[0])
    with pytest.raises(ValueError, match="cache: expected latents of the autoencoder of this run"):
        spaces.open_validation(create_run(ClassifierTrainConfig(val_data_dir=str(cache.folder))),
                               *spaces.open_pixels(ImageFolder(images)))
    with pytest.raises(FileNotFoundError, match="the autoencoder that encodes these images is not available"):
        open_validation(images.data_dir, cache, Space(None, None))


def test_validation_cache_may_contain_pixels_if_the_run_does(cache, images, tmp_path):
    pixels, space = spaces.open_pixels(ImageFolder(images))
    config = LatentCacheConfig(str(tmp_path / "pixels"), latent_dtype="float32")
    stored = write_cache(pixels.dataset, space.codec, config)
    for source in (pixels, stored):
        assert torch.equal(open_validation(stored.folder, source, space).batch([2])[0], pixels.batch([2])[0])
    for path, source, own in (cache.folder, pixels, space), (stored.folder, cache, Space(None, space.normalizer)):
        with pytest.raises(ValueError, match=r"autoencoder of this run \(.*\), got a cache of .*(none: pixels|vae.pt)"):
            open_validation(path, source, own)


# --- Low-resolution data ---


def open_low_res(source, low_res="", small_size=4, codec=None, **explicit):
    run = create_run(SmallCacheConfig(str(low_res)), SuperResConfig(large_size=8, small_size=small_size), **explicit)
    return spaces.open_low_res(run, source, Space(codec, None)), run


def test_low_res_images_are_those_of_the_source_downsampled(images):
    source, space = spaces.open_pixels(ImageFolder(images))
    low_res, run = open_low_res(source, codec=space.codec)
    expected = torch.nn.functional.avg_pool2d(ImageFolder(images).batch([3, 1]), 2)
    torch.testing.assert_close(low_res.batch([3, 1])[0], 2 * expected - 1)
    sizes = spaces.infer_sizes(run, source, low_res)
    assert (sizes.large_size, sizes.small_size) == (8, 4)
    with pytest.raises(ValueError, match="--small_size 2 conflicts with .*images, whose images are 4"):
        spaces.infer_sizes(create_run(SuperResConfig(), small_size=2), source, low_res)
    for size in (8, "4x8"):     # one axis is not smaller
        with pytest.raises(ValueError, match="expected less than .*; set --small_size below --large_size"):
            open_low_res(source, small_size=size, codec=space.codec)


def test_low_res_cache_must_have_the_same_items_and_settings(encode, cache, images, tmp_path):
    small = encode("small", image_size=4)
    low_res, run = open_low_res(cache, small.folder)
    sizes = spaces.infer_sizes(run, cache, low_res)
    assert low_res.latent_shape == (3, 2, 2) and (sizes.large_size, sizes.small_size) == (8, 4)
    with pytest.raises(ValueError, match="cache is a cache; set --low_res_cache_dir to a cache of its low-resolution"):
        open_low_res(cache)
    for name, change in {"random_flip": {"random_flip": True}, "crop": {"crop": "none"},
                         "value_range": {"value_range": "0,300"}}.items():
        other = encode(name, image_size=4, **change)
        with pytest.raises(ValueError, match=f"was encoded with --{name} "):
            open_low_res(cache, other.folder)
    save_autoencoder(tmp_path / "other.pt", seed=1)
    with pytest.raises(ValueError, match="have different autoencoders, .*other.pt and .*vae.pt"):
        open_low_res(cache, encode("of_another", vae="other.pt", image_size=4).folder)
    first, last = sorted((tmp_path / "images").iterdir())[::3]
    last.rename(first.with_name("a_9.png"))     # as many, with other names
    with pytest.raises(ValueError, match="renamed contains other images than .*cache, or another order"):
        open_low_res(cache, encode("renamed", image_size=4).folder)


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
    cache.class_names = cache.labels = None
    with pytest.raises(ValueError, match="--class_cond True requires classes, .*cache has none: name the files"):
        training.infer_model_config(dataclasses.replace(MODEL, class_cond=True), cache)
    (cache.folder / "filenames.txt").write_text("a_1.png\nrest.png\nb_2.png")
    with pytest.raises(ValueError, match="has none: .*rest.png has no class: .* got none for 1 of 3 files"):
        training.infer_model_config(dataclasses.replace(MODEL, class_cond=True), cache)
    with pytest.raises(ValueError, match="has no classes: .*rest.png has no class: .* got none for 1 of 3 files"):
        training.infer_classifier_config(ClassifierConfig(), cache)


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


@pytest.mark.parametrize("flags, dtype", [
    ({}, "float32"), ({"sample_dtype": "bfloat16"}, "bfloat16"), ({"vae_dtype": "bfloat16"}, "bfloat16"),
    ({"sample_dtype": "bfloat16", "vae_dtype": "float32"}, "float32"),
])
def test_samples_are_decoded_in_the_precision_of_the_network_unless_another_is_set(model_path, flags, dtype):
    sampler = load(model_path, *(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert sampler.codec.dtype is getattr(torch, dtype)
    assert sampler.settings.get("vae_dtype", "float32") == dtype    # an unfinished run is not continued with another


@pytest.mark.parametrize("config, sizes", [
    ({}, {16}), ({"num_samples": 5}, {5}), ({"cfg_scale": 0}, {16}), ({"cfg_scale": 2}, {32}),
    ({"cfg_scale": 2, "cfg_interval": "0.1,9"}, {16, 32}), ({"cfg_scale": 0, "cfg_interval": "0.1,9"}, {16, 32}),
])
def test_network_is_compiled_for_the_sizes_of_its_batches(config, sizes):
    assert loading._compiled(SamplingConfig(**config), None).sizes == sizes


def test_compiled_samples_are_not_mixed_with_others(model_path):
    sampler = load(model_path, "--compile", True)
    assert isinstance(sampler.model, CompiledNetwork) and sampler.settings["compile"] is True


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
        checkpoint_util.commit(folder, step, {name: checkpoint_util.save_weights(
            folder / name, weights, {**header, "step": step, "classes": [name, "b"]}) for name in names}, {})
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
    checkpoint_util.commit(
        folder, 1, {name: checkpoint_util.save_weights(folder / name, weights, header) for name in names}, {})
    for function in ("sha256_of_file", "load"):
        original = getattr(checkpoint_util, function)
        monkeypatch.setattr(checkpoint_util, function, lambda path, *args, name=function, original=original: (
            calls.append((name, path)) or original(path, *args)))
    sampler = load(folder)
    path = folder / "ema_0.9_000001.pt"
    assert [call for call in calls if call[1].parent == folder] == [("sha256_of_file", path), ("load", path)]
    marker = json.loads((folder / "state000001.json").read_text())
    assert sampler.settings["model"] == marker["files"][path.name]["sha256"]


def load_guided(path, classifier_path, explicit=None, **config):
    """Return the sampler of a model that a classifier guides."""
    run = Run("classifier_sample", (SamplingConfig(str(path)), VAEConfig(), DataConfig(), ModelConfig(),
                                    ClassifierConfig(), DiffusionConfig()), explicit or {})
    return loading.load_sampler(run, guidance=GuidanceConfig(str(classifier_path), **config))


def randomize(network):
    """Give every weight a random value, including those initialized to zero."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


TINY_CLASSIFIER = ClassifierConfig(classifier_width=64, classifier_depth=1, classifier_channel_mult="1",
                                   classifier_attention_resolutions="")


@pytest.fixture
def guiding(tmp_path, cache):
    """Write a classifier with random weights for the latents of the cache; return its path and network."""
    def write(process=PROCESS, **header):
        config = training.infer_classifier_config(TINY_CLASSIFIER, cache)
        torch.manual_seed(2)
        network = randomize(build_classifier(config, process, cache.latent_shape)[0])
        space = Space(None, spaces.fit_normalizer(NormalizerConfig(), cache))
        path = tmp_path / "classifier.pt"
        checkpoint_util.save_weights(path, network.state_dict(), {
            "kind": "classifier", "model": as_dict(config), "diffusion": as_dict(process), "noised": True,
            "classes": ["a", "b"], **spaces.space_header(cache, space), **header})
        return path, network
    return write


def test_classifier_guides_with_its_scaled_gradient(model_path, guiding):
    path, network = guiding()
    sampler = load_guided(model_path, path, classifier_scale=2.5)
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([3, 7]), torch.tensor([1, 0])
    point = x.clone().requires_grad_()
    log_p = network(point, t).log_softmax(1)[[0, 1], y].sum()
    gradient = 2.5 * torch.autograd.grad(log_p, point)[0]
    torch.testing.assert_close(sampler.cond_fn(x, t, y=y), gradient)
    assert gradient.abs().max() > 1e-3 and sampler.guided_classes == 2 and sampler.class_names == ["a", "b"]
    sha256 = loading.open_weights(path).sha256
    assert sampler.settings.items() >= {"classifier": sha256, "classifier_scale": 2.5}.items()


def test_unconditional_model_has_the_classes_of_its_classifier(model_path, guiding, tmp_path):
    weights, header = checkpoint_util.load_weights(model_path)
    header["model"].update(class_cond=False, num_classes=0)
    header["classes"] = None
    plain = {name: value for name, value in weights.items() if not name.startswith("label_emb")}
    checkpoint_util.save_weights(tmp_path / "plain.pt", plain, header)
    sampler = load_guided(tmp_path / "plain.pt", guiding()[0])
    assert sampler.num_classes == 0 and sampler.parse_classes("b,a") == [1, 0]


@pytest.mark.parametrize("change, match", [
    ({"process": dataclasses.replace(PROCESS, diffusion_steps=30)}, "--diffusion_steps 30"),
    ({"process": dataclasses.replace(PROCESS, noise_schedule="cosine_zero_snr", predict_v=True)},
     "--noise_schedule cosine_zero_snr, the diffusion model with cosine"),
    ({"process": dataclasses.replace(PROCESS, rescale_timesteps=True)}, "--rescale_timesteps True, the .* with False"),
    ({"noised": False}, "was trained on clean data"), ({"classes": ["b", "a"]}, "the classes .*a, b; got b, a"),
    ({"normalizer": {"mode": "none", "shift": [0.0], "std": [1.0]}}, "expected normalizer"),
])
def test_classifier_of_another_process_space_or_classes_is_rejected(model_path, guiding, change, match):
    with pytest.raises(ValueError, match=match):
        load_guided(model_path, guiding(**change)[0])


def test_classifier_may_have_another_respacing_and_prediction(model_path, guiding):
    process = dataclasses.replace(PROCESS, timestep_respacing="5", learn_sigma=True)
    load_guided(model_path, guiding(process=process)[0], {"learn_sigma": False})    # a flag of the model only


# --- Settings of samplers ---


def test_sampler_has_the_settings_of_the_flags(model_path):
    sampler = load(model_path, "--seed", 7, "--sampler", "ddim")
    assert sampler.seed == 7 and sampler.solver == "ddim" and sampler.clip_denoised is False
    assert sampler.settings == {"model": loading.open_weights(model_path).sha256, "sample_dtype": "float32"}
    assert load(model_path, "--clip_denoised", True).clip_denoised is True


@pytest.fixture
def guided_path(tmp_path, cache):
    """Return a weights file of a model with random weights that was trained with dropped classes."""
    model = training.infer_model_config(dataclasses.replace(MODEL, class_cond=True, class_dropout=0.1), cache)
    torch.manual_seed(0)
    network = randomize(create_model_and_diffusion_vae(cache.latent_shape, model, PROCESS)[0])
    space = Space(None, spaces.fit_normalizer(NormalizerConfig(), cache))
    header = training.diffusion_header(cache, space, model, PROCESS)
    checkpoint_util.save_weights(tmp_path / "guided.pt", network.state_dict(), header)
    return tmp_path / "guided.pt"


def test_classifier_free_guidance_extrapolates_from_the_null_class(guided_path, model_path):
    plain, guided = load(guided_path), load(guided_path, "--cfg_scale", 3, "--cfg_interval", "0.5,4")
    sigma = plain.diffusion.noise_levels()
    inside = np.flatnonzero((0.5 <= sigma) & (sigma <= 4))
    x, y, null = torch.randn(2, 3, 4, 4), torch.tensor([1, 0]), torch.tensor([2, 2])
    with torch.no_grad():
        for t in (inside[0] - 1, inside[0], inside[-1], inside[-1] + 1):
            t = torch.full((2,), int(t))
            conditional, unconditional = plain.model(x, t, y=y), plain.model(x, t, y=null)
            expected = unconditional + 3 * (conditional - unconditional) if t[0] in inside else conditional
            torch.testing.assert_close(guided.model(x, t, y=y), expected, atol=1e-4, rtol=1e-4)
    assert guided.settings.items() >= {"cfg_scale": 3.0, "cfg_interval": "0.5,4"}.items()
    with pytest.raises(ValueError, match="none of the 20 steps has a noise level inside; use a wider interval"):
        load(guided_path, "--cfg_scale", 3, "--cfg_interval", "0.5,0.5001")
    with pytest.raises(ValueError, match="--cfg_scale 3.0 requires a model trained with --class_dropout > 0"):
        load(model_path, "--cfg_scale", 3)
    with pytest.raises(ValueError, match="--cfg_interval 1,2 has no effect with --cfg_scale 1; set --cfg_scale"):
        load(guided_path, "--cfg_interval", "1,2")


def test_scale_zero_gives_unconditional_samples_without_labels(guided_path, tmp_path):
    plain, sampler = load(guided_path), load(guided_path, "--cfg_scale", 0)
    x, t, null = torch.randn(2, 3, 4, 4), torch.tensor([3, 3]), torch.tensor([2, 2])
    with torch.no_grad():
        torch.testing.assert_close(sampler.model(x, t), plain.model(x, t, y=null))
    assert sampler.parse_classes("") is None and sampler.settings["cfg_scale"] == 0
    with pytest.raises(ValueError, match="--classes a: the samples have no classes; omit the flag"):
        sampler.parse_classes("a")
    path = generate_samples(sampler, None, SamplingConfig(num_samples=2), tmp_path / "out", CPU)
    assert open_npz(path).labels is None and open_npz(path).class_names is None
    assert sorted(file.name for file in (tmp_path / "out/png").glob("*.png")) == ["000000.png", "000001.png"]
    inside = load(guided_path, "--cfg_scale", 0, "--cfg_interval", "0.5,4")     # outside the class counts
    assert inside.parse_classes("a") == [0]


@pytest.fixture
def guide(tmp_path, cache):
    """Write a smaller model of the classes of the cache with random weights; return its path."""
    def write(process=PROCESS, class_cond=True, **header):
        config = dataclasses.replace(MODEL, class_cond=class_cond, num_res_blocks=MODEL.num_res_blocks + 1)
        model = training.infer_model_config(config, cache)
        torch.manual_seed(3)
        network = randomize(create_model_and_diffusion_vae(cache.latent_shape, model, process)[0])
        space = Space(None, spaces.fit_normalizer(NormalizerConfig(), cache))
        header = {**training.diffusion_header(cache, space, model, process), **header}
        checkpoint_util.save_weights(tmp_path / "guide.pt", network.state_dict(), header)
        return tmp_path / "guide.pt"
    return write


@pytest.mark.parametrize("class_cond", [True, False])
def test_autoguidance_extrapolates_from_another_checkpoint(model_path, guide, class_cond):
    path = guide(class_cond=class_cond)
    plain, weaker = load(model_path), load(path)
    guided = load(model_path, "--cfg_scale", 3, "--guide_model_path", path, "--cfg_rescale", 0.7)
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([3, 3]), torch.tensor([1, 0])
    with torch.no_grad():
        strong, weak = plain.model(x, t, y=y), weaker.model(x, t, **({"y": y} if class_cond else {}))
        mixed = weak + 3 * (strong - weak)
        ratio = strong.std((1, 2, 3), keepdim=True) / mixed.std((1, 2, 3), keepdim=True)
        torch.testing.assert_close(guided.model(x, t, y=y), mixed * (0.7 * ratio + 0.3), atol=1e-4, rtol=1e-4)
        assert torch.equal(load(model_path, "--guide_model_path", path).model(x, t, y=y), strong)   # at scale 1
    sha256 = loading.open_weights(path).sha256
    assert guided.settings.items() >= {"cfg_scale": 3.0, "cfg_rescale": 0.7, "guide_model": sha256}.items()
    # A flag of the model does not describe the guide, whose size may differ.
    load(model_path, "--cfg_scale", 3, "--guide_model_path", path, "--num_res_blocks", MODEL.num_res_blocks)


@pytest.mark.parametrize("change, match", [
    ({"process": dataclasses.replace(PROCESS, diffusion_steps=30)}, "--diffusion_steps 30"),
    ({"process": dataclasses.replace(PROCESS, predict_xstart=True)}, "--predict_xstart True, the .* with False"),
    ({"process": dataclasses.replace(PROCESS, process="rectified_flow", noise_schedule="linear")},
     "--process rectified_flow, the diffusion model with gaussian"),
    ({"classes": ["b", "a"]}, "the classes of the model, a, b; got b, a"),
    ({"normalizer": {"mode": "none", "shift": [0.0], "std": [1.0]}},
     "guide_model_path. does not match the diffusion model: expected normalizer"),
    ({"kind": "classifier"}, "guide_model_path"),
])
def test_guide_of_another_process_space_or_classes_is_rejected(model_path, guide, change, match):
    with pytest.raises(ValueError, match=match):
        load(model_path, "--cfg_scale", 3, "--guide_model_path", guide(**change))


def test_guidance_flags_without_effect_are_rejected(guided_path, tmp_path):
    for scale in (0, 1):
        with pytest.raises(ValueError, match=f"--cfg_rescale 0.5 has no effect with --cfg_scale {scale}; set another"):
            load(guided_path, "--cfg_scale", scale, "--cfg_rescale", 0.5)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="bare.pt has no header; --guide_model_path expects a checkpoint of this"):
        load(guided_path, "--cfg_scale", 2, "--guide_model_path", tmp_path / "bare.pt")


# --- Upsamplers ---


@pytest.fixture
def upsample(tmp_path):
    """Load an upsampler from 4x6 to 8x12 pixels in three channels for base samples; return (sampler, base images)."""
    model = ModelConfig(num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="", in_channels=3,
                        class_cond=True, num_classes=2)
    super_res = SuperResConfig(large_size="8x12", small_size="4x6", cond_noise_steps=5)
    space = Space.of_pixels(3)
    network, _ = create_model_and_diffusion_vae((3, 8, 12), model, PROCESS, super_res)
    process = dataclasses.replace(PROCESS, timestep_respacing="4")
    checkpoint_util.save_weights(tmp_path / "model.pt", randomize(network).state_dict(), {
        "kind": "super_res", "model": as_dict(model), "diffusion": as_dict(process), "super_res": as_dict(super_res),
        "classes": ["a", "b"], "latent_shape": [3, 8, 12], "image_shape": [3, 8, 12], "data": {},
        "normalizer": space.normalizer.to_dict(), "autoencoder": space.codec.describe()})

    def load(labels=(1, 0, 0), names=("b", "a"), level=4, shape=(3, 4, 6, 3), seed=7):
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        arrays = {} if labels is None else {"arr_1": np.array(labels)}
        arrays.update({} if names is None else {"class_names": np.array(names)})
        np.savez(tmp_path / "base.npz", arr_0=images, **arrays)
        run = Run("super_res_sample", (SamplingConfig(str(tmp_path / "model.pt"), seed=seed), VAEConfig(), super_res,
                                       DataConfig(), ModelConfig(), DiffusionConfig()), {})
        return loading.load_sampler(run, base=BaseConfig(str(tmp_path / "base.npz"), level)), images
    return load


def test_upsampler_is_conditioned_on_diffused_base_samples_and_their_classes(upsample, tmp_path):
    sampler, images = upsample()
    assert sampler.clip_denoised is True        # x0 are pixels, and the flag was not set
    assert sampler.labels(range(4), None).tolist() == [0, 1, 1, 0]      # by name
    conditioning = sampler.low_res.condition([1, 5], CPU)
    alpha_bar = np.cumprod(1 - create_diffusion(PROCESS).betas)[4]      # of all timesteps, not of those sampled
    noise = keyed_randn((3, 4, 6), [(7, 8, i) for i in (1, 5)]).numpy()
    expected = np.sqrt(alpha_bar) * (images[[1, 2]].transpose(0, 3, 1, 2) / 127.5 - 1) + np.sqrt(1 - alpha_bar) * noise
    assert conditioning["low_res"].numpy() == pytest.approx(expected, abs=1e-5)
    assert conditioning["low_res_times"].tolist() == [4, 4] and sampler.diffusion.num_timesteps == 4
    sha256 = hashlib.sha256((tmp_path / "base.npz").read_bytes()).hexdigest()
    assert sampler.settings.items() >= {"base": sha256, "cond_noise_level": 4}.items()
    one, other = (upsample(level=level)[0].sample_x0([0, 1], None, CPU) for level in (4, 0))
    assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("change, match", [
    ({"level": 5}, r"--cond_noise_level must be in \[0, 4\], got 5"),
    ({"shape": (3, 6, 4, 3)}, r"requires images of shape \(3, 4, 6\) .channels, sides., got \(3, 6, 4\)"),
    ({"labels": None, "names": None}, "has no labels .arr_1., which the upsampler requires"),
    ({"labels": (0, 2, 0), "names": None}, r"labels .arr_1. must be in \[0, 1\], .* got 0 to 2"),
    ({"names": ("b", "c")}, "has classes c that the model does not have"),
])
def test_base_samples_that_do_not_fit_are_rejected(upsample, change, match):
    with pytest.raises(ValueError, match=match):
        upsample(**change)


# --- Data to measure a model on ---


def test_likelihood_data_have_the_preprocessing_space_and_classes_of_the_model(model_path, cache, images, tmp_path):
    def open_data(cache_dir="", data_dir="", **explicit):
        configs = (LikelihoodConfig(str(model_path)), DataConfig(data_dir), LatentConfig(cache_dir), VAEConfig(),
                   ModelConfig(), DiffusionConfig())
        return loading.load_model_and_data(Run("image_nll", configs, explicit))

    weights, header = checkpoint_util.load_weights(model_path)
    checkpoint_util.save_weights(model_path, weights, {**header, "classes": ["b", "a"]})
    of_cache, of_images = open_data(str(cache.folder))[2], open_data(data_dir=images.data_dir)[2]
    expected = cache.batch([2, 1])[0] / cache.statistics["std"]
    for data in (of_cache, of_images):
        x0 = data.space.normalizer.normalize(data.source.batch([2, 1])[0])
        torch.testing.assert_close(x0, expected, atol=1e-5, rtol=1e-4)
        assert data.labels.tolist() == (1 - cache.labels).tolist()
    assert not of_images.space.is_pixels and of_images.source.preprocessing["image_size"] == 8
    checkpoint_util.save_weights(model_path, weights, {**header, "latent_shape": [3, 8, 8]})
    with pytest.raises(ValueError, match="cache .the data. does not match the diffusion model: expected x0 shape"):
        open_data(str(cache.folder))


def test_extractors_encode_images_like_their_model(guiding, cache, images, tmp_path):
    def open_extractors(**paths):
        vae = VAEConfig(str(tmp_path / "vae.pt") if not paths else "")
        run = Run("evaluate", (EvaluateConfig(**paths), vae, DataConfig()), {})
        return loading.open_extractors(run)

    path, network = guiding()
    pixels, x0 = ImageFolder(images).batch(range(4)), cache.batch(range(4))[0] / cache.statistics["std"]
    extract, classifier, data = open_extractors(classifier_path=str(path))
    with torch.no_grad():
        logits = network(x0, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(extract(pixels).logits, logits, atol=1e-4, rtol=1e-4)
    assert classifier.image_shape == [1, 8, 8] and classifier.class_names == ["a", "b"] and data.image_size == 8
    save_autoencoder(tmp_path / "vae.pt", data=vars(DataConfig(image_size="8", value_range="0,200")))
    extract, classifier, data = open_extractors()
    latents = create_vae(VAEConfig(str(tmp_path / "vae.pt")), CPU).encode_batch(pixels)
    torch.testing.assert_close(extract(pixels).pooled[:, -3:], latents.flatten(2).std(2, correction=0))
    assert classifier is None and data.value_range == "0,200"


# --- Objects of training ---


@pytest.fixture
def loops(monkeypatch):
    """Return the arguments of the training loops that are built, none of which trains."""
    built = []
    monkeypatch.setattr(TrainLoop, "from_config", lambda model, data, train, task, **flags: built.append(
        (model, data, train, task)) or SimpleNamespace(run_loop=lambda: None, stopped=False))
    return built


@pytest.mark.parametrize("noised", [True, False])
def test_classifier_trains_with_its_schedule_in_its_space(cache, tmp_path, loops, noised):
    train = ClassifierTrainConfig(schedule_sampler="loss-second-moment", noised=noised, seed=3, max_val_samples=2,
                                  val_data_dir=str(cache.folder))
    space = Space(None, spaces.fit_normalizer(NormalizerConfig("channel"), cache))
    training.train_classifier(create_run(train, TINY_CLASSIFIER, PROCESS, folder=tmp_path / "run"), cache, space)
    (model, data, _, task), = loops
    for objective in (task.objective, task.preview.objective):
        assert objective.noised == noised and objective.diffusion.num_timesteps == 20
        assert isinstance(objective.schedule_sampler, LossSecondMomentResampler)
    assert task.preview.normalizer is space.normalizer and task.header["noised"] == noised
    assert data.normalizer is space.normalizer and model.out_channels == 2


def test_upsampler_trains_on_normalized_pairs_with_noised_conditions(encode, tmp_path, loops):
    large, small = encode("large", store="mode"), encode("small", store="mode", image_size=4)
    space = Space(None, LatentNormalizer([0.1], [0.5], "channel"))
    model = dataclasses.replace(MODEL, class_cond=True, class_dropout=0.2, in_channels=0)
    run = create_run(DiffusionTrainConfig(batch_size=4), model, PROCESS, folder=tmp_path / "run")
    training.train_diffusion(run, large, space, SuperResConfig(8, 4, cond_noise_steps=5), small)
    (network, data, _, task), = loops
    assert task.objective.cond_noise_steps == 5 and task.objective.null_label == 2 and network.noised_condition
    assert task.objective.class_dropout == 0.2 and task.header["kind"] == "super_res"
    x0, conditioning = next(data)
    data.close()
    expected, low_res = ((latents.batch(range(4))[0] - 0.1) / 0.5 for latents in (large, small))
    order = (x0[:, None] - expected).flatten(2).norm(dim=2).argmin(1)
    assert sorted(order) == [0, 1, 2, 3] and conditioning["y"].tolist() == large.labels[order].tolist()
    torch.testing.assert_close(x0, expected[order])
    torch.testing.assert_close(conditioning["low_res"], low_res[order])


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
    saved = checkpoint_util.save_weights(tmp_path / "model000001.pt", model.state_dict(), header)
    checkpoint_util.commit(tmp_path, 1, {"model000001.pt": saved}, {})
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
