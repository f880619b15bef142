"""Read and write .npz archives: image sets and batches of samples."""

import shutil
import tempfile
import zipfile
from dataclasses import dataclass

import numpy as np
import torch

from ..files import atomic_path, bf
from .listing import _UNREADABLE


def open_archive(path):
    """Return {name: array} of an .npz; of local files, arrays of more than one axis are memory-mapped.

    :raises ValueError: where it is none, or holds Python objects; names the file.
    """
    try:
        with bf.BlobFile(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
            return {info.filename.removesuffix(".npy"): _member(path, archive, info) for info in archive.infolist()}
    except (*_UNREADABLE, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as an .npz archive ({error})") from error


def _member(path, archive, info):
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
        header_size = stream.tell()
    if "://" in str(path) or dtype.hasobject or len(shape) < 2 or 0 in shape:
        with archive.open(info) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    if info.compress_type != zipfile.ZIP_STORED:
        # From an unpacked copy that has no name any more and goes with the last look at it.
        with archive.open(info) as packed, tempfile.NamedTemporaryFile() as copy:
            shutil.copyfileobj(packed, copy, 1 << 22)
            copy.flush()
            return np.load(copy.name, mmap_mode="r", allow_pickle=False)
    with open(path, "rb") as stream:
        stream.seek(info.header_offset + 26)    # in the local header: the lengths of name and extra field
        start = info.header_offset + 30 + int(np.frombuffer(stream.read(4), "<u2").sum(dtype=int)) + header_size
    return np.memmap(path, dtype, mode="r", offset=start, shape=shape, order="F" if fortran_order else "C")


def to_uint8(images):
    """Round images in [0, 1] to 0..255; a NumPy array.  [N x C x ...] -> same."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def write_npz(path, shape, parts, labels=None, names=None):
    """Write a file in the layout of guided-diffusion: arr_0 `shape` [N x H x W x C] uint8, arr_1 labels [N].

    `parts` are arrays that follow each other in arr_0; one of them at a time is in memory. Class names, where there are
    any, stand beside them as `class_names`. The same arrays give the same bytes.
    """
    with atomic_path(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            layout = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(stream, layout)
            for images in parts:
                stream.write(np.ascontiguousarray(images, np.uint8).data)
        small = {} if labels is None else {"arr_1": np.asarray(labels)}
        if names and labels is not None:
            small["class_names"] = np.array(names)
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


@dataclass
class Samples:
    """An .npz of samples: images uint8 [N x H x W x C] on disk, labels int64 [N] or None, names or None."""

    folder: str     # the file; named so as that of PictureFolder, which may be an .npz too
    images: np.ndarray
    labels: np.ndarray | None
    class_names: list | None


def open_npz(path):
    """Return the `Samples` of an .npz, ours or guided-diffusion's; the pictures are read when they are asked for.

    :raises ValueError: where there is no arr_0 of 8-bit pictures, or labels of another number.
    """
    content = open_archive(path)
    if "arr_0" not in content:
        raise ValueError(f"{path} is no batch of samples: it holds {', '.join(content)}, needed is arr_0 "
                         "[N x H x W x C]")
    images, labels, names = content["arr_0"], content.get("arr_1"), content.get("class_names")
    if images.dtype != np.uint8 or images.ndim not in (4, 5):
        raise ValueError(f"{path}: arr_0 is {images.dtype} {list(images.shape)}, needed is uint8 [N x H x W x C] or "
                         "[N x D x H x W x C]")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: arr_1 has shape {list(labels.shape)}, not one label for each of {len(images)} "
                         "pictures")
    return Samples(path, images, labels, None if names is None else names.tolist())
