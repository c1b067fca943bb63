import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import common, gpu, gpu_correctness, gpu_images, gpu_record, gpu_speed, gpu_timing
from benchmarks.gpu_record import Cell, Record, run_cells
from solvers import ReLU

ROOT = Path(gpu.__file__).parent.parent


def run(monkeypatch, folder, *words):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--out", str(folder), *words])
    gpu.main()
    path = folder / "gpu.json"
    return json.loads(path.read_text()) if path.exists() else {}


def cells_of(monkeypatch, part, *calls):
    """Let a part consist of these calls."""
    made = [Cell(part=part, name=call.__name__, seconds=0.1, call=call) for call in calls]
    monkeypatch.setattr(gpu, f"_{part}", lambda arguments, record: made)


def wrong(left):
    return {"correct": False, "failed": ["backward"]}


def right(left):
    return {"correct": True}


def test_what_is_wrong_is_not_timed_unless_forced(monkeypatch, tmp_path, capsys):
    cells_of(monkeypatch, "check", wrong)
    cells_of(monkeypatch, "speed", right)
    record = run(monkeypatch, tmp_path, "--parts", "check", "speed")
    assert record["wrong"]["found"] == wrong(0)
    assert "right" not in record
    assert "not correct, so not timed: wrong: ['backward']\n" in capsys.readouterr().out
    assert "right" not in run(monkeypatch, tmp_path, "--parts", "speed")
    assert "right" in run(monkeypatch, tmp_path, "--parts", "speed", "--force")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["correct"] is False


def test_failed_tests_are_not_correct(monkeypatch, tmp_path):
    record = Record(tmp_path / "gpu.json", "c")
    for part, name, found in (("check", "n = 80", True), ("rest", "tests", False)):
        cell = Cell(part=part, name=name, seconds=0, call=right)
        assert gpu.summary(record, "cpu")["correct"] is (name == "tests")
        record.keep(cell, {"found": {"correct": found, "summary": "1 failed"}}, 1.0)
    assert gpu.summary(record, "cpu")["correct"] is False
    assert gpu.failures(record) == ["tests: {'correct': False, 'summary': '1 failed'}"]


def test_cells_are_kept_and_those_of_other_commits_measured_again(monkeypatch, tmp_path, capsys):
    calls = []

    def counted(left):
        calls.append(left)
        return {"correct": True}

    cells_of(monkeypatch, "check", counted)
    for commit, count in (("a", 1), ("a", 1), ("b", 2)):
        record = run(monkeypatch, tmp_path, "--commit", commit)
        assert len(calls) == count
        assert record["counted"]["commit"] == commit
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(last) == {"device", "correct", "compiled", "spills", "predicted_ratio_unfused"}
    assert (last["device"], last["correct"]) == ("cpu", True)
    assert set(last["compiled"]) == {"sm_80", "sm_90", "sm_100"}
    assert set(last["predicted_ratio_unfused"]) == {"80", "256", "512", "1024", "4096"}
    assert "| correct |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("apart", [False, True])
def test_a_failure_is_written_and_the_next_cell_goes_on(tmp_path, apart):
    tried, written = [], []

    def fails(left):
        tried.append("fails")
        raise RuntimeError("no such kernel")

    def looks(left):
        written.append(json.loads((tmp_path / "gpu.json").read_text()))
        return [{"a": 1.0}]

    record = Record(tmp_path / "gpu.json", "c")
    cells = [
        Cell(part="check", name=call.__name__, seconds=0.1, call=call, apart=apart)
        for call in (fails, looks)
    ]
    since = time.time()
    for _ in range(2):  # what has failed since then is not tried again
        run_cells(cells, record, since + 60, since=since, together=1)
    assert tried == ["fails"]
    assert written[0]["fails"]["error"] == "RuntimeError: no such kernel"
    again = Record(tmp_path / "gpu.json", "c")
    assert again.found("looks") == [{"a": 1.0}]
    assert again.found("fails") is None
    run_cells(cells, again, time.time() + 60, since=time.time(), together=1)
    assert tried == ["fails", "fails"]
    assert not list(tmp_path.glob("*.unfinished"))


def test_no_cell_begins_for_which_the_time_does_not_suffice(tmp_path, capsys):
    record = Record(tmp_path / "gpu.json", "c")
    cells = [
        Cell(part="speed", name=str(s), seconds=s, call=lambda left: {"left": left})
        for s in (50, 9)
    ]
    run_cells(cells, record, time.time() + 20, since=0)
    assert set(record.cells) == {"9"}
    assert "50: not begun" in capsys.readouterr().out
    assert 16 < record.found("9")["left"] <= 17


def test_a_cell_that_does_not_end_is_stopped(tmp_path):
    record = Record(tmp_path / "gpu.json", "c")
    cell = Cell(part="speed", name="long", seconds=0, call=lambda left: time.sleep(60))
    run_cells([cell], record, time.time() + 3.2, since=0)
    assert "TimeoutError" in record.cells["long"]["error"]


def test_a_lost_device_is_left_to_another_process(tmp_path, monkeypatch):
    record, restarted = Record(tmp_path / "gpu.json", "c"), []
    cell = Cell(part="speed", name="bad", seconds=0, call=lambda left: 1 / 0)
    run_cells(
        [cell], record, time.time() + 60, since=0, lost=lambda: True,
        restart=lambda: restarted.append(True),
    )  # fmt: skip
    assert restarted == [True]
    monkeypatch.setattr(sys, "argv", ["gpu", "--parts", "check", "speed", "--minutes", "2"])
    monkeypatch.setattr(gpu.os, "execv", lambda path, words: restarted.append(words[3:]))
    gpu._restart(["speed"], 12.5)
    assert restarted[1] == ["--minutes", "2", "--since", "12.5", "--parts", "speed"]


def test_a_tree_without_a_repository_has_a_name(monkeypatch, tmp_path):
    def no_git(*words, **options):
        raise OSError

    monkeypatch.setattr(common.subprocess, "run", no_git)
    monkeypatch.setenv("COMMIT", "0123456789abcdef0123\n")
    assert common._commit() == "0123456789ab"
    monkeypatch.delenv("COMMIT")
    name = common._commit()
    assert name.startswith("sources-")
    (tmp_path / "solvers").mkdir()
    (tmp_path / "solvers" / "a.py").write_text("1")
    assert common._digest(tmp_path) != name[8:]


BLOCKED = ("tyro", "cvxpy", "flint", "foolbox", "torchdeq", "sklearn", "docstring_parser")


def test_neither_the_command_line_nor_peers_are_imported():
    code = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None  # importing it is an ImportError
import benchmarks.gpu
from benchmarks import gpu_images
gpu_images.convolutions
from benchmarks.gpu_speed import torchdeq
print(torchdeq(8, 4, "cpu"))
from lben.models import EquilibriumArchitecture
from lben.training.recipes import decode, TrainingConfig
print(TrainingConfig(model=EquilibriumArchitecture(hidden=8)).lr)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "'not installed': " in ended.stdout


def test_the_last_line_tells_device_time_from_wall_clock(tmp_path):
    record = Record(tmp_path / "gpu.json", "c")
    shares = {
        f"share of {rate}, {clock}": 0.5 for rate in ("float32", "precise")
        for clock in ("device", "wall")
    }  # fmt: skip
    rows = [
        {"n": 80, "batch": 8, "who": "lben", "measured ÷ predicted": 1.5, **shares},
        {"n": 80, "batch": 8, "who": "unfused", "÷ lben, device": 6.0, "÷ lben, wall": 3.0},
        {"n": 80, "batch": 8, "who": "torchdeq, anderson", "÷ lben, device": 9.0,
         "÷ lben, wall": 8.0},
    ]  # fmt: skip
    record.keep(Cell(part="speed", name="n", seconds=0, call=right), {"found": rows}, 1.0)
    found = gpu._measured(record)
    assert found["unfused ÷ lben, device"] == {"80 × 8": 6.0}
    assert found["unfused ÷ lben, wall"] == {"80 × 8": 3.0}
    assert found["torchdeq ÷ lben, wall"] == {"80 × 8": 8.0}
    assert found["share of precise, wall"] == {"80 × 8": 0.5}
    assert found["measured ÷ predicted"] == {"80 × 8": 1.5}
    assert "| 80 | 8 | unfused | – |" in record.table()


def test_calls_are_timed_after_the_first_one(monkeypatch):
    seen = []
    found = gpu_timing.timed({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, "cpu")
    assert seen[:2] == ["a", "a"]
    assert found["a"].kernels is None
    assert 0 < found["a"].device == found["a"].events < 1e-3
    assert found["b"].row()["wall, ms"] == 1e3 * found["b"].wall


class Event:
    """A CUDA event on a clock that ticks once per launch."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, other):
        return other.at - self.at


def test_device_time_is_that_between_events_per_call(monkeypatch):
    def launch():
        Event.now += 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu_timing.between_events(launch, 4, "cuda") == pytest.approx(2.5e-3)


def test_products_run_in_the_precision_that_is_asked_for():
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    with gpu_speed.fp32_precision("tf32"):
        assert setting.fp32_precision == "tf32"
    assert setting.fp32_precision == before
    for path in sorted((ROOT / "benchmarks").glob("gpu*.py")):
        assert "allow_tf32" not in path.read_text()


def test_memcheck_says_why_it_has_not_run(monkeypatch):
    def ends(code, text):
        monkeypatch.setattr(gpu_correctness.shutil, "which", lambda name: "/sanitizer")
        ended = subprocess.CompletedProcess([], code, stdout=text, stderr="")
        monkeypatch.setattr(gpu_correctness.subprocess, "run", lambda *words, **options: ended)
        return gpu_correctness.memcheck(80, "float32", 5)

    assert ends(0, "========= ERROR SUMMARY: 0 errors\n")["correct"] is True
    found = ends(9, "== Invalid __global__ read of size 4\n== ERROR SUMMARY: 1 error\n")
    assert found["correct"] is False
    assert found["errors"] == ["== Invalid __global__ read of size 4"]
    found = ends(1, "Error: Device not supported\n")
    assert found == {"correct": None, "not run": "Error: Device not supported"}
    monkeypatch.setattr(gpu_correctness.shutil, "which", lambda name: None)
    assert gpu_correctness.memcheck(80, "float32", 5)["correct"] is None


def test_a_process_that_dies_is_an_error(monkeypatch):
    ended = subprocess.CompletedProcess([], -6, stdout="", stderr="Assertion failed\n")
    monkeypatch.setattr(gpu_correctness.subprocess, "run", lambda *words, **options: ended)
    with pytest.raises(RuntimeError, match="ended with status -6: Assertion failed"):
        gpu_correctness.in_a_process(5, "capture")


def test_the_cells_of_a_device_fit_into_its_minutes(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cuda", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    arguments = gpu._arguments()
    assert arguments.parts == ["check", "speed", "rest"]
    record = Record(tmp_path / "gpu.json", "c")
    for part in ("speed", "rest"):
        cells = gpu._cells(part, arguments, record)
        assert sum(cell.seconds for cell in cells) < 60 * gpu.MINUTES[part]
    check = gpu._cells("check", arguments, record)
    assert sum(cell.seconds for cell in check) / 8 < 60 * gpu.MINUTES["check"]
    speed = [cell.name for cell in gpu._cells("speed", arguments, record)]
    assert speed[:3] == ["ceilings", "n = 80, batch = 65536", "n = 512, batch = 65536"]


def test_products_are_replayed_and_nothing_else():
    layer = torch.nn.Conv2d(2, 3, 3)
    x = torch.rand(1, 2, 5, 5)
    with gpu_images.Products() as products:
        (layer(x).relu().flatten(1) @ torch.rand(27, 2)).sum().backward()
    names = [call.func.name() for call in products.calls]
    assert names[:2] == ["aten::convolution", "aten::mm"]
    assert "aten::convolution_backward" in names
    with gpu_images.Products() as again:
        products.replay()
    assert [call.func.name() for call in again.calls] == names


def test_a_training_that_is_stopped_says_how_far_it_came(monkeypatch, tmp_path):
    lines = [
        {"epoch": 1, "seconds": 2.0, "test_error_percent": 4.0},
        {"epoch": 2, "seconds": 2.0, "test_error_percent": 2.2},
    ]

    def train(count):
        def stopped(recipe):
            text = "".join(json.dumps(line) + "\n" for line in lines[:count])
            (Path(recipe.out) / "metrics.jsonl").write_text(text)
            raise TimeoutError("stopped after 9 s")

        monkeypatch.setattr(gpu_images, "train", stopped)
        return gpu_images.mnist(str(tmp_path), "cpu")

    assert "no MNIST/raw folder" in gpu_images.mnist(str(tmp_path), "cpu")["not trained"]
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    assert train(2) == {"seconds": 4.0, "epochs": 2, "error, %": 2.2}
    assert train(1) == {
        "seconds": None, "epochs": 1, "error, %": 4.0, "stopped": "stopped after 9 s",
    }  # fmt: skip


@pytest.mark.parametrize("broken", ["equilibrium", "solve"])
def test_a_wrong_solver_is_found(monkeypatch, broken):
    problem = gpu_correctness.random_inclusion(6, 4, torch.float32, torch.Generator())
    check = {
        "equilibrium": lambda: gpu_correctness.backward(problem, "cpu"),
        "solve": lambda: gpu_correctness.forward(problem, ReLU(), "cpu"),
    }[broken]
    assert check()
    original = getattr(gpu_correctness, broken)

    def wrong(inclusion, *words, **options):
        solution = original(inclusion, *words, **options)
        if inclusion.bias.dtype == torch.float32:  # not the reference
            object.__setattr__(solution, "value", solution.value * 1.5)
        return solution

    monkeypatch.setattr(gpu_correctness, broken, wrong)
    assert not check()


def test_a_graph_is_compared_with_what_runs_eagerly(monkeypatch):
    found = gpu_correctness.capture("cpu")
    assert found["correct"]
    assert found["status"] == "not captured: tensors are on cpu"
    call = gpu_correctness.GraphedCallable.__call__

    def wrong(self, *arguments):
        return tuple(t * 1.01 for t in call(self, *arguments))

    monkeypatch.setattr(gpu_correctness.GraphedCallable, "__call__", wrong)
    assert not gpu_correctness.capture("cpu")["correct"]


@pytest.mark.slow
def test_the_parts_run_on_a_cpu(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("torchdeq")
    monkeypatch.setattr(gpu, "compiled", lambda left, quick: {"not built": ""})
    record = run(monkeypatch, tmp_path, "--quick", "--parts", "check", "speed", "rest")
    assert not [cell["error"] for cell in record.values() if "error" in cell]
    rows = record["n = 16, batch = 8"]["found"]
    assert [row["who"] for row in rows][:2] == ["lben", "forward and backward"]
    assert 0 < rows[0]["share of float32, wall"] < 1
    assert rows[0]["steps"] > 0
    for name in gpu_images.NETWORKS:
        found = record[name]["found"]
        assert {row["what"] for row in found} == {"training", "evaluation"}
        assert all(row["network ÷ bare, wall"] > 0.5 for row in found)
    assert record["graph, n = 16, batch = 8"]["found"][0]["status"].startswith("not captured")
    assert "torchdeq, fixed" in record["torchdeq, n = 16, batch = 8"]["found"][0]["who"]


@pytest.mark.slow
def test_a_check_runs_in_a_process_of_its_own():
    pytest.importorskip("triton")
    found = gpu_correctness.in_a_process(300, "kernel", 5, "float32", "--device", "cpu")
    assert found["correct"]
    assert gpu_correctness.in_a_process(300, "first", 9, 4, "--device", "cpu")["steps"] > 0
    assert gpu_record.markdown([]) == ""
