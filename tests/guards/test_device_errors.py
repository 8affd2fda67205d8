"""What kernels have found is raised by a later call, on every rank alike; what no call has raised is printed."""

import gc
import io
import re
import time
import weakref
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from backends import both_backends
from layer_inputs import layer_inputs
from lives import said_in_child
from on_ranks import on_ranks
from plans_ahead import FEW_PLANS, of_the_library, plans_ahead
from promises import promise

import sonic_ep
from sonic_ep import EPConfig, ExpertParallel, RecomputeError, RowOverflowError
from sonic_ep.distributed.group import EPGroup
from sonic_ep.errors import PeerError
from sonic_ep.testing import CASES, Rank, draw

pytestmark = pytest.mark.fast

CASE = CASES["uniform"]
EXPERTS_PER_RANK = 2
# A GPU is busy with them for a quarter of a second or longer, at any clock.
BUSY_CYCLES = 500_000_000


def ids(rank: Rank, *, bad: bool = False) -> torch.Tensor:
    """Of two tokens with an expert each; one is out of range on the last rank if ``bad``."""
    out_of_range = 99 if bad and rank.rank == rank.world_size - 1 else 1
    return torch.tensor([[0], [out_of_range]], device=rank.device)


def raised_by(calls: list[Callable[[], object]]) -> list[int]:
    """Which of ``calls`` raise that ids are out of range."""
    found = []
    for number, call in enumerate(calls):
        try:
            call()
        except ValueError as error:
            if "expert ids out of range" not in str(error):
                raise
            found.append(number)
    return found


@promise("device-flags")
@pytest.mark.parametrize("exact", [False, True])
@on_ranks(1, 2, 3)
def test_what_was_flagged_is_raised_in_turn_on_every_rank(rank: Rank, exact: bool) -> None:
    """Two wrong plans in a row raise one after the other, each so many plans later, or at once where the host reads."""
    experts = EXPERTS_PER_RANK * rank.world_size
    config = EPConfig(cpu_sync_on_runtime=exact)
    with plans_ahead(FEW_PLANS) as ahead, ExpertParallel(backend="fast", config=config) as ep:
        plans = [partial(ep.plan, ids(rank, bad=bad), experts) for bad in (False, True)]
        calls = [plans[bad] for bad in [False, True, True, *[False] * (ahead + 2)]]
        # A call that raises makes no plan of its own: the second of the two is raised by the very next.
        assert raised_by(calls) == ([1, 2] if exact else [1 + ahead, 2 + ahead])
        ep.check()
        if not exact:
            plans[True]()
            plans[False]()
            assert raised_by([ep.check, ep.check]) == [0]


@promise("device-flags")
@pytest.mark.parametrize("graphed", [False, True])
@on_ranks(1, 2, pool="cuda_pool")
def test_the_host_is_plans_ahead_of_the_gpu(rank: Rank, graphed: bool) -> None:
    """Also where an earlier plan is in a graph."""
    experts = EXPERTS_PER_RANK * rank.world_size
    with ExpertParallel(backend="fast", max_tokens_per_rank=2) as ep:
        for _ in range(2):
            ep.plan(ids(rank), experts)
        graph, static = torch.cuda.CUDAGraph(), ids(rank)
        if graphed:
            with torch.cuda.graph(graph):
                ep.plan(static, experts)
        given = ids(rank)
        # Kernels of the copy that plans take of what graphs have flagged are loaded when they first run.
        ep.plan(given, experts)
        ep.check()
        busy = torch.cuda.Event()
        torch.cuda._sleep(BUSY_CYCLES)
        busy.record()
        began = time.monotonic()
        ahead, window = of_the_library()
        for _ in range(ahead - window):
            ep.plan(given, experts)
        assert not busy.query(), f"the host waited for the GPU: {time.monotonic() - began:.3f} s"
        torch.cuda.synchronize()


LAYERS = 8


@promise("device-flags")
@pytest.mark.parametrize("graphed", [False, True])
@on_ranks(1, 2, pool="cuda_pool")
def test_the_host_is_layers_ahead_of_the_gpu(rank: Rank, graphed: bool) -> None:
    """Forward and backward, with ``moe``, ``moe_routed`` and ``plan``; also where a layer is in a graph."""
    x, weights, dy = layer_inputs(rank, CASE)
    inputs = draw(CASE, rank.world_size, rank.device)
    tokens = inputs.tokens_of(rank.rank)
    idx, scores = inputs.topk_idx[tokens], inputs.topk_scores[tokens]
    with ExpertParallel(backend="fast", max_tokens_per_rank=max(CASE.tokens)) as ep:

        def by_parts() -> torch.Tensor:
            plan = ep.plan(idx, CASE.num_experts)
            return ep.combine(ep.dispatch(x, plan), scores, plan)

        calls = [
            lambda: ep.moe(x, *weights, CASE.top_k).y,
            lambda: ep.moe_routed(x, idx, scores, *weights[1:]),
            by_parts,
        ]

        def queue(call: Callable[[], torch.Tensor]) -> None:
            for _ in range(LAYERS):
                torch.autograd.grad(call(), x, dy)

        for call in calls:
            # Memory, and kernels, which are loaded when they first run.
            queue(call)
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = [call() for call in calls]
            graph.replay()
            for call in calls:
                queue(call)
            del kept
        ep.check()
        for call in calls:
            busy = torch.cuda.Event()
            torch.cuda._sleep(BUSY_CYCLES)
            busy.record()
            began = time.monotonic()
            queue(call)
            assert not busy.query(), f"the host waited for the GPU: {time.monotonic() - began:.3f} s"
            torch.cuda.synchronize()
        ep.check()


@promise("device-flags")
@pytest.mark.parametrize("flags", [False, True])
def test_a_window_of_plans_has_one_event_and_one_copy(monkeypatch: pytest.MonkeyPatch, flags: bool) -> None:
    """The host waits for it when it looks at the first of these plans, and for nothing where no plan may flag."""
    from sonic_ep.fast.device_errors import DeviceErrors

    ahead, window = of_the_library()
    errors, waited, recorded = DeviceErrors(EPGroup(rank=0, world_size=1), torch.device("cpu")), [], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    for mark in errors._unused:
        mark.event = Mock(query=lambda: False, synchronize=lambda: waited.append(errors._plans))
        mark.event.record = lambda _: recorded.append(errors._plans)
    for _ in range(1, 3 * ahead):
        errors.begin()
        errors.queued(flags=flags)
    assert recorded == ([] if not flags else list(range(window - 1, 3 * ahead, window)))
    assert waited == ([] if not flags else list(range(ahead, 3 * ahead, window)))


@promise("device-flags")
@pytest.mark.parametrize("before", [0, 2, 7])
def test_what_backwards_flagged_is_raised_with_the_first_plan_of_its_window(before: int) -> None:
    """That is ``PLANS_AHEAD`` plans after its first, whichever of its plans came before."""
    from sonic_ep.fast.device_errors import REROUTED, DeviceErrors

    ahead, window = of_the_library()
    errors = DeviceErrors(EPGroup(rank=0, world_size=1), torch.device("cpu"))

    def plan() -> None:
        errors.begin()
        errors.queued(flags=False)

    # The first plan has number 1.
    for _ in range(window - 1 + before):
        plan()
    errors._gathered.codes[REROUTED.value], errors._gathered.used = 5, True
    for _ in range(ahead - before):
        plan()
    with pytest.raises(RecomputeError, match="step 5"):
        plan()
    for _ in range(2 * ahead):
        plan()
    errors.raise_all()


@promise("device-flags")
@on_ranks(1, 2, pool="cuda_pool")
def test_what_a_replay_flagged_is_raised_by_one_call_on_every_rank(rank: Rank) -> None:
    """However far a rank's host is ahead; and by ``check`` where no later plan comes."""
    experts = EXPERTS_PER_RANK * rank.world_size
    with ExpertParallel(backend="fast", max_tokens_per_rank=2) as ep:
        static, given = ids(rank), ids(rank)
        ep.plan(static, experts)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ep.plan(static, experts)
        graph.replay()
        ahead, _ = of_the_library()
        # The next plan is the second: in the window of the first plans, which plan ``ahead`` looks at.
        for calls, raises in (([partial(ep.plan, given, experts)] * 2 * ahead, ahead - 2), ([ep.check] * 2, 0)):
            static.copy_(ids(rank, bad=True))
            if rank.rank == 0:
                torch.cuda._sleep(BUSY_CYCLES)
            graph.replay()
            static.copy_(ids(rank))
            assert raised_by(calls) == [raises]
            ep.check()
        graph.replay()
        ep.check()


TIGHT = EPConfig(max_rows=1)
SAID = "max_rows: got 1, expected at least"


def overflowed(rank: Rank) -> ExpertParallel:
    ep = ExpertParallel(backend="fast", config=TIGHT)
    x, weights, _ = layer_inputs(rank, CASE)
    assert ep.moe(x, *weights, CASE.top_k).y.isnan().all()
    if rank.device.type == "cuda":
        torch.cuda.synchronize(rank.device)
    return ep


def timed_out(rank: Rank) -> ExpertParallel:
    """An object with what a kernel that has timed out, waiting for the other rank, leaves for the host."""
    from sonic_ep.fast.sync import TIME_UP

    ep = ExpertParallel(backend="fast", timeout=60.0)
    ep.meet(rank.device)
    (context,) = ep._backend._contexts.values()
    other = 1 - rank.rank
    context.workspace.wait_errors.codes.copy_(torch.tensor([TIME_UP.value, other + 1, ep._collectives.sync_tag.tag, 0]))
    return ep


def printed(use: Callable[[], object]) -> str:
    """What ``use``, and freeing what it made, print as errors."""
    words = io.StringIO()
    with redirect_stderr(words):
        use()
        gc.collect()
    return words.getvalue()


@promise("device-errors-told")
@on_ranks(2)
def test_what_no_call_has_raised_is_printed_once(rank: Rank) -> None:
    """Where an object is freed, or left by another error; not where close() raises it, nor by a forked child."""

    def left_by_another_error() -> None:
        with pytest.raises(KeyError, match="labels"), overflowed(rank):
            raise KeyError("labels")

    def finalized() -> str:
        return printed(lambda: [finalizer() for finalizer in list(weakref.finalize._registry)])

    def raised() -> None:
        ep = overflowed(rank)
        assert rank.device.type == "cuda" or "RowOverflowError" not in said_in_child(finalized)
        with pytest.raises(RowOverflowError, match=SAID):
            ep.close()

    words = f"sonic_ep: RowOverflowError: rank {rank.rank} of 2: {SAID}"
    for use, times in ((partial(overflowed, rank), 1), (left_by_another_error, 1), (raised, 0)):
        assert printed(use).count(words) == times, use


@promise("device-errors-told")
@on_ranks(2, pool="cpu_pool")
def test_a_failed_wait_is_raised_by_close_or_printed(rank: Rank) -> None:
    """Also where PyTorch's error of a trap ends the program, and where giving back the memory raises it again."""
    # The other rank may have left by then, by the same error.
    here, other = f"rank {rank.rank} of 2: ", f"rank {1 - rank.rank}"
    words = f"{here}(waited 60 s for {other} in|{other} left .*) phase sync of step 1"

    def broken() -> None:
        """What PyTorch raises after a kernel's trap: wherever the host waits for the GPU, and where it is called."""
        raise RuntimeError("device-side assert triggered")

    def ended_by_pytorchs_error() -> None:
        with pytest.raises(RuntimeError, match="device-side assert"), on_a_lost_gpu():
            broken()

    def raised() -> None:
        ep = on_a_lost_gpu()
        with pytest.raises(PeerError, match=words):
            ep.close()

    def on_a_lost_gpu() -> ExpertParallel:
        ep = timed_out(rank)
        (context,) = ep._backend._contexts.values()
        context.workspace.synchronize = broken
        return ep

    assert len(re.findall(rf"sonic_ep: Peer(Timeout|Lost)Error: {words}", printed(ended_by_pytorchs_error))) == 1
    assert "sonic_ep: " not in printed(raised)


@promise("caught-errors")
@pytest.mark.parametrize(("overflows", "world_size"), [(True, 1), (False, 2)])
@on_ranks(pool="cpu_pool")
def test_an_error_that_was_caught_keeps_no_memory(rank: Rank, overflows: bool, world_size: int) -> None:
    x, weights, _ = layer_inputs(rank, CASE)
    gc.disable()
    config = replace(TIGHT, cpu_sync_on_runtime=True)
    ep = ExpertParallel(backend="fast", config=config) if overflows else timed_out(rank)
    # Where waits fail, the other rank may report its own failure first.
    error = RowOverflowError if overflows else PeerError
    with suppress(error):
        ep.moe(x, *weights, CASE.top_k)
        pytest.fail("the call has raised nothing")
    held = weakref.ref(x)
    del x, weights
    gc.enable()
    assert held() is None
    with suppress(error):
        ep.close()


@promise("usable-after-errors", "device-errors-told")
@both_backends
@on_ranks(2)
def test_the_functional_form_raises_what_its_call_has_found(rank: Rank, backend: str) -> None:
    x, weights, _ = layer_inputs(rank, CASE)
    with pytest.raises(RowOverflowError, match=SAID):
        sonic_ep.moe(x, *weights, CASE.top_k, backend=backend, config=TIGHT)
    assert sonic_ep.moe(x, *weights, CASE.top_k, backend=backend).y.isfinite().all()


@promise("device-errors-told")
@pytest.mark.parametrize("in_capture", [True, False])
def test_what_is_on_the_host_is_found_after_the_gpu_is_lost(monkeypatch: pytest.MonkeyPatch, in_capture: bool) -> None:
    from sonic_ep.fast.device_errors import PLAN_CODES, PlanErrors, first_error

    lost = Mock(side_effect=RuntimeError)
    records = [PlanErrors(EPGroup(rank=0, world_size=1), torch.zeros(PLAN_CODES, dtype=torch.int32)) for _ in range(2)]
    gathered = Mock(codes=Mock(device=torch.device("cuda")), used=True, error=lost)
    monkeypatch.setattr("sonic_ep.fast.launch.stream_is_captured", lost if in_capture else lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert first_error(records, gathered) is None
    assert lost.call_count == 2
    records[1].codes[0] = 1
    assert "out of range on rank 0" in str(first_error(records, gathered))
