"""The picture of an evaluation: a PNG, or the command that installs what draws it."""

import sys

import pytest

from lben.evaluation.reports import draw
from tests.lben.evaluation.reports.examples import evaluation


@pytest.mark.parametrize("report", [evaluation(), evaluation(gamma=None, radii=(0.0, 0.0))])
def test_a_picture_is_written(tmp_path, report):
    draw(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lben\[plots\]'"):
        draw(evaluation(), tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
