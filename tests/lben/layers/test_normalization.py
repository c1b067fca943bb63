"""The bound of a normalisation is that of the std that runs."""

import math
from fractions import Fraction

import pytest
import torch

from lben import (
    CertificateError,
    EquilibriumClassifierConfig,
    Normalize,
    compose,
)


def test_normalization_and_its_gain():
    normalize = Normalize((0.5, 0.25), (0.5, 0.2))
    x = torch.rand(3, 2, 4, 4)
    torch.testing.assert_close(normalize(x)[:, 1], (x[:, 1] - 0.25) / 0.2)
    assert Fraction(normalize.gain) * Fraction(float(normalize.std[1])) >= 1
    assert normalize.gain == pytest.approx(5.0, rel=1e-7)
    assert normalize.state_dict() == {}


def test_rounding_of_the_normalization_is_covered():
    normalize = Normalize((0.1307,), (0.3081,)).double()
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    single = normalize.float()
    low = x.float()
    exact = (low.double() - single.mean.double()) / single.std.double()
    error = (single(low).double() - exact).flatten(1).norm(dim=1)
    assert (error <= single.rounding(low)).all()
    assert (single.rounding(low) <= 50 * error).all()


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.0,)), ((0.5,), (1.0, 1.0)), ((0,), (-1,))])
def test_bad_normalizations(mean, std):
    with pytest.raises(ValueError, match="one positive std per channel"):
        Normalize(mean, std)


@pytest.mark.parametrize("wrong", [
    -0.3, 0.0, math.nan, math.inf, 1e-42, torch.tensor(0.3, dtype=torch.complex64), torch.tensor(1),
])  # fmt: skip
def test_a_std_that_was_changed_to_no_positive_number_proves_nothing(wrong):
    config = EquilibriumClassifierConfig(
        shape=(2, 4, 4), classes=3, mean=(0.5,) * 2, std=(0.3,) * 2
    )
    model, x = config.build(), torch.rand(2, 2, 4, 4)
    by_hand = compose(model.certificate().layers)
    if isinstance(wrong, torch.Tensor):
        model.normalize.std = wrong.expand(2, 1, 1).clone()
    else:
        model.normalize.std.data[0] = wrong
    for claim in (
        lambda: model.normalize.gain,
        lambda: model.normalize.rounding_growth((2, 4, 4), torch.float32),
        model.certificate,
        lambda: model.certified_radius(x, torch.tensor([0, 1]), by_hand),
    ):
        with pytest.raises(CertificateError, match="std of a normalisation must be real, finite"):
            claim()


def test_images_in_float32_are_widened_for_a_model_in_float64():
    x, layer = torch.rand(2, 4, 4, 4), Normalize((0.5,) * 4, (0.3,) * 4).double()
    torch.testing.assert_close(layer(x), layer(x.double()), rtol=0, atol=0)


@pytest.mark.parametrize("std", [1e-50, 1e300])
def test_a_std_that_cannot_be_stored_is_refused(std):
    with pytest.raises(ValueError, match="mean and std must be numbers of"):
        Normalize((0.0,), (std,))
