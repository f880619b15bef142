import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import checkpoint_util, dist_util, logger, script_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig, AutoencoderLossConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict, opt
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.image_datasets import DataConfig, PictureFolder
from guided_diffusion_vae.latent_datasets import (
    LatentCache, LatentCacheConfig, LatentConfig, LatentFolder, write_cache,
)
from guided_diffusion_vae.sampling import SamplingConfig
from guided_diffusion_vae.train_util import AutoencoderTrainConfig, DiffusionTrainConfig, TrainLoop, seed_weights
from guided_diffusion_vae.unet import POOLS, ClassifierConfig, ModelConfig
from guided_diffusion_vae.vae_wrapper import NormalizerConfig, VAEConfig, create_vae

AUTOENCODER = (DataConfig, AutoencoderConfig, AutoencoderLossConfig, AutoencoderTrainConfig, script_util.RunConfig)
DIFFUSION = (LatentConfig, NormalizerConfig, VAEConfig, DataConfig, ModelConfig, DiffusionConfig, DiffusionTrainConfig,
             script_util.RunConfig)
SAMPLING = (SamplingConfig, VAEConfig, NormalizerConfig, DataConfig, ModelConfig, DiffusionConfig,
            script_util.RunConfig)
MODEL = ModelConfig(num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="", in_channels=3)
PROCESS = DiffusionConfig(diffusion_steps=20, noise_schedule="cosine")
CPU = torch.device("cpu")

PIPELINE = """
data: {image_size: 16x32}
autoencoder:
  num_channels: [8, 16]
  downsample_factors: [[1, 2]]
  training: {lr: 1e-3, batch_size: 4, recon_loss: l2}
latents: {store: mode, normalizer: channel}
model: {num_channels: 32, channel_mult: "1,2", class_cond: true}
diffusion: {learn_sigma: true}
training: {lr: 2.0e-4, batch_size: 8, ema_rate: "0.9,0.99"}
sampling: {num_samples: 12}
"""


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(dist_util, "memory_flags", dist_util.MEMORY_FLAGS)
    for names in dist_util.LAUNCHERS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    yield
    dist_util._settled = None
    logger.reset()


@pytest.fixture
def yaml_file(tmp_path):
    def write(text, name="file.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


# flags and YAML


def test_flags_win_over_the_file_and_the_file_over_defaults(yaml_file):
    path = yaml_file("model: {num_channels: 32, num_heads: 2}")
    argv = ["--config", path, "--num_heads", "8"]
    (model, process), given = script_util.parse_given("doc", ModelConfig, DiffusionConfig, argv=argv)
    assert (model.num_channels, model.num_heads, model.num_res_blocks) == (32, 8, ModelConfig().num_res_blocks)
    assert given == {"num_channels": 32, "num_heads": 8} and process == DiffusionConfig()


def test_a_flag_that_repeats_the_default_still_wins_over_the_file(yaml_file):
    path = yaml_file("model: {num_heads: 2}")
    model, = script_util.parse("doc", ModelConfig, argv=["--config", path, "--num_heads", str(ModelConfig().num_heads)])
    assert model.num_heads == ModelConfig().num_heads


def test_keys_may_stand_in_sections_or_alone(yaml_file):
    read = lambda text: script_util.parse("doc", *DIFFUSION, argv=["--config", yaml_file(text)])
    grouped, alone = read("training: {lr: 0.5}\ndata: {crop: none}"), read("lr: 0.5\ncrop: none")
    assert grouped == alone and grouped[6].lr == 0.5 and grouped[3].crop == "none"


def test_one_file_serves_every_script_of_the_pipeline(yaml_file):
    argv = ["--config", yaml_file(PIPELINE)]
    data, autoencoder, loss, train, _ = script_util.parse("doc", *AUTOENCODER, argv=argv)
    assert (autoencoder.num_channels, autoencoder.downsample_factors) == ((8, 16), ((1, 2),))
    assert (train.lr, train.batch_size, loss.recon_loss, data.image_size) == (1e-3, 4, "l2", "16x32")
    _, scale, _, data, model, process, train, _ = script_util.parse("doc", *DIFFUSION, argv=argv)
    assert (model.num_channels, model.channel_mult, model.class_cond) == (32, "1,2", True)
    assert (train.lr, train.batch_size, train.ema_rate, process.learn_sigma) == (2e-4, 8, "0.9,0.99", True)
    assert (scale.normalizer, data.image_size) == ("channel", "16x32")
    assert script_util.parse("doc", LatentCacheConfig, argv=argv)[0].store == "mode"
    assert script_util.parse("doc", *SAMPLING, argv=argv)[0].num_samples == 12


@pytest.mark.parametrize("text, match", [
    ("model: {num_chanels: 32}", r"file.yaml has an unknown key 'model.num_chanels'; did you mean 'num_channels'\?"),
    ("training: {learning_rat: 1}", "unknown key 'training.learning_rat'"),
    ("autoencoder: {training: {kl_weigth: 1}}", r"'autoencoder.training.kl_weigth'; did you mean 'kl_weight'\?"),
    ("modle: {num_channels: 32}", r"unknown key 'modle'; did you mean 'model'\?"),
    ("training: {num_channels: 32}", "unknown key 'training.num_channels'"),
    ("model: 3", "unknown key 'model'"),
    ("model: {num_channels: wide}", "num_channels is 'wide', needed is a value of type int"),
    ("model: {num_channels: 1.5}", "num_channels is '?1.5'?, needed is a value of type int"),
    ("model: {num_channels: }", "num_channels is None, needed is a value of type int"),
    ("model: {class_cond: maybe}", "class_cond is 'maybe', needed is a value of type bool"),
    ("model: {class_cond: 1}", "class_cond is 1, needed is a value of type bool"),
    ("training: {lr: [1, 2]}", r"lr is \[1, 2\], needed is a value of type float"),
    ("autoencoder: {num_channels: {a: 1}}", "num_channels is {'a': 1}, needed is a value of type tuple"),
    ("data: {crop: left}", "crop is 'left', possible are center, random, none"),
    ("- model", "holds a list, not keys with values"),
    ("model: [", "is not YAML: .*expected"),
])
def test_a_mistake_in_the_file_is_named(yaml_file, text, match):
    classes = AUTOENCODER if text.startswith("autoencoder") else DIFFUSION
    with pytest.raises(ValueError, match=match):
        script_util.parse("doc", *classes, argv=["--config", yaml_file(text)])


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="no file nowhere.yaml; check --config"):
        script_util.parse("doc", ModelConfig, argv=["--config", "nowhere.yaml"])


def test_an_empty_file_gives_the_defaults(yaml_file):
    assert script_util.parse("doc", ModelConfig, argv=["--config", yaml_file("# nothing\n")]) == [ModelConfig()]


@pytest.mark.parametrize("argv, message", [
    (["--num_chanels", "32"], "unrecognized arguments: --num_chanels 32; did you mean 'num_channels'?"),
    (["--num_chan", "32"], "did you mean 'num_channels'?"),
    (["--num_channels", "wide"], "argument --num_channels: invalid int value: 'wide'"),
    (["--class_cond", "maybe"], "argument --class_cond: 'maybe' is neither true nor false"),
    (["--noise_schedule", "sine"], "invalid choice: 'sine'"),
    (["--num_channels"], "argument --num_channels: expected one argument"),
])
def test_a_mistaken_flag_is_answered_with_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        script_util.parse("doc", *DIFFUSION, argv=argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.parametrize("text, value", [
    ("4", 4), ("2,2", (2, 2)), ("[2]", (2,)), ("[[1,2,2],[2,2,2]]", ((1, 2, 2), (2, 2, 2))), ("0.5, 1", (0.5, 1)),
    ("True,false", (True, False)), ("", ()),
])
def test_lists_are_read_from_flags(text, value):
    @dataclasses.dataclass
    class Config:
        levels: tuple = opt((), "a list")
    assert script_util.parse("doc", Config, argv=["--levels", text])[0].levels == value


def test_a_list_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        script_util.parse("doc", AutoencoderConfig, argv=["--num_channels", "32,a"])
    assert "'32,a' is not a list such as 2,2 or [[1,2,2],[2,2,2]]" in capsys.readouterr().err


def test_help_shows_the_sections_choices_and_defaults_as_they_are_typed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        script_util.parse("Train it.\n\n    python it.py", *AUTOENCODER, argv=["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "Train it.\n\n    python it.py\n" in text
    sections = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["options", "data", "autoencoder", "autoencoder.training", "run"]
    assert "--num_channels TUPLE" in text and "(default: [32,64,64])" in text
    assert "--recon_loss {l1,l2}" in text and "(default: 0.0001)" in text and "--dry_run BOOL" in text


def test_defaults_printed_by_help_are_read_back_as_themselves():
    default = AutoencoderConfig().num_channels
    shown = json.dumps(default, separators=(",", ":"))
    assert script_util.parse("doc", AutoencoderConfig, argv=["--num_channels", shown])[0].num_channels == default


def test_the_references_helpers_build_the_same_flags():
    import argparse

    parser = argparse.ArgumentParser()
    defaults = script_util.model_and_diffusion_defaults()
    script_util.add_dict_to_argparser(parser, {**defaults, "path": None})
    args = parser.parse_args(["--num_channels", "64", "--class_cond", "yes", "--path", "x"])
    picked = script_util.args_to_dict(args, defaults)
    assert picked == {**defaults, "num_channels": 64, "class_cond": True} and args.path == "x"
    assert script_util.str2bool("F") is False and script_util.str2bool(True) is True


def test_a_part_of_a_config_keeps_section_help_and_default():
    part = script_util.part_of(DataConfig, "image_size")
    field, = dataclasses.fields(part)
    assert script_util.section_of(part) == "data" and part().image_size == DataConfig().image_size
    assert field.metadata["help"] == DataConfig.__dataclass_fields__["image_size"].metadata["help"]


def test_every_flag_of_the_loop_is_a_field_or_an_object():
    given = script_util.loop_arguments(DiffusionTrainConfig(), "schedule_sampler")
    assert "schedule_sampler" not in given and given["lr"] == 1e-4
    assert set(given) <= set(TrainLoop.__init__.__kwdefaults__) | {"batch_size", "lr"}


def test_the_flags_that_bound_memory_are_those_of_the_script():
    expected = {"microbatch", "batch_size"}, {"microbatch", "batch_size", "vae_batch_size", "vae_tile"}, set()
    for classes, names in zip((AUTOENCODER, DIFFUSION, (ModelConfig,)), expected):
        script_util.parse("doc", *classes, argv=[])
        assert set(dist_util.memory_flags) == names


@pytest.mark.parametrize("flags, match", [
    ({"channel_mult": "1,two"}, "--channel_mult is '1,two'; needed are numbers with commas between: 1,2,2"),
    ({"channel_mult": "1;2"}, "--channel_mult is '1;2'"),
    ({"attention_resolutions": "16,small"}, "'16,small' are not numbers .*16,8 .--attention_resolutions, --class"),
])
def test_lists_of_numbers_that_are_none_are_refused_by_their_flag(flags, match):
    with pytest.raises(ValueError, match=match):
        script_util.create_model_and_diffusion_vae((3, 8, 8), dataclasses.replace(MODEL, **flags), PROCESS)


# the size of a model


@pytest.mark.parametrize("class_cond", [False, True])
def test_activation_bytes_are_those_that_autograd_saves(capsys, class_cond):
    classes = {"class_cond": True, "num_classes": 3} if class_cond else {}
    model = dataclasses.replace(MODEL, attention_resolutions="8", **classes)
    shape = (3, 8, 8)
    network, _ = script_util.create_model_and_diffusion_vae(shape, model, PROCESS)
    kept = []
    labels = {"y": torch.zeros(1, dtype=torch.long)} if class_cond else {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = network(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long), **labels)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*kept, y]}
    expected = sum(size for place, size in storages.items() if place not in weights)
    count = sum(p.numel() for p in network.parameters())
    script_util.print_model_size(network, script_util.one_sample(shape, model), batch_size=1000)
    said = capsys.readouterr().out
    shown = int(said.split(" MiB for activations")[0].split()[-1]) * 2**20
    assert f"model: {count / 1e6:.2f} M parameters" in said
    assert shown == pytest.approx(1000 * expected, rel=0.001)


# latents and autoencoders


def save_autoencoder(path, seed=0, **header):
    config = AutoencoderConfig(in_channels=1, num_channels=(4, 4), norm_num_groups=2, latent_channels=3)
    torch.manual_seed(seed)
    network = create_autoencoder(config)
    checkpoint_util.save_weights(path, network.state_dict(),
                                 {"kind": "autoencoder", "autoencoder": as_dict(config), **header})
    return path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{'ab'[i % 2]}_{i}.png")
    return DataConfig(data_dir=str(folder), image_size=8)


@pytest.fixture
def cache(tmp_path, pictures):
    codec = create_vae(VAEConfig(vae_path=str(save_autoencoder(tmp_path / "vae.pt"))), CPU)
    config = LatentCacheConfig(latent_dtype="float32")
    return write_cache(tmp_path / "cache", PictureFolder(pictures), codec, config)


def open_cache(cache, **vae):
    return script_util.open_source(LatentConfig(str(cache.folder)), VAEConfig(**vae), DataConfig(), {}, 0, CPU)


def test_a_cache_finds_its_autoencoder_where_it_was(cache):
    source, codec = open_cache(cache)
    assert isinstance(source, LatentCache) and codec.fingerprint == cache.autoencoder["sha256"]


def test_a_cache_finds_its_autoencoder_where_it_is_said_to_be_now(cache, tmp_path):
    (tmp_path / "vae.pt").rename(tmp_path / "moved.pt")
    assert open_cache(cache)[1] is None
    with pytest.raises(FileNotFoundError, match="no longer at .*vae.pt; say with --vae_path where it is"):
        script_util.codec_of(cache.autoencoder, VAEConfig(), CPU)
    assert open_cache(cache, vae_path=str(tmp_path / "moved.pt"))[1].fingerprint == cache.autoencoder["sha256"]


def test_another_autoencoder_than_the_caches_is_refused_by_name(cache, tmp_path):
    other = save_autoencoder(tmp_path / "other.pt", seed=1)
    with pytest.raises(ValueError, match=f"made with autoencoder {cache.autoencoder['sha256'][:16]} .*vae.pt.*, "
                                         f".*other.pt has [0-9a-f]{{16}}; give the autoencoder"):
        open_cache(cache, vae_path=str(other))


def test_an_autoencoder_replaced_in_its_place_is_never_used(cache, tmp_path, capsys):
    save_autoencoder(tmp_path / "vae.pt", seed=1)
    assert open_cache(cache)[1] is None
    sha256 = cache.autoencoder["sha256"][:16]
    assert f"vae.pt no longer holds the autoencoder {sha256} that the latents were made with" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made with autoencoder"):
        script_util.codec_of(cache.autoencoder, VAEConfig(), CPU)


@pytest.mark.parametrize("flag, asked, held", [
    ("image_size", 16, 8), ("random_flip", True, False), ("crop", "none", "center"), ("pad", True, False),
])
def test_flags_that_contradict_how_a_caches_pictures_were_read_are_refused(cache, flag, asked, held):
    latents = LatentConfig(str(cache.folder))
    opened = lambda given: script_util.open_source(latents, VAEConfig(), DataConfig(), given, 0, CPU)
    assert opened({flag: held, "lr": 0.1})[0].count == cache.count
    with pytest.raises(ValueError, match=f"--{flag} {asked} contradicts the cache {cache.folder}, whose pictures were "
                                         f"read with {flag} {held}; leave the flag away or encode again"):
        opened({flag: asked})


def test_a_plain_folder_of_latents_knows_of_no_pictures_to_contradict(tmp_path):
    np.save(tmp_path / "a_1.npy", np.ones((3, 4, 4), np.float32))
    script_util.require_same_pictures(LatentFolder(tmp_path), {"image_size": 16, "random_flip": True})


def test_caches_and_plain_folders_can_be_asked_onto_a_gpu(cache, tmp_path, monkeypatch):
    """As `open_source` does where there is one; here it has no memory to spare."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (400, 400))
    (tmp_path / "vae.pt").unlink()  # it could not be opened on a GPU that is not there
    (tmp_path / "plain").mkdir()
    np.save(tmp_path / "plain" / "a_1.npy", np.ones((3, 4, 4), np.float32))
    for folder, kind in ((cache.folder, LatentCache), (tmp_path / "plain", LatentFolder)):
        latents = LatentConfig(str(folder))
        source, codec = script_util.open_source(latents, VAEConfig(), DataConfig(), {}, 0, torch.device("cuda"))
        assert type(source) is kind and codec is None and source.batch([0])[0].device == CPU


def test_a_damaged_cache_is_met_before_training(cache):
    labels = cache.folder / "labels.npy"
    labels.write_bytes(labels.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match="labels.npy is not what was written there"):
        open_cache(cache)


def test_initial_weights_depend_on_the_seed_and_not_on_an_autoencoder_opened_before(cache, tmp_path):
    def weights(seed):
        source, codec = open_cache(cache)
        seed_weights(seed)
        network, _ = script_util.create_model_and_diffusion_vae(source.latent_shape, MODEL, PROCESS)
        return torch.cat([p.detach().flatten() for p in network.parameters()]), codec

    (first, codec), (other, _) = weights(0), weights(1)
    (tmp_path / "vae.pt").unlink()
    again, nothing = weights(0)
    assert codec is not None and nothing is None
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_another_scale_factor_than_the_caches_is_refused_by_name(cache):
    with pytest.raises(ValueError, match="made with scale_factor 0.18215 .* has 0.5"):
        open_cache(cache, scale_factor=0.5)


@pytest.mark.parametrize("cache_dir, data_dir", [("", ""), ("a", "b")])
def test_a_cache_and_pictures_or_neither_are_refused(cache_dir, data_dir):
    with pytest.raises(ValueError, match=f"--cache_dir is '{cache_dir}' and --data_dir is '{data_dir}'; give one"):
        script_util.open_source(LatentConfig(cache_dir), VAEConfig(), DataConfig(data_dir), {}, 0, CPU)


def test_pictures_encoded_on_the_fly_are_the_cache(cache, pictures, tmp_path):
    fly, codec = script_util.open_source(LatentConfig(), VAEConfig(str(tmp_path / "vae.pt")), pictures, {}, 0, CPU)
    assert fly.statistics["std"] == pytest.approx(cache.statistics["std"], rel=1e-5)
    torch.testing.assert_close(fly.batch([2, 0])[0], cache.batch([2, 0])[0])
    assert codec.fingerprint == fly.autoencoder["sha256"]


def test_a_run_that_goes_on_keeps_the_statistics_that_it_began_with(pictures, cache, tmp_path):
    vae, folder = VAEConfig(str(tmp_path / "vae.pt")), tmp_path / "run"
    folder.mkdir()
    opened = lambda count: script_util.open_source(LatentConfig(stats_samples=count), vae, pictures, {}, 0, CPU, folder)
    source, codec = opened(1)
    normalizer = script_util.fit_normalizer(NormalizerConfig(), source)
    header = script_util.diffusion_header(source, codec, normalizer, MODEL, PROCESS)
    script_util.write_config(folder, "it", (), header)
    assert opened(4)[0].statistics != source.statistics  # config.json alone is no run that goes on
    checkpoint_util.commit(folder, 1, [], {})
    assert opened(4)[0].statistics == source.statistics
    (folder / "config.json").write_text("{")
    assert opened(4)[0].statistics["channel_std"] == pytest.approx(cache.statistics["channel_std"], rel=1e-5)


def test_pictures_are_read_as_the_autoencoders_were_unless_a_flag_says_otherwise():
    trained = {**script_util.preprocessing(DataConfig(image_size="8x16", crop="none", value_range="0,1"))}
    read = script_util.as_trained(DataConfig("here", crop="center"), {"crop": "center"}, trained)
    assert read == DataConfig("here", image_size="8x16", value_range="0,1", crop="center")


def test_a_fixed_normalizer_must_fit_the_measured_latents(cache):
    std = cache.statistics["std"]
    assert script_util.fit_normalizer(NormalizerConfig(), cache).std == [std]
    assert script_util.fit_normalizer(NormalizerConfig("channel"), cache).std == cache.statistics["channel_std"]
    assert script_util.fit_normalizer(NormalizerConfig(f"{std * 1.05}"), cache).std == [pytest.approx(std * 1.05)]
    with pytest.raises(ValueError, match=f"deviation of 2 with --normalizer .*; --normalizer auto or {std:.5g}"):
        script_util.fit_normalizer(NormalizerConfig(f"{std / 2}"), cache)
    with pytest.raises(ValueError, match="with --normalizer none, needed is 0.9 to 1.1"):
        script_util.fit_normalizer(NormalizerConfig("none"), cache)
    assert script_util.fit_normalizer(NormalizerConfig("none", allow_latent_std=True), cache).std == [1]


def test_the_number_of_classes_is_that_of_the_data(cache):
    assert script_util.with_classes(dataclasses.replace(MODEL, class_cond=True), cache).num_classes == 2
    assert script_util.with_classes(MODEL, cache).num_classes == 0
    with pytest.raises(ValueError, match="--num_classes 7, but .*cache has 2; leave the flag away"):
        script_util.with_classes(dataclasses.replace(MODEL, class_cond=True, num_classes=7), cache)
    cache.class_names = None
    with pytest.raises(ValueError, match="--class_cond True, but .*cache has no classes: name the files"):
        script_util.with_classes(dataclasses.replace(MODEL, class_cond=True), cache)


# models from their checkpoints


@pytest.fixture
def run(tmp_path, cache):
    """The weights file of a diffusion model on the cache, as training writes it."""
    model = script_util.with_classes(dataclasses.replace(MODEL, class_cond=True, dropout=0.1), cache)
    torch.manual_seed(0)
    network, _ = script_util.create_model_and_diffusion_vae(cache.latent_shape, model, PROCESS)
    normalizer = script_util.fit_normalizer(NormalizerConfig(), cache)
    header = script_util.diffusion_header(cache, None, normalizer, model, PROCESS)
    path = tmp_path / "ema_0.9_000001.pt"
    checkpoint_util.save_weights(path, network.state_dict(), {**header, "step": 1})
    return path


def load(path, *flags):
    configs, given = script_util.parse_given("doc", *SAMPLING, argv=["--model_path", str(path), *map(str, flags)])
    return script_util.load_sampler(configs, given, CPU)


def test_a_weights_file_is_enough_to_sample(run, cache):
    sampler = load(run)
    assert sampler.shape == (3, 4, 4) and sampler.image_shape == (1, 8, 8) and sampler.diffusion.num_timesteps == 20
    assert sampler.class_names == ["a", "b"] and sampler.num_classes == 2
    assert sampler.normalizer.std == [cache.statistics["std"]]
    assert not sampler.model.training


@pytest.mark.parametrize("flags, match", [
    (["--num_channels", 64], "--num_channels 64 contradicts .*ema_0.9_000001.pt, .* with num_channels 32; leave"),
    (["--diffusion_steps", 100], "--diffusion_steps 100 contradicts .* with diffusion_steps 20"),
    (["--noise_schedule", "linear"], "--noise_schedule linear contradicts .* with noise_schedule cosine"),
    (["--num_classes", 3], "--num_classes 3 contradicts .* with num_classes 2"),
    (["--class_cond", False], "--class_cond False contradicts .* with class_cond True"),
    (["--normalizer", "none"], "--normalizer none contradicts .* with normalizer auto"),
    (["--image_size", 16], r"--image_size \(16, 16\) contradicts .* with image_size \(8, 8\)"),
    (["--image_channels", 3], "--image_channels 3 contradicts .* with image_channels 1"),
    (["--scale_factor", 0.5], "made with scale_factor 0.18215 .* has 0.5"),
])
def test_a_flag_that_contradicts_the_header_is_refused_with_both_values(run, flags, match):
    with pytest.raises(ValueError, match=match):
        load(run, *flags)


def test_flags_that_agree_with_the_header_and_free_ones_are_taken(run, yaml_file):
    path = yaml_file("model: {num_channels: 32, class_cond: true, dropout: 0.3}\ndata: {image_size: 8}\n"
                     "latents: {normalizer: auto}\ndiffusion: {diffusion_steps: 20}\ntraining: {lr: 1.0}")
    sampler = load(run, "--config", path, "--timestep_respacing", "ddim5", "--use_checkpoint", True)
    assert sampler.diffusion.num_timesteps == 5 and sampler.model.num_classes == 2


def test_a_bare_state_dict_works_with_flags(run, tmp_path):
    described = load(run)
    weights, _ = checkpoint_util.load_weights(run)
    torch.save(dict(weights), tmp_path / "bare.pt")
    flags = ["--vae_path", tmp_path / "vae.pt", "--image_size", 8, "--num_channels", 32, "--channel_mult", "1",
             "--num_res_blocks", 1, "--attention_resolutions", "", "--class_cond", True, "--num_classes", 2,
             "--diffusion_steps", 20, "--noise_schedule", "cosine", "--normalizer", described.normalizer.std[0]]
    bare = load(tmp_path / "bare.pt", *flags)
    assert (bare.shape, bare.image_shape, bare.num_classes) == (described.shape, described.image_shape, 2)
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([3, 7]), torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(bare.model(x, t, y=y), described.model(x, t, y=y))
    torch.testing.assert_close(bare.decode(x), described.decode(x))


@pytest.mark.parametrize("left_out, error, match", [
    ("--vae_path", FileNotFoundError, "no autoencoder is given; --vae_path wants"),
    ("--normalizer", ValueError, "bare.pt is a bare state dict and brings no statistics for --normalizer auto; give"),
    ("--num_channels", ValueError, r"bare.pt does not fit the model \(.* entries differ; .*\); check --model_path and"),
    ("--channel_mult", ValueError, "no width multipliers for a grid of 4, .*; give --channel_mult"),
])
def test_what_a_bare_state_dict_lacks_is_named(run, tmp_path, left_out, error, match):
    torch.save(dict(checkpoint_util.load_weights(run)[0]), tmp_path / "bare.pt")
    flags = {"--vae_path": tmp_path / "vae.pt", "--image_size": 8, "--num_channels": 32, "--channel_mult": "1",
             "--num_res_blocks": 1, "--attention_resolutions": "", "--class_cond": True, "--num_classes": 2,
             "--normalizer": 0.2}
    del flags[left_out]
    with pytest.raises(error, match=match):
        load(tmp_path / "bare.pt", *(word for pair in flags.items() for word in pair))


def test_a_run_folder_stands_for_the_slowest_average_of_its_newest_step(run, tmp_path, capsys):
    folder = tmp_path / "training"
    folder.mkdir()
    weights, header = checkpoint_util.load_weights(run)
    for step in (1, 2):
        names = [checkpoint_util.model_name(step), *(checkpoint_util.ema_name(rate, step) for rate in (0.9, 0.99))]
        for name in names:
            checkpoint_util.save_weights(folder / name, weights, {**header, "step": step, "classes": [name, "b"]})
        checkpoint_util.commit(folder, step, names, {})
    assert load(folder).class_names == ["ema_0.99_000002.pt", "b"]
    assert f"--model_path {folder}: taking ema_0.99_000002.pt" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--num_heads 7 contradicts .*training/ema_0.99_000002.pt, which was trained"):
        load(folder, "--num_heads", 7)
    with pytest.raises(ValueError, match="ema_0.99_000002.pt holds .* 'diffusion', --classifier_path wants"):
        script_util.load_classifier(str(folder), CPU)
    with pytest.raises(FileNotFoundError, match="pictures holds no finished checkpoint .*check --model_path"):
        load(tmp_path / "pictures")


# classifiers

CLASSIFIER = ClassifierConfig(classifier_width=32, classifier_depth=1, classifier_attention_resolutions="8",
                              classifier_in_channels=1, classifier_num_classes=3)


@pytest.mark.parametrize("pool", POOLS)
def test_a_classifier_takes_pictures_that_are_not_square(pool):
    flags = dataclasses.replace(CLASSIFIER, classifier_pool=pool)
    model, _ = script_util.build_classifier(flags, PROCESS, (1, 16, 64))
    assert model.image_size == (16, 64)
    assert model(torch.zeros(2, 1, 16, 64), torch.tensor([0, 7])).shape == (2, 3)


def test_a_classifier_is_rebuilt_from_its_run_folder_or_its_file(tmp_path):
    torch.manual_seed(0)
    model, _ = script_util.build_classifier(CLASSIFIER, PROCESS, (1, 16, 64))
    header = {"kind": "classifier", "image_shape": [1, 16, 64], "model": as_dict(CLASSIFIER),
              "diffusion": as_dict(PROCESS), "classes": ["a", "b", "c"], "data": {}}
    checkpoint_util.save_weights(tmp_path / "model000001.pt", model.state_dict(), header)
    checkpoint_util.commit(tmp_path, 1, ["model000001.pt"], {})
    for path in (tmp_path, tmp_path / "model000001.pt"):
        again, found = script_util.load_classifier(str(path), CPU)
        assert found["classes"] == ["a", "b", "c"] and not again.training
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_weights_of_another_kind_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="vae.pt holds .* of kind 'autoencoder', --model_path wants .* 'diffusion'"):
        load(tmp_path / "vae.pt")
    with pytest.raises(ValueError, match="ema_0.9_000001.pt holds a model of kind 'diffusion', --vae_path wants"):
        load(run, "--vae_path", run)
    with pytest.raises(ValueError, match="ema_0.9_000001.pt .*'diffusion', --classifier_path wants .*'classifier'"):
        script_util.load_classifier(run, CPU)
    torch.save(dict(checkpoint_util.load_weights(run)[0]), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="bare.pt does not say how it is built; --classifier_path wants a checkpoint"):
        script_util.load_classifier(tmp_path / "bare.pt", CPU)


def test_a_missing_or_damaged_model_is_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model given; --model_path wants"):
        load("")
    with pytest.raises(FileNotFoundError, match="gone.pt.*check --model_path"):
        load(tmp_path / "gone.pt")
    run.write_bytes(run.read_bytes()[:1000])
    with pytest.raises(ValueError, match="ema_0.9_000001.pt is damaged .*check --model_path"):
        load(run)


def test_an_autoencoder_replaced_after_training_is_refused_by_the_sampler(run, tmp_path):
    save_autoencoder(tmp_path / "vae.pt", seed=1)
    with pytest.raises(ValueError, match="made with autoencoder .*vae.pt has"):
        load(run)


# the run


def test_a_run_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write into .*file/run .*; give --logdir a folder that can be written"):
        script_util.begin_run(script_util.RunConfig(str(tmp_path / "file" / "run")))


def test_the_run_folder_is_asked_of_the_flag_then_the_environment_then_the_clock(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["scripts/it.py"])
    monkeypatch.setenv("OPENAI_LOGDIR", "from_environment")
    begin = lambda logdir: str(script_util.begin_run(script_util.RunConfig(logdir)))
    assert begin("given") == "given" and begin("") == "from_environment"
    monkeypatch.delenv("OPENAI_LOGDIR")
    assert begin("").startswith("runs/it-20") and "run folder: runs/it-20" in capsys.readouterr().out


def test_what_a_killed_run_left_half_written_is_gone_when_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    (tmp_path / ".model000002.pt.here.99999999.part").write_bytes(b"half")  # no process has a number this high
    (tmp_path / ".model000002.pt.there.99999999.part").write_bytes(b"half")
    script_util.begin_run(script_util.RunConfig(str(tmp_path)))
    assert [path.name for path in tmp_path.glob(".*")] == [".model000002.pt.there.99999999.part"]


def test_config_json_holds_every_flag_by_section_and_the_header(tmp_path):
    configs = script_util.parse("doc", *AUTOENCODER, argv=["--num_channels", "8,16", "--image_size", "8x16"])
    script_util.write_config(tmp_path, "it", configs, {"kind": "autoencoder"})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["header"] == {"kind": "autoencoder"} and written["script"] == "it"
    assert written["flags"]["data"]["image_size"] == "8x16"
    assert written["flags"]["autoencoder"]["num_channels"] == [8, 16]
    assert written["flags"]["autoencoder.training"].keys() >= {"kl_weight", "lr"}
