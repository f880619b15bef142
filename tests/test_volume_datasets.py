import dataclasses
import gzip
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guided_diffusion_vae.data import npz, volume_folders
from guided_diffusion_vae.data import (
    BatchPlan, DataConfig, ImageFolder, VolumeFolder, ImageStream, open_folder, unpad, write_nifti,
)
from guided_diffusion_vae.data.volume_folders import _values

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


def opened(folder, size="8x8x8", **fields):
    return VolumeFolder(DataConfig(str(folder), size, **fields))


def test_volumes_of_all_formats_have_classes_and_spacing(folder):
    volumes = opened(folder)
    assert len(volumes) == 3 and volumes.shape == (1, 8, 8, 8) and volumes.ignored == 1
    assert volumes.names == ["ct_0.npy", "mr_1.npz", "mr_2.nii.gz"] and volumes.class_names == ["ct", "mr"]
    assert volumes.labels.tolist() == [0, 1, 1] and volumes.kinds == {"uint16": 3}
    assert volumes.spacings[2] == (2.0, 1.5, 1.5) and volumes.spacing == (1.0, 1.0, 1.0)
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
    assert isinstance(_values(str(tmp_path / "a.npy")).base, np.memmap)


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
                _values(str(path))
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
    assert isinstance(_values(str(tmp_path / "b_0.npz")).base, np.memmap)
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
    volumes = opened(folder, random_flip=True, voxel_size=(8, 8, 8), crop="grid")
    assert set(volumes.describe()) == fields | set(volumes.preprocessing)
    not_hashed = {"data_dir", "max_pixels", "random_flip", "label_column", "allow_ignored", "verify_data"}
    assert set(volumes.preprocessing) == {f.name for f in dataclasses.fields(DataConfig)} - not_hashed
    expected = {"image_size": "8x8x8", "voxel_size": [], "spacing": "1,1,1", "files": 3, "random_flip": True}
    assert {name: volumes.describe()[name] for name in expected} == expected
    assert len(volumes) > 3 and volumes.describe()["shape"] == [1, 8, 8, 8]
