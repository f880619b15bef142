"""Turn flags and YAML into configs; the only module that imports argparse."""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from .. import dist_util
from ..config import (
    PAIRS, changed_fields, check_pairs, convert, from_dict, nearest, read, require, section_name, size, value_type,
)
from ..files import read_yaml_file
from ..programs import call_as_started

# Former names of flags and YAML keys, until the next minor release; each use is reported.
FLAG_ALIASES = {
    "val_pictures": "max_val_samples",          # alias
    "num_pictures": "max_samples",              # alias
    "mirror": "augment_flip",                   # alias
    "small_cache_dir": "low_res_cache_dir",     # alias
    "png": "save_individual",                   # alias
}


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


def flag_names(*classes):
    """Return the names of all flags of these config classes or selections."""
    return {field.name for selection in _selections(classes) for field in selection.fields}


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
    selections = _selections(classes)
    flags = _explicit(argparser(doc, *selections), sys.argv[1:] if argv is None else argv)
    return _build(selections, read_yaml(flags.pop("config"), selections) if "config" in flags else {}, flags)


def from_python(*classes, config=None, **settings):
    """Return what `parse_explicit` does, for values of Python instead of a command line.

    :param config: a YAML file or the name of one of the package, or config objects, whose fields that differ from their
        defaults are set; None: none.
    :param settings: {flag: value}, which win over `config`.
    :raises ValueError: for a setting that the script does not have, and for a value that its flag rejects.
    """
    selections = _selections(classes)
    fields = {field.name: field for selection in selections for field in selection.fields}
    is_file = config is None or isinstance(config, (str, os.PathLike))
    from_file = read_yaml(config, selections) if is_file and config is not None else {}
    for each in () if is_file else [config] if dataclasses.is_dataclass(config) else config:
        from_file |= changed_fields(each)
    for name in {**from_file, **settings}:
        require((name in fields, f"unknown setting {name!r}{nearest(name, fields)}"))
    settings = {name: read(fields[name], os.fspath(value) if isinstance(value, os.PathLike) else value)
                for name, value in settings.items()}
    return _build(selections, from_file, settings)


def find_config_flag(argv=None):
    """Return the value of --config, "" if it is not set."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    return parser.parse_known_args(argv)[0].config


def read_config_flag(*classes, argv=None):
    """Return instances with the settings of the file of --config, None if it has no section of any of the classes."""
    path = find_config_flag(argv)
    if not path or not {section_name(cls) for cls in classes} & read_yaml_file(_find_config(path)).keys():
        return None
    return from_python(*classes, config=path)[0]


def _build(selections, from_file, flags):
    """Return (instances, {flag: value} of what was set) for values from a file and flags that win over them."""
    given = _merge(from_file, flags)
    configs = [selection.build(given) for selection in selections]
    _check_spatial_dims(given, {name: value for config in configs for name, value in vars(config).items()})
    return configs, given


def _merge(from_file, flags):
    """Return the values that are set; the command line wins over the file, under either name of a pair."""
    check_pairs(from_file)
    check_pairs(flags)
    given = {**from_file, **flags}
    for pair in PAIRS:
        if pair.is_contradicted(given):
            given = {name: value for name, value in given.items() if name in flags or name not in pair[:2]}
    return given


def _check_spatial_dims(given, values):
    if "spatial_dims" in given:
        sides = size.parse(values["image_size"], "image_size")
        if given["spatial_dims"] != len(sides):
            raise ValueError(f"--spatial_dims {given['spatial_dims']} conflicts with --image_size "
                             f"{'x'.join(map(str, sides))}, which has {len(sides)} axes; omit --spatial_dims, and set "
                             "--image_size to one number per axis")


# --- Command line ---


def argparser(doc, *classes):
    """Return the parser of a script: one flag per field, with its help text and default."""
    parser = _Parser(Path(sys.argv[0]).name, "%(prog)s [--config FILE.yaml] [--flag value ...]", call_as_started(doc),
                     allow_abbrev=False, formatter_class=_HelpFormatter, add_help=False)
    parser.add_argument("-h", "--help", action=_Help, help="print the essential flags")
    parser.add_argument("--help_all", action=_Help, help="print all flags")
    selections = _selections(classes)
    config = parser.add_argument("--config", default="", metavar="FILE.yaml",
                                 help="file of flags, or name of a shipped one; the command line wins over it")
    parser.essential.append(config)
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(s.section for s in selections)}
    flags = flag_names(*selections)
    for selection in selections:
        for field in selection.fields:
            kind, choices, essential = value_type(field), field.metadata["choices"], field.metadata["essential"]
            action = groups[selection.section].add_argument(
                f"--{field.name}", default=field.default, type=_argument_type(functools.partial(read, field)),
                metavar=f"{{{','.join(map(str, choices))}}}" if choices else kind.__name__.upper(),
                help=call_as_started(field.metadata["help"]).replace("%", "%%"),    # argparse formats the text
            )
            if essential is True or essential in flags:
                parser.essential.append(action)
            if "positional" in field.metadata:
                parser.positional = f"--{field.name}"
                parser.usage = parser.usage.replace("%(prog)s", f"%(prog)s [{field.name.upper()} ...]")
    return parser


def _argument_type(convert):
    """Return a converter whose message argparse prints."""
    def converted(text):
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


def _explicit(parser, argv):
    """Return {flag: value} of the flags that are on the command line."""
    argv = _join_negative(_rename_flags(argv, {action.dest for action in parser._actions}))
    if words := [*itertools.takewhile(lambda word: not word.startswith("-"), argv)] if parser.positional else []:
        argv = [parser.positional, ",".join(words), *argv[len(words):]]
    parser.parse_args(argv)  # answers --help and reports errors while the defaults are set
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def _join_negative(argv):
    """Return the command line with `--flag=-80,0` for `--flag -80,0`, whose value argparse reads as a flag."""
    words = []
    for word in argv:
        if re.match(r"-[\d.]", word) and words and re.fullmatch(r"--\w+", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _rename_flags(argv, known):
    """Return the command line with the present names of deprecated flags."""
    words = {re.split("[= ]", word.removeprefix("--"), maxsplit=1)[0] for word in argv if word.startswith("--")}
    renamed = _rename(words, known)
    return [re.sub(r"^--(\w+)", lambda flag: f"--{renamed.get(flag[1], flag[1])}", word) for word in argv]


def _rename(names, known, prefix="--", source=""):
    """Return {deprecated name: present one} of the flags, or keys of the YAML file `source`, and report each."""
    renamed = {old: new for old, new in FLAG_ALIASES.items() if old in names and new in known}
    for old, new in renamed.items():
        if new in names:
            raise ValueError(f"{source}{prefix}{old} is the deprecated name of {prefix}{new}; set only the latter")
        message = f"{source}{prefix}{old} is deprecated, use {prefix}{new}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        if dist_util.rank() == 0:  # Python hides such warnings outside of __main__
            print(message, file=sys.stderr)
    return renamed


class _Parser(argparse.ArgumentParser):
    """Parser that answers a mistake with one line, and an unknown flag with the nearest known one."""

    def __init__(self, *texts, **settings):
        self.essential = []     # actions on the first page of the help
        self.positional = ""    # the flag whose entries are the words before the first flag
        super().__init__(*texts, **settings)

    @property
    def words(self):
        """Completions of each flag, {flag: texts}: its choices, True and False, or none."""
        metavars = {word: action.metavar or "" for action in self._actions for word in action.option_strings}
        return {flag: ["True", "False"] if text == "BOOL" else re.findall(r"[^{,}]+", text) if text[:1] == "{" else []
                for flag, text in metavars.items()}

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            word = message.split(":", 1)[1].split()[0].lstrip("-").split("=")[0]
            message += nearest(word, {a.dest for a in self._actions} - {argparse.SUPPRESS})
        message = re.sub("^argument .*?: --", "--", message)    # `config.check` names the flag itself
        self.exit(2, f"error: {message} (--help_all lists all flags)\n")

    def format_essentials(self):
        """Return the first page of the help."""
        page = self._get_formatter()
        page.add_usage(self.usage, (), ())
        page.add_text(self.description)
        page.start_section("essential flags")
        page.add_arguments(self.essential)
        page.end_section()
        page.add_text(f"--help_all lists all {len(self._actions) - 2} flags")
        return page.format_help()


class _Help(argparse.Action):
    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help() if option_string == "--help_all" else parser.format_essentials(), end="")
        parser.exit()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that ends with the default, spelled as on the command line."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action):
        default = action.default
        if default in (argparse.SUPPRESS, None, "", ()):
            return action.help
        if isinstance(default, tuple):
            default = json.dumps(default, separators=(",", ":"))
        return f"{action.help} (default: {default})"


# --- YAML ---


def read_yaml(path, classes):
    """Return {flag: value} for the given config classes or selections from a YAML file.

    Keys are top-level or in the section of their class (`data`, `autoencoder`, `autoencoder.training`, ...). Sections
    of other scripts are ignored, so one file can serve a whole pipeline; a key that no class of its section has is an
    error that names the nearest one. Keys in the section `device` hold for every section that has them.
    """
    path = _find_config(path)
    content = read_yaml_file(path)
    selections = _selections(classes)
    fields = {f.name: f for selection in selections for f in selection.fields}
    values, sections = {}, _known_keys()

    def take(section, entries):
        if not_text := [key for key in entries if not isinstance(key, str)]:
            raise ValueError(f"{path}: expected keys that are text, got {not_text[0]!r}")
        here = {f.name for s in selections if section in ("", "device", s.section) for f in s.fields}
        known = sections.get(section, set()) | here
        renamed = _rename(entries, known, section and f"{section}.", f"{path}: ")
        for key, value in entries.items():
            nested, key = f"{section}.{key}" if section else key, renamed.get(key, key)
            if nested in sections and (value is None or isinstance(value, dict)):
                take(nested, value or {})
            elif key not in known:
                raise ValueError(f"{path}: unknown key {nested!r}{nearest(key, known | set(sections))}")
            elif key in here:
                try:
                    value = read(fields[key], value)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None
                if values.setdefault(key, value) != value:
                    raise ValueError(f"{path} sets {key} to {values[key]} and, as {nested}, to {value}; keep one")

    take("", content)
    return values


def shipped_configs():
    """Return {name: path} of the configurations of the package, such as `volumes/low`."""
    package = Path(__file__).parents[1]     # configs/ is in an installed package, but beside that of a checkout
    folder = next((place / "configs" for place in (package, package.parent) if (place / "configs").is_dir()), package)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def _find_config(path):
    """Return the path of a YAML file: a file, else the configuration of the package of that name."""
    shipped = shipped_configs()
    name = str(path).removeprefix("configs/").removesuffix(".yaml")
    if not Path(path).is_file() and name not in shipped:
        raise FileNotFoundError(f"{path} does not exist; check --config, or use a configuration of the package: "
                                f"{', '.join(shipped)}")
    return path if Path(path).is_file() else shipped[name]


def _known_keys():
    """Return {section: set of its keys} of all scripts."""
    # By name, and here: `configs` imports `run`, which imports this module.
    sections = {}
    for cls in importlib.import_module(f"{__package__}.configs").CONFIGS:
        sections.setdefault(section_name(cls), set()).update(f.name for f in dataclasses.fields(cls))
    return {**sections, "device": set().union(*sections.values())}


# --- Helpers of guided-diffusion ---


def str2bool(v):
    """Return the truth value of yes/no in the usual spellings (https://stackoverflow.com/q/15008758)."""
    try:
        return v if isinstance(v, bool) else convert("", bool, v)
    except ValueError:
        raise argparse.ArgumentTypeError(f"boolean value expected, got {v!r}") from None


def add_dict_to_argparser(parser, default_dict):
    """Add a flag for every entry of a dictionary, of the type of its default (None: text)."""
    for name, default in default_dict.items():
        kind = str if default is None else type(default)
        parser.add_argument(f"--{name}", default=default, type=_argument_type(functools.partial(convert, name, kind)))


def args_to_dict(args, keys):
    """Return attributes of parsed arguments by name."""
    return {key: getattr(args, key) for key in keys}
