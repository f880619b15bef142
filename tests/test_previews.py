import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import figures, logger, metrics, script_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.image_datasets import DataConfig, PictureFolder
from guided_diffusion_vae.previews import Accuracy, ReconstructionPreview, SamplePreview
from guided_diffusion_vae.sampling import Sampler, SamplingConfig
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quiet_logger(tmp_path):
    logger.configure(str(tmp_path / "run"), [])
    yield
    logger.reset()


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (15, 16), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{'ba'[i % 2]}_{i}.png")
    return PictureFolder(DataConfig(str(tmp_path / "data"), "15x16", pad=True), multiple=(2, 2))


def test_reconstructions_are_drawn_and_measured_without_the_padding(pictures, tmp_path):
    torch.manual_seed(0)
    config = AutoencoderConfig(in_channels=1, num_channels=(4, 4), norm_num_groups=2)
    network = create_autoencoder(config).eval()
    preview = ReconstructionPreview(network, config.image_range, pictures, 3, tmp_path, CPU, batch_size=2)
    preview(7)
    images = pictures.batch([0, 2, 4])
    with torch.no_grad():
        decoded = ((network.reconstruct(2 * images - 1) + 1) / 2).clamp(0, 1)
    logged = logger.getkvs()
    for name in ("psnr", "ssim", "l1"):
        expected = getattr(metrics, name)(images[:, :, :15], decoded[:, :, :15]).mean().item()
        assert logged[f"val_{name}"] == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "previews" / "000007.png").is_file()


def test_previews_of_samples_show_one_row_a_class_and_the_same_noise_each_time(tmp_path, monkeypatch):
    diffusion = script_util.create_gaussian_diffusion(steps=4, noise_schedule="cosine", predict_xstart=True)
    level_of_class = lambda x, t, y: torch.full_like(x, -0.9) + 0.9 * y.view(-1, 1, 1, 1) + 0.01 * x
    sampler = Sampler(level_of_class, diffusion, (1, 8, 8), PixelCodec(1), LatentNormalizer([0], [1], "auto"),
                      (1, 8, 8), 3, ["a", "b", "c"])
    shown = []
    monkeypatch.setattr(figures, "contact_sheet", lambda images, columns, row_labels: shown.append(
        (images, columns, row_labels)) or Image.new("L", (1, 1)))
    preview = SamplePreview(sampler, tmp_path, CPU, columns=2)
    preview(1)
    preview(2)
    (images, columns, labels), (again, _, _) = shown
    assert columns == 2 and labels == ["a", "b", "c"] and np.array_equal(images, again)
    assert images.reshape(3, 2, -1).mean(2) == pytest.approx(np.array([[0.05] * 2, [0.5] * 2, [0.95] * 2]), abs=0.02)
    expected = sampler.decode(sampler.x0(range(6), [0, 1, 2], SamplingConfig(), CPU)[0]).numpy()
    assert np.array_equal(images[1], expected[3])  # the second picture of the first class
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["000001.png", "000002.png"]


@pytest.mark.parametrize("steps, taken, first", [(4, 4, 3), (50, 50, 49), (60, 30, 58), (1000, 50, 980)])
def test_previews_take_evenly_spaced_steps_of_any_process(steps, taken, first):
    header = {"latent_shape": [1, 8, 8], "image_shape": [1, 8, 8], "classes": None, "model": {"num_classes": 0},
              "normalizer": LatentNormalizer([0], [1], "auto").to_dict(),
              "diffusion": vars(DiffusionConfig(diffusion_steps=steps, noise_schedule="cosine"))}
    sampler = script_util.preview_sampler(None, PixelCodec(1), header)
    assert sampler.diffusion.num_timesteps == taken and max(sampler.diffusion.timestep_map) == first


def test_accuracy_is_over_all_pictures_in_the_models_numbering(pictures):
    class OddOnes(torch.nn.Module):
        """Give every picture the class 'b', the model's first."""
        in_channels = 1

        def __init__(self):
            super().__init__()
            self.out = torch.nn.Sequential(torch.nn.Linear(1, 2))
            self.out[0].weight.data.zero_()
            self.out[0].bias.data = torch.tensor([1.0, 0.0])

        def forward(self, x, t):
            return self.out(x.mean((2, 3)))

    Accuracy(OddOnes(), pictures, ["b", "a"], batch_size=2)(1)
    assert logger.getkvs() == {"val_accuracy": pytest.approx(3 / 5)}
