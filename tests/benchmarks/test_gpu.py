import json
import sys

import pytest
import torch

from benchmarks import gpu, gpu_correctness, gpu_images, gpu_speed
from solvers import ReLU


def run(monkeypatch, folder, *words):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--out", str(folder), *words])
    gpu.main()
    return json.loads((folder / "gpu.json").read_text())


def test_what_is_wrong_is_not_timed_and_is_written_down(monkeypatch, tmp_path):
    found = {"correct": False, "failed": ["n = 5: backward"]}
    monkeypatch.setattr(gpu, "correctness", lambda device, quick: found)
    with pytest.raises(SystemExit, match=r"not correct, so not timed: .*n = 5: backward"):
        run(monkeypatch, tmp_path)
    assert json.loads((tmp_path / "gpu.json").read_text())["correctness"]["found"] == found


def test_parts_are_kept_and_those_of_other_commits_measured_again(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(
        gpu, "correctness", lambda device, quick: calls.append(quick) or {"correct": True}
    )
    for _ in range(2):
        record = run(monkeypatch, tmp_path, "--quick")
    assert calls == [True]
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads(last) == {"device": "cpu", "correct": True}
    record["correctness"]["commit"] = "another"
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    run(monkeypatch, tmp_path)
    assert calls == [True, False]
    assert "| correct |" in (tmp_path / "gpu.md").read_text()


def test_no_part_begins_after_the_time_is_up(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "correctness", lambda device, quick: {"correct": True})
    monkeypatch.setattr(
        gpu, "_parts", lambda arguments: {
            "correctness": lambda record: {"correct": True},
            "late": lambda record: pytest.fail("begun too late"),
        },
    )  # fmt: skip
    times = iter([0.0, 1.0, 61.0])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(times))
    assert set(run(monkeypatch, tmp_path, "--minutes", "1")) == {"correctness"}


def test_figures_are_those_of_the_largest_batches():
    def row(n, batch, lben, torchdeq):
        return {"n": n, "batch": batch, "lben": lben, "unfused": 6.0, "share": 0.5, **torchdeq}

    part = {"commit": "c", "date": "d"}
    record = {
        "correctness": {"found": {"correct": True}, **part},
        "n = 80": {
            "found": [row(80, 128, 9.0, {}), row(80, 65536, 1.0, {"torchdeq": 20.0})], **part,
        },
        "n = 512": {"found": [row(512, 65536, 2.0, {})], **part},
    }  # fmt: skip
    figures = gpu.summary(record, "cuda")
    assert figures["share_of_ceiling"] == {"80": 0.5, "512": 0.5}
    assert figures["ratio_unfused"] == 3.0
    assert figures["ratio_torchdeq"] == 20.0
    assert "| 80 | 128 | 9 | 6 | 0.5 | – |" in gpu.table(record)


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


@pytest.mark.slow
def test_the_whole_of_it_on_a_cpu(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    assert run(monkeypatch, tmp_path, "--quick")["correctness"]["found"]["correct"]
    rows = gpu_speed.speed(16, (8,), gpu_speed.ceilings("cpu", 64), "cpu")
    assert rows[0]["lben"] > 0
    assert 0 < rows[0]["share"] < 1
    rows = gpu_images.convolutions("cpu", 2)
    assert {row["what"] for row in rows} == {"training", "evaluation"}
    assert all(row["network ÷ bare"] > 0.5 for row in rows)
