"""What has been proved, and of what?

Every proved statement is a frozen record. It holds the bound, the method and the margin of the
proof, and the fingerprint of the object that it is about. It is refused for every other object.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lben import records
from lben.rigorous import up
from lben.weights import Weights, digest
from solvers import Constants


class CertificateError(RuntimeError):
    """A claimed bound could not be proved, or a certificate is of something else.

    Example:
        >>> import torch
        >>> from dataclasses import replace
        >>> from lben import EquilibriumLinear, certify
        >>> weights = EquilibriumLinear(4, 6, 2).weights()
        >>> try:
        ...     certify(replace(weights, C=10 * weights.C))
        ... except CertificateError as error:
        ...     print(str(error)[:48])
        the Lipschitz bound γ = 1 could not be proved: M
    """


def versions() -> dict[str, str]:
    """Return the versions of the libraries that run a proof."""
    return {"torch": torch.__version__, "numpy": np.__version__}


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A proved statement about something with a fingerprint.

    Attributes:
        margin: a proved lower bound (> 0) of the smallest eigenvalue that has to be positive; None
            if the proof evaluated the bound directly and compared no eigenvalue.
        fingerprint: SHA-256 of the object that the statement is about.
        dtype: the dtype in which that object runs.
        method: how it was proved.
        versions: of the libraries that ran the proof.
        image: height and width of the images that the statement holds for: exactly this size for
            circular padding, at most this size otherwise. None if it holds for every input.

    Example:
        >>> from lben import SLLLinear, certify
        >>> certificate = certify(SLLLinear(4, 6))
        >>> Certificate.from_json(certificate.to_json()) == certificate  # the kind is in the JSON
        True
    """

    margin: float | None
    fingerprint: str
    dtype: str
    method: str
    versions: dict[str, str] = field(default_factory=versions)
    image: tuple[int, int] | None = None

    def check(self, weights: Weights) -> None:
        """Refuse other weights than those of the proof, and image sizes that it does not cover.

        Args:
            weights: as they run.

        Raises:
            CertificateError: if the fingerprint or the size differs.
        """
        self.check_fingerprint(weights.fingerprint)
        size = weights.proved_size()
        if size is not None:
            self.check_image(size[0], exactly=size[1])

    def check_fingerprint(self, found: str) -> None:
        """Refuse another fingerprint than that of the proof.

        Args:
            found: fingerprint of the object at hand.

        Raises:
            CertificateError: if the fingerprints differ.
        """
        if found != self.fingerprint:
            raise CertificateError(
                "this certificate is for other weights: fingerprint "
                f"{self.fingerprint[:12]}…, weights have {found[:12]}…"
            )

    def check_image(self, found: tuple[int, int], *, exactly: bool) -> None:
        """Refuse images that the proof of a convolution does not cover.

        Args:
            found: height and width.
            exactly: whether the proof must be for exactly this size, and not for a larger one.

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

        The result is not compared with any weights: call `check` for that.

        Args:
            text: JSON of a certificate of this class or of one that extends it.

        Returns:
            The certificate.

        Raises:
            ValueError: if the text is no such certificate.
        """
        found = records.from_json(cls, text)
        found.check_values()
        return found

    def check_values(self) -> None:
        """Refuse numbers that bound nothing; a file may hold such numbers.

        Raises:
            ValueError: naming the field.
        """
        if self.margin is not None and not 0 < self.margin < math.inf:
            raise ValueError(f"this is no {type(self).__name__}: margin must be a positive number")


@dataclass(frozen=True, kw_only=True)
class LipschitzCertificate(Certificate):
    """The statement that x ↦ y is γ-Lipschitz in l2.

    A module that you wrote, and that proves its bound in another way, returns this class.

    Attributes:
        bound: γ; infinite if only the existence and uniqueness of y is proved.

    Example:
        >>> from lben import EquilibriumLinear, certify
        >>> certificate = certify(EquilibriumLinear(4, 6, 2, gamma=3.0))
        >>> certificate.bound, certificate.margin > 0
        (3.0, True)
        >>> LipschitzCertificate.from_json(certificate.to_json()) == certificate
        True
    """

    bound: float

    def check_values(self) -> None:
        """Refuse numbers that bound nothing; the bound must be positive."""
        _check_positive(type(self), bound=self.bound)
        super().check_values()


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Proved gains from errors inside one equilibrium layer to z and y; states in the Λ norm.

    Attributes:
        input_to_state: bound of the change of z per l2 change of x.
        drive_to_state: bound of the change of z per change of v.
        drive_to_output: bound of the l2 change of Cz per change of v.
        residual_to_state: bound of ‖z̃ − z*‖ per residual ‖z̃ − z‖, where z̃ = σ(Wz + v).
        residual_to_output: bound of ‖C(z̃ − z*)‖₂ per residual.
        state_to_output: ‖CΛ^(−½)‖₂.

    Example:
        >>> from lben import EquilibriumLinear
        >>> EquilibriumLinear(4, 6, 2).certificate().sensitivity.effective_m > 0
        True
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
class LayerCertificate(LipschitzCertificate):
    """A statement about one set of weights, with the constants that a solver of the layer needs.

    Attributes:
        margin: as in `Certificate`, of a matrix that is positive definite if and only if M(Λ, γ) is
            (`Inequality.margin`).
        smallest_eigenvalue: computed smallest eigenvalue of M(Λ, γ), or of 2Λ − ΛW − WᵀΛ when
            there is no bound; for information, not used in any proof.
        m: proved lower bound of the strong monotonicity of I − W in the Λ norm; 1 for W = 0.
        L: proved upper bound of ‖I − W‖ in the Λ norm; 1 for W = 0.
        output_gain: proved upper bound of ‖CΛ^(−½)‖₂, the error of y per error of z.
        fingerprint: of the weights, see `Weights.fingerprint`.
        sensitivity: gains from errors inside an equilibrium layer; None if they were not proved.

    Example:
        >>> from lben import EquilibriumLinear, certify
        >>> certificate = certify(EquilibriumLinear(4, 6, 2, epsilon=0.1))
        >>> certificate.m >= 0.1 * (1 - 1e-4), certificate.L > certificate.m
        (True, True)
    """

    margin: float
    smallest_eigenvalue: float
    m: float
    L: float
    output_gain: float
    sensitivity: Sensitivity | None = None

    @property
    def constants(self) -> Constants:
        """The proved (m, L) as a solver takes them."""
        return Constants(m=self.m, L=self.L)

    def check_values(self) -> None:
        """Refuse numbers that bound nothing; m must be at least 0."""
        if not 0 <= self.m < math.inf:
            raise ValueError(f"this is no {type(self).__name__}: m must be a number of at least 0")
        super().check_values()


@dataclass(frozen=True, kw_only=True)
class PairCertificate(Certificate, Sequence[tuple[float, ...]]):
    """Proved bounds of yᵢ − yⱼ for every pair of outputs: a q × q table.

    It is indexed and iterated like the table: `pairs[0][1]` is the bound of y₀ − y₁.
    `margin_radius` and `compose` accept it.

    Attributes:
        margin: the smallest margin of all pairs.
        bounds: q × q, with 1 on the diagonal.
        norm: the norm in which the bounds measure Δx: "l2", or "linf" for max |Δxₖ|.

    Example:
        >>> from lben import EquilibriumLinear, certify, tighten_pairs
        >>> weights = EquilibriumLinear(4, 6, 3).weights()
        >>> pairs = certify(weights, tighten_pairs(weights))
        >>> len(pairs), pairs[0][1] == pairs[1][0], pairs.tensor().shape
        (3, True, torch.Size([3, 3]))
    """

    bounds: tuple[tuple[float, ...], ...]
    norm: str

    @classmethod
    def of(
        cls,
        weights: Weights,
        bounds: Sequence[Sequence[float]],
        norm: str,
        method: str,
        margin: float | None,
    ) -> PairCertificate:
        """Return the certificate of the bounds of all pairs, tied to the weights."""
        return cls(
            bounds=tuple(tuple(map(float, row)) for row in bounds), norm=norm, margin=margin,
            fingerprint=weights.fingerprint, dtype=name_of_dtype(weights), method=method,
        )  # fmt: skip

    @property
    def largest(self) -> float:
        """The largest bound of a pair; 1 for a single output."""
        pairs = (b for i, row in enumerate(self.bounds) for j, b in enumerate(row) if i != j)
        return max(pairs, default=1.0)

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

    def scale(self, factor: float) -> PairCertificate:
        """Return the bounds in terms of the input of a preceding map that is factor-Lipschitz."""
        if factor == 1:
            return self
        bounds = tuple(tuple(up(factor * b) for b in row) for row in self.bounds)
        return replace(self, bounds=bounds)

    def check_values(self) -> None:
        """Refuse numbers that bound nothing, and a table that is not square."""
        if self.norm not in ("l2", "linf"):
            raise ValueError(f"this is no {type(self).__name__}: norm must be l2 or linf")
        _check_table(type(self), bounds=self.bounds)
        super().check_values()


@dataclass(frozen=True, kw_only=True)
class LocalCertificate(Certificate):
    """The statement that a label cannot change within a radius of one input.

    Attributes:
        margin: the smallest margin of the proofs; None if the bound for all inputs was enough.
        fingerprint: of weights, activation and normalisation, see `network_fingerprint`.
        radius: in l2, in the unit of raw inputs.
        label: the index of the label among the logits.
        point: SHA-256 of the operating point, see `OperatingPoints.digest`.
        box: whether the statement holds for inputs in [0, 1] only.
        running: whether it also holds for the network as it runs, not only for the exact network.

    Example:
        >>> import torch
        >>> from lben import EquilibriumClassifierConfig
        >>> _ = torch.manual_seed(0)
        >>> model = EquilibriumClassifierConfig(
        ...     shape=(1, 2, 2), classes=2, mean=(0.5,), std=(0.5,), hidden=4
        ... ).build().double()
        >>> x, certificate = torch.rand(1, 1, 2, 2).double(), model.certificate()
        >>> certifier = model.local_certifier(certificate)
        >>> points = model.operating_points(x, certificate, certifier)
        >>> (proof,) = certifier.certify(points, model(x).argmax(1), 1e-6)
        >>> proof.radius, proof.running
        (1e-06, True)
    """

    radius: float
    label: int
    point: str
    box: bool
    running: bool


@dataclass(frozen=True, kw_only=True)
class ChainCertificate(LipschitzCertificate):
    """The bound of modules one after the other: the product of theirs, rounded upwards.

    Attributes:
        margin: the smallest margin of the modules.
        fingerprint: SHA-256 of the modules' certificates in order.
        layers: the modules' certificates, first to last. An inner chain has a `ChainCertificate`.
        pairs: bounds of yᵢ − yⱼ in terms of the chain's input; None if no pairs were proved, so
            that √2·bound has to serve for every pair.
        network: fingerprint of the whole network: its modules in order with their settings and
            tensors, image size and dtype. None if `compose` was called without a network.

    Example:
        >>> from lben import LipschitzSequential, SLLLinear
        >>> chain = LipschitzSequential(SLLLinear(4, 6), SLLLinear(4, 6))
        >>> certificate = chain.certificate((4,))
        >>> len(certificate.layers), round(certificate.bound, 4)
        (2, 1.0)
    """

    layers: tuple[LipschitzCertificate, ...]
    pairs: PairCertificate | None = None
    network: str | None = None

    def check_network(self, network: str) -> None:
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

    def leaves(self) -> list[LipschitzCertificate]:
        """Return the certificates of the modules that are no chains, in order."""
        inner = (x.leaves() if isinstance(x, ChainCertificate) else [x] for x in self.layers)
        return [certificate for part in inner for certificate in part]

    def radius_bound(self) -> float | PairCertificate:
        """Return the bound that `margin_radius` divides by: of every pair, else of all of y."""
        return self.bound if self.pairs is None else self.pairs

    def check_values(self) -> None:
        """Refuse numbers that bound nothing, in the certificate of every module."""
        for layer in (*self.layers, *(() if self.pairs is None else (self.pairs,))):
            layer.check_values()
        super().check_values()

    def differences(self, proved: ChainCertificate) -> str:
        """Say in one line how the network of this certificate differs from another's.

        Modules are compared by fingerprint, dtype and image size; bounds and proofs may differ.

        Args:
            proved: the other certificate.

        Returns:
            One line about the first difference; empty text if there is none.
        """
        ours, theirs = self.leaves(), proved.leaves()
        if len(ours) != len(theirs):
            return f"it has {len(ours)} modules, the model {len(theirs)}"
        for index, (own, new) in enumerate(zip(ours, theirs, strict=True)):
            for name in ("dtype", "image", "fingerprint"):
                mine, other = getattr(own, name), getattr(new, name)
                if mine != other:
                    return (
                        f"module {index} has {name} {_shorten(mine)}, the model's {_shorten(other)}"
                    )
        return "the network differs" if self.network != proved.network else ""

    def shortfall(self, claimed: ChainCertificate, slack: float = 0.0) -> str:
        """Say in one line which bound of another certificate is smaller than the bound proved here.

        Args:
            claimed: another certificate of the same network.
            slack: by which share a bound may be smaller than the one proved here.

        Returns:
            One line about the first such bound; empty text if there is none.
        """
        claims = [("the bound", claimed.bound, self.bound)]
        for index, (theirs, own) in enumerate(zip(claimed.leaves(), self.leaves(), strict=True)):
            claims.append((f"the bound of module {index}", theirs.bound, own.bound))
        if self.pairs and claimed.pairs and len(self.pairs) != len(claimed.pairs):
            return f"it is of {len(claimed.pairs)} outputs, and there are {len(self.pairs)}"
        any_pair = up(up(math.sqrt(2.0)) * self.bound)
        for i, row in enumerate(claimed.pairs or ()):
            for j, bound in enumerate(row):
                if i != j:
                    shown = min(any_pair, self.pairs[i][j]) if self.pairs else any_pair
                    claims.append((f"the bound of the outputs {i} and {j}", bound, shown))
        for name, bound, shown in claims:
            if not shown <= bound * (1 + slack):
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


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"


def compose(
    layers: Sequence[LipschitzCertificate], pairs: PairCertificate | None = None
) -> ChainCertificate:
    """Bound modules one after the other by the product of their bounds.

    Args:
        layers: certificates of the modules, first to last.
        pairs: proved bounds of yᵢ − yⱼ in terms of the input of the last module.

    Returns:
        The product of the bounds, rounded upwards, with the certificates of the modules.

    Raises:
        CertificateError: if the pairs are of other weights than the last layer's, or not in l2.
        TypeError: if a layer or the pairs are no certificate of their kind.

    Example:
        >>> from lben import SLLLinear, certify
        >>> proofs = [certify(SLLLinear(4, 6)) for _ in range(3)]
        >>> round(compose(proofs).bound, 4)
        1.0
    """
    for layer in layers:
        if not isinstance(layer, LipschitzCertificate):
            raise TypeError(
                f"compose takes certificates of modules, got {type(layer).__name__}: a bound that "
                "is proved elsewhere needs a LipschitzCertificate"
            )
    if pairs is not None:
        if not isinstance(pairs, PairCertificate):
            raise TypeError(f"pairs must be a PairCertificate, got {type(pairs).__name__}")
        _check_pairs(layers, pairs)
    bound = before = 1.0
    for layer in layers:
        before, bound = bound, _product(bound, layer.bound)
    margins = [layer.margin for layer in layers if layer.margin is not None]
    return ChainCertificate(
        bound=bound,
        margin=min(margins, default=None),
        fingerprint=digest("\n".join(layer.fingerprint for layer in layers), {}),
        dtype=layers[-1].dtype if layers else "float64",
        method=f"product of the bounds of {len(layers)} modules",
        layers=tuple(layers),
        pairs=None if pairs is None else pairs.scale(before),
    )


def _product(a: float, b: float) -> float:
    """Return a product of bounds, rounded upwards; a product with 1 is exact."""
    if a == 1 or b == 1:
        return b if a == 1 else a
    return up(a * b)


def _check_pairs(layers: Sequence[LipschitzCertificate], pairs: PairCertificate) -> None:
    if pairs.norm != "l2":
        raise CertificateError(
            f"bounds of pairs in {pairs.norm} do not compose with bounds in l2: claim pairs by "
            "Claim"
        )
    if not layers or pairs.fingerprint != layers[-1].fingerprint:
        last = layers[-1].fingerprint[:12] if layers else "none"
        raise CertificateError(
            "the bounds of pairs are for other weights than the last layer: fingerprint "
            f"{pairs.fingerprint[:12]}…, the last layer has {last}…"
        )


def name_of_dtype(weights: Weights) -> str:
    """Return the name of the dtype of weights, such as "float32"."""
    return str(next(iter(weights.tensors().values())).dtype).removeprefix("torch.")
