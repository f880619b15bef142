"""Parts around an autoencoder for other packages: posterior, losses, discriminator, perceptual loss, tiles.

`autoencoder` imports `blocks` and `posterior` from here, so this page must not import `foreign`, which needs
`autoencoder`, nor `objective`, which needs the trainer's modules: import these two, and `streaming`, by name.
"""

from .discriminator import (
    DiscriminatorConfig, PatchDiscriminator, adaptive_weight, create_discriminator, discriminator_losses,
    generator_losses,
)
from .perceptual import PerceptualConfig, PerceptualLoss
from .posterior import (
    LOGVAR_RANGE, AutoencoderLossConfig, autoencoder_losses, from_image_range, kl_divergence, sample_moments,
    to_image_range,
)
from .tiling import blend_tiles
