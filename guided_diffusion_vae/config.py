"""Configuration as dataclasses: a field with its default, help text and bounds is the only declaration of a flag.

Flags, `--help`, YAML keys, `*_defaults()` entries and checkpoint headers all derive from these fields (see
`runs.flags`). The dataclasses themselves are defined next to the classes they configure.
"""

import dataclasses
import difflib
import json
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

_BOUNDS = {"minimum": (operator.ge, ">="), "maximum": (operator.le, "<="),
           "above": (operator.gt, ">"), "below": (operator.lt, "<")}


def option(default, help, choices=None, essential=False, positional=False, **bounds):
    """Return a dataclass field with a help text and what its value must satisfy.

    The field's annotation (int, float, bool, str, tuple, or Annotated with a `ParsedText`) determines how its text is
    converted, see `value_type`.

    :param choices: the only values allowed.
    :param essential: show the flag on the first page of `--help`; a flag's name: only in scripts that have that flag.
    :param positional: words before the first flag are the entries of this comma-separated field.
    :param bounds: minimum, maximum (inclusive), above, below (exclusive).
    """
    bounds = [(*_BOUNDS[name], bound) for name, bound in bounds.items()]
    about = {"help": help, "choices": choices, "essential": essential, "bounds": bounds}
    if positional:
        about["positional"] = True
    return dataclasses.field(default=default, metadata=about)


# --- Types of fields ---


class ParsedText:
    """Type of a field that is stored as text, such as "16,8", and parsed where it is used: `Annotated[str, integers]`.

    Headers, cache manifests and the reference's factories hold these values as text, so the text must not change.

    :param name: stands for the value in `--help`.
    :param expected: describes valid texts in errors.
    :param parse: function of the text, raises ValueError for an invalid one.
    :param is_valid: predicate of what was parsed.
    :param store: function of the text that returns what the field holds.
    """

    def __init__(self, name, expected, parse, is_valid=lambda parsed: True, store=str):
        self.__name__, self.expected, self._parse, self._is_valid = name, expected, parse, is_valid
        self._store = store

    def __call__(self, text):
        """Return what the field holds for a text."""
        return self._store(str(text))

    def parse(self, text, name):
        """Return the parsed value.

        :param name: the flag's name for the error.
        :raises ValueError: if the text is invalid.
        """
        try:
            parsed = self._parse(_join(text))
            valid = self._is_valid(parsed)
        except ValueError:
            valid = False
        _require(valid, name, self.expected, text)
        return parsed


class CommaSeparated(ParsedText):
    """Type of a field that holds a comma-separated list as text; it is parsed to a tuple, an empty text to ()."""

    def __init__(self, name, expected, entry, is_valid=lambda entries: True):
        # A comma may end the list, as in Python; entries between commas must not be empty.
        split = lambda text: text.strip().removesuffix(",").split(",") if text.strip() else ()
        super().__init__(name, expected, lambda text: tuple(entry(part.strip()) for part in split(text)), is_valid)


def _join(value):
    """Return the text of a value; that of a list is comma-separated."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _number(text):
    return float(text) if "." in text else int(text)


integers = CommaSeparated("integers", "comma-separated integers such as 16,8", int)
numbers = CommaSeparated("numbers", "comma-separated numbers such as 1,2,2", _number)
words = CommaSeparated("names", "comma-separated names", str)
decibels = ParsedText("db", "a finite number, or empty", lambda text: float(text) if text else None,
                      lambda level: level is None or math.isfinite(level))


def _size(text):
    sides = text.lower().split("x")
    return int(sides[0]) if sides[0].isdigit() and len(sides) < 3 and len(set(sides)) == 1 else text


def _sides(text):
    sides = tuple(int(side) if side.strip().isdigit() else 0 for side in text.lower().split("x"))
    return sides * 2 if len(sides) == 1 else sides


# Parsed to (height, width) or (depth, height, width); a square is stored as a number.
size = ParsedText("size", "a size such as 64, 64x128 (height x width) or 32x64x128 (depth x height x width)", _sides,
                  lambda sides: len(sides) <= 3 and min(sides) > 0, _size)


def _list(text):
    """Parse `4`, `2,2` or `[[1,2,2],[2,2,2]]`; a single value stays a scalar, since it means every axis or level."""
    text = text.strip()
    value = json.loads((text if text.startswith("[") else f"[{text}]").lower())
    return to_tuple(value[0] if len(value) == 1 and not text.startswith("[") else value)


_BOOLEANS = {"yes": True, "true": True, "t": True, "y": True, "1": True,
             "no": False, "false": False, "f": False, "n": False, "0": False}
# type: (description for errors, function of a text)
_CONVERTERS = {
    int: ("an integer", int), float: ("a number", float), bool: ("true or false", lambda text: _BOOLEANS[text.lower()]),
    str: ("text", str), tuple: ("a list such as 2,2 or [[1,2,2],[2,2,2]]", _list),
}


# --- Values of fields ---


def value_type(field):
    """Return what converts the values of a field: int, float, bool, str, tuple or a `ParsedText`."""
    return getattr(field.type, "__metadata__", [field.type])[0]


def convert(name, kind, value):
    """Return a value of the type `kind` from a text of the command line or a value of a YAML file.

    :param name: the flag's name for the error.
    :raises ValueError: if the value is not of that type.
    """
    expected, from_text = (kind.expected, kind) if isinstance(kind, ParsedText) else _CONVERTERS[kind]
    if kind is tuple and isinstance(value, (list, int, float)):
        return to_tuple(value)
    # In YAML a list may be one, and a bool must be one: 1 is a number there.
    allowed = (str, bool) if kind is bool else (str, int, float, *([list] if isinstance(kind, CommaSeparated) else []))
    try:
        found = from_text(_join(value)) if isinstance(value, allowed) else None
    except (ValueError, KeyError):
        found = None
    _require(found is not None, name, expected, value)
    return found


def read(field, value):
    """Return the value of a field from a text or a YAML value, see `convert`, after checking its bounds."""
    value = convert(field.name, value_type(field), value)
    check(field, value)
    return value


def check(field, value):
    """Raise ValueError, naming the flag, if a value is out of the bounds of a field."""
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if isinstance(kind := value_type(field), ParsedText):
        kind.parse(value, field.name)
    _require(not choices or value in choices, field.name,
             f"one of {', '.join(str(choice) for choice in choices or () if choice != '')}", value)
    _require(not isinstance(value, float) or math.isfinite(value), field.name, "finite", value)
    for holds, sign, bound in bounds:
        _require(holds(value, bound), field.name, f"{sign} {bound}", value)


def validate(config):
    """Return a config unchanged; raise ValueError, naming the flag, if a value is out of bounds.

    The parser has done so for flags and YAML; code that takes configs from elsewhere calls it once.
    """
    for field in dataclasses.fields(config):
        check(field, getattr(config, field.name))
    return config


def require(*rules, error=ValueError):
    """Check (holds, message) pairs in order.

    :raises ValueError: with the message of the first pair that does not hold; `error` is another class to raise.
    """
    for holds, message in rules:
        if not holds:
            raise error(message)


def _require(holds, name, expected, value):
    require((holds, f"--{name} must be {expected}, got {value!r}"))


def format_shape(sizes):
    """Return sizes as text, such as 32x64x64."""
    return "x".join(map(str, sizes))


def nearest(word, known):
    """Return the end of a message about an unknown name: the closest known one, else all of them."""
    close = difflib.get_close_matches(word, known := sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of: {', '.join(known)}"


# --- Two flags for one setting ---


class Pair(NamedTuple):
    """Two flags for one setting: `flag` is the one that is used, a set `other` is translated to it."""

    flag: str
    other: str
    unset: object           # value of `other` that sets nothing
    conflicts: Callable     # of the value of `flag`: whether it contradicts a set `other`
    translate: Callable     # of {name: value}: the values that change because `other` is set

    def is_set(self, values):
        return self.flag in values and values.get(self.other, self.unset) != self.unset

    def is_contradicted(self, values):
        return self.is_set(values) and self.conflicts(values[self.flag])


PAIRS = (
    Pair("image_size", "voxel_size", (), lambda size: True,
         lambda v: {"image_size": "x".join(str(int(n)) for n in v["voxel_size"]), "voxel_size": ()}),
    Pair("microbatch", "gradient_accumulation_steps", 1, lambda microbatch: microbatch > 0,
         lambda v: {"microbatch": v["batch_size"], "batch_size": v["batch_size"] * v["gradient_accumulation_steps"],
                    "gradient_accumulation_steps": 1}),
    Pair("use_checkpointing", "use_gradient_checkpointing", False, lambda use: False,
         lambda v: {"use_checkpointing": True, "use_gradient_checkpointing": False}),
    Pair("sampler", "use_ddim", False, lambda sampler: sampler not in ("", "ddim"),
         lambda v: {"sampler": "ddim", "use_ddim": False}),
    Pair("max_steps", "lr_anneal_steps", 0, lambda steps: False,
         lambda v: {"max_steps": min(v["max_steps"] or v["lr_anneal_steps"], v["lr_anneal_steps"])}),
)


def check_pairs(values):
    """Raise ValueError if two flags of {name: value} contradict each other."""
    for pair in PAIRS:
        require((not pair.is_contradicted(values), f"--{pair.flag} {values.get(pair.flag)} and --{pair.other} "
                 f"{values.get(pair.other)} are mutually exclusive; set only one of them"))


def translate_pairs(values):
    """Return the entries of {name: value} that change because the other flag of a pair is set."""
    return {name: value for pair in PAIRS if pair.is_set(values) for name, value in pair.translate(values).items()}


def resolve(*configs):
    """Return the configs, checked, with every pair of flags translated to the one that is used.

    :raises ValueError: if a value is out of bounds, or two flags contradict each other.
    """
    values = {name: value for config in configs for name, value in vars(validate(config)).items()}
    check_pairs(values)
    changes = translate_pairs(values)
    return [dataclasses.replace(c, **{k: v for k, v in changes.items() if k in vars(c)}) for c in configs]


# --- Dictionaries ---


def as_dict(config):
    """Return a config dataclass as a plain dictionary that survives JSON (tuples become lists)."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(cls, values):
    """Return an instance of `cls` from a dictionary, ignoring keys it does not have; inverse of `as_dict`."""
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(**{key: to_tuple(value) for key, value in values.items() if key in known})


def changed_fields(config):
    """Return {name: value} of the fields of a config that differ from their defaults."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}


def section_name(cls):
    """Return the YAML section of a config class: its SECTION, else its name in lower case without 'Config'."""
    return getattr(cls, "SECTION", cls.__name__.removesuffix("Config").lower())


def to_tuple(value):
    """Return lists, nested ones too, as tuples, which config dataclasses hold."""
    return tuple(to_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def _plain(value):
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
