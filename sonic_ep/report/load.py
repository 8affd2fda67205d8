"""Reads the JSON documents of a report and checks them field by field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sonic_ep.fields import MOST, Fields
from sonic_ep.report import documents as d
from sonic_ep.report import measured, origin
from sonic_ep.report.cleaned import cleaned, printable
from sonic_ep.report.read_measured import (
    MOST_EXPERTS,
    ROUTINGS,
    read_pair,
    read_pairs,
    read_percent,
    read_profile,
    read_settings,
    read_shape,
    read_times,
)

KINDS = ("suite", "profile", "layer", "sweep")
# Records of what was checked, not of how long it took: a report of times has nothing to show of them.
KINDS_WITHOUT_TIMES = ("properties", "soak")


def load(paths: Sequence[Path]) -> d.Documents:
    """The documents in these files; those of kinds without times are passed over, by name.

    Raises ``ValueError`` with the file, the field, what was got and what was expected, for the first thing wrong, and
    if there is no document with times.
    """
    names = file_names(paths)
    found = {name: _read(path, name) for path, name in zip(paths, names, strict=True)}
    timed = {name: fields for name, fields in found.items() if fields.values.get("kind") not in KINDS_WITHOUT_TIMES}
    if not timed:
        raise ValueError(f"{', '.join(names)}: got no document with times, expected one of {', '.join(KINDS)}")
    return d.Documents(
        everything=tuple(map(_document, timed.values())), passed_over=tuple(name for name in names if name not in timed)
    )


def file_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """What the report calls its files: their last parts, as many as tell them apart.

    >>> file_names([Path("a/mine.json"), Path("b/mine.json"), Path("b/other.json")])
    ('a/mine.json', 'b/mine.json', 'other.json')
    """
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{path}: got this file twice, expected each file once")
    return tuple(printable(_shortest(path, paths)) for path in paths)


def _shortest(path: Path, paths: Sequence[Path]) -> str:
    for length in range(1, len(path.parts)):
        if sum(other.parts[-length:] == path.parts[-length:] for other in paths) == 1:
            return str(Path(*path.parts[-length:]))
    return str(path)


def _read(path: Path, name: str) -> Fields:
    try:
        found = cleaned(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path}: got {error.strerror or error}, expected a file that can be read") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got what is no JSON ({error}), expected a JSON document") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got a {type(found).__name__}, expected a JSON object with kind and environment")
    return Fields(file=name, path="", values=found, sparse=True)


def _document(fields: Fields) -> d.Document:
    # Suites of before there were other kinds do not name theirs.
    older_suite = "kind" not in fields.values and "entries" in fields.values
    kind = "suite" if older_suite else fields.word("kind", KINDS)
    source = origin.Source(
        file=fields.file,
        kind=kind,
        environment=_environment(fields.part("environment")),
        rates=_rates(fields.part("rates_gb_per_s")),
    )
    if kind == "suite":
        return d.Suite(source=source, entries=tuple(map(_entry, fields.parts("entries"))))
    if kind == "profile":
        return d.ProfileDocument(source=source, profile=read_profile(fields))
    if kind == "layer":
        return _layer(source, fields)
    return d.Sweep(source=source, points=tuple(map(_point, fields.parts("points"))))


def _environment(fields: Fields) -> origin.Environment:
    return origin.Environment(
        gpu=fields.text_or_none("gpu"),
        gpus=fields.count("gpus", least=0),
        link=fields.text_or_none("link"),
        torch=fields.text("torch"),
        triton=fields.text_or_none("triton"),
        cuda=fields.text_or_none("cuda"),
        nccl=fields.text_or_none("nccl"),
        driver=fields.text_or_none("driver"),
        code=fields.text_or_none("code") or "",
        world_size=fields.count("world_size"),
        process_group=fields.text_or_none("process_group"),
        commit=fields.text_or_none("commit"),
        command=fields.text("command"),
        date=fields.text("date"),
        note=fields.text_or_none("note"),
    )


def _rates(fields: Fields) -> origin.MeasuredRates:
    return origin.MeasuredRates(
        copy_engine_in=fields.positive_or_none("copy_engine_in"),
        copy_engine_out=fields.positive_or_none("copy_engine_out"),
        read=fields.positive_or_none("read"),
        write=fields.positive_or_none("write"),
        memory=fields.positive_or_none("memory"),
    )


def _entry(fields: Fields) -> d.Entry:
    return d.Entry(
        name=fields.text("name"),
        how=fields.text("how"),
        shape=read_shape(fields.part("shape")),
        times=read_times(fields),
        gb_per_s=fields.number_or_none("gb_per_s"),
        ceiling=fields.text_or_none("ceiling"),
        percent=read_percent(fields),
        floor_us=fields.number_or_none("floor_us"),
        tflop_per_s=fields.number_or_none("tflop_per_s"),
        bar=fields.text_or_none("bar"),
        bar_us=fields.number_or_none("bar_us"),
        met=fields.flag_or_none("met"),
        against=tuple(map(_against, fields.parts_or_none("against"))),
    )


def _against(fields: Fields) -> d.Against:
    return d.Against(what=fields.text("what"), ratio=fields.number("ratio"))


def _layer(source: origin.Source, fields: Fields) -> d.Layer:
    profile = fields.part_or_none("profile")
    return d.Layer(
        source=source,
        setup=_setup(fields.part("setup")),
        settings=read_settings(fields.part("config")),
        accuracy=tuple(map(_accuracy, fields.parts("accuracy"))),
        profile=None if profile is None else read_profile(profile),
        memory=tuple(map(_memory, fields.parts("memory"))),
        times=tuple(map(_pass_times, fields.parts("times"))),
        derived=tuple(map(_derived, fields.parts("derived"))),
        breakdown=tuple(map(_breakdown, fields.parts("breakdown"))),
    )


def _setup(fields: Fields) -> d.Setup:
    tokens, hidden, intermediate, num_experts, top_k = fields.counts("thiek", length=5, least=1)
    found = d.Setup(
        group_tokens=tokens,
        hidden=hidden,
        intermediate=intermediate,
        num_experts=num_experts,
        top_k=top_k,
        world_size=fields.count("world_size"),
        dtype=fields.word("dtype", tuple(measured.BYTES_OF)),
        activation=fields.text("activation"),
        gate_layout=fields.text_or_none("gate_layout"),
        score_order=fields.text("score_order"),
        add_bias=fields.flag("add_bias"),
        norm_topk_probs=fields.flag("norm_topk_probs"),
        routing=fields.text("routing"),
        backend=fields.text("backend"),
    )
    if found.rank_shape.rank_bytes > MOST or max(num_experts, top_k) > MOST_EXPERTS:
        sizes = f"T*H elements of at most {MOST} bytes, E and K of at most {MOST_EXPERTS}"
        raise fields.error("thiek", fields.value("thiek"), sizes)
    return found


def _accuracy(fields: Fields) -> d.Accuracy:
    found = d.Accuracy(
        name=fields.text("name"),
        error=fields.number("error"),
        bound=fields.number("bound"),
        worst_row=fields.number("worst_row"),
        worst_row_bound=fields.number("worst_row_bound"),
        ok=fields.flag("ok"),
    )
    if found.ok != found.within:
        right = str(found.within).lower()
        raise fields.error("ok", found.ok, f"{right}, as error and worst_row beside their bounds say")
    return found


def _memory(fields: Fields) -> d.MemoryUse:
    return d.MemoryUse(
        what=fields.text("what"),
        formula_bytes=fields.count_or_none("formula_bytes", least=0),
        measured_bytes=fields.count_or_none("measured_bytes", least=0),
    )


def _pass_times(fields: Fields) -> d.PassTimes:
    return d.PassTimes(
        pass_name=fields.text("pass"),
        what=fields.text("what"),
        times=read_times(fields),
        tflop_per_s=fields.number_or_none("tflop_per_s"),
        tflop_per_s_of_group=fields.number_or_none("tflop_per_s_of_group"),
    )


def _derived(fields: Fields) -> d.Derived:
    return d.Derived(
        pass_name=fields.text("pass"),
        # A difference of two medians, which may go either way.
        exposed_communication_us=fields.number_or_none("exposed_communication_us", least=-MOST),
        link_us=fields.number_or_none("link_us"),
        over_gemms=fields.number_or_none("over_gemms"),
        over_gemms_and_link=fields.number_or_none("over_gemms_and_link"),
        scaling_efficiency=fields.number_or_none("scaling_efficiency"),
        over_reference=fields.number_or_none("over_reference"),
    )


def _breakdown(fields: Fields) -> d.Breakdown:
    parts = fields.part("parts")
    return d.Breakdown(
        pass_name=fields.text("pass"),
        parts=tuple(d.Part(name=name, us=parts.number(name)) for name in parts.values),
    )


def _point(fields: Fields) -> d.SweepPoint:
    return d.SweepPoint(
        shape=read_shape(fields.part("shape")),
        routing=fields.word("routing", ROUTINGS),
        profile=read_profile(fields.part("profile")),
        pairs=read_pairs(fields, by_pass=True),
        picked=read_pair(fields.part("picked")),
        predicted=read_pair(fields.part("predicted")),
        over_best=_over_best(fields.part("over_best")),
        predicted_over_best=_over_best(fields.part("predicted_over_best")),
    )


def _over_best(fields: Fields) -> tuple[d.OverBest, ...]:
    return tuple(
        d.OverBest(pass_name=name, ratio=ratio)
        for name in fields.values
        if (ratio := fields.number_or_none(name)) is not None
    )
