"""The host's waits for other ranks: collectives that end in time, whatever becomes of others, and say who was missing.

``torch.distributed`` tells neither who is waited for nor, with NCCL, that it waits at all. Here every collective is
bounded, and a rank in trouble tells the others where it is through the store of their process group; who has told
nothing is who is missing. Nothing goes to the store as long as all is well.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions

from sonic_ep.autograd_utils import outside_selective_checkpoint
from sonic_ep.distributed.call_lock import CallLock
from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.rank_status import RankStatus, StatusStore
from sonic_ep.distributed.sync_tag import Phase, Step, SyncTag, mismatch
from sonic_ep.errors import CollectiveMismatchError, ConcurrentCallError, PeerError, PeerLostError, PeerTimeoutError

TIMEOUT_SECONDS = 60.0
# A wait that lasts longer is told to the others, and looked after this often.
ANNOUNCE_SECONDS = 1.0
# After a failure, how long others may take to tell that they are alive: longer than it takes them to announce a wait.
GRACE_SECONDS = 2.5
# How long the host looks at a collective of GPUs without a pause, and how long it then rests between two looks.
SPIN_SECONDS = 0.005
REST_SECONDS = 0.0002
# Between two questions to the store.
STORE_REST_SECONDS = 0.005
HOST = torch.device("cpu")


class BoundedCollectives:
    """Host collectives of one group, each of at most ``timeout`` seconds.

    meeting: where this rank is, for messages and for the ranks that it meets; the ranks' meetings have to be the same.

    Every collective raises ``PeerTimeoutError`` when its time is up, ``PeerLostError`` when a rank has gone and
    ``CollectiveMismatchError`` when one came from elsewhere. The process group is of no more use then.
    """

    def __init__(self, group: EPGroup, timeout: float = TIMEOUT_SECONDS) -> None:
        self.group = group
        self.timeout = timeout
        self.sync_tag = SyncTag(step=Step(), phase=Phase.MEETING)
        self._collectives = 0
        self._status_store = StatusStore.of(group)
        self._together = False
        self._astray = False
        self._errors = 0
        # Whether what this rank has begun is the exchange of numbers of its meeting, not what follows it.
        self._at_meeting = False
        # Collectives until the last meeting of all: what a rank told before it is of no more use.
        self._met = 0
        # One call at a time, and one backward: recompute in backward calls from within, so the same thread may.
        self.call_lock = CallLock(f"{group}: ExpertParallel")

    @property
    def object_number(self) -> int:
        """How many objects like this one the group had before."""
        return self._status_store.number

    @property
    def step(self) -> Step:
        """The call that is being made."""
        return self.sync_tag.step

    def begin(self, step: Step) -> None:
        """What follows is of ``step``."""
        self.sync_tag = SyncTag(step=step, phase=Phase.MEETING)
        self.call_lock.begun = True

    def mark_failed(self) -> None:
        """A call or a backward has ended in an error here: the others may be anywhere in it, or past it."""
        self._astray = self.group.world_size > 1
        self._errors += 1

    def sync(self, sync_tag: SyncTag, device: torch.device, own: int = 0) -> list[int]:
        """Collective. ``own`` of every rank once all are at ``sync_tag``; what follows belongs to it."""
        self.sync_tag = sync_tag
        return self.numbers(own, device)

    @outside_selective_checkpoint
    def numbers(self, own: int, device: torch.device) -> list[int]:
        """Collective. ``own`` (63 bits) of every rank, in rank order, once all are seen to be at the same meeting."""
        if self.group.world_size == 1:
            return [own]
        mine = torch.tensor([self.sync_tag.tag, own], dtype=torch.int64, device=self.group.device_for(device))
        self._at_meeting = True
        try:
            if self._astray:
                self._find_the_others()
            tags, numbers = self.all_gather(mine).t().tolist()
        finally:
            self._at_meeting = False
        for rank, tag in enumerate(tags):
            if tag != self.sync_tag.tag:
                raise CollectiveMismatchError(f"{self.group}: {mismatch(self.sync_tag, rank, SyncTag.decode(tag))}")
        self._met = self._collectives
        return [int(number) for number in numbers]

    @outside_selective_checkpoint
    def objects(self, own: Any, phase: Phase) -> list[Any]:
        """Collective. ``own`` of every rank, pickled, in rank order. ``phase``: what for."""
        if self.group.world_size == 1:
            return [own]
        before, self.sync_tag = self.sync_tag, replace(self.sync_tag, phase=phase)
        pickled = torch.frombuffer(bytearray(pickle.dumps(own)), dtype=torch.uint8)
        sizes = self.numbers(pickled.numel(), HOST)
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
        padded[: pickled.numel()] = pickled
        gathered = self.all_gather(padded.to(self.group.device_for(HOST))).cpu()
        self.sync_tag = before
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(gathered, sizes, strict=True)]

    def all_gather(self, local: Tensor) -> Tensor:
        """Collective. ``local`` of every rank, equal shapes, (W, *local.shape)."""
        if self.group.world_size == 1:
            return local.unsqueeze(0).clone()
        gathered = local.new_empty((self.group.world_size, *local.shape))
        # The shape is the same on all ranks, so all of them skip an empty exchange together.
        if gathered.numel() > 0:
            options = AllgatherOptions()
            options.timeout = self._time_of_operation(local)
            group = self._process_group(local)
            flat, own = gathered.view(-1), local.contiguous().view(-1)
            self._come_together(local)
            self._finish(lambda: group._allgather_base(flat, own, options), local)
        return gathered

    def all_to_all_rows(self, rows: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """Collective. Rows (N, ...) cut by ``send_splits``, piece q to rank q; the pieces received, in rank order."""
        if self.group.world_size == 1:
            return rows.clone()
        received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
        options = AllToAllOptions()
        options.timeout = self._time_of_operation(rows)
        group = self._process_group(rows)
        own = rows.contiguous()
        self._come_together(rows)
        self._finish(lambda: group.alltoall_base(received, own, receive_splits, send_splits, options), rows)
        return received

    def leave(self, why: str) -> None:
        """Tell the others that this rank will come no more, and why."""
        self._status_store.tell(RankStatus(collectives=self._collectives, left=True, text=why))

    def why_left(self, rank: int) -> str | None:
        """The error with which ``rank`` left, from the store; None if it has not left, or reported none."""
        notice = self._status_store.statuses().get(rank)
        return notice.text if notice is not None and notice.left else None

    def withdraw(self) -> None:
        """The object that this is for was never used; see ``object_number``."""
        self._status_store.withdraw()

    def _find_the_others(self) -> None:
        """Wait until every other rank is at this meeting: back from an error, too, or waiting in its collective.

        A collective begun while others are in one of another meeting would be paired with it.
        """
        # Who is here already may go on as soon as it is told, and be back from another error when it is looked for.
        seen = {rank for rank, notice in self._status_store.statuses().items() if self._is_of_this_meeting(notice)}
        self._tell_where(back=True)
        self._wait_for(lambda: self._elsewhere(seen))
        self._astray = False

    def _elsewhere(self, seen: set[int]) -> list[int]:
        """The ranks that were not seen at this meeting; none where nobody can tell. Adds to ``seen`` those that are."""
        statuses = self._status_store.statuses()
        seen |= {rank for rank, notice in statuses.items() if rank not in seen and self._is_here(rank, notice)}
        others = set(range(self.group.world_size)) - {self.group.rank}
        return [] if self._status_store.broken else sorted(others - seen)

    def _is_here(self, rank: int, notice: RankStatus) -> bool:
        """Whether a rank that has told ``notice`` is at this meeting, of which this rank has begun no collective.

        False where it may still come. Raises ``PeerError`` if it will not.
        """
        begun = notice.collectives - self._collectives
        if notice.left and begun <= 0:
            raise self._left(rank, notice)
        if self._is_of_this_meeting(notice):
            return True
        if self._is_stale(notice):
            return False
        if begun > 0 or notice.back:
            raise CollectiveMismatchError(
                f"{self.group}: rank {rank} is in {self._place_of(notice)}, while this rank left a step by an error "
                f"and came to {self.sync_tag}"
            )
        return False

    def _is_of_this_meeting(self, notice: RankStatus) -> bool:
        """Back from an error, a rank looks for the others before it begins the collective; else it waits in it."""
        begun = notice.collectives - self._collectives
        return not notice.left and notice.tag == self.sync_tag.tag and begun == (0 if notice.back else 1)

    def _is_stale(self, notice: RankStatus) -> bool:
        """Whether it was told before all met last, or on the way back from an earlier error than this rank's last."""
        return notice.collectives < self._met or (notice.back and notice.errors < self._errors)

    def _place_of(self, notice: RankStatus) -> str:
        """Where a rank that has told ``notice`` is: not in the collective of this rank, even if in the same phase."""
        here = notice.text == str(self.sync_tag)
        return f"{notice.text}, after another number of collectives" if here else notice.text

    def _left(self, rank: int, notice: RankStatus) -> PeerLostError:
        return PeerLostError(
            f"{self.group}: rank {rank} left ({notice.text}) while it was waited for in {self.sync_tag}"
        )

    def _come_together(self, tensor: Tensor) -> None:
        """PyTorch connects GPUs in their first collective, and waits there as long as it likes: all have to be here."""
        if self._together or tensor.device.type == "cpu":
            return
        self._together = True
        self._status_store.come()
        self._wait_for(self._status_store.absent)

    def _wait_for(self, absent: Callable[[], list[int]]) -> None:
        """Ask the store until nobody is ``absent``."""
        deadline = time.monotonic() + self.timeout
        with self.call_lock.waiting():
            while missing := absent():
                if time.monotonic() > deadline:
                    raise PeerTimeoutError(self._waited_for(_named(missing)))
                time.sleep(STORE_REST_SECONDS)

    def _process_group(self, tensor: Tensor) -> dist.ProcessGroup:
        """What moves ``tensor``, less what PyTorch puts in front of it to debug (``TORCH_DISTRIBUTED_DEBUG=DETAIL``).

        That compares ranks before each collective, waits for them by its own clock, and says less of them.
        """
        group = self.group.process_group
        assert group is not None
        return getattr(group._get_backend(tensor.device), "wrapped_pg", group)

    def _time_of_operation(self, tensor: Tensor) -> timedelta:
        """What the process group is told. NCCL's own guard would end the process without a word of the rank."""
        return timedelta(seconds=self.timeout if tensor.device.type == "cpu" else 2 * self.timeout + 60)

    def _finish(self, begin: Callable[[], dist.Work], tensor: Tensor) -> None:
        """Begin a collective of this rank's ``tensor``, and wait for it."""
        self._collectives += 1
        began = time.monotonic()
        done = _done_on_host if tensor.device.type == "cpu" else _done_on_device
        with self.call_lock.waiting():
            try:
                self._wait_in_time(begin(), done, began)
            except (PeerError, ConcurrentCallError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:
                late = time.monotonic() - began >= self.timeout
                raise (self._timed_out() if late else self._lost(error)) from error

    def _wait_in_time(self, work: dist.Work, done: Callable[[dist.Work, float], bool], began: float) -> None:
        while not done(work, ANNOUNCE_SECONDS):
            self._tell_where()
            self._raise_if_somebody_left()
            if time.monotonic() - began > self.timeout:
                raise self._timed_out()

    def _tell_where(self, *, back: bool = False) -> None:
        here = self.sync_tag
        tag = here.tag if self._at_meeting else 0
        self._status_store.tell(
            RankStatus(
                collectives=self._collectives, left=False, text=str(here), tag=tag, back=back, errors=self._errors
            )
        )

    def _raise_if_somebody_left(self) -> None:
        for rank, notice in self._status_store.statuses().items():
            if notice.left and notice.collectives < self._collectives:
                raise self._left(rank, notice)
            if notice.lost and self.group.rank not in notice.lost:
                raise PeerLostError(
                    f"{self.group}: lost {_named(notice.lost)}, waited for in {self.sync_tag}: "
                    f"rank {rank} {notice.text}"
                )
            begun = notice.collectives - self._collectives
            about_to_join = self._at_meeting and notice.tag == self.sync_tag.tag
            if notice.back and not self._is_stale(notice) and begun < 0 and not about_to_join:
                raise CollectiveMismatchError(
                    f"{self.group}: rank {rank} left a step by an error and came to {self._place_of(notice)}, expected "
                    f"it in {self.sync_tag}"
                )

    def _timed_out(self) -> PeerTimeoutError:
        self._tell_where()
        return PeerTimeoutError(self._waited_for(self._missing("waited in vain")))

    def _waited_for(self, ranks: str) -> str:
        waited = f"{self.group}: waited {self.timeout:g} s for {ranks} in {self.sync_tag}"
        return f"{waited}; did it fail, or make another call?"

    def _lost(self, error: RuntimeError) -> PeerLostError:
        self._tell_where()
        self._raise_if_somebody_left()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        missing = self._missing("lost it, too")
        return PeerLostError(f"{self.group}: lost {missing}, waited for in {self.sync_tag}: {reason}")

    def _missing(self, told: str) -> str:
        """The ranks that have not told, after ``GRACE_SECONDS`` at most, that they wait in the same collective.

        That they are missing is told to those who have: whoever finds it out first may take the store along.
        """
        deadline = time.monotonic() + GRACE_SECONDS
        while len(self._silent()) > 1 and not self._status_store.broken and time.monotonic() < deadline:
            time.sleep(ANNOUNCE_SECONDS / 10)
        missing = self._silent()
        if self._status_store.broken and not self._status_store.statuses():
            return "rank 0 of the world (which holds the store of the process group, and does not answer)"
        if not missing:
            return self._who_left()
        self._status_store.tell(RankStatus(collectives=self._collectives, left=False, text=told, lost=tuple(missing)))
        self._stay_for(set(range(self.group.world_size)) - {self.group.rank, *missing})
        return _named(missing)

    def _who_left(self) -> str:
        """Where nobody is silent: who has begun as many collectives and then gone, or is in another one of them."""
        words = []
        for rank, notice in self._status_store.statuses().items():
            if notice.left:
                words.append(f"rank {rank} (which left: {notice.text})")
            elif not notice.lost and notice.text != str(self.sync_tag):
                words.append(f"rank {rank} (which is in {notice.text})")
        return ", ".join(words) or "a rank that is not known"

    def _stay_for(self, ranks: set[int]) -> None:
        """Until each of ``ranks`` has found out who is missing, ``GRACE_SECONDS`` at most."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and not self._status_store.broken:
            statuses = self._status_store.statuses()
            if all(rank in statuses and (statuses[rank].lost or statuses[rank].left) for rank in ranks):
                return
            time.sleep(ANNOUNCE_SECONDS / 10)

    def _silent(self) -> list[int]:
        statuses = self._status_store.statuses()
        here = {rank for rank, notice in statuses.items() if notice.collectives >= self._collectives}
        return sorted(set(range(self.group.world_size)) - here - {self.group.rank})


def _named(ranks: Sequence[int]) -> str:
    """Those ranks, in words."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _done_on_host(work: dist.Work, seconds: float) -> bool:
    """Whether ``work`` ends within ``seconds``. Raises ``RuntimeError`` if it fails."""
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():
            return False
        # It ended meanwhile: in failure, which this raises again, or well.
        work.wait()
    return True


def _done_on_device(work: dist.Work, seconds: float) -> bool:
    """The same for a collective of GPUs, that the current stream waits for; the host only looks."""
    began = time.monotonic()
    while not work.is_completed():
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        time.sleep(0 if waited < SPIN_SECONDS else REST_SECONDS)
    work.wait()
    return True
