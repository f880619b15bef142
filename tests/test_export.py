import numpy as np
import pytest
import torch

from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs import diffusers_export
from guided_diffusion_vae.runs.factories import (
    create_gaussian_diffusion, create_model_and_diffusion_vae, sr_create_model,
)
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae_wrapper import LatentNormalizer

diffusers = pytest.importorskip("diffusers")

AUTOENCODER = {"in_channels": 3, "num_channels": (8, 16), "norm_num_groups": 4, "num_res_blocks": 1}
UNET = {"num_channels": 32, "num_res_blocks": 1, "num_head_channels": 16, "attention_resolutions": "4",
        "channel_mult": "1,2"}


def scattered(network):
    """Give every weight a say, those that start at zero too."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def autoencoder_of(**flags):
    config = AutoencoderConfig(**{**AUTOENCODER, **flags})
    return scattered(create_autoencoder(config)), config


def unet_of(process=DiffusionConfig(), shape=(4, 8, 8), **flags):
    model = ModelConfig(**{**UNET, **flags})
    network, _ = create_model_and_diffusion_vae(shape, model, process)
    return scattered(network), as_dict(model)


@pytest.mark.parametrize("flags", [
    {}, {"num_channels": (8, 8, 16), "num_res_blocks": (3, 1, 2)}, {"attention_levels": (False, True)},
    {"with_encoder_nonlocal_attn": True}, {"with_decoder_nonlocal_attn": True, "attention_levels": (True, True)},
    {"num_channels": (16,), "in_channels": 1, "latent_channels": 2},
])
def test_an_autoencoder_computes_in_diffusers_what_it_does_here(flags, tmp_path):
    network, config = autoencoder_of(**flags)
    diffusers_export.save_folder(diffusers_export.autoencoder_to_diffusers(network, config, 0.3), tmp_path / "vae")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    x = torch.rand(2, network.in_channels, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, sigma = network.encode(x)
        posterior = theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mean, mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(posterior.std, sigma, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(theirs.decode(mean).sample, network.decode(mean), atol=1e-4, rtol=1e-4)
    assert theirs.config.scaling_factor == 0.3


@pytest.mark.parametrize("normalizer", [LatentNormalizer([0], [0.4], "auto"),
                                        LatentNormalizer([0.1, -0.2, 0, 1], [0.5, 1, 2, 3], "channel")])
def test_a_normalizer_is_worked_into_the_autoencoder(normalizer):
    network, config = autoencoder_of()
    theirs = diffusers_export.autoencoder_to_diffusers(network, config, 0.18215, normalizer)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        x0 = normalizer.normalize(0.18215 * network.moments(x)[0])
        torch.testing.assert_close(theirs.encode(x).latent_dist.mean, x0, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(theirs.decode(x0).sample, network.reconstruct(x), atol=1e-3, rtol=1e-3)
    assert theirs.config.scaling_factor == 1


@pytest.mark.parametrize("flags, problem", [
    ({"spatial_dims": 3}, "it works on 3 axes, not on pictures"),
    ({"downsample_factors": (4,)}, r"it shrinks pictures by \(4, 4\) over 2 levels, not by 2"),
    ({"initial_downsample_factor": 2}, r"it shrinks pictures by \(4, 4\) over 2 levels"),
    ({"downsample_kernel_size": 5}, "its strided convolutions have 5 taps"),
    ({"use_convtranspose": True}, "it upsamples by transposed convolution"),
    ({"space_to_channel": True}, "it has shortcuts between space and channels"),
    ({"norm_eps": 1e-5}, "its norms add 1e-05, not 1e-6"),
    ({"image_range": (0.0, 1.0)}, r"black and white are \(0.0, 1.0\) inside"),
])
def test_an_autoencoder_without_a_counterpart_is_refused_with_the_reason(flags, problem):
    with pytest.raises(ValueError, match=f"no counterpart in diffusers: {problem}.*; export it with --format safe"):
        diffusers_export.autoencoder_to_diffusers(*autoencoder_of(**flags), 0.18215)


@pytest.mark.parametrize("flags", [
    {}, {"resblock_updown": True}, {"use_new_attention_order": True}, {"use_scale_shift_norm": False},
    {"class_cond": True, "num_classes": 3, "class_dropout": 0.1}, {"attention_resolutions": ""},
    {"num_head_channels": -1, "num_heads": 2, "attention_resolutions": "4"},
])
def test_a_unet_computes_in_diffusers_what_it_does_here(flags, tmp_path):
    network, described = unet_of(DiffusionConfig(learn_sigma=True), **flags)
    diffusers_export.save_folder(diffusers_export.unet_to_diffusers(network, described), tmp_path / "unet")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 7, 999])
    y = torch.tensor([0, 3, 1]) if flags.get("class_cond") else None
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t, class_labels=y).sample, network(x, t, y), atol=1e-4, rtol=1e-4)
    assert theirs.config.sample_size == 8 and theirs.config.out_channels == 8


@pytest.mark.parametrize("flags, problem", [
    ({"channel_mult": "2,2"}, "its first level is 64 wide and its times are embedded in 32 numbers"),
    ({"num_head_channels": -1, "num_heads": 2, "attention_resolutions": "8,4"}, r"its attention heads have \[16, 32\]"),
    ({"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4}, r"its attention heads have \[16, 32\]"),
])
def test_a_unet_without_a_counterpart_is_refused_with_the_reason(flags, problem):
    with pytest.raises(ValueError, match=f"no counterpart in diffusers: {problem}"):
        diffusers_export.unet_to_diffusers(*unet_of(**flags))


def test_volumes_and_upsamplers_are_refused():
    with pytest.raises(ValueError, match="it works on 3 axes"):
        diffusers_export.unet_to_diffusers(*unet_of(shape=(4, 8, 8, 8)))
    upsampler = sr_create_model(8, 4, 32, 1, False, False, False, "4", 1, 16, -1, True, 0, False, False,
                                            channel_mult="1,2")
    with pytest.raises(ValueError, match="it is an upsampler"):
        diffusers_export.unet_to_diffusers(upsampler, as_dict(ModelConfig(**UNET)))


def test_an_export_that_computes_something_else_is_never_written(monkeypatch):
    entries = diffusers_export._unet_entries
    monkeypatch.setattr(diffusers_export, "_unet_entries", lambda name, layer: ((k, 1.01 * v) for k, v in entries(name, layer)))
    with pytest.raises(ValueError, match="the exported UNet differs from the original by .*; it was not written"):
        diffusers_export.unet_to_diffusers(*unet_of())


@pytest.mark.parametrize("flags", [{}, {"predict_xstart": True}, {"predict_v": True}, {"learn_sigma": True}])
def test_the_scheduler_takes_our_steps(flags):
    steps = 40
    process = create_gaussian_diffusion(steps=steps, noise_schedule="cosine", **flags)
    described = as_dict(DiffusionConfig(diffusion_steps=steps, noise_schedule="cosine", **flags))
    scheduler = diffusers_export.create_scheduler(described, pixels=True)
    scheduler.set_timesteps(steps)
    x, noise = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    output = torch.randn(2, 6 if flags.get("learn_sigma") else 3, 4, 4, generator=torch.Generator().manual_seed(2))
    for t in (39, 17, 1, 0):
        generator = torch.Generator().manual_seed(5)
        theirs = scheduler.step(output, t, x, generator=generator)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        ours = process.p_sample(lambda x, t: output, x, torch.full((2,), t), noise_fn=lambda x: noise)
        torch.testing.assert_close(theirs.pred_original_sample, ours["pred_xstart"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(theirs.prev_sample, ours["sample"], atol=1e-4, rtol=1e-3)


def test_times_that_diffusers_would_show_differently_are_refused():
    described = as_dict(DiffusionConfig(diffusion_steps=100, rescale_timesteps=True))
    with pytest.raises(ValueError, match="its times run to 1000 over 100 steps"):
        diffusers_export.create_scheduler(described, pixels=True)


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "unet").mkdir()
    with pytest.raises(FileExistsError, match="unet is there already; give --out another name"):
        diffusers_export.save_folder(None, tmp_path / "unet")

    class Failing:
        def save_pretrained(self, folder):
            folder.mkdir()
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        diffusers_export.save_folder(Failing(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    np.testing.assert_array_equal(list((tmp_path / "unet").iterdir()), [])
