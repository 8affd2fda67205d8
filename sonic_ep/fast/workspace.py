"""The only owner of memory that ranks share, and of the meetings that keep its reuse in order.

Three transports stand behind one object: CUDA symmetric memory between GPUs, host shared memory for kernels under
Triton's interpreter, a plain buffer for one rank. Kernels see a table of addresses and do not know which.

Orders that hold:

- ``barrier_before_write`` before a shared buffer is written: every rank has finished reading what it held before.
- ``barrier_after_write`` after it is written and before a peer reads it: every rank has finished writing.
- Allocation happens in calls that all ranks make, never in backward and never in graph capture.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from contextlib import nullcontext
from typing import Any

import torch

from sonic_ep.distributed.call_lock import CallLock
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.sync_tag import Phase, Step, SyncTag, after_write
from sonic_ep.errors import ClosedError
from sonic_ep.fast.device_errors import WaitErrors
from sonic_ep.fast.launch import launch
from sonic_ep.fast.symmetric_memory import ALIGNMENT_BYTES, SharedBuffer, Transport, transport_of
from sonic_ep.fast.sync import barrier_kernel, leave_kernel

POISON_BYTE = 0xFF
# A flag at which ranks meet, or of something that arrives: it is up to the tag of their meeting.
TAG_BYTES = 8
NANOSECONDS_PER_SECOND = 1_000_000_000
MEETING = "meeting"
# Seconds for peers to lower this rank's last flag, and for its GPU to run ``leave_kernel``.
LEAVE_SECONDS = 2.0


class Workspace:
    """The shared buffers of one group on one device, by name. Construction is collective, and so is growth.

    waits: bounds the waits of kernels as well as those of the host, and knows where this rank is.
    """

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
        self.wait_errors = WaitErrors(self._collectives, device)
        self._closed = False
        self._strayed: set[Step] = set()
        self._transport = transport or transport_of(self._collectives, device)
        self._buffers: dict[str, SharedBuffer] = {}
        self._replaced: list[SharedBuffer] = []
        self._captured = False
        self._last_stream: torch.cuda.Stream | None = None
        weakref.finalize(self, keep_if_lost, self.wait_errors, self._buffers, self._replaced)
        self.reserve(MEETING, group.world_size * TAG_BYTES, 0)

    @property
    def call_lock(self) -> CallLock:
        """Whose call or backward it is."""
        return self._collectives.call_lock

    @property
    def step(self) -> Step:
        """The call that is being made."""
        return self._collectives.sync_tag.step

    def enter(self, phase: Phase = Phase.MEETING, step: Step | None = None, *, backward: bool = False) -> None:
        """Begin a phase of ``step``, or of the call being made: after what the last one queued, on any stream.

        Raises ``PeerError`` if a kernel of this rank has waited in vain since, ``ClosedError`` after ``close``,
        ``RuntimeError`` for a backward that an error has ended before: what was sent in it may still be there.
        """
        self._open()
        if backward and step is not None and step in self._strayed:
            raise RuntimeError(
                f"{self.group}: step {step.number}: got a backward again that an error has ended before, expected its "
                "forward again first"
            )
        self.wait_errors.raise_if_any()
        self._collectives.sync_tag = SyncTag(step=step or self.step, phase=phase, backward=backward)
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        capturing = torch.cuda.is_current_stream_capturing()
        self._captured |= capturing
        if self._last_stream is not None and self._last_stream != stream and not capturing:
            stream.wait_stream(self._last_stream)
        if not capturing:
            self._last_stream = stream

    def mark_failed(self) -> None:
        """A call or a backward has ended in an error on this rank."""
        sync_tag = self._collectives.sync_tag
        if sync_tag.backward and self.group.world_size > 1:
            self._strayed.add(sync_tag.step)

    def leave(self) -> None:
        """Set this rank's flag on every peer to a tag of ``Phase.LEFT``: kernels that wait for it stop at once.

        Queued on the current stream; the host waits for it, ``LEAVE_SECONDS`` at most. Nothing on one rank.
        """
        if self._closed or self.group.world_size == 1:
            return
        tag = SyncTag(step=self.step, phase=Phase.LEFT).tag
        limit = int(LEAVE_SECONDS * NANOSECONDS_PER_SECOND)
        sizes = (self.group.world_size, self.group.rank, tag, limit)
        launch(leave_kernel, sizes[:1], self._buffers[MEETING].addresses, *sizes, device=self.device, num_warps=1)
        if self.device.type == "cuda":
            shown = torch.cuda.Event()
            shown.record(torch.cuda.current_stream(self.device))
            deadline = time.monotonic() + LEAVE_SECONDS
            while not shown.query() and time.monotonic() < deadline:
                time.sleep(LEAVE_SECONDS / 1000)

    def reserve(self, name: str, nbytes: int, byte: int = POISON_BYTE) -> SharedBuffer:
        """The buffer ``name`` of at least ``nbytes``. Collective if it has to grow; fresh bytes are all ``byte``.

        All ranks ask for the same sizes in the same order. Raises ``RuntimeError`` if it had to grow in graph capture,
        ``ClosedError`` after ``close``.
        """
        self._open()
        held = self._buffers.get(name)
        if held is not None and held.nbytes >= nbytes:
            return held
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self.group}: shared buffer {name!r}: got {0 if held is None else held.nbytes} bytes, expected "
                f"{nbytes} before graph capture: run the call once at this shape before it is captured"
            )
        if held is not None:
            self._retire(held)
        self._buffers[name] = self._allocate(nbytes, byte)
        return self._buffers[name]

    def barrier_before_write(self) -> None:
        """Meet: every rank has finished reading the shared buffers."""
        self._meet(self._collectives.sync_tag.tag)

    def barrier_after_write(self) -> None:
        """Meet: every rank has finished writing the shared buffers."""
        self._meet(after_write(self._collectives.sync_tag.tag))

    def run_waiting(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch a kernel that waits for peers; its last parameters are expiry, rank, tag and limit."""
        self._run(kernel, grid, *arguments, tag=self._collectives.sync_tag.tag, **constants)

    def synchronize(self) -> None:
        """Wait for this rank's kernels."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Let go of all buffers, once this rank's kernels are done with them. Nothing can be shared any more."""
        self._closed = True
        self.synchronize()
        self._buffers.clear()
        self._replaced.clear()

    def _meet(self, tag: int) -> None:
        if self.group.world_size > 1:
            world_size = self.group.world_size
            # On the CPU kernels are interpreted, one program after the other.
            grid = (world_size,) if self.device.type == "cuda" else (2 * world_size,)
            self._run(barrier_kernel, grid, self._buffers[MEETING].addresses, world_size, tag=tag, num_warps=1)

    def _run(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, tag: int, **constants: Any) -> None:
        limit = int(self._collectives.timeout * NANOSECONDS_PER_SECOND)
        wait_arguments = (self.wait_errors.words, self.group.rank, tag, limit)
        # Interpreted, it is this thread that waits; a kernel has no trap then, and is done by now.
        with self.call_lock.waiting() if self.device.type == "cpu" else nullcontext():
            launch(
                kernel,
                grid,
                *arguments,
                *wait_arguments,
                device=self.device,
                debug=True,
                sanitize_overflow=False,
                **constants,
            )
        if self.device.type == "cpu":
            self.wait_errors.raise_if_any()

    def _retire(self, buffer: SharedBuffer) -> None:
        """Keep a buffer that a captured graph may still use; else let it go once no rank uses it any more.

        What uses it may be on any stream of this rank. The other ranks are met by the host, in the allocation that
        follows: a fence could come between meetings of another stream.
        """
        if self._captured:
            self._replaced.append(buffer)
        else:
            self.synchronize()

    def _allocate(self, nbytes: int, byte: int) -> SharedBuffer:
        return self._transport.allocate(ALIGNMENT_BYTES * _blocks(nbytes), byte)

    def _open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.group}: shared memory: got a call after close(), expected none")


def keep_if_lost(wait_errors: WaitErrors, *buffers: object) -> None:
    """Never let ``buffers`` go if a kernel has trapped: PyTorch ends the process where it frees shared memory then.

    That would be before the process could say what has happened.
    """
    if wait_errors.found():
        for kept in buffers:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _blocks(nbytes: int) -> int:
    return max(1, -(-nbytes // ALIGNMENT_BYTES))
