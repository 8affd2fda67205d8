"""What a profile is asked for: wrong arguments and ranks that disagree, told on every rank."""

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from on_ranks import on_ranks
from profiles import SIZES, Asked, profile, said_by_all

import sonic_ep.profiler.request as request
from sonic_ep import ClosedError, EPConfig, ExpertParallel, NetworkProfiler
from sonic_ep.cost import LinkBandwidth
from sonic_ep.profiler.agreement import gathered
from sonic_ep.testing import Rank

CPU = torch.device("cpu")
RATES = LinkBandwidth(copy_engine_in=1e12, copy_engine_out=1e12, read=1e12, write=1e12)
# Changes of single ranks of three, and what all of them say.
DISAGREEMENTS: list[tuple[dict[int, Any], str]] = [
    ({1: {"hidden": 17}}, "hidden: got 17 on rank 1, expected 16 as on the other ranks"),
    ({0: {"top_k": 1}}, "top_k: got 1 on rank 0, expected 2 as on the other ranks"),
    ({2: {"num_experts": 3}, 1: {"num_experts": 12}}, "num_experts: got 12 on rank 1, 3 on rank 2, expected 6"),
    ({2: {"dtype": torch.float16}}, "dtype: got 'float16' on rank 2, expected 'bfloat16'"),
    ({2: {"routing": "skewed"}}, "routing: got 'skewed' on rank 2, expected 'uniform'"),
    ({1: {"rounds": 7}}, "rounds: got 7 on rank 1, expected 1"),
    ({1: {"config": EPConfig(combine="rank_dedup")}}, "combine of the config: got 'rank_dedup' on rank 1"),
    ({0: {"rates": RATES}}, "rates: got {'copy_engine_in': 1000000000000.0"),
    # Wrong on one rank alone: the others do not wait for it.
    ({1: {"routing": torch.full((3, 2), 6)}}, "rank 1 of 3: expert ids of routing: got 6 to 6, expected 0 to 5"),
    ({0: {"tokens": -1}}, "rank 0 of 3: tokens: got -1, expected a whole number of at least 0"),
    ({1: {"routing": torch.empty((3, 2), dtype=torch.int64, device="meta")}}, "device of routing: got meta"),
    ({1: {"num_experts": 7}}, "rank 1 of 3: number of experts E: got 7, expected a multiple of the"),
    # Too many choices for one rank.
    ({rank: {"routing": "one_rank", "top_k": 3} for rank in range(3)}, "'one_rank': got 3, expected at most E/W=2"),
]


@on_ranks(3, pool="cpu_pool")
def test_ranks_that_ask_for_different_things(rank: Rank) -> None:
    for changed, message in DISAGREEMENTS:
        assert message in said_by_all(rank, Asked(changed=changed), ValueError)


@on_ranks(2, pool="cpu_pool")
def test_ranks_that_are_different(rank: Rank) -> None:
    another = property(lambda ep: "another", lambda ep, name: None)
    for owner, name, value, error, message in (
        (ExpertParallel, "backend", another, ValueError, "backend: got 'another' on rank 1, expected 'reference'"),
        (request, "_checked_device", lambda *_: torch.device("meta"), ValueError, "kind of device: got 'meta' on rank"),
        # As if the last rank had no memory left.
        (torch, "Generator", Mock(side_effect=MemoryError("no memory")), RuntimeError, "rank 1 of 2: no memory"),
    ):
        with pytest.MonkeyPatch.context() as patched:
            if rank.rank:
                patched.setattr(owner, name, value, raising=False)
            assert message in said_by_all(rank, Asked(), error)


@pytest.mark.parametrize("closing", [-1, 1])
@on_ranks(2, pool="cpu_pool")
def test_a_closed_one_is_told_on_every_rank(rank: Rank, closing: int) -> None:
    ep = ExpertParallel(backend="reference")
    if closing in (-1, rank.rank):
        ep.close()
    with pytest.raises(ClosedError, match="rank 1 of 2: this ExpertParallel is closed") as raised:
        NetworkProfiler(ep, cache=None).profile(tokens=3, device=CPU, **SIZES)
    assert len(set(gathered(ep.group, str(raised.value)))) == 1


def test_wrong_arguments() -> None:
    for arguments, message in (
        ({"tokens": 2.0}, "tokens: got 2.0, expected a whole number of at least 0"),
        ({"tokens": 0}, "tokens: got none on any rank, expected at least one in the group"),
        ({"hidden": 0}, "hidden: got 0, expected a whole number of at least 1"),
        ({"top_k": True}, "top_k: got True"),
        ({"top_k": 7}, "top_k: got 7, expected at most E=6"),
        ({"num_experts": None}, "num_experts: got None"),
        ({"dtype": torch.float64}, "dtype: got torch.float64, expected torch.bfloat16 or torch.float16 or"),
        ({"dtype": "bfloat16"}, "dtype: got 'bfloat16'"),
        ({"routing": "even"}, "routing: got 'even', expected 'uniform', 'skewed', 'one_rank' or a tensor"),
        ({"routing": None}, "routing: got None"),
        ({"routing": torch.zeros(5, 3).int()}, r"shape of routing: got \(5, 3\), expected \(5, 2\) = \(T, K\)"),
        ({"routing": torch.zeros(5, 2)}, "dtype of routing: got torch.float32"),
        ({"routing": torch.zeros(5, 2).int().to_sparse()}, "layout of routing: got torch.sparse_coo"),
        ({"routing": torch.zeros(5, 2, device="meta").int()}, "device of routing: got meta, expected a device that"),
        ({"routing": torch.full((5, 2), -2)}, "expert ids of routing: got -2 to -2, expected 0 to 5, or -1"),
        ({"device": "cpu"}, "device: got 'cpu', expected a torch.device, or None"),
        ({"device": torch.device("meta")}, "device: got meta, expected one that the group moves: cpu, cuda"),
        ({"rounds": 0}, "rank 0 of 1: rounds: got 0, expected a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            profile(Asked(arguments=arguments))


def test_wrong_profilers() -> None:
    with pytest.raises(TypeError, match="ep: got str, expected an ExpertParallel"):
        NetworkProfiler("ep")  # type: ignore[arg-type]
    with ExpertParallel(backend="reference") as ep:
        with pytest.raises(ValueError, match="rank 0 of 1: cache: got 3, expected a Path, or None for no cache"):
            NetworkProfiler(ep, cache=3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="rank 0 of 1: rates: got dict, expected LinkBandwidth or None"):
            NetworkProfiler(ep, rates={})  # type: ignore[arg-type]
        for rate in (0.0, -1.0, float("inf"), float("nan"), 10**400, "1", None, True):
            with pytest.raises(ValueError, match=r"rank 0 of 1: read of rates: got .*, expected a finite rate above 0"):
                NetworkProfiler(ep, rates=replace(RATES, read=rate))
        NetworkProfiler(ep, rates=RATES)
