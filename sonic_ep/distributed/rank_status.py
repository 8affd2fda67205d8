"""What ranks in trouble report to each other, through the store of their process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sonic_ep.distributed.group import EPGroup

# The store may be held by the rank that failed, and then it never answers.
ANSWER_SECONDS = 2.0

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """What a rank has reported last.

    collectives: how many it has begun. left: whether it will begin no more. lost: ranks that it has waited for until
    its time was up. text: its phase and step, or the error with which it left.
    """

    collectives: int
    left: bool
    text: str
    lost: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.collectives} {int(self.left)} {','.join(map(str, self.lost)) or '-'} {self.text}"

    @staticmethod
    def parsed(written: str) -> RankStatus:
        """The status of which ``written`` is the ``str``.

        >>> RankStatus.parsed(str(RankStatus(collectives=3, left=True, text="ValueError: no", lost=(1, 4))))
        RankStatus(collectives=3, left=True, text='ValueError: no', lost=(1, 4))
        """
        collectives, left, lost, text = written.split(" ", 3)
        ranks = () if lost == "-" else tuple(map(int, lost.split(",")))
        return RankStatus(collectives=int(collectives), left=left == "1", text=text, lost=ranks)


class StatusStore:
    """Statuses of the ranks of one group for one object. number: how many objects the group had before.

    broken: whether the store has failed to answer. Nothing here raises, or waits longer than ``ANSWER_SECONDS``.
    store: None in a group of one, where nothing is reported.
    """

    def __init__(self, group: EPGroup, store: Any) -> None:
        self._group = group
        self._store = store
        self._others = [rank for rank in range(group.world_size) if rank != group.rank]
        self._found: dict[int, RankStatus] = {}
        self.broken = False
        self.number = (self._count(1) or 1) - 1

    @staticmethod
    def of(group: EPGroup) -> StatusStore:
        """The store for a group's next object; ranks of a group make objects in the same order."""
        process_group = group.process_group
        return StatusStore(group, process_group.get_group_store() if process_group and group.world_size > 1 else None)

    def withdraw(self) -> None:
        """The object was never used: the next one takes its number."""
        self._count(-1)

    def come(self) -> None:
        """Report that this rank is about to begin its first collective."""
        self._answer(lambda: self._store.set(f"{self._key(self._group.rank)}/came", "1"))

    def absent(self) -> list[int]:
        """The ranks that have not reported ``come``; none if the store does not answer."""
        return self._answer(lambda: [r for r in self._others if not self._store.check([f"{self._key(r)}/came"])]) or []

    def report(self, status: RankStatus) -> None:
        """Replace this rank's status."""
        key = self._key(self._group.rank)
        # The text of an error may not be valid UTF-8: file names are not.
        written = str(status).encode(errors="surrogatepass")
        self._answer(lambda: self._store.set(key, written))

    def statuses(self) -> dict[int, RankStatus]:
        """The statuses of the other ranks that have reported any, by rank; the last known ones if the store is gone."""
        found = self._answer(lambda: {r: self._read(r) for r in self._others if self._store.check([self._key(r)])})
        if found is not None:
            self._found = found
        return self._found

    def _read(self, rank: int) -> RankStatus:
        return RankStatus.parsed(self._store.get(self._key(rank)).decode(errors="surrogatepass"))

    def _key(self, rank: int) -> str:
        return f"sonic_ep/statuses/{self.number}/{rank}"

    def _count(self, amount: int) -> int | None:
        key = f"sonic_ep/objects/{self._group.rank}"
        answer: int | None = self._answer(lambda: self._store.add(key, amount))
        return answer

    def _answer(self, ask: Callable[[], AnswerT]) -> AnswerT | None:
        """The answer of the store; None if it does not come in time."""
        if self._store is None or self.broken:
            return None
        answers: list[AnswerT] = []

        def asking() -> None:
            try:
                answers.append(ask())
            except (RuntimeError, EOFError, OSError):
                return

        thread = threading.Thread(target=asking, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # From Python 3.12 on no thread starts while the interpreter exits; a store call without one might block it.
            return None
        thread.join(ANSWER_SECONDS)
        self.broken = not answers
        return answers[0] if answers else None
