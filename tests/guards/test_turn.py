"""One thread at a time: in a call, or in a backward; and recompute calls from within."""

import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
from backends import both_backends
from layer_inputs import layer_inputs

from sonic_ep import ExpertParallel
from sonic_ep.distributed.call_lock import CallLock
from sonic_ep.errors import ConcurrentCallError
from sonic_ep.testing import CASES, Case, Rank, RankPool


def in_another_thread(work: Callable[[], object]) -> list[str]:
    """What ``work`` raises there, in words."""
    said: list[str] = []

    def run() -> None:
        try:
            work()
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return said


def test_a_second_thread_is_refused_and_the_first_may_do_more() -> None:
    call_lock = CallLock("an object")

    def once() -> None:
        with call_lock.taken():
            return

    with call_lock.taken():
        once()
        assert in_another_thread(once) == [
            "an object: got a call while another thread is in one, expected one after the other"
        ]
    assert in_another_thread(once) == []
    with pytest.raises(KeyError), call_lock.taken():
        raise KeyError
    assert in_another_thread(once) == []


def test_nobody_calls_in_the_middle_of_a_wait_or_closes_in_the_middle_of_a_call() -> None:
    call_lock = CallLock("an object")

    def once(*, last: bool = False) -> None:
        with call_lock.taken(last=last):
            return

    with call_lock.taken():
        with (
            call_lock.waiting(),
            pytest.raises(ConcurrentCallError, match=r"an object: got a call in the middle of a call of the same"),
        ):
            once()
        once()
        with pytest.raises(
            ConcurrentCallError, match=r"got close\(\) in the middle of a call of the same thread, expected it"
        ):
            once(last=True)
    once(last=True)
    assert in_another_thread(once) == []


def interrupted(rank: Rank, backend: str, astray: bool) -> str:
    """A signal's handler calls while this rank waits for the other, which then comes."""
    ids = torch.zeros((1, 1), dtype=torch.int64)
    with ExpertParallel(backend=backend, max_tokens_per_rank=1, timeout=20) as ep:
        ep.plan(ids, rank.world_size)
        refused = ""
        if astray:
            ep._collectives.mark_failed()

        def handler(*_: object) -> None:
            nonlocal refused
            with pytest.raises(ConcurrentCallError) as raised:
                ep.plan(ids, rank.world_size)
            refused = str(raised.value)

        if rank.rank == 0:
            before = signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
        else:
            time.sleep(1.5)
        assert ep.plan(ids, rank.world_size).counts.tolist() == [2, 0]
        if rank.rank == 0:
            signal.signal(signal.SIGALRM, before)
    return refused


@pytest.mark.parametrize(
    ("backend", "astray"),
    [("reference", False), ("reference", True), pytest.param("fast", False, marks=pytest.mark.fast)],
)
def test_a_signals_handler_that_calls_is_refused_and_harms_nothing(
    cpu_pool: RankPool, backend: str, astray: bool
) -> None:
    first, other = cpu_pool.run(interrupted, backend, astray, world_size=2)
    assert "got a call in the middle of a call of the same thread" in first
    assert other == ""


def backward_meanwhile(rank: Rank, case: Case, backend: str) -> tuple[list[str], list[str]]:
    """A backward in another thread, while this one is in a call, and when it is not any more."""
    x, weights, dy = layer_inputs(rank, case)
    with ExpertParallel(backend=backend) as ep:
        y = ep.moe(x, *weights, case.top_k).y
        with ep._call_guard.one():
            refused = in_another_thread(lambda: y.backward(dy, retain_graph=True))
        return refused, in_another_thread(lambda: y.backward(dy))


@both_backends
def test_a_backward_takes_its_turn(pool: RankPool, backend: str) -> None:
    for refused, later in pool.run(backward_meanwhile, CASES["uneven_tokens"], backend, world_size=1):
        assert len(refused) == 1
        assert "got a call while another thread is in one" in refused[0]
        assert later == []


def kernel_meanwhile(rank: Rank) -> list[str]:
    """Of another object, while a kernel is interpreted."""
    from sonic_ep.fast.launch import alone_in_this_process

    idx = torch.zeros((1, 1), dtype=torch.int64)
    with ExpertParallel(backend="fast") as ep:
        with alone_in_this_process():
            refused = in_another_thread(lambda: ep.plan(idx, 1))
        assert in_another_thread(lambda: ep.plan(idx, 1)) == []
    return refused


@pytest.mark.fast
def test_the_interpreter_runs_the_kernel_of_one_thread(cpu_pool: RankPool) -> None:
    (refused,) = cpu_pool.run(kernel_meanwhile, world_size=1)
    assert refused == ["Triton's interpreter: got a kernel while another thread runs one, expected one thread"]


class SpeechlessError(Exception):
    """An error that fails where it is to be told."""

    def __str__(self) -> str:
        raise KeyError("no words")


def test_an_error_without_words_is_not_hidden_either() -> None:
    with pytest.raises(SpeechlessError), ExpertParallel(backend="reference"):
        raise SpeechlessError


def test_an_error_is_not_hidden_by_another_threads_call() -> None:
    """Whoever leaves by an error sees it, also where another thread is in a call."""
    ep = ExpertParallel(backend="reference")
    entered, left = threading.Event(), threading.Event()

    def busy() -> None:
        with ep._call_guard.one():
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=busy)

    def fail() -> None:
        with ep:
            thread.start()
            entered.wait(10)
            raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        fail()
    left.set()
    thread.join()
    assert torch.is_grad_enabled()
