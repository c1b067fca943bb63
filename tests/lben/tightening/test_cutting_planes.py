"""Constraints that bind lower a bound, others leave it; offsets cost what they say."""

import math

import pytest
import torch

from lben.tightening.cutting_planes import Constraints, tighten_with_cutting_planes
from lben.tightening.layer_program import LayerProgram


def numbers(values):
    return torch.tensor(values, dtype=torch.float64)


def program():
    """y = −σ(x₁) + σ(x₂): it falls by at most √2 within the unit ball."""
    eye = torch.eye(2, dtype=torch.float64)[None]
    return LayerProgram(W=0 * eye, U=eye, C=numbers([[[-1.0, 1.0]]]), D=numbers([[[0.0, 0.0]]]))


def with_box_slack(fall, rise):
    none = torch.zeros(1, 0, 2, dtype=torch.float64)
    return Constraints(
        input_rows=none, unit_rows=none, offsets=none[:, :, 0], box_slack=numbers([[fall, rise]])
    )


def tighten(constraints, target=0.1):
    return tighten_with_cutting_planes(
        program(), constraints, numbers([[1.0, 1.0]]), numbers([target]), gap=1e-4
    )


FREE = math.inf


def test_inputs_that_may_go_anywhere_have_the_bound_without_constraints():
    found = tighten(with_box_slack([FREE, FREE], [FREE, FREE]))
    assert 2**0.5 <= float(found.bound) <= 1.05 * 2**0.5
    assert not bool(found.weights.any())


def test_only_inputs_that_cannot_move_the_output_down_lower_its_bound():
    """y falls where x₁ rises and where x₂ falls.

    If x₁ cannot rise, then y less w(−x₁) falls no slower: slopes in [−½, ½] at the best w = ½.
    """
    found = tighten(with_box_slack([FREE, FREE], [0.0, FREE]), target=1.12)
    assert 1.25**0.5 <= float(found.bound) <= 1.01 * 1.25**0.5
    assert found.weights[0].tolist() == pytest.approx([0, 0, 0.5, 0], abs=0.02)
    both = tighten(with_box_slack([FREE, 0.0], [0.0, FREE]), target=0.72)
    assert 0.5**0.5 <= float(both.bound) <= 0.72
    other = tighten(with_box_slack([0.0, FREE], [FREE, 0.0]))
    assert float(other.bound) >= 2**0.5


def test_an_offset_is_paid_for():
    """x₁ rises by at most 0.5 in place of 1/√2: y falls by at most 0.5 + √0.75."""
    found = tighten(with_box_slack([FREE, FREE], [0.5, FREE]))
    assert 0.5 + 0.75**0.5 <= float(found.bound) < 2**0.5 - 1e-3


def test_a_target_is_where_a_program_ends():
    found = tighten(with_box_slack([FREE, 0.0], [0.0, FREE]), target=1.5)
    assert 0.5 < float(found.bound) <= 1.5


def test_violations_are_those_of_the_increment():
    constraints = Constraints(
        input_rows=numbers([[[0.0, 0.0]]]), unit_rows=numbers([[[1.0, 0.0]]]),
        offsets=numbers([[0.5]]), box_slack=numbers([[[0.1, 9.0], [9.0, 9.0]]]),
    )  # fmt: skip
    units, inputs = constraints.measure_violations(numbers([[-0.6, 0.3]]), numbers([[-2.0, 5.0]]))[
        0
    ].tolist()
    assert units == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert inputs == [0.0, 1.0, 0.0, 0.0, 0.0]
    rows, offsets = constraints.combine(numbers([[[2.0, 0.0, 0.0, 3.0, 0.0]]]))
    assert rows[0, 0].tolist() == [-3.0, 0.0, 2.0, 0.0]
    assert float(offsets) == pytest.approx(2 * 0.5 + 3 * 9.0)
