"""One rank fails, skips or strays: every other rank ends in time, with an exit code and the name of who was missing."""

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from conftest import DEVICE_TYPES
from programs import Ended, Program
from torch import Tensor

from sonic_ep import ClosedError, EPConfig, ExpertParallel
from sonic_ep.testing import Rank

ODD = 1
FAULTY_STEP = 2
# Longer than a busy machine needs for a step.
TIMEOUT_SECONDS = 4.0
# What a process needs to say its last words and go: PyTorch's own farewell, and a busy machine.
FAREWELL_SECONDS = 12.0
FOR_EVER_SECONDS = 1000
EXPERTS_PER_RANK = 2


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Leaves of one rank: x (T, H), router_w, w1, w2."""

    x: Tensor
    weights: list[Tensor]

    @staticmethod
    def of(rank: Rank, hidden: int) -> "Layer":
        experts, dtype = EXPERTS_PER_RANK * rank.world_size, torch.bfloat16
        shapes = ((5, hidden), (experts, hidden), (EXPERTS_PER_RANK, 32, hidden), (EXPERTS_PER_RANK, hidden, 16))
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
    with ExpertParallel(backend=backend, config=config, timeout=TIMEOUT_SECONDS) as ep:
        for number in (1, 2, 3):
            now = faulty and number == FAULTY_STEP
            layers = [wide, narrow]
            if now:
                program.fault()
                stray(fault)
                if fault == "another order":
                    layers.reverse()
                if fault == "another shape":
                    layers = [wide, wide]
            losses = [layer.forward(ep).float().square().sum() for layer in layers]
            if now and fault == "killed before backward":
                os.kill(os.getpid(), signal.SIGKILL)
            if not (now and fault == "skips backward"):
                (losses[0] + losses[1]).backward()
            print("step", number, losses[0].item(), flush=True)
            if fault == "another config":
                program.fault()


def stray(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raises":
        raise KeyError("the batch has no labels")
    if fault == "hangs":
        time.sleep(FOR_EVER_SECONDS)


# What the others have to say: the phase, the steps it may be in (two calls a step), and whether they need no time out.
SEEN = {
    "killed": r"exchange|router|agreement|memory",
    "killed before backward": r"backward \(\w+\)",
    "raises": r"exchange|router|agreement|memory",
    "hangs": r"exchange|router|agreement|memory",
    "skips backward": r"backward \(\w+\)",
    "another shape": r"exchange",
    "another order": r"exchange",
    "another config": r"\w+",
}
AT_ONCE = {"skips backward", "another shape", "another order", "another config"}


def assert_ended(ended: Ended, rank: int, fault: str, seconds: float) -> None:
    assert ended.code == 1, (rank, ended)
    named = [line for line in ended.said.splitlines() if re.search(r"Peer\w*Error|CollectiveMismatchError", line)]
    assert named, (rank, ended.said)
    assert fault not in AT_ONCE or any("CollectiveMismatchError" in line for line in named), (rank, named)
    assert any(re.search(rf"rank {ODD}\b.*phase ({SEEN[fault]}) of step \d", line) for line in named), (rank, named)
    assert ended.seconds < seconds, (rank, ended)


def destroyed(program: Program, rank: Rank) -> None:
    """A process group that has ended, and that its user still refers to."""
    group = dist.group.WORLD
    with ExpertParallel(backend="reference") as ep:
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
        assert f"rank {rank} of 2: process group: got one that was destroyed, expected a live one" in ended.said


@pytest.mark.parametrize("fault", ["killed", "hangs"])
def test_who_holds_the_store_is_not_blamed_for_another(fault: str, tmp_path: Path) -> None:
    """Rank 0 ends of its error, and takes the store along with which others find out who was missing."""
    program = Program(
        body=train,
        arguments=(fault, "reference"),
        world_size=4,
        device_type="cpu",
        folder=tmp_path,
        odd=ODD,
        store_at_rank_0=True,
    )
    for rank, ended in enumerate(program.run()):
        if rank != ODD:
            assert_ended(ended, rank, fault, FAREWELL_SECONDS + TIMEOUT_SECONDS)


@pytest.mark.parametrize("device_type", DEVICE_TYPES)
@pytest.mark.parametrize("fault", SEEN)
@both_backends
def test_the_others_end_in_time_and_name_the_rank(backend: str, fault: str, device_type: str, tmp_path: Path) -> None:
    world_size = 2 if device_type == "cuda" else 3
    program = Program(
        body=train,
        arguments=(fault, backend),
        world_size=world_size,
        device_type=device_type,
        folder=tmp_path,
        odd=ODD,
    )
    seconds = FAREWELL_SECONDS + (0 if fault in AT_ONCE else TIMEOUT_SECONDS)
    for rank, ended in enumerate(program.run()):
        if rank != ODD:
            assert_ended(ended, rank, fault, seconds)
