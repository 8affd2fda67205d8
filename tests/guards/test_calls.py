"""Calls are the same on every rank, or the odd one is named. An object admits one thread at a time, backward too."""

import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from calls import HELD, HIDDEN, INTERMEDIATE, call_of, good_call, in_another_thread, routed, with_trained_experts
from layer_inputs import layer_inputs
from lives import layer_of
from new_group import own_process_group
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits

import sonic_ep
from sonic_ep import (
    ClosedError,
    CollectiveMismatchError,
    EPConfig,
    ExpertParallel,
    RouterConfig,
    RoutingPlan,
    Swiglu,
)
from sonic_ep.errors import ConcurrentCallError
from sonic_ep.testing import CASES, Rank

ODD = 1
DEFAULTS, ROUTER = "EPConfig(dispatch='auto', combine='auto'", "RouterOptions(top_k="
# What the odd rank does otherwise, in its object or its call, and how that is told: fact, its own value, the others'.
ODDITIES: list[tuple[dict[str, Any], dict[str, Any], str, str, str]] = [
    ({}, {"hidden": 16}, "H", "16", "8"),
    ({}, {"dtype": torch.bfloat16}, "dtype", "torch.bfloat16", "torch.float32"),
    ({}, {"top_k": 1}, "router", f"{ROUTER}1,", f"{ROUTER}2,"),
    ({}, {"held": 4}, "w1", "(4, 8, 8)", "(2, 8, 8)"),
    ({}, {"activation": "geglu"}, "activation", "geglu", "swiglu"),
    ({}, {"activation": Swiglu(alpha=2.0)}, "activation", "Swiglu(alpha=2.0, limit=inf, up_offset=0.0)", "swiglu"),
    ({}, {"gate_layout": "concat"}, "gate_layout", "concat", "interleaved"),
    ({}, {"b1": torch.zeros(HELD, 2 * INTERMEDIATE), "b2": torch.zeros(HELD, HIDDEN)}, "biases", "True", "False"),
    ({}, {"w1": torch.zeros(HELD, 2 * INTERMEDIATE, HIDDEN, requires_grad=True)}, "w1 trained", "True", "False"),
    ({}, {"norm_topk_probs": True}, "router", ROUTER, ROUTER),
    ({}, {"router": RouterConfig(scale=2)}, "router", ROUTER, ROUTER),
    ({}, {"plans": True}, "call", "plan", "moe"),
    ({"config": EPConfig(max_rows=99)}, {}, "config", DEFAULTS, DEFAULTS),
    ({"max_tokens_per_rank": 9}, {}, "max_tokens_per_rank", "9", "8"),
    ({"backend": "fast"}, {}, "backend", "fast", "reference"),
]


def planned(ep: ExpertParallel, num_experts: int) -> RoutingPlan:
    return ep.plan(torch.zeros(1, 1, dtype=torch.int64), num_experts)


def refused(rank: Rank, options: dict[str, Any], changes: dict[str, Any], check: bool) -> str:
    """The error of a call that is odd on one rank. Where calls are compared, the next is right again."""
    odd = rank.rank == ODD
    common = {"backend": "reference", "max_tokens_per_rank": 8, "check_collective": check}
    with own_process_group(rank) as group, ExpertParallel(group, **{**common, **(options if odd else {})}) as ep:
        call = call_of(rank.world_size, **(changes if odd else {}))
        with pytest.raises(CollectiveMismatchError) as raised:
            planned(ep, 2 * rank.world_size) if "plans" in call else ep.moe(**call)
        if not check:
            with pytest.raises(ClosedError, match="has ended: CollectiveMismatchError"):
                planned(ep, 2 * rank.world_size)
        elif not options:
            assert planned(ep, 2 * rank.world_size).counts.tolist()[:2] == [rank.world_size, 0]
            assert ep.moe(**call_of(rank.world_size)).tokens_per_expert.sum() == 2 * 5 * rank.world_size
    return str(raised.value)


@promise("compared-calls", "usable-after-errors")
@pytest.mark.fast
@on_ranks(2, 3, pool="cpu_pool")
def test_compared_calls_are_told_apart_by_their_facts(rank: Rank, world_size: int) -> None:
    others = f"rank{'s' if world_size > 2 else ''} " + ", ".join(str(r) for r in range(world_size) if r != ODD)
    for options, changes, fact, odd, usual in ODDITIES:
        where, said = refused(rank, options, changes, True).split(" differ in ")
        assert where.startswith(f"rank {rank.rank} of {world_size}: step 1: calls have to be the same on every rank")
        told = dict(part.split(": ", 1) for part in said.split("; "))[fact]
        assert odd in told.split(f" on rank {ODD}")[0], said
        assert all(words in told for words in (usual, f" on rank {ODD}", f" on {others}")), said
        # The odd rank comes first, where most agree.
        assert world_size == 2 or told.startswith(odd), said


@promise("mismatch")
@pytest.mark.fast
@on_ranks(3, pool="cpu_pool")
def test_calls_that_are_not_compared_are_told_apart_all_the_same(rank: Rank) -> None:
    other = 0 if rank.rank == ODD else ODD
    for options, changes, *_ in [*ODDITIES, ({"check_collective": True}, {})]:
        said = refused(rank, options, changes, False)
        assert said.startswith(f"rank {rank.rank} of 3: rank {other} came to phase "), (options, changes, said)
        assert "check_collective=True tells which" in said or "did it skip a call" in said, (options, changes, said)


@promise("x-gradient")
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_x_requires_a_gradient_on_every_rank_or_on_none(rank: Rank, backend: str) -> None:
    """An x without tokens counts as one that requires it where a weight does; where none does, as what it is."""
    odd = rank.rank == ODD
    empty = {"x": torch.randn(0, HIDDEN)} if odd else {}
    with ExpertParallel(backend=backend) as ep:
        ep.moe(**call_of(rank.world_size, **empty))
        arguments = with_trained_experts(call_of(rank.world_size, **empty))
        arguments["x"].requires_grad_(not odd)
        ep.moe(**arguments).y.sum().backward()
        assert (arguments["x"].grad is not None) == (not odd)
        assert arguments["w1"].grad is not None
    trained = f"x {'does not require' if odd else 'requires'} a gradient there, unlike here "
    words = rf"{trained}.*: x.requires_grad_\(\) on every rank or on none"
    for is_routed in (False, True):
        arguments = call_of(rank.world_size)
        arguments["x"].requires_grad_(odd)
        with own_process_group(rank) as group, ExpertParallel(group, backend=backend) as ep:
            call, arguments = (ep.moe_routed, routed(arguments)) if is_routed else (ep.moe, arguments)
            with torch.no_grad():
                call(**arguments)
            with pytest.raises(CollectiveMismatchError, match=words):
                call(**arguments)


@promise("usable-after-errors", "overflow")
@both_backends
@on_ranks(2)
def test_a_rank_with_too_many_tokens_may_call_again(rank: Rank, backend: str) -> None:
    """With fewer, while the others wait for it; and the same with the router."""
    with ExpertParallel(backend=backend, max_tokens_per_rank=4) as ep:
        idx = torch.full((4 + (rank.rank == ODD), 1), rank.rank, device=rank.device)
        if rank.rank == ODD:
            with pytest.raises(ValueError, match="rank 1 of 2: tokens T: got 5, expected at most C=4: construct "):
                ep.plan(idx, rank.world_size)
            idx = idx[:3]
        assert ep.plan(idx, rank.world_size).counts.tolist() == [4, 3]
        assert ep.plan(idx[:2], rank.world_size).counts.tolist() == [2] * rank.world_size
        x, *weights = layer_of(rank, tokens=5)
        if rank.rank == ODD:
            with pytest.raises(ValueError, match="tokens T: got 5, expected at most C=4"):
                ep.moe(x, *weights, 2)
        assert ep.moe(x[:1], *weights, 2).tokens_per_expert.sum() == 2 * rank.world_size


@promise("mismatch")
@pytest.mark.parametrize(
    ("backend", "wanted", "phase"),
    [("reference", ["w2"], "combine"), ("reference", ["w1", "w2"], "combine"), ("fast", ["w2"], "router")],
)
@on_ranks(2, pool="cpu_pool")
def test_a_rank_that_asks_for_fewer_gradients_is_found(rank: Rank, backend: str, wanted: list[str], phase: str) -> None:
    """But it need not ask for the gradient of the router."""
    odd, arguments = rank.rank == ODD, call_of(rank.world_size)
    leaves = {name: value.requires_grad_() for name, value in arguments.items() if name != "top_k"}

    def gradients(names: Iterable[str]) -> dict[str, torch.Tensor]:
        y = ep.moe(**arguments).y
        return dict(zip(names, torch.autograd.grad(y.sum(), [leaves[name] for name in names]), strict=True))

    def go_on() -> None:
        gradients(wanted if odd else leaves)
        planned(ep, rank.world_size)

    with own_process_group(rank) as group, ExpertParallel(group, backend=backend) as ep:
        expected = gradients(leaves)
        found = gradients([name for name in leaves if name != "router_w" or not odd])
        assert_same_bits(found, {name: expected[name] for name in found})
        words = rf"rank {rank.rank} of 2: rank {1 - rank.rank} came to phase "
        words += "" if odd else rf".* expected phase backward \({phase}\) of step 3"
        with pytest.raises(CollectiveMismatchError, match=words):
            go_on()


@promise("one-call")
@both_backends
@on_ranks(2)
def test_a_second_thread_is_refused_and_the_first_unharmed(rank: Rank, backend: str) -> None:
    x = torch.ones(2, HIDDEN, device=rank.device)
    idx = torch.full((2, 1), rank.rank, device=rank.device)
    errors: list[str] = []
    with ExpertParallel(backend=backend, max_tokens_per_rank=4) as ep:
        make = ep._backend.plan

        def interrupted(*arguments: Any, **options: Any) -> object:
            errors.extend(in_another_thread(lambda: ep.plan(idx, rank.world_size), ep.check, ep.close))
            with pytest.raises(ConcurrentCallError, match=r"got close\(\) in the middle of a call of the same thread"):
                ep.close()
            return make(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ep._backend, "plan", interrupted)
            plan = ep.plan(idx, rank.world_size)
        assert torch.equal(ep.dispatch(x, plan)[: plan.rows()], x)
    expected = f"rank {rank.rank} of 2: got a call while another thread is in one"
    assert [error.startswith(expected) for error in errors] == [True] * 3


@on_ranks(2, pool="cpu_pool")
def test_threads_with_objects_of_their_own(rank: Rank) -> None:
    groups = [dist.new_group() for _ in range(2)]
    found: dict[int, list[int]] = {}

    def run(number: int) -> None:
        with ExpertParallel(groups[number], backend="reference") as ep:
            for _ in range(20):
                counts = ep.plan(torch.full((number + 1, 1), rank.rank), rank.world_size).counts
            found[number] = counts.tolist()

    with ThreadPoolExecutor(max_workers=2) as threads:
        list(threads.map(run, range(2)))
    assert found == {0: [1, 1], 1: [2, 2]}


@promise("mismatch")
@pytest.mark.parametrize("objects", [1, 2])
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_ranks_that_use_different_plans_are_found(rank: Rank, backend: str, objects: int) -> None:
    made = [ExpertParallel(backend=backend) for _ in range(objects)]
    first = made[0]
    plans = [made[to % objects].plan(torch.full((3, 1), to, device=rank.device), rank.world_size) for to in (0, 1)]
    x = torch.ones(3, 8, device=rank.device)
    assert first.dispatch(x, plans[0]).shape == first.dispatch(x, plans[1]).shape
    step = 5 if objects == 1 else 4
    words = f"rank {rank.rank} of 2: rank {1 - rank.rank} came to phase dispatch of step {step} with another call"
    with pytest.raises(CollectiveMismatchError, match=words):
        first.dispatch(x, plans[rank.rank == ODD])
    for ep in made:
        ep.close()


@on_ranks(2, pool="cpu_pool")
def test_a_functional_call_that_is_refused_counts_for_nothing(rank: Rank) -> None:
    arguments = call_of(rank.world_size)
    if rank.rank == ODD:
        with pytest.raises(ValueError, match="top_k"):
            sonic_ep.moe(**{**arguments, "top_k": 0}, backend="reference")
    counts = sonic_ep.moe(**arguments, backend="reference").tokens_per_expert
    assert int(counts.sum()) == rank.world_size * len(arguments["x"]) * arguments["top_k"]


def test_every_fact_of_a_call_is_in_its_digest() -> None:
    ids = torch.tensor([[0, 1]])
    with ExpertParallel(backend="reference") as ep:
        x, rows = torch.zeros(1, HIDDEN), torch.zeros(2, HIDDEN)
        plans = [ep.plan(ids, num_experts) for num_experts in (4, 4, 8)]
        trained, of_x = good_call()["router_w"].requires_grad_(), torch.zeros(5, HIDDEN, requires_grad=True)
        calls = [
            *(partial(ep.plan, *arguments) for arguments in ((ids, 4), (ids, 8), (ids[:, :1], 4))),
            *(partial(ep.dispatch, x, plan) for plan in plans),
            *(partial(ep.dispatch, other, plans[0]) for other in (x[:, :4], x.bfloat16())),
            *(partial(ep.combine, rows, torch.ones(1, 2), plan) for plan in plans[:2]),
            *(partial(ep.moe, **good_call(**one)) for one in ({}, {"router_w": trained}, {"x": of_x}, {"top_k": 1})),
            *(partial(ep.moe_routed, **routed(good_call(x=x), k)) for k in (1, 2)),
        ]

        def digest(call: Callable[[], object]) -> int:
            call()
            return ep._collectives.sync_tag.step.call

        assert len({digest(call) for call in calls}) == len(calls)
        assert digest(calls[0]) == digest(calls[0])


@promise("one-call")
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_a_signals_handler_that_calls_is_refused_and_harms_nothing(rank: Rank, backend: str) -> None:
    store, handled = dist.distributed_c10d._get_default_store(), f"{backend}: a signal was handled"
    refused: list[str] = []
    with ExpertParallel(backend=backend, max_tokens_per_rank=1) as ep:
        planned(ep, 2)

        def handler(*_: object) -> None:
            if not ep._collectives.call_lock._waiting or refused:
                return
            with pytest.raises(ConcurrentCallError) as raised:
                planned(ep, 2)
            refused.append(str(raised.value))
            store.set(handled, "1")

        if rank.rank == 0:
            before = signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.3, 0.3)
        else:
            store.wait([handled])
        assert planned(ep, 2).counts.tolist() == [2, 0]
        if rank.rank == 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            store.delete_key(handled)
            assert "got a call in the middle of a call" in refused[0]


class WithoutTextError(Exception):
    def __str__(self) -> str:
        raise KeyError("no text")


@promise("one-call")
@both_backends
@on_ranks(1)
def test_a_backward_takes_the_lock(rank: Rank, backend: str) -> None:
    """A backward in another thread, while this one is in a call and after. No error is hidden by that of a call."""
    x, weights, dy = layer_inputs(rank, CASES["uneven_tokens"])
    ep = ExpertParallel(backend=backend)
    y = ep.moe(x, *weights, CASES["uneven_tokens"].top_k).y

    def fail() -> None:
        with ep:
            raise KeyError("labels")

    with ep._call_guard.one():
        (refused,) = in_another_thread(lambda: y.backward(dy, retain_graph=True))
    assert "got a call while another thread is in one" in refused
    assert in_another_thread(lambda: y.backward(dy)) == []
    with ep._call_guard.one():
        assert in_another_thread(fail) == ["'labels'"]
    with pytest.raises(WithoutTextError), ExpertParallel(backend=backend):
        raise WithoutTextError


@pytest.mark.fast
@on_ranks(1, pool="cpu_pool")
def test_the_interpreter_runs_the_kernel_of_one_thread(rank: Rank) -> None:
    from sonic_ep.fast.launch import alone_in_this_process

    with ExpertParallel(backend="fast") as ep:
        with alone_in_this_process():
            (refused,) = in_another_thread(lambda: planned(ep, 1))
        assert refused.startswith("Triton's interpreter: got a kernel while another thread runs one")
        assert in_another_thread(lambda: planned(ep, 1)) == []
