"""Read NIfTI, DICOM, NRRD and MetaImage files with the directions and spacing that they state, and write NIfTI."""

import collections
import contextlib
import gzip
import math
import os
import threading
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..config import require, to_tuple
from ..files import (
    check_array_size, check_size, file_errors, file_extension, hash_lines, read_to_end, require_regular_file,
)

_MILLIMETERS = {"meter": 1e3, "micron": 1e-3}
_SECONDS = "sec", "msec", "usec"    # units of the fourth axis of a NIfTI file
_READERS = {"dcm": "GDCMImageIO", "nrrd": "NrrdImageIO", "mha": "MetaImageIO", "mhd": "MetaImageIO"}    # of SimpleITK
_RAS = np.diag([-1.0, -1.0, 1.0])   # from the axes of ITK and DICOM, which run to the left, posterior and superior
_itk_lock = threading.Lock()
_GAP = 0.01     # by which distances of slices may differ, as a part of them and in mm


class VolumeHeader(NamedTuple):
    """The statements of a volume file, read without its values.

    :param frames: number of volumes in the file.
    :param sides: size per axis.
    :param dtype: name of the type of the values.
    :param spacing: voxel spacing per axis in mm, None if the file states none.
    :param directions: rows of a matrix [3 x 3], whose column k is the step along axis k toward right, anterior and
        superior; None if the file states none.
    """

    channels: int
    sides: tuple
    dtype: str
    spacing: tuple | None = None
    directions: tuple | None = None
    frames: int = 1


def split_frames(shape, frames="", is_timed=False):
    """Return (number of volumes, channels, *sides) for a stored shape [D x H x W] or [N x D x H x W].

    :param frames: --frames; empty: N are channels if there are up to 4 and they are not timed.
    :raises ValueError: if N are too many for channels, or neither channels nor frames are known.
    """
    expected = f"shape {tuple(shape)}: expected [D x H x W] or [C x D x H x W] with up to 4 channels"
    require((len(shape) in (3, 4), expected))
    number, sides = (1 if len(shape) == 3 else shape[0]), shape[-3:]
    if frames in ("all", "first") or number == 1:
        return (number if frames == "all" else 1, 1, *sides)
    require((number <= 4 and (frames or not is_timed),
             f"{expected}, got {number} volumes{' of a series in time' if is_timed else ''}; set --frames all to read "
             "each of them as an item, or --frames first"))
    return (1, number, *sides)


def is_medical(path):
    """Return whether a path is read here: a NIfTI, DICOM, NRRD or MetaImage file, or the folder of a DICOM series."""
    return path.endswith("/") or file_extension(path) in ("nii", "gz", *_READERS)


def read_medical_header(path, max_pixels, frames=""):
    """Return the `VolumeHeader` of a path of `is_medical`.

    :raises ValueError: if it cannot be read, or describes more than `max_pixels` or than the file can contain.
    """
    if path.endswith("/"):
        return _Series(path, max_pixels).header
    return (_itk_header if file_extension(path) in _READERS else _nifti_header)(path, max_pixels, frames)


def load_medical(path, max_pixels):
    """Return the values of a path of `is_medical`, [D x H x W] or [N x D x H x W], memory-mapped if possible."""
    if path.endswith("/"):
        return _Series(path, max_pixels).load()
    return (_load_itk if file_extension(path) in _READERS else _load_nifti)(path, max_pixels)


def path_stamp(path, stamp):
    """Return the stamps of the files of a volume as text; `stamp` is the function of a file."""
    if path.endswith("/"):
        return hash_lines(f"{name} {stamp(name)}" for name in _slices(path))
    data = _meta_data_file(path) if file_extension(path) == "mhd" else path
    return stamp(path) if data == path else f"{stamp(path)} {stamp(data)}"


# --- Directions ---


def axis_codes(path, directions):
    """Return the directions in which the axes of a file increase as three letters such as RAS, the nearest if oblique.

    :raises ValueError: if its axes do not span the space.
    """
    orientations = _import_nibabel(path).orientations
    return "".join(orientations.ornt2axcodes(_orientation(path, directions)))


def align_axes(path, directions, code):
    """Return ((stored axis, step 1 or -1) for each of the axes D, H, W) that bring a file to the directions `code`."""
    orientations = _import_nibabel(path).orientations
    transform = orientations.ornt_transform(_orientation(path, directions), orientations.axcodes2ornt(code))
    return tuple((int(axis), int(transform[axis, 1])) for axis in np.argsort(transform[:, 0]))


def _orientation(path, directions):
    directions = np.array(directions)
    require((np.isfinite(directions).all() and np.linalg.matrix_rank(directions) == 3,
             f"{path}: expected the directions of three axes that span the space, got {directions.tolist()}; fix the "
             "affine of its header, or set --orientation \"\" to read all files as stored"))
    affine = np.eye(4)
    affine[:3, :3] = directions
    return _import_nibabel(path).orientations.io_orientation(affine)


def tilt_degrees(directions):
    """Return the largest angle in degrees between an axis and the nearest of the three directions."""
    cosines = np.abs(np.array(directions) / np.linalg.norm(directions, axis=0)).max(0)
    return float(np.degrees(np.arccos(cosines.clip(0, 1))).max())


def orient(values, axes):
    """Return values [C x D x H x W] with their spatial axes permuted and flipped as `align_axes` says, as a view."""
    order = [axis + 1 for axis, _ in axes]
    return values.transpose(0, *order)[(slice(None), *(slice(None, None, step) for _, step in axes))]


# --- NIfTI ---


def _import_nibabel(path):
    """Return the module nibabel.

    :raises ImportError: if it is not installed (the extra `volumes`).
    """
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"{path} requires nibabel: pip install 'guided-diffusion-vae[volumes]'") from error
    return nibabel


def _open_nifti(path, max_pixels):
    """Return the nibabel image of a NIfTI file, whose values are not read, after checking its number of voxels."""
    nibabel = _import_nibabel(path)
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


def _nifti_header(path, max_pixels, frames):
    image = _open_nifti(path, max_pixels)
    spacing = tuple(float(s) for s in image.header.get_zooms()[:3])
    require((all(map(math.isfinite, spacing)), f"expected a finite voxel spacing, got {spacing}"),
            (image.get_data_dtype().names is None, "expected numbers, got colors; save them as a fourth axis"))
    space, time = image.header.get_xyzt_units()
    is_timed = time in _SECONDS and len(image.shape) == 4
    count, channels, *sides = split_frames(_frames_first(image.shape), frames if len(image.shape) < 5 else "channels",
                                           is_timed)
    scale = _MILLIMETERS.get(space, 1)
    # Without a code a header states sizes only; nibabel assumes that the first axis runs to the left.
    stated = any(int(image.header[code]) for code in ("sform_code", "qform_code"))
    return VolumeHeader(channels, tuple(sides), str(_scaled_dtype(image)),
                        tuple(scale * s for s in spacing) if min(spacing) > 0 else None,
                        to_tuple((scale * image.affine[:3, :3]).tolist()) if stated else None, count)


def _frames_first(shape):
    """Return the shape [N x D x H x W] of a NIfTI shape, whose fourth and fifth axes are time and channels.

    :raises ValueError: if it has both.
    """
    more = [n for n in shape[3:] if n > 1]
    require((len(more) < 2, f"shape {tuple(shape)}: expected one axis after the first three, got {len(more)}"))
    return (*(more or [1] * (len(shape) > 3)), *shape[:3])


def _scaled_dtype(image):
    """Return the type of the values of a NIfTI image: a slope and an intercept turn stored integers into float32."""
    unscaled = (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    return image.get_data_dtype() if unscaled else np.dtype(np.float32)


def _load_nifti(path, max_pixels):
    image = _open_nifti(path, max_pixels)
    if file_extension(path) == "gz":
        image, values = _gzipped_values(path, type(image))
    else:
        values = np.asarray(image.dataobj)
    values = values.astype(_scaled_dtype(image), copy=False)
    return values if values.ndim == 3 else np.moveaxis(values.reshape((*values.shape[:3], -1)), -1, 0)


def _gzipped_values(path, kind):
    """Return the image of class `kind` in a .nii.gz and its values; the stream is read to its checksum at the end."""
    nibabel = _import_nibabel(path)
    with gzip.open(path) as stream:
        image = kind.from_file_map({"image": nibabel.FileHolder(fileobj=stream)})
        values = np.asarray(image.dataobj)
        read_to_end(stream)
    return image, values


def voxel_affine(spacing: Sequence[float], orientation: str) -> np.ndarray:
    """Return the matrix float64 [4 x 4] from voxel indices to mm, whose axes increase to the right, front and top.

    :param spacing: voxel spacing per axis in mm.
    :param orientation: directions in which the axes of the volume increase, such as "RAS" or "LPS".
    """
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (step, letter) in enumerate(zip(spacing, orientation)):
        pair = next(pair for pair in ("LR", "PA", "IS") if letter in pair)
        affine[("LR", "PA", "IS").index(pair), axis] = step if letter == pair[1] else -step
    return affine


def write_nifti(path, volume: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0), orientation: str = "RAS") -> None:
    """Write a volume [D x H x W] or [C x D x H x W] as .nii.gz, with the axes that `VolumeFolder` reads.

    :param spacing: voxel spacing per axis in mm.
    :param orientation: directions in which the axes increase.
    :raises ImportError: if nibabel is not installed (the extra `volumes`).
    """
    nibabel = _import_nibabel(path)
    if volume.ndim == 4:
        volume = volume[0] if len(volume) == 1 else np.moveaxis(volume, 0, -1)
    image = nibabel.Nifti1Image(volume, voxel_affine(spacing, orientation))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


# --- Formats that SimpleITK reads ---


def _import_itk(path):
    try:
        import SimpleITK
    except ImportError as error:
        raise ImportError(f"{path} requires SimpleITK: pip install 'guided-diffusion-vae[medical]'") from error
    SimpleITK.ProcessObject.GlobalWarningDisplayOff()
    return SimpleITK


@contextlib.contextmanager
def _calling_itk():
    """Call SimpleITK from one thread at a time, as its NRRD reader crashes on two faulty files at once.

    :raises ValueError: with the last lines of an error of SimpleITK, which say what is wrong.
    """
    try:
        with _itk_lock:
            yield
    except RuntimeError as error:
        reason = " ".join(str(error).rpartition("ERROR: ")[2].split())
        raise ValueError(reason.partition("): ")[2] or reason) from error


def _open_itk(path, max_pixels):
    """Return (ImageFileReader with the header of a file, type of its values) after checking its number of voxels."""
    itk, extension = _import_itk(path), file_extension(path)
    require_regular_file(path)
    stored = path
    if extension in ("mha", "mhd"):
        stored = _meta_data_file(path)
    elif extension == "nrrd":
        _check_nrrd(path)
    reader = itk.ImageFileReader()
    reader.SetImageIO(_READERS[extension])
    reader.SetFileName(str(path))
    with _calling_itk():
        reader.ReadImageInformation()
    require((reader.GetDimension() in (3, 4), f"expected 3 or 4 axes, got {reader.GetDimension()}"))
    components = reader.GetNumberOfComponents()
    example = itk.Image([1, 1], reader.GetPixelID(), components)
    dtype = itk.GetArrayViewFromImage(example).dtype
    check_size(math.prod(reader.GetSize()) * components, 8 * dtype.itemsize, os.path.getsize(stored), max_pixels)
    return reader, dtype


def _itk_header(path, max_pixels, frames):
    with file_errors(path):
        reader, dtype = _open_itk(path, max_pixels)
        size, extra = reader.GetSize(), [reader.GetNumberOfComponents(), *reader.GetSize()[3:]]
        more = [n for n in extra if n > 1] or [1]
        require((len(more) == 1, f"expected channels or frames, got {more[0]} channels and {more[-1]} frames"))
        count, channels, *sides = split_frames((*more, *size[:3]), frames)
        spacing = reader.GetSpacing()[:3]
        stated = file_extension(path) != "nrrd" or reader.HasMetaDataKey("NRRD_space")
        return VolumeHeader(channels, tuple(sides), dtype.name, spacing, _directions(reader) if stated else None, count)


def _directions(reader):
    """Return the directions of a `VolumeHeader`."""
    axes = reader.GetDimension()
    directions = _RAS @ np.reshape(reader.GetDirection(), (axes, axes))[:3, :3] * reader.GetSpacing()[:3]
    return to_tuple(directions.tolist())


def _load_itk(path, max_pixels):
    with file_errors(path):
        reader, _ = _open_itk(path, max_pixels)
        if file_extension(path) in ("mha", "mhd"):
            _check_meta_data(path)
        with _calling_itk():
            image = reader.Execute()
        values = _import_itk(path).GetArrayFromImage(image)     # the last axis first, channels last
        if image.GetNumberOfComponentsPerPixel() > 1:
            return values.reshape(values.shape[-4:]).transpose(3, 2, 1, 0)
        return values.transpose(2, 1, 0) if values.ndim == 3 else values.transpose(0, 3, 2, 1)


def _check_nrrd(path):
    """Check that the values of an NRRD file are in the file itself."""
    with open(path, "rb") as stream:
        header = stream.read(2**16).partition(b"\n\n")[0].lower()
    require((b"\ndata file:" not in header and b"\ndatafile:" not in header,
             "expected values in the same file, got the name of another one; save it as one file"))


def _read_meta_header(path):
    """Return ({key: text}, position of the values) of a MetaImage header."""
    with open(path, "rb") as stream:
        head, found, rest = stream.read(2**16).partition(b"ElementDataFile")
        require((found, "expected ElementDataFile in the header, got none"))
    line = rest.partition(b"\n")[0]
    lines = [text.partition("=") for text in (head + found + line).decode("latin-1").splitlines()]
    return {key.strip(): value.strip() for key, _, value in lines}, len(head) + len(found) + len(line) + 1


def _meta_data_file(path):
    """Return the path of the values of a MetaImage: the file itself, or one beside it.

    :raises ValueError: if it is elsewhere, in several files, or no regular file.
    """
    name = _read_meta_header(path)[0]["ElementDataFile"]
    if name.upper() == "LOCAL":
        return path
    require((name == os.path.basename(name) and name.upper() not in ("", ".", "..", "LIST") and "%" not in name,
             f"ElementDataFile {name}: expected LOCAL or the name of one file in the same folder"))
    data = os.path.join(os.path.dirname(path), name)
    require_regular_file(data)
    return data


def data_files(paths):
    """Return the set of the files beside .mhd headers that contain their values."""
    found = set()
    for path in paths:
        if file_extension(path) == "mhd":
            with file_errors(path):
                found.add(_meta_data_file(path))
    return found - set(paths)


def _check_meta_data(path):
    """Compare compressed values of a MetaImage with their checksum, which ITK ignores."""
    header, start = _read_meta_header(path)
    if header.get("CompressedData", "").lower() != "true":
        return
    data = _meta_data_file(path)
    inflate = zlib.decompressobj()
    with open(data, "rb") as stream:
        stream.seek(start if data == path else 0)
        while not inflate.eof and (block := inflate.unconsumed_tail or stream.read(2**20)):
            inflate.decompress(block, 2**24)
    require((inflate.eof, "the compressed values are truncated"))


# --- DICOM series ---


def merge_series(paths, names):
    """Return (paths, names) with the slices of each DICOM series, the .dcm files of one folder, replaced by the folder.

    The path of a series ends with a slash. A file that is alone in its folder, and files of several frames, are volumes
    of their own.
    """
    slices = collections.Counter(os.path.dirname(path) for path in paths if file_extension(path) == "dcm")
    merged, is_series = {}, {}
    for path, name in zip(paths, names):
        folder = os.path.dirname(path)
        if file_extension(path) == "dcm" and slices[folder] > 1:
            if folder not in is_series:
                with file_errors(path):
                    is_series[folder] = _open_itk(path, math.inf)[0].GetSize()[2] == 1
            if is_series[folder]:
                path, name = folder + "/", os.path.dirname(name) or os.path.basename(folder)
        merged[path] = name
    return list(merged), list(merged.values())


def _slices(folder):
    return sorted(os.path.join(folder, name) for name in os.listdir(folder)
                  if file_extension(name) == "dcm" and not name.startswith("."))


class _Series:
    """The slices of a DICOM series in a folder, sorted by position along their normal.

    :raises ValueError: if they are of several series, differ in size or directions, or their distances differ.
    """

    def __init__(self, folder, max_pixels):
        self.max_pixels, slices = max_pixels, []
        for path in _slices(folder):
            with file_errors(path):
                slices.append((path, *_open_itk(path, max_pixels)))
        first, reader, self.dtype = slices[0]
        matrix = np.reshape(reader.GetDirection(), (3, 3))
        for path, other, dtype in slices:
            for name, read in _SLICE_FACTS.items():
                expected, found = read(reader), read(other)
                same = expected == found if name == "series" else np.allclose(expected, found, rtol=0, atol=1e-3)
                require((same, f"{path}: expected the {name} of {first}, {expected}, got {found}; put each series into "
                               "a folder of its own"))
            self.dtype = np.promote_types(self.dtype, dtype)
        positions = np.array([other.GetOrigin() for _, other, _ in slices])
        along = positions @ matrix[:, 2]
        order = np.argsort(along, kind="stable")
        self.paths = [slices[i][0] for i in order]
        gaps = np.diff(along[order])
        self._check_gaps(gaps)
        step = (positions[order[-1]] - positions[order[0]]) / max(1, len(order) - 1)
        if len(order) == 1:
            step = matrix[:, 2] * reader.GetSpacing()[2]
        directions = _RAS @ np.column_stack([matrix[:, :2] * reader.GetSpacing()[:2], step])
        sides = (*reader.GetSize()[:2], len(order))
        count = math.prod(sides) * reader.GetNumberOfComponents()
        require((count <= max_pixels, f"{folder}: {count} voxels: expected at most --max_pixels {max_pixels}; set a "
                                      "larger number"))
        spacing = tuple(float(s) for s in np.linalg.norm(directions, axis=0))
        self.header = VolumeHeader(reader.GetNumberOfComponents(), sides, self.dtype.name, spacing,
                                   to_tuple(directions.tolist()))

    def _check_gaps(self, gaps):
        usual = np.median(gaps) if len(gaps) else 0
        for before, after, gap in zip(self.paths, self.paths[1:], gaps):
            require(
                (gap > 1e-3, f"{after} has the position of {before}: expected one slice per position; put each "
                             "acquisition, such as a time or an echo, into a folder of its own"),
                (abs(gap - usual) <= _GAP * usual + _GAP,
                 f"{after} is {gap:.4g} mm from {before}: expected {usual:.4g} mm, the median of the series; add the "
                 "missing slices, or remove the volume"),
            )

    def load(self):
        """Return the values [D x H x W] or [C x D x H x W], with slope and intercept of each slice applied."""
        width, height, depth = self.header.sides
        values = np.empty((depth, height, width, self.header.channels), self.dtype)
        for plane, path in zip(values, self.paths):
            plane[:] = _load_itk(path, self.max_pixels).reshape(-1, width, height).transpose(2, 1, 0)
        return values.transpose(3, 2, 1, 0)


_SLICE_FACTS = {
    "series": lambda reader: reader.HasMetaDataKey("0020|000e") and reader.GetMetaData("0020|000e"),
    "size": lambda reader: (*reader.GetSize(), reader.GetNumberOfComponents()),
    "directions": lambda reader: reader.GetDirection(),
    "pixel spacing": lambda reader: reader.GetSpacing()[:2],
}
