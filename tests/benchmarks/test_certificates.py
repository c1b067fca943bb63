"""What a stopped run has found is taken up again by the same version, and by no other."""

import pytest

from benchmarks import certificates, running
from benchmarks.certificates import Record

ROWS = [{"network": "one", "dtype": "float32", "tol": 1e-2, "images": 3, "wrong": 0}]


@pytest.fixture(autouse=True)
def committed(monkeypatch):
    monkeypatch.setattr("benchmarks.common.COMMIT", "0123456789ab")
    monkeypatch.setattr(certificates, "COMMIT", "0123456789ab")


def test_rows_are_those_of_the_same_version_and_options(tmp_path, monkeypatch):
    out = tmp_path / "found.json"
    Record(out, quick=False).put("running", ROWS)
    assert Record(out, quick=False).rows("running") == ROWS
    assert Record(out, quick=True).rows("running") == []
    assert Record(out, quick=False).rows("rounding") == []
    for other in ("ba9876543210", "0123456789ab+changes"):
        monkeypatch.setattr("benchmarks.common.COMMIT", other)
        monkeypatch.setattr(certificates, "COMMIT", other)
        assert Record(out, quick=False).rows("running") == []


def test_uncommitted_changes_are_never_the_same_version(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.common.COMMIT", "0123456789ab+changes")
    monkeypatch.setattr(certificates, "COMMIT", "0123456789ab+changes")
    out = tmp_path / "found.json"
    Record(out, quick=False).put("running", ROWS)
    assert Record(out, quick=False).rows("running") == []


def test_parts_that_others_have_added_stay(tmp_path):
    out = tmp_path / "found.json"
    record = Record(out, quick=False)
    Record(out, quick=False).put("cost", {})
    record.put("running", ROWS)
    assert set(Record(out, quick=False).parts) == {"cost", "running"}


def test_what_was_run_is_not_run_again(monkeypatch):
    ran, saved = [], []

    def cases(boundaries, dtype, tol, quick):
        ran.append((str(dtype)[6:], tol))
        return iter(())

    monkeypatch.setattr(running, "_cases", cases)
    found = running.running(None, True, ROWS, lambda rows: saved.append(len(rows)))
    assert ("float32", 1e-2) not in ran
    assert ran == [("float32", 1e-4), ("float64", 1e-2), ("float64", 1e-4), ("float64", 1e-8)]
    assert found == ROWS
    assert len(saved) == 4
