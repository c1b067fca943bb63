"""With LBEN_CHECK_ANNOTATIONS=1 a call that breaks an annotation fails."""

import os

import jaxtyping
import pytest
import torch

from lben.weights.sizes import integer
from solvers import DenseOperator, Outcome, Request

pytestmark = pytest.mark.skipif(
    "LBEN_CHECK_ANNOTATIONS" not in os.environ, reason="needs LBEN_CHECK_ANNOTATIONS=1"
)


def outcome(samples, steps):
    return Outcome(value=torch.zeros(samples, 3), residual=torch.zeros(2), steps=steps, checks=1)


def test_one_letter_is_one_size():
    assert outcome(2, torch.ones(2, dtype=torch.long)).checks == 1
    with pytest.raises(jaxtyping.TypeCheckError, match="Outcome"):
        outcome(5, torch.ones(2, dtype=torch.long))


def test_tensors_have_the_kind_of_numbers_that_is_said():
    with pytest.raises(jaxtyping.TypeCheckError, match="Outcome"):
        outcome(2, torch.ones(2))


def test_arguments_have_the_type_that_is_said():
    assert Request(tol=1, max_steps=3).tol == 1  # an int is a float
    with pytest.raises(jaxtyping.TypeCheckError, match="Request"):
        Request(tol="small", max_steps=3)
    with pytest.raises(jaxtyping.TypeCheckError, match="integer"):
        integer(3, 4)


def test_a_function_refuses_in_its_own_words():
    with pytest.raises(ValueError, match="W must be a square matrix"):
        DenseOperator(torch.zeros(2, 3))
