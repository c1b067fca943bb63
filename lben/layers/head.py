"""How do features become logits, and how far can two logits move apart?

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import copy
import math
from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lben import precision
from lben.certificates import LayerCertificate, LipschitzCertificate, PairCertificate, certify
from lben.layers.bounded import RoundedModule, require_kind
from lben.layers.graphs import Owner, check_kind, graph_is_made
from lben.layers.lasting import Lasting, make_lasting
from lben.layers.roundoff import Signal
from lben.parameterizations.feedforward import read_weight
from lben.parameterizations.orthogonal import register_orthogonal
from lben.parameterizations.parametrized import PicklableParametrized
from lben.rigorous import Enclosure, norm_bound, sum_up, up
from lben.weights import DenseWeights
from lben.weights.growth import Growth, absolute_norm, norm_up
from lben.weights.sizes import integer, real
from solvers.precision import cast, in_autocast, leave_autocast, use_full_precision


class NormalizedLinear(RoundedModule, Lasting, PicklableParametrized, Owner):
    """y = Qx + b with rows qᵢ of norm 1, either scaled one by one or orthonormal.

    A change Δx of x changes yᵢ − yⱼ by (qᵢ − qⱼ)ᵀΔx. So `pair_certificate` bounds ‖qᵢ − qⱼ‖₂ for
    the
    weights as stored: at most 2 for normalised rows, √2 for orthonormal rows. Singla, Singla and
    Feizi (2022); the margin rule of Araujo et al. (2023).

    Args:
        in_features: p.
        out_features: q, classes.
        kind: "rows" or "orthonormal".
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive, or orthonormal rows do not fit into p features.

    Example:
        >>> import torch
        >>> from lben import NormalizedLinear
        >>> head = NormalizedLinear(4, 3, kind="orthonormal")
        >>> head(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
        >>> round(head.pair_certificate()[0][1], 4)  # √2
        1.4142
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kind: Literal["rows", "orthonormal"] = "rows",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = integer("in_features", in_features, least=None)
        out_features = integer("out_features", out_features, least=None)
        if min(in_features, out_features) < 1:
            raise ValueError(f"sizes must be at least 1, got {in_features} and {out_features}")
        if kind not in ("rows", "orthonormal"):
            raise ValueError(f"kind must be rows or orthonormal, got {kind!r}")
        if kind == "orthonormal" and out_features > in_features:
            raise ValueError(
                f"{out_features} orthonormal rows do not fit into {in_features} features"
            )
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        linear = nn.Linear(in_features, out_features, device=device, dtype=real(dtype))
        self.bias, self.weight = linear.bias, linear.weight
        if kind == "orthonormal":
            register_orthogonal(self, "weight", "cayley")
        make_lasting(self)
        self.enter()

    def matrix(self) -> Float[Tensor, "q p"]:
        """Return Q, in the precision of the parameters also under autocast."""
        weight = read_weight(self, "weight")
        with use_full_precision(self.bias):
            return functional.normalize(weight, dim=1) if self.kind == "rows" else weight

    def forward(self, x: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch q"]:
        """Return logits, in the precision of the parameters also under autocast."""
        check_kind(x)
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected {self.in_features} features in the last dimension of x, "
                f"got {tuple(x.shape)}"
            )
        own = self.bias.dtype
        if own not in (torch.float32, torch.float64):
            raise ValueError(f"parameters must be float32 or float64, got {own}")
        if x.device != self.bias.device:
            raise ValueError(f"x is on {x.device}, the layer on {self.bias.device}")
        converts = in_autocast(x.device.type) and x.is_floating_point()
        if x.dtype != own and not converts:
            raise ValueError(f"x is {x.dtype}, the layer is {own}: convert one of them")
        with leave_autocast(x.device.type):
            if graph_is_made():
                return functional.linear(x.to(own), *self.in_graph(own))
            with use_full_precision(self.bias):
                return functional.linear(x.to(own), self.matrix(), self.bias)

    def source(self) -> nn.Module:
        """Return the module that makes Q and b."""
        return _Running(self)

    def allocate(self, like: Tensor) -> list[Tensor]:
        """Return empty tensors with the shapes of Q and b."""
        q, p = self.out_features, self.in_features
        return [like.new_empty(q, p), like.new_empty(q)]

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        # torch's own __deepcopy__ of parametrized modules does not call __setstate__.
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        copied.enter()
        return copied

    @torch.no_grad()
    def pair_certificate(self) -> PairCertificate:
        """Prove bounds of ‖qᵢ − qⱼ‖₂ for every pair of logits, rounded upwards."""
        Q = Enclosure(self._read_matrix().cpu().numpy())
        bounds = [[1.0] * self.out_features for _ in range(self.out_features)]
        for i in range(self.out_features):
            row = Enclosure(Q.mid[i : i + 1])
            gap = (Q - row).magnitude
            squares = sum_up(gap * gap * (1 + 2.0**-51), axis=1)
            for j, square in enumerate(squares):
                if i != j:
                    # Squares below 2⁻¹⁰²² may have vanished, p of them at most.
                    bounds[i][j] = up(math.sqrt(float(square) + self.in_features * 2.0**-1022), 2)
        method = "norms of the differences of rows, with rounding enclosed"
        return PairCertificate.of(self.weights(), bounds, "l2", method, None)

    @torch.no_grad()
    def _read_matrix(self) -> Tensor:
        """Return Q as it runs, in float64, or refuse to claim anything of it."""
        precision.refuse_autocast()
        if self.bias.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"parameters must be float32 or float64, got {self.bias.dtype}")
        with use_full_precision(self.bias):
            Q = cast(self.matrix(), torch.float64)
        if not bool(Q.isfinite().all() and self.bias.isfinite().all()):
            raise ValueError("the weights contain NaN or Inf: did training diverge?")
        return Q

    def weights(self) -> DenseWeights:
        """Return the float64 weights, with a bound of ‖Q‖₂ as claim.

        Raises:
            ValueError: for weights that are not finite or in half precision; under autocast.
        """
        with torch.no_grad():
            Q = self._read_matrix()
            claim = norm_bound(Enclosure(Q.cpu().numpy())) * (1 + 1e-9)
            b = cast(self.bias, torch.float64)
            return DenseWeights.affine(Q, b, max(claim, 2.0**-500))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one x."""
        return (self.in_features,)

    def certificate(self, image: tuple[int, ...] | None = None) -> LayerCertificate:
        """Prove a bound of ‖Q‖₂.

        Args:
            image: not read: features have no image size.

        Returns:
            The proved l2 bound.
        """
        return certify(self.weights())

    def check(self, certificate: LipschitzCertificate, x: Tensor) -> None:
        """Refuse a certificate of other weights.

        Raises:
            CertificateError: if the fingerprint differs.
        """
        require_kind(certificate, LayerCertificate, "a head").check(self.weights())

    @torch.no_grad()
    def rounding_growth(self, shape: tuple[int, ...], dtype: torch.dtype) -> Growth:
        """Return a bound of ‖fl(y) − y‖₂, affine in ‖x‖₂; y is the exact output of `weights()`.

        Args:
            shape: of one sample, (p,).
            dtype: in which the layer runs.

        Returns:
            The bound as a function of ‖x‖₂.

        Raises:
            ValueError: if the shape or dtype does not fit; under autocast.
        """
        precision.refuse_autocast()
        own = self.bias.dtype
        if dtype != own or tuple(shape) != (self.in_features,):
            raise ValueError(
                f"expected samples of shape ({self.in_features},) in {own}, got {tuple(shape)} in "
                f"{dtype}"
            )
        x = Signal.input(own).linear(
            absolute_norm(self.matrix()), terms=self.in_features, inputs=self.in_features,
            ones=self.out_features**0.5, bias=norm_up(self.bias),
        )  # fmt: skip
        return x.below()

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return f"{self.in_features}, {self.out_features}, kind={self.kind!r}"


class _Running(nn.Module):
    """A head as a map from the compute dtype to the tensors that run: Q and b."""

    def __init__(self, head: NormalizedLinear) -> None:
        super().__init__()
        self.head = head

    def forward(self, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.head.matrix(), self.head.bias
