"""One rank fails, skips or makes another call: every other rank ends in time, with an exit code, and names it."""

import re
import signal
import time
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import pytest
from backends import BACKENDS, both_backends
from conftest import DEVICE_TYPES
from limits import HANG_SECONDS
from lives import TOP_K, layer_of
from new_group import without_haste
from programs import exits, run_program
from promises import promise

from sonic_ep import EPConfig, ExpertParallel
from sonic_ep.distributed import rank_status
from sonic_ep.testing import Rank

ODD = 1
FAULTY_STEP = 2
# Longer than a busy machine needs for a step.
TIMEOUT_SECONDS = 8.0


BEFORE = {
    "killed": partial(signal.raise_signal, signal.SIGKILL),
    "raises": Mock(side_effect=KeyError("the batch has no labels")),
    "hangs": partial(time.sleep, 2 * HANG_SECONDS),
}


def train(rank: Rank, fault: str, backend: str) -> None:
    """Three steps of two layers of unlike shape; the odd rank does what ``fault`` says in the second step."""
    wide, narrow = (layer_of(rank, hidden=hidden, tokens=5) for hidden in (64, 32))
    faulty = rank.rank == ODD
    if fault in LEFT:
        # The store of a busy machine may be slow to tell why.
        rank_status.ANSWER_SECONDS = HANG_SECONDS
    with ExpertParallel(backend=backend) as ep:
        # Kernels are compiled, and ranks that started apart are together, before time counts.
        sum(ep.moe(*layer, TOP_K).y.sum() for layer in (wide, narrow)).backward()
    config = EPConfig(dispatch="rank_dedup" if faulty and fault == "another config" else "all_to_all")
    timeout = HANG_SECONDS if fault in {*LEFT, *AT_ONCE} else TIMEOUT_SECONDS
    with ExpertParallel(backend=backend, config=config, timeout=timeout) as ep:
        without_haste(ep._collectives)
        for number in (1, 2, 3):
            now = fault if faulty and number == FAULTY_STEP else None
            BEFORE.get(now, lambda: None)()
            layers = {
                "another order": [narrow, wide],
                "another shape": [wide, wide],
                "too many tokens": [layer_of(rank, hidden=64, tokens=6)],
            }.get(now, [wide, narrow])
            losses = [ep.moe(*layer, TOP_K).y.square().sum() for layer in layers]
            if now == "killed before backward":
                BEFORE["killed"]()
            if now != "skips backward":
                sum(losses).backward()
            print("step", number, losses[0].item(), flush=True)


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


# They go the way of another fault on that backend.
ALIKE = {("reference", "another order"), ("reference", "raises")}
ALIKE |= {("fast", "another order"), ("fast", "hangs"), ("fast", "too many tokens")}
FAULTS = [
    pytest.param(*case, device_type, False, marks=pytest.mark.thorough if case in ALIKE else ())
    for case, device_type in product(product(BACKENDS, SEEN), DEVICE_TYPES)
]
FAULTS += [pytest.param("reference", fault, "cpu", True) for fault in ("killed", "hangs")]


@promise("bounded-waits", "left-by-error", "lost-rank", "mismatch")
@pytest.mark.parametrize(("backend", "fault", "device_type", "served"), FAULTS)
def test_the_others_end_in_time_and_name_the_rank(
    backend: str, fault: str, device_type: str, served: bool, tmp_path: Path
) -> None:
    """Though they would wait for it for ever. served: by rank 0, whose end is that of the store, and is not blamed."""
    size = 4 if served else 2 if device_type == "cuda" else 3
    program = {"world_size": size, "device_type": device_type, "served": served}
    for rank, (code, said) in enumerate(exits(tmp_path, train, fault, backend, odd=ODD, **program)):
        if rank == ODD:
            continue
        assert code == 1, (rank, code, said)
        error = "CollectiveMismatchError" if fault in AT_ONCE else r"Peer\w*Error|CollectiveMismatchError"
        named = "\n".join(line for line in said.splitlines() if re.search(error, line))
        assert re.search(rf"rank {ODD}\b.*phase ({SEEN[fault]}) of step \d", named), (rank, said)
        assert fault not in LEFT or re.search(rf"rank {ODD} left.*{LEFT[fault]}", named), (rank, named)


UNCAUGHT = """
import sys, torch, torch.distributed as dist, sonic_ep.testing
from sonic_ep import ExpertParallel, PeerLostError

rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
ep = ExpertParallel(backend=sys.argv[3], timeout=1200)
ep.plan(torch.zeros(4, 1, dtype=torch.int64), 2)
try:
    ep.plan(torch.zeros(4 + rank, 1, dtype=torch.int64), 2)
except PeerLostError as error:
    print(error, flush=True)
"""


@promise("left-by-error")
@both_backends
def test_an_uncaught_error_without_close_is_reported_to_peers(backend: str, tmp_path: Path) -> None:
    # Long before the time of the rank that waits is up.
    (_, first), (_, odd) = run_program(tmp_path, UNCAUGHT, *([rank, str(tmp_path / "store"), backend] for rank in "01"))
    assert "ValueError: rank 1 of 2: tokens T: got 5, expected at most C=4: construct ExpertParallel" in odd
    assert re.search(r"rank 1 left|lost rank 1", first), first
