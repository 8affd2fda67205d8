"""An all-gather by the GPU's copy engines: the driver's asynchronous copies on side streams, no kernel, no SM."""

from __future__ import annotations

import torch
from torch import Tensor

from sonic_ep.fast.staging import reserve_tokens, stage_tokens
from sonic_ep.fast.workspace import SharedBuffer, Workspace


class GatherInFlight:
    """An all-gather that has been started. ``wait()`` before the result, or the next gather, is used."""

    def __init__(self, gathered: Tensor, arrivals: list[torch.cuda.Event]) -> None:
        self._gathered = gathered
        self._arrivals = arrivals

    def wait(self) -> Tensor:
        """(W*C, H), the tokens by source rank; rows behind the T that a rank has are unspecified.

        The current stream waits, the host does not.
        """
        while self._arrivals:
            torch.cuda.current_stream(self._gathered.device).wait_event(self._arrivals.pop())
        return self._gathered


class CopyEngineGather:
    """Gathers tokens of all ranks through the shared buffer ``name``.

    The copies of one gather have to be waited for before the next one begins; ``start`` sees to it.
    """

    def __init__(self, workspace: Workspace, name: str) -> None:
        self._workspace = workspace
        self._name = name
        self._last: GatherInFlight | None = None
        on_gpu = workspace.device.type == "cuda"
        peers = range(workspace.group.world_size) if on_gpu else ()
        self._streams = tuple(torch.cuda.Stream(workspace.device) for _ in peers)

    def reserve(self, capacity: int, row_bytes: int) -> None:
        """Collective. Allocate what ``start`` needs for this shape."""
        reserve_tokens(self._workspace, capacity, row_bytes, self._name)

    def start(self, x_TH: Tensor, capacity: int) -> GatherInFlight:
        """Collective. Stage x (T, H), then bring (W, C, H) on side streams, behind what the current stream has queued.

        x may be changed as soon as the current stream has come past this call.
        """
        # A forgotten gather: its copies end before the fence lets peers write what they read.
        if self._last is not None:
            self._last.wait()
        return self.bring(x_TH, stage_tokens(x_TH, capacity, self._workspace, self._name), capacity)

    def bring(self, x_TH: Tensor, staged: SharedBuffer, capacity: int) -> GatherInFlight:
        """The second half of ``start``: copy what every rank has staged, and this rank's own tokens from x."""
        group = self._workspace.group
        shape = (capacity, x_TH.shape[1])
        gathered_WCH = x_TH.new_empty((group.world_size, *shape))
        arrivals: list[torch.cuda.Event] = []
        # Each rank begins with its next neighbour, so that no peer is asked by all at once.
        for peer in (*range(group.rank + 1, group.world_size), *range(group.rank)):
            arrivals += self._copy(gathered_WCH[peer], staged.rows(peer, shape, x_TH.dtype), peer)
        # Behind the others: it is on the stream that they waited for.
        gathered_WCH[group.rank, : x_TH.shape[0]].copy_(x_TH)
        self._last = GatherInFlight(gathered_WCH.flatten(0, 1), arrivals)
        return self._last

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
