"""Shared memory: every transport, its poison, its growth, and the meetings that keep reuse in order."""

import time

import pytest
import torch
import torch.distributed as dist
from host_files import lasting_files

from sonic_ep import ClosedError, ExpertParallel
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.errors import CollectiveMismatchError, PeerTimeoutError, SharedMemoryError
from sonic_ep.testing import Rank, RankError, RankPool

pytestmark = pytest.mark.fast


def make_workspace(rank: Rank, process_group: dist.ProcessGroup | None = None, timeout: float = 60.0):
    from sonic_ep.fast.workspace import Workspace

    group = resolve_group(process_group)
    return Workspace(group, rank.device, collectives=BoundedCollectives(group, timeout))


def exchanged_bytes(rank: Rank) -> None:
    workspace = make_workspace(rank)
    buffer = workspace.reserve("numbers", 1000)
    assert buffer.nbytes >= 1000
    assert bool((buffer.local == 0xFF).all()), "fresh memory is poisoned"
    assert buffer.rows(rank.rank, (4,), torch.float32).isnan().all()
    for iteration in range(6):
        # Whoever comes late must neither lose a number nor find one of the next iteration.
        if rank.rank == iteration % rank.world_size:
            time.sleep(0.02)
        workspace.enter()
        workspace.barrier_before_write()
        buffer.rows(rank.rank, (4,), torch.int32).fill_(100 * iteration + rank.rank)
        workspace.barrier_after_write()
        for other in range(rank.world_size):
            assert buffer.rows(other, (4,), torch.int32).tolist() == [100 * iteration + other] * 4
    workspace.close()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_reads_what_every_rank_wrote(pool: RankPool, world_size: int) -> None:
    pool.run(exchanged_bytes, world_size=world_size)


class Counter:
    """Takes numbers ``step`` apart, and counts how many."""

    def __init__(self, first: int, step: int) -> None:
        self.last, self._step, self.taken = first - step, step, 0

    def __call__(self) -> int:
        self.taken += 1
        self.last += self._step
        return self.last


def brought_in_step(rank: Rank, first: list[int]) -> tuple[int, int]:
    from sonic_ep.fast.symmetric_memory import keep_in_step

    counter = Counter(first[rank.rank], 2)
    keep_in_step(BoundedCollectives(resolve_group(None)), counter)
    return counter.last, counter.taken


@pytest.mark.parametrize(
    ("first", "expected"), [([4, 8, 6], [(8, 3), (8, 1), (8, 2)]), ([5, 5, 5], [(5, 1), (5, 1), (5, 1)])]
)
def test_ranks_take_numbers_until_they_are_in_step(
    cpu_pool: RankPool, first: list[int], expected: list[tuple[int, int]]
) -> None:
    assert cpu_pool.run(brought_in_step, first, world_size=3) == expected


def test_ranks_that_cannot_come_in_step_say_so(cpu_pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"numbers of rendezvous differ: 8 on rank 0, 7 on rank 1"):
        cpu_pool.run(brought_in_step, [4, 7], world_size=2)


def of_unequal_sizes(rank: Rank) -> str:
    workspace = make_workspace(rank)
    with pytest.raises(SharedMemoryError) as raised:
        workspace.reserve("rows", 512 * (1 + rank.rank))
    workspace.close()
    return str(raised.value)


def test_ranks_that_ask_for_unequal_sizes_hear_of_it(cpu_pool: RankPool) -> None:
    for rank, said in enumerate(cpu_pool.run(of_unequal_sizes, world_size=2)):
        assert said == f"rank {rank} of 2: shared memory: bytes differ: 512 on rank 0, 1024 on rank 1"
    assert lasting_files() == []


def shared_by_some_then_by_all(rank: Rank) -> None:
    """Groups with other members, and with other numbers of buffers, before one group of all."""
    first, second = dist.new_group([0, 1]), dist.new_group([1, 2])
    for members, buffers in ((first, 3), (second, 1)):
        if dist.get_rank(members) >= 0:
            workspace = make_workspace(rank, members)
            for number in range(buffers):
                workspace.reserve(f"buffer {number}", 8)
            workspace.close()
    exchanged_bytes(rank)


def test_ranks_that_shared_in_other_groups_before(pool: RankPool) -> None:
    pool.run(shared_by_some_then_by_all, world_size=3)


def gathered_through_the_table(rank: Rank) -> None:
    from sonic_ep.fast.collectives import gather_kernel
    from sonic_ep.fast.launch import launch

    workspace = make_workspace(rank)
    numbers = workspace.reserve("numbers", 12)
    numbers.rows(rank.rank, (3,), torch.int32).copy_(torch.arange(3, dtype=torch.int32) + 10 * rank.rank)
    workspace.barrier_after_write()
    found = torch.empty(rank.world_size, 3, dtype=torch.int32, device=rank.device)
    launch(gather_kernel, (1, rank.world_size), numbers.addresses, found, 3, device=rank.device, BLOCK=4)
    assert found.tolist() == [[10 * other + i for i in range(3)] for other in range(rank.world_size)]
    workspace.barrier_before_write()
    workspace.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_kernels_find_peers_through_the_table(pool: RankPool, world_size: int) -> None:
    pool.run(gathered_through_the_table, world_size=world_size)


def grown(rank: Rank) -> None:
    workspace = make_workspace(rank)
    small = workspace.reserve("rows", 100)
    assert workspace.reserve("rows", small.nbytes) is small
    assert workspace.reserve("others", 100) is not small
    large = workspace.reserve("rows", small.nbytes + 1)
    assert large is not small
    assert large.nbytes > small.nbytes
    assert bool((large.local == 0xFF).all())
    assert workspace.reserve("rows", 1) is large
    workspace.enter()
    large.local.fill_(rank.rank)
    workspace.barrier_after_write()
    assert [int(bytes_[-1]) for bytes_ in large.by_rank] == list(range(rank.world_size))
    workspace.barrier_before_write()
    workspace.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_buffer_grows_and_never_shrinks(pool: RankPool, world_size: int) -> None:
    pool.run(grown, world_size=world_size)


def left_alone(rank: Rank, absent: int) -> str:
    workspace = make_workspace(rank, timeout=0.25)
    workspace.enter()
    if rank.rank == absent:
        time.sleep(1)
        return ""
    with pytest.raises(PeerTimeoutError) as raised:
        workspace.barrier_after_write()
    with pytest.raises(PeerTimeoutError):
        workspace.enter()
    return str(raised.value)


def test_a_wait_is_bounded_and_names_the_rank(cpu_pool: RankPool) -> None:
    """On the CPU; on a GPU the kernel traps, which ends the process's use of the GPU, and so of the pool."""
    message = cpu_pool.run(left_alone, 1, world_size=2)[0]
    assert message.startswith("rank 0 of 2: waited 0.25 s for rank 1 in phase sync of step 0; did it fail")
    cpu_pool.stop()


def combining_alone(rank: Rank, absent: int) -> str:
    """The wait inside a combine: the other rank has planned and dispatched, and then goes another way."""
    ep = ExpertParallel(backend="fast", max_tokens_per_rank=4)
    idx = torch.tensor([[0, 1]] * 4, device=rank.device)
    plan = ep.plan(idx, num_experts=2)
    rows = ep.dispatch(torch.ones(4, 8, device=rank.device), plan).detach()
    workspace = ep._backend._context(rank.device).workspace
    with torch.no_grad():
        ep.combine(rows, torch.ones(4, 2, device=rank.device), plan)
        if rank.rank == absent:
            with pytest.MonkeyPatch.context() as patch:
                # It meets the others as a combine does, but sends nothing.
                patch.setattr(workspace, "run_waiting", lambda *_, **__: time.sleep(1))
                ep.combine(rows, torch.ones(4, 2, device=rank.device), plan)
            return ""
        ep._collectives.timeout = 0.25
        with pytest.raises(PeerTimeoutError) as raised:
            ep.combine(rows, torch.ones(4, 2, device=rank.device), plan)
    with pytest.raises(ClosedError, match="this ExpertParallel has ended: PeerTimeoutError: rank 0 of 2: waited"):
        ep.dispatch(rows, plan)
    ep.close()
    return str(raised.value)


def test_a_wait_inside_a_combine_is_bounded_too(cpu_pool: RankPool) -> None:
    message = cpu_pool.run(combining_alone, 1, world_size=2)[0]
    assert "for rank 1 in phase combine of step" in message
    cpu_pool.stop()


def reserved_in_capture(rank: Rank) -> str:
    workspace = make_workspace(rank)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError) as raised, torch.cuda.graph(graph):
        workspace.reserve("rows", 100)
    return str(raised.value)


def test_memory_cannot_be_shared_during_capture(cuda_pool: RankPool) -> None:
    for message in cuda_pool.run(reserved_in_capture, world_size=2):
        assert "expected 100 before graph capture" in message


def wrong_device(rank: Rank) -> None:
    from sonic_ep.fast import backend as layer

    def asked(seen: bool) -> str:
        with pytest.MonkeyPatch.context() as patch, ExpertParallel(backend="fast") as ep:
            patch.setattr(layer, "interpreted", lambda: seen)
            with pytest.raises(ValueError, match="device: got") as raised:
                ep.plan(torch.zeros(1, 1, dtype=torch.int64, device=rank.device), rank.world_size)
            return str(raised.value)

    expected = "the CPU under Triton's interpreter" if rank.device.type == "cuda" else "CUDA devices"
    assert asked(rank.device.type == "cuda").endswith(
        f"expected one of {expected} for backend 'fast' (backend='reference' takes others)"
    )


def test_a_device_without_kernels_is_refused(pool: RankPool) -> None:
    pool.run(wrong_device, world_size=1)


def barrier_alone(rank: Rank, shown: list[int], seconds: float) -> tuple[list[int], float]:
    """What the kernel of rank 0 of three writes where its peers have shown these tags, and how long it takes."""
    from sonic_ep.fast.launch import launch
    from sonic_ep.fast.sync import barrier_kernel

    flags = [torch.zeros(3, dtype=torch.int64) for _ in range(3)]
    flags[0][1:] = torch.tensor(shown)
    addresses = torch.tensor([tensor.data_ptr() for tensor in flags])
    words = torch.zeros(4, dtype=torch.int64)
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_DEBUG", "0")
        arguments = (addresses, 3, words, 0, HERE, int(seconds * 1e9))
        launch(barrier_kernel, (6,), *arguments, device=rank.device, debug=False, num_warps=1)
    return words.tolist(), time.monotonic() - began


HERE, ELSEWHERE_TAG = 2**32 + 7, 2**33 + 9


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ([HERE, HERE], [0, 0, 0, 0]),
        ([HERE, 0], [1, 3, HERE, 0]),
        ([0, 0], [1, 2, HERE, 0]),
        ([ELSEWHERE_TAG, 0], [2, 2, HERE, ELSEWHERE_TAG]),
        ([0, ELSEWHERE_TAG], [1, 2, HERE, 0]),
    ],
)
def test_who_is_told_by_a_meeting_that_fails(cpu_pool: RankPool, shown: list[int], expected: list[int]) -> None:
    """The first to give up tells, and after it nobody else takes its time; another tag is not waited for at all."""
    ((words, took),) = cpu_pool.run(barrier_alone, shown, WAIT_SECONDS, world_size=1)
    assert words == expected
    collectives = 1 if expected[0] == 1 else 0
    assert took < (collectives + 0.9) * WAIT_SECONDS


WAIT_SECONDS = 1.0


def fence_meets_publish(rank: Rank) -> str:
    workspace = make_workspace(rank)
    workspace.enter()
    with pytest.raises(CollectiveMismatchError) as raised:
        (workspace.barrier_before_write if rank.rank == 0 else workspace.barrier_after_write)()
    return str(raised.value)


def test_who_has_written_is_not_taken_for_who_has_read(cpu_pool: RankPool) -> None:
    for rank, said in enumerate(cpu_pool.run(fence_meets_publish, world_size=2)):
        assert said.startswith(f"rank {rank} of 2: rank {1 - rank} came to phase sync of step 0, expected phase")


def closed(rank: Rank) -> None:
    workspace = make_workspace(rank)
    workspace.close()
    for call in (workspace.enter, lambda: workspace.reserve("rows", 8)):
        with pytest.raises(ClosedError, match="got a call after close"):
            call()


def test_nothing_is_shared_after_close(cpu_pool: RankPool) -> None:
    cpu_pool.run(closed, world_size=1)
