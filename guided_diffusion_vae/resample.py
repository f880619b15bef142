"""Choose which times to train on, and weigh their losses so that the expected gradient stays the same."""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.distributed as dist

from .nn import to_device


def create_named_schedule_sampler(name, diffusion):
    """Return the sampler called `name` (a key of SCHEDULE_SAMPLERS) for the times of `diffusion`.

    Raises NotImplementedError where there is no such sampler.
    """
    if name not in SCHEDULE_SAMPLERS:
        raise NotImplementedError(f"--schedule_sampler {name} is unknown; choose from {', '.join(SCHEDULE_SAMPLERS)}")
    return SCHEDULE_SAMPLERS[name](diffusion)


class ScheduleSampler(ABC):
    """A distribution over the times of a process; a subclass says how much weight each time has."""

    @abstractmethod
    def weights(self):
        """Return one positive weight per time as a numpy array [T]; they need not add up to one."""

    def sample(self, batch_size, device, rng=None):
        """Draw times for a batch; returns (times int64 [N], importance weights float32 [N]) on `device`.

        The mean of weight * loss over draws is the mean loss over all times, whatever the distribution.

        rng: a numpy Generator or RandomState; None is numpy's global generator. Ranks that share a key draw the
        global batch from it and take their slice, so that the draws do not depend on the number of ranks.
        """
        weights = self.weights()
        p = weights / np.sum(weights)
        times = (np.random if rng is None else rng).choice(len(p), size=(batch_size,), p=p)
        importance = 1.0 / (len(p) * p[times])
        return (
            to_device(torch.from_numpy(times.astype(np.int64)), device),
            to_device(torch.from_numpy(importance.astype(np.float32)), device),
        )


class UniformSampler(ScheduleSampler):
    """Every time is as likely as any other, and all importance weights are 1."""

    def __init__(self, diffusion):
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self):
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A distribution that follows the losses met in training."""

    def update_with_local_losses(self, local_ts, local_losses):
        """Learn from the losses of this rank's batch and of all other ranks'; every rank must call it.

        local_ts: times [N], integers; local_losses: one loss per time [N]. N may differ between ranks. All ranks learn
        from the same losses in the order of the ranks, so their distributions stay equal.
        """
        pairs = torch.stack([local_ts.double(), local_losses.detach().double()], dim=1)     # [N x 2]
        times, losses = _gather_rows(pairs).T.tolist()
        self.update_with_all_losses([int(t) for t in times], losses)

    @abstractmethod
    def update_with_all_losses(self, ts, losses):
        """Learn from times `ts` and their losses, two lists of one length that are the same on every rank."""


class LossSecondMomentResampler(LossAwareSampler):
    """Draw a time with probability proportional to the root mean square of its latest losses.

    Until every time has `history_per_term` losses, all are equally likely. A share `uniform_prob` of the probability
    stays uniform, so that no time is forgotten.

    Source: iDDPM, arXiv 2102.09672, equation 18.
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
        share = root_mean_square / root_mean_square.sum()
        return share * (1.0 - self.uniform_prob) + self.uniform_prob / len(share)

    def update_with_all_losses(self, ts, losses):
        for t, loss in zip(ts, losses):
            if not math.isfinite(loss):
                continue    # a step that overflowed in half precision says nothing about how hard its times are
            filled = self._counts[t]
            if filled < self.history_per_term:
                self._losses[t, filled] = loss
                self._counts[t] = filled + 1
            else:
                self._losses[t] = np.append(self._losses[t, 1:], loss)

    def state_dict(self):
        """Return what has been learnt as plain lists, which survive JSON bit for bit."""
        return {"losses": self._losses.tolist(), "counts": self._counts.tolist()}

    def load_state_dict(self, state):
        """Take over what `state_dict` returned.

        Raises ValueError where it was made for another number of times or another length of history.
        """
        losses, counts = np.array(state["losses"], dtype=np.float64), np.array(state["counts"], dtype=np.int64)
        if losses.shape != self._losses.shape or counts.shape != self._counts.shape:
            raise ValueError(
                f"the schedule sampler's state is for [times x history] {list(losses.shape)} and {len(counts)} counts, "
                f"this one needs {list(self._losses.shape)}; resume with the same --diffusion_steps, "
                f"--timestep_respacing and --schedule_sampler"
            )
        self._losses, self._counts = losses, counts


# The choices of --schedule_sampler.
SCHEDULE_SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}


def _gather_rows(rows):
    """Return the rows [N x K] of all ranks, in the order of the ranks; N may differ between ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    longest = int(counts.max())
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts.tolist())])
