"""What is learned: losses per sample, from keyed random numbers.

An objective is a callable `(model, batch, cond, draws) -> (terms, times)`, where `terms` are losses per sample [N] with
the one to descend under "loss", and `times` are diffusion steps [N] or None. Everything random is keyed by (seed, step,
slot in the global batch), so neither the number of ranks nor an interruption changes it.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from . import logger
from .autoencoder import autoencoder_losses, to_image_range
from .discriminator import adaptive_weight, discriminator_losses, generator_losses
from .fp16_util import MixedPrecisionTrainer
from .nn import keyed_randn, keyed_rng, keyed_seed, send
from .resample import LossAwareSampler, UniformSampler

# Second number of every key, so that the streams of one seed never meet. LatentStream has 1, sampling 5 and 8.
NOISE, TIMES, DROPOUT, WEIGHTS, CLASSES, CONDITION_TIMES, CONDITION_NOISE = 2, 3, 4, 6, 7, 9, 10
MIRROR = 12  # and one number more for every further axis; evaluation has 11
SLICES = 15
AUGMENT = 16  # and one number more for every angle, shift and scale


class Draws:
    """Random numbers of one step, for the slots of the global batch that one forward pass works on."""

    def __init__(self, seed, step, slots, global_batch):
        self.seed, self.step, self.slots, self.global_batch = seed, step, slots, global_batch

    def part(self, start, stop):
        """Return the draws of the samples start..stop of this rank's batch."""
        return Draws(self.seed, self.step, self.slots[start:stop], self.global_batch)

    def normal(self, shape, device, stream=NOISE):
        """Return standard normal noise [n x *shape], one row a slot."""
        keys = [(self.seed, stream, self.step, slot) for slot in self.slots]
        return send(keyed_randn(shape, keys), device)

    def times(self, sampler, device):
        """Return (times [n], weights [n]): drawn for the whole global batch, so that every rank sees one draw."""
        t, weights = sampler.sample(self.global_batch, device, self._generator(TIMES))
        return t[self._here], weights[self._here]

    def uniform(self, stream, device):
        """Return numbers evenly spread over [0, 1), [n], one a slot."""
        drawn = self._generator(stream).random_sample(self.global_batch)[self._here]
        return send(torch.from_numpy(drawn), device)

    def _generator(self, stream):
        return np.random.RandomState(keyed_seed(self.seed, stream, self.step) % 2**32)

    @property
    def _here(self):
        return slice(self.slots[0], self.slots[-1] + 1)


class _OverTimes:
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


class DiffusionObjective(_OverTimes):
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
        terms = self.diffusion.training_losses(model, x0, t, model_kwargs=self._told(cond, draws), noise=noise)
        terms["unweighted"] = terms["loss"].detach()
        return {k: v if k == "unweighted" else v * weights for k, v in terms.items()}, t

    def _told(self, cond, draws):
        """Return what the network is told: labels of which some are hidden, small pictures with noise on them."""
        told = dict(cond)
        if self.class_dropout and "y" in cond:
            hidden = draws.uniform(CLASSES, cond["y"].device) < self.class_dropout
            told["y"] = cond["y"].masked_fill(hidden, self.null_label)
        if self.cond_noise_steps:
            low_res = cond["low_res"]
            times = (draws.uniform(CONDITION_TIMES, low_res.device) * self.cond_noise_steps).long()
            noise = draws.normal(low_res.shape[1:], low_res.device, CONDITION_NOISE)
            told["low_res"] = noised_condition(self.diffusion, low_res, times, noise)
            told["low_res_times"] = times
        return told

    def log(self, batch, t, terms):
        logger.logkv_mean("x0_std", batch.std(correction=0))
        log_loss_dict(self.diffusion, t, {k: v for k, v in terms.items() if k != "unweighted"})


def noised_condition(diffusion, low_res, times, noise):
    """Return small pictures noised to `times` [N]; time 0 stands for none at all, and leaves them alone."""
    clean = (times == 0).view(-1, *(1,) * (low_res.dim() - 1))
    return torch.where(clean, low_res, diffusion.q_sample(low_res, times, noise))


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


def mirrored(images, draws):
    """Return pictures mirrored along every axis by a coin of its own.  [N x C x ...] -> same."""
    for axis in range(2, images.dim()):
        heads = draws.uniform(MIRROR + axis - 2, images.device) < 0.5
        images = torch.where(heads.view(-1, *(1,) * (images.dim() - 1)), images.flip(axis), images)
    return images


def augmented(images, draws, config):
    """Return pictures or volumes of which a share `config.augment` is turned, scaled and shifted a little.

    Angles (in every plane), scales and shifts are evenly spread within the bounds of an AutoencoderTrainConfig; edges
    are repeated.  [N x C x ...] -> same.
    """
    dims = images.dim() - 2
    streams = itertools.count(AUGMENT)
    share = lambda: draws.uniform(next(streams), images.device)
    chosen = share() < config.augment
    within = lambda bound: torch.where(chosen, bound * (2 * share() - 1), 0.0)

    turn = torch.eye(dims, dtype=torch.float64, device=images.device).repeat(len(images), 1, 1)
    for a, b in itertools.combinations(range(dims), 2):
        angle = within(math.radians(config.augment_rotation))
        plane = torch.eye(dims, dtype=torch.float64, device=images.device).repeat(len(images), 1, 1)
        plane[:, a, a] = plane[:, b, b] = angle.cos()
        plane[:, a, b], plane[:, b, a] = -angle.sin(), angle.sin()
        turn = turn @ plane
    turn = turn / (1 + within(config.augment_scale))[:, None, None]
    shift = torch.stack([within(config.augment_translation) for _ in range(dims)], dim=1)
    # affine_grid measures every axis from -1 to 1, the last axis first.
    half = send(torch.tensor(images.shape[:1:-1], dtype=torch.float64), images.device) / 2
    theta = torch.cat([turn * half / half[:, None], (shift / half)[..., None]], dim=2)
    # In float64, which autocast leaves alone: in bfloat16 the grid would be off by half a pixel.
    grid = F.affine_grid(theta, images.shape, align_corners=False).to(images.dtype)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return torch.where(chosen.view(-1, *(1,) * (images.dim() - 1)), moved, images)


class AutoencoderObjective(PlainObjective):
    """The losses of a KL autoencoder on pictures in [0, 1], its latents drawn with keyed noise.

    :param network: the autoencoder itself, without what distributes it.
    :param train: an AutoencoderTrainConfig, for how pictures are varied.
    :param perceptual: (weight, `PerceptualLoss`) or None.
    :param adversary: an `Adversary`, or None.
    """

    def __init__(self, loss_config, network, image_range, train, perceptual=None, adversary=None):
        self.config, self.network, self.image_range, self.train = loss_config, network, image_range, train
        self.perceptual, self.adversary = perceptual, adversary

    def __call__(self, model, images, cond, draws):
        images = mirrored(images, draws) if self.train.mirror else images
        images = augmented(images, draws, self.train) if self.train.augment else images
        x = to_image_range(images, self.image_range)
        eps = draws.normal(self.network.latent_shape(x.shape[2:]), x.device)
        reconstruction, mean, sigma = model(x, eps)
        terms = autoencoder_losses(self.config, x, reconstruction, mean, 2 * sigma.float().log())
        if self.perceptual:
            weight, distance = self.perceptual
            terms["perceptual_loss"] = distance(reconstruction, x, keyed_rng(draws.seed, SLICES, draws.step))
            terms["loss"] = terms["loss"] + weight * terms["perceptual_loss"]
        if self.adversary and self.adversary.is_heeded(draws.step):
            self.adversary.add_to(terms, x, reconstruction, self.network.last_layer)
        return terms, None


class Adversary:
    """A discriminator in training beside an autoencoder.

    Every microbatch adds its judgement to the losses (`add_to`) and its gradient to the discriminator's (`judge`), with
    which `learn` takes a step. So no more than a microbatch of pictures is kept. All three wait for `is_heeded`.
    """

    def __init__(self, network, config, lr, grad_clip=0.0):
        self.network, self.config, self.grad_clip = network, config, grad_clip
        self.lr = config.discriminator_lr or lr
        self.opt = torch.optim.AdamW(network.parameters(), lr=self.lr, betas=(0.5, 0.9), weight_decay=0.0, fused=True)

    def begin(self, ddp_model, trainer):
        """Take over what the training loop decides: how the network is distributed, and its loss scaled.

        `trainer` is the MixedPrecisionTrainer of the autoencoder.
        """
        self.ddp_model, self.rival_trainer = ddp_model, trainer
        self.mp_trainer = MixedPrecisionTrainer(
            model=self.network, scale_loss=trainer.scale_loss, grad_clip=self.grad_clip,
            fp16_scale_growth=trainer.fp16_scale_growth, name="discriminator_",
        )

    def is_heeded(self, step):
        """Say whether the warm-up is over."""
        return step >= self.config.discriminator_start

    def add_to(self, terms, real, fake, last_layer):
        """Add the adversarial term of a microbatch to its losses [N], and remember the pictures for `judge`."""
        self.network.requires_grad_(False)
        losses = generator_losses(self.config.discriminator_loss, self.network(fake).float())
        self.network.requires_grad_(True)
        weight = self.config.discriminator_weight
        if self.config.adaptive_weight:
            scale = self.rival_trainer.loss_scale
            factor = adaptive_weight(terms["loss"].mean(), losses.mean(), last_layer, scale)
            terms["adaptive_weight"] = factor.expand(len(losses))
            weight = weight * factor
        terms["adversarial_loss"] = losses
        terms["loss"] = terms["loss"] + weight * losses
        self._pair = real.detach(), fake.detach()

    def judge(self, share):
        """Add to the gradient what `add_to` has seen last, a `share` of the batch."""
        (real, fake), self._pair = self._pair, None
        # One pass over both: two passes of a distributed model would need two reductions.
        judged_real, judged_fake = self.ddp_model(torch.cat([real, fake])).float().chunk(2)
        losses = discriminator_losses(self.config.discriminator_loss, judged_real, judged_fake)
        self.mp_trainer.backward(losses.mean() * share)
        logger.logkv_mean("discriminator_loss", losses.detach().mean(), len(real))
        logger.logkv_mean("logits_real", judged_real.detach().mean(), len(real))
        logger.logkv_mean("logits_fake", judged_fake.detach().mean(), len(real))

    def learn(self, lr_factor=1.0):
        """Take one step on what was judged since the last, at `lr_factor` times the learning rate."""
        self.opt.param_groups[0]["lr"] = self.lr * lr_factor
        self.mp_trainer.optimize(self.opt)
        self.mp_trainer.zero_grad()


class ClassifierObjective(_OverTimes):
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
