"""An all-gather by the GPU's copy engines: asynchronous copies on side streams, which take no SM."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sonic_ep.fast.collectives import reserve_tokens, stage_tokens
from sonic_ep.fast.launch import capturing
from sonic_ep.fast.symmetric_memory import Staging
from sonic_ep.fast.workspace import Workspace


@dataclass(eq=False)
class GatherEvents:
    """Events at the end of the copies of one gather. captured: they belong to a graph, and have no meaning outside."""

    events: tuple[torch.cuda.Event, ...]
    captured: bool
    awaited: bool = False

    def wait(self, device: torch.device) -> None:
        """The current stream of ``device`` waits for all copies."""
        for event in self.events:
            torch.cuda.current_stream(device).wait_event(event)
        self.awaited = True


@dataclass(frozen=True, kw_only=True, eq=False)
class GatherInFlight:
    """An all-gather (W, C, H) in flight. Call ``wait()`` on each stream that uses the result."""

    gathered: Tensor
    events: GatherEvents

    def wait(self) -> Tensor:
        """(W*C, H), tokens by source rank, unspecified past each T. The current stream waits, the host does not."""
        self.events.wait(self.gathered.device)
        return self.gathered.flatten(0, 1)

    def addresses(self) -> Tensor:
        """(2 * W,) int64, on the device: where the tokens of each rank begin, twice, as in a ``Staging``."""
        block_bytes = self.gathered[0].numel() * self.gathered.element_size()
        ranks_2W = torch.arange(self.gathered.shape[0], dtype=torch.int64, device=self.gathered.device).repeat(2)
        return ranks_2W * block_bytes + self.gathered.data_ptr()


class CopyEngineGather:
    """Gathers tokens of all ranks through the shared buffer ``name``. A gather first waits for the one before."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self._workspace = workspace
        self._name = name
        self._last = GatherEvents(events=(), captured=False)
        on_gpu = workspace.device.type == "cuda"
        peers = range(workspace.group.world_size) if on_gpu else ()
        self._streams = tuple(torch.cuda.Stream(workspace.device) for _ in peers)

    def reserve(self, max_tokens: int, row_bytes: int) -> Staging:
        """Collective. Allocate what ``start`` needs for this shape: one buffer, whose address the host has to know."""
        return reserve_tokens(self._workspace, max_tokens, row_bytes, self._name, in_turn=False)

    def start(self, x_TH: Tensor, max_tokens: int, *, with_own: bool = True) -> GatherInFlight:
        """Collective. Stage x (T, H), then copy (W, C, H) on side streams, after what the current stream has queued.

        The current stream may overwrite x then. with_own: the result has this rank's own tokens, else unspecified rows.
        """
        return self.bring(x_TH, self.stage(x_TH, max_tokens), max_tokens, with_own=with_own)

    def stage(self, x_TH: Tensor, max_tokens: int) -> Staging:
        """Collective. The first half of ``start``."""
        self.wait_for_last()
        return stage_tokens(x_TH, max_tokens, self._workspace, self._name, in_turn=False)

    def before_staging(self) -> None:
        """Collective. What comes before the staging in ``stage``: wait until the copies of all ranks have ended."""
        self.wait_for_last()
        self._workspace.barrier_before_write()

    def wait_for_last(self) -> None:
        """The current stream waits for the copies of the last gather."""
        # They have to end before the barrier: after it peers overwrite what they read. No wait from eager code for a
        # graph or the other way round, nor a second one in a graph, whose copies share their streams.
        last, device = self._last, self._workspace.device
        if last.events and last.captured == capturing(device) and not (last.captured and last.awaited):
            last.wait(device)

    def bring(self, x_TH: Tensor, staged: Staging, max_tokens: int, *, with_own: bool = True) -> GatherInFlight:
        """The second half of ``start``: copy the tokens that other ranks have staged, and this rank's own from x."""
        group = self._workspace.group
        shape = (max_tokens, x_TH.shape[1])
        gathered_WCH = x_TH.new_empty((group.world_size, *shape))
        events: list[torch.cuda.Event] = []
        # Each rank begins with its next neighbour, so that not all read from the same peer at once.
        for peer in (*range(group.rank + 1, group.world_size), *range(group.rank)):
            events += self._copy(gathered_WCH[peer], staged.buffer.rows(peer, shape, x_TH.dtype), peer)
        if with_own:
            # Last, because the side streams wait for the current stream, which does this copy.
            gathered_WCH[group.rank, : x_TH.shape[0]].copy_(x_TH)
        # Only the events: the caller decides how long the result lives.
        self._last = GatherEvents(events=tuple(events), captured=capturing(self._workspace.device))
        return GatherInFlight(gathered=gathered_WCH, events=self._last)

    def _copy(self, target_CH: Tensor, source_CH: Tensor, peer: int) -> list[torch.cuda.Event]:
        if not self._streams:
            target_CH.copy_(source_CH)
            return []
        stream = self._streams[peer]
        stream.wait_stream(torch.cuda.current_stream(target_CH.device))
        with torch.cuda.stream(stream):
            target_CH.copy_(source_CH)
            target_CH.record_stream(stream)
            return [stream.record_event()]
