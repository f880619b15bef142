"""Self-describing checkpoints: weights with a header, and steps that exist only once they are complete.

A weights file is a bare state dict, as guided-diffusion writes it. The header (kind, step, configuration, normalizer,
autoencoder), from which the network is rebuilt, is a JSON string in the state dict's `_metadata`, which plain
`load_state_dict` ignores and `torch.load(weights_only=True)` keeps.

A step of a run is a set of files and a marker `stateNNNNNN.json`, written last, with their sizes and SHA-256.
"""

import contextlib
import hashlib
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import deprecated_names
from .config import require
from .files import (
    atomic_path, atomic_stream, file_errors, load_tensors as load, read_record, require_regular_file, sha256_of_file,
    sha256_of_json, write_record,
)
from .state_dicts import is_flat, iter_state_dicts, load_strict as load_strict, select_weights as select_weights

FORMAT = 1
HEADER_KEY = "guided_diffusion_vae"
VERSIONS_KEY, SHA256_KEY = "module_versions", "sha256"     # in .safetensors, which have no checksums of their own


class Weights(NamedTuple):
    """Contents of a weights file: the state dict, its header (None if bare), the path and SHA-256 of the file."""

    state_dict: dict
    header: Any     # a dictionary or None, which each kind of use checks with its own message
    path: Path
    sha256: str | None


class Header(dict):
    """The header of a weights file; an entry that is missing is an error that names the file."""

    def __init__(self, path, entries):
        super().__init__(entries)
        self.path = path

    def __missing__(self, key):
        raise ValueError(f"{self.path} is corrupt: its header has no entry {key!r}; restore the file or use another "
                         "checkpoint")


def save_weights(path, state_dict: dict, header: dict) -> dict:
    """Write a state dict with `header` (a JSON-able dictionary) in its metadata, as `save` does."""
    described: Any = OrderedDict((name, value.detach()) for name, value in state_dict.items())
    described._metadata = OrderedDict(getattr(state_dict, "_metadata", None) or {})
    described._metadata[HEADER_KEY] = json.dumps({"format": FORMAT, **header})
    return save(path, described)


def save(path, content) -> dict:
    """Write any content that `torch.save` supports, atomically; return {"bytes": size, "sha256": SHA-256}."""
    with atomic_stream(path) as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            # On a full disk torch hides the error of the stream, which has the reason, behind one about its position.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    return stream.entry


def save_safetensors(path, state_dict: dict, header: dict) -> None:
    """Write a state dict as .safetensors with `header`, and a SHA-256 of all, in the metadata of the file, atomically.

    :raises ValueError: if a value is not finite.
    """
    from safetensors.torch import save_file

    bad = [name for name, value in state_dict.items() if not torch.isfinite(value).all()]
    require((not bad, f"{path} was not written: {len(bad)} of {len(state_dict)} weights are not finite, such as "
             f"{', '.join(bad[:3])}; use an earlier checkpoint"))

    versions = {k: v for k, v in (getattr(state_dict, "_metadata", None) or {}).items() if isinstance(v, dict)}
    metadata = {"format": "pt", HEADER_KEY: json.dumps({"format": FORMAT, **header}),
                VERSIONS_KEY: json.dumps(versions)}
    tensors = {name: value.detach().contiguous() for name, value in state_dict.items()}
    with atomic_path(path) as part:
        save_file(tensors, part, {**metadata, SHA256_KEY: _sha256_of_tensors(tensors, metadata)})


def load_weights(path, map_location="cpu", flag="--model_path") -> tuple[dict, Any]:
    """Return (state dict, header) of a .pt or .safetensors file; the header of a bare state dict is None.

    Files of other projects may contain state dicts inside of dictionaries, such as {"state_dict": ..., "epoch": 3}.
    These are returned as they are, and `load_strict` or `select_weights` find the state dict of a model in them.

    :raises FileNotFoundError: if the file does not exist.
    :raises ValueError: if it is corrupt or contains no state dict.
    """
    if str(path).endswith(".safetensors"):
        state_dict, text = _load_safetensors(path, map_location, flag)
    else:
        state_dict = load(path, map_location, flag)
        valid = is_flat(state_dict) or any(iter_state_dicts(state_dict))
        require((valid, f"{path} is not a state dict (names with tensors); {flag} expects a model or ema file"))
        text = (getattr(state_dict, "_metadata", None) or {}).get(HEADER_KEY)
    return state_dict, _parse_header(path, text, flag) if isinstance(text, str) else None


def _parse_header(path, text, flag):
    with file_errors(path, "its header is corrupt", f"check {flag}"):
        header = json.loads(text)
        require((isinstance(header, dict), f"expected an object, got {type(header).__name__}"))
    require((header.get("format") == FORMAT, f"{path}: expected header format {FORMAT}, got {header.get('format')}"))
    return Header(path, header)


def _load_safetensors(path, map_location, flag):
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; check {flag}")
    require_regular_file(path, f"check {flag}")
    try:
        with safe_open(path, "pt") as content:
            tensors = OrderedDict((name, content.get_tensor(name)) for name in content.keys())
            metadata = content.metadata() or {}
        sha256 = metadata.pop(SHA256_KEY, None)     # files of other projects have none
        if sha256 not in (None, _sha256_of_tensors(tensors, metadata)):
            raise ValueError("its SHA-256 differs from that of its content")
        for name in tensors:
            tensors[name] = tensors[name].to(map_location)
        if VERSIONS_KEY in metadata:
            tensors._metadata = json.loads(metadata[VERSIONS_KEY])  # read by `load_state_dict` of the modules
        return tensors, metadata.get(HEADER_KEY)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is corrupt or not a safetensors file ({error}); check {flag}") from error


def _sha256_of_tensors(tensors, metadata):
    """Return the hexadecimal SHA-256 of tensors with their names, dtypes and shapes, and of a dictionary of text."""
    digest = hashlib.sha256(sha256_of_json(metadata).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def require_kind(header: dict, kind: str, path, flag: str) -> None:
    """Reject weights of another kind of model.

    :raises ValueError: with both kinds.
    """
    require((header["kind"] == kind, f"{path}: {flag} expects a model of kind {kind!r}, got {header['kind']!r}"))


# --- Files of a step ---


def model_name(step):
    return f"model{step:06d}.pt"


PROFILE = "profile"     # begins the rate in the names of snapshots of EMA profiles


def ema_name(rate, step):
    return f"ema_{rate}_{step:06d}.pt"


def optimizer_name(step):
    return f"opt{step:06d}.pt"


def discriminator_name(step):
    return f"discriminator{step:06d}.pt"


def discriminator_optimizer_name(step):
    return f"opt_discriminator{step:06d}.pt"


def marker_name(step):
    return f"state{step:06d}.json"


def commit(folder, step: int, files: dict[str, dict], state: dict) -> dict:
    """Write and return the marker of a step: `state`, and what `save` returned of every file by name."""
    return rewrite_marker(folder, {"format": FORMAT, "step": step, "files": files, **state})


def rewrite_marker(folder, marker: dict) -> dict:
    """Write and return the marker of a step whose files are hashed already.

    :raises FileNotFoundError: if one of the files was removed meanwhile.
    """
    path = Path(folder) / marker_name(marker["step"])
    write_record(path, marker)
    missing = [name for name in marker["files"] if not (path.parent / name).is_file()]
    if missing:     # looked for afterwards, as they may have been removed up to now
        path.unlink(missing_ok=True)
        raise FileNotFoundError(f"{path.parent / missing[0]} was removed while step {marker['step']} was saved; resume "
                                "from the step before, or start again")
    return marker


def committed_steps(folder) -> list[int]:
    """Return the committed steps of a run folder in ascending order; their files are not read."""
    found = [re.fullmatch(r"state(\d{6,})\.json", p.name) for p in Path(folder).glob("state*.json")]
    return sorted(int(m.group(1)) for m in found if m)


def read_marker(folder, step: int, select=None) -> dict:
    """Return the marker of a step, after comparing its files with it.

    :param select: function of the marker that returns the name of the only file to compare; None: compare all.
    :raises ValueError: if the marker or one of these files is corrupt.
    """
    path = Path(folder) / marker_name(step)
    marker = read_record(path, "restore the file or resume from another step")
    try:
        found = marker["format"], marker["step"]
        files = [(path.parent / Path(name).name, entry["bytes"], entry["sha256"])
                 for name, entry in marker["files"].items() if select is None or name == select(marker)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is corrupt ({type(error).__name__}: {error})") from error
    require((found == (FORMAT, step), f"{path}: expected format {FORMAT} and step {step}, got format {found[0]} and "
             f"step {found[1]}: was it renamed?"))
    for file, size, sha256 in files:
        require((file.is_file(), f"{file} is missing"))
        require((file.stat().st_size == size, f"{file}: expected {size} bytes, got {file.stat().st_size}"))
        require((sha256_of_file(file) == sha256, f"{file} is corrupt: its SHA-256 is not that of {path.name}"))
    return marker


def latest_marker(folder, warn=print) -> dict | None:
    """Return the marker of the latest intact step, None if no step was ever committed.

    Corrupt steps are skipped and reported through `warn`.

    :raises ValueError: if all steps are corrupt.
    """
    return _first_intact(folder, committed_steps(folder)[::-1], warn)


def _first_intact(folder, steps, warn, select=None, action=""):
    for step in steps:
        try:
            return read_marker(folder, step, select)
        except ValueError as error:
            warn(f"checkpoint {step} of {folder} cannot be used: {error}; trying the next one")
    require((not steps, f"every checkpoint of {folder} is corrupt; use another --logdir or restore the files"
             f"{action}"))
    return None


def find_weights(path, flag="--model_path", warn=print) -> tuple[Path | str, str | None]:
    """Return (path, SHA-256) of the weights file to use: `path` itself, or of a run folder the best one.

    The best one is the EMA with the largest decay of the best step (see `TrainLoop`) or of the latest one; corrupt
    steps are skipped. The file is read once, and compared with the marker of its step if there is one; no other file
    of the step is read.

    :raises ValueError: if the file does not match its marker.
    """
    file = Path(path)
    if not file.is_dir():
        step = re.search(r"(\d{6,})\.pt$", file.name)
        if step and file.is_file() and int(step[1]) in committed_steps(file.parent):
            entry = read_marker(file.parent, int(step[1]), lambda marker: file.name)["files"].get(file.name)
            if entry:
                return path, entry["sha256"]
        return path, sha256_of_file(file) if file.is_file() else None     # `load` reports a missing file
    steps = committed_steps(file)[::-1]
    marker = _first_intact(file, steps, warn, lambda marker: None)
    if marker:
        best, readable = (marker.get("best") or {}).get("step"), [step for step in steps if step <= marker["step"]]
        marker = _first_intact(file, sorted(readable, key=lambda step: step != best), warn, _weights_name,
                               f", or set {flag} to a weights file in it that is not")
    require((marker is not None, f"{file} contains no complete checkpoint (stateNNNNNN.json); check {flag}"),
            error=FileNotFoundError)
    name = _weights_name(marker)
    return file / name, marker["files"].get(name, {}).get("sha256")


def _weights_name(marker):
    emas = {float(m.group(1)): name for name in marker["files"] if (m := re.fullmatch(r"ema_([\d.]+)_\d+\.pt", name))}
    return emas[max(emas)] if emas else model_name(marker["step"])


def latest_weights(folder, flag="--model_path") -> Path | str:
    """Return the path of the weights file of a run to use; see `find_weights`."""
    return find_weights(folder, flag)[0]


def prune_checkpoints(folder, count: int, kept=()) -> None:
    """Delete the files of all steps except the latest `count`, those in `kept` and snapshots of EMA profiles.

    The marker of a step is deleted last, so that the next call deletes what an interrupted one has left.
    """
    for step in set(committed_steps(folder)[:-count]) - set(kept):
        _remove_step(Path(folder), step, snapshots=False)


def _remove_step(folder, step, snapshots=True):
    # By name and not by the marker, which may be corrupt.
    named = model_name, optimizer_name, discriminator_name, discriminator_optimizer_name
    averages = folder.glob(ema_name("*" if snapshots else "[0-9]*", step))
    for path in [*averages, *(folder / name(step) for name in (*named, marker_name))]:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_or_removed(folder, step: int):
    """Remove the files of a step if the `with` block, which writes them, fails before its marker."""
    try:
        yield
    except BaseException:
        if not (Path(folder) / marker_name(step)).exists():
            _remove_step(Path(folder), step)
        raise


def remove_uncommitted(folder, step: int, report=print) -> None:
    """Remove the files of later steps than `step` that a killed process saved without a marker.

    Files without a header, which other projects wrote, stay.
    """
    later = {parse_resume_step_from_filename(path.name) for path in Path(folder).glob("model*.pt")}
    for other in sorted(later - set(committed_steps(folder))):
        path = Path(folder) / model_name(other)
        if other > step and path.is_file() and load_weights(path, flag="--logdir")[1] is not None:
            _remove_step(Path(folder), other)
            report(f"removed the files of step {other} from {folder}, whose saving was interrupted")


# --- Resuming ---

# Header entries that may differ when a run resumes: no weight changes its meaning with them.
RESUME_OVERRIDABLE = ("step", "path", "timestep_respacing", "use_checkpoint", "use_checkpointing", "recompute_norms",
                      "use_fp16", "classifier_use_fp16", "data_count", "data_fingerprint")


def find_step(folder: str | Path, resume_checkpoint: str = "", warn=print) -> tuple[dict | None, Path]:
    """Return (verified marker, its folder) of the step to resume from, or (None, folder) if training starts.

    Once `folder` has steps beyond `resume_checkpoint`, the latest of them is used, so that the same command resumes.

    :param resume_checkpoint: model file, with optimizer and EMA weights next to it; "" or "auto": latest step of
        `folder`. A checkpoint of guided-diffusion has no marker; its step is read from its name.
    :raises FileNotFoundError: if the file is missing.
    :raises ValueError: if it has another name, or would overwrite later steps.
    """
    folder = Path(folder)
    if not resume_checkpoint or resume_checkpoint == "auto":
        marker = latest_marker(folder, warn)
        unfinished = sorted(p.name for p in folder.glob("model*.pt")) if marker is None else []
        if unfinished:
            warn(f"{folder} contains {', '.join(unfinished)} but no marker (stateNNNNNN.json) of a completed save: "
                 "training starts at step 0; set --resume_checkpoint to resume from such a file")
        return marker, folder
    path = Path(resume_checkpoint)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {problem}; --resume_checkpoint expects a model file (modelNNNNNN.pt)")
    step = parse_resume_step_from_filename(path.name)
    if path.name != model_name(step):
        raise ValueError(f"{path}: --resume_checkpoint expects a file named like {model_name(step)}, from which the "
                         "names of its optimizer and EMA files follow")
    if later := [n for n in committed_steps(folder) if n > step]:
        if folder.resolve() == path.parent.resolve():
            raise ValueError(f"{folder} contains step {later[-1]}, which is later than {path}; to branch off there, "
                             "set another --logdir")
        return find_step(folder, "", warn)
    has_marker = (path.parent / marker_name(step)).is_file()
    return (read_marker(path.parent, step) if has_marker else {"step": step}), path.parent


def parse_resume_step_from_filename(filename: str) -> int:
    """Return the step in a name like path/to/modelNNNNNN.pt, 0 if there is none."""
    match = re.search(r"model(\d+)\.[^.]*$", filename)
    return int(match.group(1)) if match else 0


def require_same_model(stored: dict, current: dict, folder: Path) -> None:
    """Compare the headers of a checkpoint and of the model that resumes from it.

    :raises ValueError: naming the entries that differ; entries that only one of them has are ignored.
    """
    def differences(a, b, prefix=""):
        for key in a.keys() & b.keys():
            if isinstance(a[key], dict) and isinstance(b[key], dict):
                yield from differences(a[key], b[key], f"{prefix}{key}.")
            elif a[key] != b[key] and key not in RESUME_OVERRIDABLE:
                yield f"{prefix}{key} is {b[key]!r} now, {a[key]!r} in the checkpoint"

    changes = sorted(differences(stored, current))
    if changes:
        raise ValueError(f"{folder} contains checkpoints of another configuration ({'; '.join(changes[:4])}); "
                         "set the same flags again or another --logdir")


__getattr__ = deprecated_names("checkpoint_util")
