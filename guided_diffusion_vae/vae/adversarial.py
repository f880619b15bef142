"""Train a discriminator alongside an autoencoder."""

import torch

from .. import logger
from ..fp16_util import MixedPrecisionTrainer
from .discriminator import adaptive_weight, discriminator_losses, generator_losses


class DiscriminatorTrainer:
    """A discriminator in training beside an autoencoder.

    Every microbatch adds its judgement to the losses (`add_generator_loss`) and its gradient to the discriminator's (`backward_discriminator`), with
    which `optimizer_step` takes a step. So no more than a microbatch of pictures is kept. All three wait for `is_active`.
    """

    def __init__(self, network, config, lr, grad_clip=0.0):
        self.network, self.config, self.grad_clip = network, config, grad_clip
        self.lr = config.discriminator_lr or lr
        self.opt = torch.optim.AdamW(network.parameters(), lr=self.lr, betas=(0.5, 0.9), weight_decay=0.0, fused=True)

    def setup(self, ddp_model, trainer):
        """Take over what the training loop decides: how the network is distributed, and its loss scaled.

        `trainer` is the MixedPrecisionTrainer of the autoencoder.
        """
        self.ddp_model, self.generator_trainer = ddp_model, trainer
        self.mp_trainer = MixedPrecisionTrainer(
            model=self.network, scale_loss=trainer.scale_loss, grad_clip=self.grad_clip,
            fp16_scale_growth=trainer.fp16_scale_growth, name="discriminator_",
        )

    def is_active(self, step):
        """Say whether the warm-up is over."""
        return step >= self.config.discriminator_start

    def add_generator_loss(self, terms, real, fake, last_layer):
        """Add the adversarial term of a microbatch to its losses [N], and remember the pictures for `backward_discriminator`."""
        self.network.requires_grad_(False)
        losses = generator_losses(self.config.discriminator_loss, self.network(fake).float())
        self.network.requires_grad_(True)
        weight = self.config.discriminator_weight
        if self.config.adaptive_weight:
            scale = self.generator_trainer.loss_scale
            factor = adaptive_weight(terms["loss"].mean(), losses.mean(), last_layer, scale)
            terms["adaptive_weight"] = factor.expand(len(losses))
            weight = weight * factor
        terms["adversarial_loss"] = losses
        terms["loss"] = terms["loss"] + weight * losses
        self._pair = real.detach(), fake.detach()

    def backward_discriminator(self, share):
        """Add to the gradient what `add_generator_loss` has seen last, a `share` of the batch."""
        (real, fake), self._pair = self._pair, None
        # One pass over both: two passes of a distributed model would need two reductions.
        judged_real, judged_fake = self.ddp_model(torch.cat([real, fake])).float().chunk(2)
        losses = discriminator_losses(self.config.discriminator_loss, judged_real, judged_fake)
        self.mp_trainer.backward(losses.mean() * share)
        logger.logkv_mean("discriminator_loss", losses.detach().mean(), len(real))
        logger.logkv_mean("logits_real", judged_real.detach().mean(), len(real))
        logger.logkv_mean("logits_fake", judged_fake.detach().mean(), len(real))

    def optimizer_step(self, lr_factor=1.0):
        """Take one step on what was judged since the last, at `lr_factor` times the learning rate."""
        self.opt.param_groups[0]["lr"] = self.lr * lr_factor
        self.mp_trainer.optimize(self.opt)
        self.mp_trainer.zero_grad()
