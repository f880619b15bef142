"""Time one training step of the diffusion model: forward, backward, AdamW, EMA, logging.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py --reference ../guided-diffusion
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --reference diffusers
    python benchmarks/train_step.py --size 32m1224 --bench_batch_size 256 --compile_too True        # on a GPU

All sides take the same step on the same weights and batches. First the losses and gradients are compared. "matrix rate"
is the rate of a step relative to that of a large product of bfloat16 matrices, measured in the same run. diffusers
supports one head size per network, so in that comparison all heads have 64 channels.
"""

import copy
import dataclasses
import statistics
import time

import common
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion_vae.config import as_dict, option
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs import diffusers_export
from guided_diffusion_vae.runs.factories import create_model_and_diffusion_vae
from guided_diffusion_vae.train_util import TrainConfig, TrainLoop
from guided_diffusion_vae.unet import ModelConfig

COMPILED, DIFFUSERS = "bfloat16, compiled", "diffusers"
LR, EMA_RATE = 1e-4, "0.9999"
SIZES = {
    "16m122": ((4, 16, 16), dict(num_channels=128, channel_mult="1,2,2", attention_resolutions="16,8")),
    "32m1224": ((4, 32, 32), dict(num_channels=128, channel_mult="1,2,2,4", attention_resolutions="16,8")),
    "radar64": ((4, 16, 16), dict(num_channels=64, channel_mult="1,2,2", num_head_channels=32,
                                  attention_resolutions="8,4")),    # of microdoppler_small, on half its grid
    "32adm256": ((4, 32, 32), dict(num_channels=256, channel_mult="1,2,4", attention_resolutions="16,8")),
}


@dataclasses.dataclass
class StepConfig:
    SECTION = "benchmark"

    size: str = option("16m122", "latent grid and network", choices=tuple(SIZES))
    bench_batch_size: int = option(16, "batch size")
    compile_too: bool = option(False, "also measure compiled networks")


@dataclasses.dataclass
class Side:
    """One side of the comparison: its training step, and the parts of its loss."""

    run_step: callable              # (batch [N x C x ...], {}) -> None
    model: torch.nn.Module
    diffusion: object               # has training_losses
    autocast: torch.dtype | None = None
    in_model_order: callable = lambda network: network.parameters()   # this project's weights, in the order of `model`


def main():
    (bench, comparison, config), device = common.configure(__doc__, common.ComparisonConfig, StepConfig)
    shape, flags = SIZES[config.size]
    if comparison.reference == DIFFUSERS:
        flags = {**flags, "num_head_channels": 64}
    model, _ = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
    weights = common.randomize_zero_parameters(model).state_dict()
    batch = torch.randn(config.bench_batch_size, *shape, generator=torch.Generator().manual_seed(1))

    with common.silent():
        def own(recompute_norms=False, **options):
            variant = {**flags, "recompute_norms": recompute_norms}
            return own_side(shape, variant, weights, len(batch), device, **options)

        sides = references(comparison.reference, shape, flags, model, len(batch), device)
        half = {"mixed_precision": True}
        sides |= {"float32": own(), "bfloat16": own(**half), "float32, recompute_norms": own(recompute_norms=True),
                  "bfloat16, recompute_norms": own(recompute_norms=True, **half)}
        if config.compile_too:
            sides[COMPILED] = own(compile=True, **half)
            start = time.perf_counter()  # the compiler uses separate processes, which CPU time omits
            sides[COMPILED].run_step(batch, {})
            first_step = time.perf_counter() - start
        differences = compare_gradients(sides, batch, device)
        work = flops(sides["float32"], batch, device)
        steps = {name: lambda side=side: side.run_step(batch, {}) for name, side in sides.items()}
        product = common.matrix_product(device)
        times = common.time_interleaved({**steps, "product": product}, bench.repetitions, device)
        rate = product.flops / statistics.median(times.pop("product"))
        if comparison.profile:
            common.print_operators(steps, device)
    rows = common.speedup_table(times, next(iter(sides)))
    settings = {"size": config.size, "batch_size": config.bench_batch_size, "baseline": next(iter(sides)),
                "flops_of_a_step": work, "flops_per_second_of_a_product": rate}
    if config.compile_too:
        eager, compiled = (statistics.median(times[name]) for name in ("bfloat16", COMPILED))
        settings["compile_seconds"], gain = first_step, eager - compiled
        settings["steps_that_pay_it_back"] = first_step / gain if gain > 0 else None
        recovered = f"recovered after {first_step / gain:,.0f} steps" if gain > 0 else "never recovered"
        print(f"first compiled step: {first_step:.0f} s, {recovered}\n")
    for row in rows:
        row["difference of gradients"] = f"{differences[row['variant']]:.1e}"
        row["matrix rate"] = f"{work / (row['ms'] / 1e3) / rate:.0%}"
        if device.type == "cuda":
            row["peak above resident (MiB)"] = common.peak_memory(steps[row["variant"]]) / 2**20
    common.report(f"train_step_{config.size}_{config.bench_batch_size}", rows, bench, device, **settings)


def own_side(shape, flags, weights, batch_size, device, memory_format=torch.preserve_format, cls=TrainLoop, **options):
    """Return a Side with a TrainLoop, or a subclass `cls`, and the options of its TrainConfig."""
    with torch.device(device):  # initializes large networks faster than a CPU does
        model, diffusion = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
    model.load_state_dict(weights)
    loop = cls(model=model.to(device, memory_format=memory_format), diffusion=diffusion, data=iter(()),
               batch_size=batch_size, lr=LR, ema_rate=EMA_RATE, log_interval=10**9, save_interval=10**9,
               config=TrainConfig(**options))
    return Side(loop.run_step, loop.ddp_model, diffusion, loop.autocast_dtype)


def references(reference, shape, flags, model, batch_size, device):
    """Return {name: Side} of the reference implementation, with the weights of `model`."""
    if not reference:
        return {}
    if reference == DIFFUSERS:
        return {f"{DIFFUSERS}, float32": diffusers_side(flags, model, device),
                f"{DIFFUSERS}, bfloat16": diffusers_side(flags, model, device, torch.bfloat16)}
    return {"guided-diffusion": reference_side(reference, shape, flags, model, batch_size, device)}


def reference_side(folder, shape, flags, model, batch_size, device, use_fp16=False):
    """Return a Side with the TrainLoop of guided-diffusion."""
    reference = common.open_reference(folder)
    reference.dist_util.dev = lambda: device
    defaults = reference.script_util.model_and_diffusion_defaults()
    _, diffusion = reference.script_util.create_model_and_diffusion(**{**defaults, "image_size": 64})
    with torch.device(device):
        network = reference_unet(reference, shape, flags, use_fp16)
    network.load_state_dict(model.state_dict())
    if use_fp16:
        network.convert_to_fp16()
    reference.logger.configure(dir=common.logger.get_dir(), format_strs=["csv"])
    loop = reference.train_util.TrainLoop(
        model=network, diffusion=diffusion, data=iter(()), batch_size=batch_size, microbatch=-1, lr=LR,
        ema_rate=EMA_RATE, log_interval=10**9, save_interval=10**9, resume_checkpoint="", use_fp16=use_fp16,
    )
    return Side(loop.run_step, network, diffusion)


def reference_unet(reference, shape, flags, use_fp16=False):
    """Return guided-diffusion's UNet of these flags; `reference` is its package."""
    return reference.unet.UNetModel(
        image_size=shape[-1], in_channels=shape[0], model_channels=flags["num_channels"], out_channels=shape[0],
        num_res_blocks=flags.get("num_res_blocks", 2), num_heads=4, use_scale_shift_norm=True, use_fp16=use_fp16,
        attention_resolutions=tuple(shape[-1] // int(r) for r in flags["attention_resolutions"].split(",")),
        channel_mult=tuple(int(m) for m in flags["channel_mult"].split(",")),
    )


class EpsilonLoss:
    """Loss of diffusers' training examples: mean square error of the predicted noise, noised by its scheduler."""

    def __init__(self, flags):
        self.scheduler = diffusers_export.create_scheduler(flags, pixels=False)

    def training_losses(self, network, x_start, t, noise):
        prediction = network(self.scheduler.add_noise(x_start, noise, t), t).sample
        return {"loss": F.mse_loss(prediction.float(), noise, reduction="none").mean(dim=(1, 2, 3))}


def diffusers_side(flags, model, device, autocast=None):
    """Return a Side with the UNet2DModel of `model`, trained as in diffusers' examples with AdamW and EMAModel."""
    from diffusers.training_utils import EMAModel

    flags = as_dict(ModelConfig(**flags))
    network = diffusers_export.unet_to_diffusers(model, flags).to(device).train()
    loss = EpsilonLoss(as_dict(DiffusionConfig()))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    ema = EMAModel(network.parameters(), decay=float(EMA_RATE))

    def run_step(batch, _):
        x = batch.to(device)
        t = torch.randint(loss.scheduler.config.num_train_timesteps, (len(x),), device=device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss.training_losses(network, x, t, torch.randn_like(x))["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())

    names = [name for name, _ in network.named_parameters()]
    return Side(run_step, network, loss, autocast,
                lambda unet: map(diffusers_export.unet_state(unet, flags["num_res_blocks"]).get, names))


def compare_gradients(sides, batch, device):
    """Return {name: relative difference of all gradients from this project's in float32}, after printing the losses.

    All sides use the same timesteps and noise.
    """
    timesteps = torch.arange(len(batch), device=device) * 1000 // len(batch)
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(2)).to(device)
    losses, gradients = {}, {}
    for name, side in sides.items():
        with torch.autocast(device.type, side.autocast, enabled=side.autocast is not None):
            loss = side.diffusion.training_losses(side.model, batch.to(device), timesteps, noise=noise)["loss"].mean()
        loss.backward()
        losses[name], gradients[name] = loss.item(), [p.grad for p in side.model.parameters()]
        side.model.zero_grad(set_to_none=True)
    print("; ".join(f"{name}: loss {loss:.6f}" for name, loss in losses.items()) + "\n", flush=True)
    expected = copy.deepcopy(sides["float32"].model)  # holds the gradients as weights, so that every side can sort them
    with torch.no_grad():
        for p, gradient in zip(expected.parameters(), gradients["float32"]):
            p.copy_(gradient)
    norm = sum(p.double().square().sum() for p in expected.parameters()).sqrt()
    difference = lambda actual, expected: sum((a.flatten().double() - b.flatten().double()).square().sum()
                                              for a, b in zip(actual, expected, strict=True)).sqrt() / norm
    return {name: difference(actual, sides[name].in_model_order(expected)).item() for name, actual in gradients.items()}


def flops(side, batch, device):
    """Return the floating-point operations of convolutions and matrix products in a forward and a backward pass.

    This is the count of this project's network. The references take more: in upsampling, nine products per output
    instead of four.
    """
    with FlopCounterMode(display=False) as counter:
        timesteps = torch.zeros(len(batch), dtype=torch.long, device=device)
        side.diffusion.training_losses(side.model, batch.to(device), timesteps)["loss"].mean().backward()
    side.model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
