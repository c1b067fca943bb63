"""How far does an error within a layer move its output, wherever the layer is evaluated?

An equilibrium layer that runs makes three errors: v is rounded, the solve leaves a residual, and
the read-out is rounded. The first two act as a change of v in z = σ(Wz + v), the third as a change
of the read-out. The weights alone determine how far each of them can move y.

Note [Energies]
Let S = 2Λ − ΛW − WᵀΛ ≻ 0. Change v by Bξ, with a matrix B and a vector ξ, and let Δz be the change
of z. Let b satisfy ΛB(ΛB)ᵀ ⪯ bS. The sector condition gives ½ΔzᵀSΔz ≤ ΔzᵀΛBξ ≤ √(ΔzᵀSΔz) √b ‖ξ‖, so
ΔzᵀSΔz ≤ 4b‖ξ‖². Let P be a matrix, and let a satisfy PᵀP ⪯ aS. Then ‖PΔz‖² ≤ aΔzᵀSΔz. Hence

    ‖PΔz‖₂ ≤ 2 √(ab) ‖ξ‖₂.

So one number b for each B and one number a for each P bound every gain. Two of them are known:
S ⪰ 2mΛ, so a = 1/(2m) serves P = Λ^½ and b = 1/(2m) serves B = Λ^(−½).

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch

from lben.certificates.certificate import CertificateError, LayerCertificate, Sensitivity
from lben.certificates.frequencies import at_frequencies
from lben.certificates.inequality import Inequality
from lben.rigorous import Array, Enclosure, norm_bound, smallest_eigenvalue_bound, sum_up, up
from lben.weights import ConvolutionalWeights, DenseWeights, PooledWeights, Weights


def sensitivity(weights: Weights, proof: LayerCertificate) -> Sensitivity:
    """Prove how errors within an equilibrium layer move its state and its output.

    Args:
        weights: exactly as they run.
        proof: of these weights; its m, L and output gain are used.

    Returns:
        Gains from errors of x, of v and of the solve to z and to y; states in the Λ norm.

    Raises:
        CertificateError: if the proof is of other weights, or has no positive m.

    Example:
        >>> from lben import EquilibriumLinear, certify
        >>> weights = EquilibriumLinear(4, 6, 2).weights()
        >>> gains = sensitivity(weights, certify(weights))
        >>> gains.drive_to_output > 0, gains.state_to_output > 0
        (True, True)
    """
    proof.check(weights)
    if not proof.m > 0:
        raise CertificateError(f"the proof shows no strong monotonicity: m = {proof.m:g}")
    if isinstance(weights, PooledWeights):
        output, residual, drive = _bound_pooled(weights, proof)
    elif not isinstance(weights, DenseWeights | ConvolutionalWeights):
        raise TypeError(f"no sensitivity is known for {type(weights).__name__}")
    else:
        output, residual, drive = _energies(_blocks(weights, proof), proof.m)
    rest = up(1 / (2 * proof.m), 2)

    def gain(out: float, into: float) -> float:
        return up(2 * math.sqrt(up(out * into)), 3)

    return Sensitivity(
        input_to_state=gain(rest, drive),
        drive_to_state=gain(rest, rest),
        drive_to_output=gain(output, rest),
        residual_to_state=gain(rest, residual),
        residual_to_output=gain(output, residual),
        state_to_output=proof.output_gain,
    )


def _blocks(
    weights: DenseWeights | ConvolutionalWeights, proof: LayerCertificate
) -> Sequence[Inequality]:
    """Return the inequality of the weights' own Λ: one, or one per frequency of the proof."""
    exact = weights.to(torch.float64)
    if isinstance(exact, DenseWeights):
        return [Inequality.of(exact, exact.Lambda.numpy())]
    assert proof.image is not None
    return at_frequencies(exact, exact.grid(proof.image))


def _energies(blocks: Sequence[Inequality], m: float) -> tuple[float, float, float]:
    """Return a for P = C, b for B = WΛ^(−½) and b for B = U, each the largest of all blocks."""
    found = [0.0, 0.0, 0.0]
    for block in blocks:
        S, inverse_root = block.well_posedness(), block.Lambda.sqrt().reciprocal()
        ways = [block.C.T, None, block.Lambda * block.U]
        if block.W is not None:
            ways[1] = block.Lambda * block.W * inverse_root.T
        for way, G in enumerate(ways):
            if G is not None and G.mid.any():
                found[way] = max(found[way], _energy(S, G, inverse_root, m))
    return found[0], found[1], found[2]


def _energy(S: Enclosure, G: Enclosure, inverse_root: Enclosure, m: float) -> float:
    """Return a proved number b, close to the smallest possible, with GGᵀ ⪯ bS.

    S ⪰ 2mΛ, so b = ‖Λ^(−½)G‖² / 2m always serves. It is returned if no smaller b can be proved.
    """
    scale = _congruence(S)
    scaled, columns = _scale(S, scale[:, None] * scale), _scale(G, scale[:, None])
    product = columns @ columns.T
    try:
        R = scipy.linalg.cholesky(scaled.mid)
        inner = scipy.linalg.solve_triangular(R, columns.mid, trans="T")
        least = float(np.linalg.norm(inner, 2)) ** 2
    except (scipy.linalg.LinAlgError, ValueError):
        least = math.inf
    for slack in (2.0**-30, 2.0**-20, 2.0**-10):
        b = up(least * (1 + slack))
        if 0 < b < math.inf and smallest_eigenvalue_bound(scaled - product / b) > 0:
            return b
    return up(norm_bound(inverse_root * G) ** 2 / (2 * m), 4)


def _congruence(S: Enclosure) -> Array:
    """Return powers of two that make the diagonal of S near 1."""
    diagonal = np.maximum(np.diag(S.mid), 2.0**-1000)
    return np.ldexp(1.0, -(np.frexp(diagonal)[1] // 2))


def _scale(matrix: Enclosure, factor: Array) -> Enclosure:
    return Enclosure(matrix.mid * factor, matrix.radius * factor)


def _bound_pooled(weights: PooledWeights, proof: LayerCertificate) -> tuple[float, float, float]:
    """Return the numbers of `_energies` for W = W₀∗ + A⟨C, ·⟩, from the frequencies of W₀.

    Let S₀ be the S of W₀. If γ is claimed, ΛA = −Cᵀ/2γ − F with an F of the size of rounding. Then
    S = S₀ + CᵀC/γ + FC + CᵀFᵀ. If e = ‖Λ^(−½)F‖‖CΛ^(−½)‖/m < 1, both S ⪰ CᵀC/γ and S ⪰ (1 − e)S₀
    hold. The term AC of W adds ‖S^(−½)ΛA‖ ‖CΛ^(−½)‖ to the root of b for B = WΛ^(−½).
    """
    exact = weights.to(torch.float64)
    blocks = at_frequencies(exact.state, exact.state.grid(weights.image))
    _, residual, drive = _energies(blocks, proof.m)
    gain, rest = proof.output_gain, up(1 / (2 * proof.m), 2)
    output = up(rest * up(gain * gain), 2)
    root = Enclosure(exact.state.Lambda.numpy()[:, None]).sqrt()
    A, C = (Enclosure(t.transpose(0, 1).flatten(1).numpy()) for t in (exact.A, exact.C))
    inward, outward = A * root, C * root.reciprocal()
    through = up(_bound_frobenius_norm(inward) * math.sqrt(rest), 2)
    if weights.gamma is not None:
        F = _bound_frobenius_norm(inward + outward / (2 * weights.gamma))
        share = up(up(F * gain, 2) / proof.m, 2)
        if not share < 0.5:
            raise CertificateError("A and C of the pooled weights do not belong to each other")
        residual, drive = (up(b / (1 - share), 4) for b in (residual, drive))
        output = min(output, weights.gamma)
        through = up(math.sqrt(output) / (2 * weights.gamma) + up(F * math.sqrt(rest), 2), 4)
    both = up(math.sqrt(residual) + up(through * gain, 2), 4)
    return output, up(both * both), drive


def _bound_frobenius_norm(matrix: Enclosure) -> float:
    return up(math.sqrt(float(sum_up(matrix.magnitude**2 * (1 + 2.0**-50)))) * (1 + 2.0**-50), 2)
