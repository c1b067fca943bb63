"""How large are the maps of a network? Norms of its matrices, and the bound that is their product.

This is the cheapest bound of a network, and what rounding errors grow by.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from lben.certificates.certificate import (
    CertificateError,
    LipschitzCertificate,
    PairCertificate,
)
from lben.rigorous import (
    TINY,
    UNIT,
    Array,
    Enclosure,
    gamma_k,
    norm_bound,
    norms_up,
    power_of_two,
    up,
)
from lben.weights.growth import add_up, times_up
from lben.weights.network import AffineMap, Matrix, Network, is_sparse, to_dense

PRODUCTS = 3e9
"""Multiplications up to which AᵀA is computed for a sparse A, a tenth of those where A is written
out: about half a minute."""


@dataclass(frozen=True, kw_only=True)
class NetworkNorms:
    """Upper bounds of norms of a network's maps: of every block, and of the output at the end.

    Attributes:
        maps: ‖W_kj‖₂ by k and j.
        sizes: ‖ |W_kj| ‖₂, of the sums of absolute products that rounding errors are relative to.
        gains: a Lipschitz constant of x ↦ z_k in l2, of k = 0 (1) to K.
        bound: a Lipschitz constant of x ↦ y in l2.
    """

    maps: tuple[Mapping[int, float], ...]
    sizes: tuple[Mapping[int, float], ...]
    gains: tuple[float, ...]
    bound: float


def network_norms(network: Network, products: float = PRODUCTS) -> NetworkNorms:
    """Bound the norms of all maps of a network.

    A change of z_j changes z_k by at most ‖W_kj‖ times the steepest slope of σ_k. So the gain of
    z_k is at most that slope times Σ_j ‖W_kj‖ · (the gain of z_j).

    Args:
        network: with numbers that may be rounded products.
        products: see `map_norm_bound`.

    Returns:
        The bounds; infinite where nothing is proved.
    """
    affine = [*(block.affine for block in network.blocks), network.output]
    maps = [{j: map_norm_bound(a, j, products) for j in a.matrices} for a in affine]
    sizes = [{j: _schur_bound(size) for j, size in a.sizes.items()} for a in affine]
    gains = [1.0]
    for k, found in enumerate(maps):
        gain = add_up(*(times_up(norm, gains[j]) for j, norm in found.items()))
        steepest = 1.0
        if k < len(network.blocks):
            activation = network.blocks[k].activation
            steepest = max(abs(activation.low), abs(activation.high))
        gains.append(times_up(gain, steepest))
    return NetworkNorms(
        maps=tuple(maps), sizes=tuple(sizes), gains=tuple(gains[:-1]), bound=gains[-1]
    )


def product_bound(network: Network) -> float:
    """Return a proved Lipschitz bound of a network in l2, from norms of its maps alone.

    For a chain it is the product of the spectral norms and of the steepest slopes.

    Args:
        network: any.

    Returns:
        The bound; infinite where none is proved.

    Example:
        >>> import numpy as np
        >>> from lben.certificates import product_bound
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> W, C = np.diag([2.0, 1.0]), np.array([[3.0, 0.0]])
        >>> hidden = Block(affine=AffineMap.of({0: W}, np.zeros(2)), activation=RELU)
        >>> network = Network(
        ...     input_shape=(2,), blocks=(hidden,), output=AffineMap.of({1: C}, np.zeros(1))
        ... )
        >>> 6.0 <= product_bound(network) < 6.000001
        True
    """
    return network_norms(network).bound


def prove_product(network: Network) -> LipschitzCertificate:
    """Return the certificate of `product_bound`.

    Args:
        network: any.

    Raises:
        CertificateError: if no finite bound is proved.
    """
    bound = product_bound(network)
    if not bound < math.inf:
        raise CertificateError("the product of the norms of the network's maps is not finite")
    return LipschitzCertificate(
        bound=max(bound, TINY), margin=None, fingerprint=network.fingerprint, dtype="float64",
        method="product of the norms of all maps, rounded upwards",
    )  # fmt: skip


def prove_product_pairs(network: Network) -> PairCertificate:
    """Return bounds of yᵢ − yⱼ for every pair of outputs: Σ_k ‖C_k,i − C_k,j‖₂ · the gain of z_k.

    Args:
        network: any.

    Returns:
        The l2 bounds of all pairs.

    Raises:
        CertificateError: if a bound is not finite.
    """
    q, gains = network.out_features, network_norms(network).gains
    bounds = np.zeros((q, q))
    for j in network.output.matrices:
        C = network.output.enclosure(j)
        for i in range(q):
            gap = (C - Enclosure(C.mid[i : i + 1], C.radius[i : i + 1])).magnitude
            bounds[i] = (bounds[i] + norms_up(gap, 1) * gains[j]) * (1 + 4 * UNIT) + 4 * TINY
    np.fill_diagonal(bounds, 1.0)
    if not np.isfinite(bounds).all():
        raise CertificateError("the product of the norms of the network's maps is not finite")
    return PairCertificate(
        bounds=tuple(tuple(map(float, row)) for row in bounds), norm="l2", margin=None,
        fingerprint=network.fingerprint, dtype="float64",
        method="differences of rows times the norms of all maps before, rounded upwards",
    )  # fmt: skip


def map_norm_bound(affine: AffineMap, block: int, products: float = PRODUCTS) -> float:
    """Return an upper bound of ‖W_j‖₂ for the exact numbers of an affine map.

    Args:
        affine: the map.
        block: j.
        products: multiplications up to which AᵀA is computed; the bound of an A that needs more is
            that of |A|.
    """
    matrix = affine.matrices[block]
    off = times_up(affine.relative_radius, _schur_bound(affine.sizes[block]))
    return add_up(_spectral_bound(matrix, products), off)


def _spectral_bound(matrix: Matrix, products: float) -> float:
    """Return an upper bound of ‖A‖₂ for the numbers as they are stored."""
    simple = _schur_bound(matrix)
    if not matrix.shape[0] or not matrix.shape[1] or _is_isometric(matrix):
        return simple
    rows, columns = sorted(matrix.shape)
    if rows**2 * columns <= 10 * products:
        return min(simple, norm_bound(Enclosure(to_dense(matrix))))
    return min(simple, _gram_bound(scipy.sparse.csr_array(matrix), products))


def _is_isometric(matrix: Matrix) -> bool:
    """Say whether rows and columns have at most one entry: then Schur's bound is the norm."""
    if not is_sparse(matrix):
        return False
    columns = np.bincount(matrix.indices, minlength=1)
    return bool(np.diff(matrix.indptr).max(initial=0) <= 1 and columns.max() <= 1)


def _schur_bound(matrix: Matrix) -> float:
    """Return √(largest row sum × largest column sum) of absolute values, rounded upwards."""
    if not matrix.shape[0] or not matrix.shape[1]:
        return 0.0
    size = abs(matrix)
    terms = sum(matrix.shape)
    rows, columns = (float(np.max(np.asarray(size.sum(axis=k)), initial=0.0)) for k in (1, 0))
    grow = 1 + 2 * gamma_k(terms)
    lost = terms * TINY  # denormal numbers that are read as zero
    return up(math.sqrt(times_up(add_up(rows * grow, lost), add_up(columns * grow, lost))), 2)


def _gram_bound(A: scipy.sparse.csr_array, products: float) -> float:
    """Return √max_i (Hv)_i / v_i, where H has the absolute values of AᵀA and v is positive.

    ‖A‖₂² is the spectral radius of AᵀA, hence at most that of H, which every v > 0 bounds (Collatz
    and Wielandt: Horn and Johnson, "Matrix analysis", Theorem 8.1.26). Where AᵀA is expensive,
    H = |A|ᵀ|A| takes its place.
    """
    if A.shape[0] < A.shape[1]:
        A = scipy.sparse.csr_array(A.T)
    unit = power_of_two(float(np.max(np.abs(A.data), initial=0.0)))
    A = A / unit
    size, gram = abs(A), None
    rows = np.diff(A.indptr).astype(np.float64)
    terms = int(np.bincount(A.indices, minlength=1).max()) + int(rows.max(initial=0.0))
    count = A.shape[1]
    if np.sum(rows**2) <= products:
        gram = abs(scipy.sparse.csr_array(A.T @ A))
        count = int(np.diff(gram.indptr).max(initial=0))

    def apply(v: Array) -> Array:
        """Return Hv, where H has the rounding of AᵀA added."""
        whole = size.T @ (size @ v)
        return np.asarray(whole if gram is None else gram @ v + 2 * gamma_k(terms + 2) * whole)

    v = np.ones(A.shape[1])
    for _ in range(30):
        v = np.maximum(apply(v), 1e-300)
        v = np.maximum(v / v.max(), 1e-6)
    # What underflows in the sums, divided by the smallest entry of v.
    lost = 16.0 * TINY * (terms + 2) * (A.shape[1] + 2) * 1e6
    ratio = apply(v) / v * (1 + 2 * gamma_k(count + terms + 6)) + lost
    return times_up(unit, up(math.sqrt(float(np.max(ratio, initial=0.0))), 2))
