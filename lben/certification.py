"""How many images can be certified, by which proof, at which price, and how close is the attack?"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor
from tqdm import tqdm

from lben.attacks import apgd_l2, pgd_l2
from lben.certificates import NetworkCertificate
from lben.data import Dataset, pixels
from lben.evaluation import environment
from lben.models import Classifier, EquilibriumClassifier
from lben.radii import certified_radius

TEXTBOOK = "textbook, not sound"
LOCAL, PIXELS = "local", "local, in [0, 1]"


@dataclass(frozen=True, kw_only=True)
class CertificationConfig:
    """What is certified and attacked.

    Attributes:
        radii: in the l2 norm of pixels on [0, 1].
        samples: test images, the first so many.
        tol: relative tolerance of the solver, in float64.
        local: whether proofs around single images are tried, where the model has them.
        attack_steps: of PGD and of APGD.
        attack_restarts: runs of each.
        seed: of the attacks.
    """

    radii: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    samples: int = 1000
    tol: float = 1e-8
    local: bool = True
    attack_steps: int = 40
    attack_restarts: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.radii or not all(0 < r < math.inf for r in self.radii):
            raise ValueError(f"radii must be positive and finite, got {self.radii}")
        for f in fields(self):
            if f.name not in ("radii", "local", "seed") and not getattr(self, f.name) > 0:
                raise ValueError(f"{f.name} must be positive, got {getattr(self, f.name)}")


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one way of certifying gives.

    Attributes:
        name: the bound (`Classifier.certificate`), "local", the same for images in [0, 1] alone, or
            the textbook rule, which takes nothing off for solver and rounding and is there to
            compare with.
        bound: of all logits, from pixels; of the local proofs that of the global one they start
            from.
        certified: share of the images certified at each radius.
        seconds: of the proof.
        seconds_per_image: of the images, the attacked ones not counted.
    """

    name: str
    bound: float
    certified: tuple[float, ...]
    seconds: float
    seconds_per_image: float


@dataclass(frozen=True, kw_only=True)
class Certification:
    """Certified accuracy by method and radius, and what attacks leave.

    Attributes:
        data: name of the data set.
        samples: test images.
        radii: in the l2 norm of pixels on [0, 1].
        clean_accuracy: share classified correctly.
        methods: from cheap to dear.
        attacked: share that no attack broke, at each radius.
        violations: images broken within a certified radius. Anything but 0 is a defect.
        config: of the certification.
        environment: versions and hardware.
    """

    data: str
    samples: int
    radii: tuple[float, ...]
    clean_accuracy: float
    methods: tuple[Method, ...]
    attacked: tuple[float, ...]
    violations: int
    config: CertificationConfig
    environment: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    @property
    def sound(self) -> tuple[Method, ...]:
        """The methods that prove something."""
        return tuple(m for m in self.methods if m.name != TEXTBOOK)

    @property
    def best(self) -> tuple[float, ...]:
        """The largest certified share at each radius."""
        return tuple(max(column) for column in zip(*(m.certified for m in self.sound), strict=True))


def certify_model(
    model: Classifier, data: Dataset, config: CertificationConfig
) -> tuple[NetworkCertificate, Certification]:
    """Certify test images by every bound that the model has, and attack them.

    Returns:
        The certificate of the last, tightest bound, and the comparison.

    Raises:
        CertificateError: if a bound cannot be proved.
        SolveError: if a solve misses the tolerance.
    """
    exact = model.exact(config.tol)
    x = pixels(data.test_images[: config.samples], torch.float64)
    labels = data.test_labels[: config.samples]
    radii = torch.tensor(config.radii, dtype=torch.float64)
    methods: list[Method] = []
    certified = torch.zeros(len(radii), len(x), dtype=torch.bool)

    def add(name: str, bound: float, held: Tensor, proof: float, images: float) -> None:
        shares = tuple(float(row.double().mean()) for row in held)
        methods.append(
            Method(
                name=name, bound=bound, certified=shares, seconds=round(proof, 4),
                seconds_per_image=images / len(x),
            )
        )  # fmt: skip

    certificate = exact.certificate()
    for bound in exact.bounds:
        start = time.perf_counter()
        certificate = exact.certificate(bound)
        proof = time.perf_counter() - start
        if math.isinf(certificate.bound):
            continue  # there is no promise
        result = exact.certified_logits(x, certificate)
        divisor = certificate.radius_bound()
        if not methods:
            plain = certified_radius(result.logits, labels, certificate.bound)
            add(TEXTBOOK, certificate.bound, plain >= radii[:, None], proof, 0.0)
        radius = certified_radius(result.logits, labels, divisor, logit_error=result.error)
        held = radius >= radii[:, None]
        certified |= held
        seconds = time.perf_counter() - start - proof
        add(bound, certificate.bound, held, proof, seconds)
    if config.local and isinstance(exact, EquilibriumClassifier):
        start = time.perf_counter()
        local = exact.local_certificate(certificate)
        proof = time.perf_counter() - start
        for name in (LOCAL, PIXELS):
            start = time.perf_counter()
            anchors = exact.anchors(x, certificate, local, pixels=name == PIXELS)
            held = torch.stack([local.certifies(anchors, labels, float(r)) for r in radii])
            certified |= held
            add(name, certificate.bound, held, proof, time.perf_counter() - start)
    broken = _broken(exact, x, labels, config)
    return certificate, Certification(
        data=data.name,
        samples=len(x),
        radii=config.radii,
        clean_accuracy=float((exact(x).argmax(1) == labels).double().mean()),
        methods=tuple(methods),
        attacked=tuple(float((~row).double().mean()) for row in broken),
        violations=int((broken & certified).sum()),
        config=config,
        environment=environment(),
    )


def _broken(model: Classifier, x: Tensor, labels: Tensor, config: CertificationConfig) -> Tensor:
    """Return which images PGD or APGD broke within each radius."""
    generator, found = torch.Generator().manual_seed(config.seed), []
    for radius in tqdm(config.radii, desc="attack", unit="radius", disable=None, leave=False):
        broken = torch.zeros(len(x), dtype=torch.bool)
        for attack in (pgd_l2, apgd_l2):
            left = (~broken).nonzero()[:, 0]
            if len(left):
                _, broken[left] = attack(
                    model, x[left], labels[left], radius, steps=config.attack_steps,
                    restarts=config.attack_restarts, generator=generator,
                )  # fmt: skip
        found.append(broken)
    return torch.stack(found)
