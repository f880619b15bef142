"""Compare strides and savings of the autoencoder: memory at full size, step time at a size that fits the machine.

    OMP_NUM_THREADS=1 python benchmarks/autoencoder_memory.py --timed_size 64x64x32
    python benchmarks/autoencoder_memory.py --timed_size 256x256x64                                 # on a GPU

Memory is that of one training step in bfloat16 at 256x256x64, batch 1, as `scripts/plan_memory.py` counts it; beside it
stand the claims of the guides that this project was made for. On a GPU the timed steps report the peak that was
allocated beyond weights, averages and AdamW's moments, beside what was planned for that.
"""

import dataclasses

import common
import torch

from guided_diffusion_vae import memory
from guided_diffusion_vae.autoencoder import AutoencoderConfig, AutoencoderLossConfig, create_autoencoder
from guided_diffusion_vae.config import opt
from guided_diffusion_vae.discriminator import DiscriminatorConfig
from guided_diffusion_vae.image_datasets import parse_size
from guided_diffusion_vae.objectives import AutoencoderObjective
from guided_diffusion_vae.train_util import AutoencoderTrainConfig, TrainLoop, seed_weights

LOSS = AutoencoderLossConfig()


@dataclasses.dataclass
class MemoryConfig:
    SECTION = "benchmark"

    full_size: str = opt("256x256x64", "size whose memory is counted")
    timed_size: str = opt("64x64x32", "size whose steps are timed; empty: none")


def variants():
    """Return {name: (changes of an AutoencoderConfig, the guides' claim in GB or None)}."""
    wide = {"num_channels": (32, 64, 64)}
    narrow = {"num_channels": (16, 32, 64)}
    both = {"recompute_norms": True, "final_upsample": "shuffle"}
    at = lambda *factors, first=1: {"downsample_factors": factors, "initial_downsample_factor": first}
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
        "as shipped: [4,2] (initial_a)": ({**wide, **at(4, 2), "recompute_norms": True}, 3.1),
        "as shipped: [8,2] (very_high)": (
            {**narrow, **at(8, 2), "recompute_norms": True, "use_checkpointing": True}, 1.5),
        "as shipped: 2 + [4,2] (initial_b)": ({**wide, **at(4, 2, first=2), **both, "num_res_blocks": 2}, 1.8),
        "as shipped: 4 + [4,2] (initial_c)": ({**wide, **at(4, 2, first=4), **both, "num_res_blocks": 2}, 1.2),
    }


def main():
    (bench, config), device = common.configure(__doc__, MemoryConfig)
    rows, base = [], None
    for name, (changes, claim) in variants().items():
        plan = planned(changes, config.full_size).training()
        base = base or plan.peak
        rows.append({"strides": name, "GiB kept": plan.activations / 2**30, "GiB at the peak": plan.peak / 2**30,
                     "against [2,2]": f"{plan.peak / base - 1:+.0%}", "claim (GB)": claim or "",
                     "claimed": f"{claim / 8.2 - 1:+.0%}" if claim else ""})
    common.report("autoencoder_memory", rows, bench, device, size=config.full_size)
    if config.timed_size:
        with common.silent():
            timed(config.timed_size, bench, device)


def planned(changes, size):
    shape = (1, *parse_size(size))
    train = AutoencoderTrainConfig(batch_size=1, mixed_precision=True)
    return memory.AutoencoderPlan(shape, configured(changes), train, LOSS, DiscriminatorConfig())


def configured(changes):
    return AutoencoderConfig(**{"spatial_dims": 3, "in_channels": 1, "latent_channels": 3,
                                "attention_levels": (False, False, True), **changes})


def timed(size, bench, device):
    """Report the time of a training step of each variant, all on the same volume."""
    x = torch.rand(1, 1, *parse_size(size), generator=torch.Generator().manual_seed(0))
    loops = {}
    for name, (changes, _) in variants().items():
        seed_weights(0)
        network = create_autoencoder(configured(changes)).to(device)
        objective = AutoencoderObjective(LOSS, network, (-1.0, 1.0), AutoencoderTrainConfig())
        loops[name] = TrainLoop(model=network, objective=objective, data=iter(()), batch_size=1, lr=1e-4,
                                log_interval=10**9, save_interval=10**9, mixed_precision=True)
    steps = {name: lambda loop=loop: loop.run_step(x, {}) for name, loop in loops.items()}
    rows = common.compared(common.interleaved(steps, bench.repetitions, device), "[2,2]")
    for row, (changes, _) in zip(rows, variants().values()):
        plan = planned(changes, size).training()
        row["planned MiB"] = (plan.gradients + plan.activations + plan.workspace) / 2**20
        if device.type == "cuda":
            for loop in loops.values():
                loop.mp_trainer.zero_grad()
            row["measured MiB"] = common.peak_of(steps[row["variant"]]) / 2**20
    common.report("autoencoder_step", rows, bench, device, size=size)


if __name__ == "__main__":
    main()
