"""Train the diffusion model, the autoencoder or the classifier that flags describe, and save it in a run folder."""

import dataclasses
import functools
import inspect

import torch

from .. import dist_util
from ..autoencoder import create_autoencoder, strides_in_words, total_factors
from ..config import as_dict
from ..data.batching import BatchPlan, picture_batches
from ..data.folders import open_folder
from ..data.latent_stream import LatentStream
from ..evaluation.previews import ClassifierValidation, ReconstructionPreview, SamplePreview
from ..logger import say
from ..objectives import AutoencoderObjective, ClassifierObjective, DiffusionObjective
from ..resample import create_named_schedule_sampler
from ..train_util import TrainLoop, seed_weights, settled
from ..vae.adversarial import Adversary
from ..vae.discriminator import create_discriminator
from ..vae.perceptual import PerceptualLoss
from ..vae_wrapper import LatentNormalizer
from .factories import build_classifier, create_model_and_diffusion_vae, create_process
from .loading import sampler_from
from .memory import estimate_training
from .planning import AutoencoderPlan, DiffusionPlan, advice
from .run import write_config
from .spaces import Space, open_held_out, say_source, space_header


def train_diffusion(script, run, folder, configs, source, space, model_flags, process, train, super_res=None,
                    small=None):
    """Train a UNet, or with a `SuperResConfig` and the source of small pictures an upsampler, and save it in `folder`.

    With `run.dry_run` the model's size is printed and nothing is trained.
    """
    say_source(source)
    model_flags = with_classes(model_flags, source)
    _refuse_both(train.compile, model_flags.recompute_norms)
    memory = DiffusionPlan(source.latent_shape, model_flags, train, process, super_res, small and small.latent_shape)
    train = settled(train)
    seed_weights(train.seed)
    model, diffusion = create_model_and_diffusion_vae(
        source.latent_shape, model_flags, process, super_res, discrete_data=space.is_pixels
    )
    model.require_grid(source.latent_shape[1:])
    plan = BatchPlan(source.count, train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    say(plan.summary())
    if run.dry_run:
        return say(memory.training().summary())

    header = diffusion_header(source, space, model_flags, process, super_res)
    device = dist_util.dev()
    advising = functools.partial(dist_util.advising_on_memory, lambda budget: advice(memory, budget))
    preview = None
    if train.fsdp:
        say("no previews with --fsdp True: no rank has the whole model")
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
        loop = TrainLoop(
            model=model, objective=objective, header=header, use_fp16=model_flags.use_fp16, preview=preview,
            data=LatentStream(source, space.normalizer, plan, train.seed, device, model_flags.class_cond, small),
            **loop_arguments(train, "schedule_sampler"),
        )
        write_config(folder, script, configs, header)
        loop.run_loop()


def _refuse_both(compile, recompute_norms):
    if compile and recompute_norms:
        raise ValueError("--compile True and --recompute_norms True exclude each other: the compiler decides itself "
                         "what to compute again; give one of them")


def diffusion_header(source, space, model, process, super_res=None):
    """Return what the checkpoints of a diffusion model, or of an upsampler, say about themselves."""
    header = {"kind": "super_res" if super_res else "diffusion", "model": as_dict(model), "diffusion": as_dict(process),
              "classes": source.class_names if model.class_cond else None, **space_header(source, space)}
    return {**header, "super_res": as_dict(super_res)} if super_res else header


def train_autoencoder(run, folder, configs, data, autoencoder, loss, rival, perceptual, train):
    """Train a KL autoencoder and save it in `folder`; with `run.dry_run` print its size alone.

    :param rival: a DiscriminatorConfig; `perceptual`: a PerceptualConfig; both may say that there is none.
    """
    _refuse_both(train.compile, autoencoder.recompute_norms)
    unsettled, train = train, settled(train)
    if train.use_gradient_checkpointing:
        autoencoder = dataclasses.replace(autoencoder, use_checkpointing=True)
    autoencoder = dataclasses.replace(autoencoder, spatial_dims=len(data.sides))
    factors = total_factors(autoencoder, len(data.sides))
    pictures = open_folder(data, multiple=factors)
    autoencoder = dataclasses.replace(autoencoder, in_channels=autoencoder.in_channels or pictures.shape[0])
    if autoencoder.out_channels not in (0, pictures.shape[0]):
        raise ValueError(f"--out_channels {autoencoder.out_channels}, but the pictures have {pictures.shape[0]}, and "
                         "an autoencoder learns to give them back; leave the flag away")
    memory = AutoencoderPlan(pictures.shape, autoencoder, unsettled, loss, rival)
    seed_weights(train.seed)
    network = create_autoencoder(autoencoder)
    latent_shape = network.latent_shape(pictures.shape[1:])
    say(pictures.summary())
    say(f"{strides_in_words(network)}: pictures {pictures.shape} -> latents {latent_shape}")
    plan = BatchPlan(len(pictures), train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    say(plan.summary())
    judge = adversary = distance = None
    if rival.discriminator_weight:
        judge = create_discriminator(rival, autoencoder.spatial_dims, pictures.shape[0])
        judge.require_large_enough(pictures.shape[1:])
    if perceptual.use_perceptual_loss:
        distance = PerceptualLoss(perceptual, autoencoder.image_range)
        distance.require_fitting(pictures.shape)
    if run.dry_run:
        return say(memory.training().summary())

    device = dist_util.dev()
    beside = "; the perceptual term takes memory beside that: try --use_perceptual_loss False" if distance else ""
    advising = functools.partial(dist_util.advising_on_memory, lambda budget: advice(memory, budget) + beside)
    with advising():
        for part in filter(None, (network, judge, distance)):
            part.to(device)
    if judge:
        if train.fast_dev_run:
            rival = dataclasses.replace(rival, discriminator_start=0)
        adversary = Adversary(judge, rival, train.lr, train.grad_clip)
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
    preview = ReconstructionPreview(network, autoencoder.image_range, held_out, train.val_pictures, folder, device,
                                    min(32, memory.forward_size))  # no more at once than memory was planned for
    bounds = {"val_psnr": train.stop_at_psnr, "val_l1": train.stop_at_l1}
    with advising():
        loop = TrainLoop(
            model=network, data=picture_batches(pictures, plan), header=header, preview=preview, objective=objective,
            best_by="val_psnr", stop_at={name: bound for name, bound in bounds.items() if bound},
            **loop_arguments(train),
        )
        write_config(folder, "train_autoencoder", configs, header)
        loop.run_loop()


def train_classifier(run, folder, configs, given, source, space, data, flags, process, train):
    """Train a classifier of the x0 of `source` and save it in `folder`; with `run.dry_run` print its size alone."""
    say_source(source)
    flags = classifier_for(flags, source)
    seed_weights(train.seed)
    model, diffusion = build_classifier(flags, process, source.latent_shape)
    plan = BatchPlan(source.count, train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    say(plan.summary())
    if run.dry_run:
        if flags.classifier_use_fp16:
            model.convert_to_fp16()
        x0 = (train.batch_size, *source.latent_shape)
        step = lambda network: network(torch.empty(x0), torch.zeros(x0[0], dtype=torch.long)).mean().backward()
        return say(estimate_training([model], step, averages=0).summary())

    header = {"kind": "classifier", "model": as_dict(flags), "diffusion": as_dict(process), "noised": train.noised,
              "classes": source.class_names, **space_header(source, space)}
    device = dist_util.dev()
    model.to(device)
    times = create_named_schedule_sampler(train.schedule_sampler, diffusion)
    validation = None
    if train.val_data_dir:
        validation = ClassifierValidation(
            model, ClassifierObjective(diffusion, times, train.noised, "val"),
            open_held_out(train.val_data_dir, space, data, given), space.normalizer, source.class_names,
            train.val_pictures, train.batch_size, train.eval_interval or train.save_interval, train.seed, device,
        )
    loop = TrainLoop(
        model=model, objective=ClassifierObjective(diffusion, times, train.noised), header=header,
        data=LatentStream(source, space.normalizer, plan, train.seed, device, with_labels=True),
        preview=validation, preview_interval=train.eval_interval, max_steps=train.iterations, ema_rate="",
        lr_anneal_steps=train.iterations if train.anneal_lr else 0, use_fp16=flags.classifier_use_fp16,
        **loop_arguments(train, "schedule_sampler"),
    )
    write_config(folder, "classifier_train", configs, header)
    loop.run_loop()


def loop_arguments(train, *without):
    """Return the fields of a training config that TrainLoop takes, but for those named."""
    return {k: v for k, v in vars(train).items() if k in inspect.signature(TrainLoop).parameters and k not in without}


def with_classes(model, source):
    """Return a ModelConfig with the classes, channels and axes of the data, which flags must not contradict."""
    classes = len(source.class_names) if source.class_names else 0
    if model.class_cond and not classes:
        raise ValueError(f"--class_cond True, but {source.folder} has no classes: name the files <class>_<rest>.png, "
                         "or put each class into a folder of its own (and encode again)")
    found = {"in_channels": source.latent_shape[0], "dims": len(source.latent_shape) - 1}
    return _from_data(model, {**found, "num_classes": classes if model.class_cond else 0}, source.folder)


def classifier_for(flags, source):
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
    diffusion = create_process(**{**header["diffusion"], "timestep_respacing": f"ddim{spaced}"})
    return sampler_from(model, diffusion, Space(codec, LatentNormalizer.from_dict(header["normalizer"])), header)
