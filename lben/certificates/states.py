"""Where can the state of an equilibrium be, for all inputs of a set? Not far from any point.

Note [States near a point]
Let Λ^½(I − W)Λ^(−½) have a symmetric part of at least m > 0, and let σ have slopes in [0, 1]. Take
any v̂, with ẑ = σ(v̂) and r = v̂ − (Wẑ + Ux̂ + b). At another input x = x̂ + δ let z be the state and
v its pre-activations. So v − v̂ = W(z − ẑ) + Uδ − r, and (zᵢ − ẑᵢ)((vᵢ − v̂ᵢ) − (zᵢ − ẑᵢ)) ≥ 0 for
every unit. Weighted by Λ, the sum over units gives

    m ‖z − ẑ‖_Λ ≤ ‖Uδ − r‖_Λ,   so   |vᵢ − v̂ᵢ| ≤ ‖(WΛ^(−½))ᵢ‖₂ ‖Uδ − r‖_Λ / m + |(Uδ − r)ᵢ|.

The same inequality shows that there is exactly one state. v̂ is a proposal, and the bound is tight
for small sets if v̂ is nearly the state at x̂.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lben.certificates.certificate import CertificateError
from lben.certificates.relaxation import InputRegion, Intervals, prove_by_intervals
from lben.rigorous import Enclosure, norm_bound, norms_up, smallest_eigenvalue_bound
from lben.weights.affine_system import AffineSystem

_SLACK = 1 + 2.0**-20
"""More than the rounding of a sum of up to 2²⁰ numbers that are not negative."""
_FLOOR = 2.0**-400


class StateBound:
    """Bounds of the pre-activations of an equilibrium around any point.

    Args:
        system: of an equilibrium, in float64.

    Raises:
        ValueError: if the system is feed-forward.
        CertificateError: if σ has other slopes than [0, 1], or W is not proved to be monotone in
            the metric Λ.

    Attributes:
        monotonicity: m, proved.

    Example:
        z = σ(−z + x) moves by half of what x moves.

        >>> import torch
        >>> from lben.certificates.relaxation import InputRegion
        >>> from lben.certificates.states import StateBound
        >>> from lben.weights import DenseWeights
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.affine_system import AffineSystem
        >>> one, zero = torch.ones(1, 1).double(), torch.zeros(1).double()
        >>> system = AffineSystem.of_weights(DenseWeights(
        ...     W=-one, U=one, b=zero, C=one, D=None, b_y=zero, Lambda=one[0], gamma=None
        ... ), RELU)
        >>> region = InputRegion.around(2 * one, 0.5, "l2", None)
        >>> ranges = StateBound(system).prove(region, system.evaluate(2 * one)[0])
        >>> ranges.lower[1].round(decimals=4).tolist(), ranges.upper[1].round(decimals=4).tolist()
        ([[0.25]], [[1.75]])
    """

    def __init__(self, system: AffineSystem) -> None:
        metric = system.metric
        if metric is None:
            raise ValueError("a feed-forward network has no equilibrium: prove its ranges in order")
        (activation,) = system.activations
        if activation.low < 0 or activation.high > 1:
            raise CertificateError(
                f"the activation {activation.name} has slopes in [{activation.low}, "
                f"{activation.high}], and a state is bounded only for slopes in [0, 1]"
            )
        W, n = Enclosure(system.rows(1, 1).numpy()), system.units(1)
        if not bool((metric.isfinite() & (metric > 2.0**-100) & (metric < 2.0**100)).all()):
            raise CertificateError(
                "the multiplier Λ of these weights must be positive, within 2^±100: take weights "
                "whose certificate holds"
            )
        root = Enclosure(metric.numpy()[:, None]).sqrt()
        inverse = root.reciprocal()
        scaled = (Enclosure(np.eye(n)) - W) * root * inverse.T
        self.monotonicity = smallest_eigenvalue_bound(scaled.symmetric_part())
        if not self.monotonicity > 0:
            raise CertificateError(
                "I − W is not proved to be monotone in the metric Λ of the weights, so nothing is "
                f"known of the equilibrium: the proved bound of m is {self.monotonicity:g}. Take "
                "weights with a proved certificate"
            )
        self._system = system
        self._root = torch.from_numpy(root.magnitude[:, 0])
        self._gains = torch.from_numpy(norms_up((W * inverse.T).magnitude, 1))
        U = system.rows(1, 0) if 0 in system.reads(1) else torch.zeros(n, system.inputs).double()
        drive = Enclosure(U.numpy()) * Enclosure(system.std.numpy()[None]).reciprocal()
        self._sizes = torch.from_numpy(drive.magnitude)
        self._norms = torch.from_numpy(norms_up(drive.magnitude, 1))
        self._norm = norm_bound(root * drive)

    @torch.no_grad()
    def prove(self, region: InputRegion, v: Float[Tensor, "batch n"]) -> Intervals:
        """Return proved intervals of all pre-activations.

        Args:
            region: of the inputs.
            v: v̂, any pre-activations, best those at the centres.

        Returns:
            The intervals of block 1; infinite where v is not finite.
        """
        v = torch.where(v.isfinite(), v, 0.0).double()
        still = torch.zeros_like(region.center)
        at = replace(region, lower=still, upper=still)
        here = Intervals(lower={1: v}, upper={1: v})
        low, high = prove_by_intervals(self._system, 1, here, at)
        # |r|: a difference rounds by less than an ulp of itself.
        residual = torch.maximum((v - low).abs(), (high - v).abs()) * _SLACK + _FLOOR
        reach = region.reach()
        moved = reach @ self._sizes.T
        ball = region.radius.isfinite()
        size = torch.where(ball, region.radius, torch.inf)[:, None]
        moved = torch.minimum(moved, size * self._norms) * _SLACK + _FLOOR
        total = torch.linalg.vector_norm(self._root * moved, dim=1) * _SLACK
        norm = torch.where(ball, region.radius, torch.linalg.vector_norm(reach, dim=1)) * _SLACK
        total = torch.minimum(total, norm * self._norm)
        total = total + torch.linalg.vector_norm(self._root * residual, dim=1) * _SLACK + _FLOOR
        spread = total[:, None] * _SLACK / self.monotonicity * self._gains + moved + residual
        spread = spread * _SLACK + 2.0**-40 * v.abs() + _FLOOR
        sound = spread.isfinite() & (spread < 2.0**900)
        spread = torch.where(sound, spread, torch.inf)
        return Intervals(lower={1: v - spread}, upper={1: v + spread})
