"""What can be done from a terminal? `lben --help` lists the commands."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro

from lben import checkpoints
from lben.certificates import CertificateError
from lben.certification import CertificationConfig, certify_model
from lben.checkpoints import CheckpointError
from lben.data import DataError, Dataset, load
from lben.evaluation import EvaluationConfig, evaluate
from lben.models import Classifier
from lben.parallel import is_first, processes
from lben.recipes import (
    ConvolutionalEquilibriumTraining,
    EquilibriumTraining,
    ResidualTraining,
)
from lben.reports import certification_table, draw, draw_certification, table
from lben.training import Interrupted, resume, train
from solvers import SolveError


@dataclass(frozen=True)
class Demo:
    """Train, certify and attack a classifier of the embedded digits, in about a minute.

    Attributes:
        out: folder for model, reports and picture.
        gamma: l2 Lipschitz bound on the normalised input.
        epochs: passes over the training images.
        seed: of everything.
    """

    out: str = "runs/demo"
    gamma: float = 1.0
    epochs: int = 60
    seed: int = 0


@dataclass(frozen=True)
class Train:
    """Train an equilibrium classifier into a folder.

    Attributes:
        config: of the run.
    """

    config: Annotated[EquilibriumTraining, tyro.conf.arg(name="")] = field(
        default_factory=EquilibriumTraining
    )


@dataclass(frozen=True)
class TrainConv:
    """Train a convolutional equilibrium classifier into a folder.

    Attributes:
        config: of the run.
    """

    config: Annotated[ConvolutionalEquilibriumTraining, tyro.conf.arg(name="")] = field(
        default_factory=ConvolutionalEquilibriumTraining
    )


@dataclass(frozen=True)
class TrainExplicit:
    """Train a network of explicit 1-Lipschitz layers (SLL and its family) into a folder.

    Attributes:
        config: of the run.
    """

    config: Annotated[ResidualTraining, tyro.conf.arg(name="")] = field(
        default_factory=ResidualTraining
    )


@dataclass(frozen=True)
class Resume:
    """Continue an interrupted run to the weights it would have reached.

    Attributes:
        run: folder of the run.
        root: folder with the data files, if they have moved.
    """

    run: Annotated[str, tyro.conf.Positional]
    root: str | None = None


@dataclass(frozen=True)
class Evaluate:
    """Certify and attack a trained model: table, report.json and picture.

    Attributes:
        run: folder of the run.
        root: folder with the data files, if they have moved.
        config: of the evaluation.
    """

    run: Annotated[str, tyro.conf.Positional]
    root: str | None = None
    config: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = field(
        default_factory=EvaluationConfig
    )


@dataclass(frozen=True)
class Certify:
    """Certify test images by every proof there is, and attack them: table, JSON and picture.

    Attributes:
        run: folder of the run.
        root: folder with the data files, if they have moved.
        config: of the certification.
    """

    run: Annotated[str, tyro.conf.Positional]
    root: str | None = None
    config: Annotated[CertificationConfig, tyro.conf.arg(name="")] = field(
        default_factory=CertificationConfig
    )


@dataclass(frozen=True)
class Bench:
    """Compare the solvers with torchdeq's and with the published loop (needs the source tree).

    Attributes:
        quick: a subset in under 50 seconds.
        root: folder that holds MNIST/raw.
        out: also write the figures to this JSON file.
        html: also write the interactive report to this file.
    """

    quick: bool = False
    root: str | None = None
    out: str | None = None
    html: str | None = None


Command = Demo | Train | TrainConv | TrainExplicit | Resume | Evaluate | Certify | Bench

_ERRORS = (CheckpointError, DataError, CertificateError, SolveError, ValueError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for an error, 130 for Ctrl-C."""
    try:
        _run(
            tyro.cli(
                Command,
                prog="lben",
                description="Equilibrium networks whose Lipschitz bound holds by construction.",
                args=None if arguments is None else list(arguments),
                config=(tyro.conf.CascadeSubcommandArgs,),  # flags may stand in any order
            )
        )
    except Interrupted as stop:
        print(f"\nlben: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nlben: interrupted", file=sys.stderr)
        return 130
    except _ERRORS as error:
        print(f"lben: {error}", file=sys.stderr)
        return 1
    return 0


def _run(command: Command) -> None:
    match command:
        case Demo():
            _demo(command)
        case Train(config=config) | TrainConv(config=config) | TrainExplicit(config=config):
            train(config)
            _say_trained(config.out)
        case Resume(run=run, root=root):
            resume(run, root=root)
            _say_trained(run)
        case Evaluate(run=run, root=root, config=config):
            _evaluate(Path(run), config, root)
        case Certify(run=run, root=root, config=config):
            _certify(Path(run), config, root)
        case Bench():
            _bench(command)


def _bench(command: Bench) -> None:
    try:
        benchmark = importlib.import_module("benchmarks.solvers")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the benchmarks cannot be imported ({error}): they come with the source tree, "
            "installed by pip install -e '.[benchmarks]'"
        ) from error
    words = ["--quick"] if command.quick else []
    for name in ("root", "out", "html"):
        value = getattr(command, name)
        words += [] if value is None else [f"--{name}", value]
    benchmark.main(words)


def _say_trained(folder: str) -> None:
    if not is_first():
        return
    metrics = (Path(folder) / checkpoints.METRICS).read_text().splitlines()
    error = json.loads(metrics[-1])["test_error_percent"]
    print(f"test error {error:.2f} %; model in {folder}; next: lben evaluate {folder}")


def _demo(command: Demo) -> None:
    folder = Path(command.out)
    for name in (checkpoints.TRAINING, checkpoints.METRICS):
        (folder / name).unlink(missing_ok=True)  # the demo starts afresh
    train(
        EquilibriumTraining(
            data="digits", out=command.out, gamma=command.gamma, epochs=command.epochs,
            batch_size=64, seed=command.seed,
        )
    )  # fmt: skip
    config = EvaluationConfig(pairs=10000, ascent_pairs=50, ascent_steps=100, seed=command.seed)
    _evaluate(folder, replace(config, attack_samples=360), None)


def _evaluate(folder: Path, config: EvaluationConfig, root: str | None) -> None:
    model, data = _trained(folder, root)
    torch.manual_seed(config.seed)
    with processes("cpu") as team:
        report = evaluate(model, data, config, team)
    if not team.first:
        return
    _write(folder / "report.json", report.to_dict())
    print(table(report))
    picture = _drawn(partial(draw, report), folder / "robustness.png")
    print(f"\n{folder}: {checkpoints.MODEL}, {checkpoints.CERTIFICATE}, report.json{picture}")
    _refuse(report.violations)


def _certify(folder: Path, config: CertificationConfig, root: str | None) -> None:
    model, data = _trained(folder, root)
    with processes("cpu") as team:
        certificate, report = certify_model(model, data, config, team)
    if not team.first:
        return
    text = certificate.to_json() + "\n"
    checkpoints.write_atomically(folder / checkpoints.CERTIFICATE, text.encode())
    _write(folder / "certification.json", report.to_dict())
    print(certification_table(report))
    picture = _drawn(partial(draw_certification, report), folder / "certification.png")
    print(f"\n{folder}: {checkpoints.CERTIFICATE}, certification.json{picture}")
    _refuse(report.violations)


def _trained(folder: Path, root: str | None) -> tuple[Classifier, Dataset]:
    model = checkpoints.load_model(folder)
    _, training = checkpoints.load_config(folder)
    return model, load(training["data"], root or training["root"])


def _write(path: Path, values: dict[str, object]) -> None:
    checkpoints.write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def _drawn(draw_into: Callable[[Path], None], path: Path) -> str:
    """Draw where that is possible, and return what to add to the list of files."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install 'lben[plots]')")
        return ""
    draw_into(path)
    return f", {path.name}"


def _refuse(violations: int) -> None:
    if violations:
        raise CertificateError(
            f"{violations} violations of the bound: please report this as a defect"
        )
