"""Declare knobs: a dataclass field with its default and help text is the only place where a knob is written.

Flags, `--help`, YAML keys, `*_defaults()` entries and checkpoint headers all derive from these fields (see
`script_util`). The dataclasses themselves stand beside the classes they configure.
"""

import dataclasses


def option(default, help, choices=None, minimum=None, maximum=None):
    """Return a dataclass field with a help text; `choices` lists the only values allowed, or bounds are stated.

    The field's annotation (int, float, bool, str, tuple, or a function such as `size`) says how its text is read.
    """
    about = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=about)


def size(text):
    """Convert a size from a command line: `64` and `64x64` to a number, `64x128` and `32x64x64` to text."""
    sides = str(text).lower().split("x")
    return int(sides[0]) if sides[0].isdigit() and len(sides) < 3 and len(set(sides)) == 1 else str(text)


def as_dict(config):
    """Return a config dataclass as a plain dictionary that survives JSON (tuples become lists)."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(cls, values):
    """Build `cls` from a dictionary, ignoring keys it does not have; inverse of `as_dict`."""
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(**{key: to_tuple(value) for key, value in values.items() if key in known})


def section_name(cls):
    """Return the YAML section of a config class: its SECTION, else its name in lower case without 'Config'."""
    return getattr(cls, "SECTION", cls.__name__.removesuffix("Config").lower())


def require(*rules, error=ValueError):
    """Check (holds, message) pairs in order.

    :raises ValueError: with the message of the first pair that does not hold; `error` is another class to raise.
    """
    for holds, message in rules:
        if not holds:
            raise error(message)


def to_tuple(value):
    """Turn lists, nested ones too, into tuples, as config dataclasses hold them."""
    return tuple(to_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def _plain(value):
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
