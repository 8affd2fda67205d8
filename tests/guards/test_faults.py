"""One rank fails, skips or makes another call: every other rank ends in time, with an exit code, and names it."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from conftest import DEVICE_TYPES
from limits import HANG_SECONDS
from programs import Ended, Program
from promises import promise
from torch import Tensor

from sonic_ep import ClosedError, EPConfig, ExpertParallel
from sonic_ep.testing import Rank

ODD = 1
FAULTY_STEP = 2
# Longer than a busy machine needs for a step.
TIMEOUT_SECONDS = 8.0
# What a process needs to end: PyTorch's own shutdown, and a busy machine.
FAREWELL_SECONDS = 40.0
FOR_EVER_SECONDS = 1000
EXPERTS_PER_RANK = 2


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Leaves of one rank: x (T, H), router_w, w1, w2."""

    x: Tensor
    weights: list[Tensor]

    @staticmethod
    def of(rank: Rank, hidden: int, tokens: int = 5) -> "Layer":
        experts, dtype = EXPERTS_PER_RANK * rank.world_size, torch.bfloat16
        shapes = ((tokens, hidden), (experts, hidden), (EXPERTS_PER_RANK, 32, hidden), (EXPERTS_PER_RANK, hidden, 16))
        x, *weights = (torch.randn(shape).to(rank.device, dtype).requires_grad_() for shape in shapes)
        return Layer(x=x, weights=weights)

    def forward(self, ep: ExpertParallel) -> Tensor:
        return ep.moe(self.x, *self.weights, 2).y


def train(program: Program, rank: Rank, fault: str, backend: str) -> None:
    """Three steps of two layers of unlike shape; the odd rank does what ``fault`` says in the second step."""
    torch.manual_seed(rank.rank)
    wide, narrow = Layer.of(rank, 64), Layer.of(rank, 32)
    faulty = rank.rank == ODD
    with ExpertParallel(backend=backend) as ep:
        # Kernels are compiled, and ranks that started apart are together, before time counts.
        (wide.forward(ep).sum() + narrow.forward(ep).sum()).backward()
    config = EPConfig(dispatch="rank_dedup" if faulty and fault == "another config" else "all_to_all")
    timeout = PATIENT_SECONDS if fault in LEFT else TIMEOUT_SECONDS
    with ExpertParallel(backend=backend, config=config, timeout=timeout) as ep:
        for number in (1, 2, 3):
            now = faulty and number == FAULTY_STEP
            layers = [wide, narrow]
            if now:
                program.fault()
                fail(fault)
                if fault == "another order":
                    layers.reverse()
                if fault == "another shape":
                    layers = [wide, wide]
                if fault == "too many tokens":
                    layers = [Layer.of(rank, 64, tokens=6)]
            losses = [layer.forward(ep).float().square().sum() for layer in layers]
            if now and fault == "killed before backward":
                os.kill(os.getpid(), signal.SIGKILL)
            if not (now and fault == "skips backward"):
                (losses[0] + losses[1]).backward()
            print("step", number, losses[0].item(), flush=True)
            if fault == "another config":
                program.fault()


def fail(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raises":
        raise KeyError("the batch has no labels")
    if fault == "hangs":
        time.sleep(FOR_EVER_SECONDS)


# The phase that the others name.
SEEN = {
    "killed": r"exchange|router|sync|memory",
    "killed before backward": r"backward \(\w+\)",
    "raises": r"exchange|router|sync|memory",
    "hangs": r"exchange|router|sync|memory",
    "skips backward": r"backward \(\w+\)",
    "another shape": r"exchange",
    "another order": r"exchange",
    "another config": r"\w+",
    "too many tokens": r"exchange|router|sync|memory",
}
AT_ONCE = {"skips backward", "another shape", "another order", "another config"}
# An error before a call, which ends the rank: the others hear of it long before their time is up, and why.
LEFT = {"raises": "KeyError: 'the batch has no labels'", "too many tokens": "expected at most C=5"}
PATIENT_SECONDS = 120.0


def assert_ended(ended: Ended, rank: int, fault: str, seconds: float) -> None:
    assert ended.code == 1, (rank, ended)
    named = [line for line in ended.said.splitlines() if re.search(r"Peer\w*Error|CollectiveMismatchError", line)]
    assert named, (rank, ended.said)
    assert fault not in AT_ONCE or any("CollectiveMismatchError" in line for line in named), (rank, named)
    assert any(re.search(rf"rank {ODD}\b.*phase ({SEEN[fault]}) of step \d", line) for line in named), (rank, named)
    assert fault not in LEFT or any(f"rank {ODD} left" in line and LEFT[fault] in line for line in named), (rank, named)
    assert ended.seconds < seconds, (rank, ended)


def destroyed(program: Program, rank: Rank) -> None:
    """A process group that has ended, and that its user still refers to."""
    group = dist.group.WORLD
    with ExpertParallel(backend="reference") as ep:
        # A rank that is gone before its peer has connected would fail the peer's start.
        dist.barrier()
        dist.destroy_process_group()
        try:
            Layer.of(rank, 8).forward(ep)
        except ClosedError as error:
            print(error, flush=True)
        os._exit(0 if group is not None else 1)


def test_a_process_group_that_has_ended_is_told_as_such(tmp_path: Path) -> None:
    program = Program(body=destroyed, arguments=(), world_size=2, device_type="cpu", folder=tmp_path, odd=ODD)
    for rank, ended in enumerate(program.run()):
        assert ended.code == 0, ended
        assert f"rank {rank} of 2: the process group has been destroyed" in ended.said


@promise("lost-rank")
@pytest.mark.parametrize("fault", ["killed", "hangs"])
def test_who_holds_the_store_is_not_blamed_for_another(fault: str, tmp_path: Path) -> None:
    """Rank 0 ends of its error, and takes the store along with which others find out who was missing."""
    place = {"world_size": 4, "device_type": "cpu", "folder": tmp_path, "odd": ODD, "store_at_rank_0": True}
    program = Program(body=train, arguments=(fault, "reference"), **place)
    for rank, ended in enumerate(program.run()):
        if rank != ODD:
            assert_ended(ended, rank, fault, FAREWELL_SECONDS + TIMEOUT_SECONDS)


@promise("bounded-waits", "left-by-error", "mismatch")
@pytest.mark.parametrize("device_type", DEVICE_TYPES)
@pytest.mark.parametrize("fault", SEEN)
@both_backends
def test_the_others_end_in_time_and_name_the_rank(backend: str, fault: str, device_type: str, tmp_path: Path) -> None:
    world_size = 2 if device_type == "cuda" else 3
    program = Program(
        body=train, arguments=(fault, backend), world_size=world_size, device_type=device_type, folder=tmp_path, odd=ODD
    )
    seconds = FAREWELL_SECONDS + (0 if fault in AT_ONCE or fault in LEFT else TIMEOUT_SECONDS)
    for rank, ended in enumerate(program.run()):
        if rank != ODD:
            assert_ended(ended, rank, fault, seconds)


UNCAUGHT = """
import sys, time
import torch, torch.distributed as dist
import sonic_ep.testing
from sonic_ep import ExpertParallel, PeerLostError

rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
ep = ExpertParallel(backend=sys.argv[3], timeout=120)
ep.plan(torch.zeros(4, 1, dtype=torch.int64), 2)
if rank == 1:
    ep.plan(torch.zeros(5, 1, dtype=torch.int64), 2)
began = time.monotonic()
try:
    ep.plan(torch.zeros(4, 1, dtype=torch.int64), 2)
except PeerLostError as error:
    print(error, flush=True)
assert time.monotonic() - began < 60, "heard of it only at the end of its time"
"""


@promise("left-by-error")
@both_backends
def test_an_uncaught_error_without_close_is_reported_to_peers(backend: str, tmp_path: Path) -> None:
    script = tmp_path / "uncaught.py"
    script.write_text(UNCAUGHT)
    settings = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def started(rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(rank), str(tmp_path / "store"), backend]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=settings, **pipes)

    first, odd = (process.communicate(timeout=HANG_SECONDS)[0] for process in [started(0), started(1)])
    assert "ValueError: rank 1 of 2: tokens T: got 5, expected at most C=4 (the most that a rank brought" in odd
    assert re.search(r"rank 1 left|lost rank 1", first), first
