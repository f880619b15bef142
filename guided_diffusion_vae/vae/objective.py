"""Training objective of a KL autoencoder, and the discriminator that is trained alongside it."""

from pathlib import Path

import torch

from .. import checkpoint_util, dist_util, logger
from ..data.augmentation import augment_spectrograms, random_affine, random_flips
from ..fp16_util import MixedPrecisionTrainer
from ..objectives import PlainObjective
from .discriminator import adaptive_weight, discriminator_losses, generator_losses
from .posterior import autoencoder_losses, to_image_range

SLICES = 15     # random stream of the slices of volumes that a perceptual loss compares, see `objectives`
FLAG = "--resume_checkpoint"
SPECTROGRAM_CHANGES = "time_shift", "doppler_shift", "gain"     # what leaves details to reconstruct as they are


class AutoencoderObjective(PlainObjective):
    """The losses of a KL autoencoder on images in [0, 1], with latents sampled by keyed noise.

    :param network: the autoencoder itself, without distributed or compiling wrappers.
    :param train: an AutoencoderTrainConfig, for the augmentation.
    :param perceptual: (weight, `PerceptualLoss`) or None.
    :param discriminator: a `DiscriminatorTrainer` or None.
    :param colormap: the `Colormap` of RGB images, for `train.augment_spectrogram`.
    """

    def __init__(self, loss_config, network, image_range, train, perceptual=None, discriminator=None, colormap=None):
        self.config, self.network, self.image_range, self.train = loss_config, network, image_range, train
        self.perceptual, self.discriminator, self.colormap = perceptual, discriminator, colormap

    def __call__(self, model, images, cond, rng, loss_scale=1.0):
        images = random_flips(images, rng) if self.train.augment_flip else images
        if self.train.augment_spectrogram:      # first, as interpolated colors are on no colormap
            images = augment_spectrograms(images, rng, self.train.augment_spectrogram, SPECTROGRAM_CHANGES,
                                          self.colormap)
        images = random_affine(images, rng, self.train) if self.train.augment else images
        x = to_image_range(images, self.image_range)
        eps = rng.normal(self.network.latent_shape(x.shape[2:]), x.device)
        reconstruction, mean, sigma = model(x, eps)
        terms = autoencoder_losses(self.config, x, reconstruction, mean, 2 * sigma.float().log())
        if self.perceptual:
            weight, distance = self.perceptual
            terms["perceptual_loss"] = distance(reconstruction, x, rng.generator(SLICES))
            terms["loss"] = terms["loss"] + weight * terms["perceptual_loss"]
        if self.discriminator:
            last_layer = self.network.last_layer
            self.discriminator.add_generator_loss(rng.step, terms, x, reconstruction, last_layer, loss_scale)
        return terms, None


class DiscriminatorTrainer:
    """A discriminator trained alongside an autoencoder, from step `discriminator_start` on (`is_active`).

    For each microbatch, `add_generator_loss` adds the adversarial term and `backward_discriminator` accumulates the
    discriminator's gradient; `optimizer_step` updates it once per step. Only one microbatch of images is kept.

    :param network: the discriminator, on its device.
    :param config: a DiscriminatorConfig.
    :param train: the TrainConfig of the autoencoder, for learning rate, gradient clipping and precision.
    """

    def __init__(self, network, config, train):
        self.network, self.config, self.lr = network, config, config.discriminator_lr or train.lr
        self.opt = torch.optim.AdamW(network.parameters(), lr=self.lr, betas=(0.5, 0.9), weight_decay=0.0, fused=True)
        self.mp_trainer = MixedPrecisionTrainer(
            model=network, scale_loss=train.autocast_dtype is torch.float16, grad_clip=train.grad_clip,
            fp16_scale_growth=train.fp16_scale_growth, name="discriminator_",
        )
        self.ddp_model = dist_util.data_parallel(network)
        self._pair = None

    def is_active(self, step: int) -> bool:
        """Return whether the discriminator is trained and used at a step."""
        return step >= self.config.discriminator_start

    def add_generator_loss(self, step: int, terms: dict, real, fake, last_layer, loss_scale: float) -> None:
        """Add the adversarial term of a microbatch to its losses [N]; keep its images for `backward_discriminator`."""
        if not self.is_active(step):
            return
        self.network.requires_grad_(False)
        losses = generator_losses(self.config.discriminator_loss, self.network(fake).float())
        self.network.requires_grad_(True)
        weight = self.config.discriminator_weight
        if self.config.adaptive_weight:
            factor = adaptive_weight(terms["loss"].mean(), losses.mean(), last_layer, loss_scale)
            terms["adaptive_weight"] = factor.expand(len(losses))
            weight = weight * factor
        terms["adversarial_loss"] = losses
        terms["loss"] = terms["loss"] + weight * losses
        self._pair = real.detach(), fake.detach()

    def backward_discriminator(self, step: int, fraction: float) -> None:
        """Accumulate the gradient on the images of `add_generator_loss`, a `fraction` of the batch."""
        if not self.is_active(step):
            return
        (real, fake), self._pair = self._pair, None
        # One pass over both: two passes of a distributed model would require two reductions.
        logits_real, logits_fake = self.ddp_model(torch.cat([real, fake])).float().chunk(2)
        losses = discriminator_losses(self.config.discriminator_loss, logits_real, logits_fake)
        self.mp_trainer.backward(losses.mean() * fraction)
        logger.logkv_mean("discriminator_loss", losses.detach().mean(), len(real))
        logger.logkv_mean("logits_real", logits_real.detach().mean(), len(real))
        logger.logkv_mean("logits_fake", logits_fake.detach().mean(), len(real))

    def optimizer_step(self, step: int, lr_factor: float = 1.0) -> None:
        """Update the discriminator with the accumulated gradient, at `lr_factor` times its learning rate."""
        if not self.is_active(step):
            return
        self.opt.param_groups[0]["lr"] = self.lr * lr_factor
        self.mp_trainer.optimize(self.opt)
        self.mp_trainer.zero_grad()

    def save(self, folder: Path, step: int, header: dict) -> tuple[dict, dict]:
        """Write weights and optimizer; return ({name: size and SHA-256}, entries of the marker)."""
        names = [checkpoint_util.discriminator_name(step), checkpoint_util.discriminator_optimizer_name(step)]
        header = {**header, "kind": "discriminator"}
        saved = (checkpoint_util.save_weights(folder / names[0], self.network.state_dict(), header),
                 checkpoint_util.save(folder / names[1], self.opt.state_dict()))
        return dict(zip(names, saved)), {"discriminator_lg_loss_scale": float(self.mp_trainer.lg_loss_scale)}

    def load(self, folder: Path, marker: dict, device) -> None:
        """Load the discriminator of a step; without its files, as from before it was enabled, it starts as it is."""
        step = marker["step"]
        path = folder / checkpoint_util.discriminator_name(step)
        if not path.is_file():
            logger.warn(f"{folder} has no discriminator at step {step}; starting with a newly initialized one")
            return
        checkpoint_util.load_strict(self.network, checkpoint_util.load_weights(path, device, FLAG)[0], path, FLAG)
        path = folder / checkpoint_util.discriminator_optimizer_name(step)
        self.mp_trainer.load_optimizer(self.opt, checkpoint_util.load(path, device, FLAG))
        self.mp_trainer.lg_loss_scale = marker.get("discriminator_lg_loss_scale", self.mp_trainer.lg_loss_scale)
