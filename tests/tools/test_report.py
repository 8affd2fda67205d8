"""The page of ``bench/report.py``: what it shows, what it refuses, and that it asks for nothing."""

import base64
import doctest
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import pytest
import report
from end_to_end import python_in_root
from report_documents import document, entry, every_kind, layer, loaded, point, profile, shown, suite, sweep
from report_page import computed, figures, load, page
from report_page.page import write_report

from sonic_ep.profiler.machine import TWO_GPUS_NOTE

BENCH = Path(report.__file__).parent
REAL = BENCH / "results" / "2xH100_suite.json"
HOSTILE = "<script>alert('x')</script>\"'&amp;$\\frac{"
ANCHORS = {
    *{"headline", "environment", "bandwidth", "breakdown", "memory", "winners", "extrapolation"},
    *{"sweep", "spread", "suites", "layers", "profiles"},
}


def anchors(text: str) -> set[str]:
    """Ids of its sections."""
    return set(re.findall(r'<section id="(\w+)"', text))


def tree(text: str) -> ElementTree.Element:
    """The page; every tag has to close, and no attribute runs anything."""
    root = ElementTree.fromstring(text.removeprefix("<!doctype html>"))
    assert not any(name.startswith("on") for element in root.iter() for name in element.attrib)
    assert all(element.tag != "script" for element in root.iter())
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report of every kind of document and the real results."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "out").mkdir()
    assert report.main([*map(str, [REAL, *every_kind(folder)]), "-o", str(folder / "out" / "page.html")]) == 0
    return folder / "out"


def test_the_page_is_complete_and_asks_for_nothing(whole: Path) -> None:
    text = (whole / "page.html").read_text()
    elements = list(tree(text).iter())
    references = [value for e in elements for name, value in e.items() if name in ("src", "srcset", "href")]
    ids = [e.attrib["id"] for e in elements if "id" in e.attrib]
    alts = [e.attrib["alt"] for e in elements if e.tag == "img"]
    assert all(reference.startswith(("data:image/svg+xml;base64,", "#")) for reference in references)
    assert not [word for word in ("url(", "@import") if word in text]
    assert "\n:root" in text, "the style stands as it was written"
    assert {reference[1:] for reference in references if reference.startswith("#")} == ANCHORS == anchors(text)
    assert len(ids) == len(set(ids))
    assert all(alts)
    for drawing in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", text):
        drawn = base64.b64decode(drawing).decode()
        assert "<script" not in drawn
        assert re.findall(r'(?:href|src)="(?!#)', drawn) == []
    # Every figure is a PNG, too, that is not blank.
    paths = sorted((whole / "page_png").iterdir())
    assert len(paths) == len(alts) >= 8
    for path in paths:
        picture = matplotlib.image.imread(path)
        assert picture.shape[1] == pytest.approx(9.2 * 150, abs=1)
        # Title and notes are grey: colours are of what is drawn.
        colours = picture[..., :3].max(axis=-1) - picture[..., :3].min(axis=-1) > 0.13
        assert colours.mean() > 0.001, path


def test_what_is_computed_and_what_two_gpus_flatter_is_called_so(whole: Path) -> None:
    text = (whole / "page.html").read_text()
    sections = {name: text.partition(f'<section id="{name}">')[2].partition("</section>")[0] for name in ANCHORS}
    titles = re.findall(r"<(?:h2|strong|caption><span)>(.*?)</", sections["extrapolation"])
    assert ["computed, not measured" in title.lower() for title in titles] == [True] * max(3, len(titles))
    assert "W=2, K=8: all_gather + rank_dedup, measured." in sections["winners"]
    assert "W=8, K=8: all_to_all + rank_dedup, computed." in sections["winners"]
    # Once, before all sections.
    assert text.count(TWO_GPUS_NOTE) == 1
    assert text.index(TWO_GPUS_NOTE) < text.index("<section") < text.index('id="headline"') + 1
    for name in ANCHORS - {"environment", "extrapolation"}:
        assert "NVIDIA H100 80GB HBM3, W=2, commit abc1234, 2026-11-25" in sections[name], name


def test_sections_are_there_only_with_data(tmp_path: Path) -> None:
    of_suite, of_sweep = {"environment", "spread", "suites"}, {"bandwidth", "sweep"}
    bare = {"breakdown": [], "memory": [{"what": "saved activations", "formula_bytes": None, "measured_bytes": None}]}
    for content, expected in (
        (suite(), {"environment"}),
        ({**suite(entry("x", 10.0)), "rates_gb_per_s": {}}, of_suite),
        (suite(entry("x", 10.0)), of_suite | {"winners", "extrapolation"}),
        (document("profile", profile()), {"environment", "spread", "profiles"}),
        ({**layer(), **bare}, ANCHORS - of_sweep - {"suites", *bare}),
        (layer(), ANCHORS - of_sweep - {"suites"}),
        (sweep(point(1024)), ANCHORS - {"headline", "breakdown", "memory", "suites", "layers", "profiles"}),
        (sweep(point(1024, routing="skewed")), {"environment", "sweep", "spread"}),
    ):
        assert anchors(shown(loaded(tmp_path, a=content))) == expected


def test_hostile_strings_are_text_and_the_page_is_the_same_every_time(tmp_path: Path) -> None:
    shout = entry(HOSTILE, 10.0, how=HOSTILE, ceiling=HOSTILE, bar=HOSTILE, met=True)
    changes = {"gpu": HOSTILE, "command": HOSTILE, "note": HOSTILE + "\x00\u202e", "commit": HOSTILE}
    loud = layer({"activation": HOSTILE}, **changes)
    loud["memory"][0]["what"] = HOSTILE
    loud["breakdown"] = [{"pass": HOSTILE, "parts": {HOSTILE: 1.0, "rest": 2.0}}]
    documents = loaded(tmp_path, a=suite(shout, **changes), b=suite(shout, **changes), c=loud)
    write_report(documents, tmp_path / "page.html", tmp_path / "png")
    text = (tmp_path / "page.html").read_text()
    root = tree(text)
    assert " ".join(root.itertext()).count(HOSTILE) > 20
    assert any(HOSTILE in image.attrib["alt"] for image in root.iter("img"))
    assert not {"\x00", "\u202e"} & set(text)
    for name in ("first", "second"):
        write_report(documents[:1], tmp_path / name, tmp_path / "png")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_wrong_places_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded(tmp_path, a=suite(entry("x", 10.0)))
    monkeypatch.chdir(tmp_path)
    for words, code, message in (
        ("a.json a.json", 2, "a.json: expected each file once, got it twice"),
        ("a.json -o a.json", 2, "--output: expected the path of a page, got a.json, one of the results"),
        ("a.json -o .", 2, "--output: expected the path of a file, got the folder ."),
        ("b.json", 2, "b.json: expected a readable file: No such file or directory"),
        ("a.json -o a.json/page.html", 2, "--output: there is no folder a.json, make it first"),
        ("a.json -o none/page.html", 2, "--output: there is no folder none, make it first"),
        ("a.json --png-folder a.json", 1, "[Errno 17] File exists: 'a.json'"),
    ):
        assert (report.main(words.split()), capsys.readouterr().err) == (code, f"report: {message}\n")
        assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_without_a_library_one_line_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import runpy, sys; sys.modules['matplotlib'] = None\n"
        f"sys.path.insert(0, {str(BENCH)!r}); runpy.run_path({str(BENCH / 'report.py')!r}, run_name='__main__')"
    )
    done = python_in_root("-c", program, str(REAL), "-o", str(tmp_path / "page.html"))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"report: .*matplotlib.*: pip install msgspec jinja2 matplotlib\n", done.stderr)
    assert not (tmp_path / "page.html").exists()


def test_examples_in_docstrings() -> None:
    for module in (computed, figures, load, page):
        found = doctest.testmod(module)
        assert (found.attempted > 0, found.failed) == (True, 0), module
