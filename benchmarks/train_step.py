"""Time one training step of the diffusion model: forward, backward, AdamW, moving averages, logging.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py --reference ../guided-diffusion
    python benchmarks/train_step.py --size 32m1224 --bench_batch_size 256 --compile_too True        # on a GPU

Both sides take the same step on the same weights and batches. The loss and the gradients of all variants are compared
with the baseline's first. The share of the machine's matrix rate is that of a large product of bfloat16 matrices, in
the same run.
"""

import dataclasses
import statistics
import time

import common
import torch
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion_vae.config import opt
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.script_util import create_model_and_diffusion_vae
from guided_diffusion_vae.train_util import TrainLoop
from guided_diffusion_vae.unet import ModelConfig

COMPILED = "bfloat16, compiled"
SIZES = {
    "16m122": ((4, 16, 16), dict(num_channels=128, channel_mult="1,2,2", attention_resolutions="16,8")),
    "32m1224": ((4, 32, 32), dict(num_channels=128, channel_mult="1,2,2,4", attention_resolutions="16,8")),
    "32adm256": ((4, 32, 32), dict(num_channels=256, channel_mult="1,2,4", attention_resolutions="16,8")),
}


@dataclasses.dataclass
class StepConfig:
    SECTION = "benchmark"

    size: str = opt("16m122", "latent grid and network", choices=tuple(SIZES))
    bench_batch_size: int = opt(16, "latents in a step")
    compile_too: bool = opt(False, "measure compiled networks as well")


def main():
    (bench, against, config), device = common.configure(__doc__, common.ComparisonConfig, StepConfig)
    shape, flags = SIZES[config.size]
    model, _ = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
    weights = common.waken(model).state_dict()
    draw = torch.Generator().manual_seed(1)
    batch = torch.randn(config.bench_batch_size, *shape, generator=draw)

    with common.silent():
        loops, counterpart = {}, None
        if against.reference:
            loops["guided-diffusion"], counterpart = reference_loop(against.reference, shape, flags, weights,
                                                                    config.bench_batch_size, device)
        loops["float32"] = own_loop(shape, flags, weights, config.bench_batch_size, device)
        loops["bfloat16"] = own_loop(shape, flags, weights, config.bench_batch_size, device, mixed_precision=True)
        loops["float32, recompute_norms"] = own_loop(
            shape, {**flags, "recompute_norms": True}, weights, config.bench_batch_size, device)
        loops["bfloat16, recompute_norms"] = own_loop(
            shape, {**flags, "recompute_norms": True}, weights, config.bench_batch_size, device, mixed_precision=True)
        if config.compile_too:
            loops[COMPILED] = own_loop(shape, flags, weights, config.bench_batch_size, device, mixed_precision=True,
                                       compile=True)
            begun = time.perf_counter()  # the compiler works in processes of its own
            loops[COMPILED].run_step(batch, {})
            first_step = time.perf_counter() - begun
        networks = {name: (loop.ddp_model, loop.objective.diffusion, loop.autocast_dtype) for name, loop in loops.items()
                    if name != "guided-diffusion"}
        if counterpart:
            networks["guided-diffusion"] = (*counterpart, None)
        apart = compared_gradients(networks, next(iter(loops)), batch, device)
        work = flops(networks["float32"][:2], batch, device)
        steps = {name: lambda loop=loop: loop.run_step(batch, {}) for name, loop in loops.items()}
        product = common.matrix_product(device)
        times = common.interleaved({**steps, "product": product}, bench.repetitions, device)
        rate = product.flops / statistics.median(times.pop("product"))
        if against.profile:
            common.print_operators(steps, device)
    rows = common.compared(times, next(iter(loops)))
    settings = {"size": config.size, "batch_size": config.bench_batch_size, "baseline": next(iter(loops)),
                "flops_of_a_step": work, "flops_per_second_of_a_product": rate}
    if config.compile_too:
        eager, compiled = (statistics.median(times[name]) for name in ("bfloat16", COMPILED))
        settings["compile_seconds"], gain = first_step, eager - compiled
        settings["steps_that_pay_it_back"] = first_step / gain if gain > 0 else None
        paid = f"{first_step / gain:,.0f} steps pay that back" if gain > 0 else "nothing pays that back"
        print(f"the first compiled step took {first_step:.0f} s; {paid}\n")
    for row, loop in zip(rows, loops.values()):
        row["gradients apart"] = f"{apart[row['variant']]:.1e}"
        row["of the matrix rate"] = f"{work / (row['ms'] / 1e3) / rate:.0%}"
        if device.type == "cuda":
            row["MiB beyond what stays"] = common.peak_of(lambda: loop.run_step(batch, {})) / 2**20
    common.report(f"train_step_{config.size}_{config.bench_batch_size}", rows, bench, device, **settings)


def own_loop(shape, flags, weights, batch_size, device, **options):
    model, diffusion = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
    model.load_state_dict(weights)
    return TrainLoop(model=model.to(device), diffusion=diffusion, data=iter(()), batch_size=batch_size, lr=1e-4,
                     ema_rate="0.9999", log_interval=10**9, save_interval=10**9, **options)


def reference_loop(folder, shape, flags, weights, batch_size, device):
    """Return the TrainLoop of guided-diffusion on the same weights, and (its module, its diffusion)."""
    theirs = common.open_reference(folder)
    theirs.dist_util.dev = lambda: device
    known = theirs.script_util.model_and_diffusion_defaults()
    _, diffusion = theirs.script_util.create_model_and_diffusion(**{**known, "image_size": 64})
    widths = tuple(int(m) for m in flags["channel_mult"].split(","))
    at = tuple(shape[-1] // int(r) for r in flags["attention_resolutions"].split(","))
    model = theirs.unet.UNetModel(
        image_size=shape[-1], in_channels=shape[0], model_channels=flags["num_channels"], out_channels=shape[0],
        num_res_blocks=2, attention_resolutions=at, channel_mult=widths, num_heads=4, use_scale_shift_norm=True,
    ).to(device)
    model.load_state_dict(weights)
    theirs.logger.configure(dir=common.logger.get_dir(), format_strs=["csv"])
    loop = theirs.train_util.TrainLoop(
        model=model, diffusion=diffusion, data=iter(()), batch_size=batch_size, microbatch=-1, lr=1e-4,
        ema_rate="0.9999", log_interval=10**9, save_interval=10**9, resume_checkpoint="",
    )
    return loop, (model, diffusion)


def compared_gradients(networks, baseline, batch, device):
    """Return {name: how far the gradients are from the baseline's, relative, over all weights}; print the losses.

    `networks` are {name: (model, diffusion, type of autocast or None)}; all see the same times and noise.
    """
    times = torch.arange(len(batch), device=device) * 1000 // len(batch)
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(2)).to(device)
    losses, gradients = {}, {}
    for name, (model, diffusion, autocast) in networks.items():
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = diffusion.training_losses(model, batch.to(device), times, noise=noise)["loss"].mean()
        loss.backward()
        losses[name], gradients[name] = loss.item(), [p.grad.double() for p in model.parameters()]
        model.zero_grad(set_to_none=True)
    print("; ".join(f"{name}: loss {loss:.6f}" for name, loss in losses.items()) + "\n", flush=True)
    wanted = gradients[baseline]
    norm = sum(g.square().sum() for g in wanted).sqrt()
    far = lambda found: sum((a - b).square().sum() for a, b in zip(found, wanted)).sqrt() / norm
    return {name: far(found).item() for name, found in gradients.items()}


def flops(network, batch, device):
    """Return the floating-point operations of convolutions and products in a forward and a backward pass.

    Of this project's network: guided-diffusion's does more, nine products an output where grids are enlarged for four.
    """
    model, diffusion = network
    with FlopCounterMode(display=False) as counter:
        times = torch.zeros(len(batch), dtype=torch.long, device=device)
        diffusion.training_losses(model, batch.to(device), times)["loss"].mean().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
