"""What is counted in machine code, and what is called a fault."""

import json
import sys

import pytest

from benchmarks import gpu_compiled, sass

# A loop of four instructions that multiplies, in a loop that spills, beside a wait out of line.
LISTING = """
        Function : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;           /* 0x00000a00ff017b82 */
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   LDS.128 R4, [R3] ;
        /*0030*/              @!P1 BRA 0x0b0 ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/               @P0 BRA 0x20 ;
        /*0060*/                   FFMA R9, R8, R8, R9 ;
        /*0070*/                   LDL.64 R2, [R1] ;
        /*0080*/                   BRA.U !UP0, 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3] ;
        /*00c0*/              @!P1 BRA 0xb0 ;
        /*00d0*/                   BRA 0x40 ;
        /*00e0*/                   BRA 0xe0;
"""


def test_loops_are_told_apart_and_counted():
    wide, product, wait = sass.loops(sass.parse(LISTING))
    assert (wide.start, product.start, wait.start) == (0x10, 0x20, 0xB0)
    assert [loop.innermost for loop in (wide, product, wait)] == [False, False, True]
    assert [loop.product for loop in (wide, product, wait)] == [False, True, False]
    # The wait and the way back from it belong to the loop that waits.
    assert (product.instructions, product.tensor_core, product.shared_loads) == (7, 1, 1)
    assert product.tensor_core_names == ("HMMA.16816.F32.BF16",)
    assert (product.ffma, product.local_loads, product.local_stores) == (0, 0, 0)
    assert (wide.instructions, wide.ffma, wide.local_loads, wide.local_stores) == (11, 1, 1, 1)
    assert (wide.skip, product.skip, wait.skip) == ((0x30, 0xB0, 5), (0x30, 0xB0, 2), (0, 0, 0))


def test_the_longest_skip_of_a_loop_is_found():
    code = """
        /*0000*/                   MOV R1, RZ ;
        /*0010*/               @P0 BRA 0x0050 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0030*/                   FADD R1, R1, R1 ;
        /*0040*/                   FADD R1, R1, R1 ;
        /*0050*/               @P1 BRA 0x0070 ;
        /*0060*/                   FADD R1, R1, R1 ;
        /*0070*/               @P2 BRA 0x0000 ;
        /*0080*/                   EXIT ;
"""
    (loop,) = sass.loops(sass.parse("        Function : kernel\n" + code))
    assert loop.skip == (0x10, 0x50, 3)


def test_without_tensor_cores_loops_of_multiply_adds_are_products():
    code = LISTING.replace("HMMA.16816.F32.BF16", "DFMA")
    loops = sass.loops(sass.parse(code))
    assert [loop.product for loop in loops] == [False, True, False]
    assert loops[1].dfma == 1


def test_a_loop_that_is_also_entered_at_its_second_half_is_one_loop():
    """Steps, then a check that may follow on a check: that is no product loop of its own."""
    code = """
        /*0000*/               @P0 BRA 0x40 ;
        /*0010*/                   MOV R8, RZ ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0030*/               @P1 BRA 0x20 ;
        /*0040*/                   LDL R2, [R1] ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0060*/               @P2 BRA 0x40 ;
        /*0070*/               @P3 BRA 0x10 ;
        /*0080*/                   EXIT ;
    """
    whole, steps = sass.loops(sass.parse(code))
    assert (whole.start, whole.instructions, whole.product) == (0x10, 7, False)
    assert (steps.start, steps.instructions, steps.product) == (0x20, 2, True)


def test_straight_code_has_no_loops():
    assert sass.loops(sass.parse("/*0000*/ EXIT ;\n/*0010*/ BRA 0x10;")) == []
    assert sass.loops([]) == []


def row(**entries):
    [loop] = [one for one in sass.loops(sass.parse(LISTING)) if one.product]
    return {
        "kernel": "own", "case": "n=80", "target": "sm_90", "triton": "3.6.0", "error": None,
        "refused": False, "dots": ["bf16 ieee"], "tensor_core_names": ["HMMA.16816.F32.BF16"],
        "loops": [{**vars(loop), **entries.pop("loop", {})}], "registers": 32, "stack": 0,
        "shared": 1024, "shared_limit": 232448, **entries,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"loop": {"local_loads": 3}}, "3 LDL and 0 STL among the 7 instructions of the product"),
        ({"dots": ["f64 ieee"]}, "products of float64 without DMMA"),
        ({"tensor_core_names": []}, "no instruction of the tensor cores for bf16 ieee"),
        ({"tensor_core_names": ["DMMA.8x8x4"]}, "no instruction of the tensor cores"),
        ({"error": "OutOfResources: 300000 bytes"}, "OutOfResources: 300000 bytes"),
    ],
)
def test_a_fault_names_kernel_case_target_and_triton(entries, words):
    [line] = gpu_compiled.faults([row(), row(**entries)])
    assert line.startswith("own (n=80; sm_90, Triton 3.6.0): ")
    assert words in line


def test_what_is_no_fault():
    fine = [
        row(dots=["f32 ieee"], tensor_core_names=[]),
        row(target="sm_80", loop={"local_loads": 3}),
        row(target="sm_100", dots=["f64 ieee"], tensor_core_names=[]),
        {"kernel": "", "case": "n=80", "target": "sm_90", "error": "small", "refused": True},
    ]
    assert gpu_compiled.faults(fine) == []


def test_the_command_prints_a_table_and_writes_what_it_found(monkeypatch, tmp_path, capsys):
    found = [row(), row(error="CompilationError: no", case="n=256")]
    monkeypatch.setattr(gpu_compiled, "rows", lambda *arguments, **options: found)
    out = tmp_path / "compiled.json"
    monkeypatch.setattr(sys, "argv", ["gpu_compiled", "--targets", "sm_90", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        gpu_compiled.main()
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert "| own | n=80 | sm_90 | 3.6.0 | 32 | 0 | 1024 | 7 i 1 t 0 f 0 l 1 s | – |" in lines
    assert json.loads(lines[-1])["faults"] == 1
    record = json.loads(out.read_text())
    assert [one["case"] for one in record["rows"]] == ["n=80", "n=256"]
    assert {"commit", "date", "environment"} <= set(record)
    assert record["wrong"] == ["own (n=256; sm_90, Triton 3.6.0): CompilationError: no"]
