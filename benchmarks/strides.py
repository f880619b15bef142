"""Train autoencoders with different strides for the same CPU time, and measure held-out images or patches.

    OMP_NUM_THREADS=1 python benchmarks/strides.py --data_dir DATA/train --val_data_dir DATA/val --minutes 10
    OMP_NUM_THREADS=1 python benchmarks/strides.py --data_dir VOLUMES --val_data_dir HELD_OUT --image_size 32x32x32 \\
        --minutes 3 --crop random --patches_per_volume 64

Training is interleaved in slices of a few seconds, so that changes of the machine's speed affect all variants. The
learning rate decays linearly to zero over the training time of a variant, independent of the number of steps.
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

SLICE_S = 10.0  # CPU time
LR = 1e-3
EMA_RATE = "0.99"  # low enough to discard the initialization within some hundred steps: slow variants take no more


@dataclasses.dataclass
class StridesConfig:
    SECTION = "benchmark"

    val_data_dir: str = option("", "folder of held-out images or volumes")
    minutes: float = option(3.0, "CPU time per variant")
    bench_batch_size: int = option(8, "batch size")
    only: str = option("", "semicolon-separated names of variants; empty: all")


def variants(dims):
    """Return {name: fields of an AutoencoderConfig}, from small to large strides."""
    axes = lambda *pair: pair if dims == 2 else (pair[0], *pair)
    wide, narrow = (32, 64, 64), (64, 64)
    shuffle = {"final_upsample": "shuffle"}
    configs = {
        "4x: [2,2]": dict(num_channels=wide, downsample_factors=(2, 2)),
        "4x: 2 + [2]": dict(num_channels=narrow, initial_downsample_factor=2, downsample_factors=(2,)),
        "4x: 2 + [2], shuffle": dict(num_channels=narrow, initial_downsample_factor=2, downsample_factors=(2,),
                                     **shuffle),
        "4x2": dict(num_channels=wide, downsample_factors=(axes(2, 1), axes(2, 2))),
        "2x4": dict(num_channels=wide, downsample_factors=(axes(1, 2), axes(2, 2))),
    }
    for total, factors in ((8, (4, 2)), (16, (8, 2)), (16, (4, 4))):
        name = f"{total}x: [{factors[0]},{factors[1]}]"
        configs[name] = dict(num_channels=wide, downsample_factors=factors)
        configs[f"{name}, space_to_channel"] = dict(configs[name], space_to_channel=True)
    for plus in (False, True):
        configs["8x: 2 + [2,2], shuffle" + ", space_to_channel" * plus] = dict(
            num_channels=wide, initial_downsample_factor=2, downsample_factors=(2, 2), space_to_channel=plus, **shuffle)
    configs["8x: [4,2], 16 channels"] = dict(num_channels=wide, downsample_factors=(4, 2), latent_channels=16)
    configs["8x: 2 + [2,2], shuffle, 16 channels"] = dict(
        num_channels=wide, initial_downsample_factor=2, downsample_factors=(2, 2), latent_channels=16, **shuffle)
    configs["16x: 2 + [4,2], shuffle"] = dict(num_channels=wide, initial_downsample_factor=2, downsample_factors=(4, 2),
                                              **shuffle)
    for plus in (False, True):
        configs["32x: 4 + [4,2], shuffle" + ", space_to_channel" * plus] = dict(
            num_channels=wide, initial_downsample_factor=4, downsample_factors=(4, 2), space_to_channel=plus, **shuffle)
    return configs


def curve_name(name):
    """Return the curve of a variant in the figure; some curves have a single point."""
    kinds = {"16 channels": name, "+": "initial factor", "[": "between levels"}
    kind = next((kind for part, kind in kinds.items() if part in name), name)
    return kind + ", space_to_channel" * ("space_to_channel" in name)


class Variant:
    """An autoencoder in training."""

    def __init__(self, changes, dataset, device, batch_size):
        shape = dataset.shape
        network = AutoencoderConfig(spatial_dims=len(shape) - 1, in_channels=shape[0], **changes)
        loss = AutoencoderLossConfig(recon_loss="l1")
        train = AutoencoderTrainConfig(augment_flip=True, mixed_precision=True)
        seed_initialization(0)
        self.network = create_autoencoder(network).to(device)
        self.latent = self.network.latent_shape(shape[1:])
        plan = training.AutoencoderPlan(shape, network, dataclasses.replace(train, batch_size=batch_size), loss,
                                      DiscriminatorConfig())
        self.activations = plan.training().activations
        self.data = ImageStream(dataset, BatchPlan(len(dataset), batch_size))
        self.loop = TrainLoop(
            model=self.network, data=self.data, batch_size=batch_size, lr=LR, ema_rate=EMA_RATE, log_interval=10**9,
            save_interval=10**9, config=TrainConfig(mixed_precision=True, grad_clip=0.5),
            task=TrainTask(AutoencoderObjective(loss, self.network, network.image_range, train)),
        )
        self.range, self.psnr_after = network.image_range, {}

    def train(self, seconds, lr):
        """Train for a number of seconds of CPU time."""
        start, self.loop.lr = time.process_time(), lr
        while time.process_time() - start < seconds:
            self.loop.run_step(*next(self.data))

    def measure(self, dataset, device):
        """Return the means of (PSNR in dB, SSIM, L1) over a dataset."""
        scores = []
        with self.loop.ema_weights() as network, torch.no_grad():
            for start in range(0, len(dataset), 16):
                x = dataset.batch(range(start, min(start + 16, len(dataset)))).to(device)
                y = from_image_range(network.reconstruct(to_image_range(x, self.range)), self.range).clamp(0, 1)
                scores.append(torch.stack([measure(x, y) for measure in (psnr, ssim, l1)]))
        return torch.cat(scores, dim=1).mean(1).tolist()


def main():
    (bench, data, config), device = common.configure(__doc__, DataConfig, StridesConfig, without=("repetitions",))
    dataset = open_folder(data)
    crop = {"crop": "grid"} if len(data.sides) == 3 else {}
    held_out = open_folder(data, data_dir=config.val_data_dir, **crop)
    selected = [name.strip() for name in config.only.split(";") if name.strip()]
    if unknown := set(selected) - set(variants(len(data.sides))):
        raise ValueError(f"--only: unknown variants {'; '.join(unknown)}; expected one of: "
                         f"{'; '.join(variants(len(data.sides)))}")
    rows, curves = [], {}
    with common.silent():
        running = {name: Variant(changes, dataset, device, config.bench_batch_size)
                   for name, changes in variants(len(data.sides)).items() if not selected or name in selected}
        slices = math.ceil(60 * config.minutes / SLICE_S)
        measured = {slices // part: f"PSNR after {config.minutes / part:.3g} min" for part in (8, 4, 2)}
        for i in range(1, slices + 1):
            for variant in running.values():
                variant.train(60 * config.minutes / slices, LR * (1 - (i - 1) / slices))
                if i in measured:
                    variant.psnr_after[measured[i]] = variant.measure(held_out, device)[0]
        for name, variant in running.items():
            psnr, ssim, l1 = variant.measure(held_out, device)
            rows.append({"strides": name, "latent": "x".join(map(str, variant.latent)),
                         "saved activations (MiB)": variant.activations / 2**20, "steps": variant.loop.step,
                         **variant.psnr_after, "PSNR": psnr, "SSIM": ssim, "L1": l1})
            total = math.prod(dataset.shape[1:]) / math.prod(variant.latent[1:])
            curves.setdefault(curve_name(name), []).append((total, psnr))
            variant.data.close()
    common.report(f"strides_{len(data.sides)}d", rows, bench, device, **dataclasses.asdict(config))
    dims = len(data.sides)
    figures.line_plot({kind: sorted(points) for kind, points in curves.items()},
                      f"values of a channel per latent position ({dims}D)", "held-out PSNR (dB)", log_x=True
                      ).save(f"{bench.out}/strides_{dims}d.png")


if __name__ == "__main__":
    main()
