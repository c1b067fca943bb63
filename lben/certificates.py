"""Is x ↦ y really γ-Lipschitz? Proofs about `ExplicitWeights`, and nothing else.

A certificate sees explicit weights alone, never how they came about, so a bug in a
parameterization can cost tightness or make the proof fail, never make a bound wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lben.convolutional import ConvolutionalWeights, PooledWeights
from lben.inequality import Inequality
from lben.rigorous import Enclosure, down, norm_bound, sum_up, up
from lben.spectrum import at_frequencies
from lben.weights import ExplicitWeights, check_gamma
from solvers import Constants

AnyWeights = ExplicitWeights | ConvolutionalWeights | PooledWeights


class CertificateError(RuntimeError):
    """A claimed bound could not be proved."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A proved statement about one set of explicit weights.

    Attributes:
        bound: γ such that x ↦ y is γ-Lipschitz in l2; infinite when only well-posedness is proved.
        margin: proved lower bound (> 0) of the smallest eigenvalue of a matrix that is positive
            definite if and only if M(Λ, γ) is (`Inequality.margin`).
        smallest_eigenvalue: computed smallest eigenvalue of M(Λ, γ), or of 2Λ − ΛW − WᵀΛ when
            there is no bound; for information, not used in any proof.
        m: proved lower bound of the strong monotonicity of I − W in the Λ norm; 1 for W = 0.
        L: proved upper bound of ‖I − W‖ in the Λ norm; 1 for W = 0.
        output_gain: proved upper bound of ‖CΛ^(−½)‖₂: what an error of z costs in y.
        fingerprint: of the weights, see `ExplicitWeights.fingerprint`.
        dtype: of the weights as given.
        method: how it was proved.
        versions: library versions that ran the proof.
        image: height and width that the proof of a convolution is for: exactly these where it is
            circular, at most these where it is not; None for a dense layer.
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
    image: tuple[int, int] | None = None

    @property
    def constants(self) -> Constants:
        """The proved (m, L) as a solver takes them."""
        return Constants(m=self.m, L=self.L)

    def check(self, weights: AnyWeights) -> None:
        """Refuse other weights than those of the proof.

        Raises:
            CertificateError: if the fingerprint differs.
        """
        self.check_fingerprint(weights.fingerprint)

    def check_fingerprint(self, found: str) -> None:
        """As `check`, for weights whose fingerprint is known."""
        if found != self.fingerprint:
            raise CertificateError(
                "this certificate is for other weights: fingerprint "
                f"{self.fingerprint[:12]}…, weights have {found[:12]}…"
            )

    def check_image(self, found: tuple[int, int], *, exactly: bool) -> None:
        """Refuse images that the proof of a convolution does not cover.

        Args:
            found: height and width.
            exactly: whether smaller images are not covered either.

        Raises:
            CertificateError: naming both sizes.
        """
        proved = self.image
        covered = proved is not None and (
            found == proved if exactly else found[0] <= proved[0] and found[1] <= proved[1]
        )
        if not covered:
            raise CertificateError(
                f"this certificate is for images of {proved}, got images of {found}"
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
        pairs: proved bounds of yᵢ − yⱼ, classes × classes, in raw input units; None where only
            the √2·bound of all of y is known.
    """

    bound: float
    input_gain: float
    layers: tuple[Certificate, ...]
    pairs: tuple[tuple[float, ...], ...] | None = None

    def radius_bound(self) -> float | Tensor:
        """Return what `certified_radius` divides by: the pairs' bounds, else that of all of y."""
        return self.bound if self.pairs is None else torch.tensor(self.pairs, dtype=torch.float64)

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
    _check_entries(tensors, multiplier)
    return _prove(
        weights,
        claim.gamma,
        [Inequality.of(tensors, multiplier.numpy())],
        [Inequality.of(tensors, tensors.Lambda.numpy())],
        "Cholesky of a shifted Schur complement, verified a posteriori in float64",
    )


def certify_convolution(weights: ConvolutionalWeights, image: tuple[int, int]) -> Certificate:
    """Prove M(Λ, γ) ⪰ 0 for a convolutional layer at every frequency of its grid, or raise.

    On a torus all convolutions become block diagonal under the Fourier transform, M(Λ, γ) with
    them, and its blocks are the same inequality for the symbols of W, U, C and D. Zero padding
    embeds the image into a torus of (height + k − 1) × (width + k − 1), and cuts the result out: M
    of the layer is M of the torus compressed, plus the positive semi-definite part of
    [D C]ᵀ[D C]/γ that was cut off. So the proof holds for every smaller image and every padding.
    With circular padding it holds for images of exactly this size.

    Args:
        weights: as they run.
        image: height and width.

    Raises:
        ValueError: if a circular image is smaller than the kernel.
        CertificateError: if the proof fails, with the smallest eigenvalue found.
    """
    if min(image) < 1:
        raise ValueError(f"height and width of an image must be at least 1, got {image}")
    return _prove_frequencies(weights, weights, image, weights.gamma)


def certify_pooled(weights: PooledWeights, claim: Claim | None = None) -> Certificate:
    """Prove M(Λ, γ) ⪰ 0 for a convolutional layer with a pooled-linear read-out, or raise.

    The claim is the weights' own γ and Λ when omitted. With F = −ΛAᵀ − Cᵀ/2γ the Schur complement
    of M is that of the state alone, without outputs, plus FC + CᵀFᵀ: zero where A = −CΛ⁻¹/2γ, and
    otherwise (A is rounded) at least −2‖F‖‖C‖. So the frequencies of the state prove the whole,
    when that much is taken off. Another claim is proved with CᵀC ⪯ ‖CΛ^(−½)‖²Λ in place of CᵀC, at
    every frequency.

    Args:
        weights: as they run.
        claim: γ and one multiplier per channel, for weights that claim no bound of their own.

    Raises:
        ValueError: if a circular image is smaller than the kernel, or the weights claim a bound and
            another is to be proved.
        CertificateError: if the proof fails, with the smallest eigenvalue found.
    """
    if claim is not None:
        return _certify_through_state(weights, claim)
    proof = _prove_frequencies(weights, weights.state, weights.image, weights.gamma)
    exact = weights.to(torch.float64)
    root = Enclosure(exact.state.Lambda.numpy()[:, None]).sqrt()
    A, C = _by_channel(exact.A) * root, _by_channel(exact.C) * root.reciprocal()
    F = A if weights.gamma is None else A + C / (2 * weights.gamma)
    size, excess = _frobenius(C), _frobenius(F)
    # The scale of `margin` is within a factor √2 of Λ^(−½).
    excess = up(2 * excess * size * (1 + 2.0**-48))
    margin = down(proof.margin - 2 * excess)
    _require(margin, proof.smallest_eigenvalue - excess, weights.gamma)
    return replace(
        proof,
        margin=margin,
        m=max(down(proof.m - excess), 0.0),
        L=up(proof.L + up(_frobenius(A) * size * (1 + 2.0**-48))),
        output_gain=up(size * (1 + 2.0**-48)),
    )


def _certify_through_state(weights: PooledWeights, claim: Claim) -> Certificate:
    exact = weights.to(torch.float64)
    if bool(exact.A.any()):
        raise ValueError("another claim can only be proved for weights that claim no bound (A = 0)")
    root = exact.state.Lambda.sqrt()
    inverse = Enclosure(exact.state.Lambda.numpy()[:, None]).sqrt().reciprocal()
    scaled = _by_channel(exact.C) * inverse
    rows = (len(exact.C), -1)  # one per output: the norm is that of a short matrix
    gain = norm_bound(
        Enclosure(
            *(
                t.reshape(len(root), len(exact.C), -1).swapaxes(0, 1).reshape(rows)
                for t in (scaled.mid, scaled.radius)
            )
        )
    )
    outputs = torch.diag(gain * root * (1 + 2.0**-50))[:, :, None, None]
    state = replace(
        exact.state, C=outputs, b_y=root, Lambda=claim.Lambda.detach().to("cpu", torch.float64)
    )
    proof = _prove_frequencies(weights, state, weights.image, claim.gamma, exact.state)
    return replace(proof, output_gain=gain)


def _by_channel(t: Tensor) -> Enclosure:
    """Return q × n × height × width numbers with one row per channel n."""
    return Enclosure(t.transpose(0, 1).flatten(1).numpy())


def _frobenius(matrix: Enclosure) -> float:
    return up(math.sqrt(float(sum_up(matrix.magnitude**2 * (1 + 2.0**-50)))))


def _prove_frequencies(
    weights: ConvolutionalWeights | PooledWeights,
    state: ConvolutionalWeights,
    image: tuple[int, int],
    gamma: float | None,
    own: ConvolutionalWeights | None = None,
) -> Certificate:
    """Prove the inequality of the state at every frequency of its grid.

    `own` has the Λ in which the layer is solved, where that of the claim is another.
    """
    _check_entries(weights.to(torch.float64), state.Lambda.detach().cpu().double())
    blocks = at_frequencies(state.to(torch.float64), state.grid(image))
    solved = blocks if own is None else at_frequencies(own.to(torch.float64), state.grid(image))
    kind = "exactly" if state.circular else "at most"
    proof = _prove(
        weights,
        gamma,
        blocks,
        solved,
        f"Cholesky of a shifted Schur complement at {len(blocks)} frequencies, verified "
        f"a posteriori in float64; images of {kind} {image[0]} × {image[1]} pixels",
    )
    return replace(proof, image=(image[0], image[1]))


def _check_entries(weights: AnyWeights, multiplier: Tensor) -> None:
    if not all(bool(torch.isfinite(t).all()) for t in weights.tensors().values()):
        raise CertificateError("the weights contain NaN or Inf")
    own = weights.state.Lambda if isinstance(weights, PooledWeights) else weights.Lambda
    if not bool((own > 0).all() and (multiplier > 0).all()):
        raise CertificateError("Λ must be positive in every entry")


def _prove(
    weights: AnyWeights,
    gamma: float | None,
    claimed: Sequence[Inequality],
    own: Sequence[Inequality],
    method: str,
) -> Certificate:
    """Prove every block of M for the claim; the solver's constants are those of the own Λ."""
    margin = min(block.margin(gamma) for block in claimed)
    computed = min(block.smallest_eigenvalue(gamma) for block in claimed)
    _require(margin, computed, gamma)
    return Certificate(
        bound=math.inf if gamma is None else gamma,
        margin=margin,
        smallest_eigenvalue=computed,
        m=min(block.monotonicity() for block in own),
        L=max(block.norm() for block in own),
        output_gain=max(block.output_gain() for block in own),
        fingerprint=weights.fingerprint,
        dtype=str(next(iter(weights.tensors().values())).dtype).removeprefix("torch."),
        method=method,
        versions={"torch": torch.__version__, "numpy": np.__version__},
    )


def _require(margin: float, computed: float, gamma: float | None) -> None:
    if not margin > 0:
        statement = "well-posedness" if gamma is None else f"the Lipschitz bound γ = {gamma:g}"
        raise CertificateError(
            f"{statement} could not be proved: M has smallest eigenvalue {computed:.3e}, and the "
            f"proved lower bound {margin:.3e} is not positive. Causes: the weights do not satisfy "
            "the condition (a parameterization is broken or was rounded to low precision), or the "
            "slack ε is smaller than rounding. Try float64 or a larger epsilon."
        )
