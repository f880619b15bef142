"""Latent-space diffusion: guided-diffusion's UNet and process on the latents of a strided KL autoencoder."""

import os

# OpenMP threads that spin while they wait take the cores of other ranks. libgomp reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
