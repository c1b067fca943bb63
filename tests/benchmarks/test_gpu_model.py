"""The cost model: its limits, what holds phases back, and where its counts come from."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_model
from benchmarks.gpu_model import COUNTS, H100, H200, counted, floor, predict, ratio_unfused, table

SIZES = (7, 80, 128, 129, 256, 300, 700, 4096)


def test_floors():
    assert floor(80, 65536, H100.ffma) == pytest.approx(14.1, rel=0.01)
    assert floor(4096, 65536, H100.bf16 / 6) == pytest.approx(1.39e4, rel=0.01)


@pytest.mark.parametrize("n", SIZES)
def test_no_phase_is_faster_than_tensor_cores_and_memory_allow(n):
    for batch in (128, 65536):
        phases = predict("lben", n, batch).phases
        parts = 6 if n <= 256 else 3 * H100.bf16 / H100.tf32
        assert phases["step"][1].microseconds >= floor(n, batch, H100.bf16)
        for name in ("base", "check"):
            assert phases[name][1].microseconds >= floor(n, batch, H100.bf16 / parts)
        for _, cost in phases.values():
            assert cost.microseconds >= 1e6 * cost.bytes / H100.memory
            assert cost.per_sm * cost.waves * H100.multiprocessors >= cost.programs


@pytest.mark.parametrize("who", ["lben", "unfused"])
@pytest.mark.parametrize("n", SIZES)
def test_time_grows_with_batch_steps_and_checks_and_not_with_memory(who, n):
    times = [predict(who, n, batch).microseconds for batch in (128, 65536)]
    assert times[0] < times[1]
    few, many = (predict(who, n, 128, steps=s).microseconds for s in (10, 40))
    assert few < many
    assert predict(who, n, 128, checks=9).microseconds > times[0]
    assert predict(who, n, 65536, chip=H200).microseconds <= times[1]


def test_what_holds_a_phase_back():
    assert predict("lben", 80, 128).phases["step"][1].bound == "latency"
    assert predict("lben", 512, 65536).phases["step"][1].bound == "memory"
    assert predict("lben", 4096, 65536).phases["base"][1].bound == "tensor cores"
    assert predict("unfused", 80, 65536).phases["step"][1].bound == "memory"
    assert predict("unfused", 80, 128).phases["step"][1].bound == "launches"
    assert predict("unfused", 4096, 65536).phases["step"][1].bound == "library"


def test_a_solve_is_the_sum_of_its_phases():
    found = predict("lben", 80, 8192, steps=10, bases=3, checks=2)
    assert {name: count for name, (count, _) in found.phases.items()} == {
        "step": 7, "base": 3, "check": 2,
    }  # fmt: skip
    total = sum(count * cost.microseconds for count, cost in found.phases.values())
    assert found.microseconds == total
    assert ratio_unfused(80, host=0.0) > ratio_unfused(80, host=1000.0) > 1


def row(kernel, n, step, words="float32 PeacemanRachford ReLU", **other):
    """Step, check and base of `step`, 1000 and 700 instructions, 50 of each in a loop."""

    def loop(start, instructions, product=True, skip=(0, 0, 0)):
        return {"start": start, "instructions": instructions, "product": product, "skip": skip}

    loops = [
        loop(0, step + 1700, product=False, skip=(100, 5000, 1000)), loop(200, 50), loop(6000, 50),
        loop(9000, step),
    ]  # fmt: skip
    loops = loops if kernel == "resident" else [loop(0, step)]
    case = f"n={n} {words} samples=64"
    return {
        "kernel": kernel,
        "case": case,
        "target": "sm_90",
        "error": None,
        "loops": loops,
        **other,
    }


def test_counts_of_a_compilation_replace_those_of_the_model():
    counts = counted(
        [
            row("increment", 600, 400), row("increment", 600, 9, target="sm_80"),
            row("increment", 600, 9, "float64 PeacemanRachford ReLU"), row("resident", 75, 42),
            row("look", 600, 9, error="no"), row("activate", 600, 9),
        ]
    )  # fmt: skip
    assert counts.tile == {**COUNTS.tile, "increment": 400}
    own = counts.resident[80]
    assert (own.step, own.check, own.base) == (42, 1000 + 4 * 50, 700 + 4 * 50)
    assert {**counts.resident, 80: COUNTS.resident[80]} == COUNTS.resident


def test_the_counts_are_those_of_the_compilation_in_results():
    results = Path(gpu_model.__file__).parent / "results" / "gpu_compiled.json"
    assert counted(json.loads(results.read_text())["rows"]) == COUNTS


def test_more_instructions_take_longer():
    own = replace(COUNTS.resident[80], step=5000)
    slow = replace(COUNTS, resident={**COUNTS.resident, 80: own})
    before, after = (predict("lben", 80, 65536, counts=c).phases["step"][1] for c in (COUNTS, slow))
    assert after.bound == "issue"
    assert after.microseconds > before.microseconds


def test_the_table_is_printed():
    assert gpu_model.chip("NVIDIA H200") is H200
    assert gpu_model.chip("NVIDIA H100 80GB HBM3") is H100
    rows = table((80,), (128,))
    assert [row["who"] for row in rows] == ["lben", "unfused"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_model", "--chip", "H200"], check=True, text=True,
        capture_output=True, cwd=Path(gpu_model.__file__).parent.parent,
    )  # fmt: skip
    assert "| n | batch | who |" in ended.stdout
