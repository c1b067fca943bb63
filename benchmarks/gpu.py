"""Are the solvers right on this device, and how near do they come to what the chip can do?

    python -m benchmarks.gpu [--parts check speed rest] [--quick] [--out FOLDER] [--root FOLDER]
                             [--minutes M] [--commit HASH] [--force] [--device cpu]

- check, 3 minutes: kernels compile in parallel processes and are held against float64 on the CPU
  for fresh random problems, forward and backward; a CUDA graph is captured; a small solve runs
  under compute-sanitizer's memcheck. Without a GPU the kernels run in Triton's interpreter, and
  are compiled ahead of time for three generations of GPUs.
- speed, 6 minutes: the ceilings of the chip, then solves of n units for a batch, against the same
  loop unfused and in low precision; then torch.compile, torchdeq and a graph for few of them. The
  predictions of `benchmarks.gpu_model` stand beside the measurements. Refused where the check has
  found an error, unless --force is given.
- rest, 5 minutes: the tests marked `gpu`; networks of images against their bare convolutions;
  seconds of training to 2.3 % of test error on MNIST.

Every cell is written to FOLDER/gpu.json as soon as it is done, with commit and date, and FOLDER/
gpu.md is its table. Given again, the command goes on with what is missing or has failed at this
commit. No cell begins that would end after M minutes of its part. Without a CUDA device only the
check runs, unless another part is asked for: that is then a rehearsal with tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, gpu_correctness, gpu_images, gpu_model, gpu_speed
from benchmarks.gpu_record import Cell, Record, run_cells

HERE = Path(__file__).parent
MINUTES = {"check": 3.0, "speed": 6.0, "rest": 5.0}
TARGETS = ("sm_80", "sm_90", "sm_100")
MODEL_SIZES = (80, 256, 512, 1024, 4096)
_PATIENCE = 60.0
"""Minutes of each part in the interpreter."""
_MEMORY = 60e9
"""Bytes on the device that the cells may take."""


def main() -> None:
    """Run what is missing."""
    arguments = _arguments()
    device = arguments.device
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, _MEMORY / total))
    record = Record(arguments.out / "gpu.json", arguments.commit)
    begun = arguments.since
    for part in arguments.parts:
        minutes = arguments.minutes or (MINUTES[part] if device == "cuda" else _PATIENCE)
        wrong = failures(record)
        if part == "speed" and wrong and not arguments.force:
            print(f"benchmarks.gpu: not correct, so not timed: {'; '.join(wrong)}")
            continue
        start = time.time() if begun is None else begun
        remaining = list(arguments.parts[arguments.parts.index(part) :])
        run_cells(
            _cells(part, arguments, record), record, start + 60 * minutes, since=start,
            lost=partial(_lost, device), restart=partial(_restart, remaining, start),
        )  # fmt: skip
        begun = None
    print(record.table())
    expected = [cell.name for cell in _check(arguments, record)]
    print(json.dumps(summary(record, device, expected)))


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description="correctness and speed on a CUDA device")
    options.add_argument("--parts", nargs="+", choices=tuple(MINUTES), help="of the benchmark")
    options.add_argument("--quick", action="store_true", help="fewer sizes, no training")
    options.add_argument("--out", type=Path, help="folder; results/NAME OF THE DEVICE when omitted")
    options.add_argument("--root", help="folder that holds MNIST/raw")
    options.add_argument("--minutes", type=float, help="of each part: 3, 6, 5 when omitted")
    options.add_argument("--commit", default=common.COMMIT, help="what the results are kept under")
    options.add_argument("--force", action="store_true", help="time also what is not correct")
    options.add_argument("--since", type=float, help=argparse.SUPPRESS)  # of a part, after a crash
    options.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    arguments = options.parse_args()
    if arguments.parts is None:
        arguments.parts = list(MINUTES) if arguments.device == "cuda" else ["check"]
    if arguments.out is None:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        arguments.out = common.RESULTS / name.split()[-1].lower()
    return arguments


def _lost(device: str) -> bool:
    """Say whether an error on the device has spoilt this process for it."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def _restart(parts: Sequence[str], since: float) -> None:
    """Go on in a fresh process, in the time of this one."""
    words = sys.argv[1:]
    while "--parts" in words:
        at = words.index("--parts")
        end = next((i for i in range(at + 1, len(words)) if words[i] not in MINUTES), len(words))
        del words[at:end]
    print("--- the device is lost to this process: on in another", flush=True)
    sys.stderr.flush()
    os.execv(
        sys.executable,
        [sys.executable, "-m", "benchmarks.gpu", *words, "--since", str(since), "--parts", *parts],
    )


def _cells(part: str, arguments: argparse.Namespace, record: Record) -> list[Cell]:
    make = {"check": _check, "speed": _speed, "rest": _rest}[part]
    return make(arguments, record)


def _untimed(function: Callable[..., Any], *words: Any) -> Callable[[float], Any]:
    """Return a cell's call that does not ask how much time is left."""
    return lambda left: function(*words)


def _child(*words: object) -> Callable[[float], Any]:
    """Return a cell's call of a check in a process of its own."""
    return lambda left: gpu_correctness.in_a_process(left, *words)


def _check(arguments: argparse.Namespace, record: Record) -> list[Cell]:
    device, quick = arguments.device, arguments.quick
    cell = partial(Cell, part="check")
    cells = [cell(name="model", seconds=1, call=_untimed(_model, device))]
    if device == "cpu":
        for n, dtype in ((5, "float32"), (5, "float64"), (130, "float32"), (130, "float64")):
            if quick and (n, dtype) == (130, "float64"):
                continue  # half of the interpreter's minutes
            call = _untimed(gpu_correctness.kernel, n, getattr(torch, dtype), device)
            cells.append(cell(name=f"n = {n}, {dtype}", seconds=5, call=call))
        return [*cells, cell(name="compiled", seconds=20, call=partial(compiled, quick=quick))]
    cell = partial(cell, apart=True)
    sizes = gpu_correctness.SIZES[:4] if quick else gpu_correctness.SIZES

    def kernels(dtype: str) -> list[Cell]:
        return [
            cell(name=f"n = {n}, {dtype}", seconds=20, call=_child("kernel", n, dtype))
            for n in sizes
        ]

    firsts = [
        cell(name=f"first call, n = {n}, batch = {b}", seconds=15, call=_child("first", n, b))
        for n, b in (gpu_speed.CELLS[:2] if quick else gpu_speed.CELLS)
    ]
    capture = cell(name="capture", seconds=15, call=_child("capture"))
    memory = cell(name="memcheck", seconds=20, call=_memcheck)
    return [*cells, *kernels("float32"), *firsts, capture, memory, *kernels("float64")]


def _memcheck(left: float) -> dict[str, Any]:
    return gpu_correctness.memcheck(80, "float32", min(left, 90.0))


def _speed(arguments: argparse.Namespace, record: Record) -> list[Cell]:
    device = arguments.device
    cell = partial(Cell, part="speed")
    edge, sizes, peers, graph = 8192, list(gpu_speed.CELLS), list(gpu_speed.PEERS), (80, 128)
    if device == "cpu":
        edge, sizes, peers, graph = 64, [(16, 8)], [(16, 8)], (16, 8)
    elif arguments.quick:
        sizes, peers = sizes[:2], []

    def timed(n: int, batch: int, left: float) -> Any:
        ceiling = record.found("ceilings")
        if ceiling is None:
            raise RuntimeError("the ceilings are not known")
        return gpu_speed.speed(n, batch, ceiling, device)

    cells = [cell(name="ceilings", seconds=15, call=_untimed(gpu_speed.ceilings, device, edge))]
    for n, batch in sizes:
        seconds = 45 if n >= 1024 else 20
        cells.append(
            cell(name=f"n = {n}, batch = {batch}", seconds=seconds, call=partial(timed, n, batch))
        )
    others = [(name, *peer) for peer in peers for name in ("torch.compile", "torchdeq")]
    for name, n, batch in [*others, ("graph", *graph)]:
        call = _untimed(_OTHERS[name], n, batch, device)
        seconds = 30 if name == "torch.compile" else 15
        cells.append(cell(name=f"{name}, n = {n}, batch = {batch}", seconds=seconds, call=call))
    return cells


_OTHERS = {
    "torch.compile": gpu_speed.compiled_loop,
    "torchdeq": gpu_speed.torchdeq,
    "graph": gpu_speed.graphed,
}


def _rest(arguments: argparse.Namespace, record: Record) -> list[Cell]:
    device = arguments.device
    cell = partial(Cell, part="rest")
    batch = gpu_images.BATCH if device == "cuda" else 2
    networks = [
        cell(name=name, seconds=20, call=_untimed(gpu_images.convolutions, name, device, batch))
        for name in gpu_images.NETWORKS
    ]
    if device == "cpu":
        return networks
    cells = [cell(name="tests", seconds=45, call=tests, apart=True), *networks]
    if not arguments.quick:
        call = _untimed(gpu_images.mnist, arguments.root, device)
        cells.append(cell(name="MNIST", seconds=20, call=call))
    return cells


def tests(limit: float) -> dict[str, Any]:
    """Run the tests that are marked `gpu`, warnings allowed."""
    folder = HERE.parent / "tests"
    files = [str(p) for p in sorted(folder.rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-m", "gpu", "-W", "default"]
    ended = subprocess.run(
        [*command, "-p", "no:cacheprovider", *files], check=False, capture_output=True, text=True,
        timeout=limit, cwd=HERE.parent, errors="replace",
    )  # fmt: skip
    lines = ended.stdout.splitlines()
    print("\n".join(lines[-60:]), flush=True)
    return {
        "correct": ended.returncode == 0,
        "summary": next((line for line in reversed(lines) if re.search(r"\d+ \w+", line)), ""),
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def compiled(left: float, *, quick: bool) -> dict[str, Any]:
    """Compile the kernels ahead of time, and count what their loops spill."""
    if importlib.util.find_spec("benchmarks.gpu_compiled") is None:
        return {"not built": "benchmarks.gpu_compiled is missing"}
    module = importlib.import_module("benchmarks.gpu_compiled")
    rows = module.rows(TARGETS, full=True, **({"labels": _labels()} if quick else {}))
    return {
        "compiled": {t: all(r["error"] is None for r in rows if r["target"] == t) for t in TARGETS},
        "spills": sum(len(module.spills(row)) for row in rows),
        "specialisations": len(rows),
        "faults": module.faults(rows),
        "rows": rows,
    }  # fmt: skip


def _labels() -> list[str]:
    """Return the names of one case per kernel."""
    return [
        f"n={n} float32 PeacemanRachford ReLU samples=64 max_steps=1000" for n in (80, 256, 600)
    ]


def _model(device: str) -> list[dict[str, Any]]:
    """Return what `benchmarks.gpu_model` predicts for the cells of `speed`."""
    chip = gpu_model.chip(torch.cuda.get_device_name() if device == "cuda" else "")
    return [
        row for n, batch in gpu_speed.CELLS for row in gpu_model.table((n,), (batch,), chip=chip)
    ]


def failures(record: Record) -> list[str]:
    """Return what has gone wrong in the check and in the tests, one line each."""
    found = []
    for name, cell in {**record.of("check"), **record.of("rest")}.items():
        result = cell.get("found")
        if "error" in cell and (cell["part"] == "check" or name == "tests"):
            found.append(f"{name}: {cell['error']}")
        elif isinstance(result, dict) and result.get("correct") is False:
            found.append(f"{name}: {result.get('failed') or result}")
    return found


def summary(record: Record, device: str, expected: Sequence[str] = ()) -> dict[str, Any]:
    """Return the figures of the last line.

    `correct`: every check has run, and neither they nor the tests, if they have run, failed.

    Args:
        record: of what has run.
        device: where.
        expected: names of the checks.
    """
    missing = [name for name in expected if name not in record.cells]
    correct = bool(record.of("check")) and not missing and not failures(record)
    figures: dict[str, Any] = {"device": device, "correct": correct}
    if missing:
        figures["unchecked"] = missing
    chip = gpu_model.chip(torch.cuda.get_device_name() if device == "cuda" else "")
    built = record.found("compiled")
    if device == "cpu":
        known = built is not None and "compiled" in built
        figures["compiled"] = built["compiled"] if known else dict.fromkeys(TARGETS, "not built")
        figures["spills"] = built["spills"] if known else None
    else:
        tests_ = record.found("tests")
        figures["tests"] = None if tests_ is None else tests_["summary"]
        figures |= _measured(record)
    counts = gpu_model.COUNTS
    if built is not None and "rows" in built:
        counts = gpu_model.counted(built["rows"])
    figures["predicted_ratio_unfused"] = {
        str(n): round(gpu_model.ratio_unfused(n, chip=chip, counts=counts), 2) for n in MODEL_SIZES
    }
    return figures


def _measured(record: Record) -> dict[str, Any]:
    """Return shares and ratios by n × batch, device time and wall clock apart."""
    figures: dict[str, Any] = {}
    for cell in record.of("speed").values():
        for row in cell["found"] if isinstance(cell.get("found"), list) else []:
            if "who" not in row:
                continue
            size, who = f"{row['n']} × {row['batch']}", row["who"].split(",")[0]
            for clock in ("device", "wall"):
                if who == "lben":
                    for rate in ("float32", "precise"):
                        key = f"share of {rate}, {clock}"
                        figures.setdefault(key, {})[size] = round(row[key], 4)
                elif who != "forward and backward":
                    key = f"{who} ÷ lben, {clock}"
                    figures.setdefault(key, {})[size] = round(row[f"÷ lben, {clock}"], 3)
            if "measured ÷ predicted" in row and who == "lben":
                key = "measured ÷ predicted"
                figures.setdefault(key, {})[size] = round(row[key], 3)
    mnist = record.found("MNIST")
    if mnist is not None:
        figures["seconds to 2.3 %"] = mnist.get("seconds")
    return figures


if __name__ == "__main__":
    main()
