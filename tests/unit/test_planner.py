"""The one host read of exact sizes."""

import threading
import time

import pytest
import torch
from on_ranks import on_ranks

from sonic_ep.testing import Rank

pytestmark = pytest.mark.fast


@on_ranks(1)
def test_counts_are_copied_and_the_host_waits_for_every_one(rank: Rank) -> None:
    """As many as there are, zeros among them, one copy after the other."""
    from sonic_ep.fast.planner import NOT_ARRIVED, HostCopy

    copy = HostCopy(rank.device)
    for counts in ([3, 0], [0, 0], [7, 1, 2], [5]):
        copy.start(torch.tensor(counts, dtype=torch.int32, device=rank.device))
        assert copy.wait() == counts
    copy.start(torch.tensor([NOT_ARRIVED, NOT_ARRIVED], dtype=torch.int32, device=rank.device))
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    written = []

    def write_later() -> None:
        for index in (1, 0):
            time.sleep(0.05)
            written.append(index)
            copy._host[index] = 4 + index

    writer = threading.Thread(target=write_later)
    writer.start()
    assert copy.wait() == [4, 5]
    assert written == [1, 0]
    writer.join()
