"""Small documents by the schemas of the report. Numbers follow a plain rule, so that tests can count on them."""

import copy
import json
from functools import reduce
from itertools import product
from operator import getitem
from pathlib import Path
from typing import Any

from report_page.load import load
from report_page.page import render

from sonic_ep.config import CombineMode, DispatchMode

DISPATCH = tuple(mode.value for mode in DispatchMode)
COMBINE = tuple(mode.value for mode in CombineMode)
Json = dict[str, Any]
RATES = {"copy_engine_in": 350.0, "copy_engine_out": 375.0, "read": 330.0, "write": 360.0, "memory": 3000.0}


def times(median: float, wide: float = 0.01) -> Json:
    """p10 to p90 is ``wide`` times the median."""
    low, high = median * (1 - wide / 2), median * (1 + wide / 2)
    inner, outer = {"p10_us": low, "p90_us": high}, {"min_us": low * 0.99, "max_us": high * 1.01}
    return {"rounds": 20, "median_us": median, **inner, **outer}


def document(kind: str, content: Json, **changes: Any) -> Json:
    """changes: of the environment."""
    environment = {
        "gpu": "NVIDIA H100 80GB HBM3", "gpus": 2, "link": "NVLink, 18 links (NV18)", "torch": "2.11.0+cu130",
        "triton": "3.6.0", "cuda": "13.0", "nccl": "2.28.9", "driver": "580.159.04", "code": "0123456789ab",
        "world_size": 2, "process_group": "nccl", "commit": "abc1234", "command": "torchrun -m sonic_ep bench",
        "date": "2026-11-25T09:15:40+00:00", "note": None, **changes,
    }  # fmt: skip
    return {"kind": kind, "environment": environment, "rates_gb_per_s": RATES, **content}


def entry(name: str, median: float, how: str = "queued", wide: float = 0.01, **more: Any) -> Json:
    shape = {"T": 4096, "H": 4096, "I": 1536, "E": 64, "K": 8, "dtype": "bfloat16"}
    return {"name": name, "how": how, "shape": shape, **times(median, wide), **more}


def suite(*entries: Json, **changes: Any) -> Json:
    return document("suite", {"entries": list(entries)}, **changes)


def settings(**flags: Any) -> Json:
    modes = {"dispatch": "all_to_all", "combine": "rank_dedup", "max_rows": None}
    return {**modes, "redispatch_x_in_backward": False, "cpu_sync_on_runtime": False, **flags}


def profile(tokens: int = 4096, top_k: int = 8, routing: str = "uniform", backend: str = "fast") -> Json:
    """Every mode at 80 % of its ceiling for its bytes, all_to_all's combine with K/2 times as many."""
    row = tokens * 4096 * 2.0
    modes = [{"kind": "plan", "mode": "", **times(42), "link_bytes": 0.0, "gb_per_s": None, "percent": None}]
    for kind, mode in [*product(["dispatch"], DISPATCH), *product(["combine"], COMBINE)]:
        way = "write" if kind == "combine" else "copy_engine_in" if mode == "all_gather" else "read"
        moved = row * (top_k / 2 if (kind, mode) == ("combine", "all_to_all") else 1)
        rate = 0.8 * RATES[way] * row / (row + 2e6)
        link = {"link_bytes": moved, "gb_per_s": rate, "ceiling": way, "percent": 100 * rate / RATES[way]}
        modes.append({"kind": kind, "mode": mode, **times(moved / rate / 1e3), **link})
    pairs = [
        {"dispatch": dispatch, "combine": combine, **times(1000.0 + 100 * number)}
        for number, (dispatch, combine) in enumerate(product(DISPATCH, COMBINE))
    ]
    shape = {"tokens": [tokens, tokens], "hidden": 4096, "top_k": top_k, "num_experts": 64, "dtype": "bfloat16"}
    found = {"shape": {**shape, "routing": routing}, "backend": backend, "ranks_per_gpu": 1}
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
            {"name": name, "error": 5e-3 if name == "dw2" else 2e-3, "bound": 4e-3, "worst_row": 3e-3,
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


def point(tokens: int, top_k: int = 8, routing: str = "uniform", fastest: int = 2, backend: str = "fast") -> Json:
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
        "routing": routing, "profile": profile(tokens, top_k=top_k, routing=routing, backend=backend), "pairs": pairs,
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


def loaded(folder: Path, **documents: Json) -> list[Any]:
    return load(written(folder, **documents))[0]


def shown(documents: list[Any]) -> str:
    """The page without drawings."""
    return render(documents, lambda *_, **__: "")


def every_kind(folder: Path) -> list[Path]:
    """The files of two layers, and of one document of each other kind."""
    reached = {"ceiling": "the read ceiling", "percent": 74.6, "gb_per_s": 248.0, "floor_us": 449.0}
    missed = {"bar": "at most 1.2 of the GEMMs", "bar_us": 8400.0, "met": False}
    slow, fast = entry("layer", 8680.0, tflop_per_s=570.0, **missed), entry("dispatch", 540.0, **reached)
    points = point(1024), point(4096), point(4096, top_k=2, fastest=5), point(1024, routing="skewed")
    again = layer(config=settings(redispatch_x_in_backward=True), scale=1.05)
    more = {"suite": suite(fast, slow), "profile": document("profile", profile()), "sweep": sweep(*points)}
    return written(folder, layer=layer(), redispatch=again, **more)


def changed(content: Json, path: tuple[str | int, ...], value: Any) -> Json:
    """A copy with one field replaced; ``...`` takes it away."""
    found = copy.deepcopy(content)
    place = reduce(getitem, path[:-1], found)
    place[path[-1]] = value
    if value is ...:
        del place[path[-1]]
    return found
