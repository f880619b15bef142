import contextlib
import dataclasses
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from launches import Launches

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig, AutoencoderKL, create_autoencoder
from guided_diffusion_vae.config import as_dict, from_dict, option
from guided_diffusion_vae.files import sha256_of_file
from guided_diffusion_vae.vae.posterior import sample_moments
from guided_diffusion_vae.vae.tiling import blend_tiles
from guided_diffusion_vae.vae import foreign
from guided_diffusion_vae.vae_wrapper import (
    LatentNormalizer, PixelCodec, VAEConfig, VAEInterface, check_latent_std, create_vae,
)

CONFIG = AutoencoderConfig(in_channels=1, num_channels=(4, 8), num_res_blocks=1, norm_num_groups=2, latent_channels=3,
                           with_decoder_nonlocal_attn=True)
MONAI = {"spatial_dims": 2, "in_channels": 3, "out_channels": 3, "num_channels": [4, 8], "num_res_blocks": 1,
         "attention_levels": [False, True], "latent_channels": 3, "norm_num_groups": 2}


def random_network(network):
    torch.manual_seed(0)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return network.eval()


def write_weights(path, kind="autoencoder", config=CONFIG, seed=0, **header):
    network = random_network(create_autoencoder(config))
    for p in network.parameters():
        p.data += 0.01 * seed
    header = {"kind": kind, "step": 1, "autoencoder": as_dict(config), **header}
    checkpoint_util.save_weights(path, network.state_dict(), header)
    return network


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "ema_0.999_000001.pt"
    return path, write_weights(path)


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def vae(path, **arguments):
    return VAEInterface(str(path), device="cpu", **arguments)


# --- Codecs ---


def test_encode_scales_the_mode_and_decode_inverts_it(own):
    path, network = own
    codec, x = vae(path), images(3, 1, 8, 8)
    z = network.moments(2 * x - 1)[0]
    latents = codec.encode_batch(x)
    torch.testing.assert_close(latents, z * 0.18215)
    assert latents.shape == (3, *codec.latent_shape((1, 8, 8)))
    torch.testing.assert_close(codec.decode_batch(latents), ((network.decode(z) + 1) / 2).clamp(0, 1))


def test_moments_are_those_of_the_scaled_latent(own):
    codec, x = vae(own[0], scale_factor=0.5), images(2, 1, 8, 8)
    mean, logvar = own[1].moments(2 * x - 1)
    moments, eps = codec.encode_moments(x), torch.randn_like(mean)
    expected = 0.5 * (mean + (0.5 * logvar).exp() * eps)
    torch.testing.assert_close(sample_moments(moments, eps), expected)
    torch.testing.assert_close(codec.encode_batch(x, eps), expected)
    assert sample_moments(moments).equal(moments[:, :3])


def test_images_are_checked_on_the_host_and_copied_without_waiting(own, monkeypatch):
    """The meta device stands for a GPU: copies to it are seen, and nothing can be read there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    codec, x = VAEInterface(str(own[0]), device="meta"), images(3, 1, 8, 8)
    with Launches() as launches:
        latents = codec.encode_batch(x, torch.zeros(3, 3, 4, 4))
    assert latents.device.type == "meta" and launches.waiting_copies == 0
    with pytest.raises(ValueError, match="values from 0 to 2"):
        codec.encode_batch(2 * x.round())


@pytest.mark.parametrize("mode", ["auto", "channel", "none", 0.18215])
def test_round_trip_is_unchanged_by_the_normalizer(own, mode):
    codec, x = vae(own[0]), images(4, 1, 8, 8)
    latents = codec.encode_batch(x)
    columns = latents.double().transpose(0, 1).flatten(1)
    statistics = {"mean": columns.mean().item(), "std": columns.std().item(), "channel_mean": columns.mean(1).tolist(),
                  "channel_std": columns.std(1).tolist()}
    fitted = LatentNormalizer.fit(mode, statistics)
    normalizer = LatentNormalizer.from_dict(json.loads(json.dumps(fitted.to_dict())))
    again = codec.decode_batch(normalizer.denormalize(normalizer.normalize(latents)))
    torch.testing.assert_close(again, codec.decode_batch(latents), atol=1e-5, rtol=0)


def test_batches_and_full_tiles_do_not_change_the_result(own):
    x, untiled = images(5, 1, 8, 8), vae(own[0])
    parts = vae(own[0], batch_size=2, tile=8)
    latents = untiled.encode_batch(x)
    torch.testing.assert_close(parts.encode_batch(x), latents)
    torch.testing.assert_close(parts.decode_batch(latents), untiled.decode_batch(latents))


@pytest.mark.parametrize("tile", [2, 16])
def test_streamed_images_equal_untiled_ones(own, tile):
    x = images(2, 1, 24, 40)
    untiled, streamed = vae(own[0]), vae(own[0], tile=tile, batch_size=1)
    latents = untiled.encode_batch(x)
    torch.testing.assert_close(streamed.encode_batch(x), latents)
    torch.testing.assert_close(streamed.decode_batch(latents), untiled.decode_batch(latents))
    assert streamed.approximations((24, 40)) == {}  # slabs are exact


@pytest.mark.parametrize("tile, streams", [(8, True), (30, True), (40, False)])
def test_images_are_streamed_if_their_longest_side_exceeds_the_tile(own, monkeypatch, tile, streams):
    codec, slabs = vae(own[0], tile=tile), []
    for name in ("moments", "decode"):
        inner = getattr(codec._streamer, name)
        monkeypatch.setattr(codec._streamer, name, lambda x, inner=inner: slabs.append(x.shape) or inner(x))
    codec.decode_batch(codec.encode_batch(images(1, 1, 24, 40)))
    assert slabs == ([(1, 1, 24, 40), (1, 3, 12, 20)] if streams else [])


def test_tiled_diffusers_autoencoder_is_close_to_untiled(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path / "kl")
    x = images(1, 3, 24, 40)
    untiled, tiled = vae(tmp_path / "kl"), vae(tmp_path / "kl", tile=16)
    latents = untiled.encode_batch(x)
    approximate = tiled.encode_batch(x)
    assert approximate.shape == latents.shape and (approximate - latents).abs().mean() < 0.5 * latents.std()
    assert tiled.decode_batch(latents).shape == x.shape and tiled.tile == 16
    assert tiled.approximations((24, 40)) == {"vae_tile": 16} and tiled.approximations((16, 16)) == {}
    assert tiled.approximations((8, 40)) == {"vae_tile": 16}
    for tile in (2, 5):
        with pytest.raises(ValueError, match=r"--vae_tile must be 0, or a multiple of .* factors \(2, 2\) .*got ."):
            vae(tmp_path / "kl", tile=tile)


@pytest.mark.parametrize("grid, window", [((7,), (4,)), ((9, 5), (4, 5)), ((5, 6, 7), (2, 3, 5))])
def test_blended_tiles_of_a_pointwise_function_equal_the_function(grid, window):
    x, ones = torch.randn(2, 3, *grid), (1,) * len(grid)
    torch.testing.assert_close(blend_tiles(torch.sin, x, grid, window, ones, ones), x.sin())

    def double(t):
        for axis in range(2, t.ndim):
            t = t.repeat_interleave(2, axis)
        return t

    torch.testing.assert_close(blend_tiles(double, x, grid, window, ones, (2,) * len(grid)), double(x))


@pytest.mark.parametrize("gain", [1, 3])
def test_blending_moves_from_one_tile_to_the_next_in_equal_steps(gain):
    numbers = iter(range(1, 9))
    constant = lambda tile: torch.full((1, 1, 8 * gain, 8 * gain), float(next(numbers)))
    out = blend_tiles(constant, torch.zeros(1, 1, 8, 14), (8, 14), (8, 8), (1, 1), (gain, gain))[0, 0]
    assert torch.equal(out, out[:1].expand_as(out))     # tiles start at columns 0 and 6 and overlap by two cells
    ramp = (torch.arange(2 * gain) + 0.5) / (2 * gain)
    torch.testing.assert_close(out[0], torch.cat([torch.ones(6 * gain), 1 + ramp, torch.full((6 * gain,), 2.0)]))


def test_tiles_cover_the_grid_and_overlap_by_a_quarter():
    starts, x = [], torch.arange(30.0).view(1, 1, 30)
    blend_tiles(lambda tile: starts.append(tile[0, 0, 0].int().item()) or tile, x, (30,), (8,), (1,), (1,))
    assert starts == [0, 6, 12, 18, 22]


def test_padding_repeats_the_last_elements_of_each_axis():
    codec = PixelCodec(1, 3)
    codec.factors, x = (2, 4, 1), images(2, 1, 3, 5, 6)
    assert codec.pad_to_factors(x) is x
    codec.preprocessing = {"pad": True}
    expected = torch.cat([x, x[:, :, -1:]], 2)
    expected = torch.cat([expected, expected[:, :, :, -1:].expand(-1, -1, -1, 3, -1)], 3)
    assert torch.equal(codec.pad_to_factors(x), expected) and codec.pad_to_factors(expected) is expected


def test_bfloat16_encodes_volumes(tmp_path):
    write_weights(tmp_path / "vae.pt", config=dataclasses.replace(CONFIG, spatial_dims=3))
    x = images(2, 1, 4, 8, 8)
    exact, fast = (vae(tmp_path / "vae.pt", dtype=dtype).encode_batch(x) for dtype in ("float32", "bfloat16"))
    assert fast.dtype == torch.float32 and 0 < (fast - exact).norm() < 0.05 * exact.norm()


def test_bfloat16_returns_float32_close_to_exact(own):
    x = images(2, 1, 8, 8)
    codec = vae(own[0], dtype="bfloat16")
    exact, fast = vae(own[0]).encode_batch(x), codec.encode_batch(x)
    assert codec.approximations((8, 8)) == {"vae_dtype": "bfloat16"} and not codec.is_pixels
    assert fast.dtype == torch.float32 and 0 < (fast - exact).abs().max() < 0.1 * exact.abs().max()


def test_networks_are_in_eval_mode_without_gradients(own):
    codec = vae(own[0])
    assert not codec.network.training and not any(p.requires_grad for p in codec.network.parameters())
    assert not codec.encode_batch(images(1, 1, 8, 8)).requires_grad


def test_pixel_codec_maps_to_two_x_minus_one_and_back():
    codec, x = PixelCodec(3), images(2, 3, 5, 7)
    assert codec.encode_batch(x).equal(2 * x - 1)
    torch.testing.assert_close(codec.encode_batch(x, torch.randn_like(x)), 2 * x - 1)
    torch.testing.assert_close(codec.decode_batch(codec.encode_batch(x)), x)
    assert codec.latent_shape((3, 5, 7)) == (3, 5, 7) and codec.factors == (1, 1)
    assert codec.is_pixels and codec.approximations((5, 7)) == {}
    assert codec.describe()["scale_factor"] == 1 and codec.fingerprint != PixelCodec(1).fingerprint
    with pytest.raises(ValueError, match="images have 1 channels: the pixel codec expects 3"):
        codec.encode_batch(x[:, :1])


@pytest.mark.parametrize("corrupt, message", [
    (lambda x: 2 * x - 1, r"expected values in \[0, 1\] without NaN, got values from -\d"),
    (lambda x: x * 255, "values from"), (lambda x: x - x.min() - 2e-4, "values from"),
    (lambda x: x / x.max() + 2e-4, "values from"),
    (lambda x: torch.full_like(x, torch.nan), "from nan to nan"),
    (lambda x: (255 * x).byte(), r"expected float values in \[0, 1\], got torch.uint8; divide 8-bit values by 255"),
])
def test_codecs_reject_images_outside_unit_range(own, corrupt, message):
    for codec in (vae(own[0]), PixelCodec(1)):
        with pytest.raises(ValueError, match=message):
            codec.encode_batch(corrupt(images(2, 1, 8, 8)))


def test_codec_rejects_shapes_that_do_not_match(own):
    codec = vae(own[0])
    with pytest.raises(ValueError, match="axis 1 has size 9, .* factor 2"):
        codec.encode_batch(images(1, 1, 8, 9))
    with pytest.raises(ValueError, match="images have 2 channels: .*expects 1; set --image_channels"):
        codec.latent_shape((2, 8, 8))
    with pytest.raises(ValueError, match="decodes 3 channels over 2 axes"):
        codec.decode_batch(torch.zeros(1, 4, 4, 4))


# --- Weights of this project ---


def test_run_folder_gives_ema_weights_of_its_latest_step(tmp_path):
    for step in (1, 2):
        names = [f"model{step:06d}.pt", f"ema_0.9_{step:06d}.pt", f"ema_0.999_{step:06d}.pt"]
        for i, name in enumerate(names):
            write_weights(tmp_path / name, seed=10 * step + i)
        files = {name: {"bytes": (tmp_path / name).stat().st_size, "sha256": sha256_of_file(tmp_path / name)}
                 for name in names}
        checkpoint_util.commit(tmp_path, step, files, {})
    (tmp_path / "config.json").write_text("{}")
    assert vae(tmp_path).fingerprint == vae(tmp_path / "ema_0.999_000002.pt").fingerprint
    assert vae(tmp_path).fingerprint != vae(tmp_path / "ema_0.999_000001.pt").fingerprint


def test_fingerprint_identifies_the_function_not_the_file(own, tmp_path):
    write_weights(tmp_path / "copy.pt", note="another header")
    write_weights(tmp_path / "other.pt", seed=1)
    write_weights(tmp_path / "lean.pt", config=dataclasses.replace(CONFIG, use_checkpointing=True))
    write_weights(tmp_path / "range.pt", config=dataclasses.replace(CONFIG, image_range=(0.0, 1.0)))
    first = vae(own[0])
    assert first.fingerprint == vae(tmp_path / "copy.pt").fingerprint == vae(tmp_path / "lean.pt").fingerprint
    assert first.fingerprint != vae(tmp_path / "other.pt").fingerprint
    assert first.fingerprint != vae(tmp_path / "range.pt").fingerprint
    described = first.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["sha256"] == first.fingerprint and described["path"] == str(own[0])


def test_fields_at_their_defaults_do_not_change_the_fingerprint(own, tmp_path, monkeypatch):
    default, written = as_dict(AutoencoderConfig()), as_dict(CONFIG)
    changed = {name: value for name, value in written.items() if value != default[name]}
    write_weights(tmp_path / "older.pt", autoencoder=changed)  # a version without the other fields
    first = vae(own[0])
    assert vae(tmp_path / "older.pt").fingerprint == first.fingerprint
    assert first.config == {"class": "AutoencoderKL", **changed} and "norm_eps" not in first.config

    @dataclasses.dataclass
    class LaterConfig(AutoencoderConfig):
        new_option: int = option(3, "added by a later version")

    monkeypatch.setattr(foreign, "AutoencoderConfig", LaterConfig)
    without = lambda config: create_autoencoder(from_dict(AutoencoderConfig, as_dict(config)))
    monkeypatch.setattr(foreign, "create_autoencoder", without)
    assert vae(own[0]).fingerprint == first.fingerprint
    write_weights(tmp_path / "later.pt", autoencoder={**written, "new_option": 4})
    assert vae(tmp_path / "later.pt").fingerprint != first.fingerprint


def test_scale_factor_is_the_argument_else_the_autoencoders_else_default(tmp_path):
    write_weights(tmp_path / "a.pt", scale_factor=0.7)
    assert vae(tmp_path / "a.pt").scale_factor == 0.7
    assert vae(tmp_path / "a.pt", scale_factor=0.3).scale_factor == 0.3
    config = VAEConfig(vae_path=str(tmp_path / "a.pt"), vae_tile=8, vae_batch_size=2)
    codec = create_vae(config, "cpu")
    assert (codec.scale_factor, codec.slab, codec.batch_size) == (0.7, 8, 2)
    with pytest.raises(ValueError, match="--scale_factor must be > 0, got 0.0"):
        vae(tmp_path / "a.pt", scale_factor=0.0)


def test_volumes_are_encoded_and_decoded(tmp_path):
    config = dataclasses.replace(CONFIG, spatial_dims=3, downsample_factors=((1, 2, 2),))
    write_weights(tmp_path / "a.pt", config=config)
    codec, x = vae(tmp_path / "a.pt", tile=4), images(1, 1, 3, 4, 8)
    assert codec.latent_shape((1, 3, 4, 8)) == (3, 3, 2, 4)
    assert codec.decode_batch(codec.encode_batch(x)).shape == x.shape


def test_paths_without_an_autoencoder_are_rejected(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; --vae_path expects one of: hub:owner/name"):
        vae(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no autoencoder is specified; --vae_path"):
        vae("")
    with pytest.raises(ValueError, match="neither a run .* nor a diffusers folder .*--vae_path"):
        vae(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint.*--vae_path"):
        vae(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name: "AutoencoderKL"}')
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: is not JSON .*; check --vae_path"):
        vae(tmp_path)
    monkeypatch.chdir(tmp_path)     # an empty path is not the current folder
    with pytest.raises(FileNotFoundError, match="no autoencoder is specified"):
        vae("")
    write_weights(tmp_path / "d.pt", kind="diffusion")
    with pytest.raises(ValueError, match="--vae_path expects a model of kind 'autoencoder', got 'diffusion'"):
        vae(tmp_path / "d.pt")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="broken.pt is corrupt .*--vae_path"):
        vae(tmp_path / "broken.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="broken.safetensors is corrupt .*--vae_path"):
        vae(tmp_path / "broken.safetensors")


def test_arguments_out_of_range_are_rejected(own):
    with pytest.raises(ValueError, match="--vae_dtype must be one of float32, bfloat16, got 'half'"):
        vae(own[0], dtype="half")
    with pytest.raises(ValueError, match="--vae_tile must be 0, or a multiple .*got -2"):
        vae(own[0], tile=-2)


# --- MONAI ---


def write_monai(folder, weights_name="monai.pt", yaml_text=None):
    network = random_network(AutoencoderKL(**MONAI))
    weights = dict(network.state_dict())
    if weights_name.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(weights, folder / weights_name)
    else:
        torch.save(weights, folder / weights_name)
    if yaml_text is not None:
        (folder / weights_name).with_suffix(".yaml").write_text(yaml_text)
    twin = AutoencoderKL(**MONAI).eval()
    twin.load_state_dict(weights)
    return folder / weights_name, twin


@pytest.mark.parametrize("name", ["monai.pt", "monai.pth", "monai.safetensors"])
def test_monai_weights_open_with_the_yaml_file_next_to_them(tmp_path, name):
    path, twin = write_monai(tmp_path, name, json.dumps({"autoencoder": {"_target_": "monai.AutoencoderKL", **MONAI}}))
    codec, x = vae(path), images(2, 3, 8, 8)
    torch.testing.assert_close(codec.encode_batch(x), twin.moments(x)[0].detach() * 0.18215)


def test_monai_arguments_may_use_the_spelling_of_core(tmp_path):
    path, twin = write_monai(tmp_path)
    arguments = {("channels" if k == "num_channels" else k): v for k, v in MONAI.items()}
    codec, x = vae(path, vae_config={**arguments, "image_range": [-1, 1], "scale_factor": 2.0}), images(1, 3, 8, 8)
    torch.testing.assert_close(codec.encode_batch(x), 2 * twin.moments(2 * x - 1)[0].detach())


def test_monai_weights_without_matching_arguments_are_rejected(tmp_path):
    path, _ = write_monai(tmp_path)
    with pytest.raises(FileNotFoundError, match="monai.yaml .*does not exist next to it; .*--vae_config"):
        vae(path)
    with pytest.raises(FileNotFoundError, match="other.yaml does not exist; check --vae_config"):
        vae(path, vae_config=str(tmp_path / "other.yaml"))
    with pytest.raises(ValueError, match=r"contains \['num_chanels'\]: expected arguments of .*num_channels"):
        vae(path, vae_config={**MONAI, "num_chanels": 3})
    with pytest.raises(ValueError, match="contains no spatial_dims"):
        vae(path, vae_config={"num_channels": [4]})
    with pytest.raises(ValueError, match="does not match the model .*--vae_path"):
        vae(path, vae_config={**MONAI, "num_channels": [4, 4]})
    for text, reason in (("- 1", ": expected keys with values, got a list"), ("{a", " is not YAML: while parsing"),
                         ("autoencoder: 3", ": expected arguments of AutoencoderKL as keys with values, got 3"),
                         (json.dumps({**MONAI, "num_channels": "x"}), ": no AutoencoderKL has these arguments"),
                         (json.dumps({**MONAI, "spatial_dims": {}}), ": no AutoencoderKL has these arguments")):
        path.with_suffix(".yaml").write_text(text)
        with pytest.raises(ValueError, match=f"monai.yaml{reason}"):
            vae(path)


def test_grayscale_images_are_repeated_and_averaged_back(tmp_path):
    path, _ = write_monai(tmp_path, yaml_text=json.dumps(MONAI))
    codec, gray = vae(path), images(2, 1, 8, 8)
    color = codec.encode_batch(gray.repeat(1, 3, 1, 1))
    assert codec.decode_batch(color).shape[1] == 3
    latents = codec.encode_batch(gray)
    torch.testing.assert_close(latents, color)
    in_color = codec.decode_batch(latents, channels=3)
    assert in_color.shape[1] == 3 and in_color.std(1).max() > 0.01
    unclipped = codec.network.decode(latents / codec.scale_factor)
    torch.testing.assert_close(codec.decode_batch(latents), unclipped.mean(1, keepdim=True).clamp(0, 1))
    assert vae(path).decode_batch(latents, channels=1).shape == gray.shape
    assert codec.latent_shape((1, 8, 8)) == (3, 4, 4)


# --- diffusers ---


def diffusers_network(name):
    import diffusers

    torch.manual_seed(0)
    if name == "AutoencoderKL":
        return diffusers.AutoencoderKL(
            block_out_channels=(4, 8), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5, shift_factor=0.25,
        ).eval()
    if name == "AutoencoderTiny":
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4, 4), decoder_block_out_channels=(4, 4, 4), num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1), scaling_factor=2.0,
        ).eval()
    return diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41, decoder_norm_types="rms_norm", decoder_act_fns="silu",
    ).eval()


@pytest.mark.parametrize("name, scale, shift, factor", [
    ("AutoencoderKL", 0.5, 0.25, 2), ("AutoencoderTiny", 2.0, 0.0, 4), ("AutoencoderDC", 0.41, 0.0, 2),
])
@pytest.mark.filterwarnings("ignore")  # diffusers warns about its own dependencies
def test_diffusers_folders_state_their_own_scale_and_shift(tmp_path, name, scale, shift, factor):
    network = diffusers_network(name)
    network.save_pretrained(tmp_path / "vae")
    codec, x = vae(tmp_path / "vae"), images(2, 3, 8, 16)
    assert (codec.scale_factor, codec.shift_factor, codec.factors) == (scale, shift, (factor, factor))
    with torch.no_grad():
        code = network.encode(2 * x - 1)
        z = code.latent_dist.mode() if name == "AutoencoderKL" else code[0]
        expected = (network.decode(z).sample + 1) / 2
    latents = codec.encode_batch(x)
    assert latents.shape[1:] == codec.latent_shape(x.shape[1:])
    torch.testing.assert_close(latents, (z - shift) * scale)
    eps = torch.randn_like(z)
    std = code.latent_dist.std if name == "AutoencoderKL" else torch.full_like(z, math.exp(-15))
    torch.testing.assert_close(codec.encode_batch(x, eps), (z + std * eps - shift) * scale)
    torch.testing.assert_close(codec.decode_batch(latents), expected.clamp(0, 1), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"autoencoder inside, .*vae; check --vae_path"):
        vae(tmp_path)
    next((tmp_path / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be read as a diffusers autoencoder: .*--vae_path"):
        vae(tmp_path / "vae")


@pytest.mark.filterwarnings("ignore")
def test_other_classes_of_diffusers_are_rejected(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    text = "config.json contains a UNet2DModel: expected one of: AutoencoderKL, AutoencoderTiny, A"
    with pytest.raises(ValueError, match=text):
        vae(tmp_path)


# --- A new kind ---


class PatchMeans(torch.nn.Module):
    """An autoencoder of another project: latents are means over 2x2 patches of images in [-4, 4]."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(2.0))

    def compress(self, x):
        return self.gain * torch.nn.functional.avg_pool2d(x, 2)

    def expand(self, z):
        return (z / self.gain).repeat_interleave(2, 2).repeat_interleave(2, 3)


def open_patch_means(source):
    """The one function of a new kind."""
    network = PatchMeans()
    return foreign.OpenedAutoencoder(
        network, lambda x: foreign.deterministic_moments(network.compress(x)), network.expand, {"class": "PatchMeans"},
        in_channels=1, latent_channels=1, factors=(2, 2), image_range=(-4.0, 4.0), path=str(source.path),
        scale_factor=3.0,
    )


def test_a_new_kind_is_one_function_and_one_line(tmp_path, monkeypatch, one_process):
    recognizes = lambda source: (source.path / "means.json").is_file()
    monkeypatch.setitem(foreign.KINDS, "a folder of patch means", (recognizes, open_patch_means))  # the one line
    (tmp_path / "kind").mkdir()
    (tmp_path / "kind" / "means.json").write_text("{}")
    codec, x = vae(tmp_path / "kind"), images(3, 1, 4, 6).repeat_interleave(2, 2).repeat_interleave(2, 3)
    latents = codec.encode_batch(x)
    torch.testing.assert_close(latents, 3 * 2 * (8 * x[..., ::2, ::2] - 4))
    torch.testing.assert_close(codec.decode_batch(latents), x)
    assert codec.describe()["config"] == {"class": "PatchMeans"} and len(codec.fingerprint) == 64
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; .* a folder of patch means"):
        vae(tmp_path / "nowhere")

    (tmp_path / "data").mkdir()
    for i, image in enumerate((255 * x[:, 0]).byte().numpy()):
        Image.fromarray(image).save(tmp_path / "data" / f"{i}.png")
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "check_roundtrip.py"))
    monkeypatch.setattr("sys.argv", ["check_roundtrip.py", "--vae_path", str(tmp_path / "kind"), "--data_dir",
                                     str(tmp_path / "data"), "--image_size", "8x12", "--logdir", str(tmp_path / "log")])
    script["main"]()
    assert json.loads((tmp_path / "log" / "metrics.json").read_text())["psnr"] > 40


# --- The normalizer ---


STATISTICS = {"mean": 0.5, "std": 2.0, "channel_mean": [1.0, -2.0], "channel_std": [0.5, 4.0]}


@pytest.mark.parametrize("mode, shift, std", [
    ("auto", [0], [2]), ("channel", [1, -2], [0.5, 4]), ("none", [0], [1]), ("0.18215", [0], [0.18215]), (3, [0], [3]),
])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_normalizer_divides_by_the_statistics_of_its_mode(mode, shift, std, axes):
    normalizer = LatentNormalizer.fit(mode, STATISTICS)
    latents = torch.randn(2, 2, *(3,) * axes)
    column = (1, -1, *(1,) * axes)
    x0 = normalizer.normalize(latents)
    torch.testing.assert_close(x0, (latents - torch.tensor(shift).view(column)) / torch.tensor(std).view(column))
    torch.testing.assert_close(normalizer.denormalize(x0), latents)
    assert normalizer.to_dict() == {"mode": str(mode), "shift": shift, "std": std}


def test_channel_mode_gives_every_channel_mean_zero_and_std_one():
    latents = torch.randn(64, 2, 8) * torch.tensor([[0.5], [4.0]]) + torch.tensor([[1.0], [-2.0]])
    columns = latents.double().transpose(0, 1).flatten(1)
    statistics = {"std": 3.0, "channel_mean": columns.mean(1).tolist(), "channel_std": columns.std(1).tolist()}
    x0 = LatentNormalizer.fit("channel", statistics).normalize(latents).transpose(0, 1).flatten(1)
    torch.testing.assert_close(x0.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x0.std(1), torch.ones(2))


@pytest.mark.parametrize("mode", ["atuo", "0", "-1", "nan", "inf", ""])
def test_unknown_normalizer_modes_are_rejected(mode):
    with pytest.raises(ValueError, match="--normalizer must be auto, channel, none, or a number > 0 .*0.18215"):
        LatentNormalizer.fit(mode, STATISTICS)


def test_constant_channels_are_rejected_in_channel_mode():
    assert LatentNormalizer.fit("channel", {**STATISTICS, "channel_std": [3e-4, 4.0]}).std == [3e-4, 4.0]
    statistics = {**STATISTICS, "channel_std": [1e-4, 4.0]}     # below 1e-4 of the standard deviation over all
    with pytest.raises(ValueError, match=r"channels \[0\] are constant.*--normalizer auto"):
        LatentNormalizer.fit("channel", statistics)
    with pytest.raises(ValueError, match="std above 0"):
        LatentNormalizer.fit("auto", {**STATISTICS, "std": 0.0})


def test_normalizer_of_another_latent_is_rejected():
    with pytest.raises(ValueError, match=r"latents of shape \(1, 3, 2, 2\) do not match a normalizer of 2 channels"):
        LatentNormalizer.fit("channel", STATISTICS).normalize(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("std, rejected", [(0.89, True), (0.9, False), (1.0, False), (1.1, False), (1.2, True),
                                          (float("nan"), True)])
def test_latent_std_outside_its_limits_is_rejected_unless_allowed(std, rejected):
    normalizer = LatentNormalizer.fit("0.5", STATISTICS)
    check_latent_std(std, normalizer, allow=True)
    if rejected:
        number = f" or {std / 2:.5g}" if std == std else ""
        text = (f"measured standard deviation of {std:.4g} with --normalizer 0.5.*--normalizer auto{number}, or "
                "continue with --allow_latent_std")
        with pytest.raises(ValueError, match=text):
            check_latent_std(std, normalizer)
    else:
        check_latent_std(std, normalizer)
