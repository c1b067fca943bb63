"""What has been proved, and about which weights?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self, overload

import torch
from jaxtyping import Float
from torch import Tensor

from lben import records
from lben.rigorous import up
from lben.weights import ConvolutionalWeights, DenseWeights, PooledWeights
from solvers import Constants

AnyWeights = DenseWeights | ConvolutionalWeights | PooledWeights


class CertificateError(RuntimeError):
    """A claimed bound could not be proved."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Proved bounds of what errors within one equilibrium layer do, all states in the Λ norm.

    Attributes:
        input_to_state: of the change of z per l2 change of x.
        drive_to_state: of the change of z per change of v.
        drive_to_output: of the l2 change of Cz per change of v.
        residual_to_state: of ‖z̃ − z*‖ per residual ‖z̃ − z‖, where z̃ = σ(Wz + v).
        residual_to_output: of ‖C(z̃ − z*)‖₂ per residual.
        state_to_output: ‖CΛ^(−½)‖₂.
    """

    input_to_state: float
    drive_to_state: float
    drive_to_output: float
    residual_to_state: float
    residual_to_output: float
    state_to_output: float

    @property
    def effective_m(self) -> float:
        """The m for which ‖CΛ^(−½)‖/m bounds the change of Cz per change of v."""
        return self.state_to_output / self.drive_to_output if self.drive_to_output else math.inf


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
        fingerprint: of the weights, see `DenseWeights.fingerprint`.
        dtype: of the weights as given.
        method: how it was proved.
        versions: library versions that ran the proof.
        image: height and width that the proof of a convolution is for: exactly these where it is
            circular, at most these where it is not; None for a dense layer.
        sensitivity: what errors within an equilibrium layer do, where that was asked for.
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
    sensitivity: Sensitivity | None = None

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
        """Return the certificate as JSON; null for an infinite bound."""
        return records.to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the certificate that `to_json` wrote.

        It says what was proved, and nothing about the weights at hand: see `check`.

        Raises:
            ValueError: if the text is no such certificate.
        """
        found = records.from_json(cls, text)
        if not (math.isfinite(found.margin) and math.isfinite(found.m)):
            raise ValueError("this is no Certificate: margin and m must be numbers")
        _check_positive(cls, bound=found.bound)
        return found


@dataclass(frozen=True, kw_only=True)
class PairCertificate(Sequence[tuple[float, ...]]):
    """Proved bounds of yᵢ − yⱼ for every pair of outputs: a q × q table, and what it is about.

    It is indexed and iterated like the table, so that `pairs[0][1]` is the bound of y₀ − y₁, and
    `certified_radius` and `compose` take it as it is.

    Attributes:
        bounds: q × q, with 1 on the diagonal.
        norm: of the change of x that the bounds multiply: "l2", or "linf" for max |Δxₖ|.
        fingerprint: of the weights, see `DenseWeights.fingerprint`.
        dtype: of the weights as given.
        method: how it was proved.
    """

    bounds: tuple[tuple[float, ...], ...]
    norm: str
    fingerprint: str
    dtype: str
    method: str

    def __len__(self) -> int:
        return len(self.bounds)

    @overload
    def __getitem__(self, index: int) -> tuple[float, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[float, ...], ...]: ...
    def __getitem__(self, index: int | slice) -> tuple[float, ...] | tuple[tuple[float, ...], ...]:
        return self.bounds[index]

    def tensor(self) -> Float[Tensor, "q q"]:
        """Return the bounds in float64, on the CPU."""
        return torch.tensor(self.bounds, dtype=torch.float64, device="cpu")

    def to_json(self) -> str:
        """Return the certificate as JSON; null for an infinite bound."""
        return records.to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the certificate that `to_json` wrote.

        Raises:
            ValueError: if the text is no such certificate.
        """
        found = records.from_json(cls, text)
        if found.norm not in ("l2", "linf"):
            raise ValueError(f"this is no {cls.__name__}: norm must be l2 or linf")
        _check_table(cls, bounds=found.bounds)
        return found


@dataclass(frozen=True, kw_only=True)
class NetworkCertificate:
    """The bound of a chain: preprocessing, then layers, in raw input units.

    Attributes:
        bound: product of `input_gain` and the layers' bounds, rounded upwards.
        input_gain: Lipschitz constant of the preprocessing (1/deviation for a normalisation).
        layers: the layers' certificates, first to last.
        pairs: proved bounds of yᵢ − yⱼ, classes × classes, in raw input units; None where only
            the √2·bound of all of y is known.
        network: fingerprint of the network that this is about: its layers in order, normalisation,
            image size and dtype. None for a chain that `compose` was given by hand.
    """

    bound: float
    input_gain: float
    layers: tuple[Certificate, ...]
    pairs: tuple[tuple[float, ...], ...] | None = None
    network: str | None = None

    def check(self, network: str) -> None:
        """Refuse another network than that of the proof.

        Raises:
            CertificateError: if the fingerprint differs.
        """
        if network != self.network:
            raise CertificateError(
                "this certificate is for another network (layers and their order, normalisation, "
                f"image size, dtype): fingerprint {(self.network or 'none')[:12]}…, this one has "
                f"{network[:12]}…"
            )

    def radius_bound(self) -> float | Tensor:
        """Return what `certified_radius` divides by: the pairs' bounds, else that of all of y."""
        if self.pairs is None:
            return self.bound
        return torch.tensor(self.pairs, dtype=torch.float64, device="cpu")

    def to_json(self) -> str:
        """Return the certificate as JSON; null for an infinite bound."""
        return records.to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the certificate that `to_json` wrote.

        Raises:
            ValueError: if the text is no such certificate.
        """
        found = records.from_json(cls, text)
        _check_positive(cls, bound=found.bound, input_gain=found.input_gain)
        for layer in found.layers:
            _check_positive(cls, **{"bound of a layer": layer.bound})
        if found.pairs is not None:
            _check_table(cls, pairs=found.pairs)
        return found

    def differences(self, proved: NetworkCertificate) -> str:
        """Say in one line how the network of this certificate differs from another's.

        Layers are compared by fingerprint and dtype, preprocessing by its gain; bounds and proofs
        may differ.

        Returns:
            What differs, or nothing.
        """
        if len(self.layers) != len(proved.layers):
            return f"it has {len(self.layers)} layers, the model {len(proved.layers)}"
        for index, (kept, new) in enumerate(zip(self.layers, proved.layers, strict=True)):
            for name in ("dtype", "image", "fingerprint"):
                mine, other = getattr(kept, name), getattr(new, name)
                if mine != other:
                    return f"layer {index} has {name} {_short(mine)}, the model's {_short(other)}"
        if self.input_gain != proved.input_gain:
            return f"its input gain is {self.input_gain:g}, the model's {proved.input_gain:g}"
        known = {f.name for f in fields(self)}
        for name in known - {"bound", "input_gain", "layers", "pairs"}:  # of the whole network
            if getattr(self, name) != getattr(proved, name):
                return f"the {name} differs"
        return ""

    def shortfall(self, claimed: NetworkCertificate, room: float = 0.0) -> str:
        """Say in one line what another certificate of the same network claims beyond this one.

        Args:
            claimed: the other one.
            room: by which share of a bound it may lie below this one's.

        Returns:
            The first bound of it that this one does not show, or nothing.
        """
        claims = [("the bound", claimed.bound, self.bound)]
        for index, (theirs, own) in enumerate(zip(claimed.layers, self.layers, strict=True)):
            claims.append((f"the bound of layer {index}", theirs.bound, own.bound))
        if self.pairs and claimed.pairs and len(self.pairs) != len(claimed.pairs):
            return f"it is of {len(claimed.pairs)} outputs, and there are {len(self.pairs)}"
        any_pair = up(up(math.sqrt(2.0)) * self.bound)
        for i, row in enumerate(claimed.pairs or ()):
            for j, bound in enumerate(row):
                if i != j:
                    shown = min(any_pair, self.pairs[i][j]) if self.pairs else any_pair
                    claims.append((f"the bound of the outputs {i} and {j}", bound, shown))
        for name, bound, shown in claims:
            if not shown <= bound * (1 + room):
                return f"it claims {bound:.9g} as {name}, and only {shown:.9g} was proved"
        return ""


def _check_positive(cls: type, **values: float) -> None:
    """Refuse numbers of a certificate that bound nothing: NaN, 0 and below."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"this is no {cls.__name__}: {name} must be positive, got {value}")


def _check_table(cls: type, **tables: Sequence[Sequence[float]]) -> None:
    """Refuse tables that are not square, or with a number that bounds nothing."""
    for name, rows in tables.items():
        if any(len(row) != len(rows) for row in rows):
            raise ValueError(f"this is no {cls.__name__}: {name} must be a square table")
        for bound in (bound for row in rows for bound in row):
            _check_positive(cls, **{name: bound})


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"


def compose(
    layers: Sequence[Certificate],
    input_gain: float = 1.0,
    pairs: PairCertificate | Sequence[Sequence[float]] | None = None,
) -> NetworkCertificate:
    """Bound a chain of layers behind a preprocessing step by the product of their bounds.

    Args:
        layers: first to last.
        input_gain: Lipschitz constant of the preprocessing.
        pairs: proved bounds of yᵢ − yⱼ as functions of what the last layer takes.

    Raises:
        CertificateError: if the pairs are of other weights than the last layer's, or not in l2.
    """
    if isinstance(pairs, PairCertificate):
        if pairs.norm != "l2":
            raise CertificateError(
                f"bounds of pairs in {pairs.norm} do not compose with bounds in l2: take "
                "certify_pairs"
            )
        if not layers or pairs.fingerprint != layers[-1].fingerprint:
            last = layers[-1].fingerprint[:12] if layers else "none"
            raise CertificateError(
                "the bounds of pairs are for other weights than the last layer: fingerprint "
                f"{pairs.fingerprint[:12]}…, the last layer has {last}…"
            )
    bound = before = input_gain
    for layer in layers:
        before, bound = bound, up(bound * layer.bound)
    scaled = (
        None if pairs is None else tuple(tuple(up(before * float(b)) for b in row) for row in pairs)
    )
    return NetworkCertificate(
        bound=bound, input_gain=input_gain, layers=tuple(layers), pairs=scaled
    )


@dataclass(frozen=True, eq=False)
class Claim:
    """What is to be proved: a bound and the multiplier that is said to show it.

    Attributes:
        gamma: γ, or None for well-posedness alone.
        Lambda: the multiplier Λ in M(Λ, γ), n positive numbers.
    """

    gamma: float | None
    Lambda: Float[Tensor, " n"]
