"""Turn flags and YAML into configs; the only module that imports argparse."""

import argparse
import dataclasses
import difflib
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

from .. import dist_util
from ..config import from_dict, to_tuple, section_name
from ..data import DataConfig, parse_size


class Selection(NamedTuple):
    """Fields of a config class that a script has flags for; the others keep their defaults."""

    cls: type
    names: tuple

    @property
    def section(self):
        return section_name(self.cls)

    @property
    def fields(self):
        """The dataclass fields that are flags."""
        return [f for f in dataclasses.fields(self.cls) if f.name in self.names]

    def build(self, values):
        """Return an instance of the whole class; values of other flags are ignored."""
        return from_dict(self.cls, {name: values[name] for name in self.names if name in values})


def select_fields(cls, *names):
    """Return the selection of these fields of `cls`."""
    return Selection(cls, names)


def drop_fields(cls, *names):
    """Return the selection of all fields of `cls` except these."""
    return Selection(cls, tuple(f.name for f in dataclasses.fields(cls) if f.name not in names))


def _selections(classes):
    """Return a Selection for every config class or selection."""
    return [cls if isinstance(cls, Selection) else drop_fields(cls) for cls in classes]


def parse(doc, *classes, argv=None):
    """Return one instance of every config class, from defaults, then `--config file.yaml`, then flags."""
    return parse_explicit(doc, *classes, argv=argv)[0]


def parse_explicit(doc, *classes, argv=None):
    """Return (instances, {flag: value} of what was set in the file or on the command line).

    :param classes: config classes, or selections of their fields; an instance is always one of the whole class.
    """
    argv = sys.argv[1:] if argv is None else argv
    selections = _selections(classes)
    flags = _explicit(argparser(doc, *selections), argv)
    fields = [field for selection in selections for field in selection.fields]
    dist_util.memory_flags = [n for n in dist_util.MEMORY_FLAGS if n in {f.name for f in fields}]
    from_file = read_yaml(flags.pop("config"), selections) if "config" in flags else {}
    _resolve_sizes(from_file, flags)
    given = {**from_file, **flags}
    _require_in_bounds(fields, given)
    return [selection.build(given) for selection in selections], given


def _require_in_bounds(fields, given):
    for field in (field for field in fields if field.name in given):
        value, least, most = given[field.name], field.metadata["minimum"], field.metadata["maximum"]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{field.name} is {value}; it is a finite number")
        if least is not None and not value >= least:
            raise ValueError(f"--{field.name} is {value}; it is at least {least}")
        if most is not None and not value <= most:
            raise ValueError(f"--{field.name} is {value}; it is at most {most}")


def _resolve_sizes(from_file, flags):
    """Let the size on the command line win, under whichever of its two names, and refuse what contradicts it."""
    for where in (from_file, flags):
        if "image_size" in where and where.get("voxel_size"):
            raise ValueError(f"--voxel_size {where['voxel_size']} and --image_size {where['image_size']} are two names "
                             "for one size; give one of them")
    for name, other in (("image_size", "voxel_size"), ("voxel_size", "image_size")):
        if name in flags:
            from_file.pop(other, None)
    given = {**from_file, **flags}
    if "spatial_dims" not in given:
        return
    sides = given.get("voxel_size") or parse_size(given.get("image_size", DataConfig.image_size))
    if given["spatial_dims"] != len(sides):
        raise ValueError(f"--spatial_dims {given['spatial_dims']}, but the size {'x'.join(map(str, sides))} has "
                         f"{len(sides)} axes; give --image_size one number an axis, and leave --spatial_dims away")


def argparser(doc, *classes):
    """Return the parser of a script: one flag a field, with its help text and default."""
    parser = _Parser(description=doc, usage="%(prog)s [--config FILE.yaml] [--flag value ...]", allow_abbrev=False,
                     formatter_class=_HelpFormatter)
    parser.add_argument("--config", default="", metavar="FILE.yaml", help="values for flags below, which win over it")
    selections = _selections(classes)
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(s.section for s in selections)}
    for selection in selections:
        group = groups[selection.section]
        for field in selection.fields:
            choices = field.metadata["choices"]
            group.add_argument(f"--{field.name}", default=field.default, type=_CONVERTERS.get(field.type, field.type),
                               metavar=None if choices else field.type.__name__.upper(), choices=choices,
                               help=field.metadata["help"])
    return parser


def read_yaml(path, classes):
    """Return {flag: value} for the given config classes or selections from a YAML file.

    Keys stand alone or in the section of their class (`data`, `autoencoder`, `autoencoder.training`, ...). Sections of
    other scripts are passed over, so one file can serve a whole pipeline; a key that no class of its section has is
    refused with the nearest one that exists. Keys in the section `device` hold for every section that has them.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; check --config")
    try:
        content = yaml.load(Path(path).read_text(), _unique_key_loader(yaml)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not keys with values")
    selections = _selections(classes)
    mine = {f.name: f for selection in selections for f in selection.fields}
    values, sections = {}, _all_sections()

    def take(section, entries):
        here = {f.name for s in selections if section in ("", "device", s.section) for f in s.fields}
        known = sections.get(section, set())
        for key, value in entries.items():
            nested = f"{section}.{key}" if section else key
            if nested in sections and (value is None or isinstance(value, dict)):
                take(nested, value or {})
            elif key not in known | here:
                raise ValueError(f"{path} has an unknown key {nested!r}{_nearest(key, known | here | set(sections))}")
            elif key in here:
                read = _from_yaml(mine[key], value, path)
                if key in values and values[key] != read:
                    raise ValueError(f"{path} sets {key} to {values[key]} and, as {nested}, to {read}; keep one")
                values[key] = read

    take("", content)
    return values


def _unique_key_loader(yaml):
    """Return a loader that refuses a key that stands twice in one place, of which YAML would take the last."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice",
                                                            key.start_mark)
                seen.add((key.tag, key.value if isinstance(key.value, str) else id(key)))
            return super().construct_mapping(node, deep)

    return Loader


def _all_sections():
    """Return {section: known keys}; imported here because the scripts need only some of these modules."""
    from .configs import CONFIGS

    sections = {}
    for cls in CONFIGS:
        sections.setdefault(section_name(cls), set()).update(f.name for f in dataclasses.fields(cls))
    return {**sections, "device": set().union(*sections.values())}


def _from_yaml(field, value, path):
    kind = field.type.__name__
    if kind == "tuple" and isinstance(value, (list, int, float, bool)):
        return to_tuple(value)
    if kind == "bool" and not isinstance(value, bool) or isinstance(value, (dict, list)) or value is None:
        raise ValueError(f"{path}: {field.name} is {value!r}, needed is a value of type {kind}")
    try:
        value = _CONVERTERS.get(field.type, field.type)(value if kind == "bool" else str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{path}: {field.name} is {value!r}, needed is a value of type {kind}") from error
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{path}: {field.name} is {value!r}, possible are {', '.join(map(str, choices))}")
    return value


def _explicit(parser, argv):
    """Return {flag: value} of the flags that stand on the command line."""
    parser.parse_args(argv)  # answers --help and complains while the defaults are in place
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def _nearest(word, known):
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


class _Parser(argparse.ArgumentParser):
    """Answers a mistake with one line, and an unknown flag with the nearest known one."""

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            word = message.split(":", 1)[1].split()[0].lstrip("-").split("=")[0]
            message += _nearest(word, {a.dest for a in self._actions})
        self.exit(2, f"error: {message} (--help lists all flags)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that ends with the default, spelled as on the command line."""

    def _get_help_string(self, action):
        default = action.default
        if default in (argparse.SUPPRESS, None, "", ()):
            return action.help
        if isinstance(default, tuple):
            default = json.dumps(default, separators=(",", ":"))
        return f"{action.help} (default: {default})"


def str2bool(v):
    """Read yes/no in the usual spellings; https://stackoverflow.com/q/15008758 asks for it since argparse cannot."""
    if isinstance(v, bool):
        return v
    answer = {"yes": True, "true": True, "t": True, "y": True, "1": True,
              "no": False, "false": False, "f": False, "n": False, "0": False}.get(v.lower())
    if answer is None:
        raise argparse.ArgumentTypeError(f"{v!r} is neither true nor false")
    return answer


def _numbers(text):
    """Read `4`, `2,2` or `[[1,2,2],[2,2,2]]`; a single value stays a scalar, since it means every axis or level."""
    text = text.strip()
    try:
        value = json.loads((text if text.startswith("[") else f"[{text}]").lower())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 2,2 or [[1,2,2],[2,2,2]]") from error
    return to_tuple(value[0] if len(value) == 1 and not text.startswith("[") else value)


_CONVERTERS = {bool: str2bool, tuple: _numbers}


def add_dict_to_argparser(parser, default_dict):
    """Add a flag for every entry of a dictionary, its type being that of the default (None: text)."""
    for name, default in default_dict.items():
        kind = str if default is None else type(default)
        parser.add_argument(f"--{name}", default=default, type=_CONVERTERS.get(kind, kind))


def args_to_dict(args, keys):
    """Pick attributes of parsed arguments by name."""
    return {key: getattr(args, key) for key in keys}


def flag_names(*classes):
    """Return the names of all flags of these config classes or selections."""
    return {field.name for selection in _selections(classes) for field in selection.fields}
