"""Write files atomically, hash their contents, and name them in errors."""

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import struct
import sys
import uuid
import zipfile
import zlib
from pathlib import Path

import torch

from PIL import Image, UnidentifiedImageError

# Errors of Pillow, NumPy, zipfile and zlib on reading a corrupt file.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, zipfile.BadZipFile,
               Image.DecompressionBombError)


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on a clean exit it is flushed to disk and renamed to `path`.

    After an exception the temporary file is removed and `path` is as it was; `remove_stale_parts` removes what a killed
    process leaves. Running out of space is reported with the space left and the file that was being written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f" ({_free_space_message(path)}); free some space or choose another folder" if full else ""
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}{remedy}") from error
    finally:
        with contextlib.suppress(OSError):  # of a folder that is a file, say: it would hide the error above
            part.unlink()


def remove_stale_parts(folder):
    """Remove what processes that were killed inside `atomic_path` left in `folder` and the folders in it.

    Parts of living processes stay, and so do those of other hosts, of whose processes nothing is known here.
    """
    of_this_host = re.compile(rf"\..+\.{re.escape(socket.gethostname())}\.(\d{{1,9}})\.part")
    for part in [*Path(folder).glob(".*.part"), *Path(folder).glob("*/.*.part")]:
        match = of_this_host.fullmatch(part.name)
        if match and not _process_exists(int(match.group(1))):
            with contextlib.suppress(OSError):  # a leftover that cannot be removed is no reason to stop
                part.unlink()


def write_json(path, content):
    """Write `content` as indented JSON, atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def load_tensors(path, map_location="cpu", flag="the path"):
    """Read a file of tensors and plain values; ValueError where it is truncated or holds anything else."""
    if not bf.exists(str(path)) or bf.isdir(str(path)):
        raise FileNotFoundError(f"{path} is not there; check {flag}")
    try:
        with bf.BlobFile(str(path), "rb") as stream:
            return torch.load(stream, map_location=map_location, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or cut short, or holds more than tensors and plain values, which "
                         f"weights_only=True refuses ({reason}); check {flag}") from error


def sha256_of_file(path):
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def file_errors(path, problem="cannot be read", action="fix or remove the file"):
    """Turn any error on reading a file into a ValueError that names the file.

    :raises ValueError: if the body raises one of `READ_ERRORS`.
    """
    try:
        yield
    except READ_ERRORS as error:
        reason = "not an image format that Pillow reads" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path}: {problem} ({reason}); {action}") from error


def file_extension(path):
    """Return the extension of a file name in lower case, without the dot."""
    stem, dot, extension = bf.basename(path).rpartition(".")
    return extension.lower() if dot else ""


def require_writable_folder(folder, flag):
    """Create `folder` and prove that files can be written there, or raise OSError naming `flag`."""
    folder = Path(folder)
    # Ranks on several machines probe one folder at once, and process numbers repeat between machines.
    probe = folder / f".probe.{socket.gethostname()}.{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, f"cannot write into {folder} ({error.strerror}); give {flag} a folder that can be "
                      "written") from error
    return folder


def require_folder(folder, flag):
    """Return `folder` as a Path, or raise FileNotFoundError naming `flag` where there is none."""
    if not str(folder):
        raise FileNotFoundError(f"no folder given; set {flag}")
    folder = Path(folder)
    if not folder.is_dir():
        problem = "a file, not a folder" if folder.exists() else "not there"
        raise FileNotFoundError(f"{folder} is {problem}; check {flag}")
    return folder


def _process_exists(process):
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def _free_space_message(path):
    folder = next(p for p in [path.parent, *path.parent.parents] if os.path.exists(p))
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB left on {folder}"


def lazy_import(name):
    """Return a module that is imported when it is first used; the standard library's recipe for LazyLoader.

    blobfile brings the clients of two clouds along, which nobody shall wait for who wants to read `--help`.
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"{name} is not installed; pip install -e . brings it")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bf = lazy_import("blobfile")
