"""Pooled weights: a convolution plus A⟨C, ·⟩, whose read-out has rank q."""

import dataclasses

import pytest
import torch

from lben import certify
from lben.weights import PooledWeights
from tests.lben.weights.kinds import images, pooled


def test_the_operator_is_a_convolution_and_a_matrix_of_rank_q():
    w = pooled()
    whole, state = w.dense(), w.state.dense(w.image)
    rest = whole.W - state.W
    torch.testing.assert_close(rest, w.A.flatten(1).T @ w.C.flatten(1))
    assert int(torch.linalg.matrix_rank(rest)) == len(w.b_y) == 3
    assert certify(whole).bound == certify(w).bound == w.gamma


def test_shapes_and_states_that_do_not_fit_are_named():
    w = pooled()
    for change, message in (
        ({"A": w.A[:, :1]}, "A and C must have shape"),
        ({"C": w.C[..., :2]}, "A and C must have shape"),
        ({"C": w.C.flatten(2)}, "C must have 4 dimensions"),
        ({"b_y": w.b_y[:2]}, r"b_y must have shape \(3,\)"),
        ({"gamma": -1.0}, "gamma must be a positive"),
        ({"A": w.A.numpy()}, "A must be a torch.Tensor"),
        ({"state": dataclasses.replace(w.state, gamma=1.0)}, "claims no bound"),
        ({"state": images(2, 3, 2)}, "has no outputs"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(w, **change)


def test_tensors_of_the_state_and_of_the_readout_have_one_namespace():
    w = pooled()
    assert set(w.tensors()) == {"W", "U", "b", "Lambda", "A", "C", "b_y"}
    changed = w.with_tensors({"U": 2 * w.state.U, "C": 3 * w.C})
    assert torch.equal(changed.state.U, 2 * w.state.U)
    assert torch.equal(changed.C, 3 * w.C)
    assert isinstance(changed, PooledWeights)
    assert changed.apply(torch.Tensor.float).state.C.dtype == torch.float32  # empty ones too


def test_the_only_images_that_fit_are_known():
    w = pooled((2, 3))
    assert w.image == w.state.placed.grid
    assert w.proved_size() == (w.image, False)
    assert pooled(circular=True, kernel_size=1).proved_size()[1]
