"""Process groups, meshes and devices."""

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
from on_ranks import on_ranks
from promises import promise
from torch.distributed.device_mesh import init_device_mesh

from sonic_ep import ExpertParallel
from sonic_ep.checks import ArgumentChecker
from sonic_ep.distributed.group import EPGroup, device_of_rank, resolve_group
from sonic_ep.testing import Rank


@promise("rank-numbers")
@on_ranks(4, pool="cpu_pool")
def test_worlds_meshes_and_subsets(rank: Rank) -> None:
    world = resolve_group(None)
    assert (world.rank, world.world_size) == (rank.rank, 4)
    assert str(world) == f"rank {rank.rank} of 4"
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
        assert str(found) == f"rank {found.rank} of 2 (ranks 0 3 of the world)"
    else:
        with pytest.raises(ValueError, match=f"rank {rank.rank} of 4: group: got a group without this rank, expected"):
            ExpertParallel(pair)


def test_no_process_group_is_one_rank_and_ranks_may_share_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = resolve_group(None)
    assert alone == EPGroup(rank=0, world_size=1)
    assert alone.device_types() is None
    assert str(alone) == "rank 0 of 1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of_rank(rank).index for rank in range(4)] == [0, 1, 0, 1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of_rank(3) == torch.device("cpu")


@on_ranks(2, pool="cpu_pool")
def test_a_device_that_the_group_does_not_serve(rank: Rank) -> None:
    only_cuda = resolve_group(dist.new_group(list(range(rank.world_size)), backend="cuda:gloo"))
    assert only_cuda.device_for(torch.device("cpu")) == torch.device("cuda")
    assert resolve_group(None).device_for(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="device of x: got cpu, expected one that the process group moves: cuda"):
        ArgumentChecker(group=only_cuda).tensor("x", torch.zeros(1), (torch.float32,))


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


@pytest.mark.thorough
def test_objects_that_outlive_the_process_group_neither_abort_nor_hang(tmp_path: Path) -> None:
    """PyTorch aborts processes that still hold a gloo group at exit."""
    script = tmp_path / "left_open.py"
    script.write_text(LEFT_OPEN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the process group has been destroyed") == 2


@on_ranks(2, pool="cpu_pool")
def test_neither_an_open_object_nor_its_graph_holds_the_process_group(rank: Rank) -> None:
    assert isinstance(resolve_group(None).handle, weakref.ref)
    group = dist.new_group(list(range(rank.world_size)))
    held = weakref.ref(group)
    ep = ExpertParallel(group, backend="reference")
    y = ep.moe(*layer_of(rank), 2).y
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert y.requires_grad
    assert held() is None
