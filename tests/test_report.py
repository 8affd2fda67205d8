"""The page of ``sonic-ep report``: what it shows, what it computes, what it refuses, and that it asks for nothing."""

import argparse
import base64
import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from sonic_ep.cli.report import add_report
from sonic_ep.config import CombineMode, DispatchMode
from sonic_ep.report.computed import extrapolations, winner_grids
from sonic_ep.report.documents import Documents
from sonic_ep.report.load import load
from sonic_ep.report.origin import TWO_GPUS
from sonic_ep.report.page import page, write_report
from sonic_ep.report.sections import between_words, sections
from sonic_ep.report.selection import bandwidths, labels, longest_row
from sonic_ep.report.spread import repeated, within_runs

REAL = Path(__file__).parents[1] / "bench" / "results" / "2xH100_suite.json"
DISPATCH = tuple(mode.value for mode in DispatchMode)
COMBINE = tuple(mode.value for mode in CombineMode)
HOSTILE = "<script>alert('x')</script>\"'&amp;$\\frac{"
VOID = {"br", "img", "link", "meta", "source"}
ANCHORS = {
    *{"environment", "bandwidth", "breakdown", "memory", "winners", "extrapolation"},
    *{"sweep", "spread", "suites", "layers", "profiles"},
}
Json = dict[str, Any]


# Small documents by the schemas. Numbers follow a plain rule, so that tests can count on them.


def times(median: float, wide: float = 0.01, rounds: int = 20) -> Json:
    """p10 to p90 is ``wide`` times the median."""
    low, high = median * (1 - wide / 2), median * (1 + wide / 2)
    return {
        "rounds": rounds, "median_us": median, "p10_us": low, "p90_us": high,
        "min_us": low * 0.99, "max_us": high * 1.01,
    }  # fmt: skip


def environment(**changes: Any) -> Json:
    return {
        "gpu": "NVIDIA H100 80GB HBM3", "gpus": 2, "link": "NVLink, 18 links (NV18)", "torch": "2.11.0+cu130",
        "triton": "3.6.0", "cuda": "13.0", "nccl": "2.28.9", "driver": "580.159.04", "code": "0123456789ab",
        "world_size": 2, "process_group": "nccl", "commit": "abc1234", "command": "torchrun -m sonic_ep bench",
        "date": "2026-11-25T09:15:40+00:00", "note": None, **changes,
    }  # fmt: skip


RATES = {"copy_engine_in": 350.0, "copy_engine_out": 375.0, "read": 330.0, "write": 360.0, "memory": 3000.0}


def document(kind: str, content: Json, **changes: Any) -> Json:
    return {"kind": kind, "environment": environment(**changes), "rates_gb_per_s": RATES, **content}


def entry(name: str, median: float, how: str = "queued", **more: Any) -> Json:
    shape = {"T": 4096, "H": 4096, "I": 1536, "E": 64, "K": 8, "dtype": "bfloat16"}
    return {"name": name, "how": how, "shape": shape, **times(median), **more}


def suite(*entries: Json, **changes: Any) -> Json:
    return document("suite", {"entries": list(entries)}, **changes)


def settings(dispatch: str = "all_to_all", combine: str = "rank_dedup", **flags: Any) -> Json:
    found = {"dispatch": dispatch, "combine": combine, "redispatch_x_in_backward": False, "cpu_sync_on_runtime": False}
    return {**found, "max_rows": None, **flags}


def profile(tokens: int = 4096, hidden: int = 4096, top_k: int = 8, routing: str = "uniform") -> Json:
    """Every mode at 80 % of its ceiling for its bytes, all_to_all's combine with K/2 times as many."""
    row = tokens * hidden * 2
    modes = [{"kind": "plan", "mode": "", **times(42), "link_bytes": 0.0, "gb_per_s": None, "percent": None}]
    for kind, mode in [*(("dispatch", name) for name in DISPATCH), *(("combine", name) for name in COMBINE)]:
        way = "write" if kind == "combine" else "copy_engine_in" if mode == "all_gather" else "read"
        moved = row * (top_k / 2 if (kind, mode) == ("combine", "all_to_all") else 1)
        rate = 0.8 * RATES[way] * row / (row + 2e6)
        link = {"link_bytes": moved, "gb_per_s": rate, "ceiling": way, "percent": 100 * rate / RATES[way]}
        modes.append({"kind": kind, "mode": mode, **times(moved / rate / 1e3), **link})
    pairs = [
        {"dispatch": dispatch, "combine": combine, **times(1000.0 + 100 * number)}
        for number, (dispatch, combine) in enumerate(product(DISPATCH, COMBINE))
    ]
    shape = {"tokens": [tokens, tokens], "hidden": hidden, "top_k": top_k, "num_experts": 64, "dtype": "bfloat16"}
    found = {"shape": {**shape, "routing": routing}, "backend": "fast", "ranks_per_gpu": 1}
    return {**found, "modes": modes, "pairs": pairs, "config": settings()}


def layer(setup: Json | None = None, config: Json | None = None, scale: float = 1.0, **changes: Any) -> Json:
    """Forward: layer 8700, GEMMs 7000, link 800 us; forward and backward three times as much."""
    found: Json = {
        "setup": {
            "thiek": [8192, 4096, 1536, 64, 8], "world_size": 2, "dtype": "bfloat16", "activation": "swiglu",
            "gate_layout": "interleaved", "score_order": "topk_then_softmax", "add_bias": False,
            "norm_topk_probs": False, "routing": "uniform", "backend": "fast", **(setup or {}),
        },
        "config": config or settings(),
        "accuracy": [
            {"name": name, "error": 2e-3, "bound": 4e-3, "worst_row": 3e-3,
             "worst_row_bound": 6e-3, "ok": name != "dw2"}
            for name in ("o", "dx", "dw2")
        ],
        "profile": profile(),
        "memory": [
            {"what": "saved activations", "formula_bytes": 2**30, "measured_bytes": 2**30 + 2**20},
            {"what": "shared memory", "formula_bytes": 2**28, "measured_bytes": None},
        ],
        "times": [], "derived": [], "breakdown": [],
    }  # fmt: skip
    for name, factor in (("forward, training", scale), ("forward and backward", 3 * scale)):
        for what, median in (("layer", 8700.0), ("grouped GEMMs", 7000.0)):
            rates = {"tflop_per_s": 550.0, "tflop_per_s_of_group": 1100.0 if what == "layer" else None}
            found["times"].append({"pass": name, "what": what, **times(median * factor), **rates})
        ratios = {"over_gemms": 8700 / 7000, "over_gemms_and_link": 8700 / 7800, "scaling_efficiency": 0.87}
        waited = {"exposed_communication_us": 900 * factor, "link_us": 800 * factor}
        found["derived"].append({"pass": name, **waited, **ratios, "over_reference": None})
        parts = {"plan": 42.0, "dispatch": 540.0, "grouped GEMMs": 7000.0, "combine": 530.0, "rest": 588.0}
        found["breakdown"].append({"pass": name, "parts": {part: us * factor for part, us in parts.items()}})
    return document("layer", found, **changes)


def point(tokens: int, top_k: int = 8, routing: str = "uniform", fastest: int = 2) -> Json:
    """The pair number ``fastest`` of nine takes 1000 us forward, the others 1100 and more."""
    pairs = [
        {"dispatch": dispatch, "combine": combine, "pass": name, **times(factor * us)}
        for number, (dispatch, combine) in enumerate(product(DISPATCH, COMBINE))
        for name, factor in (("forward, training", 1), ("forward and backward", 3))
        if (us := 1000.0 if number == fastest else 1100.0 + 10 * number)
    ]
    over = {"forward, training": 1.0, "forward and backward": 1.02}
    return {
        "shape": {"T": tokens, "H": 4096, "I": 1536, "E": 64, "K": top_k, "dtype": "bfloat16"},
        "routing": routing, "profile": profile(tokens, top_k=top_k, routing=routing), "pairs": pairs,
        "picked": {"dispatch": "all_gather", "combine": "rank_dedup"},
        "predicted": {"dispatch": "all_to_all", "combine": "rank_dedup"},
        "over_best": over, "predicted_over_best": dict.fromkeys(over, 1.2),
    }  # fmt: skip


def sweep(*points: Json, **changes: Any) -> Json:
    return document("sweep", {"points": list(points)}, **changes)


def written(folder: Path, **documents: Json) -> list[Path]:
    """Each as a file of its name."""
    paths = [folder / f"{name}.json" for name in documents]
    for path, content in zip(paths, documents.values(), strict=True):
        path.write_text(json.dumps(content))
    return paths


def loaded(folder: Path, **documents: Json) -> Documents:
    return load(written(folder, **documents))


def all_kinds() -> dict[str, Json]:
    entries = [
        entry("dispatch all_to_all", 540.0, gb_per_s=248.0, ceiling="the read ceiling", percent=74.6, floor_us=449.0),
        entry("layer", 8680.0, tflop_per_s=570.0, bar="at most 1.2 of the GEMMs", bar_us=8400.0, met=False),
    ]
    return {
        "suite": suite(*entries),
        "profile": document("profile", profile()),
        "layer": layer(),
        "redispatch": layer(config=settings(redispatch_x_in_backward=True), scale=1.05),
        "sweep": sweep(point(1024), point(4096), point(4096, top_k=2, fastest=5), point(1024, routing="skewed")),
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


def command(*words: str) -> int:
    """The command as ``sonic_ep.cli`` runs it, errors raised."""
    parser = argparse.ArgumentParser()
    add_report(parser)
    options = parser.parse_args(words)
    options.check(options)
    code: int = options.command(options)
    return code


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report of every kind of document and the real results."""
    folder = tmp_path_factory.mktemp("report")
    paths = written(folder, **all_kinds())
    assert command(*map(str, [REAL, *paths]), "-o", str(folder / "out" / "page.html")) == 0
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
    anchors = {reference[1:] for reference in reader.references if reference.startswith("#")}
    assert anchors == ANCHORS
    assert len(reader.ids) == len(set(reader.ids))
    assert anchors <= set(reader.ids)
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
    section = text.partition('<section id="extrapolation"')[2] or text.partition('id="extrapolation">')[2]
    section = section.partition("</section>")[0]
    titles = re.findall(r"<(?:h2|strong|caption)>(.*?)</", section)
    assert len(titles) >= 3
    assert all("computed, not measured" in title.lower() for title in titles)
    grid = text.partition('id="winners">')[2].partition("</section>")[0]
    assert "W=2, K=8: all_gather + rank_dedup, measured." in grid
    assert "W=8, K=8: all_to_all + rank_dedup, computed." in grid


def test_two_gpus_have_their_caveat_wherever_they_were_measured(whole: Path) -> None:
    text = (whole / "page.html").read_text()
    for anchor in ("bandwidth", "breakdown", "memory", "sweep", "spread", "suites", "layers", "profiles", "winners"):
        section = text.partition(f'id="{anchor}">')[2].partition("</section>")[0]
        assert TWO_GPUS in section, anchor
        assert "NVIDIA H100 80GB HBM3, W=2, commit abc1234, 2026-11-25" in section, anchor


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
    assert {section.anchor for section in sections(loaded(tmp_path, **documents))} == expected


def test_hostile_strings_are_text(tmp_path: Path) -> None:
    shout = entry(HOSTILE, 10.0, how=HOSTILE, ceiling=HOSTILE, bar=HOSTILE, met=True)
    changes = {"gpu": HOSTILE, "command": HOSTILE, "note": HOSTILE + "\x00\ud800\u202e", "commit": HOSTILE}
    content = {
        "a": suite(shout, **changes),
        "b": suite(shout, **changes),
        "c": layer({"activation": HOSTILE}, **changes),
    }
    content["c"]["memory"][0]["what"] = HOSTILE
    content["c"]["breakdown"] = [{"pass": HOSTILE, "parts": {HOSTILE: 1.0, "rest": -2.0}}]
    documents = loaded(tmp_path, **content)
    output = tmp_path / "page.html"
    write_report(documents, output, tmp_path / "png")
    reader = read(output.read_text())
    assert "script" not in reader.tags
    assert reader.text.count(HOSTILE) > 20
    assert any(HOSTILE in alt for alt in reader.alts)
    assert not {"\x00", "\u202e"} & set(output.read_text())


def changed(content: Json, path: tuple[str | int, ...], value: Any) -> Json:
    """A copy with one field replaced; ``...`` takes it away."""
    found = copy.deepcopy(content)
    place: Any = found
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return found


@pytest.mark.parametrize(
    ("content", "path", "value", "message"),
    [
        (suite(entry("x", 10.0)), ("kind",), "sweet", "a.json: kind: got 'sweet', expected one of 'suite', 'profile'"),
        (layer(), ("kind",), ..., "a.json: kind: got nothing, expected this field"),
        (layer(), ("environment",), ..., "a.json: environment: got nothing, expected this field"),
        (layer(), ("environment", "gpus"), -1, "environment.gpus: got -1, expected a whole number of at least 0"),
        (layer(), ("environment", "torch"), None, "environment.torch: got None, expected a string"),
        (suite(entry("x", 10.0)), ("entries", 0, "median_us"), 0, r"entries\[0\].median_us: got 0, expected a number"),
        (suite(entry("x", 10.0)), ("entries", 0), 3, r"a.json: entries\[0\]: got 3, expected an object"),
        (suite(entry("x", 10.0)), ("entries", 0, "gb_per_s"), float("nan"), "got nan, expected a finite number"),
        (layer(), ("setup", "thiek"), [1, 2], r"setup.thiek: got \[1, 2\], expected a list of 5 whole numbers"),
        (layer(), ("setup", "add_bias"), 1, "setup.add_bias: got 1, expected true or false"),
        (layer(), ("config", "combine"), "all", "config.combine: got 'all', expected one of 'auto', 'all_to_all'"),
        (layer(), ("profile", "modes", 1, "mode"), "x", r"profile.modes\[1\].mode: got 'x', expected one of"),
        (sweep(point(8)), ("points", 0, "picked"), {}, r"points\[0\].picked.dispatch: got nothing, expected this"),
        (
            sweep(point(8)),
            ("points", 0, "routing"),
            "odd",
            r"points\[0\].routing: got 'odd', expected one of 'uniform'",
        ),
        (layer(), ("breakdown", 0, "parts", "plan"), "1", r"breakdown\[0\].parts.plan: got '1', expected a finite"),
    ],
)
def test_errors_name_file_field_got_and_expected(
    tmp_path: Path, content: Json, path: tuple[str | int, ...], value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, a=changed(content, path, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "a.json: got No such file or directory, expected a file that can be read"),
        ("{", "a.json: got what is no JSON .*line 1.*expected a JSON document"),
        ("[1]", "a.json: got a list, expected a JSON object"),
        ("[" * 100_000, "a.json: got what is no JSON"),
        (b"\xff", "a.json: got what is no JSON"),
    ],
)
def test_files_that_are_no_documents(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load([path])


def test_wrong_places_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (path,) = written(tmp_path, a=suite(entry("x", 10.0)))
    with pytest.raises(ValueError, match=r"a\.json: got this file twice"):
        command(str(path), str(path))
    with pytest.raises(ValueError, match="one of the results, expected the path of a page"):
        command(str(path), "-o", str(path))
    with pytest.raises(ValueError, match="got the folder"):
        command(str(path), "-o", str(tmp_path))
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path) -> None:
    (path,) = written(tmp_path, a=suite(entry("x", 10.0)))
    program = (
        "import argparse, sys; sys.modules['matplotlib'] = None\n"
        "from sonic_ep.cli.report import add_report\n"
        "parser = argparse.ArgumentParser(); add_report(parser); options = parser.parse_args()\n"
        "sys.exit(options.command(options))"
    )
    words = [sys.executable, "-c", program, str(path), "-o", str(tmp_path / "page.html")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "sonic-ep: the report draws with matplotlib: pip install 'sonic-ep[viz]'\n"
    assert not (tmp_path / "page.html").exists()


def test_the_older_suite_is_read_and_its_page_is_the_same_every_time(tmp_path: Path) -> None:
    content = suite(entry("x", 10.0))
    del content["kind"], content["environment"]["link"], content["environment"]["code"]
    documents = loaded(tmp_path, a=content)
    assert len(documents.suites) == 1
    assert page(documents, sections(documents)) == page(documents, sections(documents))


def test_spread_by_hand(tmp_path: Path) -> None:
    """100 to 104 us is 4 %, 200 to 210 us is 5 %, and 50 to 100 us is too short to count."""
    first = suite(entry("a", 200.0), entry("b", 50.0), entry("c", 104.0), entry("only here", 7.0))
    second = suite(entry("a", 210.0), entry("b", 100.0), entry("c", 100.5), entry("a", 300.0, how="graph"))
    documents = loaded(tmp_path, first=first, second=second)
    again = repeated(documents)
    assert [found.measured[0].what for found in again] == ["b, queued", "a, queued", "c, queued"]
    assert [found.difference_percent for found in again] == pytest.approx([100.0, 5.0, 3.4826], abs=1e-3)
    assert [found.differs for found in again] == [False, True, False]
    assert between_words(again) == ("3 medians are in more than one file. 5% or more apart: 1 of the 2 above 100 µs.")
    widths = within_runs(loaded(tmp_path, one=suite({**entry("a", 100.0), **times(100.0, wide=0.04)}, entry("b", 9.0))))
    assert widths[0].typical_percent == pytest.approx(2.5)
    assert widths[0].widest.times.spread_percent == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        (layer(), layer(scale=1.01), 4),
        (layer(), layer(config=settings(cpu_sync_on_runtime=True)), 0),
        (layer(), layer({"activation": "gelu"}), 0),
        (layer(), layer(gpu="NVIDIA H200"), 0),
        (document("profile", profile()), document("profile", profile()), 7 + 9),
        (document("profile", profile()), document("profile", profile(tokens=512)), 0),
        # A layer's profile may be the very same measurement, from the profiler's cache.
        (document("profile", profile()), layer(), 0),
    ],
)
def test_only_the_same_thing_is_compared(tmp_path: Path, first: Json, second: Json, common: int) -> None:
    assert len(repeated(loaded(tmp_path, first=first, second=second))) == common


def test_extrapolation_by_hand(tmp_path: Path) -> None:
    """K=1: a token leaves its rank with probability (W-1)/W; all_gather sends it to all W-1, and gathers 2 rows."""
    content = layer({"thiek": [2 * 1000, 500, 64, 8, 1]})
    content["rates_gb_per_s"] = {"copy_engine_in": 400, "copy_engine_out": 1, "read": 200, "write": 100, "memory": 2000}
    (found,) = extrapolations(loaded(tmp_path, a=content))
    assert [step.world_size for step in found.steps] == [2, 4, 8]
    assert found.left_out == (16,)
    step = found.steps[1]
    # 1000 tokens of 500 bf16 are 10^6 bytes: 5 us at 200 GB/s, 10 at 100, 2.5 at 400; 2*10^6 bytes of memory 1 us.
    assert step.dispatch_us[DispatchMode.ALL_TO_ALL] == pytest.approx(0.75 * 5)
    assert step.dispatch_us[DispatchMode.RANK_DEDUP] == pytest.approx(0.75 * 5 + 1)
    assert step.dispatch_us[DispatchMode.ALL_GATHER] == pytest.approx(3 * 2.5 + 1)
    assert step.combine_us[CombineMode.ALL_TO_ALL] == pytest.approx(0.75 * 10)
    assert step.combine_us[CombineMode.REDUCE_SCATTER] == pytest.approx(3 * 10)
    assert (step.forward_us, step.forward_and_backward_us) == pytest.approx((11.25, 22.5))


def test_winners_are_measured_at_the_sweeps_own_world_size_alone(tmp_path: Path) -> None:
    (grid,) = winner_grids(loaded(tmp_path, a=sweep(point(1024, fastest=0), point(4096, fastest=8))))
    measured = {(cell.world_size, cell.top_k): cell.measured for cell in grid.cells if cell.measured is not None}
    assert set(measured) == {(2, 8)}
    won = measured[2, 8]
    assert (won.shape.tokens, won.best.what) == (4096, "forward and backward")
    assert (won.best.pair.dispatch, won.best.pair.combine) == (DispatchMode.RANK_DEDUP, CombineMode.RANK_DEDUP)
    assert {cell.world_size for cell in grid.cells} == {2, 4, 8, 16}


def test_bandwidth_keeps_to_one_row_of_sizes(tmp_path: Path) -> None:
    points = [point(2048), point(512), point(512, top_k=2), point(1024, routing="one_rank")]
    (swept,) = loaded(tmp_path, a=sweep(*points)).sweeps
    row, fixed = longest_row([found for found in swept.points if found.routing == "uniform"])
    assert ([found.shape.tokens for found in row], fixed) == ([512, 2048], "H=4096, E=64, K=8, bfloat16")
    dispatch, combine = bandwidths(swept)
    assert [line.mode for line in dispatch.lines] == sorted(DISPATCH)
    assert {ceiling.name: ceiling.gb_per_s for ceiling in dispatch.ceilings} == {"copy_engine_in": 350.0, "read": 330.0}
    assert [ceiling.name for ceiling in combine.ceilings] == ["write"]


def test_layers_are_called_by_what_differs(tmp_path: Path) -> None:
    same = loaded(tmp_path, a=layer(), b=layer(), c=layer({"add_bias": True}))
    assert labels(same.layers) == (
        "all_to_all + rank_dedup, add_bias=False (a.json)",
        "all_to_all + rank_dedup, add_bias=False (b.json)",
        "all_to_all + rank_dedup, add_bias=True",
    )
