import dataclasses
import json

import pytest

from guided_diffusion_vae.config import as_dict, from_dict, option, require, size, to_tuple


@dataclasses.dataclass
class Knobs:
    name: str = option("a", "what it is called", choices=("a", "b"))
    rate: float = option(0.5, "how fast")
    factors: tuple = option(((1, 2), (2, 2)), "strides")


def test_a_field_carries_its_default_help_and_choices():
    name, rate, _ = dataclasses.fields(Knobs)
    assert Knobs() == Knobs("a", 0.5, ((1, 2), (2, 2)))
    assert dict(name.metadata) == {"help": "what it is called", "choices": ("a", "b"), "minimum": None, "maximum": None}
    assert rate.metadata["choices"] is None


@pytest.mark.parametrize("knobs", [Knobs(), Knobs("b", 1e-17, ()), Knobs(factors=2)])
def test_from_dict_inverts_as_dict_through_json(knobs):
    assert from_dict(Knobs, json.loads(json.dumps(as_dict(knobs)))) == knobs


def test_as_dict_holds_what_json_gives_back():
    assert as_dict(Knobs()) == json.loads(json.dumps(as_dict(Knobs()))) == {
        "name": "a", "rate": 0.5, "factors": [[1, 2], [2, 2]]
    }


def test_from_dict_passes_over_keys_of_other_classes_and_keeps_defaults():
    assert from_dict(Knobs, {"rate": 2.0, "lr": 1}) == Knobs(rate=2.0)


def test_frozen_turns_lists_at_any_depth_into_tuples():
    assert to_tuple([1, [2, (3, [4])], "ab"]) == (1, (2, (3, (4,))), "ab")
    assert to_tuple("ab") == "ab" and to_tuple(None) is None


@pytest.mark.parametrize("text, value", [("64", 64), (64, 64), ("64x128", "64x128"), ("-1", "-1"), ("", "")])
def test_a_size_is_a_number_where_it_is_one(text, value):
    assert size(text) == value and type(size(text)) is type(value)


def test_require_raises_the_first_message_that_does_not_hold():
    require((True, "one"), ("anything", "two"))
    with pytest.raises(ValueError, match="^two$"):
        require((True, "one"), (0, "two"), (False, "three"))
    with pytest.raises(FileNotFoundError, match="^one$"):
        require((None, "one"), error=FileNotFoundError)
