"""What is the bound of a chain of layers, and of the error that floating point adds to it?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lben.certificates import Certificate
from lben.certified import Affine, Certified, Stage
from lben.layers.companions import Companion
from lben.layers.equilibrium import EquilibriumLayer
from lben.layers.explicit import ExplicitLayer


class LipschitzSequential(nn.Sequential):
    """torch.nn.Sequential of layers with proved bounds and of 1-Lipschitz companions.

    Raises:
        ValueError: if a module has no bound.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._check()

    def _check(self) -> None:
        for layer in self:
            if not isinstance(layer, ExplicitLayer | Companion | EquilibriumLayer):
                raise ValueError(
                    f"{type(layer).__name__} has no proved Lipschitz bound: use the layers and "
                    "companions of lben.layers"
                )

    def certificates(self, shape: tuple[int, int, int]) -> list[Certificate]:
        """Prove every layer that is not a companion, first to last.

        Args:
            shape: channels, height and width of the input.

        Raises:
            CertificateError: if a proof fails.
        """
        self._check()
        x = torch.zeros(1, *shape)
        x = x.to(next(self.parameters(), x))
        proofs = []
        with torch.no_grad():
            for layer in self:
                if isinstance(layer, ExplicitLayer):
                    proofs.append(
                        layer.certificate((x.shape[2], x.shape[3]) if x.ndim == 4 else None)
                    )
                elif isinstance(layer, EquilibriumLayer):
                    proofs.append(layer.certificate())
                x = layer(x)
        return proofs

    @torch.no_grad()
    def certified(
        self, x: Tensor, proofs: Sequence[Certificate], stage: Stage | None = None
    ) -> tuple[Tensor, Stage]:
        """Return y as the chain runs, and what is known of its distance to the exact y.

        The exact y has the same weights, exact equilibria and no rounding. What a layer adds is
        multiplied by the bounds of those after it.

        Args:
            x: float32 or float64.
            proofs: of `certificates`, for these weights and images of this size.
            stage: what is known of x; that it is exact when omitted.

        Raises:
            CertificateError: if a proof is for other weights or images.
            ValueError: if there are more or fewer proofs than layers.
        """
        self._check()
        stage = Stage.start(x) if stage is None else stage
        for layer, proof in self._with_proofs(proofs):
            if isinstance(layer, EquilibriumLayer):
                assert proof is not None
                found = layer.certified(x, proof)
            else:
                assert isinstance(layer, ExplicitLayer | Companion)
                if isinstance(layer, ExplicitLayer) and proof is not None:
                    layer.check(proof, x)
                found = evaluated(layer, x)
            x, stage = found.value, stage.then(found, 1.0 if proof is None else proof.bound)
        return x, stage

    def with_error(self, x: Tensor, proofs: Sequence[Certificate]) -> tuple[Tensor, Tensor, int]:
        """Return y, a bound of its l2 distance to the exact y, and the most solver steps.

        Args and errors are those of `certified`.
        """
        y, stage = self.certified(x, proofs)
        return y, stage.error, stage.steps

    def _with_proofs(
        self, proofs: Sequence[Certificate]
    ) -> Iterator[tuple[nn.Module, Certificate | None]]:
        needed = sum(not isinstance(layer, Companion) for layer in self)
        if len(proofs) != needed:
            raise ValueError(f"expected {needed} certificates, got {len(proofs)}")
        left = iter(proofs)
        for layer in self:
            yield layer, None if isinstance(layer, Companion) else next(left)


def evaluated(layer: nn.Module, x: Tensor) -> Certified:
    """Return what is known of a layer without a solve, whose rounding is affine in ‖x‖₂."""
    rounding = layer.rounding  # type: ignore[operator]
    size = torch.linalg.vector_norm(x.double().flatten(1), dim=1) * (1 + 2.0**-40)
    unit = torch.zeros_like(x[:1])
    unit.view(-1)[:1] = 1.0
    constant, one = (float(rounding(t)[0]) if len(x) else 0.0 for t in (0 * unit, unit))
    slope = (one - constant) * (1 + 2.0**-20)
    around = Affine(constant + slope * size, slope)
    return Certified(value=layer(x), error=around.constant, uniform=around)
