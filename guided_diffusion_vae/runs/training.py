"""Train a diffusion model, an autoencoder or a classifier as the configs of a run describe."""

import dataclasses

import torch

from .. import dist_util
from ..autoencoder import AutoencoderConfig, create_autoencoder, format_strides, total_factors
from ..config import as_dict, resolve
from ..data import BatchPlan, DataConfig, ImageStream, LatentStream, open_folder
from ..evaluation import ClassifierValidation, ReconstructionValidation, SamplePreview
from ..gaussian_diffusion import DiffusionConfig
from ..logger import log_rank0
from ..objectives import ClassifierObjective, DiffusionObjective
from ..resample import create_named_schedule_sampler
from ..sampling import Sampler
from ..train_util import (
    ClassifierTrainConfig, TrainConfig, TrainLoop, TrainTask, resolve_train_config, seed_initialization,
)
from ..unet import ClassifierConfig, ModelConfig
from ..vae import AutoencoderLossConfig, DiscriminatorConfig, PerceptualConfig, PerceptualLoss, create_discriminator
from ..vae.objective import AutoencoderObjective, DiscriminatorTrainer
from ..vae_wrapper import LatentNormalizer
from .factories import build_classifier, create_diffusion, create_model_and_diffusion_vae
from .memory import estimate_training
from .planning import AutoencoderPlan, DiffusionPlan, advice
from .spaces import Space, log_source, open_validation, space_header

PREVIEW_STEPS = 50      # about this many sampling steps per preview
VALIDATION_BATCH = 32   # images at a time, if training steps are no smaller


# --- Diffusion models and upsamplers ---


def train_diffusion(run, source, space, super_res=None, low_res=None):
    """Train a UNet on the x0 of `source`; with a SuperResConfig and the source of `low_res` images an upsampler.

    A dry run prints the memory that training takes and ends.
    """
    log_source(source)
    diffusion_config, train = run[DiffusionConfig], run[TrainConfig]
    model_config = infer_model_config(run[ModelConfig], source)
    _check_compile(train, model_config)
    memory = DiffusionPlan(
        source.latent_shape, model_config, train, diffusion_config, super_res, low_res and low_res.latent_shape
    )
    train = resolve_train_config(train)
    seed_initialization(train.seed)
    model, diffusion = create_model_and_diffusion_vae(
        source.latent_shape, model_config, diffusion_config, super_res, discrete_data=space.is_pixels
    )
    model.require_grid(source.latent_shape[1:])
    plan = _plan_batches(source.count, train)
    if run.dry_run:
        return log_rank0(memory.training().summary())

    header = diffusion_header(source, space, model_config, diffusion_config, super_res)
    device = dist_util.dev()
    objective = DiffusionObjective(
        diffusion, create_named_schedule_sampler(train.schedule_sampler, diffusion), model_config.class_dropout,
        model_config.num_classes, super_res.cond_noise_steps if super_res else 0,
    )
    preview = None
    with _memory_advice(memory):
        if train.fsdp:
            log_rank0("previews disabled: with --fsdp True no rank holds the full model")
        else:
            model.to(device)    # FSDP moves it shard by shard
            if space.codec is not None and super_res is None:
                preview = SamplePreview(
                    preview_sampler(model, space.codec, header), run.folder, device, memory.forward_size
                )
        data = LatentStream(source, space.normalizer, plan, device, model_config.class_cond, low_res)
        task = TrainTask(objective, header, preview, checkpoint=run.checkpoint)
        loop = TrainLoop.from_config(model, data, train, task, use_fp16=model_config.use_fp16)
        run.save_config(header)
        loop.run_loop()


def diffusion_header(source, space, model_config, diffusion_config, super_res=None):
    """Return the header of the checkpoints of a diffusion model or upsampler."""
    header = {"kind": "super_res" if super_res else "diffusion", "model": as_dict(model_config),
              "diffusion": as_dict(diffusion_config),
              "classes": source.class_names if model_config.class_cond else None, **space_header(source, space)}
    return {**header, "super_res": as_dict(super_res)} if super_res else header


def preview_sampler(model, codec, header):
    """Return a Sampler of the model in training with about PREVIEW_STEPS evenly spaced steps.

    DDIM's spacing starts below the last timestep, whose latents are almost pure noise: there the unclipped prediction
    of x0 of an unfinished model diverges.
    """
    steps = header["diffusion"]["diffusion_steps"]
    spaced = len(range(0, steps, -(-steps // PREVIEW_STEPS)))
    diffusion = create_diffusion({**header["diffusion"], "timestep_respacing": f"ddim{spaced}"})
    space = Space(codec, LatentNormalizer.from_dict(header["normalizer"]))
    return Sampler.from_header(model, diffusion, space, header)


# --- Autoencoders ---


def train_autoencoder(run):
    """Train a KL autoencoder; a dry run prints the memory that training takes and ends."""
    data, train = run[DataConfig], run[TrainConfig]
    loss, discriminator_config, perceptual = run[AutoencoderLossConfig], run[DiscriminatorConfig], run[PerceptualConfig]
    config = dataclasses.replace(run[AutoencoderConfig], spatial_dims=len(data.sides))
    _check_compile(train, config)
    config, _ = resolve(config, train)
    factors = total_factors(config, len(data.sides))
    images = open_folder(data, multiple=factors)
    channels = images.shape[0]
    config = dataclasses.replace(config, in_channels=config.in_channels or channels)
    if config.out_channels not in (0, channels):
        raise ValueError(f"--out_channels {config.out_channels} conflicts with {images.folder}, whose images have "
                         f"{channels} channels; omit the flag")
    validation = images
    if train.val_data_dir:
        held_out = dataclasses.replace(data, data_dir=train.val_data_dir, random_flip=False)
        validation = open_folder(held_out, factors, "--val_data_dir")
    if validation.shape[0] != channels:
        raise ValueError(f"{validation.folder} (--val_data_dir): expected {channels} channels as in {images.folder}, "
                         f"got {validation.shape[0]}; set --image_channels")
    memory = AutoencoderPlan(images.shape, config, train, loss, discriminator_config)
    train = resolve_train_config(train)
    seed_initialization(train.seed)
    network = create_autoencoder(config)
    log_rank0(images.summary())
    log_rank0(f"{format_strides(network)}: images {images.shape} -> latents {network.latent_shape(images.shape[1:])}")
    plan = _plan_batches(len(images), train)
    discriminator = distance = None
    if discriminator_config.discriminator_weight:
        discriminator = create_discriminator(discriminator_config, config.spatial_dims, channels)
        discriminator.check_min_size(images.shape[1:])
    if perceptual.use_perceptual_loss:
        distance = PerceptualLoss(perceptual, config.image_range)
        distance.check_input_shape(images.shape)
    if run.dry_run:
        return log_rank0(memory.training().summary())

    device = dist_util.dev()
    header = {"kind": "autoencoder", "autoencoder": as_dict(config), "image_shape": list(images.shape),
              "data": images.preprocessing}
    hint = "; the perceptual loss takes memory in addition: try --use_perceptual_loss False" if distance else ""
    with _memory_advice(memory, hint):
        for module in filter(None, (network, discriminator, distance)):
            module.to(device)
        trainer = None
        if discriminator:
            if train.fast_dev_run:  # a smoke test of two steps must reach the discriminator
                discriminator_config = dataclasses.replace(discriminator_config, discriminator_start=0)
            trainer = DiscriminatorTrainer(discriminator, discriminator_config, train)
        objective = AutoencoderObjective(loss, network, config.image_range, train,
                                         distance and (perceptual.perceptual_weight, distance), trainer)
        # Validation must not take more memory than was planned for training.
        preview = ReconstructionValidation(network, config.image_range, validation, train.val_pictures, run.folder,
                                           device, min(VALIDATION_BATCH, memory.forward_size))
        bounds = {"val_psnr": train.stop_at_psnr, "val_l1": train.stop_at_l1}
        task = TrainTask(objective, header, preview, monitor="val_psnr", checkpoint=run.checkpoint,
                         early_stop={name: bound for name, bound in bounds.items() if bound})
        loop = TrainLoop.from_config(network, ImageStream(images, plan), train, task)
        run.save_config(header)
        loop.run_loop()


# --- Classifiers ---


def train_classifier(run, source, space):
    """Train a classifier of the x0 of `source`; a dry run prints the memory that training takes and ends."""
    log_source(source)
    diffusion_config, train = run[DiffusionConfig], run[ClassifierTrainConfig]
    config = infer_classifier_config(run[ClassifierConfig], source)
    seed_initialization(train.seed)
    model, diffusion = build_classifier(config, diffusion_config, source.latent_shape)
    plan = _plan_batches(source.count, train)
    if run.dry_run:
        shape = train.batch_size, *source.latent_shape
        return log_rank0(_estimate_classifier(model, config, shape).summary())

    header = {"kind": "classifier", "model": as_dict(config), "diffusion": as_dict(diffusion_config),
              "noised": train.noised, "classes": source.class_names, **space_header(source, space)}
    device = dist_util.dev()
    model.to(device)
    timesteps = create_named_schedule_sampler(train.schedule_sampler, diffusion)
    validation = None
    if train.val_data_dir:
        validation = ClassifierValidation(
            model, ClassifierObjective(diffusion, timesteps, train.noised, "val"),
            open_validation(run, space), space.normalizer,
            source.class_names, train, device,
        )
    data = LatentStream(source, space.normalizer, plan, device, with_labels=True)
    objective = ClassifierObjective(diffusion, timesteps, train.noised)
    task = TrainTask(objective, header, validation, checkpoint=run.checkpoint)
    loop = TrainLoop.from_config(model, data, train.to_train_config(), task, use_fp16=config.classifier_use_fp16)
    run.save_config(header)
    loop.run_loop()


def _estimate_classifier(model, config, shape):
    if config.classifier_use_fp16:
        model.convert_to_fp16()
    x0, timesteps = torch.empty(shape), torch.zeros(shape[0], dtype=torch.long)
    return estimate_training([model], lambda network: network(x0, timesteps).mean().backward(), averages=0)


# --- Shared by all three ---


def _plan_batches(count, train):
    plan = BatchPlan(count, train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    log_rank0(plan.summary())
    return plan


def _memory_advice(plan, hint=""):
    """Return a context in which running out of memory ends in the flags that would fit."""
    return dist_util.oom_advice(lambda budget: advice(plan, budget) + hint)


def _check_compile(train, network_config):
    if train.compile and network_config.recompute_norms:
        raise ValueError("--compile and --recompute_norms are mutually exclusive: the compiler decides what to "
                         "recompute; set only one")


def infer_model_config(config, source):
    """Return a ModelConfig with the classes, channels and axes of the data.

    :raises ValueError: if flags conflict with the data.
    """
    classes = len(source.class_names or ()) if config.class_cond else 0
    if config.class_cond and not classes:
        raise ValueError(f"--class_cond True requires classes, {source.folder} has none: name the files "
                         "<class>_<rest>.png or use one subfolder per class (and re-encode)")
    if config.num_classes and not config.class_cond:
        raise ValueError(f"--num_classes {config.num_classes} has no effect without --class_cond True; set that flag "
                         "alone, the number follows from the data")
    facts = {"in_channels": source.latent_shape[0], "dims": len(source.latent_shape) - 1, "num_classes": classes}
    return _apply_facts(config, facts, source.folder)


def infer_classifier_config(config, source):
    """Return a ClassifierConfig with the channels, axes and number of classes of the data.

    :raises ValueError: if flags conflict with the data, or it has no classes.
    """
    if not source.class_names:
        raise ValueError(f"{source.folder} has no classes: name the files <class>_<rest>.png or use one subfolder per "
                         "class")
    facts = {"classifier_in_channels": source.latent_shape[0], "classifier_dims": len(source.latent_shape) - 1,
             "classifier_num_classes": len(source.class_names)}
    return _apply_facts(config, facts, source.folder)


def _apply_facts(config, facts, folder):
    for name, value in facts.items():
        if vars(config)[name] not in (0, value):
            raise ValueError(f"--{name} {vars(config)[name]} conflicts with {folder}, which has {value}; omit the flag")
    return dataclasses.replace(config, **facts)
