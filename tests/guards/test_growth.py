"""Without ``max_tokens_per_rank`` ranks agree on C in each call, by host memory or by the process group."""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from backends import both_backends
from lives import HIDDEN, TOP_K, layer_of
from new_group import own_process_group, without_haste
from on_ranks import on_ranks
from programs import run_program
from promises import promise
from same import assert_same_bits
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.distributed import collectives, mailbox, max_tokens, rank_status
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.sync_tag import Step, SyncTag
from sonic_ep.errors import PeerError
from sonic_ep.testing import Rank

ODD = 1
# T of two ranks in call after call: longer on one rank, then on the other, none, shorter, and longer again.
BATCHES = [(1, 2), (3, 1), (0, 0), (2, 1), (0, 5)]
MOST = 5
FLAGS = EPConfig(redispatch_x_in_backward=True, dispatch="all_gather", cpu_sync_on_runtime=True)
CONFIGS = [pytest.param(EPConfig(), id="plain"), pytest.param(FLAGS, id="flags", marks=pytest.mark.thorough)]


def batch(rank: Rank, number: int) -> list[Tensor]:
    return layer_of(rank, seed=number, tokens=BATCHES[number][rank.rank])


def trained(ep: ExpertParallel, rank: Rank, *, again: bool | None = None) -> list[Tensor]:
    """Results and gradients of all batches: all forwards, then all backwards. again: checkpointed, reentrant or not."""
    leaves = [batch(rank, number) for number in range(len(BATCHES))]

    def layer(*given: Tensor) -> Tensor:
        return ep.moe(*given, TOP_K).y

    outs = [layer(*of) if again is None else checkpoint(layer, *of, use_reentrant=again) for of in leaves]
    for y in outs:
        y.square().sum().backward()
    return [y.detach() for y in outs] + [leaf.grad for of in leaves for leaf in of]


@contextmanager
def without_a_mailbox(rank: Rank) -> Iterator[None]:
    """One rank cannot map the others' pages, as on another machine."""
    with pytest.MonkeyPatch.context() as patch:
        if rank.rank == ODD:
            patch.setattr(mailbox, "_page_of", lambda offer: None)
        yield


OTHER_RECOMPUTES = [("reference", False), ("fast", True)]


@promise("growth")
@pytest.mark.parametrize("config", CONFIGS)
@both_backends
@on_ranks(2)
def test_longer_batches_are_agreed_on_and_change_no_bit(rank: Rank, backend: str, config: EPConfig) -> None:
    """Forwards of growing batches, then their backwards; as with room for the most from the beginning."""
    with ExpertParallel(backend=backend, config=config, max_tokens_per_rank=MOST) as large:
        expected = trained(large, rank)
    with ExpertParallel(backend=backend, config=config) as ep:
        assert_same_bits(trained(ep, rank), expected)
        assert ep._max_tokens._mailbox is not None


@promise("growth")
@pytest.mark.parametrize(
    ("backend", "reentrant"),
    [("reference", True), ("fast", False), *(pytest.param(*o, marks=pytest.mark.thorough) for o in OTHER_RECOMPUTES)],
)
@on_ranks(2)
def test_recompute_makes_the_plan_of_its_forward_again(rank: Rank, backend: str, reentrant: bool) -> None:
    """Though longer batches came between, and shorter ones."""
    with ExpertParallel(backend=backend) as ep:
        expected = trained(ep, rank)
        assert_same_bits(trained(ep, rank, again=reentrant), expected)


@promise("growth")
@pytest.mark.parametrize("shared_memory", [True, False])
@both_backends
@on_ranks(2)
def test_each_plan_keeps_its_own_bound(rank: Rank, backend: str, shared_memory: bool) -> None:
    """Also without a mailbox. Plans are used after larger and smaller ones were made."""

    def there_and_back(ep: ExpertParallel) -> list[Tensor]:
        plans = []
        for counts in BATCHES:
            experts = 2 * rank.world_size
            idx = torch.arange(counts[rank.rank] * 2, device=rank.device).view(-1, 2) % experts
            plans.append(ep.plan(idx, experts))
        bounds.append([plan.max_tokens for plan in plans])
        found = []
        for plan in plans[::-1]:
            x = layer_of(rank, tokens=plan.num_tokens)[0]
            scores = torch.full((plan.num_tokens, 2), 0.5, device=rank.device)
            y = ep.combine(ep.dispatch(x, plan), scores, plan)
            y.sum().backward()
            found += [y.detach(), x.grad]
        return found

    bounds: list[list[int]] = []
    with ExpertParallel(backend=backend, max_tokens_per_rank=MOST) as large:
        expected = there_and_back(large)
    if shared_memory:
        with ExpertParallel(backend=backend) as ep:
            found = there_and_back(ep)
    else:
        with without_a_mailbox(rank), ExpertParallel(backend=backend) as ep:
            found = there_and_back(ep)
            assert ep._max_tokens._mailbox is None
    assert_same_bits(found, expected)
    assert bounds == [[MOST] * len(BATCHES), [max(counts) for counts in BATCHES]]


def test_a_bound_that_is_given_exchanges_nothing() -> None:
    held = Mock()
    fixed = max_tokens.max_tokens_of(held, 4)
    assert fixed.agree(torch.zeros(3, 1)) == 4
    assert [name for name, *_ in held.method_calls] == []


@promise("growth")
def test_a_captured_graph_takes_what_eager_calls_have_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls alike, with and without gradients. No rank is asked."""
    held = Mock(group=EPGroup(rank=0, world_size=2))
    agreed = max_tokens.AgreedMaxTokens(held)
    tokens = {number: Mock(shape=(number, 8), is_cuda=True) for number in (3, 5, 6)}
    for call, number in ((6, 3), (7, 5), (8, 6), (6, 3)):
        held.tag = Step(call=call).bits
        monkeypatch.setattr(agreed, "_numbers", lambda own: [0, own])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert agreed.agree(tokens[number]) == number
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(agreed, "_numbers", Mock(side_effect=AssertionError))
    assert agreed.agree(tokens[3]) == agreed.agree(tokens[5]) == 5
    with pytest.raises(ValueError, match="rank 0 of 2: tokens T: got 6, expected at most C=5 in graph capture: run"):
        agreed.agree(tokens[6])


@promise("growth", "graphs")
@on_ranks(2, pool="cuda_pool")
def test_a_longer_batch_in_capture_is_refused_by_name(rank: Rank) -> None:
    x, *weights = (tensor.bfloat16().detach() for tensor in layer_of(rank, hidden=64, tokens=7))
    with ExpertParallel(backend="fast") as ep, torch.no_grad():
        for number in (3, 4, 2):
            expected = ep.moe(x[:number], *weights, TOP_K).y
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ep.moe(x[:2], *weights, TOP_K).y
        graph.replay()
        assert_same_bits([y], [expected])
        refused = pytest.raises(ValueError, match="tokens T: got 7, expected at most C=4 in graph capture")
        with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
            ep.moe(x, *weights, TOP_K)


@promise("growth", "usable-after-errors")
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_more_tokens_in_backward_than_in_forward_are_refused_on_every_rank(rank: Rank, backend: str) -> None:
    x, *weights = layer_of(rank)
    runs = []
    with ExpertParallel(backend=backend) as ep:

        def layer(x: Tensor) -> Tensor:
            runs.append(x)
            longer = len(runs) > 1 and rank.rank == ODD
            return ep.moe(torch.cat([x, x]) if longer else x, *weights, TOP_K).y[: len(x)]

        y = checkpoint(layer, x, use_reentrant=True)
        with pytest.raises(ValueError, match="tokens T: got 6, expected at most C=3 in backward: activation"):
            y.sum().backward()
        assert ep.moe(torch.cat([x, x, x]), *weights, TOP_K).y.isfinite().all()


@promise("mismatch")
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_another_call_while_a_rank_waits_for_tokens_is_found(rank: Rank, backend: str) -> None:
    """A rank that makes a plan, and one that dispatches."""
    x = torch.ones(3, HIDDEN)
    with own_process_group(rank) as group, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_status, "ANSWER_SECONDS", 60.0)
        ep = ExpertParallel(group, backend=backend, timeout=100.0)
        without_haste(ep._collectives)
        for _ in range(3):
            plan = ep.plan(torch.full((3, 1), rank.rank), rank.world_size)
        # From now on it waits in kernels, on the fast backend.
        ep.dispatch(x, plan)
        began = time.monotonic()
        # One of them may hear first that the other has found it.
        words = rf"rank {rank.rank} of 2: rank {1 - rank.rank} (came to|left \(CollectiveMismatchError.* came to) phase"
        with pytest.raises(PeerError, match=words) as raised:
            ep.dispatch(x, plan) if rank.rank == ODD else ep.plan(torch.full((3, 1), 0), rank.world_size)
        assert time.monotonic() - began < 50
        assert all(f"phase {phase} of step 5" in str(raised.value) for phase in ("dispatch", "tokens"))
        ep.close()


@promise("ended-object")
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_an_interrupt_while_a_rank_waits_for_tokens_is_told(rank: Rank, backend: str) -> None:
    idx = torch.full((3, 1), rank.rank)
    with own_process_group(rank) as group, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_status, "ANSWER_SECONDS", 60.0)
        ep = ExpertParallel(group, backend=backend, timeout=100.0)
        for _ in range(3):
            ep.plan(idx, rank.world_size)
        if rank.rank == ODD:
            before = signal.signal(signal.SIGALRM, Mock(side_effect=KeyboardInterrupt))
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                ep.plan(idx, rank.world_size)
            signal.signal(signal.SIGALRM, before)
        else:
            while ODD not in ep._collectives._status_store.statuses():
                time.sleep(0.05)
            with pytest.raises(PeerError, match=r"rank 1 left \(KeyboardInterrupt"):
                ep.plan(idx, rank.world_size)
        ep.close()


KILLED = """
import os, signal, sys, time, torch, torch.distributed as dist, sonic_ep.testing
from sonic_ep import ExpertParallel, PeerLostError

rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
ep = ExpertParallel(backend=sys.argv[3], timeout=1200)
for _ in range(3):
    ep.plan(torch.zeros(4, 1, dtype=torch.int64), 2)
if rank == 1:
    print("process", os.getpid(), flush=True)
    signal.raise_signal(signal.SIGKILL)
try:
    ep.plan(torch.zeros(4, 1, dtype=torch.int64), 2)
except PeerLostError as error:
    print(error, flush=True)
"""


@promise("lost-rank")
@pytest.mark.parametrize("backend", ["reference", pytest.param("fast", marks=pytest.mark.thorough)])
def test_a_process_that_died_is_named_within_seconds(backend: str, tmp_path: Path) -> None:
    (_, first), (_, odd) = run_program(tmp_path, KILLED, *([rank, str(tmp_path / "store"), backend] for rank in "01"))
    (number,) = re.findall(r"process (\d+)", odd)
    said = f"rank 0 of 2: rank 1 (process {number}) has died while it was waited for in phase tokens of step 4"
    assert said in first, first


def test_a_word_of_an_earlier_round_is_not_taken_for_this_one() -> None:
    """Two ranks in one process. In the third round the first round's words are still there. A number is cut off."""
    pages = [bytearray(mailbox.KEY_AT) for _ in range(2)]
    absent: list[list[int]] = []

    def box(rank: int) -> mailbox.Mailbox:
        held: Any = Mock(group=EPGroup(rank=rank, world_size=2), wait_for=lambda look, phase: absent.append(look()))
        return mailbox.Mailbox(held, pages)  # type: ignore[arg-type]

    first, second = box(0), box(1)
    first.numbers(7)
    assert second.numbers(8) == [7, 8]
    second.numbers(2**40)
    assert first.numbers(9) == [9, 2**32 - 1]
    first.numbers(1)
    assert second.numbers(0) == [1, 0]
    assert absent == [[1], [], [0], [], [1], []]


def test_a_page_of_another_machine_or_of_another_owner_is_not_read() -> None:
    """Else a number of a process that has taken its place might be taken for a rank's."""
    with ExitStack() as stack:
        page, offer = mailbox._own_page(stack)
        assert page is not None
        assert mailbox._page_of(offer) is not None
        elsewhere = replace(offer.process, machine="another")
        for other in (replace(offer, key=bytes(mailbox.KEY_BYTES)), replace(offer, process=elsewhere)):
            assert mailbox._page_of(other) is None


@on_ranks(2, pool="cpu_pool")
def test_a_late_rank_is_announced_and_waited_for(rank: Rank) -> None:
    """A second late, in the exchange of tokens: longer than a rank waits without a word."""
    with ExpertParallel(backend="reference") as ep:
        idx = torch.zeros(2, 1, dtype=torch.int64)
        for _ in range(2):
            ep.plan(idx, rank.world_size)
        held: BoundedCollectives = ep._collectives
        while rank.rank == ODD and 0 not in held._status_store.statuses():
            time.sleep(collectives.ANNOUNCE_SECONDS / 20)
        assert ep.plan(idx, rank.world_size).max_tokens == 2
        if rank.rank == ODD:
            status = held._status_store.statuses()[0]
            assert SyncTag.decode(status.tag) == SyncTag(step=held.step, phase=collectives.Phase.TOKENS)
