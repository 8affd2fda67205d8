"""What the device has found and no call has raised is printed."""

import gc
import io
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress

import pytest
import torch
from backends import both_backends
from layer_inputs import layer_inputs

import sonic_ep
from sonic_ep import EPConfig, ExpertParallel, RowOverflowError
from sonic_ep.errors import PeerTimeoutError
from sonic_ep.testing import CASES, Rank, RankPool

CASE = CASES["uniform"]
TIGHT = EPConfig(max_rows=1)
SAID = "max_rows: got 1, expected at least"


def overflowed(rank: Rank, ep: ExpertParallel) -> None:
    x, weights, _ = layer_inputs(rank, CASE)
    assert ep.moe(x, *weights, CASE.top_k).y.isnan().all()
    if rank.device.type == "cuda":
        torch.cuda.synchronize(rank.device)


def forgotten(rank: Rank) -> None:
    overflowed(rank, ExpertParallel(backend="fast", config=TIGHT))


def left_by_another_error(rank: Rank) -> None:
    def use() -> None:
        with ExpertParallel(backend="fast", config=TIGHT) as ep:
            overflowed(rank, ep)
            raise KeyError("labels")

    with pytest.raises(KeyError, match="labels"):
        use()


def heard(rank: Rank) -> None:
    ep = ExpertParallel(backend="fast", config=TIGHT)
    overflowed(rank, ep)
    with pytest.raises(RowOverflowError, match=SAID):
        ep.close()


def after_a_wait_in_vain(rank: Rank) -> ExpertParallel:
    """An object of which a kernel of this rank has waited in vain: what that leaves for the host."""
    from sonic_ep.fast.sync import TIME_UP

    ep = ExpertParallel(backend="fast")
    ep.meet(rank.device)
    (context,) = ep._backend._contexts.values()
    context.workspace.wait_errors.words.copy_(torch.tensor([TIME_UP.value, 2, ep._collectives.sync_tag.tag, 0]))
    return ep


@contextmanager
def lost_gpu(ep: ExpertParallel) -> Iterator[Callable[[], None]]:
    """What PyTorch raises of a kernel that trapped: wherever the host waits for the GPU, and where it is called."""

    def broken() -> None:
        raise RuntimeError("device-side assert triggered")

    (context,) = ep._backend._contexts.values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context.workspace, "synchronize", broken)
        yield broken


def waited_in_vain(rank: Rank) -> None:
    """What the program sees is PyTorch's error, there and when the memory is given back."""
    ep = after_a_wait_in_vain(rank)

    def use() -> None:
        with ep:
            broken()

    with lost_gpu(ep) as broken, pytest.raises(RuntimeError, match="device-side assert"):
        use()


def in_a_child(rank: Rank) -> None:
    """What the device has found is its parent's to tell."""
    ep = ExpertParallel(backend="fast", config=TIGHT)
    overflowed(rank, ep)
    gc.collect()
    child = os.fork()
    if child == 0:
        words = io.StringIO()
        with redirect_stderr(words):
            for finalizer in list(weakref.finalize._registry):
                finalizer()
        os._exit(int("RowOverflowError" in words.getvalue()))
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(RowOverflowError, match=SAID):
        ep.close()


@pytest.mark.fast
def test_a_forked_child_does_not_tell_what_its_parent_will(cpu_pool: RankPool) -> None:
    cpu_pool.run(in_a_child, world_size=1)


def closed_behind_a_lost_gpu(rank: Rank) -> None:
    """Who was waited for is what close() raises, not what comes of giving back the memory."""
    ep = after_a_wait_in_vain(rank)
    with lost_gpu(ep), pytest.raises(PeerTimeoutError, match="waited 60 s for rank 1 in phase sync of step 1"):
        ep.close()


@pytest.mark.fast
def test_close_tells_who_was_waited_for(cpu_pool: RankPool) -> None:
    cpu_pool.run(closed_behind_a_lost_gpu, world_size=2)


def overflow_found(rank: Rank) -> ExpertParallel:
    ep = ExpertParallel(backend="fast", config=TIGHT)
    overflowed(rank, ep)
    return ep


def caught(rank: Rank, failing: Callable[[Rank], ExpertParallel], error: type[Exception]) -> None:
    """An error that was caught holds nothing of what was in the call."""
    x, weights, _ = layer_inputs(rank, CASE)
    gc.disable()
    ep = failing(rank)
    with suppress(error):
        ep.moe(x, *weights, CASE.top_k)
    held = weakref.ref(x)
    del x, weights
    gc.enable()
    assert held() is None
    with suppress(error):
        ep.close()


@pytest.mark.fast
def test_an_error_that_was_caught_keeps_no_memory(pool: RankPool) -> None:
    pool.run(caught, overflow_found, RowOverflowError, world_size=1)


def printed(rank: Rank, use: Callable[[Rank], None]) -> str:
    """What ``use`` leaves on the error stream."""
    words = io.StringIO()
    with redirect_stderr(words):
        use(rank)
        gc.collect()
    return words.getvalue()


@pytest.mark.fast
@pytest.mark.parametrize(("use", "times"), [(forgotten, 1), (left_by_another_error, 1), (heard, 0)])
def test_what_nobody_asked_for_is_printed(pool: RankPool, use: Callable[[Rank], None], times: int) -> None:
    for rank, words in enumerate(pool.run(printed, use, world_size=2)):
        assert words.count(f"sonic_ep: RowOverflowError: rank {rank} of 2: {SAID}") == times


@pytest.mark.fast
def test_who_was_waited_for_is_printed_where_an_error_of_pytorchs_ends_the_program(cpu_pool: RankPool) -> None:
    for rank, words in enumerate(cpu_pool.run(printed, waited_in_vain, world_size=2)):
        said = f"sonic_ep: PeerTimeoutError: rank {rank} of 2: waited 60 s for rank 1 in phase sync of step 1"
        assert words.count(said) == 1


def functional(rank: Rank, backend: str) -> None:
    x, weights, _ = layer_inputs(rank, CASE)
    with pytest.raises(RowOverflowError, match=SAID):
        sonic_ep.moe(x, *weights, CASE.top_k, backend=backend, config=TIGHT)
    # And the group goes on.
    assert sonic_ep.moe(x, *weights, CASE.top_k, backend=backend).y.isfinite().all()


@both_backends
def test_the_functional_form_raises_what_its_call_has_found(pool: RankPool, backend: str) -> None:
    pool.run(functional, backend, world_size=2)


def raised_at_close(rank: Rank) -> None:
    with pytest.raises(PeerTimeoutError, match="for rank 1"):
        after_a_wait_in_vain(rank).close()


@pytest.mark.fast
def test_a_wait_in_vain_that_was_raised_is_not_printed_again(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(printed, raised_at_close, world_size=2) == ["", ""]


@pytest.mark.fast
def test_a_wait_in_vain_that_was_caught_keeps_no_memory(cpu_pool: RankPool) -> None:
    cpu_pool.run(caught, after_a_wait_in_vain, PeerTimeoutError, world_size=2)
