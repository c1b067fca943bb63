"""What does a feed-forward network gain when it is trained on as an equilibrium network?

    python -m benchmarks.finetune [--quick] [--out FILE] [--root FOLDER]

An SLL network of dense layers is trained on MNIST with the published loss. Then it is trained on
for as many steps at the same rate, once as it is, and once as the equilibrium network that
`EquilibriumLinear.from_weights` makes of its layers: the same function and bound at the start, with
a small penalty on feedback that it did not have. Certified accuracy (per-pair margins, solver and
rounding error subtracted) is compared.
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import finish, mnist_of, parser
from lben import EquilibriumLinear, LipschitzSequential, feedback
from lben.data import Dataset, pixels
from lben.layers import EquilibriumLayer, FeedforwardLayer, Flatten
from lben.models import FeedforwardClassifier, FeedforwardClassifierConfig
from lben.radii.margin import margin_radius
from lben.training.augmentation import Augmentation
from lben.training.losses import CrossEntropy
from lben.training.optimization import PiecewiseLinear
from lben.weights import DenseWeights

SEED, BATCH, HIDDEN, DEPTH = 0, 256, 64, 3
RADII = (0.0, 0.5, 1.0, 1.5)
LOSS = CrossEntropy(temperature=0.25, offset=1.5 * math.sqrt(2))
PENALTY = 1e-3
RATE = 5e-4  # of both, after the first training


def main() -> None:
    """Run the benchmark."""
    options = parser("feed-forward training against fine-tuning as an equilibrium network")
    options.add_argument("--root", help="folder that holds MNIST/raw")
    arguments = options.parse_args()
    _, data = mnist_of(arguments.root, "finetune")
    torch.manual_seed(SEED)
    steps, more = (100, 20) if arguments.quick else (3000, 400)
    model = FeedforwardClassifierConfig(
        shape=data.shape, classes=10, mean=data.mean, std=(1.0,), channels=(1,), depths=(0,),
        pool=1, dense_depth=DEPTH, dense_hidden=HIDDEN,
    ).build()  # fmt: skip
    _train(model, data, steps, 1e-2, 0)
    rows: dict[str, dict[str, Any]] = {"feed-forward": _certify(model, data, arguments)}

    equilibrium = copy.deepcopy(model)
    layers = [
        layer.parameterization.dense(torch.float32)
        for layer in equilibrium.features
        if isinstance(layer, FeedforwardLayer)
    ]
    core = EquilibriumLinear.from_weights(layers, trainable=True, tol=1e-4).float()
    equilibrium.features = LipschitzSequential(Flatten(), core)
    rows["converted"] = _certify(equilibrium, data, arguments)

    _train(model, data, more, RATE, 1)
    rows["feed-forward, trained on"] = _certify(model, data, arguments)
    _train(equilibrium, data, more, RATE, 1, core)
    rows["equilibrium, trained on"] = _certify(equilibrium, data, arguments)
    structure = float(feedback(core.weights().W.detach(), [HIDDEN] * DEPTH))

    print(f"\n{'network':26}" + "".join(f"{f'certified at {r:g}':>18}" for r in RADII) + "   bound")
    for name, row in rows.items():
        shares = "".join(f"{100 * share:17.2f}%" for share in row["certified"])
        print(f"{name:26}{shares}   {row['bound']:.6f}")
    print(f"squared norm of the feedback in W after fine-tuning: {structure:.3g}")
    gain = {
        f"{r:g}": round(
            100 * (rows["equilibrium, trained on"]["certified"][i]
                   - rows["feed-forward, trained on"]["certified"][i]), 2)
        for i, r in enumerate(RADII)
    }  # fmt: skip
    finish(
        {"gain_in_points": gain}, arguments.out, seed=SEED, quick=arguments.quick, rows=rows,
        feedback=structure, steps=[steps, more],
    )  # fmt: skip


def _train(
    model: FeedforwardClassifier,
    data: Dataset,
    steps: int,
    lr: float,
    seed: int,
    core: EquilibriumLayer[DenseWeights] | None = None,
) -> None:
    """Adam over random batches; with an equilibrium core its feedback is penalised."""
    model.train()
    generator = torch.Generator().manual_seed(seed)
    augment, schedule = Augmentation(shift=1), PiecewiseLinear()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.5, 0.9))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        index = torch.randint(len(data.train_images), (BATCH,), generator=generator)
        x, labels = augment(data.train_images[index], generator), data.train_labels[index]
        loss = LOSS(model(x), labels)
        if core is not None:
            loss = loss + PENALTY * feedback(core.parameterization().W, [HIDDEN] * DEPTH)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 10) == 0:
            print(f"step {step:5} of {steps}: loss {float(loss.detach()):.4f}", flush=True)


def _certify(
    model: FeedforwardClassifier, data: Dataset, arguments: argparse.Namespace
) -> dict[str, Any]:
    exact = model.to_exact(1e-8)
    certificate = exact.certificate()
    count = 500 if arguments.quick else len(data.test_labels)
    radii = []
    for start in range(0, count, 1000):
        part = slice(start, min(start + 1000, count))
        labels = data.test_labels[part]
        images = pixels(data.test_images[part], torch.float64)
        result = exact.forward_with_error(images, certificate)
        radius = margin_radius(
            result.value, labels, certificate.radius_bound(), logit_error=result.error
        )
        radii.append(torch.where(result.value.argmax(1) == labels, radius, -1.0))
    found: Tensor = torch.cat(radii)
    return {
        "certified": [float((found >= 0 if r == 0 else found > r).double().mean()) for r in RADII],
        "bound": certificate.bound,
    }


if __name__ == "__main__":
    main()
