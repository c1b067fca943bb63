"""The cost model: figures that were worked out by hand from compiled loops, within a fifth."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_model
from benchmarks.gpu_model import H100, H200, counted, floor, predict, ratio_unfused, table

STEP = {
    "now": {
        (80, 128): 3.11, (80, 8192): 6.21, (80, 65536): 49.7, (128, 65536): 49.7, (256, 128): 14.8,
        (256, 65536): 237, (512, 128): 58.3, (512, 65536): 933, (1024, 128): 91.9,
        (1024, 8192): 362, (1024, 65536): 2880, (4096, 128): 359, (4096, 65536): 44700,
    },
    "six": {
        (80, 128): 1.03, (80, 65536): 5.7, (128, 128): 2.05, (128, 65536): 14.6, (256, 128): 12.7,
        (256, 65536): 82, (512, 128): 21.5, (512, 8192): 40.1, (512, 65536): 301, (1024, 128): 39,
        (1024, 65536): 1160, (4096, 128): 144, (4096, 1024): 285, (4096, 65536): 17600,
    },
    "increments": {
        (80, 128): 0.256, (80, 65536): 1.19, (128, 128): 0.513, (128, 65536): 2.55,
        (256, 128): 1.42, (256, 65536): 11.4, (512, 128): 6.62, (512, 8192): 19.8,
        (512, 65536): 137, (1024, 128): 9.54, (1024, 65536): 272, (4096, 128): 27,
        (4096, 8192): 390, (4096, 65536): 3030,
    },
}  # fmt: skip
SOLVE = {  # batch 65536, milliseconds
    "now": {80: 0.99, 128: 0.99, 256: 4.8, 512: 18.7, 1024: 62, 4096: 910},
    "stage 1": {80: 0.33, 128: 0.33, 256: 1.3, 512: 4.8, 1024: 24, 4096: 330},
    "six": {80: 0.12, 128: 0.30, 512: 6.8, 1024: 24, 4096: 330},
    "increments": {80: 0.08, 128: 0.14, 256: 0.58, 512: 4.9, 1024: 13, 4096: 154},
    "unfused": {80: 1.25, 128: 2.2, 256: 6.0, 512: 18.6, 1024: 63, 4096: 880},
}


@pytest.mark.parametrize(
    ("design", "n", "batch", "microseconds"),
    [(d, n, b, time) for d, cells in STEP.items() for (n, b), time in cells.items()],
)
def test_steps(design, n, batch, microseconds):
    assert predict(design, n, batch).step.microseconds == pytest.approx(microseconds, rel=0.2)


@pytest.mark.parametrize(
    ("design", "n", "milliseconds"),
    [(d, n, time) for d, cells in SOLVE.items() for n, time in cells.items()],
)
def test_solves(design, n, milliseconds):
    found = predict(design, n, 65536).microseconds / 1e3
    assert found == pytest.approx(milliseconds, rel=0.2)


@pytest.mark.parametrize(
    ("n", "ratio"), [(80, 6.1), (128, 8.1), (256, 8.4), (512, 3.7), (1024, 4.8), (4096, 5.7)]
)
def test_ratios_to_the_unfused_loop(n, ratio):
    assert ratio_unfused(n) == pytest.approx(ratio, rel=0.2)


def test_floors():
    assert floor(80, 65536, H100.ffma) == pytest.approx(14.1, rel=0.01)
    assert floor(4096, 65536, H100.bf16 / 6) == pytest.approx(1.39e4, rel=0.01)


def test_what_holds_a_kernel_back():
    assert predict("now", 80, 65536).step.bound == "shared memory"
    assert predict("now", 256, 65536).step.bound == "issue"
    assert predict("increments", 80, 128).step.bound == "latency"
    assert predict("increments", 512, 65536).step.bound == "memory"
    assert predict("increments", 4096, 65536).step.bound == "tensor cores"
    assert predict("increments", 80, 128).step.per_sm == 2


@pytest.mark.parametrize("design", ["now", "stage 1", "six", "increments", "unfused"])
def test_time_grows_with_batch_steps_and_checks_and_not_with_memory(design):
    for n in (7, 80, 129, 300, 700):
        times = [predict(design, n, batch).microseconds for batch in (128, 65536)]
        assert times[0] < times[1]
        few, many = (predict(design, n, 128, steps=s).microseconds for s in (10, 40))
        assert few < many
        assert predict(design, n, 128, checks=9).microseconds > times[0]
        assert predict(design, n, 65536, chip=H200).microseconds <= times[1]


def test_counts_of_a_compilation_replace_those_of_the_model():
    def row(kernel, n, instructions, words="float32 PeacemanRachford ReLU", **other):
        loops = [
            {"instructions": instructions, "product": True, "tensor_core": 8},
            {"instructions": 50, "product": False, "tensor_core": 0},
        ]
        return {
            "kernel": kernel, "case": f"n={n} {words} samples=64", "target": "sm_90",
            "error": None, "shared": 131_072, "registers": 224, "loops": loops, **other,
        }  # fmt: skip

    counts = counted(
        [
            row("increment", 600, 4000), row("increment", 600, 9, target="sm_80"),
            row("increment", 600, 9, "float64 PeacemanRachford ReLU"), row("resident", 80, 242),
            row("moved", 150, 300), row("increment", 600, 9, error="no"),
        ]
    )  # fmt: skip
    assert counts.loop["increment"] == 4000
    assert counts.registers["increment"] == 224
    assert counts.step[80] == 242
    assert counts.wide_step == 400
    for n, bound in ((1024, "issue"), (80, "issue")):
        slow = predict("increments", n, 65536, counts=counts).step
        assert slow.bound == bound
        assert slow.microseconds > predict("increments", n, 65536).step.microseconds


def test_the_table_is_printed():
    assert gpu_model.chip("NVIDIA H200") is H200
    assert gpu_model.chip("NVIDIA H100 80GB HBM3") is H100
    rows = table((80,), (128,))
    assert [row["design"] for row in rows] == ["now", "stage 1", "six", "increments", "unfused"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_model", "--chip", "H200"], check=True, text=True,
        capture_output=True, cwd=Path(gpu_model.__file__).parent.parent,
    )  # fmt: skip
    assert "| n | batch | design |" in ended.stdout
