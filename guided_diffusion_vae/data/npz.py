"""Read and write .npz archives: image sets and batches of samples."""

import contextlib
import io
import os
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..config import require
from ..files import (
    MAX_NPY_HEADER, MAX_PIXELS, atomic_path, bf, check_array_size, file_errors, open_zip, read_npy_header, read_to_end,
)

MAX_CHECKED_BYTES = 2**30
MAX_RATIO = 100         # of a compressed array larger than --max_pixels bytes
# (path, size, modification time, name) of the members whose CRC this process has compared
_checked: set[tuple] = set()


class ArrayHeader(NamedTuple):
    """Header of an array in an archive: `size` is the length of the header, `member` its entry in the zip file."""

    shape: tuple
    fortran_order: bool
    dtype: np.dtype
    size: int
    member: zipfile.ZipInfo


def read_archive_headers(path) -> dict[str, ArrayHeader]:
    """Return {name: ArrayHeader} of an .npz file; no values are read or unpacked.

    :raises ValueError: if the file is not an .npz archive, or an array is shorter than its header describes.
    """
    with _open_zip(path) as archive:
        return _read_headers(archive)


def open_archive(path, names: Iterable[str] | None = None, in_memory: bool = False,
                 max_pixels: int = MAX_PIXELS) -> dict[str, np.ndarray]:
    """Return {name: array} of an .npz file; arrays of more than one axis in local files are memory-mapped.

    Compressed arrays are unpacked once per call, to a temporary file without a name or to memory. Promised is that the
    CRC of each returned array was compared with its values: of a compressed one in this call, of an uncompressed one
    that is memory-mapped when this process first opened it. It is not compared in files of more than
    `MAX_CHECKED_BYTES`, and changes of a file that is open are not noticed.

    :param names: arrays to open, by default all.
    :param in_memory: unpack compressed arrays to memory.
    :param max_pixels: bytes that a compressed array may have at more than `MAX_RATIO` times its compressed size.
    :raises ValueError: if the file is not an .npz archive, contains Python objects, or an array is shorter than its
        header describes or unpacks to more than is allowed, before it is unpacked.
    """
    with _open_zip(path) as archive:
        headers = _read_headers(archive)
        return {name: _read_member(path, archive, headers[name], in_memory, max_pixels) for name in names or headers}


@contextlib.contextmanager
def _open_zip(path):
    with file_errors(path, "cannot be read as an .npz archive"), bf.BlobFile(str(path), "rb") as stream:
        with open_zip(stream) as archive:
            yield archive


def _read_headers(archive):
    headers = {}
    for info in archive.infolist():
        with archive.open(info) as stream:
            start = io.BytesIO(stream.read(2 * MAX_NPY_HEADER))
        shape, fortran_order, dtype = read_npy_header(start)
        check_array_size(shape, dtype, info.file_size - start.tell())
        header = ArrayHeader(shape, fortran_order, dtype, start.tell(), info)
        headers[info.filename.removesuffix(".npy")] = header
    return headers


def _read_member(path, archive, header, in_memory, max_pixels):
    shape, fortran_order, dtype, header_size, info = header
    packed = info.compress_type != zipfile.ZIP_STORED
    size, limit = info.file_size, max(max_pixels, MAX_RATIO * info.compress_size)
    require((not packed or size <= limit, f"{info.filename} unpacks from {info.compress_size} to {size} bytes: "
             f"expected at most {limit}; save it without compression or set a larger --max_pixels"))
    in_memory = in_memory or sys.platform == "win32"    # which deletes no file while it is mapped
    if "://" in str(path) or dtype.hasobject or len(shape) < 2 or 0 in shape or packed and in_memory:
        with archive.open(info) as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
            read_to_end(stream)
            return array
    if packed:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        require((size <= free, f"{info.filename} unpacks to {size} bytes, but {folder} has {free} bytes free; save it "
                               "without compression or set TMPDIR to another folder"))
        # A decompressed copy without a name: the file is deleted with the last reference to its memory map.
        with archive.open(info) as stream, tempfile.NamedTemporaryFile() as copy:
            shutil.copyfileobj(stream, copy, 1 << 22)
            copy.flush()
            return np.load(copy.name, mmap_mode="r", allow_pickle=False)
    status = os.stat(path)
    key = os.path.abspath(path), status.st_size, status.st_mtime_ns, info.filename
    if key not in _checked and status.st_size <= MAX_CHECKED_BYTES:
        with archive.open(info) as stream:
            read_to_end(stream)
        _checked.add(key)
    with open(path, "rb") as stream:
        stream.seek(info.header_offset + 26)    # in the local header: the lengths of name and extra field
        start = info.header_offset + 30 + int(np.frombuffer(stream.read(4), "<u2").sum(dtype=int)) + header_size
    return np.memmap(path, dtype, mode="r", offset=start, shape=shape, order="F" if fortran_order else "C")


def archive_classes(path, labels, count, names=None) -> list[str]:
    """Return the class names of the labels of `count` images: `names`, else the numbers of the labels that occur.

    :raises ValueError: if labels are not integers from 0 on, or a label has no name; without names they have to be
        consecutive, so that one wrong label does not make a million classes.
    """
    _check_labels(path, "'labels'", labels, count)
    found = np.unique(labels)
    classes = np.arange(len(found)).astype(str) if names is None else names
    distinct = classes.ndim == 1 and classes.dtype.kind == "U" and len({*classes.tolist(), ""}) == len(classes) + 1
    require((distinct, f"{path}: 'class_names' are invalid: expected distinct names [classes], got {classes.dtype} of "
                       f"shape {classes.shape}; name each class once"))
    outside, absent = found[found >= len(classes)], np.setdiff1d(np.arange(len(classes)), found)
    holes = f" and none of {_shorten(absent)}" if len(absent) and names is None else ""
    source = f"{len(found)} labels occur" if names is None else "there are as many 'class_names'"
    require((not len(outside),
             f"{path}: 'labels' do not number {len(classes)} classes: expected 0 to {len(classes) - 1}, as {source}, "
             f"got {_shorten(outside)}{holes}; renumber them, or add 'class_names' for all of them"))
    return classes.tolist()


def _check_labels(path, name, labels, count):
    ends = f" from {labels.min()} to {labels.max()}" if labels.size and labels.dtype.kind in "iuf" else ""
    valid = labels.shape == (count,) and labels.dtype.kind in "iu" and labels.min(initial=0) >= 0
    require((valid, f"{path}: {name} must be {count} integers >= 0, got {labels.dtype} of shape {labels.shape}{ends}"))


def _shorten(numbers):
    return ", ".join([*map(str, numbers[:3].tolist()), *(["..."] if len(numbers) > 3 else [])])


def write_npz(path, shape: Sequence[int], parts: Iterable[np.ndarray], labels=None, names=None, colormap="",
              attributes=None) -> None:
    """Write a file in guided-diffusion's layout: arr_0 [N x H x W x C] uint8, arr_1 labels [N].

    Equal arrays give bitwise identical files.

    :param shape: of arr_0.
    :param parts: arrays that are concatenated in arr_0, one at a time in memory.
    :param names: class names, stored as `class_names` next to labels.
    :param colormap: name of the table of a colormap that the images are scalars of, stored as `colormap`.
    :param attributes: {name: numbers [N]}, stored as `attributes` float32 [N x A] and `attribute_names`.
    """
    with atomic_path(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            layout = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(stream, layout)
            for images in parts:
                stream.write(np.ascontiguousarray(images, np.uint8).data)
        arrays = {} if labels is None else {"arr_1": np.asarray(labels)}
        if names and labels is not None:
            arrays["class_names"] = np.array(names)
        if colormap:
            arrays["colormap"] = np.array(colormap)
        if attributes:
            arrays["attributes"] = np.stack(list(attributes.values()), axis=1).astype(np.float32)
            arrays["attribute_names"] = np.array(list(attributes))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


@dataclass
class Samples:
    """An .npz of samples: images uint8 [N x H x W x C] on disk, labels int64 [N] or None, class names or None.

    With the name of the table of a `colormap`, images are scalars of it. `attributes` are {name: float32 [N]}.
    """

    folder: str     # path of the file, under the name of the same member of an image source
    images: np.ndarray
    labels: np.ndarray | None
    class_names: list | None
    colormap: str = ""
    attributes: dict = field(default_factory=dict)


def open_npz(path, content=None) -> Samples:
    """Return the `Samples` of an .npz in guided-diffusion's layout; images are read on access.

    :param content: what `open_archive` returns for it, if it is open already.
    :raises ValueError: if there is no arr_0 of 8-bit images, or arr_1 has another length or other values than labels.
    """
    content = open_archive(path) if content is None else content
    images, labels, names = content.get("arr_0"), content.get("arr_1"), content.get("class_names")
    require((images is not None, f"{path} is not a batch of samples: expected arr_0 [N x H x W x C], got "
                                 f"{', '.join(content)}; use the .npz that sampling has written"))
    require(
        (images.dtype == np.uint8 and images.ndim in (4, 5),
         f"{path}: expected arr_0 as uint8 [N x H x W x C] or [N x D x H x W x C], got {images.dtype} {images.shape}"),
        (labels is None or labels.shape == images.shape[:1],
         f"{path}: expected one label in arr_1 for each of {len(images)} images, got shape {np.shape(labels)}"),
    )
    if labels is not None and names is not None:
        archive_classes(path, labels, len(images), names)
    elif labels is not None:
        _check_labels(path, "arr_1", labels, len(images))
    return Samples(path, images, labels, None if names is None else names.tolist(), str(content.get("colormap", "")),
                   _open_attributes(path, content, len(images)))


def _open_attributes(path, content, count):
    values, names = (content.get(name) for name in ("attributes", "attribute_names"))
    if values is None or names is None:     # an array of that name may be anything in a file of another program
        return {}
    matching = values.shape == (count, *names.shape) and len(set(names.tolist())) == values.shape[-1]
    require((values.dtype.kind == "f" and matching, f"{path}: expected attributes as numbers {(count, *names.shape)} "
             f"with distinct attribute_names, got {values.dtype} of shape {values.shape}"))
    return dict(zip(names.tolist(), np.asarray(values, np.float32).T))
