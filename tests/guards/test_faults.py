"""One rank fails, skips or makes another call: every other rank ends in time, with an exit code, and names it."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from backends import both_backends
from conftest import DEVICE_TYPES
from lives import TOP_K, layer_of
from programs import Program, output_at_end, start_program
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


def forward(ep: ExpertParallel, layer: list[Tensor]) -> Tensor:
    return ep.moe(*layer, TOP_K).y


def train(program: Program, rank: Rank, fault: str, backend: str) -> None:
    """Three steps of two layers of unlike shape; the odd rank does what ``fault`` says in the second step."""
    wide, narrow = (layer_of(rank, hidden=hidden, tokens=5) for hidden in (64, 32))
    faulty = rank.rank == ODD
    with ExpertParallel(backend=backend) as ep:
        # Kernels are compiled, and ranks that started apart are together, before time counts.
        (forward(ep, wide).sum() + forward(ep, narrow).sum()).backward()
    config = EPConfig(dispatch="rank_dedup" if faulty and fault == "another config" else "all_to_all")
    timeout = PATIENT_SECONDS if fault in LEFT else TIMEOUT_SECONDS
    with ExpertParallel(backend=backend, config=config, timeout=timeout) as ep:
        for number in (1, 2, 3):
            now = fault if faulty and number == FAULTY_STEP else None
            layers = [wide, narrow]
            if now:
                program.fault()
                BEFORE.get(now, lambda: None)()
                others = {"another order": [narrow, wide], "another shape": [wide, wide]}
                layers = [layer_of(rank, hidden=64, tokens=6)] if now == "too many tokens" else others.get(now, layers)
            losses = [forward(ep, layer).square().sum() for layer in layers]
            if now == "killed before backward":
                killed()
            if now != "skips backward":
                sum(losses).backward()
            print("step", number, losses[0].item(), flush=True)
            if fault == "another config":
                program.fault()


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raises() -> None:
    raise KeyError("the batch has no labels")


def hangs() -> None:
    time.sleep(FOR_EVER_SECONDS)


BEFORE = {"killed": killed, "raises": raises, "hangs": hangs}
# The phase that the others name.
ANY, BACKWARD = r"exchange|router|sync|memory", r"backward \(\w+\)"
SEEN = {
    **dict.fromkeys(("killed", "raises", "hangs", "too many tokens"), ANY),
    **dict.fromkeys(("killed before backward", "skips backward"), BACKWARD),
    **dict.fromkeys(("another shape", "another order"), "exchange"),
    "another config": r"\w+",
}
AT_ONCE = {"skips backward", "another shape", "another order", "another config"}
# An error before a call, which ends the rank: the others hear of it long before their time is up, and why.
LEFT = {"raises": "KeyError: 'the batch has no labels'", "too many tokens": "expected at most C=5"}
PATIENT_SECONDS = 120.0


def assert_others_end(fault: str, seconds: float, **program: Any) -> None:
    """All ranks but the odd one end within ``seconds``, with an error that names it."""
    for rank, ended in enumerate(Program(body=train, odd=ODD, **program).run()):
        if rank == ODD:
            continue
        assert ended.code == 1, (rank, ended)
        error = "CollectiveMismatchError" if fault in AT_ONCE else r"Peer\w*Error|CollectiveMismatchError"
        named = "\n".join(line for line in ended.said.splitlines() if re.search(error, line))
        assert re.search(rf"rank {ODD}\b.*phase ({SEEN[fault]}) of step \d", named), (rank, ended.said)
        assert fault not in LEFT or re.search(rf"rank {ODD} left.*{LEFT[fault]}", named), (rank, named)
        assert ended.seconds < seconds, (rank, ended)


def destroyed(program: Program, rank: Rank) -> None:
    """A process group that has ended, to which the caller still refers."""
    group = dist.group.WORLD
    with ExpertParallel(backend="reference") as ep:
        # The peer's start would fail if this rank were gone before.
        dist.barrier()
        dist.destroy_process_group()
        try:
            forward(ep, layer_of(rank))
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
def test_the_rank_with_the_store_is_not_blamed_for_another(fault: str, tmp_path: Path) -> None:
    """Rank 0 ends by its error, and with it the store by which others find out which rank was missing."""
    place = {"world_size": 4, "device_type": "cpu", "folder": tmp_path, "store_at_rank_0": True}
    assert_others_end(fault, FAREWELL_SECONDS + TIMEOUT_SECONDS, arguments=(fault, "reference"), **place)


@promise("bounded-waits", "left-by-error", "mismatch")
@pytest.mark.parametrize("device_type", DEVICE_TYPES)
@pytest.mark.parametrize("fault", SEEN)
@both_backends
def test_the_others_end_in_time_and_name_the_rank(backend: str, fault: str, device_type: str, tmp_path: Path) -> None:
    world_size = 2 if device_type == "cuda" else 3
    seconds = FAREWELL_SECONDS + (0 if fault in AT_ONCE or fault in LEFT else TIMEOUT_SECONDS)
    place = {"world_size": world_size, "device_type": device_type, "folder": tmp_path}
    assert_others_end(fault, seconds, arguments=(fault, backend), **place)


UNCAUGHT = """
import sys, time, torch, torch.distributed as dist, sonic_ep.testing
from sonic_ep import ExpertParallel, PeerLostError

rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
ep = ExpertParallel(backend=sys.argv[3], timeout=120)
ep.plan(torch.zeros(4, 1, dtype=torch.int64), 2)
began = time.monotonic()
try:
    ep.plan(torch.zeros(4 + rank, 1, dtype=torch.int64), 2)
except PeerLostError as error:
    print(error, flush=True)
assert time.monotonic() - began < 60, "heard of it only at the end of its time"
"""


@promise("left-by-error")
@both_backends
def test_an_uncaught_error_without_close_is_reported_to_peers(backend: str, tmp_path: Path) -> None:
    started = [start_program(tmp_path, UNCAUGHT, rank, str(tmp_path / "store"), backend) for rank in "01"]
    first, odd = (output_at_end(process) for process in started)
    assert "ValueError: rank 1 of 2: tokens T: got 5, expected at most C=4: construct ExpertParallel" in odd
    assert re.search(r"rank 1 left|lost rank 1", first), first
