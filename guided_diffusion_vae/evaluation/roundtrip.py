"""Measure the round trip of an autoencoder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..config import option
from ..data import RunningMoments, to_uint8, unpad, write_npz
from ..files import write_json
from . import figures, image_metrics
from .comparison import _progress


@dataclass
class RoundtripConfig:
    num_pictures: int = option(0, "how many pictures to check, evenly spread over the folder; 0: all", minimum=0)
    batch_size: int = option(32, "pictures at a time", minimum=1)
    min_psnr: float = option(0.0, "exit with status 1 where the mean PSNR is below this many dB")
    min_ssim: float = option(-1.0, "exit with status 1 where the mean SSIM is below this")
    max_l1: float = option(1.0, "exit with status 1 where the mean absolute error is above this")
    save_npz: bool = option(False, "write the reconstructions to reconstructions_NxHxWxC.npz, which evaluate.py takes as "
                                "--samples; with --inception_path its FID is what papers call rFID")


def roundtrip(codec, pictures, config, folder, device):
    """Encode and decode pictures; return the report, after writing metrics.json and roundtrip.png to `folder`.

    The report holds means of PSNR (dB), SSIM and L1, the greatest error of a pixel, the same three for a bicubic
    down-and-up by the codec's total strides, and the latent's statistics; a channel whose standard deviation is below a
    thousandth of the widest one is listed as dead.
    """
    count = config.num_pictures or len(pictures)
    chosen = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)
    scores, moments, sheet, kept = {}, RunningMoments(), None, []
    for start in _progress(range(0, len(chosen), config.batch_size), "round trip"):
        images = pictures.batch(chosen[start:start + config.batch_size]).to(device)
        with torch.no_grad():
            latent = codec.encode_batch(images)
            decoded = codec.decode_batch(latent).to(images.dtype)
        moments.add(latent.float().cpu().numpy())
        bicubic = image_metrics.bicubic_baseline(images, codec.factors)
        images, decoded, bicubic = (unpad(x, pictures.unpadded_shape) for x in (images, decoded, bicubic))
        for prefix, candidate in {"": decoded, "bicubic_": bicubic}.items():
            for name in ("psnr", "ssim", "l1"):
                scores.setdefault(prefix + name, []).append(getattr(image_metrics, name)(images, candidate).cpu())
        scores.setdefault("max_error", []).append(image_metrics.max_error(images, decoded).cpu())
        if config.save_npz:
            kept.append(np.moveaxis(to_uint8(decoded), 1, -1))
        if sheet is None:
            sheet = figures.reconstruction_grid(images[:12].cpu().numpy(), decoded[:12].cpu().numpy())
    statistics = moments.statistics()
    std = statistics["channel_std"]
    report = {k: (torch.cat(v).max() if k == "max_error" else torch.cat(v).mean()).item() for k, v in scores.items()}
    report.update(
        pictures=len(chosen), latent_shape=list(codec.latent_shape(pictures.shape)), scale_factor=codec.scale_factor,
        latent_mean=statistics["mean"], latent_std=statistics["std"], channel_mean=statistics["channel_mean"],
        channel_std=std, dead_channels=[i for i, s in enumerate(std) if s < 1e-3 * max(std)],
    )
    figures.save_image(Path(folder) / "roundtrip.png", sheet)
    write_json(Path(folder) / "metrics.json", report)
    if kept:
        shape = len(chosen), *kept[0].shape[1:]
        labels = None if pictures.labels is None else pictures.labels[chosen]
        path = Path(folder) / f"reconstructions_{'x'.join(map(str, shape))}.npz"
        write_npz(path, shape, kept, labels, pictures.class_names)
    return report


def failed_thresholds(report, config):
    """Return one line for every threshold that the report of a round trip misses."""
    lines = []
    limits = ("psnr", config.min_psnr, True), ("ssim", config.min_ssim, True), ("l1", config.max_l1, False)
    for name, limit, below in limits:
        met = report[name] >= limit if below else report[name] <= limit
        if not met:  # so written, NaN fails too
            flag = f"--{'min' if below else 'max'}_{name}"
            lines.append(f"{name} is {report[name]:.4f}, {flag} asks for {'at least' if below else 'at most'} {limit}")
    if report["dead_channels"]:
        lines.append(f"latent channels {report['dead_channels']} are dead: their standard deviation is below a "
                     "thousandth of the widest channel's; lower --kl_weight or --latent_channels")
    return lines
