"""One rank fails, before a call or in it, skips it or makes another: every other ends in time, and names it."""

import gc
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from backends import BACKENDS, both_backends
from calls import HIDDEN, call_of, good_call, with_trained_experts
from conftest import DEVICE_TYPES
from limits import HANG_SECONDS
from lives import TOP_K, layer_of
from new_group import own_process_group, without_haste
from on_ranks import on_ranks
from programs import exits, run_program
from promises import promise

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.distributed import rank_status
from sonic_ep.testing import Rank

ODD, FAULTY_STEP = 1, 2
# Longer than a busy machine needs for a step.
TIMEOUT_SECONDS = 8.0
BEFORE = {
    "killed": partial(signal.raise_signal, signal.SIGKILL),
    "raises": Mock(side_effect=KeyError("the batch has no labels")),
    "hangs": partial(time.sleep, 2 * HANG_SECONDS),
}


def train(rank: Rank, fault: str, backend: str) -> None:
    """Three steps of two layers of unlike shape; the odd rank does what ``fault`` says in the second step."""
    wide, narrow = (layer_of(rank, hidden=hidden, tokens=5) for hidden in (64, 32))
    faulty = rank.rank == ODD
    if fault in LEFT:
        # The store of a busy machine may be slow to tell why.
        rank_status.ANSWER_SECONDS = HANG_SECONDS
    with ExpertParallel(backend=backend) as ep:
        # Kernels are compiled, and ranks that started apart are together, before time counts.
        sum(ep.moe(*layer, TOP_K).y.sum() for layer in (wide, narrow)).backward()
    config = EPConfig(dispatch="rank_dedup" if faulty and fault == "another config" else "all_to_all")
    timeout = HANG_SECONDS if fault in {*LEFT, *AT_ONCE} else TIMEOUT_SECONDS
    # A C of its own, or ranks would agree on more.
    most = 5 if fault == "too many tokens" else None
    with ExpertParallel(backend=backend, config=config, timeout=timeout, max_tokens_per_rank=most) as ep:
        without_haste(ep._collectives)
        for number in (1, 2, 3):
            now = fault if faulty and number == FAULTY_STEP else None
            BEFORE.get(now, lambda: None)()
            layers = {
                "another order": [narrow, wide],
                "another shape": [wide, wide],
                "too many tokens": [layer_of(rank, hidden=64, tokens=6)],
            }.get(now, [wide, narrow])
            losses = [ep.moe(*layer, TOP_K).y.square().sum() for layer in layers]
            if now == "killed before backward":
                # On a GPU kernels of forward that have not run die with the process.
                losses[-1].item()
                BEFORE["killed"]()
            if now != "skips backward":
                sum(losses).backward()
            print("step", number, losses[0].item(), flush=True)


# The phase that the others name.
ANY, BACKWARD = r"tokens|exchange|router|sync|memory", r"backward \(\w+\)"
SEEN = {
    **dict.fromkeys(("killed", "raises", "hangs", "too many tokens"), ANY),
    **dict.fromkeys(("killed before backward", "skips backward"), BACKWARD),
    **dict.fromkeys(("another shape", "another order"), "exchange"),
    "another config": r"\w+",
}
AT_ONCE = {"skips backward", "another shape", "another order", "another config"}
# An error before a call, which ends the rank: the others hear of it long before their time is up, and why.
LEFT = {"raises": "KeyError: 'the batch has no labels'", "too many tokens": "expected at most C=5"}


# They go the way of another fault on that backend.
ALIKE = {*product(["reference"], ["another order", "raises", "hangs"])}
ALIKE |= {*product(["fast"], ["another order", "another config", "hangs", "too many tokens", "killed before backward"])}
FAULTS = [
    pytest.param(*case, device_type, False, marks=pytest.mark.thorough if case in ALIKE else ())
    for case, device_type in product(product(BACKENDS, SEEN), DEVICE_TYPES)
]
FAULTS += [pytest.param("reference", fault, "cpu", True) for fault in ("killed", "hangs")]


@promise("bounded-waits", "left-by-error", "lost-rank", "mismatch")
@pytest.mark.parametrize(("backend", "fault", "device_type", "served"), FAULTS)
def test_the_others_end_in_time_and_name_the_rank(
    backend: str, fault: str, device_type: str, served: bool, tmp_path: Path
) -> None:
    """Though they would wait for it for ever. served: by rank 0, whose end is that of the store, and is not blamed."""
    size = 4 if served else 2 if device_type == "cuda" else 3
    program = {"world_size": size, "device_type": device_type, "served": served}
    for rank, (code, said) in enumerate(exits(tmp_path, train, fault, backend, odd=ODD, **program)):
        if rank == ODD:
            continue
        assert code == 1, (rank, code, said)
        error = "CollectiveMismatchError" if fault in AT_ONCE else r"Peer\w*Error|CollectiveMismatchError"
        named = "\n".join(line for line in said.splitlines() if re.search(error, line))
        assert re.search(rf"rank {ODD}\b.*phase ({SEEN[fault]}) of step \d", named), (rank, said)
        assert fault not in LEFT or re.search(rf"rank {ODD} left.*{LEFT[fault]}", named), (rank, named)


UNCAUGHT = """
import sys, torch, torch.distributed as dist, sonic_ep.testing
from sonic_ep import ExpertParallel, PeerLostError

rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
ep = ExpertParallel(backend=sys.argv[3], timeout=1200, max_tokens_per_rank=4)
ep.plan(torch.zeros(4, 1, dtype=torch.int64), 2)
try:
    ep.plan(torch.zeros(4 + rank, 1, dtype=torch.int64), 2)
except PeerLostError as error:
    print(error, flush=True)
"""


@promise("left-by-error")
@pytest.mark.parametrize("backend", ["fast", pytest.param("reference", marks=pytest.mark.thorough)])
def test_an_uncaught_error_without_close_is_reported_to_peers(backend: str, tmp_path: Path) -> None:
    # Long before the time of the rank that waits is up.
    (_, first), (_, odd) = run_program(tmp_path, UNCAUGHT, *([rank, str(tmp_path / "store"), backend] for rank in "01"))
    assert "ValueError: rank 1 of 2: tokens T: got 5, expected at most C=4: construct ExpertParallel" in odd
    assert re.search(r"rank 1 left|lost rank 1", first), first


# A rank that waited that long would raise PeerTimeoutError; the abandoned collective of a failed group lasts as long.
PATIENT_SECONDS = 100.0
SHORT = "tried to allocate 2.00 GiB"
# The library's own errors begin with the rank. Those of a hook on saved tensors, or of a model run again, need not.
OF_MEMORY = (torch.OutOfMemoryError(SHORT), "OutOfMemoryError: rank 1 of 3: out of")
INTERRUPT = (KeyboardInterrupt(), "KeyboardInterrupt")
OF_A_HOOK = (ValueError("a hook of one rank"), "ValueError: a hook of one rank")
LATER = [pytest.param(*case, marks=pytest.mark.thorough) for case in ((OF_MEMORY, False), (INTERRUPT, True))]
# What exchanges rows: in a call, and in a backward.
EXCHANGES = {
    "fast": ("sonic_ep.fast.moe_function._pulled", "sonic_ep.fast.exchange.Exchange.rows"),
    "reference": ("sonic_ep.reference.exchange.Exchange.rows",),
}


def told(work: Callable[[], object]) -> str:
    with pytest.raises((RuntimeError, KeyboardInterrupt, ValueError)) as raised:
        work()
    return f"{raised.type.__name__}: {raised.value}"


def fails_once(rank: Rank, group: dist.ProcessGroup, backend: str, error: BaseException, backward: bool) -> list[str]:
    """What the second call, or its backward, raises, and what everything raises that follows."""
    with pytest.MonkeyPatch.context() as patch:
        # The store of a busy machine may be slow to tell why a rank has left.
        patch.setattr("sonic_ep.distributed.rank_status.ANSWER_SECONDS", HANG_SECONDS)
        ep = ExpertParallel(group, backend=backend, timeout=PATIENT_SECONDS)
        call = partial(ep.moe, **with_trained_experts(call_of(rank.world_size)))
        first = call().y.sum()

        def use() -> None:
            y = call().y.sum() if backward else None
            for exchange in EXCHANGES[backend] if rank.rank == ODD else ():
                patch.setattr(exchange, Mock(side_effect=error))
            y.backward() if backward else call().y.sum().backward()
            call()

        said = [told(work) for work in (use, call, first.backward, ep.check)]
        # What it holds is given back all the same.
        ep.close()
        assert told(call) == said[1]
    return said


@promise("ended-object")
@pytest.mark.parametrize(("error", "backward"), [(OF_MEMORY, True), (INTERRUPT, False), (OF_A_HOOK, True), *LATER])
@both_backends
@on_ranks(3, pool="cpu_pool")
def test_an_error_of_one_rank_ends_the_object_on_all(
    rank: Rank, backend: str, error: tuple[BaseException, str], backward: bool
) -> None:
    with own_process_group(rank) as group:
        said = fails_once(rank, group, backend, error[0], backward)
        # Else a traceback keeps the group, and its connections, at which other ranks' abandoned collectives wait.
        error[0].__traceback__ = None
        gc.collect()
    found = [said] * rank.world_size
    dist.all_gather_object(found, said)
    (first, *later), why = said, found[ODD][0]
    assert why.startswith(error[1])
    if rank.rank != ODD:
        # Or the third rank, which has heard of it before, has left by that.
        assert first.startswith(f"PeerLostError: rank {rank.rank} of 3: ")
        assert f"rank 1 left ({why}) while it was waited for in" in first
    ended = f"ClosedError: rank {rank.rank} of 3: this ExpertParallel has ended: {first}; make a new one after the"
    assert all(words.startswith(ended) for words in later), later


@promise("usable-after-errors", "out-of-memory")
@both_backends
@on_ranks(1, pool="cpu_pool")
def test_memory_that_runs_out_is_told_with_the_place(rank: Rank, backend: str) -> None:
    """That of the CPU in a call, and what runs out in its backward."""
    arguments = with_trained_experts(call_of(1))
    with ExpertParallel(backend=backend) as ep:
        if backend == "reference":
            huge = good_call(x=torch.zeros(1, HIDDEN).expand(2**44, HIDDEN))
            with pytest.raises(torch.OutOfMemoryError, match=r"rank 0 of 1: out of memory in phase .* of step \d"):
                ep.moe(**huge)
        ep.moe(**arguments)
        y = ep.moe(**arguments).y
        expected = rf"rank 0 of 1: out of memory in phase .* of step \d: {SHORT}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EXCHANGES[backend][-1], Mock(side_effect=torch.OutOfMemoryError(SHORT)))
            with pytest.raises(torch.OutOfMemoryError, match=expected):
                y.sum().backward()
        ep.moe(**arguments).y.sum().backward()


@promise("out-of-memory")
@both_backends
@on_ranks(1, pool="cuda_pool")
def test_gpu_memory_that_runs_out_is_told_with_rank_and_place(rank: Rank, backend: str) -> None:
    """The third call wants more than this process may have any more."""
    weights = {name: call_of(rank.world_size)[name].to(rank.device) for name in ("router_w", "w1", "w2")}
    x = torch.randn(2**20, HIDDEN, device=rank.device)
    with ExpertParallel(backend=backend, max_tokens_per_rank=len(x)) as ep:
        for tokens in (x[:8], x[:8]):
            ep.moe(tokens, **weights, top_k=2)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(rank.device).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total, rank.device)
        said = "rank 0 of 1: out of memory in phase .* of step 3: CUDA out of memory"
        try:
            with pytest.raises(torch.OutOfMemoryError, match=said):
                ep.moe(x, **weights, top_k=2)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, rank.device)


@promise("usable-after-errors")
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_a_second_backward_is_refused_and_leaves_the_object_usable(rank: Rank, backend: str) -> None:
    with ExpertParallel(backend=backend, timeout=PATIENT_SECONDS) as ep:
        call = partial(ep.moe, **with_trained_experts(call_of(rank.world_size)))
        loss = call().y.sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="through the graph a second time"):
            loss.backward()
        call().y.sum().backward()
