"""Power-function EMA profiles: snapshots of few lengths, from which the EMA of any length is reconstructed afterwards.

Karras et al. 2024 (arXiv:2312.02696), Sec. 3 and App. C. At step t, the profile with exponent gamma gives the weights
of step tau a density proportional to tau^gamma: its length is a fixed fraction of the training so far. It is named by
its standard deviation relative to t, such as 0.05 or 0.10; longer ones have larger values.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from . import checkpoint_util
from .config import CommaSeparated, option, require
from .files import sha256_of_file

MAX_STD = 0.28      # a profile with the exponent 0, the plain average of all steps, has 1 / sqrt(12) = 0.289
relative_stds = CommaSeparated("stds", f"comma-separated relative standard deviations in (0, {MAX_STD}], such as "
                               "0.05,0.10", float, lambda stds: all(0 < std <= MAX_STD for std in stds))


@dataclass
class ReconstructConfig:
    SECTION = "reconstruction"

    model_path: str = option("", "run folder of a training with --ema_profiles", essential=True)
    ema_std: Annotated[str, relative_stds] = option(
        "0.075", "comma-separated relative standard deviations, one file each", essential=True)
    ema_step: int = option(0, "step whose EMA weights are reconstructed, from snapshots up to it; 0: the latest",
                           minimum=0)
    reference: str = option("", "real images as for evaluate.py: keep only the weights whose samples have the lowest "
                                "Fréchet distance to them; empty: keep all", essential=True)
    num_samples: int = option(1000, "samples of each length for --reference, from the same noise", minimum=2)


def profile_exponent(std: float) -> float:
    """Return gamma of a relative standard deviation: sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) (Eq. 123)."""
    return max(np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2]).real)


def profile_decay(std: float, step: int) -> float:
    """Return the decay of the update at `step`, 1 for the first one: (1 - 1 / step)^(gamma + 1) (Eq. 127)."""
    return (1.0 - 1.0 / step) ** (profile_exponent(std) + 1.0)


def snapshot_name(std: float, step: int) -> str:
    """Return the file name of a snapshot."""
    return checkpoint_util.ema_name(f"{checkpoint_util.PROFILE}{std:g}", step)


def reconstruction_weights(snapshots, std: float, step: int) -> tuple[np.ndarray, float]:
    """Return (weights [N], relative error) of the sum of snapshots that is closest to a profile.

    Least squares over the densities of the profiles (App. C, Alg. 3), under the constraint that the weights add up to
    1: parameters that no longer change are then reproduced exactly.

    :param snapshots: pairs (relative standard deviation, step) [N].
    """
    exponents, steps = (np.array(column, dtype=np.float64) for column in zip(
        *((profile_exponent(each), at) for each, at in snapshots)))
    gram = _inner_products(exponents[:, None], steps[:, None], exponents, steps)
    target = _inner_products(exponents, steps, profile_exponent(std), step)
    norm = _inner_products(profile_exponent(std), step, profile_exponent(std), step)
    ones = np.ones(len(steps))
    system = np.block([[gram / norm, ones[:, None]], [ones[None], np.zeros((1, 1))]])
    weights = np.linalg.lstsq(system, np.append(target / norm, 1.0), rcond=1e-14)[0][:-1]
    squared = (weights @ gram @ weights - 2.0 * weights @ target) / norm + 1.0
    return weights, float(np.sqrt(max(squared, 0.0)))


def _inner_products(a, step_a, b, step_b):
    """Return the integral of the product of two profiles of exponents a and b, whose densities end at their steps.

    (a + 1) tau^a / step_a^(a + 1) is the density of one of them; a product is integrated up to the earlier step.
    """
    shared = np.minimum(step_a, step_b)
    return (a + 1) * (b + 1) / (a + b + 1) * (shared / step_a) ** a * (shared / step_b) ** b * shared / step_a / step_b


def reconstruct(folder, std: float, step: int = 0) -> tuple[dict, dict, float]:
    """Return (state dict, header, relative error of the profile) of the EMA weights of any length.

    :param step: step of the EMA weights; 0: the latest committed one.
    :raises FileNotFoundError: if the run has no snapshots up to that step.
    :raises ValueError: if one of them is corrupt.
    """
    folder = Path(folder)
    files, step = _open_snapshots(folder, step)
    weights, error = reconstruction_weights(list(files), std, step)
    total: dict[str, torch.Tensor] = {}
    for weight, path in zip(weights, files.values()):
        state_dict, header = checkpoint_util.load_weights(path)
        for name, value in state_dict.items():
            value = value.double() * weight if value.is_floating_point() else value
            total[name] = total[name] + value if name in total and value.is_floating_point() else value
    for name, value in state_dict.items():
        state_dict[name] = total[name].to(value.dtype)      # in the dictionary of the last file, for its metadata
    return state_dict, {**header, "step": step, "ema_std": std}, error


def _open_snapshots(folder, step):
    """Return ({(relative standard deviation, step): path} of verified snapshots up to a step, the step)."""
    committed = checkpoint_util.committed_steps(folder)
    require((committed, f"{folder} contains no complete checkpoint (stateNNNNNN.json): --model_path expects a run "
             "folder"), error=FileNotFoundError)
    recorded = checkpoint_util.read_marker(folder, committed[-1], lambda marker: None).get("profiles", {})
    step = step or committed[-1]
    files = {}
    for name, entry in recorded.items():
        found = re.fullmatch(rf"ema_{checkpoint_util.PROFILE}([\d.]+)_(\d+)\.pt", name)
        if found and int(found[2]) <= step:
            files[float(found[1]), int(found[2])] = path = folder / name
            require((path.is_file(), f"{path} is missing: restore it"), error=FileNotFoundError)
            require((sha256_of_file(path) == entry["sha256"],
                     f"{path} is corrupt: its SHA-256 is not that of {checkpoint_util.marker_name(committed[-1])}"))
    require((files and step <= committed[-1], f"{folder} has no snapshots of EMA profiles for step {step}: expected a "
             f"run trained with --ema_profiles and --ema_step up to {committed[-1]}"))
    return files, step


def save_reconstruction(folder, std: float, step: int = 0) -> tuple[Path, float]:
    """Write the result of `reconstruct` into the run folder; return (path, relative error of the profile)."""
    state_dict, header, error = reconstruct(folder, std, step)
    path = Path(folder) / f"reconstructed_ema_{std:g}_{header['step']:06d}.pt"
    checkpoint_util.save_weights(path, state_dict, header)
    return path, error
