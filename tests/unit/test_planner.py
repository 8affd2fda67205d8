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
    writer = threading.Timer(0.05, lambda: (copy._host[1:].fill_(5), time.sleep(0.05), copy._host[:1].fill_(4)))
    writer.start()
    assert copy.wait() == [4, 5]
    writer.join()
