"""Collectives that end within a timeout and name the missing rank; those of ``torch.distributed`` do not.

A rank that waits long, fails or leaves reports it through the store of the process group; a rank without a report is
the missing one. The first GPU collective reports, too.
"""

import pickle
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sonic_ep import compat
from sonic_ep.autograd_utils import outside_selective_checkpoint
from sonic_ep.distributed.call_lock import CallLock
from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.process_identity import ProcessIdentity
from sonic_ep.distributed.rank_status import RankStatus, StatusStore
from sonic_ep.distributed.sync_tag import Phase, Step, SyncTag, at_phase, mismatch, step_of
from sonic_ep.errors import CollectiveMismatchError, ConcurrentCallError, PeerError, PeerLostError, PeerTimeoutError

# Where the process group does not tell its own.
TIMEOUT_SECONDS = 60.0
# Between two reports of a rank that waits.
ANNOUNCE_SECONDS = 1.0
# After a failure, for the others to report that they are alive: longer than ANNOUNCE_SECONDS.
GRACE_SECONDS = 2.5
# The host polls a collective of GPUs for SPIN_SECONDS without a pause, then every REST_SECONDS.
SPIN_SECONDS, REST_SECONDS = 0.005, 0.0002
HOST = torch.device("cpu")
# What a rank reports of those that it has given up waiting for.
LATE = "timed out waiting for it"

WorkT = TypeVar("WorkT")


@dataclass(frozen=True, kw_only=True)
class Fate:
    """died: whether a rank's process is known to be gone. text: what is known, for messages."""

    died: bool
    text: str


class BoundedCollectives:
    """Collectives of one group. tag: where this rank is, compared across ranks; ``sync_tag`` is the same as an object.

    call_lock: the object's.
    timeout: seconds to wait for another rank; None: those of the process group. tags_shown: the tags that other ranks'
    kernels show to this rank while they wait for it and it has queued none, by rank.

    Every collective raises ``PeerTimeoutError`` after ``timeout`` seconds, ``PeerLostError`` when a rank has gone and
    ``CollectiveMismatchError`` when one is at another tag. The process group is unusable after that.
    """

    def __init__(self, group: EPGroup, timeout: float | None = None) -> None:
        self.group = group
        self.timeout = group.timeout() or TIMEOUT_SECONDS if timeout is None else timeout
        self.tags_shown: Callable[[], Mapping[int, int]] = dict
        # A number, since every phase of every call sets it. Messages decode it.
        self.tag = at_phase(0, Phase.SYNC)
        self.call_lock = CallLock(str(group))
        self._begun = 0
        self._connected = False
        self._status_store = StatusStore.of(group)
        # How many objects the group had before.
        self.object_number = self._status_store.number

    @property
    def sync_tag(self) -> SyncTag:
        """Where this rank is."""
        return SyncTag.decode(self.tag)

    @sync_tag.setter
    def sync_tag(self, here: SyncTag) -> None:
        self.tag = here.tag

    @property
    def step(self) -> Step:
        """The call in progress."""
        return step_of(self.tag)

    def begin(self, step: Step) -> None:
        """Make ``step``, which every rank begins, the current call."""
        self.tag = at_phase(step.bits, Phase.SYNC)
        self.call_lock.begun = True

    def sync(
        self, phase: Phase, device: torch.device, own: int = 0, step: Step | None = None, *, backward: bool = False
    ) -> list[int]:
        """Collective. Begin a phase of ``step`` (None: the current call). ``own`` of every rank, once all are in it."""
        self.sync_tag = SyncTag(step=step or self.step, phase=phase, backward=backward)
        return self.numbers(own, device)

    @outside_selective_checkpoint
    def numbers(self, own: int, device: torch.device) -> list[int]:
        """Collective. ``own`` (63 bits) of every rank, in rank order, once all are seen to be at the same tag."""
        if self.group.world_size == 1:
            return [own]
        mine = torch.tensor([self.tag, own], dtype=torch.int64, device=self.group.device_for(device))
        tags, numbers = self.all_gather(mine).t().tolist()
        for rank, tag in enumerate(tags):
            if tag != self.tag:
                raise CollectiveMismatchError(f"{self.group}: {mismatch(self.sync_tag, rank, SyncTag.decode(tag))}")
        return [int(number) for number in numbers]

    @outside_selective_checkpoint
    def objects(self, own: Any, phase: Phase) -> list[Any]:
        """Collective. ``own`` of every rank, pickled, in rank order. ``phase``: of the tag meanwhile."""
        if self.group.world_size == 1:
            return [own]
        before, self.tag = self.tag, self._in_phase(phase)
        pickled = pickle.dumps(own)
        sizes = self.numbers(len(pickled), HOST)
        padded = torch.frombuffer(bytearray(pickled.ljust(max(sizes), b"\0")), dtype=torch.uint8)
        gathered = self.all_gather(padded.to(self.group.device_for(HOST))).cpu()
        self.tag = before
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(gathered, sizes, strict=True)]

    def all_gather(self, local: Tensor) -> Tensor:
        """Collective. (W, *local.shape): ``local`` of every rank, of one shape and dtype, in rank order."""
        if self.group.world_size == 1:
            return local.unsqueeze(0).clone()
        gathered = local.new_empty((self.group.world_size, *local.shape))
        # The shape is the same on all ranks, so all of them skip an empty exchange together.
        if gathered.numel() > 0:
            flat, own = gathered.view(-1), local.contiguous().view(-1)
            others = self._status_store.others
            self._run(lambda group, timeout: compat.all_gather(group, flat, own, timeout), local, others)
        return gathered

    def all_to_all_rows(self, rows: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """Collective. Rows (N, ...) cut by ``send_splits``, part q to rank q; the parts received, in rank order."""
        if self.group.world_size == 1:
            return rows.clone()
        received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
        own, splits = rows.contiguous(), (receive_splits, send_splits)
        self._run(lambda group, timeout: compat.all_to_all(group, received, own, *splits, timeout), rows)
        return received

    def leave(self, why: str, tag: int = 0) -> None:
        """Report that this rank has left, and why. tag: where others were not, if it left for that."""
        self._status_store.report(RankStatus(collectives=self._begun, left=True, text=why, tag=tag))

    def why_left(self, rank: int) -> str | None:
        """The error with which ``rank`` left, from the store; None if it has not left, or reported none."""
        status = self._status_store.statuses().get(rank)
        return status.text if status is not None and status.left else None

    def withdraw(self) -> None:
        """Stop counting this object: it was never used."""
        self._status_store.withdraw()

    def know(self, processes: Mapping[int, ProcessIdentity]) -> None:
        """The processes of all ranks: as the store would tell, which may end with one of them."""
        self._status_store.know(processes)

    def late(self, ranks: Sequence[int], here: SyncTag, names: str = "") -> PeerError:
        """The error for ``ranks`` that have not come to ``here`` in time. names: what to call them."""
        fates = [self._fate(rank) for rank in ranks]
        said = "; ".join(fate.text for fate in fates) or "did it fail, or make another call?"
        error = PeerLostError if any(fate.died for fate in fates) else PeerTimeoutError
        return error(f"{self.group}: waited {self.timeout:g} s for {names or _named(ranks)} in {here}: {said}")

    def wait_for(self, absent: Callable[[], Sequence[int]], phase: Phase) -> None:
        """Collective. Wait on the host until no rank is ``absent``, which tells those that have not come."""
        self._begun += 1
        if absent():
            before, self.tag = self.tag, self._in_phase(phase)
            self._finish(lambda: None, lambda _, seconds: _polled(lambda: not absent(), seconds), absent=absent)
            self.tag = before

    def _in_phase(self, phase: Phase) -> int:
        return replace(self.sync_tag, phase=phase).tag

    def _run(
        self, start: Callable[[dist.ProcessGroup, timedelta], dist.Work], tensor: Tensor, needed: Sequence[int] = ()
    ) -> None:
        """Start a collective of this rank's ``tensor``, and wait for it. needed: ranks without which it cannot end."""
        group = self.group.process_group
        assert group is not None
        group, on_host = compat.unwrapped(group, tensor.device), tensor.device.type == "cpu"
        if not (on_host or self._connected):
            self._connect()
        # NCCL's own watchdog would end the process before the missing rank is named.
        limit = timedelta(seconds=self.timeout if on_host else 2 * self.timeout + 60)
        self._begun += 1
        self._finish(lambda: start(group, limit), _done_on_host if on_host else _done_on_device, needed)

    def _finish(
        self,
        start: Callable[[], WorkT],
        done: Callable[[WorkT, float], bool],
        needed: Sequence[int] = (),
        absent: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        """Start and wait. done: whether it ends within so many seconds. needed: see ``_run``. absent: have not come."""
        began = time.monotonic()
        with self.call_lock.waiting():
            try:
                work = start()
                while not done(work, ANNOUNCE_SECONDS):
                    self._report()
                    self._raise_if_elsewhere(absent)
                    self._raise_if_any_left(absent)
                    self._raise_if_any_died((*needed, *absent()))
                    if time.monotonic() - began > self.timeout:
                        raise self._failure(None, late=True)
            except (PeerError, ConcurrentCallError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:
                raise self._failure(error, late=time.monotonic() - began >= self.timeout) from error

    def _connect(self) -> None:
        """Wait for all ranks before the first collective of GPUs, in which PyTorch connects them without a timeout."""
        self._connected = True
        self._status_store.arrive()
        with self.call_lock.waiting():
            self._until(self._all_arrived, self.timeout)
        if absent := self._status_store.absent():
            raise self.late(absent, self.sync_tag)

    def _all_arrived(self) -> bool:
        """Whether all ranks have come to connect. Raises ``PeerLostError`` if one has left or died instead."""
        absent = self._status_store.absent()
        self._raise_if_any_died(absent)
        for rank, status in self._status_store.statuses().items() if absent else ():
            if rank in absent and status.left:
                raise PeerLostError(f"{self.group}: {left(rank, status.text, self.sync_tag)}")
        return not absent

    def _report(self, text: str = "", lost: Sequence[int] = ()) -> None:
        here = self.sync_tag
        status = RankStatus(collectives=self._begun, left=False, text=text or str(here), lost=tuple(lost), tag=self.tag)
        self._status_store.report(status)

    def _raise_if_any_left(self, absent: Callable[[], Sequence[int]] = tuple) -> None:
        for rank, status in self._status_store.statuses().items():
            # Those with as many collectives may have left after their part.
            if status.left and (status.collectives < self._begun or rank in absent()):
                # It may have found this rank at another tag, and left since tags were compared here.
                self._raise_if_elsewhere(absent)
                raise PeerLostError(f"{self.group}: {left(rank, status.text, self.sync_tag)}")
            if status.lost and self.group.rank not in status.lost:
                raise self._lost_to(rank, status)

    def _lost_to(self, rank: int, status: RankStatus) -> PeerError:
        """The error for ranks that another one, ``rank``, has reported: late, as that one raises, or lost."""
        fates = [self._fate(lost) for lost in status.lost]
        lost = f"{_named(status.lost)}, waited for in {self.sync_tag}: rank {rank} {status.text}"
        said = "; ".join(fate.text for fate in fates)
        if status.text == LATE and not any(fate.died for fate in fates):
            return PeerTimeoutError(f"{self.group}: {lost}; {said}")
        return PeerLostError(f"{self.group}: lost {lost}; {said}")

    def _raise_if_elsewhere(self, absent: Callable[[], Sequence[int]]) -> None:
        """Raise if a rank waits at another tag: on the host, in as many collectives, or, if absent, in a kernel."""
        statuses = self._status_store.statuses()
        shown = {rank: one.tag for rank, one in statuses.items() if one.tag and one.collectives == self._begun}
        if absent():
            shown |= {rank: tag for rank, tag in self.tags_shown().items() if rank in absent()}
        for rank, tag in shown.items():
            there = SyncTag.decode(tag)
            if there.phase is Phase.LEFT:
                # It reports why before it shows this phase, perhaps after ``statuses`` was asked.
                why = self.why_left(rank) or "see its own output for the error"
                raise PeerLostError(f"{self.group}: {left(rank, why, self.sync_tag)}")
            if tag != self.tag:
                raise CollectiveMismatchError(f"{self.group}: {mismatch(self.sync_tag, rank, there)}")

    def _raise_if_any_died(self, ranks: Sequence[int]) -> None:
        died = [rank for rank in ranks if self._fate(rank).died]
        if died:
            self._tell("has seen that it died", died)
            said = "; ".join(self._fate(rank).text for rank in died)
            raise PeerLostError(f"{self.group}: {said} while it was waited for in {self.sync_tag}")

    def _failure(self, error: RuntimeError | None, *, late: bool) -> PeerError:
        """The error for a collective that failed with ``error``, or, if ``late``, timed out."""
        self._report()
        if not late:
            self._raise_if_any_left()
        missing = self._missing(LATE if late else "lost it, too")
        names = self._names_of(missing)
        if late:
            return self.late(missing, self.sync_tag, names)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        died = "".join(f"; {fate.text}" for fate in map(self._fate, missing) if fate.died)
        return PeerLostError(f"{self.group}: lost {names}, waited for in {self.sync_tag}: {reason}{died}")

    def _missing(self, text: str) -> list[int]:
        """The ranks that, within ``GRACE_SECONDS``, have not reported reaching this collective; told to the others."""
        store = self._status_store
        self._until(lambda: len(store.silent(self._begun)) <= 1)
        missing = store.silent(self._begun)
        if store.broken and not store.statuses():
            return []
        if missing:
            self._tell(text, missing)
        return missing

    def _names_of(self, missing: Sequence[int]) -> str:
        store = self._status_store
        if store.broken and not store.statuses():
            return "rank 0 of the world (which holds the store of the process group, and does not answer)"
        gone = (f"rank {rank} (which left: {s.text})" for rank, s in store.statuses().items() if s.left)
        return _named(missing) if missing else next(gone, "a rank that is not known")

    def _tell(self, text: str, missing: Sequence[int]) -> None:
        """Report ``missing`` to the others, and wait until they know: this rank may end next, and with it the store."""
        self._report(text, missing)
        store = self._status_store
        self._until(lambda: all(s.lost or s.left for rank, s in store.statuses().items() if rank not in missing))

    def _fate(self, rank: int) -> Fate:
        """What has become of the process of ``rank``."""
        process = self._status_store.processes().get(rank)
        died = process.has_died() if process is not None else None
        if process is None or died is None:
            return Fate(died=False, text=f"whether rank {rank} is alive is not known, as on another machine")
        who = f"rank {rank} (process {process.pid})"
        busy = f"{who} is alive, so busy (saving, compiling) or in another call: a larger timeout waits for it longer"
        return Fate(died=died, text=f"{who} has died" if died else busy)

    def _until(self, reached: Callable[[], bool], seconds: float = GRACE_SECONDS) -> None:
        """Wait until ``reached``, ``seconds`` at most, while the store answers."""
        deadline = time.monotonic() + seconds
        while not self._status_store.broken and time.monotonic() < deadline and not reached():
            time.sleep(ANNOUNCE_SECONDS / 10)


def left(rank: int, why: str, here: SyncTag) -> str:
    """The message for a rank that left."""
    return f"rank {rank} left ({why}) while it was waited for in {here}"


def differing(values: Sequence[object]) -> str:
    """Each value with its ranks, the rarest first; empty if all are equal.

    >>> differing(["64", "128", "64"]), differing([1, 1])
    ('128 on rank 1, 64 on ranks 0, 2', '')
    """
    counts = Counter(values)
    if len(counts) == 1:
        return ""
    ranks_of = {value: [rank for rank, own in enumerate(values) if own == value] for value in counts}
    return ", ".join(f"{value} on {_named(ranks_of[value])}" for value in sorted(counts, key=counts.__getitem__))


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _done_on_host(work: dist.Work, seconds: float) -> bool:
    """Whether ``work`` ends within ``seconds``. Raises ``RuntimeError`` if it fails."""
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():
            return False
        # It has ended meanwhile. If it failed, this raises again.
        work.wait()
    return True


def _done_on_device(work: dist.Work, seconds: float) -> bool:
    """The same for a collective of GPUs: the current stream waits for it, and the host polls."""
    if not _polled(work.is_completed, seconds):
        return False
    work.wait()
    return True


def _polled(reached: Callable[[], bool], seconds: float) -> bool:
    """Whether ``reached`` within ``seconds``."""
    began = time.monotonic()
    while not reached():
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        time.sleep(0 if waited < SPIN_SECONDS else REST_SECONDS)
    return True
