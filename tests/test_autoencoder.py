import io
import itertools
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from guided_diffusion_vae.autoencoder import AutoencoderConfig, AutoencoderKL, create_autoencoder
from guided_diffusion_vae.config import as_dict, from_dict
from guided_diffusion_vae.nn import upsample_nearest
from guided_diffusion_vae.vae import (
    LOGVAR_RANGE, AutoencoderLossConfig, autoencoder_losses, from_image_range, to_image_range,
)
from guided_diffusion_vae.vae.blocks import (
    Attention, ChannelToSpace, Downsample, ShuffledConv, SpaceToChannel, UpsampledConv,
)

TINY = {"num_channels": (4, 8), "num_res_blocks": 1, "attention_levels": False, "norm_num_groups": 2,
        "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}


def tiny(spatial_dims=2, **changes):
    torch.manual_seed(0)
    return AutoencoderKL(spatial_dims, **{**TINY, **changes}).eval()


@pytest.mark.parametrize("spatial_dims, changes, size, grid", [
    (1, {}, (12,), (6,)),
    (2, {}, (8, 12), (4, 6)),
    (2, {"num_channels": (4,)}, (5, 7), (5, 7)),
    (2, {"downsample_factors": (3,)}, (9, 6), (3, 2)),
    (2, {"downsample_factors": ((1, 4),)}, (5, 8), (5, 2)),
    (2, {"num_channels": (4, 4, 8), "downsample_factors": (4, 2)}, (16, 8), (2, 1)),
    (2, {"initial_downsample_factor": 2, "downsample_factors": (4,)}, (16, 32), (2, 4)),
    (2, {"initial_downsample_factor": (1, 3), "use_convtranspose": True}, (4, 12), (2, 2)),
    (3, {"downsample_factors": ((1, 2, 2),), "use_convtranspose": True}, (3, 4, 4), (3, 2, 2)),
    (3, {"num_channels": (4, 4, 8), "downsample_factors": ((1, 2, 2), (2, 2, 2))}, (4, 8, 8), (2, 2, 2)),
    (3, {"initial_downsample_factor": 2, "downsample_kernel_size": 3, "downsample_factors": (4,)}, (8, 8, 8), (1,) * 3),
    (2, {"downsample_kernel_size": 3, "downsample_factors": ((1, 8),)}, (3, 16), (3, 2)),
])
def test_latent_grid_is_size_over_factors_and_decode_inverts_it(spatial_dims, changes, size, grid):
    network = tiny(spatial_dims, in_channels=2, out_channels=1, **changes)
    mu, sigma = network.encode(torch.randn(2, 2, *size))
    assert mu.shape == sigma.shape == (2, *network.latent_shape(size)) == (2, 3, *grid)
    assert network.decode(mu).shape == (2, 1, *size)


@st.composite
def networks_and_sizes(draw):
    """Return (flags of an autoencoder, sizes that its factors divide, the grid) over one to three axes."""
    dims = draw(st.integers(1, 3))
    factor = st.tuples(*[st.integers(1, 5)] * dims)
    levels = draw(st.integers(1, 3))
    factors, first = draw(st.tuples(*[factor] * (levels - 1))), draw(factor)
    flags = {"spatial_dims": dims, "num_channels": (4,) * levels, "downsample_factors": factors,
             "initial_downsample_factor": first, "final_upsample": draw(st.sampled_from(["nearest", "shuffle"])),
             "use_convtranspose": draw(st.booleans()), "space_to_channel": draw(st.booleans())}
    total = [math.prod(axis) for axis in zip(first, *factors)]
    grid = draw(st.tuples(*[st.integers(1, 3)] * dims))
    size = tuple(n * f for n, f in zip(grid, total))
    assume(math.prod(size) <= 30000)
    return flags, size, grid


@settings(deadline=None, max_examples=40)
@given(networks_and_sizes())
def test_sizes_are_divided_by_all_factors_and_restored(case):
    flags, size, grid = case
    network = tiny(**flags)
    assert network.latent_shape(size) == (3, *grid)
    mean, _ = network.moments(torch.randn(1, 1, *size))
    assert mean.shape[2:] == grid and network.decode(mean).shape == (1, 1, *size)


@settings(deadline=None, max_examples=20)
@given(networks_and_sizes())
def test_every_input_element_can_influence_the_latent(case):
    flags, size, _ = case
    assume(math.prod(size) <= 4000)
    network = tiny(**flags).double()
    x = torch.randn(1, 1, *size, dtype=torch.float64, requires_grad=True)
    mean, _ = network.moments(x)
    (mean * torch.randn_like(mean)).sum().backward()
    # Except if a norm of a single position removes everything.
    assert (x.grad != 0).all() or math.prod(mean.shape[2:]) == 1


@settings(deadline=None, max_examples=30)
@given(networks_and_sizes(), st.data())
def test_indivisible_sizes_are_rejected_with_sizes_that_work(case, data):
    flags, size, _ = case
    network = tiny(**flags)
    axis = data.draw(st.integers(0, len(size) - 1))
    assume(network.factors[axis] > 1)
    wrong = list(size)
    wrong[axis] += data.draw(st.integers(1, network.factors[axis] - 1))
    with pytest.raises(ValueError, match=f"axis {axis} has size {wrong[axis]}, which .* total downsampling factor "
                                         f"{network.factors[axis]} .* expected e.g. "
                                         f"{size[axis]} or {size[axis] + network.factors[axis]}"):
        network.latent_shape(wrong)


@pytest.mark.parametrize("flags", [
    {"use_checkpointing": True}, {"recompute_norms": True}, {"recompute_norms": True, "use_checkpointing": True},
])
@pytest.mark.parametrize("dims, autocast", [(2, False), (3, False), (2, True)])
def test_memory_optimizations_change_no_gradient(flags, dims, autocast):
    shape = {"num_channels": (4, 8), "attention_levels": (False, True), "space_to_channel": True, "num_res_blocks": 2}
    plain, saving = tiny(dims, **shape), tiny(dims, **shape, **flags)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, *(8,) * dims)
    for network in (plain.train(), saving.train()):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mean, logvar = network.moments(x)
            (network.decode(mean).square().mean() + logvar.mean()).backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def saved_bytes(network, x):
    saved = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.untyped_storage()._cdata: t.untyped_storage().nbytes()}) or t, lambda t: t)
    with hooks:
        network.decode(network.moments(x)[0])
    return sum(saved.values())


def test_recomputed_norms_save_memory():
    flags = {"num_channels": (16, 16), "num_res_blocks": 2, "norm_num_groups": 4}
    x = torch.randn(1, 1, 64, 64)
    assert saved_bytes(tiny(**flags, recompute_norms=True), x) < 0.6 * saved_bytes(tiny(**flags), x)


@pytest.mark.parametrize("factors", [(2,), (2, 2), (1, 3), (2, 1, 2)])
def test_space_to_channel_has_an_inverse(factors):
    dims, count = len(factors), math.prod(factors)
    x = torch.randn(2, 3, *(2 * f for f in factors))
    channels = SpaceToChannel(factors, 3 * count)(x)
    assert channels.shape == (2, 3 * count, *(2,) * dims)
    assert torch.equal(ChannelToSpace(factors, 3)(channels), x)
    averaged = SpaceToChannel(factors, 3)(x)
    expected = x
    for axis, f in enumerate(factors):
        expected = expected.unflatten(2 + axis, (-1, f)).mean(3 + axis)
    torch.testing.assert_close(averaged, expected)


def test_channels_are_averaged_or_repeated_in_their_order():
    x = torch.arange(8.0).view(1, 8, 1)
    ones = (1,)
    assert SpaceToChannel(ones, 4)(x).flatten().tolist() == [0.5, 2.5, 4.5, 6.5]
    assert SpaceToChannel(ones, 16)(x).flatten().tolist() == [float(i // 2) for i in range(16)]
    assert ChannelToSpace((2,), 4)(x[:, :4]).flatten().tolist() == [0.0, 0, 1, 1, 2, 2, 3, 3]


def phase_kernels(weight, factors):
    """Return a kernel for every phase of the upsampled grid.  [C' x C x 3 ...] -> [phases x C' x C x 3 ...].

    In phase p, kernel offset t (-1, 0, 1) of the upsampled grid falls on element floor((p + t) / factor) of the input.
    """
    kernels = []
    for phase in itertools.product(*map(range, factors)):
        kernel = torch.zeros_like(weight)
        for offsets in itertools.product(range(3), repeat=len(factors)):
            position = tuple((p + t - 1) // f + 1 for p, t, f in zip(phase, offsets, factors))
            kernel[(..., *position)] += weight[(..., *offsets)]
        kernels.append(kernel)
    return torch.stack(kernels)


def test_shuffled_conv_with_equal_kernels_is_nearest_then_conv():
    shared = UpsampledConv(2, 3, 2, (2, 3))
    shuffled = ShuffledConv(2, 3, 2, (2, 3))
    x = torch.randn(1, 3, 4, 5)
    shuffled.conv.weight.data = phase_kernels(shared.conv.weight.detach(), (2, 3)).flatten(0, 1)
    shuffled.conv.bias.data = shared.conv.bias.repeat(6).detach()
    torch.testing.assert_close(shuffled(x), shared(x))


def test_shortcuts_pass_detail_through_zeroed_layers():
    network = tiny(num_channels=(4, 16), latent_channels=16, space_to_channel=True)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.GroupNorm)):
                module.weight.zero_()
                module.bias.zero_()
        first, last = network.encoder.blocks[0], network.decoder.blocks[-1]
        first.conv.weight[0, 0, 1, 1] = last.conv.weight[0, 0, 1, 1] = 1
        x = torch.randn(1, 1, 4, 4)
        moved = network.encoder.blocks[2](network.encoder.blocks[0](x))
    # Level 0 has 4 channels; 2x2 pixels of the first one are in the first four of 16.
    assert torch.equal(ChannelToSpace((2, 2), 4)(moved)[:, :1], x)


@pytest.mark.parametrize("strides", [(2, 2), (4, 4), (1, 5), (3, 8)])
def test_strided_layers_see_every_input(strides):
    network = tiny(initial_downsample_factor=strides)
    for layer, channels in ((network.encoder.blocks[0], 1), (Downsample(2, 1, strides), 1)):
        x = torch.randn(1, channels, *(3 * s for s in strides), requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape[2:] == (3, 3) and (x.grad != 0).all()


@pytest.mark.parametrize("transposed, kernels", [(True, {(1, 1), (3, 3), (5, 5)}), (False, {(1, 1), (3, 3)})])
def test_fixed_kernel_applies_to_transposed_convolutions_only_in_the_decoder(transposed, kernels):
    network = tiny(use_convtranspose=transposed, downsample_kernel_size=5)
    assert {layer.kernel_size for layer in network.decoder.modules() if hasattr(layer, "kernel_size")} == kernels


def test_fixed_kernel_of_three_leaves_gaps_at_stride_four():
    x = torch.randn(1, 1, 8, requires_grad=True)
    Downsample(1, 1, (4,), kernel=3)(x).sum().backward()
    assert (x.grad == 0).flatten().tolist() == [False, False, False, True] * 2


def test_downsample_by_two_pads_one_zero_at_the_far_end():
    layer = Downsample(1, 1, (2,))
    layer.conv.conv.weight.data = torch.tensor([[[1.0, 10.0, 100.0]]])
    layer.conv.conv.bias.data.zero_()
    assert layer(torch.tensor([[[1.0, 2, 3, 4]]])).flatten().tolist() == [321.0, 43.0]


@pytest.mark.parametrize("factors", [(3,), (4, 2), (1, 2), (5, 1), (2, 1, 3), (9, 8), (8, 8, 4)])
def test_upsampled_conv_equals_nearest_then_conv(factors):
    layer = UpsampledConv(len(factors), 3, 2, factors).double()
    x = torch.randn(2, 3, *range(3, 3 + len(factors)), dtype=torch.float64, requires_grad=True)
    actual, expected = layer(x), layer.conv(upsample_nearest(x, factors))
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(actual)
    gradients = [torch.autograd.grad((y * weights).sum(), [x, layer.conv.weight]) for y in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_attention_is_softmax_of_scaled_products_then_projected():
    torch.manual_seed(0)
    layer, x = Attention(4, 2, 0.5), torch.randn(2, 4, 3, 5)
    tokens = F.group_norm(x, 2, layer.norm.weight, layer.norm.bias, 0.5).flatten(2).transpose(1, 2)
    scores = layer.to_q(tokens) @ layer.to_k(tokens).transpose(1, 2) / 2
    mixed = layer.proj_attn(scores.softmax(-1) @ layer.to_v(tokens))
    torch.testing.assert_close(layer(x), x + mixed.transpose(1, 2).reshape(x.shape))


def by_hand(weights, name, h, stride=1, attend=False):
    """Apply one block of an autoencoder from its weights alone: norms of 2 groups with eps 0.3, SiLU, convolutions."""
    of = lambda part: (weights[f"{name}.{part}.weight"], weights[f"{name}.{part}.bias"])
    norm = lambda h, part: F.group_norm(h, 2, *of(part), 0.3)
    if attend:
        tokens = norm(h, "norm").flatten(2).mT
        q, k, v = (F.linear(tokens, *of(f"to_{part}")) for part in "qkv")
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return h + F.linear(mixed, *of("proj_attn")).mT.reshape(h.shape)
    if f"{name}.norm1.weight" not in weights:
        part = "conv.conv" if f"{name}.conv.conv.weight" in weights else "conv"
        return F.conv2d(h, *of(part), stride, int(stride == 1))
    inner = F.conv2d(F.silu(norm(h, "norm1")), *of("conv1.conv"), padding=1)
    inner = F.conv2d(F.silu(norm(inner, "norm2")), *of("conv2.conv"), padding=1)
    return inner + (F.conv2d(h, *of("nin_shortcut.conv")) if f"{name}.nin_shortcut.conv.weight" in weights else h)


@pytest.mark.parametrize("recompute_norms", [False, True])
def test_network_equals_its_blocks_computed_from_the_weights(recompute_norms):
    network = tiny(attention_levels=(False, True), norm_eps=0.3, with_encoder_nonlocal_attn=True,
                   with_decoder_nonlocal_attn=True, recompute_norms=recompute_norms)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    weights, x = {name: p.detach() for name, p in network.named_parameters()}, torch.randn(2, 1, 6, 8)
    layer = lambda name, h: F.conv2d(h, weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"])
    norm = lambda name, h: F.group_norm(h, 2, weights[f"{name}.weight"], weights[f"{name}.bias"], 0.3)

    h = by_hand(weights, "encoder.blocks.1", by_hand(weights, "encoder.blocks.0", x))
    h = by_hand(weights, "encoder.blocks.2", F.pad(h, (0, 1, 0, 1)), stride=2)
    for i, attend in ((3, False), (4, True), (5, False), (6, True), (7, False)):
        h = by_hand(weights, f"encoder.blocks.{i}", h, attend=attend)
    h = by_hand(weights, "encoder.blocks.9", norm("encoder.blocks.8", h))
    mean, logvar = network.moments(x)
    torch.testing.assert_close(mean, layer("quant_conv_mu", h), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logvar, layer("quant_conv_log_sigma", h), rtol=1e-4, atol=1e-4)

    z = torch.randn_like(mean)
    h = by_hand(weights, "decoder.blocks.0", layer("post_quant_conv", z))
    for i, attend in ((1, False), (2, True), (3, False), (4, False), (5, True)):
        h = by_hand(weights, f"decoder.blocks.{i}", h, attend=attend)
    h = by_hand(weights, "decoder.blocks.6.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    h = norm("decoder.blocks.8", by_hand(weights, "decoder.blocks.7", h))
    torch.testing.assert_close(network.decode(z), by_hand(weights, "decoder.blocks.9", h), rtol=1e-4, atol=1e-4)
    assert network.last_layer is network.decoder.blocks[9].conv.weight


@pytest.mark.parametrize("kernel, padding", [(None, (0, 1, 0, 1)), (3, (0, 1, 0, 0)), (7, (2, 3, 1, 2))])
def test_downsampling_pads_each_axis_by_its_own_kernel(kernel, padding):
    layer, x = Downsample(2, 1, (4, 2), kernel), torch.randn(1, 1, 8, 12)
    expected = F.conv2d(F.pad(x, padding), layer.conv.conv.weight, layer.conv.conv.bias, (4, 2))
    torch.testing.assert_close(layer(x), expected)
    if kernel is None:
        assert layer.conv.conv.kernel_size == (5, 3)


def attending():
    return tiny(attention_levels=(False, True), with_decoder_nonlocal_attn=True)


def test_own_state_dict_loads_with_its_projection_from_a_file():
    network, other, x = attending(), attending(), torch.randn(1, 1, 8, 8)
    for p in other.parameters():
        torch.nn.init.normal_(p, std=0.3)
    stream = io.BytesIO()
    torch.save(other.state_dict(), stream)
    stream.seek(0)
    network.load_state_dict(torch.load(stream, weights_only=True))
    torch.testing.assert_close(network.reconstruct(x), other.reconstruct(x))


@pytest.mark.parametrize("version", [None, 1])
def test_weights_of_generative_models_load_with_an_identity_projection(version):
    network, other = attending(), attending()
    weights = OrderedDict(network.state_dict())
    if version:     # of every class without a version of its own: files of torch.save contain it
        weights._metadata = {name: {"version": version} for name, _ in network.named_modules()}
    other.load_state_dict(weights)
    for name, value in other.state_dict().items():
        if name.endswith("proj_attn.weight"):
            assert value.equal(torch.eye(len(value)))
        elif name.endswith("proj_attn.bias"):
            assert not value.any()
        else:
            assert value.equal(network.state_dict()[name])


@pytest.mark.parametrize("transposed", [False, True])
def test_monai_core_names_load_with_their_projection(transposed):
    network, other = (tiny(attention_levels=True, use_convtranspose=transposed) for _ in range(2))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    core = {}
    for name, value in network.state_dict().items():
        for part in ("q", "k", "v"):
            name = name.replace(f".to_{part}.", f".attn.to_{part}.")
        name = name.replace(".proj_attn.", ".attn.out_proj.")
        if name.startswith("decoder") and ".conv.conv." in name:
            name = name.replace(".conv.conv.", ".deconv." if transposed else ".postconv.conv.")
        core[name] = value
    assert core.keys() != network.state_dict().keys()
    other.load_state_dict(core)
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(other.reconstruct(x), network.reconstruct(x))


def test_monai_core_without_projection_loads_as_identity():
    layer = Attention(4, 2, 1e-6)
    keys = {k: v for k, v in layer.state_dict().items() if "proj" not in k}
    core = {k.replace("to_", "attn.to_"): v for k, v in keys.items()}
    layer.load_state_dict(core)
    assert layer.proj_attn.weight.equal(torch.eye(4)) and not layer.proj_attn.bias.any()


def test_missing_weights_are_rejected():
    network = attending()
    weights = OrderedDict(network.state_dict())
    del weights["encoder.blocks.0.conv.weight"]
    with pytest.raises(RuntimeError, match="encoder.blocks.0.conv.weight"):
        network.load_state_dict(weights)


def test_checkpointing_changes_neither_values_nor_gradients():
    x, results = torch.randn(2, 1, 8, 8), []
    for flag in (False, True):
        network = tiny(use_checkpointing=flag, attention_levels=True)
        out = network.reconstruct(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 10
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_forward_samples_around_the_mean_of_encode():
    network, x = tiny(), torch.randn(1, 1, 8, 8)
    (mean, logvar), (mu, sigma) = network.moments(x), network.encode(x)
    torch.testing.assert_close(sigma, (0.5 * logvar).exp())
    eps = torch.randn_like(mu)
    torch.testing.assert_close(network.sampling(mu, sigma, eps), mu + sigma * eps)
    torch.manual_seed(3)
    reconstruction, *_ = network(x)
    torch.manual_seed(3)
    torch.testing.assert_close(reconstruction, network.decode(network.sampling(mean, sigma)))


def test_log_variance_stays_in_its_range():
    network = tiny()
    network.quant_conv_log_sigma.conv.weight.data.mul_(1e6)
    logvar = network.moments(torch.randn(1, 1, 8, 8))[1]
    assert (logvar.min().item(), logvar.max().item()) == LOGVAR_RANGE


@pytest.mark.parametrize("changes, message", [
    ({"num_channels": (4, 7)}, r"num_channels \(4, 7\) must be multiples of norm_num_groups 2"),
    ({"attention_levels": (True,)}, "attention_levels .* has 1 entries: expected 2 for num_channels"),
    ({"num_res_blocks": (1, 1, 1)}, "num_res_blocks .* has 3 entries: expected 2"),
    ({"num_res_blocks": (1, 0)}, r"num_res_blocks must be >= 1, got \(1, 0\)"),
    ({"downsample_factors": (2, 2)}, "downsample_factors .* has 2 entries: expected 1 for num_channels"),
    ({"downsample_factors": (0,)}, "downsample_factors must be integers >= 1, got 0"),
    ({"downsample_factors": ((2, 2, 2),)}, "3 values for 2 spatial axes"),
    ({"initial_downsample_factor": 1.5}, "initial_downsample_factor must be integers >= 1, got 1.5"),
    ({"downsample_kernel_size": 4}, "downsample_kernel_size must be odd, or None .*got 4"),
])
def test_constructor_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_inputs_of_other_shapes_are_rejected():
    network = tiny(downsample_factors=((2, 4),))
    with pytest.raises(ValueError, match="axis 1 has size 10, .* factor 4 .* expected e.g. 8 or 12; .*--pad"):
        network.encode(torch.zeros(1, 1, 4, 10))
    with pytest.raises(ValueError, match="axis 0 has size 1, .*: expected e.g. 2; change --image_size"):
        network.latent_shape((1, 4))
    with pytest.raises(ValueError, match="have 3 axes: the autoencoder expects 2"):
        network.latent_shape((4, 4, 4))
    with pytest.raises(ValueError, match="have 3 channels: the autoencoder expects 1"):
        network.encode(torch.zeros(1, 3, 4, 4))


def test_config_builds_the_same_network_after_a_dictionary():
    config = AutoencoderConfig(
        in_channels=1, num_channels=(4, 8, 8), norm_num_groups=4, downsample_factors=((1, 2), (2, 2)),
        initial_downsample_factor=2, attention_levels=(False, False, True),
    )
    again = from_dict(AutoencoderConfig, as_dict(config))
    assert again == config
    network = create_autoencoder(again)
    assert network.factors == (4, 8) and network.out_channels == 1 and network.latent_shape((8, 8)) == (4, 2, 1)


def test_config_without_channels_is_rejected():
    with pytest.raises(ValueError, match="in_channels is 0: expected the channels of the data; set --in_channels"):
        create_autoencoder(AutoencoderConfig())


def test_config_defaults_downsample_by_four():
    with torch.device("meta"):
        network = create_autoencoder(AutoencoderConfig(in_channels=1))
    assert network.latent_shape((64, 64)) == (4, 16, 16)


@pytest.mark.parametrize("image_range", [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)])
def test_image_range_has_an_inverse(image_range):
    x = torch.tensor([0.0, 0.25, 1.0])
    inside = to_image_range(x, image_range)
    assert (inside[0], inside[2]) == image_range
    torch.testing.assert_close(from_image_range(inside, image_range), x)


@pytest.mark.parametrize("name, distance", [("l1", 2.0), ("l2", 4.0)])
def test_losses_are_means_per_sample(name, distance):
    config = AutoencoderLossConfig(kl_weight=0.5, recon_loss=name)
    x, mean, logvar = torch.zeros(3, 1, 4, 4), torch.zeros(3, 2, 2, 2), torch.zeros(3, 2, 2, 2)
    mean[1], logvar[2] = 3.0, 1.0
    terms = autoencoder_losses(config, x, x + 2, mean, logvar)
    kl = torch.tensor([0.0, 4.5, 0.5 * (torch.e - 2)])
    torch.testing.assert_close(terms["recon_loss"], torch.full((3,), distance))
    torch.testing.assert_close(terms["kl_loss"], kl)
    torch.testing.assert_close(terms["loss"], distance + 0.5 * kl)


def test_kl_equals_torch_distributions():
    mean, logvar = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)).mean((1, 2, 3))
    actual = autoencoder_losses(AutoencoderLossConfig(), torch.zeros(2, 1), torch.zeros(2, 1), mean, logvar)["kl_loss"]
    torch.testing.assert_close(actual, expected)
