"""Write files atomically, hash their content, check folders, and report file errors with the path."""

import contextlib
import difflib
import errno
import hashlib
import importlib.util
import itertools
import json
import lzma
import math
import os
import re
import shutil
import socket
import stat
import struct
import sys
import tokenize
import uuid
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

_SPECIAL_FILES = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
                  stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"}
MAX_PIXELS = 2**29      # default of --max_pixels: an image of 23,170 x 23,170, a volume of 512 x 512 x 2048
FREE_PIXELS = 2**22     # decoded whatever the size of the file
MAX_EXPANSION = 1032    # bytes that DEFLATE decodes from one byte, at most
MAX_NPY_HEADER = 10_000     # bytes, the limit of NumPy
MAX_YAML_NODES = 100_000    # with every alias replaced by what it stands for
OWN_SHA256 = "content_sha256"
OWNED_MARKER = ".sampling"  # in a folder of images that sampling has created
# Errors of Pillow, NumPy, nibabel, PyYAML, zipfile and zlib on reading a corrupt file; the message of the second kind
# says little without the type of the error.
_UNNAMED_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, lzma.LZMAError,
                   tokenize.TokenError)
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, zipfile.BadZipFile,
               Image.DecompressionBombError, *_UNNAMED_ERRORS)


@contextlib.contextmanager
def write_errors(path):
    """Convert errors on writing a file or folder into an OSError that names it, and the free space if the disk is full.

    Errors of the system that a library reports as its own, such as safetensors', are recognized by their number.
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
        if code is None and not isinstance(error, OSError):
            raise
        reason = error.strerror or error if isinstance(error, OSError) else os.strerror(code)
        full = code in (errno.ENOSPC, errno.EDQUOT)
        remedy = f" ({_free_space_message(path)}); free some space or choose another folder" if full else ""
        raise OSError(code, f"cannot write {path}: {reason}{remedy}") from error


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path next to `path`; on a clean exit it is flushed to disk and renamed to `path`.

    After an exception the temporary file is removed and `path` is unchanged; `remove_stale_parts` removes those of
    killed processes.

    :raises OSError: if the file cannot be written; the message contains the free space if the disk is full.
    """
    path = Path(path)
    # In the same folder, as a rename is atomic within a file system only.
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            with open(part, "rb+") as stream:
                os.fsync(stream.fileno())   # else a power failure may leave an empty file under the final name
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # e.g. if the folder is a file; it would hide the error above
            part.unlink()


def remove_stale_parts(folder):
    """Remove temporary files of `atomic_path` from `folder` and its subfolders if their process has ended.

    Those of other hosts stay: their processes cannot be checked from here.
    """
    of_this_host = re.compile(rf"\..+\.{re.escape(socket.gethostname())}\.(\d{{1,9}})\.part")
    for part in [*Path(folder).glob(".*.part"), *Path(folder).glob("*/.*.part")]:
        match = of_this_host.fullmatch(part.name)
        if match and not _process_exists(int(match.group(1))):
            with contextlib.suppress(OSError):  # not worth ending a run for
                part.unlink()


@contextlib.contextmanager
def open_zip(stream):
    """Yield the ZipFile of a seekable binary stream after comparing its directory with the number of its entries.

    zipfile does not: a changed length in one entry of the directory would hide those that follow.

    :raises zipfile.BadZipFile: if it is no zip file, or the numbers differ.
    """
    with zipfile.ZipFile(stream) as archive:
        stream.seek(-22 - len(archive.comment), os.SEEK_END)
        end, found = stream.read(22), len(archive.infolist())
        stated = int.from_bytes(end[10:12], "little")   # 65535: stated in a record of ZIP64
        if not end.startswith(b"PK\5\6") or stated not in (found, 0xffff):
            raise zipfile.BadZipFile(f"expected {stated} entries in its directory, got {found}")
        yield archive


def _check_zip(path):
    """Compare the content of a local zip file with its checksums, which torch ignores."""
    if "://" not in str(path) and zipfile.is_zipfile(path):
        with open(path, "rb") as stream, open_zip(stream) as archive:
            if bad := archive.testzip():
                raise ValueError(f"{bad} differs from its checksum")


class HashedStream:
    """Binary stream for writing that counts and hashes what passes; `entry` is {"bytes": int, "sha256": str}."""

    def __init__(self, stream):
        self._stream, self._digest, self._bytes = stream, hashlib.sha256(), 0

    def write(self, data):
        """Write bytes, or anything with a buffer, and return their number."""
        self._digest.update(data)
        self._bytes += memoryview(data).nbytes
        return self._stream.write(data)

    def flush(self):
        """Flush the stream below."""
        self._stream.flush()

    @property
    def entry(self):
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


@contextlib.contextmanager
def atomic_stream(path):
    """Yield a `HashedStream` into `path`, which is written atomically.

    A checksum of what was meant to be written is that of the file; one of the file as it is read back would also fit
    what a disk or another process made of it.
    """
    with atomic_path(path) as part, open(part, "wb") as stream:
        yield HashedStream(stream)


def write_json(path, content):
    """Write `content` as indented JSON, atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def write_record(path, content):
    """Write a dictionary as JSON with a SHA-256 of its content, from which `read_record` verifies it."""
    write_json(path, {**content, OWN_SHA256: sha256_of_json(content)})


def read_record(path, action="fix or remove the file"):
    """Return the dictionary that `write_record` wrote; one of version 0.2 or before has no checksum to compare with.

    :raises ValueError: if it cannot be read or is not a JSON object, or its content differs from its SHA-256.
    """
    with file_errors(path, "invalid JSON", action):
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
    sha256 = content.pop(OWN_SHA256, None)
    if sha256 is None and _was_sha256(content) or sha256 not in (None, sha256_of_json(content)):
        raise ValueError(f"{path} is corrupt or was edited: its SHA-256 differs from that of its content; {action}")
    return content


def _was_sha256(content):
    """Return whether the last entry of a record looks like its SHA-256 with a changed name."""
    name, value = list(content.items())[-1] if content else ("", "")
    return bool(difflib.get_close_matches(OWN_SHA256, [name])) or re.fullmatch("[0-9a-f]{64}", str(value)) is not None


def sha256_of_json(content):
    """Return the hexadecimal SHA-256 of a value in JSON, whatever its layout in a file."""
    read_back = json.loads(json.dumps(content))     # in which all keys are strings, before they are sorted
    return hashlib.sha256(json.dumps(read_back, sort_keys=True).encode()).hexdigest()


def load_tensors(path, map_location="cpu", flag="the path"):
    """Return the content of a local or cloud file of tensors and plain values.

    :param flag: flag of the path, for the message.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is corrupt, not a regular file or contains other objects, whose code is not run.
    """
    if not bf.exists(str(path)) or bf.isdir(str(path)):
        raise FileNotFoundError(f"{path} does not exist; check {flag}")
    require_regular_file(path, f"check {flag}")
    try:
        _check_zip(path)
        with bf.BlobFile(str(path), "rb") as stream:
            return torch.load(stream, map_location=map_location, weights_only=True)
    except torch.OutOfMemoryError:  # not a fault of the file
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        if other := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} contains more than tensors and plain values ({other[1]}), which weights_only=True rejects, as "
                "reading it runs code of the file; use a .safetensors version of it, or if you trust it, load it with "
                "weights_only=False where its packages are installed and save its state dict alone with torch.save; "
                f"check {flag}"
            ) from error
        raise ValueError(f"{path} is corrupt or truncated, or contains more than tensors and plain values, which "
                         f"weights_only=True rejects ({reason}); check {flag}") from error


def read_yaml_file(path):
    """Return the keys and values of a YAML file; {} if it is empty.

    :raises ValueError: if it is not UTF-8 or not YAML, a key occurs twice, an anchor contains itself, aliases expand to
        more than `MAX_YAML_NODES`, or the content is not a mapping; the message names the file.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def get_single_node(self):
            node = super().get_single_node()
            if node is not None and _count_yaml_nodes(node, {}) > MAX_YAML_NODES:
                raise ValueError(f"anchors contain themselves or aliases expand to more than {MAX_YAML_NODES} values")
            return node

        def construct_mapping(self, node, deep=False):
            seen = set()    # of a key that occurs twice YAML would take the last
            for key, _ in node.value:
                name = key.tag, key.value if isinstance(key.value, str) else id(key)
                if name in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} occurs twice",
                                                            key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    require_regular_file(path)
    content = Path(path).read_bytes()
    try:
        if b"\0" in content:    # UTF-16 and UTF-32, which may be valid UTF-8
            raise ValueError("it contains null bytes, as UTF-16 does")
        text = content.decode()
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    try:
        values = yaml.load(text, Loader)
    except (yaml.YAMLError, *READ_ERRORS) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, _UNNAMED_ERRORS) else str(error)
        raise ValueError(f"{path} is not YAML: {' '.join(reason.split())}") from error
    if not isinstance(values, (dict, type(None))):
        raise ValueError(f"{path}: expected keys with values, got a {type(values).__name__}")
    return values or {}


def _count_yaml_nodes(node, counts):
    """Return the number of nodes of a YAML node with every alias expanded: infinite if it contains itself."""
    if id(node) not in counts:
        counts[id(node)] = math.inf
        children = () if isinstance(node.value, str) else node.value
        pairs = (child if isinstance(child, tuple) else (child,) for child in children)
        counts[id(node)] = 1 + sum(_count_yaml_nodes(child, counts) for child in itertools.chain.from_iterable(pairs))
    return counts[id(node)]


def hash_lines(lines):
    """Return the hexadecimal SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()    # of any file name


def sha256_of_file(path):
    """Return the hexadecimal SHA-256 of a file's bytes."""
    require_regular_file(path)
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_regular_file(path, action="remove it"):
    """Check a local path before it is opened: opening a named pipe waits for a writer, reading a device may never end.

    :raises OSError: if there is no such file.
    :raises ValueError: if it is a named pipe, socket, device or folder.
    """
    kind = stat.S_IFREG if "://" in str(path) else stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"{path} cannot be read: expected a regular file, got {_SPECIAL_FILES[kind]}; {action}")


@contextlib.contextmanager
def file_errors(path, problem="cannot be read", action="fix or remove the file"):
    """Convert errors on reading a file into a ValueError that contains its path.

    :raises ValueError: if it is not a regular file, before the body is run, or the body raises one of `READ_ERRORS`.
    """
    with contextlib.suppress(OSError):  # the body reports a missing file
        require_regular_file(path, action)
    try:
        yield
    except READ_ERRORS as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):    # converted already
            raise
        reason = f"{type(error).__name__}: {error}" if isinstance(error, _UNNAMED_ERRORS) else error
        reason = "not an image format that Pillow reads" if isinstance(error, UnidentifiedImageError) else reason
        raise ValueError(f"{path}: {problem} ({reason}); {action}") from error


def read_npy_header(stream):
    """Return (shape, whether the order is Fortran's, dtype) of an .npy stream, which is then at its values.

    :raises ValueError: if the header is longer than `MAX_NPY_HEADER`: NumPy allocates whatever length it has.
    """
    version, start = np.lib.format.read_magic(stream), stream.tell()
    length, = struct.unpack(*(("<H", stream.read(2)) if version == (1, 0) else ("<I", stream.read(4))))
    if length > MAX_NPY_HEADER:
        raise ValueError(f"the header has {length} bytes: expected at most {MAX_NPY_HEADER}")
    stream.seek(start)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def check_array_size(shape, dtype, stored_bytes):
    """Check that the values of an .npy header are stored after it: NumPy allocates memory for them before it reads.

    :raises ValueError: if not.
    """
    expected = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or not dtype.hasobject and expected > stored_bytes:
        raise ValueError(f"the header describes {dtype} values of shape {tuple(shape)}: expected {expected} bytes, got "
                         f"{stored_bytes}")


def check_size(count, bits, stored_bytes, max_pixels=MAX_PIXELS):
    """Check how many pixels or voxels of how many bits a header describes before memory is allocated for them.

    :param stored_bytes: size of the file, which a header cannot exceed by more than the ratio of DEFLATE.
    :raises ValueError: if there are more than `max_pixels`, or more than so few bytes can contain.
    """
    if count > max_pixels:
        raise ValueError(f"the header describes {count} pixels: expected at most --max_pixels {max_pixels}; set a "
                         "larger number if the header is right")
    if count > FREE_PIXELS and count * bits > 8 * MAX_EXPANSION * stored_bytes:
        raise ValueError(f"the header describes {count} pixels of {bits} bits, more than {stored_bytes} bytes can "
                         "contain; it is corrupt, or the image is empty")


def open_npy(path):
    """Return the array of a local .npy file, memory-mapped.

    :raises ValueError: if it contains Python objects, or fewer values than its header describes.
    """
    with open(path, "rb") as stream:
        shape, fortran_order, dtype = read_npy_header(stream)
        start = stream.tell()
        check_array_size(shape, dtype, os.fstat(stream.fileno()).st_size - start)
    if dtype.hasobject:
        raise ValueError("it contains Python objects, which are not loaded")
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran_order else "C")


def read_to_end(stream):
    """Read the rest of a decompressed stream, which compares its checksum at the end."""
    while stream.read(1 << 20):
        pass


def file_extension(path):
    """Return the extension of a file name in lower case, without the dot."""
    path = os.fspath(path)
    _, dot, extension = (bf.basename(path) if "://" in path else path).rpartition(".")  # blobfile is slow
    return extension.lower() if dot and "/" not in extension and os.sep not in extension else ""


def require_writable_folder(folder, flag):
    """Create `folder` if it does not exist, and return it as a Path.

    :param flag: flag of the folder, for the message.
    :raises OSError: if no file can be written there.
    """
    folder = Path(folder)
    # Ranks on several nodes probe one folder at the same time, and process ids repeat between nodes.
    probe = folder / f".probe.{socket.gethostname()}.{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        message = f"cannot write into {folder} ({error.strerror}); set {flag} to a writable folder"
        raise OSError(error.errno, message) from error
    return folder


def require_folder(folder, flag):
    """Return `folder` as a Path.

    :param flag: flag of the folder, for the message.
    :raises FileNotFoundError: if it is empty or not an existing folder.
    """
    if not str(folder):
        raise FileNotFoundError(f"no folder specified; set {flag}")
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {problem}; check {flag}")
    return folder


def _process_exists(process):
    if os.name == "nt":     # os.kill would end the process
        return True
    try:
        os.kill(process, 0)     # signal 0 is not sent, only checked
    except ProcessLookupError:
        return False
    except PermissionError:     # it exists and belongs to another user
        pass
    return True


def _free_space_message(path):
    # The folder of `path` itself may not exist: creating it can be what failed.
    folder = next(p for p in [path.parent, *path.parent.parents] if os.path.exists(p))
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB free on {folder}"


def lazy_import(name):
    """Return a module that is imported on its first use (the recipe of `importlib.util.LazyLoader`).

    blobfile imports the clients of two clouds, which would delay `--help`.

    :raises ImportError: if the module is not installed.
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"{name} is not installed; run pip install -e .")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bf = lazy_import("blobfile")
