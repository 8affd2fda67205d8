"""How a kernel that waits for peers ends when they do not come, and how that is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sonic_ep.config import CollectiveMismatchError, PeerError, PeerLostError, PeerTimeoutError
from sonic_ep.fast.device import ELSEWHERE, host_words
from sonic_ep.fast.unheard import told_at_the_end
from sonic_ep.group import EPGroup
from sonic_ep.meeting import Meeting, Phase, apart
from sonic_ep.waits import Waits

WORDS = 4


class Expiry:
    """What waiting kernels of one workspace write when they give up, and the host reads.

    words (4,) int64, on the host: why (0: nothing happened; see ``sonic_ep.fast.device``), the peer plus one, the tag
    of this rank's meeting, and what the peer showed instead. On a GPU the kernel traps as well, and PyTorch's own
    error, which names nobody, may be all that the program sees: so what is here is printed at the latest when the
    process ends.
    """

    def __init__(self, waits: Waits, device: torch.device) -> None:
        self._waits = waits
        # The host reads it while kernels run, so on a GPU it is pinned memory that kernels write through the bus.
        self.words = host_words(WORDS, device, torch.int64)
        self._untold = told_at_the_end(self, partial(found_in, self.words, waits.group, waits.timeout, waits.why_left))

    def found(self) -> PeerError | None:
        """What a kernel has written, if any. No wait for the GPU."""
        return found_in(self.words, self._waits.group, self._waits.timeout)

    def raise_if_any(self, cause: RuntimeError | None = None) -> None:
        """Raise ``PeerTimeoutError``, ``PeerLostError`` or ``CollectiveMismatchError``, from ``cause``.

        Does not wait for the GPU. Reads the error of a rank that left from the store of the process group.
        """
        found = found_in(self.words, self._waits.group, self._waits.timeout, self._waits.why_left)
        if found is not None:
            self._untold.detach()
            try:
                raise found from cause
            finally:
                # Its traceback holds this frame, and would hold it for good through its own name.
                del found


def found_in(
    words: Tensor, group: EPGroup, timeout: float, why_left: Callable[[int], str | None] = lambda rank: None
) -> PeerError | None:
    """The error that ``words`` encode, or None. why_left: rank to the error it left with, None if unknown."""
    why, peer, here, there = words.tolist()
    if not why:
        return None
    meeting = Meeting.of_tag(here)
    if why == ELSEWHERE and Meeting.of_tag(there).phase is Phase.LEFT:
        reason = why_left(peer - 1) or "see its own output for the error"
        return PeerLostError(f"{group}: rank {peer - 1} left ({reason}) while it was waited for in {meeting}")
    if why == ELSEWHERE:
        return CollectiveMismatchError(f"{group}: {apart(meeting, peer - 1, Meeting.of_tag(there))}")
    return PeerTimeoutError(
        f"{group}: waited {timeout:g} s for rank {peer - 1} in {meeting}; did it fail, or make another call?"
    )
