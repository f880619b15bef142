import io
import json
import os
import pickle
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import scipy.io
from PIL import Image

from guided_diffusion_vae.data import ImageFolder, VolumeFolder, archives, image_folders, listing, open_folder
from guided_diffusion_vae.data.decoding import read_header, read_values

RNG = np.random.default_rng(0)
IMAGES = {"cats/1.png": RNG.integers(0, 256, (12, 10), np.uint8), "cats/2.png": RNG.integers(0, 256, (8, 8), np.uint8),
          "dogs/1.tif": RNG.integers(0, 65536, (9, 9), np.uint16), "dogs/2.jpg": RNG.integers(0, 256, (8, 8), np.uint8),
          "dogs/3.npy": RNG.integers(0, 256, (8, 8), np.uint8), "dogs/4.gif": RNG.integers(0, 256, (8, 8), np.uint8)}


def encode(name, array):
    stream, extension = io.BytesIO(), name.rpartition(".")[2]
    if extension == "npy":
        np.save(stream, array)
    else:
        Image.fromarray(array).save(stream, {"tif": "tiff", "jpg": "jpeg"}.get(extension, extension))
    return stream.getvalue()


FILES = {name: encode(name, array) for name, array in IMAGES.items()}


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return str(path)


def write_zip(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def write_tar(path, files, mode="w", **fields):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def write_deflated(path, files):
    return write_zip(path, files, zipfile.ZIP_DEFLATED)


WRITERS = [("a.zip", write_zip), ("a.ZIP", write_deflated), ("a.tar", write_tar)]


def open_images(path, **fields):
    return ImageFolder(data_dir=str(path), **{"image_size": 8, "image_channels": 1, **fields})


@pytest.mark.parametrize("name, write", WRITERS)
def test_images_classes_and_names_are_those_of_the_unpacked_folder(tmp_path, name, write):
    path = write(tmp_path / name, dict(reversed(FILES.items())))
    found, expected = open_images(path), open_images(write_folder(tmp_path / "unpacked", FILES))
    indices = range(len(expected))
    assert torch.equal(found.batch(indices, [True] * 6), expected.batch(indices, [True] * 6))
    assert found.names == expected.names == list(FILES)
    assert found.class_names == ["cats", "dogs"] and found.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert found.kinds == expected.kinds == {"uint8": 5, "uint16": 1}
    assert found.folder == path and found.paths[0] == f"{path}/cats/1.png"


@pytest.mark.parametrize("name, write", WRITERS)
def test_headers_and_values_are_those_of_files(tmp_path, name, write):
    path, folder = write(tmp_path / name, FILES), write_folder(tmp_path / "unpacked", FILES)
    for file in FILES:
        assert read_header(f"{path}/{file}") == read_header(f"{folder}/{file}")
        assert np.array_equal(read_values(f"{path}/{file}"), read_values(f"{folder}/{file}"))


@pytest.mark.parametrize("name, write", WRITERS)
def test_a_folder_inside_of_an_archive_is_read(tmp_path, name, write):
    path = write(tmp_path / name, {f"train/{file}": content for file, content in FILES.items()} | {"test/3_a.png": b""})
    assert open_images(f"{path}/train").names == list(FILES)
    with pytest.raises(FileNotFoundError, match="/val does not exist; check --data_dir"):
        open_images(f"{path}/val")


def test_hidden_members_and_those_of_systems_are_not_images(tmp_path):
    hidden = {".hidden.png": b"", "__MACOSX/cats/._1.png": b"", "cats/._1.png": b""}
    assert open_images(write_zip(tmp_path / "a.zip", {**FILES, **hidden})).names == list(FILES)


def test_directories_and_leading_dots_of_a_tar_are_no_part_of_names(tmp_path):
    folder = write_folder(tmp_path / "unpacked", FILES)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder, ".")
    assert open_images(tmp_path / "a.tar").names == list(FILES)


def test_a_folder_may_be_named_like_an_archive(tmp_path):
    folder = write_folder(tmp_path / "images.zip", FILES)
    inner = write_zip(tmp_path / "images.zip" / "inner.zip", FILES)
    assert open_images(folder).names == open_images(inner).names == list(FILES)


def test_an_archive_whose_entries_are_reordered_has_the_same_fingerprint(tmp_path):
    first = open_images(write_zip(tmp_path / "a.zip", FILES))
    second = open_images(write_zip(tmp_path / "b.zip", dict(reversed(FILES.items()))))
    changed = open_images(write_zip(tmp_path / "c.zip", {**FILES, "cats/2.png": FILES["dogs/2.jpg"]}))
    assert first.fingerprint == second.fingerprint != changed.fingerprint


def test_an_archive_that_is_replaced_is_listed_again(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    assert len(open_images(path)) == 6
    write_zip(path, {"b_1.png": FILES["cats/1.png"]})
    assert open_images(path).class_names == ["b"]


@pytest.mark.parametrize("name, write", WRITERS)
@pytest.mark.parametrize("folder", ["", "images/"])
def test_label_files_inside_of_an_archive_are_read(tmp_path, name, write, folder):
    labels = json.dumps({"labels": [[file, i // 3 + 4] for i, file in enumerate(FILES)]})
    files = {f"{folder}{file}": content for file, content in {**FILES, "dataset.json": labels.encode()}.items()}
    found, unpacked = open_images(write(tmp_path / name, files)), open_images(write_folder(tmp_path / "b", files))
    assert found.class_names == unpacked.class_names == ["4", "5"]
    assert found.labels.tolist() == unpacked.labels.tolist() == [0, 0, 0, 1, 1, 1]
    table = "file_name,label,speed\n" + "".join(f"{file},{file[0]},{i}\n" for i, file in enumerate(FILES))
    path = write(tmp_path / name, {**FILES, "metadata.csv": table.encode()})
    found = open_images(path)
    assert found.class_names == ["c", "d"] and found.attributes["speed"].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=f"{name}/metadata.csv has no column of labels: expected size"):
        open_images(path, label_column="size")


def test_names_of_a_zip_that_its_directory_hides_are_noticed(tmp_path):
    path = Path(write_zip(tmp_path / "a.zip", FILES))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 32] = 56     # length of the comment: the size of the next entry
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.zip: cannot be read .*\(expected 6 entries in its directory, got 5\)"):
        open_images(path)


# the saved index


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """Give archives of any size an index; return the list of the directories and headers that are read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "INDEX_MINIMUM", 1)
    paths, directory, header = [], archives.read_directory, image_folders.read_header
    monkeypatch.setattr(listing, "read_directory", lambda path: paths.append(path) or directory(path))
    monkeypatch.setattr(archives, "read_directory", listing.read_directory)
    monkeypatch.setattr(image_folders, "read_header", lambda path, *args: paths.append(path) or header(path, *args))
    return paths


@pytest.mark.parametrize("name, write", WRITERS)
def test_directory_and_headers_of_an_archive_are_read_again_only_if_it_changes(tmp_path, reads, name, write):
    path = write(tmp_path / name, FILES)
    first = open_images(path)
    assert len(reads) == 1 + len(FILES)
    members = archives.open_directory(path)
    for folder in ("", "/cats"):    # whose headers have an index of their own
        reads.clear()
        archives._directories.clear()
        again = open_images(path + folder)
        assert reads == [f"{path}/cats/{i}.png" for i in (1, 2) if folder]
        assert archives.open_directory(path) == members
        assert [type(value) for value in members["dogs/1.tif"]] == [
            type(value) for value in archives.open_directory(path)["dogs/1.tif"]]
        assert torch.equal(again.batch([0, 1]), first.batch([0, 1]))
    assert open_images(path).fingerprint == first.fingerprint and len(list((tmp_path / "cache").rglob("*.json"))) == 3
    status = os.stat(path)
    write(path, {**FILES, "dogs/2.jpg": FILES["cats/2.png"]})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    reads.clear()
    open_images(path)
    assert len(reads) == 1 + len(FILES)


@pytest.mark.parametrize("name, write", WRITERS)
def test_other_processes_receive_the_directory_of_an_archive(tmp_path, reads, name, write):
    source = open_images(write(tmp_path / name, FILES))
    sent = pickle.dumps(source)
    reads.clear()
    archives._directories.clear()
    assert torch.equal(pickle.loads(sent).batch(range(6)), source.batch(range(6))) and not reads
    write(tmp_path / name, {name: FILES[name] for name in reversed(FILES)})     # another copy has other positions
    assert torch.equal(pickle.loads(sent).batch(range(6)), source.batch(range(6))) and len(reads) == 1


def test_threads_wait_for_the_one_that_reads_the_directory_of_an_archive(tmp_path, monkeypatch):
    path, reads = write_zip(tmp_path / "a.zip", FILES), []

    def read(archive):
        reads.append(archive)
        time.sleep(0.1)
        return read_directory(archive)

    read_directory = archives.read_directory
    monkeypatch.setattr(archives, "read_directory", read)
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda _: archives.open_directory(path), range(4))
    assert reads == [path] and all(members is first for members in others)


# corrupt and hostile archives


@pytest.mark.parametrize("name, write", WRITERS[:2])
def test_every_changed_byte_of_a_zip_is_noticed_or_harmless(tmp_path, name, write):
    files = {name: FILES[name] for name in ("cats/1.png", "dogs/3.npy")}
    path, original = Path(write(tmp_path / name, files)), open_images(write_folder(tmp_path / "unpacked", files))
    content, expected, errors = path.read_bytes(), original.batch([0, 1]), 0
    for byte in range(0, len(content), 7):
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 4]) + content[byte + 1:])
        archives._directories.clear()
        try:
            found = open_images(path)
            if found.names == original.names:
                assert torch.equal(found.batch([0, 1]), expected)
        except (ValueError, FileNotFoundError) as error:
            assert str(error).startswith(str(path)), error
            errors += 1
    assert errors > len(content) / 7 / 2


def test_the_crc_of_a_member_is_compared(tmp_path):
    path = Path(write_zip(tmp_path / "a.zip", FILES))
    content = path.read_bytes()
    start = content.index(FILES["dogs/3.npy"]) + len(FILES["dogs/3.npy"]) - 1
    path.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1:])
    with pytest.raises(ValueError, match=r"a.zip/dogs/3.npy: cannot be read \(expected CRC \w{8}, got \w{8}\); fix or"):
        open_images(path).read(4)


@pytest.mark.parametrize("name, write", WRITERS)
def test_truncated_archives_are_rejected(tmp_path, name, write):
    path = Path(write(tmp_path / name, FILES))
    content = path.read_bytes()
    for length in (0, 100, 512 * 3, len(content) // 2 // 512 * 512, len(content.rstrip(b"\0")) - 10):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as a .{name[2:].lower()} archive \("):
            open_images(path)


def test_members_longer_than_the_archive_are_rejected_before_memory_is_allocated(tmp_path):
    path = Path(write_zip(tmp_path / "a.zip", FILES))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + 20:entry + 28] = b"\xff\xff\xff\x7f" * 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.zip: .*it is truncated: 'cats/1.png' ends after its {len(content)} b"):
        open_images(path)


def test_a_corrupt_header_does_not_end_a_tar(tmp_path):
    path = Path(write_tar(tmp_path / "a.tar", FILES))
    content = bytearray(path.read_bytes())
    content[content.index(b"dogs/1.tif")] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.tar: cannot be read as a .tar archive \(expected a member or the end of "
                                         r"the archive at byte \d+, got neither\)"):
        open_images(path)


@pytest.mark.parametrize("name, write", WRITERS)
@pytest.mark.parametrize("member", ["../a_1.png", "/a_1.png", "b/../../a_1.png", "b/../a_1.png"])
def test_names_that_lead_out_of_an_archive_are_rejected(tmp_path, name, write, member):
    path = write(tmp_path / name, {member: FILES["cats/1.png"]})
    with pytest.raises(ValueError, match=rf"{name}: cannot be read .*the name '{member}' leads out of the archive"):
        open_images(path)


def test_backslashes_and_repeated_names_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"a.zip: .*the name 'cats\\\\1.png' has backslashes: expected slashes"):
        open_images(write_zip(tmp_path / "a.zip", {"cats\\1.png": b""}))
    with pytest.raises(ValueError, match=r"b.tar: .*two members are named 'a.png'; repack it"):
        open_images(write_tar(tmp_path / "b.tar", {"a.png": b"", "./a.png": b""}))


def test_links_in_a_tar_are_rejected(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd")
    with pytest.raises(ValueError, match="a.tar: .*'a.png' is a link, a device or sparse: expected files and folders"):
        open_images(path)


def test_encrypted_members_are_rejected(tmp_path):
    path = Path(write_zip(tmp_path / "a.zip", {"a_1.png": FILES["cats/1.png"]}))
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.zip/a_1.png: cannot be read \(the member is encrypted; unpack"):
        open_images(path)


def test_members_that_unpack_to_much_more_are_rejected_before_they_are_unpacked(tmp_path):
    array = np.zeros((3000, 3000), np.uint8)
    path = write_deflated(tmp_path / "a.zip", {"a_1.npy": encode("a.npy", array)})
    assert open_images(path, max_pixels=9_000_128).shape == (1, 8, 8)
    with pytest.raises(ValueError, match=r"a.zip/a_1.npy: .* unpacks from \d+ to 9000128 bytes: expected at most"):
        open_images(path, max_pixels=9_000_000)


def test_other_compression_methods_and_compressed_tars_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="a.zip/cats/1.png: .*compression method 14: expected stored or deflate"):
        open_images(write_zip(tmp_path / "a.zip", FILES, zipfile.ZIP_LZMA))
    with pytest.raises(ValueError, match=r"a.tar.gz: expected a .zip or an uncompressed .tar, whose files can be read "
                                         r"in place, got .tar.gz; unpack it and set --data_dir to the folder"):
        open_images(write_tar(tmp_path / "a.tar.gz", FILES, "w:gz"))
    with pytest.raises(ValueError, match="a.tar: cannot be read .*; only uncompressed archives are read in place"):
        open_images(write_tar(tmp_path / "a.tar", FILES, "w:gz"))
    with pytest.raises(ValueError, match="gs://a/b.zip: archives are read from local disks only"):
        open_images("gs://a/b.zip")


def test_archives_without_images_and_of_volumes_are_rejected(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.txt": b""})
    with pytest.raises(FileNotFoundError, match="a.zip contains no image"):
        open_images(path)
    with pytest.raises(ValueError, match="a.zip: expected a folder of volumes, got a file; set --val_data_dir to"):
        open_folder(ImageFolder(data_dir=write_zip(path, FILES), image_size=8, image_channels=1).config,
                    image_size="8x8x8", image_channels=0, flag="--val_data_dir")


# shards of webdataset, tables of datasets


def write_shards(folder, classes, extra=""):
    folder.mkdir()
    images = list(FILES.items())
    for shard in (0, 1):
        files = {}
        for i, (name, content) in enumerate(images[3 * shard:3 * shard + 3], 3 * shard):
            files[f"{i:04}.{name.rpartition('.')[2]}"] = content
            if classes:
                files[f"{i:04}.cls"] = str(classes[i]).encode() + b"\n"
        write_tar(folder / f"train-{shard:04}.tar", {**files, **({"0000.seg.png": files["0000.png"]} if extra else {})})
        extra = ""
    return str(folder)


def test_each_shard_is_listed_once_however_many_there_are(tmp_path, monkeypatch):
    listed = []
    read = archives.read_directory
    monkeypatch.setattr(archives, "read_directory", lambda path: listed.append(path) or read(path))
    monkeypatch.setattr(listing, "read_directory", archives.read_directory)
    (tmp_path / "shards").mkdir()
    for i in range(20):
        write_tar(tmp_path / "shards" / f"{i:02d}.tar", {f"{i}.png": FILES["cats/2.png"]})
    source = open_images(tmp_path / "shards")
    source.batch([*range(20), *range(20)])
    assert len(listed) == len(source) == 20


def test_shards_of_webdataset_are_one_set_with_the_classes_of_their_cls_files(tmp_path):
    path = write_shards(tmp_path / "shards", [10, 2, 2, 10, 3, 2])
    (tmp_path / "shards" / "sizes.json").write_text("{}")
    expected = open_images(write_folder(tmp_path / "unpacked", FILES))
    found = open_folder(expected.config, data_dir=path)
    assert torch.equal(found.batch(range(6)), expected.batch(range(6)))
    assert found.class_names == ["2", "3", "10"] and found.labels.tolist() == [2, 0, 0, 2, 1, 0]
    assert found.names[3] == "train-0001.tar/0003.jpg" and found.ignored == 1
    assert found.describe()["label_file"]["column"] == "cls"
    shard = open_images(f"{path}/train-0001.tar")
    assert shard.class_names == ["2", "3", "10"] and shard.names[0] == "0003.jpg"
    assert open_images(write_shards(tmp_path / "plain", None)).labels is None
    assert open_images(path, label_column="none").labels is None


def test_samples_of_webdataset_have_one_image_and_one_class(tmp_path):
    with pytest.raises(ValueError, match=r"train-0000.tar/0000.seg.png and train-0000.tar/0000.png are images of one"):
        open_images(write_shards(tmp_path / "a", [1] * 6, extra="seg"))
    files = {"0.png": FILES["cats/1.png"], "0.cls": b"1", "1.png": FILES["cats/2.png"]}
    with pytest.raises(ValueError, match=r"a.tar/1.png has no class: expected it in .*a.tar/1.cls, as the first file"):
        open_images(write_tar(tmp_path / "a.tar", files))
    with pytest.raises(ValueError, match=r"a.tar/1.cls: cannot be read \(it is empty: expected a class\)"):
        open_images(write_tar(tmp_path / "a.tar", {**files, "1.cls": b" "}))


def test_tars_beside_images_or_folders_are_not_shards(tmp_path):
    folder = write_folder(tmp_path / "a", FILES)
    write_tar(tmp_path / "a" / "backup.tar", FILES)
    assert open_images(folder).names == list(FILES)


@pytest.mark.parametrize("name, split", [("dataset_dict.json", r"\['train'\]"), ("state.json", "")])
def test_tables_of_datasets_are_rejected_with_a_way_to_export_them(tmp_path, name, split):
    write_folder(tmp_path, {**FILES, "dataset_info.json": b"{}"})
    assert len(open_images(tmp_path)) == 6
    write_folder(tmp_path, {name: b"{}"})
    with pytest.raises(ValueError, match=rf"was saved by Hugging Face datasets: expected image files, .*'\){split}"
                                         r"\): row\['image'\].save"):
        open_images(tmp_path)


# threads, processes


@pytest.mark.parametrize("name, write", WRITERS)
def test_threads_and_forked_processes_read_at_once(tmp_path, name, write):
    source = open_images(write(tmp_path / name, FILES))
    expected = [source.read(i) for i in range(6)]
    wrong = []

    def read():
        wrong.extend(i for _ in range(30) for i in range(6) if not np.array_equal(source.read(i), expected[i]))

    child = os.fork()
    if not child:
        read()
        os._exit(len(wrong))
    threads = [threading.Thread(target=read) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert os.waitpid(child, 0)[1] == 0 and not wrong


# arrays in MATLAB and HDF5 files


def write_mat(path, values, **options):
    scipy.io.savemat(path, values, **options)
    return str(path)


def write_mat73(path, values, classes=True):
    """Write arrays as MATLAB does with -v7.3: HDF5 after a block of text, axes reversed, complex as (real, imag)."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in values.items():
            array, kind = np.asarray(array).T, {"float64": "double", "float32": "single", "bool": "logical"}
            if array.dtype.kind == "c":
                pair = np.empty(array.shape, [("real", array.real.dtype), ("imag", array.real.dtype)])
                pair["real"], pair["imag"] = array.real, array.imag
                stored = file.create_dataset(name, data=pair)
            else:
                stored = file.create_dataset(name, data=array.astype(np.uint8) if array.dtype == bool else array)
            if classes:
                stored.attrs["MATLAB_class"] = np.bytes_(kind.get(array.real.dtype.name, array.real.dtype.name))
    with open(path, "r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    return str(path)


def write_h5(path, values, **options):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, array in values.items():
            file.create_dataset(name, data=array, **options)
    return str(path)


ARRAY_WRITERS = {"5.mat": write_mat, "7.mat": lambda path, values: write_mat(path, values, do_compression=True),
                 "73.mat": write_mat73, "a.h5": write_h5,
                 "a.HDF5": lambda path, values: write_h5(path, values, chunks=True, compression="gzip", shuffle=True)}
TYPES = ["bool", "uint8", "uint16", "int16", "int32", "float32", "float64", "complex64", "complex128"]


def random_array(shape, dtype):
    values = RNG.normal(size=(2, *shape)) * 90
    return (values[0] + 1j * values[1] if dtype.startswith("complex") else values[0] > 0 if dtype == "bool" else
            values[0]).astype(dtype)


def in_range(source):
    return [source.read(i) for i in range(len(source))]


@pytest.mark.parametrize("name", ARRAY_WRITERS)
@pytest.mark.parametrize("shape", [(9, 12), (8, 10, 3), (3, 8, 10), (1, 8, 9)])
def test_the_same_matrix_has_the_same_values_in_every_format(tmp_path, name, shape):
    settings = {"image_channels": 0, "dynamic_range_db": 40, "value_window": "-500,500"}
    for dtype in TYPES:
        array = random_array(shape, dtype)
        for kind, write in (("files", ARRAY_WRITERS[name]), ("npy", lambda path, values: np.save(path, values["x"]))):
            folder = tmp_path / kind / dtype
            folder.mkdir(parents=True)
            others = {"fs": np.full((1, 1), 4000.0), "time": np.ones((1, 9))}
            write(folder / (name if kind == "files" else "a.npy"), {"x": array, **others})
        found, expected = (open_images(tmp_path / kind / dtype, **settings) for kind in ("files", "npy"))
        assert found.kinds == expected.kinds == {dtype: 1} and found.shape == expected.shape
        assert np.array_equal(found._values(0), expected._values(0)) and found._values(0).dtype == dtype
        assert np.array_equal(found.read(0), expected.read(0))


@pytest.mark.parametrize("name", ARRAY_WRITERS)
def test_one_of_several_arrays_is_named_by_array_key(tmp_path, name):
    first, second = random_array((8, 8), "uint8"), random_array((8, 9), "float32")
    ARRAY_WRITERS[name](tmp_path / f"up_{name}", {"first": first, "second": second})
    problem = r"expected one numeric array of 2 or 3 axes, got first uint8 \[8, 8\], second float32 \[8, 9\]\)"
    with pytest.raises(ValueError, match=rf"up_{name}: cannot be read \({problem}; .* --array_key"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="it contains no numeric array third: expected one of --array_key, got first"):
        open_images(tmp_path, array_key="third")
    assert np.array_equal(open_images(tmp_path, array_key="first")._values(0)[..., 0], first)
    assert open_images(tmp_path, array_key="first").preprocessing["array_key"] == "first"
    assert "array_key" not in ImageFolder(data_dir=write_folder(tmp_path / "b", FILES), image_size=8,
                                          image_channels=1).preprocessing


@pytest.mark.parametrize("name", ARRAY_WRITERS)
@pytest.mark.parametrize("shape, settings", [((9, 10, 12), {}), ((2, 9, 10, 12), {}),
                                             ((9, 10, 12), {"spacing": "1", "resample_spacing": "1,1,1.2"})])
def test_volumes_have_the_same_values_in_every_format(tmp_path, name, shape, settings):
    settings = {"image_size": "8x8x8", "value_window": "-300,300", "array_key": "x", **settings}
    for dtype in ("uint8", "float32"):
        array = random_array(shape, dtype)
        for kind, write in (("files", ARRAY_WRITERS[name]), ("npy", lambda path, values: np.save(path, values["x"]))):
            folder = tmp_path / kind / dtype
            folder.mkdir(parents=True)
            write(folder / (name if kind == "files" else "a.npy"), {"x": array, "y": array + 1})
        found, expected = (VolumeFolder(data_dir=str(tmp_path / kind / dtype), **settings) for kind in ("files", "npy"))
        assert found.kinds == expected.kinds == {dtype: 1} and found.shape == expected.shape
        assert np.array_equal(found.read(0), expected.read(0))
    with pytest.raises(ValueError, match=rf"{name}: .*expected one numeric array of 3 or 4 axes, got x float32 .*, y "):
        VolumeFolder(data_dir=str(tmp_path / "files/float32"), **{**settings, "array_key": ""})


def test_groups_of_hdf5_are_searched_and_other_files_are_not(tmp_path):
    h5py = pytest.importorskip("h5py")
    array = random_array((8, 8), "uint8")
    write_h5(tmp_path / "secret.h5", {"x": array})
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "a.h5", "w") as file:
        file["scan/radar/x"] = array
        file["link"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")
        file.create_dataset("raw", (8, 8), "u1", external=[(str(tmp_path / "secret.h5"), 0, 64)])
        file["text"] = "words"
    assert np.array_equal(open_images(tmp_path / "data")._values(0)[..., 0], array)
    for key in ("link", "raw"):
        with pytest.raises(ValueError, match=f"no numeric array {key}: expected one of --array_key, got scan/radar/x"):
            open_images(tmp_path / "data", array_key=key)


def test_texts_cells_and_empty_arrays_of_matlab_are_no_candidates(tmp_path):
    array = random_array((8, 10), "uint8")
    others = {"text": np.array(["one", "two"]), "cell": np.array([[array, 1]], object), "structure": {"y": array},
              "none": np.zeros((0, 8, 3))}
    write_mat(tmp_path / "a.mat", {**others, "x": array})
    h5py = pytest.importorskip("h5py")
    text, empty = np.ones((8, 8), np.uint16), np.array([[8, 0]], np.uint64)
    write_mat73(tmp_path / "b.mat", {"x": array, "text": text, "none": empty.repeat(3, 0)})
    with h5py.File(tmp_path / "b.mat", "r+") as file:
        file["text"].attrs["MATLAB_class"], file["none"].attrs["MATLAB_empty"] = np.bytes_("char"), 1
        file["#refs#/a"] = array
        file["cell"] = np.full((8, 8), file["#refs#/a"].ref, h5py.ref_dtype)
    for values in map(open_images(tmp_path)._values, (0, 1)):
        assert np.array_equal(values[..., 0], array)


def test_attributes_of_matlab_transpose_whatever_the_ending(tmp_path):
    array = random_array((8, 10), "uint8")
    write_mat73(tmp_path / "a.h5", {"x": array})
    write_mat73(tmp_path / "b.mat", {"x": array}, classes=False)
    for values in map(open_images(tmp_path)._values, (0, 1)):
        assert np.array_equal(values[..., 0], array)


@pytest.mark.parametrize("name", ARRAY_WRITERS)
@pytest.mark.parametrize("shape", [(6, 8, 9), (6, 9, 8, 3)])
def test_one_file_of_all_images_has_labels(tmp_path, name, shape):
    images, labels = random_array(shape, "uint8"), np.array([0, 1, 1, 0, 2, 1])
    offset = name.endswith("mat")    # MATLAB counts from 1
    path = ARRAY_WRITERS[name](tmp_path / name, {"x": images, "y": labels[:, None] + 1.0 if offset else labels})
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    found, expected = open_images(path, image_channels=0), open_images(tmp_path / "a.npz", image_channels=0)
    assert torch.equal(found.batch(range(6)), expected.batch(range(6))) and found.shape == expected.shape
    assert found.labels.tolist() == labels.tolist() and found.labels.dtype == np.int64
    assert found.class_names == (["1", "2", "3"] if offset else ["0", "1", "2"])
    assert found.names[3] == f"{name}[3]" and found.kinds == {"uint8": 6}


def test_one_wrong_label_of_matlab_does_not_make_a_billion_classes(tmp_path):
    path = write_mat(tmp_path / "a.mat", {"x": random_array((3, 8, 8), "uint8"), "y": np.array([1, 2, 10**9])})
    with pytest.raises(ValueError, match="a.mat: 'labels' do not number 3 classes: expected 0 to 2, .*got 999999999"):
        open_images(path)


@pytest.mark.parametrize("name", ARRAY_WRITERS)
def test_single_files_name_what_does_not_fit(tmp_path, name):
    write = ARRAY_WRITERS[name]
    path = write(tmp_path / name, {"x": random_array((8, 9, 3, 6), "uint8")})
    with pytest.raises(ValueError, match=rf"{name}: expected 'images' .* got .*\(8, 9, 3, 6\)"):
        open_images(path)
    path = write(tmp_path / name, {"x": random_array((6, 8, 8), "uint8"), "y": np.array([0, 1, 2, 0.5, 1, 1])})
    with pytest.raises(ValueError, match=f"{name}: 'labels' must be 6 integers >= 0, got float64"):
        open_images(path)
    path = write(tmp_path / name, {"x": random_array((6, 8, 8), "uint8"), "z": random_array((6, 8, 8), "uint8")})
    with pytest.raises(ValueError, match=rf"{name}: .*expected one numeric array of 3 or 4 axes, got x uint8 .*, z "):
        open_images(path)
    assert len(open_images(path, array_key="z")) == 6


@pytest.mark.parametrize("name", ARRAY_WRITERS)
def test_array_files_that_are_truncated_or_no_arrays_are_named(tmp_path, name):
    path = Path(ARRAY_WRITERS[name](tmp_path / name, {"x": random_array((40, 40), "uint8")}))
    content = path.read_bytes()
    for broken in (content[:-300], content[:100], b"", b"text" * 300):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{name}: cannot be read \(.*\); fix or remove the file"):
            open_images(tmp_path)


@pytest.mark.parametrize("name", ["7.mat", "a.h5"])
def test_sizes_of_arrays_are_bounded_before_they_are_read(tmp_path, name):
    path = ARRAY_WRITERS[name](tmp_path / name, {"x": np.zeros((100, 101), np.uint8)})
    assert open_images(tmp_path, max_pixels=10_100).shape == (1, 8, 8)
    for data_dir in (tmp_path, path) if name == "7.mat" else (tmp_path,):
        with pytest.raises(ValueError, match=f"{name}: .*describes 10100 pixels: expected at most --max_pixels 10099"):
            open_images(data_dir, max_pixels=10_099, array_key="x")


def test_sparse_hdf5_that_describes_more_than_it_contains_is_rejected(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (20_000, 20_000), "f8", chunks=(100, 100))
    with pytest.raises(ValueError, match=r"a.h5: .*describes 400000000 pixels of 64 bits, more than \d+ bytes"):
        open_images(tmp_path)


def test_array_files_are_read_from_archives(tmp_path):
    arrays = {name: random_array((8, 8), "uint8") for name in ARRAY_WRITERS}
    files = {name: Path(write(tmp_path / name, {"x": arrays[name]})).read_bytes()
             for name, write in ARRAY_WRITERS.items()}
    source = open_images(write_deflated(tmp_path / "all.zip", files))
    for i, name in enumerate(source.names):
        assert np.array_equal(source._values(i)[..., 0], arrays[name])


def test_a_forked_process_opens_a_file_of_images_itself(tmp_path):
    source = open_images(write_h5(tmp_path / "a.h5", {"x": random_array((6, 8, 8), "uint8")}))
    expected = in_range(source)
    child = os.fork()
    if not child:
        os._exit(not np.array_equal(in_range(source), expected) or source._archive._process != os.getpid())
    assert np.array_equal(in_range(source), expected) and os.waitpid(child, 0)[1] == 0


def test_the_missing_library_of_hdf5_is_named_with_its_extra(tmp_path, monkeypatch):
    write_h5(tmp_path / "a.h5", {"x": random_array((8, 8), "uint8")})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"a.h5 requires h5py: pip install 'guided-diffusion-vae\[hdf5\]'"):
        open_images(tmp_path)
