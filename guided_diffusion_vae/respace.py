"""Respacing: run a process on a subset of its timesteps, with the same noise levels in fewer, larger steps."""

from itertools import accumulate, repeat

import numpy as np

from .gaussian_diffusion import GaussianDiffusion

# Half of it, the logarithm of sqrt(SNR), is where the authors of DPM-Solver end the cosine schedule.
MIN_LOG_SNR = -10.2


def space_timesteps(num_timesteps: int, section_counts) -> set[int]:
    """Return the timesteps of a shorter process, a set of integers in [0, num_timesteps).

    :param section_counts: number of timesteps to keep in each of as many sections of (nearly) equal length, a list of
        integers or text such as "10,15,20". A section keeps its first and last timestep, the others are evenly spaced.
        "ddimN" keeps N timesteps at an integer stride from 0 on, the spacing of DDIM (arXiv:2010.02502, Sec. 4.2).
    :raises ValueError: if a section is shorter than its count, no integer stride gives N timesteps, or the text has
        none of these forms.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _uniform_stride(num_timesteps, _parse_counts(section_counts[len("ddim"):], section_counts)[0])
        section_counts = _parse_counts(section_counts, section_counts)
    kept: set[int] = set()
    for start, size, count in _sections(num_timesteps, section_counts):
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Strides are accumulated, not multiplied: ties then round as in released runs.
        offsets = accumulate(repeat(stride, count - 1), initial=0.0) if count > 0 else ()
        kept.update(start + round(offset) for offset in offsets)
    return kept


def space_trailing(num_timesteps: int, section_counts) -> set[int]:
    """Return the last timesteps of equal parts, a set of integers that contains num_timesteps - 1.

    Sampling then starts at the noisiest timestep, also in one step, and takes equal steps down to x_0 (zero terminal
    SNR, arXiv:2305.08891, Sec. 3.3).

    :param section_counts: number of parts of each of as many sections, as in `space_timesteps`; "trailingN" and "ddimN"
        mean N.
    :raises ValueError: as `space_timesteps` does.
    """
    counts = section_counts
    if isinstance(counts, str):
        counts = _parse_counts(counts.removeprefix("trailing").removeprefix("ddim"), counts)
    return {last for start, size, count in _sections(num_timesteps, counts)
            for last in (start + round((part + 1) * size / count) - 1 for part in range(count))}


def _sections(num_timesteps, section_counts):
    """Yield (first timestep, size, count) of sections of (nearly) equal length.

    :raises ValueError: if a section is shorter than its count.
    """
    shortest, longer = divmod(num_timesteps, len(section_counts))
    start = 0
    for section, count in enumerate(section_counts):
        size = shortest + (section < longer)
        if count > size:
            raise ValueError(f"--timestep_respacing keeps {count} steps of section {section} of {len(section_counts)}, "
                             f"which has {size} of the {num_timesteps}; lower it, or increase --diffusion_steps")
        yield start, size, count
        start += size


def space_by_log_snr(alphas_cumprod, count: int) -> set[int]:
    """Return `count` timesteps evenly spaced in log(alpha-bar / (1 - alpha-bar)), a set of integers.

    The spacing of DPM-Solver (arXiv:2206.00927, Sec. 3.4), for solvers with few steps. It ends at the last timestep
    with a log-SNR above MIN_LOG_SNR, beyond which x_0 cannot be predicted reliably; schedules that end in pure noise
    start there. Timesteps are integers: at spacings below one timestep, adjacent ones are used.

    :raises ValueError: if there are fewer timesteps above MIN_LOG_SNR, or `count` is below 2.
    """
    alphas_cumprod = np.asarray(alphas_cumprod)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)
    usable = int((log_snr > MIN_LOG_SNR).sum())
    if not 2 <= count <= usable:
        raise ValueError(f"--timestep_respacing logsnr{count}: N must be in [2, {usable}], the number of the "
                         f"{len(log_snr)} --diffusion_steps with enough signal")
    even = np.linspace(log_snr[0], log_snr[usable - 1], count)
    kept = np.interp(-even, -log_snr[:usable], np.arange(usable)).round().astype(int)
    for i in range(1, count):
        kept[i] = max(kept[i], kept[i - 1] + 1)
    kept = np.minimum(kept, np.arange(usable - count, usable))
    if alphas_cumprod[-1] == 0:
        kept[-1] = len(alphas_cumprod) - 1
    return set(kept.tolist())


def _uniform_stride(num_timesteps, count):
    for stride in range(1, num_timesteps):
        kept = range(0, num_timesteps, stride)
        if len(kept) == count:
            return set(kept)
    raise ValueError(f"--timestep_respacing ddim{count}: no integer stride keeps {count} of {num_timesteps} steps; use "
                     f"a divisor of --diffusion_steps, or {count} without ddim")


def _parse_counts(text, flag_value):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--timestep_respacing {flag_value!r}: expected a count (250), counts per section (10,15,20), "
                         "ddimN (ddim25), logsnrN (logsnr20) or trailingN (trailing4)") from None


class SpacedDiffusion(GaussianDiffusion):
    """Process on a subset of the timesteps of an original process, with the same alpha-bar at each of them.

    Betas follow from the kept alpha-bars (iDDPM, arXiv:2102.09672, Eq. 19). The timesteps of the original process are
    passed to models and guidance, so that a network trained on 1000 steps is sampled in 50.

    :param use_timesteps: collection of timesteps of the original process to keep.
    :param kwargs: arguments of GaussianDiffusion for the original process.
    :raises ValueError: if `use_timesteps` is empty or not within [0, len(betas)).
    """

    def __init__(self, use_timesteps, **kwargs):
        original_betas = np.asarray(kwargs.pop("betas"), dtype=np.float64)
        kept = sorted(set(use_timesteps))
        if not kept or kept[0] < 0 or kept[-1] >= len(original_betas):
            raise ValueError(f"use_timesteps: expected integers in [0, {len(original_betas) - 1}], got "
                             f"{f'{kept[0]} to {kept[-1]}' if kept else 'none'}")
        alpha_bar = np.cumprod(1.0 - original_betas)[kept]
        super().__init__(betas=1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1]), **kwargs)
        self.use_timesteps, self.timestep_map, self.original_num_steps = set(kept), kept, len(original_betas)
