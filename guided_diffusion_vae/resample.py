"""Sample the timesteps to train on, and weight their losses so that the expected gradient stays the same."""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.distributed as dist

from .nn import to_device, to_float64


def create_named_schedule_sampler(name: str, diffusion) -> "ScheduleSampler":
    """Return the sampler `name` (a key of SCHEDULE_SAMPLERS) for the timesteps of `diffusion`.

    :raises NotImplementedError: if there is no such sampler.
    """
    if name not in SCHEDULE_SAMPLERS:
        raise NotImplementedError(f"--schedule_sampler {name} is unknown: expected one of: "
                                  f"{', '.join(SCHEDULE_SAMPLERS)}")
    return SCHEDULE_SAMPLERS[name](diffusion)


class ScheduleSampler(ABC):
    """Distribution over the timesteps of a process, given by the `weights` of a subclass."""

    is_constant = False     # whether the weights never change, so that timesteps can be sampled steps ahead

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Return one positive weight per timestep as a NumPy array [T]; their sum may differ from one."""

    def sample(self, batch_size: int, device, rng=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (timesteps int64 [N], importance weights float32 [N]) of a batch on `device`.

        The expected value of weight * loss is the mean loss over all timesteps, for any distribution.

        :param rng: a NumPy Generator or RandomState; None: NumPy's global generator. Ranks with the same key sample the
            global batch and take their slice, so that the result does not depend on the number of ranks.
        """
        weights = self.weights()
        p = weights / np.sum(weights)
        t = (np.random if rng is None else rng).choice(len(p), size=(batch_size,), p=p)
        importance = 1.0 / (len(p) * p[t])
        return (
            to_device(torch.from_numpy(t.astype(np.int64)), device),
            to_device(torch.from_numpy(importance.astype(np.float32)), device),
        )

    def state_dict(self) -> dict:
        """Return the JSON-able state that a checkpoint stores."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore the result of `state_dict`."""
        del state   # a sampler without state ignores that of another one, with which the run was started


class UniformSampler(ScheduleSampler):
    """All timesteps have the same probability, and all importance weights are 1."""

    is_constant = True

    def __init__(self, diffusion):
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self):
        return self._weights


class LogitNormalSampler(ScheduleSampler):
    """Logit-normal distribution, in which intermediate timesteps are the most probable: sigmoid(u), u ~ N(0, 1).

    Importance weights are 1: the distribution weights the losses, as intended for rectified flows (arXiv:2403.03206,
    Sec. 3.1, with m = 0 and s = 1). Timestep t is sampled with the density at (t + 0.5) / T.
    """

    def __init__(self, diffusion):
        times = (np.arange(diffusion.num_timesteps) + 0.5) / diffusion.num_timesteps
        logit = np.log(times / (1.0 - times))
        self._weights = np.exp(-0.5 * logit**2) / (times * (1.0 - times))

    def weights(self):
        return self._weights

    def sample(self, batch_size, device, rng=None):
        t, weights = super().sample(batch_size, device, rng)
        return t, torch.ones_like(weights)


class LossAwareSampler(ScheduleSampler):
    """Distribution that follows the losses of training."""

    def update_with_local_losses(self, local_ts: torch.Tensor, local_losses: torch.Tensor) -> None:
        """Update from the losses of this rank's batch and of all other ranks'; every rank must call it.

        All ranks use the same losses in the order of the ranks, so that their distributions stay equal.

        :param local_ts: timesteps [N], integers; N may differ between ranks.
        :param local_losses: one loss per timestep [N].
        """
        pairs = torch.stack([to_float64(local_ts), to_float64(local_losses.detach())], dim=1)     # [N x 2]
        ts, losses = _gather_rows(pairs).T.tolist()
        self.update_with_all_losses([int(t) for t in ts], losses)

    @abstractmethod
    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        """Update from timesteps `ts` and their losses, two lists of one length that are the same on every rank."""


class LossSecondMomentResampler(LossAwareSampler):
    """Sample timesteps with probability proportional to the root mean square of their latest losses.

    Until every timestep has `history_per_term` losses, all have the same probability. A fraction `uniform_prob` of the
    probability stays uniform, so that every timestep keeps being sampled.

    Source: iDDPM, arXiv:2102.09672, Eq. 18.
    """

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001):
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._losses = np.zeros([diffusion.num_timesteps, history_per_term])    # oldest first; float64
        self._counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self):
        if (self._counts < self.history_per_term).any():
            return np.ones(len(self._counts))
        root_mean_square = np.sqrt((self._losses**2).mean(axis=1))
        p = root_mean_square / root_mean_square.sum()
        return p * (1.0 - self.uniform_prob) + self.uniform_prob / len(p)

    def update_with_all_losses(self, ts, losses):
        for t, loss in zip(ts, losses):
            if not math.isfinite(loss):
                continue    # an overflow in half precision is no measure of how difficult a timestep is
            filled = self._counts[t]
            if filled < self.history_per_term:
                self._losses[t, filled] = loss
                self._counts[t] = filled + 1
            else:
                self._losses[t] = np.append(self._losses[t, 1:], loss)

    def state_dict(self):
        """Return the history as plain lists, which JSON stores bit-exactly."""
        return {"losses": self._losses.tolist(), "counts": self._counts.tolist()}

    def load_state_dict(self, state):
        """Restore the result of `state_dict`.

        :raises ValueError: if it belongs to another number of timesteps or another length of history.
        """
        losses, counts = np.array(state["losses"], dtype=np.float64), np.array(state["counts"], dtype=np.int64)
        if losses.shape != self._losses.shape or counts.shape != self._counts.shape:
            raise ValueError(
                f"schedule sampler state has another shape: expected [timesteps x history] {list(self._losses.shape)}, "
                f"got {list(losses.shape)} and {len(counts)} counts; resume with the same --diffusion_steps, "
                f"--timestep_respacing and --schedule_sampler"
            )
        self._losses, self._counts = losses, counts


# The choices of --schedule_sampler.
SCHEDULE_SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler,
                     "logit-normal": LogitNormalSampler}


def _gather_rows(rows):
    """Return the rows [N x K] of all ranks, in the order of the ranks; N may differ between ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    longest = int(counts.max())
    # all_gather requires one shape, so that shorter ranks pad with zeros that are removed again.
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts.tolist())])
