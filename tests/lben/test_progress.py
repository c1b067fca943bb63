"""A bar on a terminal; elsewhere one line that says how long, and one at the end."""

import pytest

from lben import progress
from lben.progress import Progress, format_seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.1, "1 second"), (20.4, "20 seconds"), (89, "89 seconds"), (90, "1.5 minutes"),
        (3000, "50 minutes"), (5399, "90 minutes"), (9000, "2.5 hours"), (90000, "25 hours"),
    ],
)  # fmt: skip
def test_times_as_people_say_them(seconds, words):
    assert format_seconds(seconds) == words


def clocked(monkeypatch, step):
    now = [0.0]

    def tick():
        return now[0]

    monkeypatch.setattr(progress.time, "perf_counter", tick)
    return lambda bar: (now.__setitem__(0, now[0] + step), bar.update())


def test_long_work_says_once_how_long_it_takes(monkeypatch, capsys):
    advance = clocked(monkeypatch, 4.0)
    with Progress(10, "proofs", "images") as bar:
        for _ in range(10):
            advance(bar)
    assert capsys.readouterr().err.splitlines() == [
        "proofs: 2 of 10 images, about 32 seconds left",
        "proofs: 10 images in 40 seconds",
    ]


def test_what_was_done_before_does_not_count_as_speed(monkeypatch, capsys):
    advance = clocked(monkeypatch, 6.0)
    with Progress(10, "train", "steps", initial=8) as bar:
        advance(bar)
    assert "9 of 10 steps, about 6 seconds left" in capsys.readouterr().err


@pytest.mark.parametrize(("quiet", "step"), [(True, 100.0), (None, 0.1)])
def test_short_work_and_other_processes_are_silent(monkeypatch, capsys, quiet, step):
    advance = clocked(monkeypatch, step)
    with Progress(10, "proofs", "images", quiet) as bar:
        for _ in range(10):
            advance(bar)
    assert capsys.readouterr().err == ""
