"""A comparison of proofs on a terminal and as a picture."""

from lben.evaluation.proofs import TEXTBOOK
from lben.evaluation.reports import certification_table, draw_certification
from tests.lben.evaluation.reports.examples import certification


def test_every_proof_is_in_the_table():
    text = certification_table(certification())
    for words in (
        "digits, first 40 of 360 test images, clean accuracy 90.00 %", TEXTBOOK, "scaled",
        "withstands the attacks", "violations: 0", "intervals", "2.55/255", "0.500      2.00",
        "all test images: --samples 360 takes about",
    ):  # fmt: skip
        assert words in text


def test_a_complete_table_extrapolates_nothing():
    text = certification_table(certification(samples=360))
    assert text.endswith("took 21 seconds, all test images")


def test_the_picture_shows_what_proves_something(tmp_path):
    report = certification()
    assert [m.name for m in report.sound] == ["scaled"]
    assert report.best == (0.8, 0.4)
    draw_certification(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
