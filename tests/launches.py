"""Count the kernels and synchronizations of a piece of code on any machine: each operation except views is a kernel."""

import collections

from torch.utils._python_dispatch import TorchDispatchMode

# These return views or run on the host as well, although their schemas do not show it.
NO_KERNEL = ("aten::_unsafe_view", "profiler::")
# Operations that read a value on the host and so wait for the device.
SYNCHRONIZING = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::item")


class Launches(TorchDispatchMode):
    """Count operations by name inside the `with` block."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()
        self.waiting_copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not func.is_view:
            self.counts[func.name()] += 1
        device = kwargs.get("device")
        if func.name() == "aten::_to_copy" and device not in (None, args[0].device):
            self.waiting_copies += not kwargs.get("non_blocking")
        return func(*args, **kwargs)

    @property
    def total(self):
        """Number of kernels launched."""
        return sum(n for name, n in self.counts.items() if not name.startswith(NO_KERNEL))

    @property
    def synchronizations(self):
        """Number of times the host waited for the device."""
        return self.waiting_copies + sum(n for name, n in self.counts.items() if name.startswith(SYNCHRONIZING))
