"""The one read on the host that exact sizes cost."""

import threading
import time

import pytest
import torch

from sonic_ep.testing import Rank, RankPool

pytestmark = pytest.mark.fast


def copied(rank: Rank) -> None:
    """Counts of changing number, zeros among them, one read after the other."""
    from sonic_ep.fast.planner import HostCopy

    copy = HostCopy(rank.device)
    for counts in ([3, 0], [0, 0], [7, 1, 2], [5]):
        copy.start(torch.tensor(counts, dtype=torch.int32, device=rank.device))
        assert copy.wait() == counts


def test_counts_arrive(pool: RankPool) -> None:
    pool.run(copied, world_size=1)


def arriving_late(rank: Rank) -> None:
    """Each word for itself, and a while later: the host waits for all of them."""
    from sonic_ep.fast.planner import NOT_ARRIVED, HostCopy

    copy = HostCopy(rank.device)
    copy.start(torch.tensor([NOT_ARRIVED, NOT_ARRIVED], dtype=torch.int32, device=rank.device))
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    written = []

    def write() -> None:
        for place in (1, 0):
            time.sleep(0.05)
            written.append(place)
            copy._host[place] = 4 + place

    writer = threading.Thread(target=write)
    writer.start()
    assert copy.wait() == [4, 5]
    assert written == [1, 0]
    writer.join()


def test_the_host_waits_for_every_count(pool: RankPool) -> None:
    pool.run(arriving_late, world_size=1)
