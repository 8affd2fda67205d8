"""What ranks in trouble report to each other, through the store of their process group."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.process_identity import ProcessIdentity

# The store may be held by the rank that failed, and then it never answers.
ANSWER_SECONDS = 2.0

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """A rank's last report: collectives begun, whether it left, phase and step (or error) as text, ranks lost to it.

    tag: of the collective that it waits in, or left because others were elsewhere; else 0.
    """

    collectives: int
    left: bool
    text: str
    lost: tuple[int, ...] = ()
    tag: int = 0


class StatusStore:
    """Statuses of the ranks of one group for one object. Nothing here raises, or waits longer than ``ANSWER_SECONDS``.

    store: None in a group of one. number: of earlier objects of the group. others: the other ranks. broken: no answer.
    Each rank reports its process when it makes the object: one that is dead or busy does not answer later.
    """

    def __init__(self, group: EPGroup, store: Any) -> None:
        self._group = group
        self._store = store
        self.others = [rank for rank in range(group.world_size) if rank != group.rank]
        self._found: dict[int, RankStatus] = {}
        self._processes: dict[int, ProcessIdentity] = {}
        self.broken = False
        self.number = 0
        self._answer(self._register)

    @staticmethod
    def of(group: EPGroup) -> StatusStore:
        """The store for a group's next object; ranks of a group make objects in the same order."""
        process_group = group.process_group
        return StatusStore(group, process_group.get_group_store() if process_group and group.world_size > 1 else None)

    def withdraw(self) -> None:
        """The object was never used: the next one takes its number."""
        self._answer(lambda: self._store.add(f"sonic_ep/objects/{self._group.rank}", -1))

    def know(self, processes: Mapping[int, ProcessIdentity]) -> None:
        """The processes of ranks, as they have told themselves."""
        self._processes |= processes

    def processes(self) -> Mapping[int, ProcessIdentity]:
        """The processes of the other ranks that have reported theirs, by rank."""
        keys = {rank: _process_key(rank) for rank in self.others if rank not in self._processes}
        if keys:
            found = self._answer(lambda: {r: self._store.get(k) for r, k in keys.items() if self._store.check([k])})
            self._processes |= {rank: pickle.loads(pickled) for rank, pickled in (found or {}).items()}
        return self._processes

    def arrive(self) -> None:
        """Report that this rank is about to connect its GPU."""
        self._answer(lambda: self._store.set(f"{self._key(self._group.rank)}/arrived", "1"))

    def absent(self) -> list[int]:
        """The other ranks that have not arrived; none where the store does not answer."""
        return (
            self._answer(lambda: [r for r in self.others if not self._store.check([f"{self._key(r)}/arrived"])]) or []
        )

    def silent(self, collectives: int) -> list[int]:
        """The other ranks that have not reported beginning ``collectives`` collectives."""
        reported = {rank for rank, status in self.statuses().items() if status.collectives >= collectives}
        return [rank for rank in self.others if rank not in reported]

    def report(self, status: RankStatus) -> None:
        """Replace this rank's status."""
        self._answer(lambda: self._store.set(self._key(self._group.rank), pickle.dumps(status)))

    def statuses(self) -> dict[int, RankStatus]:
        """The last known statuses of the other ranks, by rank."""
        keys = {rank: self._key(rank) for rank in self.others}
        found = self._answer(lambda: {r: self._store.get(key) for r, key in keys.items() if self._store.check([key])})
        if found is not None:
            self._found = {rank: pickle.loads(pickled) for rank, pickled in found.items()}
        return self._found

    def _key(self, rank: int) -> str:
        return f"sonic_ep/statuses/{self.number}/{rank}"

    def _register(self) -> None:
        self.number = self._store.add(f"sonic_ep/objects/{self._group.rank}", 1) - 1
        self._store.set(_process_key(self._group.rank), pickle.dumps(ProcessIdentity.own()))

    def _answer(self, ask: Callable[[], AnswerT]) -> AnswerT | None:
        """The answer of the store; None if it does not come in time."""
        if self._store is None or self.broken:
            return None
        answers: list[AnswerT] = []

        def asking() -> None:
            with suppress(RuntimeError, EOFError, OSError):
                answers.append(ask())

        thread = threading.Thread(target=asking, daemon=True)
        # From Python 3.12 on no thread starts while the interpreter exits; a store call without one might block it.
        try:
            thread.start()
        except RuntimeError:
            return None
        thread.join(ANSWER_SECONDS)
        self.broken = not answers
        return answers[0] if answers else None


def _process_key(rank: int) -> str:
    """One for all objects of a group: there may be many of them, and the store outlives them."""
    return f"sonic_ep/processes/{rank}"
