"""Within which radius around one sample can the prediction not change?

Near one sample few units of σ can leave the branch they are on. Let ℓᵢ be a proved Lipschitz bound
of x ↦ vᵢ. If the input moves by Δx, then the pre-activation vᵢ moves by at most ℓᵢ‖Δx‖₂. So within
a radius the chord slopes Δzᵢ/Δvᵢ from the sample lie in an interval narrower than [0, 1], and with
these slope bounds the inequality shows a smaller bound of every difference of logits. Only
increments from the sample count here, not those between two arbitrary points. Symbols:
docs/glossary.md.

Note [Constraints]
Let linear constraints F(Δx, Δz) ≥ −o hold for all increments, and let w ≥ 0. Then the difference of
two logits less w(F + o) is at most the difference itself. So if the former stays positive, the
latter does, for every w. There are two kinds of constraints: Δzᵢ ≥ sΔvᵢ − o where σ lies above a
line of slope s, and the box slack: how far a pixel is from 0 and from 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from lben.certificates import CertificateError, LocalCertificate, PairCertificate
from lben.certificates.local import LocalClaim, compress_inputs, prove_local_claim
from lben.certificates.proof import read_exactly
from lben.radii.error_bounds import Affine
from lben.radii.margin import ROOT2, check_labels, pair_bounds
from lben.rigorous import Enclosure, up
from lben.tightening.local import (
    LocalProgram,
    tighten_locally,
    tighten_with_constraints,
    widen_slope_bounds,
)
from lben.weights import DenseWeights, digest
from solvers import ProximalActivation

_BATCH = 64
"""Programs in a batch."""
_SMALLEST = 2.0**-900
"""Radii and margins below it are treated as this one: their products do not underflow."""
_LARGEST = 2.0**900
"""No larger radius is proved: its products do not overflow."""


def network_fingerprint(
    weights: DenseWeights, activation: ProximalActivation, input_gain: float = 1.0
) -> str:
    """Return a SHA-256 of everything that a proof around an input depends on.

    A global proof holds for every activation with slopes in [0, 1]; a local proof uses the slopes
    of one activation. Λ and γ, which the weights claim, are not part of it.

    Args:
        weights: as they run.
        activation: σ; its class, numbers and tensors count.
        input_gain: Lipschitz constant of the normalisation before the layer.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> import torch
        >>> from lben import DenseWeights
        >>> from lben.radii.local import network_fingerprint
        >>> from solvers import ReLU, Tanh
        >>> one, zero = torch.ones(1, 1), torch.zeros(1)
        >>> weights = DenseWeights(
        ...     W=0 * one, U=one, b=zero, C=one, D=None, b_y=zero, Lambda=one[0], gamma=1.0
        ... )
        >>> relu, tanh = network_fingerprint(weights, ReLU()), network_fingerprint(weights, Tanh())
        >>> len(relu), relu == tanh
        (64, False)
    """
    tensors: dict[str, Tensor] = {}
    header = f"{weights.function_fingerprint};{_describe(activation, 'σ', tensors)};"
    return digest(f"{header}gain={float(input_gain)!r};", tensors)


def _describe(value: object, name: str, tensors: dict[str, Tensor]) -> str:
    """Return a class and its attributes as text; add its tensors to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return name
    if not isinstance(value, ProximalActivation):
        return repr(value)
    parts = (f"{k}={_describe(v, f'{name}.{k}', tensors)}" for k, v in sorted(vars(value).items()))
    return f"{type(value).__module__}.{type(value).__qualname__}({', '.join(parts)})"


@dataclass(frozen=True, kw_only=True, eq=False)
class OperatingPoints:
    """The states of a network at some inputs, with their errors, in float64 on the CPU.

    Attributes:
        v: pre-activations Wz + Ux + b.
        v_error: bound of |v − v*|, where v* belongs to the exact equilibrium.
        logits: y.
        logit_error: bound of ‖y − y*‖₂.
        box_slack: how far each input of the layer can fall and rise, infinite where that is not
            known. With it a proof is for images in [0, 1] only; None for all inputs.
        elsewhere: bound of ‖y − y*‖₂ as the network runs within a radius of the input, affine in
            the radius. The radius is one of raw inputs; of inputs of the layer if the points are of
            the layer alone. None for proofs about the exact network around the input.
        fingerprint: of the network that they are of (`network_fingerprint`). None for points that
            you made by hand; nothing then checks that they are of the certifier's network.

    Example:
        >>> import torch
        >>> from lben.radii.local import OperatingPoints
        >>> zero = torch.zeros(3, 2, dtype=torch.float64)
        >>> points = OperatingPoints(v=zero, v_error=zero, logits=zero, logit_error=zero[:, 0])
        >>> tuple(points.select(torch.tensor([0, 2])).v.shape)
        (2, 2)
    """

    v: Float[Tensor, "batch n"]
    v_error: Float[Tensor, "batch n"]
    logits: Float[Tensor, "batch q"]
    logit_error: Float[Tensor, " batch"]
    box_slack: Float[Tensor, "batch 2 p"] | None = None
    elsewhere: Affine | None = None
    fingerprint: str | None = None

    def digest(self) -> str:
        """Return the SHA-256 of all numbers: which inputs a local certificate is about."""
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        around = "" if self.elsewhere is None else f"slope={self.elsewhere.slope!r};"
        if self.elsewhere is not None:
            tensors["elsewhere"] = self.elsewhere.constant
        return digest(f"{self.fingerprint};{around}", tensors)

    def select(self, index: Tensor) -> OperatingPoints:
        """Return the points at some indices of the batch."""
        return replace(
            self, v=self.v[index], v_error=self.v_error[index], logits=self.logits[index],
            logit_error=self.logit_error[index],
            box_slack=None if self.box_slack is None else self.box_slack[index],
            elsewhere=None if self.elsewhere is None else self.elsewhere.select(index),
        )  # fmt: skip


class LocalCertifier:
    """A certifier around single inputs, for one set of explicit weights and one activation.

    Its construction proves a Lipschitz bound of every pre-activation by a semidefinite program per
    unit. That takes seconds for 100 units, and time grows as n⁴.

    Args:
        weights: exactly as they run.
        activation: σ.
        bound: a proved global Lipschitz bound of the logits or of each pair, in the form that
            `margin_radius` takes. Pairs that it certifies need no local proof.
        input_gain: Lipschitz constant of the normalisation, from raw inputs to x.

    Raises:
        ValueError: if the weights are neither float32 nor float64, or the gain is not positive.
        CertificateError: if 2Λ − ΛW − WᵀΛ is not positive definite, or no bound of a
            pre-activation can be proved.

    Attributes:
        fingerprint: of weights, activation and gain, see `network_fingerprint`.
        gains: ℓ, a proved l2 Lipschitz bound of x ↦ vᵢ for every unit.

    Example:
        y = (σ(x), 0) has the global bound 1, and margin 2 at x = 2, where the label is 0.

        >>> import torch
        >>> from lben import DenseWeights
        >>> from lben.radii.local import LocalCertifier, OperatingPoints
        >>> from solvers import ReLU
        >>> one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> weights = DenseWeights(
        ...     W=0 * one, U=one, b=zero, C=torch.cat([one, 0 * one]), D=None,
        ...     b_y=torch.cat([zero, zero]), Lambda=one[0], gamma=None,
        ... )
        >>> certifier = LocalCertifier(weights, ReLU())
        >>> logits = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
        >>> points = OperatingPoints(v=2 * one, v_error=0 * one, logits=logits, logit_error=zero)
        >>> label = torch.tensor([0])
        >>> [certifier.certifies(points, label, radius).item() for radius in (1.9, 2.1)]
        [True, False]
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
        rows = compress_inputs((w.U if w.D is None else torch.cat([w.U, w.D])).numpy())
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
        labels: Integer[Tensor, " batch"],
        radius: float | Float[Tensor, " batch"],
        *,
        constraints: bool | None = None,
    ) -> Bool[Tensor, " batch"]:
        """Return for each input whether its label is proved within an l2 radius of raw inputs.

        Args:
            operating_points: of the inputs.
            labels: the index of each input's label among the logits.
            radius: one for all inputs or one each, in the unit of raw inputs.
            constraints: whether linear constraints are used besides slope bounds, see Note
                [Constraints]: tighter, and about ten times as long. None uses them for points with
                box slack.

        Returns:
            True where the label is proved; False means that no proof was found.

        Raises:
            ValueError: if labels or points do not fit, a radius is negative or NaN, or constraints
                is False for points that have box slack.
            CertificateError: if the points are of other weights, another activation or another
                normalisation.
        """
        margins = self._margins(operating_points, labels, radius, constraints)
        return margins > 0

    def certify(
        self,
        operating_points: OperatingPoints,
        labels: Integer[Tensor, " batch"],
        radius: float | Float[Tensor, " batch"],
        *,
        constraints: bool | None = None,
    ) -> list[LocalCertificate | None]:
        """Return a certificate for each input whose label is proved within a radius.

        Args:
            operating_points, labels, radius, constraints: as for `certifies`.

        Returns:
            One per input; None where no proof was found.

        Raises:
            ValueError, CertificateError: as `certifies`.
        """
        margins = self._margins(operating_points, labels, radius, constraints)
        radii = torch.as_tensor(radius, dtype=torch.float64, device="cpu").expand(len(margins))
        return [
            self._certificate(operating_points.select(torch.tensor([i])), int(labels[i]), r, margin)
            if margin > 0
            else None
            for i, (r, margin) in enumerate(zip(radii.tolist(), margins.tolist(), strict=True))
        ]

    def _certificate(
        self, point: OperatingPoints, label: int, radius: float, margin: float
    ) -> LocalCertificate:
        return LocalCertificate(
            margin=margin if math.isfinite(margin) else None,
            fingerprint=self.fingerprint,
            dtype="float64",
            method="slope bounds around the input, Cholesky verified a posteriori in float64",
            radius=radius,
            label=label,
            point=point.digest(),
            box=point.box_slack is not None,
            running=point.elsewhere is not None,
        )

    def _margins(
        self,
        operating_points: OperatingPoints,
        labels: Integer[Tensor, " batch"],
        radius: float | Float[Tensor, " batch"],
        constraints: bool | None,
    ) -> Float[Tensor, " batch"]:
        """Return the least margin of the proofs for each input.

        −inf where a proof was not found; inf where the bound for all inputs is enough.
        """
        self._check(operating_points)
        constraints = operating_points.box_slack is not None if constraints is None else constraints
        if operating_points.box_slack is not None and not constraints:
            raise ValueError(
                "these operating points have box_slack, which is a constraint, but constraints is "
                "False: leave constraints out, or use points without box_slack"
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
        margins = margins - 2.0**-48 * (y.abs().amax(1) + error)[:, None] - _SMALLEST
        rivals = torch.ones_like(margins, dtype=torch.bool).scatter(1, labels[:, None], False)
        certain = (margins > 0).logical_or(~rivals).all(1) & (radius <= _LARGEST)
        least = torch.where(certain, torch.inf, -torch.inf).double()
        open_ = ~(radius[:, None] * self._bounds[labels] * (1 + 2.0**-48) + _SMALLEST < margins)
        # The least margins first: one that fails saves the others of its image.
        for rank in margins.masked_fill(~rivals, math.inf).argsort(1).T[:-1]:
            sample = ((least > 0) & open_.gather(1, rank[:, None])[:, 0]).nonzero()[:, 0]
            for part in sample.split(_BATCH) if len(sample) else ():
                proved = self._prove_margins(
                    operating_points.select(part), labels[part], rank[part],
                    margins[part, rank[part]], radius[part], constraints,
                )  # fmt: skip
                least[part] = torch.minimum(least[part], proved)
        return least

    def radius(
        self,
        operating_points: OperatingPoints,
        labels: Integer[Tensor, " batch"],
        start: Float[Tensor, " batch"],
        *,
        steps: int = 6,
        constraints: bool | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return a certified l2 radius per input, by bisection above one known to be certified.

        Args:
            operating_points: of the inputs.
            labels: the index of each input's label among the logits.
            start: certified radii, from a global bound; inputs where it is 0 are left at 0.
            steps: trials. Until one fails the radius is doubled, then the interval is halved.
            constraints: as for `certifies`.

        Returns:
            Radii in the unit of raw inputs, none below `start`.

        Raises:
            ValueError: if labels, points or start do not fit, as in `certifies`.
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
            proved = torch.zeros_like(labels, dtype=torch.bool)
            proved[index] = self.certifies(
                operating_points.select(index), labels[index], trial[index], constraints=constraints
            )
            low, high = torch.where(proved, trial, low), torch.where(proved, high, trial)
        return low

    def _check(self, operating_points: OperatingPoints) -> None:
        """Refuse operating points that are of another network, or contain NaN."""
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

    def _prove_margins(
        self,
        operating_points: OperatingPoints,
        labels: Tensor,
        rivals: Tensor,
        margins: Tensor,
        radius: Tensor,
        constraints: bool,
    ) -> Float[Tensor, " batch"]:
        """Return the margin of the proof that y_label − y_rival stays positive, per input."""
        inner = radius.clamp_min(_SMALLEST) * self._input_gain * (1 + 2.0**-48)
        reach = self.gains * inner[:, None] * (1 + 2.0**-48)
        slopes = widen_slope_bounds(
            *self._activation.slope_bounds(operating_points.v, reach, operating_points.v_error)
        )
        target = margins / inner * (1 - 2.0**-48)
        pairs = list(zip(labels.tolist(), rivals.tolist(), strict=True))
        if constraints:
            return self._prove_with_constraints(operating_points, pairs, slopes, margins, inner)
        first, second = labels.numpy(), rivals.numpy()
        C = Enclosure(self._C[first]) - Enclosure(self._C[second])
        D = Enclosure(self._D[first]) - Enclosure(self._D[second])
        return self._prove(C, D, slopes, target)[1]

    def _prove_with_constraints(
        self,
        operating_points: OperatingPoints,
        pairs: list[tuple[int, int]],
        slopes: tuple[Tensor, Tensor],
        margins: Tensor,
        radius: Tensor,
    ) -> Float[Tensor, " batch"]:
        """Return the same as `_prove_margins`, with constraints besides slope bounds."""
        w, (low, high) = self._weights, slopes
        first, second = torch.tensor(pairs, device="cpu").T
        lines = self._activation.lower_lines(operating_points.v, operating_points.v_error)
        box_slack = operating_points.box_slack
        if box_slack is None:
            box_slack = w.U.new_full((len(pairs), 2, w.in_features), math.inf)
        D = w.U.new_zeros(w.in_features) if w.D is None else w.D[first] - w.D[second]
        problem = LocalProgram(
            W=w.W, U=w.U.expand(len(pairs), *w.U.shape), C=(w.C[first] - w.C[second])[:, None],
            D=D.expand(len(pairs), -1)[:, None], Lambda=self._Lambda, low=low, high=high,
        )  # fmt: skip
        units, target = radius[:, None], margins / radius
        try:
            bound, multiplier, weights = tighten_with_constraints(
                problem, [(s, o / units) for s, o in lines], box_slack / units[..., None], target
            )
        except ValueError as error:
            raise CertificateError(str(error)) from error
        # Weights are proposals. Only w ≥ 0 and known constraints are sound.
        n, weights = w.hidden_features, weights.clamp_min(0)
        known, inputs = weights.split([n * len(lines), 2 * w.in_features], dim=1)
        fall, rise = inputs.chunk(2, dim=1)
        free = torch.where(fall > rise, box_slack[:, 0], box_slack[:, 1])
        eta = torch.where(free.isfinite(), fall - rise, 0.0)
        used = torch.cat([known, eta.abs()], dim=1)
        offsets = torch.cat([*(o for _, o in lines), free.nan_to_num(0.0, 0.0)], dim=1)
        proposed = (bound <= target) & weights.isfinite().all(1)
        found = torch.full_like(target, -math.inf)
        for i in proposed.nonzero()[:, 0].tolist():
            price = Enclosure(used[i, None].numpy()) @ Enclosure(offsets[i, :, None].numpy())
            claim = LocalClaim(
                gamma=float((margins[i] - price.magnitude[0, 0]) / radius[i]) * (1 - 2.0**-48),
                Lambda=multiplier[i].numpy(), low=low[i].numpy(), high=high[i].numpy(),
            )  # fmt: skip
            nu = zip((s for s, _ in lines), known[i].view(len(lines), n), strict=True)
            found[i] = self._prove_constrained_difference(pairs[i], tuple(nu), eta[i], claim)
        return found

    def _prove_constrained_difference(
        self,
        pair: tuple[int, int],
        nu: Sequence[tuple[float, Tensor]],
        eta: Tensor,
        claim: LocalClaim,
    ) -> float:
        """Return the margin of a claim of y_i − y_j − Σ νₛᵀ(z − sv) − ηᵀx."""
        w, n = self._weights, len(self._W)
        direct = [] if w.D is None else [w.D[i : i + 1] for i in pair]
        try:
            rows = compress_inputs(torch.cat([w.U, *direct, eta[None]]).numpy())
        except CertificateError:
            return -math.inf
        C, D = Enclosure(self._C[[pair[0]]]) - Enclosure(self._C[[pair[1]]]), Enclosure(-rows[-1:])
        U = rows[:n]
        if direct:
            D = Enclosure(rows[n : n + 1]) - Enclosure(rows[n + 1 : n + 2]) + D
        for slope, numbers in nu:
            weight = Enclosure(numbers.numpy()[None])
            steep = weight * Enclosure(np.array([[slope]]))
            C, D = C - weight + steep @ Enclosure(self._W), D + steep @ Enclosure(U)
        return prove_local_claim(self._W, U, C, D, claim)

    def _prove_gains(self, units: Tensor) -> Float[Tensor, " units"]:
        """Return proved Lipschitz bounds of x ↦ vᵢ = Wᵢz + Uᵢx + bᵢ for some units."""
        index = units.numpy()
        C, D = Enclosure(self._W[index]), Enclosure(self._U[index])
        ones = torch.ones(len(units), len(self._W), dtype=torch.float64, device="cpu")
        gains, margins = self._prove(C, D, (0 * ones, ones), None)
        if not bool((margins > 0).all()):
            raise CertificateError("no Lipschitz bound of the pre-activations could be proved")
        return gains

    def _prove(
        self, C: Enclosure, D: Enclosure, slopes: tuple[Tensor, Tensor], target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return a bound for each row of C and D, and its margin; −inf above the target."""
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
        proposed = (
            torch.ones(count, dtype=torch.bool, device="cpu") if target is None else gamma <= target
        )
        margins = torch.full_like(gamma, -math.inf)
        for i in proposed.nonzero()[:, 0].tolist():
            claim = LocalClaim(
                gamma=float(gamma[i]), Lambda=multiplier[i].numpy(), low=low[i].numpy(),
                high=high[i].numpy(),
            )  # fmt: skip
            c, d = (Enclosure(e.mid[i : i + 1], e.radius[i : i + 1]) for e in (C, D))
            margins[i] = prove_local_claim(self._W, self._U, c, d, claim)
        return gamma, margins
