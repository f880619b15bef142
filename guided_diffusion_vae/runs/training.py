"""Train the diffusion model, the autoencoder or the classifier that flags describe, and save it in a run folder."""

import dataclasses
import functools

import torch

from .. import dist_util
from ..autoencoder import create_autoencoder, format_strides, total_factors
from ..config import as_dict
from ..data import BatchPlan, LatentStream, image_batches, open_folder
from ..evaluation.previews import ClassifierValidation, ReconstructionValidation, SamplePreview
from ..logger import log_rank0
from ..objectives import AutoencoderObjective, ClassifierObjective, DiffusionObjective
from ..resample import create_named_schedule_sampler
from ..train_util import TrainLoop, TrainTask, resolve_train_config, seed_initialization
from ..vae import PerceptualLoss, create_discriminator
from ..vae.adversarial import DiscriminatorTrainer
from ..vae_wrapper import LatentNormalizer
from .factories import build_classifier, create_model_and_diffusion_vae, create_diffusion
from .loading import create_sampler
from .memory import estimate_training
from .planning import AutoencoderPlan, DiffusionPlan, advice
from .run import write_config
from .spaces import Space, open_validation, log_source, space_header


def train_diffusion(script, run, folder, configs, source, space, model_flags, process, train, super_res=None,
                    small=None):
    """Train a UNet, or with a `SuperResConfig` and the source of small pictures an upsampler, and save it in `folder`.

    With `run.dry_run` the model's size is printed and nothing is trained.
    """
    log_source(source)
    model_flags = infer_model_config(model_flags, source)
    _check_exclusive(train.compile, model_flags.recompute_norms)
    memory = DiffusionPlan(source.latent_shape, model_flags, train, process, super_res, small and small.latent_shape)
    train = resolve_train_config(train)
    seed_initialization(train.seed)
    model, diffusion = create_model_and_diffusion_vae(
        source.latent_shape, model_flags, process, super_res, discrete_data=space.is_pixels
    )
    model.require_grid(source.latent_shape[1:])
    plan = BatchPlan(source.count, train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    log_rank0(plan.summary())
    if run.dry_run:
        return log_rank0(memory.training().summary())

    header = diffusion_header(source, space, model_flags, process, super_res)
    device = dist_util.dev()
    advising = functools.partial(dist_util.oom_advice, lambda budget: advice(memory, budget))
    preview = None
    if train.fsdp:
        log_rank0("no previews with --fsdp True: no rank has the whole model")
    else:
        with advising():
            model.to(device)  # else it moves there in parts
    if space.codec is not None and super_res is None and not train.fsdp:
        preview = SamplePreview(preview_sampler(model, space.codec, header), folder, device, memory.forward_size)
    objective = DiffusionObjective(
        diffusion, create_named_schedule_sampler(train.schedule_sampler, diffusion),
        model_flags.class_dropout, model_flags.num_classes, super_res.cond_noise_steps if super_res else 0,
    )
    with advising():
        stream = LatentStream(source, space.normalizer, plan, train.seed, device, model_flags.class_cond, small)
        loop = TrainLoop.from_config(model, stream, train, TrainTask(objective, header, preview), model_flags.use_fp16)
        write_config(folder, script, configs, header)
        loop.run_loop()


def _check_exclusive(compile, recompute_norms):
    if compile and recompute_norms:
        raise ValueError("--compile True and --recompute_norms True exclude each other: the compiler decides itself "
                         "what to compute again; give one of them")


def diffusion_header(source, space, model, process, super_res=None):
    """Return what the checkpoints of a diffusion model, or of an upsampler, say about themselves."""
    header = {"kind": "super_res" if super_res else "diffusion", "model": as_dict(model), "diffusion": as_dict(process),
              "classes": source.class_names if model.class_cond else None, **space_header(source, space)}
    return {**header, "super_res": as_dict(super_res)} if super_res else header


def train_autoencoder(run, folder, configs, data, autoencoder, loss, discriminator_config, perceptual, train):
    """Train a KL autoencoder and save it in `folder`; with `run.dry_run` print its size alone.

    :param rival: a DiscriminatorConfig; `perceptual`: a PerceptualConfig; both may say that there is none.
    """
    _check_exclusive(train.compile, autoencoder.recompute_norms)
    unsettled, train = train, resolve_train_config(train)
    if train.use_gradient_checkpointing:
        autoencoder = dataclasses.replace(autoencoder, use_checkpointing=True)
    autoencoder = dataclasses.replace(autoencoder, spatial_dims=len(data.sides))
    factors = total_factors(autoencoder, len(data.sides))
    pictures = open_folder(data, multiple=factors)
    autoencoder = dataclasses.replace(autoencoder, in_channels=autoencoder.in_channels or pictures.shape[0])
    if autoencoder.out_channels not in (0, pictures.shape[0]):
        raise ValueError(f"--out_channels {autoencoder.out_channels}, but the pictures have {pictures.shape[0]}, and "
                         "an autoencoder learns to give them back; leave the flag away")
    memory = AutoencoderPlan(pictures.shape, autoencoder, unsettled, loss, discriminator_config)
    seed_initialization(train.seed)
    network = create_autoencoder(autoencoder)
    latent_shape = network.latent_shape(pictures.shape[1:])
    log_rank0(pictures.summary())
    log_rank0(f"{format_strides(network)}: pictures {pictures.shape} -> latents {latent_shape}")
    plan = BatchPlan(len(pictures), train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    log_rank0(plan.summary())
    judge = adversary = distance = None
    if discriminator_config.discriminator_weight:
        judge = create_discriminator(discriminator_config, autoencoder.spatial_dims, pictures.shape[0])
        judge.check_min_size(pictures.shape[1:])
    if perceptual.use_perceptual_loss:
        distance = PerceptualLoss(perceptual, autoencoder.image_range)
        distance.check_input_shape(pictures.shape)
    if run.dry_run:
        return log_rank0(memory.training().summary())

    device = dist_util.dev()
    beside = "; the perceptual term takes memory beside that: try --use_perceptual_loss False" if distance else ""
    advising = functools.partial(dist_util.oom_advice, lambda budget: advice(memory, budget) + beside)
    with advising():
        for part in filter(None, (network, judge, distance)):
            part.to(device)
    if judge:
        if train.fast_dev_run:
            discriminator_config = dataclasses.replace(discriminator_config, discriminator_start=0)
        adversary = DiscriminatorTrainer(judge, discriminator_config, train.lr, train.grad_clip)
    objective = AutoencoderObjective(loss, network, autoencoder.image_range, train,
                                     distance and (perceptual.perceptual_weight, distance), adversary)
    header = {"kind": "autoencoder", "autoencoder": as_dict(autoencoder), "image_shape": list(pictures.shape),
              "data": pictures.preprocessing}
    held_out = pictures
    if train.val_data_dir:
        held_out = open_folder(dataclasses.replace(data, data_dir=train.val_data_dir, random_flip=False), factors,
                               "--val_data_dir")
    if held_out.shape[0] != pictures.shape[0]:
        raise ValueError(f"{held_out.folder} (--val_data_dir) has {held_out.shape[0]} channels, {pictures.folder} "
                         f"{pictures.shape[0]}; give pictures of the same kind, or --image_channels")
    preview = ReconstructionValidation(network, autoencoder.image_range, held_out, train.val_pictures, folder, device,
                                    min(32, memory.forward_size))  # no more at once than memory was planned for
    bounds = {"val_psnr": train.stop_at_psnr, "val_l1": train.stop_at_l1}
    with advising():
        task = TrainTask(objective, header, preview, monitor="val_psnr",
                         early_stop={name: bound for name, bound in bounds.items() if bound})
        loop = TrainLoop.from_config(network, image_batches(pictures, plan), train, task)
        write_config(folder, "train_autoencoder", configs, header)
        loop.run_loop()


def train_classifier(run, folder, configs, given, source, space, data, flags, process, train):
    """Train a classifier of the x0 of `source` and save it in `folder`; with `run.dry_run` print its size alone."""
    log_source(source)
    flags = infer_classifier_config(flags, source)
    seed_initialization(train.seed)
    model, diffusion = build_classifier(flags, process, source.latent_shape)
    plan = BatchPlan(source.count, train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    log_rank0(plan.summary())
    if run.dry_run:
        if flags.classifier_use_fp16:
            model.convert_to_fp16()
        x0 = (train.batch_size, *source.latent_shape)
        step = lambda network: network(torch.empty(x0), torch.zeros(x0[0], dtype=torch.long)).mean().backward()
        return log_rank0(estimate_training([model], step, averages=0).summary())

    header = {"kind": "classifier", "model": as_dict(flags), "diffusion": as_dict(process), "noised": train.noised,
              "classes": source.class_names, **space_header(source, space)}
    device = dist_util.dev()
    model.to(device)
    times = create_named_schedule_sampler(train.schedule_sampler, diffusion)
    validation = None
    if train.val_data_dir:
        validation = ClassifierValidation(
            model, ClassifierObjective(diffusion, times, train.noised, "val"),
            open_validation(train.val_data_dir, space, data, given), space.normalizer, source.class_names,
            train.val_pictures, train.batch_size, train.eval_interval or train.save_interval, train.seed, device,
        )
    stream = LatentStream(source, space.normalizer, plan, train.seed, device, with_labels=True)
    task = TrainTask(ClassifierObjective(diffusion, times, train.noised), header, validation)
    loop = TrainLoop.from_config(model, stream, train.to_train_config(), task, flags.classifier_use_fp16)
    write_config(folder, "classifier_train", configs, header)
    loop.run_loop()


def infer_model_config(model, source):
    """Return a ModelConfig with the classes, channels and axes of the data, which flags must not contradict."""
    classes = len(source.class_names) if source.class_names else 0
    if model.class_cond and not classes:
        raise ValueError(f"--class_cond True, but {source.folder} has no classes: name the files <class>_<rest>.png, "
                         "or put each class into a folder of its own (and encode again)")
    found = {"in_channels": source.latent_shape[0], "dims": len(source.latent_shape) - 1}
    return _from_data(model, {**found, "num_classes": classes if model.class_cond else 0}, source.folder)


def infer_classifier_config(flags, source):
    """Return a ClassifierConfig with the channels, axes and number of classes of the data."""
    if not source.class_names:
        raise ValueError(f"{source.folder} has no classes: name the files <class>_<rest>.png, or put each class into a "
                         "folder of its own")
    found = {"classifier_in_channels": source.latent_shape[0], "classifier_num_classes": len(source.class_names),
             "classifier_dims": len(source.latent_shape) - 1}
    return _from_data(flags, found, source.folder)


def _from_data(config, found, folder):
    """Return a config with what was found in the data; a flag that says otherwise is refused."""
    if found.get("num_classes") == 0 and config.num_classes and not config.class_cond:
        raise ValueError(f"--num_classes {config.num_classes} without --class_cond True: the model would not be told "
                         "of them; give that flag too (the data say how many there are), or leave this one away")
    for name, value in found.items():
        if getattr(config, name) not in (0, value):
            raise ValueError(f"--{name} {getattr(config, name)}, but {folder} has {value}; leave the flag away")
    return dataclasses.replace(config, **found)


def preview_sampler(model, codec, header):
    """Return a Sampler for previews: the model in training, walked through in about 50 evenly spaced steps.

    The spacing of DDIM begins below the very last step, where latents are all but pure noise and an unclipped
    prediction of x0 from an unfinished model runs away.
    """
    steps = header["diffusion"]["diffusion_steps"]
    spaced = len(range(0, steps, -(-steps // 50)))
    diffusion = create_diffusion({**header["diffusion"], "timestep_respacing": f"ddim{spaced}"})
    return create_sampler(model, diffusion, Space(codec, LatentNormalizer.from_dict(header["normalizer"])), header)
