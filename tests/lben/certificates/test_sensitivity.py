"""Gains of errors hold for every pattern of slopes."""

import pytest

from lben import (
    EquilibriumLinear,
)
from lben.certificates import (
    CertificateError,
    sensitivity,
)


def test_gains_are_of_the_weights_of_the_proof():
    layer, other = (EquilibriumLinear(4, 5, 3) for _ in range(2))
    with pytest.raises(CertificateError, match="other weights"):
        sensitivity(layer.weights(), other.certificate())
