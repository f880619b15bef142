"""List the files of a folder with their fingerprint: the base of the image and volume folders."""

import base64
import collections
import contextlib
import dataclasses
import functools
import operator
import os
import stat
import time
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
import torch

from ..config import as_dict, format_shape, require, to_tuple
from ..files import READ_ERRORS, bf, file_extension, hash_lines, read_record, sha256_of_file, write_record
from ..interfaces import ImageSource
from .archives import (
    Member, export_directories, file_stamps, import_directories, is_archive, is_member, iter_members, list_members,
    open_directory, read_directory, require_readable, split_archive,
)

REFERENCE_EXTENSIONS = ("jpg", "jpeg", "png", "gif")
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "__pycache__"}      # beside the hidden ones, which start with a dot
INDEX_MINIMUM = 1000    # files of a folder or an archive that has an index
PROBED_FILES, THREADS_FROM_S = 32, 0.001    # threads read further files if most of these wait that long
_FILES_OF_IMAGES = ("npz", "mat", "h5", "hdf5")
MAX_LISTED_CLASSES = 20     # in a line of the log
# Fields of a DataConfig that do not determine the values.
_NOT_RECORDED = ("data_dir", "max_pixels", "random_flip", "allow_ignored", "verify_data")


class FileSource(ImageSource):
    """Shared part of `ImageFolder` and `VolumeFolder`: files, classes, checks, padding, descriptions.

    A subclass calls `_list_files` and `_set_shape` when constructed, and adds `batch` and `read_file`, which decodes a
    file of `paths`. Rank 0 constructs it and sends it to the other ranks, pickled.

    :raises FileNotFoundError: if the folder does not exist.
    """

    kind = "image"
    header_type: type       # class of the headers: a named tuple of JSON-able and hashable values

    def __init__(self, config, flag):
        self.config, self.folder, self._flag = config, config.data_dir, flag
        self.value_limits = config.value_limits
        self.random_flip, self.random_crop = config.random_flip, config.crop == "random"
        require_data_dir(config.data_dir, flag)
        require((self.kind == "image" or "://" in config.data_dir or os.path.isdir(config.data_dir),
                 f"{config.data_dir}: expected a folder of {self.kind}s, got a file; set {flag} to its folder, or "
                 "unpack an archive"))
        require((not config.colormap or len(config.sides) == 2, f"--colormap {config.colormap} is for images; omit it"))
        # Set by `_list_files`: sentences for the log, the files that are not read by ending, the label file.
        self.attributes, self.notes, self.left_out, self.label_record = {}, (), {}, {}
        self._archives = ()     # that contain the files

    @abstractmethod
    def read_file(self, file):
        """Return what file number `file` of `paths` contains, decoded."""

    def _list_files(self, extensions, accepts, read_header, hint, find_labels):
        """Set paths, names, classes and fingerprint; return the `FileHeader` of each file that `accepts(path)` selects.

        :param hint: what to check if there is no such file.
        :param find_labels: function (names, folder, label column) -> `labels.Labels`.
        :raises FileNotFoundError: if no file is accepted.
        """
        files = list(walk_files(self.folder, extensions))
        visible = [(path, name) for path, name in zip(files, relative_names(self.folder, files))
                   if not is_skipped(name)]
        chosen = [accepts(path) for path, _ in visible]
        self.paths = [path for (path, _), accepted in zip(visible, chosen) if accepted]
        require((self.paths, f"{self.folder} contains no {self.kind} ({', '.join(extensions)}) among {len(files)} "
                             f"files; check {self._flag}{hint}"), error=FileNotFoundError)
        self.names = [name for (_, name), accepted in zip(visible, chosen) if accepted]
        self.paths, self.names = self._merge(self.paths, self.names)
        found = find_labels(self.names, self.folder, self.config.label_column)
        self.class_names, self.labels, self.attributes, self.notes, self.label_record = found
        read = found.record.get("file")
        parts = self._parts(self.paths)
        self.ignored = len(files) - sum(chosen) - len(parts) - (read is not None)
        others = [path for (path, _), accepted in zip(visible, chosen)
                  if not accepted and path not in parts and os.path.basename(path) != read]
        self.left_out = dict(collections.Counter(file_extension(path) or "without ending" for path in others))
        if is_member(self.paths[0]):
            located = list(iter_members(self.paths))
            self._archives = list(dict.fromkeys(archive for archive, _ in located))
            stamps = [member.stamp for _, member in located]
            states = [*stamps, *(file_stamps(archive)[1] for archive in self._archives)]
        else:
            stamps, states = zip(*_map_files(functools.partial(self._require_stamps, read_header), self.paths))
        self.fingerprint = hash_lines(f"{name} {stamp}" for name, stamp in zip(self.names, stamps))
        return self._read_headers(read_header, states, sum(chosen))

    def _read_headers(self, read_header, states, count):
        """Return the header of each file; those of `count` files, which may be parts of fewer, are in an index."""
        def read():
            headers = _map_files(read_header, self.paths)
            number = {header: i for i, header in enumerate(dict.fromkeys(headers))}
            return {"headers": list(number), "numbers": _to_text([number[header] for header in headers])}, count

        content = _indexed(self.folder, "", [*self.names, *states, PIL.__version__, repr(read_header.keywords)], read)
        distinct = [self.header_type(*to_tuple(fields)) for fields in content["headers"]]
        return [distinct[number] for number in _from_text(content["numbers"]).tolist()]   # equal ones are one object

    def __getstate__(self):
        return {**vars(self), "_directories": export_directories(self._archives)}

    def __setstate__(self, state):
        import_directories(state.pop("_directories"))
        vars(self).update(state)

    def _merge(self, paths, names):
        """Return (paths, names) of what is read as one: here each file."""
        return paths, names

    def _parts(self, paths):
        """Return the set of the files that are read as parts of others: here none."""
        return set()

    def _stamps(self, path):
        """Return the `file_stamps` of a path."""
        return file_stamps(path)

    def _require_stamps(self, read_header, path):
        try:
            return self._stamps(path)
        except OSError:
            read_header(path)   # names the file in its error
            raise

    def _check_files(self, headers, full_range):
        """Check that each file is large enough and has the range of values that its type requires."""
        config, sides = self.config, self.config.sides
        is_small = lambda header: any(n < m for n, m in zip(header.sides, sides))
        for header in {id(header): header for header in headers}.values():  # few, of any number of files
            is_complex = header.dtype.startswith("complex")
            unlimited = not is_complex and not self.value_limits and header.dtype not in full_range
            if is_small(header) or is_complex and not config.dynamic_range_db or unlimited:
                path = next(path for path, other in zip(self.paths, headers) if other is header)
                small = sum(map(is_small, headers))
                require(
                    (not is_small(header),
                     f"{path}: size {format_shape(header.sides)} is smaller than --image_size {format_shape(sides)} "
                     f"({small} of {len(headers)} files are); nothing is upsampled, set a smaller size or remove them"),
                    (not is_complex or config.dynamic_range_db > 0,
                     f"{path}: complex values require --dynamic_range_db (e.g. 40) to map their magnitude to [0, 1]"),
                    (not unlimited,
                     f"{path}: {header.dtype} values require --value_range lo,hi, which become 0 and 1, or "
                     "--value_window lo,hi, which also clips values outside"),
                )

    def _set_shape(self, channels, headers, multiple):
        """Set the shape of an item, with `--pad True` padded to sizes that `multiple` divides, and the value types."""
        self.kinds = dict(collections.Counter(header.dtype for header in headers))
        self.file_sides = [header.sides for header in headers]
        sides = self.config.sides
        self.shape = self.unpadded_shape = (channels, *sides)
        if self.config.pad and multiple is not None:
            factors = (multiple,) * len(sides) if isinstance(multiple, int) else multiple
            self.shape = (channels, *(-(-n // factor) * factor for n, factor in zip(sides, factors)))

    def item_sides(self, index):
        """Return the sizes per spatial axis of the file of an item, before it is resized or cropped."""
        return self.file_sides[index]

    def _pad(self, item):
        """Return an item [C x ...] padded to `shape` by repeating its last rows along each axis."""
        after = [n - m for n, m in zip(self.shape[1:], self.unpadded_shape[1:])]
        return np.pad(item, [(0, 0), *((0, n) for n in after)], mode="edge") if any(after) else item

    def _stack(self, items, flips):
        """Return a list of items as a tensor; flips keep the padding at its side, where it repeats the new edge."""
        images, width = np.stack(items), self.unpadded_shape[-1]
        if flips is not None and any(flips):
            chosen = np.asarray(flips, bool)
            flipped = images[chosen][..., :width][..., ::-1]
            images[chosen, ..., :width] = flipped
            images[chosen, ..., width:] = flipped[..., -1:]
        return torch.from_numpy(images)

    @property
    def preprocessing(self):
        """The settings that map files to values, as recorded by checkpoints."""
        hidden = *_NOT_RECORDED, *self.config.VOLUME_OPTIONS, *self.config.unset_later_fields()
        return {k: v for k, v in as_dict(self.config).items() if k not in hidden}

    def warnings(self):
        """Return lines for the log on values that are probably not read as they are meant, for which files are read."""
        return []

    def describe(self):
        """Return the files and settings that were read, JSON-able; the `preprocessing` entry of a latent cache."""
        labels = {"label_file": self.label_record} if self.label_record else {}
        return {**super().describe(), "random_flip": self.random_flip, "files": len(self.paths),
                "ignored": self.ignored, "kinds": self.kinds, **labels}

    def summary(self):
        """Return one line for the log: count, shape, types and classes."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        ignored = f"; {self.ignored} other files ignored" if self.ignored else ""
        attributes = f"; attributes: {', '.join(self.attributes)}" if self.attributes else ""
        return f"{self._content()} ({kinds}) in {self.folder}{format_classes(self)}{attributes}{ignored}"

    def _content(self):
        return f"{len(self)} {self.kind}s {format_shape(self.shape)}"


class LabelMaps:
    """Items are one-hot maps [K x ...] of K label values; they are resized and cropped like images."""

    def __init__(self, values, config, multiple=None, flag="--condition_dir"):
        self.values = np.array(values)
        # The range lets all types of files be opened; values are compared with the labels when they are read.
        config = dataclasses.replace(config, image_channels=1, value_range=f"{min(values)},{max(values)}")
        super().__init__(config, multiple, flag)
        require((len(self.shape) == 3 or self.shape[0] == 1,
                 f"{self.folder} ({flag}): expected label maps of one channel, got {self.shape[0]}; omit "
                 "--condition_labels for images"))
        self.shape, self.unpadded_shape = ((len(values), *shape[1:]) for shape in (self.shape, self.unpadded_shape))

    def one_hot(self, labels, path):
        """Return label values [...] as float32 [... x K]."""
        one_hot = labels[..., None] == self.values
        if not one_hot.any(-1).all():
            found = ", ".join(f"{value:g}" for value in np.setdiff1d(labels, self.values)[:3])
            raise ValueError(f"{path}: expected labels {', '.join(map(str, self.values))} (--condition_labels), got "
                             f"{found}; set all values of the label maps, or omit the flag for images")
        return one_hot.astype(np.float32)


class ItemNames(Sequence):
    """The names `start`[0], `start`[1], ... of items in one file, made on access."""

    def __init__(self, start, count):
        self.start, self.numbers = start, range(count)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [f"{self.start}[{number}]" for number in self.numbers[index]]
        return f"{self.start}[{self.numbers[index]}]"

    def __eq__(self, other):
        return len(self) == len(other) and all(map(operator.eq, self, other))


def _map_files(function, paths):
    """Return `function` of each path, on several threads if the first ones mostly wait: for a network or a disk."""
    done, waits = [], []
    for path in paths[:PROBED_FILES]:
        start, busy = time.perf_counter(), time.thread_time()
        done.append(function(path))
        waits.append(time.perf_counter() - start - (time.thread_time() - busy))
    # Threads would compete for the interpreter. A few long waits are those for a core that other processes have.
    if not waits or np.median(waits) < THREADS_FROM_S:
        return [*done, *map(function, paths[PROBED_FILES:])]
    with ThreadPoolExecutor(8) as pool:
        return [*done, *pool.map(function, paths[PROBED_FILES:])]


def _indexed(source, kind, state, read):
    """Return what `read` returns first, from the index of a folder or an archive if it was saved in the same state.

    The index is a file in the cache folder of the user. If it cannot be read, `read` is called; that it cannot be
    written has no consequence.

    :param kind: end of the name of the index.
    :param state: texts that change with what is read. The code of this room counts, too.
    :param read: returns (JSON-able dictionary, number of files that were read), of which INDEX_MINIMUM have an index.
    """
    place = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hash_lines([source if "://" in source else os.path.abspath(source)])[:32]
    index = os.path.join(place, "guided_diffusion_vae", f"{name}{kind}.json")
    key = hash_lines([*state, _hash_of_code()])
    with contextlib.suppress(*READ_ERRORS):
        content = read_record(index)
        if content["key"] == key:
            return content
    content, count = read()
    if count >= INDEX_MINIMUM:
        with contextlib.suppress(*READ_ERRORS):
            write_record(index, {"key": key, **content})
    return content


@functools.cache
def _hash_of_code():
    return hash_lines(sha256_of_file(path) for path in sorted(Path(__file__).parent.glob("*.py")))


def _to_text(numbers):
    return base64.b64encode(np.array(numbers, "<i8")).decode()


def _from_text(text):
    return np.frombuffer(base64.b64decode(text), "<i8")


def _is_archive(path):
    """Return `is_archive`; the directory of a large archive is read from its index."""
    if found := split_archive(path):
        open_directory(found[0], _read_directory)
    return is_archive(path)


def _read_directory(archive):
    """Return {name: Member} of an archive, of a large one from its index."""
    def read():
        members = read_directory(archive)
        numbers = [(start, stored, size, method, -1 if crc is None else crc, encrypted)
                   for start, stored, size, _, method, crc, encrypted in members.values()]
        return {"names": "\0".join(members), "stamps": "\0".join(member.stamp for member in members.values()),
                "numbers": _to_text(numbers)}, len(members)

    content = _indexed(archive, "-members", [file_stamps(archive)[1]], read)
    rows = _from_text(content["numbers"]).reshape(-1, 6).tolist()
    return {name: Member(start, stored, size, stamp, method, None if crc < 0 else crc, bool(encrypted))
            for name, stamp, (start, stored, size, method, crc, encrypted)
            in zip(content["names"].split("\0"), content["stamps"].split("\0"), rows)}


def walk_files(folder, extensions, parents=()):
    """Yield the paths of all files below a folder or in an archive, entries in order of their names.

    Files of a folder of nothing but .tar shards, as webdataset writes them, are those in the shards.

    :param parents: resolved paths of the folders above.
    :raises ValueError: if a symbolic link leads back to a folder that contains it.
    :raises OSError: if a folder or an entry cannot be examined, such as a link to itself.
    """
    if _is_archive(folder):
        yield from list_members(folder)
        return
    resolved = folder if "://" in folder else os.path.realpath(folder)
    require((resolved not in parents, f"{folder} is a symbolic link to {resolved}, which contains it; remove the link"))
    entries = _list_folder(folder, extensions)
    shards = _are_shards(entries)
    for path, is_folder in entries:
        if is_folder or shards and file_extension(path) == "tar":
            yield from walk_files(path, extensions, (*parents, resolved))
        else:
            yield path


def _are_shards(entries):
    # Names are compared without blobfile, which examines each path for several clouds.
    visible = [(path, is_folder) for path, is_folder in entries if not os.path.basename(path).startswith(".")]
    endings = {"" if is_folder else file_extension(path) for path, is_folder in visible}
    return "tar" in endings and endings <= {"tar", "json", "txt", "md"}


def _list_folder(folder, extensions):
    """Return [(path, whether it is a folder)] of the entries of a folder in order of their names."""
    try:
        if "://" in folder:
            paths = [bf.join(folder, entry) for entry in sorted(bf.listdir(folder))]
        else:
            start = os.path.join(folder, "")
            paths = [start + entry for entry in sorted(os.listdir(folder))]
        # An entry with a known extension is a file without asking the file system, which is slow on clouds.
        return [(path, file_extension(path) not in extensions and _is_folder(path)) for path in paths]
    except OSError as error:
        message = f"{error.filename or folder} cannot be read: {error.strerror or error}; fix or remove it"
        raise OSError(error.errno, message) from error


def _is_folder(path):
    """Return whether a path is a folder; of a link to itself the error is raised, a link to nothing is none."""
    try:
        return bf.isdir(path) if "://" in path else stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def is_skipped(name: str) -> bool:
    """Return whether a relative file name is hidden, or in a hidden folder or one of an operating system."""
    return name.startswith(".") or "/." in name or "/" in name and not SYSTEM_FOLDERS.isdisjoint(name.split("/")[:-1])


def relative_names(folder, paths):
    """Return the paths relative to `folder`, with forward slashes."""
    start = len(folder.rstrip("/")) + 1
    return [path[start:].replace(os.sep, "/") for path in paths]


def require_data_dir(data_dir: str, flag: str = "--data_dir") -> None:
    """Check that a folder, an .npz, .zip or .tar file exists.

    :raises FileNotFoundError: if not; the message names `flag`.
    :raises ValueError: if it is an archive that cannot be read in place, or saved by Hugging Face datasets.
    """
    if _is_archive(data_dir):
        return
    require_readable(data_dir, flag)
    require(
        (data_dir, f"no folder of images specified; set {flag}"),
        (not data_dir or bf.exists(data_dir), f"{data_dir} does not exist; check {flag}"),
        (not data_dir or bf.isdir(data_dir) or file_extension(data_dir) in _FILES_OF_IMAGES,
         f"{data_dir} is a file; set {flag} to its folder, or to a file of all images: "
         f"{', '.join(_FILES_OF_IMAGES)}, zip or tar"),
        error=FileNotFoundError,
    )
    has = lambda name: bf.exists(bf.join(data_dir, name))
    split = "['train']" if has("dataset_dict.json") else ""
    require((not split and not (has("state.json") and has("dataset_info.json")),
             f"{data_dir} was saved by Hugging Face datasets: expected image files, got tables; export them, such as "
             f"by for i, row in enumerate(datasets.load_from_disk('{data_dir}'){split}): "
             "row['image'].save(f'images/{row[\"label\"]}_{i}.png')"))


def format_classes(source):
    """Return "; classes: a 6, b 6; numbers: a -> 0, b -> 1" for a source with classes, else an empty text."""
    if source.labels is None:
        return ""
    counts, names = np.bincount(source.labels, minlength=len(source.class_names)), source.class_names
    more = ["..."] if len(names) > MAX_LISTED_CLASSES else []
    numbers = [f"{name} -> {number}" for number, name in enumerate(names[:MAX_LISTED_CLASSES])]
    census = [f"{name} {count}" for name, count in zip(names[:MAX_LISTED_CLASSES], counts)]
    return f"; classes: {', '.join(census + more)}; numbers: {', '.join(numbers + more)}"
