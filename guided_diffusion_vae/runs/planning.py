"""Plan the memory of training: which flags make a configuration fit a device, and at what cost."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import torch

from ..config import CommaSeparated, option
from .memory import GIB, Estimate, estimate_training

LAYERS_SHOWN = 10
sizes = CommaSeparated("GiB", "comma-separated numbers > 0, such as 12,24", float, lambda all: all and min(all) > 0)
counts = CommaSeparated("counts", "comma-separated integers > 0, such as 1,2,4", int, lambda all: all and min(all) > 0)


@dataclass
class PlanConfig:
    budget_gb: Annotated[str, sizes] = option(
        "12,24,32,40", "comma-separated device memory sizes to plan for, in GiB", essential=True)
    plan_batch_sizes: Annotated[str, counts] = option(
        "1,2,4,8", "comma-separated numbers of samples per forward pass to plan for", essential=True)


@dataclass(frozen=True)
class Plan(ABC):
    """A training run whose memory is planned; subclasses (in `training`) build its networks and compute its step.

    `shape` is (C, ...) of the network's input, `network` and `train` are the configs whose flags `memory_savings`
    changes.
    """

    shape: tuple[int, ...]
    network: Any
    train: Any

    CHECKPOINTING = ""      # the flag of `network` that recomputes blocks
    half_precision = False  # weights are float16 already
    codec_bytes = 0         # of the autoencoder that makes latents

    @abstractmethod
    def build(self) -> list[torch.nn.Module]:
        """Return the networks, the trained one first."""

    @abstractmethod
    def step(self, *networks) -> None:
        """Compute losses and gradients of these networks."""

    @abstractmethod
    def preview(self, network) -> None:
        """Compute what a preview computes."""

    def with_flags(self, **changes) -> "Plan":
        """Return a plan with other values of the flags `changes`, whichever config has them."""
        network = {name: value for name, value in changes.items() if name in vars(self.network)}
        train = {name: value for name, value in changes.items() if name not in network}
        return replace(self, network=replace(self.network, **network), train=replace(self.train, **train))

    def training(self) -> Estimate:
        """Return the `Estimate` of a training step."""
        with torch.device("meta"):
            networks = self.build()
        return estimate_training(
            networks, self.step, self.train.optimizer, len(self.train.ema_rates) + len(self.train.ema_profile_stds),
            self.train.autocast_dtype, self.preview if self.has_previews else None, self.codec_bytes,
        )

    @property
    def has_previews(self) -> bool:
        """Whether previews are made."""
        return self.train.preview_interval >= 0

    @property
    def forward_size(self) -> int:
        """Samples per forward pass."""
        return min(self.train.batch_size, self.train.microbatch if self.train.microbatch > 0 else self.train.batch_size)

    def smaller_networks(self) -> Iterator[tuple[str, dict]]:
        """Yield (note, flags) of smaller networks, the last resort."""
        return iter(())


class MemorySaving(NamedTuple):
    """A plan that takes less memory: `flags` are all changes to the configuration, `latest` the one added last."""

    flags: dict
    latest: dict
    note: str
    plan: Plan

    def __str__(self):
        return _format_flags(self.flags, self.note)


def memory_savings(plan: Plan) -> Iterator[MemorySaving]:
    """Yield `MemorySaving`s, each including all before it, in the order of their cost.

    The first is the plan itself, followed by changes within rounding errors, by changes that cost time, and finally by
    smaller networks. Norms of compiled networks are left out: the compiler decides what to recompute.
    """
    flags = {}

    def change(note="", **changes):
        nonlocal plan
        plan = plan.with_flags(**changes)
        flags.update(changes)
        return MemorySaving(dict(flags), changes, note, plan)

    yield change()
    if not plan.train.mixed_precision and not plan.half_precision:
        yield change(mixed_precision=True)
    if not plan.network.recompute_norms and not plan.train.compile:
        yield change(recompute_norms=True)
    while plan.forward_size > 1:
        yield change(**_smaller_forward(plan))
    if not vars(plan.network)[plan.CHECKPOINTING]:
        yield change(**{plan.CHECKPOINTING: True})
    if plan.train.optimizer != "adamw8bit":
        yield change(optimizer="adamw8bit")
    for note, changes in plan.smaller_networks():
        yield change(note, **changes)


def estimated(plan: Plan) -> Iterator[tuple[MemorySaving, Estimate]]:
    """Yield (`MemorySaving`, its `Estimate`), skipping strides that do not divide the size."""
    for saving in memory_savings(plan):
        try:
            yield saving, saving.plan.training()
        except ValueError:
            continue


def advice(plan: Plan, budget_bytes: float, device_type: str = "cuda") -> str:
    """Return a sentence with the first of `memory_savings` that fits a device of this memory."""
    configured, budget = None, f"{budget_bytes / GIB:.1f} GiB"
    for saving, estimate in estimated(plan):
        required = estimate.required_on(device_type) / GIB
        configured = configured or required
        if saving.flags and estimate.fits(budget_bytes, device_type):
            return (f"training takes about {configured:.1f} GiB as configured; of {budget}, {saving} would take "
                    f"{required:.1f} (plan ahead with scripts/plan_memory.py)")
    return f"no flag brings this configuration below {budget}: train on smaller images, or on patches"


def report(plan, batch_sizes, budgets) -> Iterator[str]:
    """Yield lines about an `AutoencoderPlan`: parts, layers, batch sizes, and flags that fit the budgets."""
    yield plan.summary()
    estimate = plan.training()
    yield f"training, {plan.forward_size} per forward pass: {estimate.summary()}"
    yield "\nsaved for backward, by layer:"
    layers = sorted(estimate.layers.items(), key=lambda entry: -entry[1])
    rest = (f"{len(layers) - LAYERS_SHOWN} more layers", sum(size for _, size in layers[LAYERS_SHOWN:]))
    for name, size in layers[:LAYERS_SHOWN] + [rest] * (len(layers) > LAYERS_SHOWN):
        yield f"{size / 2**20:12.1f} MiB  {name or 'the batch and its losses'}"

    yield "\nGiB required for training with one change:"
    for changes, note in _alternatives(plan):
        try:
            yield f"{plan.with_flags(**changes).training().required / GIB:9.2f}  {_format_flags(changes, note)}"
        except ValueError:  # strides that do not divide the size
            continue

    heads = "".join(f"{n:>9}" for n in batch_sizes)
    columns = lambda estimates: "".join(f"{estimate.required / GIB:9.2f}" for estimate in estimates)
    single_pass = {"microbatch": -1, "gradient_accumulation_steps": 1}
    yield "\nGiB required for encoding and decoding, by samples at a time, untiled (--vae_tile takes less):"
    yield heads
    for name in ("encoding", "decoding"):
        for dtype in ("float32", "bfloat16"):
            plans = [plan.with_flags(batch_size=n, **single_pass) for n in batch_sizes]
            estimates = [p.inference(name, getattr(torch, dtype)) for p in plans]
            yield f"{columns(estimates)}  {name}, --vae_dtype {dtype}"

    yield "\nGiB required for training, by samples per forward pass; each line includes all changes above it:"
    yield heads
    for saving in memory_savings(plan.with_flags(batch_size=1, **single_pass)):
        change = _format_flags(saving.latest, saving.note)
        try:
            yield f"{columns([saving.plan.with_flags(batch_size=n).training() for n in batch_sizes])}  {change}"
        except ValueError as error:
            yield f"{change}: {error}"

    yield ""
    choices = list(estimated(plan))
    for budget in budgets:
        fitting = (f"{saving} ({estimate.required / GIB:.2f} GiB)" for saving, estimate in choices
                   if estimate.fits(budget * GIB))
        yield f"least lossy within {budget:g} GiB: {next(fitting, 'none')}"


def _alternatives(plan):
    """Yield (flags, note) of every single saving; those in use are turned off instead."""
    yield {"mixed_precision": not plan.train.mixed_precision}, ""
    if not plan.train.compile:
        yield {"recompute_norms": not plan.network.recompute_norms}, ""
    yield {plan.CHECKPOINTING: not vars(plan.network)[plan.CHECKPOINTING]}, ""
    yield {"optimizer": "adamw" if plan.train.optimizer == "adamw8bit" else "adamw8bit"}, ""
    if plan.forward_size > 1:
        yield _smaller_forward(plan), ""
    for note, changes in plan.smaller_networks():
        yield changes, note


def _smaller_forward(plan):
    """Return the flags that divide the forward pass by its lowest prime factor and keep the samples per step."""
    parts = next(n for n in range(2, plan.forward_size + 1) if plan.forward_size % n == 0)
    if plan.train.microbatch > 0:
        return {"microbatch": plan.forward_size // parts}
    return {"batch_size": plan.train.batch_size // parts,
            "gradient_accumulation_steps": plan.train.gradient_accumulation_steps * parts}


def _format_flags(flags, note=""):
    text = " ".join(f"--{name} {_format_value(value)}" for name, value in flags.items()) or "as configured"
    return text + (f" ({note})" if note else "")


def _format_value(value):
    """Return a flag's value as on the command line, one number if all axes agree."""
    if not isinstance(value, tuple):
        return str(value)
    if isinstance(value[0], tuple):
        return "[" + ",".join(_format_value(v) if len(set(v)) == 1 else f"[{_format_value(v)}]" for v in value) + "]"
    return str(value[0]) if len(set(value)) == 1 else ",".join(map(str, value))
