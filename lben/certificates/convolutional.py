"""Which Lipschitz bound do the weights of a layer of images have?

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lben.certificates.certificate import LayerCertificate
from lben.certificates.claims import Claim
from lben.certificates.frequencies import at_frequencies
from lben.certificates.proof import multiplier_of, prove, read_exactly, require
from lben.rigorous import Enclosure, down, norm_bound, sum_up, up
from lben.weights import ConvolutionalWeights, PooledWeights, check_gamma


def prove_convolutional(
    weights: ConvolutionalWeights, claim: Claim | None, image: tuple[int, int]
) -> LayerCertificate:
    """Prove M(Λ, γ) ⪰ 0 for kernels at every frequency of their grid, or raise; see `certify`.

    On a torus the Fourier transform makes all convolutions, and M(Λ, γ) with them, block diagonal.
    Each block is the same inequality for the symbols of W, U, C and D at one frequency. A
    zero-padded layer embeds the image into a torus of (height + k − 1) × (width + k − 1), and crops
    the result. Its M is the compression of the M of the torus, plus the positive semi-definite part
    of [D C]ᵀ[D C]/γ that the crop removes. So the proof holds for every smaller image and every
    padding. With circular padding it holds for images of exactly this size.

    Args:
        weights: float32 or float64.
        claim: γ and Λ; those of the weights when None.
        image: height and width of images; with zero padding the largest size.

    Returns:
        The certificate, for images of this size.
    """
    if min(image) < 1:
        raise ValueError(f"height and width of an image must be at least 1, got {image}")
    exact = read_exactly(weights)
    if claim is None:
        return _prove_frequencies(weights, exact, image, weights.gamma)
    claimed = replace(exact, Lambda=multiplier_of(weights, claim))
    return _prove_frequencies(weights, claimed, image, check_gamma(claim.gamma), exact)


def prove_pooled(weights: PooledWeights, claim: Claim | None = None) -> LayerCertificate:
    """Prove M(Λ, γ) ⪰ 0 for a pooled read-out, or raise; see `certify`.

    Let F = −ΛAᵀ − Cᵀ/2γ. The Schur complement of M is the Schur complement of the state without
    outputs, plus FC + CᵀFᵀ. This sum is zero if A = −CΛ⁻¹/2γ. A is rounded, so the sum is bounded
    from below by −2‖F‖‖C‖ instead. So the frequencies of the state prove the whole once this much
    is subtracted. Another claim is proved with CᵀC ⪯ ‖CΛ^(−½)‖²Λ in place of CᵀC, at every
    frequency.

    Args:
        weights: float32 or float64.
        claim: γ and Λ; those of the weights when None.

    Returns:
        The certificate, for images of the size of the weights.
    """
    if claim is not None:
        return _prove_through_state(weights, claim)
    exact = read_exactly(weights)
    proof = _prove_frequencies(weights, exact.state, weights.image, weights.gamma)
    root = Enclosure(exact.state.Lambda.numpy()[:, None]).sqrt()
    A, C = _flatten_by_channel(exact.A) * root, _flatten_by_channel(exact.C) * root.reciprocal()
    F = A if weights.gamma is None else A + C / weights.gamma / 2.0
    size, excess = _bound_frobenius_norm(C), _bound_frobenius_norm(F)
    # `margin` scales M by numbers within a factor √2 of Λ^(−½).
    excess = up(2 * excess * size * (1 + 2.0**-48))
    margin = down(proof.margin - 2 * excess)
    require(margin, lambda: proof.smallest_eigenvalue - excess, weights.gamma)
    return replace(
        proof,
        margin=margin,
        m=max(down(proof.m - excess), 0.0),
        L=up(proof.L + up(_bound_frobenius_norm(A) * size * (1 + 2.0**-48))),
        output_gain=up(size * (1 + 2.0**-48)),
    )


def _prove_through_state(weights: PooledWeights, claim: Claim) -> LayerCertificate:
    exact = read_exactly(weights)
    gamma = check_gamma(claim.gamma)
    multiplier = multiplier_of(weights, claim)
    if bool((exact.A != 0).any()):
        raise ValueError("another claim can only be proved for weights that claim no bound (A = 0)")
    root = exact.state.Lambda.sqrt()
    inverse = Enclosure(exact.state.Lambda.numpy()[:, None]).sqrt().reciprocal()
    scaled = _flatten_by_channel(exact.C) * inverse
    rows = (len(exact.C), -1)  # one row per output: few rows make the norm cheap
    gain = norm_bound(
        Enclosure(
            *(
                t.reshape(len(root), len(exact.C), -1).swapaxes(0, 1).reshape(rows)
                for t in (scaled.mid, scaled.radius)
            )
        )
    )
    # Rounding up is safe, as larger outputs have a larger bound. No entry may underflow to zero.
    outputs = torch.diag((gain * root * (1 + 2.0**-48)).clamp_min(2.0**-800))[:, :, None, None]
    state = replace(exact.state, C=outputs, b_y=root, Lambda=multiplier)
    proof = _prove_frequencies(weights, state, weights.image, gamma, exact.state)
    return replace(proof, output_gain=gain)


def _flatten_by_channel(t: Tensor) -> Enclosure:
    """Return a q × n × height × width tensor as a matrix with one row per channel n."""
    return Enclosure(t.transpose(0, 1).flatten(1).numpy())


def _bound_frobenius_norm(matrix: Enclosure) -> float:
    return up(math.sqrt(float(sum_up(matrix.magnitude**2 * (1 + 2.0**-50)))))


def _prove_frequencies(
    weights: ConvolutionalWeights | PooledWeights,
    state: ConvolutionalWeights,
    image: tuple[int, int],
    gamma: float | None,
    own: ConvolutionalWeights | None = None,
) -> LayerCertificate:
    """Prove the inequality of the state at every frequency of its grid.

    `state` and `own` are float64. `state` has the Λ of the claim, `own` the Λ in which the layer is
    solved.
    """
    blocks = at_frequencies(state, state.grid(image))
    solved = blocks if own is None else at_frequencies(own, state.grid(image))
    kind = "exactly" if state.circular else "at most"
    proof = prove(
        weights,
        gamma,
        blocks,
        solved,
        f"Cholesky of a shifted Schur complement at {len(blocks)} frequencies, verified "
        f"a posteriori in float64; images of {kind} {image[0]} × {image[1]} pixels",
    )
    return replace(proof, image=(image[0], image[1]))
