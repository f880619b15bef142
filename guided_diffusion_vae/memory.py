"""Say how much memory training, encoding and decoding will take, before any of it is taken.

The real code runs on fake tensors, which have shapes and storages but no bytes, while every storage's birth and end are
counted. So the largest sum of what is alive at a time is exact for what PyTorch allocates; what libraries take for
themselves beside (a CUDA context, workspaces of convolutions) is not in it.
"""

import collections
import contextlib
import math
import weakref
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .autoencoder import autoencoder_losses, create_autoencoder, per_level, strides_in_words
from .config import as_dict
from .discriminator import create_discriminator, discriminator_losses, generator_losses
from . import nn as nn_util
from .nn import per_axis
from .script_util import create_model_and_diffusion_vae, create_process
from .train_util import AMP_DTYPES

GIB = 2**30
# Beside what is allocated: a CUDA context with its kernels, and what the allocator cannot use of what it holds.
CONTEXT_BYTES, FRAGMENTATION = 0.6 * GIB, 1.05
LAYERS_SHOWN = 10
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.04}     # of state per parameter; 8 bits come with scales per block


@dataclass
class Estimate:
    """Bytes that a piece of work takes."""

    parameters: int
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    copies: int = 0             # weights in half precision, where `parameters` are their float32 masters
    activations: int = 0        # kept for the backward pass, inputs included
    workspace: int = 0          # what comes on top at the moment of the peak
    layers: dict = field(default_factory=dict)      # activations by the layer that made them

    @property
    def peak(self):
        """What PyTorch has allocated at the moment of the peak."""
        return (self.parameters + self.gradients + self.optimizer + self.averages + self.copies + self.activations
                + self.workspace)

    @property
    def needed(self):
        """What a device must have: the peak, and what lies beside it on a GPU."""
        return self.peak * FRAGMENTATION + CONTEXT_BYTES

    def fits(self, budget_bytes):
        """Say whether it runs on a device with so much memory."""
        return self.needed <= budget_bytes

    def summary(self):
        """Return the parts of training in words."""
        mib = lambda size: f"{size / 2**20:.1f}"
        return (
            f"{self.parameters / 4e6:.2f} M parameters; {mib(self.parameters + self.copies)} MiB of weights, "
            f"{mib(self.gradients)} of gradients, {mib(self.optimizer)} of AdamW, {mib(self.averages)} of averages, "
            f"{mib(self.activations)} of activations, {mib(self.workspace)} of workspace at the peak: "
            f"{self.peak / GIB:.2f} GiB, {self.needed / GIB:.2f} with what a GPU needs besides"
        )


# ---------------------------------------------------------------------------------------------------------------------
# counting


class _Living(TorchDispatchMode):
    """Count the bytes of all storages made inside, while they live; the first network tells which layer makes them.

    `at_backward` holds {layer: bytes} of what was alive when the first backward pass began, with "" for what is made
    outside of the network.
    """

    def __init__(self, *networks):
        super().__init__()
        self.now = self.peak = 0
        self.at_backward = None
        held = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
        self._before = {tensor.untyped_storage()._cdata for tensor in held}
        self._owner, self._sizes = {}, collections.Counter()
        self._path, self._handles = [""], []
        for name, module in networks[0].named_modules():
            self._handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._path.append(name)))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def __exit__(self, *raised):
        for handle in self._handles:
            handle.remove()
        if self.at_backward is None:
            self.at_backward = self._by_layer()
        return super().__exit__(*raised)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.at_backward is None and torch._C._current_graph_task_id() != -1:
            self.at_backward = self._by_layer()
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _leave(self, *_):
        self._path.pop()    # and return nothing, which would take the place of the layer's result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._owner and key not in self._before:
            self._owner[key] = self._path[-1]
            self._sizes[self._path[-1]] += size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self._sizes[self._owner.pop(key)] -= size
        self.now -= size

    def _by_layer(self):
        return {name: size for name, size in self._sizes.items() if size}


@contextlib.contextmanager
def _fake(amp=None):
    """Make tensors fake inside; with `amp` (a dtype) compute in it as CUDA's autocast would."""
    with FakeTensorMode(allow_non_fake_inputs=True), _like_cuda(amp):
        yield


@contextlib.contextmanager
def _like_cuda(amp):
    """Run the CPU's autocast to `amp`, if that is a dtype, with norms in float32 as CUDA's has them.

    Norms are changed for good and not by a mode, because what is computed again in the backward pass is computed
    outside of modes.
    """
    if amp is None:
        yield
        return
    group_norm, fast = F.group_norm, nn_util.NORMS_ADD_IN_FLOAT32
    F.group_norm = lambda x, *args, **kwargs: group_norm(x.float(), *args, **kwargs)
    nn_util.NORMS_ADD_IN_FLOAT32 = set()
    try:
        with torch.autocast("cpu", amp):
            yield
    finally:
        F.group_norm, nn_util.NORMS_ADD_IN_FLOAT32 = group_norm, fast


def _emptied(network):
    """Put fake parameters and buffers into a network (inside `_fake`) and return it."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    return network


def saved_activations(network, forward, amp=None):
    """Return {layer: bytes} of what is alive after forward(network) and was not before: what the backward pass needs.

    The network's parameters are replaced by fake ones; it is of no use afterwards.
    """
    with _fake(amp), _Living(_emptied(network)) as living:
        result = forward(network)   # which keeps the graph alive
    del result
    return living.at_backward


def estimate_training(networks, step, optimizer="adamw", averages=1, amp=None):
    """Return the `Estimate` of a training step.

    :param networks: the networks that learn, the first one with its moving averages; of no use afterwards.
    :param step: a function of the (fake) networks that computes and calls `backward` as training does.
    """
    count = [sum(p.numel() for p in network.parameters()) for network in networks]
    half = any(p.dtype is torch.float16 for network in networks for p in network.parameters())
    copies = half * sum(p.nbytes for network in networks for p in network.parameters())
    with _fake(amp):
        for network in networks:
            _emptied(network)
        with _Living(*networks) as living:
            step(*networks)
        weights = [p for network in networks for p in network.parameters()]
        gradients = sum(p.grad.untyped_storage().nbytes() for p in weights if p.grad is not None)
    activations = sum(living.at_backward.values())
    return Estimate(
        parameters=4 * sum(count), gradients=gradients, optimizer=round(OPTIMIZER_BYTES[optimizer] * sum(count)),
        averages=4 * averages * count[0], copies=copies, activations=activations, layers=living.at_backward,
        # Masters get gradients of their own, after the backward pass.
        workspace=max(living.peak - gradients - activations, half * 4 * sum(count) - activations, 0),
    )


def estimate_inference(network, forward, amp=None):
    """Return the `Estimate` of forward(network) without gradients; the network is of no use afterwards."""
    count = sum(p.numel() for p in network.parameters())
    with _fake(amp), torch.no_grad(), _Living(_emptied(network)) as living:
        forward(network)
    return Estimate(parameters=4 * count, workspace=living.peak)


# ---------------------------------------------------------------------------------------------------------------------
# plans


@dataclass(frozen=True)
class Plan:
    """What decides how much memory training takes. `shape` is (C, ...) of what the network is trained on.

    `network` and `train` are the configs that hold the flags which `savings` changes.
    """

    shape: tuple
    network: object
    train: object

    CHECKPOINTING = ""      # the flag of `network` that recomputes whole blocks

    def changed(self, **changes):
        """Return a plan with other values of the flags `changes`, whichever config has them."""
        network = {name: value for name, value in changes.items() if hasattr(self.network, name)}
        train = {name: value for name, value in changes.items() if name not in network}
        return replace(self, network=replace(self.network, **network), train=replace(self.train, **train))

    def training(self):
        """Return the `Estimate` of a training step."""
        with torch.device("meta"):
            networks = self.build()
        averages = len([rate for rate in str(self.train.ema_rate).split(",") if rate])
        return estimate_training(networks, self.step, self.train.optimizer, averages, self.amp)

    @property
    def amp(self):
        """What autocast computes in, or None."""
        return AMP_DTYPES[self.train.amp_dtype] if self.train.mixed_precision else None

    @property
    def forward_size(self):
        """The number of samples in a forward pass."""
        return min(self.train.batch_size, self.train.microbatch if self.train.microbatch > 0 else self.train.batch_size)

    def smaller(self):
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
        diffusion = create_process(**as_dict(self.process))
        x0 = torch.empty(n, *self.shape)
        losses = diffusion.training_losses(model, x0, times, model_kwargs=told, noise=torch.empty_like(x0))
        losses["loss"].mean().backward()


@dataclass(frozen=True)
class AutoencoderPlan(Plan):
    """An autoencoder of pictures or volumes of `shape`, with its loss and DiscriminatorConfig."""

    loss: object = None
    rival: object = None

    CHECKPOINTING = "use_checkpointing"

    def __post_init__(self):
        checkpointing = self.network.use_checkpointing or self.train.use_gradient_checkpointing
        network = replace(self.network, in_channels=self.shape[0], spatial_dims=len(self.shape) - 1,
                          use_checkpointing=checkpointing)
        object.__setattr__(self, "network", network)
        object.__setattr__(self, "train", replace(self.train, use_gradient_checkpointing=False))

    def build(self):
        networks = [create_autoencoder(self.network)]
        if self.rival.discriminator_weight:
            networks.append(create_discriminator(self.rival, self.network.spatial_dims, self.shape[0]))
        return networks

    def step(self, network, judge=None):
        """Compute as `AutoencoderObjective` and `Adversary` do, with the discriminator heeded."""
        kind = self.rival.discriminator_loss
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

    def smaller(self):
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


class Saving(NamedTuple):
    """A plan that takes less memory: `flags` is all that differs from what was configured, `latest` what was added."""

    flags: dict
    latest: dict
    note: str
    plan: Plan

    def __str__(self):
        return _flags(self.flags, self.note) or "as configured"


def savings(plan):
    """Yield `Saving`s from the least to the most that is given up for memory, each with all before it.

    The first is the plan itself, then comes what changes no number but by rounding, then what costs time, last another
    network. A compiled network decides itself what to compute again.
    """
    flags = {}

    def change(note="", **changes):
        nonlocal plan
        plan = plan.changed(**changes)
        flags.update(changes)
        return Saving(dict(flags), changes, note, plan)

    yield change()
    if not plan.train.mixed_precision and not getattr(plan.network, "use_fp16", False):
        yield change(mixed_precision=True)
    if not plan.network.recompute_norms and not plan.train.compile:
        yield change(recompute_norms=True)
    while plan.forward_size > 1:
        yield change(**_in_parts(plan))
    if not getattr(plan.network, plan.CHECKPOINTING):
        yield change(**{plan.CHECKPOINTING: True})
    if plan.train.optimizer != "adamw8bit":
        yield change(optimizer="adamw8bit")
    for note, changes in plan.smaller():
        yield change(note, **changes)


def estimated(plan):
    """Yield (`Saving`, its `Estimate`), but for strides that do not divide the size."""
    for saving in savings(plan):
        try:
            yield saving, saving.plan.training()
        except ValueError:
            continue


def advice(plan, budget_bytes):
    """Return in words what the first of `savings` is that fits a device with so much memory."""
    configured, have = None, f"{budget_bytes / GIB:.1f} GiB"
    for saving, estimate in estimated(plan):
        configured = configured or estimate
        if saving.flags and estimate.fits(budget_bytes):
            return (f"training takes about {configured.needed / GIB:.1f} GiB as configured; of {have}, {saving} would "
                    f"take {estimate.needed / GIB:.1f} (scripts/plan_memory.py plans ahead)")
    return f"no saving brings this configuration below {have}: train on smaller pictures, or on patches"


def report(plan, batch_sizes, budgets):
    """Yield lines that say what an `AutoencoderPlan` takes: parts, layers, batch sizes, and what fits the budgets."""
    with torch.device("meta"):
        network = create_autoencoder(plan.network)
    latent = network.latent_shape(plan.shape[1:])
    by = lambda shape: "x".join(map(str, shape))
    values, kept = math.prod(plan.shape), math.prod(latent)
    yield (f"{strides_in_words(network)}: {by(plan.shape)} ({4 * values / 2**20:.2f} MiB) -> {by(latent)} "
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
            yield f"{plan.changed(**changes).training().needed / GIB:9.2f}  {_flags(changes, note)}"
        except ValueError:  # strides that do not divide the size
            continue

    heads = "".join(f"{n:>9}" for n in batch_sizes)
    one_pass = {"microbatch": -1, "gradient_accumulation_steps": 1}
    yield "\nGiB that encoding and decoding need, by the samples at once, in one piece (--vae_tile takes less):"
    yield heads
    for name in ("encoding", "decoding"):
        for dtype in ("float32", "bfloat16"):
            plans = (plan.changed(batch_size=n, **one_pass) for n in batch_sizes)
            needed = (getattr(of, name)(getattr(torch, dtype)).needed / GIB for of in plans)
            yield "".join(f"{size:9.2f}" for size in needed) + f"  {name}, --vae_dtype {dtype}"

    yield "\nGiB that training needs, by the samples in a forward pass; each line has all savings above it, too:"
    yield heads
    for saving in savings(plan.changed(batch_size=1, **one_pass)):
        what = _flags(saving.latest, saving.note) or "as configured"
        try:
            needed = [saving.plan.changed(batch_size=n).training().needed / GIB for n in batch_sizes]
            yield "".join(f"{size:9.2f}" for size in needed) + f"  {what}"
        except ValueError as error:
            yield f"{what}: {error}"

    yield ""
    choices = list(estimated(plan))
    for budget in budgets:
        fitting = (f"{saving} ({estimate.needed / GIB:.2f} GiB)" for saving, estimate in choices
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
        yield _in_parts(plan), ""
    for note, changes in plan.smaller():
        yield changes, note


def _in_parts(plan):
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
