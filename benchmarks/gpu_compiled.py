"""Does every kernel that the launcher asks for compile, for which GPUs, and what is in its loops?

    python -m benchmarks.gpu_compiled [--full] [--targets sm_80 sm_90 sm_100 gfx942]
        [--triton FOLDER] [--out FILE]

No GPU is needed: a driver that only names its target makes launches specialise as on the device.
Without --full compilation ends after Triton's front end. With it every specialisation goes through
the assembler, and its registers, its stack, its shared memory and the instructions of its loops
are counted. What does not compile, asks for more than a block may have, or takes the compiler down
is a row with the error. The exit status says whether there was one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.targets import SHARED_MEMORY

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100")
PATIENCE = 900
"""Seconds that a process may take for its share of the cases."""
_PARTS = 6
_DMMA = ("sm_80", "sm_90")  # Triton 3.6 uses none on sm_100, where vectors are as fast

Row = dict[str, Any]


def rows(
    targets: Sequence[str] = TARGETS,
    *,
    full: bool = False,
    full_cases: bool | None = None,
    cases: str = "benchmarks.gpu_cases",
    labels: Iterable[str] | None = None,
    triton: Path | None = None,
    workers: int = 2,
) -> list[Row]:
    """Compile ahead of time what launches ask for, in processes of their own.

    Args:
        targets: names of devices, keys of `benchmarks.targets.SHARED_MEMORY`.
        full: whether to go through the assembler and count; else the front end only.
        full_cases: whether to take the cases meant for all depth; as `full` when omitted.
        cases: a module with a function `cases(full)` that returns functions that launch, by name.
        labels: names of the cases to run; all when omitted.
        triton: a folder that holds another Triton than the installed one.
        workers: processes at a time.

    Returns:
        One row per target and specialisation, in the order of the cases, with `error` None where
        nothing is wrong; and one without a kernel per case that the launcher refused or lost.
    """
    full_cases = full if full_cases is None else full_cases
    environment = _environment(triton)
    parts = _PARTS if full and workers > 1 else workers
    orders = [
        {"cases": cases, "full_cases": full_cases, "full": full, "target": target,
         "labels": None if labels is None else list(labels), "part": part, "parts": parts}
        for target in targets
        for part in range(parts)
    ]  # fmt: skip
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda order: _compiled(order, environment), orders))
    once: dict[tuple[str, str], Row] = {}
    for row in chain.from_iterable(found):  # two parts may have met the same specialisation
        once.setdefault((row["target"], row.get("key") or row["case"]), row)
    return list(once.values())


def _environment(triton: Path | None) -> dict[str, str]:
    folders = [str(triton)] if triton else []
    folders += [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    environment.pop("TRITON_INTERPRET", None)
    return {**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _compiled(order: dict[str, Any], environment: dict[str, str]) -> list[Row]:
    """Run one part of the cases, again without what has ended its process."""
    found: list[Row] = []
    known: set[str] = set()
    labels: list[str] | None = None
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "order.json", Path(folder) / "rows.jsonl"
        while labels is None or labels:
            rest = {} if labels is None else {"labels": labels, "part": 0, "parts": 1}
            asked.write_text(json.dumps({**order, **rest, "known": sorted(known)}))
            answer.write_text("")
            how, errors = _process(asked, answer, environment)
            lines = [json.loads(line) for line in answer.read_text().splitlines()]
            open_: Row | None = None
            for line in lines:
                if "labels" in line:
                    labels = line["labels"]
                elif "begun" in line:
                    open_ = line["begun"]
                    known.add(open_["key"])
                elif "done" in line:
                    labels = [label for label in labels or () if label != line["done"]]
                else:
                    open_ = None
                    found.append({"target": order["target"], **line})
            if how is None:
                break
            # The process ended early, in the middle of a compilation or of the launcher.
            error = f"the compiler's process {how}: {errors}"
            if open_ is not None:
                found.append({**open_, "error": error})
            else:
                begun = bool(labels)
                found.append(
                    {"target": order["target"], "kernel": "", "refused": False, "error": error,
                     "case": labels.pop(0) if labels else f"all of {order['cases']}"}
                )  # fmt: skip
                if not begun:  # kernels or cases could not be imported: again would be the same
                    break
    return found


def _process(asked: Path, answer: Path, environment: dict[str, str]) -> tuple[str | None, str]:
    """Run the compiler's process; return how it failed, or None, and the end of its errors."""
    command = [sys.executable, "-m", "benchmarks.gpu_compiler", str(asked), str(answer)]
    try:
        ended = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=PATIENCE, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"had not ended after {PATIENCE} seconds", ""
    code = ended.returncode
    if code == 0:
        return None, ""
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return how, _tail(ended.stderr)


def _tail(text: str) -> str:
    """Return the line of a dying process that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if "assert" in line.lower() or "error" in line.lower()]
    return (wrong or lines or ["without a word"])[-1][:400]


def product_loops(row: Row) -> list[Row]:
    """Return the innermost loops of a kernel that multiply and accumulate."""
    return [loop for loop in row.get("loops", ()) if loop["product"]]


_ADDRESSES = 1 / 16
"""Share of a loop's instructions that may fetch addresses and descriptors from local memory."""


def spills(row: Row) -> list[Row]:
    """Return the product loops of a kernel for sm_90 that keep numbers in local memory."""
    if row["target"] != "sm_90":
        return []
    return [
        loop for loop in product_loops(row)
        if loop["local_loads"] + loop["local_stores"] > _ADDRESSES * loop["instructions"]
    ]  # fmt: skip


def faults(found: Iterable[Row]) -> list[str]:
    """Return what must not be, one line each that names kernel, case, target and Triton.

    Errors anywhere; on sm_90 numbers in local memory in product loops; on sm_80 and sm_90 products
    of float64 without DMMA; on CUDA devices products that ask for tensor cores and do without them.
    """
    wrong = []
    for row in found:
        where = f"{row['kernel'] or 'the launcher'} ({row['case']}; {row['target']}"
        where += f", Triton {row['triton']})" if "triton" in row else ")"
        if row["error"] is not None and not row.get("refused"):
            wrong.append(f"{where}: {row['error']}")
        if "loops" not in row or not row["target"].startswith("sm_"):
            continue
        for loop in spills(row):
            wrong.append(
                f"{where}: {loop['local_loads']} LDL and {loop['local_stores']} STL among the "
                f"{loop['instructions']} instructions of the product loop at {loop['start']:#x}"
            )
        names, kinds = row["tensor_core_names"], row["dots"]
        has_double = any(name.startswith("DMMA") for name in names)
        if "f64 ieee" in kinds and row["target"] in _DMMA and not has_double:
            wrong.append(f"{where}: products of float64 without DMMA")
        asking = [kind for kind in kinds if kind not in ("f32 ieee", "f64 ieee")]
        if asking and not any(not name.startswith("DMMA") for name in names):
            wrong.append(f"{where}: no instruction of the tensor cores for {', '.join(asking)}")
    return wrong


def table(found: Iterable[Row]) -> str:
    """Return one line per row.

    A product loop is shown by its instructions (i), those of the tensor cores (t), multiply-adds
    (f), local loads and stores (l), and shared loads and stores (s).
    """
    lines = [
        "| kernel | case | target | Triton | registers | stack | shared | product loops | error |",
        "|" + "---|" * 9,
    ]
    for row in found:
        shapes = [
            f"{loop['instructions']} i {loop['tensor_core']} t {loop['ffma'] + loop['dfma']} f "
            f"{loop['local_loads'] + loop['local_stores']} l "
            f"{loop['shared_loads'] + loop['shared_stores']} s"
            for loop in product_loops(row)
        ]
        cells = [row["kernel"], row["case"], row["target"], row.get("triton"), row.get("registers")]
        cells += [row.get("stack"), row.get("shared"), "; ".join(shapes) or None, row["error"]]
        lines.append("| " + " | ".join("–" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compile, print the table, and end with the number of faults."""
    from benchmarks.common import finish  # light for whoever calls `rows`

    arguments = _arguments()
    found = rows(
        arguments.targets, full=arguments.full, triton=arguments.triton, workers=arguments.workers
    )  # fmt: skip
    wrong = faults(found)
    print(table(found))
    for line in wrong:
        print(line)
    figures = {
        "full": arguments.full, "targets": arguments.targets, "specialisations": len(found),
        "faults": len(wrong),
    }  # fmt: skip
    finish(figures, arguments.out, rows=found, wrong=wrong)
    sys.exit(bool(wrong))


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description="compile the kernels for GPUs without one")
    options.add_argument("--full", action="store_true", help="through the assembler, and count")
    options.add_argument(
        "--targets", nargs="+", choices=list(SHARED_MEMORY), default=list(TARGETS), metavar="NAME",
        help=f"of {', '.join(SHARED_MEMORY)}; {', '.join(TARGETS)} when omitted",
    )  # fmt: skip
    options.add_argument("--triton", type=Path, help="folder that holds another Triton")
    options.add_argument("--workers", type=int, default=2, help="processes at a time")
    options.add_argument("--out", type=Path, help="also write the JSON object to this file")
    return options.parse_args()


if __name__ == "__main__":
    main()
