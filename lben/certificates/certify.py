"""Is a claimed bound true? `certify` proves it for weights of every kind and for modules.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Protocol, overload, runtime_checkable

from lben.certificates.certificate import (
    Certificate,
    LayerCertificate,
    LipschitzCertificate,
    PairCertificate,
)
from lben.certificates.claims import Claim, IntervalClaim, LinfClaim
from lben.certificates.convolutional import prove_convolutional, prove_pooled
from lben.certificates.dense import prove_dense
from lben.certificates.linf import prove_by_intervals, prove_linf
from lben.certificates.network import NetworkClaim, prove_network, prove_network_pairs
from lben.certificates.pairs import prove_pairs
from lben.weights import ConvolutionalWeights, DenseWeights, PooledWeights, Weights
from lben.weights.network import Network
from lben.weights.sizes import image_size

PairClaims = Mapping[tuple[int, int], Claim] | Mapping[tuple[int, int], LinfClaim]
"""A claim for every pair of outputs i < j."""
NetworkPairClaims = Mapping[tuple[int, int], NetworkClaim]
"""The same for networks."""
AnyClaim = Claim | PairClaims | IntervalClaim | NetworkClaim | NetworkPairClaims
"""What `certify` may be asked to prove."""


@runtime_checkable
class Certifiable(Protocol):
    """An object that proves its own bound: a layer, a chain, a classifier, a module you wrote.

    Example:
        >>> from lben import SLLLinear, certify
        >>> round(certify(SLLLinear(4, 6)).bound, 4)  # a layer is one
        1.0
    """

    def certificate(self, image: tuple[int, ...] | None = None) -> LipschitzCertificate:
        """Prove a Lipschitz bound and return it with its proof."""
        ...


@overload
def certify(
    thing: Weights, claim: Claim | None = None, *, image: tuple[int, int] | None = None
) -> LayerCertificate: ...
@overload
def certify(thing: Weights, claim: PairClaims | IntervalClaim) -> PairCertificate: ...
@overload
def certify(thing: Network, claim: NetworkClaim | None = None) -> LipschitzCertificate: ...
@overload
def certify(thing: Network, claim: NetworkPairClaims) -> PairCertificate: ...
@overload
def certify(
    thing: Certifiable, *, image: tuple[int, ...] | None = None
) -> LipschitzCertificate: ...
def certify(
    thing: Weights | Network | Certifiable,
    claim: AnyClaim | None = None,
    *,
    image: tuple[int, ...] | None = None,
) -> Certificate:
    """Prove a Lipschitz bound of weights as they are stored, or of a module as it is, or raise.

    For weights, this proves M(Λ, γ) ⪰ 0 (`Inequality`) in float64, with every rounding enclosed:
    Revay, Wang and Manchester (2020), Theorems 1 and 2; D as in recurrent equilibrium networks
    (Revay, Wang and Manchester 2023). The certificate also holds m, L and the output gain. They are
    proved for the weights' own Λ, the metric in which the layer is solved. A feed-forward network
    is proved block after block (lben/certificates/network.py). A module proves its own bound by its
    method `certificate`.

    Args:
        thing: weights of any kind, a `Network`; or a layer, a chain or a classifier.
        claim: for weights; their own γ and Λ when omitted. A `Claim` is about all outputs: with γ
            None it says that the equilibrium exists and is unique (2Λ − ΛW − WᵀΛ ≻ 0), and the
            bound is infinite. A mapping has one `Claim`, or one `LinfClaim`, for every pair of
            outputs. An `IntervalClaim` asks for bounds of all pairs by intervals. For a network, a
            `NetworkClaim`, or a mapping with one for every pair; the multipliers that
            `prove_network` names when omitted.
        image: height and width of images; for a module, the shape of one sample serves too. It may
            be omitted for weights that have an image size and for modules built for one size.

    Returns:
        A `LayerCertificate` of all outputs of weights, a `PairCertificate` of pairs of outputs, or
        what the module returns.

    Raises:
        ValueError: if a claim does not fit (γ not positive and finite, another size, a pair without
            a claim), an image size is missing or too small, or the weights are neither float32 nor
            float64.
        CertificateError: if the proof fails, with the smallest eigenvalue found.
        TypeError: if `thing` is neither weights nor such a module, or an image size is no pair of
            integers.

    Example:
        >>> from lben import EquilibriumLinear, SLLConv2d, tighten_pairs
        >>> layer = EquilibriumLinear(4, 6, 3, gamma=2.0)
        >>> certify(layer).bound
        2.0
        >>> weights = layer.weights()
        >>> pairs = certify(weights, tighten_pairs(weights))
        >>> len(pairs), pairs.largest < 2.0 * 2**0.5
        (3, True)
        >>> round(certify(SLLConv2d(3, 5), image=(8, 8)).bound, 4)
        1.0
    """
    if isinstance(thing, Network):
        return _certify_network(thing, claim, image)
    if isinstance(thing, Weights):
        return _certify_weights(thing, claim, None if image is None else image_size(image))
    if not hasattr(thing, "certificate"):
        raise TypeError(
            "certify takes weights, networks, layers, chains and classifiers, got "
            f"{type(thing).__name__}: give it a method certificate(image=None) that returns a "
            "Certificate, write its weights as DenseWeights, or take from_torch"
        )
    if claim is not None:
        raise TypeError(
            "a claim is about weights: take certify(layer.weights(), claim), or the bound of a "
            'classifier by certificate(bound="...")'
        )
    return thing.certificate() if image is None else thing.certificate(image)


def _certify_network(
    network: Network, claim: object, image: tuple[int, ...] | None
) -> LipschitzCertificate | PairCertificate:
    if image is not None:
        raise ValueError(f"a network is built for inputs of {network.input_shape}: omit image")
    if claim is None or isinstance(claim, NetworkClaim):
        return prove_network(network, claim)
    if isinstance(claim, Mapping) and all(isinstance(c, NetworkClaim) for c in claim.values()):
        return prove_network_pairs(network, claim)
    raise TypeError(
        f"a network is proved with a NetworkClaim, or with one for every pair of outputs, got "
        f"{type(claim).__name__}: propose one by lben.tightening.network.tighten_network"
    )


def _certify_weights(
    weights: Weights,
    claim: AnyClaim | None,
    image: tuple[int, int] | None,
) -> Certificate:
    if claim is None or isinstance(claim, Claim):
        return _prove(weights, claim, image)
    if not isinstance(weights, DenseWeights):
        raise ValueError(
            f"pairs of outputs are proved for DenseWeights, got {type(weights).__name__}: take its "
            "matrices by dense(...)"
        )
    if isinstance(claim, IntervalClaim):
        return prove_by_intervals(weights)
    if not isinstance(claim, Mapping):
        raise TypeError(f"no such claim: {type(claim).__name__}")
    if any(isinstance(c, LinfClaim) for c in claim.values()):
        return prove_linf(weights, {k: c for k, c in claim.items() if isinstance(c, LinfClaim)})
    return prove_pairs(weights, {k: c for k, c in claim.items() if isinstance(c, Claim)})


@singledispatch
def _prove(
    weights: Weights, claim: Claim | None, image: tuple[int, int] | None
) -> LayerCertificate:
    raise TypeError(f"no proof is known for {type(weights).__name__}")


@_prove.register
def _(
    weights: DenseWeights, claim: Claim | None, image: tuple[int, int] | None
) -> LayerCertificate:
    return prove_dense(weights, claim)


@_prove.register
def _(
    weights: ConvolutionalWeights, claim: Claim | None, image: tuple[int, int] | None
) -> LayerCertificate:
    if image is None:
        if weights.geometry is None:
            raise ValueError(
                "a convolution is proved for a size: certify(..., image=(height, width))"
            )
        image = weights.geometry.grid
    return prove_convolutional(weights, claim, image)


@_prove.register
def _(
    weights: PooledWeights, claim: Claim | None, image: tuple[int, int] | None
) -> LayerCertificate:
    if image is not None and image != weights.image:
        raise ValueError(f"the weights are for images of {weights.image}, got {image}")
    return prove_pooled(weights, claim)
