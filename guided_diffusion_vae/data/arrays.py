"""Read arrays from MATLAB files (.mat of versions 5 to 7.3) and HDF5 files (.h5, .hdf5)."""

import io
import math
import os
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

from ..config import require
from ..files import MAX_PIXELS, check_size, file_errors, file_extension
from .archives import open_file

EXTENSIONS = ("mat", "h5", "hdf5")
KEY_FLAG = "--array_key"
IMAGE_KEYS, LABEL_KEYS = ("images", "arr_0"), ("labels", "y", "arr_1")     # of a file with many images
_HDF5 = b"\x89HDF\r\n\x1a\n"
_USER_BLOCK = 512       # bytes before the HDF5 part of a .mat of version 7.3
_MATRIX, _COMPRESSED = 14, 15   # kinds of data elements of .mat version 5
_COMPLEX, _LOGICAL = 0x800, 0x200   # flags of a matrix
_NAME_BYTES = 1024      # of an unpacked matrix that contain its flags, axes and name
# Numeric classes of .mat version 5 by number.
_MAT_DTYPES = dict(enumerate("float64 float32 int8 uint8 int16 uint16 int32 uint32 int64 uint64".split(), 6))


class ArrayHeader(NamedTuple):
    """An array in a file: shape and type as in NumPy, the most bytes it has in the file, and whether that is HDF5.

    `transposed`: stored with its axes in reverse order, as by MATLAB in HDF5.
    """

    shape: tuple
    dtype: np.dtype
    stored: int
    hdf5: bool = False
    transposed: bool = False


def find_array(path: str, key: str = "", axes=(2, 3), max_pixels: int = MAX_PIXELS) -> tuple[str, ArrayHeader]:
    """Return the name and header of the array `key` of a file, by default of the only numeric one with so many axes.

    Arrays with fewer than two sizes above 1, such as MATLAB's scalars and vectors, count only by name.

    :raises ValueError: if there is no such array, or several, or it has more values than `max_pixels` or than the file
        can contain.
    """
    with file_errors(path, action=f"fix or remove the file, or set {KEY_FLAG}"):
        headers = list_arrays(path)
        name = _choose(headers, key, axes)
        header = headers[name]
        # MATLAB may store any number in one byte.
        check_size(math.prod(header.shape), 8 * header.dtype.itemsize if header.hdf5 else 8, header.stored, max_pixels)
        return name, header


def _choose(headers, key, axes):
    fitting = [name for name, header in headers.items()
               if len(header.shape) in axes and min(header.shape) and sum(n > 1 for n in header.shape) > 1]
    listed = ", ".join(f"{name} {header.dtype} {list(header.shape)}" for name, header in headers.items()) or "none"
    require(
        (not key or key in headers, f"it contains no numeric array {key}: expected one of {KEY_FLAG}, got {listed}"),
        (key or len(fitting) == 1, f"expected one numeric array of {' or '.join(map(str, axes))} axes, got {listed}"))
    return key or fitting[0]


def list_arrays(path: str) -> dict[str, ArrayHeader]:
    """Return {name: ArrayHeader} of the numeric arrays in a file; no values are read.

    :raises ImportError: if h5py is not installed and the file is HDF5.
    """
    if _is_hdf5(path):
        with _open_hdf5(path) as file:
            return _list_hdf5(path, file)
    with open_file(path, MAX_PIXELS) as stream:
        return dict(_list_mat(stream))


def load_array(path: str, name: str, header: ArrayHeader) -> np.ndarray:
    """Return an array of a file in the type of its header."""
    if header.hdf5:
        with _open_hdf5(path) as file:
            return _load_hdf5(file[name], header, ())
    import scipy.io
    with open_file(path, MAX_PIXELS) as stream:
        # Not mat_dtype=True: it drops imaginary parts.
        values = scipy.io.loadmat(stream, variable_names=[name])[name]
    require((values.shape == header.shape, f"{name}: expected shape {header.shape}, got {values.shape}"))
    return values.astype(header.dtype, copy=False)


def read_array_file(path: str, key: str = "", axes=(2, 3), max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the array that `find_array` finds.

    :raises ValueError: if it cannot be read.
    """
    name, header = find_array(path, key, axes, max_pixels)
    with file_errors(path):
        return load_array(path, name, header)


class StoredImages:
    """Images [N x H x W x C] of an HDF5 file, read from it one by one; forked processes open it themselves."""

    def __init__(self, path, name, header):
        self.path, self.name, self.header = path, name, header
        self.shape, self.dtype = header.shape + (1,) * (4 - len(header.shape)), header.dtype
        self.ndim = len(self.shape)
        self._file, self._process = None, None

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        with file_errors(self.path):
            if self._process != os.getpid():
                self._file, self._process = _open_hdf5(self.path), os.getpid()
            return _load_hdf5(self._file[self.name], self.header, (index,)).reshape(self.shape[1:])


def open_image_set(path: str, key: str = "", max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Return the "images" [N x H x W (x C)] of a file, and "labels" [N] and "class_names" [classes] if it has labels.

    Images are the array `key`, by default one of `IMAGE_KEYS` or the only one of three or four axes, those of HDF5 are
    read when indexed. Labels are one of `LABEL_KEYS`, in MATLAB a row or column of integers of any type that may count
    from 1; the names of classes are then the numbers in the file.

    :raises ValueError: if there is no such array, or it cannot be read.
    """
    with file_errors(path, action=f"fix the file, or set {KEY_FLAG}"):
        headers = list_arrays(path)
        key = key or next((name for name in IMAGE_KEYS if name in headers), "")
        name = _choose({name: header for name, header in headers.items() if name not in LABEL_KEYS}, key, (3, 4))
        header, hdf5 = headers[name], headers[name].hdf5
        check_size(math.prod(header.shape[hdf5:]), 0 if hdf5 else 8, header.stored, max_pixels)
        found = {"images": StoredImages(path, name, header) if hdf5 else load_array(path, name, header)}
        if label_key := next((name for name in LABEL_KEYS if name in headers), None):
            labels = found["labels"] = _to_integers(load_array(path, label_key, headers[label_key]))
            if file_extension(path) == "mat" and labels.dtype.kind in "iu" and labels.min(initial=1) == 1:
                found["labels"] = labels - 1
                found["class_names"] = np.arange(1, len(np.unique(labels)) + 1).astype(str)
        return found


def _to_integers(labels):
    """Return labels [N x 1] or [1 x N] as [N], and integers that are stored as float as int64."""
    labels = labels.reshape(-1) if max(labels.shape, default=0) == labels.size else labels
    whole = labels.dtype.kind == "f" and np.isfinite(labels).all() and (labels == np.rint(labels)).all()
    return labels.astype(np.int64) if whole else labels


# --- HDF5 ---


def _is_hdf5(path):
    if file_extension(path) != "mat":
        return True
    with open_file(path, MAX_PIXELS) as stream:
        content = stream.read(_USER_BLOCK + len(_HDF5))
    return content.startswith(_HDF5) or content[_USER_BLOCK:] == _HDF5


def _open_hdf5(path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path} requires h5py: pip install 'guided-diffusion-vae[hdf5]'") from error
    if os.path.isfile(path):
        return h5py.File(path, "r", locking=False)      # locks fail on read-only and network file systems
    with open_file(path, MAX_PIXELS) as stream:     # in an archive
        return h5py.File(io.BytesIO(stream.read()), "r")


def _list_hdf5(path, file):
    import h5py
    headers = {}

    def visit(name, item):
        # Links to other files are not followed by visititems.
        if isinstance(item, h5py.Dataset) and item.shape and item.external is None and not item.is_virtual:
            kind = item.attrs.get("MATLAB_class", b"")
            dtype = _value_dtype(item.dtype, kind)
            if dtype is not None and "MATLAB_empty" not in item.attrs and not name.startswith("#refs#"):
                matlab = file_extension(path) == "mat" or bool(kind)
                headers[name] = ArrayHeader(item.shape[::-1] if matlab else item.shape, dtype, size, True, matlab)

    size = os.path.getsize(path) if os.path.isfile(path) else file.id.get_filesize()
    file.visititems(visit)
    return headers


def _value_dtype(dtype, matlab_class):
    """Return the type of the values of an HDF5 dataset in native order, None if they are no numbers."""
    if matlab_class == b"char":
        return None
    if matlab_class == b"logical":
        return np.dtype(bool)
    if dtype.names in (("real", "imag"), ("r", "i")):
        return np.result_type(dtype[0], dtype[1], np.complex64)
    return dtype.newbyteorder("=") if dtype.kind in "biufc" else None


def _load_hdf5(dataset, header, index):
    """Return the values of a dataset at an index into its first axes, in the order of `header`."""
    values = dataset[(..., *index[::-1])] if header.transposed else dataset[index]
    if values.dtype.names:
        real, imaginary = (values[name] for name in values.dtype.names)
        values = np.empty(real.shape, header.dtype)
        values.real, values.imag = real, imaginary
    return np.asarray(values.T if header.transposed else values).astype(header.dtype, copy=False)


# --- MATLAB version 5 ---


def _list_mat(stream):
    """Yield (name, ArrayHeader) of the numeric matrices of a .mat file of version 5."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(128)
    require((head[126:128] in (b"IM", b"MI"), "expected a .mat file of version 5, 6, 7 or 7.3; save it with -v7"))
    order = "<" if head.endswith(b"IM") else ">"
    while (start := stream.tell()) < size:
        kind, length = struct.unpack(f"{order}2I", stream.read(8))
        require((start + 8 + length <= size, f"it is truncated: expected {length} bytes from {start + 8} on"))
        content = stream.read(min(length, _NAME_BYTES))
        if kind == _COMPRESSED:
            content = zlib.decompressobj().decompress(content, _NAME_BYTES)
            kind, = struct.unpack_from(f"{order}I", content)
            content = content[8:]
        if kind == _MATRIX and length:
            flags, _, _, axes = struct.unpack_from(f"{order}4I", content, 8)
            shape = struct.unpack_from(f"{order}{axes // 4}i", content, 24)
            name = _mat_name(content, 24 + -(-axes // 8) * 8, order)
            if dtype := _MAT_DTYPES.get(flags & 0xff):
                dtype = "bool" if flags & _LOGICAL else np.result_type(dtype, "c8") if flags & _COMPLEX else dtype
                require((min(shape) >= 0, f"{name}: expected sizes >= 0, got {shape}"))
                yield name, ArrayHeader(shape, np.dtype(dtype), length)
        stream.seek(start + 8 + length)


def _mat_name(content, start, order):
    kind, length = struct.unpack_from(f"{order}2I", content, start)
    if kind >> 16:      # up to four bytes stand beside their length
        length, start = kind >> 16, start - 4
    return content[start + 8:start + 8 + length].decode("ascii")
