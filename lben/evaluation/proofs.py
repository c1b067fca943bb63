"""How many images does each proof certify, at which cost, and how many resist attacks?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lben.certificates import ChainCertificate, IntervalClaim, PairCertificate, certify
from lben.data import Dataset, pixels
from lben.evaluation.accuracy import environment
from lben.evaluation.attacks import apgd_l2, pgd_l2
from lben.evaluation.attacks.common import differentiating
from lben.models import CertifiedLogits, Classifier, EquilibriumClassifier, Promise
from lben.parallel import ALONE, Processes
from lben.progress import Progress, track
from lben.radii.error_bounds import Affine
from lben.radii.local import LocalCertifier, OperatingPoints
from lben.radii.margin import margin_radius, pair_bounds
from lben.records import from_json, to_plain
from lben.rigorous import up
from lben.tightening import tighten_linf
from lben.values import check_tol, conform

TEXTBOOK = "textbook, not sound"
LOCAL, PIXELS = "local", "local, in [0, 1]"


@dataclass(frozen=True, kw_only=True)
class CertificationConfig:
    """The configuration of a certification: images, radii, proofs and attacks.

    Attributes:
        radii: in the l2 norm of pixels on [0, 1].
        linf_radii: in the l∞ norm, the most that any pixel changes.
        samples: number of test images, from the first one on. A proof around one image takes about
            half a second if pixels stay in [0, 1]; the table says how long all images would take.
        tol: relative tolerance of the solver; the model's own when None.
        promise: "running": the model as it runs gives the label at every image of the ball; or
            "exact": the exact network of the same weights does.
        local: whether proofs around single images are tried, where the model has them.
        attack_steps: of PGD and of APGD.
        attack_restarts: runs of each.
        seed: of the attacks.

    Raises:
        ValueError: naming the field, what it must be, and what was given.

    Example:
        >>> CertificationConfig(radii=(0.5, 1.0), local=False).samples
        40
    """

    radii: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    linf_radii: tuple[float, ...] = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
    samples: int = 40
    tol: float | None = None
    promise: Promise = "running"
    local: bool = True
    attack_steps: int = 40
    attack_restarts: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        conform(self)
        for name in ("radii", "linf_radii"):
            radii = getattr(self, name)
            if not radii or not all(0 < r < math.inf for r in radii):
                raise ValueError(f"{name} must be positive and finite, got {radii}")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int | float) and f.name not in ("local", "seed") and not value > 0:
                raise ValueError(f"{f.name} must be positive, got {value}")
        check_tol(self.tol)


@dataclass(frozen=True, kw_only=True)
class Method:
    """The result of one way of certifying.

    Attributes:
        name: the bound (see `Classifier.certificate`); or "local", or the same for images in [0, 1]
            only; or the textbook rule, which subtracts nothing for solver and rounding errors and
            is listed for comparison.
        bound: Lipschitz bound of all logits, from pixels. For local proofs it is the bound for all
            inputs that they start from. In the l∞ norm it is the largest bound of a pair of logits.
        certified: share of the images certified at each radius.
        seconds: of the proof, in the slowest process.
        seconds_per_image: time for the images without attacks, in the slowest process, divided by
            the number of images of all processes.

    Example:
        >>> Method(
        ...     name="scaled", bound=5.0, certified=(0.4,), seconds=0.5, seconds_per_image=0.002
        ... ).certified
        (0.4,)
    """

    name: str
    bound: float
    certified: tuple[float, ...]
    seconds: float
    seconds_per_image: float


@dataclass(frozen=True, kw_only=True)
class Certification:
    """Certified accuracy by method and radius, and the accuracy that attacks leave.

    Attributes:
        data: name of the data set.
        samples: test images, the first so many.
        available: test images that there are.
        radii: in the l2 norm of pixels on [0, 1].
        clean_accuracy: share classified correctly.
        dtype: that the network runs in.
        tol: relative tolerance of its solver; None where it has none.
        methods: from cheap to expensive; local proofs try the images that the others do not
        certify.
        attacked: share that no attack broke, at each radius.
        violations: images broken within a certified radius. Anything but 0 is a defect.
        in_linf: the same in the l∞ norm, for the radii that the configuration names.
        seconds: of the whole certification, in the first process.
        config: of the certification.
        environment: versions and hardware.

    Example:
        >>> Certification.from_json("{}")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: this is no Certification: ...
    """

    data: str
    samples: int
    available: int
    radii: tuple[float, ...]
    clean_accuracy: float
    dtype: str
    tol: float | None
    methods: tuple[Method, ...]
    attacked: tuple[float, ...]
    violations: int
    in_linf: tuple[Method, ...]
    seconds: float
    config: CertificationConfig
    environment: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """Return plain values, ready for strict JSON: None where a number is not finite."""
        values: dict[str, object] = to_plain(self)
        return values

    @classmethod
    def from_json(cls, text: str) -> Certification:
        """Return the comparison that certification.json holds; null where a number was infinite.

        Raises:
            ValueError: if it holds none.
        """
        return from_json(cls, text)

    @property
    def seconds_of_all(self) -> float:
        """Seconds for all test images, if each takes as long as the images of this run."""
        proofs = sum(m.seconds for m in (*self.methods, *self.in_linf))
        images = max(self.seconds - proofs, 0.0)
        return min(proofs, self.seconds) + images * self.available / self.samples

    @property
    def sound(self) -> tuple[Method, ...]:
        """The methods that prove something."""
        return tuple(m for m in self.methods if m.name != TEXTBOOK)

    @property
    def best(self) -> tuple[float, ...]:
        """The largest certified share at each radius."""
        return tuple(max(column) for column in zip(*(m.certified for m in self.sound), strict=True))


@differentiating
def evaluate_certificates(
    model: Classifier, data: Dataset, config: CertificationConfig, team: Processes = ALONE
) -> tuple[ChainCertificate, Certification]:
    """Certify test images by every bound that the model has, and attack them.

    Args:
        model: on any device; it is certified on the CPU.
        data: whose test images are used.
        config: of the certification.
        team: processes that share the images; each returns the comparison. It is that of one
            process but for random starts of attacks.

    Returns:
        The certificate of the last, tightest bound, and the comparison.

    Raises:
        CertificateError: if a bound cannot be proved.
        SolveError: if a solve misses the tolerance.
        ValueError: if there are fewer images than processes.

    Example:
        >>> from lben.models import EquilibriumArchitecture
        >>> images = torch.arange(160, dtype=torch.uint8).reshape(10, 1, 4, 4)
        >>> labels = torch.arange(10) % 2
        >>> data = Dataset.from_tensors(images, labels, images, labels)
        >>> model = EquilibriumArchitecture(hidden=4).for_data(data).build()
        >>> config = CertificationConfig(radii=(0.1,), samples=4, attack_steps=2, local=False)
        >>> certificate, report = evaluate_certificates(model, data, config)
        >>> report.violations, [method.name for method in report.sound][:3]
        (0, ['promised', 'scaled', 'pairs'])
    """
    started = time.perf_counter()
    samples = min(config.samples, len(data.test_images))
    team.check_shares(samples=samples)
    running = model.freeze(config.tol)
    x = pixels(team.share(data.test_images[:samples]), running.dtype)
    labels = team.share(data.test_labels[:samples])
    radii = torch.tensor(config.radii, dtype=torch.float64, device="cpu")
    methods: list[Method] = []
    largest: tuple[Method, ...] = ()
    certified = torch.zeros(len(radii), len(x), dtype=torch.bool, device="cpu")
    certificate = running.certificate()
    for bound in running.bounds:
        start = time.perf_counter()
        certificate = running.certificate(bound=bound)
        proof = time.perf_counter() - start
        if math.isinf(certificate.bound):
            continue  # the parameterization promises no bound
        result = running.forward_with_error(x, certificate)
        held = result.radius(labels, certificate, config.promise) >= radii[:, None]
        certified |= held
        seconds = time.perf_counter() - start - proof
        if not methods:
            plain = result.radius(labels, certificate, "textbook") >= radii[:, None]
            methods.append(_method(TEXTBOOK, certificate.bound, plain, proof, 0.0, team))
            largest = _certify_linf(running, result, labels, certificate, config, team)
        methods.append(_method(bound, certificate.bound, held, proof, seconds, team))
    if config.local and isinstance(running, EquilibriumClassifier):
        start = time.perf_counter()
        local = running.local_certifier(certificate)
        proof = time.perf_counter() - start
        for name in (LOCAL, PIXELS):
            start = time.perf_counter()
            operating_points = running.operating_points(
                x, certificate, local, pixels=name == PIXELS, promise=config.promise
            )
            _certify_around(local, operating_points, labels, certified, name, config, team)
            seconds = time.perf_counter() - start
            methods.append(_method(name, certificate.bound, certified, proof, seconds, team))
    broken = _gather(_find_broken(running, x, labels, config, team), team)
    correct = team.gather(running(x).argmax(1) == labels)
    return certificate, Certification(
        data=data.name,
        samples=samples,
        available=len(data.test_images),
        radii=config.radii,
        clean_accuracy=float(correct.double().mean()),
        dtype=str(running.dtype).removeprefix("torch."),
        tol=running.tol,
        methods=tuple(methods),
        attacked=tuple(float((~row).double().mean()) for row in broken),
        violations=int((broken & _gather(certified, team)).sum()),
        in_linf=largest,
        seconds=round(time.perf_counter() - started, 2),
        config=config,
        environment=environment(team),
    )


_PART = 20
"""Number of images whose proofs run together, between two updates of the progress bar."""


def _certify_around(
    local: LocalCertifier,
    operating_points: OperatingPoints,
    labels: Tensor,
    certified: Tensor,
    name: str,
    config: CertificationConfig,
    team: Processes,
) -> None:
    """Mark in `certified` (radii × images) the images that proofs around single images certify.

    A radius is tried only for images whose next smaller radius is certified, because the larger
    ball contains the smaller one.
    """
    rising = sorted(range(len(config.radii)), key=config.radii.__getitem__)
    with Progress(len(labels), f"proofs {name}", "images", team.quiet) as progress:
        for part in torch.arange(len(labels), device="cpu").split(_PART):
            reached = torch.ones(len(part), dtype=torch.bool, device="cpu")
            for index in rising:
                tried = part[reached & ~certified[index, part]]
                if len(tried):
                    found = local.certifies(
                        operating_points.select(tried), labels[tried], config.radii[index]
                    )
                    certified[index, tried] = found
                reached = certified[index, part]
            progress.update(len(part))


def _method(
    name: str, bound: float, held: Tensor, proof: float, images: float, team: Processes
) -> Method:
    held = _gather(held, team)
    seconds = torch.tensor([[proof, images]], dtype=torch.float64, device="cpu")
    proof, images = team.gather(seconds).amax(0).tolist()
    return Method(
        name=name, bound=bound, certified=tuple(float(row.double().mean()) for row in held),
        seconds=round(proof, 4), seconds_per_image=images / held.shape[1],
    )  # fmt: skip


def _gather(held: Tensor, team: Processes) -> Tensor:
    """Return a table, radii × images, with the columns of all processes."""
    return team.gather(held.T).T


def _certify_linf(
    model: Classifier,
    result: CertifiedLogits,
    labels: Tensor,
    certificate: ChainCertificate,
    config: CertificationConfig,
    team: Processes,
) -> tuple[Method, ...]:
    """Certify in the l∞ norm: by ‖x‖₂ ≤ √p ‖x‖_∞, and by l∞ bounds of a dense layer."""

    def bound_by_norms() -> Tensor:
        bound = up(certificate.bound * math.sqrt(math.prod(model.shape)) * (1 + 2.0**-50))
        return pair_bounds(bound, result.value.shape[1])

    bounds: dict[str, Callable[[], Tensor]] = {"l2 · √p": bound_by_norms}
    if isinstance(model, EquilibriumClassifier):
        weights, gain = model.layer.weights(), up(model.normalize.gain * (1 + 2.0**-50))

        def convert_to_pixels(pairs: PairCertificate) -> Tensor:
            return pairs.tensor() * gain * (1 + 2.0**-50)

        bounds["intervals"] = lambda: convert_to_pixels(certify(weights, IntervalClaim()))
        bounds["own"] = lambda: convert_to_pixels(certify(weights, tighten_linf(weights)))
    radii, methods = torch.tensor(config.linf_radii, dtype=torch.float64, device="cpu"), []
    # ‖x' − x‖₂ ≤ √p ‖x' − x‖_∞
    root = math.sqrt(math.prod(model.shape)) * (1 + 2.0**-50)
    around = result.uniform
    elsewhere = Affine(around.constant, around.slope * root, around.limit / root)
    if config.promise == "exact":
        elsewhere = Affine(0 * elsewhere.constant, 0.0)
    for name, prove in bounds.items():
        start = time.perf_counter()
        pairs = prove()
        seconds = time.perf_counter() - start
        radius = margin_radius(
            result.value, labels, pairs, logit_error=result.error, elsewhere=elsewhere
        )
        most = float(pairs.fill_diagonal_(0.0).max())
        methods.append(_method(name, most, radius >= radii[:, None], seconds, 0.0, team))
    return tuple(methods)


def _find_broken(
    model: Classifier, x: Tensor, labels: Tensor, config: CertificationConfig, team: Processes
) -> Tensor:
    """Return which images PGD or APGD broke within each radius."""
    generator, found = torch.Generator("cpu").manual_seed(config.seed), []
    for radius in track(config.radii, "attack", "radii", team.quiet):
        broken = torch.zeros(len(x), dtype=torch.bool, device="cpu")
        for attack in (pgd_l2, apgd_l2):
            left = (~broken).nonzero()[:, 0]
            if len(left):
                _, broken[left] = attack(
                    model, x[left], labels[left], radius, steps=config.attack_steps,
                    restarts=config.attack_restarts, generator=generator,
                )  # fmt: skip
        found.append(broken)
    return torch.stack(found)
