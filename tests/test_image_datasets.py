import contextlib
import itertools
import io
import random
import resource
import shutil
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from guided_diffusion_vae import image_datasets, logger
from guided_diffusion_vae.data import (
    BatchPlan, DataConfig, ImageFolder, ImageStream, Prefetcher, open_folder, open_npz, parse_size, permute_indices,
    image_folders, map_labels, npz, open_archive, read_array, resizing, unpad,
)
from guided_diffusion_vae.data.decoding import exif_orientation, read_header, read_values


def ramp(height, width, dtype=np.uint8, channels=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.arange(np.prod(shape)).astype(dtype).reshape(shape)


def save(folder, name, array, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path, **options)
    return str(path)


def folder_of(path, **fields):
    return ImageFolder(data_dir=str(path), **{"image_size": 8, **fields})


# guided-diffusion's interface


def test_listing_is_sorted_per_folder_and_ignores_other_extensions(tmp_path):
    for name in ("b.PNG", "a/z.jpg", "a/notes.txt", "c.tif", "d.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = image_datasets._list_image_files_recursively(str(tmp_path))
    assert [path[len(str(tmp_path)) + 1:] for path in found] == ["a/z.jpg", "b.PNG", "d.gif"]


def test_dataset_yields_rgb_between_minus_one_and_one_with_labels(tmp_path):
    paths = [save(tmp_path, f"{v}.png", np.full((8, 8), v, np.uint8)) for v in (0, 255, 51)]
    dataset = image_datasets.ImageDataset(8, paths, classes=[4, 5, 6], shard=0, num_shards=2)
    (black, first), (other, second) = dataset[0], dataset[1]
    assert len(dataset) == 2 and black.shape == (3, 8, 8) and black.dtype == np.float32
    assert (black == -1).all() and np.allclose(other, 51 / 127.5 - 1)
    assert first["y"].dtype == np.int64 and (first["y"], second["y"]) == (4, 6)


def test_random_crop_samples_side_then_top_then_left():
    image = Image.fromarray(ramp(40, 60))
    random.seed(3)
    cut = image_datasets.random_crop_arr(image, 16)
    after = random.random()
    random.seed(3)
    side = random.randrange(16, 21)
    random.randrange(side - 16 + 1), random.randrange(round(60 * side / 40) - 16 + 1)
    assert cut.shape == (16, 16) and random.random() == after


def test_load_data_yields_endless_batches_with_labels_by_prefix(tmp_path):
    for name in ("b_1.png", "a_1.png", "b_2.png"):
        save(tmp_path, name, np.full((8, 8), 255 * name.startswith("b"), np.uint8))
    stream = image_datasets.load_data(data_dir=str(tmp_path), batch_size=2, image_size=8, class_cond=True,
                                      deterministic=True)
    for _ in range(3):
        images, extra = next(stream)
        assert images.shape == (2, 3, 8, 8) and extra["y"].tolist() == [0, 1]
        assert (images[0] == -1).all() and (images[1] == 1).all()
    stream.close()


def test_load_data_rejects_a_shard_smaller_than_a_batch(tmp_path):
    for i in range(3):
        save(tmp_path, f"a_{i}.png", ramp(8, 8))
    with pytest.raises(ValueError, match="rank 1 of 2 has 1 of the 3 images.*--batch_size 2"):
        image_datasets.load_data(data_dir=str(tmp_path), batch_size=2, image_size=8, shard=1, num_shards=2)


@pytest.mark.parametrize("make", [lambda d: image_datasets.load_data(data_dir=d, batch_size=1, image_size=8),
                                  folder_of])
def test_missing_or_empty_folder_error_names_the_flag(tmp_path, make):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; check --data_dir"):
        make(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="contains no image.*--data_dir"):
        make(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set --data_dir"):
        make("")


# Values are kept


@pytest.mark.parametrize("name, array", [
    ("gray.png", ramp(8, 8)), ("rgb.png", ramp(8, 8, channels=3)), ("gray.tif", ramp(8, 8)),
    ("deep.png", ramp(8, 8, np.uint16) * 1000), ("deep.tiff", ramp(8, 8, np.uint16) * 1000),
    ("deep.npy", ramp(8, 8, np.uint16) * 1000), ("rgb.npy", ramp(8, 8, np.uint16, 3) * 300),
    ("big_endian.npy", (ramp(8, 8, np.uint16) * 1000).astype(">u2")),
])
def test_integers_keep_every_value_at_their_own_size(tmp_path, name, array):
    save(tmp_path, name, array)
    folder = folder_of(tmp_path)
    top = np.iinfo(array.dtype).max
    pixels = folder.read(0)
    assert pixels.dtype == np.float32 and pixels.shape == folder.shape == (array.ndim == 3 and 3 or 1, 8, 8)
    expected = array if array.ndim == 3 else array[..., None]
    assert (np.round(np.moveaxis(pixels, 0, -1).astype(np.float64) * top) == expected).all()


def test_signed_integers_span_their_own_range(tmp_path):
    save(tmp_path, "a.npy", np.full((8, 8), -32768, np.int16))
    assert (folder_of(tmp_path).read(0) == 0).all()


@pytest.mark.parametrize("name", ["a.npy", "a.tif"])
def test_float_files_require_a_range_and_stay_inside(tmp_path, name):
    save(tmp_path, name, np.linspace(-60, 10, 64, dtype=np.float32).reshape(8, 8))
    with pytest.raises(ValueError, match=f"{name}: float32 values require --value_range"):
        folder_of(tmp_path)
    pixels = folder_of(tmp_path, value_range="-60,10").read(0)
    assert pixels[0, 0, 0] == 0 and pixels[0, -1, -1] == 1 and np.allclose(np.diff(pixels.ravel()), 1 / 63, atol=1e-6)
    with pytest.raises(ValueError, match=f"{name}: values from -60 to 10 are outside --value_range -60,0; set a"):
        folder_of(tmp_path, value_range="-60,0").read(0)


def test_value_range_applies_to_integers_too(tmp_path):
    save(tmp_path, "a.png", np.full((8, 8), 1000, np.uint16))
    assert np.allclose(folder_of(tmp_path, value_range="0,4000").read(0), 0.25)
    with pytest.raises(ValueError, match="values from 1000 to 1000 are outside"):
        folder_of(tmp_path, value_range="0,999").read(0)


def test_values_that_are_not_finite_are_rejected(tmp_path):
    save(tmp_path, "a.npy", np.array([[0, np.nan], [np.inf, 1]]).repeat(4, 0).repeat(4, 1))
    with pytest.raises(ValueError, match="a.npy: 32 of 64 values are not finite"):
        folder_of(tmp_path, value_range="0,1").read(0)


def test_complex_arrays_become_decibels_below_their_maximum(tmp_path):
    levels = np.array([0, -10, -20, -40, -41, -300.0])
    path = save(tmp_path, "a.npy", 7 * 10 ** (levels / 20) * np.exp(1j * np.arange(6))[None])
    unit = read_array(path, dynamic_range_db=40)
    assert np.allclose(unit, [[[1, 0.75, 0.5, 0, 0, 0]]], atol=1e-6) and unit.dtype == np.float32


def test_reference_db_keeps_levels_comparable_and_rejects_higher_ones(tmp_path):
    path = save(tmp_path, "a.npy", np.array([[1, 0.1j]]))
    assert np.allclose(read_array(path, dynamic_range_db=40, reference_db=20), [[[0.5, 0]]])
    with pytest.raises(ValueError, match=r"a.npy: the maximum, 0.00 dB, is above --reference_db -3"):
        read_array(path, dynamic_range_db=40, reference_db=-3)
    silent = save(tmp_path, "b.npy", np.zeros((1, 2), np.complex64))
    assert not read_array(silent, dynamic_range_db=40, reference_db=20).any()


def test_complex_files_require_a_dynamic_range_and_a_signal(tmp_path):
    path = save(tmp_path, "a.npy", np.zeros((8, 8), np.complex64))
    with pytest.raises(ValueError, match="a.npy: complex values require --dynamic_range_db"):
        folder_of(tmp_path)
    with pytest.raises(ValueError, match="all values are 0"):
        read_array(path, dynamic_range_db=40)


def test_channels_are_the_first_or_last_axis_of_an_array(tmp_path):
    array = ramp(8, 8, channels=3)
    save(tmp_path, "a.npy", array)
    save(tmp_path, "b.npy", np.moveaxis(array, -1, 0))
    first, second = folder_of(tmp_path).batch([0, 1])
    assert (first == second).all()
    save(tmp_path, "c.npy", ramp(8, 8, channels=5))
    with pytest.raises(ValueError, match=r"c.npy: cannot be read \(shape \(8, 8, 5\)"):
        folder_of(tmp_path)


def test_palettes_become_rgb_and_opaque_alpha_is_dropped(tmp_path):
    rgb = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8).repeat(8, 0).repeat(4, 1)
    Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.gif")
    save(tmp_path, "b.png", np.dstack([rgb, np.full((8, 8), 255, np.uint8)]))
    first, second = folder_of(tmp_path).batch([0, 1])
    assert torch.equal(first, second) and torch.equal(first[:, 0, 0], torch.tensor([1.0, 0, 0]))


def test_transparent_images_are_rejected(tmp_path):
    save(tmp_path, "a.png", np.full((8, 8, 4), 128, np.uint8))
    with pytest.raises(ValueError, match="a.png: cannot be read .*transparent pixels .alpha down to 128 of 255.: set "
                                         "--alpha white or --alpha black.*flatten"):
        folder_of(tmp_path).read(0)


def test_transparent_pixels_are_composited_onto_the_color_of_alpha(tmp_path):
    for name, pixel, white, black in (("a", (100, 0, 200, 51), (224, 204, 244), (20, 0, 40)),
                                      ("b", (10, 20, 30, 0), (255, 255, 255), (0, 0, 0)),
                                      ("c", (10, 20, 30, 255), (10, 20, 30), (10, 20, 30))):
        path = save(tmp_path, f"{name}.png", np.full((8, 8, 4), pixel, np.uint8))
        assert read_values(path, alpha="white")[0, 0].tolist() == list(white)
        assert read_values(path, alpha="black")[0, 0].tolist() == list(black)
    folder = folder_of(tmp_path, alpha="white")
    assert torch.allclose(folder.batch([0])[0, :, 0, 0], torch.tensor([224, 204, 244]) / 255)
    assert folder.preprocessing["alpha"] == "white" and "alpha" not in folder_of(tmp_path).preprocessing


@pytest.mark.parametrize("mode, pixel, options, expected", [
    ("LA", (100, 51), {}, [224]), ("P", 1, {"transparency": 1}, [255, 255, 255]), ("L", 7, {"transparency": 7}, [255]),
    ("RGB", (1, 2, 3), {"transparency": (1, 2, 3)}, [255, 255, 255]), ("PA", (1, 0), {}, [255, 255, 255]),
])
def test_every_kind_of_transparency_is_composited(tmp_path, mode, pixel, options, expected):
    image = Image.new(mode, (8, 8), pixel)
    if mode[0] == "P":
        image.putpalette([0, 0, 0, 10, 20, 30])
    path = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    image.save(path, **options)
    assert read_values(str(path), alpha="white")[3, 4].tolist() == expected
    with pytest.raises(ValueError, match="transparent pixels"):
        read_values(str(path))


@pytest.mark.parametrize("mode, pixel, name, expected", [
    ("CMYK", (255, 0, 0, 0), "a.tif", [0, 255, 255]), ("CMYK", (0, 0, 0, 128), "a.tif", [127, 127, 127]),
    ("YCbCr", (76, 85, 255), "a.jpg", [254, 0, 0]), ("RGB", (9, 8, 7), "a.bmp", [9, 8, 7]), ("L", 9, "a.bmp", [9]),
    ("RGB", (9, 8, 7), "a.webp", [9, 8, 7]), ("RGBA", (9, 8, 7, 255), "a.webp", [9, 8, 7]),
])
def test_color_models_and_formats_become_rgb_or_gray(tmp_path, mode, pixel, name, expected):
    Image.new(mode, (8, 8), pixel).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    folder = folder_of(tmp_path)
    assert (folder.batch([0])[0, :, 2, 3] * 255).round().tolist() == expected
    assert folder.shape == (len(expected), 8, 8)


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write_deep_png(path, values, before=b"", after=b""):
    """Write uint16 [H x W x C] as a PNG of 16 bits, which Pillow does not in color, with chunks around the pixels."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before +
                     png_chunk(b"IDAT", zlib.compress(rows)) + after + png_chunk(b"IEND", b""))


def write_deep_tiff(path, values, order="<", deflate=False, planes=1):
    """Write uint16 [H x W x 3] as a TIFF of one strip; with 2 `planes` its header describes separate ones."""
    height, width, _ = values.shape
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if deflate else data
    bits, start = 14 + 12 * 10, 20 + 12 * 10      # after the directory of ten entries and the end of directories
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, bits), (259, 3, 1, 8 if deflate else 1),
               (262, 3, 1, 2), (273, 4, 1, start), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data)),
               (284, 3, 1, planes)]
    packed = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + struct.pack(
        f"{order}I" if entry[1] == 4 or entry[2] > 1 else f"{order}Hxx", entry[3]) for entry in entries)
    path.write_bytes((b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 10) + packed + bytes(4) +
                     struct.pack(f"{order}3H", 16, 16, 16) + data)


DEEP = np.random.default_rng(0).integers(0, 65536, (8, 8, 4)).astype(np.uint16)


@pytest.mark.parametrize("name, write", [
    ("a.png", write_deep_png), ("a.tif", write_deep_tiff),
    ("b.tif", lambda path, values: write_deep_tiff(path, values, ">")),
    ("c.tif", lambda path, values: write_deep_tiff(path, values, deflate=True)),
    ("d.tif", lambda path, values: write_deep_tiff(path, values, ">", deflate=True)),
])
def test_16_bit_color_keeps_every_value(tmp_path, name, write):
    write(tmp_path / name, DEEP[..., :3])
    folder = folder_of(tmp_path)
    assert folder.kinds == {"uint16": 1} and folder.shape == (3, 8, 8)
    assert (np.round(np.moveaxis(folder.read(0), 0, -1).astype(np.float64) * 65535) == DEEP[..., :3]).all()
    assert np.array_equal(read_values(str(tmp_path / name)), DEEP[..., :3])


def test_16_bit_alpha_and_transparent_colors_are_composited(tmp_path):
    path = tmp_path / "a.png"
    write_deep_png(path, DEEP)
    weight = DEEP[..., 3:] / 65535
    expected = np.rint(weight * DEEP[..., :3] + (1 - weight) * 65535)
    assert np.array_equal(read_values(str(path), alpha="white"), expected)
    with pytest.raises(ValueError, match=f"alpha down to {DEEP[..., 3].min()} of 65535"):
        read_values(str(path))
    for channels in (1, 3):
        values = DEEP[..., :channels]
        write_deep_png(path, values, png_chunk(b"tRNS", values[2, 5].astype(">u2").tobytes()))
        composited = read_values(str(path), alpha="black")
        assert (composited[2, 5] == 0).all() and (composited != values).sum() == channels


@pytest.mark.parametrize("name, write, problem", [
    ("a.png", lambda path: write_deep_png(path, DEEP[..., :2]), "16 bits per channel as LA;16B, of which Pillow keeps"),
    ("a.tif", lambda path: write_deep_tiff(path, DEEP[..., :3], planes=2), "more than 8 bits per channel in separate"),
])
def test_other_16_bit_color_is_rejected_rather_than_reduced(tmp_path, name, write, problem):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: cannot be read .{problem}"):
        folder_of(tmp_path)


@pytest.mark.parametrize("highest, bits", [(4021, 12), (4095, 12), (4096, 14), (255, 8), (1000, 10), (16383, 14)])
def test_ranges_of_16_bit_files_far_below_their_type_are_logged(tmp_path, monkeypatch, highest, bits):
    for name, value in (("a", 3), ("b", highest), ("c", 5)):
        save(tmp_path, f"{name}.png", np.full((8, 8), value, np.uint16))
    logged = []
    monkeypatch.setattr(logger, "warn", logged.append)
    open_folder(DataConfig(image_size=8), data_dir=str(tmp_path))
    assert logged == [f"values reach {highest:,} of 65,535: set --value_range 0,{2**bits - 1} if these are {bits}-bit "
                      "data"]
    assert folder_of(tmp_path, value_range=f"0,{2**bits - 1}").warnings() == []
    save(tmp_path, "d.png", np.full((8, 8), 2**14, np.uint16))
    assert folder_of(tmp_path).warnings() == []


def test_ranges_are_those_of_evenly_spaced_files_with_few_pixels(tmp_path, monkeypatch):
    for i in range(9):
        save(tmp_path, f"{i}.png", np.full((8, 8), i, np.uint16))
    folder, read = folder_of(tmp_path), []
    monkeypatch.setattr(folder, "_values", lambda i, values=folder._values: read.append(int(i)) or values(i))
    for count, expected in (5, [0, 2, 4, 6, 8]), (20, [*range(9)]):
        monkeypatch.setattr(image_folders, "CENSUS_FILES", count)
        read.clear()
        folder.warnings()
        assert read == expected
    assert [int(values.max()) for values in folder._census([0, 2, 4], 100)] == [0, 2]


def test_types_of_values_that_differ_are_logged_with_an_example(tmp_path):
    save(tmp_path, "a.png", ramp(8, 8))
    for name in ("b.png", "c.png"):
        save(tmp_path, name, np.full((8, 8), 60_000, np.uint16))
    note, = folder_of(tmp_path).warnings()
    assert note.startswith("files have several types of values: 1 uint8 (a.png), 2 uint16 (b.png); the full range of ")


# EXIF orientation: the same image, as stored with each orientation

UPRIGHT = ramp(8, 10) * 3
STORED = {1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1], 5: UPRIGHT.T,
          6: np.rot90(UPRIGHT), 7: UPRIGHT[::-1, ::-1].T, 8: np.rot90(UPRIGHT, -1)}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg"])
def test_orientation_is_applied_to_pixels_and_sizes(tmp_path, name, orientation):
    stored = np.ascontiguousarray(STORED[orientation])
    exif = Image.Exif()
    exif[274] = orientation
    options = {"a.webp": {"lossless": True}, "a.jpg": {"quality": 100}}.get(name, {})
    path = save(tmp_path, name, stored, exif=exif, **options)
    assert read_header(path).sides == (8, 10)
    values = read_values(path)[..., 0].astype(int)
    assert values.shape == (8, 10) and abs(values - UPRIGHT).max() <= (8 if name == "a.jpg" else 0)
    assert (folder_of(tmp_path, image_size="8x10").read(0)[0] * 255).round().astype(int).tolist() == values.tolist()
    with open(path, "rb") as stream, Image.open(stream) as image:    # what others decode
        assert np.array_equal(read_values(path)[..., 0], np.asarray(ImageOps.exif_transpose(image).convert("L")))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_orientation_of_a_png_may_follow_its_pixels(tmp_path, order, placement):
    exif = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IHHHIH", 8, 1, 274, 3, 1, 6) + bytes(6)
    path = tmp_path / "a.png"
    write_deep_png(path, DEEP[:6, :, :3], **{placement: png_chunk(b"eXIf", exif)})
    assert read_header(str(path)).sides == (8, 6)
    assert np.array_equal(read_values(str(path)), np.rot90(DEEP[:6, :, :3], -1))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind, letter", [(1, "B"), (3, "H"), (4, "I")])
def test_orientation_is_an_integer_of_any_size(order, kind, letter):
    value = struct.pack(order + letter, 8).ljust(4, b"\0")
    exif = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 2) + struct.pack(
        f"{order}HHII", 271, 3, 1, 5) + struct.pack(f"{order}HHI", 274, kind, 1) + value
    assert exif_orientation(exif) == exif_orientation(b"Exif\0\0" + exif) == 8


@pytest.mark.parametrize("exif", [
    b"", b"II", b"Exif\0\0", b"JUNK" * 9, b"II*\0" + b"\xff" * 30,
    b"II*\0" + struct.pack("<IHHHIH", 8, 1, 274, 3, 1, 9) + bytes(6),
    b"II*\0" + struct.pack("<IHHHIH", 8, 1, 275, 3, 1, 6) + bytes(6),
    b"II*\0" + struct.pack("<IHHHIH", 8, 9, 275, 3, 1, 6),
])
def test_orientation_is_1_if_exif_is_missing_or_corrupt(exif):
    assert exif_orientation(exif) == 1


def test_reference_loader_ignores_the_orientation(tmp_path):
    exif = Image.Exif()
    exif[274] = 3
    path = save(tmp_path, "a.png", UPRIGHT, exif=exif)
    pixels, _ = image_datasets.ImageDataset(8, [path], random_flip=False)[0]
    assert np.allclose(pixels[0], UPRIGHT[:, 1:9] / 127.5 - 1)


def test_images_of_several_pages_are_rejected(tmp_path):
    page = Image.fromarray(ramp(8, 8))
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page, page])
    with pytest.raises(ValueError, match="a.tif: cannot be read .3 pages"):
        folder_of(tmp_path)


def test_mixed_channels_are_rejected_or_converted_by_image_channels(tmp_path):
    save(tmp_path, "a.png", np.full((8, 8), 100, np.uint8))
    save(tmp_path, "b.png", np.full((8, 8, 3), (0, 255, 0), np.uint8))
    with pytest.raises(ValueError, match="a.png is grayscale and .*b.png is RGB; set --image_channels 1 or"):
        folder_of(tmp_path)
    assert torch.allclose(folder_of(tmp_path, image_channels=3).batch([0])[0], torch.tensor(100 / 255))
    assert np.allclose(folder_of(tmp_path, image_channels=1).read(1), 150 / 255)
    save(tmp_path, "c.npy", np.broadcast_to(np.float32([0, 1, 0]), (8, 8, 3)))
    assert np.allclose(folder_of(tmp_path, image_channels=1, value_range="0,1").read(2), 0.587)


# Sizes


def test_exact_size_is_unchanged_and_larger_is_cropped_as_in_reference(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50), np.uint8)
    save(tmp_path, "a.png", pixels)
    assert (folder_of(tmp_path, image_size="37x50").read(0)[0] == pixels / np.float32(255)).all()
    expected = image_datasets.center_crop_arr(Image.fromarray(pixels), 8)
    assert (folder_of(tmp_path).read(0)[0] == expected / np.float32(255)).all()


def test_float_and_16_bit_images_are_resized_without_rounding(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50), np.uint8)
    save(tmp_path, "a.png", pixels)
    save(tmp_path, "b.npy", pixels.astype(np.uint16) * 257)
    folder = folder_of(tmp_path, image_size="8x12")
    eight, deep = folder.batch([0, 1])
    assert folder.shape == (1, 8, 12) and not torch.equal(eight, deep) and (eight - deep).abs().max() < 3 / 255


def test_crop_none_resizes_the_full_image(tmp_path):
    save(tmp_path, "a.png", np.repeat(np.array([[0, 255]], np.uint8), 32, 1).repeat(8, 0))
    pixels = folder_of(tmp_path, crop="none").read(0)[0]
    assert (pixels[:, 0] < 0.01).all() and (pixels[:, -1] > 0.99).all()


def test_random_crops_come_from_the_generator_and_never_upsample(tmp_path):
    save(tmp_path, "a.png", ramp(9, 40))
    folder = folder_of(tmp_path, crop="random")
    cuts = [folder.read(0, np.random.default_rng(i)) for i in (0, 0, 1)]
    assert (cuts[0] == cuts[1]).all() and not (cuts[0] == cuts[2]).all() and cuts[0].shape == (1, 8, 8)


def test_images_smaller_than_the_size_are_rejected(tmp_path):
    save(tmp_path, "a.png", ramp(8, 16))
    save(tmp_path, "b.png", ramp(8, 7))
    with pytest.raises(ValueError, match="b.png: size 8x7 is smaller than --image_size 8x8 .1 of 2 files"):
        folder_of(tmp_path)


def test_padding_reaches_the_next_multiple_and_unpad_inverts_it(tmp_path):
    save(tmp_path, "a.png", ramp(9, 10))
    folder = folder_of(tmp_path, image_size="9x10", pad=True, multiple=(4, 8))
    images = folder.batch([0])
    assert folder.shape == (1, 12, 16) and images.shape[1:] == folder.shape
    assert (images[0, 0, 9:, :10] == images[0, 0, 8, :10]).all()
    expected = folder_of(tmp_path, image_size="9x10").batch([0])
    assert torch.equal(unpad(images, folder.unpadded_shape), expected)
    assert folder_of(tmp_path, image_size="9x10", multiple=4).shape == (1, 9, 10)


def test_flips_keep_the_padding_on_its_side(tmp_path):
    save(tmp_path, "a.png", ramp(8, 10))
    folder = folder_of(tmp_path, image_size="8x10", pad=True, multiple=(4, 8))
    plain, flipped = (folder.batch([0], [flip]) for flip in (False, True))
    assert torch.equal(flipped[..., :10], plain[..., :10].flip(-1))
    assert torch.equal(flipped[..., 10:], plain[..., :1].expand(1, 1, 8, 6))


@pytest.mark.parametrize("text, size", [(64, (64, 64)), ("64", (64, 64)), ("64x128", (64, 128)), ("9X10", (9, 10)),
                                        ("32x64x64", (32, 64, 64))])
def test_sizes_are_one_number_or_height_by_width(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["64x", "0", "1x2x3x4", "big", ""])
def test_invalid_sizes_are_rejected(text):
    with pytest.raises(ValueError, match=f"--image_size must be a size such as 64, .*, got '{text}'"):
        parse_size(text)


@pytest.mark.parametrize("text", ["1", "2,1", "0,nan", "0,inf", "1,2,3", "low,high"])
@pytest.mark.parametrize("flag", ["value_range", "value_window"])
def test_invalid_ranges_are_rejected(flag, text):
    with pytest.raises(ValueError, match=f"--{flag} must be two finite numbers, the lower first, .*, got '{text}'"):
        _ = DataConfig(**{flag: text}).value_limits


# Damage


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.npy", "a.tif", "a.gif", "a.bmp", "a.webp"])
def test_truncated_file_error_names_the_file(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    path = tmp_path / name
    save(tmp_path, name, pixels)
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        folder_of(tmp_path).read(0)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        folder_of(tmp_path)


def change_bit(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


READERS = [lambda path: ImageFolder(data_dir=str(path.parent), image_size=8).read(0),
           lambda path: image_datasets.ImageDataset(8, [str(path)])[0]]


@pytest.mark.parametrize("read", READERS)
def test_every_changed_bit_of_a_png_is_noticed(tmp_path, read):
    path = tmp_path / "a.png"
    save(tmp_path, "a.png", np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8))
    content = path.read_bytes()
    read(path)
    for position in range(8 * len(content)):
        change_bit(path, *divmod(position, 8))
        with pytest.raises(ValueError, match=f"^{path}: cannot be read"):
            read(path)
        path.write_bytes(content)


def test_changed_pixels_and_missing_ends_of_a_png_are_explained(tmp_path):
    path = tmp_path / "a.png"
    save(tmp_path, "a.png", ramp(8, 8))
    content = path.read_bytes()
    change_bit(path, content.index(b"IDAT") + 10)
    with pytest.raises(ValueError, match="a.png: cannot be read .PNG is corrupt: expected CRC [0-9a-f]{8} in chunk "
                                         "IDAT, got [0-9a-f]{8}.; fix or remove"):
        folder_of(tmp_path).read(0)
    path.write_bytes(content[:-12])
    with pytest.raises(ValueError, match="PNG is truncated: expected a last chunk IEND, got the end of the file"):
        folder_of(tmp_path).read(0)
    path.write_bytes(content[:-14])
    with pytest.raises(ValueError, match=r"PNG is truncated: expected \d+ bytes in chunk IDAT, got \d+"):
        folder_of(tmp_path).read(0)
    path.write_bytes(content + b"appended")     # as some programs do
    assert (folder_of(tmp_path).read(0)[0] * 255 == ramp(8, 8)).all()


@contextlib.contextmanager
def memory_limit(mib):
    """Let this process allocate at most that much more memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + mib * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


on_linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory limit is that of Linux")
TIFF_TAGS = {"width": 256, "height": 257, "compression": 259, "tile_width": 305, "tile_height": 306}
DEFLATE, TILED = 8, {273: 324, 279: 325, 305: 322, 306: 323}     # Pillow does not write tiles: other tags become theirs


def write_tiff(path, mode="RGB", numbers=None, **tags):
    """Write 24 x 24 pixels and 12 KB of zeros; `tags` replaces values, `numbers` the numbers of tags."""
    Image.new(mode, (24, 24), 1).save(path, tiffinfo={305: "", 306: ""})
    content = bytearray(path.read_bytes())
    start, = struct.unpack_from("<I", content, 4)
    entries = {struct.unpack_from("<H", content, at)[0]: at for at in
               range(start + 2, start + 2 + 12 * content[start], 12)}
    for name, value in tags.items():
        struct.pack_into("<HII", content, entries[TIFF_TAGS[name]] + 2, 4, 1, value)
    for old, new in (numbers or {}).items():
        struct.pack_into("<H", content, entries[old], new)
    path.write_bytes(content + bytes(12_000))


@on_linux
@pytest.mark.parametrize("tags, problem", [
    (dict(width=20_000, height=20_000), "400000000 pixels of 24 bits, more than 1.... bytes can contain; it"),
    (dict(width=20_000, height=20_000, compression=DEFLATE), "400000000 pixels of 24 bits, more than 1.... bytes"),
    (dict(width=50_000, height=50_000), "2500000000 pixels: expected at most --max_pixels 536870912; set a larger"),
    (dict(numbers=TILED, tile_width=32_768, tile_height=20_000, compression=DEFLATE), "655360000 pixels: expected at"),
    (dict(numbers=TILED, tile_width=32_768, tile_height=16_000, compression=DEFLATE), "524288000 pixels of 24 bits, "),
    (dict(mode="L", height=60_000), "the file contains 576 of 1440000 pixels"),
])
@pytest.mark.parametrize("read", [read_header, read_values, lambda path: image_datasets.ImageDataset(8, [path])[0]])
def test_pixels_are_bounded_before_a_tiff_is_decoded(tmp_path, read, tags, problem):
    write_tiff(tmp_path / "a.tif", **tags)
    with memory_limit(300), pytest.raises(ValueError, match=f"^{tmp_path}/a.tif: cannot be read .*{problem}"):
        read(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("name, pixels", [("a.png", 64), ("a.tif", 64), ("a.gif", 64), ("a.jpg", 64)])
def test_max_pixels_is_an_option_that_no_checkpoint_records(tmp_path, name, pixels):
    save(tmp_path, name, ramp(8, 8))
    folder = folder_of(tmp_path, max_pixels=pixels)
    assert folder.read(0).shape == (1, 8, 8) or name == "a.gif"
    assert "max_pixels" not in folder.describe()
    with pytest.raises(ValueError, match=f"{name}: cannot be read .*64 pixels: expected at most --max_pixels 63; "):
        folder_of(tmp_path, max_pixels=pixels - 1)
    save(tmp_path, name, ramp(9, 9))    # after it was opened
    with pytest.raises(ValueError, match=f"{name}: cannot be read .*81 pixels: expected at most --max_pixels 64; "):
        folder.read(0)


@pytest.mark.parametrize("mode, compression", [("1", "group4"), ("L", "tiff_lzw"), ("RGB", "tiff_adobe_deflate")])
def test_images_of_one_color_are_decoded_up_to_four_million_pixels(tmp_path, mode, compression):
    Image.new(mode, (2048, 2048), 1).save(tmp_path / "a.tif", compression=compression)
    assert read_values(str(tmp_path / "a.tif")).shape[:2] == (2048, 2048)


def test_images_that_compress_as_far_as_possible_are_decoded(tmp_path):
    Image.new("1", (3000, 3000)).save(tmp_path / "a.png", optimize=True)
    assert (tmp_path / "a.png").stat().st_size < 3000 * 3000 / 1032     # 1 bit per pixel
    assert read_values(str(tmp_path / "a.png")).shape == (3000, 3000, 1)
    Image.new("RGB", (2100, 2100)).save(tmp_path / "a.webp", lossless=True)
    assert (tmp_path / "a.webp").stat().st_size < 2100 * 2100 * 3 / 1032
    assert read_values(str(tmp_path / "a.webp")).shape == (2100, 2100, 3)


def npy_bytes(shape, size=144, dtype="|u1"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(size)


LONG_HEADER = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{" * 200


@on_linux
@pytest.mark.parametrize("content, problem", [
    (npy_bytes((30_000, 30_000)), r"uint8 values of shape \(30000, 30000\): expected 900000000 bytes, got 144"),
    (npy_bytes((2**40, 2**40)), "expected 1208925819614629174706176 bytes, got 144"),
    (npy_bytes((-1, 12)), "uint8 values of shape .-1, 12"),
    (npy_bytes((12, 12), dtype="<U99999999"), "expected 57599999424 bytes, got 144"),
    (LONG_HEADER, "the header has 4294967295 bytes: expected at most 10000"),
])
def test_array_sizes_are_compared_with_the_file_before_memory_is_allocated(tmp_path, content, problem):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    np.savez(tmp_path / "a.npz", images=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    for file, read in ((path, read_header), (path, read_values), (tmp_path / "a.npz", open_archive)):
        with memory_limit(300), pytest.raises(ValueError, match=f"^{file}: cannot be read.*{problem}"):
            read(str(file))


def test_changed_bits_of_an_npy_header_are_errors_with_the_name_or_harmless(tmp_path):
    path, pixels = tmp_path / "a.npy", ramp(12, 12)
    np.save(path, pixels)
    content, harmless = path.read_bytes(), 0
    for position in range(0, 8 * 128, 5):
        path.write_bytes(content)
        change_bit(path, *divmod(position, 8))
        try:
            read_header(str(path))
            harmless += read_values(str(path)).size <= pixels.size
        except ValueError as error:
            assert str(error).startswith(f"{path}: cannot be read (")
    assert harmless < 100   # spaces, types of the same size, smaller shapes


# In the central directory: the position of a field after its signature, a value, the message.
@pytest.mark.parametrize("field, value, problem", [
    (10, 99, "NotImplementedError: That compression method is not supported"),
    (6, 200, "NotImplementedError: zip file version 20.0"),
    (8, 1, "RuntimeError: File .* is encrypted, password required"),
])
def test_unknown_kinds_of_zip_are_errors_with_the_name(tmp_path, field, value, problem):
    path = tmp_path / "set.npz"
    np.savez(path, images=np.zeros((2, 8, 8), np.uint8))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + field] = value
    path.write_bytes(content)
    for read in (open_archive, open_npz, lambda path: ImageFolder(data_dir=path, image_size=8)):
        with pytest.raises(ValueError, match=f"^{path}: cannot be read as an .npz archive .{problem}.*; fix or remove"):
            read(str(path))


def test_archives_that_unpack_to_much_more_are_rejected_before_they_are_unpacked(tmp_path, monkeypatch):
    path, images = str(tmp_path / "set.npz"), np.zeros((16, 128, 128), np.uint8)
    np.savez_compressed(path, images=images)
    size = images.size + 128    # with the header
    assert ImageFolder(data_dir=path, image_size=8, max_pixels=size).shape == (1, 8, 8)
    monkeypatch.setattr(shutil, "copyfileobj", lambda *streams: pytest.fail("unpacked"))
    match = f"^{path}: cannot be read as .*images.npy unpacks from .* to {size} bytes: expected at most {size - 1}; "
    with pytest.raises(ValueError, match=match + "save it without compression or set a larger --max_pixels"):
        ImageFolder(data_dir=path, image_size=8, max_pixels=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, size - 1))
    with pytest.raises(ValueError, match=f"unpacks to {size} bytes, but .* has {size - 1} bytes free; .* TMPDIR"):
        ImageFolder(data_dir=path, image_size=8)
    assert len(open_archive(path, in_memory=True)["images"]) == 16      # not on the disk
    np.savez(path, images=images)
    assert ImageFolder(data_dir=path, image_size=8, max_pixels=1).shape == (1, 8, 8)    # nothing is unpacked
    monkeypatch.undo()
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 256, images.shape, np.uint8))
    assert ImageFolder(data_dir=path, image_size=8, max_pixels=1).shape == (1, 8, 8)    # a ratio of about 1


@pytest.mark.parametrize("read", [lambda path: folder_of(path),
                                  lambda path: next(image_datasets.load_data(data_dir=str(path), batch_size=1,
                                                                             image_size=8, class_cond=True))])
def test_symbolic_links_that_lead_back_are_named(tmp_path, read):
    save(tmp_path, "data/cats/a.png", ramp(8, 8))
    link = tmp_path / "data" / "cats" / "all"
    link.symlink_to("..")
    with pytest.raises(ValueError, match=f"^{link} is a symbolic link to {tmp_path}/data, which contains it; remove"):
        read(tmp_path / "data")
    link.unlink()
    link.symlink_to("all")
    with pytest.raises(OSError, match=f"{link} cannot be read: Too many levels of symbolic links; fix or remove it"):
        read(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=f"{link} does not exist; check --data_dir"):
        read(link)
    link.unlink()
    link.symlink_to("../../more")
    save(tmp_path, "more/b.png", ramp(8, 8))
    read(tmp_path / "data")     # a link to a folder elsewhere is followed


def test_pickled_arrays_are_rejected(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[{}] * 8] * 8))
    with pytest.raises(ValueError, match="a.npy"):
        folder_of(tmp_path, value_range="0,1").read(0)


# Classes


def test_classes_come_from_folders_or_prefixes_or_are_absent(tmp_path):
    flat, deep, none = ("b_1.png", "a_1_x.png"), ("tap/1.png", "slide/x/1.png"), ("a_1.png", "1.png")
    for name in (*(f"flat/{n}" for n in flat), *(f"deep/{n}" for n in deep), *(f"none/{n}" for n in none)):
        save(tmp_path, name, ramp(8, 8))
    flat, deep, none = (folder_of(tmp_path / name) for name in ("flat", "deep", "none"))
    assert flat.class_names == ["a", "b"] and flat.labels.tolist() == [0, 1] and flat.names == ["a_1_x.png", "b_1.png"]
    assert deep.class_names == ["slide", "tap"] and deep.names == ["slide/x/1.png", "tap/1.png"]
    assert none.class_names is None and none.labels is None
    with pytest.raises(ValueError, match="has no classes, required by --class_cond True"):
        ImageStream(none, BatchPlan(2, 1), with_labels=True)


@pytest.mark.parametrize("names, first, count", [
    (("a_1.png", "b_2.png", "rest.png", "x.png"), "rest.png", 2), (("a/1.png", "b/2.png", "rest.png"), "rest.png", 1),
])
def test_classes_missing_in_some_files_are_logged_and_named_if_required(tmp_path, monkeypatch, names, first, count):
    for name in names:
        save(tmp_path, name, ramp(8, 8))
    logged = []
    monkeypatch.setattr(logger, "warn", logged.append)
    folder = open_folder(DataConfig(str(tmp_path), 8))
    message = (f"{tmp_path}/{first} has no class: expected CLASS_rest or a subfolder for each file, got none for "
               f"{count} of {len(names)} files")
    assert folder.class_names is None and len(logged) == 1 and logged[0].startswith(message)
    with pytest.raises(ValueError, match=f"{tmp_path} has no classes, required by --class_cond True .*; {message}"):
        ImageStream(folder, BatchPlan(2, 1), with_labels=True)


def test_unknown_classes_are_named_with_the_first_of_their_files(tmp_path):
    for name in ("cat_1.png", "dog_2.png", "dog_3.png", "emu_4.png"):
        save(tmp_path, name, ramp(8, 8))
    folder = folder_of(tmp_path)
    assert map_labels(folder, ["emu", "dog", "cat"]).tolist() == [2, 1, 1, 0]
    match = f"^{tmp_path} has classes dog, emu that the model does not have .first {tmp_path}/dog_2.png.; expected some"
    with pytest.raises(ValueError, match=f"{match} of: cat, fox"):
        map_labels(folder, ["cat", "fox"])


def test_labels_without_names_are_compared_with_the_classes_of_a_model(tmp_path):
    path = str(tmp_path / "set.npz")
    for highest in (2, 1_000_000):
        np.savez(path, arr_0=np.zeros((3, 8, 8, 1), np.uint8), arr_1=[0, highest, 1])
        with pytest.raises(ValueError, match=f"^{path} has labels up to {highest}: expected 0 to 1, the classes of the "
                                             "model .a, b., as it has no names"):
            map_labels(open_npz(path), ["a", "b"])
    np.savez(path, arr_0=np.zeros((3, 8, 8, 1), np.uint8), arr_1=[0, 1, 1])
    assert map_labels(open_npz(path), ["a", "b"]).tolist() == [0, 1, 1]
    np.savez(path, arr_0=np.zeros((3, 8, 8, 1), np.uint8))
    assert map_labels(open_npz(path), ["a", "b"]) is None


@pytest.mark.parametrize("labels, problem", [
    ([0, -2], "int64 of shape .2,. from -2 to 0"), ([0.5, 1.0], "float64 of shape .2,. from 0.5 to 1.0"),
    (["a", "b"], "<U1 of shape .2,."),
])
def test_labels_of_samples_that_are_not_numbers_from_0_on_are_rejected(tmp_path, labels, problem):
    path = str(tmp_path / "set.npz")
    np.savez(path, arr_0=np.zeros((2, 8, 8, 1), np.uint8), arr_1=labels)
    with pytest.raises(ValueError, match=f"^{path}: arr_1 must be 2 integers >= 0, got {problem}$"):
        open_npz(path)
    with pytest.raises(ValueError, match=f"^{path}: 'labels' must be 2 integers >= 0, got {problem}$"):
        ImageFolder(data_dir=path, image_size=8)


@pytest.mark.parametrize("names", [("a_1.png", "b_2.png"), ("a/1.png", "b/2_2.png"), ("1.png", "2.png")])
def test_nothing_is_logged_if_all_files_or_none_have_a_class(tmp_path, monkeypatch, names):
    for name in names:
        save(tmp_path, name, ramp(8, 8))
    monkeypatch.setattr(logger, "warn", lambda message: pytest.fail(message))
    assert (open_folder(DataConfig(str(tmp_path), 8)).class_names == ["a", "b"]) == ("a" in names[0])


def test_archive_without_labels_has_no_classes_whatever_its_name(tmp_path):
    np.savez(tmp_path / "my_set.npz", images=np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="my_set.npz has no classes, .*add 'labels' to an .npz"):
        ImageStream(open_folder(DataConfig(str(tmp_path / "my_set.npz"), 8)), BatchPlan(2, 1), with_labels=True)


def test_empty_class_names_are_rejected_with_the_file(tmp_path):
    for name in ("a_1.png", "_0002.png", "_0003.png"):
        save(tmp_path, name, ramp(8, 8))
    with pytest.raises(ValueError, match=f"^{tmp_path}/_0002.png has an empty class name: expected CLASS_rest, got "
                                         "nothing before the first underscore in 2 of 3 files; rename them"):
        folder_of(tmp_path)


def test_reference_loader_keeps_an_empty_class_name(tmp_path):
    for name in ("a_1.png", "_0002.png"):
        save(tmp_path, name, ramp(8, 8))
    batches = image_datasets.load_data(data_dir=str(tmp_path), batch_size=2, image_size=8, class_cond=True,
                                       deterministic=True)
    assert next(batches)[1]["y"].tolist() == [0, 1]


def test_names_in_subfolders_may_start_with_an_underscore(tmp_path):
    save(tmp_path, "a/_0002.png", ramp(8, 8))
    assert folder_of(tmp_path).class_names == ["a"]


def test_dataset_splits_are_not_classes(tmp_path):
    for name in ("train/a_1.png", "val/a_2.png"):
        save(tmp_path, name, ramp(8, 8))
    with pytest.raises(ValueError, match="contains dataset splits, not classes: train, val"):
        folder_of(tmp_path)


def test_hidden_and_foreign_files_are_counted_not_read(tmp_path):
    save(tmp_path, "a_1.png", ramp(8, 8))
    (tmp_path / ".a_2.png").write_bytes(b"half written")
    (tmp_path / "notes.txt").write_text("")
    folder = folder_of(tmp_path)
    assert len(folder) == 1 and folder.ignored == 2 and "2 other files ignored" in folder.summary()


def test_the_fingerprint_changes_with_the_files(tmp_path):
    save(tmp_path, "a_1.png", ramp(8, 8))
    before = folder_of(tmp_path).fingerprint
    assert folder_of(tmp_path).fingerprint == before
    save(tmp_path, "a_2.png", ramp(8, 8))
    assert folder_of(tmp_path).fingerprint != before


def test_npz_archive_is_read_as_images_and_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)
    path = str(tmp_path / "set.npz")
    np.savez(path, images=images, labels=np.array([0, 2, 2, 1, 0], np.int32))
    folder = ImageFolder(data_dir=path, image_size=8)
    assert folder.shape == (1, 8, 8) and folder.class_names == ["0", "1", "2"] and folder.labels.dtype == np.int64
    assert torch.equal(folder.batch([3, 1])[:, 0], torch.from_numpy(images[[3, 1]] / np.float32(255)))
    with pytest.raises(FileNotFoundError, match="an .npz is specified by its own path"):
        folder_of(tmp_path)


@pytest.mark.parametrize("arrays, match", [
    ({"x": np.zeros(3)}, "expected 'images'"), ({"images": np.zeros((2, 8, 8, 2), np.uint8)}, "expected 'images'"),
    ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(3, int)}, "'labels' must be 2 integers"),
    ({"images": np.zeros((2, 8, 8), np.uint8), "labels": -np.ones(2, int)}, "'labels' must be 2 integers"),
])
def test_npz_with_other_arrays_is_rejected(tmp_path, arrays, match):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=match):
        ImageFolder(data_dir=str(tmp_path / "set.npz"), image_size=8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    (tmp_path / "set.npz").write_bytes(buffer.getvalue()[:-30])
    with pytest.raises(ValueError, match="set.npz: cannot be read"):
        ImageFolder(data_dir=str(tmp_path / "set.npz"), image_size=8)


@pytest.mark.parametrize("labels, match", [
    ([0, 1, 2, 1_000_000], "4 classes: expected 0 to 3, as 4 labels occur, got 1000000 and none of 3; renumber them"),
    ([0, 0, 2, 2], "2 classes: expected 0 to 1, as 2 labels occur, got 2 and none of 1; .*, or add 'class_names' for"),
    ([10, 20, 30, 40], "4 classes: expected 0 to 3, as 4 labels occur, got 10, 20, 30, ... and none of 0, 1, 2, ...; "),
    ([1, 1, 1, 1], "1 classes: expected 0 to 0, as 1 labels occur, got 1 and none of 0"),
])
def test_labels_with_holes_and_outliers_are_rejected(tmp_path, labels, match):
    path = str(tmp_path / "set.npz")
    np.savez(path, images=np.zeros((4, 8, 8), np.uint8), labels=labels)
    with pytest.raises(ValueError, match=f"^{path}: 'labels' do not number {match}"):
        ImageFolder(data_dir=path, image_size=8)


def test_class_names_cover_labels_that_do_not_occur(tmp_path):
    path, images = str(tmp_path / "set.npz"), np.zeros((2, 8, 8, 1), np.uint8)
    np.savez(path, arr_0=images, arr_1=[3, 1], class_names=list("abcd"))
    for source in (ImageFolder(data_dir=path, image_size=8), open_npz(path)):
        assert source.class_names == ["a", "b", "c", "d"] and source.labels.tolist() == [3, 1]
    np.savez(path, arr_0=images, class_names=list("ab"))
    assert open_npz(path).labels is None and open_npz(path).class_names == ["a", "b"]
    np.savez(path, arr_0=images, arr_1=[999, 7])    # samples of a model without class names
    assert open_npz(path).labels.tolist() == [999, 7] and open_npz(path).class_names is None


@pytest.mark.parametrize("labels, names, match", [
    ([0, 4], list("abcd"), "'labels' do not number 4 classes: expected 0 to 3, as there are as many .*, got 4; renum"),
    ([0, 1], list("aa"), r"'class_names' are invalid: expected distinct names \[classes\], got <U1 of shape .2,."),
    ([0, 1], ["a", ""], "'class_names' are invalid"), ([0, 1], [3, 4], "'class_names' are invalid: .*, got int64"),
    ([0, 1], [["a"], ["b"]], "'class_names' are invalid"), ([-1, 1], ["a", "b"], "'labels' must be 2 integers >= 0"),
    ([0.0, 1.0], ["a", "b"], "'labels' must be 2 integers >= 0, got float64"),
])
@pytest.mark.parametrize("read", [open_npz, lambda path: ImageFolder(data_dir=path, image_size=8)])
def test_class_names_that_do_not_fit_are_rejected(tmp_path, read, labels, names, match):
    path = str(tmp_path / "set.npz")
    np.savez(path, arr_0=np.zeros((2, 8, 8, 1), np.uint8), arr_1=labels, class_names=names)
    with pytest.raises(ValueError, match=f"^{path}: {match}"):
        read(path)


@pytest.mark.parametrize("save_archive", [np.savez, np.savez_compressed])
def test_changed_bits_of_an_archive_never_give_other_values(tmp_path, save_archive):
    path, images = tmp_path / "set.npz", np.random.default_rng(0).integers(0, 256, (2, 8, 8), np.uint8)
    save_archive(path, images=images, labels=[0, 1])
    content, unchanged = path.read_bytes(), 0
    for position in np.random.default_rng(1).choice(8 * len(content), 400, replace=False):
        path.write_bytes(content)
        change_bit(path, *divmod(int(position), 8))
        npz._checked.clear()    # the size and maybe the modification time are those of the previous file
        try:
            arrays = open_archive(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: cannot be read as an .npz archive")
        else:   # e.g. in the time stamps of zip
            unchanged += 1
            names = [name for name in arrays if name in ("images", "labels")]
            assert all((arrays[name] == {"images": images, "labels": [0, 1]}[name]).all() for name in names)
    assert unchanged < 200


@pytest.mark.parametrize("name", ["images", "labels"])
def test_changed_values_of_an_archive_are_rejected(tmp_path, name):
    path = tmp_path / "set.npz"
    np.savez(path, images=np.zeros((2, 8, 8), np.uint8), labels=np.arange(2))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        end = info.header_offset + 30 + len(info.filename) + info.compress_size
        end += int.from_bytes(path.read_bytes()[info.header_offset + 28:][:2], "little")   # the extra field
    change_bit(path, end - 1)
    with pytest.raises(ValueError, match=f"set.npz: cannot be read as .* .Bad CRC-32 for file '{name}.npy'"):
        ImageFolder(data_dir=str(path), image_size=8)


def test_bytes_after_an_array_belong_to_its_checksum(tmp_path):
    path, stream = tmp_path / "set.npz", io.BytesIO()
    np.save(stream, np.arange(3))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.npy", stream.getvalue() + bytes(range(256)) * 99)
    assert open_archive(path)["labels"].tolist() == [0, 1, 2]
    content = path.read_bytes()
    crc = zlib.crc32(stream.getvalue() + bytes(range(256)) * 99).to_bytes(4, "little")
    path.write_bytes(content.replace(crc, bytes(4)))
    with pytest.raises(ValueError, match="set.npz: cannot be read as .* .Bad CRC-32 for file 'labels.npy'"):
        open_archive(path)


def test_mapped_arrays_are_compared_once_per_process_up_to_a_size(tmp_path, monkeypatch):
    path, read = tmp_path / "set.npz", []
    np.savez(path, images=np.zeros((2, 8, 8), np.uint8))
    monkeypatch.setattr(npz, "read_to_end", lambda stream: read.append(stream.name))
    for _ in range(2):
        open_archive(path)
    assert read == ["images.npy"]
    np.savez(path, images=np.zeros((3, 8, 8), np.uint8))
    open_archive(path)
    assert len(read) == 2   # another file of this name
    npz._checked.clear()
    monkeypatch.setattr(npz, "MAX_CHECKED_BYTES", path.stat().st_size - 1)
    open_archive(path)
    assert len(read) == 2


# Plans and streams


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 64, 1000])
def test_permute_indices_is_a_permutation(count):
    images = [permute_indices(np.arange(count), count, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(image.tolist()) == list(range(count)) for image in images)
    if count > 16:
        assert all((a != b).any() for a, b in itertools.pairwise(images))


def test_permute_indices_is_uncorrelated():
    # Mean and lag-one correlation of a permutation of 4096 stay within 5 standard errors of chance.
    image = permute_indices(np.arange(4096), 4096, 7, 3) / 4095 - 0.5
    assert abs(image[:1024].mean()) < 5 * 0.289 / 32 and abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 5 / 64


def test_batch_plan_needs_no_table():
    tracemalloc.start()
    plan = BatchPlan(10**9, 8, seed=1)
    drawn = [plan.indices(step) for step in (0, 10**7, 10**8)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(map(max, drawn)) < 10**9 and peak < 2**23


def test_every_epoch_has_every_item_once_in_another_order():
    plan = BatchPlan(10, 4, seed=2)
    stream = np.concatenate([plan.indices(step) for step in range(5)])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10)) and (stream[:10] != stream[10:]).any()
    assert stream.dtype == np.int64


def test_two_ranks_share_the_batches_of_one_rank():
    whole = BatchPlan(11, 6, seed=5)
    parts = [BatchPlan(11, 3, rank, 2, seed=5) for rank in range(2)]
    for step in range(7):
        assert (np.concatenate([part.indices(step) for part in parts]) == whole.indices(step)).all()
        assert (np.concatenate([part.flip_mask(step) for part in parts]) == whole.flip_mask(step)).all()
    assert [list(part.slots) for part in parts] == [[0, 1, 2], [3, 4, 5]]


def test_a_plan_without_shuffle_counts_up():
    assert BatchPlan(5, 3, shuffle=False).indices(1).tolist() == [3, 4, 0]


def test_flip_mask_has_probability_one_half():
    heads = np.mean([BatchPlan(64, 64).flip_mask(step) for step in range(50)])
    assert abs(heads - 0.5) < 5 * 0.5 / np.sqrt(3200)


@pytest.mark.parametrize("crop", ["center", "none"])
def test_images_of_twice_the_size_are_averaged_over_blocks(crop):
    pixels = np.random.default_rng(0).random((8, 12, 1), np.float32)
    blocks = pixels.reshape(4, 2, 6, 2).mean((1, 3))[..., None]
    np.testing.assert_allclose(resizing.fit(pixels, 4, 6, crop, None), blocks, atol=1e-6)


def test_random_crops_start_at_every_offset():
    pixels = ramp(5, 8)[..., None]
    tops = {int(resizing.fit(pixels, 4, 8, "random", np.random.default_rng(seed))[0, 0, 0]) for seed in range(20)}
    assert tops == {0, 8}


def test_order_and_flips_depend_on_seed_and_step():
    orders = [BatchPlan(64, 32, seed=seed).indices(step).tolist() for seed in (0, 1) for step in (0, 1, 2)]
    flips = [BatchPlan(64, 32, seed=seed).flip_mask(step).tolist() for seed in (0, 1) for step in (0, 1, 2)]
    assert len({*map(tuple, orders)}) == len({*map(tuple, flips)}) == 6


class EchoedSource:
    """Labeled images that show what a stream requests: index, whether it is flipped, a random number."""

    folder, labels, class_names, random_flip, random_crop = "echo", np.arange(7) * 10, list("abcdefg"), True, True

    def batch(self, indices, flips, rngs):
        return torch.tensor([[i, int(flip), rng.integers(10**6)] for i, flip, rng in zip(indices, flips, rngs)])


def test_image_stream_requests_the_items_flips_and_generators_of_its_slots():
    plan = BatchPlan(7, 3, rank=1, num_ranks=2, seed=5)
    batch, conditioning = ImageStream(EchoedSource(), plan, with_labels=True).make_batch(4)
    numbers = [np.random.default_rng([5, 4, slot]).integers(10**6) for slot in (3, 4, 5)]
    assert batch.T.tolist() == [plan.indices(4).tolist(), plan.flip_mask(4).tolist(), numbers]
    assert conditioning["y"].tolist() == (plan.indices(4) * 10).tolist()


def test_fewer_items_than_a_step_are_rejected():
    with pytest.raises(ValueError, match="7 items are fewer than one step requires: --batch_size 4 on 2 ranks is 8"):
        BatchPlan(7, 4, num_ranks=2)


def test_prefetcher_returns_steps_in_order_and_respects_depth():
    made = []
    ahead = Prefetcher(lambda step: made.append(step) or step, start_step=3, depth=2)
    assert [ahead.next() for _ in range(4)] == [3, 4, 5, 6]
    time.sleep(0.05)
    ahead.close()
    assert made == list(range(3, 3 + len(made))) and len(made) <= 6 and not ahead._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        ahead.next()


def test_prefetcher_makes_every_stride_th_step():
    ahead = Prefetcher(lambda step: step, start_step=3, stride=4, end_step=12)
    assert [ahead.next() for _ in range(3)] == [3, 7, 11]
    ahead.close()


def test_prefetcher_raises_errors_of_its_thread():
    def make(step):
        if step == 1:
            raise ValueError("broken.png: cannot be read")
        return step

    ahead = Prefetcher(make)
    assert ahead.next() == 0
    for _ in range(2):
        with pytest.raises(ValueError, match="broken.png"):
            ahead.next()
    ahead.close()


def test_image_stream_seek_is_bit_exact(tmp_path):
    for i in range(5):
        save(tmp_path, f"{'ab'[i % 2]}_{i}.png", np.random.default_rng(i).integers(0, 256, (20, 24), np.uint8))
    folder = folder_of(tmp_path, crop="random", random_flip=True)
    stream = ImageStream(folder, BatchPlan(5, 2, seed=9), with_labels=True)
    unbroken = [next(stream) for _ in range(6)]
    stream.seek(2)
    for images, extra in unbroken[2:4]:
        again, labels = next(stream)
        assert torch.equal(images, again) and torch.equal(extra["y"], labels["y"]) and labels["y"].dtype == torch.int64
    stream.close()
    assert stream.step == 4 and torch.equal(next(stream)[0], unbroken[4][0])
    stream.seek(1)
    assert torch.equal(next(stream)[0], unbroken[1][0])
    stream.close()


def test_flips_reverse_the_last_axis(tmp_path):
    save(tmp_path, "a.png", ramp(8, 8))
    plain, flipped = folder_of(tmp_path).batch([0, 0], flips=[False, True])
    assert torch.equal(plain.flip(-1), flipped)
