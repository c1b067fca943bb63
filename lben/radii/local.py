"""Within which radius can a prediction not change, seen from the sample itself?

Near one input few units of σ can leave the branch they are on. If the input moves by Δx then the
pre-activation vᵢ moves by at most ℓᵢ‖Δx‖, ℓᵢ a proved Lipschitz bound of x ↦ vᵢ; so within a radius
the slopes Δzᵢ/Δvᵢ lie in an interval narrower than [0, 1], and with them the inequality shows a
smaller bound of every difference of logits. Increments from the sample are all that matters here,
not those between two arbitrary points.

Note [Facts]
Let facts F(Δx, Δz) ≥ −o hold of all increments and w ≥ 0. A difference of logits less wᵀF + wᵀo
falls no slower than the difference itself, so a margin that the one keeps the other keeps, whatever
w is. The facts are Δzᵢ ≥ sΔvᵢ − o where σ lies above a line, and the room that is left to a pixel
in [0, 1].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lben.certificates import CertificateError, PairCertificate
from lben.certificates.local import LocalClaim, fewer_inputs, is_proved_locally
from lben.certificates.proof import read_exactly
from lben.radii.error_bounds import Affine
from lben.radii.margin import ROOT2, check_labels, pair_bounds
from lben.rigorous import Enclosure, up
from lben.tightening.local import LocalProgram, tighten_locally, tighten_with_constraints, widen
from lben.weights import DenseWeights, digest
from solvers import ProximalActivation

_BATCH = 64
"""Programs that are solved at a time."""
_LEAST = 2.0**-900
"""Smaller radii and margins are not told from this: no product of them loses bits to underflow."""
_MOST = 2.0**900
"""No larger radius is proved: no product of it overflows."""


def network_fingerprint(
    weights: DenseWeights, activation: ProximalActivation, input_gain: float = 1.0
) -> str:
    """Return a SHA-256 of all that a proof around an input depends on.

    Global proofs hold for every activation with slopes in [0, 1]; local ones use those of one. The
    claims of the weights, Λ and γ, are not part of it.

    Args:
        weights: as they run.
        activation: σ: its class, and its numbers and tensors.
        input_gain: Lipschitz constant of what comes before.
    """
    tensors: dict[str, Tensor] = {}
    header = f"{weights.function_fingerprint};{_described(activation, 'σ', tensors)};"
    return digest(f"{header}gain={float(input_gain)!r};", tensors)


def _described(value: object, name: str, tensors: dict[str, Tensor]) -> str:
    """Return a class and its attributes as text, and collect the tensors among them."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return name
    if not isinstance(value, ProximalActivation):
        return repr(value)
    parts = (f"{k}={_described(v, f'{name}.{k}', tensors)}" for k, v in sorted(vars(value).items()))
    return f"{type(value).__module__}.{type(value).__qualname__}({', '.join(parts)})"


@dataclass(frozen=True, kw_only=True, eq=False)
class OperatingPoints:
    """What a network is known to do at some inputs, in float64.

    Attributes:
        v: pre-activations Wz + Ux + b.
        v_error: bound of their distance to those at the exact equilibrium, per unit.
        logits: y.
        logit_error: bound of ‖y − y*‖₂.
        elsewhere: bound of the same distance within a radius of the input (of raw inputs, or of
            what the layer takes where the points are of the layer alone), as it runs there; None
            for proofs about the exact network around the input.
        room: how far each input can fall and rise at most, infinite where that is not known: the
            room of a pixel, where a proof is for images in [0, 1] alone. None where it is for all
            inputs.
        fingerprint: of the network that they were taken from (`network_fingerprint`). None where
            they were put together by hand: then it is for you to see that they fit.
    """

    v: Float[Tensor, "batch n"]
    v_error: Float[Tensor, "batch n"]
    logits: Float[Tensor, "batch q"]
    logit_error: Float[Tensor, " batch"]
    room: Float[Tensor, "batch 2 p"] | None = None
    elsewhere: Affine | None = None
    fingerprint: str | None = None

    def select(self, index: Tensor) -> OperatingPoints:
        """Return some of them."""
        return replace(
            self, v=self.v[index], v_error=self.v_error[index], logits=self.logits[index],
            logit_error=self.logit_error[index],
            room=None if self.room is None else self.room[index],
            elsewhere=None if self.elsewhere is None else self.elsewhere.select(index),
        )  # fmt: skip


class LocalCertifier:
    """Proofs around single inputs, for one set of explicit weights and one activation.

    Making one proves a Lipschitz bound of every pre-activation, a semidefinite program per unit:
    seconds for 100 units, and like n⁴ from there.

    Args:
        weights: exactly as they run.
        activation: σ.
        bound: proved for all inputs, of the logits or of each pair, as `certified_radius` takes it;
            what it certifies is not tried again.
        input_gain: Lipschitz constant of the preprocessing, from what radii are measured in to x.

    Raises:
        ValueError: if the weights are neither float32 nor float64, or the gain is not positive.
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite, or no bound of a
            pre-activation can be proved.

    Attributes:
        fingerprint: of weights, activation and gain, see `network_fingerprint`.
        gains: ℓ, a proved Lipschitz bound of x ↦ vᵢ for every unit.
    """

    def __init__(
        self,
        weights: DenseWeights,
        activation: ProximalActivation,
        bound: float | PairCertificate | Float[Tensor, "q q"] = math.inf,
        *,
        input_gain: float = 1.0,
    ) -> None:
        w = read_exactly(weights).apply(torch.clone)  # parameters may be trained on
        if not 0 < input_gain < math.inf:
            raise ValueError(f"input_gain must be positive and finite, got {input_gain}")
        n, q = w.hidden_features, w.out_features
        rows = fewer_inputs((w.U if w.D is None else torch.cat([w.U, w.D])).numpy())
        self._weights = w
        self._W, self._C, self._Lambda = w.W.numpy(), w.C.numpy(), w.Lambda
        self._U = rows[:n]
        self._D = np.zeros((q, len(rows))) if w.D is None else rows[n:]
        self._activation = copy.deepcopy(activation)
        self._input_gain = up(input_gain * (1 + 2.0**-48))
        self._bounds = pair_bounds(bound, q)
        self.fingerprint = network_fingerprint(weights, activation, input_gain)
        self._layer = network_fingerprint(weights, activation)
        self.gains = torch.cat(
            [self._prove_gains(i) for i in torch.arange(n, device="cpu").split(_BATCH)]
        )

    def certifies(
        self,
        operating_points: OperatingPoints,
        labels: Int[Tensor, " batch"],
        radius: float | Float[Tensor, " batch"],
        *,
        facts: bool | None = None,
    ) -> Bool[Tensor, " batch"]:
        """Say for which inputs the label is proved to hold within a radius (l2, raw inputs).

        Args:
            operating_points: of the inputs.
            labels: i.
            radius: of all or of each.
            facts: whether one-sided facts are used beside the slopes, see Note [Facts]: tighter,
                and about ten times as long. If the operating_points have room when omitted.

        Raises:
            ValueError: if labels or points do not fit, a radius is negative or NaN, or facts are
                off for points that have room.
            CertificateError: if the points are of other weights, another activation or another
                normalisation.
        """
        self._check(operating_points)
        facts = operating_points.room is not None if facts is None else facts
        if operating_points.room is not None and not facts:
            raise ValueError(
                "room is a fact: facts cannot be off for operating_points that have it"
            )
        labels = check_labels(operating_points.logits, labels).cpu()
        radius = torch.as_tensor(radius, dtype=torch.float64, device="cpu")
        if radius.shape not in ((), labels.shape) or not bool((radius >= 0).all()):
            raise ValueError(
                f"a radius must be at least 0 and not NaN, one for all or {len(labels)}, got "
                f"{radius}"
            )
        radius = radius.expand(len(labels))
        y, error = operating_points.logits, operating_points.logit_error
        if operating_points.elsewhere is not None:
            # Those of the layer are in terms of what it takes, not of raw inputs.
            own = operating_points.fingerprint == self._layer
            reach = radius * self._input_gain * (1 + 2.0**-48) if own else radius
            error = error + operating_points.elsewhere.at(reach)
        error = ROOT2 * error * (1 + 2.0**-48)
        margins = y.gather(1, labels[:, None]) - y - error[:, None]
        margins = margins - 2.0**-48 * (y.abs().amax(1) + error)[:, None] - _LEAST
        rivals = torch.ones_like(margins, dtype=torch.bool).scatter(1, labels[:, None], False)
        certain = (margins > 0).logical_or(~rivals).all(1) & (radius <= _MOST)
        open_ = ~(radius[:, None] * self._bounds[labels] * (1 + 2.0**-48) + _LEAST < margins)
        # The least margins first: one that fails saves the others of its image.
        for rank in margins.masked_fill(~rivals, math.inf).argsort(1).T[:-1]:
            sample = (certain & open_.gather(1, rank[:, None])[:, 0]).nonzero()[:, 0]
            for part in sample.split(_BATCH) if len(sample) else ():
                held = self._holds(
                    operating_points.select(part), labels[part], rank[part],
                    margins[part, rank[part]], radius[part], facts,
                )  # fmt: skip
                certain[part] &= held
        return certain

    def radius(
        self,
        operating_points: OperatingPoints,
        labels: Int[Tensor, " batch"],
        start: Float[Tensor, " batch"],
        *,
        steps: int = 6,
        facts: bool | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return a certified radius per input, by bisection from one that is certified already.

        Args:
            operating_points: of the inputs.
            labels: i.
            start: radii known to be certified; where 0 nothing is tried.
            steps: of bisection, after the first one, at twice the start.
            facts: as for `certifies`.

        Raises:
            ValueError: as `certifies` does.
        """
        labels = check_labels(operating_points.logits, labels).cpu()
        low = start.detach().cpu().double().clone()
        if low.shape != labels.shape or not bool((low >= 0).all()):
            raise ValueError(
                f"start must be {len(labels)} radii of at least 0 and not NaN, got {start}"
            )
        high = torch.full_like(low, math.inf)
        for _ in range(steps):
            trial = torch.where(high.isinf(), 2 * low, 0.5 * (low + high))
            index = (low > 0).nonzero()[:, 0]
            held = torch.zeros_like(labels, dtype=torch.bool)
            held[index] = self.certifies(
                operating_points.select(index), labels[index], trial[index], facts=facts
            )
            low, high = torch.where(held, trial, low), torch.where(held, high, trial)
        return low

    def _check(self, operating_points: OperatingPoints) -> None:
        """Refuse operating_points that are not of this network, or not numbers."""
        if operating_points.fingerprint not in (None, self._layer, self.fingerprint):
            raise CertificateError(
                "these operating points are of other weights, another activation or another "
                f"normalisation: fingerprint {str(operating_points.fingerprint)[:12]}…, this "
                f"certificate has {self.fingerprint[:12]}…"
            )
        n, q, batch = len(self._W), len(self._C), len(operating_points.logits)
        expected = {
            "v": (batch, n), "v_error": (batch, n), "logits": (batch, q), "logit_error": (batch,),
        }  # fmt: skip
        for name, shape in expected.items():
            value = getattr(operating_points, name)
            if value.shape != shape or value.dtype != torch.float64 or value.device.type != "cpu":
                raise ValueError(
                    f"{name} of the operating_points must be {shape} in float64 on the CPU, got "
                    f"{tuple(value.shape)} {value.dtype} on {value.device}"
                )
            if bool(value.isnan().any()):
                raise ValueError(f"{name} of the operating_points contains NaN")

    def _holds(
        self,
        operating_points: OperatingPoints,
        labels: Tensor,
        rivals: Tensor,
        margins: Tensor,
        radius: Tensor,
        facts: bool,
    ) -> Bool[Tensor, " batch"]:
        """Say for which inputs y_label − y_rival is proved to stay positive."""
        inner = radius.clamp_min(_LEAST) * self._input_gain * (1 + 2.0**-48)
        reach = self.gains * inner[:, None] * (1 + 2.0**-48)
        slopes = widen(
            *self._activation.slope_bounds(operating_points.v, reach, operating_points.v_error)
        )
        target = margins / inner * (1 - 2.0**-48)
        pairs = list(zip(labels.tolist(), rivals.tolist(), strict=True))
        if facts:
            return self._hold_with_facts(operating_points, pairs, slopes, margins, inner)
        first, second = labels.numpy(), rivals.numpy()
        C = Enclosure(self._C[first]) - Enclosure(self._C[second])
        D = Enclosure(self._D[first]) - Enclosure(self._D[second])
        return self._prove(C, D, slopes, target)[1]

    def _hold_with_facts(
        self,
        operating_points: OperatingPoints,
        pairs: list[tuple[int, int]],
        slopes: tuple[Tensor, Tensor],
        margins: Tensor,
        radius: Tensor,
    ) -> Bool[Tensor, " batch"]:
        """Say the same with one-sided facts."""
        w, (low, high) = self._weights, slopes
        first, second = torch.tensor(pairs, device="cpu").T
        lines = self._activation.lower_lines(operating_points.v, operating_points.v_error)
        room = operating_points.room
        if room is None:
            room = w.U.new_full((len(pairs), 2, w.in_features), math.inf)
        D = w.U.new_zeros(w.in_features) if w.D is None else w.D[first] - w.D[second]
        problem = LocalProgram(
            W=w.W, U=w.U.expand(len(pairs), *w.U.shape), C=(w.C[first] - w.C[second])[:, None],
            D=D.expand(len(pairs), -1)[:, None], Lambda=self._Lambda, low=low, high=high,
        )  # fmt: skip
        units, target = radius[:, None], margins / radius
        try:
            bound, multiplier, weights = tighten_with_constraints(
                problem, [(s, o / units) for s, o in lines], room / units[..., None], target
            )
        except ValueError as error:
            raise CertificateError(str(error)) from error
        # A proposal, whatever it is: only facts that are known count, and none against its sense.
        n, weights = w.hidden_features, weights.clamp_min(0)
        known, inputs = weights.split([n * len(lines), 2 * w.in_features], dim=1)
        fall, rise = inputs.chunk(2, dim=1)
        free = torch.where(fall > rise, room[:, 0], room[:, 1])
        eta = torch.where(free.isfinite(), fall - rise, 0.0)
        used = torch.cat([known, eta.abs()], dim=1)
        offsets = torch.cat([*(o for _, o in lines), free.nan_to_num(0.0, 0.0)], dim=1)
        held = (bound <= target) & weights.isfinite().all(1)
        for i in held.nonzero()[:, 0].tolist():
            price = Enclosure(used[i, None].numpy()) @ Enclosure(offsets[i, :, None].numpy())
            claim = LocalClaim(
                gamma=float((margins[i] - price.magnitude[0, 0]) / radius[i]) * (1 - 2.0**-48),
                Lambda=multiplier[i].numpy(), low=low[i].numpy(), high=high[i].numpy(),
            )  # fmt: skip
            nu = zip((s for s, _ in lines), known[i].view(len(lines), n), strict=True)
            held[i] = self._holds_less(pairs[i], tuple(nu), eta[i], claim)
        return held

    def _holds_less(
        self,
        pair: tuple[int, int],
        nu: Sequence[tuple[float, Tensor]],
        eta: Tensor,
        claim: LocalClaim,
    ) -> bool:
        """Prove a claim of y_i − y_j − Σ νₛᵀ(z − sv) − ηᵀx."""
        w, n = self._weights, len(self._W)
        direct = [] if w.D is None else [w.D[i : i + 1] for i in pair]
        try:
            rows = fewer_inputs(torch.cat([w.U, *direct, eta[None]]).numpy())
        except CertificateError:
            return False
        C, D = Enclosure(self._C[[pair[0]]]) - Enclosure(self._C[[pair[1]]]), Enclosure(-rows[-1:])
        U = rows[:n]
        if direct:
            D = Enclosure(rows[n : n + 1]) - Enclosure(rows[n + 1 : n + 2]) + D
        for slope, numbers in nu:
            weight = Enclosure(numbers.numpy()[None])
            steep = weight * Enclosure(np.array([[slope]]))
            C, D = C - weight + steep @ Enclosure(self._W), D + steep @ Enclosure(U)
        return is_proved_locally(self._W, U, C, D, claim)

    def _prove_gains(self, units: Tensor) -> Float[Tensor, " units"]:
        """Prove a bound of x ↦ vᵢ = Wᵢz + Uᵢx + bᵢ for some units."""
        index = units.numpy()
        C, D = Enclosure(self._W[index]), Enclosure(self._U[index])
        ones = torch.ones(len(units), len(self._W), dtype=torch.float64, device="cpu")
        gains, proved = self._prove(C, D, (0 * ones, ones), None)
        if not bool(proved.all()):
            raise CertificateError("no Lipschitz bound of the pre-activations could be proved")
        return gains

    def _prove(
        self, C: Enclosure, D: Enclosure, slopes: tuple[Tensor, Tensor], target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return a bound for each row of C and D, and whether it is proved (and the target)."""
        count, (low, high) = len(C.mid), slopes
        U = torch.from_numpy(self._U)
        problem = LocalProgram(
            W=torch.from_numpy(self._W), U=U.expand(count, *U.shape),
            C=torch.from_numpy(C.mid)[:, None], D=torch.from_numpy(D.mid)[:, None],
            Lambda=self._Lambda, low=low, high=high,
        )  # fmt: skip
        try:
            gamma, multiplier = tighten_locally(problem, target=target)
        except ValueError as error:
            raise CertificateError(str(error)) from error
        if target is None:  # a bound near 0 could be no bound in floating point
            floor = 2.0**-30 * torch.from_numpy(np.linalg.norm(np.hstack([C.mid, D.mid]), axis=1))
            floor = torch.maximum(gamma, floor + 2.0**-90)
            gamma, multiplier = floor, multiplier * (gamma / floor)[:, None]
        proved = (
            torch.ones(count, dtype=torch.bool, device="cpu") if target is None else gamma <= target
        )
        for i in proved.nonzero()[:, 0].tolist():
            claim = LocalClaim(
                gamma=float(gamma[i]), Lambda=multiplier[i].numpy(), low=low[i].numpy(),
                high=high[i].numpy(),
            )  # fmt: skip
            c, d = (Enclosure(e.mid[i : i + 1], e.radius[i : i + 1]) for e in (C, D))
            proved[i] = is_proved_locally(self._W, self._U, c, d, claim)
        return gamma, proved
