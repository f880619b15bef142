"""Measure the variational bound of data."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import dist_util, logger
from ..config import option
from ..files import atomic_path
from ..nn import keyed_seed
from .comparison import write_report

LIKELIHOOD = 11  # second number of the keys of noise, apart from those of training and sampling


@dataclass
class LikelihoodConfig:
    SECTION = "evaluation"

    model_path: str = option("", "run of image_train.py or image_train_vae.py, or one weights file of it, or one of "
                              "guided-diffusion, which the flags of the model describe")
    num_samples: int = option(1000, "how many items of the data to measure, evenly spread", minimum=1)
    batch_size: int = option(1, "items at a time on each rank", minimum=1)
    clip_denoised: bool = option(True, "clip the predicted x0 to [-1, 1]; never done to latents unless the flag is given")
    seed: int = option(0, "seed of the noise")


def likelihood(model, diffusion, source, space, labels, clip_denoised, config, folder):
    """Return the report of the variational bound over a source, after writing it and its terms to `folder`.

    `bits_per_dim` of pictures, `nats_per_latent_dim` of latents (their x0, the posterior's mean). vb_terms.npz,
    mse_terms.npz and xstart_mse_terms.npz hold, as arr_0 [T] from the last time to the first, means over the items.
    """
    bits = space.is_pixels
    name, unit = ("bits_per_dim", 1.0) if bits else ("nats_per_latent_dim", math.log(2.0))
    chosen = np.linspace(0, len(source) - 1, min(config.num_samples, len(source))).round().astype(int)
    if len(chosen) < config.num_samples:
        logger.log(f"{source.folder} has {len(source)} items, fewer than --num_samples {config.num_samples}")
    starts = list(range(0, len(chosen), config.batch_size))[dist_util.rank()::dist_util.world_size()]
    totals, terms = [], {"vb": [], "mse": [], "xstart_mse": []}
    for start in starts:
        items = chosen[start:start + config.batch_size]
        torch.manual_seed(keyed_seed(config.seed, LIKELIHOOD, start))
        with torch.no_grad():
            x0 = space.normalizer.normalize(source.latents(source.read(items), device=dist_util.dev()))
        told = {} if labels is None else {"y": torch.from_numpy(labels[items]).to(x0.device)}
        measured = diffusion.calc_bpd_loop(model, x0, clip_denoised, told)
        totals += (measured["total_bpd"] * unit).tolist()
        for key, rows in terms.items():
            rows.append((measured[key] * (unit if key == "vb" else 1.0)).double().cpu().numpy())
        logger.log(f"done {len(totals)} samples on this rank: {'bpd' if bits else name}={np.mean(totals):.5f}")
    totals = np.concatenate(dist_util.gather_objects(totals))
    gathered = {key: dist_util.gather_objects(rows) for key, rows in terms.items()}
    report = {name: float(totals.mean()), "standard_error": float(totals.std() / math.sqrt(len(totals))),
              "count": len(totals)}
    if dist_util.rank() == 0:
        for key, ranks in gathered.items():
            mean = np.concatenate([rows for of_rank in ranks for rows in of_rank]).mean(0)
            with atomic_path(Path(folder) / f"{key}_terms.npz") as part, open(part, "wb") as stream:
                np.savez(stream, mean)
    write_report(report, folder)
    return report
