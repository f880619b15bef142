"""Give this process a CUDA device that does not exist, and run the scenarios of gpu_paths.py on it.

    python tests/fake_cuda.py [LIBRARY]

LIBRARY is fake_cuda.cpp, compiled; without it, scenarios with a backward pass are left out. The device cannot be
removed again: test_gpu_paths.py runs this in a process of its own.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

CUDA, META = 1, 14      # of the enumeration c10::DeviceType


def load_device(library=""):
    """Register a device for fake tensors on CUDA, which torch looks for when it is imported."""
    folder = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    if library:
        ctypes.CDLL(str(folder / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(library)
        return
    # The device guard of meta tensors does nothing, as required here, but the engine of autograd does not accept it.
    importlib.import_module("torch")
    c10 = ctypes.CDLL(str(folder / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    guards[CUDA] = guards[META]


if __name__ == "__main__":
    load_device(*sys.argv[1:])
    import gpu_paths

    gpu_paths.main(backward=len(sys.argv) > 1)
