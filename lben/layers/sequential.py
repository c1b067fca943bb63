"""What is the bound of a chain of layers, and of the error that floating point adds to it?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lben import precision
from lben.certificates import Certificate, compose
from lben.layers.equilibrium import EquilibriumLayer
from lben.layers.equilibrium_dense import DenseEquilibriumLayer
from lben.layers.feedforward import FeedforwardLayer
from lben.layers.fixed import FixedImageMap, FixedMap, Flatten
from lben.layers.growth import Growth, add_up, norm_up, norms_up
from lben.layers.head import NormalizedLinear
from lben.layers.hooks import refuse_hooks
from lben.radii.error_bounds import Affine, Certified, Stage


class LipschitzSequential(nn.Sequential):
    """torch.nn.Sequential of layers and heads with proved bounds and of 1-Lipschitz fixed_maps.

    Chains nest. A sample has as many dimensions as the first layer takes, behind any number of
    batch dimensions; where a chain starts with `Flatten` the first dimension is the batch's.

    Raises:
        ValueError: if a module has no bound.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._check()

    def _check(self) -> None:
        known = FeedforwardLayer | FixedMap | EquilibriumLayer | NormalizedLinear
        for layer in self:
            if isinstance(layer, LipschitzSequential):
                layer._check()
            elif not isinstance(layer, known):
                raise ValueError(
                    f"{type(layer).__name__} has no proved Lipschitz bound: use the layers, "
                    "fixed_maps, heads and chains of lben.layers"
                )

    @property
    def dims(self) -> int | None:
        """Dimensions of one sample; None where no layer says."""
        for layer in self:
            if isinstance(layer, Flatten):
                return None
            found = _dims(layer)
            if found is not None:
                return found
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Return y, of every sample."""
        x, batch = self._flat(x)
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y if batch is None else y.reshape(*batch, *y.shape[1:])

    def _flat(self, x: Tensor) -> tuple[Tensor, torch.Size | None]:
        """Return x with one batch dimension, and its batch dimensions if they were others."""
        dims = self.dims
        if dims is None or x.ndim < dims or x.ndim == dims + 1:
            return x, None
        batch = x.shape[: x.ndim - dims]
        return x.reshape(math.prod(batch), *x.shape[x.ndim - dims :]), batch

    def certificates(self, shape: tuple[int, ...]) -> list[Certificate]:
        """Prove every layer that is not a fixed map, first to last, those of inner chains in turn.

        Args:
            shape: of one sample: (p,), or (channels, height, width).

        Raises:
            ValueError: if a module has no bound; under autocast.
            CertificateError: if a proof fails.
        """
        precision.refuse_autocast()
        self._check()
        x = torch.zeros(1, *shape, device="cpu")
        x = x.to(next(self.parameters(), x))
        proofs: list[Certificate] = []
        with torch.no_grad():
            for layer in self:
                if isinstance(layer, FeedforwardLayer):
                    image = (x.shape[2], x.shape[3]) if x.ndim == 4 else None
                    proofs.append(layer.certificate(image))
                elif isinstance(layer, EquilibriumLayer | NormalizedLinear):
                    proofs.append(layer.certificate())
                elif isinstance(layer, LipschitzSequential):
                    proofs.extend(layer.certificates(tuple(x.shape[1:])))
                x = layer(x)
        return proofs

    @torch.no_grad()
    def certified(
        self, x: Tensor, proofs: Sequence[Certificate], stage: Stage | None = None
    ) -> tuple[Tensor, Stage]:
        """Return y as the chain runs, and what is known of its distance to the exact y.

        The exact y is that of `weights()` of every layer, with exact equilibria and no rounding.
        What a layer adds is multiplied by the bounds of those after it.

        Args:
            x: float32 or float64, with one batch dimension.
            proofs: of `certificates`, for these weights and images of this size.
            stage: what is known of x; that it is exact when omitted.

        Raises:
            CertificateError: if a proof is for other weights or images.
            ValueError: if there are more or fewer proofs than layers; under autocast.
        """
        precision.refuse_autocast()
        self._check()
        refuse_hooks(self)
        stage = Stage.start(x) if stage is None else stage
        for layer, own_proofs in self._with_proofs(proofs):
            if isinstance(layer, LipschitzSequential):
                x, stage = layer.certified(x, own_proofs, stage)
            else:
                found = certified(layer, x, own_proofs)
                x, stage = found.value, stage.then(found, compose(own_proofs).bound)
        return x, stage

    def with_error(self, x: Tensor, proofs: Sequence[Certificate]) -> tuple[Tensor, Tensor, int]:
        """Return y, a bound of its l2 distance to the exact y, and the most solver steps.

        As `certified`, for any number of batch dimensions.
        """
        x, batch = self._flat(x)
        y, stage = self.certified(x, proofs)
        if batch is None:
            return y, stage.error, stage.steps
        return y.reshape(*batch, *y.shape[1:]), stage.error.reshape(batch), stage.steps

    @torch.no_grad()
    def rounding_growth(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        proofs: Sequence[Certificate] | None = None,
    ) -> Growth:
        """Bound ‖fl(y) − y‖₂ affinely in ‖x‖₂.

        Args:
            shape: of one sample.
            dtype: in which the chain runs.
            proofs: of `certificates`; made when omitted.

        Raises:
            CertificateError: if a proof fails or is for other weights or images.
            ValueError: if there is an equilibrium layer in the chain, whose error is that of its
                solve: `with_error` has it; or as `certificates`.
        """
        precision.refuse_autocast()
        proofs = self.certificates(shape) if proofs is None else proofs
        x = torch.zeros(1, *shape, dtype=dtype, device="cpu")
        x = x.to(next(self.parameters(), x).device)
        size, error = Growth(0.0, 1.0), Growth(0.0, 0.0)
        for layer, own_proofs in self._with_proofs(proofs):
            if isinstance(layer, EquilibriumLayer):
                raise ValueError(
                    "the error of an equilibrium layer is that of its solve, and no function of "
                    "the input's size: use with_error"
                )
            if isinstance(layer, LipschitzSequential):
                own = layer.rounding_growth(tuple(x.shape[1:]), dtype, own_proofs)
            else:
                assert isinstance(layer, FeedforwardLayer | FixedMap | NormalizedLinear)
                if isinstance(layer, FeedforwardLayer):
                    layer.check(own_proofs[0], x)
                elif isinstance(layer, NormalizedLinear):
                    layer.check(own_proofs[0])
                own = layer.rounding_growth(tuple(x.shape[1:]), dtype)
            gain = compose(own_proofs).bound
            error = error.times(gain) + own.after(size + error)
            y = layer(torch.zeros_like(x))
            size = size.times(gain).plus(add_up(norm_up(y), own.constant))  # ‖f(0)‖
            x = y
        return error

    def rounding(self, x: Tensor) -> Float[Tensor, "*batch"]:
        """Bound ‖fl(y) − y‖₂ per sample in float64, see `rounding_growth`."""
        flat, batch = self._flat(x)
        growth = self.rounding_growth(tuple(flat.shape[1:]), x.dtype)
        found = growth.at(norms_up(flat, flat.ndim - 1))
        return found if batch is None else found.reshape(batch)

    @property
    def _needed(self) -> int:
        """How many certificates the chain has."""
        return sum(
            layer._needed
            if isinstance(layer, LipschitzSequential)
            else not isinstance(layer, FixedMap)
            for layer in self
        )

    def _with_proofs(
        self, proofs: Sequence[Certificate]
    ) -> Iterator[tuple[nn.Module, Sequence[Certificate]]]:
        """Yield every layer with its certificates: none, one, or those of an inner chain."""
        if len(proofs) != self._needed:
            raise ValueError(f"expected {self._needed} certificates, got {len(proofs)}")
        start = 0
        for layer in self:
            count = 0 if isinstance(layer, FixedMap) else 1
            if isinstance(layer, LipschitzSequential):
                count = layer._needed
            yield layer, proofs[start : start + count]
            start += count


def certified(layer: nn.Module, x: Tensor, proofs: Sequence[Certificate]) -> Certified:
    """Return what is known of one layer, fixed map or head as it runs.

    Args:
        layer: of a chain, but no chain itself.
        x: with one batch dimension.
        proofs: of the layer; none for a fixed map.

    Raises:
        CertificateError: if the proof is for other weights or images, or the layer has hooks.
    """
    refuse_hooks(layer)
    if isinstance(layer, EquilibriumLayer):
        return layer.certified(x, proofs[0])
    assert isinstance(layer, FeedforwardLayer | FixedMap | NormalizedLinear)
    if isinstance(layer, FeedforwardLayer):
        layer.check(proofs[0], x)
    elif isinstance(layer, NormalizedLinear):
        layer.check(proofs[0])
    return rounded(layer(x), x, layer.rounding_growth(tuple(x.shape[1:]), x.dtype))


def rounded(y: Tensor, x: Tensor, growth: Growth) -> Certified:
    """Return what is known of an output whose rounding is affine in ‖x‖₂."""
    size = norms_up(x, x.ndim - 1)
    around = Affine(
        growth.constant + growth.slope * size, growth.slope, (growth.limit - size).clamp_min(-1.0)
    )
    return Certified(value=y, error=growth.at(size), uniform=around)


def _dims(layer: nn.Module) -> int | None:
    if isinstance(layer, LipschitzSequential):
        return layer.dims
    if isinstance(layer, FeedforwardLayer):
        return layer.map.dims
    if isinstance(layer, NormalizedLinear | DenseEquilibriumLayer):
        return 1
    return 3 if isinstance(layer, FixedImageMap | EquilibriumLayer) else None
