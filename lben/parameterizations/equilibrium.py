"""What is a parameterization of an equilibrium layer? Free tensors to weights, at every call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import nn

from lben.weights import Weights

W_ = TypeVar("W_", bound=Weights)


class EquilibriumParameterization(nn.Module, ABC, Generic[W_]):
    """A module whose call returns weights, differentiable in its parameters.

    Attributes:
        gamma: γ, the l2 Lipschitz bound that holds by construction; None for no bound.

    Example:
        >>> from lben.parameterizations import DirectParameterization
        >>> isinstance(DirectParameterization(4, 6, 2), EquilibriumParameterization)
        True
    """

    gamma: float | None

    @abstractmethod
    def forward(self) -> W_:
        """Return the weights."""
