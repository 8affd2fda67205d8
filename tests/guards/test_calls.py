"""Calls: the same on every rank or told which is not and in what, one at a time, in one process, with its place."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from calls import HELD, HIDDEN, INTERMEDIATE, call_of, good_call, with_trained_experts

import sonic_ep
from sonic_ep import CollectiveMismatchError, EPConfig, ExpertParallel
from sonic_ep.distributed.group import resolve_group
from sonic_ep.errors import PeerError
from sonic_ep.testing import Rank, RankPool, assert_bitwise

ODD = 1
# An exchange of words on a busy machine.
AT_ONCE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Oddity:
    """What the odd rank does otherwise, and how that is told: the fact, its own value and that of the others."""

    ep: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    method: Callable[[ExpertParallel, dict[str, Any]], object] | None = None
    fact: str
    odd: str
    usual: str


def wider(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of twice as many features."""
    doubled = {name: arguments[name].repeat(1, 2) for name in ("x", "router_w")}
    twice = {"w1": arguments["w1"].repeat(1, 1, 2), "w2": arguments["w2"].repeat(1, 2, 1)}
    return {**arguments, **doubled, **twice}


def of_more_experts(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, **{name: arguments[name].repeat_interleave(2, 0) for name in ("router_w", "w1", "w2")}}


def in_half(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def with_biases(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "b1": torch.zeros(HELD, 2 * INTERMEDIATE), "b2": torch.zeros(HELD, HIDDEN)}


def changed(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[ExpertParallel, dict[str, Any]], object]:
    return lambda ep, arguments: ep.moe(**change(arguments))


def planned(ep: ExpertParallel, arguments: dict[str, Any]) -> object:
    return ep.plan(torch.zeros(1, 1, dtype=torch.int64), arguments["router_w"].shape[0])


DEFAULTS = "EPConfig(dispatch='auto', combine='auto'"
ODDITIES = {
    "H": Oddity(method=changed(wider), fact="H", odd=str(2 * HIDDEN), usual=str(HIDDEN)),
    "dtype": Oddity(method=changed(in_half), fact="dtype", odd="torch.bfloat16", usual="torch.float32"),
    "K": Oddity(call={"top_k": 1}, fact="router", odd="RouterOptions(top_k=1,", usual="RouterOptions(top_k=2,"),
    "E": Oddity(method=changed(of_more_experts), fact="w1", odd="(4, 8, 8)", usual="(2, 8, 8)"),
    "activation": Oddity(call={"activation": "geglu"}, fact="activation", odd="geglu", usual="swiglu"),
    "gate layout": Oddity(call={"gate_layout": "concat"}, fact="gate_layout", odd="concat", usual="interleaved"),
    "biases": Oddity(method=changed(with_biases), fact="biases", odd="True", usual="False"),
    "training": Oddity(method=changed(with_trained_experts), fact="w1 trained", odd="True", usual="False"),
    "scores": Oddity(call={"norm_topk_probs": True}, fact="router", odd="RouterOptions(", usual="RouterOptions("),
    "call": Oddity(method=planned, fact="call", odd="plan", usual="moe"),
    "config": Oddity(ep={"config": EPConfig(max_rows=99)}, fact="config", odd=DEFAULTS, usual=DEFAULTS),
    "bound": Oddity(ep={"max_tokens_per_rank": 9}, fact="max_tokens_per_rank", odd="9", usual="8"),
    "backend": Oddity(ep={"backend": "fast"}, fact="backend", odd="fast", usual="reference"),
}


def refused(rank: Rank, group: dist.ProcessGroup, oddity: Oddity, check: bool) -> str:
    """What is said of a call that is odd on one rank."""
    odd = rank.rank == ODD
    common = {"backend": "reference", "max_tokens_per_rank": 8, "check_collective": check}
    ep = ExpertParallel(group, **{**common, **(oddity.ep if odd else {})})
    arguments = call_of(rank.world_size, **(oddity.call if odd else {}))
    began = time.monotonic()
    with pytest.raises(CollectiveMismatchError) as raised:
        oddity.method(ep, arguments) if odd and oddity.method else ep.moe(**arguments)
    assert time.monotonic() - began < AT_ONCE_SECONDS
    ep.close()
    return str(raised.value)


def all_refused(rank: Rank, check: bool) -> dict[str, str]:
    """Of every oddity, one after the other: all ranks hear of each, so they stay in step."""
    torch.manual_seed(rank.rank)
    group = dist.new_group(list(range(rank.world_size)))
    said = {name: refused(rank, group, oddity, check) for name, oddity in ODDITIES.items()}
    with ExpertParallel(group, backend="reference", check_collective=check) as ep:
        # As many tokens as a rank likes, and calls that nobody makes otherwise.
        out = ep.moe(**call_of(rank.world_size, x=torch.randn(rank.rank, HIDDEN)))
        assert out.y.shape == (rank.rank, HIDDEN)
        assert int(out.tokens_per_expert.sum()) == 2 * sum(range(rank.world_size))
    dist.destroy_process_group(group)
    return said


@pytest.mark.fast
@pytest.mark.parametrize("world_size", [2, 3])
def test_compared_calls_are_told_apart_in_words(cpu_pool: RankPool, world_size: int) -> None:
    others = " ".join(str(rank) for rank in range(world_size) if rank != ODD)
    for rank, said in enumerate(cpu_pool.run(all_refused, True, world_size=world_size)):
        for name, oddity in ODDITIES.items():
            assert said[name].startswith(f"rank {rank} of {world_size}: step 1: got calls that differ in ")
            facts = dict(part.split(": ", 1) for part in said[name].split(" differ in ")[1].split("; "))
            assert oddity.odd in facts[oddity.fact].split(f" on rank {ODD}")[0], said
            assert oddity.usual in facts[oddity.fact], said
            assert f" on rank {ODD}" in facts[oddity.fact]
            assert f" on rank{'s' if world_size > 2 else ''} {others}" in facts[oddity.fact]
            # Whoever is odd comes first, where most agree.
            assert world_size == 2 or facts[oddity.fact].startswith(oddity.odd)
            assert said[name].endswith(", expected the same call")


@pytest.mark.fast
def test_calls_that_are_not_compared_are_told_apart_all_the_same(cpu_pool: RankPool) -> None:
    for rank, said in enumerate(cpu_pool.run(all_refused, False, world_size=3)):
        other = 0 if rank == ODD else ODD
        for name, words in said.items():
            assert words.startswith(f"rank {rank} of 3: rank {other} came to phase "), (name, words)
            assert "check_collective=True tells which" in words or "did it skip a call" in words, (name, words)


def one_compares(rank: Rank) -> str:
    ep = ExpertParallel(backend="reference", check_collective=rank.rank == ODD)
    with pytest.raises(CollectiveMismatchError) as raised:
        planned(ep, call_of(rank.world_size))
    return str(raised.value)


def test_that_one_rank_alone_compares_is_found(cpu_pool: RankPool) -> None:
    said = cpu_pool.run(one_compares, world_size=2)
    assert said[0].startswith("rank 0 of 2: rank 1 came to phase check of step 1, expected phase meeting of step 1")
    assert said[1].startswith("rank 1 of 2: rank 0 came to phase meeting of step 1, expected phase check of step 1")


def too_many_on_one(rank: Rank, backend: str) -> tuple[str, list[int]]:
    """A rank that brought too many tokens calls again with fewer, while the others wait for it."""
    said = ""
    with ExpertParallel(backend=backend, max_tokens_per_rank=4) as ep:
        idx = torch.full((4 + (rank.rank == ODD), 1), rank.rank, device=rank.device)
        try:
            counts = ep.plan(idx, rank.world_size).counts
        except ValueError as error:
            said = str(error)
            counts = ep.plan(idx[:3], rank.world_size).counts
        again = ep.plan(idx[:2], rank.world_size).counts
        assert again.tolist() == [2] * rank.world_size
        routed_again(ep, rank)
        return said, counts.tolist()


def routed_again(ep: ExpertParallel, rank: Rank) -> None:
    """The same with the router."""
    arguments = call_of(rank.world_size)
    on_device = {k: v.to(rank.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    tokens = on_device.pop("x")[:1]
    if rank.rank == ODD:
        with pytest.raises(ValueError, match="tokens T: got 5, expected at most C=4"):
            ep.moe(tokens.expand(5, -1), **on_device)
    assert ep.moe(tokens, **on_device).tokens_per_expert.sum() == on_device["top_k"] * rank.world_size


@pytest.mark.parametrize("backend", ["reference", pytest.param("fast", marks=pytest.mark.fast)])
def test_who_brings_too_many_tokens_may_call_again(pool: RankPool, backend: str) -> None:
    found = pool.run(too_many_on_one, backend, world_size=2)
    assert [said for said, _ in found] == [
        "",
        "rank 1 of 2: tokens T: got 5, expected at most C=4 (max_tokens_per_rank): construct ExpertParallel with "
        "max_tokens_per_rank of at least 5, the same on every rank",
    ]
    assert [counts for _, counts in found] == [[4, 3]] * 2


def other_gradients(rank: Rank, backend: str, wanted: list[str]) -> str:
    """The odd rank asks for fewer gradients, so its backward meets the others less often; then it goes on."""
    group = dist.new_group(list(range(rank.world_size)))
    ep = ExpertParallel(group, backend=backend, timeout=5.0)
    arguments = call_of(rank.world_size)
    leaves = {name: value.requires_grad_() for name, value in arguments.items() if isinstance(value, torch.Tensor)}

    def use() -> None:
        y = ep.moe(**arguments).y
        torch.autograd.grad(y.sum(), [leaves[name] for name in (wanted if rank.rank == ODD else leaves)])
        ep.plan(torch.zeros(1, 1, dtype=torch.int64), rank.world_size)

    with pytest.raises(PeerError) as raised:
        use()
    ep._call_guard.detach()
    dist.barrier()
    return f"{raised.type.__name__}: {raised.value}"


@pytest.mark.parametrize(
    ("backend", "wanted", "phase"),
    [
        ("reference", ["w2"], "combine"),
        ("reference", ["w1", "w2"], "combine"),
        pytest.param("fast", ["w2"], "router", marks=pytest.mark.fast),
    ],
)
def test_a_rank_that_asks_for_fewer_gradients_is_found(
    cpu_pool: RankPool, backend: str, wanted: list[str], phase: str
) -> None:
    said = cpu_pool.run(other_gradients, backend, wanted, world_size=2)
    for rank, words in enumerate(said):
        assert words.startswith(f"CollectiveMismatchError: rank {rank} of 2: rank {1 - rank} came to phase ")
    assert f"expected phase backward ({phase}) of step 1" in said[0]


def all_but_the_routers_weight(rank: Rank, backend: str) -> None:
    """The odd rank asks for no gradient of router_w; its backward sums it all the same, with that of x."""
    arguments = call_of(rank.world_size)
    leaves = {name: value.requires_grad_() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    wanted = [name for name in leaves if name != "router_w" or rank.rank != ODD]
    with ExpertParallel(backend=backend, timeout=30) as ep:
        expected = torch.autograd.grad(ep.moe(**arguments).y.sum(), list(leaves.values()))
        found = torch.autograd.grad(ep.moe(**arguments).y.sum(), [leaves[name] for name in wanted])
    for name, gradient in zip(wanted, found, strict=True):
        assert_bitwise(gradient, dict(zip(leaves, expected, strict=True))[name], name)


@pytest.mark.parametrize("backend", ["reference", pytest.param("fast", marks=pytest.mark.fast)])
def test_a_rank_need_not_ask_for_the_gradient_of_the_router(cpu_pool: RankPool, backend: str) -> None:
    cpu_pool.run(all_but_the_routers_weight, backend, world_size=2)


class Meanwhile:
    """A second thread and what its calls came to, one after the other, while the first is in a call."""

    def __init__(self, *calls: Callable[[], object]) -> None:
        self.errors: list[str] = []
        self._call_guard = calls

    def __call__(self) -> None:
        thread = threading.Thread(target=self._run)
        thread.start()
        thread.join()

    def _run(self) -> None:
        for call in self._call_guard:
            try:
                call()
            except RuntimeError as error:
                self.errors.append(str(error))


def in_two_threads(rank: Rank, backend: str) -> list[str]:
    x = torch.ones(2, HIDDEN, device=rank.device)
    idx = torch.full((2, 1), rank.rank, device=rank.device)
    with ExpertParallel(backend=backend, max_tokens_per_rank=4) as ep:
        meanwhile = Meanwhile(lambda: ep.plan(idx, rank.world_size), lambda: ep.check(), lambda: ep.close())
        make = ep._backend.plan

        def interrupted(*arguments: Any, **options: Any) -> object:
            meanwhile()
            return make(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ep._backend, "plan", interrupted)
            plan = ep.plan(idx, rank.world_size)
        assert torch.equal(ep.dispatch(x, plan)[: plan.rows()], x)
    return meanwhile.errors


@pytest.mark.parametrize("backend", ["reference", pytest.param("fast", marks=pytest.mark.fast)])
def test_a_second_thread_is_refused_and_the_first_unharmed(pool: RankPool, backend: str) -> None:
    for rank, errors in enumerate(pool.run(in_two_threads, backend, world_size=2)):
        expected = f"rank {rank} of 2: ExpertParallel: got a call while another thread is in one"
        assert [error.startswith(expected) for error in errors] == [True] * 3


def threads_take_turns(rank: Rank) -> None:
    """Objects and groups of their own in threads of their own; and one object, one thread after another."""
    groups = [dist.new_group(list(range(rank.world_size))) for _ in range(2)]
    found: dict[int, list[int]] = {}

    def run(number: int) -> None:
        with ExpertParallel(groups[number], backend="reference") as ep:
            for _ in range(20):
                counts = ep.plan(torch.full((number + 1, 1), rank.rank), rank.world_size).counts
            found[number] = counts.tolist()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [1, 1], 1: [2, 2]}
    with ExpertParallel(backend="reference") as ep:
        meanwhile = Meanwhile(lambda: ep.plan(torch.full((1, 1), rank.rank), rank.world_size))
        meanwhile()
        meanwhile()
        assert meanwhile.errors == []
        assert resolve_group(None).rank == rank.rank


def test_threads_with_objects_of_their_own(cpu_pool: RankPool) -> None:
    cpu_pool.run(threads_take_turns, world_size=2)


def plans_of_one_shape(rank: Rank, backend: str) -> str:
    """Two plans of one shape, of which the odd rank takes the other."""
    with ExpertParallel(backend=backend) as ep:
        plans = [ep.plan(torch.full((3, 1), to, device=rank.device), rank.world_size) for to in (0, 1)]
        x = torch.ones(3, 8, device=rank.device)
        assert ep.dispatch(x, plans[0]).shape == ep.dispatch(x, plans[1]).shape
        with pytest.raises(CollectiveMismatchError) as raised:
            ep.dispatch(x, plans[rank.rank == ODD])
        ep._call_guard.detach()
    return str(raised.value)


def plans_of_two_objects(rank: Rank, backend: str) -> str:
    """Two objects' first plans, of one shape, of which the odd rank takes the other's."""
    objects = [ExpertParallel(backend=backend) for _ in range(2)]
    plans = [ep.plan(torch.full((3, 1), to, device=rank.device), rank.world_size) for to, ep in enumerate(objects)]
    x = torch.ones(3, 8, device=rank.device)
    assert objects[0].dispatch(x, plans[0]).shape == objects[0].dispatch(x, plans[1]).shape
    with pytest.raises(CollectiveMismatchError) as raised:
        objects[0].dispatch(x, plans[rank.rank == ODD])
    for ep in objects:
        ep._call_guard.detach()
    return str(raised.value)


@pytest.mark.parametrize("backend", ["reference", pytest.param("fast", marks=pytest.mark.fast)])
def test_ranks_that_use_plans_of_different_objects_are_found(cpu_pool: RankPool, backend: str) -> None:
    for rank, said in enumerate(cpu_pool.run(plans_of_two_objects, backend, world_size=2)):
        assert said.startswith(f"rank {rank} of 2: rank {1 - rank} came to phase dispatch of step 4 with another call")


@pytest.mark.parametrize("backend", ["reference", pytest.param("fast", marks=pytest.mark.fast)])
def test_ranks_that_use_different_plans_are_found(cpu_pool: RankPool, backend: str) -> None:
    for rank, said in enumerate(cpu_pool.run(plans_of_one_shape, backend, world_size=2)):
        assert said.startswith(f"rank {rank} of 2: rank {1 - rank} came to phase dispatch of step 5 with another call")


def functional_retried(rank: Rank, backend: str) -> list[int]:
    """A functional call that is refused on one rank counts for nothing."""
    arguments = call_of(rank.world_size)
    if rank.rank == ODD:
        with pytest.raises(ValueError, match="top_k"):
            sonic_ep.moe(**{**arguments, "top_k": 0}, backend=backend)
    return sonic_ep.moe(**arguments, backend=backend).tokens_per_expert.tolist()


def test_a_functional_call_that_is_refused_counts_for_nothing(cpu_pool: RankPool) -> None:
    first, second = cpu_pool.run(functional_retried, "reference", world_size=2)
    assert first == second


def test_every_fact_of_a_call_is_in_its_digest() -> None:
    """Calls that differ in one fact alone, also where no shape of what is moved tells them apart."""
    ids = torch.tensor([[0, 1]])
    with ExpertParallel(backend="reference") as ep:
        x, rows = torch.zeros(1, HIDDEN), torch.zeros(2, HIDDEN)
        plans = [ep.plan(ids, 4), ep.plan(ids, 4), ep.plan(ids, 8), ep.plan(ids[:, :1], 4)]
        trained = good_call()["router_w"].requires_grad_()
        routed = {k: v for k, v in good_call().items() if k not in ("router_w", "top_k")}
        routed["x"] = x
        one, two = ({"topk_idx": ids[:, :k], "topk_scores": torch.ones(1, k)} for k in (1, 2))
        calls = [
            lambda: ep.plan(ids, 4),
            lambda: ep.plan(ids, 8),
            lambda: ep.plan(ids[:, :1], 4),
            lambda: ep.dispatch(x, plans[0]),
            lambda: ep.dispatch(x, plans[1]),
            lambda: ep.dispatch(x, plans[2]),
            lambda: ep.dispatch(x[:, :4], plans[0]),
            lambda: ep.dispatch(x.bfloat16(), plans[0]),
            lambda: ep.combine(rows, torch.ones(1, 2), plans[0]),
            lambda: ep.combine(rows, torch.ones(1, 2), plans[1]),
            lambda: ep.moe(**good_call()),
            lambda: ep.moe(**good_call(router_w=trained)),
            lambda: ep.moe(**good_call(top_k=1)),
            lambda: ep.moe_routed(**routed, **one),
            lambda: ep.moe_routed(**routed, **two),
        ]
        digests = []
        for call in calls:
            call()
            digests.append(ep._collectives.sync_tag.step.call)
        assert len(set(digests)) == len(calls)
        calls[0]()
        assert ep._collectives.sync_tag.step.call == digests[0]
