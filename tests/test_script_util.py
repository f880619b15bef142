import contextlib
import dataclasses
import importlib
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

import guided_diffusion_vae
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import check, option, read, section_name, validate, value_type
from guided_diffusion_vae.data.cache_writer import LatentCacheConfig
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.evaluation.comparison import EvaluateConfig
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.latent_datasets import LatentConfig
from guided_diffusion_vae.runs.configs import CONFIGS as ALL_CONFIGS
from guided_diffusion_vae.runs.factories import create_model_and_diffusion_vae, model_and_diffusion_defaults
from guided_diffusion_vae.runs.flags import (
    FLAG_ALIASES, add_dict_to_argparser, args_to_dict, argparser, drop_fields, flag_names, parse, parse_explicit,
    select_fields, str2bool,
)
from guided_diffusion_vae.runs.training import AutoencoderPlan, DiffusionPlan
from guided_diffusion_vae.runs.run import Run, RunConfig
from guided_diffusion_vae.sampling.sampler import SamplingConfig
from guided_diffusion_vae.train_util import AutoencoderTrainConfig, ClassifierTrainConfig, DiffusionTrainConfig
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae import AutoencoderLossConfig, DiscriminatorConfig
from guided_diffusion_vae.vae_wrapper import NormalizerConfig, VAEConfig

CONFIGS = Path(__file__).parents[1] / "configs"
AUTOENCODER = (DataConfig, AutoencoderConfig, AutoencoderLossConfig, AutoencoderTrainConfig, RunConfig)
DIFFUSION = (LatentConfig, NormalizerConfig, VAEConfig, DataConfig, ModelConfig, DiffusionConfig, DiffusionTrainConfig,
             RunConfig)
SAMPLING = (SamplingConfig, VAEConfig, NormalizerConfig, DataConfig, ModelConfig, DiffusionConfig,
            RunConfig)
MODEL = ModelConfig(num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="", in_channels=3)
PROCESS = DiffusionConfig(diffusion_steps=20, noise_schedule="cosine")

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


pytestmark = pytest.mark.usefixtures("one_process")


# --- Flags and YAML ---


def test_flags_override_yaml_and_yaml_overrides_defaults(yaml_file):
    path = yaml_file("model: {num_channels: 32, num_heads: 2}")
    argv = ["--config", path, "--num_heads", "8"]
    (model, process), given = parse_explicit("doc", ModelConfig, DiffusionConfig, argv=argv)
    assert (model.num_channels, model.num_heads, model.num_res_blocks) == (32, 8, ModelConfig().num_res_blocks)
    assert given == {"num_channels": 32, "num_heads": 8} and process == DiffusionConfig()


def test_flag_with_default_value_overrides_yaml(yaml_file):
    path = yaml_file("model: {num_heads: 2}")
    model, = parse("doc", ModelConfig, argv=["--config", path, "--num_heads", str(ModelConfig().num_heads)])
    assert model.num_heads == ModelConfig().num_heads


def test_yaml_keys_may_be_in_sections_or_top_level(yaml_file):
    read = lambda text: parse("doc", *DIFFUSION, argv=["--config", yaml_file(text)])
    grouped, alone = read("training: {lr: 0.5}\ndata: {crop: none}"), read("lr: 0.5\ncrop: none")
    assert grouped == alone and grouped[6].lr == 0.5 and grouped[3].crop == "none"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_config_gives_documented_latents_and_memory(path):
    data, network, loss, train, _ = parse("doc", *AUTOENCODER, argv=["--config", str(path)])
    plan = AutoencoderPlan((1, *data.sides), network, train, loss, DiscriminatorConfig())
    with torch.device("meta"):
        shape = create_autoencoder(plan.network).latent_shape(data.sides)
    assert f"-> {'x'.join(map(str, shape))} latents" in path.read_text().splitlines()[0]
    number = r"(\d+\.\d)"
    said = re.search(rf"training takes {number} GiB.*encoding {number},\W+decoding\W+{number}", path.read_text(), re.S)
    for text, needed in zip(said.groups() if said else (), (plan.training(), plan.inference("encoding"),
                                                                 plan.inference("decoding"))):
        assert float(text) == pytest.approx(needed.required / 2**30, abs=0.08), needed
    model, process, train = parse("doc", *DIFFUSION, argv=["--config", str(path)])[4:7]
    if "model:" in path.read_text():
        model = dataclasses.replace(model, in_channels=shape[0], dims=len(shape) - 1, num_classes=2 * model.class_cond)
        assert DiffusionPlan(shape, model, dataclasses.replace(train, batch_size=1), process).training().activations > 0


def test_progressive_stages_have_the_same_weights():
    stages = []
    for size in (256, 512, 1024):
        argv = ["--config", str(CONFIGS / f"images/progressive_{size}.yaml"), "--in_channels", "1"]
        network = parse("doc", *AUTOENCODER, argv=argv)[1]
        model = parse("doc", *DIFFUSION, argv=argv[:2])[4]
        model = dataclasses.replace(model, in_channels=4, dims=2, num_classes=2 * model.class_cond)
        with torch.device("meta"):
            autoencoder = create_autoencoder(network)
            unet, _ = create_model_and_diffusion_vae(autoencoder.latent_shape((size, size)), model, PROCESS)
        stages.append([{name: value.shape for name, value in part.state_dict().items()}
                       for part in (autoencoder, unet)])
    assert stages[0] == stages[1] == stages[2]


def test_device_section_applies_to_every_script(yaml_file):
    argv = ["--config", yaml_file("device: {mixed_precision: true}\ndata: {voxel_size: [8, 16, 16]}")]
    data, _, _, train, _ = parse("doc", *AUTOENCODER, argv=argv)
    assert train.mixed_precision and data.image_size == "8x16x16" and data.sides == (8, 16, 16)
    assert parse("doc", *DIFFUSION, argv=argv)[6].mixed_precision
    assert parse("doc", *SAMPLING, argv=argv)[0].num_samples  # has no such flag, and passes it over


def test_size_flag_overrides_yaml_under_either_name(yaml_file):
    config = ["--config", yaml_file("data: {voxel_size: [8, 16, 16]}")]
    read = lambda *argv: parse("doc", *AUTOENCODER, argv=[*config, *argv])[0].sides
    assert read() == (8, 16, 16) and read("--image_size", "4x8x8") == (4, 8, 8)
    assert read("--spatial_dims", "3") == (8, 16, 16)
    images = ["--config", yaml_file("data: {image_size: 32}"), "--voxel_size", "4,4,4"]
    assert parse("doc", *AUTOENCODER, argv=images)[0].sides == (4, 4, 4)


def test_flag_overrides_yaml_under_either_name_of_a_pair(yaml_file):
    read = lambda text, *argv: parse("doc", *AUTOENCODER, argv=["--config", yaml_file(text), *argv])[3]
    accumulated = read("device: {gradient_accumulation_steps: 4}", "--microbatch", "2")
    assert (accumulated.microbatch, accumulated.gradient_accumulation_steps) == (2, 1)
    split = read("device: {microbatch: 2}", "--gradient_accumulation_steps", "4")
    assert (split.microbatch, split.gradient_accumulation_steps) == (-1, 4)
    for argv in (["--sampler", "unipc"], ["--sampler", "ddim"]):
        sampling = parse("doc", *SAMPLING, argv=["--config", yaml_file("sampling: {use_ddim: true}"), *argv])[0]
        assert (sampling.sampler, sampling.use_ddim) == (argv[1], argv[1] == "ddim")
    with pytest.raises(ValueError, match="--microbatch 2 and --gradient_accumulation_steps 4 are mutually exclusive"):
        read("lr: 1.0", "--microbatch", "2", "--gradient_accumulation_steps", "4")


@pytest.mark.parametrize("text, flags, match", [
    ("data: {voxel_size: [8, 8, 8], image_size: 32}", [],
     "--image_size 32 and --voxel_size .8, 8, 8. are mutually exclusive; set only one"),
    ("data: {voxel_size: [8, 8, 8]}", ["--spatial_dims", "2"],
     "--spatial_dims 2 conflicts with --image_size 8x8x8, which has 3 axes"),
    ("autoencoder: {spatial_dims: 3}", [], "--spatial_dims 3 conflicts with --image_size 64x64, which has 2 axes"),
])
def test_conflicting_sizes_are_rejected(yaml_file, text, flags, match):
    with pytest.raises(ValueError, match=match):
        parse("doc", *AUTOENCODER, argv=["--config", yaml_file(text), *flags])


@pytest.mark.parametrize("text, match", [
    ("data: {image_size: 32}\ndata: {pad: true}", "the key data occurs twice"),
    ("lr: 1.0e-3\nautoencoder.training: {lr: 2.0e-3}", "sets lr to 0.001 and, as autoencoder.training.lr, to 0.002"),
])
def test_yaml_with_conflicting_keys_is_rejected(yaml_file, text, match):
    with pytest.raises(ValueError, match=match):
        parse("doc", *AUTOENCODER, argv=["--config", yaml_file(text)])


@pytest.mark.parametrize("flag, value, bound", [
    ("lr", "-1", ">= 0"), ("lr", "nan", "finite"), ("weight_decay", "inf", "finite"), ("batch_size", "0", ">= 1"),
    ("latent_channels", "0", ">= 1"), ("augment", "3", "<= 1"), ("microbatch", "-7", ">= -1"),
    ("fast_dev_run_batches", "0", ">= 1"), ("max_steps", "-5", ">= 0"),
])
def test_numbers_out_of_bounds_are_rejected_by_name(yaml_file, capsys, flag, value, bound):
    in_yaml = {"nan": ".nan", "inf": ".inf"}.get(value, value)
    message = f"--{flag} must be {bound}, got {value}"
    with pytest.raises(ValueError, match=f"file.yaml: {message}"):
        parse("doc", *AUTOENCODER, argv=["--config", yaml_file(f"{flag}: {in_yaml}")])
    with pytest.raises(SystemExit):
        parse("doc", *AUTOENCODER, argv=[f"--{flag}", value])
    assert capsys.readouterr().err.startswith(f"error: {message}")
    field = next(f for cls in AUTOENCODER for f in dataclasses.fields(cls) if f.name == flag)
    with pytest.raises(ValueError, match=message):
        check(field, value_type(field)(value))


def test_yaml_merge_keys_work(yaml_file):
    merged = "training: &t {lr: 0.5}\nautoencoder.training: {<<: *t, batch_size: 3}"
    train = parse("doc", *AUTOENCODER, argv=["--config", yaml_file(merged)])[3]
    assert (train.lr, train.batch_size) == (0.5, 3)


def test_yaml_sections_may_be_empty(yaml_file):
    data = parse("doc", *AUTOENCODER, argv=["--config", yaml_file("data:\nautoencoder.training:\n")])[0]
    assert data.image_size == 64


def test_one_yaml_file_serves_every_script_of_the_pipeline(yaml_file):
    argv = ["--config", yaml_file(PIPELINE)]
    data, autoencoder, loss, train, _ = parse("doc", *AUTOENCODER, argv=argv)
    assert (autoencoder.num_channels, autoencoder.downsample_factors) == ((8, 16), ((1, 2),))
    assert (train.lr, train.batch_size, loss.recon_loss, data.image_size) == (1e-3, 4, "l2", "16x32")
    _, scale, _, data, model, process, train, _ = parse("doc", *DIFFUSION, argv=argv)
    assert (model.num_channels, model.channel_mult, model.class_cond) == (32, "1,2", True)
    assert (train.lr, train.batch_size, train.ema_rate, process.learn_sigma) == (2e-4, 8, "0.9,0.99", True)
    assert (scale.normalizer, data.image_size) == ("channel", "16x32")
    assert parse("doc", LatentCacheConfig, argv=argv)[0].store == "mode"
    assert parse("doc", *SAMPLING, argv=argv)[0].num_samples == 12


@pytest.mark.parametrize("text, match", [
    ("model: {num_chanels: 32}", r"file.yaml: unknown key 'model.num_chanels'; did you mean 'num_channels'\?"),
    ("training: {learning_rat: 1}", "unknown key 'training.learning_rat'"),
    ("autoencoder: {training: {kl_weigth: 1}}", r"'autoencoder.training.kl_weigth'; did you mean 'kl_weight'\?"),
    ("device: {mixed_precison: true}", r"unknown key 'device.mixed_precison'; did you mean 'mixed_precision'\?"),
    ("modle: {num_channels: 32}", r"unknown key 'modle'; did you mean 'model'\?"),
    ("training: {num_channels: 32}", "unknown key 'training.num_channels'"),
    ("model: 3", "unknown key 'model'"),
    ("model: {num_channels: wide}", "file.yaml: --num_channels must be an integer, got 'wide'"),
    ("model: {num_channels: 1.5}", "--num_channels must be an integer, got 1.5"),
    ("model: {num_channels: }", "--num_channels must be an integer, got None"),
    ("model: {class_cond: maybe}", "--class_cond must be true or false, got 'maybe'"),
    ("model: {class_cond: 1}", "--class_cond must be true or false, got 1"),
    ("training: {lr: [1, 2]}", r"--lr must be a number, got \[1, 2\]"),
    ("autoencoder: {num_channels: {a: 1}}", "--num_channels must be a list such as .*, got {'a': 1}"),
    ("data: {crop: left}", "--crop must be one of center, random, none, grid, got 'left'"),
    ("- model", "expected keys with values, got a list"),
    ("model: [", "is not YAML: .*expected"),
])
def test_yaml_mistakes_are_rejected_by_name(yaml_file, text, match):
    classes = AUTOENCODER if text.startswith("autoencoder") else DIFFUSION
    with pytest.raises(ValueError, match=match):
        parse("doc", *classes, argv=["--config", yaml_file(text)])


def test_missing_yaml_file_is_reported():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist; check --config"):
        parse("doc", ModelConfig, argv=["--config", "nowhere.yaml"])


def test_empty_yaml_file_gives_defaults(yaml_file):
    assert parse("doc", ModelConfig, argv=["--config", yaml_file("# nothing\n")]) == [ModelConfig()]


@pytest.mark.parametrize("argv, message", [
    (["--num_chanels", "32"], "unrecognized arguments: --num_chanels 32; did you mean 'num_channels'?"),
    (["--num_chan", "32"], "did you mean 'num_channels'?"),
    (["--num_channels", "wide"], "error: --num_channels must be an integer, got 'wide'"),
    (["--class_cond", "maybe"], "error: --class_cond must be true or false, got 'maybe'"),
    (["--noise_schedule", "sine"], "error: --noise_schedule must be one of linear, cosine, "),
    (["--num_channels"], "argument --num_channels: expected one argument"),
])
def test_flag_mistakes_print_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        parse("doc", *DIFFUSION, argv=argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_values_with_a_minus_need_no_equals_sign():
    for argv in (["--value_window", "-1000,400", "--seed", "-3"], ["--value_window=-1000,400", "--seed=-3"]):
        data, train = parse("doc", DataConfig, AutoencoderTrainConfig, argv=argv)
        assert data.value_window == "-1000,400" and train.seed == -3


@pytest.mark.parametrize("text, value", [
    ("4", 4), ("2,2", (2, 2)), ("[2]", (2,)), ("[[1,2,2],[2,2,2]]", ((1, 2, 2), (2, 2, 2))), ("0.5, 1", (0.5, 1)),
    ("True,false", (True, False)), ("", ()),
])
def test_lists_are_parsed_from_flags(text, value):
    @dataclasses.dataclass
    class Config:
        levels: tuple = option((), "a list")
    assert parse("doc", Config, argv=["--levels", text])[0].levels == value


def test_malformed_list_is_rejected(capsys):
    with pytest.raises(SystemExit):
        parse("doc", AutoencoderConfig, argv=["--num_channels", "32,a"])
    assert "--num_channels must be a list such as 2,2 or [[1,2,2],[2,2,2]], got '32,a'" in capsys.readouterr().err


def test_help_all_shows_sections_choices_and_typed_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        parse("Train it.\n\n    python it.py", *AUTOENCODER, argv=["--help_all"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "Train it.\n\n    python it.py\n" in text
    sections = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["options", "data", "autoencoder", "autoencoder.training", "run"]
    assert "--num_channels TUPLE" in text and "(default: [32,64,64])" in text
    assert "more than 10% of the files" in " ".join(text.split())
    assert "--recon_loss {l1,l2}" in text and "(default: 0.0001)" in text and "--dry_run BOOL" in text


def configs_of(script):
    """The config classes and selections of a script."""
    return runpy.run_path(str(script))["main"].argparser.args[1:]


SCRIPTS = sorted((CONFIGS.parent / "scripts").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_one_screen_of_essential_flags(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    classes = configs_of(script)
    names = flag_names(*classes)
    pages = []
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            parse("doc", *classes, argv=[flag])
        pages.append(capsys.readouterr().out)
        assert stop.value.code == 0
    shown, all_shown = (set(re.findall(r"^  --(\w+)", page, re.M)) for page in pages)
    assert 3 < len(shown) <= 15 and len(pages[0].splitlines()) <= 34 and all_shown == {"config", "help_all", *names}
    assert shown <= {"config", *names} and pages[0].endswith(f"\n--help_all lists all {len(names) + 1} flags\n")
    assert not shown & {"in_channels", "out_channels", "num_classes", "dims", "spatial_dims", "classifier_dims",
                        "classifier_in_channels", "classifier_num_classes"}


def test_scripts_that_train_or_sample_use_tf32():
    defaults = {script.stem: parse("doc", *configs_of(script), argv=[])[-1].tf32 for script in SCRIPTS}
    fast = {"distill", "image_edit", "train_autoencoder",
            *(name for name in defaults if name.endswith(("_train", "_train_vae", "_sample", "_sample_vae")))}
    assert len(fast) == 11 and defaults == {name: name in fast for name in defaults}


def test_essential_may_depend_on_another_flag():
    @dataclasses.dataclass
    class Here:
        first: int = option(1, "a", essential=True)
        second: int = option(2, "b", essential="third")

    @dataclasses.dataclass
    class There:
        third: int = option(3, "c")

    essential = lambda *classes: [action.dest for action in argparser("doc", *classes).essential]
    assert essential(Here) == ["config", "first"] and essential(Here, There) == ["config", "first", "second"]


def test_table_of_configs_is_complete():
    package = Path(guided_diffusion_vae.__file__).parent
    declared = set()
    for path in package.rglob("*.py"):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        if "= option(" in path.read_text() and path.name != "config.py" or module.endswith("data.config"):
            members = vars(importlib.import_module(module)).values()
            declared |= {cls for cls in members if dataclasses.is_dataclass(cls) and isinstance(cls, type)
                         and cls.__module__ == module and all("help" in f.metadata for f in dataclasses.fields(cls))}
    assert declared == set(ALL_CONFIGS) and len(declared) > 25


def test_fields_of_the_same_yaml_key_have_the_same_type():
    kinds = {}
    for cls in ALL_CONFIGS:
        for field in dataclasses.fields(cls):
            assert kinds.setdefault((section_name(cls), field.name), value_type(field)) is value_type(field)


@pytest.mark.parametrize("cls", ALL_CONFIGS, ids=lambda cls: cls.__name__)
def test_defaults_are_valid_and_survive_the_command_line(cls):
    validate(cls())
    for field in dataclasses.fields(cls):
        shown = json.dumps(field.default) if isinstance(field.default, tuple) else str(field.default)
        assert read(field, shown) == field.default and type(read(field, shown)) is type(field.default)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("old, new", FLAG_ALIASES.items())
def test_deprecated_flag_works_and_warns_once(capsys, old, new, joined):
    cls, default = next((c, getattr(c, new)) for c in ALL_CONFIGS if new in c.__dataclass_fields__)
    value = {bool: not default, int: 7, str: "DIR"}[type(default)]
    argv = [f"--{old}={value}"] if joined else [f"--{old}", str(value)]
    with pytest.warns(DeprecationWarning, match=f"^--{old} is deprecated, use --{new}$") as caught:
        (config,), given = parse_explicit("doc", cls, argv=argv)
    assert getattr(config, new) == value and given == {new: value} and len(caught) == 1
    assert capsys.readouterr().err == f"--{old} is deprecated, use --{new}\n"


def test_deprecated_yaml_key_works_and_warns(yaml_file, capsys):
    path = yaml_file("autoencoder: {training: {mirror: true}}\nlatents: {small_cache_dir: DIR}\nlr: 1.0")
    with pytest.warns(DeprecationWarning, match="autoencoder.training.mirror is deprecated, use auto"):
        train = parse("doc", *AUTOENCODER, argv=["--config", path])[3]
        overridden = parse("doc", *AUTOENCODER, argv=["--config", path, "--augment_flip", "False"])[3]
    assert train.augment_flip and not overridden.augment_flip
    assert f"{path}: latents.small_cache_dir is deprecated, use latents.low_res_cache_dir\n" in capsys.readouterr().err


@pytest.mark.parametrize("argv, text, match", [
    (["--mirror", "True", "--augment_flip", "True"], "lr: 1.0", "--mirror is the deprecated name of --augment_flip"),
    ([], "autoencoder.training: {mirror: true, augment_flip: true}", "training.mirror is the deprecated name of auto"),
])
def test_deprecated_and_present_name_together_are_rejected(yaml_file, argv, text, match):
    with pytest.raises(ValueError, match=match):
        parse("doc", *AUTOENCODER, argv=["--config", yaml_file(text), *argv])


def test_deprecated_flag_is_unknown_without_the_present_one(capsys):
    with pytest.raises(SystemExit):
        parse("doc", ModelConfig, argv=["--mirror", "True"])
    assert "unrecognized arguments: --mirror" in capsys.readouterr().err


@pytest.mark.parametrize("flag, value, problem", [
    ("value_range", "1", "two finite numbers, the lower first"), ("spacing", "1,2", "one or three distances"),
    ("image_size", "64x", "a size such as 64"), ("reference_db", "loud", "a finite number, or empty"),
    ("channel_mult", "1;2", "comma-separated numbers"), ("attention_resolutions", "a", "comma-separated integers"),
    ("timestep_respacing", "dim25", "a count"), ("ema_rate", "1.5", "comma-separated numbers in"),
    ("normalizer", "atuo", "auto, channel, none, or a number"), ("class_dropout", "1", "< 1"),
])
def test_malformed_text_is_rejected_by_the_parser(capsys, yaml_file, flag, value, problem):
    with pytest.raises(SystemExit):
        parse("doc", *DIFFUSION, argv=[f"--{flag}", value])
    assert capsys.readouterr().err.startswith(f"error: --{flag} must be {problem}")
    with pytest.raises(ValueError, match=f"file.yaml: --{flag} must be {problem}"):
        parse("doc", *DIFFUSION, argv=["--config", yaml_file(f"{flag}: {value}")])


def test_comma_separated_flags_may_be_yaml_lists(yaml_file):
    text = "model: {channel_mult: [1, 2], attention_resolutions: [8]}\nvalue_range: [-80, 0]\nema_rate: [0.9, 0.99]"
    _, _, _, data, model, _, train, _ = parse("doc", *DIFFUSION, argv=["--config", yaml_file(text)])
    assert (model.channel_mult, model.attention_resolutions) == ("1,2", "8")
    assert (data.value_range, train.ema_rate) == ("-80,0", "0.9,0.99")


def test_defaults_printed_by_help_parse_to_themselves():
    default = AutoencoderConfig().num_channels
    shown = json.dumps(default, separators=(",", ":"))
    assert parse("doc", AutoencoderConfig, argv=["--num_channels", shown])[0].num_channels == default


def test_reference_helpers_build_the_same_flags():
    import argparse

    parser = argparse.ArgumentParser()
    defaults = model_and_diffusion_defaults()
    add_dict_to_argparser(parser, {**defaults, "path": None})
    args = parser.parse_args(["--num_channels", "64", "--class_cond", "yes", "--path", "x"])
    picked = args_to_dict(args, defaults)
    assert picked == {**defaults, "num_channels": 64, "class_cond": True} and args.path == "x"
    assert str2bool("F") is False and str2bool(True) is True
    with pytest.raises(argparse.ArgumentTypeError, match="^boolean value expected, got 'maybe'$"):
        str2bool("maybe")


def test_selection_has_the_fields_and_builds_the_full_class(yaml_file, capsys):
    part = select_fields(DataConfig, "image_size")
    field, = part.fields
    assert part.section == "data" and field.default == DataConfig().image_size
    assert field.metadata["help"] == DataConfig.__dataclass_fields__["image_size"].metadata["help"]
    argv = ["--config", yaml_file("data: {image_size: 32, crop: none}")]   # crop is a flag of other scripts
    (data,), given = parse_explicit("doc", part, argv=argv)
    assert data == DataConfig(image_size=32) and given == {"image_size": 32}
    with pytest.raises(SystemExit):
        parse("doc", part, argv=["--crop", "none"])


def test_unselected_field_is_not_set_by_the_flag_of_another_class():
    training = drop_fields(ClassifierTrainConfig, "batch_size")
    evaluate, train = parse("doc", EvaluateConfig, training, argv=["--batch_size", "7"])
    assert (evaluate.batch_size, train.batch_size) == (7, ClassifierTrainConfig.batch_size)


@pytest.mark.parametrize("flags, match", [
    ({"channel_mult": "1,two"}, "--channel_mult must be comma-separated numbers such as 1,2,2, got '1,two'"),
    ({"channel_mult": "1;2"}, "--channel_mult must be .* got '1;2'"),
    ({"attention_resolutions": "16,small"},
     "--attention_resolutions must be comma-separated integers such as 16,8, got '16,small'"),
])
def test_model_factory_rejects_malformed_lists_by_flag(flags, match):
    with pytest.raises(ValueError, match=match):
        create_model_and_diffusion_vae((3, 8, 8), dataclasses.replace(MODEL, **flags), PROCESS)


# --- The run ---


def open_run(logdir, *configs):
    run = Run("it", [RunConfig(str(logdir)), *configs], {})
    run.open_folder(False, contextlib.ExitStack())
    return run


def test_run_folder_below_a_file_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write into .*file/run .*; set --logdir to a writable folder"):
        open_run(tmp_path / "file" / "run")


def test_run_folder_is_from_flag_then_environment_then_date(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["scripts/it.py"])
    monkeypatch.setenv("OPENAI_LOGDIR", "from_environment")
    begin = lambda logdir: str(open_run(logdir).folder)
    assert begin("given") == "given" and begin("") == "from_environment"
    monkeypatch.delenv("OPENAI_LOGDIR")
    assert begin("").startswith("runs/it-20") and "run folder: runs/it-20" in capsys.readouterr().out


def test_resumed_run_removes_partial_files_of_a_killed_process(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    (tmp_path / ".model000002.pt.here.99999999.part").write_bytes(b"half")  # no process has a number this high
    (tmp_path / ".model000002.pt.there.99999999.part").write_bytes(b"half")
    open_run(tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".model000002.pt.there.99999999.part"]


def test_config_json_has_all_flags_by_section_and_the_header(tmp_path):
    configs = parse("doc", *AUTOENCODER, argv=["--num_channels", "8,16", "--image_size", "8x16"])
    Run("it", configs, {}, tmp_path).save_config({"kind": "autoencoder"})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["header"] == {"kind": "autoencoder"} and written["script"] == "it"
    assert written["flags"]["data"]["image_size"] == "8x16"
    assert written["flags"]["autoencoder"]["num_channels"] == [8, 16]
    assert written["flags"]["autoencoder.training"].keys() >= {"kl_weight", "lr"}
