"""An evaluation on a terminal: every figure, at most 90 columns, and what a radius promises."""

import pytest

from lben.evaluation.reports.table import statement, table
from tests.lben.evaluation.reports.examples import evaluation


def test_every_figure_is_in_the_table():
    text = table(evaluation())
    for words in (
        "digits, 360 test images", "90.00 %", "2 on the normalised input", "5 (pixels to logits)",
        "4 found; tightness 1.375 (bound 5.5 ÷ found)", "0 in 205 pairs", "17 steps at most",
        "within 2.0e-04", "0.500         40.00     45.00         50.00     75.00",
    ):  # fmt: skip
        assert words in text
    assert max(map(len, text.splitlines())) <= 90


def test_a_model_without_a_promise_has_none_in_the_table():
    text = table(evaluation(gamma=None, promised_bound=None, tol=None))
    assert "promised γ         none" in text
    assert "÷ found" not in text
    assert "solves to" not in text


@pytest.mark.parametrize(
    ("promise", "tol", "words"),
    [
        ("running", 1e-4, "as it runs (float32, solves to 0.0001) it keeps the label"),
        ("running", None, "as it runs (float32) it keeps the label"),
        ("exact", 1e-4, "the exact network of these weights keeps the label"),
    ],
)
def test_a_table_says_what_a_radius_promises(promise, tol, words):
    assert statement("float32", tol, promise).startswith(words)
