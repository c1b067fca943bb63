"""Are the certificates sound, how tight are they, and what do they cost?

    python -m benchmarks.certificates [--quick] [--out FILE] [--root FOLDER] [--parts PART …]

- soundness: random and attacked pairs over random and trained networks of every kind, in float32
  and float64, against the certificate of the weights that run (`--quick`: a tenth of the networks);
- faults that are planted in parameterizations, proofs, radii and solvers (`benchmarks.faults`) and
  in what claims cover (`benchmarks.claims`): every one must be caught, and nothing without one;
- the network as it runs at images x' inside certified radii (`benchmarks.running`), and what that
  promise costs in certified points at tolerances 1e-4, 1e-6 and 1e-8;
- bounds of rounding and of solver error, at x and around it, against whole networks evaluated in
  integer arithmetic, and sums in orders chosen by hand (`benchmarks.rounding`);
- radii at images placed next to the boundary of the exact network, at tolerances from 1e-1 to 1e-7
  in both precisions, beside the textbook rule;
- tightness: joint bound ÷ largest quotient found, and certified accuracy by method on the MNIST
  models of `benchmarks.mnist`, on one trained here as plainly as the papers do (Adam, no
  augmentation), and on networks of other kinds; `gap_closed_at_1` is the share of the images
  between the √2γ rule and the attacks, at l2 radius 1.0, that the best proof certifies, and
  `gained_at_1` how many points that is, both of the plain model;
- seconds of a proof at n = 80, 400 and 1000, and of the joint semidefinite program.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import claims
from benchmarks.common import COMMIT, circumstances, finish, mnist_of, parser, trained, write
from benchmarks.faults import Bench, faults, honest
from benchmarks.networks import (
    Network,
    random_networks,
    trained_networks,
    trained_on_digits,
)
from benchmarks.rounding import rounding
from benchmarks.running import promise, running
from lben import EquilibriumLinear, certify, tighten_diagonal
from lben.data import Dataset, load, pixels
from lben.evaluation.attacks import across_the_boundary, ascend_quotient, corner_pairs, random_pairs
from lben.evaluation.proofs import CertificationConfig, evaluate_certificates
from lben.evaluation.reports import certification_table
from lben.models import Classifier, EquilibriumArchitecture, EquilibriumClassifier
from lben.training.loop import train
from lben.training.optimization import Adam
from lben.training.recipes import TrainingConfig

SEED = 0
PLAIN = "MNIST, γ = 1, plainly trained"
PARTS = (
    "cost", "soundness", "faults", "running", "rounding", "promise", "boundary", "tightness",
    "certified",
)  # fmt: skip
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def main() -> None:
    """Run the parts that are asked for, and put them into the file beside those that are there."""
    options = parser("soundness, tightness and cost of certificates")
    options.add_argument("--root", help="folder that holds MNIST/raw")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    arguments = options.parse_args()
    root, mnist = mnist_of(arguments.root, "certificates")
    quick = arguments.quick
    record = Record(arguments.out, quick)
    warnings.simplefilter("ignore")  # solves of images far outside [0, 1] may miss the tolerance
    parts: dict[str, Callable[[], Any]] = {
        "cost": lambda: cost(80 if quick else None),
        "soundness": lambda: soundness(
            [*random_networks(28 if quick else 210, SEED), *trained_networks(quick)],
            500 if quick else 2300,
        ),
        "faults": lambda: planted(Bench(mnist)),
        "running": lambda: running(
            mnist, quick, record.rows("running"), partial(record.put, "running")
        ),
        "rounding": lambda: rounding(quick),
        "promise": lambda: promise(mnist, quick),
        "boundary": lambda: boundary(mnist, (1e-2, 1e-5) if quick else TOLERANCES),
        "tightness": lambda: tightness(mnist, quick),
        "certified": lambda: certified(mnist, plain_model(root), quick),
    }
    for name in arguments.parts:
        record.put(name, parts[name]())
    found = {name: record.parts[name] for name in PARTS if name in record.parts}
    figures = summary({name: part["found"] for name, part in found.items()})
    finish(figures, arguments.out, **found)


class Record:
    """The parts that are finished, kept in a file where one is given.

    Attributes:
        parts: per name what was found, with its circumstances.
    """

    def __init__(self, out: Path | None, quick: bool) -> None:
        self._out, self._quick = out, quick
        self.parts: dict[str, Any] = {}
        self._read()

    def put(self, name: str, found: Any) -> None:
        """Add a part, or put it in the place of an older one."""
        self._read()  # now: others may have added to it
        self.parts[name] = {"found": found, **self._run}
        if self._out is not None:
            write(self._out, self.parts)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a part that this version has run, with these options, and stopped."""
        part = self.parts.get(name, {})
        same = all(part.get(key) == value for key, value in self._run.items() if key != "date")
        return list(part["found"]) if same and not COMMIT.endswith("+changes") else []

    @property
    def _run(self) -> dict[str, Any]:
        return {"seed": SEED, "quick": self._quick, **circumstances()}

    def _read(self) -> None:
        if self._out is not None and self._out.exists():
            self.parts = json.loads(self._out.read_text())


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the parts that are there."""
    figures: dict[str, Any] = {"violations": 0}
    if "soundness" in found:
        figures["violations"] += found["soundness"]["violations"]
    if "running" in found:
        figures["violations"] += sum(row["wrong"] for row in found["running"])
        figures["images_inside"] = sum(row["images"] for row in found["running"])
        figures["wrong_at_x_alone"] = sum(row["at x alone"] for row in found["running"])
    if "rounding" in found:
        figures["violations"] += sum(row["wrong"] for row in found["rounding"])
        figures["errors_in_exact_arithmetic"] = sum(row["errors"] for row in found["rounding"])
    if "promise" in found:
        figures["certified_at_1"] = {
            f"γ = {row['γ']}, {row['dtype']}, {row['tol']:g}": [
                row[kind][1] for kind in ("running", "exact", "textbook")
            ]
            for row in found["promise"]
        }
    if "boundary" in found:
        figures["violations"] += sum(row["ours"] for row in found["boundary"])
    if "faults" in found:
        caught = found["faults"]["caught"]
        figures["violations"] += sum(found["faults"]["without"].values())
        figures |= {"faults_planted": len(caught), "faults_caught": sum(caught.values())}
    if "tightness" in found:
        figures["tightness_gamma1"] = found["tightness"]
    if "certified" in found:
        figures["violations"] += sum(table["violations"] for table in found["certified"].values())
        plain = found["certified"][PLAIN]
        figures |= {name: plain[name] for name in ("gap_closed_at_1", "gained_at_1")}
    return figures | found.get("cost", {})


def planted(bench: Bench) -> dict[str, Any]:
    """Plant every fault, and look first that nothing is caught without one."""
    without = honest(bench) | claims.honest()
    print(f"without a fault: {without}")
    caught = {name: run() for name, run in (*faults(bench), *claims.faults())}
    print("\n".join(f"{'caught' if c else 'MISSED'}: {name}" for name, c in caught.items()))
    return {"without": without, "caught": caught}


def soundness(networks: Iterable[Network], count: int) -> dict[str, Any]:
    """Attack every network in both precisions, and count pairs beyond its bound."""
    generator = torch.Generator().manual_seed(SEED)
    totals: dict[str, dict[str, float]] = {}
    for network in networks:
        total = totals.setdefault(network.kind, {"pairs": 0, "violations": 0, "reached": 0.0})
        for dtype in (torch.float32, torch.float64):
            model = network.model.to(dtype).requires_grad_(False)
            proof = model.certificate(bound=network.bound)
            x = torch.rand(64, *model.shape, generator=generator).to(dtype)
            found = ascend_quotient(model, x, steps=20, generator=generator)
            pairs = [(found.a, found.b), *corner_pairs(x, generator)]
            pairs += random_pairs(x, count, generator)
            for a, b in pairs:
                ya, yb = (model.forward_with_error(side, proof) for side in (a, b))
                change = (ya.value.double() - yb.value.double()).norm(dim=1)
                distance = (a.double() - b.double()).flatten(1).norm(dim=1)
                allowed = proof.bound * distance * (1 + 1e-12) + ya.error + yb.error
                total["violations"] += int((change > allowed).sum())
                total["pairs"] += len(a)
            total["reached"] = max(total["reached"], float(found.quotient.max()) / proof.bound)
    for kind, total in totals.items():
        print(f"{kind}: {total}")
    return {
        "networks": len(list(networks)),
        "pairs": int(sum(t["pairs"] for t in totals.values())),
        "violations": int(sum(t["violations"] for t in totals.values())),
        "kinds": totals,
    }


def boundary(mnist: Dataset, tolerances: Iterable[float]) -> list[dict[str, Any]]:
    """Count wrong radii at images next to the boundary of the exact γ = 1 network.

    A tolerance that float32 cannot hold is replaced by the smallest that it can.
    """
    x = pixels(mnist.test_images[:1000], torch.float64)
    rows = []
    for dtype in (torch.float64, torch.float32):
        own = trained("1").to(dtype)
        exact = _same_weights(own)
        near, across = across_the_boundary(exact, x[:500], x[500:], distance=2e-3)
        near = near.to(dtype)
        beyond = exact(across).argmax(1)
        distance = (near.double() - across).flatten(1).norm(dim=1)
        for tol in sorted({max(t, 4 * torch.finfo(dtype).eps) for t in tolerances}, reverse=True):
            own.layer.tol, own.layer.on_failure = tol, "warn"
            labels = own(near).argmax(1)
            wrong = labels != beyond  # else the image across is no counterexample
            proof = own.certificate(bound="scaled")

            found: dict[str, Any] = {
                "dtype": str(dtype).removeprefix("torch."), "tol": tol, "images": len(near),
            }  # fmt: skip
            for name, sound in (("textbook", False), ("ours", True)):
                radius = own.certified_radius(near, labels, proof, sound=sound)
                found[name] = int(((radius >= distance) & wrong).sum())
            rows.append(found)
            print(found)
    return rows


def _same_weights(model: EquilibriumClassifier) -> EquilibriumClassifier:
    """Return the network of the very weights that run, in float64 and solved to 1e-11."""
    exact = model.to_exact(1e-11)
    weights = model.layer.weights().to(torch.float64)
    vars(exact.layer)["weights"] = lambda: weights
    return exact


def tightness(mnist: Dataset, quick: bool) -> float:
    """Return the joint bound of the γ = 1 model ÷ the largest quotient found."""
    exact = trained("1").to_exact(1e-9)
    x = pixels(mnist.test_images[: 20 if quick else 200], torch.float64)
    found = ascend_quotient(exact, x, steps=60 if quick else 300,
                            generator=torch.Generator().manual_seed(SEED))  # fmt: skip
    return round(exact.certificate(bound="diagonal").bound / float(found.quotient.max()), 4)


def certified(mnist: Dataset, plainly: Classifier, quick: bool) -> dict[str, dict[str, Any]]:
    """Certify by every method: MNIST models, and networks of other kinds on the digits."""
    digits = load("digits")
    cases: list[tuple[str, Classifier, Dataset, tuple[float, ...]]] = [
        (PLAIN, plainly, mnist, (0.5, 1.0, 1.5))
    ]
    if not quick:
        cases.append(("MNIST, γ = 1", trained("1"), mnist, (0.5, 1.0, 1.5)))
        cases.append(("MNIST, γ = 5", trained("5"), mnist, (0.25, 0.5, 1.0)))
        for kind in ("sll", "convolution, γ = 1"):
            cases.append((f"digits, {kind}", trained_on_digits(kind), digits, (0.1, 0.25, 0.5)))
    tables = {}
    for kind, model, data, radii in cases:
        config = CertificationConfig(
            radii=radii, samples=100 if quick else 1000, attack_steps=20 if quick else 40,
            attack_restarts=1 if quick else 2,
        )  # fmt: skip
        _, report = evaluate_certificates(model, data, config)
        print(kind, certification_table(report), sep="\n")
        tables[kind] = report.to_dict()
        if 1.0 in radii:
            at = radii.index(1.0)
            plain = next(m for m in report.methods if m.name == "promised").certified[at]
            gap = report.attacked[at] - plain
            gained = report.best[at] - plain
            tables[kind] |= {"gained_at_1": round(100 * gained, 2),
                             "gap_closed_at_1": round(gained / gap, 3)}  # fmt: skip
    return tables


def plain_model(root: str) -> Classifier:
    """Train 80 units at γ = 1 without what `benchmarks.mnist` does for accuracy."""
    recipe = TrainingConfig(
        model=EquilibriumArchitecture(gamma=1.0), data="mnist", root=root, epochs=10, lr=1e-3,
        optimizer=Adam(), seed=SEED,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return train(replace(recipe, out=folder)).eval()


def cost(only: int | None) -> dict[str, dict[str, float]]:
    """Time the proof and the joint program at n units, 784 inputs and 10 outputs."""
    proofs, programs = {}, {}
    for n in (80, 400, 1000):
        torch.manual_seed(SEED)
        weights = EquilibriumLinear(784, n, 10, gamma=1.0).weights()
        proofs[str(n)] = _seconds(partial(certify, weights), 7)
        if n <= (only or 400):
            programs[str(n)] = _seconds(partial(tighten_diagonal, weights), 7 if n == 80 else 1)
    print(f"seconds: {proofs} {programs}")
    return {"proof_seconds": proofs, "sdp_seconds": programs}


def _seconds(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + (rounds > 1)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[-rounds:]), 4)


if __name__ == "__main__":
    main()
