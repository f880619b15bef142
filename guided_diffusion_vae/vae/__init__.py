"""The parts around an autoencoder that other rooms use: posterior, losses, discriminator, perceptual loss, tiles.

`autoencoder` imports `blocks` and `posterior` of this room, so this page imports nothing that needs `autoencoder`:
import `streaming` and `foreign` by their own names.
"""

from .discriminator import (
    DiscriminatorConfig, PatchDiscriminator, adaptive_weight, create_discriminator, discriminator_losses, generator_losses,
)
from .perceptual import PerceptualConfig, PerceptualLoss
from .posterior import (
    LOGVAR_RANGE, AutoencoderLossConfig, autoencoder_losses, from_image_range, kl_divergence, sample_moments,
    to_image_range,
)
from .tiling import blend_tiles

__all__ = [
    "LOGVAR_RANGE", "AutoencoderLossConfig", "DiscriminatorConfig", "PatchDiscriminator", "PerceptualConfig",
    "PerceptualLoss", "adaptive_weight", "autoencoder_losses", "blend_tiles", "create_discriminator",
    "discriminator_losses", "from_image_range", "generator_losses", "kl_divergence", "sample_moments", "to_image_range",
]
