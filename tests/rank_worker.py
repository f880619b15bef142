"""Train the small networks of test_train_util.py, which runs this on two ranks and imports it for one.

    mpiexec -n 2 python tests/rank_worker.py FOLDER first|again
"""

import dataclasses
import inspect
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from guided_diffusion_vae import checkpoint_util, dist_util, gaussian_diffusion as gd, logger
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict, from_dict
from guided_diffusion_vae.data import BatchPlan, ImageFolder, LatentStream, ImageStream
from guided_diffusion_vae.data.cache_writer import LatentCacheConfig, write_cache
from guided_diffusion_vae.latent_datasets import EncodedImages, LatentCache
from guided_diffusion_vae.objectives import ClassifierObjective
from guided_diffusion_vae.resample import LossSecondMomentResampler, UniformSampler
from guided_diffusion_vae.train_util import AutoencoderTrainConfig, DiffusionTrainConfig, TrainLoop, TrainTask
from guided_diffusion_vae.unet import EncoderUNetModel, UNetModel
from guided_diffusion_vae.vae.objective import AutoencoderObjective, DiscriminatorTrainer
from guided_diffusion_vae.vae import AutoencoderLossConfig, DiscriminatorConfig, create_discriminator
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec, VAEInterface

COUNT, GLOBAL_BATCH, SEED = 10, 4, 7
KINDS = ("cached", "encoded", "autoencoder", "adversarial", "classifier")
WITHOUT_DROPOUT = ("cached", "autoencoder", "adversarial", "classifier")  # dropout masks differ between ranks
AUTOENCODER = AutoencoderConfig(
    in_channels=1, num_channels=(8, 16), num_res_blocks=1, latent_channels=4, norm_num_groups=2
)
DISCRIMINATOR = DiscriminatorConfig(
    discriminator_weight=0.5, discriminator_start=3, discriminator_channels=16, discriminator_layers=1,
)
# Long enough for the loss-aware sampler to leave its warm-up, and beyond the end of an epoch.
STOP, END, MICRO_STEPS = 6, 10, 2


def prepare(folder):
    """Write images of two classes, an autoencoder [1 x 16 x 16] -> [4 x 8 x 8] and a cache of moments."""
    (folder / "images").mkdir()
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{'ab'[i % 2]}_{i}.png")
    torch.manual_seed(0)
    header = {"kind": "autoencoder", "autoencoder": as_dict(AUTOENCODER)}
    checkpoint_util.save_weights(folder / "vae.pt", create_autoencoder(AUTOENCODER).state_dict(), header)
    config = LatentCacheConfig(str(folder / "cache"), latent_dtype="float32", shard_size=4)
    write_cache(images_in(folder), VAEInterface(folder / "vae.pt", device="cpu"), config)


def images_in(folder):
    return ImageFolder(data_dir=str(folder / "images"), image_size=16)


def unet(dropout=0.0):
    # Width 64 gives norms two channels per group. A bias before a norm of single channels has no effect: its gradient
    # is rounding error, which Adam scales up to full steps.
    return UNetModel(
        image_size=8, in_channels=4, model_channels=64, out_channels=8, num_res_blocks=1,
        attention_resolutions=(2,), dropout=dropout, channel_mult=(1, 1), num_classes=2, num_heads=2,
        use_scale_shift_norm=True,
    )


def process():
    return gd.GaussianDiffusion(
        betas=gd.get_named_beta_schedule("cosine", 4), model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE, loss_type=gd.LossType.RESCALED_MSE,
    )


def plan(batch_size):
    return BatchPlan(COUNT, batch_size, dist_util.rank(), dist_util.world_size(), SEED)


def network_and_loop_arguments(kind, folder, batch_size, schedule="uniform", config=None):
    """Return the network of a kind of training, and the arguments of TrainLoop that depend on the kind."""
    if kind in ("cached", "encoded"):
        codec = VAEInterface(folder / "vae.pt", device="cpu")
        cached = LatentCache(folder / "cache")
        source = cached if kind == "cached" else EncodedImages(images_in(folder), codec, COUNT)
        normalizer = LatentNormalizer.fit("auto", source.statistics)
        diffusion = process()
        sampler = LossSecondMomentResampler(diffusion, history_per_term=2) if schedule == "loss" else None
        data = LatentStream(source, normalizer, plan(batch_size), "cpu", with_labels=True)
        dropout = 0.1 if kind == "encoded" else 0.0
        return unet(dropout), {"diffusion": diffusion, "schedule_sampler": sampler, "data": data}
    images = images_in(folder)
    if kind in ("autoencoder", "adversarial"):
        network, discriminator = create_autoencoder(AUTOENCODER), None
        if kind == "adversarial":
            discriminator = create_discriminator(DISCRIMINATOR, 2, 1)
            discriminator = DiscriminatorTrainer(discriminator, DISCRIMINATOR, config or DiffusionTrainConfig())
        objective = AutoencoderObjective(AutoencoderLossConfig(kl_weight=1e-2), network, AUTOENCODER.image_range,
                                         AutoencoderTrainConfig(augment_flip=True), discriminator=discriminator)
        return network, {"objective": objective, "data": ImageStream(images, plan(batch_size))}
    network = EncoderUNetModel(
        image_size=16, in_channels=1, model_channels=64, out_channels=2, num_res_blocks=1, attention_resolutions=(),
        channel_mult=(1, 1), pool="adaptive",
    )
    source = EncodedImages(images, PixelCodec(1))
    data = LatentStream(source, LatentNormalizer([0], [1], "none"), plan(batch_size), "cpu", with_labels=True)
    return network, {"objective": ClassifierObjective(process(), UniformSampler(process())), "data": data}


class Interrupted:
    """Batches of another stream; the last rank receives a signal while it waits for the batch of step `at`."""

    def __init__(self, data, at, number=signal.SIGTERM):
        self.data, self.at, self.number = data, at, number
        self.close = data.close

    def seek(self, step):
        self.data.seek(step)
        self.step = step

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        if self.step == self.at and dist_util.rank() == dist_util.world_size() - 1:
            os.kill(os.getpid(), self.number)
        return next(self.data)


def create_loop(**options):
    """Return a TrainLoop; options are its arguments, fields of its TrainTask or fields of its config."""
    take = lambda names: {name: options.pop(name) for name in options.keys() & names}
    task = TrainTask(**take({field.name for field in dataclasses.fields(TrainTask)}))
    arguments = take(inspect.signature(TrainLoop).parameters.keys())
    return TrainLoop(**arguments, config=DiffusionTrainConfig(**options), task=task)


def train(folder, name, kind, steps, *, schedule="uniform", interrupt=0, start=0, **loop):
    """Train one network in FOLDER/NAME up to `steps`, or until a signal at step `interrupt`; return the TrainLoop.

    `start` seeds the initial weights, on which a resumed run must not depend.
    """
    batch_size = loop.pop("batch_size", GLOBAL_BATCH // dist_util.world_size())
    options = {"lr": 1.5e-4, "weight_decay": 0.01, "ema_rate": "0.9", "save_interval": 100, "log_interval": 5, **loop}
    torch.manual_seed(start)
    config = from_dict(DiffusionTrainConfig, options)
    network, arguments = network_and_loop_arguments(kind, folder, batch_size, schedule, config)
    if interrupt:
        arguments["data"] = Interrupted(arguments["data"], interrupt)
    logger.configure(str(folder / name), [])
    kind = options.pop("header_kind", kind)
    running = create_loop(
        model=network, batch_size=batch_size, max_steps=steps, seed=SEED, header={"kind": kind}, **arguments, **options
    )
    running.run_loop()
    return running


def schedule_of(kind):
    return "loss" if kind == "cached" else "uniform"


def train_sharded(folder, part):
    """Train the cached kind sharded over the ranks: full, resumed, and by microbatches."""
    schedule = schedule_of("cached")
    if part == "again":
        train(folder, "2/sharded-resumed", "cached", END, schedule=schedule, start=1, fsdp=True)
        return
    train(folder, "2/sharded-full", "cached", END, schedule=schedule, fsdp=True)
    train(folder, "2/sharded-resumed", "cached", END, schedule=schedule, fsdp=True, interrupt=STOP)
    train(folder, "2/sharded-micro", "cached", MICRO_STEPS, microbatch=1, fsdp=True)


def main():
    folder, part = Path(sys.argv[1]), sys.argv[2]
    dist_util.setup_dist()
    for kind in KINDS:
        schedule = schedule_of(kind)
        if part == "again":
            train(folder, f"2/{kind}-resumed", kind, END, schedule=schedule, start=1)
            continue
        train(folder, f"2/{kind}-full", kind, END, schedule=schedule)
        train(folder, f"2/{kind}-resumed", kind, END, schedule=schedule, interrupt=STOP)
    train_sharded(folder, part)
    if part == "first":
        train(folder, "2/cached-micro", "cached", MICRO_STEPS, microbatch=1)


if __name__ == "__main__":
    dist_util.launch(main)
