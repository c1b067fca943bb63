"""What do convolutional equilibria certify on CIFAR-10, and how much of their bound do they use?

    python -m benchmarks.conv_cifar [--models NAME …] [--minutes M] [--device cuda] [--epochs E]
                                    [--root FOLDER] [--out FILE] [--work FOLDER] [--quick]

Without arguments: one small network (48 channels on 8 × 8 pixels after invertible down-sampling)
at γ = 1 and 3 on the normalised image and without a bound, for a budget of minutes each. `--models
single-1 multi-1 hybrid --device cuda` trains the published sizes and a hybrid with SLL layers;
a run that was cut off continues when the same command is given again.

Beside certified and attacked accuracy it reports the largest quotient that gradient ascent found,
as a share of γ (`reached`), and how many of 10⁴ attacked pairs exceed the proved bound: pairs near
it are evaluated again in float64.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cifar import PUBLISHED, cifar, options, picture, run, source, summary
from benchmarks.common import RESULTS, finish
from lben.data import Dataset, pixels
from lben.evaluation.accuracy import EvaluationConfig, Report
from lben.evaluation.attacks import ascend_quotient, quotients
from lben.models import (
    Architecture,
    Classifier,
    ConvolutionalEquilibriumArchitecture,
    FeedforwardArchitecture,
)
from lben.training import checkpoints
from lben.training.augmentation import Augmentation
from lben.training.losses import CrossEntropy
from lben.training.optimization import Adam, PiecewiseLinear
from lben.training.recipes import TrainingConfig

RADII = (0.0, 36 / 255, 72 / 255, 108 / 255, 1.0)
TOL = 1e-6

LAYER = ConvolutionalEquilibriumArchitecture()
SINGLE = TrainingConfig(
    model=LAYER,
    data="cifar10",
    epochs=60,
    batch_size=128,
    lr=1e-3,
    optimizer=Adam(),
    schedule=PiecewiseLinear(),
    loss=CrossEntropy(temperature=0.25, offset=2.0),
    augmentation=Augmentation(shift=4, reflect=True, flip=True),
)
SMALL = ConvolutionalEquilibriumArchitecture(channels=(48,), stem=4, pool=2)
LIGHT = replace(SINGLE, augmentation=Augmentation(shift=2, flip=True))
HYBRID = FeedforwardArchitecture(depths=(10,), dense_depth=3, core=64)
MODELS: dict[str, TrainingConfig[Architecture]] = {
    "γ = 1": replace(LIGHT, model=replace(SMALL, gamma=1.0)),
    "γ = 3": replace(
        LIGHT, model=replace(SMALL, gamma=3.0), loss=CrossEntropy(temperature=0.75, offset=6.0)
    ),
    "no bound": replace(LIGHT, model=replace(SMALL, gamma=None), loss=CrossEntropy()),
    **{f"single-{g}": replace(SINGLE, model=replace(LAYER, gamma=float(g))) for g in (1, 2, 3, 5)},
    "single-unbounded": replace(SINGLE, model=replace(LAYER, gamma=None), loss=CrossEntropy()),
    "multi-1": replace(SINGLE, model=replace(LAYER, channels=(16, 32, 64))),
    "hybrid": replace(PUBLISHED, model=HYBRID, epochs=100),
}
DEFAULT = ("γ = 1", "γ = 3", "no bound")


def main() -> None:
    """Run the benchmark."""
    arguments = options("convolutional equilibria", MODELS, DEFAULT).parse_args()
    data = cifar(arguments)
    models = ("γ = 1",) if arguments.quick else arguments.models
    evaluation = EvaluationConfig(
        radii=RADII, tol=TOL, pairs=500, ascent_pairs=20, ascent_steps=40, pgd_restarts=1,
        pgd_steps=10, attack_samples=50 if arguments.quick else 200,
    )  # fmt: skip
    pairs = 200 if arguments.quick else 10_000
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        results, figures = {}, {}
        for name in models:
            folder = work / name.replace(" ", "")
            report, seconds = run(MODELS[name], data, arguments, folder, evaluation)
            results[name] = report, seconds
            figures[name] = _figures(report, seconds, folder, data, pairs, arguments)
            print(figures[name], flush=True)
    if len(results) > 1 and not arguments.quick:
        picture(results, RESULTS / "conv_cifar.png", f"{source(arguments)}, conv. equilibria")
    finish(
        figures,
        arguments.out,
        data=source(arguments),
        quick=arguments.quick,
        recipes={name: str(MODELS[name]) for name in models},
        reports={name: report.to_dict() for name, (report, _) in results.items()},
    )


def _figures(
    report: Report,
    seconds: float,
    folder: Path,
    data: Dataset,
    pairs: int,
    arguments: argparse.Namespace,
) -> dict[str, object]:
    model = checkpoints.load_model(folder).to(arguments.device)
    largest, violations = _attacked(model, data, pairs, report.bound)
    quotient = max(largest, report.quotient)
    return {
        **summary(report, seconds),
        "bound": report.bound,
        "quotient": quotient,
        "reached": round(quotient / report.bound, 4),
        "attacked_pairs": pairs,
        "violations": report.violations + violations,
    }


def _attacked(model: Classifier, data: Dataset, pairs: int, bound: float) -> tuple[float, int]:
    """Return the largest quotient of attacked pairs, and how many exceed the bound in float64."""
    exact, generator = model.to_exact(1e-9), torch.Generator().manual_seed(0)
    device, largest, violations = next(model.parameters()).device, 0.0, 0
    for part in torch.arange(pairs).split(250):
        images = pixels(data.test_images[part % len(data.test_images)], torch.float32).to(device)
        found = ascend_quotient(model, images, steps=1, generator=generator)
        near = found.quotient > 0.98 * min(bound, math.inf)
        largest = max(largest, float(found.quotient[~near].max()) if bool((~near).any()) else 0.0)
        if bool(near.any()):
            again = quotients(exact, found.a[near].cpu().double(), found.b[near].cpu().double())
            largest = max(largest, float(again.max()))
            violations += int((again > bound).sum())
    return largest, violations


if __name__ == "__main__":
    main()
