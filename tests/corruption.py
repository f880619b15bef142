"""Corrupt small files of every format that is read, and assess how they are read; see campaign.py."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import traceback
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from PIL import Image

from guided_diffusion_vae import checkpoint_util, data, train_util, vae_wrapper
from guided_diffusion_vae.runs import configs, flags, loading, spaces
from guided_diffusion_vae.runs.run import Run

ROOT = Path(__file__).parents[1]
HANG_S = 60             # a case that takes longer has failed
MEMORY_MIB = 512        # that reading a file of a few KiB may take
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)    # printed as one line by `dist_util.launch`


class Failure(Exception):
    """A promise that was not kept: its kind, and after a colon the details."""


def require(condition, kind, details=""):
    if not condition:
        raise Failure(f"{kind}: {details}")


def keyed_rng(seed, name):
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def fork():
    """Fork this process, which must have one thread: others do not exist in a fork, and may have held locks."""
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads"
    return os.fork()


# --- Formats ---


class Format(NamedTuple):
    """Files of a folder below the root, and a function that reads one of them as the scripts do.

    Corrupted is what `unpack` returns for a file; `pack` makes a file of it, whose checksums are valid. If another
    library reads the folder, errors may name the folder alone.
    """

    folder: str
    files: str
    read: Callable
    checksum: bool = False
    unpack: Callable = bytes
    pack: Callable = lambda content, original: content
    foreign: bool = False


def read_images(path, **fields):
    folder = path if path.suffix == ".npz" else path.parent
    images = data.ImageFolder(data_dir=str(folder), image_size=8, **fields)
    return images.batch(range(len(images))), images.labels, images.class_names


def read_volumes(path):
    volumes = data.VolumeFolder(data_dir=str(path.parent), image_size="4x4x4", value_window="-3,3")
    return volumes.batch(range(len(volumes))), volumes.spacing


def read_cache(path):
    cache = spaces.open_cache(path.parent, {})
    return cache.read(range(len(cache))), cache.labels, cache.filenames, cache.manifest


def read_step(path):
    marker, folder = train_util.find_checkpoint(path.parent)
    return marker, {name: checkpoint_util.load(folder / name) for name in marker["files"]}


def read_weights(path):
    return tuple(loading.open_weights(str(path)))[:2]


def read_model(path):
    network, process = loading.load_diffusion_model(loading.open_weights(str(path)))
    return network.state_dict(), process.betas


def read_autoencoder(path):
    codec = vae_wrapper.VAEInterface(path, device="cpu")
    return codec.fingerprint, codec.describe(), codec.preprocessing


def read_settings(path):
    return flags.read_yaml(str(path), (configs.AutoencoderConfig, configs.AutoencoderTrainConfig, configs.DataConfig))


def with_crcs(content, original):
    """Return a PNG with the CRC that each chunk should have."""
    content, start = bytearray(content), 8
    while (end := start + 8 + int.from_bytes(content[start:start + 4], "big")) + 4 <= len(content):
        content[end:end + 4] = zlib.crc32(content[start + 4:end]).to_bytes(4, "big")
        start = end + 4
    return bytes(content)


def zipped(content, original=None):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    return stream.getvalue()


def unzipped(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read("images.npy")


def with_header(content, original):
    weights, stream = torch.load(io.BytesIO(original), weights_only=True), io.BytesIO()
    weights._metadata[checkpoint_util.HEADER_KEY] = content.decode("latin-1")
    torch.save(weights, stream)
    return stream.getvalue()


def header_of(content):
    return torch.load(io.BytesIO(content), weights_only=True)._metadata[checkpoint_util.HEADER_KEY].encode()


# Whatever has a checksum: every flipped bit is noticed or without effect.
FLIPS = {
    "cache": Format("encode/run", "*", read_cache, True),
    "checkpoint": Format("step", "[dmseo]*[0-9].*", read_step, True),
    "run": Format("step", "[se]*[0-9].*", lambda path: read_weights(path.parent), True),
    "weights": Format("step", "ema*.pt", read_weights, True),
    "config.json": Format("step", "config.json", lambda path: Run("", (), {}, path.parent).resumed_header, True),
    "autoencoder": Format("autoencoder/run", "[se]*6.*", lambda path: read_autoencoder(path.parent), True),
    "autoencoder-file": Format("autoencoder/run", "ema*6.pt", read_autoencoder, True),
    "samples": Format("sample/run", "samples*.npz", lambda path: vars(data.open_npz(str(path))), True),
    "png": Format("formats/png", "*", read_images, True),
    "npz": Format("formats/npz", "*", read_images, True),
    "nii.gz": Format("formats/nii.gz", "*", read_volumes, True),
    "pt": Format("formats/pt", "*", read_weights, True),
    "safetensors": Format("formats/safetensors", "*", read_weights, True),
}
MUTATIONS = {
    **FLIPS,
    **{name: Format(f"formats/{name}", "*", read_images) for name in ("jpg", "gif", "tiff", "tiff-lzw", "npy")},
    "npy-float": Format("formats/npy-float", "*", lambda path: read_images(path, value_window="-3,3")),
    "npy-volume": Format("formats/npy-volume", "*", read_volumes),
    "nii": Format("formats/nii", "*", read_volumes),
    "png-content": Format("formats/png", "*", read_images, pack=with_crcs),
    "npz-content": Format("formats/npz-content", "*", read_images, unpack=unzipped, pack=zipped),
    "nii.gz-content": Format("formats/nii.gz", "*", read_volumes, unpack=gzip.decompress,
                             pack=lambda content, original: gzip.compress(content, 1)),
    "yaml": Format("formats/yaml", "*", read_settings),
    "pt-header": Format("formats/pt", "*", read_model, unpack=header_of, pack=with_header),
    "diffusers": Format("formats/diffusers", "*", lambda path: read_autoencoder(path.parent), foreign=True),
}


def write_formats(root):
    """Write one small file of each format that users bring, and a folder with the last step of the training `train`."""
    rng, formats = np.random.default_rng(0), root / "formats"
    for name in {Path(kind.folder).name for kind in MUTATIONS.values() if kind.folder.startswith("formats")}:
        (formats / name).mkdir(parents=True)
    pixels = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    for name, options in {"png": {}, "jpg": {}, "gif": {}, "tiff": {}, "tiff-lzw": {"compression": "tiff_lzw"}}.items():
        pixels.save(formats / name / f"a_0.{name.partition('-')[0]}", **options)
    volume, images = rng.normal(size=(6, 6, 6)).astype(np.float32), rng.integers(0, 256, (3, 12, 12), np.uint8)
    for name, array in {"npy": np.asarray(pixels), "npy-float": volume[0].repeat(2, 0).repeat(2, 1),
                        "npy-volume": volume, "npz-content": images}.items():
        np.save(formats / name / "a_0.npy", array)
    member = formats / "npz-content" / "a_0.npy"
    member.with_suffix(".npz").write_bytes(zipped(member.read_bytes()))
    member.unlink()
    np.savez(formats / "npz" / "a.npz", images=images, labels=np.arange(3), class_names=np.array(list("abc")))
    for name in ("nii", "nii.gz"):
        data.write_nifti(formats / name / f"a_0.{name}", volume, (2, 1, 1))
    shutil.copy(ROOT / "configs" / "microdoppler_small.yaml", formats / "yaml")
    shutil.copytree(root / "train/run", root / "step")
    last = checkpoint_util.committed_steps(root / "step")[-1]
    for path in root.glob("step/*0[0-9][0-9][0-9][0-9][0-9].*"):
        if f"{last:06d}." not in path.name:
            path.unlink()
    weights = checkpoint_util.load_weights(root / "step" / checkpoint_util.model_name(last))
    checkpoint_util.save_weights(formats / "pt" / "weights.pt", *weights)
    checkpoint_util.save_safetensors(formats / "safetensors" / "weights.safetensors", *weights)
    network = diffusers.AutoencoderKL(block_out_channels=[8], norm_num_groups=2, latent_channels=2)
    network.save_pretrained(formats / "diffusers")


# --- Mutations of a bytearray ---


def position(content, rng):
    """Return a random position, often in the first or last bytes, where headers are."""
    near, anywhere = rng.integers(min(256, len(content)) or 1), rng.integers(len(content) or 1)
    return int([near, max(len(content) - 1 - near, 0), anywhere, anywhere][rng.integers(4)])


def block(content, rng):
    start = position(content, rng)
    return slice(start, start + int(2 ** rng.uniform(0, 12)))


def flip_bit(content, rng):
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)


def flip_bits(content, rng):
    for _ in range(rng.integers(1, 9)):
        content[position(content, rng)] ^= 1 << rng.integers(8)


def truncate(content, rng):
    del content[position(content, rng):]


def remove_block(content, rng):
    del content[block(content, rng)]


def insert_block(content, rng):
    start = position(content, rng)
    content[start:start] = rng.bytes(int(2 ** rng.uniform(0, 12)))


def duplicate_block(content, rng):
    copied, start = content[block(content, rng)], position(content, rng)
    content[start:start] = copied


def swap_blocks(content, rng):
    first, second = block(content, rng), block(content, rng)
    content[first], content[second] = content[second], content[first]


def set_extreme(content, rng):
    """Set a field of one to eight bytes to an extreme value."""
    size, start = 2 ** int(rng.integers(4)), position(content, rng)
    value = [0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1][rng.integers(5)]
    content[start:start + size] = value.to_bytes(size, ["big", "little"][rng.integers(2)])


def replace_word(content, rng):
    """Replace a number or word of text by another value, or by text that is deeply nested, recursive or not UTF-8."""
    words = list(re.finditer(rb"[\w.+-]+", content))
    values = [b"-1", b"0", b"1e999", b"9" * 20, b"null", b"NaN", b"[]", b"{}", b'"x"', b"true", b"\xff\xfe",
              b"[" * 5000, b"&a [*a]"]
    if words:
        content[slice(*words[rng.integers(len(words))].span())] = values[rng.integers(len(values))]


def remove_line(content, rng):
    lines = content.split(b"\n")
    del lines[rng.integers(len(lines))]
    content[:] = b"\n".join(lines)


MUTATORS = (flip_bits, truncate, remove_block, insert_block, duplicate_block, swap_blocks, set_extreme, replace_word,
            remove_line)


# --- Assessment ---


def digest(value):
    """Return a text that differs if a nested value of tensors, arrays and plain values does."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if isinstance(value, dict):
        return str({key: digest(item) for key, item in value.items()})
    return str([digest(item) for item in value]) if isinstance(value, (list, tuple)) else repr(value)


def assess(kind, path, expected):
    """Read a corrupted file; return what is made of it.

    "rejected" with an error, "skipped" with a warning, "harmless": the same values, "accepted": others, which is a
    failure if the format has a checksum.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            found = digest(kind.read(path))
    except USER_ERRORS as error:
        message = f"{type(error).__name__}: {error} {printed.getvalue()}"
        # Of a checkpoint or cache another file may be named, such as one that is missing.
        named = path.name in message or f"{path.parent}{'' if kind.foreign else '/'}" in message
        require(named, "error without file", message)
        return "rejected"
    except BaseException as error:      # extensions in Rust raise errors that are not an Exception
        raise Failure(f"{type(error).__name__}: {error}") from error
    if found == expected:
        return "harmless"
    if f"{path.parent}/" in printed.getvalue():
        return "skipped"
    require(not kind.checksum, "unnoticed", f"{path.name} has other content")
    return "accepted"


def peak_mib():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def corrupt(kind, mutators, folder, number, rng, expected):
    """Corrupt one file of a folder, assess it and restore it; return (name of the file, its content, failure, note)."""
    files = sorted(path for path in folder.glob(kind.files) if path.is_file() and not path.name.startswith("."))
    path = files[rng.integers(len(files))]
    original, note, failure = path.read_bytes(), "", ""
    content = bytearray(kind.unpack(original))
    mutators[rng.integers(len(mutators))](content, rng)
    corrupted = kind.pack(bytes(content), original)
    path.write_bytes(corrupted)
    os.utime(path, ns=(number, number))     # readers that remember a file compare its time, whose clock is coarse
    Path("/proc/self/clear_refs").write_text("5")       # resets the peak
    before = peak_mib()
    try:
        note = assess(kind, path, expected)
        require(peak_mib() - before < MEMORY_MIB, "memory", f"{peak_mib() - before:.0f} MiB for {len(content)} bytes")
    except Failure as error:
        failure = str(error)
    path.write_bytes(original)
    return path.name, corrupted, failure, note


def corrupt_all(root, seed, kind, names, mutators):
    """Yield (name, failure, note) of one corrupted file per name; assessed in forks, which may crash or hang."""
    done = 0
    while done < len(names):
        receive, send = os.pipe()
        pid = fork()
        if pid == 0:
            with open(send, "w", buffering=1) as stream:
                _work(root, seed, kind, names[done:], mutators, stream)
        os.close(send)
        buffer, failure = b"", ""
        while not failure:
            if not select.select([receive], [], [], HANG_S)[0]:
                failure = f"hang: no end within {HANG_S} s"
            elif not (received := os.read(receive, 1 << 16)):
                break
            else:
                *lines, buffer = (buffer + received).split(b"\n")
                for line in lines:
                    yield names[done], *json.loads(line)
                    done += 1
        os.close(receive)
        if failure:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if done < len(names):
            yield names[done], failure or f"crash: status {status}, see {root / 'work.txt'}", ""
            done += 1


def _work(root, seed, kind, names, mutators, stream):
    """Corrupt files one after the other and write [failure, note] for each; never return."""
    status = 1
    try:
        log = os.open(root / "work.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        warnings.simplefilter("ignore")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**32,) * 2)
        folder = root / "work" / uuid.uuid4().hex
        shutil.copytree(root / kind.folder, folder)
        path = next(path for path in sorted(folder.glob(kind.files)) if path.is_file())
        path.write_bytes(kind.pack(kind.unpack(original := path.read_bytes()), original))
        expected = digest(kind.read(path))
        for number, name in enumerate(names):
            file, content, *result = corrupt(kind, mutators, folder, number * 10**9, keyed_rng(seed, name), expected)
            if result[0]:
                (root / "cases" / f"{name.replace('/', '-')}-{file}").write_bytes(content)
            print(json.dumps(result), file=stream)
        shutil.rmtree(folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)
