"""The profiler: right before it is timed, agreed by all ranks, never faster than the link, and picked jointly."""

import gc
import json
import weakref
from dataclasses import replace
from itertools import count
from math import inf
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from backends import both_backends
from on_ranks import on_ranks
from profiles import SIZES, Asked, profile, profile_of_all, said_by_all

import sonic_ep.profiler.profiler as profiler_module
from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel, ProfileReport
from sonic_ep.cost import LinkBandwidth
from sonic_ep.profiler import WrongResultError, default_device
from sonic_ep.profiler.measuring import Stage
from sonic_ep.profiler.problem import RoutingProblem, Shape
from sonic_ep.profiler.profiler import FEWEST_ROUNDS, MOST_ROUNDS
from sonic_ep.profiler.report import EVERY_MODE, EVERY_PAIR
from sonic_ep.profiler.timing import AboveCeilingError, RoundTimer, Timing
from sonic_ep.testing import Rank
from sonic_ep.testing.oracle import ALONE

CPU = torch.device("cpu")
# Of three ranks: dropped slots, a token without any, an expert twice, and a rank without tokens.
GIVEN = {
    0: {"tokens": 3, "routing": torch.tensor([[0, 5], [-1, 2], [3, 3]])},
    1: {"tokens": 0, "routing": torch.empty((0, 2), dtype=torch.int32)},
    2: {"tokens": 2, "routing": torch.tensor([[-1, -1], [1, 0]], dtype=torch.int32)},
}


def check_report(report: ProfileReport, asked: Asked, world_size: int) -> None:
    """What holds of every profile."""
    assert [(mode.kind, mode.mode) for mode in report.modes] == EVERY_MODE
    assert [(pair.dispatch, pair.combine) for pair in report.pairs] == EVERY_PAIR
    assert report.shape.world_size == world_size
    assert report.backend == asked.backend
    assert not report.from_cache
    spreads = [timed.spread for timed in (*report.modes, *report.pairs)]
    assert all(0 < s.min_us <= s.p10_us <= s.median_us <= s.p90_us <= s.max_us for s in spreads)
    assert all(s.rounds == asked.rounds for s in spreads)
    medians = {(pair.dispatch, pair.combine): pair.spread.median_us for pair in report.pairs}
    assert medians[report.picked.dispatch, report.picked.combine] <= 1.01 * min(medians.values())
    for mode in report.modes:
        assert mode.gb_per_s == pytest.approx(mode.link_bytes / mode.spread.median_us / 1e3, rel=1e-3)
        assert (mode.percent is None) == (mode.ceiling is None)
        assert (mode.ceiling is None) == (report.rates is None or mode.kind == "plan")
        if mode.ceiling is not None:
            ceiling = getattr(report.rates, mode.ceiling) / 1e9
            assert mode.percent == pytest.approx(100 * mode.gb_per_s / ceiling, rel=1e-3)
    assert ProfileReport.from_json(json.loads(json.dumps(report.as_json()))) == report
    assert ExpertParallel(backend="reference", config=report.config).config == report.config


@on_ranks(1, 2, 3)
def test_every_mode_and_pair_is_timed(rank: Rank) -> None:
    asked = Asked(tokens=(5, 0, 3), rounds=2)
    report = profile_of_all(rank, asked)
    check_report(report, asked, rank.world_size)
    assert report.shape.tokens == (5, 0, 3)[: rank.world_size]
    assert report.shape.routing == "uniform"


@both_backends
@on_ranks(2)
def test_a_profile_of_either_backend_and_its_config(rank: Rank, backend: str) -> None:
    config, hidden = EPConfig(cpu_sync_on_runtime=True, max_rows=1), SIZES["hidden"]
    asked = Asked(backend=backend, changed={0: GIVEN[0], 1: GIVEN[1]}, config=config)
    report = profile_of_all(rank, asked)
    check_report(report, asked, 2)
    assert report.config == replace(config, dispatch=report.config.dispatch, combine=report.config.combine)
    found = {(mode.kind, mode.mode): mode.link_bytes for mode in report.modes}
    # On another rank are expert 5 of token 0 and twice expert 3 of token 2; the fast backend reads a token once.
    assert found["dispatch", "all_gather"] == 3 * 2 * hidden
    # Rank 0 gets nothing: all come to rank 1.
    assert found["dispatch", "rank_dedup"] == 2 * 2 * hidden
    assert found["dispatch", "all_to_all"] == (2 if backend == "fast" else 3) * 2 * hidden
    x_TH = torch.randn((2, hidden), device=rank.device)
    ids_TK = torch.tensor([[0, 3], [1, 2]], device=rank.device)
    with ExpertParallel(backend=backend, config=replace(report.config, max_rows=None)) as ep:
        plan = ep.plan(ids_TK, SIZES["num_experts"])
        y_TH = ep.combine(ep.dispatch(x_TH, plan), torch.full((2, 2), 0.5, device=rank.device), plan)
        here = "cuda" if torch.cuda.is_available() else "cpu"
        assert default_device(ep).type == (rank.device.type if backend == "fast" else here)
    assert torch.equal(y_TH, x_TH)


@on_ranks(3, pool="cpu_pool")
def test_link_bytes_by_hand(rank: Rank) -> None:
    report = profile_of_all(rank, Asked(changed=GIVEN))
    assert report.shape.routing == "given"
    # Two experts a rank. On other ranks: 5 and 2 of rank 0's first two tokens, 3 twice of its third; 1 and 0 of rank 2.
    row, ids = 2 * SIZES["hidden"], 4 * 2 * 3 * 2
    blocks = 2 * 3 * row
    # Busiest: rank 1 with 2, 3 and 3 again from rank 0; all of rank 0's return. Scores are as many bytes as ids.
    dispatched, combined = [blocks, 3 * row, 2 * row], [4 * row, blocks, 3 * row]
    assert [mode.link_bytes for mode in report.modes] == [ids, *dispatched, *(b + ids for b in combined)]
    arguments = {"routing": "skewed", "dtype": torch.float32}
    report = profile_of_all(rank, Asked(arguments=arguments, tokens=(9,)))
    assert (report.shape.routing, report.shape.dtype) == ("skewed", "float32")
    report = profile_of_all(rank, Asked(arguments={**arguments, "routing": "one_rank"}, tokens=(9,)))
    # Two ranks send two slots of each token to the third, and it sends none.
    by_slots = next(mode for mode in report.modes if (mode.kind, mode.mode) == ("dispatch", "all_to_all"))
    assert by_slots.link_bytes == 2 * 9 * 2 * 4 * SIZES["hidden"]
    assert by_slots.gb_per_s == pytest.approx(by_slots.link_bytes / by_slots.spread.median_us / 1e3, rel=1e-3, abs=1e-6)


@on_ranks(2, pool="cpu_pool")
def test_modes_that_the_config_fixes_stay_and_rounds_adapt(rank: Rank) -> None:
    fixed = EPConfig(dispatch="rank_dedup", redispatch_x_in_backward=True, max_rows=1)
    report = profile_of_all(rank, Asked(config=fixed, rounds=None))
    assert len(report.pairs) == 9
    assert report.config == replace(fixed, combine=report.config.combine)
    assert isinstance(report.config.combine, CombineMode)
    (rounds,) = {timed.spread.rounds for timed in (*report.modes, *report.pairs)}
    assert FEWEST_ROUNDS <= rounds <= MOST_ROUNDS


def wrong_in_calls(patched: pytest.MonkeyPatch, name: str, begin: int, end: float) -> None:
    """One bit or count is wrong in what calls ``begin`` to ``end`` of a method return."""
    honest, calls = getattr(ExpertParallel, name), count()

    def call(self: ExpertParallel, *arguments: Any) -> Any:
        result = honest(self, *arguments)
        # The right answers come from lanes with exact sizes.
        if not self.config.cpu_sync_on_runtime and begin <= next(calls) < end:
            if name == "plan":
                result.counts[0] += 1
            else:
                result.view(torch.int16)[0, 0] ^= 1
        return result

    patched.setattr(ExpertParallel, name, call)


@on_ranks(2)
def test_a_wrong_result_is_refused_on_every_rank(rank: Rank) -> None:
    # Distinct experts on few tokens: every rank receives rows.
    asked = Asked(changed={0: GIVEN[0], 1: {**GIVEN[0], "routing": torch.tensor([[5, 4], [0, 3], [2, 1]])}})
    for name, begin, end, message in (
        # Every mode and pair runs twice before anything is timed: modes first, in order.
        ("dispatch", 4, 6, "dispatch by rank_dedup: rows: 1 of "),
        ("combine", 4, 6, "combine by rank_dedup: sums: 1 of "),
        ("plan", 0, inf, "plan: counts: 1 of "),
        ("dispatch", 2 * (3 + 9), inf, "dispatch by all_gather: rows: 1 of "),
        # At first: then nothing may be timed.
        ("dispatch", 0, 2, "dispatch by all_gather: rows: 1 of "),
    ):
        with pytest.MonkeyPatch.context() as patched:
            if rank.rank:
                wrong_in_calls(patched, name, begin, end)
            if begin == 0:
                timed = Mock(side_effect=NotImplementedError("timed, although a result is wrong"))
                patched.setattr(Stage, "time", timed)
            assert said_by_all(rank, asked, WrongResultError).startswith(f"rank 1 of 2: {message}")


def test_a_stale_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, results = ExpertParallel.dispatch, {}

    def stale(self: ExpertParallel, *arguments: Any) -> Any:
        if self.config.cpu_sync_on_runtime:
            return honest(self, *arguments)
        return results.setdefault(self, honest(self, *arguments))

    monkeypatch.setattr(ExpertParallel, "dispatch", stale)
    with pytest.raises(WrongResultError, match=r"rank 0 of 1: dispatch by all_gather: rows: "):
        profile(Asked(tokens=(1,)))


@on_ranks(2, pool="cpu_pool")
def test_rates_and_ceilings(rank: Rank, tmp_path: Path) -> None:
    def as_if(rate: float) -> None:
        """There were a link of ``rate`` bytes/s."""
        bandwidth = LinkBandwidth(copy_engine_in=rate, copy_engine_out=rate, read=2 * rate, write=4 * rate)
        patched.setattr(profiler_module, "measured_bandwidth", lambda *arguments, **options: bandwidth)

    with pytest.MonkeyPatch.context() as patched:
        as_if(1e9)
        report = profile_of_all(rank, Asked())
        check_report(report, Asked(), 2)
        ceilings = [mode.ceiling for mode in report.modes]
        assert ceilings == [None, "copy_engine_in", "read", "read", "write", "write", "write"]
        assert report.rates == LinkBandwidth(copy_engine_in=1e9, copy_engine_out=1e9, read=2e9, write=4e9)
        assert "ceilings of the link in GB/s: copy engine 1.0, reads 2.0, writes 4.0" in str(report)
        as_if(1.0)
        said = said_by_all(rank, Asked(cache=tmp_path), AboveCeilingError)
        assert said.startswith("rank 0 of 2: dispatch all_gather: got ")
        assert "(the copy_engine_in ceiling)" in said
        assert list(tmp_path.iterdir()) == []
        # What is given is not measured.
        rates = LinkBandwidth(copy_engine_in=1e15, copy_engine_out=1e15, read=1e15, write=1e15)
        report = profile_of_all(rank, Asked(rates=rates))
        assert report.rates == rates
        # However small a share is, it is told.
        assert all(mode.percent > 0 for mode in report.modes[1:])
        said = said_by_all(rank, Asked(rates=replace(rates, read=1.0)), AboveCeilingError)
        assert said.startswith("rank 0 of 2: dispatch all_to_all: got ")


@on_ranks(3, pool="cpu_pool")
def test_rank_0_decides_and_its_errors_reach_all(rank: Rank) -> None:
    honest, fastest = RoundTimer.time, (rank.rank, len(EVERY_MODE) + 2 * rank.rank)

    def own(timer: RoundTimer, functions: Any, **options: Any) -> list[Timing]:
        """As if each rank had measured something else: on rank r, pair 2r is the fastest, and mode r."""
        timings = honest(timer, functions, **options)
        seconds = [1e-3 if place in fastest else 2e-3 for place in range(len(timings))]
        return [Timing(rounds=(taken,) * len(timing.rounds)) for taken, timing in zip(seconds, timings, strict=True)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RoundTimer, "time", own)
        report = profile_of_all(rank, Asked())
        assert (report.config.dispatch, report.config.combine) == EVERY_PAIR[0]
        error = RuntimeError("judged on another rank" if rank.rank else "no judgement")
        patched.setattr(profiler_module, "mode_times", Mock(side_effect=error))
        assert said_by_all(rank, Asked(), RuntimeError) == "rank 0 of 3: no judgement"


def test_inputs() -> None:
    """Rows after the valid ones are NaN, and changed inputs differ until they are restored exactly."""
    shape = Shape(tokens=3, hidden=16, top_k=2, num_experts=6)
    given = GIVEN[0]["routing"].clone()
    inputs = RoutingProblem(shape=shape, group=ALONE, device=CPU, routing=given)
    inputs.draw()
    # A slot is dropped, so there is a place more than the five rows.
    assert inputs.rows_RH.isnan().sum(dim=1).tolist() == [0] * 5 + [16]
    held = [inputs.topk_idx_TK, inputs.x_TH, inputs.rows_RH.view(torch.int16)]
    before = [tensor.clone() for tensor in held]
    with inputs.changed():
        assert inputs.topk_idx_TK.tolist() == [[1, 0], [-1, 3], [4, 4]]
        assert torch.equal(inputs.x_TH, -before[1])
        assert (held[2] != before[2]).all()
        assert torch.equal(given, GIVEN[0]["routing"]), "the caller's ids are not written"
    assert all(map(torch.equal, held, before))


def test_what_a_problem_holds_is_freed_with_it() -> None:
    """At once: a profile comes before training, which needs the memory."""
    problem = RoutingProblem(shape=Shape(tokens=3, hidden=16, top_k=2, num_experts=6), group=ALONE, device=CPU)
    used = [problem.rows_RH, problem.received[DispatchMode.ALL_TO_ALL]]
    used += [problem.sums[CombineMode.RANK_DEDUP, True], problem.round_trips[CombineMode.ALL_TO_ALL]]
    held = [weakref.ref(tensor) for tensor in used]
    gc.disable()
    del problem, used
    gc.enable()
    assert [tensor() for tensor in held] == [None] * len(held)
