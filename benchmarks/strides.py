"""Train autoencoders that differ in their strides for the same CPU time each, and measure held-out pictures or patches.

    OMP_NUM_THREADS=1 python benchmarks/strides.py --data_dir DATA/train --val_data_dir DATA/val --minutes 10
    OMP_NUM_THREADS=1 python benchmarks/strides.py --data_dir VOLUMES --val_data_dir HELD_OUT --image_size 32x32x32 \\
        --minutes 3 --crop random --patches_per_volume 64

The variants take turns of a few seconds, so that a change of the machine's speed meets all of them. The learning rate
falls linearly to zero over each one's time, however many steps that is.
"""

import dataclasses
import math
import time

import common
import torch

from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import option
from guided_diffusion_vae.data import BatchPlan, DataConfig, ImageStream, open_folder
from guided_diffusion_vae.evaluation import figures
from guided_diffusion_vae.evaluation.image_metrics import l1, psnr, ssim
from guided_diffusion_vae.runs import training
from guided_diffusion_vae.train_util import (
    AutoencoderTrainConfig, TrainConfig, TrainLoop, TrainTask, seed_initialization,
)
from guided_diffusion_vae.vae import AutoencoderLossConfig, DiscriminatorConfig, from_image_range, to_image_range
from guided_diffusion_vae.vae.objective import AutoencoderObjective

TURN = 10.0  # seconds of CPU time
LR = 1e-3
EMA_RATE = "0.99"  # so fast that the beginning is forgotten after some hundred steps, all that some variants take


@dataclasses.dataclass
class StridesConfig:
    SECTION = "benchmark"

    val_data_dir: str = option("", "held-out pictures or volumes")
    minutes: float = option(3.0, "CPU time that each variant trains")
    bench_batch_size: int = option(8, "pictures in a step")
    only: str = option("", "names of variants with semicolons between; empty: all")


def variants(dims):
    """Return {name: what it changes in an AutoencoderConfig}, from small to large strides."""
    axes = lambda *pair: pair if dims == 2 else (pair[0], *pair)
    wide, narrow = (32, 64, 64), (64, 64)
    shuffle = {"final_upsample": "shuffle"}
    found = {
        "4x: [2,2]": dict(num_channels=wide, downsample_factors=(2, 2)),
        "4x: 2 + [2]": dict(num_channels=narrow, initial_downsample_factor=2, downsample_factors=(2,)),
        "4x: 2 + [2], shuffle": dict(num_channels=narrow, initial_downsample_factor=2, downsample_factors=(2,),
                                     **shuffle),
        "4x2": dict(num_channels=wide, downsample_factors=(axes(2, 1), axes(2, 2))),
        "2x4": dict(num_channels=wide, downsample_factors=(axes(1, 2), axes(2, 2))),
    }
    for total, factors in ((8, (4, 2)), (16, (8, 2)), (16, (4, 4))):
        name = f"{total}x: [{factors[0]},{factors[1]}]"
        found[name] = dict(num_channels=wide, downsample_factors=factors)
        found[f"{name}, space_to_channel"] = dict(num_channels=wide, downsample_factors=factors, space_to_channel=True)
    for plus in (False, True):
        found["8x: 2 + [2,2], shuffle" + ", space_to_channel" * plus] = dict(
            num_channels=wide, initial_downsample_factor=2, downsample_factors=(2, 2), space_to_channel=plus, **shuffle)
    found["8x: [4,2], 16 channels"] = dict(num_channels=wide, downsample_factors=(4, 2), latent_channels=16)
    found["8x: 2 + [2,2], shuffle, 16 channels"] = dict(
        num_channels=wide, initial_downsample_factor=2, downsample_factors=(2, 2), latent_channels=16, **shuffle)
    found["16x: 2 + [4,2], shuffle"] = dict(num_channels=wide, initial_downsample_factor=2, downsample_factors=(4, 2),
                                            **shuffle)
    for plus in (False, True):
        found["32x: 4 + [4,2], shuffle" + ", space_to_channel" * plus] = dict(
            num_channels=wide, initial_downsample_factor=4, downsample_factors=(4, 2), space_to_channel=plus, **shuffle)
    return found


def curve_name(name):
    """Return the curve of the figure that a variant is a point of; some stand alone."""
    kinds = {"16 channels": name, "+": "first stride", "[": "between levels"}
    kind = next((kind for part, kind in kinds.items() if part in name), name)
    return kind + ", space_to_channel" * ("space_to_channel" in name)


class Variant:
    """One autoencoder in training."""

    def __init__(self, changes, pictures, device, batch_size):
        shape = pictures.shape
        network = AutoencoderConfig(spatial_dims=len(shape) - 1, in_channels=shape[0], **changes)
        loss, train = AutoencoderLossConfig(recon_loss="l1"), AutoencoderTrainConfig(mirror=True, mixed_precision=True)
        seed_initialization(0)
        self.network = create_autoencoder(network).to(device)
        self.latent = self.network.latent_shape(shape[1:])
        plan = training.AutoencoderPlan(shape, network, dataclasses.replace(train, batch_size=batch_size), loss,
                                      DiscriminatorConfig())
        self.activations = plan.training().activations
        self.data = ImageStream(pictures, BatchPlan(len(pictures), batch_size))
        self.loop = TrainLoop(
            model=self.network, data=self.data, batch_size=batch_size, lr=LR, ema_rate=EMA_RATE, log_interval=10**9,
            save_interval=10**9, config=TrainConfig(mixed_precision=True, grad_clip=0.5),
            task=TrainTask(AutoencoderObjective(loss, self.network, network.image_range, train)),
        )
        self.range, self.psnr_after = network.image_range, {}

    def train(self, seconds, lr):
        """Train for so much CPU time."""
        begun, self.loop.lr = time.process_time(), lr
        while time.process_time() - begun < seconds:
            self.loop.run_step(*next(self.data))

    def measure(self, pictures, device):
        """Return (PSNR in dB, SSIM, L1) of held-out pictures, means over them."""
        found = []
        with self.loop.ema_weights() as network, torch.no_grad():
            for start in range(0, len(pictures), 16):
                x = pictures.batch(range(start, min(start + 16, len(pictures)))).to(device)
                y = from_image_range(network.reconstruct(to_image_range(x, self.range)), self.range).clamp(0, 1)
                found.append(torch.stack([measure(x, y) for measure in (psnr, ssim, l1)]))
        return torch.cat(found, dim=1).mean(1).tolist()


def main():
    (bench, data, config), device = common.configure(__doc__, DataConfig, StridesConfig, without=("repetitions",))
    pictures = open_folder(data)
    crop = {"crop": "grid"} if len(data.sides) == 3 else {}
    held_out = open_folder(data, data_dir=config.val_data_dir, **crop)
    wanted = [name.strip() for name in config.only.split(";") if name.strip()]
    if unknown := set(wanted) - set(variants(len(data.sides))):
        raise ValueError(f"--only: there is no variant {', '.join(unknown)}; known are: "
                         f"{'; '.join(variants(len(data.sides)))}")
    rows, curves = [], {}
    with common.silent():
        running = {name: Variant(changes, pictures, device, config.bench_batch_size)
                   for name, changes in variants(len(data.sides)).items() if not wanted or name in wanted}
        turns = math.ceil(60 * config.minutes / TURN)
        on_the_way = {turns // part: f"PSNR after {config.minutes / part:.3g} min" for part in (8, 4, 2)}
        for turn in range(1, turns + 1):
            for variant in running.values():
                variant.train(60 * config.minutes / turns, LR * (1 - (turn - 1) / turns))
                if turn in on_the_way:
                    variant.psnr_after[on_the_way[turn]] = variant.measure(held_out, device)[0]
        for name, variant in running.items():
            psnr, ssim, l1 = variant.measure(held_out, device)
            rows.append({"strides": name, "latent": "x".join(map(str, variant.latent)),
                         "kept MiB": variant.activations / 2**20, "steps": variant.loop.step,
                         **variant.psnr_after, "PSNR": psnr, "SSIM": ssim, "L1": l1})
            total = math.prod(pictures.shape[1:]) / math.prod(variant.latent[1:])
            curves.setdefault(curve_name(name), []).append((total, psnr))
            variant.data.close()
    common.report(f"strides_{len(data.sides)}d", rows, bench, device, **dataclasses.asdict(config))
    dims = len(data.sides)
    figures.line_plot({kind: sorted(points) for kind, points in curves.items()},
                      f"values of a channel for one latent place ({dims}D)", "held-out PSNR (dB)", log_x=True
                      ).save(f"{bench.out}/strides_{dims}d.png")


if __name__ == "__main__":
    main()
