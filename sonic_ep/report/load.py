"""Reads the JSON documents of a report and checks them field by field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sonic_ep.config import AUTO, CombineMode, DispatchMode, ModePair
from sonic_ep.report import documents as d
from sonic_ep.report import measured, origin
from sonic_ep.report.fields import Fields, printable

KINDS = ("suite", "profile", "layer", "sweep")
ROUTINGS = ("uniform", "skewed", "one_rank", "given")
IDS_TO_ROWS = "ids to combined rows"


def load(paths: Sequence[Path]) -> d.Documents:
    """The documents in these files.

    Raises ``ValueError`` with the file, the field, what was got and what was expected, for the first thing wrong.
    """
    names = file_names(paths)
    return d.Documents(everything=tuple(_read(path, name) for path, name in zip(paths, names, strict=True)))


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


def _read(path: Path, name: str) -> d.Document:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: got {error.strerror or error}, expected a file that can be read") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got what is no JSON ({error}), expected a JSON document") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got a {type(found).__name__}, expected a JSON object with kind and environment")
    return _document(Fields(file=name, path="", values=found))


def _document(fields: Fields) -> d.Document:
    # Suites of before there were other kinds do not name theirs.
    older_suite = "kind" not in fields.values and "entries" in fields.values
    kind = "suite" if older_suite else fields.choice("kind", KINDS)
    source = origin.Source(
        file=fields.file,
        kind=kind,
        environment=_environment(fields.inside("environment")),
        rates=_rates(fields.inside("rates_gb_per_s")),
    )
    if kind == "suite":
        return d.Suite(source=source, entries=tuple(map(_entry, fields.each("entries"))))
    if kind == "profile":
        return d.ProfileDocument(source=source, profile=_profile(fields))
    if kind == "layer":
        return _layer(source, fields)
    return d.Sweep(source=source, points=tuple(map(_point, fields.each("points"))))


def _environment(fields: Fields) -> origin.Environment:
    return origin.Environment(
        gpu=fields.maybe_text("gpu"),
        gpus=fields.count("gpus"),
        link=fields.maybe_text("link"),
        torch=fields.text("torch"),
        triton=fields.maybe_text("triton"),
        cuda=fields.maybe_text("cuda"),
        nccl=fields.maybe_text("nccl"),
        driver=fields.maybe_text("driver"),
        code=fields.maybe_text("code"),
        world_size=fields.count("world_size", least=1),
        process_group=fields.maybe_text("process_group"),
        commit=fields.maybe_text("commit"),
        command=fields.text("command"),
        date=fields.text("date"),
        note=fields.maybe_text("note"),
    )


def _rates(fields: Fields) -> origin.MeasuredRates:
    return origin.MeasuredRates(
        copy_engine_in=fields.maybe_positive("copy_engine_in"),
        copy_engine_out=fields.maybe_positive("copy_engine_out"),
        read=fields.maybe_positive("read"),
        write=fields.maybe_positive("write"),
        memory=fields.maybe_positive("memory"),
    )


def _times(fields: Fields) -> measured.Times:
    return measured.Times(
        rounds=fields.count("rounds", least=1),
        median_us=fields.positive("median_us"),
        p10_us=fields.positive("p10_us"),
        p90_us=fields.positive("p90_us"),
        min_us=fields.positive("min_us"),
        max_us=fields.positive("max_us"),
    )


def _shape(fields: Fields) -> measured.Shape:
    return measured.Shape(
        tokens=fields.count("T"),
        hidden=fields.count("H", least=1),
        intermediate=fields.maybe_count("I", least=1),
        num_experts=fields.count("E", least=1),
        top_k=fields.count("K", least=1),
        dtype=fields.choice("dtype", tuple(measured.BYTES_OF)),
    )


def _entry(fields: Fields) -> d.Entry:
    return d.Entry(
        name=fields.text("name"),
        how=fields.text("how"),
        shape=_shape(fields.inside("shape")),
        times=_times(fields),
        gb_per_s=fields.maybe_number("gb_per_s"),
        ceiling=fields.maybe_text("ceiling"),
        percent=fields.maybe_number("percent"),
        floor_us=fields.maybe_number("floor_us"),
        tflop_per_s=fields.maybe_number("tflop_per_s"),
        bar=fields.maybe_text("bar"),
        bar_us=fields.maybe_number("bar_us"),
        met=fields.maybe_flag("met"),
        against=tuple(map(_against, fields.maybe_each("against"))),
    )


def _against(fields: Fields) -> d.Against:
    return d.Against(what=fields.text("what"), ratio=fields.number("ratio"))


def _pair(fields: Fields) -> ModePair:
    return ModePair(dispatch=fields.member("dispatch", DispatchMode), combine=fields.member("combine", CombineMode))


def _settings(fields: Fields) -> measured.Settings:
    return measured.Settings(
        dispatch=fields.choice("dispatch", (AUTO, *(mode.value for mode in DispatchMode))),
        combine=fields.choice("combine", (AUTO, *(mode.value for mode in CombineMode))),
        redispatch_x_in_backward=fields.flag("redispatch_x_in_backward"),
        cpu_sync_on_runtime=fields.flag("cpu_sync_on_runtime"),
        max_rows=fields.maybe_count("max_rows", least=1),
    )


def _profile(fields: Fields) -> measured.Profile:
    shape = fields.inside("shape")
    return measured.Profile(
        shape=measured.ProfileShape(
            tokens=shape.counts("tokens"),
            hidden=shape.count("hidden", least=1),
            top_k=shape.count("top_k", least=1),
            num_experts=shape.count("num_experts", least=1),
            dtype=shape.choice("dtype", tuple(measured.BYTES_OF)),
            routing=shape.choice("routing", ROUTINGS),
        ),
        backend=fields.text("backend"),
        ranks_per_gpu=fields.maybe_count("ranks_per_gpu"),
        modes=tuple(map(_mode, fields.each("modes"))),
        pairs=tuple(
            measured.PairTimes(pair=_pair(pair), what=IDS_TO_ROWS, times=_times(pair)) for pair in fields.each("pairs")
        ),
        settings=_settings(fields.inside("config")),
    )


def _mode(fields: Fields) -> measured.ModeTimes:
    kind = fields.choice("kind", ("plan", "dispatch", "combine"))
    modes = {
        "plan": ("",),
        "dispatch": tuple(mode.value for mode in DispatchMode),
        "combine": tuple(mode.value for mode in CombineMode),
    }
    return measured.ModeTimes(
        kind=kind,
        mode=fields.choice("mode", modes[kind]),
        times=_times(fields),
        link_bytes=fields.number("link_bytes"),
        gb_per_s=fields.maybe_number("gb_per_s"),
        ceiling=fields.maybe_text("ceiling"),
        percent=fields.maybe_number("percent"),
    )


def _layer(source: origin.Source, fields: Fields) -> d.Layer:
    profile = fields.maybe_inside("profile")
    return d.Layer(
        source=source,
        setup=_setup(fields.inside("setup")),
        settings=_settings(fields.inside("config")),
        accuracy=tuple(map(_accuracy, fields.each("accuracy"))),
        profile=None if profile is None else _profile(profile),
        memory=tuple(map(_memory, fields.each("memory"))),
        times=tuple(map(_pass_times, fields.each("times"))),
        derived=tuple(map(_derived, fields.each("derived"))),
        breakdown=tuple(map(_breakdown, fields.each("breakdown"))),
    )


def _setup(fields: Fields) -> d.Setup:
    tokens, hidden, intermediate, num_experts, top_k = fields.counts("thiek", length=5, least=1)
    return d.Setup(
        group_tokens=tokens,
        hidden=hidden,
        intermediate=intermediate,
        num_experts=num_experts,
        top_k=top_k,
        world_size=fields.count("world_size", least=1),
        dtype=fields.choice("dtype", tuple(measured.BYTES_OF)),
        activation=fields.text("activation"),
        gate_layout=fields.maybe_text("gate_layout"),
        score_order=fields.text("score_order"),
        add_bias=fields.flag("add_bias"),
        norm_topk_probs=fields.flag("norm_topk_probs"),
        routing=fields.text("routing"),
        backend=fields.text("backend"),
    )


def _accuracy(fields: Fields) -> d.Accuracy:
    return d.Accuracy(
        name=fields.text("name"),
        error=fields.number("error"),
        bound=fields.number("bound"),
        worst_row=fields.number("worst_row"),
        worst_row_bound=fields.number("worst_row_bound"),
        ok=fields.flag("ok"),
    )


def _memory(fields: Fields) -> d.MemoryUse:
    return d.MemoryUse(
        what=fields.text("what"),
        formula_bytes=fields.maybe_count("formula_bytes"),
        measured_bytes=fields.maybe_count("measured_bytes"),
    )


def _pass_times(fields: Fields) -> d.PassTimes:
    return d.PassTimes(
        pass_name=fields.text("pass"),
        what=fields.text("what"),
        times=_times(fields),
        tflop_per_s=fields.maybe_number("tflop_per_s"),
        tflop_per_s_of_group=fields.maybe_number("tflop_per_s_of_group"),
    )


def _derived(fields: Fields) -> d.Derived:
    return d.Derived(
        pass_name=fields.text("pass"),
        exposed_communication_us=fields.maybe_number("exposed_communication_us"),
        link_us=fields.maybe_number("link_us"),
        over_gemms=fields.maybe_number("over_gemms"),
        over_gemms_and_link=fields.maybe_number("over_gemms_and_link"),
        scaling_efficiency=fields.maybe_number("scaling_efficiency"),
        over_reference=fields.maybe_number("over_reference"),
    )


def _breakdown(fields: Fields) -> d.Breakdown:
    parts = fields.inside("parts")
    return d.Breakdown(
        pass_name=fields.text("pass"),
        parts=tuple(d.Part(name=printable(name), us=parts.number(name)) for name in parts.values),
    )


def _point(fields: Fields) -> d.SweepPoint:
    return d.SweepPoint(
        shape=_shape(fields.inside("shape")),
        routing=fields.choice("routing", ROUTINGS),
        profile=_profile(fields.inside("profile")),
        pairs=tuple(
            measured.PairTimes(pair=_pair(pair), what=pair.text("pass"), times=_times(pair))
            for pair in fields.each("pairs")
        ),
        picked=_pair(fields.inside("picked")),
        predicted=_pair(fields.inside("predicted")),
        over_best=_over_best(fields.inside("over_best")),
        predicted_over_best=_over_best(fields.inside("predicted_over_best")),
    )


def _over_best(fields: Fields) -> tuple[d.OverBest, ...]:
    return tuple(
        d.OverBest(pass_name=printable(name), ratio=ratio)
        for name in fields.values
        if (ratio := fields.maybe_number(name)) is not None
    )
