"""Within which radius can a prediction not change, seen from the sample itself?

Near one input few units of σ can leave the branch they are on. If the input moves by Δx then the
pre-activation vᵢ moves by at most ℓᵢ‖Δx‖, ℓᵢ a proved Lipschitz bound of x ↦ vᵢ; so within a radius
the slopes Δzᵢ/Δvᵢ lie in an interval narrower than [0, 1], and with them the inequality shows a
smaller bound of every difference of logits. Increments from the sample are all that matters here,
not those between two arbitrary points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lben.certificates import CertificateError
from lben.certificates.local import LocalClaim, fewer_inputs, holds_locally
from lben.radii import ROOT2, check_labels, pair_bounds
from lben.rigorous import Array, Enclosure, up
from lben.tightening.local import tighten_locally, widened
from lben.weights import ExplicitWeights
from solvers import ProximalActivation

_BATCH = 64
"""Programs that are solved at a time."""

_SHARE = 0.6
"""Of the gradient that is taken off at the faces: see Note [Faces]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Anchors:
    """What a network is known to do at some inputs, in float64.

    Attributes:
        v: pre-activations Wz + Ux + b.
        v_error: bound of their distance to those at the exact equilibrium, per unit.
        logits: y.
        logit_error: bound of ‖y − y*‖₂.
        faces: 1 for an input that cannot fall, −1 for one that cannot rise, 0 for the others: the
            pixels that are 0 or 1, where a proof is for images in [0, 1] alone. None where it is
            for all inputs.
    """

    v: Float[Tensor, "batch n"]
    v_error: Float[Tensor, "batch n"]
    logits: Float[Tensor, "batch q"]
    logit_error: Float[Tensor, " batch"]
    faces: Float[Tensor, "batch p"] | None = None

    def select(self, index: Tensor) -> Anchors:
        """Return some of them."""
        return Anchors(
            v=self.v[index], v_error=self.v_error[index], logits=self.logits[index],
            logit_error=self.logit_error[index],
            faces=None if self.faces is None else self.faces[index],
        )  # fmt: skip


class LocalCertificate:
    """Proofs around single inputs, for one set of explicit weights.

    Making one proves a Lipschitz bound of every pre-activation, a semidefinite program per unit:
    seconds for 100 units, and like n⁴ from there.

    Args:
        weights: exactly as they run.
        activation: σ.
        bound: proved for all inputs, of the logits or of each pair, as `certified_radius` takes it;
            what it certifies is not tried again.
        input_gain: Lipschitz constant of the preprocessing, from what radii are measured in to x.

    Raises:
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite, or no bound of a
            pre-activation can be proved.

    Attributes:
        gains: ℓ, a proved Lipschitz bound of x ↦ vᵢ for every unit.
    """

    def __init__(
        self,
        weights: ExplicitWeights,
        activation: ProximalActivation,
        bound: float | Float[Tensor, "q q"] = math.inf,
        *,
        input_gain: float = 1.0,
    ) -> None:
        w = weights.to(torch.float64)
        n, q = w.hidden_features, w.out_features
        rows = fewer_inputs((w.U if w.D is None else torch.cat([w.U, w.D])).numpy())
        self._weights = w
        self._W, self._C, self._Lambda = w.W.numpy(), w.C.numpy(), w.Lambda
        self._U = rows[:n]
        self._D = np.zeros((q, len(rows))) if w.D is None else rows[n:]
        self._activation, self._input_gain = activation, up(input_gain * (1 + 2.0**-50))
        self._bounds = pair_bounds(bound, q)
        self.fingerprint = weights.fingerprint
        self.gains = torch.cat([self._prove_gains(i) for i in torch.arange(n).split(_BATCH)])

    def certifies(
        self,
        anchors: Anchors,
        labels: Int[Tensor, " batch"],
        radius: float | Float[Tensor, " batch"],
    ) -> Bool[Tensor, " batch"]:
        """Say for which inputs the label is proved to hold within a radius (l2, raw inputs)."""
        check_labels(anchors.logits, labels)
        radius = torch.as_tensor(radius, dtype=torch.float64).expand(len(labels))
        y, error = anchors.logits, ROOT2 * anchors.logit_error
        margins = y.gather(1, labels[:, None]) - y - error[:, None]
        margins = margins - 8 * 2.0**-53 * (y.abs().amax(1) + error)[:, None]
        rivals = torch.ones_like(margins, dtype=torch.bool).scatter(1, labels[:, None], False)
        certain = (margins > 0).logical_or(~rivals).all(1)
        open_ = radius[:, None] * self._bounds[labels] * (1 + 2.0**-50) >= margins
        # The least margins first: one that fails saves the others of its image.
        for rank in margins.masked_fill(~rivals, math.inf).argsort(1).T[:-1]:
            sample = (certain & open_.gather(1, rank[:, None])[:, 0]).nonzero()[:, 0]
            for part in sample.split(_BATCH):
                held = self._holds(
                    anchors.select(part), labels[part], rank[part],
                    margins[part, rank[part]], radius[part],
                )  # fmt: skip
                certain[part] &= held
        return certain

    def radius(
        self,
        anchors: Anchors,
        labels: Int[Tensor, " batch"],
        start: Float[Tensor, " batch"],
        *,
        steps: int = 6,
    ) -> Float[Tensor, " batch"]:
        """Return a certified radius per input, by bisection from one that is certified already.

        Args:
            anchors: of the inputs.
            labels: i.
            start: radii known to be certified; where 0 nothing is tried.
            steps: of bisection, after the first one, at twice the start.
        """
        low, high = start.double().clone(), torch.full_like(start.double(), math.inf)
        for _ in range(steps):
            trial = torch.where(high.isinf(), 2 * low, 0.5 * (low + high))
            index = (low > 0).nonzero()[:, 0]
            held = torch.zeros_like(labels, dtype=torch.bool)
            held[index] = self.certifies(anchors.select(index), labels[index], trial[index])
            low, high = torch.where(held, trial, low), torch.where(held, high, trial)
        return low

    def _holds(
        self, anchors: Anchors, labels: Tensor, rivals: Tensor, margins: Tensor, radius: Tensor
    ) -> Bool[Tensor, " batch"]:
        """Say for which inputs y_label − y_rival is proved to stay positive."""
        inner = radius * self._input_gain * (1 + 2.0**-50)
        reach = self.gains * inner[:, None] * (1 + 2.0**-50)
        slopes = widened(*self._activation.chords(anchors.v, reach, anchors.v_error))
        first, second = labels.numpy(), rivals.numpy()
        C = Enclosure(self._C[first]) - Enclosure(self._C[second])
        D = Enclosure(self._D[first]) - Enclosure(self._D[second])
        target = margins / inner * (1 - 2.0**-50)
        held = self._prove(self._U[None], C, D, slopes, target)[1]
        left = (~held).nonzero()[:, 0]
        if anchors.faces is None or not len(left):
            return held
        held[left] = self._holds_at_faces(
            anchors.faces[left], first[left.numpy()], second[left.numpy()],
            (slopes[0][left], slopes[1][left]), target[left],
        )  # fmt: skip
        return held

    def _holds_at_faces(
        self,
        faces: Tensor,
        first: NDArray[np.int64],
        second: NDArray[np.int64],
        slopes: tuple[Tensor, Tensor],
        target: Tensor,
    ) -> Bool[Tensor, " batch"]:
        """Say the same for inputs that stay on their side of the faces.

        Note [Faces]
        Where ηₖ has the sign of the face, ηᵀΔx ≥ 0 for every admissible Δx, so a difference of
        logits less ηᵀx falls no slower than the difference itself, and what is proved of the one
        holds for the other. η is a share of the gradient, at slopes in the middle, where it points
        out of the faces: any share is valid.
        """
        w, count = self._weights, len(first)
        n, middle = w.hidden_features, 0.5 * (slopes[0] + slopes[1])
        C = w.C[first] - w.C[second]
        inner = torch.eye(n, dtype=torch.float64) - w.W * middle[:, None, :]
        gradient = (torch.linalg.solve(inner.mT, (C * middle)[..., None])[..., 0]) @ w.U
        direct = [] if w.D is None else [w.D[first], w.D[second]]
        if direct:
            gradient = gradient + direct[0] - direct[1]
        eta = _SHARE * torch.where(gradient * faces > 0, gradient, 0.0)
        reduced = np.stack([
            fewer_inputs(torch.cat([w.U, *(row[i : i + 1] for row in (*direct, eta))]).numpy())
            for i in range(count)
        ])  # fmt: skip
        D = Enclosure(-reduced[:, -1])
        if direct:
            D = Enclosure(reduced[:, n]) - Enclosure(reduced[:, n + 1]) + D
        rows = Enclosure(self._C[first]) - Enclosure(self._C[second])
        return self._prove(reduced[:, :n], rows, D, slopes, target)[1]

    def _prove_gains(self, units: Tensor) -> Float[Tensor, " units"]:
        """Prove a bound of x ↦ vᵢ = Wᵢz + Uᵢx + bᵢ for some units."""
        index = units.numpy()
        C, D = Enclosure(self._W[index]), Enclosure(self._U[index])
        ones = torch.ones(len(units), len(self._W), dtype=torch.float64)
        gains, proved = self._prove(self._U[None], C, D, (0 * ones, ones), None)
        if not bool(proved.all()):
            raise CertificateError("no Lipschitz bound of the pre-activations could be proved")
        return gains

    def _prove(
        self,
        U: Array,
        C: Enclosure,
        D: Enclosure,
        slopes: tuple[Tensor, Tensor],
        target: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return a bound for each row of C and D, and whether it is proved (and the target).

        U is one matrix for all rows, or one for each.
        """
        count, (low, high) = len(C.mid), slopes
        U = np.broadcast_to(U, (count, *U.shape[1:]))
        try:
            gamma, multiplier = tighten_locally(
                torch.from_numpy(self._W),
                torch.tensor(U),
                torch.from_numpy(C.mid)[:, None],
                torch.from_numpy(D.mid)[:, None],
                self._Lambda,
                slopes,
                target=target,
            )
        except ValueError as error:
            raise CertificateError(str(error)) from error
        proved = torch.ones(count, dtype=torch.bool) if target is None else gamma <= target
        for i in proved.nonzero()[:, 0].tolist():
            claim = LocalClaim(
                gamma=float(gamma[i]), Lambda=multiplier[i].numpy(), low=low[i].numpy(),
                high=high[i].numpy(),
            )  # fmt: skip
            c, d = (Enclosure(e.mid[i : i + 1], e.radius[i : i + 1]) for e in (C, D))
            proved[i] = holds_locally(self._W, U[i], c, d, claim)
        return gamma, proved
