"""Read NIfTI files, with the directions and the voxel spacing that they state, and write volumes as NIfTI."""

import gzip
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..config import require
from ..files import check_array_size, check_size, file_extension, read_to_end

_MILLIMETERS = {"meter": 1e3, "micron": 1e-3}


class VolumeHeader(NamedTuple):
    """The statements of a volume file, read without its values.

    :param sides: size per axis.
    :param dtype: name of the type of the values.
    :param spacing: voxel spacing per axis in mm, None if the file states none.
    :param directions: [3 x 3], whose column k is the step along axis k toward right, anterior and superior; None if the
        file states none.
    """

    channels: int
    sides: tuple
    dtype: str
    spacing: tuple | None = None
    directions: np.ndarray | None = None


def with_channels(shape):
    """Return the shape [C x D x H x W] for a stored shape.

    :raises ValueError: if it is neither [D x H x W] nor [C x D x H x W].
    """
    require((len(shape) == 3 or len(shape) == 4 and shape[0] <= 4,
             f"shape {tuple(shape)}: expected [D x H x W] or [C x D x H x W] with up to 4 channels"))
    return (1, *shape) if len(shape) == 3 else tuple(shape)


# --- Directions ---


def axis_codes(path, directions):
    """Return the directions in which the axes of a file increase as three letters such as RAS, the nearest if oblique.

    :raises ValueError: if its axes do not span the space.
    """
    orientations = import_nibabel(path).orientations
    return "".join(orientations.ornt2axcodes(_orientation(path, directions)))


def align_axes(path, directions, code):
    """Return ((stored axis, step 1 or -1) for each of the axes D, H, W) that bring a file to the directions `code`."""
    orientations = import_nibabel(path).orientations
    transform = orientations.ornt_transform(_orientation(path, directions), orientations.axcodes2ornt(code))
    return tuple((int(axis), int(transform[axis, 1])) for axis in np.argsort(transform[:, 0]))


def _orientation(path, directions):
    require((np.isfinite(directions).all() and np.linalg.matrix_rank(directions) == 3,
             f"{path}: expected the directions of three axes that span the space, got {directions.tolist()}; fix the "
             "affine of its header, or set --orientation \"\" to read all files as stored"))
    affine = np.eye(4)
    affine[:3, :3] = directions
    return import_nibabel(path).orientations.io_orientation(affine)


def tilt_degrees(directions):
    """Return the largest angle in degrees between an axis and the nearest of the three directions."""
    cosines = np.abs(directions / np.linalg.norm(directions, axis=0)).max(0)
    return float(np.degrees(np.arccos(cosines.clip(0, 1))).max())


def orient(values, axes):
    """Return values [C x D x H x W] with their spatial axes permuted and flipped as `align_axes` says, as a view."""
    order = [axis + 1 for axis, _ in axes]
    return values.transpose(0, *order)[(slice(None), *(slice(None, None, step) for _, step in axes))]


# --- NIfTI ---


def import_nibabel(path):
    """Return the module nibabel.

    :raises ImportError: if it is not installed (the extra `volumes`).
    """
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"{path} requires nibabel: pip install 'guided-diffusion-vae[volumes]'") from error
    return nibabel


def open_nifti(path, max_pixels):
    """Return the nibabel image of a NIfTI file, whose values are not read, after checking its number of voxels."""
    nibabel = import_nibabel(path)
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise ValueError(str(error)) from error
    size, dtype, shape = os.path.getsize(path), image.get_data_dtype(), [int(n) for n in image.shape]
    require((min(shape, default=0) > 0, f"expected a shape of numbers above 0, got {tuple(shape)}"))
    if file_extension(path) == "gz":
        check_size(math.prod(shape), 8 * dtype.itemsize, size, max_pixels)
    else:
        check_array_size(shape, dtype, size - int(image.dataobj.offset))
    return image


def nifti_header(path, max_pixels):
    """Return the `VolumeHeader` of a NIfTI file."""
    image = open_nifti(path, max_pixels)
    spacing = tuple(float(s) for s in image.header.get_zooms()[:3])
    require((all(map(math.isfinite, spacing)), f"expected a finite voxel spacing, got {spacing}"))
    channels, *sides = with_channels((*image.shape[3:], *image.shape[:3]))
    if min(spacing) <= 0:   # as good as none
        spacing = None
    scale = _MILLIMETERS.get(image.header.get_xyzt_units()[0], 1)
    # Without a code a header states sizes only; nibabel assumes that the first axis runs to the left.
    stated = any(int(image.header[code]) for code in ("sform_code", "qform_code"))
    return VolumeHeader(channels, tuple(sides), str(_scaled_dtype(image)),
                        spacing and tuple(scale * s for s in spacing),
                        scale * image.affine[:3, :3] if stated else None)


def _scaled_dtype(image):
    """Return the type of the values of a NIfTI image: a slope and an intercept turn stored integers into float32."""
    unscaled = (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    return image.get_data_dtype() if unscaled else np.dtype(np.float32)


def load_nifti(path, max_pixels):
    """Return the values of a NIfTI file, channels first."""
    image = open_nifti(path, max_pixels)
    if file_extension(path) == "gz":
        image, values = _gzipped_values(path, type(image))
    else:
        values = np.asarray(image.dataobj)
    values = values.astype(_scaled_dtype(image), copy=False)
    return values if values.ndim == 3 else np.moveaxis(values, -1, 0)


def _gzipped_values(path, kind):
    """Return the image of class `kind` in a .nii.gz and its values; the stream is read to its checksum at the end."""
    nibabel = import_nibabel(path)
    with gzip.open(path) as stream:
        image = kind.from_file_map({"image": nibabel.FileHolder(fileobj=stream)})
        values = np.asarray(image.dataobj)
        read_to_end(stream)
    return image, values


def write_nifti(path, volume: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0), orientation: str = "RAS") -> None:
    """Write a volume [D x H x W] or [C x D x H x W] as .nii.gz, with the axes that `VolumeFolder` reads.

    :param spacing: voxel spacing per axis in mm.
    :param orientation: directions in which the axes increase.
    :raises ImportError: if nibabel is not installed (the extra `volumes`).
    """
    nibabel = import_nibabel(path)
    if volume.ndim == 4:
        volume = volume[0] if len(volume) == 1 else np.moveaxis(volume, 0, -1)
    affine = np.eye(4)
    for axis, (direction, sign) in enumerate(nibabel.orientations.axcodes2ornt(orientation)):
        affine[:3, axis] = sign * spacing[axis] * np.eye(3)[int(direction)]
    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
