"""Are the solvers right on this device, and how near do they come to what the chip can do?

    python -m benchmarks.gpu [--quick] [--out FOLDER] [--root FOLDER] [--minutes M] [--device cpu]

In this order: correctness (the tests marked `gpu`, and forward and backward solves of fresh random
problems against float64 on the CPU); the two ceilings, copying and multiplying; solves of n units
for batches up to 65536, against the same loop unfused, that loop compiled by torch.compile,
torchdeq's solvers at their best step, and low precision; networks of images against their bare
convolutions; seconds of training to 2.3 % of test error on MNIST.

Every part is written to FOLDER/gpu.json as soon as it is done, with commit and date, and FOLDER/
gpu.md is its table. Given again, the command goes on with what is missing at this commit; no part
is begun after M minutes. Without a CUDA device only the correctness runs, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, circumstances, write
from benchmarks.gpu_correctness import correctness
from benchmarks.gpu_images import convolutions, mnist
from benchmarks.gpu_speed import BATCHES, SIZES, ceilings, speed

HERE = Path(__file__).parent


def main() -> None:
    """Run what is missing."""
    arguments = _arguments()
    device = arguments.device
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    path = arguments.out / "gpu.json"
    record = _record(path)
    start = time.monotonic()
    for name, part in _parts(arguments).items():
        if name in record or time.monotonic() - start > 60 * arguments.minutes:
            continue
        print(f"--- {name}", flush=True)
        record[name] = {"found": part(record), **circumstances()}
        write(path, record)
        (arguments.out / "gpu.md").write_text(table(record))
        if name == "correctness" and not record[name]["found"]["correct"]:
            sys.exit(f"benchmarks.gpu: not correct, so not timed: {record[name]['found']}")
    print(table(record))
    print(json.dumps(summary(record, device)))


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description="correctness and speed on a CUDA device")
    options.add_argument("--quick", action="store_true", help="two sizes, two batches, no training")
    options.add_argument("--out", type=Path, help="folder; results/NAME OF THE DEVICE when omitted")
    options.add_argument("--root", help="folder that holds MNIST/raw")
    options.add_argument("--minutes", type=float, default=8.0, help="no part begins after these")
    options.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    arguments = options.parse_args()
    if arguments.out is None:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        arguments.out = RESULTS / name.split()[-1].lower()
    return arguments


def _parts(arguments: argparse.Namespace) -> dict[str, Callable[[dict[str, Any]], Any]]:
    device, quick = arguments.device, arguments.quick
    parts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "correctness": lambda record: {
            **correctness(device, quick),
            **({"tests": _tests()} if device == "cuda" else {}),
        }
    }
    if device == "cpu":
        return parts
    sizes, batches = ((80, 512), (128, 65536)) if quick else (SIZES, BATCHES)
    parts["ceilings"] = lambda record: ceilings(device)

    def cell(n: int, record: dict[str, Any]) -> list[dict[str, Any]]:
        return speed(n, batches, record["ceilings"]["found"], device)

    parts |= {f"n = {n}": partial(cell, n) for n in sizes}
    parts["convolutions"] = lambda record: convolutions(device)
    if not quick:
        parts["mnist"] = lambda record: mnist(arguments.root, device)
    return parts


def _tests() -> bool:
    """Run the tests that are marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests")]
    return subprocess.run(command, check=False).returncode == 0


def _record(path: Path) -> dict[str, Any]:
    """Return what an earlier run of this commit has left there."""
    if not path.exists():
        return {}
    known = json.loads(path.read_text())
    commit = circumstances()["commit"]
    return {name: part for name, part in known.items() if part["commit"] == commit}


def summary(record: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the figures of the last line."""
    found = record["correctness"]["found"]
    figures: dict[str, Any] = {"device": device, "correct": found["correct"]}
    rows = [row for name in record if name.startswith("n = ") for row in record[name]["found"]]
    if rows:
        largest = {row["n"]: row for row in rows}  # the last batch of each size
        figures["share_of_ceiling"] = {str(n): row["share"] for n, row in largest.items()}
        for name in ("unfused", "torchdeq"):
            ratios = [row[name] / row["lben"] for row in largest.values() if row.get(name)]
            figures[f"ratio_{name}"] = round(min(ratios), 3) if ratios else None
    return figures


def table(record: dict[str, Any]) -> str:
    """Return everything that was measured, in Markdown."""
    lines = []
    for name, part in record.items():
        lines += [f"## {name} ({part['commit']}, {part['date']})", ""]
        found = part["found"]
        rows = found if isinstance(found, list) else [found]
        if rows:
            names = list(dict.fromkeys(key for row in rows for key in row))
            lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
            lines += [
                "| " + " | ".join(_shown(row.get(key)) for key in names) + " |" for row in rows
            ]
        lines.append("")
    return "\n".join(lines)


def _shown(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
