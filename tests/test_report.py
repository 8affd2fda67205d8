"""The page of ``bench/report.py``: what it shows, what it computes, what it refuses, and that it asks for nothing."""

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest
from limits import HANG_SECONDS
from report import main
from report_documents import (
    Json,
    all_kinds,
    anchors,
    document,
    entry,
    layer,
    loaded,
    point,
    profile,
    suite,
    sweep,
    written,
)
from report_page.page import render, write_report

from sonic_ep.profiler.machine import TWO_GPUS_NOTE

BENCH = Path(__file__).parents[1] / "bench"
REAL = BENCH / "results" / "2xH100_suite.json"
HOSTILE = "<script>alert('x')</script>\"'&amp;$\\frac{"
VOID = {"br", "img", "link", "meta", "source"}
ANCHORS = {
    *{"environment", "bandwidth", "breakdown", "memory", "winners", "extrapolation"},
    *{"sweep", "spread", "suites", "layers", "profiles"},
}


class Reader(HTMLParser):
    """Walks a page: every tag has to close, and what it refers to is kept."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.alts: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.add(tag)
        self.references += [found[name] or "" for name in ("src", "srcset", "href") if name in found]
        self.ids += [found["id"] or ""] if "id" in found else []
        self.alts += [found.get("alt") or ""] if tag == "img" else []
        assert not any(name.startswith("on") for name in found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report of every kind of document and the real results."""
    folder = tmp_path_factory.mktemp("report")
    paths = written(folder, **all_kinds())
    assert main([*map(str, [REAL, *paths]), "-o", str(folder / "out" / "page.html")]) == 0
    return folder / "out"


def test_the_page_is_complete_and_asks_for_nothing(whole: Path) -> None:
    text = (whole / "page.html").read_text()
    reader = read(text)
    assert text.startswith("<!doctype html>")
    assert "script" not in reader.tags
    assert all(reference.startswith(("data:", "#")) for reference in reader.references)
    assert "url(" not in text
    assert "@import" not in text
    assert "\n:root" in text, "the style stands as it was written"
    assert {reference[1:] for reference in reader.references if reference.startswith("#")} == ANCHORS == anchors(text)
    assert len(reader.ids) == len(set(reader.ids))
    assert all(reader.alts)
    assert len(reader.alts) >= 8


def test_drawings_ask_for_nothing_either(whole: Path) -> None:
    drawings = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", (whole / "page.html").read_text())
    for drawing in drawings:
        text = base64.b64decode(drawing).decode()
        assert "<script" not in text
        assert re.findall(r'(?:href|src)="(?!#)', text) == []


def test_every_figure_is_a_png_that_is_not_blank(whole: Path) -> None:
    reader = read((whole / "page.html").read_text())
    paths = sorted((whole / "page_png").iterdir())
    assert len(paths) == len(reader.alts)
    for path in paths:
        picture = matplotlib.image.imread(path)
        assert picture.shape[1] == pytest.approx(9.2 * 150, abs=1)
        # Title and notes are grey: colours are of what is drawn.
        colours = picture[..., :3].max(axis=-1) - picture[..., :3].min(axis=-1) > 0.13
        assert colours.mean() > 0.001, path


def test_computed_is_called_computed(whole: Path) -> None:
    text = (whole / "page.html").read_text()
    section = text.partition('<section id="extrapolation"')[2].partition("</section>")[0]
    titles = re.findall(r"<(?:h2|strong|caption><span)>(.*?)</", section)
    assert len(titles) >= 3
    assert all("computed, not measured" in title.lower() for title in titles)
    grid = text.partition('id="winners">')[2].partition("</section>")[0]
    assert "W=2, K=8: all_gather + rank_dedup, measured." in grid
    assert "W=8, K=8: all_to_all + rank_dedup, computed." in grid


def test_two_gpus_have_their_caveat_wherever_they_were_measured(whole: Path) -> None:
    text = (whole / "page.html").read_text()
    for anchor in ("bandwidth", "breakdown", "memory", "sweep", "spread", "suites", "layers", "profiles", "winners"):
        section = text.partition(f'id="{anchor}">')[2].partition("</section>")[0]
        assert TWO_GPUS_NOTE in section, anchor
        assert "NVIDIA H100 80GB HBM3, W=2, commit abc1234, 2026-11-25" in section, anchor


def test_link_bytes_are_those_of_the_busiest_rank(whole: Path) -> None:
    text = (whole / "page.html").read_text()
    assert "reach the busiest rank" in text.partition('id="bandwidth">')[2].partition("</section>")[0]
    assert "into the busiest rank, MiB" in text.partition('id="profiles">')[2]


UNKNOWN_MEMORY = [{"what": "saved activations", "formula_bytes": None, "measured_bytes": None}]
WITHOUT_PARTS = {"bandwidth", "sweep", "suites", "breakdown", "memory"}


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ({"a": suite()}, {"environment"}),
        ({"a": {**suite(entry("x", 10.0)), "rates_gb_per_s": {}}}, {"environment", "spread", "suites"}),
        ({"a": suite(entry("x", 10.0))}, {"environment", "winners", "extrapolation", "spread", "suites"}),
        ({"a": document("profile", profile())}, {"environment", "spread", "profiles"}),
        ({"a": {**layer(), "breakdown": [], "memory": UNKNOWN_MEMORY}}, ANCHORS - WITHOUT_PARTS),
        ({"a": layer()}, ANCHORS - {"bandwidth", "sweep", "suites"}),
        ({"a": sweep(point(1024))}, ANCHORS - {"breakdown", "memory", "suites", "layers", "profiles"}),
        ({"a": sweep(point(1024, routing="skewed"))}, {"environment", "sweep", "spread"}),
    ],
)
def test_sections_are_there_only_with_data(tmp_path: Path, documents: dict[str, Json], expected: set[str]) -> None:
    assert anchors(render(loaded(tmp_path, **documents), lambda *_, **__: "")) == expected


def test_hostile_strings_are_text(tmp_path: Path) -> None:
    shout = entry(HOSTILE, 10.0, how=HOSTILE, ceiling=HOSTILE, bar=HOSTILE, met=True)
    changes = {"gpu": HOSTILE, "command": HOSTILE, "note": HOSTILE + "\x00\u202e", "commit": HOSTILE}
    content = {
        "a": suite(shout, **changes),
        "b": suite(shout, **changes),
        "c": layer({"activation": HOSTILE}, **changes),
    }
    content["c"]["memory"][0]["what"] = HOSTILE
    content["c"]["breakdown"] = [{"pass": HOSTILE, "parts": {HOSTILE: 1.0, "rest": 2.0}}]
    documents = loaded(tmp_path, **content)
    output = tmp_path / "page.html"
    write_report(documents, output, tmp_path / "png")
    reader = read(output.read_text())
    assert "script" not in reader.tags
    assert reader.text.count(HOSTILE) > 20
    assert any(HOSTILE in alt for alt in reader.alts)
    assert not {"\x00", "\u202e"} & set(output.read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.json", "a.json"], "a.json: expected each file once, got it twice"),
        (["a.json", "-o", "a.json"], "--output: expected the path of a page, got a.json, one of the results"),
        (["a.json", "-o", "."], "--output: expected the path of a file, got the folder ."),
        (["b.json"], "b.json: expected a readable file: No such file or directory"),
    ],
)
def test_wrong_places_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    written(tmp_path, a=suite(entry("x", 10.0)))
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err == f"report: {message}\n"
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_written_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = written(tmp_path, a=suite(entry("x", 10.0)))
    assert main([str(path), "-o", str(path / "page.html")]) == 1
    assert "File exists" in capsys.readouterr().err


def test_without_a_library_one_line_says_what_to_install(tmp_path: Path) -> None:
    (path,) = written(tmp_path, a=suite(entry("x", 10.0)))
    program = (
        "import runpy, sys; sys.modules['matplotlib'] = None\n"
        f"sys.path.insert(0, {str(BENCH)!r}); runpy.run_path({str(BENCH / 'report.py')!r}, run_name='__main__')"
    )
    words = [sys.executable, "-c", program, str(path), "-o", str(tmp_path / "page.html")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"report: .*matplotlib.*: pip install 'sonic-ep\[bench\]'\n", done.stderr)
    assert not (tmp_path / "page.html").exists()


def test_the_page_and_its_drawings_are_the_same_every_time(tmp_path: Path) -> None:
    documents = loaded(tmp_path, a=sweep(point(1024), point(4096)), b=suite(entry("x", 10.0)))
    for name in ("first", "second"):
        write_report(documents, tmp_path / name, tmp_path / "png")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
