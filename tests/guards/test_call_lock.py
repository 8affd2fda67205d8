"""One thread at a time: in a call, or in a backward; and recompute calls from within."""

import signal

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from calls import in_another_thread
from layer_inputs import layer_inputs
from on_ranks import on_ranks
from promises import promise

from sonic_ep import ClosedError, ExpertParallel
from sonic_ep.distributed.call_lock import CallLock
from sonic_ep.errors import ConcurrentCallError
from sonic_ep.testing import CASES, Rank


@promise("one-call")
def test_the_lock_refuses_threads_waits_and_an_early_close() -> None:
    lock = CallLock("an object")

    def once(*, last: bool = False) -> None:
        with lock.taken(last=last):
            return

    with lock.taken():
        once()
        (refused,) = in_another_thread(once)
        assert refused.startswith("an object: got a call while another thread is in one")
        with lock.waiting(), pytest.raises(ConcurrentCallError, match="an object: got a call in the middle of a call"):
            once()
        once()
        with pytest.raises(ConcurrentCallError, match=r"got close\(\) in the middle of a call"):
            once(last=True)
    assert in_another_thread(once) == []
    with pytest.raises(KeyError), lock.taken():
        raise KeyError
    assert in_another_thread(once) == []
    lock.end("has ended: the first")
    lock.end("is closed")
    with pytest.raises(ClosedError, match="an object: this ExpertParallel has ended: the first"):
        once()
    once(last=True)


def test_an_error_of_the_outermost_call_is_handled_once() -> None:
    lock, seen = CallLock("an object"), []
    lock.after_error(lambda error: seen.append((type(error), lock.begun)))
    with pytest.raises(KeyError), lock.taken(begun=True), lock.taken():
        raise KeyError
    with pytest.raises(KeyError), lock.taken():
        raise KeyError
    assert seen == [(KeyError, True), (KeyError, False)]


@promise("one-call")
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_a_signals_handler_that_calls_is_refused_and_harms_nothing(rank: Rank, backend: str) -> None:
    ids = torch.zeros((1, 1), dtype=torch.int64)
    store, handled = dist.distributed_c10d._get_default_store(), f"{backend}: a signal was handled"
    refused: list[str] = []
    with ExpertParallel(backend=backend, max_tokens_per_rank=1) as ep:
        ep.plan(ids, rank.world_size)

        def handler(*_: object) -> None:
            if not ep._collectives.call_lock._waiting or refused:
                return
            with pytest.raises(ConcurrentCallError) as raised:
                ep.plan(ids, rank.world_size)
            refused.append(str(raised.value))
            store.set(handled, "1")

        if rank.rank == 0:
            before = signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.3, 0.3)
        else:
            store.wait([handled])
        assert ep.plan(ids, rank.world_size).counts.tolist() == [2, 0]
        if rank.rank == 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            store.delete_key(handled)
            assert "got a call in the middle of a call" in refused[0]


@promise("one-call")
@both_backends
@on_ranks(1)
def test_a_backward_takes_the_lock(rank: Rank, backend: str) -> None:
    """A backward in another thread, while this one is in a call and after."""
    x, weights, dy = layer_inputs(rank, CASES["uneven_tokens"])
    with ExpertParallel(backend=backend) as ep:
        y = ep.moe(x, *weights, CASES["uneven_tokens"].top_k).y
        with ep._call_guard.one():
            (refused,) = in_another_thread(lambda: y.backward(dy, retain_graph=True))
        assert "got a call while another thread is in one" in refused
        assert in_another_thread(lambda: y.backward(dy)) == []


@pytest.mark.fast
@on_ranks(1, pool="cpu_pool")
def test_the_interpreter_runs_the_kernel_of_one_thread(rank: Rank) -> None:
    from sonic_ep.fast.launch import alone_in_this_process

    idx = torch.zeros((1, 1), dtype=torch.int64)
    with ExpertParallel(backend="fast") as ep:
        with alone_in_this_process():
            (refused,) = in_another_thread(lambda: ep.plan(idx, 1))
        assert refused.startswith("Triton's interpreter: got a kernel while another thread runs one")
        assert in_another_thread(lambda: ep.plan(idx, 1)) == []


class WithoutTextError(Exception):
    def __str__(self) -> str:
        raise KeyError("no text")


def test_an_error_is_hidden_neither_by_its_want_of_text_nor_by_another_threads_call() -> None:
    with pytest.raises(WithoutTextError), ExpertParallel(backend="reference"):
        raise WithoutTextError
    ep = ExpertParallel(backend="reference")

    def fail() -> None:
        with ep:
            raise KeyError("labels")

    with ep._call_guard.one():
        assert in_another_thread(fail) == ["'labels'"]
