"""Read files in place from .zip and .tar archives, whose members have paths such as data.zip/cats/1.png."""

import io
import os
import posixpath
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from typing import NamedTuple

EXTENSIONS = (".zip", ".tar")
MAX_RATIO = 100     # of a compressed member larger than --max_pixels bytes
_ARCHIVES = re.compile(r"\.(?:zip|tar)(?=/|$)", re.IGNORECASE)
_COMPRESSED = re.compile(r"\.(?:tar\.\w+|tgz|tbz2?|txz|7z|rar)$", re.IGNORECASE)
_LOCAL_HEADER = 30  # bytes before the name of a member in a .zip
_ENCRYPTED = 1      # flag of a member
_ERRORS = (OSError, ValueError, EOFError, LookupError, RuntimeError, struct.error, zipfile.BadZipFile, tarfile.TarError)


class Member(NamedTuple):
    """A file in an archive: `size` bytes, in the archive `stored` bytes from `start` on.

    Of a .zip, `start` is the member's header, `method` its compression and `crc` its checksum; of a .tar `crc` is None.
    `stamp` changes with the content.
    """

    start: int
    stored: int
    size: int
    stamp: str
    method: int = zipfile.ZIP_STORED
    crc: int | None = None
    encrypted: bool = False


# Path of an archive -> (its `file_stamps` when it was read, {name: Member}), of every archive that this process reads.
_directories: dict[str, tuple] = {}
_reading = threading.Lock()     # the threads that decode a batch would each read a directory that has changed


def is_archive(path: str) -> bool:
    """Return whether a path is that of a .zip or .tar file on a local disk, or of a folder inside of one."""
    found = split_archive(path)
    return found is not None and (not found[1] or bool(list_members(path)))


def require_readable(path: str, flag: str) -> None:
    """Check that a file is not an archive whose members cannot be read in place.

    :raises ValueError: if it is.
    """
    if compressed := _COMPRESSED.search(path):
        raise ValueError(f"{path}: expected a .zip or an uncompressed .tar, whose files can be read in place, got "
                         f"{compressed[0]}; unpack it and set {flag} to the folder")
    if "://" in path and path.lower().endswith(EXTENSIONS):
        raise ValueError(f"{path}: archives are read from local disks only; copy it to one and set {flag} to it")


def list_members(path: str) -> list[str]:
    """Return the paths of the files in an archive or a folder of it, entries of each folder in order of their names.

    :raises ValueError: if it cannot be read, two members have one name, or a name leads out of the archive.
    """
    archive, folder = split_archive(path)
    prefix = folder and f"{folder}/"
    names = [name for name in open_directory(archive) if name.startswith(prefix)]
    return [f"{archive}/{name}" for name in sorted(names, key=lambda name: name.split("/"))]


def iter_members(paths):
    """Yield (path of the archive, `Member`) of the paths of files in archives, as they are listed."""
    start, members = None, {}
    for path in paths:
        if start is None or not path.startswith(start):
            archive, _ = split_archive(path)
            start, members = f"{archive}/", open_directory(archive)
        yield archive, members[path[len(start):]]


def open_directory(archive, read=None):
    """Return {name: Member} of the files in an archive, read again only if its state has changed.

    :param read: function to read it instead of `read_directory`.
    """
    state = _stamps(os.stat(archive))[1]
    if _directories.get(archive, (None,))[0] != state:
        with _reading:
            if _directories.get(archive, (None,))[0] != state:
                _directories[archive] = state, (read or read_directory)(archive)
    return _directories[archive][1]


def export_directories(archives):
    """Return the directories of archives; `import_directories` in another process saves reading them there."""
    return {archive: _directories[archive] for archive in archives}


def import_directories(directories):
    """Use what `export_directories` returned, of archives that have the same state here."""
    _directories.update(directories)


def is_member(path: str) -> bool:
    """Return whether a path is that of a file in an archive."""
    return _locate(path) is not None


def path_exists(path: str) -> bool:
    """Return whether a file, or a file in an archive, exists."""
    return is_member(path) or (_bf().exists(path) if "://" in str(path) else os.path.exists(path))


def file_stamp(path: str) -> str:
    """Return text that changes with the content of a file: its size with its modification time, or in a .zip its CRC.

    :raises FileNotFoundError: if there is no such file.
    """
    return file_stamps(path)[0]


def file_stamps(path: str) -> tuple[str, str]:
    """Return (`file_stamp`, for a local file text that changes whenever it is written: also the time of its status)."""
    if found := _locate(path):
        return found[1].stamp, found[1].stamp
    if "://" in str(path):
        status = _bf().stat(path)
        return (f"{status.size} {status.mtime}",) * 2
    return _stamps(os.stat(path))


def open_file(path: str, max_pixels: int):
    """Return a binary stream of a file or a file in an archive; threads and forked processes share none.

    A compressed member is unpacked, and compared with its CRC. `read()` of an uncompressed one compares it.

    :param max_pixels: bytes that a compressed member may have at more than `MAX_RATIO` times its compressed size.
    :raises ValueError: if a member is encrypted, unpacks to more than is allowed, or differs from its CRC.
    """
    found = _locate(path)
    if found is None:
        return _bf().BlobFile(path, "rb") if "://" in str(path) else open(path, "rb")
    section, member = _Section(*found), found[1]
    if member.method == zipfile.ZIP_STORED and not member.encrypted:
        return section
    limit = max(max_pixels, MAX_RATIO * member.stored)
    with section:
        if member.encrypted:
            raise ValueError("the member is encrypted; unpack the archive")
        if member.method != zipfile.ZIP_DEFLATED:
            raise ValueError(f"compression method {member.method}: expected stored or deflate; repack the archive")
        if member.size > limit:
            raise ValueError(f"the member unpacks from {member.stored} to {member.size} bytes: expected at most "
                             f"{limit}; set a larger --max_pixels")
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(section.readall(), member.size + 1)
        _check_content(content, member)
        return io.BytesIO(content)


class _Section(io.RawIOBase):
    """The bytes of a member as a stream, with a file object of its own."""

    def __init__(self, archive, member):
        self._archive, self._member, self._position = open(archive, "rb"), member, 0
        self._start, self._length = member.start, member.stored
        if member.crc is not None:
            header = self._read_at(0, _LOCAL_HEADER)
            if not header.startswith(b"PK\3\4"):
                raise ValueError("the archive has no member where its directory says")
            self._start += _LOCAL_HEADER + sum(struct.unpack("<2H", header[26:]))

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self._position = max(0, offset + {io.SEEK_CUR: self._position, io.SEEK_END: self._length}.get(whence, 0))
        return self._position

    def readinto(self, buffer):
        length = min(len(buffer), max(0, self._length - self._position))
        buffer[:length] = self._read_at(self._position, length)
        self._position += length
        return length

    def readall(self):
        content = self._read_at(0, self._length)
        if self._member.method == zipfile.ZIP_STORED:
            _check_content(content, self._member)
        rest, self._position = content[self._position:], self._length
        return rest

    def close(self):
        self._archive.close()
        super().close()

    def _read_at(self, position, length):
        self._archive.seek(self._start + position)
        content = self._archive.read(length)
        if len(content) < length:
            raise ValueError(f"the archive is truncated: expected {length} bytes, got {len(content)}")
        return content


def _check_content(content, member):
    if len(content) != member.size:
        raise ValueError(f"expected {member.size} bytes, got {len(content)}")
    if member.crc is not None and (found := zlib.crc32(content)) != member.crc:
        raise ValueError(f"expected CRC {member.crc:08x}, got {found:08x}")


def _bf():
    import blobfile     # which imports the clients of two clouds
    return blobfile


def _stamps(status):
    return f"{status.st_size} {status.st_mtime}", f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def split_archive(path):
    """Return (path of an archive on a local disk, name inside of it) for the first one in a path, None without one."""
    path = str(path)
    for end in _ARCHIVES.finditer(path):
        archive = path[:end.end()]
        if os.path.isfile(archive):
            return archive, path[end.end() + 1:].rstrip("/")


def _locate(path):
    """Return (path of the archive, `Member`) for a file in an archive, None for other paths."""
    archive, name = split_archive(path) or (None, "")
    member = open_directory(archive).get(name) if name else None
    return member and (archive, member)


def read_directory(path):
    """Return {name: Member} of the files in an archive.

    :raises ValueError: as `list_members`.
    """
    kind, size = path[-4:].lower(), os.path.getsize(path)
    members = {}
    try:
        for stored_name, member in (_read_zip if kind == ".zip" else _read_tar)(path):
            name = posixpath.normpath(stored_name)
            if name.startswith("/") or ".." in stored_name.split("/"):
                raise ValueError(f"the name {stored_name!r} leads out of the archive; repack it")
            if "\\" in name or "\0" in name:
                raise ValueError(f"the name {stored_name!r} has backslashes: expected slashes; repack it")
            if name in members:
                raise ValueError(f"two members are named {name!r}; repack it")
            if member.start + member.stored > size:
                raise ValueError(f"it is truncated: {name!r} ends after its {size} bytes")
            members[name] = member
    except _ERRORS as error:
        raise ValueError(f"{path}: cannot be read as a {kind} archive ({error}); fix or remove the file") from error
    return members


def _read_zip(path):
    with open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
        stream.seek(-22 - len(archive.comment), os.SEEK_END)
        end, found = stream.read(22), len(archive.infolist())
        stated = int.from_bytes(end[10:12], "little")   # zipfile ignores it; 65535: stated in a record of ZIP64
        if not end.startswith(b"PK\5\6") or stated not in (found, 0xffff):
            raise zipfile.BadZipFile(f"expected {stated} entries in its directory, got {found}")
        for info in archive.infolist():
            if not info.is_dir():
                yield info.orig_filename, Member(
                    info.header_offset, info.compress_size, info.file_size, f"{info.file_size} {info.CRC:08x}",
                    info.compress_type, info.CRC, bool(info.flag_bits & _ENCRYPTED))


def _read_tar(path):
    try:
        archive = tarfile.open(path, "r:")
    except tarfile.TarError as error:
        raise ValueError(f"{error}; only uncompressed archives are read in place") from error
    with archive:
        while info := archive.next():
            archive.members.clear()     # which tarfile would keep
            if not (info.isdir() or info.isreg() and info.sparse is None):
                raise ValueError(f"{info.name!r} is a link, a device or sparse: expected files and folders; repack it "
                                 "with the files that links lead to (tar --dereference --hard-dereference)")
            if not info.isdir():
                yield info.name, Member(info.offset_data, info.size, info.size, f"{info.size} {info.mtime}")
        # At a corrupt header tarfile ends as if the archive did.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"expected a member or the end of the archive at byte {archive.offset}, got neither")
