"""Latent-space diffusion: guided-diffusion's UNet and process on the latents of a strided KL autoencoder."""

__version__ = "0.3.0"

import ctypes
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import LatentCache, Sampler, VAEInterface, evaluate, run_command, train

__all__ = ["LatentCache", "Sampler", "VAEInterface", "evaluate", "run_command", "train"]

# OpenMP threads that spin while they wait take the cores of other ranks. libgomp reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _keep_freed_memory(environ: Mapping[str, str]) -> bool:
    """Let glibc keep freed memory; return whether it does.

    By default it returns every tensor above 32 MiB to the system, whose pages are then zeroed again at each step. Not
    changed if the environment configures malloc or preloads libraries; GDVAE_KEEP_MEMORY=0 turns it off.
    """
    configured = "LD_PRELOAD" in environ or "malloc" in environ.get("GLIBC_TUNABLES", "")
    if configured or environ.get("GDVAE_KEEP_MEMORY") == "0" or any(name.startswith("MALLOC_") for name in environ):
        return False
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):    # another system
        return False
    if not hasattr(libc, "gnu_get_libc_version"):   # another C library
        return False
    trim_threshold, mmap_max = -1, -4   # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 512 << 20))


KEEPS_FREED_MEMORY = _keep_freed_memory(os.environ)


if not TYPE_CHECKING:   # for which a module with this function has any name
    def __getattr__(name):
        """Return a name of `api`, which is imported on first use, and with it PyTorch."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import api

        return getattr(api, name)


class _DeprecatedModules:
    """Finder of the modules of version 0.1 that have moved; asked after all others."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package == __name__:
            from .runs import deprecated

            if name in deprecated.MODULES:
                return importlib.util.spec_from_loader(fullname, deprecated.ModuleLoader(name))
        return None


def deprecated_names(module: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module that lost names since version 0.1: they are found with a warning."""
    def lookup(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        from .runs import deprecated

        return deprecated.find(module, name)

    return lookup


def deprecated_method(old: str, new: str) -> Callable[..., Any]:
    """Return a method with a name of version 0.1 that warns and calls its successor."""
    def method(self: Any, *args: Any) -> Any:
        warnings.warn(f"{type(self).__name__}.{old} is deprecated, use {new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)(*args)

    return method


sys.meta_path.append(_DeprecatedModules)
