"""What can be done from a terminal? `lben --help` lists the commands."""

from __future__ import annotations

import errno
import functools
import importlib
import importlib.util
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, get_args

import torch
import tyro

from lben.certificates import CertificateError
from lben.certificates.relaxation import InputNorm
from lben.data import DataError, Dataset, load
from lben.evaluation.accuracy import EvaluationConfig, evaluate
from lben.evaluation.files import find_shape, read_model, read_samples
from lben.evaluation.proofs import CertificationConfig, evaluate_certificates
from lben.evaluation.reports import (
    certification_table,
    draw,
    draw_certification,
    robustness_table,
    table,
)
from lben.evaluation.robustness import RobustnessConfig, evaluate_robustness
from lben.models import (
    Classifier,
    ConvolutionalEquilibriumArchitecture,
    EquilibriumArchitecture,
    FeedforwardArchitecture,
)
from lben.parallel import is_first, processes
from lben.progress import format_seconds
from lben.training import checkpoints
from lben.training.checkpoints import CheckpointError
from lben.training.loop import OWN_DATA, Interrupted, resume, train
from lben.training.recipes import TrainingConfig
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

    config: Annotated[TrainingConfig[EquilibriumArchitecture], tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainingConfig(model=EquilibriumArchitecture())
    )


@dataclass(frozen=True)
class TrainConv:
    """Train a convolutional equilibrium classifier into a folder.

    Attributes:
        config: of the run.
    """

    config: Annotated[
        TrainingConfig[ConvolutionalEquilibriumArchitecture], tyro.conf.arg(name="")
    ] = field(default_factory=lambda: TrainingConfig(model=ConvolutionalEquilibriumArchitecture()))


@dataclass(frozen=True)
class TrainFeedforward:
    """Train a network of 1-Lipschitz layers without a solve (SLL and its family) into a folder.

    Attributes:
        config: of the run.
    """

    config: Annotated[TrainingConfig[FeedforwardArchitecture], tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainingConfig(model=FeedforwardArchitecture())
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
    """Certify a trained run by every proof there is, or with --data any model on any data.

    Without --data, the test images of a run are certified and attacked: table, JSON and picture.
    With --data, the model may be a folder of a run, an .onnx file, or a public checkpoint
    (.safetensors, or .pt with tensors by name): its global bound, how it was found, and proofs
    around each input. Of the options below it takes --radii, --samples and --no-local.

    Attributes:
        run: folder of a run, or the file of a model.
        root: folder with the data files, if they have moved.
        data: digits, mnist, cifar10, or an .npz file with the arrays images and labels.
        norm: with --data: of --radii.
        box: with --data: smallest and largest value of an input, for statements about such inputs
            alone.
        seconds: with --data: of search, for each input and radius that a quick proof leaves open.
        out: with --data: also write the report to this JSON file.
        config: of the certification.
    """

    run: Annotated[str, tyro.conf.Positional]
    root: str | None = None
    data: str | None = None
    norm: InputNorm = "l2"
    box: tuple[float, float] | None = None
    seconds: float = 1.0
    out: str | None = None
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


Command = Demo | Train | TrainConv | TrainFeedforward | Resume | Evaluate | Certify | Bench

_ERRORS = (
    CheckpointError, DataError, CertificateError, SolveError, ValueError, ImportError, OSError,
)  # fmt: skip

_EVALUATED = ("report.json", "robustness.png", "robustness.partial.png")
_CERTIFIED = ("certification.json", "certification.png", "certification.partial.png")
_NO_MEMORY = (
    "can't allocate memory", "not enough memory", "Storage size calculation overflowed",
    "numel: integer multiplication overflow", "Overflow when unpacking long",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for an error, 130 for Ctrl-C.

    Every error is one line. A character that the terminal cannot show becomes a question mark. If
    the reader of a pipe closes it (`| head`), the output ends without an error.

    Args:
        arguments: words of the command line; those of the process when None.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = _status(sys.argv[1:] if arguments is None else list(arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError):  # or Python complains once more when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _status(arguments: list[str]) -> int:
    try:
        command = _parse(arguments)
        if command is None:
            return 1
        _run(command)
    except Interrupted as stop:
        _tell(f"\nlben: {stop}")
        return 130
    except KeyboardInterrupt:
        _tell("\nlben: interrupted")
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if not (isinstance(error, _ERRORS) or _lacks_memory(error)):
            raise
        _tell(f"lben: {_sentence(error)}")
        return 1
    return 0


def _parse(arguments: list[str]) -> Command | None:
    """Return the command, or say in one line what is wrong with it."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            command: Command = tyro.cli(
                Command,
                prog="lben",
                description="Equilibrium networks whose Lipschitz bound holds by construction.",
                args=arguments,
                config=(tyro.conf.CascadeSubcommandArgs,),  # flags may stand in any order
            )
            return command
    except SystemExit as end:
        if not end.code:
            raise  # --help
        # A box: its title, what is wrong, and below a rule where to read on.
        rows = [row.strip("│╭╮╰╯ ") for row in said.getvalue().splitlines()[1:]]
        rows = [row for row in rows if row and not row.endswith(("───", "---"))]
        ends = ("Argument help", "For full help")
        end_of_it = next((i for i, row in enumerate(rows) if row.startswith(ends)), None)
        words = " ".join(" ".join(rows[:end_of_it]).split()).rstrip(".")
        words = words.replace("__tyro-dummy-inner__.config.", "--")
        known = arguments[0] if arguments and arguments[0] in words_of_commands() else ""
        _tell(f"lben: {words}; see `{' '.join(f'lben {known}'.split())} --help`")
        return None


def words_of_commands() -> tuple[str, ...]:
    """Return the first words that `lben` takes."""
    return tuple(
        "".join(f"-{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("-")
        for cls in get_args(Command)
    )


def _lacks_memory(error: BaseException) -> bool:
    """Return whether an error means lack of memory; torch says so only in its message."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError | TypeError) and any(w in str(error) for w in _NO_MEMORY)
    )


def _sentence(error: BaseException) -> str:
    """Return the message of an error in one line, with the next step."""
    words = " ".join(str(error).split())
    if _lacks_memory(error):
        first = next(iter(str(error).splitlines()), "no more is known")
        return (
            "out of memory: take a smaller --batch-size or a smaller model, or --accumulate "
            f"({first})"
        )
    if not isinstance(error, OSError) or error.errno is None:
        return words
    advice = {
        errno.ENOSPC: "free some space and repeat the command",
        errno.EDQUOT: "free some space and repeat the command",
        errno.EACCES: "choose a folder that you may write to",
        errno.EROFS: "choose a folder that you may write to",
    }.get(error.errno, "see to that and repeat the command")
    where = f" {error.filename}" if error.filename else ""
    return f"cannot read or write{where}: {error.strerror}; {advice}"


def _tell(line: str) -> None:
    with suppress(OSError):  # nobody listens
        print(line, file=sys.stderr, flush=True)


def _run(command: Command) -> None:
    match command:
        case Demo():
            _demo(command)
        case Train(config=config) | TrainConv(config=config) | TrainFeedforward(config=config):
            train(config)
            _say_trained(config.out)
        case Resume(run=run, root=root):
            resume(run, root=root)
            _say_trained(run)
        case Evaluate(run=run, root=root, config=config):
            _evaluate(Path(run), config, root)
        case Certify(data=None):
            _refuse_changed(command, ("norm", "box", "seconds", "out"), "needs --data")
            _certify_run(command)
        case Certify():
            _certify_model(command)
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
    metrics = (Path(folder) / checkpoints.METRICS).read_text(encoding="utf-8").splitlines()
    error = json.loads(metrics[-1])["test_error_percent"]
    print(f"test error {error:.2f} %; model in {folder}; next: lben evaluate {folder}")


def _demo(command: Demo) -> None:
    started, folder = time.perf_counter(), Path(command.out)
    recipe = TrainingConfig(
        model=EquilibriumArchitecture(gamma=command.gamma), data="digits", out=command.out,
        epochs=command.epochs, batch_size=64, seed=command.seed,
    )  # fmt: skip
    begun = (folder / checkpoints.CONFIG).exists()
    checkpoints.check_folder(folder, (*_EVALUATED, *checkpoints.RUN), fresh=not begun)
    if begun:
        _, there = checkpoints.load_config(folder)
        if there.get("data") != "digits":
            raise CheckpointError(
                f"{folder} holds a run on {there.get('data', 'data of your own')}, which the demo "
                "would replace: "
                "choose another --out"
            )
    train(recipe, overwrite=begun)  # the demo starts afresh
    config = EvaluationConfig(pairs=10000, ascent_pairs=50, ascent_steps=100, seed=command.seed)
    _evaluate(folder, replace(config, attack_samples=360), None)
    if is_first():
        print(
            f"trained for {command.epochs} epochs on 1437 digits, proved the bound, certified and "
            f"attacked the other 360, in {format_seconds(time.perf_counter() - started)}; "
            f"next: lben certify {folder}"
        )


def _evaluate(folder: Path, config: EvaluationConfig, root: str | None) -> None:
    model, data, said = _load_trained(folder, root, _EVALUATED)
    torch.manual_seed(config.seed)
    with processes("cpu") as team:
        report = evaluate(model, data, config, team)
    if not team.first:
        return
    checkpoints.write_json(folder / "report.json", report)
    picture = _draw(functools.partial(draw, report), folder / "robustness.png")
    print(f"{said}{table(report)}")
    print(f"\n{folder}: {checkpoints.MODEL}, {checkpoints.CERTIFICATE}, report.json{picture}")
    _refuse(report.violations)


def _certify_run(command: Certify) -> None:
    folder = Path(command.run)
    if folder.is_file():
        raise ValueError(
            f"no checkpoint in {folder}: it is a file. If it holds a model, say which inputs are "
            "certified by --data digits, mnist, cifar10 or an .npz file"
        )
    model, data, said = _load_trained(folder, command.root, _CERTIFIED)
    with processes("cpu") as team:
        certificate, report = evaluate_certificates(model, data, command.config, team)
    if not team.first:
        return
    checkpoints.write_json(folder / checkpoints.CERTIFICATE, certificate)
    checkpoints.write_json(folder / "certification.json", report)
    picture = _draw(functools.partial(draw_certification, report), folder / "certification.png")
    print(f"{said}{certification_table(report)}")
    print(f"\n{folder}: {checkpoints.CERTIFICATE}, certification.json{picture}")
    _refuse(report.violations)


def _certify_model(command: Certify) -> None:
    assert command.data is not None
    own = ("linf_radii", "tol", "promise", "attack_steps", "attack_restarts", "seed")
    _refuse_changed(command.config, own, "is for runs without --data")
    radii = command.config.radii
    if command.norm == "linf" and radii == CertificationConfig().radii:
        radii = CertificationConfig().linf_radii
    config = RobustnessConfig(
        radii=radii, norm=command.norm, box=command.box, seconds=command.seconds,
        local=command.config.local,
    )  # fmt: skip
    out = None if command.out is None else Path(command.out)
    if out is not None:
        checkpoints.check_folder(out.parent, (out.name,))
    model = read_model(command.run)
    samples = read_samples(
        command.data, command.root, count=command.config.samples, shape=find_shape(model)
    )
    with processes("cpu") as team:
        report = evaluate_robustness(model, samples, config, team)
    if not team.first:
        return
    print(robustness_table(report))
    if out is not None:
        checkpoints.write_json(out, report)
        print(f"\n{out}")


def _refuse_changed(options: object, names: Sequence[str], why: str) -> None:
    """Refuse options that would do nothing.

    Raises:
        ValueError: naming the first that is not at its default.
    """
    for f in fields(options):  # type: ignore[arg-type]
        if f.name in names and getattr(options, f.name) != f.default:
            raise ValueError(f"--{f.name.replace('_', '-')} {why}")


def _load_trained(
    folder: Path, root: str | None, written: Sequence[str]
) -> tuple[Classifier, Dataset, str]:
    """Return the model of a run, its certificate checked, and the data that it was trained on.

    The third result is a line of text to print with the results; it may be empty. A folder into
    which the results cannot be written is refused before any work.
    """
    model = checkpoints.load_model(folder)
    _, training = checkpoints.load_config(folder)
    if OWN_DATA in training:
        raise CheckpointError(
            f"{folder} holds a model of data of your own ({training[OWN_DATA]['name']!r}), which "
            "it does not keep: take lben.evaluation from Python"
        )
    if "data" not in training:
        raise CheckpointError(
            f"{folder / checkpoints.CONFIG} does not say which data the model was trained on"
        )
    data = load(training["data"], root or training.get("root"))
    checkpoints.check_folder(folder, (checkpoints.CERTIFICATE, *written))
    said = ""
    if is_first():
        proved, doubts = checkpoints.prove_again(folder, model)
        if doubts:
            _tell(f"warning: {doubts}; the bound was proved anew and written there")
            checkpoints.write_json(folder / checkpoints.CERTIFICATE, proved)
        else:
            said = f"{checkpoints.CERTIFICATE} is of this model: its bound was proved again\n"
    return model, data, said


def _draw(draw_into: Callable[[Path], None], path: Path) -> str:
    """Draw a picture if matplotlib is installed; return a note for the list of written files."""
    if importlib.util.find_spec("matplotlib") is None:
        return " (no picture: matplotlib is not installed, pip install 'lben[plots]')"
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        draw_into(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return f", {path.name}"


def _refuse(violations: int) -> None:
    if violations:
        raise CertificateError(
            f"{violations} violations of the bound: please report this as a defect"
        )
