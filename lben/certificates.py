"""Is x ↦ y really γ-Lipschitz? Proofs about `ExplicitWeights`, and nothing else.

A certificate sees explicit weights alone, never how they came about, so a bug in a
parameterization can cost tightness or make the proof fail, never make a bound wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lben.rigorous import (
    Array,
    Enclosure,
    block,
    down,
    gamma_k,
    norm_bound,
    smallest_eigenvalue_bound,
    up,
)
from lben.weights import ExplicitWeights, check_gamma
from solvers import Constants


class CertificateError(RuntimeError):
    """A claimed bound could not be proved."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A proved statement about one set of explicit weights.

    Attributes:
        bound: γ such that x ↦ y is γ-Lipschitz in l2; infinite when only well-posedness is proved.
        margin: proved lower bound (> 0) of the smallest eigenvalue of the Schur complement
            2Λ − ΛW − WᵀΛ − CᵀC/γ − G R⁻¹Gᵀ (without D), of M(Λ, γ) (with D), or of
            2Λ − ΛW − WᵀΛ (no bound).
        smallest_eigenvalue: computed smallest eigenvalue of M(Λ, γ), or of 2Λ − ΛW − WᵀΛ when
            there is no bound; for information, not used in any proof.
        m: proved lower bound of the strong monotonicity of I − W in the Λ norm.
        L: proved upper bound of ‖I − W‖ in the Λ norm.
        output_gain: proved upper bound of ‖CΛ^(−½)‖₂: what an error of z costs in y.
        fingerprint: of the weights, see `ExplicitWeights.fingerprint`.
        dtype: of the weights as given.
        method: how it was proved.
        versions: library versions that ran the proof.
    """

    bound: float
    margin: float
    smallest_eigenvalue: float
    m: float
    L: float
    output_gain: float
    fingerprint: str
    dtype: str
    method: str
    versions: dict[str, str]

    @property
    def constants(self) -> Constants:
        """The proved (m, L) as a solver takes them."""
        return Constants(m=self.m, L=self.L)

    def check(self, weights: ExplicitWeights) -> None:
        """Refuse other weights than those of the proof.

        Raises:
            CertificateError: if the fingerprint differs.
        """
        if weights.fingerprint != self.fingerprint:
            raise CertificateError(
                "this certificate is for other weights: fingerprint "
                f"{self.fingerprint[:12]}…, weights have {weights.fingerprint[:12]}…"
            )

    def to_json(self) -> str:
        """Return the certificate as JSON."""
        return _json(self)


@dataclass(frozen=True, kw_only=True)
class NetworkCertificate:
    """The bound of a chain: preprocessing, then layers, in raw input units.

    Attributes:
        bound: product of `input_gain` and the layers' bounds, rounded upwards.
        input_gain: Lipschitz constant of the preprocessing (1/deviation for a normalisation).
        layers: the layers' certificates, first to last.
    """

    bound: float
    input_gain: float
    layers: tuple[Certificate, ...]

    def to_json(self) -> str:
        """Return the certificate as JSON."""
        return _json(self)


def _json(record: Certificate | NetworkCertificate) -> str:
    def finite(value: object) -> object:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        return [finite(v) for v in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(asdict(record)), indent=2)


def compose(layers: Sequence[Certificate], input_gain: float = 1.0) -> NetworkCertificate:
    """Bound a chain of layers behind a preprocessing step by the product of their bounds."""
    bound = input_gain
    for layer in layers:
        bound = up(bound * layer.bound)
    return NetworkCertificate(bound=bound, input_gain=input_gain, layers=tuple(layers))


@dataclass(frozen=True, eq=False)
class Claim:
    """What is to be proved: a bound and the multiplier that is said to show it.

    Attributes:
        gamma: γ, or None for well-posedness alone.
        Lambda: the multiplier Λ in M(Λ, γ), n positive numbers.
    """

    gamma: float | None
    Lambda: Float[Tensor, " n"]


def certify(weights: ExplicitWeights, claim: Claim | None = None) -> Certificate:
    """Prove M(Λ, γ) ⪰ 0 for the weights exactly as stored, or raise.

    With γ None, prove that the equilibrium exists and is unique (2Λ − ΛW − WᵀΛ ≻ 0) and return an
    infinite bound. m, L and the output gain are always those of the weights' own Λ, the metric in
    which the layer is solved. The claim is the weights' own γ and Λ when omitted. Revay, Wang and
    Manchester (2020), Theorems 1 and 2; D as in recurrent equilibrium networks (Revay, Wang and
    Manchester 2023).

    Raises:
        ValueError: if the claimed γ is not positive and finite, or its Λ has another size.
        CertificateError: if the proof fails, with the smallest eigenvalue found.
    """
    claim = Claim(weights.gamma, weights.Lambda) if claim is None else claim
    check_gamma(claim.gamma)
    if claim.Lambda.shape != weights.Lambda.shape:
        raise ValueError(
            f"the claim's Lambda must have shape {tuple(weights.Lambda.shape)}, "
            f"got {tuple(claim.Lambda.shape)}"
        )
    tensors = weights.to(torch.float64)
    multiplier = claim.Lambda.detach().to("cpu", torch.float64)
    if not all(bool(torch.isfinite(t).all()) for t in tensors.tensors().values()):
        raise CertificateError("the weights contain NaN or Inf")
    if not bool((tensors.Lambda > 0).all() and (multiplier > 0).all()):
        raise CertificateError("Λ must be positive in every entry")
    pieces, own = _Pieces(tensors, multiplier), _Pieces(tensors, tensors.Lambda)
    gamma = claim.gamma
    margin = smallest_eigenvalue_bound(
        pieces.well_posedness() if gamma is None else pieces.lipschitz(gamma)
    )
    computed = pieces.smallest_eigenvalue(gamma)
    if not margin > 0:
        statement = "well-posedness" if gamma is None else f"the Lipschitz bound γ = {gamma:g}"
        raise CertificateError(
            f"{statement} could not be proved: M has smallest eigenvalue {computed:.3e}, and the "
            f"proved lower bound {margin:.3e} is not positive. Causes: the weights do not satisfy "
            "the condition (a parameterization is broken or was rounded to low precision), or the "
            "slack ε is smaller than rounding. Try float64 or a larger epsilon."
        )
    return Certificate(
        bound=math.inf if gamma is None else gamma,
        margin=margin,
        smallest_eigenvalue=computed,
        m=own.monotonicity(),
        L=norm_bound(own.H()),
        output_gain=norm_bound(own.C * own.root.reciprocal().T),
        fingerprint=weights.fingerprint,
        dtype=str(weights.W.dtype).removeprefix("torch."),
        method="Cholesky of a shifted Schur complement, verified a posteriori in float64",
        versions={"torch": torch.__version__, "numpy": np.__version__},
    )


def tighten(weights: ExplicitWeights) -> Claim:
    """Propose the least γ that the weights' own Λ, up to a common factor, supports.

    For D = 0 and S = 2Λ − ΛW − WᵀΛ the condition with Λ scaled by t is
    S ⪰ (CᵀC/t + tΛUUᵀΛ)/γ, so γ(t) = λmax(S⁻¹(CᵀC/t + tΛUUᵀΛ)), a convex function of log t
    minimised on a line. Works for layers that claim no bound (γ None) as well. The result is a
    proposal: `certify` proves it.

    Raises:
        ValueError: if the weights have a feed-through D.
        CertificateError: if S is not positive definite.
    """
    if weights.D is not None:
        raise ValueError("tighten needs weights without feed-through D")
    double = weights.to(torch.float64)
    W, C, Lambda = double.W.numpy(), double.C.numpy(), double.Lambda.numpy()
    G = Lambda[:, None] * double.U.numpy()
    weighted = Lambda[:, None] * W
    S = 2 * np.diag(Lambda) - weighted - weighted.T
    CC, GG = C.T @ C, G @ G.T
    last = [len(S) - 1, len(S) - 1]
    try:
        scipy.linalg.cholesky(S)
    except scipy.linalg.LinAlgError as error:
        raise CertificateError("2Λ − ΛW − WᵀΛ is not positive definite") from error

    def gamma(log_t: float) -> float:
        t = math.exp(log_t)
        top = scipy.linalg.eigh(CC / t + t * GG, S, eigvals_only=True, subset_by_index=last)
        return float(top[0])

    centre = 0.5 * math.log(np.trace(CC) / np.trace(GG))
    best = scipy.optimize.minimize_scalar(
        gamma, bounds=(centre - 5, centre + 5), method="bounded", options={"xatol": 1e-4}
    )
    t = math.exp(float(best.x))
    found = gamma(float(best.x)) * (1 + 1e-7)  # room for the proof
    if weights.gamma is not None and found >= weights.gamma:
        return Claim(weights.gamma, weights.Lambda)
    return Claim(found, double.Lambda * t)


def certified_radius(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    bound: float,
    *,
    logit_error: Float[Tensor, " batch"] | float = 0.0,
) -> Float[Tensor, " batch"]:
    """Return a radius in the l2 norm of raw inputs within which the prediction cannot change.

    r = max(0, (yᵢ − max_{j≠i} yⱼ − √2 e) / (√2 γ)), rounded downwards: (eᵢ − eⱼ)ᵀy is
    √2γ-Lipschitz, and an error of at most e in y moves it by at most √2e. 0 for a sample that is
    misclassified.

    Args:
        logits: y.
        labels: i, integers in [0, classes).
        bound: γ of the whole network from raw input to logits.
        logit_error: e, a bound of ‖y − y*‖₂ per sample (solver and rounding).

    Raises:
        ValueError: if shapes disagree, a label is out of range, there are fewer than two classes,
            logits are not finite, or the bound is not positive.
    """
    check_labels(logits, labels)
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits contain NaN or Inf")
    y = logits.detach().double()
    own = y.gather(1, labels[:, None])
    others = y.scatter(1, labels[:, None], -math.inf)
    margin = own.squeeze(1) - others.amax(1)
    root = up(math.sqrt(2.0))
    error = torch.as_tensor(logit_error, dtype=torch.float64, device=y.device)
    radius = (margin - root * error) / up(root * bound)
    # The subtraction of logits, the error term and the quotient round by under 4 u each.
    slack = 8 * 2.0**-53 * (y.abs().amax(1) + root * error) / bound
    return (radius - slack - radius.abs() * 2.0**-50).clamp_min(0)


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless labels are integers in [0, classes), one per row of logits."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (batch, classes ≥ 2), got {tuple(logits.shape)}")
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be {logits.shape[0]} integers, got {tuple(labels.shape)} {labels.dtype}"
        )
    classes = logits.shape[1]
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(
            f"labels must lie in [0, {classes}), "
            f"got values from {int(labels.min())} to {int(labels.max())}"
        )


def logit_error(
    weights: ExplicitWeights,
    certificate: Certificate,
    x: Float[Tensor, "batch p"],
    z: Float[Tensor, "batch n"],
    state_error: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Bound ‖y − y*‖₂ for y evaluated in float64 from an inexact state z.

    y* is the output at the exact equilibrium of x. Three parts: the state error ‖z − z*‖_Λ as the
    solver saw it, through ‖CΛ^(−½)‖; rounding of v = Ux + b, which moves z* by at most
    ‖δv‖_Λ / m; and rounding of Cz + Dx + b_y.

    Args:
        weights: float64 weights of the layer.
        certificate: of the same weights.
        x: inputs of the layer, float64.
        z: states that the outputs were evaluated from, float64.
        state_error: bound of ‖z − z*‖_Λ for the problem with the rounded v.
    """
    w = weights
    u_n, u_p = gamma_k(w.hidden_features + 4), gamma_k(w.in_features + 4)
    v_error = u_p * (x.abs() @ w.U.abs().T + w.b.abs())
    v_error = torch.linalg.vector_norm(v_error * w.Lambda.sqrt(), dim=-1) / certificate.m
    y_error = u_n * (z.abs() @ w.C.abs().T) + 4 * 2.0**-53 * w.b_y.abs()
    if w.D is not None:
        y_error = y_error + u_p * (x.abs() @ w.D.abs().T)
    inflate = 1 + 1e-9
    y_norm = 4 * torch.linalg.vector_norm(y_error, dim=-1)
    return (certificate.output_gain * (state_error + 2 * v_error) + y_norm) * inflate


class _Pieces:
    """Enclosures of the blocks of M for float64 weights and a multiplier."""

    def __init__(self, weights: ExplicitWeights, Lambda: Tensor) -> None:
        def exact(t: Tensor) -> Enclosure:
            return Enclosure(t.numpy())

        self.W, self.U, self.C = exact(weights.W), exact(weights.U), exact(weights.C)
        self.D = None if weights.D is None else exact(weights.D)
        self.Lambda = exact(Lambda[:, None])
        self.root = self.Lambda.sqrt()
        self.n = weights.hidden_features

    def _identity(self, size: int, value: float = 1.0) -> Enclosure:
        return Enclosure(value * np.eye(size))

    def well_posedness(self) -> Enclosure:
        """2Λ − ΛW − WᵀΛ."""
        weighted = self.Lambda * (self._identity(self.n) - self.W)
        return weighted + weighted.T

    def lipschitz(self, gamma: float) -> Enclosure:
        """The Schur complement of M(Λ, γ) without D, M(Λ, γ) itself with D."""
        S = self.well_posedness() - self.C.T @ self.C / gamma
        G = self.Lambda * self.U
        if self.D is None:
            return S - G @ G.T / gamma
        return self._assemble(gamma, S, G, self.D)

    def _assemble(self, gamma: float, S: Enclosure, G: Enclosure, D: Enclosure) -> Enclosure:
        corner = self._identity(D.mid.shape[1], gamma) - D.T @ D / gamma
        side = -(G.T + D.T @ self.C / gamma)
        return block([[corner, side], [side.T, S]])

    def H(self) -> Enclosure:
        """Λ^½ (I − W) Λ^(−½)."""
        return self.root * (self._identity(self.n) - self.W) * self.root.reciprocal().T

    def monotonicity(self) -> float:
        """Return a proved lower bound of λmin(sym H), at least 0.

        2 sym H = Λ^(−½)(2Λ − ΛW − WᵀΛ)Λ^(−½), already proved positive definite.
        """
        return max(down(smallest_eigenvalue_bound(self.H())), 0.0)

    def smallest_eigenvalue(self, gamma: float | None) -> float:
        """Compute λmin of M(Λ, γ) (or of 2Λ − ΛW − WᵀΛ), in coordinates that shrink the input.

        M acts as γI on inputs orthogonal to the rows of U and D; an orthonormal basis of those
        rows replaces the input space when it is larger.
        """
        if gamma is None:
            return float(np.linalg.eigvalsh(self.well_posedness().mid)[0])
        D = np.zeros((1, self.U.mid.shape[1])) if self.D is None else self.D.mid
        rows = np.vstack([D, self.U.mid])
        if rows.shape[1] > rows.shape[0]:
            rows = scipy.linalg.qr(rows.T, mode="economic")[1].T
        D, U = rows[: len(D)], rows[len(D) :]
        G: Array = self.Lambda.mid * U
        S = self.well_posedness().mid - self.C.mid.T @ self.C.mid / gamma
        C = self.C.mid if self.D is not None else np.zeros((1, self.n))
        side = -(G.T + D.T @ C / gamma)
        corner = gamma * np.eye(rows.shape[1]) - D.T @ D / gamma
        return float(np.linalg.eigvalsh(np.block([[corner, side], [side.T, S]]))[0])
