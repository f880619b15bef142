import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from guided_diffusion_vae.losses import (
    approx_standard_normal_cdf, discretized_gaussian_log_likelihood, gaussian_log_density, normal_kl,
)


def test_gaussian_log_density_equals_torch_distributions():
    x, means, log_scales = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).double()
    expected = Normal(means, log_scales.exp()).log_prob(x)
    torch.testing.assert_close(gaussian_log_density(x, means=means, log_scales=log_scales), expected)


def test_kl_equals_torch_distributions():
    m1, l1, m2, l2 = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).double()
    expected = kl_divergence(Normal(m1, (l1 / 2).exp()), Normal(m2, (l2 / 2).exp()))
    torch.testing.assert_close(normal_kl(m1, l1, m2, l2), expected)


def test_kl_of_a_normal_to_itself_is_zero():
    m, l = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    assert normal_kl(m, l, m, l).abs().max() < 1e-6


def test_kl_accepts_numbers_with_tensors():
    m = torch.tensor([0.0, 2.0])
    torch.testing.assert_close(normal_kl(m, 0.0, 0.0, 0.0), m**2 / 2)
    torch.testing.assert_close(normal_kl(0.0, 0.0, m, 0.0), m**2 / 2)


def test_kl_rejects_four_numbers():
    with pytest.raises(TypeError, match="at least one tensor"):
        normal_kl(0.0, 0.0, 1.0, 0.0)


def test_cdf_error_is_below_the_documented_bound():
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    assert (approx_standard_normal_cdf(x) - torch.special.ndtr(x)).abs().max() < 5e-4


def test_probabilities_of_all_8bit_values_sum_to_one():
    levels = torch.arange(256.0) / 127.5 - 1
    for mean, log_scale in [(0.0, -1.0), (0.9, -3.0), (-2.0, 0.5)]:
        log_p = discretized_gaussian_log_likelihood(
            levels, means=torch.full_like(levels, mean), log_scales=torch.full_like(levels, log_scale)
        )
        assert abs(log_p.exp().sum() - 1) < 1e-4


def test_impossible_values_have_a_floor_and_finite_gradients():
    means = torch.full((3,), 50.0, requires_grad=True)
    levels, log_scales = torch.tensor([-1.0, 0.0, 0.5]), torch.full((3,), -5.0)
    log_p = discretized_gaussian_log_likelihood(levels, means=means, log_scales=log_scales)
    torch.testing.assert_close(log_p, torch.full((3,), math.log(1e-12)))
    log_p.sum().backward()
    assert means.grad.isfinite().all()


def test_likelihood_rejects_differing_shapes():
    with pytest.raises(ValueError, match=r"means \(2,\), log_scales \(3,\)"):
        discretized_gaussian_log_likelihood(torch.zeros(3), means=torch.zeros(2), log_scales=torch.zeros(3))
