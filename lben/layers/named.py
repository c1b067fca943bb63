"""Which feed-forward layers have a name?

Each is a parameterization, a rule for its multiplier T, and a linear map: dense or convolutional.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch.nn.utils.parametrize import register_parametrization

from lben.layers.feedforward import ContractionLayer, ResidualLayer, SandwichLayer
from lben.parameterizations import (
    CayleyRows,
    ContractionParameterization,
    Gershgorin,
    MultiplierRule,
    Orthonormal,
    ResidualParameterization,
    SandwichParameterization,
    Spectral,
)
from lben.parameterizations.orthogonal import register_orthogonal
from lben.weights.linear_maps import Convolution, Dense
from lben.weights.sizes import real
from solvers import ProximalActivation


class _Factory(TypedDict):
    """Where parameters are made, and in which precision."""

    device: torch.device | str | None
    dtype: torch.dtype | None


class SLLLinear(ResidualLayer):
    """SDP-based Lipschitz layer y = x − 2UᵀT⁻¹σ(Ux + b), T by `Gershgorin`. Araujo et al. (2023).

    Args:
        features: p, inputs and outputs.
        hidden_features: n.
        squarings: of the Gershgorin rule; 0 is the published layer, more is tighter and costs more.
        activation: σ, slope-restricted to [0, 1]; ReLU when omitted.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> import torch
        >>> from lben import SLLLinear
        >>> layer = SLLLinear(4, 6)
        >>> layer(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
        >>> round(layer.certificate().bound, 4)
        1.0
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        squarings: int = 0,
        activation: ProximalActivation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = _factory(device, dtype)
        rule = Gershgorin(hidden_features, squarings=squarings, **factory)
        super().__init__(
            ResidualParameterization((hidden_features, features), rule, **factory),
            Dense(),
            activation,
        )


class CPLLinear(ResidualLayer):
    """Convex potential layer, T = τI with τ ≥ ‖U‖₂². Meunier et al. (2022).

    Args:
        features: p, inputs and outputs.
        hidden_features: n.
        squarings: of the bound of ‖U‖₂².
        activation: σ; ReLU when omitted.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> import torch
        >>> from lben import CPLLinear
        >>> layer = CPLLinear(4, 6)
        >>> layer(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
        >>> round(layer.certificate().bound, 4)
        1.0
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        squarings: int = 5,
        activation: ProximalActivation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = _factory(device, dtype)
        super().__init__(
            ResidualParameterization((hidden_features, features), Spectral(squarings), **factory),
            Dense(),
            activation,
        )


class AOLLinear(ContractionLayer):
    """Almost orthogonal linear map y = VT^(−½)x + b. Prach and Lampert (2022).

    Args:
        in_features: p.
        out_features: q.
        learn_q: train the q of Araujo et al. (2023), Theorem 2; False is the published AOL.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> import torch
        >>> from lben import AOLLinear
        >>> layer = AOLLinear(4, 3)
        >>> layer(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
        >>> round(layer.certificate().bound, 4)
        1.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        learn_q: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = _factory(device, dtype)
        rule = Gershgorin(in_features, learn_q=learn_q, **factory)
        super().__init__(_contraction((out_features, in_features), rule, factory), Dense())


class SpectralLinear(ContractionLayer):
    """Linear map divided by an upper bound of its spectral norm.

    Args:
        in_features: p.
        out_features: q.
        squarings: of the bound.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> import torch
        >>> from lben import SpectralLinear
        >>> layer = SpectralLinear(4, 3)
        >>> layer(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
        >>> round(layer.certificate().bound, 4)
        1.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        squarings: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = _factory(device, dtype)
        rule = Spectral(squarings)
        super().__init__(_contraction((out_features, in_features), rule, factory), Dense())


class OrthogonalLinear(ContractionLayer):
    """Linear map with orthonormal rows or columns, by torch's orthogonal parametrization.

    Args:
        in_features: p.
        out_features: q.
        orthogonal_map: "cayley", "matrix_exp" or "householder" (torch.nn.utils.parametrizations).
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive or the map unknown.

    Example:
        >>> import torch
        >>> from lben import OrthogonalLinear
        >>> layer = OrthogonalLinear(4, 3)
        >>> layer(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
        >>> round(layer.certificate().bound, 4)
        1.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        orthogonal_map: str = "cayley",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = _factory(device, dtype)
        parameterization = _contraction((out_features, in_features), Orthonormal(), factory)
        register_orthogonal(parameterization, "V", orthogonal_map)
        super().__init__(parameterization, Dense())


class SandwichLinear(SandwichLayer):
    """Sandwich layer (LBDN) with orthonormal [A B]. Wang and Manchester (2023).

    Args:
        in_features: p.
        out_features: q.
        hidden_features: n ≤ p + q; q when omitted.
        activation: σ; ReLU when omitted.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive, or n > p + q.

    Example:
        >>> import torch
        >>> from lben import SandwichLinear
        >>> layer = SandwichLinear(4, 3)
        >>> layer(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
        >>> round(layer.certificate().bound, 4)
        1.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_features: int | None = None,
        activation: ProximalActivation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = _factory(device, dtype)
        n = out_features if hidden_features is None else hidden_features
        parameterization = SandwichParameterization(
            (n, out_features + in_features), out_features, Orthonormal(), **factory
        )
        if n > out_features + in_features:
            raise ValueError(
                f"at most {out_features + in_features} hidden features can be orthonormal, got {n}"
            )
        register_parametrization(parameterization, "AB", CayleyRows())
        super().__init__(parameterization, Dense(), activation)


class SLLConv2d(ResidualLayer):
    """Convolutional SLL: y = x − 2UᵀT⁻¹σ(U∗x + b), T by `Gershgorin`. Araujo et al. (2023).

    Args:
        channels: p, in and out.
        hidden_channels: n.
        kernel_size: k.
        padding: pixels of zeros; k // 2 when omitted.
        circular: the image is a torus instead.
        squarings: of the Gershgorin rule; 0 is the published layer.
        activation: σ; ReLU when omitted.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: for sizes that are not positive, or a padding that does not fit.

    Example:
        >>> import torch
        >>> from lben import SLLConv2d
        >>> layer = SLLConv2d(3, 5)
        >>> layer(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
        >>> round(layer.certificate((8, 8)).bound, 4)
        1.0
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        *,
        padding: int | None = None,
        circular: bool = False,
        squarings: int = 0,
        activation: ProximalActivation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = _factory(device, dtype)
        rule = Gershgorin(hidden_channels, squarings=squarings, **factory)
        shape = (hidden_channels, channels, kernel_size, kernel_size)
        super().__init__(
            ResidualParameterization(shape, rule, **factory),
            _convolution(kernel_size, padding, circular),
            activation,
        )


class CPLConv2d(ResidualLayer):
    """Convolutional convex potential layer, T = τI with τ ≥ ‖U‖₂². Meunier et al. (2022).

    Args: as `SLLConv2d`; squarings are those of the bound of ‖U‖₂².

    Example:
        >>> import torch
        >>> from lben import CPLConv2d
        >>> layer = CPLConv2d(3, 5)
        >>> layer(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
        >>> round(layer.certificate((8, 8)).bound, 4)
        1.0
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        *,
        padding: int | None = None,
        circular: bool = False,
        squarings: int = 3,
        activation: ProximalActivation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = _factory(device, dtype)
        shape = (hidden_channels, channels, kernel_size, kernel_size)
        super().__init__(
            ResidualParameterization(shape, Spectral(squarings), **factory),
            _convolution(kernel_size, padding, circular),
            activation,
        )


class AOLConv2d(ContractionLayer):
    """Almost orthogonal convolution. Prach and Lampert (2022).

    A stride leaves out rows of the map, which cannot raise its norm.

    Args:
        in_channels: p.
        out_channels: q.
        kernel_size: k.
        padding: pixels of zeros; k // 2 when omitted.
        circular: the image is a torus instead.
        stride: of the output, with zero padding.
        learn_q: train q; False is the published AOL.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: for sizes that are not positive, or stride or padding that do not fit.

    Example:
        >>> import torch
        >>> from lben import AOLConv2d
        >>> layer = AOLConv2d(3, 4, stride=2)
        >>> layer(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4, 4, 4])
        >>> round(layer.certificate((8, 8)).bound, 4)
        1.0
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        padding: int | None = None,
        circular: bool = False,
        stride: int = 1,
        learn_q: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = _factory(device, dtype)
        rule = Gershgorin(in_channels, learn_q=learn_q, **factory)
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        super().__init__(
            _contraction(shape, rule, factory), _convolution(kernel_size, padding, circular, stride)
        )


class SpectralConv2d(ContractionLayer):
    """Convolution divided by an upper bound of its spectral norm.

    Args: as `AOLConv2d`, with the squarings of the bound in place of q.

    Example:
        >>> import torch
        >>> from lben import SpectralConv2d
        >>> layer = SpectralConv2d(3, 4)
        >>> layer(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
        >>> round(layer.certificate((8, 8)).bound, 4)
        1.0
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        padding: int | None = None,
        circular: bool = False,
        stride: int = 1,
        squarings: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = _factory(device, dtype)
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        super().__init__(
            _contraction(shape, Spectral(squarings), factory),
            _convolution(kernel_size, padding, circular, stride),
        )


class SandwichConv2d(SandwichLayer):
    """Convolutional sandwich layer with T by `Gershgorin` in place of an orthogonal convolution.

    Args:
        in_channels: p.
        out_channels: q.
        kernel_size: k.
        hidden_channels: n; q when omitted.
        padding: pixels of zeros; k // 2 when omitted.
        circular: the image is a torus instead.
        squarings: of the Gershgorin rule.
        activation: σ; ReLU when omitted.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: for sizes that are not positive, or a padding that does not fit.

    Example:
        >>> import torch
        >>> from lben import SandwichConv2d
        >>> layer = SandwichConv2d(3, 4)
        >>> layer(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
        >>> round(layer.certificate((8, 8)).bound, 4)
        1.0
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        hidden_channels: int | None = None,
        padding: int | None = None,
        circular: bool = False,
        squarings: int = 0,
        activation: ProximalActivation | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = _factory(device, dtype)
        n = out_channels if hidden_channels is None else hidden_channels
        shape = (n, out_channels + in_channels, kernel_size, kernel_size)
        rule = Gershgorin(n, squarings=squarings, **factory)
        super().__init__(
            SandwichParameterization(shape, out_channels, rule, **factory),
            _convolution(kernel_size, padding, circular),
            activation,
        )


def _factory(device: torch.device | str | None, dtype: torch.dtype | None) -> _Factory:
    return {"device": device, "dtype": real(dtype)}


def _convolution(
    kernel_size: int, padding: int | None, circular: bool, stride: int = 1
) -> Convolution:
    return Convolution(
        kernel_size=kernel_size,
        padding=kernel_size // 2 if padding is None else padding,
        circular=circular,
        stride=stride,
    )


def _contraction(
    shape: tuple[int, ...], rule: MultiplierRule, factory: _Factory
) -> ContractionParameterization:
    return ContractionParameterization(shape, rule, **factory)
