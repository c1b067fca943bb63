"""How many inputs does a network from elsewhere classify robustly, with a proof?"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lben.certificates.relaxation import InputNorm
from lben.evaluation.accuracy import environment
from lben.evaluation.files import Samples
from lben.interop.radius import RadiusCertifier, check_request
from lben.parallel import ALONE, Processes
from lben.progress import Progress
from lben.records import from_json, to_plain
from lben.tightening.routes import Route
from lben.values import check_positive, conform
from lben.weights.network import Network


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig:
    """Which balls are tried, and how long.

    Attributes:
        radii: in the unit of the inputs.
        norm: l2, or linf for the largest change of a number.
        box: smallest and largest value of a number in an input, if the statements are about such
            inputs alone; None if inputs may be any numbers.
        seconds: of search, for each input and radius that back-substitution does not prove.
        local: whether proofs around inputs are tried.

    Raises:
        ValueError: naming the field, what it must be, and what was given.

    Example:
        >>> RobustnessConfig(radii=(0.1, 0.2), norm="linf", box=(0, 1)).seconds
        1.0
    """

    radii: tuple[float, ...]
    norm: InputNorm = "l2"
    box: tuple[float, float] | None = None
    seconds: float = 1.0
    local: bool = True

    def __post_init__(self) -> None:
        conform(self)
        if not self.radii:
            raise ValueError("radii must be positive and finite, got none")
        check_positive(self, "radii")
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds must be at least 0, got {self.seconds}")
        if self.box is not None and not self.box[0] < self.box[1]:
            raise ValueError(f"box must be (smallest, largest), got {self.box}")


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """What was proved of a model's labels.

    Attributes:
        model: its class.
        data: name of the data.
        samples: inputs, the first so many.
        available: inputs that there are.
        clean_accuracy: share classified correctly.
        bound: proved global l2 bound.
        method: how it was proved.
        route: how it was found, for a feed-forward network.
        bound_seconds: that it took.
        radii: in the norm and unit of the configuration.
        certified_globally: share certified at each radius by the margin over the global bound.
        certified: share certified at each radius by that or by a proof around the input.
        largest: for each input, the largest of the radii that is certified; 0 for none.
        local: whether proofs around inputs were tried; a model may have none.
        seconds_per_sample: time of all proofs around inputs, divided by their number.
        seconds: of the whole, in the first process.
        config: of the evaluation.
        environment: versions and hardware.

    Example:
        >>> Robustness.from_json("{}")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: this is no Robustness: ...
    """

    model: str
    data: str
    samples: int
    available: int
    clean_accuracy: float
    bound: float
    method: str
    route: Route | None
    bound_seconds: float
    radii: tuple[float, ...]
    certified_globally: tuple[float, ...]
    certified: tuple[float, ...]
    largest: tuple[float, ...]
    local: bool
    seconds_per_sample: float
    seconds: float
    config: RobustnessConfig
    environment: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """Return plain values, ready for strict JSON: None where a number is not finite."""
        values: dict[str, object] = to_plain(self)
        return values

    @classmethod
    def from_json(cls, text: str) -> Robustness:
        """Return the report that a JSON file holds.

        Raises:
            ValueError: if it holds none.
        """
        return from_json(cls, text)


def evaluate_robustness(
    model: nn.Module | Network, samples: Samples, config: RobustnessConfig, team: Processes = ALONE
) -> Robustness:
    """Certify the labels of inputs at several radii, by the global bound and around each input.

    Args:
        model: as for `certified_radius`.
        samples: inputs and labels.
        config: of the evaluation.
        team: processes that share the inputs; each returns the report.

    Returns:
        Shares of inputs.

    Raises:
        ValueError: if shapes or labels do not fit, or there are fewer inputs than processes.
        CertificateError: if no global bound is proved.

    Example:
        >>> from lben.evaluation import read_samples
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).eval()
        >>> samples = read_samples("digits", count=20, shape=(64,))
        >>> config = RobustnessConfig(radii=(0.01, 9.0), seconds=0.0)
        >>> report = evaluate_robustness(model, samples, config)
        >>> report.certified[0] <= report.clean_accuracy, report.certified[1], report.route.name
        (True, 0.0, 'primal-dual')
    """
    started = time.perf_counter()
    count = len(samples.inputs)
    team.check_shares(samples=count)
    check_request(samples.inputs, samples.labels, config.norm, config.box, config.seconds)
    certifier = RadiusCertifier.of(model, tuple(samples.inputs.shape[1:]))
    bound_seconds = time.perf_counter() - started
    x, labels = team.share(samples.inputs), team.share(samples.labels)
    radii = torch.tensor(config.radii, dtype=torch.float64, device="cpu")
    held = certifier.prove_globally(x, labels, config.norm) >= radii[:, None]
    globally = held.clone()
    start = time.perf_counter()
    local = config.local and certifier.system is not None
    if local:
        _certify_around(certifier, x, labels, held, config, team)
    seconds = torch.tensor([[time.perf_counter() - start]], dtype=torch.float64, device="cpu")
    correct = team.gather(certifier.predict(x) == labels)
    globally, held = (team.gather(table.T).T for table in (globally, held))
    return Robustness(
        model=type(model).__name__,
        data=samples.name,
        samples=count,
        available=samples.available,
        clean_accuracy=float(correct.double().mean()),
        bound=certifier.certificate.bound,
        method=certifier.certificate.method,
        route=certifier.route,
        bound_seconds=round(bound_seconds, 3),
        radii=config.radii,
        certified_globally=tuple(float(row.double().mean()) for row in globally),
        certified=tuple(float(row.double().mean()) for row in held),
        largest=tuple((held * radii[:, None]).amax(0).tolist()),
        local=local,
        seconds_per_sample=float(team.gather(seconds).amax()) / count,
        seconds=round(time.perf_counter() - started, 2),
        config=config,
        environment=environment(team),
    )


_PART = 16
"""Inputs whose proofs run together, between two updates of the progress bar."""


def _certify_around(
    certifier: RadiusCertifier,
    x: Tensor,
    labels: Tensor,
    held: Tensor,
    config: RobustnessConfig,
    team: Processes,
) -> None:
    """Mark in `held` (radii × inputs) what proofs around inputs certify, from small radii on."""
    rising = sorted(range(len(config.radii)), key=config.radii.__getitem__)
    with Progress(len(x), "proofs around inputs", "inputs", team.quiet) as progress:
        for part in torch.arange(len(x), device="cpu").split(_PART):
            reached = torch.ones(len(part), dtype=torch.bool, device="cpu")
            for index in rising:
                tried = part[reached & ~held[index, part]]
                if len(tried):
                    held[index, tried] = certifier.prove_locally(
                        x[tried], labels[tried], config.radii[index], norm=config.norm,
                        box=config.box, seconds=config.seconds,
                    )  # fmt: skip
                reached = held[index, part]
            progress.update(len(part))
