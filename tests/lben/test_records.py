"""Records: frozen configurations and reports become JSON and come back equal."""

import dataclasses
import json

import numpy as np
import pytest

from lben.records import by_name, decode, encode, from_json, to_json, to_plain
from lben.training.optimization import SGD, Constant


@dataclasses.dataclass(frozen=True)
class Nested:
    rows: tuple[tuple[int, ...], ...]
    inner: SGD | Constant | None = None


@pytest.mark.parametrize("inner", [None, SGD(momentum=0.5), Constant()])
def test_nested_values_come_back_equal(inner):
    value = Nested(((1, 2), ()), inner)
    assert decode(json.loads(json.dumps(encode(value))), by_name(Nested)) == value


@dataclasses.dataclass(frozen=True)
class Inner:
    bound: float
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...]
    pair: tuple[float, int]
    maybe: float | None
    rows: tuple[tuple[float, ...], ...] | None = None
    words: dict[str, str] = dataclasses.field(default_factory=dict)


def test_what_is_not_finite_is_null_and_infinite_again():
    inf = float("inf")
    value = Outer((Inner(inf), Inner(1.5, "β")), (inf, 2), None, ((0.0, inf),), {"k": "v"})
    text = to_json(value)
    assert "Infinity" not in text
    assert to_plain(value)["parts"][0] == {"bound": None, "name": "a"}
    assert to_plain({"nan": float("nan"), 1: [np.float64(inf)]}) == {"nan": None, "1": [None]}
    assert from_json(Outer, text) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", '{"parts": []}', '{"parts": 1, "pair": [1, 2], "maybe": 1}',
        '{"parts": [], "pair": [1], "maybe": 1}', '{"parts": [], "pair": [1, 2.5], "maybe": 1}',
        '{"parts": [], "pair": [1, true], "maybe": 1}',
        '{"parts": [{"bound": "1"}], "pair": [1, 2], "maybe": 1}',
        '{"parts": [], "pair": [1, 2], "maybe": 1, "colour": 1}',
    ],
)  # fmt: skip
def test_text_that_is_no_record_is_refused(text):
    with pytest.raises(ValueError):
        from_json(Outer, text)
