"""Latent-space diffusion: guided-diffusion's UNet and process on the latents of a strided KL autoencoder."""
