"""A forked process keeps off what its parent made, in calls, in backward and at its end."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backends import both_backends
from lives import TOKENS, TOP_K, layer_of, planned, warned
from on_ranks import on_ranks
from programs import output_at_end, start_program
from promises import promise
from same import assert_same_bits

from sonic_ep import ExpertParallel
from sonic_ep.testing import Rank

AT_EXIT = """
import os, sys, torch, sonic_ep

def planned(ep):
    return ep.plan(torch.tensor([[0], [1]]), 2).counts.tolist()

layer = (torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 8, 8), torch.ones(2, 8, 4), 1)
reference = sonic_ep.ExpertParallel(backend="reference")
fast = sonic_ep.ExpertParallel(backend="fast")
y = sonic_ep.moe(*layer, backend="fast").y
assert planned(reference) == planned(fast) == [1, 1]
child = os.fork()
if child == 0:
    for ep in (reference, fast):
        try:
            planned(ep)
        except RuntimeError as error:
            print(error)
    sys.exit(0)
print("child ended with", os.waitpid(child, 0)[1], flush=True)
assert planned(reference) == planned(fast) == [1, 1]
"""


@promise("close")
@pytest.mark.fast
def test_what_is_left_open_at_exit_warns_in_the_process_that_made_it(tmp_path: Path) -> None:
    """Once: not for what holds nothing, and not in a child that was forked."""
    process = start_program(tmp_path, AT_EXIT)
    said = output_at_end(process)
    assert process.returncode == 0, said
    assert said.count("ResourceWarning: rank 0 of 1: this ExpertParallel was not closed: call close()") == 1
    refused = [line for line in said.splitlines() if line.startswith("rank 0 of 1: got a call in process")]
    assert len(refused) == 2
    assert all("cannot be inherited, make one in this process" in line for line in refused)
    assert "child ended with 0" in said


def said_in_child(use: Callable[[], object]) -> str:
    """What ``use`` raises in a forked process, whose number is replaced by CHILD."""
    read, write = os.pipe()
    # The child cannot end what is left over of other groups.
    gc.collect()
    child = os.fork()
    if child == 0:
        words = "nothing"
        try:
            use()
        except RuntimeError as error:
            words = str(error)
        os.write(write, words.encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    os.close(write)
    with open(read) as said:
        return said.read().replace(str(child), "CHILD")


@promise("one-call")
@both_backends
@on_ranks(2, pool="cpu_pool")
def test_a_forked_process_keeps_off(rank: Rank, backend: str) -> None:
    """In children the object is used, closed, freed and called backward through; the parent goes on."""
    with ExpertParallel(backend=backend, max_tokens_per_rank=TOKENS) as ep:
        assert planned(ep, rank) == [2] * rank.world_size
        leaves = layer_of(rank)
        y = ep.moe(*leaves, TOP_K).y
        expected = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)

        def used_and_freed() -> None:
            with warned() as said:
                try:
                    with ep:
                        planned(ep, rank)
                except RuntimeError as error:
                    raise RuntimeError(f"{error}{said}") from None

        for use in (used_and_freed, ep.close, y.sum().backward):
            said = said_in_child(use)
            assert said.startswith(f"rank {rank.rank} of 2: got a call in process CHILD, forked from "), said
            assert said.removesuffix("[]").endswith("cannot be inherited, make one in this process")
            assert planned(ep, rank) == [2] * rank.world_size
        # No child has reported that this rank is gone.
        assert ep._collectives._status_store.statuses() == {}
        assert_same_bits(torch.autograd.grad(y.square().sum(), leaves), expected)
