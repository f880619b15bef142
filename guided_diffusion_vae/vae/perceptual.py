"""Compare pictures as a network sees them (LPIPS, Zhang et al. 2018, arXiv 1801.03924), volumes slice by slice."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from .. import checkpoint_util
from ..config import option

BACKBONES = ("vgg", "alex", "squeeze")
MIN_SIZE = 32   # pixels a side that the backbones can take


@dataclass
class PerceptualConfig:
    SECTION = "autoencoder.training"

    use_perceptual_loss: bool = option(False, "add LPIPS to the loss (extra: perceptual)")
    perceptual_weight: float = option(0.1, "weight of the perceptual term", minimum=0)
    perceptual_net: str = option("vgg", "backbone of the perceptual term", choices=BACKBONES)
    perceptual_path: str = option("", "torchvision's weights file of that backbone, such as vgg16-397923af.pth")
    perceptual_slices: int = option(4, "volumes: slices compared along each axis, drawn anew at every step", minimum=1)


class PerceptualLoss(nn.Module):
    """LPIPS with a backbone from a local file; [N x C x ...] twice -> [N]. Gradients reach both arguments.

    One channel is shown three times. Of volumes, `slices` places are drawn along every axis, the same for both.

    :param image_range: the values of black and white.
    :raises ImportError: without lpips (the extra `perceptual`).
    :raises FileNotFoundError, ValueError: no such weights, or those of another network; no slices.
    """

    def __init__(self, config, image_range=(-1.0, 1.0)):
        super().__init__()
        if config.perceptual_slices < 1:
            raise ValueError(f"--perceptual_slices {config.perceptual_slices}: at least one is compared")
        path = config.perceptual_path
        if not path or not Path(path).is_file():
            raise FileNotFoundError(f"{path or 'no file'} is given for the backbone of the perceptual loss; "
                                    f"--perceptual_path wants torchvision's weights of {config.perceptual_net} "
                                    "(download.pytorch.org/models)")
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
            raise ImportError("--use_perceptual_loss True needs lpips, with a torchvision that fits torch "
                              f"({error}): pip install 'guided-diffusion-vae[perceptual]'") from error
        self.network = lpips.LPIPS(net=config.perceptual_net, pnet_rand=True, verbose=False)
        _load_backbone(self.network.net, path)
        self.network.requires_grad_(False).eval()
        self.image_range, self.slices = image_range, config.perceptual_slices

    def train(self, mode=True):
        """Stay in evaluation mode: the distance has no dropout."""
        return super().train(False)

    def check_input_shape(self, shape):
        """Raise ValueError for pictures or volumes [C x ...] that the backbone cannot look at."""
        if shape[0] not in (1, 3):
            raise ValueError(f"{shape[0]} channels: the perceptual loss looks at one or three; set "
                             "--use_perceptual_loss False, or --image_channels")
        if min(shape[1:]) < MIN_SIZE:
            raise ValueError(f"pictures of {'x'.join(map(str, shape[1:]))} are too small for the perceptual loss, "
                             f"which needs {MIN_SIZE} pixels along every axis; set --use_perceptual_loss False")

    def forward(self, x, y, rng=None):
        """Return the distance of two batches; `rng` (numpy Generator) draws the slices of volumes."""
        low, high = self.image_range
        x, y = ((v.float() - low) * (2 / (high - low)) - 1 for v in (x, y))
        if x.dim() == 4:
            return self._distance(x, y)
        planes = []
        for axis in range(2, x.dim()):
            places = torch.as_tensor(rng.integers(x.shape[axis], size=self.slices), device=x.device)
            pair = [v.index_select(axis, places).movedim(axis, 1).flatten(0, 1) for v in (x, y)]
            planes.append(self._distance(*pair).view(len(x), -1))
        return torch.cat(planes, 1).mean(1)

    def _distance(self, x, y):
        shown = [v.expand(-1, 3, -1, -1) if v.shape[1] == 1 else v for v in (x, y)]
        with torch.autocast(x.device.type, enabled=False):
            return self.network(*shown).flatten()


def _load_backbone(net, path):
    """Load torchvision's weights into lpips' slices of the same network, whose layers keep torchvision's numbers."""
    weights = checkpoint_util.load(path, "cpu", "--perceptual_path")
    state = {}
    for name, value in net.state_dict().items():
        _, number, kind = name.split(".", 2)        # slice1.0.weight, slice2.3.squeeze.weight
        source = f"features.{number}.{kind}"
        if source not in weights or weights[source].shape != value.shape:
            found = tuple(weights[source].shape) if source in weights else "nothing"
            raise ValueError(f"{path} has {found} for {source}, needed is {tuple(value.shape)}; --perceptual_path "
                             "wants torchvision's weights of --perceptual_net")
        state[name] = weights[source]
    net.load_state_dict(state)
