"""Build models and diffusion processes from configs."""

import dataclasses
import inspect

import numpy as np

from .. import gaussian_diffusion as gd
from ..config import as_dict
from ..gaussian_diffusion import DiffusionConfig
from ..respace import SpacedDiffusion, space_by_log_snr, space_timesteps
from ..unet import ClassifierConfig, EncoderUNetModel, ModelConfig, SuperResModel, UNetModel

NUM_CLASSES = 1000

# Width multipliers per level where --channel_mult is empty, by the size of the grid that the network works on. The
# sizes from 64 up are those of the released checkpoints; 16 and 32 are the usual latent grids.
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4),
    32: (1, 2, 2, 4), 16: (1, 2, 2),
}
CLASSIFIER_CHANNEL_MULT = {size: CHANNEL_MULT[size] for size in (512, 256, 128, 64)}
SUPER_RES_CHANNEL_MULT = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}


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


def create_model_and_diffusion(image_size, learn_sigma=False, **flags):
    """Build a UNet and its process from the flags of `model_and_diffusion_defaults`."""
    of_process = {k: flags.pop(k) for k in list(flags) if k in diffusion_defaults()}
    model = create_model(image_size, learn_sigma=learn_sigma, **flags)
    return model, create_diffusion(learn_sigma=learn_sigma, **of_process)


def create_model_and_diffusion_vae(latent_shape, model, diffusion, super_res=None, discrete_data=False):
    """Build the UNet of a grid [C x ...] and its process from a ModelConfig and a DiffusionConfig.

    With a SuperResConfig it is the upsampler onto that grid. `discrete_data` says that the grid is of 8-bit pictures.
    """
    flags = {**as_dict(model), "in_channels": latent_shape[0], "dims": len(latent_shape) - 1}
    size = max(latent_shape[1:])
    process = create_diffusion(**as_dict(diffusion), discrete_data=discrete_data)
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
    return model, create_diffusion(learn_sigma=learn_sigma, **of_process)


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
    return create_classifier(image_size, **flags), create_diffusion(learn_sigma=learn_sigma, **of_process)


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


def create_diffusion(diffusion_steps=1000, **flags):
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


def build_classifier(flags, process, shape):
    """Build the classifier of x0 [C x ...] and the process that noises them."""
    sides = shape[1] if len(set(shape[1:])) == 1 else tuple(shape[1:])
    return create_classifier_and_diffusion(image_size=sides, **as_dict(flags), **as_dict(process))
