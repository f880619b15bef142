"""The perceptual distance LPIPS (Zhang et al. 2018, arXiv:1801.03924), of volumes slice by slice."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from ..config import option, require, validate
from ..files import load_tensors
from ..nn import to_device

BACKBONES = ("vgg", "alex", "squeeze")
MIN_SIZE = 32   # pixels per side; the backbones downsample by up to 32


@dataclass
class PerceptualConfig:
    SECTION = "autoencoder.training"

    use_perceptual_loss: bool = option(False, "add LPIPS to the loss (extra: perceptual)", essential="logdir")
    perceptual_weight: float = option(0.1, "weight of the perceptual term", minimum=0)
    perceptual_net: str = option("vgg", "backbone of the perceptual term", choices=BACKBONES)
    perceptual_path: str = option("", "torchvision weights file of the backbone, such as vgg16-397923af.pth")
    perceptual_slices: int = option(4, "random slices of volumes that are compared along each axis per step", minimum=1)


class PerceptualLoss(nn.Module):
    """LPIPS with a backbone from a local file; [N x C x ...] twice -> [N]. Gradients flow to both arguments.

    A single channel is repeated to three. Volumes are compared in `slices` random slices along every axis.

    :param image_range: minimum and maximum intensity of the images.
    :raises ImportError: without lpips (the extra `perceptual`).
    :raises FileNotFoundError: if the weights file does not exist.
    :raises ValueError: if it contains weights of another network, or an option is out of bounds.
    """

    def __init__(self, config: PerceptualConfig, image_range: tuple[float, float] = (-1.0, 1.0)):
        super().__init__()
        path = validate(config).perceptual_path
        require((path and Path(path).is_file(), f"--perceptual_path {path or 'is not set'}: expected a file with "
                 f"torchvision's weights of {config.perceptual_net} (download.pytorch.org/models)"),
                error=FileNotFoundError)
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch version
            raise ImportError("--use_perceptual_loss True requires lpips, and a torchvision that matches torch "
                              f"({error}): pip install 'guided-diffusion-vae[perceptual]'") from error
        self.network = lpips.LPIPS(net=config.perceptual_net, pnet_rand=True, verbose=False)
        _load_backbone(self.network.net, path)
        self.network.requires_grad_(False).eval()
        self.image_range, self.slices = image_range, config.perceptual_slices

    def train(self, mode=True):
        """Stay in evaluation mode: the distance has no dropout."""
        return super().train(False)

    def check_input_shape(self, shape) -> None:
        """Check that the backbone can process images or volumes of shape (C, ...).

        :raises ValueError: otherwise.
        """
        require(
            (shape[0] in (1, 3), f"images have {shape[0]} channels: the perceptual loss expects 1 or 3; set "
                                 "--use_perceptual_loss False or --image_channels"),
            (min(shape[1:]) >= MIN_SIZE,
             f"images of size {'x'.join(map(str, shape[1:]))} are too small for the perceptual loss: expected at least "
             f"{MIN_SIZE} along every axis; set --use_perceptual_loss False"),
        )

    def forward(self, x, y, rng=None) -> torch.Tensor:
        """Return the distances [N] of two batches; `rng` (NumPy Generator) selects the slices of volumes."""
        low, high = self.image_range
        x, y = ((v.float() - low) * (2 / (high - low)) - 1 for v in (x, y))
        if x.dim() == 4:
            return self._distance(x, y)
        planes = []
        for axis in range(2, x.dim()):
            positions = to_device(torch.from_numpy(rng.integers(x.shape[axis], size=self.slices)), x.device)
            pair = [v.index_select(axis, positions).movedim(axis, 1).flatten(0, 1) for v in (x, y)]
            planes.append(self._distance(*pair).view(len(x), -1))
        return torch.cat(planes, 1).mean(1)

    def _distance(self, x, y):
        pair = [v.expand(-1, 3, -1, -1) if v.shape[1] == 1 else v for v in (x, y)]
        with torch.autocast(x.device.type, enabled=False):
            return self.network(*pair).flatten()


def _load_backbone(net, path):
    """Load torchvision's weights into lpips' slices of the same network, which keep torchvision's layer numbers."""
    weights = load_tensors(path, "cpu", "--perceptual_path")
    state = {}
    for name, value in net.state_dict().items():
        _, number, kind = name.split(".", 2)        # slice1.0.weight, slice2.3.squeeze.weight
        source = f"features.{number}.{kind}"
        shape = tuple(weights[source].shape) if source in weights else "no weights"
        require((shape == tuple(value.shape), f"{path} has {shape} for {source}: expected {tuple(value.shape)}; set "
                 "--perceptual_path to torchvision's weights of --perceptual_net"))
        state[name] = weights[source]
    net.load_state_dict(state)
