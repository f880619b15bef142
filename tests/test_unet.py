"""Claims about the UNet, its upsampler, its classifier and their blocks, on networks of 32 channels."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from guided_diffusion_vae import unet
from guided_diffusion_vae.autoencoder import AutoencoderKL
from guided_diffusion_vae.config import as_dict
from guided_diffusion_vae.runs import memory
from guided_diffusion_vae.vae import PatchDiscriminator

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
TINY = dict(model_channels=32, num_res_blocks=1, attention_resolutions=(2,), channel_mult=(1, 1), num_heads=2)


def randomize(network):
    """Give every parameter a random value, including those initialized to zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def tiny_unet(size=8, channels=2, **changes):
    torch.manual_seed(0)
    return randomize(unet.UNetModel(size, channels, out_channels=channels, **{**TINY, **changes}))


def tiny_encoder(size=8, **changes):
    torch.manual_seed(0)
    options = {**TINY, "num_head_channels": 16, **changes}
    return randomize(unet.EncoderUNetModel(size, 2, out_channels=5, **options))


def inputs(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *shape, generator=generator), torch.tensor([3.0, 500.5])


@pytest.mark.parametrize(
    "dims, grid, options",
    [
        (1, (8,), {}),
        (2, (8, 12), {}),
        (2, (4, 8), {"resblock_updown": True, "use_scale_shift_norm": True}),
        (2, (4, 4), {"conv_resample": False}),
        (3, (3, 4, 8), {}),
        (3, (4, 4, 4), {"resample_depth": True}),
        (3, (4, 4, 2), {"resample_depth": True, "resblock_updown": True}),
        (3, (2, 4, 4), {"resample_depth": True, "conv_resample": False}),
    ],
)
def test_output_has_the_grid_of_the_input(dims, grid, options):
    x, t = inputs(2, *grid)
    assert tiny_unet(dims=dims, **options)(x, t).shape == x.shape


@pytest.mark.parametrize("options", [{}, {"conv_resample": False}, {"resblock_updown": True}])
@pytest.mark.parametrize("resample_depth, middle", [(False, (4, 2, 2)), (True, (2, 2, 2))])
def test_depth_is_downsampled_only_with_resample_depth(options, resample_depth, middle):
    network, grids = tiny_unet(dims=3, resample_depth=resample_depth, **options), []
    network.middle_block.register_forward_hook(lambda module, args, output: grids.append(tuple(output.shape[2:])))
    network(*inputs(2, 4, 4, 4))
    assert grids == [middle]


def test_attention_is_the_softmax_of_scaled_products():
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    expected = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    assert torch.allclose(unet.attend(q, k, v), expected, atol=1e-5)


def test_attention_by_matrix_products_equals_the_fused_kernel(monkeypatch):
    q, k, v = torch.randn(3, 2, 4, 5, 8).bfloat16().unbind()
    products = unet.attend(q, k, v)
    monkeypatch.setattr(unet, "MATMUL_TOKENS", 0)
    fused = unet.attend(q, k, v)
    assert products.dtype == fused.dtype == torch.bfloat16
    assert torch.allclose(products.float(), fused.float(), atol=0.03)


def test_head_orders_differ_by_a_permutation_of_channels():
    heads, width = 2, 4
    new = torch.randn(1, 3 * heads * width, 6)                              # ordered q k v, then heads
    legacy = new.view(1, 3, heads, width, 6).transpose(1, 2).reshape(new.shape)
    result = unet.QKVAttention(heads)(new)
    assert result.shape == (1, heads * width, 6)
    assert torch.equal(result, unet.QKVAttentionLegacy(heads)(legacy))


def test_single_head_attention_has_no_head_order():
    qkv = torch.randn(2, 24, 5)
    assert torch.equal(unet.QKVAttention(1)(qkv), unet.QKVAttentionLegacy(1)(qkv))


def test_attention_flops_are_those_of_two_products():
    module = unet.QKVAttention(2)
    module.total_ops = torch.zeros(1, dtype=torch.float64)
    qkv = torch.randn(3, 24, 5)
    module.count_flops(module, (qkv,), module(qkv))
    assert module.total_ops.item() == 2 * 3 * 8 * 5**2


def test_attention_block_is_equivariant_to_permutations():
    block, x = randomize(unet.AttentionBlock(32, num_heads=4)), torch.randn(1, 32, 9)
    order = torch.randperm(9)
    assert torch.allclose(block(x)[..., order], block(x[..., order]), atol=1e-5)


def test_new_blocks_are_identities():
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(unet.AttentionBlock(32)(x), x)
    assert torch.equal(unet.ResBlock(32, 8, 0.0)(x, torch.randn(1, 8)), x)


def test_new_networks_return_zeros_and_ignore_the_time_of_the_condition():
    x, t = inputs(2, 8, 8)
    assert not unet.UNetModel(8, 2, out_channels=2, **TINY)(x, t).any()
    assert not unet.EncoderUNetModel(8, 2, out_channels=5, pool="adaptive", **TINY)(x, t).any()
    network = unet.SuperResModel(8, 2, out_channels=2, noised_condition=True, **TINY)
    assert not network.low_res_embed(torch.randn(2, 32)).any()


def test_channels_that_do_not_divide_into_heads_are_rejected():
    with pytest.raises(ValueError, match="32 channels do not divide into heads of 24; change --num_head_channels"):
        unet.AttentionBlock(32, num_head_channels=24)
    with pytest.raises(ValueError, match="32 channels do not divide into 3 heads; change --num_heads"):
        unet.AttentionBlock(32, num_heads=3)


def test_average_pooling_inverts_upsampling():
    x = torch.randn(1, 32, 2, 4, 6)
    for depth in (False, True):
        up = unet.Upsample(32, False, dims=3, resample_depth=depth)
        down = unet.Downsample(32, False, dims=3, resample_depth=depth)
        assert up(x).shape[2:] == ((4 if depth else 2), 8, 12)
        assert torch.allclose(down(up(x)), x, atol=1e-6)


def test_resampling_rejects_other_channels():
    with pytest.raises(ValueError, match="Upsample expects 32 channels, got shape"):
        unet.Upsample(32, False)(torch.zeros(1, 16, 2, 2))
    with pytest.raises(ValueError, match="average pooling keeps 32 channels, got out_channels=64"):
        unet.Downsample(32, False, out_channels=64)


def test_block_without_forward_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        unet.TimestepBlock()


@pytest.mark.parametrize("flag", ["use_checkpoint", "recompute_norms"])
@pytest.mark.parametrize("options", [
    {"use_scale_shift_norm": False}, {"use_scale_shift_norm": True}, {"dropout": 0.3}, {"resblock_updown": True},
    {"dims": 3},
])
def test_recomputing_changes_no_gradient(flag, options):
    x, t = inputs(2, *(4,) * options.get("dims", 2))
    gradients = []
    for value in (False, True):
        network = tiny_unet(**{flag: value}, **options).train()
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(network(x, t).square().mean(), list(network.parameters())))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*gradients))


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_recomputed_norms_save_little_more_than_half(amp):
    saved_bytes = []
    for value in (False, True):
        network = tiny_unet(recompute_norms=value, dropout=0.1)
        saved_bytes.append(sum(memory.saved_activations(network, lambda n: n(*inputs(2, 16, 16)), amp).values()))
    assert saved_bytes[1] < 0.6 * saved_bytes[0]


def test_nothing_is_recomputed_by_default(monkeypatch):
    flags = set()
    monkeypatch.setattr(unet, "checkpoint", lambda func, inputs, params, flag: flags.add(flag) or func(*inputs))
    tiny_unet()(*inputs(2, 4, 4))
    assert flags == {False}


@pytest.mark.parametrize("build", [tiny_unet, tiny_encoder])
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_autocast_result_is_close_and_gradients_are_float32(build, use_checkpoint):
    x, t = inputs(2, 8, 8)
    network = build(use_checkpoint=use_checkpoint)
    plain = network(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x, t)
    assert mixed.dtype == torch.float32
    assert (mixed - plain).abs().max() < 0.05 * plain.abs().max()
    mixed.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("build", [tiny_unet, tiny_encoder])
def test_bfloat16_weights_accept_and_return_float32(build):
    x, t = inputs(2, 8, 8)
    network = build()
    with torch.no_grad():
        plain, cast = network(x, t), network.bfloat16()(x, t)
    assert cast.dtype == torch.float32
    assert (cast - plain).abs().max() < 0.1 * plain.abs().max()


def test_convert_to_fp16_casts_inner_convolutions_only():
    network = tiny_unet(use_fp16=True)
    assert network.dtype == torch.float16 and network.torso_dtype == torch.float32
    network.convert_to_fp16()
    assert network.dtype == network.torso_dtype == torch.float16
    assert network.middle_block[1].qkv.weight.dtype == torch.float16
    residual, attention, _ = network.middle_block
    others = [network.time_embed[0], residual.emb_layers[1], attention.norm, network.out[2]]
    assert all(layer.weight.dtype == torch.float32 for layer in others)
    x, t = inputs(2, 4, 4)
    assert network(x, t).dtype == torch.float32
    network.convert_to_fp32()
    assert network.torso_dtype == torch.float32 and all(p.dtype == torch.float32 for p in network.parameters())


def test_classes_change_the_output():
    network, (x, t) = tiny_unet(num_classes=3), inputs(2, 4, 4)
    assert not torch.allclose(network(x, t, torch.tensor([0, 0])), network(x, t, y=torch.tensor([1, 2])))


def test_labels_must_match_the_network():
    x, t = inputs(2, 4, 4)
    with pytest.raises(ValueError, match="network has no classes, got labels y"):
        tiny_unet()(x, t, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="conditioned on 3 classes, got no labels"):
        tiny_unet(num_classes=3)(x, t)
    with pytest.raises(ValueError, match=r"expected one class per sample, shape \(2,\), got \(1,\)"):
        tiny_unet(num_classes=3)(x, t, torch.tensor([0]))


def test_grids_that_the_levels_do_not_divide_are_rejected():
    network = tiny_unet(channel_mult=(1, 1, 1))
    with pytest.raises(ValueError, match="spatial axis 1 has size 6: expected a multiple of 4.*data of size 4 or 8"):
        network(*inputs(2, 8, 6))


def test_num_heads_upsample_is_used_without_head_channels_only():
    heads = [m.num_heads for m in tiny_unet(num_heads_upsample=8).modules() if isinstance(m, unet.AttentionBlock)]
    assert heads == [2, 2, 8, 8]
    network = tiny_unet(num_heads_upsample=8, num_head_channels=8)
    assert {m.num_heads for m in network.modules() if isinstance(m, unet.AttentionBlock)} == {4}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_upsampler_depends_on_the_low_resolution_image(dims):
    network = randomize(unet.SuperResModel(8, 1, out_channels=1, dims=dims, **TINY))
    x, t = inputs(1, *(8,) * dims)
    low_res = torch.randn(2, 1, *(4,) * dims)
    assert network(x, t, low_res=low_res).shape == x.shape
    assert not torch.allclose(network(x, t, low_res), network(x, t, -low_res))
    with pytest.raises(ValueError, match="requires low-resolution images"):
        network(x, t)


@pytest.mark.parametrize("pool", unet.POOLS)
@pytest.mark.parametrize("dims, size, grid", [(1, 8, (8,)), (2, (8, 4), (8, 4)), (3, 4, (4, 4, 4))])
def test_every_pool_returns_one_vector_per_sample(pool, dims, size, grid):
    x, t = inputs(2, *grid)
    assert tiny_encoder(size, pool=pool, dims=dims)(x, t).shape == (2, 5)


def test_attention_pool_rejects_another_grid():
    with pytest.raises(ValueError, match=r"last grid of \(4, 4\), got \(8, 8\); set --image_size"):
        tiny_encoder(8, pool="attention")(*inputs(2, 16, 16))
    with pytest.raises(ValueError, match="num_head_channels must divide the 32 channels of the attention pool, got -1"):
        tiny_encoder(8, pool="attention", num_head_channels=-1)


def test_attention_pool_is_the_attention_of_the_mean_with_positions():
    torch.manual_seed(0)
    pool, x = unet.AttentionPool2d((2, 3), 8, 4, output_dim=5), torch.randn(2, 8, 2, 3)
    assert 0.6 < pool.positional_embedding.std() * 8**0.5 < 1.5
    randomize(pool)
    tokens = x.flatten(2)
    tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], 2) + pool.positional_embedding       # [N x 8 x 7]
    q, k, v = (pool.qkv_proj.weight[:, :, 0] @ tokens + pool.qkv_proj.bias[:, None]).chunk(3, dim=1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (torch.einsum("nc,nct->nt", q[:, head, 0], k[:, head]) / 4**0.5).softmax(-1)
        heads.append(torch.einsum("nt,nct->nc", weights, v[:, head]))
    expected = torch.cat(heads, 1) @ pool.c_proj.weight[:, :, 0].T + pool.c_proj.bias
    torch.testing.assert_close(pool(x), expected, rtol=1e-4, atol=1e-5)


def norm_by_hand(layer, h):
    return F.group_norm(h, 32, layer.weight, layer.bias, 1e-5)


@pytest.mark.parametrize("recompute_norms", [False, True])
@pytest.mark.parametrize("use_scale_shift_norm", [False, True])
@pytest.mark.parametrize("out_channels, use_conv", [(32, False), (64, False), (64, True)])
def test_residual_block_equals_its_formula(use_scale_shift_norm, out_channels, use_conv, recompute_norms):
    block = randomize(unet.ResBlock(32, 8, 0.0, out_channels, use_conv, use_scale_shift_norm,
                                    recompute_norms=recompute_norms))
    x, emb = torch.randn(2, 32, 3, 4), torch.randn(2, 8)
    h = block.in_layers[2](F.silu(norm_by_hand(block.in_layers[0], x)))
    shift = block.emb_layers[1](F.silu(emb))[..., None, None]
    if use_scale_shift_norm:
        scale, shift = shift.chunk(2, dim=1)
        h = norm_by_hand(block.out_layers[0], h) * (1 + scale) + shift
    else:
        h = norm_by_hand(block.out_layers[0], h + shift)
    skip = x if out_channels == 32 else F.conv2d(x, block.skip_connection.weight, block.skip_connection.bias,
                                                 padding=1 if use_conv else 0)
    torch.testing.assert_close(block(x, emb), skip + block.out_layers[3](F.silu(h)), rtol=1e-4, atol=1e-4)


def test_network_equals_its_blocks_in_their_order():
    network = tiny_unet(num_classes=3, channel_mult=(1, 2), use_scale_shift_norm=True)
    (x, t), y = inputs(2, 8, 8), torch.tensor([2, 0])
    linear = lambda layer, h: F.linear(h, layer.weight, layer.bias)
    waves = torch.outer(t, 10000 ** (-torch.arange(16) / 16))
    emb = linear(network.time_embed[2], F.silu(linear(network.time_embed[0], torch.cat([waves.cos(), waves.sin()], 1))))
    emb = F.silu(emb + network.label_emb.weight[y])

    def attention(block, h):
        tokens = norm_by_hand(block.norm, h).flatten(2)
        qkv = F.conv1d(tokens, block.qkv.weight, block.qkv.bias).unflatten(1, (block.num_heads, 3, -1))
        q, k, v = qkv.unbind(2)                                             # [N x H x C x T]
        mixed = v @ ((q.mT @ k) / q.shape[2] ** 0.5).softmax(-1).mT
        return h + F.conv1d(mixed.flatten(1, 2), block.proj_out.weight, block.proj_out.bias).view(h.shape)

    first, fine, down, coarse = network.input_blocks
    h = first[0](x)
    skips = [h]
    for section in (fine, down, coarse):
        h = section[0](h, emb) if section is not down else F.conv2d(h, down[0].op.weight, down[0].op.bias, 2, 1)
        h = attention(section[1], h) if len(section) == 2 else h
        skips.append(h)
    before, attend, after = network.middle_block
    h = after(attention(attend, before(h, emb)), emb)
    kinds = []
    for section in network.output_blocks:
        h = section[0](torch.cat([h, skips.pop()], 1), emb)
        for layer in section[1:]:
            kinds.append(type(layer).__name__)
            h = attention(layer, h) if isinstance(layer, unet.AttentionBlock) else F.conv2d(
                h.repeat_interleave(2, 2).repeat_interleave(2, 3), layer.conv.weight, layer.conv.bias, padding=1)
    assert [len(section) for section in (first, fine, down, coarse)] == [1, 1, 1, 2]
    assert kinds == ["AttentionBlock", "AttentionBlock", "Upsample"] and not skips
    expected = network.out[2](F.silu(norm_by_hand(network.out[0], h)))
    torch.testing.assert_close(network(x, t, y), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noised_condition", [False, True])
def test_upsampler_is_a_unet_of_the_image_and_the_upsampled_condition(noised_condition):
    # Norms of 32 groups remove what an embedding adds to 32 channels, but not what it scales.
    options = {**TINY, "out_channels": 1, "use_scale_shift_norm": True}
    network = randomize(unet.SuperResModel(8, 1, noised_condition=noised_condition, **options))
    (x, t), low_res, times = inputs(1, 8, 8), torch.randn(2, 1, 4, 4), torch.tensor([7, 400])
    plain = randomize(unet.UNetModel(8, 2, **options))
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if "low_res" not in name})
    if noised_condition:    # its embedding is added to that of the timestep
        angles = torch.outer(times.float(), 10000 ** (-torch.arange(16) / 16))
        extra = network.low_res_embed(torch.cat([angles.cos(), angles.sin()], 1))
        plain.time_embed.register_forward_hook(lambda module, args, emb: emb + extra)
    upsampled = F.interpolate(low_res, (8, 8), mode="bilinear", align_corners=False)
    expected = plain(torch.cat([x, upsampled], 1), t)
    conditioning = {"low_res_times": times} if noised_condition else {}
    torch.testing.assert_close(network(x, t, low_res, **conditioning), expected, rtol=1e-4, atol=1e-4)
    if noised_condition:
        torch.testing.assert_close(network(x, t, low_res), network(x, t, low_res, low_res_times=0 * times))
        assert not torch.allclose(network(x, t, low_res), network(x, t, low_res, low_res_times=times), atol=1e-3)


def test_dropout_acts_before_the_last_convolution_in_training_only():
    block = randomize(unet.ResBlock(32, 8, 1.0))
    x, emb = torch.randn(2, 32, 3, 4), torch.randn(2, 8)
    torch.testing.assert_close(block(x, emb), x + block.out_layers[3].bias.view(1, -1, 1, 1))   # all is dropped
    network, (x, t) = tiny_unet(dropout=0.3), inputs(2, 4, 4)
    assert {layer.p for layer in network.modules() if isinstance(layer, torch.nn.Dropout)} == {0.3}
    assert not torch.equal(network(x, t), network(x, t)) and torch.equal(network.eval()(x, t), network(x, t))


@pytest.mark.parametrize("pool, hidden", [("spatial", F.relu), ("spatial_v2", F.silu), ("adaptive", F.silu)])
def test_pools_average_the_last_grid_or_the_grids_of_all_levels(pool, hidden):
    network, (x, t), grids, embeddings = tiny_encoder(pool=pool), inputs(2, 8, 8), [], []
    network.middle_block[0].register_forward_hook(lambda module, args, h: embeddings.append(args[1]))
    for block in (*network.input_blocks, network.middle_block):
        block.register_forward_hook(lambda module, args, h: grids.append(h))
    actual = network(x, t)
    torch.testing.assert_close(embeddings, [F.silu(network.embed(t))])
    first, *norm, last = [layer for layer in network.out if list(layer.parameters())]
    if pool == "adaptive":
        expected = F.silu(norm_by_hand(first, grids[-1])).mean((2, 3)) @ last.weight[:, :, 0, 0].T + last.bias
    else:
        h = F.linear(torch.cat([h.mean((2, 3)) for h in grids], 1), first.weight, first.bias)
        expected = F.linear(hidden(norm_by_hand(norm[0], h) if norm else h), last.weight, last.bias)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_unknown_pools_are_rejected_with_the_known_ones():
    with pytest.raises(NotImplementedError, match="--classifier_pool must be one of adaptive, .*got 'median'"):
        tiny_encoder(pool="median")


def test_widths_that_the_norm_cannot_group_are_rejected():
    with pytest.raises(ValueError, match="48 channels do not divide"):
        tiny_unet(model_channels=48)


def test_channel_multipliers_may_be_fractions():
    network = tiny_unet(model_channels=64, channel_mult=(0.5, 1))
    assert network.input_blocks[0][0].out_channels == 32
    assert network(*inputs(2, 4, 4)).shape == (2, 2, 4, 4)


@pytest.mark.skipif(not PARITY.is_dir(), reason="no recorded defaults next to the checkout")
def test_defaults_equal_guided_diffusion():
    recorded = json.loads((PARITY / "reference" / "defaults.json").read_text())
    expected = {**recorded["model_and_diffusion_defaults"], **recorded["classifier_defaults"]}
    names = expected.keys() - recorded["diffusion_defaults"].keys() - {"image_size"}    # the size belongs to the data
    defaults = {**as_dict(unet.ModelConfig()), **as_dict(unet.ClassifierConfig())}
    assert {name: defaults[name] for name in names} == {name: expected[name] for name in names}


# Operations whose gradients on CUDA PyTorch lists as not deterministic (torch.use_deterministic_algorithms).
NONDETERMINISTIC = (
    "AvgPool3D", "AdaptiveAvgPool", "AdaptiveMaxPool", "FractionalMaxPool", "MaxUnpool", "UpsampleLinear",
    "UpsampleBilinear", "UpsampleBicubic", "UpsampleTrilinear", "ReflectionPad", "GridSampler", "NllLoss2D", "Cumsum",
    "Put", "EmbeddingBag",
)


def nondeterministic_gradients(loss):
    """Return the operations of a graph whose gradients may differ from run to run on GPUs."""
    found, seen, nodes = set(), set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            found |= {name for name in NONDETERMINISTIC if node.name().startswith(name)}
    return found


def losses(dims):
    """Yield losses of networks of all kinds."""
    (x, t), y = inputs(2, *(8,) * dims), torch.tensor([0, 2])
    for changes in ({}, {"conv_resample": False, "num_classes": 3}, {"resblock_updown": True}):
        model = unet.UNetModel(8, 2, out_channels=2, dims=dims, **{**TINY, **changes})
        yield model(x, t, **({"y": y} if model.num_classes else {})).mean()
    upsampler = unet.SuperResModel(8, 2, out_channels=2, dims=dims, noised_condition=True, **TINY)
    yield upsampler(x, t, low_res=x[..., ::2], low_res_times=t).mean()
    for pool in unet.POOLS:
        encoder = unet.EncoderUNetModel(8, 2, out_channels=5, dims=dims, pool=pool, conv_resample=False,
                                        **TINY, num_head_channels=16)
        yield F.cross_entropy(encoder(x, t), y, reduction="none").mean()
    for changes in ({}, {"space_to_channel": True, "num_channels": (4, 6)}, {"use_convtranspose": True}):
        options = {"num_channels": (4, 4), "num_res_blocks": 1, "attention_levels": True, **changes}
        autoencoder = AutoencoderKL(dims, 2, 2, norm_num_groups=2, **options)
        yield sum(part.mean() for part in autoencoder(x))
    yield PatchDiscriminator(dims, 2, channels=8, layers=1)(x).mean()


def test_deterministic_networks_have_deterministic_gradients_on_gpus(numerics):
    found = lambda dims: {name for loss in losses(dims) for name in nondeterministic_gradients(loss)}
    assert found(2) == {"AdaptiveAvgPool"} and found(3) == {"AdaptiveAvgPool", "AvgPool3D"}
    torch.use_deterministic_algorithms(True)
    assert found(2) == found(3) == set()
