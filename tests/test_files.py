import errno
import hashlib
import json
import os
import signal
import socket
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from guided_diffusion_vae import checkpoint_util, image_datasets, locks
from guided_diffusion_vae.data import DataConfig, ImageFolder, VolumeFolder, open_npz
from guided_diffusion_vae.data.manifest import read_manifest
from guided_diffusion_vae.data.microdoppler import MicrodopplerConfig, write_dataset
from guided_diffusion_vae.files import (
    atomic_path, atomic_stream, file_errors, load_tensors, open_zip, read_record,
    remove_stale_parts, require_folder, require_regular_file, require_writable_folder, sha256_of_file, write_json,
    write_errors, write_record,
)
from guided_diffusion_vae.latent_datasets import LatentCache, open_latents
from guided_diffusion_vae.locks import LOCK_FILE, FolderInUseError, locked_folder
from forks import FORKS


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_path_creates_the_complete_file(tmp_path):
    with atomic_path(tmp_path / "new/folder/a.txt") as part:
        part.write_text("content")
        assert names_in(part.parent) == [part.name] and part.name.endswith(".part")
    assert (tmp_path / "new/folder/a.txt").read_text() == "content"
    assert names_in(tmp_path / "new/folder") == ["a.txt"]


@pytest.mark.parametrize("error", [KeyError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "broken disk")])
def test_atomic_path_exception_leaves_the_old_file_only(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(type(error)):
        with atomic_path(tmp_path / "a.txt") as part:
            part.write_text("half of the new")
            raise error
    assert (tmp_path / "a.txt").read_text() == "old" and names_in(tmp_path) == ["a.txt"]


def test_atomic_path_full_disk_names_the_file_and_the_free_space(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match=rf"cannot write {path}: No space left on device \(\d+ MiB free on {tmp_path}\); "
                                      "free some space or choose another folder") as caught:
        with atomic_path(path) as part:
            # A device that is always full, instead of the file: an actual error of an actual write.
            part.symlink_to("/dev/full")
            part.write_text("content")
    assert caught.value.errno == errno.ENOSPC and names_in(tmp_path) == []


@pytest.mark.parametrize("number, hint", [
    (errno.EDQUOT, r" \(\d+ MiB free on .*\); free some space or choose another folder"), (errno.EACCES, ""),
    (errno.EIO, ""),
])
def test_atomic_path_reports_free_space_only_if_the_disk_is_full(tmp_path, number, hint):
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/a.txt: {os.strerror(number)}{hint}$") as caught:
        with atomic_path(tmp_path / "a.txt"):
            raise OSError(number, os.strerror(number))
    assert caught.value.errno == number


def leave_part(path):
    """Kill a process that has written half of a file, and return the temporary file it leaves."""
    script = ("import os, signal, sys; from guided_diffusion_vae.files import atomic_path\n"
              "with atomic_path(sys.argv[1]) as part:\n"
              "    part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)")
    process = FORKS.run_source(script, path)
    assert process.returncode == -signal.SIGKILL
    part, = path.parent.glob(".*.part")
    return part


def test_remove_stale_parts_removes_only_those_of_killed_processes(tmp_path):
    stale = leave_part(tmp_path / "previews" / "a.b.png")
    host, number = stale.name.removeprefix(".a.b.png.").removesuffix(".part").rsplit(".", 1)
    stale = stale.rename(tmp_path / stale.name)
    below = tmp_path / "previews" / stale.name
    below.write_text("half")
    others = [f".a.png.{host}.{os.getpid()}.part", f".a.png.{host}.1.part", f".a.png.else{host}.{number}.part",
              f".a.png.{host}.part", f"a.png.{host}.{number}.part", ".model000005.pt.99.part", "model000005.pt"]
    for name in others:
        (tmp_path / name).write_text("")
    with atomic_path(tmp_path / "new.txt") as part:
        part.write_text("content")
        remove_stale_parts(tmp_path)
    assert not stale.exists() and not below.exists()
    assert names_in(tmp_path) == sorted([*others, "new.txt", "previews"])
    remove_stale_parts(tmp_path / "nowhere")


def test_writing_below_a_file_names_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/file/a.txt: (File exists|Not a directory)"):
        write_json(tmp_path / "file/a.txt", {})
    with pytest.raises(OSError, match=f"cannot write into {tmp_path}/file.*set --logdir to a writable folder"):
        require_writable_folder(tmp_path / "file", "--logdir")
    with pytest.raises(OSError, match=f"cannot write into {tmp_path}/file/below .*--logdir"):
        require_writable_folder(tmp_path / "file/below", "--logdir")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="requires a folder without write access")
def test_require_writable_folder_error_names_the_flag():
    with pytest.raises(OSError, match="cannot write into /proc/nowhere .*set --cache_dir to a writable folder"):
        require_writable_folder("/proc/nowhere", "--cache_dir")


def test_require_writable_folder_creates_an_empty_folder(tmp_path):
    assert require_writable_folder(str(tmp_path / "a/b"), "--logdir") == tmp_path / "a/b"
    assert names_in(tmp_path / "a/b") == []


def test_require_writable_folder_probes_differ_between_ranks_and_hosts(tmp_path, monkeypatch):
    probes = []
    monkeypatch.setattr(Path, "write_bytes", lambda path, text: probes.append(path.name) or path.touch())
    for host in ("one", "one", "two"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        require_writable_folder(tmp_path, "--logdir")
    assert len(set(probes)) == 3 and probes[0].split(".")[2] == "one" and probes[2].split(".")[2] == "two"


def test_require_folder_rejects_missing_folders_and_files(tmp_path):
    assert require_folder(str(tmp_path), "--data_dir") == tmp_path
    (tmp_path / "file").write_text("")
    for folder, message in (("", "no folder specified; set --data_dir"),
                            (tmp_path / "none", "none does not exist; check --data_dir"),
                            (tmp_path / "file", "file is a file, not a folder; check --data_dir")):
        with pytest.raises(FileNotFoundError, match=message):
            require_folder(folder, "--data_dir")


def test_write_json_round_trip(tmp_path):
    content = {"step": 3, "names": ["Füße", None], "nested": {"x": 0.1}}
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == content and text.endswith("}\n")


def test_write_json_error_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": {1, 2}})
    assert names_in(tmp_path) == []


def test_sha256_of_file_covers_all_bytes(tmp_path):
    content = os.urandom((1 << 20) + 3)     # more than one block
    (tmp_path / "a").write_bytes(content)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_atomic_stream_hashes_what_is_written(tmp_path):
    with atomic_stream(tmp_path / "a.npy") as stream:
        np.save(stream, np.arange(5.0))
    assert stream.entry == {"bytes": 168, "sha256": sha256_of_file(tmp_path / "a.npy")}
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]


def test_zip_whose_directory_hides_entries_is_rejected(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.arange(2))
    original = bytearray(path.read_bytes())
    assert open_npz(path).labels.tolist() == [0, 1]
    entry = original.index(b"PK\1\2")
    for field in (28, 30, 32):      # lengths of name, extra field and comment
        corrupt = original.copy()
        corrupt[entry + field + 1] ^= 0x40
        path.write_bytes(corrupt)
        with pytest.raises(ValueError, match="a.npz"):
            open_npz(path)
    with open(path, "rb") as stream, pytest.raises(zipfile.BadZipFile, match="expected 2 entries .* got 1"):
        with open_zip(stream):
            pass


# Records


RECORD = {"std": 0.217, "names": ["Füße", None], "scales": {10: 1e-05, 9: [True, -2]}, "text": "a\nb"}


def test_record_round_trip_whatever_its_layout(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, RECORD)
    assert read_record(path) == json.loads(json.dumps(RECORD))
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4, sort_keys=True))
    assert read_record(path) == json.loads(json.dumps(RECORD))
    path.write_text(json.dumps(RECORD))     # as before version 0.3
    assert read_record(path) == json.loads(json.dumps(RECORD))


def test_flipped_bits_of_a_record_are_refused_or_change_no_value(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, RECORD)
    original, values = path.read_bytes(), read_record(path)
    for place in range(0, 8 * len(original), 3):
        corrupt = bytearray(original)
        corrupt[place // 8] ^= 1 << place % 8
        path.write_bytes(corrupt)
        try:
            found = read_record(path, "restore it")
        except ValueError as error:
            assert "a.json" in str(error) and "restore it" in str(error)
        else:
            assert found == values      # another spelling of the same number or text


@pytest.mark.parametrize("text, problem", [
    ("", "invalid JSON"), ("[1]", "expected an object, got list"), ("[" * 100_000, "invalid JSON"),
    ('{"a": 1, "content_sha256": 3}', "corrupt or was edited"),
    ('{"a": 1, "cootent_sha25": 3}', "corrupt or was edited"),
    ('{"a": 1, "": "' + "0a" * 32 + '"}', "corrupt or was edited"), ("\xff", "invalid JSON"),
])
def test_invalid_record_is_refused(tmp_path, text, problem):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"a.json.*{problem}.*; restore it"):
        read_record(tmp_path / "a.json", "restore it")


# Locks


def hold(folder, host=None, age=0.0):
    """Leave the lock of a process that has ended, last seen `age` seconds ago, on this host or another one."""
    lock = folder / LOCK_FILE
    lock.write_text(json.dumps({"host": host or socket.gethostname(), "process": 1, "user": "image_train_vae",
                                "started": "2026-01-01T00:00:00+00:00"}))
    os.utime(lock, (time.time() - age,) * 2)
    return lock


def test_locked_folder_is_refused_by_name_until_it_is_released(tmp_path):
    with locked_folder(tmp_path, "--logdir", "image_train"):
        for _ in range(2):
            with pytest.raises(FolderInUseError, match=(
                    rf"{tmp_path} is in use by image_train \(process {os.getpid()} on {socket.gethostname()}, started "
                    r"20\d\d-.*\): wait until it has ended, stop it, or set another --logdir")):
                with locked_folder(tmp_path, "--logdir", "other"):
                    pass
    assert names_in(tmp_path) == []
    with locked_folder(tmp_path, "--logdir", "other"):
        pass


def test_lock_is_held_by_another_process_and_released_by_its_death(tmp_path):
    messages, (reader, writer) = [], os.pipe()
    child = os.fork()
    if child == 0:
        with locked_folder(tmp_path, "--logdir", "child"):
            os.write(writer, b"locked")
            signal.pause()
    try:
        assert os.read(reader, 6) == b"locked"
        with pytest.raises(FolderInUseError, match=rf"in use by child \(process {child} "):
            with locked_folder(tmp_path, "--logdir", "other", messages.append):
                pass
        assert messages == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with locked_folder(tmp_path, "--logdir", "other", messages.append):
        assert len(messages) == 1 and f"child (process {child} " in messages[0] and "has ended" in messages[0]
    assert names_in(tmp_path) == []


def test_lock_of_another_host_is_refused_while_it_shows_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "TIMEOUT", 0.4)
    lock, messages, stop = hold(tmp_path, "gpu07"), [], threading.Event()
    heart = threading.Thread(target=locks._show_life, args=(lock, stop))
    heart.start()
    try:
        with pytest.raises(FolderInUseError, match="in use by image_train_vae .process 1 on gpu07, started 2026-01-01"):
            with locked_folder(tmp_path, "--logdir", "other", messages.append):
                pass
    finally:
        stop.set()
        heart.join()
    assert "waiting up to 0.4 s" in messages[0]
    with locked_folder(tmp_path, "--logdir", "other", messages.append):     # no sign of life any more
        assert "gpu07" in messages[-1] and "has ended" in messages[-1]
    monkeypatch.setattr(locks, "TIMEOUT", 60)
    hold(tmp_path, "gpu07", age=7200)   # too old to be waited for
    with locked_folder(tmp_path, "--logdir", "other", messages.append):
        pass


def test_holder_shows_life_and_leaves_the_lock_of_its_successor(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "TIMEOUT", 0.1)
    with locked_folder(tmp_path, "--logdir", "one"):
        lock = tmp_path / LOCK_FILE
        os.utime(lock, (0, 0))
        for _ in range(200):
            if lock.stat().st_mtime > 0:
                break
            time.sleep(0.01)
        assert lock.stat().st_mtime > 0
        lock.unlink()
        hold(tmp_path, "gpu07")     # as if taken over by another host
    assert names_in(tmp_path) == [LOCK_FILE]


def test_lock_without_support_of_the_file_system(tmp_path, monkeypatch):
    streams, unlink = [], Path.unlink

    def unlink_closed(path):    # as on Windows
        if not all(stream.closed for stream in streams):
            raise PermissionError
        unlink(path)

    monkeypatch.setattr(locks, "open", lambda *args, **kwargs: streams.append(open(*args, **kwargs)) or streams[-1],
                        raising=False)
    monkeypatch.setattr(Path, "unlink", unlink_closed)
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "TIMEOUT", 0.4)
    with locked_folder(tmp_path, "--logdir", "one"):
        with pytest.raises(FolderInUseError, match="in use by one"):
            with locked_folder(tmp_path, "--logdir", "other", lambda message: None):
                pass
    assert names_in(tmp_path) == []


# Regular files only


@pytest.mark.parametrize("name, read", [
    ("tapin_0006.png", lambda path: ImageFolder(data_dir=str(path.parent), image_size=8)),
    ("tapin_0006.npy", lambda path: ImageFolder(data_dir=str(path.parent), image_size=8)),
    ("tapin_0006.png", lambda path: image_datasets.ImageDataset(8, [str(path)])[0]),
    ("tapin_0006.npy", lambda path: VolumeFolder(DataConfig(str(path.parent), "4x4x4"))),
    ("tapin_0006.npz", lambda path: VolumeFolder(DataConfig(str(path.parent), "4x4x4"))),
    ("tapin_0006.nii.gz", lambda path: VolumeFolder(DataConfig(str(path.parent), "4x4x4"))),
    ("tapin_0006.npy", lambda path: open_latents(path.parent)),
    ("samples.npz", lambda path: ImageFolder(data_dir=str(path), image_size=8)),
    ("samples.npz", open_npz),
    ("manifest.json", lambda path: read_manifest(path.parent)),
    ("filenames.txt", lambda path: LatentCache.filenames.fget(SimpleNamespace(folder=path.parent))),
    ("dataset.json", lambda path: write_dataset(MicrodopplerConfig(out_dir=str(path.parent)))),
    ("state000003.json", lambda path: checkpoint_util.read_marker(path.parent, 3)),
    ("model000003.pt", load_tensors),
    ("model000003.pt", sha256_of_file),
])
def test_named_pipes_are_rejected_before_they_are_opened(tmp_path, named_pipe, name, read):
    path = named_pipe(tmp_path / name)
    with pytest.raises(ValueError, match=f"{path} cannot be read: expected a regular file, got a named pipe; "):
        read(path)


def test_named_pipe_that_replaces_a_listed_image_is_rejected(tmp_path, named_pipe):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    folder = ImageFolder(data_dir=str(tmp_path), image_size=8)
    (tmp_path / "a.png").unlink()
    named_pipe(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png cannot be read: expected a regular file, got a named pipe"):
        folder.batch([0])


def test_files_that_are_not_read_may_be_named_pipes(tmp_path, named_pipe):
    Image.fromarray(np.full((8, 8), 51, np.uint8)).save(tmp_path / "a.png")
    named_pipe(tmp_path / "notes.txt")
    named_pipe(tmp_path / ".b.png")
    assert ImageFolder(data_dir=str(tmp_path), image_size=8).read(0).mean() == pytest.approx(0.2)


def test_sockets_devices_and_folders_are_rejected_and_links_are_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)     # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    Path("device.png").symlink_to("/dev/zero")
    Path("folder.png").mkdir()
    for kind in ("socket", "device", "folder"):
        with pytest.raises(ValueError, match=f"^{kind}.png cannot be read: expected a regular file, got a {kind}; fix"):
            with file_errors(f"{kind}.png", action="fix it"):
                raise AssertionError("opened")
    Path("file").write_text("content")
    Path("link").symlink_to("file")
    require_regular_file("link")
    require_regular_file("gs://bucket/file")    # not on this machine


def test_missing_files_and_loops_of_links_are_named(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name, problem in (("none.png", "No such file"), ("loop.png", "symbolic links")):
        with pytest.raises(ValueError, match=f"{tmp_path}/{name}: cannot be read .*{problem}.*; fix or remove"):
            with file_errors(tmp_path / name), open(tmp_path / name):
                pass


def test_full_disks_are_recognized_in_errors_of_libraries(tmp_path):
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/a: No space left on device .*; free some space"):
        with write_errors(tmp_path / "a"):
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="another"), write_errors(tmp_path / "a"):
        raise RuntimeError("another")
