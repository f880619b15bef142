"""Create models and diffusion processes from their configs, which other modules of the room import from here."""

import dataclasses
import inspect

import numpy as np

from .. import gaussian_diffusion as gd
from ..config import as_dict, from_dict, integers, numbers, require, words
from ..gaussian_diffusion import DiffusionConfig
from ..rectified_flow import RectifiedFlow
from ..respace import SpacedDiffusion, space_by_log_snr, space_timesteps, space_trailing
from ..unet import (
    ClassifierConfig, EncoderUNetModel, ModelConfig, SuperResConfig as SuperResConfig, SuperResModel, UNetModel,
)

NUM_CLASSES = 1000

# Default --channel_mult by the grid size of the network: sizes from 64 up as in the released checkpoints, 16 and 32 for
# common latent grids.
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4),
    32: (1, 2, 2, 4), 16: (1, 2, 2),
}
CLASSIFIER_CHANNEL_MULT = {size: CHANNEL_MULT[size] for size in (512, 256, 128, 64)}
SUPER_RES_CHANNEL_MULT = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}


def _defaults(*classes):
    return {f.name: f.default for cls in classes for f in dataclasses.fields(cls)}


def diffusion_defaults() -> dict:
    """Return the default flags of the diffusion process."""
    return _defaults(DiffusionConfig)


def classifier_defaults() -> dict:
    """Return the default flags of noisy-image classifiers."""
    return {"image_size": 64, **_defaults(ClassifierConfig)}


def model_and_diffusion_defaults() -> dict:
    """Return the default flags of image models and their process."""
    return {"image_size": 64, **_defaults(ModelConfig), **diffusion_defaults()}


def classifier_and_diffusion_defaults() -> dict:
    """Return the default flags of classifiers and of the process that noises their input."""
    return {**classifier_defaults(), **diffusion_defaults()}


def sr_model_and_diffusion_defaults() -> dict:
    """Return the default flags of upsamplers and their process."""
    accepted = inspect.signature(sr_create_model).parameters
    kept = {k: v for k, v in model_and_diffusion_defaults().items() if k in accepted}
    return {**kept, **diffusion_defaults(), "large_size": 256, "small_size": 64}


def create_model_and_diffusion(image_size, learn_sigma=False, **flags):
    """Return (UNet, process) of the flags of `model_and_diffusion_defaults`."""
    diffusion, flags = _split_diffusion(learn_sigma, flags)
    return create_model(image_size, learn_sigma=learn_sigma, **flags), diffusion


def _split_diffusion(learn_sigma, flags):
    """Return (process of the flags of DiffusionConfig, remaining flags)."""
    known = diffusion_defaults()
    diffusion = create_diffusion({**flags, "learn_sigma": learn_sigma})
    return diffusion, {key: value for key, value in flags.items() if key not in known}


def create_model_and_diffusion_vae(latent_shape, model, diffusion_config, super_res=None, discrete_data=False,
                                   condition_channels=0):
    """Return (UNet of x0 [C x ...], process) of a ModelConfig and a DiffusionConfig.

    :param super_res: a SuperResConfig, for an upsampler to this grid.
    :param discrete_data: x0 are 8-bit images.
    :param condition_channels: see `UNetModel`; not for an upsampler.
    """
    flags = {**as_dict(model), "in_channels": latent_shape[0], "dims": len(latent_shape) - 1}
    size = max(latent_shape[1:])
    diffusion = create_diffusion(diffusion_config, discrete_data)
    if super_res is None:
        network = create_model(size, learn_sigma=diffusion_config.learn_sigma, condition_channels=condition_channels,
                               **flags)
        return network, diffusion
    known = inspect.signature(sr_create_model).parameters
    flags = {key: value for key, value in flags.items() if key in known}
    network = sr_create_model(size, None, learn_sigma=diffusion_config.learn_sigma,
                              noised_condition=super_res.cond_noise_steps > 0, **flags)
    return network, diffusion


def create_model(
    image_size, num_channels, num_res_blocks, channel_mult="", learn_sigma=False, class_cond=False,
    use_checkpoint=False, attention_resolutions="16", num_heads=1, num_head_channels=-1, num_heads_upsample=-1,
    use_scale_shift_norm=False, dropout=0, resblock_updown=False, use_fp16=False, use_new_attention_order=False,
    in_channels=0, num_classes=0, dims=0, resample_depth=False, class_dropout=0.0, recompute_norms=False,
    condition_channels=0, condition_on="",
):
    """Return the UNet of a grid of `image_size`, the size of latents for latent diffusion.

    Zeros mean guided-diffusion's values: 3 channels, 1000 classes, 2 axes. `class_dropout` adds the null class as the
    last one.

    :raises ValueError: if `channel_mult` is empty and `image_size` has no default.
    """
    arguments = locals()
    return _create_unet(UNetModel, arguments.pop("image_size"), CHANNEL_MULT, **arguments)


def sr_create_model_and_diffusion(large_size, small_size, learn_sigma=False, **flags):
    """Return (upsampler, process) of the flags of `sr_model_and_diffusion_defaults`."""
    diffusion, flags = _split_diffusion(learn_sigma, flags)
    return sr_create_model(large_size, small_size, learn_sigma=learn_sigma, **flags), diffusion


def sr_create_model(
    large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
    attention_resolutions, num_heads, num_head_channels, num_heads_upsample, use_scale_shift_norm, dropout,
    resblock_updown, use_fp16, channel_mult="", use_new_attention_order=False, in_channels=0, num_classes=0, dims=0,
    resample_depth=False, class_dropout=0.0, noised_condition=False, recompute_norms=False, condition_on="",
):
    """Return an upsampler to `large_size`, to whose input channels the low-resolution image is concatenated.

    Zeros and `class_dropout` are as in `create_model`; low-resolution images may have any size.

    :raises ValueError: if `channel_mult` is empty and `large_size` has no default.
    """
    arguments = locals()
    del arguments["small_size"]
    return _create_unet(SuperResModel, arguments.pop("large_size"), SUPER_RES_CHANNEL_MULT, **arguments)


def _create_unet(cls, size, default_multipliers, *, num_channels, channel_mult, learn_sigma, attention_resolutions,
                 in_channels, dims, class_cond, num_classes, class_dropout, condition_on, **options):
    """Return a network of class `cls` on a grid of `size`; `options` have the names that the class gives them."""
    in_channels = in_channels or 3
    return cls(
        image_size=size, in_channels=in_channels, model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        attention_resolutions=_strides(size, attention_resolutions),
        channel_mult=_multipliers(size, channel_mult, default_multipliers), dims=dims or 2,
        num_classes=_embedded_classes(class_cond, num_classes, class_dropout,
                                      condition_on or options.get("condition_channels")),
        num_attributes=len(words.parse(condition_on, "condition_on")), **options,
    )


def _embedded_classes(class_cond, num_classes, class_dropout, is_conditioned=False):
    """Return the number of class embeddings of a network, None for an unconditional one."""
    require(
        (not class_dropout or class_cond or is_conditioned, f"--class_dropout {class_dropout} requires "
         "--class_cond True, --condition_on or --condition_dir"),
        (0 <= class_dropout < 1, f"--class_dropout must be in [0, 1), got {class_dropout}"),
    )
    return (num_classes or NUM_CLASSES) + (class_dropout > 0) if class_cond else None


def create_classifier_and_diffusion(image_size, learn_sigma=False, **flags):
    """Return (classifier, process that noises its input) of the flags of `classifier_and_diffusion_defaults`."""
    diffusion, flags = _split_diffusion(learn_sigma, flags)
    return create_classifier(image_size, **flags), diffusion


def create_classifier(
    image_size, classifier_use_fp16, classifier_width, classifier_depth, classifier_attention_resolutions,
    classifier_use_scale_shift_norm, classifier_resblock_updown, classifier_pool, classifier_in_channels=0,
    classifier_num_classes=0, classifier_channel_mult="", classifier_dims=0, classifier_resample_depth=False,
):
    """Return a classifier, the downsampling half of a UNet followed by a pooling layer.

    :raises ValueError: if `classifier_channel_mult` is empty and `image_size` has no default.
    """
    return EncoderUNetModel(
        image_size=image_size, in_channels=classifier_in_channels or 3, model_channels=classifier_width,
        out_channels=classifier_num_classes or NUM_CLASSES, num_res_blocks=classifier_depth,
        attention_resolutions=_strides(
            image_size, classifier_attention_resolutions, "classifier_attention_resolutions"),
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
    """Return a Gaussian diffusion process on the timesteps of `timestep_respacing` (empty: all).

    :raises ValueError: for two predictions or two losses, and as `SpacedDiffusion` does.
    """
    require(
        (not (predict_xstart and predict_v), "--predict_xstart and --predict_v are mutually exclusive; set only one"),
        (not min_snr_gamma or not (use_kl or rescale_learned_sigmas), "--min_snr_gamma weights the squared error and "
         "is mutually exclusive with --use_kl and --rescale_learned_sigmas; set only one"),
    )
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


def _create_gaussian(config, discrete_data):
    flags = {key: value for key, value in vars(config).items() if key not in ("process", "diffusion_steps")}
    return create_gaussian_diffusion(steps=config.diffusion_steps, discrete_data=discrete_data, **flags)


def _create_rectified_flow(config, discrete_data):
    for flag in ("learn_sigma", "noise_schedule", "use_kl", "predict_xstart", "predict_v", "min_snr_gamma",
                 "rescale_learned_sigmas"):
        value, default = getattr(config, flag), getattr(DiffusionConfig, flag)
        require((value == default, f"--{flag} {value} conflicts with --process rectified_flow, which has its own "
                 f"prediction, loss and noise levels: expected {default}; omit the flag or set it to that"))
    steps, text = config.diffusion_steps, str(config.timestep_respacing)
    times = (np.arange(steps) + 1) / steps
    alpha_bar = (1 - times) ** 2 / ((1 - times) ** 2 + times**2)    # of the same noise-to-signal ratio
    kept = _space_by_log_snr(alpha_bar, text) or space_trailing(steps, text or [steps])
    return RectifiedFlow(kept, steps, config.rescale_timesteps, discrete_data)


# Diffusion processes by --process: functions of (DiffusionConfig, discrete_data), which return an `interfaces.Process`.
PROCESSES = {"gaussian": _create_gaussian, "rectified_flow": _create_rectified_flow}


def create_diffusion(config: DiffusionConfig | dict, discrete_data=True):
    """Return the process of a DiffusionConfig, or of the "diffusion" flags of a header.

    :param discrete_data: x0 are 8-bit images.
    :raises ValueError: if `config.process` is not a key of PROCESSES.
    """
    config = from_dict(DiffusionConfig, config) if isinstance(config, dict) else config
    require((config.process in PROCESSES, f"--process {config.process}: expected one of: {', '.join(PROCESSES)}"))
    return PROCESSES[config.process](config, discrete_data)


def choose_timesteps(betas, timestep_respacing) -> set[int]:
    """Return the timesteps that `--timestep_respacing` keeps of a schedule with these betas; empty: all."""
    if str(timestep_respacing).startswith("trailing"):
        return space_trailing(len(betas), timestep_respacing)
    kept = _space_by_log_snr(np.cumprod(1.0 - betas), str(timestep_respacing))
    return kept or space_timesteps(len(betas), timestep_respacing or [len(betas)])


def _space_by_log_snr(alphas_cumprod, text):
    """Return the timesteps that logsnrN keeps, None for a text of another form."""
    count = text.removeprefix("logsnr")
    return space_by_log_snr(alphas_cumprod, int(count)) if count != text and count.isdigit() else None


def _strides(size, resolutions, flag="attention_resolutions"):
    """Return the downsampling factors at which the longest side of the grid has the given sizes ("16,8")."""
    return tuple(_longest(size) // side for side in integers.parse(resolutions, flag) if side)


def _longest(size):
    return max(size) if isinstance(size, tuple) else size


def _multipliers(size, text, table):
    """Return the width multipliers of a flag, by default those of the longest side of the grid."""
    flag = "classifier_channel_mult" if table is CLASSIFIER_CHANNEL_MULT else "channel_mult"
    if text:
        return numbers.parse(text, flag)
    require((_longest(size) in table, f"no default width multipliers for a grid of {size}: expected one of: "
             f"{', '.join(map(str, sorted(table)))}; set --{flag}, e.g. 1,2,2"))
    return table[_longest(size)]


def build_classifier(config: ClassifierConfig, diffusion_config: DiffusionConfig, shape):
    """Return (classifier of x0 [C x ...], process that noises them) of a ClassifierConfig and a DiffusionConfig."""
    sides = shape[1] if len(set(shape[1:])) == 1 else tuple(shape[1:])
    return create_classifier_and_diffusion(image_size=sides, **as_dict(config), **as_dict(diffusion_config))
