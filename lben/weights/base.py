"""What do the weights of every kind of layer have in common?

A layer is z = σ(Wz + Ux + b), y = Cz + Dx + b_y. A class of weights decides how W, U, C and D are
stored. It provides products with them, bounds of the rounding of these products, and a fingerprint.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import hashlib
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from solvers import LinearOperator, ProximalActivation
from solvers.dependencies import Sendable
from solvers.precision import cast


class Rounding(NamedTuple):
    """Bounds of the rounding errors of v = Ux + b and of y, evaluated in float64.

    Attributes:
        drive: bound of the error of v in the Λ norm, per sample.
        output: bound of the error of y in l2 for a given z, per sample.

    Example:
        >>> import torch
        >>> from lben import EquilibriumLinear
        >>> weights = EquilibriumLinear(4, 6, 2, dtype=torch.float64).weights()
        >>> x, z = torch.ones(3, 4).double(), torch.ones(3, 6).double()
        >>> rounding = weights.rounding(x, z)
        >>> rounding.drive.shape, bool((rounding.output < 1e-12).all())
        (torch.Size([3]), True)
    """

    drive: Float[Tensor, " batch"]
    output: Float[Tensor, " batch"]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How norms and rounding errors grow with the input and the state; states are in the Λ norm.

    Attributes:
        drive: ‖v‖ per ‖x‖₂.
        drive_rounding: the rounding of v per ‖x‖₂.
        readout: the rounding of Cz per ‖z‖.
        through: the rounding of Dx per ‖x‖₂.

    Example:
        >>> import torch
        >>> from lben import EquilibriumLinear
        >>> weights = EquilibriumLinear(4, 6, 2, dtype=torch.float64).weights()
        >>> weights.rates(2.0**-53).drive_rounding < 1e-12
        True
    """

    drive: float
    drive_rounding: float
    readout: float
    through: float = 0.0


class Weights(Sendable, ABC):
    """The weights of one layer, without a trace of how they were parameterized.

    Subclasses are frozen dataclasses of tensors. Nothing here is proved: `gamma` is a claim, and
    `lben.certify` proves it from the tensors alone.

    Attributes:
        gamma: γ, the l2 Lipschitz bound of x ↦ y that is claimed; None for no claim.
        b_y: the bias of y.

    Example:
        >>> import torch
        >>> from lben import EquilibriumLinear
        >>> weights = EquilibriumLinear(4, 6, 2).weights()
        >>> x = torch.ones(3, 4)
        >>> v = weights.drive(x)
        >>> weights.readout(x, torch.relu(v)).shape
        torch.Size([3, 2])
    """

    gamma: float | None
    b_y: Tensor
    entry: ClassVar[str]
    """What one number of x is called."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one x."""

    @property
    @abstractmethod
    def multiplier(self) -> Float[Tensor, " n"]:
        """Λ, one positive number per unit or channel."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name; absent ones are left out."""

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return the weights with these tensors in place of those of the same names."""

    @abstractmethod
    def operator(self) -> LinearOperator:
        """Return W as an operator on states, cut from the graph."""

    @abstractmethod
    def operator_tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that define W, with their graph: see `LinearOperator.tensors`."""

    @abstractmethod
    def drive(self, x: Tensor) -> Float[Tensor, "*batch n"]:
        """Return v = Ux + b."""

    @abstractmethod
    def readout(self, x: Tensor, z: Float[Tensor, "*batch n"]) -> Tensor:
        """Return y = Cz + Dx + b_y."""

    @abstractmethod
    def rounding(self, x: Tensor, z: Float[Tensor, "*batch n"]) -> Rounding:
        """Bound the rounding of `drive` and `readout` in float64."""

    @abstractmethod
    def rates(self, unit: float) -> Rates:
        """Return how norms and rounding errors grow if products run with a given unit roundoff.

        Args:
            unit: unit roundoff of the dtype that runs; the weights themselves are float64.
        """

    @abstractmethod
    def largest(self) -> float:
        """Return an upper bound of the sum of the largest entries of U, C and D."""

    @abstractmethod
    def check_input(self, x: Tensor) -> None:
        """Refuse inputs of another shape.

        Raises:
            ValueError: naming the shape that is expected.
        """

    @abstractmethod
    def header(self) -> str:
        """Return, as text, the settings that the fingerprint covers besides the tensors."""

    def proved_size(self) -> tuple[tuple[int, int], bool] | None:
        """Return the image size that a proof has to cover, and whether it must match exactly.

        Weights without an image size return None.
        """
        return None

    def restrict(self, activation: ProximalActivation) -> ProximalActivation:
        """Return σ as it acts on states: it keeps units that only pad the state at 0."""
        return activation

    def check_values(self) -> None:
        """Refuse tensors that contradict the other attributes of the weights.

        Raises:
            ValueError: naming the contradiction.
        """
        return

    def check_sums(self) -> None:
        """Refuse devices whose order or algorithm of summation has no rounding bound.

        Raises:
            ValueError: naming the library and the cure.
        """
        return

    def apply(self, transform: Callable[[Tensor], Tensor]) -> Self:
        """Return the weights with every tensor transformed."""
        return self.with_tensors({name: transform(t) for name, t in self.tensors().items()})

    def to(self, dtype: torch.dtype) -> Self:
        """Return the weights in another precision, cut from the graph, on the CPU."""
        return self.apply(lambda t: convert(t, dtype))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, shapes, dtypes, bits and gamma; a certificate is tied to it.

        0.0 and −0.0 count as two numbers. Device, memory layout and requires_grad do not count.
        """
        return digest(self.header(), self.tensors())


def digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a header and of names, shapes, dtypes and bits of tensors.

    Args:
        header: text.
        tensors: by name.

    Returns:
        The digest in hexadecimal digits.

    Example:
        >>> import torch
        >>> digest("γ", {"W": torch.zeros(2)})[:12]
        '572a66e2576c'
    """
    result = hashlib.sha256(header.encode())
    for name, value in sorted(tensors.items()):
        array = value.detach().cpu().resolve_neg().contiguous()
        result.update(f"{name}:{array.dtype}:{tuple(array.shape)};".encode())
        result.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def convert(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another precision, cut from the graph, on the CPU.

    A conversion to float64 is exact, even if the process reads denormal numbers as zero: a denormal
    float32 is an integer times 2⁻¹⁴⁹, and is converted as such.

    Args:
        t: a tensor on any device.
        dtype: of the result.

    Returns:
        A tensor of the same shape on the CPU.

    Example:
        >>> import torch
        >>> convert(torch.tensor([0.5], dtype=torch.bfloat16), torch.float64)
        tensor([0.5000], dtype=torch.float64)
    """
    t = t.detach().to("cpu")
    # bfloat16 and float16 to float32: a matter of bits.
    narrow = t.dtype not in (torch.float32, torch.float64)
    return cast(t.to(torch.float32) if dtype == torch.float64 and narrow else t, dtype)


def check_tensors(values: Mapping[str, object]) -> None:
    """Raise ValueError unless every value is None or a tensor.

    Args:
        values: by name, for the message.

    Example:
        >>> import torch
        >>> check_tensors({"W": torch.zeros(2, 2), "D": None})
    """
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(
                f"{name} must be a torch.Tensor, got {type(value).__name__}: take "
                "torch.as_tensor(...) of it"
            )


def check_dimensions(name: str, value: Tensor, count: int) -> None:
    """Raise ValueError unless a tensor has this number of dimensions.

    Args:
        name: of the tensor, for the message.
        value: the tensor.
        count: number of dimensions.

    Example:
        >>> import torch
        >>> check_dimensions("W", torch.zeros(2, 2), 2)
    """
    if value.ndim != count:
        raise ValueError(f"{name} must have {count} dimensions, got shape {tuple(value.shape)}")


def check_gamma(gamma: object) -> float | None:
    """Return gamma as a float, or None for None.

    Args:
        gamma: a number, or None for no claim.

    Raises:
        ValueError: unless gamma is None or a positive, finite real number.

    Example:
        >>> check_gamma(2), check_gamma(None)
        (2.0, None)
    """
    number = None if gamma is None else as_number(gamma)
    if gamma is not None and (number is None or not 0 < number < math.inf):
        raise ValueError(
            "gamma must be a positive, finite Lipschitz bound (or None for no bound), "
            f"got {gamma!r}"
        )
    return number


def check_epsilon(epsilon: object) -> float:
    """Return epsilon as a float.

    Args:
        epsilon: a number.

    Raises:
        ValueError: unless it is a positive, finite real number.

    Example:
        >>> check_epsilon(1)
        1.0
    """
    number = as_number(epsilon)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon!r}")
    return number


def as_number(value: object) -> float | None:
    """Return a real number of Python, NumPy or torch as a float; None for all else, and bool.

    Args:
        value: of any type.

    Example:
        >>> import torch
        >>> as_number(torch.tensor(2)), as_number("2"), as_number(True)
        (2.0, None, None)
    """
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return None
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
