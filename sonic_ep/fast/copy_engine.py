"""An all-gather by the GPU's copy engines: the driver's asynchronous copies on side streams, no kernel, no SM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sonic_ep.fast.collectives import reserve_tokens, stage_tokens
from sonic_ep.fast.symmetric_memory import SharedBuffer
from sonic_ep.fast.workspace import Workspace


@dataclass(eq=False)
class GatherEvents:
    """Events that end the copies of one gather. captured: they are of a graph, and mean nothing outside of it."""

    events: tuple[torch.cuda.Event, ...]
    captured: bool
    awaited: bool = False

    def hold_back(self, device: torch.device) -> None:
        """Let the current stream of ``device`` wait for all copies."""
        for event in self.events:
            torch.cuda.current_stream(device).wait_event(event)
        self.awaited = True

    def hold_back_next(self, device: torch.device) -> None:
        """Let the next gather wait, unless it cannot, or in a graph need not: its copies follow on the same streams."""
        if self.events and self.captured == _capturing(device) and not (self.captured and self.awaited):
            self.hold_back(device)


class GatherInFlight:
    """An all-gather that has been started. ``wait()`` before the result is used, on each stream that uses it."""

    def __init__(self, gathered_WCH: Tensor, arrivals: GatherEvents) -> None:
        self._gathered = gathered_WCH
        self._arrivals = arrivals

    def wait(self) -> Tensor:
        """(W*C, H), the tokens by source rank; rows behind the T that a rank has are unspecified.

        The current stream waits, the host does not.
        """
        self._arrivals.hold_back(self._gathered.device)
        return self._gathered.flatten(0, 1)

    def addresses(self) -> Tensor:
        """(W,) int64, on the device: where the tokens of each rank begin."""
        block_bytes = self._gathered[0].numel() * self._gathered.element_size()
        ranks_W = torch.arange(self._gathered.shape[0], dtype=torch.int64, device=self._gathered.device)
        return ranks_W * block_bytes + self._gathered.data_ptr()


class CopyEngineGather:
    """Gathers tokens of all ranks through the shared buffer ``name``.

    The copies of one gather have to be waited for before the next one begins; ``start`` sees to it.
    """

    def __init__(self, workspace: Workspace, name: str) -> None:
        self._workspace = workspace
        self._name = name
        self._last = GatherEvents(events=(), captured=False)
        on_gpu = workspace.device.type == "cuda"
        peers = range(workspace.group.world_size) if on_gpu else ()
        self._streams = tuple(torch.cuda.Stream(workspace.device) for _ in peers)

    def reserve(self, max_tokens: int, row_bytes: int) -> None:
        """Collective. Allocate what ``start`` needs for this shape."""
        reserve_tokens(self._workspace, max_tokens, row_bytes, self._name)

    def start(self, x_TH: Tensor, max_tokens: int, *, with_own: bool = True) -> GatherInFlight:
        """Collective. Stage x (T, H), then bring (W, C, H) on side streams, behind what the current stream has queued.

        x may be changed as soon as the current stream has come past this call. with_own: whether this rank's own tokens
        are wanted among those of the others; else their place is unspecified.
        """
        return self.bring(x_TH, self.stage(x_TH, max_tokens), max_tokens, with_own=with_own)

    def stage(self, x_TH: Tensor, max_tokens: int) -> SharedBuffer:
        """Collective. The first half of ``start``."""
        # The last gather's copies end before the fence lets peers write what they read, whoever has waited for them.
        self._last.hold_back_next(self._workspace.device)
        return stage_tokens(x_TH, max_tokens, self._workspace, self._name)

    def bring(self, x_TH: Tensor, staged: SharedBuffer, max_tokens: int, *, with_own: bool = True) -> GatherInFlight:
        """The second half of ``start``: copy what every rank has staged, and this rank's own tokens from x."""
        group = self._workspace.group
        shape = (max_tokens, x_TH.shape[1])
        gathered_WCH = x_TH.new_empty((group.world_size, *shape))
        arrivals: list[torch.cuda.Event] = []
        # Each rank begins with its next neighbour, so that no peer is asked by all at once.
        for peer in (*range(group.rank + 1, group.world_size), *range(group.rank)):
            arrivals += self._copy(gathered_WCH[peer], staged.rows(peer, shape, x_TH.dtype), peer)
        if with_own:
            # Behind the others: it is on the stream that they waited for.
            gathered_WCH[group.rank, : x_TH.shape[0]].copy_(x_TH)
        # Not the result itself, which is the caller's to keep or to drop.
        self._last = GatherEvents(events=tuple(arrivals), captured=_capturing(self._workspace.device))
        return GatherInFlight(gathered_WCH, self._last)

    def _copy(self, target_CH: Tensor, source_CH: Tensor, peer: int) -> list[torch.cuda.Event]:
        if not self._streams:
            target_CH.copy_(source_CH)
            return []
        stream = self._streams[peer]
        stream.wait_stream(torch.cuda.current_stream(target_CH.device))
        with torch.cuda.stream(stream):
            target_CH.copy_(source_CH)
            target_CH.record_stream(stream)
            arrival = torch.cuda.Event()
            arrival.record(stream)
        return [arrival]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
