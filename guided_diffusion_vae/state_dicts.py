"""Find the state dict that fits a model: weights of other projects are in dictionaries, or have prefixes."""

import re
from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from .config import require

# Keys of EMA weights in checkpoints of other projects, which contain the last weights, too.
EMA_NAMES = {"ema", "ema_model", "model_ema", "ema_state_dict", "state_dict_ema", "model_ema_state_dict", "params_ema"}


def load_strict(model: torch.nn.Module, weights: dict, path, flag="--model_path") -> dict:
    """Load weights strictly and return their state dict; `weights` are what `load_weights` returned.

    Weights inside of dictionaries, or whose names have a prefix, are loaded if only one state dict fits the model, or
    only one of those that fit is named as EMA weights.

    :raises ValueError: with the first differences, if keys or shapes do not match; with the names of the state dicts
        that fit, if there are several.
    """
    if is_flat(weights):
        try:
            model.load_state_dict(weights)
            return weights
        except RuntimeError:
            pass
    expected = _shapes(model.state_dict())
    readings = _readings(weights, expected)
    errors = [_load_error(model, reading.state_dict) for reading in readings]
    fitting = [reading for reading, error in zip(readings, errors) if error is None]
    if fitting:
        chosen = _choose(fitting, path, flag)
        model.load_state_dict(chosen)   # as later readings have left a part of their values
        return chosen
    readings += [Reading(place, state_dict, 0) for place, state_dict in iter_state_dicts(weights)]
    closest = max(readings, key=lambda reading: (reading.matches, len(reading.state_dict)), default=Reading("", {}, 0))
    found = _shapes(closest.state_dict)
    lines = [f"{k}: expected {expected.get(k, 'nothing')}, got {found.get(k, 'nothing')}"
             for k in sorted(expected.keys() | found.keys()) if found.get(k) != expected.get(k)]
    contents = "" if is_flat(weights) else f"; it contains {_describe_contents(weights)}"
    raise ValueError(f"{path} does not match the model ({len(lines)} of {len(expected)} entries differ; "
                     f"{'; '.join(lines[:3])}){contents}; {_suggest_flags(expected, found)}check {flag} and the "
                     "flags of the model")


def _suggest_flags(expected, found):
    """Return which flags of a UNet would explain that its shapes {name: shape} are not those that were found."""
    flags = []
    if ("label_emb.weight" in found) != ("label_emb.weight" in expected) and "input_blocks.0.0.weight" in found:
        flags.append(f"--class_cond {'label_emb.weight' in found}")
    width, other = (shapes.get("out.2.bias", (0,))[0] for shapes in (expected, found))
    if width and other in (2 * width, width / 2):
        flags.append(f"--learn_sigma {other > width}")
    return f"it seems to be a model with {' and '.join(flags)}; " if flags else ""


def select_weights(model: torch.nn.Module, weights: dict, path, flag: str) -> dict:
    """Return the state dict in what `load_weights` returned that has the most weights in common with a model.

    :raises ValueError: if none has any, or several have the same number and not one of them is named as EMA weights.
    """
    expected = _shapes(model.state_dict())
    if is_flat(weights) and _count_matches(weights, expected):
        return weights
    readings = _readings(weights, expected)
    most = max((reading.matches for reading in readings), default=0)
    contents = "" if is_flat(weights) else f"; it contains {_describe_contents(weights)}"
    require((most, f"{path} has no weights in common with this model{contents}; check {flag}"))
    return _choose([reading for reading in readings if reading.matches == most], path, flag)


class Reading(NamedTuple):
    """A state dict in a weights file, where it is, and the number of its weights that have the shape of the model's."""

    place: str
    state_dict: dict
    matches: int


def iter_state_dicts(content, place: str = "", depth: int = 4):
    """Yield (place, state dict) of each dictionary of tensors within `content`, other than states of optimizers.

    The place consists of keys, such as "model/ema"; `_orig_mod.`, which torch.compile adds to names, is removed.
    """
    if not isinstance(content, dict) or not depth:
        return
    tensors: Any = OrderedDict((name.replace("_orig_mod.", ""), value) for name, value in content.items()
                               if isinstance(name, str) and isinstance(value, torch.Tensor))
    if tensors:
        versions = getattr(content, "_metadata", None) or {}
        tensors._metadata = {f"{name}.".replace("_orig_mod.", "")[:-1]: value for name, value in versions.items()}
        yield place, tensors
    for key, value in content.items():
        if isinstance(key, str) and key != "state":     # of an optimizer
            yield from iter_state_dicts(value, f"{place}/{key}".strip("/"), depth - 1)


def without_prefix(state_dict: dict, prefix: str) -> dict:
    """Return the weights whose names start with `prefix`, without it; versions of modules are kept."""
    part: Any = OrderedDict(
        (name[len(prefix):], value) for name, value in state_dict.items() if name.startswith(prefix))
    versions = getattr(state_dict, "_metadata", None) or {}
    part._metadata = {name[len(prefix):]: value for name, value in versions.items() if f"{name}.".startswith(prefix)}
    return part


def _readings(content, expected):
    """Return a `Reading` of each state dict and each prefix after which names are those of `expected`."""
    found = []
    for place, state_dict in iter_state_dicts(content):
        ends = {name: [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")] for name in state_dict}
        prefixes = {name[:end] for name in ends for end in ends[name] if name[end:] in expected}
        for prefix in sorted(prefixes):
            part = without_prefix(state_dict, prefix)
            found.append(Reading(f"{place}/{prefix}*".strip("/"), part, _count_matches(part, expected)))
    return found


def _shapes(state_dict):
    return {name: tuple(value.shape) for name, value in state_dict.items()}


def _count_matches(state_dict, expected):
    return sum(expected.get(name) == tuple(value.shape) for name, value in state_dict.items())


def _load_error(model, state_dict):
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        return error


def _choose(readings, path, flag):
    places = {reading.place: reading.state_dict for reading in readings}
    return places[choose_place(list(places), path, flag, "sets of weights that fit the model")]


def choose_place(places: list[str], path, flag: str, contents: str) -> str:
    """Return the only one of the places of some contents in a file, else the only one that is named as EMA weights.

    That the EMA weights are chosen is printed.

    :raises ValueError: if there are several, and not one of them is.
    """
    averaged = [place for place in places if not EMA_NAMES.isdisjoint(re.split("[/.]", place))]
    listed = ", ".join(places)
    require((len(places) == 1 or len(averaged) == 1,
             f"{path} contains several {contents}: {listed}; save one of them with torch.save in a file of its own, "
             f"and set {flag} to it"))
    if len(places) == 1:
        return places[0]
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(f"{path} contains several {contents}: {listed}; the EMA weights are used", flush=True)
    return averaged[0]


def _describe_contents(content):
    return ", ".join(f"{next(iter(state_dict))} and {len(state_dict) - 1} others in {place or 'the file itself'}"
                     for place, state_dict in iter_state_dicts(content))


def is_flat(content):
    return isinstance(content, dict) and all(isinstance(value, torch.Tensor) for value in content.values())
