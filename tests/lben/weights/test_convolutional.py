"""Weights of convolutions agree with their matrices, and round within their bounds."""

import dataclasses

import pytest
import torch

from lben import CertificateError, certify
from lben.parameterizations.feedforward import UNIT_BOUND
from tests.lben.layers.families import CONVOLUTIONAL, IMAGE, perturb, sample
from tests.lben.weights.kinds import images, without_state


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
@pytest.mark.parametrize("circular", [False, True])
def test_matrices_of_a_convolution(kind, circular):
    layer = perturb(CONVOLUTIONAL[kind](dtype=torch.float64, circular=circular))
    w, x = layer.weights().dense(IMAGE), sample(layer, 3)
    flat = x.flatten(1)
    y = torch.relu(flat @ w.U.T + w.b) @ w.C.T + w.b_y
    y = y if w.D is None else y + flat @ w.D.T
    torch.testing.assert_close(y, layer(x).flatten(1))
    assert certify(w).bound == UNIT_BOUND


def test_weights_of_no_image_size_are_proved_and_not_evaluated():
    w = dataclasses.replace(images(2, 3, 2), geometry=None)
    assert certify(w, image=(4, 5)).bound == 1.0
    assert w.proved_size() is None
    for call in (
        lambda: certify(w),
        lambda: w.drive(torch.zeros(1, 2, 4, 5)),
        lambda: w.operator(),
    ):
        with pytest.raises(ValueError, match=r"image=\(height, width\)|are of no image size"):
            call()


def test_a_state_that_is_read_as_it_is_has_no_readout():
    w = images(2, 3)
    assert w.reads_state
    assert certify(w).bound == w.gamma
    for change in ({"C": 2 * w.C}, {"b_y": w.b_y + 1}):
        wrong = dataclasses.replace(w, **change)
        with pytest.raises(ValueError, match="C is not I or b_y is not 0"):
            certify(wrong)


def test_without_W_there_is_no_operator_to_solve():
    w = without_state()
    z = torch.randn(2, w.operator().n, dtype=torch.float64)
    assert not w.operator().mv(z).any()
    assert w.operator_tensors() == ()


def test_shapes_and_numbers_that_do_not_fit_are_named():
    w = images(2, 3, 2)
    for change, message in (
        ({"W": torch.zeros(3, 3, 2, 2).double()}, "the kernel W must have an odd size"),
        ({"b": w.b[:2]}, r"b must have shape \(3,\)"),
        ({"D": torch.zeros(2, 3, 3, 3).double()}, r"D must have shape \(2, 2, 3, 3\)"),
        ({"D": float("nan")}, "needs a finite number d"),
        ({"U": w.U.flatten(2)}, "U must have 4 dimensions"),
        ({"gamma": 0.0}, "gamma must be a positive"),
        ({"W": w.W.numpy()}, "W must be a torch.Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(w, **change)
    unequal = dataclasses.replace(w, C=w.C[:1], b_y=w.b_y[:1])
    with pytest.raises(ValueError, match="as many outputs as inputs, got 1 and 2"):
        dataclasses.replace(unequal, D=1.0)


def test_images_without_a_batch_are_told_what_to_add():
    w = images(2, 3, 2)
    with pytest.raises(ValueError, match=r"add a batch dimension, x\[None\]"):
        w.check_input(torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="merge the leading dimensions"):
        w.check_input(torch.zeros(3, 3, 2, 4, 5))


def test_a_state_that_is_read_is_part_of_who_the_weights_are():
    w = images(2, 3)
    halved = dataclasses.replace(w, C=w.C / 2, reads_state=False)  # half the output
    proof = certify(halved)
    with pytest.raises(CertificateError, match="other weights"):
        proof.check(dataclasses.replace(halved, reads_state=True))
