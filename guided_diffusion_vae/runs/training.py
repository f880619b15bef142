"""Train diffusion models, autoencoders and classifiers, and plan their memory."""

import dataclasses
import math
import types
from pathlib import Path

import torch

from .. import dist_util
from ..autoencoder import AutoencoderConfig, create_autoencoder, format_strides, total_factors
from ..checkpoint_util import latest_weights
from ..config import as_dict, format_shape, require, resolve, words
from ..data import (
    Attributes, BatchPlan, ConditionConfig, DataConfig, ImageStream, LatentStream, evenly_spaced, missing_classes,
    map_labels, open_colormap, open_folder, require_labels,
)
from ..evaluation import PREVIEW_IMAGES, ClassifierValidation, ReconstructionValidation, SamplePreview
from ..interfaces import Codec
from ..logger import log_rank0
from ..objectives import ClassifierObjective, DiffusionObjective
from ..resample import create_named_schedule_sampler
from ..sampling import Sampler, deterministic_sampler
from ..train_util import (
    ClassifierTrainConfig, TrainConfig, TrainLoop, TrainTask, resolve_train_config, seed_initialization,
)
from ..vae import (
    AutoencoderLossConfig, DiscriminatorConfig, PerceptualConfig, PerceptualLoss, autoencoder_losses,
    create_discriminator, discriminator_losses, generator_losses,
)
from ..vae.objective import AutoencoderObjective, DiscriminatorTrainer
from ..vae_wrapper import LatentNormalizer
from .factories import (
    ClassifierConfig, DiffusionConfig, ModelConfig, SuperResConfig, build_classifier, create_diffusion,
    create_model_and_diffusion_vae,
)
from .memory import estimate_inference, estimate_training
from .planning import Plan, PlanConfig, advice, counts, report, sizes
from .spaces import (
    Space, compare_with_resumed_data, condition_header, data_header, log_source, open_conditions, open_validation,
    space_header,
)

PREVIEW_STEPS = 50      # about this many sampling steps per preview
PREVIEW_CONDITIONS = 6  # images or label maps that the samples of a preview are conditioned on, if any
VALIDATION_BATCH = 32   # images at a time, if training steps are no smaller


# --- Diffusion models and upsamplers ---


def train_diffusion(run, source, space, super_res=None, low_res=None, teacher=None):
    """Train a UNet on the x0 of `source`, with `super_res` and the source `low_res` an upsampler.

    A dry run prints the memory that training takes and ends.

    :param teacher: a `teacher.Teacher`, whose student is trained. Its configs replace those of the run.
    """
    compare_with_resumed_data(run, source)
    diffusion_config, train = teacher.process if teacher else run[DiffusionConfig], run[TrainConfig]
    model_config = infer_model_config(teacher.model if teacher else run[ModelConfig], source)
    attributes = _open_attributes(teacher.header if teacher else run.previous_header, model_config, source)
    _check_compile(train, model_config)
    condition = open_conditions(run, source, space)
    channels = condition.shape[0] if condition else 0
    memory = DiffusionPlan(
        source.latent_shape, model_config, train, diffusion_config, super_res, low_res and low_res.latent_shape,
        space.codec, channels, teacher.nbytes if teacher else 0,
    )
    train = resolve_train_config(train)
    plan = _plan_batches(source.count, train)
    _require_initial_weights(run, train)
    with torch.device("meta"):
        memory.build()[0].require_grid(source.latent_shape[1:])
    # Without a cache, latents are now encoded to measure their statistics: all else has been checked.
    log_source(source)
    log_rank0(plan.summary())
    header = diffusion_header(source, space, model_config, diffusion_config, super_res, attributes)
    seed_initialization(train.seed)     # here: opening an autoencoder, if there is one, has drawn random numbers
    model, diffusion = create_model_and_diffusion_vae(
        source.latent_shape, model_config, diffusion_config, super_res, discrete_data=space.is_pixels,
        condition_channels=channels,
    )
    if teacher:
        teacher.initialize(model)
    if run.dry_run:
        return log_rank0(memory.training().summary())

    if condition:
        header["condition"] = condition_header(condition, run[ConditionConfig])
    device = dist_util.dev()
    timesteps = create_named_schedule_sampler(train.schedule_sampler, diffusion)
    if teacher:
        header["distillation"] = teacher.entry
        objective = teacher.objective(diffusion, timesteps, space.is_pixels)
    else:
        objective = DiffusionObjective(diffusion, timesteps, model_config.class_dropout, model_config.num_classes,
                                       super_res.cond_noise_steps if super_res else 0)
    preview = None
    with _memory_advice(memory):
        if train.fsdp:
            log_rank0("previews disabled: with --fsdp True no rank has the full model")
        else:
            model.to(device)    # FSDP moves it shard by shard
            if space.codec is not None and super_res is None:
                preview = SamplePreview(
                    preview_sampler(model, space.codec, header, condition), run.folder, device, memory.forward_size
                )
        data = LatentStream(source, space.normalizer, plan, device, model_config.class_cond, low_res,
                            condition=condition, attributes=attributes and attributes.of_items(source))
        task = TrainTask(objective, header, preview, checkpoint=run.checkpoint)
        loop = TrainLoop.from_config(model, data, train, task, use_fp16=model_config.use_fp16)
        run.save_config(header)     # after TrainLoop has accepted the checkpoint in the folder
        _run(loop)


def _open_attributes(header, model_config, source):
    """Return the `Attributes` of --condition_on, None without; a run keeps those in the header that it continues."""
    names = words.parse(model_config.condition_on, "condition_on")
    recorded = Attributes.from_dict(header.get("attributes"))
    return recorded if recorded and recorded.names == names else Attributes.of_source(source, names)


def diffusion_header(source, space, model_config, diffusion_config, super_res=None, attributes=None):
    """Return the header of the checkpoints of a diffusion model or upsampler."""
    header = {"kind": "super_res" if super_res else "diffusion", "model": as_dict(model_config),
              "diffusion": as_dict(diffusion_config),
              "classes": source.class_names if model_config.class_cond else None, **space_header(source, space)}
    if attributes:
        header["attributes"] = as_dict(attributes)
    return {**header, "super_res": as_dict(super_res)} if super_res else header


def preview_sampler(model, codec, header, condition=None):
    """Return a Sampler of the model in training with about PREVIEW_STEPS evenly spaced steps, a student with its own.

    :param condition: `Conditions` of the data, of which evenly spaced ones become those of the samples.

    DDIM's spacing starts below the last timestep, whose latents are almost pure noise: there the unclipped prediction
    of x0 of an unfinished model diverges.
    """
    diffusion, solver = create_diffusion(header["diffusion"]), ""
    if header.get("distillation"):
        solver = deterministic_sampler(diffusion)
    else:
        steps = header["diffusion"]["diffusion_steps"]
        spaced = len(range(0, steps, -(-steps // PREVIEW_STEPS)))
        diffusion = create_diffusion({**header["diffusion"], "timestep_respacing": f"ddim{spaced}"})
    space = Space(codec, LatentNormalizer.from_dict(header["normalizer"]))
    condition = condition and condition.select(evenly_spaced(len(condition), PREVIEW_CONDITIONS))
    return Sampler.from_header(model, diffusion, space, header, solver=solver, condition=condition)


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
    compare_with_resumed_data(run, images)
    channels = images.shape[0]
    config = dataclasses.replace(config, in_channels=config.in_channels or channels)
    if config.out_channels not in (0, channels):
        raise ValueError(f"--out_channels {config.out_channels} conflicts with {images.folder}, whose images have "
                         f"{channels} channels; omit the flag")
    colormap = _spectrogram_colormap(images) if train.augment_spectrogram else None
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
    log_rank0(plan.summary())
    _require_initial_weights(run, train)
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
              "data": images.preprocessing, **data_header(images)}
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
                                         distance and (perceptual.perceptual_weight, distance), trainer, colormap)
        # Validation must not take more memory than was planned for training.
        preview = ReconstructionValidation(network, config.image_range, validation, train.max_val_samples, run.folder,
                                           device, min(VALIDATION_BATCH, memory.forward_size))
        bounds = {"val_psnr": train.stop_at_psnr, "val_l1": train.stop_at_l1}
        task = TrainTask(objective, header, preview, monitor="val_psnr", checkpoint=run.checkpoint,
                         early_stop={name: bound for name, bound in bounds.items() if bound})
        loop = TrainLoop.from_config(network, ImageStream(images, plan, device=device), train, task)
        run.save_config(header)
        _run(loop)


def _spectrogram_colormap(images):
    """Return the colormap of RGB spectrograms, None for gray levels.

    :raises ValueError: for volumes, and for colors that are on no known map.
    """
    name = images.preprocessing.get("recognized_colormap", "")
    require(
        (len(images.shape) == 3, f"{images.folder} contains volumes: --augment_spectrogram expects images, frequencies "
         "x frames; set it to 0"),
        (images.shape[0] == 1 or name, f"{images.folder} contains RGB images whose colormap is unknown: "
         "--augment_spectrogram requires levels; set --colormap to the name of their map or --image_channels 1, or "
         "--augment_spectrogram 0"))
    return open_colormap(name) if name and images.shape[0] == 3 else None


# --- Classifiers ---


def train_classifier(run, source, space):
    """Train a classifier of the x0 of `source`; a dry run prints the memory that training takes and ends."""
    compare_with_resumed_data(run, source)
    diffusion_config, train = run[DiffusionConfig], run[ClassifierTrainConfig]
    config = infer_classifier_config(run[ClassifierConfig], source)
    plan = _plan_batches(source.count, train)
    _require_initial_weights(run, train)
    held_out = open_validation(run, source, space) if train.val_data_dir else None
    if held_out:
        require_labels(held_out, True)
        map_labels(held_out, source.class_names)
    with torch.device("meta"):
        build_classifier(config, diffusion_config, source.latent_shape)
    # Without a cache, latents are now encoded to measure their statistics: all else has been checked.
    log_source(source)
    log_rank0(plan.summary())
    seed_initialization(train.seed)
    model, diffusion = build_classifier(config, diffusion_config, source.latent_shape)
    if run.dry_run:
        shape = train.batch_size, *source.latent_shape
        return log_rank0(_estimate_classifier(model, config, shape).summary())

    header = {"kind": "classifier", "model": as_dict(config), "diffusion": as_dict(diffusion_config),
              "noised": train.noised, "classes": source.class_names, **space_header(source, space)}
    device = dist_util.dev()
    model.to(device)
    timesteps = create_named_schedule_sampler(train.schedule_sampler, diffusion)
    validation = None
    if held_out:
        validation = ClassifierValidation(model, ClassifierObjective(diffusion, timesteps, train.noised, "val"),
                                          held_out, space.normalizer, source.class_names, train, device)
    data = LatentStream(source, space.normalizer, plan, device, with_labels=True)
    objective = ClassifierObjective(diffusion, timesteps, train.noised)
    task = TrainTask(objective, header, validation, checkpoint=run.checkpoint)
    loop = TrainLoop.from_config(model, data, train.to_train_config(), task, use_fp16=config.classifier_use_fp16)
    run.save_config(header)
    _run(loop)


def _estimate_classifier(model, config, shape):
    if config.classifier_use_fp16:
        model.convert_to_fp16()
    x0, timesteps = torch.empty(shape), torch.zeros(shape[0], dtype=torch.long)
    # No preview: validation computes the forward pass of a step.
    return estimate_training([model], lambda network: network(x0, timesteps).mean().backward(), averages=0)


# --- Shared by all three ---


def _run(loop):
    """Run a TrainLoop to its end.

    :raises dist_util.StoppedBySignal: if a signal ended it before.
    """
    loop.run_loop()
    if loop.stopped:
        raise dist_util.StoppedBySignal(f"a signal has ended the training; step {loop.step} is saved in {loop.folder}, "
                                        "from which the same call resumes")


def _plan_batches(count, train):
    return BatchPlan(count, train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)


def _require_initial_weights(run, train):
    """Check that the run or file of --init_from exists, if a new run starts."""
    if train.init_from and run.checkpoint[0] is None:
        path = str(latest_weights(train.init_from, "--init_from"))
        require(("://" in path or Path(path).exists(), f"{path} does not exist; check --init_from"),
                error=FileNotFoundError)


def _memory_advice(plan, hint=""):
    """Return a context in which running out of memory ends in the flags that would fit."""
    return dist_util.oom_advice(lambda budget: advice(plan, budget, dist_util.dev().type) + hint)


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
        remedy = "name the files <class>_<rest>.png or use one subfolder per class (and re-encode)"
        raise ValueError(f"--class_cond True requires classes, {source.folder} has none: "
                         f"{missing_classes(source) or remedy}")
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
        remedy = "name the files <class>_<rest>.png or use one subfolder per class"
        raise ValueError(f"{source.folder} has no classes: {missing_classes(source) or remedy}")
    facts = {"classifier_in_channels": source.latent_shape[0], "classifier_dims": len(source.latent_shape) - 1,
             "classifier_num_classes": len(source.class_names)}
    return _apply_facts(config, facts, source.folder)


def _apply_facts(config, facts, folder):
    for name, value in facts.items():
        if vars(config)[name] not in (0, value):
            raise ValueError(f"--{name} {vars(config)[name]} conflicts with {folder}, which has {value}; omit the flag")
    return dataclasses.replace(config, **facts)


# --- Plans of their memory ---


@dataclasses.dataclass(frozen=True)
class DiffusionPlan(Plan):
    """The training of a UNet on x0 of `shape`; `super_res` and `low_res_shape` are set for an upsampler.

    `codec` decodes previews, None: there are none. `teacher_bytes` are those of the weights of a teacher.
    """

    diffusion_config: DiffusionConfig
    super_res: SuperResConfig | None = None
    low_res_shape: tuple | None = None
    codec: Codec | None = None
    condition_channels: int = 0
    teacher_bytes: int = 0

    CHECKPOINTING = "use_checkpoint"

    @property
    def half_precision(self):
        return self.network.use_fp16

    def build(self):
        model, _ = create_model_and_diffusion_vae(self.shape, self.network, self.diffusion_config, self.super_res,
                                                  condition_channels=self.condition_channels)
        if self.network.use_fp16:
            model.convert_to_fp16()
        return [model]

    def step(self, model):
        n = self.forward_size
        t = torch.zeros(n, dtype=torch.long)
        model_kwargs = {"y": t} if self.network.class_cond else {}
        if self.super_res:
            model_kwargs["low_res"] = torch.empty(n, *self.low_res_shape)
        if self.condition_channels:
            model_kwargs["condition"] = torch.empty(n, self.condition_channels, *self.shape[1:])
        x0, noise = torch.empty(n, *self.shape), torch.empty(n, *self.shape)
        terms = create_diffusion(self.diffusion_config).training_losses(model, x0, t, model_kwargs, noise)
        terms["loss"].mean().backward()

    @property
    def codec_bytes(self):
        return (self.codec.nbytes if self.codec else 0) + self.teacher_bytes

    @property
    def has_previews(self):
        return super().has_previews and self.codec is not None and self.super_res is None and not self.train.fsdp

    def preview(self, model):
        """Compute a sampling step of `SamplePreview`, and its decoding unless slabs or tiles bound it."""
        t = torch.zeros(PREVIEW_IMAGES, dtype=torch.long)
        model(torch.empty(len(t), *self.shape), t, **({"y": t} if self.network.class_cond else {}))
        sides = [n * factor for n, factor in zip(self.shape[1:], self.codec.factors)]
        if not 0 < self.codec.max_side < max(sides):
            self.codec.decode_batch(torch.empty(min(PREVIEW_IMAGES, self.forward_size), *self.shape))


@dataclasses.dataclass(frozen=True)
class AutoencoderPlan(Plan):
    """The training of an autoencoder on images or volumes of `shape`, with its discriminator, if any."""

    loss: AutoencoderLossConfig
    discriminator_config: DiscriminatorConfig

    CHECKPOINTING = "use_checkpointing"

    def __post_init__(self):
        network, _ = resolve(self.network, self.train)
        network = dataclasses.replace(network, in_channels=self.shape[0], spatial_dims=len(self.shape) - 1)
        object.__setattr__(self, "network", network)
        object.__setattr__(self, "train", dataclasses.replace(self.train, use_gradient_checkpointing=False))

    def build(self):
        networks = [create_autoencoder(self.network)]
        if self.discriminator_config.discriminator_weight:
            networks.append(create_discriminator(self.discriminator_config, self.network.spatial_dims, self.shape[0]))
        return networks

    def step(self, network, discriminator=None):
        """Compute what `AutoencoderObjective` and an active `DiscriminatorTrainer` compute."""
        kind = self.discriminator_config.discriminator_loss
        x = torch.empty(self.forward_size, *self.shape)
        reconstruction, mean, sigma = network(x, torch.empty(len(x), *network.latent_shape(x.shape[2:])))
        losses = autoencoder_losses(self.loss, x, reconstruction, mean, 2 * sigma.float().log())["loss"]
        if discriminator is not None:
            discriminator.requires_grad_(False)
            losses = losses + generator_losses(kind, discriminator(reconstruction).float())
            discriminator.requires_grad_(True)
        fake = reconstruction.detach()
        del reconstruction, mean, sigma
        losses.mean().backward()
        if discriminator is not None:
            logits = discriminator(torch.cat([x, fake])).float().chunk(2)
            discriminator_losses(kind, *logits).mean().backward()

    def preview(self, network):
        """Compute a batch of `ReconstructionValidation`."""
        mean, _ = network.moments(torch.empty(min(VALIDATION_BATCH, self.forward_size), *self.shape))
        network.decode(mean)

    def _without_memory(self):
        """Return the network on the meta device."""
        with torch.device("meta"):
            return create_autoencoder(self.network)

    def inference(self, name, dtype=torch.float32):
        """Return the `Estimate` of "encoding" or "decoding" a batch untiled with `--vae_dtype`."""
        network = self._without_memory().eval()
        shape = self.shape if name == "encoding" else network.latent_shape(self.shape[1:])
        forward = {"encoding": network.moments, "decoding": network.decode}[name]
        return estimate_inference(network, lambda _: forward(torch.empty(self.forward_size, *shape)),
                                  None if dtype is torch.float32 else dtype)

    def summary(self):
        """Return the strides, and the sizes of image and latent, as text."""
        network = self._without_memory()
        latent = network.latent_shape(self.shape[1:])
        format_size = lambda shape: f"{format_shape(shape)} ({4 * math.prod(shape) / 2**20:.2f} MiB)"
        return (f"{format_strides(network)}: {format_size(self.shape)} -> {format_size(latent)}, one latent element "
                f"per {math.prod(self.shape) / math.prod(latent):.1f} values")

    def smaller_networks(self):
        """Yield the same latent with a first level of half the size, then a smaller latent."""
        network = self._without_memory()
        first = {"initial_downsample_factor": tuple(2 * factor for factor in network.initial_strides)}
        last = {"final_upsample": "shuffle"}
        for i, strides in enumerate(network.strides):
            if all(stride % 2 == 0 for stride in strides):
                halved = tuple(stride // 2 for stride in strides)
                factors = (*network.strides[:i], halved, *network.strides[i + 1:])
                yield "a latent of the same size", {**first, "downsample_factors": factors, **last}
                break
        factors = {"downsample_factors": network.strides} if network.strides else {}
        yield "a latent half as large along every axis", {**first, **factors, **last}


def autoencoder_plan(run, channels=None):
    """Return the `AutoencoderPlan` of the configs of a run.

    :param channels: those of the data; None: they follow from flags, else from the data, else there is one.
    """
    data, config = run[DataConfig], run[AutoencoderConfig]
    channels = config.in_channels or data.image_channels or channels or (
        open_folder(data).shape[0] if data.data_dir else 1)
    sides = data.sides
    if data.pad:
        sides = [-(-n // factor) * factor for n, factor in zip(sides, total_factors(config, len(sides)))]
    return AutoencoderPlan((channels, *sides), config, run[TrainConfig], run[AutoencoderLossConfig],
                           run[DiscriminatorConfig])


def latent_diffusion_plan(model_config, diffusion_config, train, autoencoder, source=None):
    """Return the `DiffusionPlan` of a model of the latents of an `AutoencoderPlan`.

    :param source: images, for the number of classes; None: a class-conditional model has one.
    :raises ValueError: if the model conflicts with the images or the size of the latents.
    """
    with torch.device("meta"):
        network, = autoencoder.build()[:1]
    facts = types.SimpleNamespace(latent_shape=network.latent_shape(autoencoder.shape[1:]), labels=None,
                                  folder=source.folder if source else "the data",
                                  class_names=source.class_names if source else ["class"])
    plan = DiffusionPlan(facts.latent_shape, infer_model_config(model_config, facts), train, diffusion_config)
    with torch.device("meta"):
        plan.build()[0].require_grid(plan.shape[1:])
    return plan


def report_autoencoder_memory(run):
    """Yield the lines of a memory report for the autoencoder that the configs of a run describe."""
    plan, plan_config = autoencoder_plan(run), run[PlanConfig]
    if run[PerceptualConfig].use_perceptual_loss:
        yield "the perceptual loss is not counted: its backbone takes additional memory"
    yield from report(plan, counts.parse(plan_config.plan_batch_sizes, "plan_batch_sizes"),
                      sizes.parse(plan_config.budget_gb, "budget_gb"))
