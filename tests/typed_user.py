"""A program of a user that is checked by `make lint` with mypy's strict rules, and never run.

Lines with an ignore are wrong uses. An ignore without an error on its line is an error itself, so that each of them
must be rejected.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import guided_diffusion_vae
from guided_diffusion_vae import LatentCache, Sampler, VAEInterface, evaluate, run_command, train
from guided_diffusion_vae import Samplers  # type: ignore[attr-defined]  # noqa: F401
from guided_diffusion_vae.runs.configs import DiffusionConfig, ModelConfig


def run(folder: Path) -> dict[str, float]:
    """Use each function and class of the interface as documented."""
    cache = LatentCache.open(folder / "cache")
    model: Path = train([ModelConfig(num_channels=64), DiffusionConfig(predict_v=True)], data=cache,
                        logdir=folder / "model", max_steps=2000, batch_size=8, ema_rate="0.999")
    train("microdoppler_small", data="images", logdir="runs/vae", model="autoencoder")
    sampler = Sampler.open(model, steps=20, cfg_scale=2.0, sampler="dpmpp_sde")
    images: np.ndarray = sampler.images(classes=["tapin", 2], n=8)
    colored: list[Image.Image] = sampler.images(n=2, pil=True)
    colored[0].save(folder / "first.png")
    if sampler.affine is not None:
        print(sampler.affine[:3, 3], ", ".join(sampler.class_names or []))
    vae = VAEInterface("runs/vae", device="cpu")
    latents: torch.Tensor = vae.encode(images)
    decoded: np.ndarray = vae.decode(latents)
    vae.decode(vae.encode(colored), pil=True)[0].show()
    latents = cache.latents(cache.read([0, 5]), device=latents.device)
    labels = cache.labels_of(range(2))
    print(cache.count, cache.latent_shape, cache.class_names, cache.statistics["std"], labels, decoded.shape)
    written: Path | None = run_command("image_nll", model_path=model, cache_dir=folder / "cache")
    print(written)
    report = evaluate(images, folder / "val", features="runs/vae", paired=True)
    return {"frechet": float(report["frechet"])}


def misuse(cache: LatentCache, sampler: Sampler, vae: VAEInterface) -> None:
    """Use each of them wrongly."""
    guided_diffusion_vae.Sample  # type: ignore[attr-defined]  # noqa: B018
    Sampler.open(3)  # type: ignore[arg-type]
    Sampler.open("runs/model", steps=2.5)  # type: ignore[arg-type]
    Sampler.open("runs/model", cfg_scale=None)  # type: ignore[arg-type]
    sampler.images(n="8")  # type: ignore[call-overload]
    sampler.images(count=8)  # type: ignore[call-overload]
    sampler.images(pil=True).shape  # type: ignore[attr-defined]  # noqa: B018
    sampler.image()  # type: ignore[attr-defined]
    sampler.affine.sum()  # type: ignore[union-attr]
    vae.encode("image.png")  # type: ignore[arg-type]
    vae.decode([1.0])  # type: ignore[call-overload]
    VAEInterface()  # type: ignore[call-arg]
    cache.read("0")  # type: ignore[arg-type]
    cache.latent_shape.append(1)  # type: ignore[attr-defined]
    train("microdoppler_small", "images")  # type: ignore[call-arg]
    train(64, data="images", logdir="runs/vae")  # type: ignore[arg-type]
    train(data="images", logdir="runs/vae").images()  # type: ignore[attr-defined]
    run_command(train)  # type: ignore[arg-type]
    evaluate([1, 2], "val")  # type: ignore[arg-type]
