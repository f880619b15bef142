import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import logger
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.data import DataConfig, ImageFolder, VolumeFolder
from guided_diffusion_vae.evaluation import (
    PAIRED_METRICS, ClassifierValidation, ReconstructionValidation, SamplePreview, previews,
)
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.latent_datasets import EncodedImages
from guided_diffusion_vae.nn import allow_tf32, keyed_randn
from guided_diffusion_vae.objectives import ClassifierObjective
from guided_diffusion_vae.resample import UniformSampler
from guided_diffusion_vae.runs import training
from guided_diffusion_vae.runs.factories import create_gaussian_diffusion
from guided_diffusion_vae.sampling import Sampler
from guided_diffusion_vae.train_util import ClassifierTrainConfig
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quiet_logger(tmp_path):
    logger.configure(str(tmp_path / "run"), [])
    yield
    logger.reset()


@pytest.fixture
def source(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (15, 16), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{'ba'[i % 2]}_{i}.png")
    return ImageFolder(DataConfig(str(tmp_path / "data"), "15x16", pad=True), multiple=(2, 2))


def test_reconstructions_are_measured_without_tf32(source, tmp_path, numerics, monkeypatch):
    network, allowed = create_autoencoder(AutoencoderConfig(in_channels=1, num_channels=(4, 4), norm_num_groups=2)), []
    for name in ("moments", "decode"):
        inner = getattr(network, name)
        monkeypatch.setattr(network, name, lambda x, inner=inner: allowed.append(
            torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32) or inner(x))
    allow_tf32(True)
    ReconstructionValidation(network.eval(), (-1.0, 1.0), source, 3, tmp_path, CPU, batch_size=2)(7)
    assert allowed == [False] * 4 and torch.backends.cudnn.allow_tf32


def test_reconstructions_are_shown_and_measured_without_padding(source, tmp_path):
    torch.manual_seed(0)
    config = AutoencoderConfig(in_channels=1, num_channels=(4, 4), norm_num_groups=2)
    network = create_autoencoder(config).eval()
    preview = ReconstructionValidation(network, config.image_range, source, 3, tmp_path, CPU, batch_size=2)
    preview(7)
    images = source.batch([0, 2, 4])
    with torch.no_grad():
        decoded = ((network.reconstruct(2 * images - 1) + 1) / 2).clamp(0, 1)
    logged = logger.getkvs()
    for name, metric in PAIRED_METRICS.items():
        expected = metric(images[:, :, :15], decoded[:, :, :15]).mean().item()
        assert logged[f"val_{name}"] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        mean, logvar = network.moments(2 * images - 1)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).mean()
    assert logged["val_kl"] == pytest.approx(divergence.item(), rel=1e-4)
    assert (tmp_path / "previews" / "000007.png").is_file()


class Identity(torch.nn.Module):
    """Autoencoder that is the identity, and counts its windows."""

    windows = 0

    def moments(self, x):
        self.windows += 1
        return x, torch.zeros_like(x)

    def decode(self, z):
        return z


class Doubling(Identity):
    """Autoencoder that doubles the range of [-1, 1], with posteriors of variance e."""

    def moments(self, x):
        return 2 * x, torch.ones_like(x)


def test_validation_clips_reconstructions_and_averages_the_divergence(source, tmp_path):
    measured = ReconstructionValidation(Doubling(), (-1.0, 1.0), source, 5, tmp_path, CPU, batch_size=2)(1)
    images = source.batch(range(5))
    decoded = (2 * images - 0.5).clamp(0, 1)
    assert measured["val_l1"] == pytest.approx((images - decoded)[:, :, :15].abs().mean().item(), rel=1e-5)
    mean = 2 * (2 * images - 1)
    assert measured["val_kl"] == pytest.approx(0.5 * (mean**2 + np.e - 2).mean().item(), rel=1e-5)


def test_full_volumes_are_measured_in_windows_without_seams(tmp_path):
    (tmp_path / "data").mkdir()
    for i, shape in enumerate([(9, 17, 23), (8, 8, 8)]):
        np.save(tmp_path / f"data/{i}.npy", np.random.default_rng(i).integers(0, 256, shape, np.uint8))
    volumes = VolumeFolder(DataConfig(str(tmp_path / "data"), "8x8x8", crop="random", patches_per_volume=3))
    network = Identity()
    measured = ReconstructionValidation(network, (-1.0, 1.0), volumes, 9, tmp_path, CPU, batch_size=2)(1)
    assert measured["val_l1"] < 1e-6 and measured["val_ssim"] > 0.9999 and network.windows > 1 + 2 * 3 * 3
    wholes = [torch.from_numpy(2 * volumes.read_volume(i) - 1) for i in range(2)]
    measured = ReconstructionValidation(network, (-1.0, 1.0), volumes, 9, tmp_path, CPU, batch_size=2)(1)
    assert measured["val_kl"] == pytest.approx(np.mean([0.5 * (x**2).mean().item() for x in wholes]), rel=0.05)


def test_sample_previews_show_one_row_per_class_from_fixed_noise(tmp_path, monkeypatch):
    diffusion = create_gaussian_diffusion(steps=4, noise_schedule="cosine", predict_xstart=True)
    level_of_class = lambda x, t, y: torch.full_like(x, -0.9) + 0.9 * y.view(-1, 1, 1, 1) + 0.01 * x
    sampler = Sampler(level_of_class, diffusion, (1, 8, 8), PixelCodec(1), LatentNormalizer([0], [1], "auto"),
                      (1, 8, 8), 3, ["a", "b", "c"])
    shown = []
    monkeypatch.setattr(previews, "contact_sheet", lambda images, columns, row_labels, colormap: shown.append(
        (images, columns, row_labels)) or Image.new("L", (1, 1)))
    logged = []
    monkeypatch.setattr(previews.logger, "logimage", lambda key, image, step: logged.append((key, image.size, step)))
    preview = SamplePreview(sampler, tmp_path, CPU, decode_batch=4, columns=2)
    preview(1)
    preview(2)
    (images, columns, labels), (again, _, _) = shown
    assert columns == 2 and labels == ["a", "b", "c"] and np.array_equal(images, again)
    assert images.reshape(3, 2, -1).mean(2) == pytest.approx(np.array([[0.05] * 2, [0.5] * 2, [0.95] * 2]), abs=0.02)
    expected = sampler.decode(sampler.sample_x0(range(6), [0, 1, 2], CPU)).numpy()
    assert np.array_equal(images[1], expected[3])  # the second image of the first class
    assert logged == [("preview", (1, 1), 1), ("preview", (1, 1), 2)]
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["000001.png", "000002.png"]


def test_sample_previews_without_classes_have_two_rows(tmp_path):
    diffusion = create_gaussian_diffusion(steps=4, noise_schedule="cosine", predict_xstart=True)
    sampler = Sampler(lambda x, t: 0 * x, diffusion, (1, 8, 8), PixelCodec(1), LatentNormalizer([0], [1], "auto"),
                      (1, 8, 8))
    SamplePreview(sampler, tmp_path, CPU, columns=3)(1)
    with Image.open(tmp_path / "previews" / "000001.png") as sheet:
        assert sheet.size == (3 * 10 + 2, 2 * 10 + 2)


@pytest.mark.parametrize("steps, taken, first", [(4, 4, 3), (50, 50, 49), (60, 30, 58), (1000, 50, 980)])
def test_previews_use_evenly_spaced_steps_of_any_length(steps, taken, first):
    header = {"latent_shape": [1, 8, 8], "image_shape": [1, 8, 8], "classes": None, "model": {"num_classes": 0},
              "normalizer": LatentNormalizer([0], [1], "auto").to_dict(),
              "diffusion": vars(DiffusionConfig(diffusion_steps=steps, noise_schedule="cosine"))}
    sampler = training.preview_sampler(None, PixelCodec(1), header)
    assert sampler.diffusion.num_timesteps == taken and max(sampler.diffusion.timestep_map) == first


class FirstClass(torch.nn.Module):
    """Classify every image as the first class, 'b', and record the inputs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, t):
        self.seen.append((x, t))
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)


def validation(source, count, noised, batch_size=2, shift=0.0, std=1.0, **options):
    diffusion = create_gaussian_diffusion(steps=40)
    objective = ClassifierObjective(diffusion, UniformSampler(diffusion), noised, "val")
    source = EncodedImages(source, PixelCodec(1))
    model = FirstClass()
    train = ClassifierTrainConfig(max_val_samples=count, batch_size=batch_size, **{"eval_interval": 5, **options})
    normalizer = LatentNormalizer([shift], [std], "channel")
    return model, ClassifierValidation(model, objective, source, normalizer, ["b", "a"], train, CPU)


def test_classifier_validation_uses_the_classes_of_the_model(source):
    model, measure = validation(source, 99, noised=False)
    measure(5)
    logged = logger.getkvs()
    assert logged["val_acc@1"] == pytest.approx(3 / 5) and logged["val_acc@5"] == 1
    loss = (3 * np.log(1 + np.exp(-1)) + 2 * np.log(1 + np.exp(1))) / 5
    assert logged["val_loss"] == pytest.approx(loss, rel=1e-5)
    seen = torch.cat([x for x, _ in model.seen])
    assert torch.equal(seen, 2 * source.batch(range(5)) - 1) and all((t == 0).all() for _, t in model.seen)


def test_classifier_validation_without_count_uses_the_next_batch(source):
    model, measure = validation(source, 0, noised=False)
    measure(5)
    measure(10)
    expected = 2 * source.batch([2, 3, 4, 0]) - 1
    assert torch.equal(torch.cat([x for x, _ in model.seen]), expected)


@pytest.mark.parametrize("options, first", [({"eval_interval": 5, "save_interval": 2}, 2),
                                            ({"eval_interval": 0, "save_interval": 10}, 1)])
def test_classifier_validation_continues_at_its_interval(source, options, first):
    model, measure = validation(source, 0, noised=False, batch_size=1, **options)
    measure(10)
    assert torch.equal(model.seen[0][0], 2 * source.batch([first]) - 1)


def test_classifier_validation_measures_evenly_spaced_items_with_keyed_noise(source):
    model, measure = validation(source, 3, noised=True, shift=0.3, std=0.5, seed=7)
    measure(5)
    t = torch.cat([t for _, t in model.seen])
    alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(25e-4, 0.5, 40))).float()[t].view(-1, 1, 1, 1)
    x0 = (2 * source.batch([0, 2, 4]) - 1.3) / 0.5
    noise = keyed_randn((1, 16, 16), [(7, 2, 0, slot) for slot in range(3)])   # seed, stream, no step, slot
    torch.testing.assert_close(torch.cat([x for x, _ in model.seen]),
                               alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, rtol=1e-4, atol=1e-4)
    loss = np.log(1 + np.exp([1, -1, -1])).mean()   # the second and third are of the first class of the model
    assert logger.getkvs()["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert logger.getkvs()["val_acc@1"] == pytest.approx(2 / 3)


def test_classifier_validation_uses_the_same_noise_each_time(source):
    model, measure = validation(source, 99, noised=True)
    measure(5)
    measure(10)
    first, second = model.seen[:3], model.seen[3:]
    assert all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(first, second, strict=True))
    times = torch.cat([t for _, t in first])
    noise = torch.cat([x for x, _ in first]) - 2 * source.batch(range(5)) + 1
    assert len(set(times.tolist())) > 1 and noise.std() > 0.1
