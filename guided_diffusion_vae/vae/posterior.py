"""The posterior of a KL autoencoder: samples, KL divergence, losses, value ranges."""

import dataclasses

import torch

from ..config import option
from ..nn import mean_flat, to_device

LOGVAR_RANGE = (-30.0, 20.0)    # keeps exp(logvar) finite in float32; the range of Stable Diffusion


@dataclasses.dataclass
class AutoencoderLossConfig:
    SECTION = "autoencoder.training"

    kl_weight: float = option(1e-6, "weight of the KL term, a mean over latent elements", minimum=0)
    recon_loss: str = option("l1", "reconstruction error, a mean over elements", choices=("l1", "l2"))


def to_image_range(images, image_range: tuple[float, float]):
    """Map images in [0, 1] to the value range of a network; inverts `from_image_range`."""
    low, high = image_range
    return images * (high - low) + low


def from_image_range(values, image_range: tuple[float, float]):
    """Map a network's values to [0, 1]; inverts `to_image_range`."""
    low, high = image_range
    return (values - low) / (high - low)


def autoencoder_losses(config: AutoencoderLossConfig, x, reconstruction, mean, logvar) -> dict[str, torch.Tensor]:
    """Return the loss per sample and its two terms, {loss, recon_loss, kl_loss}, each [N], float32.

    The KL divergence of N(mean, exp(logvar)) from N(0, 1) (arXiv:1312.6114, App. B) is averaged over the elements of
    the latent, the distance over those of the image, so that `kl_weight` does not depend on sizes. `x` and
    `reconstruction` [N x C x ...] are in the network's range; mean and logvar are [N x Z x ...].
    """
    difference = reconstruction.float() - x.float()
    distance = mean_flat(_RECON_LOSSES[config.recon_loss](difference))
    divergence = kl_divergence(mean, logvar)
    return {"loss": distance + config.kl_weight * divergence, "recon_loss": distance, "kl_loss": divergence}


_RECON_LOSSES = {"l1": torch.abs, "l2": torch.square}


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) in nats, averaged over latent elements.  [N x Z x ...] -> [N]."""
    mean, logvar = mean.float(), logvar.float()
    return mean_flat(0.5 * (mean**2 + logvar.exp() - 1 - logvar))


def sample_moments(moments: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
    """Return posterior samples of latents, mean + std * eps, or with eps None the mode.

    [N x 2Z x ...], mean and log-variance -> [N x Z x ...].
    """
    mean, logvar = moments.chunk(2, dim=1)
    return mean if eps is None else mean + torch.exp(0.5 * logvar) * to_device(eps, mean.device).to(mean)
