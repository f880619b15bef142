"""Measure the reconstruction quality of an autoencoder: the round trip of images through its latents."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import option
from ..data import RunningMoments, evenly_spaced, to_uint8, unpad, write_npz
from ..logger import progress
from . import figures
from .image_metrics import average_metrics, bicubic_baseline, max_error, paired_metrics


@dataclass
class RoundtripConfig:
    max_samples: int = option(
        0, "number of evenly spaced images of the folder to check; 0: all", minimum=0, essential=True)
    batch_size: int = option(32, "images in a batch", minimum=1, essential=True)
    min_psnr: float = option(0.0, "exit with status 1 if the mean PSNR in dB is lower", essential=True)
    min_ssim: float = option(-1.0, "exit with status 1 if the mean SSIM is lower", essential=True)
    max_l1: float = option(1.0, "exit with status 1 if the mean absolute error is higher", essential=True)
    save_npz: bool = option(False, "write reconstructions_NxHxWxC.npz, which evaluate.py reads as --samples: with "
                                   "--inception_path its FID is the rFID of papers", essential=True)


def roundtrip(codec, source, config: RoundtripConfig, folder, device) -> dict:
    """Encode and decode images; return the report, after writing roundtrip.png to `folder`.

    The report has the means of PSNR (dB), SSIM and L1, the maximum error of a pixel, the same three for the bicubic
    downsample-upsample baseline with the total factors of the codec, and the statistics of the latents. A channel with
    a standard deviation below a thousandth of the largest one is listed as dead.

    :param source: an `ImageSource`.
    """
    chosen = evenly_spaced(len(source), config.max_samples or len(source))
    scores, errors, moments, reconstructions = [], [], RunningMoments(), []
    grid: Any = None
    for start in progress(range(0, len(chosen), config.batch_size), "round trip"):
        images = source.batch(chosen[start:start + config.batch_size]).to(device)
        with torch.no_grad():
            latent = codec.encode_batch(images)
            decoded = codec.decode_batch(latent).to(images.dtype)
        moments.add(latent.float().cpu().numpy())
        bicubic = bicubic_baseline(images, codec.factors)
        images, decoded, bicubic = (unpad(x, source.unpadded_shape) for x in (images, decoded, bicubic))
        scores.append({**paired_metrics(images, decoded), **paired_metrics(images, bicubic, "bicubic_")})
        errors.append(max_error(images, decoded).max().item())
        if config.save_npz:
            reconstructions.append(np.moveaxis(to_uint8(decoded), 1, -1))
        if grid is None:
            grid = figures.reconstruction_grid(images[:12].cpu().numpy(), decoded[:12].cpu().numpy())
    statistics = moments.statistics()
    std = statistics["channel_std"]
    figures.save_image(Path(folder) / "roundtrip.png", grid)
    if reconstructions:
        shape = len(chosen), *reconstructions[0].shape[1:]
        labels = None if source.labels is None else source.labels[chosen]
        path = Path(folder) / f"reconstructions_{'x'.join(map(str, shape))}.npz"
        write_npz(path, shape, reconstructions, labels, source.class_names,
                  source.preprocessing.get("colormap", ""))
    return {
        **average_metrics(scores), "max_error": float(np.max(errors)), "num_images": len(chosen),
        "latent_shape": list(codec.latent_shape(source.shape)), "scale_factor": codec.scale_factor,
        "latent_mean": statistics["mean"], "latent_std": statistics["std"],
        "channel_mean": statistics["channel_mean"], "channel_std": std,
        "dead_channels": [i for i, s in enumerate(std) if s < 1e-3 * max(std)],
    }


def failed_thresholds(report: dict, config: RoundtripConfig) -> list[str]:
    """Return one line for every threshold that the report of a round trip does not meet."""
    lines = []
    limits = ("psnr", config.min_psnr, ">="), ("ssim", config.min_ssim, ">="), ("l1", config.max_l1, "<=")
    for name, limit, relation in limits:
        value = report[name]
        if not (value >= limit if relation == ">=" else value <= limit):  # NaN fails, too
            flag = f"--{'max' if relation == '<=' else 'min'}_{name}"
            lines.append(f"{name} {value:.4f} must be {relation} {limit} ({flag})")
    if report["dead_channels"]:
        lines.append(f"latent channels {report['dead_channels']} are dead: their standard deviation is below a "
                     "thousandth of the largest one; lower --kl_weight or --latent_channels")
    return lines
