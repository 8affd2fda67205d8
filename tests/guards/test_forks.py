"""A forked process keeps off what its parent made, in calls, in backward and at its end."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import both_backends
from limits import HANG_SECONDS
from lives import TOKENS, TOP_K, layer_of, planned, warned
from torch import Tensor

from sonic_ep import ExpertParallel
from sonic_ep.testing import Rank, RankPool, assert_bitwise

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


@pytest.mark.fast
def test_what_is_left_open_at_exit_warns_in_the_process_that_made_it(tmp_path: Path) -> None:
    """Once: not for what holds nothing, and not in a child that was forked."""
    script = tmp_path / "left_open.py"
    script.write_text(AT_EXIT)
    settings = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "always", str(script)],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env=settings,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ResourceWarning: rank 0 of 1: ExpertParallel: got no close() before it was let go") == 1
    refused = [
        line for line in done.stdout.splitlines() if "rank 0 of 1: ExpertParallel: got a call in process" in line
    ]
    assert len(refused) == 2
    assert "that made it, expected one made in this process: what ranks share cannot be inherited" in refused[0]
    assert "child ended with 0" in done.stdout


def in_child(ep: ExpertParallel, rank: Rank, y: Tensor) -> str:
    """What a forked process hears when it calls, and when it leaves a ``with``."""
    said = ""
    try:
        with ep:
            planned(ep, rank)
    except RuntimeError as error:
        said = str(error)
    with warned() as warnings_said:
        del ep
    return said + "".join(warnings_said)


def forked(rank: Rank, backend: str) -> list[str]:
    """In children the object is used, closed, and called backward through; the parent goes on."""
    read, write = os.pipe()
    with ExpertParallel(backend=backend, max_tokens_per_rank=TOKENS) as ep:
        assert planned(ep, rank) == [2] * rank.world_size
        leaves = layer_of(rank)
        y = ep.moe(*leaves, TOP_K).y
        expected = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
        # A child would end what is left over here of other groups, and cannot.
        gc.collect()
        children = []
        for leave in (in_child, closed_in_child, backward_in_child):
            children.append(os.fork())
            if children[-1] == 0:
                os.write(write, leave(ep, rank, y).encode() + b"\n")
                os._exit(0)
            assert os.waitpid(children[-1], 0)[1] == 0
            assert planned(ep, rank) == [2] * rank.world_size
        # None of them has told anybody that this rank is gone.
        assert ep._collectives._status_store.statuses() == {}
        for found, grad in zip(torch.autograd.grad(y.square().sum(), leaves), expected, strict=True):
            assert_bitwise(found, grad)
    os.close(write)
    with open(read) as said:
        return [line.replace(str(children[number]), "CHILD") for number, line in enumerate(said)]


def backward_in_child(ep: ExpertParallel, rank: Rank, y: Tensor) -> str:
    try:
        y.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "went backward"


def closed_in_child(ep: ExpertParallel, rank: Rank, y: Tensor) -> str:
    try:
        ep.close()
    except RuntimeError as error:
        return str(error)
    return "closed"


@both_backends
def test_a_forked_process_keeps_off(cpu_pool: RankPool, backend: str) -> None:
    for rank, said in enumerate(cpu_pool.run(forked, backend, world_size=2)):
        assert len(said) == 3
        for words in said:
            assert words.startswith(f"rank {rank} of 2: ExpertParallel: got a call in process CHILD, forked from ")
            assert words.endswith("what ranks share cannot be inherited\n")
