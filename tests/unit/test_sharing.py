"""``shared``: one object for a process group, for as long as somebody uses it."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from lives import TOP_K, layer_of, planned, said_in_child, warned
from new_group import own_process_group
from on_ranks import on_ranks
from promises import promise
from same import assert_same_bits
from torch.distributed.device_mesh import init_device_mesh

from sonic_ep import EPConfig, ExpertParallel, shared
from sonic_ep.testing import Rank

pytestmark = promise("shared")


def test_options_are_those_of_the_first_or_refused() -> None:
    first = shared()
    assert first is shared() is shared(None, config=EPConfig(), backend="auto", timeout=None)
    for name, other in (("config", EPConfig(max_rows=9)), ("max_tokens_per_rank", 4), ("check_collective", True)):
        with pytest.raises(ValueError, match=f"rank 0 of 1: {name} of shared: got .*, expected .*, as the object"):
            shared(**{name: other})
    with pytest.raises(TypeError, match="shared: got options capacity, expected some of backend, config, max_tokens"):
        shared(capacity=4)
    del first
    gc.collect()
    tight = shared(max_tokens_per_rank=4)
    assert tight is shared() is shared(max_tokens_per_rank=4)
    with pytest.raises(ValueError, match="max_tokens_per_rank of shared: got 5, expected 4"):
        shared(max_tokens_per_rank=5)
    assert tight.plan(torch.zeros(4, 1, dtype=torch.int64), 1).max_tokens == 4


def test_one_that_is_closed_or_of_another_process_is_replaced() -> None:
    first = shared(backend="reference")
    assert said_in_child(lambda: shared() is not first) == "True"
    first.close()
    assert shared() is not first
    assert isinstance(first, ExpertParallel)


def test_one_whose_users_are_garbage_is_replaced() -> None:
    """On every rank, also where the garbage collector has not come by yet: FSDP2's modules are cycles."""
    cycle: list[object] = [shared()]
    before = weakref.ref(cycle[0])
    cycle.append(cycle)
    gc.disable()
    try:
        del cycle
        assert before() is not None
        shared()
        assert before() is None
    finally:
        gc.enable()


@on_ranks(2, pool="cpu_pool")
def test_a_mesh_and_its_group_are_the_same(rank: Rank) -> None:
    """Other groups of the same ranks are not; and one that was destroyed is not found again."""
    mesh = init_device_mesh(rank.device.type, (2,), mesh_dim_names=("ep",))
    ep = shared(mesh.get_group(), backend="reference")
    assert ep.mesh is None
    assert shared(mesh["ep"]) is ep is shared(mesh.get_group())
    assert ep.mesh == mesh["ep"]
    assert ExpertParallel(mesh, backend="reference").mesh is mesh
    with own_process_group(rank) as group:
        other = shared(group, backend="reference")
        assert other is not ep
        assert planned(other, rank) == [2, 2]
    with own_process_group(rank) as group:
        assert shared(group, backend="reference") is not other
    assert planned(ep, rank) == [2, 2]
    dist.barrier()


@both_backends
@on_ranks(2)
def test_the_last_user_frees_it_and_its_graphs_live_on(rank: Rank, backend: str) -> None:
    """Without a warning. The next user gets a new one."""
    leaves = layer_of(rank)
    with warned() as said:
        users = [shared(backend=backend) for _ in range(2)]
        held = weakref.ref(users[0])
        y = users[0].moe(*leaves, TOP_K).y
        expected = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
        users.pop()
        assert held() is shared()
        users.pop()
        assert held() is None
        with ExpertParallel(backend=backend) as other:
            planned(other, rank)
        assert_same_bits(torch.autograd.grad(y.square().sum(), leaves), expected)
        assert planned(shared(backend=backend), rank) == [2, 2]
    assert said == []
