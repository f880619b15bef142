import dataclasses
import json
import re

import pytest

from guided_diffusion_vae import files
from guided_diffusion_vae.config import (
    CommaSeparated, as_dict, check_pairs, from_dict, integers, numbers, option, read, require, resolve, size, to_tuple,
    validate,
)
from guided_diffusion_vae.files import read_yaml_file


@dataclasses.dataclass
class Options:
    name: str = option("a", "what it is called", choices=("a", "b"), essential=True)
    rate: float = option(0.5, "how fast")
    factors: tuple = option(((1, 2), (2, 2)), "strides")


def test_field_has_default_help_choices_and_bounds():
    name, rate, _ = dataclasses.fields(Options)
    assert Options() == Options("a", 0.5, ((1, 2), (2, 2)))
    assert dict(name.metadata) == {"help": "what it is called", "choices": ("a", "b"), "essential": True, "bounds": []}
    assert rate.metadata["choices"] is None and not rate.metadata["essential"]


@pytest.mark.parametrize("config", [Options(), Options("b", 1e-17, ()), Options(factors=2)])
def test_from_dict_inverts_as_dict_through_json(config):
    assert from_dict(Options, json.loads(json.dumps(as_dict(config)))) == config


def test_as_dict_survives_json():
    assert as_dict(Options()) == json.loads(json.dumps(as_dict(Options()))) == {
        "name": "a", "rate": 0.5, "factors": [[1, 2], [2, 2]]
    }


def test_from_dict_ignores_other_keys_and_keeps_defaults():
    assert from_dict(Options, {"rate": 2.0, "lr": 1}) == Options(rate=2.0)


def test_to_tuple_converts_nested_lists():
    assert to_tuple([1, [2, (3, [4])], "ab"]) == (1, (2, (3, (4,))), "ab")
    assert to_tuple("ab") == "ab" and to_tuple(None) is None


@pytest.mark.parametrize("text, value", [("64", 64), (64, 64), ("64x128", "64x128"), ("-1", "-1"), ("", "")])
def test_square_size_is_stored_as_a_number(text, value):
    assert size(text) == value and type(size(text)) is type(value)


def test_require_raises_the_first_message_that_does_not_hold():
    require((True, "one"), ("anything", "two"))
    with pytest.raises(ValueError, match="^two$"):
        require((True, "one"), (0, "two"), (False, "three"))
    with pytest.raises(FileNotFoundError, match="^one$"):
        require((None, "one"), error=FileNotFoundError)


ascending = CommaSeparated("lo,hi", "two integers, the lower first", int, lambda v: len(v) == 2 and v[0] < v[1])


@dataclasses.dataclass
class Bounded:
    share: float = option(0.5, "a share", minimum=0, below=1)
    width: float = option(1.0, "a width", above=0, maximum=9)
    order: ascending = option("1,2", "an interval")
    levels: tuple = option((), "a list")


FIELDS = {field.name: field for cls in (Options, Bounded) for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("name, value, problem", [
    ("share", -0.5, ">= 0"), ("share", 1.0, "< 1"), ("width", 0.0, "> 0"), ("width", 9.5, "<= 9"),
    ("width", float("nan"), "finite"), ("width", float("-inf"), "finite"), ("name", "c", "one of a, b"),
    ("order", "2,1", "two integers, the lower first"), ("order", "1,b", "two integers"), ("order", "", "two integers"),
])
def test_values_out_of_bounds_are_rejected_in_flags_and_code(name, value, problem):
    cls = Bounded if name in Bounded.__dataclass_fields__ else Options
    for attempt in (lambda: read(FIELDS[name], str(value)), lambda: validate(cls(**{name: value}))):
        with pytest.raises(ValueError, match=f"^--{name} must be {problem}.*, got {value!r}|got '{value}'$"):
            attempt()


def test_values_at_inclusive_bounds_are_valid():
    config = Bounded(share=0.0, width=9.0, order=" 3, 4,")
    assert validate(config) is config
    with pytest.raises(KeyError):
        option(0, "a misspelled bound", least=0)


@pytest.mark.parametrize("name, value, found", [
    ("rate", "1e-3", 1e-3), ("rate", 2, 2.0), ("factors", "2,[1,2]", (2, (1, 2))), ("factors", [1, [2]], (1, (2,))),
    ("factors", "2", 2), ("factors", True, True), ("order", [3, 4], "3,4"), ("order", "3, 4", "3, 4"),
])
def test_value_is_converted_by_the_type_of_its_field(name, value, found):
    assert read(FIELDS[name], value) == found and type(read(FIELDS[name], value)) is type(found)


def test_comma_separated_text_is_parsed_on_use():
    assert integers.parse("16,8", "x") == (16, 8) and integers.parse("", "x") == ()
    assert numbers.parse("1,0.5", "x") == (1, 0.5) == numbers.parse([1, 0.5], "x")
    assert integers.parse(" 16, 8, ", "x") == (16, 8)
    for text in ("16;8", "16,,8", ","):
        with pytest.raises(ValueError, match=f"^--x must be comma-separated integers such as 16,8, got '{text}'$"):
            integers.parse(text, "x")


@dataclasses.dataclass
class Sampling:
    sampler: str = option("", "")
    use_ddim: bool = option(False, "")
    batch_size: int = option(3, "")
    microbatch: int = option(-1, "")
    gradient_accumulation_steps: int = option(1, "", minimum=1)
    max_steps: int = option(0, "")
    lr_anneal_steps: int = option(0, "")
    use_gradient_checkpointing: bool = option(False, "")


@dataclasses.dataclass
class Network:
    use_checkpointing: bool = option(False, "")


@pytest.mark.parametrize("given, translated", [
    ({"use_ddim": True}, {"sampler": "ddim", "use_ddim": False}), ({"sampler": "unipc"}, {"sampler": "unipc"}),
    ({"use_ddim": True, "sampler": "ddim"}, {"use_ddim": False}),
    ({"gradient_accumulation_steps": 2}, {"batch_size": 6, "microbatch": 3, "gradient_accumulation_steps": 1}),
    ({"lr_anneal_steps": 7}, {"max_steps": 7, "lr_anneal_steps": 7}),
    ({"lr_anneal_steps": 7, "max_steps": 5}, {"max_steps": 5}),
    ({"lr_anneal_steps": 7, "max_steps": 9}, {"max_steps": 7}),
])
def test_other_flag_of_a_pair_is_translated_once(given, translated):
    config, = resolve(Sampling(**given))
    assert config == Sampling(**{**given, **translated}) and resolve(config) == [config]


def test_resolve_rejects_values_out_of_bounds():
    with pytest.raises(ValueError, match="--gradient_accumulation_steps must be >= 1, got 0"):
        resolve(Sampling(gradient_accumulation_steps=0))


def test_pair_may_belong_to_two_configs():
    assert resolve(Network(), Sampling(use_gradient_checkpointing=True)) == [Network(True), Sampling()]
    assert resolve(Network(True), Sampling()) == [Network(True), Sampling()]


@pytest.mark.parametrize("values", [
    {"sampler": "unipc", "use_ddim": True}, {"microbatch": 2, "gradient_accumulation_steps": 4},
    {"image_size": 64, "voxel_size": (64, 64, 64)},
])
def test_conflicting_pair_is_rejected_by_both_names(values):
    (first, a), (second, b) = values.items()
    message = re.escape(f"--{first} {a} and --{second} {b} are mutually exclusive; set only one of them")
    with pytest.raises(ValueError, match=message):
        check_pairs(values)
    if first != "image_size":
        with pytest.raises(ValueError, match=message):
            resolve(Sampling(**values))


# --- YAML files ---


@pytest.mark.parametrize("content, problem", [
    ("data: {crop: none}".encode("utf-16"), "is not UTF-8 text .*; save it as UTF-8"),
    ("data: {crop: none}".encode("utf-16-le"), "is not UTF-8 text .it contains null bytes, as UTF-16 does.; save it"),
    ("name: Müller".encode("latin-1"), "is not UTF-8 text .*can't decode byte 0xfc in position 7.*; save it as UTF-8"),
    (b"a: &x [*x]", "is not YAML: anchors contain themselves or aliases expand to more than 100000 values"),
    (b"a: &x {b: {c: *x}}", "is not YAML: anchors contain themselves"),
    (b"a0: &a0 [1, 1]\n" + b"".join(b"a%d: &a%d [%b]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9))
                                    for n in range(1, 9)),
     "is not YAML: .* aliases expand to more than 100000 values"),
    (b"a: !!timestamp x", "is not YAML: AttributeError: "), (b"a: !!bool x", "is not YAML: KeyError: 'x'"),
    (b"a: !!int x", "is not YAML: invalid literal for int"), (b"a: 2001-13-45", "is not YAML: month must be in 1..12"),
    (b"a: !!python/object/apply:os.system [echo]", "is not YAML: could not determine a constructor"),
    (b"[" * 500, "is not YAML: RecursionError: "), (b"a: *b", "is not YAML: found undefined alias 'b'"),
    (b"a: 1\na: 2", "is not YAML: the key a occurs twice"), (b"? [a]\n: 1", "is not YAML: .*found unhashable key"),
    (b"- a", ": expected keys with values, got a list"), (b"text", ": expected keys with values, got a str"),
])
def test_yaml_files_that_are_not_read_are_named(tmp_path, content, problem):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} ?{problem}"):
        read_yaml_file(path)


def test_yaml_files_may_have_a_byte_order_mark_anchors_and_any_text(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("\ufeffbase: &b {lr: 1, name: Müller}\nmore: [*b, *b]\nnext: {<<: *b, lr: 2}".encode())
    base = {"lr": 1, "name": "Müller"}
    assert read_yaml_file(path) == {"base": base, "more": [base, base], "next": {**base, "lr": 2}}
    path.write_text("# nothing")
    assert read_yaml_file(path) == {}


def test_number_of_yaml_values_is_bounded_inclusively(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("a: &a [1, 2]\nb: *a")     # the mapping, two keys, twice a list of two
    monkeypatch.setattr(files, "MAX_YAML_NODES", 9)
    assert read_yaml_file(path) == {"a": [1, 2], "b": [1, 2]}
    monkeypatch.setattr(files, "MAX_YAML_NODES", 8)
    with pytest.raises(ValueError, match="aliases expand to more than 8 values"):
        read_yaml_file(path)
