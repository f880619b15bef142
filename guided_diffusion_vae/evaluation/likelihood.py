"""Likelihood of data under a diffusion model: its variational lower bound."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import dist_util, logger
from ..config import option
from ..data import evenly_spaced
from ..files import atomic_path
from ..interfaces import LatentSource
from ..nn import keyed_seed

LIKELIHOOD = 11  # second number of the keys of noise; training and sampling use others


@dataclass
class LikelihoodConfig:
    SECTION = "evaluation"

    model_path: str = option("", "run of image_train.py or image_train_vae.py, a weights file of one, or one of "
                                 "guided-diffusion described by the model flags", essential=True)
    num_samples: int = option(1000, "number of evenly spaced items of the data to measure", minimum=1, essential=True)
    batch_size: int = option(1, "items in a batch per rank", minimum=1, essential=True)
    clip_denoised: bool = option(True, "clip the predicted x0 to [-1, 1]; for latents only if set explicitly")
    seed: int = option(0, "seed of the noise")


class HeldOutData(NamedTuple):
    """Data to measure a model on: a latent source, the `Space` of its x0, and what the model is conditioned on.

    These are labels int64 [N], and normalized attributes float32 [N x A]; None: the model has none.
    """

    source: LatentSource
    space: Any      # `runs.spaces.Space`, of a higher layer
    labels: np.ndarray | None
    attributes: np.ndarray | None = None


def likelihood(model, diffusion, data: HeldOutData, config: LikelihoodConfig, folder) -> dict:
    """Return the report of the variational lower bound of `HeldOutData`, after writing its terms to `folder`.

    The report has `bits_per_dim` of images, or `nats_per_latent_dim` of latents (x0 of the posterior mode).
    vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz contain means over the items, arr_0 [T] from the last timestep
    to the first.
    """
    source, space, *_ = data
    name, unit = ("bits_per_dim", 1.0) if space.is_pixels else ("nats_per_latent_dim", math.log(2.0))
    chosen = evenly_spaced(len(source), config.num_samples)
    if len(chosen) < config.num_samples:
        logger.log(f"{source.folder} has {len(source)} items, fewer than --num_samples {config.num_samples}")
    own: list[float] = []   # bounds of the items of this rank
    terms: dict[str, list] = {"vb": [], "mse": [], "xstart_mse": []}
    for start in range(0, len(chosen), config.batch_size)[dist_util.rank()::dist_util.world_size()]:
        items = chosen[start:start + config.batch_size]
        torch.manual_seed(keyed_seed(config.seed, LIKELIHOOD, start))
        with torch.no_grad():
            x0 = space.normalizer.normalize(source.latents(source.read(items), device=dist_util.dev()))
        conditioning = {name: torch.from_numpy(values[items]).to(x0.device) for name, values in
                        (("y", data.labels), ("attributes", data.attributes)) if values is not None}
        bound = diffusion.calc_bpd_loop(model, x0, config.clip_denoised, conditioning)
        own += (bound["total_bpd"] * unit).tolist()
        for key, rows in terms.items():
            rows.append((bound[key] * (unit if key == "vb" else 1.0)).cpu().double().numpy())
        logger.log(f"done {len(own)} samples on this rank: {'bpd' if unit == 1 else name}={np.mean(own):.5f}")
    totals = np.concatenate(dist_util.gather_objects(own))
    gathered = {key: dist_util.gather_objects(rows) for key, rows in terms.items()}
    if dist_util.rank() == 0:
        for key, ranks in gathered.items():
            mean = np.concatenate([rows for rank_rows in ranks for rows in rank_rows]).mean(0)
            with atomic_path(Path(folder) / f"{key}_terms.npz") as part, open(part, "wb") as stream:
                np.savez(stream, mean)
    return {name: float(totals.mean()), "standard_error": float(totals.std() / math.sqrt(len(totals))),
            "count": len(totals)}
