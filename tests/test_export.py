import types

import numpy as np
import pytest
import torch

from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs import diffusers_export
from guided_diffusion_vae.runs.factories import (
    create_diffusion, create_gaussian_diffusion, create_model_and_diffusion_vae, sr_create_model,
)
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae.blocks import Attention
from guided_diffusion_vae.vae_wrapper import LatentNormalizer

diffusers = pytest.importorskip("diffusers")

AUTOENCODER = {"in_channels": 3, "num_channels": (8, 16), "norm_num_groups": 4, "num_res_blocks": 1}
UNET = {"num_channels": 32, "num_res_blocks": 1, "num_head_channels": 16, "attention_resolutions": "4",
        "channel_mult": "1,2"}


def randomize(network):
    """Give every weight a random value, including those initialized to zero."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def random_autoencoder(**flags):
    config = AutoencoderConfig(**{**AUTOENCODER, **flags})
    network = randomize(create_autoencoder(config))
    for module in network.modules():
        if isinstance(module, Attention):   # far from the uniform attention of small weights
            torch.nn.init.normal_(module.to_q.weight)
            torch.nn.init.normal_(module.to_q.bias, std=3.0)
    return network, config


def random_unet(diffusion=None, shape=(4, 8, 8), **flags):
    model = ModelConfig(**{**UNET, **flags})
    network, _ = create_model_and_diffusion_vae(shape, model, diffusion or DiffusionConfig())
    return randomize(network), as_dict(model)


@pytest.mark.parametrize("flags", [
    {}, {"num_channels": (8, 8, 16), "num_res_blocks": (3, 1, 2)}, {"attention_levels": (False, True)},
    {"with_encoder_nonlocal_attn": True}, {"with_decoder_nonlocal_attn": True, "attention_levels": (True, True)},
    {"num_channels": (16,), "in_channels": 1, "latent_channels": 2},
])
def test_exported_autoencoder_computes_the_same(flags, tmp_path):
    network, config = random_autoencoder(**flags)
    diffusers_export.save_folder(diffusers_export.autoencoder_to_diffusers(network, config, 0.3), tmp_path / "vae")
    exported = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    x = torch.rand(2, network.in_channels, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, sigma = network.encode(x)
        posterior = exported.encode(x).latent_dist
        torch.testing.assert_close(posterior.mean, mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(posterior.std, sigma, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(exported.decode(mean).sample, network.decode(mean), atol=1e-4, rtol=1e-4)
    assert exported.config.scaling_factor == 0.3


@pytest.mark.parametrize("normalizer", [LatentNormalizer([0], [0.4], "auto"),
                                        LatentNormalizer([0.1, -0.2, 0, 1], [0.5, 1, 2, 3], "channel")])
def test_normalizer_is_folded_into_the_exported_autoencoder(normalizer):
    network, config = random_autoencoder()
    exported = diffusers_export.autoencoder_to_diffusers(network, config, 0.18215, normalizer)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        x0 = normalizer.normalize(0.18215 * network.moments(x)[0])
        torch.testing.assert_close(exported.encode(x).latent_dist.mean, x0, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(exported.decode(x0).sample, network.reconstruct(x), atol=1e-3, rtol=1e-3)
    assert exported.config.scaling_factor == 1


@pytest.mark.parametrize("flags, problem", [
    ({"spatial_dims": 3}, "it has 3 spatial axes instead of 2"),
    ({"downsample_factors": (4,)}, r"it downsamples by \(4, 4\) over 2 levels, not by 2"),
    ({"initial_downsample_factor": 2}, r"it downsamples by \(4, 4\) over 2 levels"),
    ({"downsample_kernel_size": 5}, "its strided convolutions have kernel size 5"),
    ({"use_convtranspose": True}, "it upsamples by transposed convolution"),
    ({"space_to_channel": True}, "it has shortcuts between space and channels"),
    ({"norm_eps": 1e-5}, "its norms add 1e-05, not 1e-6"),
    ({"image_range": (0.0, 1.0)}, r"its image_range is \(0.0, 1.0\) instead of \(-1, 1\)"),
])
def test_autoencoder_without_a_counterpart_is_rejected_with_the_reason(flags, problem):
    with pytest.raises(ValueError, match=f"no counterpart in diffusers: {problem}.*; set --format safetensors"):
        diffusers_export.autoencoder_to_diffusers(*random_autoencoder(**flags), 0.18215)


@pytest.mark.parametrize("flags", [
    {}, {"resblock_updown": True}, {"use_new_attention_order": True}, {"use_scale_shift_norm": False},
    {"class_cond": True, "num_classes": 3, "class_dropout": 0.1}, {"attention_resolutions": ""},
    {"num_head_channels": -1, "num_heads": 2, "attention_resolutions": "4"},
])
def test_exported_unet_computes_the_same(flags, tmp_path):
    network, described = random_unet(DiffusionConfig(learn_sigma=True), **flags)
    diffusers_export.save_folder(diffusers_export.unet_to_diffusers(network, described), tmp_path / "unet")
    exported = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 7, 999])
    y = torch.tensor([0, 3, 1]) if flags.get("class_cond") else None
    with torch.no_grad():
        torch.testing.assert_close(exported(x, t, class_labels=y).sample, network(x, t, y), atol=1e-4, rtol=1e-4)
    assert exported.config.sample_size == 8 and exported.config.out_channels == 8


@pytest.mark.parametrize("flags, problem", [
    ({"channel_mult": "2,2"}, "its first level has 64 channels and its timestep embedding 32"),
    ({"num_head_channels": -1, "num_heads": 2, "attention_resolutions": "8,4"}, r"its attention heads have \[16, 32\]"),
    ({"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4}, r"its attention heads have \[16, 32\]"),
])
def test_unet_without_a_counterpart_is_rejected_with_the_reason(flags, problem):
    with pytest.raises(ValueError, match=f"no counterpart in diffusers: {problem}"):
        diffusers_export.unet_to_diffusers(*random_unet(**flags))


def test_volumes_and_upsamplers_are_rejected():
    with pytest.raises(ValueError, match="it has 3 spatial axes instead of 2"):
        diffusers_export.unet_to_diffusers(*random_unet(shape=(4, 8, 8, 8)))
    upsampler = sr_create_model(8, 4, 32, 1, False, False, False, "4", 1, 16, -1, True, 0, False, False,
                                channel_mult="1,2")
    with pytest.raises(ValueError, match="it is an upsampler, which has low-resolution images as a second input"):
        diffusers_export.unet_to_diffusers(upsampler, as_dict(ModelConfig(**UNET)))


def test_export_with_other_outputs_is_rejected(monkeypatch):
    entries = diffusers_export._unet_entries
    monkeypatch.setattr(diffusers_export, "_unet_entries",
                        lambda name, layer: ((k, 1.01 * v) for k, v in entries(name, layer)))
    with pytest.raises(ValueError, match="the exported UNet differs from the original by .*; it was not written"):
        diffusers_export.unet_to_diffusers(*random_unet())


@pytest.mark.parametrize("flags", [{}, {"predict_xstart": True}, {"predict_v": True}, {"learn_sigma": True}])
def test_scheduler_steps_equal_ours(flags):
    steps = 40
    diffusion = create_gaussian_diffusion(steps=steps, noise_schedule="cosine", **flags)
    described = as_dict(DiffusionConfig(diffusion_steps=steps, noise_schedule="cosine", **flags))
    scheduler = diffusers_export.create_scheduler(described, pixels=True)
    scheduler.set_timesteps(steps)
    x, noise = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    output = torch.randn(2, 6 if flags.get("learn_sigma") else 3, 4, 4, generator=torch.Generator().manual_seed(2))
    for t in (39, 17, 1, 0):
        generator = torch.Generator().manual_seed(5)
        actual = scheduler.step(output, t, x, generator=generator)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        t = torch.full((2,), t)
        expected = diffusion.p_sample(lambda x, t: output, x, t, noise_fn=lambda x, noise=noise: noise)
        torch.testing.assert_close(actual.pred_original_sample, expected["pred_xstart"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(actual.prev_sample, expected["sample"], atol=1e-4, rtol=1e-3)


def test_processes_that_diffusers_does_not_support_are_rejected():
    described = as_dict(DiffusionConfig(diffusion_steps=100, rescale_timesteps=True))
    with pytest.raises(ValueError, match="its timesteps are rescaled to 1000 over 100 steps"):
        diffusers_export.create_scheduler(described, pixels=True)
    with pytest.raises(ValueError, match="its diffusion process is flow"):
        diffusers_export.create_scheduler({**as_dict(DiffusionConfig()), "process": "flow"}, pixels=True)


@pytest.mark.parametrize("schedule, respacing, spacing", [
    ("cosine", "", "leading"), ("cosine_zero_snr", "", "trailing"), ("cosine", "trailing4", "trailing"),
])
def test_scheduler_has_the_timesteps_of_the_process(schedule, respacing, spacing):
    described = as_dict(DiffusionConfig(diffusion_steps=40, noise_schedule=schedule, timestep_respacing=respacing,
                                        predict_v=True))
    for pixels in (False, True):
        scheduler = diffusers_export.create_scheduler(described, pixels)
        assert scheduler.config.clip_sample is pixels and scheduler.config.timestep_spacing == spacing
        assert scheduler.config.num_train_timesteps == 40


@pytest.fixture(scope="module")
def unet():
    """Header and UNet of latents [4 x 8 x 8] with dropout."""
    network, described = random_unet(dropout=0.3)
    return network, {"model": described, "diffusion": as_dict(DiffusionConfig(diffusion_steps=40))}


@pytest.mark.parametrize("pixels", [False, True])
def test_pipeline_works_on_x0_and_clips_pixels_only(unet, pixels):
    network, header = unet
    autoencoder, config = random_autoencoder()
    codec = types.SimpleNamespace(is_pixels=pixels, network=autoencoder, architecture=config, scale_factor=0.3)
    normalizer = LatentNormalizer([0.1], [0.4], "channel")
    pipeline = diffusers_export.pipeline_to_diffusers(network, header, codec, normalizer)
    assert pipeline.scheduler.config.clip_sample is pixels and pipeline.unet.config.dropout == 0.3
    assert type(pipeline).__name__ == ("DDPMPipeline" if pixels else "LDMPipeline")
    if not pixels:
        x = torch.rand(2, 3, 16, 16) * 2 - 1
        with torch.no_grad():
            x0 = normalizer.normalize(0.3 * autoencoder.moments(x)[0])
            torch.testing.assert_close(pipeline.vqvae.encode(x).latent_dist.mean, x0, atol=1e-4, rtol=1e-4)
        assert pipeline.vqvae.config.scaling_factor == 1


def test_latent_samples_of_a_pipeline_are_not_clipped(unet):
    _, header = unet
    scheduler = diffusers_export.create_scheduler(header["diffusion"], pixels=False)
    diffusion = create_diffusion(header["diffusion"])
    x, eps = 5 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    actual = scheduler.step(eps, 20, x, generator=torch.Generator().manual_seed(5))
    expected = diffusion.p_mean_variance(lambda x, t: eps, x, torch.full((2,), 20), clip_denoised=False)
    torch.testing.assert_close(actual.pred_original_sample, expected["pred_xstart"], atol=1e-4, rtol=1e-4)
    assert expected["pred_xstart"].abs().max() > 2


def test_autoencoders_keep_or_absorb_the_scale_of_their_latents():
    network, config = random_autoencoder()
    codec = types.SimpleNamespace(network=network, architecture=config, scale_factor=0.3)
    assert diffusers_export.codec_to_diffusers(codec).config.scaling_factor == 0.3
    theirs = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    codec = types.SimpleNamespace(network=theirs, architecture=None, scale_factor=0.3, shift_factor=0.0,
                                  config={"_class_name": "AutoencoderKL"})
    exported = diffusers_export.codec_to_diffusers(codec, LatentNormalizer([0], [0.4], "auto"))
    assert exported.config.scaling_factor == pytest.approx(0.3 / 0.4)     # x0 = 0.3 z / 0.4
    for normalizer, shift in ((LatentNormalizer([0.1], [0.4], "channel"), 0.0),
                              (LatentNormalizer([0], [0.4], "auto"), 0.2)):
        codec.shift_factor = shift
        with pytest.raises(ValueError, match="its latents are normalized by --normalizer .* cannot represent"):
            diffusers_export.codec_to_diffusers(codec, normalizer)


def test_exports_may_differ_by_rounding_only():
    expected = torch.tensor([2.0, -10.0])
    diffusers_export._check_equal("UNet", expected, expected + 9e-4)
    with pytest.raises(ValueError, match="the exported UNet differs from the original by 0.0002 of its largest value"):
        diffusers_export._check_equal("UNet", expected, expected + 2e-3)


def test_autoencoders_of_other_projects_are_rejected():
    codec = types.SimpleNamespace(network=torch.nn.Identity(), architecture=None, config={"class": "Other"})
    with pytest.raises(ValueError, match="its autoencoder is of class Other"):
        diffusers_export.codec_to_diffusers(codec)


def test_save_folder_rejects_existing_folders_and_is_atomic(tmp_path):
    (tmp_path / "unet").mkdir()
    with pytest.raises(FileExistsError, match="unet already exists; set another --out"):
        diffusers_export.save_folder(None, tmp_path / "unet")

    class Failing:
        def save_pretrained(self, folder):
            folder.mkdir()
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        diffusers_export.save_folder(Failing(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    np.testing.assert_array_equal(list((tmp_path / "unet").iterdir()), [])
