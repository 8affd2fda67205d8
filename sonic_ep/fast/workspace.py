"""The only owner of memory that ranks share, and of the barriers that keep its reuse in order.

- ``barrier_before_write``: every rank has finished reading what a buffer held.
- ``barrier_after_write``: every rank has finished writing, so peers may read.
- Buffers are allocated in calls that all ranks make, never in backward or in graph capture.
"""

import time
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sonic_ep.compat import current_stream_address, keep_forever, stream_is_captured
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.sync_tag import Phase, after_write, at_phase
from sonic_ep.errors import ClosedError
from sonic_ep.fast.device_errors import WaitErrors
from sonic_ep.fast.launch import Launcher, capturing, launch
from sonic_ep.fast.symmetric_memory import ALIGNMENT_BYTES, SharedBuffer, Staging, Transport, transport_of
from sonic_ep.fast.sync import barrier_kernel, leave_kernel, leave_slots_kernel

POISON_BYTE = 0xFF
# Bytes of a flag, which is set to a phase's tag.
TAG_BYTES = 8
NANOSECONDS_PER_SECOND = 1_000_000_000
BARRIER = "barrier"
# Of kernels that wait: they trap where a wait fails.
WAITING: Mapping[str, bool] = MappingProxyType({"debug": True, "sanitize_overflow": False})
# Flags that one program of ``leave_slots_kernel`` sets.
LEFT_SLOTS = 256
# Seconds for peers to lower this rank's last flag, and for its GPU to run ``leave_kernel``.
LEAVE_SECONDS = 2.0


class Workspace:
    """The shared buffers of one group on one device, by name. Construction is collective, and so is growth."""

    def __init__(
        self,
        group: EPGroup,
        device: torch.device,
        transport: Transport | None = None,
        collectives: BoundedCollectives | None = None,
    ) -> None:
        self.group = group
        self.device = device
        self._collectives = collectives or BoundedCollectives(group)
        self.call_lock = self._collectives.call_lock
        self.wait_errors = WaitErrors(self._collectives, device)
        self._closed = False
        self._transport = transport or transport_of(self._collectives, device)
        self._buffers: dict[str, SharedBuffer] = {}
        self._stagings: dict[str, Staging] = {}
        # Of the combine that comes next, and how many each rank has: peers may wait for this rank's.
        self.receive_flags: tuple[SharedBuffer, int] | None = None
        # What users of buffers keep of them, by keys of their own, until a buffer changes.
        self.kept: dict[object, Any] = {}
        self._replaced: list[object] = []
        self._captured = False
        self._last_stream: torch.cuda.Stream | None = None
        self._last_address = -1
        self._on_gpu = device.type == "cuda"
        # Changes whenever a buffer does: what was reserved at the same one is still there.
        self.generation = 0
        weakref.finalize(self, _keep_after_trap, self.wait_errors, self._buffers, self._replaced)
        self._launch_barrier = Launcher(barrier_kernel, device, {"num_warps": 1, **WAITING})
        self._barrier_flags = self.reserve(BARRIER, group.world_size * TAG_BYTES, 0).addresses
        # Barriers passed, () int32: kernels find by it the half of a ``Staging``, also when a graph is replayed.
        with torch.inference_mode(False):
            self.epoch = torch.zeros((), dtype=torch.int32, device=device)
            # See ``combine.base.take_ticket``.
            self.ticket = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def tag(self) -> int:
        """A tag of the call that is being made, see ``sync_tag``."""
        return self._collectives.tag

    def enter(self, phase: Phase = Phase.SYNC, tag: int | None = None, *, backward: bool = False) -> None:
        """Begin a phase of the call that ``tag`` is of, or of this one, after what the last phase queued on any stream.

        Raises ``PeerError`` if a kernel of this rank has timed out since, ``ClosedError`` after ``close``.
        """
        if self._closed or self.wait_errors.found():
            self._raise_if_closed()
            self.wait_errors.raise_if_any()
        held = self._collectives
        held.tag = at_phase(held.tag if tag is None else tag, phase, backward)
        if not self._on_gpu:
            return
        if stream_is_captured():
            self._captured = True
        elif current_stream_address(self.device.index) != self._last_address:
            self._change_stream()

    def _change_stream(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None:
            stream.wait_stream(self._last_stream)
        self._last_stream, self._last_address = stream, stream.cuda_stream

    def leave(self, tag: int = 0) -> None:
        """Show ``tag``, or ``Phase.LEFT``, to every peer, which ends their waits; ``LEAVE_SECONDS`` at most."""
        if self._closed or self.group.world_size == 1:
            return
        left = at_phase(self.tag, Phase.LEFT)
        tag = tag or left
        limit = int(LEAVE_SECONDS * NANOSECONDS_PER_SECOND)
        sizes = (self.group.world_size, self.group.rank, tag, limit)
        launch(leave_kernel, sizes[:1], self._buffers[BARRIER].addresses, *sizes, device=self.device, num_warps=1)
        if self.receive_flags is not None:
            flags, chunk = self.receive_flags
            grid, of_slots = (sizes[0], -(-chunk // LEFT_SLOTS)), (*sizes[:2], chunk, left)
            launch(leave_slots_kernel, grid, flags.addresses, *of_slots, device=self.device, BLOCK=LEFT_SLOTS)
        if self.device.type == "cuda":
            done = torch.cuda.current_stream(self.device).record_event()
            deadline = time.monotonic() + LEAVE_SECONDS
            while not done.query() and time.monotonic() < deadline:
                time.sleep(LEAVE_SECONDS / 1000)

    def tags_shown(self) -> dict[int, int]:
        """Tags of barriers at which other ranks wait for this one, by rank, once all that it has queued has run."""
        if self.device.type == "cuda":
            streams = (torch.cuda.current_stream(self.device), self._last_stream)
            if not all(stream is None or stream.query() for stream in streams):
                return {}
        flags = self._buffers[BARRIER].rows(self.group.rank, (self.group.world_size,), torch.int64).tolist()
        return {rank: tag for rank, tag in enumerate(flags) if tag}

    def reserve(self, name: str, nbytes: int, byte: int = POISON_BYTE) -> SharedBuffer:
        """The buffer ``name`` of at least ``nbytes``. Collective if it has to grow; new bytes are all ``byte``.

        Raises ``RuntimeError`` if it had to grow in graph capture, ``ClosedError`` after ``close``.
        """
        self._raise_if_closed()
        held = self._buffers.get(name)
        if held is not None and held.nbytes >= nbytes:
            return held
        if capturing(self.device):
            raise RuntimeError(
                f"{self.group}: shared buffer {name!r}: got {0 if held is None else held.nbytes} bytes, expected "
                f"{nbytes} before graph capture: run the call once at this shape before it is captured"
            )
        if held is not None and self._captured:
            # A captured graph may use it.
            self._replaced.append(held)
        elif held is not None:
            # As peers do, to allocate.
            self.synchronize()
        blocks = max(1, -(-nbytes // ALIGNMENT_BYTES))
        self._buffers[name] = self._transport.allocate(ALIGNMENT_BYTES * blocks, byte)
        self.generation += 1
        self.kept.clear()
        return self._buffers[name]

    def staging(self, name: str, nbytes: int, *, in_turn: bool = True) -> Staging:
        """The buffer ``name`` in halves of at least ``nbytes``. Collective and raising as ``reserve``.

        in_turn: False for one buffer that serves as both, so that a barrier has to come before it is written, too.
        """
        held = self._stagings.get(name)
        if held is not None and held.half_bytes >= nbytes:
            self._raise_if_closed()
            return held
        half_bytes = ALIGNMENT_BYTES * max(1, -(-nbytes // ALIGNMENT_BYTES))
        halves = 2 if in_turn and self.group.world_size > 1 else 1
        if held is not None and self._captured:
            self._replaced.append(held)
        made = Staging.of(self.reserve(name, halves * half_bytes), half_bytes)
        self._stagings[name] = made
        return made

    def barrier_before_write(self) -> None:
        """Wait until every rank has finished reading the shared buffers."""
        self._barrier(self._collectives.tag)

    def barrier_after_write(self) -> None:
        """Wait until every rank has finished writing the shared buffers."""
        self._barrier(after_write(self._collectives.tag))

    def run_waiting(
        self, run: Launcher, grid: tuple[int, ...], pointers: tuple[Tensor, ...], numbers: tuple[int, ...]
    ) -> None:
        """Launch a kernel that waits for peers, with ``WAITING`` among its constants.

        Its last pointer is wait_errors_ptr, its last numbers are rank, tag and limit.
        """
        self._run(run, grid, (*pointers, self.wait_errors.codes), numbers, self._collectives.tag)

    def synchronize(self) -> None:
        """Wait for this rank's kernels."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Free all buffers, once this rank's kernels are done with them."""
        self._closed = True
        self.synchronize()
        self.kept.clear()
        self.receive_flags = None
        self._stagings.clear()
        self._buffers.clear()
        self._replaced.clear()

    def _barrier(self, tag: int) -> None:
        world_size = self.group.world_size
        if world_size > 1:
            # Interpreted, programs run one after the other: the first W raise flags, the others wait.
            grid = (world_size,) if self._on_gpu else (2 * world_size,)
            pointers = (self._barrier_flags, self.epoch, self.wait_errors.codes)
            self._run(self._launch_barrier, grid, pointers, (world_size,), tag)

    def _run(
        self, run: Launcher, grid: tuple[int, ...], pointers: tuple[Tensor, ...], numbers: tuple[int, ...], tag: int
    ) -> None:
        limit = int(self._collectives.timeout * NANOSECONDS_PER_SECOND)
        if self._on_gpu:
            run(grid, *pointers, *numbers, self.group.rank, tag, limit)
            return
        # Interpreted, it is this thread that waits, and a kernel that times out cannot trap.
        with self.call_lock.waiting():
            run(grid, *pointers, *numbers, self.group.rank, tag, limit)
        self.wait_errors.raise_if_any()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.group}: shared memory: got a call after close()")


def _keep_after_trap(wait_errors: WaitErrors, *buffers: object) -> None:
    """Never free ``buffers`` after a trap: PyTorch would end the process before it could report the error."""
    if wait_errors.found():
        for kept in buffers:
            keep_forever(kept)
