"""How much accuracy can be certified on CIFAR-10, by which family, in how much time?

    python -m benchmarks.cifar [--models NAME …] [--minutes M] [--device cuda] [--epochs E]
                               [--root FOLDER] [--out FILE] [--work FOLDER] [--quick]

trains, certifies and attacks feed-forward networks. Without arguments: one small network a family,
for an equal budget of minutes each on this machine, the number of epochs measured beforehand.
`--models sll-small --device cuda` trains the published network; a run that was cut off continues
from its last epoch when the same command is given again. The last line has the figures of each.

Certified accuracy is that of the margin rule with the bounds of each pair of logits; attacked
accuracy that of PGD. `--jpeg` marks the figures of a JPEG copy of the data.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import RESULTS, finish, parser
from lben.data import DataError, Dataset, load
from lben.evaluation.accuracy import EvaluationConfig, Report, evaluate
from lben.evaluation.reports import table
from lben.models import Architecture, FeedforwardArchitecture, Size, published_architecture
from lben.training import checkpoints
from lben.training.augmentation import Augmentation
from lben.training.loop import train
from lben.training.losses import CrossEntropy
from lben.training.optimization import Adam, PiecewiseLinear
from lben.training.recipes import TrainingConfig

RADII = (0.0, 36 / 255, 72 / 255, 108 / 255, 1.0)
NAMES = ("clean", "36/255", "72/255", "108/255", "255/255")

# The loss, optimizer and schedule of Araujo et al. (2023); a batch four times theirs.
PUBLISHED = TrainingConfig(
    model=FeedforwardArchitecture(), data="cifar10", epochs=1000, batch_size=256, lr=1e-2,
    loss=CrossEntropy(temperature=0.25, offset=1.5 * math.sqrt(2)),
    optimizer=Adam(betas=(0.5, 0.9)), schedule=PiecewiseLinear(),
    augmentation=Augmentation(
        shift=4, reflect=True, flip=True, brightness=0.1, contrast=(0.5, 2.0),
        saturation=(0.3, 2.0), hue=0.02,
    ),
)  # fmt: skip
# Two cores: half the resolution and a tenth of the width; little augmentation for few epochs.
SMALL = FeedforwardArchitecture(
    stem=2, channels=(32, 64), depths=(3, 3), conv_hidden=24, pool=2, dense_depth=2,
    dense_hidden=384,
)  # fmt: skip
LIGHT = replace(PUBLISHED, batch_size=128, augmentation=Augmentation(shift=2, flip=True))
SIZES: tuple[Size, ...] = ("small", "medium", "large", "xlarge")
MODELS: dict[str, TrainingConfig[Architecture]] = {
    "sll": replace(LIGHT, model=replace(SMALL, block="sll")),
    "cpl": replace(LIGHT, model=replace(SMALL, block="cpl")),
    "aol": replace(LIGHT, model=replace(SMALL, block="aol")),
    "spectral": replace(LIGHT, model=replace(SMALL, block="spectral")),
    "sandwich": replace(
        LIGHT,
        model=replace(SMALL, block="sandwich", depths=(2, 2), conv_hidden=32, dense_depth=1),
    ),
    **{f"sll-{size}": replace(PUBLISHED, model=published_architecture(size)) for size in SIZES},
}
FAMILY = ("sll", "cpl", "aol", "spectral", "sandwich")


def main() -> None:
    """Run the benchmark."""
    arguments = options("feed-forward 1-Lipschitz networks", MODELS, FAMILY).parse_args()
    data = cifar(arguments)
    models = ("sll",) if arguments.quick else arguments.models
    evaluation = EvaluationConfig(
        radii=RADII, pairs=1000, ascent_pairs=20, ascent_steps=40, pgd_restarts=1,
        attack_samples=100 if arguments.quick else 200, bound="promised",
    )  # fmt: skip
    if not set(models) <= set(FAMILY):  # attacks in float64 on the published sizes are expensive
        evaluation = replace(evaluation, pairs=200, ascent_pairs=5, attack_samples=50)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        results = {
            name: run(MODELS[name], data, arguments, work / name, evaluation) for name in models
        }
    if len(results) > 1 and not arguments.quick:
        picture(results, RESULTS / "cifar.png", f"{source(arguments)}, equal time")
    figures = {name: summary(report, seconds) for name, (report, seconds) in results.items()}
    finish(
        figures,
        arguments.out,
        data=source(arguments),
        quick=arguments.quick,
        recipes={name: str(MODELS[name]) for name in models},
        reports={name: report.to_dict() for name, (report, _) in results.items()},
    )


def options(
    what: str, models: Mapping[str, object], default: Sequence[str]
) -> argparse.ArgumentParser:
    """Return a parser for trainings of named models."""
    words = parser(f"CIFAR-10: certified accuracy of {what}")
    words.add_argument("--models", nargs="+", choices=list(models), default=list(default))
    words.add_argument("--minutes", type=float, default=8.0, help="of training per model")
    words.add_argument("--epochs", type=int, help="instead of a budget of minutes")
    words.add_argument("--device", default="cpu")
    words.add_argument("--root", default="data", help="folder with the CIFAR-10 batches")
    words.add_argument("--work", type=Path, help="folder of the runs, to continue them")
    words.add_argument("--jpeg", action="store_true", help="the data are a JPEG copy")
    words.add_argument("--autocast", action="store_true", help="products in bfloat16")
    return words


def cifar(arguments: argparse.Namespace) -> Dataset:
    """Return the data, or end the program with one line."""
    try:
        return load("cifar10", arguments.root)
    except DataError as error:
        sys.exit(f"benchmarks: {error}")


def source(arguments: argparse.Namespace) -> str:
    """Return what the figures call the data."""
    return "CIFAR-10 (JPEG-75 copy)" if arguments.jpeg else "CIFAR-10"


def run(
    recipe: TrainingConfig[Architecture],
    data: Dataset,
    arguments: argparse.Namespace,
    folder: Path,
    evaluation: EvaluationConfig,
) -> tuple[Report, float]:
    """Train for the budget of the arguments, or continue, and evaluate; return the seconds too."""
    recipe = replace(recipe, root=arguments.root, out=str(folder), device=arguments.device)
    if recipe.model.supports:
        recipe = replace(
            recipe, autocast=arguments.autocast, channels_last=arguments.device == "cuda"
        )
    begun = (folder / checkpoints.TRAINING).exists()
    if begun:
        _, record = checkpoints.load_config(folder)
        recipe = replace(recipe, epochs=record["epochs"])
    elif arguments.quick or arguments.epochs is not None:
        recipe = replace(recipe, epochs=arguments.epochs or 1)
    else:
        recipe = replace(recipe, epochs=_epochs(recipe, data, 60 * arguments.minutes))
    print(f"\n--- {folder.name}: {recipe.epochs} epochs", flush=True)
    model = train(recipe, resume=begun)
    lines = (folder / checkpoints.METRICS).read_text().splitlines()
    seconds = sum(json.loads(line)["seconds"] for line in lines)
    report = evaluate(model, data, evaluation)
    print(table(report), flush=True)
    return report, seconds


def _epochs(recipe: TrainingConfig[Architecture], data: Dataset, budget: float) -> int:
    """Return how many epochs fit into a budget of seconds, from some timed steps."""
    torch.manual_seed(0)
    model = recipe.model.for_data(data).build().to(recipe.device)
    optimizer = recipe.optimizer.build(model)
    generator = torch.Generator().manual_seed(0)
    images = data.train_images.to(recipe.device)
    labels = data.train_labels.to(recipe.device)
    size, times = recipe.batch_size, []
    for step in range(10):
        start = time.perf_counter()
        part = slice(step * size, (step + 1) * size)
        with torch.autocast(recipe.device, torch.bfloat16, enabled=recipe.autocast):
            logits = model(recipe.augmentation(images[part], generator))
        loss = recipe.loss(logits.float(), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        float(loss.detach())
        times.append(time.perf_counter() - start)
    epoch = sorted(times)[len(times) // 2] * math.ceil(len(labels) / size)
    return max(1, int(budget / (1.05 * epoch)))


def summary(report: Report, seconds: float) -> dict[str, object]:
    """Return clean and certified accuracy in per cent, and the seconds of training."""
    certified = dict(zip(NAMES, report.certified_accuracy, strict=True))
    return {
        "clean": round(100 * report.clean_accuracy, 2),
        "certified": {name: round(100 * certified[name], 2) for name in NAMES[1:]},
        "seconds": round(seconds, 1),
    }


def picture(results: Mapping[str, tuple[Report, float]], path: Path, title: str) -> None:
    """Draw certified and attacked accuracy over the radius, both on the attacked images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (name, (report, _)) in enumerate(results.items()):
        pixels = [255 * r for r in report.radii]
        axes.plot(
            pixels, [100 * a for a in report.certified_attacked], color=f"C{index}", label=name
        )
        axes.plot(pixels, [100 * a for a in report.pgd_accuracy], color=f"C{index}", ls="--")
    axes.plot([], [], color="0.4", label="certified")
    axes.plot([], [], color="0.4", ls="--", label="withstands PGD")
    axes.set_xlabel("ℓ2 radius (255 ÷ pixels on [0, 1])")
    axes.set_ylabel(f"accuracy on the first {report.attack_samples} test images, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
