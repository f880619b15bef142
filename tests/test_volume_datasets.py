import contextlib
import gzip
import locale
import os
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guided_diffusion_vae import config
from guided_diffusion_vae.data import config as config_of_data
from guided_diffusion_vae.data import listing, npz, volume_folders
from guided_diffusion_vae.data import (
    BatchPlan, DataConfig, ImageFolder, VolumeFolder, ImageStream, open_folder, unpad, write_nifti,
)
from guided_diffusion_vae.checkpoint_util import require_same_model, save_weights
from guided_diffusion_vae.data.cache_writer import LatentCacheConfig, write_cache
from guided_diffusion_vae.data.volume_folders import read_volume
from guided_diffusion_vae.files import write_record
from guided_diffusion_vae.runs import run as run_module
from guided_diffusion_vae.runs import spaces
from guided_diffusion_vae.runs.run import Run, RunConfig
from guided_diffusion_vae.train_util import DiffusionTrainConfig as TrainConfig
from guided_diffusion_vae.train_util import TrainLoop
from guided_diffusion_vae.vae_wrapper import PixelCodec

nibabel = pytest.importorskip("nibabel")


def ramp(*shape):
    """Return a volume in which every value is different."""
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


@pytest.fixture
def folder(tmp_path):
    """Three volumes of two kinds, in three formats."""
    np.save(tmp_path / "ct_0.npy", ramp(8, 10, 12))
    np.savez_compressed(tmp_path / "mr_1.npz", volume=ramp(8, 8, 8))
    image = nibabel.Nifti1Image(ramp(9, 8, 10), np.diag([2.0, 1.5, 1.5, 1.0]))
    nibabel.save(image, tmp_path / "mr_2.nii.gz")
    (tmp_path / "index.json").write_text("[]")
    return tmp_path


def images_beside(folder):
    """Return a folder with one image."""
    (folder / "images").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "images" / "a.png")
    return folder / "images"


def opened(folder, size="8x8x8", **fields):
    return VolumeFolder(DataConfig(str(folder), size, **fields))


def test_volumes_of_all_formats_have_classes_and_spacing(folder):
    volumes = opened(folder)
    assert len(volumes) == 3 and volumes.shape == (1, 8, 8, 8) and volumes.ignored == 1
    assert volumes.names == ["ct_0.npy", "mr_1.npz", "mr_2.nii.gz"] and volumes.class_names == ["ct", "mr"]
    assert volumes.labels.tolist() == [0, 1, 1] and volumes.kinds == {"uint16": 3}
    assert volumes.spacings == [(2.0, 1.5, 1.5)] * 3 and volumes.spacing == (2.0, 1.5, 1.5)
    assert volumes.notes == [f"2 of 3 volumes state no directions, such as {folder}/ct_0.npy: they are read as stored, "
                             "and count as RAS with the voxel spacing of the others"]
    batch = volumes.batch([1, 2])
    assert batch.shape == (2, 1, 8, 8, 8) and batch.dtype == torch.float32
    np.testing.assert_allclose(batch[0, 0] * 65535, ramp(8, 8, 8), atol=0.01)
    np.testing.assert_allclose(batch[1, 0] * 65535, ramp(9, 8, 10)[0:8, :, 1:9], atol=0.01)  # the middle


def test_three_sizes_open_volumes_and_two_open_images(folder, tmp_path):
    assert isinstance(open_folder(DataConfig(str(folder), "8x8x8")), VolumeFolder)
    assert DataConfig(voxel_size=(8, 4, 2)).image_size == "8x4x2" == DataConfig(image_size="8x4x2").image_size
    with pytest.raises(ValueError, match="expected two sizes and no grid for images"):
        ImageFolder(DataConfig(str(folder), "8x8x8"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_folder(DataConfig(str(tmp_path / "nowhere"), 8))


def test_a_grid_covers_every_voxel_with_the_fewest_patches(folder):
    volumes = opened(folder, "4x8x8", crop="grid")
    of_first = [name for name in volumes.names if name.startswith("ct")]
    assert len(of_first) == 2 * 2 * 2 and "ct_0.npy[4,2,4]" in of_first
    seen = {round(float(v) * 65535) for i in range(8) for v in volumes.read(i).flatten()}
    assert seen == set(range(8 * 10 * 12)) and volumes.labels.tolist() == [0] * 8 + [1] * 2 + [1] * 6


def test_random_patches_depend_on_seed_step_and_slot_alone(folder):
    volumes = opened(folder, "4x4x4", crop="random", patches_per_volume=3)
    assert len(volumes) == 9
    whole = ImageStream(volumes, BatchPlan(9, 4, seed=5))
    first, second = next(whole)[0], next(whole)[0]
    parts = [ImageStream(volumes, BatchPlan(9, 2, rank, 2, seed=5), start_step=1) for rank in (0, 1)]
    assert torch.equal(torch.cat([next(part)[0] for part in parts]), second) and not torch.equal(first, second)
    for stream in (whole, *parts):
        stream.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.tuples(*[st.integers(1, 8)] * 3), strides=st.tuples(*[st.integers(1, 5)] * 3))
def test_cropping_undoes_padding(folder, size, strides):
    plain, padded = (VolumeFolder(DataConfig(str(folder), "x".join(map(str, size)), pad=pad), multiple=strides)
                     for pad in (False, True))
    assert all(n % stride == 0 and n - stride < m <= n for n, stride, m in zip(padded.shape[1:], strides, size))
    assert torch.equal(unpad(padded.batch([0, 1, 2]), padded.unpadded_shape), plain.batch([0, 1, 2]))


def test_random_patches_without_rngs_have_fixed_positions(folder):
    volumes = opened(folder, "4x4x4", crop="random", patches_per_volume=3)
    first = volumes.batch(range(9))
    assert torch.equal(first, volumes.batch(range(9)))
    assert len({tuple(patch.flatten().tolist()) for patch in first}) == 9


def test_full_volumes_keep_their_own_size(folder):
    assert opened(folder).read_volume(2).shape == (1, 9, 8, 10)


def test_volumes_are_flipped_along_their_last_axis(folder):
    volumes = opened(folder)
    plain, flipped = volumes.batch([0, 0], flips=[False, True])
    assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)


def test_padding_repeats_the_far_end(folder):
    volumes = VolumeFolder(DataConfig(str(folder), "7x8x8", pad=True), multiple=(4, 4, 4))
    assert volumes.shape == (1, 8, 8, 8) and volumes.unpadded_shape == (1, 7, 8, 8)
    item = volumes.read(0)
    assert np.array_equal(item[:, 7], item[:, 6])


def test_value_window_clips_values_and_value_range_rejects_them(tmp_path):
    np.save(tmp_path / "ct.npy", np.linspace(-2000, 2000, 64).reshape(4, 4, 4).astype(np.float32))
    windowed = opened(tmp_path, "4x4x4", value_window="-1000,1000").read(0)
    assert windowed.min() == 0 and windowed.max() == 1 and (windowed == 0).sum() == 16
    with pytest.raises(ValueError, match="ct.npy: values from -2000 to 2000 are outside --value_range.*--value_w"):
        opened(tmp_path, "4x4x4", value_range="-1000,1000").read(0)
    with pytest.raises(ValueError, match="--value_range and --value_window are mutually exclusive"):
        opened(tmp_path, "4x4x4", value_range="0,1", value_window="0,1")
    with pytest.raises(ValueError, match="float32 values require --value_range lo,hi, .* or --value_window"):
        opened(tmp_path, "4x4x4")


def test_complex_cubes_share_one_reference_level(tmp_path):
    cube = np.full((4, 4, 8), 0.1, np.complex64)
    cube[..., 4:] = 1j
    np.save(tmp_path / "a.npy", cube)
    volumes = opened(tmp_path, "4x4x4", crop="grid", dynamic_range_db=40.0, reference_db="0")
    np.testing.assert_allclose(volumes.batch([0, 1]).mean((1, 2, 3, 4)), [0.5, 1.0], atol=1e-6)  # -20 dB and 0 dB
    with pytest.raises(ValueError, match="a.npy: complex values require --reference_db"):
        opened(tmp_path, "4x4x4", dynamic_range_db=40.0)


def test_value_window_applies_to_images_too(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[-5.0, 0], [5, 10]], np.float32))
    assert ImageFolder(DataConfig(str(tmp_path), 2, value_window="0,5")).read(0).flatten().tolist() == [0, 0, 1, 1]


def test_slope_and_intercept_of_a_header_are_applied(tmp_path):
    values = 2.0 * ramp(4, 4, 4) - 10
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.set_data_dtype(np.int16)      # stored as integers, with a slope and an intercept
    nibabel.save(image, tmp_path / "a.nii")
    volumes = opened(tmp_path, "4x4x4", value_window="-10,116")
    assert volumes.kinds == {"float32": 1}
    np.testing.assert_allclose(volumes.read(0)[0] * 126 - 10, values, atol=0.01)


def test_intercept_of_a_header_with_slope_one_is_applied(tmp_path):
    values = np.arange(-100, 28, 2, dtype=np.int16).reshape(4, 4, 4)
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.set_data_dtype(np.uint8)      # which cannot store negative values, as scanners store Hounsfield units
    nibabel.save(image, tmp_path / "a.nii")
    stored = nibabel.load(tmp_path / "a.nii").dataobj
    assert stored.slope == 1 and stored.inter < 0
    volumes = opened(tmp_path, "4x4x4", value_range="-100,100")
    assert volumes.kinds == {"float32": 1}
    np.testing.assert_allclose(volumes.read(0)[0] * 200 - 100, values, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_written_volumes_are_read_back(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 256, (channels, 4, 5, 6), np.uint8)
    write_nifti(tmp_path / "a.nii.gz", values, (3.0, 2.0, 1.0))
    volumes = opened(tmp_path, "4x5x6", crop="none")
    assert volumes.spacing == (3.0, 2.0, 1.0) and np.array_equal(np.rint(volumes.read(0) * 255), values)


def test_spacing_flag_overrides_the_files(folder):
    assert opened(folder, spacing="3").spacing == (3.0, 3.0, 3.0)
    assert opened(folder, spacing="3,2,1").preprocessing["spacing"] == "3,2,1"
    with pytest.raises(ValueError, match="--spacing must be one or three distances above 0 in mm, .* got .1,2"):
        opened(folder, spacing="1,2")


def test_volumes_on_disk_are_read_patch_by_patch(tmp_path):
    np.save(tmp_path / "a.npy", ramp(16, 16, 16))
    assert isinstance(opened(tmp_path), VolumeFolder)
    assert isinstance(read_volume(str(tmp_path / "a.npy")).base, np.memmap)


@pytest.mark.parametrize("make, fields, match", [
    (lambda f: np.save(f / "ct_0.npy", ramp(4, 8, 8)), {}, "ct_0.npy: size 4x8x8 is smaller than --image_size 8x8x8"),
    (lambda f: np.save(f / "ct_0.npy", ramp(8, 8)), {}, "ct_0.npy: cannot be read .shape .8, 8.: expected"),
    (lambda f: np.save(f / "ct_0.npy", ramp(2, 8, 8, 8)), {}, "mr_1.npz: expected 2 channels as in .*ct_0.npy, got 1"),
    (lambda f: (f / "mr_2.nii.gz").write_bytes(b"no volume"), {}, "mr_2.nii.gz: cannot be read"),
    (lambda f: np.savez(f / "mr_1.npz", a=ramp(8, 8, 8), b=ramp(8, 8, 8)), {},
     "expected one array of three or four axes, got 2"),
    (lambda f: None, {"crop": "none"}, "ct_0.npy: size 8x10x12 is not 8x8x8, and --crop none reads full volumes"),
    (lambda f: None, {"image_channels": 3}, "--image_channels 3: volumes are not converted"),
])
def test_invalid_volumes_and_flags_are_rejected(folder, make, fields, match):
    make(folder)
    with pytest.raises(ValueError, match=match):
        opened(folder, **fields)


def test_changed_bits_of_a_compressed_nifti_never_give_other_voxels(tmp_path):
    path, values = tmp_path / "a.nii.gz", ramp(4, 4, 4)
    write_nifti(path, values)
    content, unchanged = path.read_bytes(), 0
    for position in np.random.default_rng(0).choice(8 * len(content), 300, replace=False):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        volume_folders._recent.clear()  # the size and maybe the modification time are those of the previous file
        try:
            read = opened(tmp_path, "4x4x4").read(0)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
        else:   # e.g. in the time stamp of gzip
            unchanged += 1
            np.testing.assert_array_equal(read[0], values / np.float32(65535))
    assert unchanged < 60


@pytest.mark.parametrize("end", [-1, -4, -8])
def test_compressed_nifti_without_its_checksum_is_rejected(tmp_path, end):
    path = tmp_path / "a.nii.gz"
    write_nifti(path, np.random.default_rng(0).integers(0, 65536, (8, 8, 8), np.uint16))
    path.write_bytes(path.read_bytes()[:end])
    volumes = opened(tmp_path)  # the header is complete
    with pytest.raises(ValueError, match="a.nii.gz: cannot be read .Compressed file ended before the end-of-stream"):
        volumes.read(0)


def test_nifti_of_an_unknown_data_type_is_rejected(tmp_path):
    nibabel.save(nibabel.Nifti1Image(ramp(4, 4, 4), np.eye(4)), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[71] = 8     # the upper byte of the data type
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(ValueError, match="a.nii: cannot be read .data code 2048 not supported"):
        opened(tmp_path, "4x4x4")


# Positions of a NIfTI-1 header: the dimensions from 42 on, the data type at 70, the voxel sizes from 80 on.
@pytest.mark.parametrize("position, layout, values, problem, compressed", [
    (42, "<3h", (2000, 2000, 2000), "uint16 values of shape .2000, 2000, 2000.: expected 16000000000 bytes, got 128",
     "8000000000 pixels: expected at most --max_pixels 536870912; set a larger number if the header is right"),
    (42, "<3h", (600, 600, 600), "expected 432000000 bytes, got 128",
     "216000000 pixels of 16 bits, more than [0-9]+ bytes can contain; it is corrupt, or the image is empty"),
    (42, "<h", (-4,), *["expected a shape of numbers above 0, got .-4, 4, 4"] * 2),
    (80, "<f", (np.nan,), *["expected a finite voxel spacing, got .nan, 1.0, 1.0"] * 2),
])
def test_sizes_of_a_nifti_are_bounded_before_it_is_read(tmp_path, position, layout, values, problem, compressed):
    content = bytearray(nibabel.Nifti1Image(ramp(4, 4, 4), np.eye(4)).to_bytes())
    struct.pack_into(layout, content, position, *values)
    for name, stored, match in (("a.nii", content, problem), ("a.nii.gz", gzip.compress(content), compressed)):
        path = tmp_path / name
        path.write_bytes(stored)
        with pytest.raises(ValueError, match=f"^{path}: cannot be read .*{match}"):
            opened(tmp_path, "4x4x4")
        if position == 42:
            with pytest.raises(ValueError, match=f"^{path}: cannot be read .*{match}"):
                read_volume(str(path))
        path.unlink()


def test_changed_bits_of_a_nifti_header_are_errors_with_the_name(tmp_path):
    path, random = tmp_path / "a.nii", np.random.default_rng(0)
    content = nibabel.Nifti1Image(ramp(4, 4, 4), np.eye(4)).to_bytes()
    for position in random.choice(8 * 352, 150, replace=False):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        volume_folders._recent.clear()
        try:
            opened(tmp_path, "1x1x1", value_window="0,1").read(0)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")


def test_compressed_archives_are_unpacked_once_and_not_for_their_header(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a_0.npz", volume=ramp(8, 8, 8), more=np.zeros(9))
    np.savez(tmp_path / "b_0.npz", volume=ramp(8, 8, 8))
    unpacked, read_member = [], npz._read_member
    monkeypatch.setattr(npz, "_read_member", lambda path, archive, header, *rest: unpacked.append(
        header.member.filename) or read_member(path, archive, header, *rest))
    volumes = opened(tmp_path, "4x4x4", crop="grid")
    assert len(volumes) == 16 and unpacked == []
    patches = volumes.batch(range(8))
    assert unpacked == ["volume.npy"]
    assert torch.equal(patches, volumes.batch(range(8, 16)))    # memory-mapped, not unpacked
    assert isinstance(read_volume(str(tmp_path / "b_0.npz")).base, np.memmap)
    np.savez_compressed(tmp_path / "a_0.npz", volume=ramp(8, 8, 8) + 1)
    assert not torch.equal(opened(tmp_path, "4x4x4", crop="grid").batch(range(8)), patches)     # another file


def test_changed_values_of_a_compressed_archive_are_rejected(tmp_path):
    path, random = tmp_path / "a.npz", np.random.default_rng(0)
    np.savez_compressed(path, volume=random.integers(0, 65536, (24, 24, 24), np.uint16))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    volumes = opened(tmp_path)      # the header is intact
    with pytest.raises(ValueError, match=f"^{path}: cannot be read as an .npz archive .*(Bad CRC-32|decompress)"):
        volumes.read(0)


def test_max_pixels_bounds_compressed_volumes(folder):
    assert opened(folder, max_pixels=9 * 8 * 10).read(2).shape == (1, 8, 8, 8)
    with pytest.raises(ValueError, match="mr_2.nii.gz: cannot be read .*720 pixels: expected at most --max_pixels 719"):
        opened(folder, max_pixels=719)
    np.savez_compressed(folder / "mr_1.npz", volume=np.zeros((64, 64, 64), np.uint16))
    volumes = opened(folder, max_pixels=10**5)
    with pytest.raises(ValueError, match="mr_1.npz: .*volume.npy unpacks from .* to 524416 bytes: expected at most 1"):
        volumes.read(1)


def test_folder_without_volumes_is_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="contains no volume .*, or set --image_size to two sizes for images"):
        opened(tmp_path)


def test_described_settings_are_those_of_earlier_caches(folder):
    """Every entry is hashed: another one would encode all caches again."""
    fields = {"files", "ignored", "kinds", "shape", "unpadded_shape", "fingerprint", "data_dir", "random_flip"}
    volumes = opened(folder, random_flip=True, voxel_size=(8, 8, 8), crop="grid", **DataConfig.VOLUME_OPTIONS)
    assert set(volumes.describe()) == fields | set(volumes.preprocessing)
    assert set(volumes.preprocessing) == {"image_size", "voxel_size", "image_channels", "value_range", "value_window",
                                          "dynamic_range_db", "reference_db", "crop", "pad", "patches_per_volume",
                                          "spacing"}
    expected = {"image_size": "8x8x8", "voxel_size": [], "spacing": "1,1,1", "files": 3, "random_flip": True}
    assert {name: volumes.describe()[name] for name in expected} == expected
    assert len(volumes) > 3 and volumes.describe()["shape"] == [1, 8, 8, 8]
    images = ImageFolder(DataConfig(str(images_beside(folder)), 8))
    assert not set(DataConfig.VOLUME_OPTIONS) & set(images.preprocessing)


# --- Directions ---

SCENE = np.random.default_rng(0).integers(0, 256, (5, 6, 7), np.uint8)   # in the order R, A, S


def save_nifti(path, values, code="RAS", spacing=(1, 1, 1), turn=None):
    """Write values in the order R, A, S (x frames) with the spacing along R, A, S, stored in the directions `code`."""
    affine = np.diag([*spacing, 1.0])
    if turn is not None:
        affine[:3, :3] = turn @ affine[:3, :3]
    image = nibabel.Nifti1Image(values, affine)
    orientations = nibabel.orientations
    nibabel.save(image.as_reoriented(orientations.axcodes2ornt(code)), path)


def turned(degrees):
    """Return a rotation about the third axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


@pytest.mark.parametrize("name", ["nii", "nii.gz"])
@pytest.mark.parametrize("code, order, flips", [
    ("RAS", (0, 1, 2), (1, 1, 1)), ("LPS", (0, 1, 2), (-1, -1, 1)), ("SLA", (2, 0, 1), (1, -1, 1)),
])
def test_a_scene_is_the_same_however_it_is_stored(tmp_path, name, code, order, flips):
    for stored in ("RAS", "LAS", "LPI", "PIR"):
        save_nifti(tmp_path / f"{stored}.{name}", SCENE, stored, (2, 3, 4))
    expected = SCENE.transpose(order)[tuple(slice(None, None, step) for step in flips)]
    volumes = opened(tmp_path, "x".join(map(str, expected.shape)), crop="none", orientation=code)
    assert volumes.spacings == [tuple((2.0, 3.0, 4.0)[axis] for axis in order)] * 4 and not volumes.notes
    assert all(np.array_equal(volumes.read(i)[0] * 255, expected) for i in range(4))
    assert volumes.preprocessing["orientation"] == code and f" 4 volumes {code}, " in volumes.summary()


def test_directions_as_stored_are_those_that_all_files_have(tmp_path):
    for name in "ab":
        save_nifti(tmp_path / f"{name}.nii", SCENE, "LPI", (2, 3, 4))
    volumes = opened(tmp_path, "5x6x7", orientation="as_stored")
    assert volumes.preprocessing["orientation"] == volumes.orientation == "LPI"
    assert np.array_equal(volumes.read(0)[0] * 255, SCENE[::-1, ::-1, ::-1])
    save_nifti(tmp_path / "c.nii", SCENE, "RAS")
    with pytest.raises(ValueError, match=f"^{tmp_path}/c.nii: expected axes in the directions LPI as in "
                                         f"{tmp_path}/a.nii, got RAS; set --orientation LPI instead of as_stored$"):
        opened(tmp_path, "5x6x7", orientation="as_stored")
    np.save(tmp_path / "c.nii.npy", SCENE)
    (tmp_path / "c.nii").unlink()
    assert opened(tmp_path, "5x6x7", orientation="as_stored").orientation == "LPI"
    for name in "ab":
        (tmp_path / f"{name}.nii").unlink()
    assert opened(tmp_path, "5x6x7", orientation="as_stored").orientation == "RAS"


def test_without_a_record_of_directions_files_are_read_as_stored(tmp_path):
    save_nifti(tmp_path / "a.nii", SCENE, "LPI")
    save_nifti(tmp_path / "b.nii", SCENE, "RAS", (1, 1, 5))
    volumes = opened(tmp_path, "5x6x7", orientation="")     # an old run, which must go on
    assert np.array_equal(volumes.read(0)[0] * 255, SCENE[::-1, ::-1, ::-1]) and volumes.spacing == (1, 1, 3)
    assert np.array_equal(volumes.read(1)[0] * 255, SCENE) and "orientation" not in volumes.preprocessing
    assert volumes.notes == [f"{tmp_path}/b.nii: expected a voxel spacing of 1,1,1 mm as in {tmp_path}/a.nii, got "
                             "1,1,5 mm; 1,1,3 mm is recorded"]


@pytest.mark.parametrize("text", ["RAX", "RLS", "RA", "RASS", "RRS", "stored"])
def test_directions_that_do_not_exist_are_rejected(tmp_path, text):
    save_nifti(tmp_path / "a.nii", SCENE)
    with pytest.raises(ValueError, match=f"--orientation must be three letters, one each of R or L.*got '{text}'"):
        opened(tmp_path, "5x6x7", orientation=text)


def test_directions_may_be_lower_case_on_the_command_line():
    assert config.convert("orientation", config_of_data.directions, "lps") == "LPS"
    assert config.convert("orientation", config_of_data.directions, "as_stored") == "as_stored"


@pytest.mark.parametrize("degrees, noted", [(0.9, []), (12.0, ["up to 12.0 degrees"]), (46.0, ["up to 44.0 degrees"])])
def test_oblique_volumes_have_the_nearest_directions(tmp_path, degrees, noted):
    save_nifti(tmp_path / "a.nii", SCENE, turn=turned(degrees))
    save_nifti(tmp_path / "b.nii", SCENE, "LAS")
    volumes = opened(tmp_path, "5x5x5")
    nearest = SCENE[:, ::-1].transpose(1, 0, 2) if degrees > 45 else SCENE      # R is then the old P
    assert np.array_equal(volumes.read_volume(0)[0] * 255, nearest)
    assert all(text in note and f"1 of 2 volumes have oblique axes, {text} in {tmp_path}/a.nii" in note
               for text, note in zip(noted, volumes.notes)) and len(noted) == len(volumes.notes)


def test_a_header_without_a_code_states_no_directions(tmp_path):
    image = nibabel.Nifti1Image(SCENE, np.diag([2.0, 3, 4, 1]))
    image.set_sform(None, 0)
    nibabel.save(image, tmp_path / "a.nii")
    assert nibabel.aff2axcodes(nibabel.load(tmp_path / "a.nii").affine) == ("L", "A", "S")  # assumed by nibabel
    save_nifti(tmp_path / "b.nii", SCENE, "LPI", (2, 3, 4))
    volumes = opened(tmp_path, "5x6x7")
    assert all(np.array_equal(volumes.read(i)[0] * 255, SCENE) for i in range(2)) and volumes.spacing == (2, 3, 4)
    assert volumes.notes[0].startswith(f"1 of 2 volumes state no directions, such as {tmp_path}/a.nii: they are read")


def test_directions_that_do_not_span_the_space_are_rejected(tmp_path):
    path = tmp_path / "a.nii"
    save_nifti(path, SCENE)
    content = bytearray(path.read_bytes())
    content[296:312] = content[280:296]     # srow_y is srow_x
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: expected the directions of three axes that span the space, got "):
        opened(tmp_path, "5x6x7")
    assert np.array_equal(opened(tmp_path, "5x6x7", orientation="").read(0)[0] * 255, SCENE)


def test_uncompressed_volumes_are_flipped_without_reading_them(tmp_path):
    save_nifti(tmp_path / "a.nii", SCENE, "PIR")
    values = opened(tmp_path, "2x2x2")._values(0)
    base = values
    while not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize("code, spacing", [("RAS", (3, 2, 1)), ("LAS", (3, 2, 1)), ("PIR", (1, 2, 3)),
                                           ("SLA", (3, 1, 2))])
@pytest.mark.parametrize("channels", [1, 3])
def test_written_volumes_have_the_directions_of_the_data(tmp_path, code, spacing, channels):
    values = np.random.default_rng(0).integers(0, 256, (channels, 4, 5, 6), np.uint8)
    write_nifti(tmp_path / "a.nii.gz", values, spacing, code)
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert "".join(nibabel.aff2axcodes(image.affine)) == code and image.header.get_zooms()[:3] == spacing
    assert image.header.get_xyzt_units()[0] == "mm"
    volumes = opened(tmp_path, "4x5x6", crop="none", orientation=code)
    assert volumes.spacing == spacing and np.array_equal(np.rint(volumes.read(0) * 255), values)
    assert opened(tmp_path, "4x5x6", crop="none", orientation="as_stored").orientation == code
    in_ras = nibabel.as_closest_canonical(image).dataobj
    volumes = opened(tmp_path, "x".join(map(str, in_ras.shape[:3])), crop="none")
    expected = np.asarray(in_ras) if channels == 3 else np.asarray(in_ras)[..., None]
    assert np.array_equal(np.rint(volumes.read(0) * 255), np.moveaxis(expected, -1, 0))


OLD = {"image_size": "5x6x7", "crop": "center", "spacing": "1,1,1"}    # the data of a header of version 0.2


def test_later_commands_read_volumes_like_training():
    apply = spaces.apply_trained_preprocessing
    assert apply(DataConfig(), {}, OLD).orientation == ""
    assert apply(DataConfig(), {"orientation": "RAS"}, OLD).orientation == "RAS"
    trained = apply(DataConfig(), {}, {**OLD, "orientation": "LPS", "resample_spacing": "1,1,2"})
    assert (trained.orientation, trained.resample_spacing) == ("LPS", "1,1,2")
    assert apply(DataConfig(), {}, {}).orientation == "RAS"     # an autoencoder that records nothing
    assert apply(DataConfig(), {}, {"image_size": 8}).orientation == "RAS"


def test_flags_are_compared_with_the_directions_of_a_cache():
    old, new, images = (SimpleNamespace(folder="cache", preprocessing=recorded) for recorded in (
        OLD, {**OLD, "orientation": "LPS", "resample_spacing": "1,1,2"}, {"image_size": 8}))
    for cache, flags in ((new, {"orientation": "LPS", "resample_spacing": "1.0,1,2"}), (images, {"orientation": "LPS"}),
                         (new, {"orientation": "as_stored"}), (old, {"orientation": "as_stored"})):
        spaces.require_same_preprocessing(cache, flags)
    for cache, name, value, recorded in ((old, "orientation", "RAS", ""), (old, "resample_spacing", "1", ""),
                                         (new, "orientation", "RAS", "LPS"), (new, "resample_spacing", "1", "1,1,2")):
        with pytest.raises(ValueError, match=f"--{name} {value}.* conflicts with .*{name}={recorded};"):
            spaces.require_same_preprocessing(cache, {name: value})


def resumed(folder, data, explicit=None):
    """Return the DataConfig of a run that resumes one in whose header are `data`."""
    write_record(folder / "config.json", {"header": {"data": data}})
    run = Run("train", (DataConfig("volumes", "5x6x7", **(explicit or {})),), explicit or {},
              checkpoint=({"step": 2}, folder))
    run._take_recorded_options()
    return run[DataConfig]


def test_a_run_takes_over_how_volumes_are_read_when_it_is_opened(tmp_path, monkeypatch):
    write_record(tmp_path / "config.json", {"header": {"data": OLD}})
    monkeypatch.setattr(run_module, "find_checkpoint", lambda folder, path: ({"step": 2}, tmp_path))
    run = Run("train", (DataConfig(), TrainConfig(), RunConfig(logdir=str(tmp_path / "run"))), {})
    with contextlib.ExitStack() as held:
        run.open_folder(True, held)
    assert run[DataConfig].orientation == ""


def test_a_step_is_not_resumed_with_other_directions(tmp_path):
    """Also where config.json is missing, from which a run takes them over."""
    save_weights(tmp_path / "model000002.pt", {"weight": torch.zeros(1)}, {"step": 2, "data": OLD})
    loop = SimpleNamespace(header={"data": {**OLD, "orientation": "RAS"}})
    with pytest.raises(ValueError, match="data.orientation is 'RAS' now, '' in the checkpoint"):
        TrainLoop._load_model(loop, tmp_path, 2, "cpu")


@pytest.mark.parametrize("recorded, expected", [({}, SCENE[::-1]), ({"orientation": "RAS"}, SCENE)])
def test_validation_data_are_read_like_the_cache(tmp_path, recorded, expected):
    save_nifti(tmp_path / "a.nii", SCENE, "LAS")
    run = Run("train", (DataConfig(image_size="5x6x7"), SimpleNamespace(val_data_dir=str(tmp_path))), {})
    source = SimpleNamespace(folder="cache", latent_shape=(1, 5, 6, 7), preprocessing={**OLD, **recorded})
    found = spaces.open_validation(run, source, spaces.Space.of_pixels(1, dims=3))
    assert np.array_equal(np.rint(found.dataset.read(0)[0] * 255), expected)


def test_a_resumed_run_reads_volumes_as_it_did(tmp_path):
    assert resumed(tmp_path, OLD).orientation == "" and resumed(tmp_path, OLD).data_dir == "volumes"
    assert resumed(tmp_path, {**OLD, "orientation": "LPS"}).orientation == "LPS"
    assert resumed(tmp_path, {"image_size": 8}).orientation == "RAS"
    with pytest.raises(ValueError, match=f"--orientation RAS conflicts with the run in {tmp_path}, which was trained"):
        resumed(tmp_path, OLD, {"orientation": "RAS"})
    current = {"data": {**OLD, "orientation": "RAS"}}
    with pytest.raises(ValueError, match="data.orientation is 'RAS' now, '' in the checkpoint"):
        require_same_model(config_of_data.state_options({"data": OLD}), config_of_data.state_options(current), tmp_path)


# --- Voxel spacing ---


@pytest.mark.parametrize("unit, factor", [("mm", 1), ("meter", 1000), ("micron", 0.001), ("unknown", 1)])
def test_spacing_is_in_mm_whatever_the_unit_of_the_file(tmp_path, unit, factor):
    image = nibabel.Nifti1Image(SCENE, np.diag([2.0, 3, 4, 1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(opened(tmp_path, "5x6x7").spacing, [2 * factor, 3 * factor, 4 * factor])


def test_files_of_another_spacing_are_rejected(tmp_path):
    save_nifti(tmp_path / "a.nii", SCENE, "RAS", (1, 1, 1))
    save_nifti(tmp_path / "b.nii", SCENE, "PIR", (1, 1.009, 1))
    assert opened(tmp_path, "5x6x7").spacing == (1, pytest.approx(1.0045), 1)
    save_nifti(tmp_path / "c.nii", SCENE, "LPI", (1, 1, 5))
    with pytest.raises(ValueError, match=f"^{tmp_path}/c.nii: expected a voxel spacing of 1,1,1 mm as in "
                                         f"{tmp_path}/a.nii, got 1,1,5 mm; set --resample_spacing, such as 1,1,1, or "
                                         "--spacing to ignore those of the files$"):
        opened(tmp_path, "5x6x7")
    assert opened(tmp_path, "5x6x7", spacing="1,1,2").spacing == (1, 1, 2)


def test_resampled_volumes_have_the_size_and_values_of_the_new_spacing(tmp_path):
    ramps = np.add.outer(np.add.outer(100 * np.arange(8), 10 * np.arange(6)), np.arange(4)).astype(np.int16)
    for name, code in (("a", "RAS"), ("b", "PIR")):
        save_nifti(tmp_path / f"{name}.nii", ramps, code, (1, 2, 3))
    fields = dict(crop="none", value_range="0,1000")
    volumes = opened(tmp_path, "4x12x4", resample_spacing="2,1,3", **fields)
    found = volumes.read(0)[0] * 1000
    # Linear functions are kept away from the border: means of pairs along R, quarters of steps along A.
    expected = ramps.astype(float).reshape(4, 2, 6, 4).mean(1)
    expected = np.stack([expected - 2.5, expected + 2.5], 2).reshape(4, 12, 4)
    np.testing.assert_allclose(found[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-3)
    assert np.abs(found - expected).max() < 30 and volumes.kinds == {"int16": 2}
    np.testing.assert_allclose(volumes.read(1)[0] * 1000, found, atol=1e-3)
    assert volumes.spacing == (2, 1, 3) and volumes.preprocessing["resample_spacing"] == "2,1,3"
    assert opened(tmp_path, "2x3x4", spacing="1", resample_spacing="1,2,1", **fields | {"crop": "center"}
                  ).read_volume(0).shape == (1, 8, 3, 4)     # --spacing replaces that of the files
    with pytest.raises(ValueError, match="a.nii: size 4x12x4 is not 4x6x4, and --crop none"):
        opened(tmp_path, "4x6x4", resample_spacing="2,1,3", **fields)


def test_files_of_different_spacing_become_comparable(tmp_path):
    blob = np.zeros((24, 24, 24))
    blob[6:18, 6:18, 6:18] = 200
    blob = scipy.ndimage.gaussian_filter(blob, 3)
    save_nifti(tmp_path / "a.nii", blob.astype(np.uint8), spacing=(1, 1, 1))
    save_nifti(tmp_path / "b.nii", blob.reshape(24, 24, 6, 4).mean(3).astype(np.uint8), spacing=(1, 1, 4))
    volumes = opened(tmp_path, "12x12x12", resample_spacing="2")
    fine, coarse = volumes.read_volume(0), volumes.read_volume(1)
    assert fine.shape == coarse.shape == (1, 12, 12, 12)
    assert np.abs(fine - coarse).max() < 0.06 and fine.max() > 0.6


def test_resampling_averages_what_the_new_voxels_cover(tmp_path):
    np.save(tmp_path / "a.npy", np.tile(np.uint8([0, 0, 0, 255]), (8, 8, 4)))
    volumes = opened(tmp_path, "8x8x4", spacing="1", resample_spacing="1,1,4", crop="none")
    assert np.abs(volumes.read(0)[..., 1:-1] - 0.25).max() < 1e-6      # 0 where two voxels are interpolated


def test_resampled_values_stay_in_the_range_of_the_file(tmp_path):
    np.save(tmp_path / "a.npy", np.full((9, 9, 9), 255, np.uint8))
    volumes = opened(tmp_path, "4x4x4", spacing="0.7", resample_spacing="0.9,1.3,0.4")
    assert (volumes.read_volume(0) == 1).all() and volumes.read_volume(0).shape == (1, 7, 5, 16)


def test_resampled_volumes_are_kept_in_memory_for_each_setting(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", SCENE)
    made, resample = [], volume_folders._resample
    monkeypatch.setattr(volume_folders, "_resample", lambda values, arrangement: made.append(arrangement.sides) or
                        resample(values, arrangement))
    for spacing in ("2", "2", "3", "2"):
        volumes = opened(tmp_path, "2x2x2", crop="grid", spacing="1", resample_spacing=spacing)
        volumes.batch(range(len(volumes)))
    assert made == [(2, 3, 4), (2, 2, 2)]


@pytest.mark.parametrize("fields, match", [
    ({}, "a.npy states no voxel spacing, which --resample_spacing requires; set --spacing$"),
    ({"spacing": "1", "resample_spacing": "0.001"}, "a.npy: size 5x6x7 at 1,1,1 mm becomes 5000x6000x7000 at --"
     "resample_spacing 0.001,0.001,0.001: expected at most --max_pixels 536870912 voxels, got 210000000000; "
     "set a wider spacing$"),
    ({"resample_spacing": "1,2"}, "--resample_spacing must be one or three distances above 0 in mm"),
])
def test_impossible_resampling_is_rejected(tmp_path, fields, match):
    np.save(tmp_path / "a.npy", SCENE)
    with pytest.raises(ValueError, match=match):
        opened(tmp_path, "1x1x1", **{"resample_spacing": "2", **fields})


def test_complex_volumes_are_not_resampled(tmp_path):
    np.save(tmp_path / "a.npy", SCENE + 1j)
    with pytest.raises(ValueError, match="a.npy: complex values are not resampled; omit --resample_spacing"):
        opened(tmp_path, "1x1x1", spacing="1", resample_spacing="2", dynamic_range_db=40.0, reference_db="0")


# --- Frames ---


def save_frames(path, count, unit="unknown"):
    """Write `count` frames of the scene, in which frame k is the scene plus k; return them [T x D x H x W]."""
    frames = np.stack([SCENE // 2 + k for k in range(count)])
    image = nibabel.Nifti1Image(np.moveaxis(frames, 0, -1)[::-1], np.diag([-1.0, 1, 1, 1]))
    image.header.set_xyzt_units("mm", unit)
    nibabel.save(image, path)
    return frames


@pytest.mark.parametrize("name", ["mr_a.nii", "mr_a.nii.gz"])
def test_each_frame_of_a_file_is_an_item(tmp_path, name):
    frames = save_frames(tmp_path / name, 6, "sec")
    np.save(tmp_path / "ct_b.npy", SCENE)
    volumes = opened(tmp_path, "5x6x4", crop="grid", frames="all")
    assert volumes.names == [f"ct_b.npy[0,0,{k}]" for k in (0, 3)] + [f"{name}[{t}][0,0,{k}]" for t in range(6)
                                                                      for k in (0, 3)]
    assert volumes.labels.tolist() == [0] * 2 + [1] * 12 and volumes.shape == (1, 5, 6, 4)
    assert all(np.array_equal(volumes.read(2 + 2 * t)[0] * 255, frames[t][..., :4]) for t in range(6))
    assert volumes.preprocessing["frames"] == "all" and np.array_equal(volumes.read_volume(1)[0] * 255, frames[0])
    first = opened(tmp_path, "5x6x7", frames="first")
    assert first.names == ["ct_b.npy", name] and np.array_equal(first.read(1)[0] * 255, frames[0])


def test_frames_are_resampled(tmp_path):
    frames = save_frames(tmp_path / "a.nii.gz", 5)
    volumes = opened(tmp_path, "5x6x7", crop="none", frames="all", resample_spacing="1,1,1.0")
    assert np.array_equal(volumes.read(4)[0] * 255, frames[4])
    finer = opened(tmp_path, "10x6x7", crop="none", frames="all", resample_spacing="0.5,1,1")
    difference = finer.batch([4]) - finer.batch([1])
    assert len(finer) == 5 and torch.allclose(difference * 255, torch.tensor(3.0), atol=1e-3)


def test_few_volumes_are_channels_unless_they_are_timed(tmp_path):
    frames = save_frames(tmp_path / "a.nii", 3)
    volumes = opened(tmp_path, "5x6x7")
    assert volumes.shape == (3, 5, 6, 7) and np.array_equal(volumes.read(0) * 255, frames)
    assert "frames" not in volumes.preprocessing    # as in earlier caches
    save_frames(tmp_path / "a.nii", 3, "msec")
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.nii: cannot be read .*, got 3 volumes of a series in time; "
                                         "set --frames all to read each of them as an item, or --frames first.;"):
        opened(tmp_path, "5x6x7")
    assert opened(tmp_path, "5x6x7", frames="channels").shape == (3, 5, 6, 7)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.npy"])
def test_many_volumes_in_a_file_require_the_flag(tmp_path, name):
    frames = save_frames(tmp_path / "a.nii.gz", 5)
    if name == "a.npy":
        np.save(tmp_path / name, frames)
        (tmp_path / "a.nii.gz").unlink()
    for setting in ("", "channels"):
        with pytest.raises(ValueError, match=f"^{tmp_path}/{name}: .* got 5 volumes; set --frames all to read each"):
            opened(tmp_path, "5x6x7", frames=setting)
    assert len(opened(tmp_path, "5x6x7", frames="all")) == 5


@pytest.mark.parametrize("shape, channels", [((5, 6, 7, 1), 1), ((5, 6, 7, 1, 3), 3), ((5, 6, 7, 1, 1), 1)])
@pytest.mark.parametrize("frames", ["", "all"])
def test_fifth_axis_of_a_nifti_are_channels(tmp_path, shape, channels, frames):
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, tmp_path / "a.nii")
    volumes = opened(tmp_path, "5x6x7", frames=frames)
    expected = np.moveaxis(values.reshape(5, 6, 7, channels), -1, 0)
    assert len(volumes) == 1 and np.array_equal(volumes.read(0) * 255, expected)


def test_a_nifti_of_frames_with_channels_or_colors_is_rejected(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 2, 3), np.uint8), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(ValueError, match="a.nii: cannot be read .*expected one axis after the first three, got 2"):
        opened(tmp_path, "4x4x4", frames="all")
    colors = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colors, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(ValueError, match="a.nii: cannot be read .*expected numbers, got colors"):
        opened(tmp_path, "4x4x4")


# --- DICOM, NRRD and MetaImage ---


@pytest.fixture
def itk():
    return pytest.importorskip("SimpleITK")


def itk_image(itk, values, code="RAS", spacing=(1, 1, 1)):
    """Return a SimpleITK image of values in the order R, A, S (x channels), stored in the directions `code`."""
    image = nibabel.Nifti1Image(values, np.diag([*spacing, 1.0]))
    stored = image.as_reoriented(nibabel.orientations.axcodes2ornt(code))
    matrix = np.diag([-1, -1, 1]) @ stored.affine[:3, :3]
    found = itk.GetImageFromArray(np.swapaxes(np.asarray(stored.dataobj), 0, 2), isVector=values.ndim == 4)
    found.SetSpacing(np.linalg.norm(matrix, axis=0).tolist())
    found.SetDirection((matrix / np.linalg.norm(matrix, axis=0)).flatten().tolist())
    return found


def save_series(itk, folder, values, code="RAS", spacing=(1.0, 1.0, 1.0), positions=None, series="1.2.3", intercept=0):
    """Write values [R x A x S] as DICOM slices in the directions `code`, the names of files in a random order."""
    folder.mkdir(exist_ok=True, parents=True)
    image = itk_image(itk, values.astype(np.int16), code, spacing)
    matrix = np.reshape(image.GetDirection(), (3, 3))
    writer = itk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(image.GetDepth()):
        position = k * image.GetSpacing()[2] if positions is None else positions[k]
        part = image[:, :, k]
        plane = itk.GetImageFromArray(itk.GetArrayFromImage(part)[None])    # the writer subtracts the intercept
        plane.SetSpacing((*image.GetSpacing()[:2], 9.0))    # the thickness of a slice is not their distance
        tags = {"0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0018": f"{series}.{k}", "0020|000e": series,
                "0020|000d": "1.2", "0008|0060": "CT", "0020|0013": "1", "0028|1052": str(intercept), "0028|1053": "1",
                "0020|0032": "\\".join(f"{v:g}" for v in matrix[:, 2] * position),
                "0020|0037": "\\".join(f"{v:g}" for v in (*matrix[:, 0], *matrix[:, 1])),
                "0018|0050": "9"}
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}_{(7 * k + 3) % 11:02d}.dcm"))
        encoding = locale.setlocale(locale.LC_CTYPE)
        writer.Execute(plane)
        locale.setlocale(locale.LC_CTYPE, encoding)     # which the writer changes


@pytest.mark.parametrize("name", ["nrrd", "mha", "mhd", "gz.nrrd", "gz.mha", "gz.mhd"])
@pytest.mark.parametrize("code", ["RAS", "LAS", "LPI", "PIR"])
def test_formats_of_itk_agree_with_nifti(itk, tmp_path, name, code):
    itk.WriteImage(itk_image(itk, SCENE, code, (2, 3, 4)), str(tmp_path / f"a.{name}"), name.startswith("gz"))
    save_nifti(tmp_path / "b.nii", SCENE, "PIR", (2, 3, 4))
    volumes = opened(tmp_path, "5x6x7", crop="none")
    assert len(volumes) == 2 and volumes.spacings == [pytest.approx((2, 3, 4))] * 2 and not volumes.notes
    assert all(np.array_equal(volumes.read(i)[0] * 255, SCENE) for i in range(2)) and volumes.kinds == {"uint8": 2}
    patches = opened(tmp_path, "2x2x2", crop="grid")
    assert len(patches) == 2 * 3 * 3 * 4 and torch.equal(patches.batch(range(36)), patches.batch(range(36, 72)))


def test_headers_of_volumes_are_read_again_only_if_a_file_changes(itk, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "INDEX_MINIMUM", 10)   # as many as slices
    folder, read, header = tmp_path / "data", [], volume_folders.read_header
    monkeypatch.setattr(volume_folders, "read_header", lambda path, **kw: read.append(path) or header(path, **kw))
    save_series(itk, folder / "a", SCENE, "LPI", (2.0, 3.0, 4.0))
    itk.WriteImage(itk_image(itk, SCENE.astype(np.int16), "PIR", (2, 3, 4)), str(folder / "b.mhd"))
    save_nifti(folder / "c.nii.gz", SCENE.astype(np.int16), "LAS", (2, 3, 4))
    np.save(folder / "d.npy", SCENE.astype(np.int16))
    first = opened(folder, "5x6x7")
    assert len(read) == 4
    again = opened(folder, "5x6x7")
    assert len(read) == 4 and torch.equal(again.batch(range(4)), first.batch(range(4)))
    assert (again.spacings, again.notes, again.preprocessing) == (first.spacings, first.notes, first.preprocessing)
    for path in (folder / "a" / sorted(os.listdir(folder / "a"))[3], folder / "b.raw"):
        os.utime(path)
        read.clear()
        opened(folder, "5x6x7")
        assert len(read) == 4


def test_data_files_of_headers_are_not_left_out(itk, tmp_path):
    for name in "ab":
        itk.WriteImage(itk_image(itk, SCENE), str(tmp_path / f"{name}.mhd"))
    volumes = open_folder(DataConfig(str(tmp_path), "5x6x7"))
    assert len(volumes) == 2 and volumes.ignored == 0 and volumes.left_out == {}
    (tmp_path / "c.raw").write_bytes(b"")
    assert open_folder(DataConfig(str(tmp_path), "5x6x7")).left_out == {"raw": 1}
    (tmp_path / "b.raw").write_bytes(SCENE[::-1].tobytes("F"))
    changed = open_folder(DataConfig(str(tmp_path), "5x6x7"))
    assert changed.fingerprint != volumes.fingerprint and np.array_equal(changed.read(1)[0] * 255, SCENE[::-1])


def test_channels_and_frames_of_itk(itk, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)
    itk.WriteImage(itk_image(itk, values.swapaxes(0, 2).swapaxes(0, 2)), str(tmp_path / "a.nrrd"))
    volumes = opened(tmp_path, "5x6x7")
    assert np.array_equal(volumes.read(0) * 255, np.moveaxis(values, -1, 0))
    (tmp_path / "a.nrrd").unlink()
    frames = np.stack([SCENE // 2 + k for k in range(5)])
    itk.WriteImage(itk.GetImageFromArray(frames.transpose(0, 3, 2, 1), isVector=False), str(tmp_path / "a.mha"))
    volumes = opened(tmp_path, "5x6x7", frames="all", orientation="LPS")
    assert len(volumes) == 5 and np.array_equal(volumes.read(3)[0] * 255, frames[3])
    with pytest.raises(ValueError, match="a.mha: cannot be read .*got 5 volumes; set --frames all"):
        opened(tmp_path, "5x6x7")


def test_an_nrrd_without_a_space_states_no_directions(itk, tmp_path):
    header = b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 5 6 7\nencoding: raw\n\n"
    (tmp_path / "a.nrrd").write_bytes(header + SCENE.tobytes("F"))
    save_nifti(tmp_path / "b.nii", SCENE, "LAS")
    volumes = opened(tmp_path, "5x6x7")
    assert all(np.array_equal(volumes.read(i)[0] * 255, SCENE) for i in range(2))
    assert "1 of 2 volumes state no directions" in volumes.notes[0]


@pytest.mark.parametrize("code", ["LPS", "RAS", "PIR", "SLA"])
@pytest.mark.parametrize("intercept", [0, -1000])
def test_a_dicom_series_is_one_volume(itk, tmp_path, code, intercept):
    values = SCENE.astype(np.int16) * 8 - 1000
    save_series(itk, tmp_path / "ct_1", values, code, (2.0, 3.0, 4.0), intercept=intercept)
    save_series(itk, tmp_path / "mr" / "x_2", values, "RAS", (2.0, 3.0, 4.0))
    save_nifti(tmp_path / "mr" / "y_3.nii", values, "LAS", (2, 3, 4))
    stored = (tmp_path / "ct_1" / "1.2.3_03.dcm").read_bytes()[-40:]
    assert (np.frombuffer(stored, "<i2").min() >= 0) == (intercept != 0)
    volumes = opened(tmp_path, "5x6x7", crop="none", value_range="-1000,1040")
    assert volumes.names == ["ct_1", "mr/x_2", "mr/y_3.nii"] and volumes.ignored == 0 and volumes.left_out == {}
    assert volumes.spacings == [pytest.approx((2, 3, 4))] * 3 and not volumes.notes
    for i in range(3):
        np.testing.assert_array_equal(np.rint(volumes.read(i)[0] * 2040 - 1000), values)


def test_the_folder_itself_may_be_a_series(itk, tmp_path):
    save_series(itk, tmp_path / "scan", SCENE)
    for folder in (f"{tmp_path}/scan", f"{tmp_path}/scan/"):
        volumes = opened(folder, "5x6x7", value_range="0,255")
        assert volumes.names == ["scan"] and np.array_equal(np.rint(volumes.read(0)[0] * 255), SCENE)


def test_a_dicom_file_of_several_frames_is_a_volume(itk, tmp_path):
    for name in "ab":
        itk.WriteImage(itk_image(itk, SCENE, "LPS", (2, 3, 4)), str(tmp_path / f"{name}.dcm"))
    volumes = opened(tmp_path, "5x6x7", crop="none")
    assert volumes.names == ["a.dcm", "b.dcm"]
    assert all(np.array_equal(volumes.read(i)[0] * 255, SCENE) for i in range(2))


def test_oblique_series_have_the_nearest_directions(itk, tmp_path):
    image = itk_image(itk, SCENE, "LPS", (2, 3, 4))
    image.SetDirection(turned(10).flatten().tolist())
    itk.WriteImage(image, str(tmp_path / "a.mha"))
    volumes = opened(tmp_path, "5x6x7")
    assert np.array_equal(volumes.read(0)[0] * 255, SCENE) and "up to 10.0 degrees" in volumes.notes[0]


@pytest.mark.parametrize("make, match", [
    (lambda itk, f: save_series(itk, f, SCENE, positions=[0, 1, 2, 4, 5, 6, 7]),
     r"/s/1.2.3_02.dcm is 2 mm from .*/s/1.2.3_06.dcm: expected 1 mm, the median of the series; add the missing"),
    (lambda itk, f: save_series(itk, f, SCENE, positions=[0, 1, 2, 2, 3, 4, 5]),
     r"/s/1.2.3_0\d.dcm has the position of .*/s/1.2.3_0\d.dcm: expected one slice per position"),
    (lambda itk, f: (save_series(itk, f, SCENE), save_series(itk, f, SCENE, series="1.2.4")),
     r"/s/1.2.4_\d\d.dcm: expected the series of .*/s/1.2.3_\d\d.dcm, 1.2.3, got 1.2.4; put each series into"),
    (lambda itk, f: (save_series(itk, f, SCENE), save_series(itk, f.with_name("t"), SCENE[:4]),
                     (f.with_name("t") / "1.2.3_03.dcm").rename(f / "1.2.3_03.dcm")),
     r"/s/1.2.3_03.dcm: expected the size of .*/s/1.2.3_01.dcm, .5, 6, 1, 1., got .4, 6, 1, 1.; put each"),
    (lambda itk, f: (save_series(itk, f, SCENE), (f / "1.2.3_03.dcm").write_bytes(b"no image")),
     r"/s/1.2.3_03.dcm: cannot be read .*; fix or remove the file"),
    (lambda itk, f: (save_series(itk, f, SCENE), (f / "1.2.3_10.dcm").write_bytes(b"")),
     r"/s/1.2.3_10.dcm: cannot be read .*; fix or remove the file"),
])
def test_faulty_series_are_rejected(itk, tmp_path, make, match):
    make(itk, tmp_path / "s")
    with pytest.raises(ValueError, match=f"^{tmp_path}{match}"):
        opened(tmp_path, "2x2x2", value_range="0,255")


def test_faulty_files_of_itk_are_read_by_one_thread_at_a_time(itk, tmp_path):
    """Its NRRD reader crashes otherwise."""
    path = tmp_path / "a.nrrd"
    path.write_bytes(b"no image")

    def read(_):
        with pytest.raises(ValueError, match=f"^{path}: cannot be read .*couldn't parse"):
            volume_folders.read_header(str(path))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(300)))


def test_changed_slices_are_another_series(itk, tmp_path):
    save_series(itk, tmp_path / "s", SCENE)
    before = opened(tmp_path, "5x6x7", value_range="0,255")
    assert np.array_equal(np.rint(before.read(0)[0] * 255), SCENE)
    save_series(itk, tmp_path / "s", SCENE[::-1])
    after = opened(tmp_path, "5x6x7", value_range="0,255")
    assert np.array_equal(np.rint(after.read(0)[0] * 255), SCENE[::-1]) and after.fingerprint != before.fingerprint


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "c.nrrd", "c.mha", "a.dcm"])
def test_truncated_files_of_itk_are_errors_with_the_name(itk, tmp_path, name, capfd):
    path = tmp_path / name
    itk.WriteImage(itk_image(itk, SCENE), str(path), name.startswith("c"))
    content = path.read_bytes()
    for end in (0, 10, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=f"^{path}: cannot be read .*; fix or remove the file$"):
            opened(tmp_path, "5x6x7").read(0)


def test_changed_bits_of_compressed_files_of_itk_never_give_other_voxels(itk, tmp_path):
    unchanged = 0
    for name in ("c.nrrd", "c.mha", "c.mhd"):
        path = tmp_path / name
        itk.WriteImage(itk_image(itk, SCENE), str(path), True)
        data = next(tmp_path.glob("c.zraw"), path)
        content = data.read_bytes()
        for position in np.random.default_rng(0).choice(8 * 200, 40, replace=False):
            changed = bytearray(content)
            changed[-1 - position // 8] ^= 1 << position % 8
            data.write_bytes(changed)
            volume_folders._recent.clear()
            try:
                assert np.array_equal(opened(tmp_path, "5x6x7").read(0)[0] * 255, SCENE), f"{name} {position}"
                unchanged += 1
            except ValueError as error:
                assert str(error).startswith(f"{path}: cannot be read (")
        path.unlink()
    assert unchanged < 20   # e.g. in the length at the end of a gzip stream


@pytest.mark.parametrize("name, content, match", [
    ("a.nrrd", b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2000 3000 4000\nencoding: gzip\n\n",
     "24000000000 pixels: expected at most --max_pixels 536870912"),
    ("a.nrrd", b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 200 300 400\nencoding: gzip\n\n",
     "24000000 pixels of 8 bits, more than [0-9]+ bytes can contain"),
    ("a.nrrd", b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 3 4\ndata file: /etc/passwd\nencoding: raw\n\n",
     "expected values in the same file, got the name of another one"),
    ("a.mhd", b"NDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\nElementDataFile = ../b.raw\n",
     "ElementDataFile ../b.raw: expected LOCAL or the name of one file in the same folder"),
    ("a.mhd", b"NDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\nElementDataFile = LIST\nx.raw\n",
     "ElementDataFile LIST: expected LOCAL or the name of one file in the same folder"),
    ("a.mhd", b"NDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\nElementDataFile = b.raw\n", "No such file"),
    ("a.mha", b"NDims = 2\nDimSize = 2 3\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n......",
     "expected 3 or 4 axes, got 2"),
])
def test_headers_of_itk_are_checked_before_values_are_read(itk, tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{name}: cannot be read .*{match}.*; fix or remove the file$"):
        opened(tmp_path, "2x2x2")


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.dcm"])
def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    (tmp_path / name).write_bytes(b"values")
    with pytest.raises(ImportError, match=rf"{name} requires SimpleITK: pip install 'guided-diffusion-vae\[medical\]'"):
        opened(tmp_path, "2x2x2")


def test_an_old_cache_of_other_directions_is_named(tmp_path):
    """The autoencoder records no preprocessing, so that the default of today differs from what version 0.2 did."""
    folder, codec = tmp_path / "volumes", PixelCodec(1, dims=3)
    folder.mkdir()
    save_nifti(folder / "a.nii", np.tile(SCENE, (2, 2, 2))[:8, :8, :8], "LPS")
    cache = LatentCacheConfig(cache_dir=str(tmp_path / "cache"))
    for _ in range(2):      # written, then verified
        write_cache(opened(folder, orientation=""), codec, cache)
    with pytest.raises(ValueError, match="contains a cache of other images or settings .*; orientation is 'RAS' now, "
                                         "'' in the cache.; choose another"):
        write_cache(opened(folder), codec, cache)


@pytest.mark.parametrize("kind, high, warned", [(np.int16, 3000, True), (np.int16, 20000, False),
                                                (np.uint16, 4000, True), (np.uint8, 3, False)])
def test_volumes_that_fill_a_small_part_of_16_bits_are_logged(tmp_path, kind, high, warned):
    for i in range(2):
        np.save(tmp_path / f"a_{i}.npy", np.linspace(0, high, 512).reshape(8, 8, 8).astype(kind))
    notes = VolumeFolder(DataConfig(str(tmp_path), image_size="8x8x8")).warnings()
    assert len(notes) == warned
    if warned:
        assert re.match(r"values reach from [\d,]+ to [\d,]+, and -?[\d,]+ to [\d,]+ become 0 to 1: set --value_window",
                        notes[0])
        assert not VolumeFolder(DataConfig(str(tmp_path), image_size="8x8x8", value_window="0,3000")).warnings()
