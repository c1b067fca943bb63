"""A proof around one input needs slopes that the activation has there."""

import math

import numpy as np
import pytest

from lben.certificates.local import LocalClaim, is_proved_locally
from lben.rigorous import Enclosure


def test_a_local_claim_needs_slopes_between_zero_and_one():
    one = np.ones(1)
    W, U = np.zeros((1, 1)), np.ones((1, 1))

    def holds(**values):
        claim = {"gamma": 1.1, "Lambda": one, "low": 0 * one, "high": one, **values}
        return is_proved_locally(W, U, Enclosure(U), Enclosure(W), LocalClaim(**claim))

    assert holds()
    for bad in ({"low": one, "high": 0 * one}, {"high": 2 * one}, {"low": -one},
                {"low": math.nan * one}, {"high": math.nan * one}, {"gamma": math.nan},
                {"gamma": math.inf}, {"gamma": -1.0}, {"Lambda": math.inf * one}):  # fmt: skip
        assert not holds(**bad)
    with pytest.raises(ValueError, match="must have shape"):
        holds(low=np.zeros(2))
