"""Self-describing checkpoints: weights that carry their header, and steps that exist only when they are whole.

A weights file is a bare state dict, as guided-diffusion writes it. What rebuilds the network (kind, step,
configuration, normalizer, autoencoder) rides along as a JSON string in the state dict's `_metadata`, which plain
`load_state_dict` passes over and `torch.load(weights_only=True)` keeps.

A step of a run is a set of files and, written last, a marker `stateNNNNNN.json` with their sizes and SHA-256.
"""

import collections
import contextlib
import json
import re
from collections import OrderedDict
from pathlib import Path

import torch

from .files import atomic_path, load_tensors as load, sha256_of_file, write_json

FORMAT = 1
HEADER_KEY = "guided_diffusion_vae"
VERSIONS_KEY = "module_versions"


def save_weights(path, state_dict, header):
    """Write a state dict with `header` (a JSON-able dictionary) in its metadata, atomically."""
    described = OrderedDict((name, value.detach()) for name, value in state_dict.items())
    described._metadata = OrderedDict(getattr(state_dict, "_metadata", None) or {})
    described._metadata[HEADER_KEY] = json.dumps({"format": FORMAT, **header})
    save(path, described)


def save(path, content):
    """Write what `torch.save` can write, atomically."""
    with atomic_path(path) as part, open(part, "wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            # Given a name in place of a stream, torch says of a full disk only that a position is unexpected; given a
            # stream, it may still raise that on top of the stream's own error.
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def save_safetensors(path, state_dict, header):
    """Write a state dict as .safetensors with `header` among the file's metadata, atomically."""
    from safetensors.torch import save_file

    versions = {k: v for k, v in (getattr(state_dict, "_metadata", None) or {}).items() if isinstance(v, dict)}
    metadata = {"format": "pt", HEADER_KEY: json.dumps({"format": FORMAT, **header}),
                VERSIONS_KEY: json.dumps(versions)}
    with atomic_path(path) as part:
        save_file({name: value.detach().contiguous() for name, value in state_dict.items()}, part, metadata)


def load_weights(path, map_location="cpu", flag="--model_path"):
    """Return (state dict, header) of a .pt or .safetensors file; the header of a bare state dict is None."""
    if str(path).endswith(".safetensors"):
        state_dict, text = _load_safetensors(path, map_location, flag)
    else:
        state_dict = load(path, map_location, flag)
        if not isinstance(state_dict, dict) or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
            raise ValueError(f"{path} holds no state dict (names with tensors); {flag} wants a model or ema file")
        text = (getattr(state_dict, "_metadata", None) or {}).get(HEADER_KEY)
    header = json.loads(text) if isinstance(text, str) else None
    if header is not None and header.get("format") != FORMAT:
        raise ValueError(f"{path} has header format {header.get('format')}, this version reads format {FORMAT}")
    return state_dict, header


def _load_safetensors(path, map_location, flag):
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there; check {flag}")
    try:
        with safe_open(path, "pt") as content:
            tensors = collections.OrderedDict((name, content.get_tensor(name).to(map_location))
                                              for name in content.keys())
            metadata = content.metadata() or {}
            if VERSIONS_KEY in metadata:
                tensors._metadata = json.loads(metadata[VERSIONS_KEY])  # modules ask for the version of their weights
            return tensors, metadata.get(HEADER_KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); check {flag}") from error


def require_kind(header, kind, path, flag):
    """Refuse weights of another kind of model, naming both kinds."""
    if header["kind"] != kind:
        raise ValueError(f"{path} holds a model of kind {header['kind']!r}, {flag} wants one of kind {kind!r}")


def load_strict(model, state_dict, path, flag="--model_path"):
    """Load weights strictly; ValueError with the first differences where keys or shapes disagree."""
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        found = {k: tuple(v.shape) for k, v in state_dict.items()}
        lines = [f"{k}: {found.get(k, 'missing')} in the file, {wanted.get(k, 'nothing')} in the model"
                 for k in sorted(wanted.keys() | found.keys()) if found.get(k) != wanted.get(k)]
        raise ValueError(f"{path} does not fit the model ({len(lines)} of {len(wanted)} entries differ; "
                         f"{'; '.join(lines[:3])}); check {flag} and the flags of the model") from error


# ---------------------------------------------------------------------------------------------------------------------
# the files of a step


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


def commit(folder, step, names, state):
    """Write the marker of a step: `state` and the size and SHA-256 of every file in `names`."""
    folder = Path(folder)
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": sha256_of_file(folder / n)} for n in names}
    write_json(folder / marker_name(step), {"format": FORMAT, "step": step, "files": files, **state})


def committed_steps(folder):
    """Return the committed steps of a run folder, oldest first; their files are not looked at yet."""
    found = [re.fullmatch(r"state(\d{6,})\.json", p.name) for p in Path(folder).glob("state*.json")]
    return sorted(int(m.group(1)) for m in found if m)


def read_marker(folder, step):
    """Return the marker of a step after comparing its files with it; ValueError where one is damaged."""
    folder = Path(folder)
    try:
        marker = json.loads((folder / marker_name(step)).read_text())
        found = marker["format"], marker["step"]
        files = [(folder / Path(name).name, want["bytes"], want["sha256"]) for name, want in marker["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / marker_name(step)} is damaged ({type(error).__name__}: {error})") from error
    if found != (FORMAT, step):
        raise ValueError(f"{folder / marker_name(step)} is of format {found[0]} and step {found[1]}, needed are format "
                         f"{FORMAT} and step {step}: was it renamed?")
    for path, size, sha256 in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, {size} were written")
        if sha256_of_file(path) != sha256:
            raise ValueError(f"{path} does not hold what was written (its SHA-256 differs)")
    return marker


def latest_marker(folder, warn=print):
    """Return the marker of the newest undamaged step, or None where no step was ever committed.

    Damaged steps are reported through `warn` and passed over; where all are damaged, ValueError.
    """
    committed = committed_steps(folder)
    for step in reversed(committed):
        try:
            return read_marker(folder, step)
        except ValueError as error:
            warn(f"checkpoint {step} of {folder} cannot be used: {error}; trying the one before it")
    if committed:
        raise ValueError(f"every checkpoint of {folder} is damaged; choose another --logdir or restore the files")
    return None


def latest_weights(folder, flag="--model_path"):
    """Return the weights file of a run to use: the slowest moving average of its best step, else of its newest one.

    Which step was best a run knows that measured itself (see `TrainLoop`); damaged steps are passed over.
    """
    marker = latest_marker(folder)
    if marker is None:
        raise FileNotFoundError(f"{folder} holds no finished checkpoint (stateNNNNNN.json); check {flag}")
    best = (marker.get("best") or {}).get("step", marker["step"])
    if best != marker["step"] and best in committed_steps(folder):
        with contextlib.suppress(ValueError):
            marker = read_marker(folder, best)
    averages = {float(m.group(1)): name for name in marker["files"] if (m := re.match(r"ema_([\d.]+)_\d+\.pt", name))}
    return Path(folder) / (averages[max(averages)] if averages else model_name(marker["step"]))


def prune_checkpoints(folder, count, kept=()):
    """Delete the files of all but the newest `count` steps and those `kept`, each step's marker first."""
    folder = Path(folder)
    for step in set(committed_steps(folder)[:-count]) - set(kept):
        (folder / marker_name(step)).unlink()
        # By name and not by what the marker lists: it may be damaged.
        named = model_name, optimizer_name, discriminator_name, discriminator_optimizer_name
        for path in [*(folder / name(step) for name in named), *folder.glob(ema_name("*", step))]:
            path.unlink(missing_ok=True)
