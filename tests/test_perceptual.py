import sys
import types

import numpy as np
import pytest
import torch

from guided_diffusion_vae.vae.perceptual import BACKBONES, PerceptualConfig, PerceptualLoss

LAYERS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


class StandIn(torch.nn.Module):
    """The interface of lpips.LPIPS with one convolution, for machines without lpips."""

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
    except Exception:  # RuntimeError: a torchvision of another torch version
        monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=StandIn))
        weights = {"features.0.weight": torch.randn(4, 3, 3, 3), "features.0.bias": torch.randn(4)}
    torch.save(weights, tmp_path / "backbone.pth")
    path = str(tmp_path / "backbone.pth")
    loss = PerceptualLoss(PerceptualConfig(perceptual_net=request.param, perceptual_path=path))
    loss.kind = request.param
    return loss


def test_distance_to_itself_is_zero_and_gradients_flow(perceptual):
    x, y = torch.rand(2, 1, 64, 64) * 2 - 1, (torch.rand(2, 1, 64, 64) * 2 - 1).requires_grad_()
    assert perceptual(x, x).abs().max() < 1e-6
    distance = perceptual(x, y)
    distance.sum().backward()
    assert distance.shape == (2,) and (distance > 0).all() and y.grad.abs().max() > 0
    assert not any(p.requires_grad for p in perceptual.parameters())
    torch.testing.assert_close(distance, perceptual(x.expand(-1, 3, -1, -1), y.detach().expand(-1, 3, -1, -1)))


def test_volumes_are_compared_in_slices_along_every_axis(perceptual):
    x = torch.rand(2, 1, 40, 48, 64) * 2 - 1
    y = x.clone()
    y[1] = -y[1]
    rng = lambda: np.random.default_rng(3)
    distance = perceptual(x, y, rng())
    assert distance.shape == (2,) and distance[0] < 1e-6 < distance[1]
    torch.testing.assert_close(perceptual(x, y, rng()), distance)


def test_distance_does_not_depend_on_image_range(perceptual):
    x, y = torch.rand(2, 1, 1, 64, 64)
    as_is = perceptual(2 * x - 1, 2 * y - 1)
    perceptual.image_range = (0.0, 1.0)
    torch.testing.assert_close(perceptual(x, y), as_is, rtol=1e-4, atol=1e-5)


class Recorder(torch.nn.Module):
    """Keep the arguments of LPIPS, and return the mean of the first: what a slice contains shows in its distance."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, y):
        self.seen.append((x, y, torch.is_autocast_enabled("cpu")))
        return x.mean((1, 2, 3), keepdim=True)


def test_backbone_receives_three_channels_between_minus_one_and_one(tmp_path, perceptual):
    path, x, y = str(tmp_path / "backbone.pth"), torch.rand(2, 1, 40, 32), torch.rand(2, 1, 40, 32)
    for low, high in ((-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)):
        loss = PerceptualLoss(PerceptualConfig(perceptual_path=path, perceptual_net=perceptual.kind), (low, high))
        loss.network = Recorder()
        with torch.autocast("cpu", torch.bfloat16):
            loss(x * (high - low) + low, y * (high - low) + low)
        seen_x, seen_y, autocast = loss.network.seen[0]
        torch.testing.assert_close(seen_x, (2 * x - 1).expand(2, 3, 40, 32))
        torch.testing.assert_close(seen_y, (2 * y - 1).expand(2, 3, 40, 32))
        assert not autocast


@pytest.mark.parametrize("slices", [1, 3])
def test_distance_of_volumes_is_the_mean_over_random_slices_of_every_axis(tmp_path, perceptual, slices):
    config = PerceptualConfig(perceptual_path=str(tmp_path / "backbone.pth"), perceptual_net=perceptual.kind,
                              perceptual_slices=slices)
    loss = PerceptualLoss(config)
    loss.network = Recorder()
    sizes = 33, 40, 64
    x = torch.rand(2, 1, *sizes) * 2 - 1
    distance = loss(x, x, np.random.default_rng(3))
    rng, means = np.random.default_rng(3), []
    for axis, size in enumerate(sizes):
        positions = rng.integers(size, size=slices)
        means += [x.select(2 + axis, int(position)).mean((1, 2, 3)) for position in positions]
    torch.testing.assert_close(distance, torch.stack(means).mean(0))
    assert [len(seen[0]) for seen in loss.network.seen] == [2 * slices] * 3


def test_backbone_has_the_weights_of_the_file_in_evaluation_mode(tmp_path, perceptual):
    weights = torch.load(str(tmp_path / "backbone.pth"), weights_only=True)
    first = perceptual.network.net.state_dict()["slice1.0.weight"]
    assert torch.equal(first, weights["features.0.weight"])
    perceptual.train()
    assert not any(module.training for module in perceptual.modules())


@pytest.mark.parametrize("shape, message", [
    ((1, 16, 64), "images of size 16x64 are too small for the perceptual loss: expected at least 32"),
    ((1, 64, 64, 24), "images of size 64x64x24 are too small"),
    ((2, 64, 64), "images have 2 channels: the perceptual loss expects 1 or 3"),
])
def test_images_that_the_backbone_cannot_process_are_rejected(perceptual, shape, message):
    with pytest.raises(ValueError, match=message):
        perceptual.check_input_shape(shape)


def test_perceptual_loss_rejects_zero_slices():
    with pytest.raises(ValueError, match="--perceptual_slices must be >= 1, got 0"):
        PerceptualLoss(PerceptualConfig(perceptual_slices=0))


def test_missing_weights_or_lpips_are_rejected(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="--perceptual_path is not set: expected .* weights of vgg"):
        PerceptualLoss(PerceptualConfig())
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"--use_perceptual_loss True requires lpips, .*\[perceptual\]"):
        PerceptualLoss(PerceptualConfig(perceptual_path=str(tmp_path / "other.pth")))


def test_weights_of_another_network_are_rejected(perceptual, tmp_path):
    from guided_diffusion_vae.vae.perceptual import _load_backbone

    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth has .* for features.0.weight: expected"):
        _load_backbone(perceptual.network.net, tmp_path / "other.pth")
