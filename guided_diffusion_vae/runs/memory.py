"""Estimate the memory of training, encoding and decoding without allocating it.

The real code runs on fake tensors, which have shapes and storages but no data, while the lifetime of every storage is
tracked. The peak of their sum is exact for the allocations of PyTorch; memory that libraries allocate themselves (a
CUDA context, workspaces of convolutions) is not included.
"""

import collections
import contextlib
import weakref
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import KEEPS_FREED_MEMORY, nn as nn_util

GIB = 2**30
# In addition to allocations: a CUDA context with its kernels, and fragmentation of the memory that the allocator holds.
CONTEXT_BYTES, FRAGMENTATION = 0.6 * GIB, 1.05
# On CPUs: a process that has imported the package, and the largest measured ratio of further resident memory to the
# allocations of PyTorch, with freed memory kept by glibc (see docs/results.md) and returned. Libraries take the rest.
PROCESS_BYTES, RESIDENT_RATIO = 0.25 * GIB, 2.6 if KEEPS_FREED_MEMORY else 1.5
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.04}     # of state per parameter; 8-bit state has scales per block


@dataclass
class Estimate:
    """Memory of a piece of work in bytes."""

    parameters: int
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    copies: int = 0             # weights in half precision, if `parameters` are float32 master weights
    activations: int = 0        # saved for backward, inputs included
    workspace: int = 0          # all other tensors at the peak of a step
    preview: int = 0            # tensors at the peak of a preview, among them a copy of the weights
    codec: int = 0              # weights of the autoencoder that makes latents
    layers: dict = field(default_factory=dict)      # activations by layer

    @property
    def peak(self) -> int:
        """The peak of PyTorch's allocations, in a step or in a preview."""
        return (self.parameters + self.gradients + self.optimizer + self.averages + self.copies + self.codec
                + max(self.activations + self.workspace, self.preview))

    @property
    def required(self) -> float:
        """Memory that a device must have: the peak, fragmentation and a CUDA context."""
        return self.peak * FRAGMENTATION + CONTEXT_BYTES

    @property
    def resident(self) -> float:
        """Upper bound of the resident memory on a CPU."""
        return PROCESS_BYTES + RESIDENT_RATIO * self.peak

    def fits(self, budget_bytes: float, device_type: str = "cuda") -> bool:
        """Return whether a device with this much memory is enough."""
        return self.required_on(device_type) <= budget_bytes

    def required_on(self, device_type: str) -> float:
        """Return `required` for a GPU, `resident` for a CPU."""
        return self.resident if device_type == "cpu" else self.required

    def summary(self) -> str:
        """Return the parts of the memory of training as text."""
        mib = lambda size: f"{size / 2**20:.1f}"
        preview = f", or {mib(self.preview)} of a preview" if self.preview > self.activations + self.workspace else ""
        codec = f", {mib(self.codec)} of the autoencoder" if self.codec else ""
        return (
            f"{self.parameters / 4e6:.2f} M parameters; {mib(self.parameters + self.copies)} MiB of weights, "
            f"{mib(self.gradients)} of gradients, {mib(self.optimizer)} of AdamW, {mib(self.averages)} of EMA weights, "
            f"{mib(self.activations)} of activations with {mib(self.workspace)} of workspace at the peak{preview}"
            f"{codec}: {self.peak / GIB:.2f} GiB, {self.required / GIB:.2f} with the overhead of a GPU, up to "
            f"{self.resident / GIB:.2f} resident on a CPU"
        )


class _StorageTracker(TorchDispatchMode):
    """Track the bytes of all storages created inside during their lifetime, by layer of the first network.

    `at_backward` is {layer: bytes} of the storages alive at the start of the first backward pass, with "" for storages
    created outside of the network.
    """

    def __init__(self, *networks):
        super().__init__()
        self.now = self.peak = 0
        self.at_backward = None
        weights = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
        self._before = {tensor.untyped_storage()._cdata for tensor in weights}
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
        self._path.pop()    # must return None: any other value would replace the layer's result

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
    """Create fake tensors inside; with `amp` (a dtype) compute like CUDA's autocast to it."""
    with FakeTensorMode(allow_non_fake_inputs=True), _like_cuda(amp):
        yield


@contextlib.contextmanager
def _like_cuda(amp):
    """Run the CPU's autocast to `amp`, unless that is None, with norms in float32 as in CUDA's autocast.

    Norms are patched instead of intercepted by a mode, because the backward pass recomputes outside of modes.
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


def _with_fake_parameters(network):
    """Put fake parameters and buffers into a network (inside `_fake`) and return it."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    return network


def saved_activations(network, forward, amp=None) -> dict[str, int]:
    """Return {layer: bytes} of the storages that forward(network) saves for backward.

    The network's parameters are replaced by fake ones; it cannot be used afterwards.
    """
    with _fake(amp), _StorageTracker(_with_fake_parameters(network)) as tracker:
        result = forward(network)   # holds the graph
    del result
    return tracker.at_backward


def estimate_training(
    networks, step, optimizer: str = "adamw", averages: int = 1, amp=None, preview=None, codec: int = 0
) -> Estimate:
    """Return the `Estimate` of a training step.

    :param networks: the trained networks, which cannot be used afterwards.
    :param step: a function of the (fake) networks that computes losses and calls `backward` as training does.
    :param averages: number of EMA copies of the first network.
    :param amp: dtype of autocast, None without.
    :param preview: a function of the first network that computes what a preview does; None: no previews.
    :param codec: bytes of the autoencoder that makes latents.
    """
    count = [sum(p.numel() for p in network.parameters()) for network in networks]
    half = any(p.dtype is torch.float16 for network in networks for p in network.parameters())
    copies = half * sum(p.nbytes for network in networks for p in network.parameters())
    with _fake(amp):
        for network in networks:
            _with_fake_parameters(network)
        with _StorageTracker(*networks) as tracker:
            step(*networks)
        weights = [p for network in networks for p in network.parameters()]
        gradients = sum(p.grad.untyped_storage().nbytes() for p in weights if p.grad is not None)
        previewed = _preview_bytes(networks[0], preview) if preview else 0
    activations = sum(tracker.at_backward.values())
    return Estimate(
        parameters=4 * sum(count), gradients=gradients, optimizer=round(OPTIMIZER_BYTES[optimizer] * sum(count)),
        averages=4 * averages * count[0], copies=copies, activations=activations, layers=tracker.at_backward,
        preview=previewed, codec=codec,
        # Master weights get separate gradients, after the backward pass.
        workspace=max(tracker.peak - gradients - activations, half * 4 * sum(count) - activations, 0),
    )


def _preview_bytes(network, preview):
    """Return the bytes of a preview: its tensors, and the weights of training while the EMA weights are in place."""
    network.eval()
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _StorageTracker(network) as tracker:
        preview(network)
    return tracker.peak + sum(p.nbytes for p in network.parameters())


def estimate_inference(network, forward, amp=None) -> Estimate:
    """Return the `Estimate` of forward(network) without gradients; the network cannot be used afterwards."""
    count = sum(p.numel() for p in network.parameters())
    with _fake(amp), torch.no_grad(), _StorageTracker(_with_fake_parameters(network)) as tracker:
        forward(network)
    return Estimate(parameters=4 * count, workspace=tracker.peak)
