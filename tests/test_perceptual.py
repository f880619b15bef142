import sys

import numpy as np
import pytest
import torch

from guided_diffusion_vae.perceptual import NETS, PerceptualConfig, PerceptualLoss

LAYERS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


@pytest.fixture(params=NETS)
def perceptual(request, tmp_path):
    """The loss with a backbone of random weights in torchvision's layout; skipped where lpips cannot be had."""
    try:
        import lpips  # noqa: F401
        import torchvision
    except Exception as error:  # a torchvision that does not fit torch raises a RuntimeError
        pytest.skip(f"no lpips that works here: {error}")
    torch.manual_seed(0)
    backbone = getattr(torchvision.models, LAYERS[request.param])(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
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


def test_pictures_too_small_for_the_backbone_are_refused(perceptual):
    with pytest.raises(ValueError, match=r"pictures of \(16, 64\) are too small for the perceptual loss"):
        perceptual(torch.zeros(1, 1, 16, 64), torch.zeros(1, 1, 16, 64))


def test_weights_must_be_given_and_be_those_of_the_backbone(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file is given .*; --perceptual_path wants torchvision's weights"):
        PerceptualLoss(PerceptualConfig())
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"--use_perceptual_loss True needs lpips, .*\[perceptual\]"):
        PerceptualLoss(PerceptualConfig(perceptual_path=str(tmp_path / "other.pth")))


def test_weights_of_another_network_are_refused(perceptual, tmp_path):
    from guided_diffusion_vae.perceptual import _load_backbone

    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth has .* for features.0.weight, needed is"):
        _load_backbone(perceptual.network.net, tmp_path / "other.pth")
