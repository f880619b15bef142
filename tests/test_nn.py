"""Claims about the building blocks of all networks."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from guided_diffusion_vae import nn
from guided_diffusion_vae.autoencoder import AutoencoderKL
from guided_diffusion_vae.data.augmentation import random_affine, random_flips
from guided_diffusion_vae.evaluation.image_metrics import PAIRED_METRICS
from guided_diffusion_vae.train_util import AutoencoderTrainConfig
from guided_diffusion_vae.unet import UNetModel


@pytest.fixture
def uncompiled(monkeypatch):
    """Run the functions of fused norms as they are: building their kernels takes a minute."""
    monkeypatch.setattr(nn, "_compiled", lambda function: function)


def test_fused_norms_equal_separate_kernels(uncompiled):
    cases = [((2, 8, 5, 7), True, torch.bfloat16), ((3, 8, 3, 4, 5), False, torch.float32),
             ((2, 8, 6), False, torch.bfloat16), ((2, 8, 5, 7), True, torch.float32)]
    torch.manual_seed(0)
    for shape, modulated, dtype in cases:
        norm = nn.GroupNorm32(4, 8)
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        random = lambda *shape, dtype=dtype: torch.randn(shape).to(dtype).requires_grad_()
        x, grad = random(*shape), random(*shape)
        modulation = [random(shape[0], 8, *(1,) * (len(shape) - 2)) for _ in range(2 * modulated)]
        results = []
        for norm.is_fused in (False, True):
            y = nn.norm_act(norm, x, *modulation)
            results.append([y, *torch.autograd.grad(y, [x, norm.weight, norm.bias, *modulation], grad)])
        for expected, actual in zip(*results):
            assert actual.dtype == expected.dtype and actual.shape == expected.shape
            error = (actual.float() - expected.float()).norm() / expected.float().norm()
            assert error < (1e-6 if dtype is torch.float32 else 1e-2)


def test_fused_norms_on_a_gpu_read_nothing_on_the_host_and_return_the_dtype_of_their_input():
    with FakeTensorMode():
        x = torch.empty(2, 8, 5, 7, device="cuda", dtype=torch.bfloat16)
        modulation = [torch.empty(2, 8, 1, 1, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        weight, bias = torch.empty(8, device="cuda"), torch.empty(8, device="cuda")
        y, mean, rstd = nn._norm_act(x, weight, bias, *modulation, 4, 1e-5)
        gradients = nn._norm_act_gradients(y, x, weight, bias, *modulation, mean, rstd, 4)
    assert y.dtype == x.dtype and mean.dtype == rstd.dtype == torch.float32 and mean.shape == (2, 4, 1, 1, 1)
    for gradient, tensor in zip(gradients, (x, weight, bias, *modulation)):
        assert (gradient.shape, gradient.dtype, gradient.device) == (tensor.shape, tensor.dtype, tensor.device)


def test_fused_norms_of_a_network_equal_separate_kernels(uncompiled):
    for recompute in (False, True):
        torch.manual_seed(0)
        unet = UNetModel(4, 4, 32, 4, 1, (), channel_mult=(1, 2), use_scale_shift_norm=True, resblock_updown=True,
                         recompute_norms=recompute)
        autoencoder = AutoencoderKL(2, 1, 1, 1, (8, 16), False, 4, 4, recompute_norms=recompute)
        for network, inputs in ((unet, (torch.randn(2, 4, 4, 4), torch.arange(2))),
                                (autoencoder, (torch.randn(2, 1, 4, 4), torch.randn(2, 4, 2, 2)))):
            [torch.nn.init.normal_(p, std=0.1) for p in network.parameters()]
            gradients = []
            for fused in (False, True):
                if fused:
                    nn.fuse_norms(network)
                y = network(*inputs)
                loss = (y if isinstance(y, torch.Tensor) else y[0]).square().mean()
                # Some gradients are rounding errors: that of a bias before a norm over single channels.
                of_weights = torch.autograd.grad(loss, list(network.parameters()))
                gradients.append(torch.cat([gradient.flatten() for gradient in of_weights]))
            assert sum(getattr(module, "is_fused", False) for module in network.modules()) > 4
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * gradients[0].abs().max().item())


def test_keyed_randn_depends_only_on_the_key():
    first = nn.keyed_randn((3, 4), [(1, 2, 3), (1, 2, 4)])
    torch.randn(7)
    again = nn.keyed_randn((3, 4), [(9, 9), (1, 2, 4), (1, 2, 3)])
    assert first.shape == (2, 3, 4) and first.dtype == torch.float32
    assert torch.equal(first[0], again[2]) and torch.equal(first[1], again[1])


def test_keyed_randn_rows_equal_samples_of_keyed_rng():
    keys = [(4, i) for i in range(50)]
    for row, key in zip(nn.keyed_randn((3, 1), keys), keys):  # an odd count leaves a buffered value
        assert np.array_equal(row.numpy(), nn.keyed_rng(*key).standard_normal((3, 1), dtype=np.float32))


def test_keyed_seed_is_reproducible_and_valid_for_torch():
    seeds = [nn.keyed_seed(0, step) for step in range(1000)]
    assert seeds == [nn.keyed_seed(0, step) for step in range(1000)] and len(set(seeds)) == 1000
    assert min(seeds) >= 0 and max(seeds) < 2**63
    torch.Generator().manual_seed(max(seeds))


def test_keys_in_another_order_give_other_samples():
    keys = [(0, 1), (1, 0), (0, 0, 1), (1,), (-1,)]
    rows = nn.keyed_randn((8,), keys)
    assert len({tuple(row.tolist()) for row in rows}) == len(keys)


def test_keyed_randn_is_standard_normal_across_adjacent_keys():
    samples = nn.keyed_randn((16,), [(0, step) for step in range(1000)])
    assert abs(samples.mean()) < 0.03 and abs(samples.std() - 1) < 0.03
    assert torch.corrcoef(samples.t())[0, 1:].abs().max() < 0.15


def test_numpy_integers_give_the_same_key():
    assert nn.keyed_seed(np.int64(5)) == nn.keyed_seed(5)
    assert torch.equal(nn.keyed_randn((4,), [(np.int64(5),)]), nn.keyed_randn((4,), [(5,)]))


@pytest.mark.parametrize("dims, shape", [(1, (8,)), (2, (8, 6)), (3, (8, 6, 4))])
def test_layers_exist_for_one_to_three_axes(dims, shape):
    x = torch.randn(2, 3, *shape)
    half = tuple(n // 2 for n in shape)
    assert nn.conv_nd(dims, 3, 5, 3, stride=2, padding=1)(x).shape == (2, 5, *half)
    assert nn.avg_pool_nd(dims, kernel_size=2)(x).shape == (2, 3, *half)
    assert nn.conv_transpose_nd(dims, 3, 5, 2, stride=2)(x).shape == (2, 5, *(2 * n for n in shape))
    assert torch.allclose(nn.adaptive_avg_pool_nd(dims, 1)(x).flatten(1), x.flatten(2).mean(2), atol=1e-6)
    assert nn.resize_linear(x, half).shape == (2, 3, *half)


def value_and_gradient(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos())[0]


@pytest.mark.parametrize("count", [1, 3, 5, 6, 15, 20, 36])
def test_deterministic_channel_means_equal_adaptive_pooling(count, numerics):
    for grid in ((4,), (2, 3), (2, 1, 3)):
        x = torch.randn(2, 15, *grid)
        expected = value_and_gradient(lambda x: nn.adaptive_channel_mean(x, count), x)
        torch.use_deterministic_algorithms(True)
        for found, wanted in zip(value_and_gradient(lambda x: nn.adaptive_channel_mean(x, count), x), expected):
            torch.testing.assert_close(found, wanted)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("factors, grid", [((1, 2, 2), (3, 4, 6)), ((2, 2, 2), (5, 4, 7)), (3, (3, 6, 8))])
def test_deterministic_pooling_of_volumes_equals_that_of_pytorch(factors, grid, numerics):
    x, pool = torch.randn(2, 3, *grid), nn.avg_pool_nd(3, kernel_size=factors, stride=factors)
    expected = value_and_gradient(pool, x)
    assert all(torch.equal(*pair) for pair in zip(expected, value_and_gradient(torch.nn.AvgPool3d(factors), x)))
    half = pool(x.bfloat16())       # PyTorch has no such kernel for CPUs
    torch.testing.assert_close(half, expected[0].bfloat16(), atol=0.02, rtol=0.02)
    torch.use_deterministic_algorithms(True)
    for found, wanted in zip(value_and_gradient(pool, x), expected):
        torch.testing.assert_close(found, wanted)


def test_overlapping_pooling_of_volumes_is_that_of_pytorch(numerics):
    torch.use_deterministic_algorithms(True)
    x = torch.randn(1, 2, 5, 5, 5)
    for options in ({"stride": 1}, {"padding": 1}):
        assert torch.equal(nn.avg_pool_nd(3, 3, **options)(x), F.avg_pool3d(x, 3, **options))


def test_without_tf32_restores_both_settings(numerics):
    flags = lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    nn.allow_tf32(True)
    assert flags() == (True, True)
    torch.backends.cuda.matmul.allow_tf32 = False       # PyTorch's default
    with pytest.raises(KeyError), nn.without_tf32():
        assert flags() == (False, False)
        raise KeyError
    assert flags() == (True, False)


def test_convolutions_accept_one_number_per_axis():
    convolve = nn.conv_nd(3, 1, 2, (1, 3, 5), stride=(1, 2, 4), padding=(0, 1, 2))
    assert convolve(torch.zeros(1, 1, 4, 8, 16)).shape == (1, 2, 4, 4, 4)


@pytest.mark.parametrize("build", [nn.conv_nd, nn.conv_transpose_nd, nn.avg_pool_nd, nn.adaptive_avg_pool_nd])
@pytest.mark.parametrize("dims", [0, 4])
def test_other_numbers_of_axes_are_rejected(build, dims):
    with pytest.raises(ValueError, match=f"over {dims} spatial axes: --dims must be 1, 2 or 3"):
        build(dims, 2)


def test_per_axis_repeats_a_scalar_and_checks_a_tuple():
    assert nn.per_axis(2, 3) == (2, 2, 2)
    assert nn.per_axis([1, 2], 2) == (1, 2)
    with pytest.raises(ValueError, match="2 values for 3 spatial axes"):
        nn.per_axis((1, 2), 3)


def test_volumes_keep_their_first_axis_by_default():
    assert [nn.resampling_factors(dims) for dims in (1, 2, 3)] == [(2,), (2, 2), (1, 2, 2)]
    assert nn.resampling_factors(3, resample_depth=True) == (2, 2, 2)


@pytest.mark.parametrize("factor", [1, 2, 3, 7, 25])
def test_upsampling_repeats_every_element(factor):
    x = torch.arange(6.0).view(1, 1, 2, 3)
    expected = x.repeat_interleave(2, dim=2).repeat_interleave(factor, dim=3)
    assert torch.equal(nn.upsample_nearest(x, (2, factor)), expected)


@pytest.mark.parametrize("grid, factors", [((5,), 2), ((4, 5), (2, 2)), ((4, 5), (1, 4)), ((1, 2, 3), (2, 3, 8))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upsample_conv_accepts_half_precision_weights(grid, factors, dtype):
    conv = nn.conv_nd(len(grid), 8, 8, 3, padding=1)
    x = torch.randn(2, 8, *grid)
    expected = conv(nn.upsample_nearest(x, factors))
    actual = nn.upsample_conv(conv.to(dtype), x.to(dtype), factors)
    assert actual.dtype == dtype and (actual - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("grid, factors", [((5,), 2), ((4, 5), (2, 2)), ((4, 5), (1, 4)), ((1, 2, 3), (2, 3, 8)),
                                           ((2, 8, 8), (1, 2, 2)), ((2, 8, 8), (1, 3, 3)), ((4, 1, 4), (2, 2, 2))])
@pytest.mark.parametrize("amp", [False, True])
def test_upsample_conv_equals_conv_of_upsampled_input(grid, factors, amp):
    """Gradients included, also on flat grids in half precision, for which oneDNN is wrong elsewhere."""
    conv = nn.conv_nd(len(grid), 8, 8, 3, padding=1)
    x = torch.randn(2, 8, *grid, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        actual = nn.upsample_conv(conv, x, factors).float()
    expected = conv(nn.upsample_nearest(x, factors))
    direction = torch.randn_like(expected)
    pairs = [(actual, expected), *zip(*(torch.autograd.grad((y * direction).sum(), [x, conv.weight, conv.bias])
                                        for y in (actual, expected)))]
    for a, b in pairs:
        assert (a - b).norm() < (2e-2 if amp else 1e-5) * b.norm()


@pytest.mark.parametrize("grid, factors", [((4, 5), (2, 4)), ((2, 2, 3), (1, 2, 8))])
def test_upsample_conv_compiles_into_one_graph(grid, factors):
    conv = nn.conv_nd(len(grid), 4, 4, 3, padding=1)
    x = torch.randn(2, 4, *grid)
    compiled = torch.compile(nn.upsample_conv, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(conv, x, factors), nn.upsample_conv(conv, x, factors))


def test_resize_linear_interpolates_between_aligned_outer_edges():
    ramp = torch.tensor([[[0.0, 1.0]]])
    assert nn.resize_linear(ramp, (4,)).flatten().tolist() == [0, 0.25, 0.75, 1]
    assert nn.resize_linear(torch.arange(4.0).view(1, 1, 4), (2,)).flatten().tolist() == [0.5, 2.5]
    both = nn.resize_linear(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), (4, 2))
    assert both[0, 0].tolist() == [[0, 1], [0.5, 1.5], [1.5, 2.5], [2, 3]]


def test_explicit_padding_has_the_sizes_of_each_axis():
    layer, x = nn.conv_nd(3, 1, 1, (1, 3, 5), padding=(0, 1, 2)), torch.randn(1, 1, 2, 3, 4)
    padded = layer.pad_explicitly(x)
    torch.testing.assert_close(F.conv3d(padded, layer.weight, layer.bias), layer(x))
    assert torch.equal(layer.crop_padding(padded), x)


def test_norm_of_all_unets_has_32_groups_and_eps_1e_minus_5():
    norm, x = nn.normalization(64), 1e-3 * torch.randn(2, 64, 5)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    grouped = x.double().view(2, 32, 10)
    whitened = (grouped - grouped.mean(2, True)) / (grouped.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = whitened.view(2, 64, 5) * norm.weight.double()[:, None] + norm.bias.double()[:, None]
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_groupnorm_keeps_the_dtype_and_accumulates_in_float32():
    norm = nn.normalization(32)
    x = 300 * torch.randn(2, 32, 16)
    for dtype in (torch.float16, torch.bfloat16):
        y = norm(x.to(dtype))
        assert y.dtype == dtype
        assert torch.equal(y, norm(x.to(dtype).float()).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_widths_not_divisible_by_32_are_rejected():
    with pytest.raises(ValueError, match="48 channels do not divide into the norm's 32 groups.*--num_channels"):
        nn.normalization(48)


def test_update_ema_moves_by_one_minus_rate():
    average, current = [torch.zeros(3), torch.ones(2, 2)], [torch.ones(3), torch.zeros(2, 2)]
    nn.update_ema(average, iter(current), rate=0.75)
    assert torch.equal(average[0], torch.full((3,), 0.25)) and torch.equal(average[1], torch.full((2, 2), 0.75))


def test_update_ema_has_no_gradient_history_in_half_precision():
    average = torch.nn.Parameter(torch.zeros(2))
    nn.update_ema([average], [torch.nn.Parameter(torch.ones(2, dtype=torch.float16))], rate=0.5)
    assert average.is_leaf and average.dtype == torch.float32 and torch.equal(average.detach(), torch.full((2,), 0.5))


def test_update_ema_rejects_lists_of_different_length():
    with pytest.raises(ValueError, match="zip"):
        nn.update_ema([torch.zeros(1)], [])


def test_zero_and_scale_change_every_parameter():
    layer = torch.nn.Linear(2, 2)
    before = [p.clone() for p in layer.parameters()]
    assert nn.scale_module(layer, 3) is layer
    assert all(torch.equal(p, 3 * b) for p, b in zip(layer.parameters(), before))
    assert all((p == 0).all() for p in nn.zero_module(layer).parameters())


def test_cast_convolutions_leaves_other_layers_unchanged():
    module = torch.nn.Sequential(nn.conv_nd(1, 2, 2, 1), nn.conv_nd(3, 2, 2, 1), nn.linear(2, 2), nn.normalization(32))
    nn.cast_convolutions(module, torch.float16)
    assert [layer.weight.dtype for layer in module] == [torch.float16] * 2 + [torch.float32] * 2


def test_mean_flat_averages_each_sample():
    assert torch.equal(nn.mean_flat(torch.arange(8.0).view(2, 2, 2)), torch.tensor([1.5, 5.5]))


def test_timestep_zero_is_embedded_as_ones_then_zeros():
    assert torch.equal(nn.timestep_embedding(torch.zeros(1), 5), torch.tensor([[1.0, 1, 0, 0, 0]]))


def test_timestep_one_is_embedded_with_geometric_frequencies():
    w = torch.tensor([1.0, 0.1])
    expected = torch.cat([w.cos(), w.sin()])[None]
    assert torch.allclose(nn.timestep_embedding(torch.ones(1, dtype=torch.long), 4, max_period=100), expected)


def test_checkpoint_gives_the_same_gradients_with_dropout():
    layer = torch.nn.Linear(4, 4)
    results = []
    for flag in (False, True):
        torch.manual_seed(0)
        x = torch.ones(2, 4, requires_grad=True)
        y = nn.checkpoint(lambda v: F.dropout(layer(v).tanh(), 0.5), (x,), layer.parameters(), flag)
        results.append([y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_checkpoint_recomputes_under_autocast():
    layer, seen = torch.nn.Linear(4, 4), []

    def func(x):
        y = layer(x)
        seen.append(y.dtype)
        return y.float().square()

    with torch.autocast("cpu", torch.bfloat16):
        y = nn.checkpoint(func, (torch.ones(1, 4),), layer.parameters(), True)
    y.sum().backward()
    assert seen == [torch.bfloat16] * 2


# --- Recomputed convolutions ---


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("groups_at_a_time", [4, 1])
def test_recomputed_conv_changes_no_gradient(monkeypatch, groups_at_a_time, random):
    torch.manual_seed(0)
    conv = nn.conv_nd(2, 8, 6, 3, padding=1)
    x, shift = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(2, 8, 1, 1, requires_grad=True)
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)
    tensors = [x, shift, weight, bias, *conv.parameters()]
    monkeypatch.setattr(nn, "MAX_RECOMPUTED_ELEMENTS", x.numel() * groups_at_a_time // 4)
    calls = []

    def cheap(groups, x, shift, weight, bias):
        calls.append(groups)
        return F.dropout(F.silu(F.group_norm(x + shift, groups, weight, bias)), 0.5 if random else 0.0)

    def run(result):
        result.square().sum().backward()
        gradients = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            tensor.grad = None
        return result, torch.rand(1), gradients

    torch.manual_seed(1)
    expected = run(conv(cheap(4, x, shift, weight, bias)))
    torch.manual_seed(1)
    actual = run(nn.recomputed_conv(cheap, conv, (x, shift), (weight, bias), 4, random=random))
    assert min(calls) == (4 if random else groups_at_a_time)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("grid, kernel, stride", [
    ((2, 2, 2), 3, 1), ((2, 4, 6), 3, 1), ((4, 6, 6), 5, 2), ((1, 3, 3), 3, 1),
])
def test_half_precision_gradients_are_correct_on_flat_grids(grid, kernel, stride, recomputed):
    torch.manual_seed(0)
    conv = nn.conv_nd(3, 32, 32, kernel, stride=stride, padding=kernel // 2)
    x, gradients = torch.randn(2, 32, *grid, requires_grad=True), []
    cheap = lambda groups, x: x.sin()
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = nn.recomputed_conv(cheap, conv, (x,), (), 32) if recomputed else conv(cheap(32, x))
        y.float().square().sum().backward()
        gradients.append([t.grad.clone() for t in (x, conv.weight, conv.bias)])
        x.grad = conv.weight.grad = conv.bias.grad = None
    assert all((a - b).norm() < 0.02 * a.norm() for a, b in zip(*gradients))


@pytest.mark.parametrize("grid, factors", [((2, 8, 8), (1, 2, 2)), ((2, 2, 2), (1, 3, 3)), ((3, 4, 4), (2, 2, 2))])
def test_transposed_convolutions_are_correct_on_flat_grids(grid, factors):
    kernel = [max(2 * f - 1, 3) for f in factors]
    conv = nn.conv_transpose_nd(3, 8, 8, kernel, factors, [k // 2 for k in kernel], [f - 1 for f in factors])
    x, gradients = torch.randn(2, 8, *grid, requires_grad=True), []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = conv(x)
        assert y.dtype == (torch.bfloat16 if half else torch.float32)
        gradients.append(torch.autograd.grad(y.float().square().sum(), [x, conv.weight, conv.bias]))
    assert all((a - b).norm() < 0.02 * a.norm() for a, b in zip(*gradients))


def test_recomputed_conv_does_not_save_its_input():
    conv, x, weight = nn.conv_nd(2, 8, 8, 3), torch.randn(1, 8, 9, 9, requires_grad=True), torch.ones(8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nn.recomputed_conv(lambda groups, x, weight: F.silu(x * weight.view(-1, 1, 1)), conv, (x,), (weight,), 8)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, weight, conv.weight)}


def test_recomputed_conv_works_without_gradients():
    conv, x = nn.conv_nd(2, 8, 8, 3), torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        y = nn.recomputed_conv(lambda groups, x: x.relu(), conv, (x,), (), 8)
    torch.testing.assert_close(y, conv(x.relu()))


# --- The GPU of a Mac ---


RNG = types.SimpleNamespace(uniform=lambda _, device: torch.rand(2, dtype=torch.float64))     # of a StepRNG


class NoFloat64(TorchDispatchMode):
    """Raise an error if an operation creates float64 on a Mac's GPU, as that does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "mps" and tensor.dtype is torch.float64:
                raise TypeError(f"{function} creates float64 on MPS")
        return result


@pytest.mark.parametrize("compute, device", [
    (lambda x: nn.to_float64(x), "cpu"),
    (lambda x: torch.stack([metric(x, x) for metric in PAIRED_METRICS.values()]), "cpu"),
    (lambda x: random_affine(random_flips(x, RNG), RNG, AutoencoderTrainConfig(augment=1.0)), "mps"),
])
def test_gpu_of_a_mac_computes_without_float64(compute, device, monkeypatch):
    monkeypatch.setattr(F, "grid_sample", lambda x, grid, **options: x + grid.sum())   # has no fake kernel
    with FakeTensorMode(), NoFloat64():
        assert compute(torch.ones(2, 1, 16, 16, device="mps")).device.type == device
        with pytest.raises(TypeError, match="float64 on MPS"):
            torch.ones(2, device="mps").double()
