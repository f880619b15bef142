import pytest
import torch
import torch.nn.functional as F

from guided_diffusion_vae.vae.discriminator import (
    DiscriminatorConfig, PatchDiscriminator, adaptive_weight, create_discriminator, discriminator_losses,
    generator_losses,
)


def discriminator(dims=2, channels=16, layers=2):
    torch.manual_seed(0)
    return PatchDiscriminator(dims, 1, channels, layers)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layers, size, patches", [(1, 16, 6), (2, 16, 2), (3, 32, 2)])
def test_discriminator_returns_one_logit_per_patch(dims, layers, size, patches):
    assert discriminator(dims, layers=layers)(torch.randn(2, 1, *(size,) * dims)).shape == (2, 1, *(patches,) * dims)


def test_logits_do_not_depend_on_the_rest_of_the_batch():
    x = torch.randn(4, 1, 24, 24)
    torch.testing.assert_close(discriminator()(x)[2:3], discriminator()(x[2:3]))


def test_logit_without_norms_depends_on_its_patch_only():
    network = discriminator(layers=1)
    network.layers[3] = torch.nn.Identity()
    x = torch.randn(1, 1, 32, 32, requires_grad=True)
    network(x)[0, 0, 0, 0].backward()
    assert x.grad[..., 20:, :].abs().max() == 0 and x.grad[..., :8, :8].abs().max() > 0


def test_widths_double_up_to_eight_times():
    widths = [m.out_channels for m in discriminator(layers=4).layers if isinstance(m, torch.nn.Conv2d)]
    assert widths == [16, 32, 64, 128, 128, 1]


@pytest.mark.parametrize("kind", ["hinge", "least_squares"])
def test_losses_separate_patches_and_the_generator_opposes(kind):
    real, fake = (torch.tensor(v).view(2, 1, 1).requires_grad_() for v in ([0.2, -0.5], [0.1, 0.7]))
    losses = discriminator_losses(kind, real, fake)
    assert losses.shape == (2,)
    pull = torch.autograd.grad(losses.sum(), [real, fake])
    assert (pull[0] < 0).all() and (pull[1] > 0).all()  # descent raises real, lowers fake
    assert (torch.autograd.grad(generator_losses(kind, fake).sum(), fake)[0] < 0).all()


def test_known_losses():
    real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[-3.0, 1.0]])
    assert discriminator_losses("hinge", real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    assert discriminator_losses("least_squares", real, fake).item() == pytest.approx(0.5 * (1.0 + 5.0))
    assert generator_losses("hinge", fake).item() == pytest.approx(1.0)
    assert generator_losses("least_squares", fake).item() == pytest.approx(0.5 * 8.0)


def test_adaptive_weight_makes_gradients_equally_large():
    weight = torch.randn(3, requires_grad=True)
    first, second = (weight**2).sum(), 5 * (weight**4).sum()
    factor = adaptive_weight(first, second, weight)
    large, small = (torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (first, second))
    assert not factor.requires_grad and (factor * small).item() == pytest.approx(large.item(), rel=1e-3)


def test_adaptive_weight_is_the_bounded_ratio_of_unscaled_norms():
    weight = torch.ones(1, requires_grad=True)
    for scale in (1.0, 2.0**10):    # 1e-4 is added to the norm of the second gradient
        assert adaptive_weight(3e-4 * weight.sum(), 2e-4 * weight.sum(), weight, scale).item() == pytest.approx(1.0)
        assert adaptive_weight(9.0 * weight.sum(), 0.0 * weight.sum(), weight, scale).item() == 1e4


@pytest.mark.parametrize("layers", [1, 2])
def test_network_equals_its_layers_computed_from_the_weights(layers):
    network, x = discriminator(layers=layers), torch.randn(2, 1, 24, 16)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    weights = {name.removeprefix("layers."): p for name, p in network.named_parameters()}
    h = F.leaky_relu(F.conv2d(x, weights["0.weight"], weights["0.bias"], 2, 1), 0.2)
    for layer in range(1, layers + 1):
        h = F.conv2d(h, weights[f"{3 * layer - 1}.weight"], None, 1 if layer == layers else 2, 1)
        h = F.leaky_relu(F.group_norm(h, 8, weights[f"{3 * layer}.weight"], weights[f"{3 * layer}.bias"]), 0.2)
    last = f"{3 * layers + 2}"
    torch.testing.assert_close(network(x), F.conv2d(h, weights[f"{last}.weight"], weights[f"{last}.bias"], 1, 1))


def test_adaptive_weight_in_float16_uses_the_loss_scale():
    weight, volume = torch.ones(1, requires_grad=True), torch.ones(2**20, dtype=torch.half)
    first, second = (factor * (weight.half() * volume).float().mean() for factor in (0.02, 0.01))
    assert adaptive_weight(first, second, weight) == 0
    assert adaptive_weight(first, second, weight, scale=2**12).item() == pytest.approx(2, rel=2e-2)
    assert adaptive_weight(first, second, weight, scale=2**24) == 0     # both overflow
    assert adaptive_weight(1e9 * first, second, weight, scale=2**12) == 0


def test_create_discriminator_rejects_invalid_flags_and_small_images():
    config = DiscriminatorConfig(discriminator_channels=16, discriminator_layers=2)
    network = create_discriminator(config, 3, 2)
    assert network.layers[0].in_channels == 2
    with pytest.raises(ValueError, match="--discriminator_channels must be a multiple of 8, got 12"):
        PatchDiscriminator(2, 1, 12)
    with pytest.raises(ValueError, match="--discriminator_layers must be >= 1, got 0"):
        PatchDiscriminator(2, 1, 16, 0)
    with pytest.raises(ValueError, match=r"images of size \(8, 8\) are too small for the discriminator: .* least 12"):
        discriminator()(torch.zeros(1, 1, 8, 8))
