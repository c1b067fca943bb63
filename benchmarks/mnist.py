"""How good are equilibrium classifiers of MNIST with 80 units, how tight are their bounds?

    python -m benchmarks.mnist [--quick] [--out FILE] [--root FOLDER]

trains five models (γ = 0.2, 0.5, 1, 5 on the normalised input, and monDEQ), and certifies and
attacks them in float64 at tolerance 1e-8. With --quick the models are those that the last full run
left in results/mnist, and fewer pairs are attacked. A full run rewrites results/mnist.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.common import RESULTS, finish, mnist_of, parser
from lben.data import Dataset
from lben.evaluation.accuracy import EvaluationConfig, Report, evaluate
from lben.evaluation.reports import table
from lben.models import EquilibriumArchitecture
from lben.training import checkpoints
from lben.training.augmentation import Augmentation
from lben.training.loop import train
from lben.training.recipes import TrainingConfig

FOLDER = RESULTS / "mnist"
MODELS = {
    "0.2": EquilibriumArchitecture(gamma=0.2),
    "0.5": EquilibriumArchitecture(gamma=0.5),
    "1": EquilibriumArchitecture(gamma=1.0),
    "5": EquilibriumArchitecture(gamma=5.0),
    "monotone": EquilibriumArchitecture(gamma=None, learn_metric=False),
}
RECIPE = TrainingConfig(
    model=MODELS["1"], data="mnist", epochs=40, lr=4e-3, augmentation=Augmentation(shift=1)
)
FULL = EvaluationConfig(
    tol=1e-8, pairs=100_000, ascent_pairs=200, ascent_steps=300, attack_samples=1000
)
QUICK = EvaluationConfig(
    tol=1e-8, pairs=5000, ascent_pairs=50, ascent_steps=60, attack_samples=100, pgd_restarts=1,
    radii=(0.0, 0.5, 1.0, 1.5),
)  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    options = parser("MNIST: test error, tightness and violations of 80-unit equilibrium models")
    options.add_argument("--root", help="folder that holds MNIST/raw")
    arguments = options.parse_args()
    root, data = mnist_of(arguments.root, "mnist")
    if not arguments.quick:
        for name in MODELS:
            _train(name, root)
    reports = {name: _evaluate(name, data, arguments) for name in MODELS}
    _summary(reports)
    if not arguments.quick:
        _picture(reports, RESULTS / "mnist.png")
    figures = {
        "test_error": {n: round(100 * (1 - r.clean_accuracy), 2) for n, r in reports.items()},
        "tightness": {n: round(r.tightness, 4) for n, r in reports.items()},
        "violations": sum(r.violations for r in reports.values()),
    }
    finish(
        figures,
        arguments.out or (None if arguments.quick else RESULTS / "mnist.json"),
        seed=RECIPE.seed,
        quick=arguments.quick,
        recipe={"epochs": RECIPE.epochs, "lr": RECIPE.lr, "shift": RECIPE.augmentation.shift},
        reports={name: report.to_dict() for name, report in reports.items()},
    )


def _train(name: str, root: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(f"training {name}", flush=True)
        train(replace(RECIPE, model=MODELS[name], root=root, out=folder))
        target = FOLDER / name
        target.mkdir(parents=True, exist_ok=True)
        for file in (checkpoints.MODEL, checkpoints.CERTIFICATE, checkpoints.METRICS):
            shutil.copy(Path(folder) / file, target / file)
        model, training = checkpoints.load_config(folder)
        checkpoints.save_config(target, model, {**training, "root": "data", "out": name})


def _evaluate(name: str, data: Dataset, arguments: argparse.Namespace) -> Report:
    report = evaluate(
        checkpoints.load_model(FOLDER / name).double(), data, QUICK if arguments.quick else FULL
    )
    print(f"\n--- {name}\n{table(report)}", flush=True)
    return report


def _summary(reports: dict[str, Report]) -> None:
    radii = next(iter(reports.values())).radii
    shown = [r for r in radii if r in (0.5, 1.0, 1.5)]
    print("\nγ          error %   bound   found   tightness   violations / pairs", end="")
    print("".join(f"   cert. {r:g}" for r in shown))
    for name, r in reports.items():
        line = (
            f"{name:9}  {100 * (1 - r.clean_accuracy):6.2f}  {r.promised_bound or r.bound:7.3f} "
            f"{r.quotient:7.3f}     {r.tightness:7.4f}   {r.violations:5} / {r.pairs:7}    "
        )
        certified = dict(zip(r.radii, r.certified_accuracy, strict=True))
        print(line + "".join(f"   {100 * certified[radius]:7.2f}" for radius in shown))
    print("bounds and quotients in pixels; radii in the l2 norm of pixels on [0, 1]\n")


def _picture(reports: dict[str, Report], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, r in enumerate(reports.values()):
        label = "monDEQ" if r.gamma is None else f"γ = {r.gamma:g}"
        axes.plot(r.radii, [100 * a for a in r.certified_attacked], color=f"C{index}", label=label)
        axes.plot(r.radii, [100 * a for a in r.pgd_accuracy], color=f"C{index}", ls="--")
    axes.plot([], [], color="0.4", label="certified")
    axes.plot([], [], color="0.4", ls="--", label="withstands PGD")
    axes.set_xlabel("ℓ2 radius (pixels on [0, 1])")
    axes.set_ylabel(f"accuracy, % of {next(iter(reports.values())).attack_samples} test images")
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.set_title("MNIST, 80 equilibrium units: γ counted on the normalised input", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
