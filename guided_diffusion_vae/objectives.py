"""What is learned: losses per sample, from keyed random numbers.

An objective is a callable `(model, batch, cond, draws) -> (terms, times)`, where `terms` are losses per sample [N] with
the one to descend under "loss", and `times` are diffusion steps [N] or None. Everything random is keyed by (seed, step,
slot in the global batch), so neither the number of ranks nor an interruption changes it.
"""

import numpy as np
import torch
import torch.nn.functional as F

from . import logger
from .data.augmentation import random_affine, random_flips
from .gaussian_diffusion import noised_condition
from .nn import keyed_randn, keyed_rng, keyed_seed, to_device
from .resample import LossAwareSampler, UniformSampler
from .vae import autoencoder_losses, to_image_range

# Second number of every key, so that the streams of one seed never meet. LatentStream has 1, sampling 5 and 8.
NOISE, TIMESTEPS, DROPOUT, WEIGHTS, CLASSES, CONDITION_TIMESTEPS, CONDITION_NOISE = 2, 3, 4, 6, 7, 9, 10


SLICES = 15


class StepRNG:
    """Random numbers of one step, for the slots of the global batch that one forward pass works on."""

    def __init__(self, seed, step, slots, global_batch):
        self.seed, self.step, self.slots, self.global_batch = seed, step, slots, global_batch

    def part(self, start, stop):
        """Return the draws of the samples start..stop of this rank's batch."""
        return StepRNG(self.seed, self.step, self.slots[start:stop], self.global_batch)

    def normal(self, shape, device, stream=NOISE):
        """Return standard normal noise [n x *shape], one row a slot."""
        keys = [(self.seed, stream, self.step, slot) for slot in self.slots]
        return to_device(keyed_randn(shape, keys), device)

    def times(self, sampler, device):
        """Return (times [n], weights [n]): drawn for the whole global batch, so that every rank sees one draw."""
        t, weights = sampler.sample(self.global_batch, device, self._generator(TIMESTEPS))
        return t[self._here], weights[self._here]

    def uniform(self, stream, device):
        """Return numbers evenly spread over [0, 1), [n], one a slot."""
        drawn = self._generator(stream).random_sample(self.global_batch)[self._here]
        return to_device(torch.from_numpy(drawn), device)

    def _generator(self, stream):
        return np.random.RandomState(keyed_seed(self.seed, stream, self.step) % 2**32)

    @property
    def _here(self):
        return slice(self.slots[0], self.slots[-1] + 1)


class _TimestepObjective:
    """What objectives share whose times a sampler draws; losses before its weights are the terms' "unweighted"."""

    def __init__(self, diffusion, schedule_sampler=None):
        self.diffusion, self.schedule_sampler = diffusion, schedule_sampler or UniformSampler(diffusion)

    def after_step(self, t, terms):
        """Report the losses of a whole step to a sampler that learns from them."""
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(t, terms["unweighted"])

    def state_dict(self):
        return self.schedule_sampler.state_dict() if hasattr(self.schedule_sampler, "state_dict") else {}

    def load_state_dict(self, state):
        if state:
            self.schedule_sampler.load_state_dict(state)


class DiffusionObjective(_TimestepObjective):
    """The losses of `GaussianDiffusion.training_losses` at drawn times, weighted as the sampler of times asks.

    :param class_dropout: share of samples whose label is replaced by `null_label`.
    :param cond_noise_steps: noise the `low_res` of an upsampler to a time drawn below this, and tell the network.
    :raises ValueError: where the process has fewer steps than that.
    """

    def __init__(self, diffusion, schedule_sampler=None, class_dropout=0.0, null_label=None, cond_noise_steps=0):
        if cond_noise_steps > diffusion.num_timesteps:
            raise ValueError(f"--cond_noise_steps {cond_noise_steps} is more than the {diffusion.num_timesteps} steps "
                             "of the process; lower it, or raise --diffusion_steps")
        super().__init__(diffusion, schedule_sampler)
        self.class_dropout, self.null_label, self.cond_noise_steps = class_dropout, null_label, cond_noise_steps

    def __call__(self, model, x0, cond, draws):
        t, weights = draws.times(self.schedule_sampler, x0.device)
        noise = draws.normal(x0.shape[1:], x0.device)
        terms = self.diffusion.training_losses(model, x0, t, model_kwargs=self._embed_conditioning(cond, draws), noise=noise)
        terms["unweighted"] = terms["loss"].detach()
        return {k: v if k == "unweighted" else v * weights for k, v in terms.items()}, t

    def _embed_conditioning(self, cond, draws):
        """Return what the network is told: labels of which some are hidden, small pictures with noise on them."""
        told = dict(cond)
        if self.class_dropout and "y" in cond:
            hidden = draws.uniform(CLASSES, cond["y"].device) < self.class_dropout
            told["y"] = cond["y"].masked_fill(hidden, self.null_label)
        if self.cond_noise_steps:
            low_res = cond["low_res"]
            times = (draws.uniform(CONDITION_TIMESTEPS, low_res.device) * self.cond_noise_steps).long()
            noise = draws.normal(low_res.shape[1:], low_res.device, CONDITION_NOISE)
            told["low_res"] = noised_condition(self.diffusion, low_res, times, noise)
            told["low_res_times"] = times
        return told

    def log(self, batch, t, terms):
        logger.logkv_mean("x0_std", batch.std(correction=0))
        log_loss_dict(self.diffusion, t, {k: v for k, v in terms.items() if k != "unweighted"})


class PlainObjective:
    """An objective without times or memory: `losses(model, batch, cond, draws) -> {name: [N]}`."""

    def __init__(self, losses):
        self.losses = losses

    def __call__(self, model, batch, cond, draws):
        return self.losses(model, batch, cond, draws), None

    def after_step(self, t, terms):
        pass

    def log(self, batch, t, terms):
        for name, value in terms.items():
            logger.logkv_mean(name, value.detach().mean())

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class AutoencoderObjective(PlainObjective):
    """The losses of a KL autoencoder on pictures in [0, 1], its latents drawn with keyed noise.

    :param network: the autoencoder itself, without what distributes it.
    :param train: an AutoencoderTrainConfig, for how pictures are varied.
    :param perceptual: (weight, `PerceptualLoss`) or None.
    :param adversary: an `DiscriminatorTrainer`, or None.
    """

    def __init__(self, loss_config, network, image_range, train, perceptual=None, adversary=None):
        self.config, self.network, self.image_range, self.train = loss_config, network, image_range, train
        self.perceptual, self.adversary = perceptual, adversary

    def __call__(self, model, images, cond, draws):
        images = random_flips(images, draws) if self.train.mirror else images
        images = random_affine(images, draws, self.train) if self.train.augment else images
        x = to_image_range(images, self.image_range)
        eps = draws.normal(self.network.latent_shape(x.shape[2:]), x.device)
        reconstruction, mean, sigma = model(x, eps)
        terms = autoencoder_losses(self.config, x, reconstruction, mean, 2 * sigma.float().log())
        if self.perceptual:
            weight, distance = self.perceptual
            terms["perceptual_loss"] = distance(reconstruction, x, keyed_rng(draws.seed, SLICES, draws.step))
            terms["loss"] = terms["loss"] + weight * terms["perceptual_loss"]
        if self.adversary and self.adversary.is_active(draws.step):
            self.adversary.add_generator_loss(terms, x, reconstruction, self.network.last_layer)
        return terms, None


class ClassifierObjective(_TimestepObjective):
    """Cross-entropy on x0; with `noised`, on x0 noised to drawn times. Log keys begin with `prefix`."""

    def __init__(self, diffusion, schedule_sampler, noised=True, prefix="train"):
        super().__init__(diffusion, schedule_sampler)
        self.noised, self.prefix = noised, prefix

    def __call__(self, model, x0, cond, draws):
        labels = cond["y"]
        t, weights = torch.zeros_like(labels), 1.0
        if self.noised:
            t, weights = draws.times(self.schedule_sampler, x0.device)
            x0 = self.diffusion.q_sample(x0, t, noise=draws.normal(x0.shape[1:], x0.device))
        logits = model(x0, t).float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": loss * weights, "unweighted": loss.detach(), "acc@1": best[:, 0].float(),
                "acc@5": best.any(1).float()}, t

    def log(self, batch, t, terms):
        named = {f"{self.prefix}_{name}": value for name, value in terms.items() if name != "unweighted"}
        log_loss_dict(self.diffusion, t, named)


def log_loss_dict(diffusion, ts, losses):
    """Log the mean of every loss [N] and its means over the quarters of the process, without waiting for the device."""
    quarter = (ts * 4).div(diffusion.num_timesteps, rounding_mode="floor").long()
    counts = torch.zeros(4, device=ts.device).index_add_(0, quarter, torch.ones_like(quarter, dtype=torch.float32))
    for name, value in losses.items():
        value = value.detach().float()
        logger.logkv_mean(name, value.mean())
        means = torch.zeros(4, device=ts.device).index_add_(0, quarter, value) / counts.clamp(min=1)
        for q in range(4):
            logger.logkv_mean(f"{name}_q{q}", means[q], weight=counts[q])
