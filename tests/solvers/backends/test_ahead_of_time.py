"""Do the kernels compile for GPUs that are not here, and is their machine code what is meant?

In processes of their own, without Triton's interpreter (`benchmarks.gpu_compiled`). Every run takes
the front end; `-m slow` goes through the assembler, with the installed Triton and with the one in
the folder that LBEN_OTHER_TRITON names.
"""

import os
import re
from pathlib import Path

import pytest

from benchmarks.gpu_compiled import faults, product_loops, rows

pytest.importorskip("triton")
OTHER = "LBEN_OTHER_TRITON"
# x, ρ(x) and the slopes of 64 samples and 256 units are more than a multiprocessor's registers hold
# beside addresses: the steps of such adjoint solves go through local memory too, no others do.
# With 129 units, padded to 256, a product loop reads seven constants from there and writes none.
SPILLS = re.compile(
    r"resident \(n=256 float32 \w+ LinearSlope .* LDL and"
    r"|resident \(n=129 float32 PeacemanRachford ReLU .*: 7 LDL and 0 STL"
)
TARGETS = ["sm_80", "sm_90", "sm_100"]


@pytest.fixture(scope="module")
def front_end():
    return rows(["sm_90"])


def test_the_front_end_takes_everything_that_the_launcher_asks_for(front_end):
    wrong = faults(front_end)
    assert not wrong, "\n".join(wrong)


def test_the_launcher_refuses_no_case_and_none_is_lost(front_end):
    for row in front_end:
        assert row["kernel"], f"{row['case']}: {row['error']}"
    assert len(front_end) >= 30
    words = " ".join(row["case"] for row in front_end)
    for word in ("n=80 ", "n=256 ", "n=600 ", "float64", "reflect_sum", "activated", "adjoint"):
        assert word in words, f"no specialisation for {word}"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("triton", ["installed", "other"])
def test_the_machine_code_is_what_is_meant(triton, target):
    """No error, shared memory within limits, no spills in product loops, tensor cores in use."""
    folder = None
    if triton == "other":
        if not os.environ.get(OTHER):
            pytest.skip(f"{OTHER} names no folder with another Triton (pip install --target)")
        folder = Path(os.environ[OTHER])
        assert (folder / "triton").is_dir(), f"{OTHER}: there is no triton in {folder}"
    found = rows([target], full=True, triton=folder)
    wrong = [fault for fault in faults(found) if not SPILLS.search(fault)]
    assert not wrong, "\n".join(wrong)
    taken = [row for row in found if not row.get("refused")]
    assert len(taken) >= 30
    for row in taken:
        assert row["shared"] <= row["shared_limit"], f"{row['kernel']} ({row['case']})"
        if row["dots"] and row["loops"]:
            assert product_loops(row), f"{row['kernel']} ({row['case']}): no product loop was found"


# --- Does the gate see faults?

FAULTY = "tests.solvers.faulty_kernels"


@pytest.fixture(scope="module")
def faulty():
    return {row["case"]: row for row in rows(["sm_90"], cases=FAULTY, workers=1)}


@pytest.mark.parametrize(
    ("case", "kernel", "words"),
    [
        ("underscore", "underscore", "CompilationError.*Loop-carried variable _"),
        ("int64 limit", "wide", "CompilationError.*Loop-carried variable step.*int64"),
        ("compiler that aborts", "sound", "the compiler's process died of SIGABRT"),
        ("launcher that aborts", "the launcher", "the compiler's process died of SIGABRT"),
        ("launcher that fails", "the launcher", "TypeError|KeyError"),
    ],
)
def test_a_fault_is_a_row_with_its_error(faulty, case, kernel, words):
    [line] = faults([faulty[case]])
    assert line.startswith(f"{kernel} ({case}; sm_90")
    assert re.search(words, line), line


def test_what_follows_a_fault_is_compiled_all_the_same(faulty):
    for case in ("sound", "sound float64", "sound float32", "int32 limit"):
        assert faulty[case]["error"] is None
    assert faulty["sound"]["dots"] == ["f32 tf32x3"]
    assert faulty["sound float64"]["dots"] == ["f64 ieee"]


def test_what_asks_for_too_much_shared_memory_is_reported():
    """And machine code is counted: products on the tensor cores where they are asked for."""
    names = ["greedy", "sound", "sound float64", "sound float32"]
    found = rows(["sm_90"], full=True, cases=FAULTY, labels=names, workers=1)
    greedy, *others = found
    [line] = faults([greedy])
    assert line.startswith("sound (greedy; sm_90")
    assert "bytes of shared memory, a block has 232448" in line
    assert faults(others) == []
    for row, instruction in zip(others, ("HGMMA", "DMMA", None), strict=True):
        [loop] = product_loops(row)
        assert 0 < loop["instructions"] <= row["instructions"]
        assert row["registers"] > 0
        if instruction is None:
            assert row["tensor_core_names"] == []
            assert loop["ffma"] >= 64**3 / (32 * row["warps"])
        else:
            assert all(name.startswith(instruction) for name in loop["tensor_core_names"])
