"""Turn flags and YAML into configs, and configs into models; the only file that knows argparse and yaml."""

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from . import dist_util, logger
from . import gaussian_diffusion as gd
from .config import as_dict, from_dict, frozen, opt
from .files import require_writable_folder, sweep_parts, write_json
from .gaussian_diffusion import DiffusionConfig
from .image_datasets import DataConfig, parse_size
from .respace import SpacedDiffusion, space_by_log_snr, space_timesteps
from .train_util import find_checkpoint
from .unet import ClassifierConfig, EncoderUNetModel, ModelConfig, SuperResModel, UNetModel

NUM_CLASSES = 1000

# Width multipliers per level where --channel_mult is empty, by the size of the grid that the network works on. The
# sizes from 64 up are those of the released checkpoints; 16 and 32 are the usual latent grids.
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4),
    32: (1, 2, 2, 4), 16: (1, 2, 2),
}
CLASSIFIER_CHANNEL_MULT = {size: CHANNEL_MULT[size] for size in (512, 256, 128, 64)}
SUPER_RES_CHANNEL_MULT = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}

@dataclasses.dataclass
class RunConfig:
    logdir: str = opt("", "folder of the run; default $OPENAI_LOGDIR, else runs/<script>-<date>")
    dry_run: bool = opt(False, "print the resolved configuration, the data and the model's size, then stop")


@dataclasses.dataclass
class PlanConfig:
    budget_gb: str = opt("12,24,32,40", "memory of the devices to plan for, in GiB, with commas between")
    plan_batch_sizes: str = opt("1,2,4,8", "samples in a forward pass to plan for, with commas between")


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
    _settle_sizes(from_file, flags)
    given = {**from_file, **flags}
    _require_in_bounds(classes, given)
    return [from_dict(cls, given) for cls in classes], given


def _require_in_bounds(classes, given):
    for field in (field for cls in classes for field in dataclasses.fields(cls) if field.name in given):
        value, least, most = given[field.name], field.metadata["least"], field.metadata["most"]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{field.name} is {value}; it is a finite number")
        if least is not None and not value >= least:
            raise ValueError(f"--{field.name} is {value}; it is at least {least}")
        if most is not None and not value <= most:
            raise ValueError(f"--{field.name} is {value}; it is at most {most}")


def _settle_sizes(from_file, flags):
    """Let the size on the command line win, under whichever of its two names, and refuse what contradicts it."""
    for where in (from_file, flags):
        if "image_size" in where and where.get("voxel_size"):
            raise ValueError(f"--voxel_size {where['voxel_size']} and --image_size {where['image_size']} are two names "
                             "for one size; give one of them")
    for name, other in (("image_size", "voxel_size"), ("voxel_size", "image_size")):
        if name in flags:
            from_file.pop(other, None)
    given = {**from_file, **flags}
    if "spatial_dims" not in given:
        return
    sides = given.get("voxel_size") or parse_size(given.get("image_size", DataConfig.image_size))
    if given["spatial_dims"] != len(sides):
        raise ValueError(f"--spatial_dims {given['spatial_dims']}, but the size {'x'.join(map(str, sides))} has "
                         f"{len(sides)} axes; give --image_size one number an axis, and leave --spatial_dims away")


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


def part_without(cls, *names):
    """Return a config class of the same section with all fields of `cls` but these."""
    return part_of(cls, *(f.name for f in dataclasses.fields(cls) if f.name not in names))


def read_yaml(path, classes):
    """Return {flag: value} for the given config classes from a YAML file.

    Keys stand alone or in the section of their class (`data`, `autoencoder`, `autoencoder.training`, ...). Sections of
    other scripts are passed over, so one file can serve a whole pipeline; a key that no class of its section has is
    refused with the nearest one that exists. Keys in the section `device` hold for every section that has them.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; check --config")
    try:
        content = yaml.load(Path(path).read_text(), _once_each(yaml)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not keys with values")
    mine = {f.name: f for cls in classes for f in dataclasses.fields(cls)}
    values, sections = {}, _all_sections()

    def take(section, entries):
        heeded = [cls for cls in classes if section in ("", "device", section_of(cls))]
        here = {f.name for cls in heeded for f in dataclasses.fields(cls)}
        known = sections.get(section, set())
        for key, value in entries.items():
            nested = f"{section}.{key}" if section else key
            if nested in sections and (value is None or isinstance(value, dict)):
                take(nested, value or {})
            elif key not in known | here:
                raise ValueError(f"{path} has an unknown key {nested!r}{_nearest(key, known | here | set(sections))}")
            elif key in here:
                read = _from_yaml(mine[key], value, path)
                if key in values and values[key] != read:
                    raise ValueError(f"{path} sets {key} to {values[key]} and, as {nested}, to {read}; keep one")
                values[key] = read

    take("", content)
    return values


def _once_each(yaml):
    """Return a loader that refuses a key that stands twice in one place, of which YAML would take the last."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice",
                                                            key.start_mark)
                seen.add((key.tag, key.value if isinstance(key.value, str) else id(key)))
            return super().construct_mapping(node, deep)

    return Loader


def _all_sections():
    """Return {section: known keys}; imported here because the scripts need only some of these modules."""
    from . import (
        autoencoder, discriminator, evaluation, export, guidance, image_datasets, latent_datasets, microdoppler,
        perceptual, sampling, train_util, unet, vae_wrapper,
    )

    sections = {}
    for module in (autoencoder, discriminator, evaluation, export, gd, guidance, image_datasets, latent_datasets,
                   microdoppler, perceptual, sampling, train_util, unet, vae_wrapper, sys.modules[__name__]):
        for cls in vars(module).values():
            if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__name__.endswith("Config"):
                sections.setdefault(section_of(cls), set()).update(f.name for f in dataclasses.fields(cls))
    return {**sections, "device": set().union(*sections.values())}


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

    The folder is printed first and, by `end_run`, last. Where a training run goes on in it, so do its curves; scripts
    that do not train (their configs have no `resume_checkpoint`) leave them alone and write log.txt only.
    """
    dist_util.setup_dist()
    folder = run.logdir or os.environ.get("OPENAI_LOGDIR")
    if run.dry_run:
        print_configuration(configs)
        return folder
    resume_step = None
    trains = [c.resume_checkpoint for c in configs if hasattr(c, "resume_checkpoint")]
    if folder and any(getattr(c, "fast_dev_run", False) for c in configs):
        folder = Path(folder) / "fast_dev_run"  # so that no run goes on from a trial
        if dist_util.rank() == 0 and folder.exists():
            shutil.rmtree(folder)
        dist_util.barrier()
    if folder:
        require_writable_folder(folder, "--logdir")
        if dist_util.rank() == 0:
            sweep_parts(folder)
        found = find_checkpoint(folder, trains[0])[0] if trains else None
        resume_step = found["step"] if found else None
    logger.configure(dir=folder, format_strs=None if trains else _texts(), resume_step=resume_step)
    logger.log(f"run folder: {logger.get_dir()}")
    return Path(logger.get_dir())


def _texts():
    """Return the formats of the log that hold no curves, as far as the environment wants them."""
    return [name for name in os.environ.get("OPENAI_LOG_FORMAT", "stdout,log").split(",") if name in ("stdout", "log")]


def end_run(folder):
    """Say once more where everything is."""
    if dist_util.rank() == 0 and folder and Path(folder).is_dir():   # a dry run makes none
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
    return model, create_process(learn_sigma=learn_sigma, **of_process)


def create_model_and_diffusion_vae(latent_shape, model, diffusion, super_res=None, discrete_data=False):
    """Build the UNet of a grid [C x ...] and its process from a ModelConfig and a DiffusionConfig.

    With a SuperResConfig it is the upsampler onto that grid. `discrete_data` says that the grid is of 8-bit pictures.
    """
    flags = {**as_dict(model), "in_channels": latent_shape[0], "dims": len(latent_shape) - 1}
    size = max(latent_shape[1:])
    process = create_process(**as_dict(diffusion), discrete_data=discrete_data)
    if super_res is None:
        return create_model(size, learn_sigma=diffusion.learn_sigma, **flags), process
    known = inspect.signature(sr_create_model).parameters
    flags = {key: value for key, value in flags.items() if key in known}
    network = sr_create_model(size, None, learn_sigma=diffusion.learn_sigma,
                              noised_condition=super_res.cond_noise_steps > 0, **flags)
    return network, process


def create_model(
    image_size, num_channels, num_res_blocks, channel_mult="", learn_sigma=False, class_cond=False,
    use_checkpoint=False, attention_resolutions="16", num_heads=1, num_head_channels=-1, num_heads_upsample=-1,
    use_scale_shift_norm=False, dropout=0, resblock_updown=False, use_fp16=False, use_new_attention_order=False,
    in_channels=0, num_classes=0, dims=0, resample_depth=False, class_dropout=0.0, recompute_norms=False,
):
    """Build a UNet for a grid of `image_size` (of the latent, where it works on latents).

    Zeros stand for what guided-diffusion has: 3 channels, 1000 classes, 2 axes. With `class_dropout` there is one class
    more, the last, which stands for none.

    :raises ValueError: where `image_size` has no default multipliers and `channel_mult` is empty.
    """
    in_channels = in_channels or 3
    return UNetModel(
        image_size=image_size, in_channels=in_channels, model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1), num_res_blocks=num_res_blocks,
        attention_resolutions=_strides(image_size, attention_resolutions), dropout=dropout,
        channel_mult=_multipliers(image_size, channel_mult, CHANNEL_MULT), dims=dims or 2,
        num_classes=_embedded_classes(class_cond, num_classes, class_dropout), use_checkpoint=use_checkpoint,
        use_fp16=use_fp16, num_heads=num_heads, num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample, use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown, use_new_attention_order=use_new_attention_order, resample_depth=resample_depth,
        recompute_norms=recompute_norms,
    )


def sr_create_model_and_diffusion(large_size, small_size, learn_sigma=False, **flags):
    """Build an upsampler and its process from the flags of `sr_model_and_diffusion_defaults`."""
    of_process = {k: flags.pop(k) for k in list(flags) if k in diffusion_defaults()}
    model = sr_create_model(large_size, small_size, learn_sigma=learn_sigma, **flags)
    return model, create_process(learn_sigma=learn_sigma, **of_process)


def sr_create_model(
    large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
    attention_resolutions, num_heads, num_head_channels, num_heads_upsample, use_scale_shift_norm, dropout,
    resblock_updown, use_fp16, channel_mult="", use_new_attention_order=False, in_channels=0, num_classes=0, dims=0,
    resample_depth=False, class_dropout=0.0, noised_condition=False, recompute_norms=False,
):
    """Build an upsampler that works at `large_size` and sees the small picture as further channels.

    Zeros and `class_dropout` are as in `create_model`; the network takes small pictures of any size.

    :raises ValueError: where `large_size` has no multipliers and `channel_mult` is empty.
    """
    in_channels = in_channels or 3
    return SuperResModel(
        image_size=large_size, in_channels=in_channels, model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1), num_res_blocks=num_res_blocks,
        attention_resolutions=_strides(large_size, attention_resolutions), dropout=dropout,
        channel_mult=_multipliers(large_size, channel_mult, SUPER_RES_CHANNEL_MULT), dims=dims or 2,
        num_classes=_embedded_classes(class_cond, num_classes, class_dropout), use_checkpoint=use_checkpoint,
        num_heads=num_heads, num_head_channels=num_head_channels, num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm, resblock_updown=resblock_updown, use_fp16=use_fp16,
        use_new_attention_order=use_new_attention_order, resample_depth=resample_depth,
        noised_condition=noised_condition, recompute_norms=recompute_norms,
    )


def _embedded_classes(class_cond, num_classes, class_dropout):
    """Return how many classes a network has embeddings for, None for a network without."""
    if class_dropout and not class_cond:
        raise ValueError(f"--class_dropout {class_dropout} hides classes that --class_cond False does not show; set "
                         "--class_cond True, or --class_dropout 0")
    if not 0 <= class_dropout < 1:
        raise ValueError(f"--class_dropout is {class_dropout}; it is a share from 0 to below 1")
    return (num_classes or NUM_CLASSES) + (class_dropout > 0) if class_cond else None


def create_classifier_and_diffusion(image_size, learn_sigma=False, **flags):
    """Build a classifier and the process that noises its input, from `classifier_and_diffusion_defaults`."""
    of_process = {k: flags.pop(k) for k in list(flags) if k in diffusion_defaults()}
    return create_classifier(image_size, **flags), create_process(learn_sigma=learn_sigma, **of_process)


def create_classifier(
    image_size, classifier_use_fp16, classifier_width, classifier_depth, classifier_attention_resolutions,
    classifier_use_scale_shift_norm, classifier_resblock_updown, classifier_pool, classifier_in_channels=0,
    classifier_num_classes=0, classifier_channel_mult="", classifier_dims=0, classifier_resample_depth=False,
):
    """Build the half of a UNet that ends in logits.

    :raises ValueError: where `image_size` has no multipliers and `classifier_channel_mult` is empty.
    """
    return EncoderUNetModel(
        image_size=image_size, in_channels=classifier_in_channels or 3, model_channels=classifier_width,
        out_channels=classifier_num_classes or NUM_CLASSES, num_res_blocks=classifier_depth,
        attention_resolutions=_strides(image_size, classifier_attention_resolutions),
        channel_mult=_multipliers(image_size, classifier_channel_mult, CLASSIFIER_CHANNEL_MULT),
        use_fp16=classifier_use_fp16, num_head_channels=64, use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown, pool=classifier_pool, dims=classifier_dims or 2,
        resample_depth=classifier_resample_depth,
    )


def create_gaussian_diffusion(
    *, steps=1000, learn_sigma=False, sigma_small=False, noise_schedule="linear", use_kl=False, predict_xstart=False,
    rescale_timesteps=False, rescale_learned_sigmas=False, timestep_respacing="", predict_v=False, min_snr_gamma=0.0,
    discrete_data=True,
):
    """Build a process; `timestep_respacing` picks the steps that sampling walks through (empty: all).

    :raises ValueError: for two predictions or two losses at once, and whatever `SpacedDiffusion` refuses.
    """
    if predict_xstart and predict_v:
        raise ValueError("--predict_xstart True and --predict_v True exclude each other; give one of them")
    if min_snr_gamma and (use_kl or rescale_learned_sigmas):
        raise ValueError(f"--min_snr_gamma {min_snr_gamma} weighs the plain squared error; leave --use_kl and "
                         "--rescale_learned_sigmas off")
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    elif min_snr_gamma:
        loss_type = gd.LossType.MIN_SNR
    else:
        loss_type = gd.LossType.RESCALED_MSE if rescale_learned_sigmas else gd.LossType.MSE
    mean_type = gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON
    fixed = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    betas = gd.get_named_beta_schedule(noise_schedule, steps)
    return SpacedDiffusion(
        use_timesteps=choose_timesteps(betas, timestep_respacing),
        betas=betas,
        model_mean_type=gd.ModelMeanType.VELOCITY if predict_v else mean_type,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        min_snr_gamma=min_snr_gamma,
        discrete_data=discrete_data,
    )


def create_process(diffusion_steps=1000, **flags):
    """Build the process that the "diffusion" flags of a header describe."""
    return create_gaussian_diffusion(steps=diffusion_steps, **flags)


def choose_timesteps(betas, timestep_respacing):
    """Return the times that `--timestep_respacing` asks for, of a schedule with these betas; empty: all."""
    text = str(timestep_respacing)
    if text.startswith("logsnr") and text[len("logsnr"):].isdigit():
        return space_by_log_snr(np.cumprod(1.0 - betas), int(text[len("logsnr"):]))
    return space_timesteps(len(betas), timestep_respacing or [len(betas)])


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
    flag = "--classifier_channel_mult" if table is CLASSIFIER_CHANNEL_MULT else "--channel_mult"
    if text:
        try:
            return tuple(float(m) if "." in m else int(m) for m in str(text).split(","))
        except ValueError:
            raise ValueError(f"{flag} is {text!r}; needed are numbers with commas between: 1,2,2") from None
    if _longest(size) not in table:
        known = ", ".join(map(str, sorted(table)))
        raise ValueError(f"no width multipliers for a grid of {size}, only for {known}; give {flag}, for example 1,2,2")
    return table[_longest(size)]
