"""Latent-space diffusion: guided-diffusion's UNet and process on the latents of a strided KL autoencoder."""

__version__ = "0.1.0"

import gc
import os
import sys

# OpenMP threads that spin while they wait take the cores of other ranks. libgomp reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Importing torch makes millions of objects that all stay: an eighth of its time would be spent looking for garbage.
if "torch" not in sys.modules and gc.isenabled():
    gc.disable()
    import torch  # noqa: F401

    gc.freeze()
    gc.enable()
