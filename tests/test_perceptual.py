import sys
import types

import numpy as np
import pytest
import torch

from guided_diffusion_vae.vae.perceptual import BACKBONES, PerceptualConfig, PerceptualLoss

LAYERS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


class StandIn(torch.nn.Module):
    """The interface of lpips.LPIPS with one convolution, for machines where lpips cannot be had."""

    def __init__(self, net, pnet_rand, verbose):
        super().__init__()
        self.net = torch.nn.Module()
        self.net.slice1 = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2, 1))

    def forward(self, x, y):
        return (self.net.slice1(x) - self.net.slice1(y)).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture(params=BACKBONES)
def perceptual(request, tmp_path, monkeypatch):
    """The loss with a backbone of random weights in torchvision's layout, or one of a single layer without lpips."""
    torch.manual_seed(0)
    try:
        import lpips  # noqa: F401
        import torchvision
        weights = getattr(torchvision.models, LAYERS[request.param])(weights=None).state_dict()
    except Exception:  # a torchvision that does not fit torch raises a RuntimeError
        monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=StandIn))
        weights = {"features.0.weight": torch.randn(4, 3, 3, 3), "features.0.bias": torch.randn(4)}
    torch.save(weights, tmp_path / "backbone.pth")
    path = str(tmp_path / "backbone.pth")
    return PerceptualLoss(PerceptualConfig(perceptual_net=request.param, perceptual_path=path))


def test_the_distance_is_none_of_a_picture_to_itself_and_gradients_flow(perceptual):
    x, y = torch.rand(2, 1, 64, 64) * 2 - 1, (torch.rand(2, 1, 64, 64) * 2 - 1).requires_grad_()
    assert perceptual(x, x).abs().max() < 1e-6
    distance = perceptual(x, y)
    distance.sum().backward()
    assert distance.shape == (2,) and (distance > 0).all() and y.grad.abs().max() > 0
    assert not any(p.requires_grad for p in perceptual.parameters())
    torch.testing.assert_close(distance, perceptual(x.expand(-1, 3, -1, -1), y.detach().expand(-1, 3, -1, -1)))


def test_volumes_are_compared_by_slices_of_every_axis(perceptual):
    x = torch.rand(2, 1, 40, 48, 64) * 2 - 1
    y = x.clone()
    y[1] = -y[1]
    rng = lambda: np.random.default_rng(3)
    distance = perceptual(x, y, rng())
    assert distance.shape == (2,) and distance[0] < 1e-6 < distance[1]
    torch.testing.assert_close(perceptual(x, y, rng()), distance)


def test_the_range_of_black_and_white_is_taken_away(perceptual):
    x, y = torch.rand(2, 1, 1, 64, 64)
    as_is = perceptual(2 * x - 1, 2 * y - 1)
    perceptual.image_range = (0.0, 1.0)
    torch.testing.assert_close(perceptual(x, y), as_is, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape, said", [
    ((1, 16, 64), "pictures of 16x64 are too small for the perceptual loss"),
    ((1, 64, 64, 24), "pictures of 64x64x24 are too small"),
    ((2, 64, 64), "2 channels: the perceptual loss looks at one or three"),
])
def test_pictures_that_the_backbone_cannot_look_at_are_refused(perceptual, shape, said):
    with pytest.raises(ValueError, match=said):
        perceptual.check_input_shape(shape)


def test_at_least_one_slice_is_compared():
    with pytest.raises(ValueError, match="--perceptual_slices 0"):
        PerceptualLoss(PerceptualConfig(perceptual_slices=0))


def test_weights_must_be_given_and_be_those_of_the_backbone(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file is given .*; --perceptual_path wants torchvision's weights"):
        PerceptualLoss(PerceptualConfig())
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"--use_perceptual_loss True needs lpips, .*\[perceptual\]"):
        PerceptualLoss(PerceptualConfig(perceptual_path=str(tmp_path / "other.pth")))


def test_weights_of_another_network_are_refused(perceptual, tmp_path):
    from guided_diffusion_vae.vae.perceptual import _load_backbone

    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth has .* for features.0.weight, needed is"):
        _load_backbone(perceptual.network.net, tmp_path / "other.pth")
