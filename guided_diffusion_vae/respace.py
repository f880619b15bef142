"""Run a diffusion process on a subset of its times: the same noise levels in fewer, larger steps."""

from itertools import accumulate, repeat

import numpy as np

from .gaussian_diffusion import GaussianDiffusion

# Half of it is where the authors of DPM-Solver end the cosine schedule.
MIN_LOG_SNR = -10.2


def space_timesteps(num_timesteps, section_counts):
    """Choose the times of a shorter process; returns a set of integers in [0, num_timesteps).

    section_counts: how many times to keep in each of as many sections of (nearly) equal length, as a list of integers
    or as text "10,15,20"; a section keeps its first and its last time and spreads the others evenly. "ddimN" keeps N
    times at one whole-number stride from 0 on, the spacing of DDIM (arXiv 2010.02502, section 4.2).

    Raises ValueError where a section is asked for more times than it has, where no whole-number stride gives N
    times, and where the text is none of these forms.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _uniform_stride(num_timesteps, _parse_counts(section_counts[len("ddim"):], section_counts)[0])
        section_counts = _parse_counts(section_counts, section_counts)
    shortest, longer = divmod(num_timesteps, len(section_counts))
    kept, start = set(), 0
    for section, wanted in enumerate(section_counts):
        size = shortest + (section < longer)
        if wanted > size:
            raise ValueError(
                f"section {section} of {len(section_counts)} has {size} of the {num_timesteps} steps, not the {wanted} "
                f"that --timestep_respacing asks for; lower that count or raise --diffusion_steps"
            )
        stride = (size - 1) / (wanted - 1) if wanted > 1 else 1.0
        # Strides are added up, not multiplied out: the rounding of ties then falls as in released runs.
        offsets = accumulate(repeat(stride, wanted - 1), initial=0.0) if wanted > 0 else ()
        kept.update(start + round(offset) for offset in offsets)
        start += size
    return kept


def space_by_log_snr(alphas_cumprod, count):
    """Choose `count` times at even distances of log(alpha-bar / (1 - alpha-bar)); returns a set of integers.

    The spacing of DPM-Solver (arXiv 2206.00927, section 3.4), for solvers of few steps. It goes from time 0 to the last
    time with a log-SNR above FAINTEST_LOG_SNR, beyond which noise tells nothing reliable of x_0; a schedule that ends
    in pure noise is meant to be started there, and is. Times are whole numbers, so where the distances fall below one
    time, neighbours are taken.

    Raises ValueError where there are not that many times, or fewer than 2 are wanted.
    """
    alphas_cumprod = np.asarray(alphas_cumprod)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)
    usable = int((log_snr > MIN_LOG_SNR).sum())
    if not 2 <= count <= usable:
        raise ValueError(f"--timestep_respacing logsnr{count}: choose from 2 to {usable}, the times of the "
                         f"{len(log_snr)} --diffusion_steps whose noise leaves something of x_0")
    even = np.linspace(log_snr[0], log_snr[usable - 1], count)
    times = np.interp(-even, -log_snr[:usable], np.arange(usable)).round().astype(int)
    for i in range(1, count):
        times[i] = max(times[i], times[i - 1] + 1)
    times = np.minimum(times, np.arange(usable - count, usable))
    if alphas_cumprod[-1] == 0:
        times[-1] = len(alphas_cumprod) - 1
    return set(times.tolist())


def _uniform_stride(num_timesteps, wanted):
    for stride in range(1, num_timesteps):
        times = range(0, num_timesteps, stride)
        if len(times) == wanted:
            return set(times)
    raise ValueError(
        f"no whole-number stride takes {wanted} of {num_timesteps} steps (--timestep_respacing ddim{wanted}); choose a "
        f"divisor of --diffusion_steps, or {wanted} without ddim"
    )


def _parse_counts(text, flag_value):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--timestep_respacing {flag_value!r} is not a count (250), counts per section (10,15,20), ddimN (ddim25) "
            "or logsnrN (logsnr20)"
        ) from None


class SpacedDiffusion(GaussianDiffusion):
    """A process that visits only some times of a longer one, with the same alpha-bar at each of them.

    Betas follow from the kept alpha-bars (iDDPM, arXiv 2102.09672, equation 19). Models and guidance are given the
    times of the long process, so a network trained on 1000 steps is sampled in 50.

    use_timesteps: collection of times of the long process to keep.
    kwargs: arguments of GaussianDiffusion for the long process.

    Raises ValueError where `use_timesteps` is empty or leaves [0, len(betas)).
    """

    def __init__(self, use_timesteps, **kwargs):
        original_betas = np.asarray(kwargs.pop("betas"), dtype=np.float64)
        kept = sorted(set(use_timesteps))
        if not kept or kept[0] < 0 or kept[-1] >= len(original_betas):
            found = f"{kept[0]} to {kept[-1]}" if kept else "none"
            raise ValueError(
                f"use_timesteps must be times from 0 to {len(original_betas) - 1}, found {found}; "
                f"check --timestep_respacing against --diffusion_steps"
            )
        alpha_bar = np.cumprod(1.0 - original_betas)[kept]
        super().__init__(betas=1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1]), **kwargs)
        self.use_timesteps, self.timestep_map, self.original_num_steps = set(kept), kept, len(original_betas)
