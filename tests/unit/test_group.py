"""What counts as a group."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import HANG_SECONDS
from lives import layer_of
from torch.distributed.device_mesh import init_device_mesh

from sonic_ep import ExpertParallel
from sonic_ep.checks import ArgumentChecker
from sonic_ep.distributed.group import EPGroup, device_of_rank, resolve_group
from sonic_ep.testing import Rank, RankPool


def groups(rank: Rank) -> None:
    world = resolve_group(None)
    assert (world.rank, world.world_size) == (rank.rank, 4)
    assert str(world) == f"rank {rank.rank} of 4"
    assert world.device_types() is not None
    assert rank.device.type in world.device_types()
    mesh = init_device_mesh(rank.device.type, (2, 2), mesh_dim_names=("data", "expert"))
    along = resolve_group(mesh["expert"])
    assert (along.rank, along.world_size) == (rank.rank % 2, 2)
    with pytest.raises(ValueError, match="group: got a device mesh of 2 dimensions, expected one dimension"):
        resolve_group(mesh)
    pair = dist.new_group([0, 3])
    if rank.rank in (0, 3):
        found = resolve_group(pair)
        assert (found.rank, found.world_size) == (int(rank.rank == 3), 2)
        # Which of the world a message means by rank 1.
        assert str(found) == f"rank {found.rank} of 2 (ranks 0 3 of the world)"
    else:
        expected = f"rank {rank.rank} of 4: group: got a group without this rank, expected one that it is a member of"
        with pytest.raises(ValueError, match=expected):
            ExpertParallel(pair)


def test_worlds_meshes_and_subsets(cpu_pool: RankPool) -> None:
    cpu_pool.run(groups, world_size=4)


def test_no_process_group_is_one_rank() -> None:
    alone = resolve_group(None)
    assert alone == EPGroup(rank=0, world_size=1)
    assert alone.device_types() is None
    assert str(alone) == "rank 0 of 1"


def tensors_it_cannot_move(rank: Rank) -> None:
    only_cuda = dist.new_group(list(range(rank.world_size)), backend="cuda:gloo")
    checker = ArgumentChecker(group=resolve_group(only_cuda))
    assert resolve_group(only_cuda).device_for(torch.device("cpu")) == torch.device("cuda")
    assert resolve_group(None).device_for(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="device of x: got cpu, expected one that the process group moves: cuda"):
        checker.tensor("x", torch.zeros(1), (torch.float32,))


def test_a_device_that_the_group_does_not_move(cpu_pool: RankPool) -> None:
    cpu_pool.run(tensors_it_cannot_move, world_size=2)


def test_devices_are_shared_if_ranks_outnumber_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of_rank(rank).index for rank in range(4)] == [0, 1, 0, 1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of_rank(3) == torch.device("cpu")


LEFT_OPEN = """
import torch, torch.distributed as dist, sonic_ep
dist.init_process_group("gloo")
ep = sonic_ep.ExpertParallel(backend="reference")
pair = sonic_ep.ExpertParallel(dist.new_group([0, 1]), backend="reference")
layer = sonic_ep.MoE(8, 4, num_experts=4, top_k=2, ep=ep)
out = layer(torch.randn(3, 8, requires_grad=True))
dist.destroy_process_group()
try:
    layer(torch.randn(3, 8))
except sonic_ep.ClosedError as error:
    print(error)
"""


def test_what_outlives_the_process_group_neither_aborts_nor_hangs(tmp_path: Path) -> None:
    """A graph, a layer and an open ExpertParallel at exit: PyTorch aborts processes that still hold a gloo group."""
    script = tmp_path / "left_open.py"
    script.write_text(LEFT_OPEN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    for _ in range(3):
        done = subprocess.run(launcher, capture_output=True, text=True, timeout=HANG_SECONDS)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("the process group has been destroyed") == 2


def used_and_ended(rank: Rank) -> bool:
    """An open object and a graph of it keep no process group alive: PyTorch aborts processes that hold one at exit."""
    assert isinstance(resolve_group(None).handle, weakref.ref)
    group = dist.new_group(list(range(rank.world_size)))
    held = weakref.ref(group)
    ep = ExpertParallel(group, backend="reference")
    y = ep.moe(*layer_of(rank), 2).y
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert y.requires_grad
    return held() is None


def test_nothing_of_ours_holds_a_process_group(cpu_pool: RankPool) -> None:
    assert cpu_pool.run(used_and_ended, world_size=2) == [True, True]
