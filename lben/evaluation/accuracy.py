"""How robust is a model? Clean, certified and attacked accuracy, and the tightness of its bound."""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lben.certificates import ChainCertificate, LayerCertificate
from lben.data import Dataset, pixels
from lben.evaluation.attacks import ascend_quotient, pgd_l2, quotients, random_pairs
from lben.evaluation.attacks.common import differentiating
from lben.models import Bound, CertifiedLogits, Classifier
from lben.parallel import ALONE, Processes
from lben.progress import track
from lben.radii.error_bounds import Affine
from lben.records import from_json, to_plain
from lben.values import check_tol, conform


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a model is evaluated.

    Attributes:
        radii: l2 radii in pixels on [0, 1].
        tol: relative tolerance of the solver; the model's own when None.
        attack_samples: test images that PGD attacks at every radius.
        pgd_steps: steps of each PGD run.
        pgd_restarts: starts of each PGD run, the first at the image itself.
        pairs: random pairs on which the bound is checked.
        ascent_pairs: pairs on which the quotient is maximised.
        ascent_steps: steps of that ascent.
        bound: the bound that radii are certified with; when None, "scaled" if the model has it,
        else
            "promised".
        seed: of all draws.

    Raises:
        ValueError: naming the field, what it must be, and what was given.

    Example:
        >>> EvaluationConfig(radii=(0.0, 0.5), pairs=100).pgd_steps
        20
    """

    radii: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    tol: float | None = None
    attack_samples: int = 500
    pgd_steps: int = 20
    pgd_restarts: int = 2
    pairs: int = 20000
    ascent_pairs: int = 100
    ascent_steps: int = 150
    bound: Bound | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        conform(self)
        if not self.radii or not all(0 <= r < math.inf for r in self.radii):
            raise ValueError(f"radii must be at least 0 and finite, got {self.radii}")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("radii", "bound", "seed") or (f.name == "tol" and value is None):
                continue
            if not value > 0:
                raise ValueError(f"{f.name} must be positive, got {value}")
        check_tol(self.tol)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that an evaluation found; tables and pictures are functions of it.

    Attributes:
        data: name of the data set.
        samples: test images of the clean and certified figures.
        attack_samples: how many of them were attacked, from the first one on.
        radii: in the l2 norm of pixels on [0, 1].
        clean_accuracy: share classified correctly.
        certified_accuracy: share with certified radius above each radius, for the network as it
        runs
            (its weights, dtype and tol): it gives the label at every image of the ball.
        certified_exact: the same share for the exact network of the same weights.
        certified_attacked: as certified_accuracy, on the attacked images only.
        pgd_accuracy: share of the attacked images that PGD did not break at each radius.
        gamma: promised bound of y on the normalised input; None when there is none.
        bound: proved bound from pixels to logits that the radii rest on.
        promised_bound: gamma in pixels, proved; None when there is none.
        quotient: largest Lipschitz quotient found, in pixels.
        tightness: promised bound (proved bound when none is promised) ÷ quotient.
        pairs: pairs checked against the bound, random and attacked.
        violations: pairs whose quotient exceeds the bound, and attacked images broken within
            their certified radius. Anything but 0 is a defect of the library.
        smallest_eigenvalue: of M(Λ, γ) for the bound used, the least of all layers.
        m: proved strong monotonicity, the least of all layers.
        dtype: that the network runs in.
        tol: relative tolerance of its solver; None where it has none.
        max_logit_error: largest proved distance of the evaluated to the exact logits.
        solver_steps: most iterations that a test image needed.
        seconds: of the whole evaluation.
        config: of the evaluation.
        environment: versions and hardware.

    Example:
        >>> Report.from_json("{}")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: this is no Report: ...
    """

    data: str
    samples: int
    attack_samples: int
    radii: tuple[float, ...]
    clean_accuracy: float
    certified_accuracy: tuple[float, ...]
    certified_exact: tuple[float, ...]
    certified_attacked: tuple[float, ...]
    pgd_accuracy: tuple[float, ...]
    gamma: float | None
    bound: float
    promised_bound: float | None
    quotient: float
    tightness: float
    pairs: int
    violations: int
    smallest_eigenvalue: float
    m: float
    dtype: str
    tol: float | None
    max_logit_error: float
    solver_steps: int
    seconds: float
    config: EvaluationConfig
    environment: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """Return plain values, ready for strict JSON: None where a number is not finite."""
        values: dict[str, object] = to_plain(self)
        return values

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report that report.json holds; null where a number was infinite.

        Raises:
            ValueError: if it holds none.
        """
        return from_json(cls, text)


def environment(team: Processes = ALONE) -> dict[str, str]:
    """Return versions, hardware and processes, as every result file records them.

    Args:
        team: the processes of the run.
    """
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            processor = next(line for line in file if line.startswith("model name"))
            processor = processor.partition(":")[2].strip()
    except (OSError, StopIteration):
        pass
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor,
        "processes": str(team.count),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


@differentiating
def evaluate(
    model: Classifier, data: Dataset, config: EvaluationConfig, team: Processes = ALONE
) -> Report:
    """Certify and attack a model as it runs: in its own precision, solved to its own tolerance.

    Lipschitz quotients are measured on the exact network of the same weights
    (`Classifier.to_exact`).

    Args:
        model: on any device; it is evaluated on the CPU.
        data: whose test images are used.
        config: of the evaluation.
        team: processes that share images and pairs; each returns the report. It is that of one
            process but for random pairs and random starts of attacks.

    Returns:
        The report: accuracies are shares of images, radii and quotients in the l2 norm of pixels.

    Raises:
        CertificateError: if the bound cannot be proved.
        SolveError: if a solve of a test image misses the tolerance.
        ValueError: if there are fewer images or pairs than processes.

    Example:
        >>> from lben.models import EquilibriumArchitecture
        >>> images = torch.arange(160, dtype=torch.uint8).reshape(10, 1, 4, 4)
        >>> labels = torch.arange(10) % 2
        >>> data = Dataset.from_tensors(images, labels, images, labels)
        >>> model = EquilibriumArchitecture(hidden=4).for_data(data).build()
        >>> config = EvaluationConfig(radii=(0.0, 0.1), pairs=10, ascent_pairs=2, ascent_steps=2)
        >>> report = evaluate(model, data, config)
        >>> report.violations, report.quotient <= report.bound
        (0, True)
    """
    started = time.perf_counter()
    attacked = min(config.attack_samples, len(data.test_images))
    team.check_shares(attack_samples=attacked, pairs=config.pairs, ascent_pairs=config.ascent_pairs)
    running = model.freeze(config.tol)
    promised = None if running.gamma is None else running.certificate()
    usual: Bound = "scaled" if "scaled" in running.bounds else "promised"
    bound = config.bound or usual
    certificate = promised if promised and bound == "promised" else running.certificate(bound=bound)

    x, labels = pixels(data.test_images, running.dtype), data.test_labels
    found = _all_logits(running, x, certificate, team)
    logits, errors = found.value, found.error
    radius, of_exact = (
        found.radius(labels, certificate, promise) for promise in ("running", "exact")
    )
    robust, broken_within = _attack(running, x[:attacked], labels[:attacked], radius, config, team)
    quotient, pairs, over = _pairs(model.to_exact(_EXACTLY), x.double(), bound, config, team)
    proved = certificate if promised is None else promised
    correct = logits.argmax(1) == labels
    layers = [c for c in certificate.leaves() if isinstance(c, LayerCertificate)]

    def measure_certified(r: float, count: int, radius: Tensor = radius) -> float:
        held = correct if r == 0 else radius > r
        return float(held[:count].double().mean())

    return Report(
        data=data.name,
        samples=len(x),
        attack_samples=attacked,
        radii=config.radii,
        clean_accuracy=float(correct.double().mean()),
        certified_accuracy=tuple(measure_certified(r, len(x)) for r in config.radii),
        certified_exact=tuple(measure_certified(r, len(x), of_exact) for r in config.radii),
        certified_attacked=tuple(measure_certified(r, attacked) for r in config.radii),
        pgd_accuracy=robust,
        gamma=running.gamma,
        bound=certificate.bound,
        promised_bound=None if promised is None else promised.bound,
        quotient=quotient,
        tightness=proved.bound / quotient if quotient else math.inf,
        pairs=pairs,
        violations=over + broken_within,
        smallest_eigenvalue=min(layer.smallest_eigenvalue for layer in layers),
        m=min(layer.m for layer in layers),
        dtype=str(running.dtype).removeprefix("torch."),
        tol=running.tol,
        max_logit_error=float(errors.max()),
        solver_steps=found.steps,
        seconds=round(time.perf_counter() - started, 2),
        config=config,
        environment=environment(team),
    )


_EXACTLY = 1e-8
"""Tolerance of the exact network in float64; its remaining error is subtracted nevertheless."""


def _all_logits(
    model: Classifier, x: Tensor, certificate: ChainCertificate, team: Processes
) -> CertifiedLogits:
    found = []
    batches = team.share(x).split(2000)
    for batch in track(batches, "certify", "batches", team.quiet):
        found.append(model.forward_with_error(batch, certificate))
    return CertifiedLogits(
        value=team.gather(torch.cat([f.value for f in found])),
        error=team.gather(torch.cat([f.error for f in found])),
        uniform=Affine(
            team.gather(torch.cat([f.uniform.constant for f in found])),
            max(f.uniform.slope for f in found),
            team.gather(torch.cat([0 * f.error + f.uniform.limit for f in found])),
        ),
        steps=int(team.gather(torch.tensor([max(f.steps for f in found)], device="cpu")).max()),
    )


def _attack(
    model: Classifier,
    x: Tensor,
    labels: Tensor,
    radius: Tensor,
    config: EvaluationConfig,
    team: Processes,
) -> tuple[tuple[float, ...], int]:
    """Return PGD accuracy at every radius, and how many images broke inside their certificate."""
    accuracy, broken_within = [], 0
    generator = torch.Generator("cpu").manual_seed(config.seed)
    for r in track(config.radii, "attack", "radii", team.quiet):
        _, broken = pgd_l2(
            model, team.share(x), team.share(labels), r,
            steps=config.pgd_steps if r else 1, restarts=config.pgd_restarts if r else 1,
            generator=generator,
        )  # fmt: skip
        broken = team.gather(broken)
        accuracy.append(float((~broken).double().mean()))
        broken_within += int((broken & (radius[: len(x)] > r)).sum())
    return tuple(accuracy), broken_within


def _pairs(
    model: Classifier,
    x: Tensor,
    bound: Bound,
    config: EvaluationConfig,
    team: Processes,
) -> tuple[float, int, int]:
    """Return the largest quotient, the number of pairs and how many exceed the bound.

    A pair counts only if it exceeds the bound by more than the proved errors of both logits. Each
    process draws pairs of its own images.
    """
    certificate = model.certificate(bound=bound)
    generator, x = torch.Generator("cpu").manual_seed(config.seed + 1), team.share(x)
    order = torch.randperm(len(x), generator=generator, device="cpu")
    chosen = order[: team.share_of(config.ascent_pairs)]
    starts = x[chosen]
    found = ascend_quotient(model, starts, steps=config.ascent_steps, generator=generator)
    largest, count, over = 0.0, 0, 0
    batches = [(found.a, found.b)]
    random = random_pairs(x, team.share_of(config.pairs), generator)
    with torch.no_grad():
        for a, b in track([*batches, *random], "pairs", "batches", team.quiet):
            ya, yb = (model.forward_with_error(side, certificate) for side in (a, b))
            change = torch.linalg.vector_norm(ya.value - yb.value, dim=1)
            distance = torch.linalg.vector_norm((a - b).flatten(1), dim=1)
            allowed = certificate.bound * distance * (1 + 1e-12) + ya.error + yb.error
            over += int((change > allowed).sum())
            count += len(a)
            largest = max(largest, float(quotients(model, a, b).max()))
    counts = team.gather(torch.tensor([[count, over]], device="cpu")).sum(0).tolist()
    quotient = torch.tensor([largest], dtype=torch.float64, device="cpu")
    return float(team.gather(quotient).max()), *counts
