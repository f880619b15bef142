"""A patch discriminator between images and reconstructions, and the adversarial losses.

Isola et al. 2017 (arXiv:1611.07004, Sec. 3.2.2) as used by VQGAN (Esser et al. 2021, arXiv:2012.09841, Sec. 3.1).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..config import option, require
from ..nn import conv_nd, mean_flat

GROUPS = 8      # of every norm


@dataclass
class DiscriminatorConfig:
    SECTION = "autoencoder.training"

    discriminator_weight: float = option(
        0.0, "weight of the adversarial term, such as 0.5; 0: no discriminator", minimum=0, essential=True)
    discriminator_start: int = option(
        1000, "steps before the discriminator is trained and the adversarial term is used", minimum=0)
    discriminator_loss: str = option(
        "hinge", "adversarial loss of discriminator and autoencoder", choices=("hinge", "least_squares"))
    adaptive_weight: bool = option(
        False, "scale the adversarial term so that its gradient at the last layer has the norm of the reconstruction's "
               "(VQGAN, Eq. 7), separately on each rank and in each forward pass")
    discriminator_channels: int = option(64, "width of the discriminator's first layer, a multiple of 8", minimum=8)
    discriminator_layers: int = option(
        3, "stride-2 layers of the discriminator; with more it sees larger patches", minimum=1)
    discriminator_lr: float = option(0.0, "learning rate of the discriminator; 0: that of the autoencoder", minimum=0)


def create_discriminator(config: DiscriminatorConfig, dims: int, in_channels: int) -> "PatchDiscriminator":
    """Build the network that a DiscriminatorConfig describes."""
    return PatchDiscriminator(dims, in_channels, config.discriminator_channels, config.discriminator_layers)


class PatchDiscriminator(nn.Module):
    """Return a logit per overlapping patch, high for real ones.  [N x C x ...] -> [N x 1 x smaller ...].

    Convolutions of kernel size 4, `layers` of them with stride 2, widths doubling up to eightfold. Norms are over
    groups, not over the batch, so that a sample gets the same logits in any microbatch and on any number of ranks.

    :raises ValueError: if the norms' groups do not divide `channels`.
    """

    def __init__(self, dims: int, in_channels: int, channels: int = 64, layers: int = 3):
        super().__init__()
        require(
            (channels % GROUPS == 0, f"--discriminator_channels must be a multiple of {GROUPS}, got {channels}"),
            (layers >= 1, f"--discriminator_layers must be >= 1, got {layers}"),
        )
        blocks, width = [conv_nd(dims, in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], channels
        for layer in range(1, layers + 1):
            out = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            blocks += [conv_nd(dims, width, out, 4, stride=stride, padding=1, bias=False), nn.GroupNorm(GROUPS, out),
                       nn.LeakyReLU(0.2)]
            width = out
        self.layers = nn.Sequential(*blocks, conv_nd(dims, width, 1, 4, padding=1))
        # Kernel size 4 at stride 1 takes one element off an axis, twice: 3 elements leave one logit.
        self.min_size = 2**layers * 3

    def check_min_size(self, sizes) -> None:
        """Check that an image of these spatial sizes has at least one patch.

        :raises ValueError: otherwise.
        """
        if min(sizes) < self.min_size:
            raise ValueError(f"images of size {tuple(sizes)} are too small for the discriminator: expected at least "
                             f"{self.min_size} along every axis; lower --discriminator_layers")

    def forward(self, x):
        self.check_min_size(x.shape[2:])
        return self.layers(x)


def discriminator_losses(kind: str, real, fake) -> torch.Tensor:
    """Return the discriminator's losses [N] from the logits [N x 1 x ...] of images and of reconstructions.

    hinge: Lim and Ye 2017 (arXiv:1705.02894); least_squares: Mao et al. 2017 (arXiv:1611.04076, Eq. 9).
    """
    if kind == "hinge":
        return 0.5 * (mean_flat(F.relu(1 - real)) + mean_flat(F.relu(1 + fake)))
    return 0.5 * (mean_flat((real - 1) ** 2) + mean_flat(fake**2))


def generator_losses(kind: str, fake) -> torch.Tensor:
    """Return the autoencoder's adversarial losses [N] from the logits [N x 1 x ...] of its reconstructions."""
    return mean_flat(-fake) if kind == "hinge" else 0.5 * mean_flat((fake - 1) ** 2)


def adaptive_weight(reconstruction, adversarial, last_layer, scale: float = 1.0) -> torch.Tensor:
    """Return the factor that makes the gradients of two losses at a weight equally large (VQGAN, Eq. 7).

    Both losses are scalars; no gradient flows through the factor. The loss `scale` keeps float16 gradients from
    underflow: that of a mean over a large volume would be 0. If they overflow, the factor is 0 and the step is skipped.
    """
    large, small = (torch.autograd.grad(loss * scale, last_layer, retain_graph=True)[0].float().norm() / scale
                    for loss in (reconstruction, adversarial))
    usable = large.isfinite() & small.isfinite()
    return (large / (small + 1e-4)).clamp(0, 1e4).where(usable, torch.zeros_like(large)).detach()
