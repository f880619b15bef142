"""Self-describing checkpoints: weights with a header, and steps that exist only once they are complete.

A weights file is a bare state dict, as guided-diffusion writes it. The header (kind, step, configuration, normalizer,
autoencoder), from which the network is rebuilt, is a JSON string in the state dict's `_metadata`, which plain
`load_state_dict` ignores and `torch.load(weights_only=True)` keeps.

A step of a run is a set of files and a marker `stateNNNNNN.json`, written last, with their sizes and SHA-256.
"""

import contextlib
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch

from . import deprecated_names
from .config import require
from .files import atomic_path, load_tensors as load, require_regular_file, sha256_of_file, write_json

FORMAT = 1
HEADER_KEY = "guided_diffusion_vae"
VERSIONS_KEY = "module_versions"


class Weights(NamedTuple):
    """Contents of a weights file: the state dict, its header (None if bare), the path and SHA-256 of the file."""

    state_dict: dict
    header: dict | None
    path: Path
    sha256: str | None


def save_weights(path, state_dict: dict, header: dict) -> None:
    """Write a state dict with `header` (a JSON-able dictionary) in its metadata, atomically."""
    described = OrderedDict((name, value.detach()) for name, value in state_dict.items())
    described._metadata = OrderedDict(getattr(state_dict, "_metadata", None) or {})
    described._metadata[HEADER_KEY] = json.dumps({"format": FORMAT, **header})
    save(path, described)


def save(path, content) -> None:
    """Write any content that `torch.save` supports, atomically."""
    with atomic_path(path) as part, open(part, "wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            # On a full disk torch hides the error of the stream, which has the reason, behind one about its position.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def save_safetensors(path, state_dict: dict, header: dict) -> None:
    """Write a state dict as .safetensors with `header` in the metadata of the file, atomically."""
    from safetensors.torch import save_file

    versions = {k: v for k, v in (getattr(state_dict, "_metadata", None) or {}).items() if isinstance(v, dict)}
    metadata = {"format": "pt", HEADER_KEY: json.dumps({"format": FORMAT, **header}),
                VERSIONS_KEY: json.dumps(versions)}
    with atomic_path(path) as part:
        save_file({name: value.detach().contiguous() for name, value in state_dict.items()}, part, metadata)


def load_weights(path, map_location="cpu", flag="--model_path") -> tuple[dict, dict | None]:
    """Return (state dict, header) of a .pt or .safetensors file; the header of a bare state dict is None."""
    if str(path).endswith(".safetensors"):
        state_dict, text = _load_safetensors(path, map_location, flag)
    else:
        state_dict = load(path, map_location, flag)
        valid = isinstance(state_dict, dict) and all(isinstance(v, torch.Tensor) for v in state_dict.values())
        require((valid, f"{path} is not a state dict (names with tensors); {flag} expects a model or ema file"))
        text = (getattr(state_dict, "_metadata", None) or {}).get(HEADER_KEY)
    header = json.loads(text) if isinstance(text, str) else None
    require((header is None or header.get("format") == FORMAT,
             f"{path}: expected header format {FORMAT}, got {header and header.get('format')}"))
    return state_dict, header


def _load_safetensors(path, map_location, flag):
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; check {flag}")
    try:
        with safe_open(path, "pt") as content:
            tensors = OrderedDict((name, content.get_tensor(name).to(map_location)) for name in content.keys())
            metadata = content.metadata() or {}
            if VERSIONS_KEY in metadata:
                tensors._metadata = json.loads(metadata[VERSIONS_KEY])  # read by `load_state_dict` of the modules
            return tensors, metadata.get(HEADER_KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or not a safetensors file ({error}); check {flag}") from error


def require_kind(header: dict, kind: str, path, flag: str) -> None:
    """Reject weights of another kind of model.

    :raises ValueError: with both kinds.
    """
    require((header["kind"] == kind, f"{path}: {flag} expects a model of kind {kind!r}, got {header['kind']!r}"))


def load_strict(model: torch.nn.Module, state_dict: dict, path, flag="--model_path") -> None:
    """Load weights strictly.

    :raises ValueError: with the first differences, if keys or shapes do not match.
    """
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        found = {k: tuple(v.shape) for k, v in state_dict.items()}
        lines = [f"{k}: expected {expected.get(k, 'nothing')}, got {found.get(k, 'nothing')}"
                 for k in sorted(expected.keys() | found.keys()) if found.get(k) != expected.get(k)]
        raise ValueError(f"{path} does not match the model ({len(lines)} of {len(expected)} entries differ; "
                         f"{'; '.join(lines[:3])}); check {flag} and the flags of the model") from error


# --- Files of a step ---


def model_name(step):
    return f"model{step:06d}.pt"


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


def commit(folder, step: int, names: list[str], state: dict) -> dict:
    """Write and return the marker of a step: `state`, and the size and SHA-256 of every file in `names`."""
    folder = Path(folder)
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": sha256_of_file(folder / n)} for n in names}
    return rewrite_marker(folder, {"format": FORMAT, "step": step, "files": files, **state})


def rewrite_marker(folder, marker: dict) -> dict:
    """Write and return the marker of a step whose files are hashed already."""
    write_json(Path(folder) / marker_name(marker["step"]), marker)
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
    try:
        require_regular_file(path)
        marker = json.loads(path.read_text())
        found = marker["format"], marker["step"]
        files = [(path.parent / Path(name).name, entry["bytes"], entry["sha256"])
                 for name, entry in marker["files"].items() if select is None or name == select(marker)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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


def _first_intact(folder, steps, warn, select=None):
    for step in steps:
        try:
            return read_marker(folder, step, select)
        except ValueError as error:
            warn(f"checkpoint {step} of {folder} cannot be used: {error}; trying the next one")
    require((not steps, f"every checkpoint of {folder} is corrupt; use another --logdir or restore the files"))
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
    steps, best = committed_steps(file)[::-1], None
    for step in steps:
        with contextlib.suppress(ValueError):
            best = (read_marker(file, step, lambda marker: None).get("best") or {}).get("step")
            break
    marker = _first_intact(file, sorted(steps, key=lambda step: step != best), warn, _weights_name)
    require((marker is not None, f"{file} contains no complete checkpoint (stateNNNNNN.json); check {flag}"),
            error=FileNotFoundError)
    name = _weights_name(marker)
    return file / name, marker["files"].get(name, {}).get("sha256")


def _weights_name(marker):
    emas = {float(m.group(1)): name for name in marker["files"] if (m := re.fullmatch(r"ema_([\d.]+)_\d+\.pt", name))}
    return emas[max(emas)] if emas else model_name(marker["step"])


def latest_weights(folder, flag="--model_path") -> Path:
    """Return the path of the weights file of a run to use; see `find_weights`."""
    return find_weights(folder, flag)[0]


def prune_checkpoints(folder, count: int, kept=()) -> None:
    """Delete the files of all steps except the latest `count` and those in `kept`, each step's marker first."""
    folder = Path(folder)
    for step in set(committed_steps(folder)[:-count]) - set(kept):
        (folder / marker_name(step)).unlink()
        # By name and not by the marker, which may be corrupt.
        named = model_name, optimizer_name, discriminator_name, discriminator_optimizer_name
        for path in [*(folder / name(step) for name in named), *folder.glob(ema_name("*", step))]:
            path.unlink(missing_ok=True)


# --- Resuming ---

# Header entries that may differ when a run resumes: no weight changes its meaning with them.
RESUME_OVERRIDABLE = ("step", "path", "timestep_respacing", "use_checkpoint", "use_checkpointing", "recompute_norms",
                      "use_fp16", "classifier_use_fp16")


def find_step(folder: str | Path, resume_checkpoint: str = "", warn=print) -> tuple[dict | None, Path]:
    """Return (verified marker, its folder) of the step to resume from, or (None, folder) if training starts.

    Once `folder` has steps beyond `resume_checkpoint`, the latest of them is used, so that the same command resumes.

    :param resume_checkpoint: model file, with optimizer and EMA weights next to it; "" or "auto": latest step of
        `folder`. A checkpoint of guided-diffusion has no marker; its step is read from its name.
    :raises FileNotFoundError, ValueError: if the file is missing, has another name, or would overwrite later steps.
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
        raise FileNotFoundError(f"{path} does not exist; --resume_checkpoint expects a model file (modelNNNNNN.pt)")
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
