import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import script_util
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.sampling import (
    KeyedNoise, Sampler, SamplingConfig, draw, parse_classes, read_npz, to_uint8, write_npz, write_samples,
)
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec

CPU = torch.device("cpu")
NAMES = ["push", "tapin", "tapout"]
# a network that predicts x0 keeps the samples of random weights in a sensible range
PROCESS = DiffusionConfig(diffusion_steps=4, noise_schedule="cosine", predict_xstart=True)


@pytest.fixture(scope="module")
def sampler():
    """A tiny conditional UNet whose every weight counts, on pictures themselves."""
    model = ModelConfig(num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="8", in_channels=1,
                        class_cond=True, num_classes=3)
    network, diffusion = script_util.create_model_and_diffusion_vae((1, 8, 8), model, PROCESS)
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    normalizer = LatentNormalizer([0.1], [0.5], "channel")
    return Sampler(network.eval(), diffusion, (1, 8, 8), PixelCodec(1), normalizer, (1, 7, 8), 3, NAMES)


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


# what a sample depends on


@pytest.mark.parametrize("use_ddim", [False, True])
def test_a_sample_depends_on_seed_and_number_alone(sampler, use_ddim):
    config = SamplingConfig(use_ddim=use_ddim)
    together, labels = sampler.x0(range(5), [2, 0], config, CPU)
    alone = [sampler.x0([i], [2, 0], config, CPU) for i in range(5)]
    assert labels.tolist() == [2, 0, 2, 0, 2] == [label.item() for _, label in alone]
    torch.testing.assert_close(torch.cat([x for x, _ in alone]), together, atol=1e-5, rtol=0)
    shuffled, _ = sampler.x0([4, 1], [2, 0], config, CPU)
    torch.testing.assert_close(shuffled, together[[4, 1]], atol=1e-5, rtol=0)


def test_batches_of_one_and_of_four_draw_the_same_pictures(sampler):
    config = SamplingConfig(num_samples=6, batch_size=1, seed=3)
    one, labels = draw(sampler, [0, 1, 2], config, CPU)
    four, _ = draw(sampler, [0, 1, 2], dataclasses.replace(config, batch_size=4), CPU)
    assert one.shape == (6, 1, 7, 8) and one.dtype == np.uint8 and labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert np.abs(one.astype(int) - four.astype(int)).max() <= 1  # a rounding at the edge of two grey levels


def test_another_seed_and_another_class_draw_another_picture(sampler):
    config = SamplingConfig()
    first, _ = sampler.x0([0], [0], config, CPU)
    assert (first - sampler.x0([0], [0], dataclasses.replace(config, seed=1), CPU)[0]).abs().max() > 0.1
    assert (first - sampler.x0([0], [1], config, CPU)[0]).abs().max() > 1e-3


def test_noise_is_standard_normal_and_fresh_at_every_call():
    noise = KeyedNoise(0, range(64))
    first, second = noise(torch.empty(64, 2, 8, 8)), noise(torch.empty(64, 2, 8, 8))
    assert abs(first.mean()) < 0.03 and abs(first.std() - 1) < 0.03
    assert abs((first * second).mean()) < 0.03 and abs((first[:32] * first[32:]).mean()) < 0.03
    assert noise(torch.empty(64, 1, dtype=torch.float64)).dtype == torch.float64


def test_ranks_share_the_batches_and_hold_the_whole(sampler, monkeypatch):
    config = SamplingConfig(num_samples=5, batch_size=2)
    whole, labels = draw(sampler, [0, 1], config, CPU)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr("guided_diffusion_vae.dist_util.world_size", lambda: 2)
        monkeypatch.setattr("guided_diffusion_vae.dist_util.rank", lambda: rank)
        monkeypatch.setattr("guided_diffusion_vae.dist_util.gather_objects", lambda mine: parts.append(mine) or parts)
        images, found = draw(sampler, [0, 1], config, CPU)
    assert [[start for start, *_ in part] for part in parts] == [[0, 4], [2]]
    assert np.array_equal(images, whole) and np.array_equal(found, labels)


def test_a_model_that_has_diverged_is_no_black_picture(sampler):
    broken = Sampler(lambda x, t, **kwargs: x * float("nan"), sampler.diffusion, (1, 8, 8), sampler.codec,
                     sampler.normalizer, (1, 8, 8))
    with pytest.raises(FloatingPointError, match="samples 0 to 1 are not finite: the model has diverged"):
        draw(broken, None, SamplingConfig(num_samples=2), CPU)


def test_nothing_to_draw_is_refused(sampler):
    with pytest.raises(ValueError, match="--num_samples 0 --batch_size 16: both are at least 1"):
        draw(sampler, None, SamplingConfig(num_samples=0), CPU)


def test_decode_undoes_the_normalisation_and_the_padding(sampler):
    images = torch.rand(2, 1, 8, 8)
    x0 = sampler.normalizer.normalise(sampler.codec.encode_batch(images))
    torch.testing.assert_close(sampler.decode(x0), images[:, :, :7])


# classes


@pytest.mark.parametrize("text, numbers", [
    ("", [0, 1, 2]), ("tapin", [1]), ("2, push", [2, 0]), ("tapin,tapin,0", [1, 1, 0]),
])
def test_classes_are_asked_for_by_name_or_number(text, numbers):
    assert parse_classes(text, 3, NAMES) == numbers


def test_a_name_that_is_a_number_means_the_class_of_that_name():
    assert parse_classes("7,0", 2, ["7", "9"]) == [0, 0]


@pytest.mark.parametrize("text, names, match", [
    ("tapon", NAMES, "--classes: the model has no class 'tapon'; it has push, tapin, tapout"),
    ("3", NAMES, "no class '3'"),
    ("-1", None, "no class '-1'; it has 0 to 2"),
])
def test_a_class_that_the_model_lacks_is_refused(text, names, match):
    with pytest.raises(ValueError, match=match):
        parse_classes(text, 3, names)


def test_classes_of_a_model_without_any_are_refused():
    assert parse_classes("", 0) is None
    with pytest.raises(ValueError, match="--classes 1: this model was trained without classes; leave the flag away"):
        parse_classes("1", 0)


# files


def test_the_npz_has_the_layout_of_the_reference(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6), np.uint8)
    path = write_npz(tmp_path, images, np.array([0, 1, 0, 1, 0]))
    assert path.name == "samples_5x4x6x3.npz"
    with np.load(path) as content:
        assert content["arr_0"].dtype == np.uint8 and content["arr_0"].shape == (5, 4, 6, 3)
        assert np.array_equal(content["arr_0"][2, 3, 5], images[2, :, 3, 5])
        assert content["arr_1"].tolist() == [0, 1, 0, 1, 0]
    back, labels, names = read_npz(path)
    assert np.array_equal(to_uint8(back), images) and labels.tolist() == [0, 1, 0, 1, 0] and names is None
    assert list(tmp_path.iterdir()) == [path]


def test_without_classes_the_npz_has_no_labels(tmp_path):
    path = write_npz(tmp_path, np.zeros((2, 1, 4, 4), np.uint8), None)
    with np.load(path) as content:
        assert content.files == ["arr_0"]
    assert read_npz(path)[1:] == (None, None)


def test_class_names_travel_with_the_labels(tmp_path):
    path = write_npz(tmp_path, np.zeros((2, 1, 4, 4), np.uint8), np.array([2, 0]), NAMES)
    assert read_npz(path)[2] == NAMES


def test_a_batch_of_samples_that_is_none_is_named(tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4 and no more")
    np.savez(tmp_path / "other.npz", images=np.zeros((1, 4, 4)))
    np.savez(tmp_path / "float.npz", np.zeros((1, 4, 4, 1)))
    for name in ("cut.npz", "other.npz", "gone.npz"):
        with pytest.raises(ValueError, match=f"{name} is no batch of samples .*arr_0"):
            read_npz(tmp_path / name)
    with pytest.raises(ValueError, match="float.npz: arr_0 is float64, needed is uint8"):
        read_npz(tmp_path / "float.npz")


def test_samples_are_written_as_npz_pictures_and_a_sheet_with_a_row_a_class(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 1, 16, 16), np.uint8)
    path = write_samples(tmp_path, images, np.array([2, 0, 2, 0, 2, 0, 2]), [2, 0], NAMES)
    assert path == tmp_path / "samples_7x16x16x1.npz" and path.exists()
    names = sorted(p.name for p in (tmp_path / "png").iterdir())
    assert names == ["push_000001.png", "push_000003.png", "push_000005.png",
                     *(f"tapout_00000{i}.png" for i in (0, 2, 4, 6))]
    assert np.array_equal(pixels_of(tmp_path / "png" / "push_000003.png"), images[3, 0])
    tall, wide = pixels_of(tmp_path / "contact_sheet.png").shape[:2]
    assert wide > 3 * 16 and tall >= 2 * 16


def test_new_samples_replace_the_pictures_of_older_ones_whole(tmp_path, monkeypatch):
    black, grey = (np.full((count, 1, 8, 8), level, np.uint8) for count, level in ((4, 0), (2, 99)))
    write_samples(tmp_path, black, np.array([0, 1, 0, 1]), [0, 1], NAMES)
    (tmp_path / "png.part").mkdir()
    (tmp_path / "png.part" / "half.png").write_bytes(b"left by a killed one")
    path = write_samples(tmp_path, grey, np.array([2, 2]), [2], NAMES)
    assert sorted(p.name for p in (tmp_path / "png").iterdir()) == ["tapout_000000.png", "tapout_000001.png"]
    assert (pixels_of(tmp_path / "png" / "tapout_000001.png") == 99).all() and not (tmp_path / "png.part").exists()
    assert read_npz(path)[1].tolist() == [2, 2] and read_npz(path)[2] == NAMES

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("guided_diffusion_vae.sampling.figures.save_picture", full)
    with pytest.raises(OSError, match="no space left"):
        write_samples(tmp_path, black, None)
    assert len(list((tmp_path / "png").iterdir())) == 2  # half a set never takes the place of a whole one


@pytest.mark.parametrize("labels, classes", [(None, None), (np.array([1]), [1, 2])])
def test_few_samples_and_no_classes_make_a_plain_sheet(tmp_path, labels, classes):
    write_samples(tmp_path, np.zeros((1, 3, 16, 16), np.uint8), labels, classes)
    assert min(pixels_of(tmp_path / "contact_sheet.png").shape[:2]) >= 16


def test_levels_are_rounded_to_the_nearest_of_256():
    assert to_uint8(torch.tensor([0, 0.4 / 255, 0.6 / 255, 1])).tolist() == [0, 0, 1, 255]
