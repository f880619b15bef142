"""Say how much memory training, encoding and decoding will take, before any of it is taken.

The real code runs on fake tensors, which have shapes and storages but no bytes, while every storage's birth and end are
counted. So the largest sum of what is alive at a time is exact for what PyTorch allocates; what libraries take for
themselves beside (a CUDA context, workspaces of convolutions) is not in it.
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

from .. import nn as nn_util

GIB = 2**30
# Beside what is allocated: a CUDA context with its kernels, and what the allocator cannot use of what it holds.
CONTEXT_BYTES, FRAGMENTATION = 0.6 * GIB, 1.05


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
    def required(self):
        """What a device must have: the peak, and what lies beside it on a GPU."""
        return self.peak * FRAGMENTATION + CONTEXT_BYTES

    def fits(self, budget_bytes):
        """Say whether it runs on a device with so much memory."""
        return self.required <= budget_bytes

    def summary(self):
        """Return the parts of training in words."""
        mib = lambda size: f"{size / 2**20:.1f}"
        return (
            f"{self.parameters / 4e6:.2f} M parameters; {mib(self.parameters + self.copies)} MiB of weights, "
            f"{mib(self.gradients)} of gradients, {mib(self.optimizer)} of AdamW, {mib(self.averages)} of averages, "
            f"{mib(self.activations)} of activations, {mib(self.workspace)} of workspace at the peak: "
            f"{self.peak / GIB:.2f} GiB, {self.required / GIB:.2f} with what a GPU needs besides"
        )


class _StorageTracker(TorchDispatchMode):
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


def saved_activations(network, forward, amp=None):
    """Return {layer: bytes} of what is alive after forward(network) and was not before: what the backward pass needs.

    The network's parameters are replaced by fake ones; it is of no use afterwards.
    """
    with _fake(amp), _StorageTracker(_with_fake_parameters(network)) as living:
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
            _with_fake_parameters(network)
        with _StorageTracker(*networks) as living:
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
    with _fake(amp), torch.no_grad(), _StorageTracker(_with_fake_parameters(network)) as living:
        forward(network)
    return Estimate(parameters=4 * count, workspace=living.peak)
