"""Time one training step of the diffusion model: forward, backward, AdamW, moving averages, logging.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py --reference ../guided-diffusion
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --reference diffusers
    python benchmarks/train_step.py --size 32m1224 --bench_batch_size 256 --compile_too True        # on a GPU

All sides take the same step on the same weights and batches. The loss and the gradients of all variants are compared
with the baseline's first. The share of the machine's matrix rate is that of a large product of bfloat16 matrices, in
the same run. diffusers knows one size for the heads of a network: beside it all have 64 channels.
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
    "32adm256": ((4, 32, 32), dict(num_channels=256, channel_mult="1,2,4", attention_resolutions="16,8")),
}


@dataclasses.dataclass
class StepConfig:
    SECTION = "benchmark"

    size: str = option("16m122", "latent grid and network", choices=tuple(SIZES))
    bench_batch_size: int = option(16, "latents in a step")
    compile_too: bool = option(False, "measure compiled networks as well")


@dataclasses.dataclass
class Side:
    """One of the things compared: how it takes a step, and what its loss is made of."""

    run_step: callable              # (batch [N x C x ...], {}) -> None
    model: torch.nn.Module
    diffusion: object               # what has training_losses
    autocast: torch.dtype | None = None
    in_its_order: callable = lambda network: network.parameters()   # weights of our network, as `model` lists its own


def main():
    (bench, against, config), device = common.configure(__doc__, common.ComparisonConfig, StepConfig)
    shape, flags = SIZES[config.size]
    if against.reference == DIFFUSERS:
        flags = {**flags, "num_head_channels": 64}
    model, _ = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
    weights = common.randomize_zero_parameters(model).state_dict()
    draw = torch.Generator().manual_seed(1)
    batch = torch.randn(config.bench_batch_size, *shape, generator=draw)

    with common.silent():
        def own(recompute_norms=False, **options):
            changed = {**flags, "recompute_norms": recompute_norms}
            return own_side(shape, changed, weights, len(batch), device, **options)

        sides = references(against.reference, shape, flags, model, len(batch), device)
        half = {"mixed_precision": True}
        sides |= {"float32": own(), "bfloat16": own(**half), "float32, recompute_norms": own(recompute_norms=True),
                  "bfloat16, recompute_norms": own(recompute_norms=True, **half)}
        if config.compile_too:
            sides[COMPILED] = own(compile=True, **half)
            begun = time.perf_counter()  # the compiler works in processes of its own
            sides[COMPILED].run_step(batch, {})
            first_step = time.perf_counter() - begun
        apart = compared_gradients(sides, batch, device)
        work = flops(sides["float32"], batch, device)
        steps = {name: lambda side=side: side.run_step(batch, {}) for name, side in sides.items()}
        product = common.matrix_product(device)
        times = common.time_interleaved({**steps, "product": product}, bench.repetitions, device)
        rate = product.flops / statistics.median(times.pop("product"))
        if against.profile:
            common.print_operators(steps, device)
    rows = common.speedup_table(times, next(iter(sides)))
    settings = {"size": config.size, "batch_size": config.bench_batch_size, "baseline": next(iter(sides)),
                "flops_of_a_step": work, "flops_per_second_of_a_product": rate}
    if config.compile_too:
        eager, compiled = (statistics.median(times[name]) for name in ("bfloat16", COMPILED))
        settings["compile_seconds"], gain = first_step, eager - compiled
        settings["steps_that_pay_it_back"] = first_step / gain if gain > 0 else None
        paid = f"{first_step / gain:,.0f} steps pay that back" if gain > 0 else "nothing pays that back"
        print(f"the first compiled step took {first_step:.0f} s; {paid}\n")
    for row in rows:
        row["gradients apart"] = f"{apart[row['variant']]:.1e}"
        row["of the matrix rate"] = f"{work / (row['ms'] / 1e3) / rate:.0%}"
        if device.type == "cuda":
            row["MiB beyond what stays"] = common.peak_of(steps[row["variant"]]) / 2**20
    common.report(f"train_step_{config.size}_{config.bench_batch_size}", rows, bench, device, **settings)


def own_side(shape, flags, weights, batch_size, device, **options):
    model, diffusion = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
    model.load_state_dict(weights)
    loop = TrainLoop(model=model.to(device), diffusion=diffusion, data=iter(()), batch_size=batch_size, lr=LR,
                     ema_rate=EMA_RATE, log_interval=10**9, save_interval=10**9, config=TrainConfig(**options))
    return Side(loop.run_step, loop.ddp_model, diffusion, loop.autocast_dtype)


def references(reference, shape, flags, model, batch_size, device):
    """Return {name: Side} of what --reference names, on the weights of `model`."""
    if not reference:
        return {}
    if reference == DIFFUSERS:
        return {f"{DIFFUSERS}, float32": diffusers_side(flags, model, device),
                f"{DIFFUSERS}, bfloat16": diffusers_side(flags, model, device, torch.bfloat16)}
    return {"guided-diffusion": reference_side(reference, shape, flags, model, batch_size, device)}


def reference_side(folder, shape, flags, model, batch_size, device):
    """Return the TrainLoop of guided-diffusion as a Side."""
    theirs = common.open_reference(folder)
    theirs.dist_util.dev = lambda: device
    known = theirs.script_util.model_and_diffusion_defaults()
    _, diffusion = theirs.script_util.create_model_and_diffusion(**{**known, "image_size": 64})
    widths = tuple(int(m) for m in flags["channel_mult"].split(","))
    at = tuple(shape[-1] // int(r) for r in flags["attention_resolutions"].split(","))
    network = theirs.unet.UNetModel(
        image_size=shape[-1], in_channels=shape[0], model_channels=flags["num_channels"], out_channels=shape[0],
        num_res_blocks=2, attention_resolutions=at, channel_mult=widths, num_heads=4, use_scale_shift_norm=True,
    ).to(device)
    network.load_state_dict(model.state_dict())
    theirs.logger.configure(dir=common.logger.get_dir(), format_strs=["csv"])
    loop = theirs.train_util.TrainLoop(
        model=network, diffusion=diffusion, data=iter(()), batch_size=batch_size, microbatch=-1, lr=LR,
        ema_rate=EMA_RATE, log_interval=10**9, save_interval=10**9, resume_checkpoint="",
    )
    return Side(loop.run_step, network, diffusion)


class EpsilonLoss:
    """The loss of diffusers' training examples: its scheduler's noise, its network's answer, their mean square."""

    def __init__(self, flags):
        self.scheduler = diffusers_export.create_scheduler(flags, pixels=False)

    def training_losses(self, network, x_start, t, noise):
        answer = network(self.scheduler.add_noise(x_start, noise, t), t).sample
        return {"loss": F.mse_loss(answer.float(), noise, reduction="none").mean(dim=(1, 2, 3))}


def diffusers_side(flags, model, device, autocast=None):
    """Return our network as a UNet2DModel that is trained the way of diffusers' examples: AdamW and its EMAModel."""
    from diffusers.training_utils import EMAModel

    flags = as_dict(ModelConfig(**flags))
    network = diffusers_export.unet_to_diffusers(model, flags).to(device).train()
    loss = EpsilonLoss(as_dict(DiffusionConfig()))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    average = EMAModel(network.parameters(), decay=float(EMA_RATE))

    def run_step(batch, _):
        x = batch.to(device)
        t = torch.randint(loss.scheduler.config.num_train_timesteps, (len(x),), device=device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss.training_losses(network, x, t, torch.randn_like(x))["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    names = [name for name, _ in network.named_parameters()]
    return Side(run_step, network, loss, autocast,
                lambda ours: map(diffusers_export.unet_state(ours, flags["num_res_blocks"]).get, names))


def compared_gradients(sides, batch, device):
    """Return {name: how far the gradients are from our float32's, relative, over all weights}; print the losses.

    All sides see the same times and noise.
    """
    times = torch.arange(len(batch), device=device) * 1000 // len(batch)
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(2)).to(device)
    losses, gradients = {}, {}
    for name, side in sides.items():
        with torch.autocast(device.type, side.autocast, enabled=side.autocast is not None):
            loss = side.diffusion.training_losses(side.model, batch.to(device), times, noise=noise)["loss"].mean()
        loss.backward()
        losses[name], gradients[name] = loss.item(), [p.grad for p in side.model.parameters()]
        side.model.zero_grad(set_to_none=True)
    print("; ".join(f"{name}: loss {loss:.6f}" for name, loss in losses.items()) + "\n", flush=True)
    wanted = copy.deepcopy(sides["float32"].model)  # with its gradients for weights, which each side lists in its order
    with torch.no_grad():
        for p, gradient in zip(wanted.parameters(), gradients["float32"]):
            p.copy_(gradient)
    norm = sum(p.double().square().sum() for p in wanted.parameters()).sqrt()
    far = lambda found, wanted: sum((a.flatten().double() - b.flatten().double()).square().sum()
                                    for a, b in zip(found, wanted, strict=True)).sqrt() / norm
    return {name: far(found, sides[name].in_its_order(wanted)).item() for name, found in gradients.items()}


def flops(side, batch, device):
    """Return the floating-point operations of convolutions and products in a forward and a backward pass.

    Of this project's network: the others' do more, nine products an output where grids are enlarged for four.
    """
    with FlopCounterMode(display=False) as counter:
        times = torch.zeros(len(batch), dtype=torch.long, device=device)
        side.diffusion.training_losses(side.model, batch.to(device), times)["loss"].mean().backward()
    side.model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
