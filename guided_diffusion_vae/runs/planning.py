"""Plan the memory of a training run, and find what fits a device."""

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..autoencoder import AutoencoderConfig, create_autoencoder, format_strides, per_level, total_factors
from ..config import option, resolve
from ..data import DataConfig, open_folder
from ..nn import per_axis
from ..train_util import AMP_DTYPES, AutoencoderTrainConfig, decays
from ..vae import (
    AutoencoderLossConfig, DiscriminatorConfig, PerceptualConfig, autoencoder_losses, create_discriminator,
    discriminator_losses, generator_losses,
)
from .factories import create_model_and_diffusion_vae, create_diffusion
from .memory import GIB, estimate_inference, estimate_training

LAYERS_SHOWN = 10


@dataclass(frozen=True)
class Plan:
    """What decides how much memory training takes. `shape` is (C, ...) of what the network is trained on.

    `network` and `train` are the configs that hold the flags which `memory_savings` changes.
    """

    shape: tuple
    network: object
    train: object

    CHECKPOINTING = ""      # the flag of `network` that recomputes whole blocks

    def with_flags(self, **changes):
        """Return a plan with other values of the flags `changes`, whichever config has them."""
        network = {name: value for name, value in changes.items() if hasattr(self.network, name)}
        train = {name: value for name, value in changes.items() if name not in network}
        return replace(self, network=replace(self.network, **network), train=replace(self.train, **train))

    def training(self):
        """Return the `Estimate` of a training step."""
        with torch.device("meta"):
            networks = self.build()
        averages = len(decays.parse(self.train.ema_rate, "ema_rate"))
        return estimate_training(networks, self.step, self.train.optimizer, averages, self.amp)

    @property
    def amp(self):
        """What autocast computes in, or None."""
        return AMP_DTYPES[self.train.amp_dtype] if self.train.mixed_precision else None

    @property
    def forward_size(self):
        """The number of samples in a forward pass."""
        return min(self.train.batch_size, self.train.microbatch if self.train.microbatch > 0 else self.train.batch_size)

    def smaller_networks(self):
        """Yield (what is changed, its flags) where another network is the last resort."""
        return iter(())


@dataclass(frozen=True)
class DiffusionPlan(Plan):
    """A UNet of x0 of `shape`; `process` is its DiffusionConfig, `super_res` and `low_res_shape` are an upsampler's."""

    process: object = None
    super_res: object = None
    low_res_shape: tuple = None

    CHECKPOINTING = "use_checkpoint"

    def build(self):
        model, _ = create_model_and_diffusion_vae(self.shape, self.network, self.process, self.super_res)
        if self.network.use_fp16:
            model.convert_to_fp16()
        return [model]

    def step(self, model):
        """Compute as `DiffusionObjective` does."""
        n = self.forward_size
        times = torch.zeros(n, dtype=torch.long)
        told = {"y": times} if self.network.class_cond else {}
        if self.super_res:
            told["low_res"] = torch.empty(n, *self.low_res_shape)
        diffusion = create_diffusion(self.process)
        x0 = torch.empty(n, *self.shape)
        losses = diffusion.training_losses(model, x0, times, model_kwargs=told, noise=torch.empty_like(x0))
        losses["loss"].mean().backward()


@dataclass(frozen=True)
class AutoencoderPlan(Plan):
    """An autoencoder of pictures or volumes of `shape`, with its loss and DiscriminatorConfig."""

    loss: object = None
    discriminator_config: object = None

    CHECKPOINTING = "use_checkpointing"

    def __post_init__(self):
        network, _ = resolve(self.network, self.train)
        network = replace(network, in_channels=self.shape[0], spatial_dims=len(self.shape) - 1)
        object.__setattr__(self, "network", network)
        object.__setattr__(self, "train", replace(self.train, use_gradient_checkpointing=False))

    def build(self):
        networks = [create_autoencoder(self.network)]
        if self.discriminator_config.discriminator_weight:
            networks.append(create_discriminator(self.discriminator_config, self.network.spatial_dims, self.shape[0]))
        return networks

    def step(self, network, judge=None):
        """Compute as `AutoencoderObjective` and `DiscriminatorTrainer` do, with the discriminator heeded."""
        kind = self.discriminator_config.discriminator_loss
        x = torch.empty(self.forward_size, *self.shape)
        reconstruction, mean, sigma = network(x, torch.empty(len(x), *network.latent_shape(x.shape[2:])))
        losses = autoencoder_losses(self.loss, x, reconstruction, mean, 2 * sigma.float().log())["loss"]
        if judge is not None:
            judge.requires_grad_(False)
            losses = losses + generator_losses(kind, judge(reconstruction).float())
            judge.requires_grad_(True)
        fake = reconstruction.detach()
        del reconstruction, mean, sigma
        losses.mean().backward()
        if judge is not None:
            judged = judge(torch.cat([x, fake])).float().chunk(2)
            discriminator_losses(kind, *judged).mean().backward()

    def encoding(self, dtype=torch.float32):
        """Return the `Estimate` of encoding a batch in one piece, as with `--vae_dtype` of that name."""
        return self._without_gradients(lambda network, n: network.moments(torch.empty(n, *self.shape)), dtype)

    def decoding(self, dtype=torch.float32):
        """Return the `Estimate` of decoding a batch in one piece, as with `--vae_dtype` of that name."""
        decode = lambda network, n: network.decode(torch.empty(n, *network.latent_shape(self.shape[1:])))
        return self._without_gradients(decode, dtype)

    def _without_gradients(self, compute, dtype):
        with torch.device("meta"):
            network = create_autoencoder(self.network).eval()
        amp = None if dtype is torch.float32 else dtype
        return estimate_inference(network, lambda network: compute(network, self.forward_size), amp)

    def smaller_networks(self):
        """Yield the same latent from a first level of half the size, then a smaller latent."""
        dims = self.network.spatial_dims
        first = per_axis(self.network.initial_downsample_factor, dims)
        factors = per_level(self.network.downsample_factors or 2, len(per_level(self.network.num_channels, 1)) - 1)
        factors = [per_axis(factor, dims) for factor in factors]
        doubled = tuple(2 * factor for factor in first)
        for i, factor in enumerate(factors):
            if all(f % 2 == 0 for f in factor):
                halved = (*factors[:i], tuple(f // 2 for f in factor), *factors[i + 1:])
                yield "a latent of the same size", {"initial_downsample_factor": doubled, "downsample_factors": halved,
                                                    "final_upsample": "shuffle"}
                break
        between = {"downsample_factors": tuple(factors)} if factors else {}
        yield "a latent half as large along every axis", {
            "initial_downsample_factor": doubled, **between, "final_upsample": "shuffle"
        }


class MemorySaving(NamedTuple):
    """A plan that takes less memory: `flags` is all that differs from what was configured, `latest` what was added."""

    flags: dict
    latest: dict
    note: str
    plan: Plan

    def __str__(self):
        return _flags(self.flags, self.note) or "as configured"


def memory_savings(plan):
    """Yield `MemorySaving`s from the least to the most that is given up for memory, each with all before it.

    The first is the plan itself, then comes what changes no number but by rounding, then what costs time, last another
    network. A compiled network decides itself what to compute again.
    """
    flags = {}

    def change(note="", **changes):
        nonlocal plan
        plan = plan.with_flags(**changes)
        flags.update(changes)
        return MemorySaving(dict(flags), changes, note, plan)

    yield change()
    if not plan.train.mixed_precision and not getattr(plan.network, "use_fp16", False):
        yield change(mixed_precision=True)
    if not plan.network.recompute_norms and not plan.train.compile:
        yield change(recompute_norms=True)
    while plan.forward_size > 1:
        yield change(**_smaller_forward(plan))
    if not getattr(plan.network, plan.CHECKPOINTING):
        yield change(**{plan.CHECKPOINTING: True})
    if plan.train.optimizer != "adamw8bit":
        yield change(optimizer="adamw8bit")
    for note, changes in plan.smaller_networks():
        yield change(note, **changes)


def estimated(plan):
    """Yield (`MemorySaving`, its `Estimate`), but for strides that do not divide the size."""
    for saving in memory_savings(plan):
        try:
            yield saving, saving.plan.training()
        except ValueError:
            continue


def advice(plan, budget_bytes):
    """Return in words what the first of `memory_savings` is that fits a device with so much memory."""
    configured, have = None, f"{budget_bytes / GIB:.1f} GiB"
    for saving, estimate in estimated(plan):
        configured = configured or estimate
        if saving.flags and estimate.fits(budget_bytes):
            return (f"training takes about {configured.required / GIB:.1f} GiB as configured; of {have}, {saving} would "
                    f"take {estimate.required / GIB:.1f} (scripts/plan_memory.py plans ahead)")
    return f"no saving brings this configuration below {have}: train on smaller pictures, or on patches"


def report_autoencoder(run):
    """Yield the lines of `report` for the autoencoder that the configs of a run describe.

    The channels follow from flags, else from the data, else there is one.
    """
    data, config, wanted = run[DataConfig], run[AutoencoderConfig], run[PlanConfig]
    channels = config.in_channels or data.image_channels or (open_folder(data).shape[0] if data.data_dir else 1)
    sides = data.sides
    if data.pad:
        sides = [-(-n // factor) * factor for n, factor in zip(sides, total_factors(config, len(sides)))]
    plan = AutoencoderPlan((channels, *sides), config, run[AutoencoderTrainConfig], run[AutoencoderLossConfig],
                           run[DiscriminatorConfig])
    if run[PerceptualConfig].use_perceptual_loss:
        yield "the perceptual loss is not counted: its backbone takes additional memory"
    yield from report(plan, _numbers(wanted.plan_batch_sizes, int), _numbers(wanted.budget_gb, float))


def _numbers(text, kind):
    try:
        numbers = [kind(number) for number in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) <= 0:
        raise ValueError(f"{text!r} is not a list of numbers above 0; --budget_gb and --plan_batch_sizes expect e.g. 12,24")
    return numbers


def report(plan, batch_sizes, budgets):
    """Yield lines that say what an `AutoencoderPlan` takes: parts, layers, batch sizes, and what fits the budgets."""
    with torch.device("meta"):
        network = create_autoencoder(plan.network)
    latent = network.latent_shape(plan.shape[1:])
    by = lambda shape: "x".join(map(str, shape))
    values, kept = math.prod(plan.shape), math.prod(latent)
    yield (f"{format_strides(network)}: {by(plan.shape)} ({4 * values / 2**20:.2f} MiB) -> {by(latent)} "
           f"({4 * kept / 2**20:.2f} MiB), one latent number for {values / kept:.1f} values")
    estimate = plan.training()
    yield f"training, {plan.forward_size} in a forward pass: {estimate.summary()}"
    yield "\nkept for the backward pass, by the layer that makes it:"
    most = sorted(estimate.layers.items(), key=lambda entry: -entry[1])
    rest = (f"{len(most) - LAYERS_SHOWN} more layers", sum(size for _, size in most[LAYERS_SHOWN:]))
    for name, size in most[:LAYERS_SHOWN] + [rest] * (len(most) > LAYERS_SHOWN):
        yield f"{size / 2**20:12.1f} MiB  {name or 'the batch and its losses'}"

    yield "\nGiB that training needs with one thing changed:"
    for changes, note in _alternatives(plan):
        try:
            yield f"{plan.with_flags(**changes).training().required / GIB:9.2f}  {_flags(changes, note)}"
        except ValueError:  # strides that do not divide the size
            continue

    heads = "".join(f"{n:>9}" for n in batch_sizes)
    one_pass = {"microbatch": -1, "gradient_accumulation_steps": 1}
    yield "\nGiB that encoding and decoding need, by the samples at once, in one piece (--vae_tile takes less):"
    yield heads
    for name in ("encoding", "decoding"):
        for dtype in ("float32", "bfloat16"):
            plans = (plan.with_flags(batch_size=n, **one_pass) for n in batch_sizes)
            needed = (getattr(of, name)(getattr(torch, dtype)).required / GIB for of in plans)
            yield "".join(f"{size:9.2f}" for size in needed) + f"  {name}, --vae_dtype {dtype}"

    yield "\nGiB that training needs, by the samples in a forward pass; each line has all savings above it, too:"
    yield heads
    for saving in memory_savings(plan.with_flags(batch_size=1, **one_pass)):
        what = _flags(saving.latest, saving.note) or "as configured"
        try:
            needed = [saving.plan.with_flags(batch_size=n).training().required / GIB for n in batch_sizes]
            yield "".join(f"{size:9.2f}" for size in needed) + f"  {what}"
        except ValueError as error:
            yield f"{what}: {error}"

    yield ""
    choices = list(estimated(plan))
    for budget in budgets:
        fitting = (f"{saving} ({estimate.required / GIB:.2f} GiB)" for saving, estimate in choices
                   if estimate.fits(budget * GIB))
        yield f"least lossy within {budget:g} GiB: {next(fitting, 'nothing fits')}"


def _alternatives(plan):
    """Yield (flags, note) of every saving for itself; those that are there already are turned off."""
    yield {"mixed_precision": not plan.train.mixed_precision}, ""
    if not plan.train.compile:
        yield {"recompute_norms": not plan.network.recompute_norms}, ""
    yield {plan.CHECKPOINTING: not getattr(plan.network, plan.CHECKPOINTING)}, ""
    yield {"optimizer": "adamw" if plan.train.optimizer == "adamw8bit" else "adamw8bit"}, ""
    if plan.forward_size > 1:
        yield _smaller_forward(plan), ""
    for note, changes in plan.smaller_networks():
        yield changes, note


def _smaller_forward(plan):
    """Return the flags that divide the forward pass by its smallest prime, so that a step stays of as many samples."""
    parts = next(n for n in range(2, plan.forward_size + 1) if plan.forward_size % n == 0)
    if plan.train.microbatch > 0:
        return {"microbatch": plan.forward_size // parts}
    return {"batch_size": plan.train.batch_size // parts,
            "gradient_accumulation_steps": plan.train.gradient_accumulation_steps * parts}


def _flags(flags, note=""):
    return " ".join(f"--{name} {_text(value)}" for name, value in flags.items()) + (f" ({note})" if note else "")


def _text(value):
    """Write a flag's value as on the command line, one number where all axes agree."""
    if not isinstance(value, tuple):
        return str(value)
    if isinstance(value[0], tuple):
        return "[" + ",".join(_text(v) if len(set(v)) == 1 else f"[{_text(v)}]" for v in value) + "]"
    return str(value[0]) if len(set(value)) == 1 else ",".join(map(str, value))


@dataclasses.dataclass
class PlanConfig:
    budget_gb: str = option("12,24,32,40", "memory of the devices to plan for, in GiB, with commas between")
    plan_batch_sizes: str = option("1,2,4,8", "samples in a forward pass to plan for, with commas between")
