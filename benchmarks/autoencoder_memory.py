"""Compare strides and memory optimizations of the autoencoder: memory at full size, step time at a reduced size.

    OMP_NUM_THREADS=1 python benchmarks/autoencoder_memory.py --timed_size 64x64x32
    python benchmarks/autoencoder_memory.py --timed_size 256x256x64                                 # on a GPU

Memory is that of one training step in bfloat16 at 256x256x64, batch 1, as counted by `scripts/plan_memory.py`. The
table also lists the claims of the guides behind this project. On a GPU, the timed steps report the measured and the
planned peak beyond weights, EMA weights and AdamW's moments.

With `--reference DIR`, MONAI's AutoencoderKL with the same weights takes the same steps as [2,2]. DIR is a folder with
MONAI (pip install --no-deps --target DIR monai einops).
"""

import dataclasses
import math
import sys
from pathlib import Path

import common
import torch
from torch import nn

from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import option
from guided_diffusion_vae.data import parse_size
from guided_diffusion_vae.evaluation import figures
from guided_diffusion_vae.runs import memory, training
from guided_diffusion_vae.runs.flags import read_yaml
from guided_diffusion_vae.train_util import (
    AutoencoderTrainConfig, TrainConfig, TrainLoop, TrainTask, seed_initialization,
)
from guided_diffusion_vae.vae import AutoencoderLossConfig, DiscriminatorConfig
from guided_diffusion_vae.vae.objective import AutoencoderObjective

LOSS = AutoencoderLossConfig()
VOLUMES = Path(__file__).parents[1] / "configs/volumes"
PLOTTED_SIZES = ("64x64x32", "128x128x64", "256x256x64", "512x512x128")
PLOTTED = ("[2,2]", "as shipped: [4,2] (initial_a)", "2 + [2] (same latent), shuffle, recompute_norms",
           "as shipped: 2 + [4,2] (initial_b)", "as shipped: 4 + [4,2] (initial_c)")


@dataclasses.dataclass
class MemoryConfig:
    SECTION = "benchmark"

    full_size: str = option("256x256x64", "size at which memory is counted")
    timed_size: str = option("64x64x32", "size at which steps are timed; empty: disabled")
    reference: str = option("", "folder with the package monai; empty: without MONAI")


def variants():
    """Return {name: (fields of an AutoencoderConfig, the guides' claim in GB or None)}."""
    wide = {"num_channels": (32, 64, 64)}
    both = {"recompute_norms": True, "final_upsample": "shuffle"}
    at = lambda *factors, first=1: {"downsample_factors": factors, "initial_downsample_factor": first}
    shipped = {"[4,2] (initial_a)": 3.1, "[8,2] (very_high)": 1.5, "2 + [4,2] (initial_b)": 1.8,
               "4 + [4,2] (initial_c)": 1.2}
    return {
        "[2,2]": ({**wide, **at(2, 2)}, 8.2),
        "[4,2]": ({**wide, **at(4, 2)}, 3.1),
        "[8,2]": ({**wide, **at(8, 2)}, 1.5),
        "2 + [4,2]": ({**wide, **at(4, 2, first=2)}, 1.8),
        "4 + [4,2]": ({**wide, **at(4, 2, first=4)}, 1.2),
        "[2,2], recompute_norms": ({**wide, **at(2, 2), "recompute_norms": True}, None),
        "[2,2], use_checkpointing": ({**wide, **at(2, 2), "use_checkpointing": True}, None),
        "2 + [2] (same latent), shuffle, recompute_norms": (
            {"num_channels": (64, 64), "attention_levels": (False, True), **at(2, first=2), **both}, None),
        **{f"as shipped: {name}": (autoencoder_flags(name.split("(")[1][:-1]), claim)
           for name, claim in shipped.items()},
    }


def autoencoder_flags(name):
    """Return the autoencoder's flags in a file of configs/volumes."""
    flags = read_yaml(VOLUMES / f"{name}.yaml", (AutoencoderConfig, AutoencoderTrainConfig))
    fields = {f.name for f in dataclasses.fields(AutoencoderConfig)}
    return {**{key: value for key, value in flags.items() if key in fields},
            "use_checkpointing": flags.get("use_gradient_checkpointing", False)}


def main():
    (bench, config), device = common.configure(__doc__, MemoryConfig)
    rows, base = [], None
    plans = {name: (plan_of(changes, config.full_size).training(), claim)
             for name, (changes, claim) in variants().items()}
    if config.reference:
        plans["[2,2], MONAI"] = Monai.plan(config.reference, config.full_size), None
    for name, (plan, claim) in plans.items():
        base = base or plan.peak
        rows.append({"strides": name, "saved activations (GiB)": plan.activations / 2**30,
                     "peak (GiB)": plan.peak / 2**30, "relative to [2,2]": f"{plan.peak / base - 1:+.0%}",
                     "claim (GB)": claim or "",
                     "claimed change": f"{claim / 8.2 - 1:+.0%}" if claim else ""})
    common.report("autoencoder_memory", rows, bench, device, size=config.full_size)
    plot(config.reference).save(f"{bench.out}/autoencoder_memory.png")
    if config.timed_size:
        with common.silent():
            time_steps(config.timed_size, bench, device, config.reference)


def plot(reference):
    """Return a figure of the memory that training requires over the number of voxels."""
    plans = {name: lambda size, name=name: plan_of(variants()[name][0], size).training() for name in PLOTTED}
    if reference:
        plans["[2,2], MONAI"] = lambda size: Monai.plan(reference, size)
    curves = {name: [(math.prod(parse_size(size)) / 1e6, plan(size).required / 2**30) for size in PLOTTED_SIZES]
              for name, plan in plans.items()}
    return figures.line_plot(curves, "million voxels", "GiB required for training", log_x=True, log_y=True)


def plan_of(changes, size):
    shape = (1, *parse_size(size))
    train = AutoencoderTrainConfig(batch_size=1, mixed_precision=True)
    return training.AutoencoderPlan(shape, autoencoder_config(changes), train, LOSS, DiscriminatorConfig())


def autoencoder_config(changes):
    return AutoencoderConfig(**{"spatial_dims": 3, "in_channels": 1, "latent_channels": 3,
                                "attention_levels": (False, False, True), **changes})


class Monai(nn.Module):
    """MONAI's AutoencoderKL for [2,2] with the interface of this project's, for the same training loop."""

    def __init__(self, folder):
        if not (Path(folder) / "monai").is_dir():
            raise FileNotFoundError(f"{folder} does not contain the package monai; check --reference")
        super().__init__()
        sys.path.insert(0, folder)
        from monai.networks.nets import AutoencoderKL

        config = autoencoder_config(variants()["[2,2]"][0])
        self.latent_shape = create_autoencoder(config).latent_shape
        self.network = AutoencoderKL(
            config.spatial_dims, 1, 1, (config.num_res_blocks,) * len(config.num_channels), config.num_channels,
            config.attention_levels, config.latent_channels, config.norm_num_groups, config.norm_eps,
            with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
        )

    @classmethod
    def plan(cls, folder, size):
        plan = plan_of(variants()["[2,2]"][0], size)
        return memory.estimate_training([cls(folder)], plan.step, amp=plan.train.autocast_dtype)

    def forward(self, x, eps):
        mean, sigma = self.network.encode(x)
        return self.network.decode(mean + sigma * eps), mean, sigma


def time_steps(size, bench, device, reference=""):
    """Report the time of a training step of each variant, all on the same volume."""
    x = torch.rand(1, 1, *parse_size(size), generator=torch.Generator().manual_seed(0))
    networks, plans = {}, {name: plan_of(changes, size).training() for name, (changes, _) in variants().items()}
    for name, (changes, _) in variants().items():
        seed_initialization(0)
        networks[name] = create_autoencoder(autoencoder_config(changes)).to(device)
    if reference:
        monai, own = Monai(reference).to(device), networks["[2,2]"]
        own.load_state_dict(monai.network.state_dict())
        eps = torch.zeros(1, *own.latent_shape(x.shape[2:]), device=device)
        with torch.no_grad():
            (a, *_), (b, *_) = monai(x.to(device), eps), own(x.to(device), eps)
        print(f"reconstructions of MONAI's network and of [2,2] differ by {(a - b).abs().max():.1e}\n", flush=True)
        networks["[2,2], MONAI"] = monai
        plans["[2,2], MONAI"] = Monai.plan(reference, size)
    loops = {}
    for name, network in networks.items():
        objective = AutoencoderObjective(LOSS, network, (-1.0, 1.0), AutoencoderTrainConfig())
        loops[name] = TrainLoop(model=network, data=iter(()), batch_size=1, lr=1e-4, log_interval=10**9,
                                save_interval=10**9, config=TrainConfig(mixed_precision=True),
                                task=TrainTask(objective))
    steps = {name: lambda loop=loop: loop.run_step(x, {}) for name, loop in loops.items()}
    rows = common.speedup_table(common.time_interleaved(steps, bench.repetitions, device), "[2,2]")
    for row in rows:
        plan = plans[row["variant"]]
        row["planned MiB"] = (plan.gradients + plan.activations + plan.workspace) / 2**20
        if device.type == "cuda":
            for loop in loops.values():
                loop.mp_trainer.zero_grad()
            row["measured MiB"] = common.peak_memory(steps[row["variant"]]) / 2**20
    common.report("autoencoder_step", rows, bench, device, size=size)


if __name__ == "__main__":
    main()
