"""Conditioning on images and label maps: files, streams, networks, guidance, scripts."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict
from guided_diffusion_vae.data import (
    BatchPlan, Conditions, DataConfig, ImageFolder, LabelImages, LabelVolumes, LatentStream, VolumeFolder,
    match_conditions, open_label_maps, require_same_sizes,
)
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.latent_datasets import EncodedImages
from guided_diffusion_vae.nn import drop_conditioning
from guided_diffusion_vae.runs.factories import create_model_and_diffusion_vae
from guided_diffusion_vae.runs.spaces import Space
from guided_diffusion_vae.sampling import ClassifierFreeGuidance, Unconditional
from guided_diffusion_vae.unet import ModelConfig, UNetModel

pytestmark = pytest.mark.usefixtures("one_process")
COUNT = 6


def blocks(shape, seed):
    """Return a label map of 0, 1 and 2 in blocks of 4 along each axis, so that sizes divided by 4 keep it exact."""
    coarse = np.random.default_rng(seed).integers(0, 3, [n // 4 for n in shape])
    for axis in range(len(shape)):
        coarse = coarse.repeat(4, axis)
    return coarse.astype(np.uint8)


@pytest.fixture
def pairs(tmp_path):
    """Folders of images (100 times the label) and of their label maps, 16x24."""
    for kind, factor, ending in (("images", 100, "png"), ("masks", 1, "bmp")):
        (tmp_path / kind).mkdir()
        for i in range(COUNT):
            Image.fromarray(blocks((16, 24), i) * factor).save(tmp_path / kind / f"{i}.{ending}")
    return tmp_path


def label_maps(folder, **options):
    return LabelImages((0, 1, 2), DataConfig(**{"data_dir": str(folder), "image_size": "16x24", **options}))


# --- Files ---


@pytest.mark.parametrize("kind", ["gray", "palette", "int64", "float32"])
def test_label_maps_of_any_type_are_one_hot(tmp_path, kind):
    labels = blocks((8, 8), 0)
    if kind in ("int64", "float32"):
        np.save(tmp_path / "a.npy", labels.astype(kind))
    else:
        image = Image.fromarray(labels)
        if kind == "palette":
            image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        image.save(tmp_path / "a.png")
    maps = label_maps(tmp_path, image_size="8x8").batch([0])[0].numpy()
    assert (maps.argmax(0) == labels).all() and (maps.sum(0) == 1).all() and maps.shape == (3, 8, 8)


def test_resized_label_maps_are_fractions_of_each_label(tmp_path):
    labels = np.zeros((8, 8), np.uint8)
    labels[:3], labels[3:] = 2, 1
    Image.fromarray(labels).save(tmp_path / "a.png")
    maps = label_maps(tmp_path, image_size="4x4").batch([0])[0]
    torch.testing.assert_close(maps[:, :, 0], torch.tensor([[0, 0, 0, 0], [0, 0.5, 1, 1], [1, 0.5, 0, 0]]))


def test_other_labels_are_rejected(pairs):
    maps = LabelImages((0, 255), DataConfig(data_dir=str(pairs / "masks"), image_size="16x24"))
    with pytest.raises(ValueError, match=r"0.bmp: expected labels 0, 255 \(--condition_labels\), got 1, 2; set"):
        maps.batch([0])


def test_colors_are_no_label_map(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: expected a label map of one channel, got colors"):
        label_maps(tmp_path, image_size="8x8").batch([0])


def test_names_match_without_extensions(pairs):
    images = ImageFolder(data_dir=str(pairs / "images"), image_size="16x24")
    maps = label_maps(pairs / "masks")
    order = ["4.npy", "0.nii.gz", "3.jpeg"]
    assert match_conditions(order, maps, "data").tolist() == [4, 0, 3]
    patches = Named(["a/2.png[0,0,8]", "a/1.nii.gz[0,0,8]"])
    assert match_conditions(["a/1.nii[0,0,8]"], patches, "data").tolist() == [1]
    with pytest.raises(ValueError, match=r"masks \(--condition_dir\) has no condition for 2 of 3 items of data, such "
                                         "as 9.png, b/1.png: expected files of the same names, .* such as 0.bmp, 1.b"):
        match_conditions(["9.png", "1.png", "b/1.png"], maps, "data")
    with pytest.raises(ValueError, match="1.png and 1.bmp are conditions of one image"):
        match_conditions(images.names, Named(["1.png", "1.bmp"]), "data")


@dataclasses.dataclass
class Named:
    names: list
    folder: str = "folder"


def test_conditions_of_other_sizes_are_rejected_unless_all_are_resized(pairs):
    images = ImageFolder(data_dir=str(pairs / "images"), image_size="16x24")
    Image.fromarray(blocks((20, 24), 0)).save(pairs / "masks" / "2.bmp")
    with pytest.raises(ValueError, match="2.bmp in .*masks .--condition_dir.: expected size 16x24 as 2.png, got 20x24"):
        require_same_sizes(images, label_maps(pairs / "masks"), np.arange(COUNT))
    require_same_sizes(images, label_maps(pairs / "masks", crop="none"), np.arange(COUNT))


# --- Streams ---


def stream_of(source, labels, rows, space, grid):
    conditions = Conditions(labels, rows, (3, *grid), None)
    plan = BatchPlan(len(rows), 3, seed=5)
    return LatentStream(EncodedImages(source, space.codec), space.normalizer, plan, "cpu", condition=conditions)


@pytest.mark.parametrize("options", [{}, {"random_flip": True}, {"crop": "random", "random_flip": True}])
def test_conditions_follow_flips_and_random_crops(pairs, options):
    size = {"image_size": "16x24" if "crop" not in options else "8x12", **options}
    images = ImageFolder(data_dir=str(pairs / "images"), **size)
    (pairs / "masks" / "unused.bmp").write_bytes((pairs / "masks" / "0.bmp").read_bytes())
    maps = label_maps(pairs / "masks", **size)
    rows = match_conditions(images.names, maps, images.folder)
    stream = stream_of(images, maps, rows, Space.of_pixels(1), images.shape[1:])
    for _ in range(3):
        x0, conditioning = next(stream)
        labels = (conditioning["condition"] * torch.arange(3.0).view(3, 1, 1)).sum(1, keepdim=True)
        # The image is 100 times the label. Resizing overshoots at edges, which is clipped at 0 and 1.
        difference = ((x0 + 1) * 127.5 - 100 * labels).abs()
        assert difference.max() < 1e-3 if "crop" not in options else difference.mean() < 4
    stream.close()


def test_volumes_and_their_patches_have_conditions(tmp_path):
    for kind, factor in (("images", 100), ("masks", 1)):
        (tmp_path / kind).mkdir()
        for i in range(3):
            np.save(tmp_path / kind / f"{i}.npy", blocks((8, 12, 12), i) * np.uint8(factor))
    config = DataConfig(data_dir=str(tmp_path / "images"), image_size="8x8x8", crop="random", patches_per_volume=2)
    volumes = VolumeFolder(config)
    masks = dataclasses.replace(config, data_dir=str(tmp_path / "masks"), patches_per_volume=1)
    maps = open_label_maps(masks, (0, 1, 2))
    assert isinstance(maps, LabelVolumes)
    rows = match_conditions(volumes.names, maps, volumes.folder)
    assert rows.tolist() == [0, 0, 1, 1, 2, 2]
    stream = stream_of(volumes, maps, rows, Space.of_pixels(1, 3), (8, 8, 8))
    x0, conditioning = next(stream)
    stream.close()
    labels = (conditioning["condition"] * torch.arange(3.0).view(3, 1, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close((x0 + 1) * 127.5, 100 * labels, atol=1e-3, rtol=0)


def test_label_maps_are_averaged_over_the_grid_of_x0(pairs):
    conditions = Conditions(label_maps(pairs / "masks"), np.arange(COUNT)[::-1], (3, 4, 6), None)
    read = conditions.of_samples([0, COUNT], "cpu")
    expected = blocks((16, 24), COUNT - 1)[::4, ::4]
    assert (read[0].argmax(0).numpy() == expected).all() and torch.equal(read[0], read[1])
    assert conditions.names == [f"{i}.bmp" for i in reversed(range(COUNT))]


# --- Networks and guidance ---


def unet(**options):
    torch.manual_seed(0)
    return UNetModel(image_size=8, in_channels=1, model_channels=32, out_channels=1, num_res_blocks=1,
                     attention_resolutions=(), channel_mult=(1,), **options)


def test_condition_widens_the_first_convolution_alone():
    plain, conditional = unet(), unet(condition_channels=3)
    shapes = [{name: value.shape for name, value in network.state_dict().items()} for network in (plain, conditional)]
    assert {name for name in shapes[0] if shapes[0][name] != shapes[1][name]} == {"input_blocks.0.0.weight"}
    assert shapes[0].keys() == shapes[1].keys() and shapes[1]["input_blocks.0.0.weight"] == (32, 4, 3, 3)


def test_network_requires_the_condition_that_it_was_built_for():
    x, t = torch.zeros(2, 1, 8, 8), torch.zeros(2)
    for network, condition, found in ((unet(condition_channels=3), None, r"\(2, 0, 8, 8\)"),
                                      (unet(condition_channels=3), torch.zeros(2, 3, 4, 4), r"\(2, 3, 4, 4\)"),
                                      (unet(), torch.zeros(2, 3, 8, 8), r"\(2, 3, 8, 8\)")):
        with pytest.raises(ValueError, match=f"condition: expected shape .* got {found}; .*--condition_dir"):
            network(x, t, condition=condition)


def test_dropped_samples_have_no_condition_and_the_null_class():
    conditioning = {"y": torch.tensor([0, 1]), "condition": torch.ones(2, 3, 4, 4), "low_res": torch.ones(2, 1, 2, 2)}
    dropped = drop_conditioning(conditioning, torch.tensor([False, True]), 7)
    assert dropped["y"].tolist() == [0, 7] and dropped["condition"].amax((1, 2, 3)).tolist() == [1, 0]
    assert dropped["low_res"] is conditioning["low_res"]


def test_guidance_without_classes_is_guidance_of_the_condition():
    network = unet(condition_channels=3).eval()
    torch.nn.init.normal_(network.out[-1].weight)
    x, t, condition = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 3.0]), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        given, absent = network(x, t, condition=condition), network(x, t, condition=torch.zeros_like(condition))
        guided = ClassifierFreeGuidance(network, None, 3.0)(x, t, condition=condition)
        none = Unconditional(network, None)(x, t, condition=condition)
    torch.testing.assert_close(guided, absent + 3 * (given - absent), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(none, absent)
    assert (given - absent).abs().max() > 1e-3


# --- Scripts ---

FLAGS = {"num_channels": 32, "channel_mult": "1", "num_res_blocks": 1, "attention_resolutions": "8", "batch_size": 3,
         "noise_schedule": "cosine", "diffusion_steps": 8, "predict_v": True, "max_steps": 1, "ema_rate": ""}
SAMPLES = {"num_samples": 4, "batch_size": 3, "timestep_respacing": "2"}


def test_label_maps_condition_training_previews_and_samples(pairs, call):
    run, masks = pairs / "run", str(pairs / "masks")
    flags = {**FLAGS, "data_dir": pairs / "images", "image_size": "16x24", "class_dropout": 0.5, "logdir": run}
    status, _, error = call("image_train", **flags, condition_dir=masks, condition_labels="0,1,2")
    assert status == 0, error
    header = checkpoint_util.load_weights(run / "model000001.pt")[1]
    assert header["condition"] == {"channels": 3, "labels": [0, 1, 2], "value_range": ""}
    assert (run / "previews" / "000001.png").exists()

    status, _, error = call("image_sample", model_path=run, logdir=pairs / "samples", **SAMPLES)
    assert status and "--condition_dir is not set: the model was trained with label maps of 0, 1, 2" in error
    status, _, error = call("image_sample", model_path=run, logdir=pairs / "samples", condition_dir=masks, cfg_scale=2,
                            **SAMPLES)
    assert status == 0, error
    assert (pairs / "samples" / "conditions.txt").read_text().split() == ["0.bmp", "1.bmp", "2.bmp", "3.bmp"]
    status, _, error = call("image_nll", model_path=run, data_dir=pairs / "images", logdir=pairs / "nll")
    assert status and "was trained with --condition_dir" in error


def test_images_condition_latents_of_a_cache(pairs, call):
    config = AutoencoderConfig(in_channels=1, num_channels=(8, 16), num_res_blocks=1, norm_num_groups=4)
    header = {"kind": "autoencoder", "autoencoder": as_dict(config)}
    checkpoint_util.save_weights(pairs / "vae.pt", create_autoencoder(config).state_dict(), header)
    cache, run = pairs / "cache", pairs / "run"
    status, _, error = call("encode_dataset", vae_path=pairs / "vae.pt", data_dir=pairs / "images", cache_dir=cache,
                            image_size="16x24", random_flip=True)
    assert status == 0, error
    flags = {**FLAGS, "cache_dir": cache, "condition_dir": pairs / "masks"}
    status, _, error = call("image_train_vae", **flags, logdir=run)
    assert status == 0, error
    header = checkpoint_util.load_weights(run / "model000001.pt")[1]
    assert header["condition"]["channels"] == 4 == header["latent_shape"][0]
    status, _, error = call("image_sample_vae", model_path=run, logdir=run / "samples", condition_dir=pairs / "masks",
                            **SAMPLES)
    assert status == 0, error
    (pairs / "masks" / "3.bmp").unlink()
    status, _, error = call("image_train_vae", **flags, logdir=pairs / "other")
    assert status and "has no condition for 1 of 6 items" in error and "such as 3.png" in error


def test_flags_of_conditions_are_checked_together(pairs, call):
    flags = {**FLAGS, "data_dir": pairs / "images", "image_size": "16x24", "logdir": pairs / "run"}
    np.save(pairs / "masks" / "0.npy", np.zeros((16, 24), np.float32))
    for options, message in (
        ({"condition_labels": "0,1"}, "--condition_labels and --condition_value_range have no effect without"),
        ({"condition_labels": "3", "condition_dir": pairs / "masks"}, "3: expected two or more different values"),
        ({"condition_dir": pairs / "masks"}, "for --condition_dir the flag is --condition_value_range"),
    ):
        status, _, error = call("image_train", **flags, **options)
        assert status and message in error


def test_condition_of_a_model_without_is_rejected(pairs, call):
    flags = {**FLAGS, "data_dir": pairs / "images", "image_size": "16x24", "logdir": pairs / "run"}
    assert call("image_train", **flags, preview_interval=-1)[0] == 0
    status, _, error = call("image_sample", model_path=pairs / "run", condition_dir=pairs / "masks",
                            logdir=pairs / "samples", **SAMPLES)
    assert status and "the model was trained without conditions; omit the flag" in error


def test_class_dropout_requires_something_to_drop():
    message = "--class_dropout 0.1 requires --class_cond True, --condition_on or --condition_dir"
    with pytest.raises(ValueError, match=message):
        create_model_and_diffusion_vae((1, 8, 8), ModelConfig(class_dropout=0.1, channel_mult="1"), DiffusionConfig())
