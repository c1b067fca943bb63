"""The page of a record: its profiles, what it escapes, what it refuses, and that it really runs."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.report import RecordError, main, performance_profile, render

ROOT = Path(__file__).parent.parent.parent
METHODS = ("PeacemanRachford()", "DouglasRachford(relaxation=0.5)", "torchdeq <b>Anderson</b>")
HOSTILE = "</script><script>throw Error('escaped')</script><!-- {{title}} & \u2028"
STEPS = 25


def make_record() -> dict:
    """Return a small record with failures, gaps, nulls, infinities and hostile words."""
    cells = [
        {
            "problem": f"random {n}", "family": "random", "n": n, "batch": 128, "m": None,
            "skew": 0.5, "threads": 2, "tol": 1e-4, "dtype": "float32", "direction": direction,
            "product_seconds": 1e-5 * n,
            "results": [
                {
                    "method": method, "seconds": 1e-3 * (i + 1), "steps": 10 * (i + 1),
                    "status": "converged", "residual": 9e-5, "detail": "",
                }
                for i, method in enumerate(METHODS)
            ],
        }
        for direction in ("forward", "forward+backward")
        for n in (80, 400)
    ]  # fmt: skip
    cells[0]["results"][2].update(seconds=None, status="diverged", residual=math.inf)
    del cells[1]["results"][1]
    curves = [
        {
            "problem": problem, "method": method, "steps": list(range(STEPS)),
            "milliseconds": [0.1 * (i + 1) * k for k in range(STEPS)],
            "residual": [0.5 ** (k / (i + 1)) for k in range(STEPS)],
        }
        for problem in ("trained", HOSTILE)
        for i, method in enumerate(METHODS)
    ]  # fmt: skip
    curves[2]["residual"][-3:] = [math.inf, math.nan, 0.0]  # no place on a logarithmic axis
    return {
        "title": HOSTILE, "seed": 0, "commit": "0123456789ab", "date": "2026-01-31", "quick": True,
        "environment": {"processor": "abacus", "threads": 2},
        "figures": {
            "failures": 1, "bound_violations": 0, "worst_ratio_torchdeq": 3.14159,
            "geomean_forward_ratio_published": 2.5, "geomean_backward_ratio_published": None,
            "floor_ratio": {"80": 1.25, "400": None, "1000": 1.5},
        },
        "cells": cells, "curves": curves,
        "scaling": {
            "points": [
                {"n": n, "batch": batch, "seconds": 1e-9 * n**2 * batch}
                for n in (80, 400, 1000) for batch in (1, 32, 1024)
            ],
            "slope_n": 2.0, "slope_batch": None,
        },
    }  # fmt: skip


# --- performance profiles -----------------------------------------------------------------------

seconds = st.one_of(
    st.none(), st.sampled_from([math.nan, math.inf]), st.floats(1e-6, 1e3, exclude_min=True)
)
tables = st.integers(1, 8).flatmap(
    lambda cells: st.dictionaries(
        st.sampled_from("abcde"), st.lists(seconds, min_size=cells, max_size=cells), min_size=1
    )
)


def succeeded(time: float | None) -> bool:
    return time is not None and math.isfinite(time)


@given(tables)
def test_profiles_are_distribution_functions(times):
    for method, corners in performance_profile(times).items():
        taus, shares = zip(*corners, strict=True)
        assert taus[0] == 1.0
        assert list(taus) == sorted(set(taus))
        assert list(shares) == sorted(shares)
        assert shares[0] >= 0
        # Failures never count: the right end is exactly the share of cells that were solved.
        assert shares[-1] == sum(map(succeeded, times[method])) / len(times[method])


@given(tables)
def test_at_one_stand_the_cells_in_which_a_method_is_fastest(times):
    cells = list(zip(*times.values(), strict=True))
    for (method, corners), own in zip(
        performance_profile(times).items(), times.values(), strict=True
    ):
        wins = sum(
            succeeded(mine) and mine == min(t for t in cell if succeeded(t))
            for mine, cell in zip(own, cells, strict=True)
        )
        assert corners[0] == (1.0, wins / len(cells)), method


def test_profile_of_a_hand_computed_table():
    times = {"a": [1.0, 4.0, None, 3.0], "b": [2.0, 1.0, None, None]}
    assert performance_profile(times) == {
        "a": [(1.0, 0.5), (4.0, 0.75)],
        "b": [(1.0, 0.25), (2.0, 0.5)],
    }


def test_a_cell_that_all_fail_lowers_every_profile_and_divides_by_nothing():
    assert performance_profile({"a": [None, 1.0], "b": [None, 1.0]}) == {
        "a": [(1.0, 0.5)],
        "b": [(1.0, 0.5)],
    }
    assert performance_profile({"a": [None]}) == {"a": [(1.0, 0.0)]}
    assert performance_profile({"a": []}) == {"a": []}
    assert performance_profile({}) == {}


def test_profiles_refuse_times_that_mean_nothing():
    with pytest.raises(ValueError, match=r"one time per cell.*'a': 1, 'b': 2"):
        performance_profile({"a": [1.0], "b": [1.0, 2.0]})
    for time in (0.0, -1.0, -math.inf):
        with pytest.raises(ValueError, match="must be positive"):
            performance_profile({"a": [time]})


# --- the text of the page -----------------------------------------------------------------------


def payload(page: str) -> dict:
    found = re.findall(
        r'<script type="application/json" id="payload">(.*?)</script>', page, re.DOTALL
    )
    assert len(found) == 1

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(found[0], parse_constant=refuse)


def test_the_record_is_embedded_whole_and_cannot_leave_its_element():
    page = render(make_record())
    assert page.count("</script>") == render({**make_record(), "title": ""}).count("</script>") == 3
    assert "throw Error('escaped')</script>" not in page
    embedded = payload(page)["record"]
    assert embedded["title"] == HOSTILE
    assert embedded["cells"][0]["results"][2]["residual"] == "Infinity"
    assert embedded["curves"][2]["residual"][-2:] == ["NaN", 0.0]


def test_the_page_names_no_address():
    assert re.findall(r"https?://[^\"' )]+", render(make_record())) == [
        "http://www.w3.org/2000/svg"  # the name of SVG, not a place to load from
    ]


def test_profiles_are_over_the_cells_in_which_all_methods_took_part():
    profiles = payload(render(make_record()))["profiles"]
    assert profiles["forward"]["cells"] == 1
    ends = {m: corners[-1][1] for m, corners in profiles["forward"]["methods"].items()}
    assert list(ends.values()) == [1.0, 1.0, 0.0]
    assert all(c[-1][1] == 1.0 for c in profiles["forward+backward"]["methods"].values())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.pop("seed"), "the record lacks seed"),
        (lambda r: r["figures"].pop("failures"), "figures lacks failures"),
        (lambda r: r["cells"][1].pop("tol"), r"cells\[1\] lacks tol"),
        (
            lambda r: [r["cells"][1]["results"][0].pop(k) for k in ("steps", "status")],
            r"cells\[1\]\.results\[0\] lacks steps, status",
        ),
        (lambda r: r.update(curves=None), "curves should be a list, got NoneType"),
        (lambda r: r.update(scaling=[]), "scaling should be an object, got list"),
        (lambda r: r["cells"].append(None), r"cells\[4\] should be an object, got NoneType"),
        (lambda r: r["curves"][0]["steps"].pop(), r"curves\[0\] has 24 steps, 25 milliseconds"),
        (lambda r: r["cells"][0]["results"][0].update(seconds=0.0), "times must be positive"),
    ],
)
def test_one_error_names_what_the_record_lacks(damage, message):
    record = make_record()
    damage(record)
    with pytest.raises(RecordError, match=f"^not a record of the solver benchmark: {message}"):
        render(record)


def test_one_error_names_all_that_is_missing():
    record = make_record()
    del record["date"], record["scaling"]["points"]
    with pytest.raises(RecordError, match=r"the record lacks date; scaling lacks points$"):
        render(record)


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_the_page(tmp_path, capsys):
    (tmp_path / "record.json").write_text(json.dumps(make_record()))
    main([str(tmp_path / "record.json"), str(tmp_path / "new" / "page.html")])
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == render(make_record())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "the record should be an object, got list"),
        (b"null", "the record should be an object, got NoneType"),
        (b"{}", "the record lacks title, seed, commit"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(content, message, tmp_path, capsys):
    source, target = tmp_path / "record.json", tmp_path / "page.html"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        main([str(source), str(target)])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not target.exists()


def test_the_command_says_when_it_cannot_write(tmp_path, capsys):
    (tmp_path / "record.json").write_text(json.dumps(make_record()))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "record.json"), str(tmp_path)])
    assert "cannot write" in capsys.readouterr().err


def test_the_command_starts_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--help"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0
    assert b"usage: python -m benchmarks.report" in done.stdout


# --- the page in a browser ----------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)
in_a_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"needs a headless browser: none of {', '.join(BROWSERS)} is installed"
)


def open_page(record: dict, folder: Path, address: str = "") -> str:
    """Return the document as a browser shows it, once its script has run without error."""
    page = folder / "page.html"
    page.write_text(render(record), encoding="utf-8")
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    words += [f"--user-data-dir={folder / 'browser'}", "--virtual-time-budget=3000", "--dump-dom"]
    shown = subprocess.run(
        [BROWSER, *words, page.as_uri() + address], capture_output=True, text=True, timeout=60
    ).stdout
    errors = re.search(r'<p id="errors"[^>]*>(.*?)</p>', shown, re.DOTALL)
    assert errors, "the browser showed no page"
    assert errors[1] == ""
    assert 'hidden=""' in errors[0]
    return shown


def picture(document: str, holder: str) -> ElementTree.Element:
    """Return the first drawing in the element of this id."""
    begin = document.index("<svg", document.index(f'id="{holder}"'))
    return ElementTree.fromstring(document[begin : document.index("</svg>", begin) + len("</svg>")])


def curves(drawing: ElementTree.Element) -> dict[str, ElementTree.Element]:
    return {path.get("data-series"): path for path in drawing.iter() if path.get("data-series")}


def label(drawing: ElementTree.Element, kind: str) -> str:
    return next(text.text for text in drawing.iter() if text.get("class") == kind)


def figure(document: str, name: str) -> str:
    found = re.search(f'<dd data-figure="{name}"[^>]*>(.*?)</dd>', document, re.DOTALL)
    return re.sub("<[^>]*>", "", found[1])


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> str:
    return open_page(make_record(), tmp_path_factory.mktemp("page"))


@in_a_browser
def test_the_browser_shows_the_headline_figures(document):
    assert figure(document, "failures") == "1"
    assert figure(document, "worst_ratio_torchdeq") == "3.14 ×"
    assert figure(document, "geomean_backward_ratio_published") == "not measured"
    assert figure(document, "floor_ratio") == "1.25 × n 80– × n 4001.50 × n 1000"
    assert "throw Error" in re.search("<h1>(.*?)</h1>", document)[1]  # shown as text, not run


@in_a_browser
def test_the_browser_draws_every_point_of_every_curve(document):
    drawing = picture(document, "plot-convergence")
    assert label(drawing, "x-label") == "iterations"
    drawn = curves(drawing)
    assert set(drawn) == set(METHODS)
    places = {name: re.findall("[ML]", path.get("d")) for name, path in drawn.items()}
    assert [len(places[m]) for m in METHODS] == [STEPS, STEPS, STEPS - 3]


@in_a_browser
def test_the_browser_draws_profiles_and_scaling(document):
    assert set(curves(picture(document, "plot-profiles"))) == set(METHODS)
    assert set(curves(picture(document, "plot-n"))) == {"batch 1", "batch 32", "batch 1024"}
    assert set(curves(picture(document, "plot-batch"))) == {"n 80", "n 400", "n 1000"}
    assert label(picture(document, "plot-n"), "title") == "over n, slope 2.00"
    assert label(picture(document, "plot-batch"), "title") == "over batch, slope not measured"


@in_a_browser
def test_a_method_has_one_look_on_all_plots(document):
    drawings = [picture(document, name) for name in ("plot-convergence", "plot-profiles")]
    looks = [{m: path.get("style") for m, path in curves(d).items()} for d in drawings]
    assert looks[0] == looks[1]
    assert len(set(looks[0].values())) == len(METHODS)


@in_a_browser
def test_the_browser_lists_failures_and_cells(document):
    rows = re.search('<tbody id="failure-rows">(.*?)</tbody>', document, re.DOTALL)[1]
    counts = re.findall(r'<td class="number[^"]*">(\d+)</td>', rows)
    assert counts == ["1", "4", "0", "4", "0", "3"]  # failed and run, worst method first
    assert "diverged" in rows
    assert "11 of 11 results" in document


@in_a_browser
def test_the_address_chooses_axis_problem_and_methods(tmp_path):
    address = "#axis=time&problem=trained&hide=" + "PeacemanRachford()"
    drawing = picture(open_page(make_record(), tmp_path, address), "plot-convergence")
    assert label(drawing, "x-label") == "time (ms)"
    assert set(curves(drawing)) == set(METHODS[1:])


@in_a_browser
def test_a_record_without_measurements_still_makes_a_page(tmp_path):
    record = copy.deepcopy(make_record())
    record.update(cells=[], curves=[], figures=None, environment=None, scaling=None)
    document = open_page(record, tmp_path)
    assert figure(document, "failures") == "not measured"
    assert "nothing to show" in document
