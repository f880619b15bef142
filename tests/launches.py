"""Count what a piece of code asks of a device, on any machine: each operation that is no view launches a kernel."""

import collections

from torch.utils._python_dispatch import TorchDispatchMode

# These return views, too, or run on the host; their schemas do not say so.
NO_KERNEL = ("aten::_unsafe_view", "profiler::")
# What reads a value on the host and so waits for the device.
SYNCHRONISES = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::item")


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
        """How many kernels were launched."""
        return sum(n for name, n in self.counts.items() if not name.startswith(NO_KERNEL))

    @property
    def synchronisations(self):
        """How often the host waited for the device."""
        return self.waiting_copies + sum(n for name, n in self.counts.items() if name.startswith(SYNCHRONISES))
