import io
import json
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae.data import ImageFolder, archives, open_folder
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


# corrupt and hostile archives


@pytest.mark.parametrize("name, write", WRITERS[:2])
def test_every_changed_byte_of_a_zip_is_noticed_or_harmless(tmp_path, name, write):
    files = {name: FILES[name] for name in ("cats/1.png", "dogs/3.npy")}
    path, original = Path(write(tmp_path / name, files)), open_images(write_folder(tmp_path / "unpacked", files))
    content, expected, errors = path.read_bytes(), original.batch([0, 1]), 0
    for byte in range(0, len(content), 7):
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 4]) + content[byte + 1:])
        archives._read_directory.cache_clear()
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
    with pytest.raises(ValueError, match="a.zip: volumes are not read from archives; unpack it and set --val_data_dir"):
        open_folder(ImageFolder(data_dir=write_zip(path, FILES), image_size=8, image_channels=1).config,
                    image_size="8x8x8", image_channels=0, flag="--val_data_dir")


# threads, processes, speed


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
