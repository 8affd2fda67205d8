"""Shared memory: every transport, its poison, its growth, and the barriers that order its reuse."""

import time
from itertools import count

import pytest
import torch
import torch.distributed as dist
from limits import HANG_SECONDS
from on_ranks import on_ranks
from promises import promise
from workspaces import assert_every_rank_reads, new_workspace, workspace_of

from sonic_ep import ClosedError, ExpertParallel
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import resolve_group
from sonic_ep.errors import CollectiveMismatchError, PeerTimeoutError, SharedMemoryError
from sonic_ep.testing import Rank, RankPool

pytestmark = pytest.mark.fast


@on_ranks(1, 2, 3, pytest.param(4, marks=pytest.mark.thorough))
def test_every_rank_reads_what_every_rank_wrote(rank: Rank) -> None:
    with workspace_of(rank) as workspace:
        buffer = workspace.reserve("numbers", 1000)
        assert buffer.nbytes >= 1000
        assert bool((buffer.local == 0xFF).all()), "fresh memory is poisoned"
        assert buffer.rows(rank.rank, (4,), torch.float32).isnan().all()
        for iteration in range(6):
            # A late rank must neither lose a number nor find one of the next iteration.
            if rank.rank == iteration % rank.world_size:
                time.sleep(0.02)
            workspace.enter()
            workspace.barrier_before_write()
            buffer.rows(rank.rank, (4,), torch.int32).fill_(100 * iteration + rank.rank)
            workspace.barrier_after_write()
            for other in range(rank.world_size):
                assert buffer.rows(other, (4,), torch.int32).tolist() == [100 * iteration + other] * 4


@on_ranks(3)
def test_ranks_that_shared_memory_in_other_groups_before(rank: Rank) -> None:
    """Groups of other members and with other numbers of buffers, before one group of all."""
    for members, buffers in ((dist.new_group([0, 1]), 3), (dist.new_group([1, 2]), 1)):
        if dist.get_rank(members) >= 0:
            workspace = new_workspace(rank, members)
            for number in range(buffers):
                workspace.reserve(f"buffer {number}", 8)
            workspace.close()
    test_every_rank_reads_what_every_rank_wrote.body(rank)


@on_ranks(3, pool="cpu_pool")
def test_ranks_take_numbers_until_they_are_in_step_or_raise(rank: Rank) -> None:
    from sonic_ep.fast.symmetric_memory import keep_in_step

    collectives = BoundedCollectives(resolve_group(None))
    # Numbers 2 apart, and the last that every rank takes.
    for first, last in (((4, 8, 6), 8), ((5, 5, 5), 5)):
        numbers = count(first[rank.rank], 2)
        keep_in_step(collectives, numbers.__next__)
        assert next(numbers) - 2 == last
    with pytest.raises(RuntimeError, match=r"\b9 on rank 1, 8 on ranks 0, 2"):
        keep_in_step(collectives, count((4, 7, 8)[rank.rank], 2).__next__)


@on_ranks(2, pool="cpu_pool")
def test_unequal_sizes_are_refused_on_all_ranks(rank: Rank) -> None:
    refused = pytest.raises(SharedMemoryError, match=rf"^rank {rank.rank} of 2: .*512 on rank 0, 1024 on rank 1")
    with workspace_of(rank) as workspace, refused:
        workspace.reserve("rows", 512 * (1 + rank.rank))


@on_ranks(1, 3)
def test_a_buffer_grows_and_never_shrinks_and_is_gone_after_close(rank: Rank) -> None:
    with workspace_of(rank) as workspace:
        small = workspace.reserve("rows", 100)
        assert workspace.reserve("rows", small.nbytes) is small
        assert workspace.reserve("others", 100) is not small
        large = workspace.reserve("rows", small.nbytes + 1)
        assert large.nbytes > small.nbytes
        assert bool((large.local == 0xFF).all())
        assert workspace.reserve("rows", 1) is large
        assert_every_rank_reads(workspace, large)
    for call in (workspace.enter, lambda: workspace.reserve("rows", 8)):
        with pytest.raises(ClosedError, match="got a call after close"):
            call()


def combine_without_rank_1(rank: Rank) -> None:
    """Rank 1 has planned and dispatched, but sends nothing in its second combine."""
    ep = ExpertParallel(backend="fast", max_tokens_per_rank=4)
    plan = ep.plan(torch.tensor([[0, 1]] * 4, device=rank.device), num_experts=2)
    rows = ep.dispatch(torch.ones(4, 8, device=rank.device), plan).detach()
    scores = torch.ones(4, 2, device=rank.device)
    ep.combine(rows, scores, plan)
    if rank.rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            workspace = ep._backend._context(rank.device).workspace
            patch.setattr(workspace, "run_waiting", lambda *_, **__: time.sleep(1))
            ep.combine(rows, scores, plan)
        return
    ep._collectives.timeout = 0.25
    with pytest.raises(PeerTimeoutError, match=r"^rank 0 of 2: .* for rank 1 in phase combine of step"):
        ep.combine(rows, scores, plan)
    with pytest.raises(ClosedError, match=r"PeerTimeoutError: rank 0 of 2: waited 0\.25 s"):
        ep.dispatch(rows, plan)
    ep.close()


# On the CPU: on a GPU the kernel traps, which ends the process's use of the GPU, and so of the pool.
@promise("bounded-waits")
def test_a_wait_inside_a_combine_is_bounded_and_names_the_rank(cpu_pool: RankPool) -> None:
    cpu_pool.run(combine_without_rank_1, world_size=2)
    cpu_pool.stop()


@on_ranks(2, pool="cuda_pool")
def test_memory_cannot_be_shared_during_capture(rank: Rank) -> None:
    workspace, graph = new_workspace(rank), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="expected 100 before graph capture"), torch.cuda.graph(graph):
        workspace.reserve("rows", 100)


@on_ranks(1)
def test_a_device_without_kernels_is_refused(rank: Rank) -> None:
    on_gpu = rank.device.type == "cuda"
    devices = "the CPU under Triton's interpreter" if on_gpu else "CUDA devices"
    with pytest.MonkeyPatch.context() as patch, ExpertParallel(backend="fast") as ep:
        patch.setattr("sonic_ep.fast.backend.interpreted", lambda: on_gpu)
        with pytest.raises(ValueError, match=f"device: got .*, expected one of {devices} for backend 'fast'"):
            ep.plan(torch.zeros(1, 1, dtype=torch.int64, device=rank.device), rank.world_size)


WAIT_SECONDS, TAG, OTHER_TAG = 2, 2**32 + 7, 2**33 + 9
# Both come, one late, both late, another tag first, another tag after a timeout.
RECORDED = {
    (TAG, TAG): [0, 0, 0, 0],
    (TAG, 0): [1, 3, TAG, 0],
    (0, 0): [1, 2, TAG, 0],
    (OTHER_TAG, 0): [2, 2, TAG, OTHER_TAG],
    (0, OTHER_TAG): [1, 2, TAG, 0],
}


@promise("bounded-waits")
@on_ranks(1, pool="cpu_pool")
def test_a_barrier_records_the_first_failure(rank: Rank) -> None:
    """Rank 0 of three, whose peers show these tags. One wait times out, and none where the tag is another."""
    from sonic_ep.fast.launch import launch
    from sonic_ep.fast.sync import barrier_kernel

    for shown, expected in RECORDED.items():
        flags = [torch.zeros(3, dtype=torch.int64) for _ in range(3)]
        flags[0][1:] = torch.tensor(shown)
        addresses = torch.tensor([tensor.data_ptr() for tensor in flags])
        record, began = torch.zeros(4, dtype=torch.int64), time.monotonic()
        limit = WAIT_SECONDS if expected[0] == 1 else HANG_SECONDS
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_DEBUG", "0")
            epoch = torch.zeros((), dtype=torch.int32)
            arguments = (addresses, epoch, record, 3, 0, TAG, int(limit * 1e9))
            launch(barrier_kernel, (6,), *arguments, device=rank.device, debug=False, num_warps=1)
            assert epoch == 1
        assert time.monotonic() - began < (2 * WAIT_SECONDS if expected[0] == 1 else HANG_SECONDS)
        assert record.tolist() == expected


@promise("mismatch")
@on_ranks(2, pool="cpu_pool")
def test_a_barrier_before_a_write_does_not_match_one_after_it(rank: Rank) -> None:
    workspace = new_workspace(rank)
    workspace.enter()
    expected = rf"^rank {rank.rank} of 2: rank {1 - rank.rank} came to phase .* of step 0\b"
    with pytest.raises(CollectiveMismatchError, match=expected):
        (workspace.barrier_before_write if rank.rank == 0 else workspace.barrier_after_write)()
