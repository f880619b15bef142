"""Training objectives: losses per sample, from random numbers keyed by (seed, step, slot in the global batch).

See `interfaces.Objective`. Neither the number of ranks nor an interruption changes what is sampled. The objective of an
autoencoder is in `vae.objective`.
"""

import numpy as np
import torch
import torch.nn.functional as F

from . import deprecated_names, logger
from .data.batching import BatchStream
from .interfaces import Objective
from .nn import drop_conditioning, float64_device, keyed_randn, keyed_rng, keyed_seed, pin, to_device
from .resample import LossAwareSampler, ScheduleSampler, UniformSampler

# Second number of every key, so that streams of one seed differ. LatentStream has 1, sampling 5 and 8, evaluation 11,
# `vae.objective` 15, `data.augmentation` 12 to 14 and from 16 (to 48). Another value would change what old runs sample.
NOISE, TIMESTEPS, DROPOUT, WEIGHTS, CLASSES, CONDITION_TIMESTEPS, CONDITION_NOISE = 2, 3, 4, 6, 7, 9, 10


class StepRNG:
    """Random numbers of one step for the slots of the global batch in one forward pass.

    :param drawn: {request: CPU tensors, with one row per slot} that `StepRNGs` has drawn ahead. Other numbers are drawn
        on request.
    :param requests: set to which each request for numbers that can be drawn ahead is added.
    """

    def __init__(self, seed, step, slots, global_batch, drawn=None, requests=None):
        self.seed, self.step, self.slots, self.global_batch = seed, step, slots, global_batch
        self._drawn, self._requests = drawn or {}, set() if requests is None else requests

    def part(self, start: int, stop: int) -> "StepRNG":
        """Return the StepRNG of the samples start..stop of this rank's batch."""
        drawn = {request: [rows[start:stop] for rows in tensors] for request, tensors in self._drawn.items()}
        return StepRNG(self.seed, self.step, self.slots[start:stop], self.global_batch, drawn, self._requests)

    def normal(self, shape, device, stream: int = NOISE) -> torch.Tensor:
        """Return standard normal noise [n x *shape], one row per slot."""
        return self._numbers(device, StepRNG._draw_normal, tuple(shape), stream)[0]

    def timesteps(self, sampler: ScheduleSampler, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (timesteps [n], importance weights [n]) of a schedule sampler."""
        if sampler.is_constant:
            return self._numbers(device, StepRNG._draw_timesteps, sampler)
        timesteps, weights = self._draw_timesteps(sampler)
        return to_device(timesteps, device), to_device(weights, device)

    def uniform(self, stream: int, device) -> torch.Tensor:
        """Return numbers uniformly distributed over [0, 1), float64 [n], one per slot, on the `float64_device`."""
        return self._numbers(float64_device(torch.device(device)), StepRNG._draw_uniform, stream)[0]

    def generator(self, stream: int) -> np.random.Generator:
        """Return a NumPy Generator that depends on (seed, stream, step) alone, equal on all ranks."""
        return keyed_rng(self.seed, stream, self.step)

    def draw(self, request) -> tuple[torch.Tensor, ...]:
        """Return the CPU tensors of a request (method, *arguments) that was recorded in `requests`."""
        method, *arguments = request
        return method(self, *arguments)

    def _numbers(self, device, *request):
        self._requests.add(request)
        drawn = self._drawn[request] if request in self._drawn else self.draw(request)
        return tuple(to_device(rows, device) for rows in drawn)

    def _draw_normal(self, shape, stream):
        return keyed_randn(shape, [(self.seed, stream, self.step, slot) for slot in self.slots]),

    def _draw_timesteps(self, sampler):
        # Sampled for the global batch and then sliced, so that any number of ranks gets the same timesteps.
        return tuple(rows[self._rank_slice] for rows in
                     sampler.sample(self.global_batch, "cpu", self._global_batch_rng(TIMESTEPS)))

    def _draw_uniform(self, stream):
        numbers = self._global_batch_rng(stream).random_sample(self.global_batch)
        return torch.from_numpy(numbers[self._rank_slice]),

    def _global_batch_rng(self, stream):
        return np.random.RandomState(keyed_seed(self.seed, stream, self.step) % 2**32)

    @property
    def _rank_slice(self):
        return slice(self.slots[0], self.slots[-1] + 1)


class StepRNGs(BatchStream):
    """The `StepRNG` of each step. Its numbers are drawn on a background thread, for a GPU into pinned memory.

    All numbers that the previous step requested are drawn for the next ones. They depend on (seed, step, slot) alone:
    it makes no difference when and where they are drawn.
    """

    def __init__(self, seed: int, slots: range, global_batch: int, device):
        super().__init__()
        self.seed, self.slots, self.global_batch, self.device = seed, slots, global_batch, device
        self._requests: set[tuple] = set()      # of the previous step
        self._recorded: set[tuple] = set()      # of the current one so far

    def at(self, step: int) -> StepRNG:
        """Return the StepRNG of a step."""
        self._requests, self._recorded = self._recorded, set()
        if not self._requests:      # it is not known yet what to draw
            return self.finish((step, {}))
        self.seek(step)
        return next(self)

    def make_batch(self, step):
        rng = StepRNG(self.seed, step, self.slots, self.global_batch)
        return step, {request: [pin(rows, self.device) for rows in rng.draw(request)] for request in self._requests}

    def finish(self, prepared):
        step, drawn = prepared
        return StepRNG(self.seed, step, self.slots, self.global_batch, drawn, self._recorded)


class _TimestepObjective(Objective):
    """Base of objectives with a schedule sampler; "unweighted" among the terms are the losses without its weights."""

    def __init__(self, diffusion, schedule_sampler=None):
        self.diffusion, self.schedule_sampler = diffusion, schedule_sampler or UniformSampler(diffusion)

    def after_step(self, t, terms):
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(t, terms["unweighted"])

    def state_dict(self):
        return self.schedule_sampler.state_dict()

    def load_state_dict(self, state):
        if state:   # {} in runs that had a sampler without state
            self.schedule_sampler.load_state_dict(state)


class DiffusionObjective(_TimestepObjective):
    """The `training_losses` of a diffusion process at sampled timesteps, times importance weights.

    :param diffusion: a `Process`.
    :param class_dropout: probability that the conditioning of a sample is dropped (see `nn.drop_conditioning`), for
        classifier-free guidance. A dropped label becomes `null_label`.
    :param cond_noise_steps: diffuse the `low_res` of an upsampler to a timestep below this, passed to the network.
    :raises ValueError: if the process has fewer steps.
    """

    def __init__(self, diffusion, schedule_sampler=None, class_dropout=0.0, null_label=None, cond_noise_steps=0):
        if cond_noise_steps > diffusion.num_timesteps:
            raise ValueError(f"--cond_noise_steps must be <= {diffusion.num_timesteps}, the steps of the process, got "
                             f"{cond_noise_steps}; lower it or raise --diffusion_steps")
        super().__init__(diffusion, schedule_sampler)
        self.class_dropout, self.null_label, self.cond_noise_steps = class_dropout, null_label, cond_noise_steps

    def __call__(self, model, x0, cond, rng, loss_scale=1.0):
        t, weights = rng.timesteps(self.schedule_sampler, x0.device)
        noise = rng.normal(x0.shape[1:], x0.device)
        terms = self.diffusion.training_losses(model, x0, t, model_kwargs=self._model_kwargs(cond, rng), noise=noise)
        unweighted = terms["loss"].detach()
        return {**{name: losses * weights for name, losses in terms.items()}, "unweighted": unweighted}, t

    def _model_kwargs(self, cond, rng):
        """Return the conditioning, dropped for some samples, with noised low-resolution images."""
        model_kwargs = dict(cond)
        if self.class_dropout and cond:
            device = next(iter(cond.values())).device
            dropped = (rng.uniform(CLASSES, device) < self.class_dropout).to(device)
            model_kwargs = drop_conditioning(cond, dropped, self.null_label)
        if self.cond_noise_steps:
            low_res = cond["low_res"]
            t = (rng.uniform(CONDITION_TIMESTEPS, low_res.device) * self.cond_noise_steps).long().to(low_res.device)
            noise = rng.normal(low_res.shape[1:], low_res.device, CONDITION_NOISE)
            model_kwargs["low_res"] = self.diffusion.noise_condition(low_res, t, noise)
            model_kwargs["low_res_times"] = t
        return model_kwargs

    def log(self, batch, t, terms):
        logger.logkv_mean("x0_std", batch.std(correction=0))
        log_loss_dict(self.diffusion, t, {k: v for k, v in terms.items() if k != "unweighted"})


class PlainObjective(Objective):
    """Objective of a function `losses(model, batch, cond, rng) -> {name: [N]}`, without timesteps or state."""

    def __init__(self, losses):
        self.losses = losses

    def __call__(self, model, batch, cond, rng, loss_scale=1.0):
        return self.losses(model, batch, cond, rng), None

    def log(self, batch, t, terms):
        for name, value in terms.items():
            logger.logkv_mean(name, value.detach().mean())


class ClassifierObjective(_TimestepObjective):
    """Cross-entropy on x0 or, if `noised`, on x0 diffused to sampled timesteps. Log keys start with `prefix`."""

    def __init__(self, diffusion, schedule_sampler, noised=True, prefix="train"):
        super().__init__(diffusion, schedule_sampler)
        self.noised, self.prefix = noised, prefix

    def __call__(self, model, x0, cond, rng, loss_scale=1.0):
        labels = cond["y"]
        t, weights = torch.zeros_like(labels), 1.0
        if self.noised:
            t, weights = rng.timesteps(self.schedule_sampler, x0.device)
            x0 = self.diffusion.q_sample(x0, t, noise=rng.normal(x0.shape[1:], x0.device))
        logits = model(x0, t).float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": loss * weights, "unweighted": loss.detach(), "acc@1": best[:, 0].float(),
                "acc@5": best.any(1).float()}, t

    def log(self, batch, t, terms):
        prefixed = {f"{self.prefix}_{name}": value for name, value in terms.items() if name != "unweighted"}
        log_loss_dict(self.diffusion, t, prefixed)


def log_loss_dict(diffusion, ts: torch.Tensor, losses: dict[str, torch.Tensor]) -> None:
    """Log the mean of every loss [N] and its means over the quarters of the process, without a host sync."""
    quarter = (ts * 4).div(diffusion.num_timesteps, rounding_mode="floor").long()
    counts = torch.zeros(4, device=ts.device).index_add_(0, quarter, torch.ones_like(quarter, dtype=torch.float32))
    log = logger.get_current().logkv_mean   # looked up once, as this logs five values per loss in every step
    for name, value in losses.items():
        value = value.detach().float()
        log(name, value.mean())
        # A quarter without samples has weight 0: which ones are empty is known on the device only.
        means = torch.zeros(4, device=ts.device).index_add_(0, quarter, value) / counts.clamp(min=1)
        for q in range(4):
            log(f"{name}_q{q}", means[q], weight=counts[q])


__getattr__ = deprecated_names("objectives")
