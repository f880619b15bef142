import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from guided_diffusion_vae.files import (
    atomic_path, require_folder, require_writable_folder, sha256_of_file, remove_stale_parts, write_json,
)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_under_its_name(tmp_path):
    with atomic_path(tmp_path / "new/folder/a.txt") as part:
        part.write_text("content")
        assert names_in(part.parent) == [part.name] and part.name.endswith(".part")
    assert (tmp_path / "new/folder/a.txt").read_text() == "content"
    assert names_in(tmp_path / "new/folder") == ["a.txt"]


@pytest.mark.parametrize("error", [KeyError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "broken disk")])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(type(error)):
        with atomic_path(tmp_path / "a.txt") as part:
            part.write_text("half of the new")
            raise error
    assert (tmp_path / "a.txt").read_text() == "old" and names_in(tmp_path) == ["a.txt"]


def test_a_full_disk_is_reported_with_the_file_and_the_space_left(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match=rf"cannot write {path}: No space left on device \(\d+ MiB left on {tmp_path}\); "
                                      "free some space or choose another folder") as caught:
        with atomic_path(path) as part:
            # A device that is always full, in the place of the file: a real error of a real write.
            part.symlink_to("/dev/full")
            part.write_text("content")
    assert caught.value.errno == errno.ENOSPC and names_in(tmp_path) == []


@pytest.mark.parametrize("number, remedy", [
    (errno.EDQUOT, r" \(\d+ MiB left on .*\); free some space or choose another folder"), (errno.EACCES, ""),
    (errno.EIO, ""),
])
def test_space_is_a_remedy_only_where_it_ran_out(tmp_path, number, remedy):
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/a.txt: {os.strerror(number)}{remedy}$") as caught:
        with atomic_path(tmp_path / "a.txt"):
            raise OSError(number, os.strerror(number))
    assert caught.value.errno == number


def killed_inside_atomic_path(path):
    """Let a process write half of a file and be killed; return what it left."""
    script = ("import os, signal, sys; from guided_diffusion_vae.files import atomic_path\n"
              "with atomic_path(sys.argv[1]) as part:\n"
              "    part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)")
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=environ, timeout=240)
    assert done.returncode == -signal.SIGKILL
    left, = path.parent.glob(".*.part")
    return left


def test_parts_of_killed_processes_are_swept_and_no_others(tmp_path):
    left = killed_inside_atomic_path(tmp_path / "previews" / "a.b.png")
    host, number = left.name.removeprefix(".a.b.png.").removesuffix(".part").rsplit(".", 1)
    dead = left.rename(tmp_path / left.name)
    below = tmp_path / "previews" / left.name
    below.write_text("half")
    others = [f".a.png.{host}.{os.getpid()}.part", f".a.png.{host}.1.part", f".a.png.else{host}.{number}.part",
              f".a.png.{host}.part", f"a.png.{host}.{number}.part", ".model000005.pt.99.part", "model000005.pt"]
    for name in others:
        (tmp_path / name).write_text("")
    with atomic_path(tmp_path / "new.txt") as part:
        part.write_text("content")
        remove_stale_parts(tmp_path)
    assert not dead.exists() and not below.exists()
    assert names_in(tmp_path) == sorted([*others, "new.txt", "previews"])
    remove_stale_parts(tmp_path / "nowhere")


def test_a_folder_that_is_a_file_is_reported_as_such(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/file/a.txt: (File exists|Not a directory)"):
        write_json(tmp_path / "file/a.txt", {})
    with pytest.raises(OSError, match=f"cannot write into {tmp_path}/file.*give --logdir a folder that can be written"):
        require_writable_folder(tmp_path / "file", "--logdir")
    with pytest.raises(OSError, match=f"cannot write into {tmp_path}/file/below .*--logdir"):
        require_writable_folder(tmp_path / "file/below", "--logdir")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write into")
def test_a_folder_that_cannot_be_written_is_refused_by_its_flag():
    with pytest.raises(OSError, match="cannot write into /proc/nowhere .*give --cache_dir a folder that can be"):
        require_writable_folder("/proc/nowhere", "--cache_dir")


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    assert require_writable_folder(str(tmp_path / "a/b"), "--logdir") == tmp_path / "a/b"
    assert names_in(tmp_path / "a/b") == []


def test_ranks_on_several_machines_probe_one_folder_under_different_names(tmp_path, monkeypatch):
    probes = []
    monkeypatch.setattr(Path, "write_text", lambda path, text: probes.append(path.name) or path.touch())
    for host in ("one", "one", "two"):
        monkeypatch.setattr("socket.gethostname", lambda: host)
        require_writable_folder(tmp_path, "--logdir")
    assert len(set(probes)) == 3 and probes[0].split(".")[2] == "one" and probes[2].split(".")[2] == "two"


def test_a_folder_to_read_must_be_there(tmp_path):
    assert require_folder(str(tmp_path), "--data_dir") == tmp_path
    (tmp_path / "file").write_text("")
    for given, problem in (("", "no folder given; set --data_dir"), (tmp_path / "none", "none is not there; check"),
                           (tmp_path / "file", "file is a file, not a folder; check --data_dir")):
        with pytest.raises(FileNotFoundError, match=problem):
            require_folder(given, "--data_dir")


def test_json_is_written_so_that_it_reads_back(tmp_path):
    content = {"step": 3, "names": ["Füße", None], "nested": {"x": 0.1}}
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == content and text.endswith("}\n")


def test_content_that_is_no_json_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": {1, 2}})
    assert names_in(tmp_path) == []


def test_sha256_is_that_of_all_bytes(tmp_path):
    content = os.urandom((1 << 20) + 3)  # more than one block
    (tmp_path / "a").write_bytes(content)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
