"""Turn flags and YAML into configs, and configs into models; the only file that knows argparse and yaml."""

import argparse
import dataclasses
import difflib
import functools
import inspect
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from . import checkpoint_util, dist_util, logger
from . import gaussian_diffusion as gd
from .config import as_dict, from_dict, frozen, opt
from .files import require_writable_folder, sweep_parts, write_json
from .gaussian_diffusion import DiffusionConfig
from .image_datasets import PictureFolder, parse_size
from .latent_datasets import EncodedPictures, open_latents
from .respace import SpacedDiffusion, space_timesteps
from .sampling import Sampler
from .train_util import TrainLoop, find_checkpoint, progress_bar
from .unet import ClassifierConfig, EncoderUNetModel, ModelConfig, SuperResModel, UNetModel
from .vae_wrapper import LatentNormalizer, check_latent_std, create_vae

NUM_CLASSES = 1000

# Width multipliers per level where --channel_mult is empty, by the size of the grid that the network works on. The
# sizes from 64 up are those of the released checkpoints; 16 and 32 are the usual latent grids.
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4),
    32: (1, 2, 2, 4), 16: (1, 2, 2),
}
CLASSIFIER_CHANNEL_MULT = {size: CHANNEL_MULT[size] for size in (512, 256, 128, 64)}
SUPER_RES_CHANNEL_MULT = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}

# What a sampler may choose freely: everything else in the header of a model describes the weights.
FREE_AT_SAMPLING = ("timestep_respacing", "use_fp16", "use_checkpoint", "dropout")


@dataclasses.dataclass
class RunConfig:
    logdir: str = opt("", "folder of the run; default $OPENAI_LOGDIR, else runs/<script>-<date>")
    dry_run: bool = opt(False, "print the resolved configuration, the data and the model's size, then stop")


# ---------------------------------------------------------------------------------------------------------------------
# flags and YAML


def parse(doc, *classes, argv=None):
    """Return one instance of every config class, from defaults, then `--config file.yaml`, then flags."""
    return parse_given(doc, *classes, argv=argv)[0]


def parse_given(doc, *classes, argv=None):
    """Return (instances, {flag: value} of what was given in the file or on the command line)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparser(doc, *classes)
    flags = _explicit(parser, argv)
    fields = {f.name for cls in classes for f in dataclasses.fields(cls)}
    dist_util.memory_flags = [name for name in dist_util.MEMORY_FLAGS if name in fields]
    from_file = read_yaml(flags.pop("config"), classes) if "config" in flags else {}
    given = {**from_file, **flags}
    return [from_dict(cls, given) for cls in classes], given


def argparser(doc, *classes):
    """Return the parser of a script: one flag a field, with its help text and default."""
    parser = _Parser(description=doc, usage="%(prog)s [--config FILE.yaml] [--flag value ...]", allow_abbrev=False,
                     formatter_class=_HelpFormatter)
    parser.add_argument("--config", default="", metavar="FILE.yaml", help="values for flags below, which win over it")
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(map(section_of, classes))}
    for cls in classes:
        group = groups[section_of(cls)]
        for field in dataclasses.fields(cls):
            choices = field.metadata["choices"]
            group.add_argument(f"--{field.name}", default=field.default, type=_CONVERTERS.get(field.type, field.type),
                               metavar=None if choices else field.type.__name__.upper(), choices=choices,
                               help=field.metadata["help"])
    return parser


def section_of(cls):
    """Return the YAML section of a config class: its SECTION, else its name in lower case without 'Config'."""
    return getattr(cls, "SECTION", cls.__name__.removesuffix("Config").lower())


def part_of(cls, *names):
    """Return a config class of the same section with these fields of `cls` alone, for a script that heeds no others."""
    fields = [(f.name, f.type, dataclasses.field(default=f.default, metadata=f.metadata))
              for f in dataclasses.fields(cls) if f.name in names]
    return dataclasses.make_dataclass(cls.__name__, fields, namespace={"SECTION": section_of(cls)})


def read_yaml(path, classes):
    """Return {flag: value} for the given config classes from a YAML file.

    Keys stand alone or in the section of their class (`data`, `autoencoder`, `autoencoder.training`, ...). Sections of
    other scripts are passed over, so one file can serve a whole pipeline; a key that no class of its section has is
    refused with the nearest one that exists.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; check --config")
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not keys with values")
    mine = {f.name: f for cls in classes for f in dataclasses.fields(cls)}
    values, sections = {}, _all_sections()

    def take(section, entries):
        here = {f.name for cls in classes if section_of(cls) == section for f in dataclasses.fields(cls)}
        known = sections[section] if section else set(mine)
        for key, value in entries.items():
            nested = f"{section}.{key}" if section else key
            if isinstance(value, dict) and nested in sections:
                take(nested, value)
            elif key not in known | here:
                raise ValueError(f"{path} has an unknown key {nested!r}{_nearest(key, known | here | set(sections))}")
            elif key in here or (not section and key in mine):
                values[key] = _from_yaml(mine[key], value, path)

    take("", content)
    return values


def _all_sections():
    """Return {section: known keys}; imported here because the scripts need only some of these modules."""
    from . import (
        autoencoder, evaluation, image_datasets, latent_datasets, microdoppler, sampling, train_util, unet, vae_wrapper,
    )

    sections = {}
    for module in (autoencoder, evaluation, gd, image_datasets, latent_datasets, microdoppler, sampling, train_util,
                   unet, vae_wrapper, sys.modules[__name__]):
        for cls in vars(module).values():
            if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__name__.endswith("Config"):
                sections.setdefault(section_of(cls), set()).update(f.name for f in dataclasses.fields(cls))
    return sections


def _from_yaml(field, value, path):
    kind = field.type.__name__
    if kind == "tuple" and isinstance(value, (list, int, float, bool)):
        return frozen(value)
    if kind == "bool" and not isinstance(value, bool) or isinstance(value, (dict, list)) or value is None:
        raise ValueError(f"{path}: {field.name} is {value!r}, needed is a value of type {kind}")
    try:
        value = _CONVERTERS.get(field.type, field.type)(value if kind == "bool" else str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{path}: {field.name} is {value!r}, needed is a value of type {kind}") from error
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{path}: {field.name} is {value!r}, possible are {', '.join(map(str, choices))}")
    return value


def _explicit(parser, argv):
    """Return {flag: value} of the flags that stand on the command line."""
    parser.parse_args(argv)  # answers --help and complains while the defaults are in place
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def _nearest(word, known):
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


class _Parser(argparse.ArgumentParser):
    """Answers a mistake with one line, and an unknown flag with the nearest known one."""

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            word = message.split(":", 1)[1].split()[0].lstrip("-").split("=")[0]
            message += _nearest(word, {a.dest for a in self._actions})
        self.exit(2, f"error: {message} (--help lists all flags)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that ends with the default, spelled as on the command line."""

    def _get_help_string(self, action):
        default = action.default
        if default in (argparse.SUPPRESS, None, "", ()):
            return action.help
        if isinstance(default, tuple):
            default = json.dumps(default, separators=(",", ":"))
        return f"{action.help} (default: {default})"


def str2bool(v):
    """Read yes/no in the usual spellings; https://stackoverflow.com/q/15008758 asks for it since argparse cannot."""
    if isinstance(v, bool):
        return v
    answer = {"yes": True, "true": True, "t": True, "y": True, "1": True,
              "no": False, "false": False, "f": False, "n": False, "0": False}.get(v.lower())
    if answer is None:
        raise argparse.ArgumentTypeError(f"{v!r} is neither true nor false")
    return answer


def _numbers(text):
    """Read `4`, `2,2` or `[[1,2,2],[2,2,2]]`; a single value stays a scalar, since it means every axis or level."""
    text = text.strip()
    try:
        value = json.loads((text if text.startswith("[") else f"[{text}]").lower())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 2,2 or [[1,2,2],[2,2,2]]") from error
    return frozen(value[0] if len(value) == 1 and not text.startswith("[") else value)


_CONVERTERS = {bool: str2bool, tuple: _numbers}


def add_dict_to_argparser(parser, default_dict):
    """Add a flag for every entry of a dictionary, its type being that of the default (None: text)."""
    for name, default in default_dict.items():
        kind = str if default is None else type(default)
        parser.add_argument(f"--{name}", default=default, type=_CONVERTERS.get(kind, kind))


def args_to_dict(args, keys):
    """Pick attributes of parsed arguments by name."""
    return {key: getattr(args, key) for key in keys}


# ---------------------------------------------------------------------------------------------------------------------
# a run


def begin_run(run, configs=()):
    """Start the ranks, the run folder and the log; return the folder.

    The folder is printed first and, by `end_run`, last. Where it already holds checkpoints, the logs go on from them.
    """
    dist_util.setup_dist()
    folder = run.logdir or os.environ.get("OPENAI_LOGDIR")
    if run.dry_run:
        print_configuration(configs)
        return folder
    resume_step = None
    if folder:
        require_writable_folder(folder, "--logdir")
        if dist_util.rank() == 0:
            sweep_parts(folder)
        trains = [c.resume_checkpoint for c in configs if hasattr(c, "resume_checkpoint")]
        found = find_checkpoint(folder, trains[0])[0] if trains else None
        resume_step = found["step"] if found else None
    logger.configure(dir=folder, resume_step=resume_step)
    logger.log(f"run folder: {logger.get_dir()}")
    return Path(logger.get_dir())


def end_run(folder):
    """Say once more where everything is."""
    if dist_util.rank() == 0:
        print(f"run folder: {folder}", flush=True)


def write_config(folder, script, configs, header):
    """Write config.json, all that rebuilds the run; called once the run is known to fit what its folder holds."""
    if dist_util.rank() == 0:
        write_json(Path(folder) / "config.json", {"script": script, "header": header, "flags": _by_section(configs)})


def print_configuration(configs):
    """Print all flags with their values (rank 0)."""
    if dist_util.rank() == 0:
        for section, flags in _by_section(configs).items():
            print(f"{section}:")
            for key, value in flags.items():
                print(f"  {key}: {json.dumps(value)}")


def _by_section(configs):
    flags = {}
    for config in configs:
        flags.setdefault(section_of(type(config)), {}).update(as_dict(config))
    return flags


def print_model_size(model, forward, batch_size, averages=1):
    """Print the parameter count and what training needs: weights, gradients, AdamW, averages, saved activations.

    `forward(model)` runs the model on one sample; it is done on the meta device, where nothing is allocated, and the
    bytes that it keeps for the backward pass are counted.
    """
    count = sum(p.numel() for p in model.parameters())
    fixed = 4 * count * (4 + averages)
    shadow = model.to("meta")
    saved = []

    def keep(tensor):
        saved.append(tensor)  # and alive, so that no two share a number
        return tensor

    with torch.device("meta"), _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        kept_alive = forward(shadow)
    unique = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*saved, kept_alive]}
    for parameter in shadow.parameters():
        unique.pop(parameter.untyped_storage()._cdata, None)
    say(f"model: {count / 1e6:.2f} M parameters; training needs about {fixed / 2**20:.0f} MiB for weights, gradients, "
        f"AdamW and averages, and {batch_size * sum(unique.values()) / 2**20:.0f} MiB for activations (float32, batch "
        f"{batch_size}, without --use_checkpoint or --mixed_precision savings)")


class _FusedAttention(TorchFunctionMode):
    """Let attention on the meta device keep what fused kernels keep; it would take the one that keeps the weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return function(*args, **(kwargs or {}))


def say(text):
    """Print on rank 0, and into the log where there is one."""
    if dist_util.rank() == 0:
        logger.log(text)


def print_report(report, indent=""):
    """Print numbers by name, nested ones further in (rank 0)."""
    for key, value in report.items():
        if isinstance(value, dict):
            say(f"{indent}{key}:")
            print_report(value, indent + "  ")
        else:
            say(f"{indent}{key}: {f'{value:.5g}' if isinstance(value, float) else value}")


def one_sample(shape, model):
    """Return what `print_model_size` calls: the UNet on one latent [C x ...]."""
    labels = {"y": torch.zeros(1, dtype=torch.long, device="meta")} if model.class_cond else {}
    return lambda network: network(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long), **labels)


def preprocessing(data):
    """Return how pictures become numbers: what a checkpoint remembers of a DataConfig."""
    return {k: v for k, v in as_dict(data).items() if k not in ("data_dir", "random_flip")}


def loop_arguments(train, *without):
    """Return the fields of a training config that TrainLoop takes, but for those named."""
    return {k: v for k, v in vars(train).items() if k in inspect.signature(TrainLoop).parameters and k not in without}


def say_source(source):
    """Print what a latent source holds: count, shape, classes, statistics."""
    classes = ""
    if source.class_names:
        counts = np.bincount(source.labels, minlength=len(source.class_names))
        classes = "; classes: " + ", ".join(f"{name} {n}" for name, n in zip(source.class_names, counts))
    of = source.statistics
    spread = ", ".join(f"{std:.4f}" for std in of["channel_std"])
    say(f"{source.count} latents {'x'.join(map(str, source.latent_shape))} in {source.folder}{classes}; "
        f"mean {of['mean']:.4f}, std {of['std']:.4f}, std per channel {spread}")


# ---------------------------------------------------------------------------------------------------------------------
# defaults, by name of flag


def _defaults(*classes):
    return {f.name: f.default for cls in classes for f in dataclasses.fields(cls)}


def diffusion_defaults():
    """Defaults of the diffusion process."""
    return _defaults(DiffusionConfig)


def classifier_defaults():
    """Defaults of noisy-image classifiers."""
    return {"image_size": 64, **_defaults(ClassifierConfig)}


def model_and_diffusion_defaults():
    """Defaults of image models and their process."""
    return {"image_size": 64, **_defaults(ModelConfig), **diffusion_defaults()}


def classifier_and_diffusion_defaults():
    """Defaults of classifiers and the process that noises their input."""
    return {**classifier_defaults(), **diffusion_defaults()}


def sr_model_and_diffusion_defaults():
    """Defaults of upsamplers and their process."""
    accepted = inspect.signature(sr_create_model).parameters
    kept = {k: v for k, v in model_and_diffusion_defaults().items() if k in accepted}
    return {**kept, **diffusion_defaults(), "large_size": 256, "small_size": 64}


# ---------------------------------------------------------------------------------------------------------------------
# factories


def create_model_and_diffusion(image_size, learn_sigma=False, **flags):
    """Build a UNet and its process from the flags of `model_and_diffusion_defaults`."""
    of_process = {k: flags.pop(k) for k in list(flags) if k in diffusion_defaults()}
    model = create_model(image_size, learn_sigma=learn_sigma, **flags)
    return model, _process_from_flags(learn_sigma=learn_sigma, **of_process)


def create_model_and_diffusion_vae(latent_shape, model, diffusion):
    """Build the UNet of a latent grid [C x ...] and its process from a ModelConfig and a DiffusionConfig."""
    flags = {**as_dict(model), "in_channels": latent_shape[0], "dims": len(latent_shape) - 1}
    return create_model_and_diffusion(image_size=max(latent_shape[1:]), **flags, **as_dict(diffusion))


def create_model(
    image_size, num_channels, num_res_blocks, channel_mult="", learn_sigma=False, class_cond=False,
    use_checkpoint=False, attention_resolutions="16", num_heads=1, num_head_channels=-1, num_heads_upsample=-1,
    use_scale_shift_norm=False, dropout=0, resblock_updown=False, use_fp16=False, use_new_attention_order=False,
    in_channels=0, num_classes=0, dims=0, resample_depth=False,
):
    """Build a UNet for a grid of `image_size` (of the latent, where it works on latents).

    Zeros stand for what guided-diffusion has: 3 channels, 1000 classes, 2 axes.

    :raises ValueError: where `image_size` has no default multipliers and `channel_mult` is empty.
    """
    in_channels = in_channels or 3
    return UNetModel(
        image_size=image_size, in_channels=in_channels, model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1), num_res_blocks=num_res_blocks,
        attention_resolutions=_strides(image_size, attention_resolutions), dropout=dropout,
        channel_mult=_multipliers(image_size, channel_mult, CHANNEL_MULT), dims=dims or 2,
        num_classes=(num_classes or NUM_CLASSES) if class_cond else None, use_checkpoint=use_checkpoint,
        use_fp16=use_fp16, num_heads=num_heads, num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample, use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown, use_new_attention_order=use_new_attention_order, resample_depth=resample_depth,
    )


def sr_create_model_and_diffusion(large_size, small_size, learn_sigma=False, **flags):
    """Build an upsampler and its process from the flags of `sr_model_and_diffusion_defaults`."""
    of_process = {k: flags.pop(k) for k in list(flags) if k in diffusion_defaults()}
    model = sr_create_model(large_size, small_size, learn_sigma=learn_sigma, **flags)
    return model, _process_from_flags(learn_sigma=learn_sigma, **of_process)


def sr_create_model(
    large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
    attention_resolutions, num_heads, num_head_channels, num_heads_upsample, use_scale_shift_norm, dropout,
    resblock_updown, use_fp16,
):
    """Build an upsampler that works at `large_size` and sees the small picture as further channels.

    :raises ValueError: where `large_size` has no multipliers.
    """
    return SuperResModel(
        image_size=large_size, in_channels=3, model_channels=num_channels, out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks, attention_resolutions=_strides(large_size, attention_resolutions),
        dropout=dropout, channel_mult=_multipliers(large_size, "", SUPER_RES_CHANNEL_MULT),
        num_classes=NUM_CLASSES if class_cond else None, use_checkpoint=use_checkpoint, num_heads=num_heads,
        num_head_channels=num_head_channels, num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm, resblock_updown=resblock_updown, use_fp16=use_fp16,
    )


def create_classifier_and_diffusion(image_size, learn_sigma=False, **flags):
    """Build a classifier and the process that noises its input, from `classifier_and_diffusion_defaults`."""
    of_process = {k: flags.pop(k) for k in list(flags) if k in diffusion_defaults()}
    return create_classifier(image_size, **flags), _process_from_flags(learn_sigma=learn_sigma, **of_process)


def create_classifier(
    image_size, classifier_use_fp16, classifier_width, classifier_depth, classifier_attention_resolutions,
    classifier_use_scale_shift_norm, classifier_resblock_updown, classifier_pool, classifier_in_channels=0,
    classifier_num_classes=0,
):
    """Build the half of a UNet that ends in logits.

    :raises ValueError: where `image_size` has no multipliers.
    """
    return EncoderUNetModel(
        image_size=image_size, in_channels=classifier_in_channels or 3, model_channels=classifier_width,
        out_channels=classifier_num_classes or NUM_CLASSES, num_res_blocks=classifier_depth,
        attention_resolutions=_strides(image_size, classifier_attention_resolutions),
        channel_mult=_multipliers(image_size, "", CLASSIFIER_CHANNEL_MULT), use_fp16=classifier_use_fp16,
        num_head_channels=64, use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown, pool=classifier_pool,
    )


def create_gaussian_diffusion(
    *, steps=1000, learn_sigma=False, sigma_small=False, noise_schedule="linear", use_kl=False, predict_xstart=False,
    rescale_timesteps=False, rescale_learned_sigmas=False, timestep_respacing="",
):
    """Build a process; `timestep_respacing` picks the steps that sampling walks through (empty: all)."""
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    else:
        loss_type = gd.LossType.RESCALED_MSE if rescale_learned_sigmas else gd.LossType.MSE
    fixed = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def _process_from_flags(diffusion_steps=1000, **flags):
    return create_gaussian_diffusion(steps=diffusion_steps, **flags)


def _strides(size, resolutions):
    """Return the downsampling rates at which the longest side of the grid has the given sizes ("16,8")."""
    try:
        wanted = [int(r) for r in str(resolutions).split(",") if r]
    except ValueError:
        raise ValueError(f"attention resolutions {resolutions!r} are not numbers with commas between, such as 16,8 "
                         "(--attention_resolutions, --classifier_attention_resolutions)") from None
    return tuple(_longest(size) // r for r in wanted if r)


def _longest(size):
    return max(size) if isinstance(size, tuple) else size


def _multipliers(size, text, table):
    """Return the width multipliers that are given, else those of the longest side of the grid."""
    if text:
        try:
            return tuple(float(m) if "." in m else int(m) for m in str(text).split(","))
        except ValueError:
            raise ValueError(f"--channel_mult is {text!r}; needed are numbers with commas between: 1,2,2") from None
    if _longest(size) not in table:
        remedy = "give --channel_mult, for example 1,2,2" if table is CHANNEL_MULT else "choose another --image_size"
        known = ", ".join(map(str, sorted(table)))
        raise ValueError(f"no width multipliers for a grid of {size}, only for {known}; {remedy}")
    return table[_longest(size)]


# ---------------------------------------------------------------------------------------------------------------------
# models from their checkpoints


def open_source(latents, vae, data, given, seed, device, folder=None):
    """Return (latent source, codec or None): a cache, or pictures that an autoencoder encodes on the fly.

    A cache needs no autoencoder to train from; without one there are no previews. A run that goes on in `folder` keeps
    the statistics it began with.
    """
    if bool(latents.cache_dir) == bool(data.data_dir):
        raise ValueError(f"--cache_dir is {latents.cache_dir!r} and --data_dir is {data.data_dir!r}; give one of them: "
                         "a cache of latents, or pictures together with --vae_path")
    if latents.cache_dir:
        source = open_latents(latents.cache_dir)
        codec = codec_of(source.autoencoder, vae, device, required=False)
        require_same_pictures(source, given)
        verify(source)
        if device.type == "cuda":
            source.on_device(device, torch.cuda.mem_get_info()[0] // 4)
        if codec is None:
            say("the cache's autoencoder is not at hand (--vae_path), so there are no previews")
        return source, codec
    codec = create_vae(vae, device)
    pictures = open_pictures(data, given, codec)
    encoded = functools.partial(EncodedPictures, pictures, codec, device, latents.stats_samples, seed)
    measured = begun_with(folder).get("statistics")
    if dist_util.rank() == 0 and measured is None:
        with progress_bar(None, 0, "measuring latents") as bar:
            measured = encoded(progress=bar.advance_to).statistics
    return encoded(statistics=dist_util.broadcast_object(measured)), codec


def open_pictures(data, given, codec):
    """Return the PictureFolder that an autoencoder shall see, read as it was trained where the flags do not say."""
    return PictureFolder(as_trained(data, given, codec.preprocessing), multiple=codec.factors)


def as_trained(data, given, preprocessing):
    """Return a DataConfig with the settings that a model was trained with, but for those that are given."""
    known = {f.name for f in dataclasses.fields(data)} - {"data_dir", "random_flip"} - set(given)
    return dataclasses.replace(data, **{k: frozen(v) for k, v in preprocessing.items() if k in known})


def require_same_pictures(cache, given):
    """Refuse flags of the data that contradict how the pictures of a cache were read."""
    read = getattr(cache, "preprocessing", None) or {}
    for key, value in given.items():
        if key in read and key != "data_dir" and frozen(read[key]) != value:
            raise ValueError(f"--{key} {value} contradicts the cache {cache.folder}, whose pictures were read with "
                             f"{key} {read[key]}; leave the flag away or encode again")


def verify(cache, limit_bytes=2**32):
    """Compare a cache with the SHA-256 of its files on rank 0, where that takes seconds."""
    if dist_util.rank() == 0 and hasattr(cache, "verify"):
        if cache.nbytes > limit_bytes:
            return say(f"{cache.folder} is large and taken as it is; encode_dataset.py with the same flags verifies it")
        with progress_bar(None, 0, "verifying the cache") as bar:
            cache.verify(bar.advance_to)


def begun_with(folder):
    """Return the header of the run that goes on in `folder`, an empty dictionary where none does."""
    if not folder or not checkpoint_util.steps(folder):
        return {}
    try:
        return json.loads((Path(folder) / "config.json").read_text())["header"]
    except (OSError, ValueError, KeyError):
        return {}


def codec_of(described, vae, device, required=True):
    """Open the autoencoder that latents were made with: `--vae_path`, else where the description says that it was.

    :raises ValueError: where another autoencoder is found, naming both.
    :raises FileNotFoundError: where none is found, unless `required` is False; then None is returned.
    """
    described = described or {"path": "", "sha256": None, "scale_factor": vae.scale_factor or None}
    path = vae.vae_path or described["path"]
    if not path or not vae.vae_path and not path.startswith("hub:") and not Path(path).exists():
        if required:
            raise FileNotFoundError(f"the autoencoder is no longer at {path or 'any known place'}; say with --vae_path "
                                    "where it is")
        return None
    scale_factor = vae.scale_factor or described["scale_factor"]
    codec = create_vae(dataclasses.replace(vae, vae_path=path, scale_factor=scale_factor or 0.0), device)
    stale = not required and not vae.vae_path and codec.fingerprint != described["sha256"]
    if stale:
        say(f"{path} no longer holds the autoencoder {_short(described['sha256'])} that the latents were made with")
        return None
    for name, wanted, found in (("autoencoder", described["sha256"], codec.fingerprint),
                                ("scale_factor", described["scale_factor"], codec.scale_factor)):
        if wanted is not None and wanted != found:
            raise ValueError(f"the latents were made with {name} {_short(wanted)} ({described['path']}), {path} has "
                             f"{_short(found)}; give the autoencoder they were made with as --vae_path")
    return codec


def _short(value):
    return value[:16] if isinstance(value, str) else value


def fit_normalizer(config, source):
    """Return the LatentNormalizer of a latent source, after checking what it makes of the measured deviation."""
    normalizer = LatentNormalizer.fit(config.normalizer, source.statistics, source.scale_factor)
    std = source.statistics["std"] / normalizer.std[0] if len(normalizer.std) == 1 else 1.0
    check_latent_std(std, normalizer, config.allow_latent_std)
    return normalizer


def with_classes(model, source):
    """Return a ModelConfig with the classes, channels and axes of the data, which flags must not contradict."""
    classes = len(source.class_names) if source.class_names else 0
    if model.class_cond and not classes:
        raise ValueError(f"--class_cond True, but {source.folder} has no classes: name the files <class>_<rest>.png, "
                         "or put each class into a folder of its own (and encode again)")
    found = {"num_classes": classes, "in_channels": source.latent_shape[0], "dims": len(source.latent_shape) - 1}
    return _from_data(model, {**found, "num_classes": classes if model.class_cond else 0}, source.folder)


def _from_data(config, found, folder):
    """Return a config with what was found in the data; a flag that says otherwise is refused."""
    for name, value in found.items():
        if getattr(config, name) not in (0, value):
            raise ValueError(f"--{name} {getattr(config, name)}, but {folder} has {value}; leave the flag away")
    return dataclasses.replace(config, **found)


def diffusion_header(source, codec, normalizer, model, process):
    """Return what the checkpoints of a diffusion run say about themselves.

    A plain folder of latents does not know its autoencoder; then the one given as `--vae_path` is taken for it.
    """
    autoencoder = source.autoencoder or (codec and codec.describe())
    return {
        "kind": "diffusion", "latent_shape": list(source.latent_shape),
        "image_shape": source.unpadded_shape and list(source.unpadded_shape),
        "model": as_dict(model), "diffusion": as_dict(process), "normalizer": normalizer.to_dict(),
        "scale_factor": autoencoder["scale_factor"] if autoencoder else source.scale_factor, "autoencoder": autoencoder,
        "statistics": source.statistics,
        "classes": source.class_names if model.class_cond else None,
    }


def load_diffusion_model(path, given, model, process, shape=None, flag="--model_path"):
    """Rebuild a diffusion model from its weights file; return (model, diffusion, header).

    The header describes the model; `given` flags that contradict it are refused, those of FREE_AT_SAMPLING win over it.
    Weights without a header, such as a released checkpoint, are described by the flags alone; `shape` is then the
    latent's [C x ...].
    """
    weights, header = checkpoint_util.load_weights(path, "cpu", flag)
    if header is not None:
        checkpoint_util.require_kind(header, "diffusion", path, flag)
        described = {**header["model"], **header["diffusion"]}
        for key, value in given.items():
            if key in described and key not in FREE_AT_SAMPLING and frozen(described[key]) != value:
                raise ValueError(f"--{key} {value} contradicts {path}, which was trained with {key} {described[key]}; "
                                 "leave the flag away")
        described.update({key: given[key] for key in FREE_AT_SAMPLING if key in given})
        model, process = from_dict(ModelConfig, described), from_dict(DiffusionConfig, described)
        shape = header["latent_shape"]
    network, diffusion = create_model_and_diffusion_vae(tuple(shape), model, process)
    checkpoint_util.load_into(network, weights, path, flag)
    network.to(dist_util.dev())
    if model.use_fp16:
        network.convert_to_fp16()
    return network.eval(), diffusion, header


def load_sampler(configs, given, device):
    """Return the Sampler that the configs of image_sample_vae.py describe."""
    sample, vae, scale, data, model, process, _ = configs
    codec = shape = None
    size = parse_size(data.image_size)
    path = weights_file(sample.model_path, "--model_path")
    if not is_described(path):
        codec = create_vae(vae, device)
        shape = codec.latent_shape((data.image_channels or codec.in_channels, *size))
    network, diffusion, header = load_diffusion_model(path, given, model, process, shape)
    if header is None:
        if scale.normalizer in ("auto", "channel"):
            raise ValueError(f"{path} is a bare state dict and brings no statistics for --normalizer "
                             f"{scale.normalizer}; give the number that its latents were divided by, or none")
        normalizer = LatentNormalizer.fit(scale.normalizer, None, codec.scale_factor)
        image_shape = (data.image_channels or codec.in_channels, *size)
        return Sampler(network, diffusion, shape, codec, normalizer, image_shape, network.num_classes or 0)
    sampler = sampler_from(network, diffusion, codec_of(header["autoencoder"], vae, device), header)
    channels, *sides = sampler.image_shape
    described = {"normalizer": (scale.normalizer, sampler.normalizer.mode), "image_size": (size, tuple(sides)),
                 "image_channels": (data.image_channels or channels, channels)}
    for flag, (asked, found) in described.items():
        if flag in given and asked != found:
            raise ValueError(f"--{flag} {asked} contradicts {path}, which was trained with {flag} "
                             f"{found}; leave the flag away")
    return sampler


def preview_sampler(model, codec, header):
    """Return a Sampler for previews: the model in training, walked through in about 50 evenly spaced steps.

    The spacing of DDIM begins below the very last step, where latents are all but pure noise and an unclipped
    prediction of x0 from an unfinished model runs away.
    """
    steps = header["diffusion"]["diffusion_steps"]
    spaced = len(range(0, steps, -(-steps // 50)))
    process = {**header["diffusion"], "timestep_respacing": f"ddim{spaced}"}
    return sampler_from(model, _process_from_flags(**process), codec, header)


def sampler_from(model, diffusion, codec, header):
    """Return the Sampler of a model that its header describes."""
    shape = tuple(header["latent_shape"])
    image_shape = header["image_shape"] or (codec.in_channels, *(n * f for n, f in zip(shape[1:], codec.factors)))
    return Sampler(model, diffusion, shape, codec, LatentNormalizer.from_dict(header["normalizer"]), tuple(image_shape),
                   header["model"]["num_classes"], header["classes"])


def weights_file(path, flag):
    """Return the weights file that a flag names: itself, or of a run folder the one to use (see `newest_weights`).

    Rank 0 looks and all ranks take what it found, as the run may go on meanwhile.
    """
    if not path:
        raise FileNotFoundError(f"no model given; {flag} wants a run folder, or a model or ema file")
    if not Path(path).is_dir():
        return path
    newest = checkpoint_util.newest_weights(path, flag) if dist_util.rank() == 0 else None
    newest = dist_util.broadcast_object(newest)
    say(f"{flag} {path}: taking {newest.name}")
    return newest


def is_described(path, flag="--model_path"):
    """Say whether a weights file carries a header."""
    return checkpoint_util.load_weights(path, "meta", flag)[1] is not None


def load_classifier(path, device, flag="--classifier_path"):
    """Rebuild a classifier of this project from its run folder or weights file; return (model, header)."""
    path = weights_file(path, flag)
    weights, header = checkpoint_util.load_weights(path, "cpu", flag)
    if header is None:
        raise ValueError(f"{path} does not say how it is built; {flag} wants a checkpoint of classifier_train.py")
    checkpoint_util.require_kind(header, "classifier", path, flag)
    described = {**header["model"], **header["diffusion"]}
    flags, process = from_dict(ClassifierConfig, described), from_dict(DiffusionConfig, described)
    model, _ = build_classifier(flags, process, header["image_shape"])
    checkpoint_util.load_into(model, weights, path, flag)
    return model.to(device).eval(), header


def classifier_for(flags, pictures):
    """Return a ClassifierConfig with the channels and the number of classes of the data."""
    if not pictures.class_names:
        raise ValueError(f"{pictures.config.data_dir} has no classes: name the files <class>_<rest>.png, or put each "
                         "class into a folder of its own")
    found = {"classifier_in_channels": pictures.shape[0], "classifier_num_classes": len(pictures.class_names)}
    return _from_data(flags, found, pictures.config.data_dir)


def build_classifier(flags, process, shape):
    """Build the classifier of pictures [C x H x W] and the process that noises them."""
    sides = shape[1] if len(set(shape[1:])) == 1 else tuple(shape[1:])
    return create_classifier_and_diffusion(image_size=sides, **as_dict(flags), **as_dict(process))


def classifier_header(pictures, flags, process, data):
    """Return what the checkpoints of a classifier say about themselves."""
    return {"kind": "classifier", "image_shape": list(pictures.shape), "model": as_dict(flags),
            "diffusion": as_dict(process), "classes": pictures.class_names, "data": preprocessing(data)}
