"""What ranks in trouble tell each other, through the store of their process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sonic_ep.distributed.group import EPGroup

# The store may be held by a rank that is the trouble; then it is not waited for.
ANSWER_SECONDS = 2.0

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """What a rank has told last.

    collectives: how many it has begun. left: whether it will begin no more. lost: the ranks that it has waited for in
    vain, if that is why. text: where it is, or why it left. tag: of its meeting, 0 if it tells none. back: whether it
    left an earlier one by an error, and looks for the others before it begins this one. errors: how many it left so.
    """

    collectives: int
    left: bool
    text: str
    lost: tuple[int, ...] = ()
    tag: int = 0
    back: bool = False
    errors: int = 0

    def __str__(self) -> str:
        lost = ",".join(map(str, self.lost)) or "-"
        return f"{self.collectives} {int(self.left)} {lost} {self.tag} {int(self.back)} {self.errors} {self.text}"

    @staticmethod
    def parsed(written: str) -> RankStatus:
        """The notice of which ``written`` is the ``str``.

        >>> Notice.parsed(str(Notice(collectives=3, left=True, text="ValueError: no", lost=(1, 4), tag=2)))
        Notice(collectives=3, left=True, text='ValueError: no', lost=(1, 4), tag=2, back=False, errors=0)
        """
        collectives, left, lost, tag, back, errors, text = written.split(" ", 6)
        return RankStatus(
            collectives=int(collectives),
            left=left == "1",
            text=text,
            lost=() if lost == "-" else tuple(int(rank) for rank in lost.split(",")),
            tag=int(tag),
            back=back == "1",
            errors=int(errors),
        )


class StatusStore:
    """Notices of the ranks of one group about one object of theirs; ``number``: how many objects there were before.

    broken: whether the store has not answered, or has gone with the rank that held it. Nothing here raises or waits
    longer than ``ANSWER_SECONDS``. Without a store, as in a group of one, nobody tells anything.
    """

    def __init__(self, group: EPGroup, store: Any) -> None:
        self._group = group
        self._store = store
        self.broken = False
        self._found: dict[int, RankStatus] = {}
        before = self._answer(lambda: store.add(f"sonic_ep/objects/{group.rank}", 1)) if store is not None else None
        self.number = (before or 1) - 1

    @staticmethod
    def of(group: EPGroup) -> StatusStore:
        """The board of a group's next object; ranks of a group make them in the same order."""
        process_group = group.process_group
        return StatusStore(group, process_group.get_group_store() if process_group and group.world_size > 1 else None)

    def withdraw(self) -> None:
        """The object was never used: the next one has its number."""
        self._answer(lambda: self._store.add(f"sonic_ep/objects/{self._group.rank}", -1))

    def come(self) -> None:
        """Tell that this rank is about to begin the first collective."""
        self._answer(lambda: self._store.set(f"{self._key(self._group.rank)}/came", "1"))

    def absent(self) -> list[int]:
        """The ranks that have not come; none where nobody can tell."""
        others = [rank for rank in range(self._group.world_size) if rank != self._group.rank]
        return self._answer(lambda: [r for r in others if not self._store.check([f"{self._key(r)}/came"])]) or []

    def tell(self, notice: RankStatus) -> None:
        """Replace this rank's notice."""
        key = self._key(self._group.rank)
        # An error's text may hold what is no UTF-8: a file's name, say.
        written = str(notice).encode(errors="surrogatepass")
        self._answer(lambda: self._store.set(key, written))

    def statuses(self) -> dict[int, RankStatus]:
        """The notices of the other ranks that have told something, by rank; those of before if the store has gone."""
        others = [rank for rank in range(self._group.world_size) if rank != self._group.rank]
        found = self._answer(lambda: {rank: self._read(rank) for rank in others if self._told(rank)})
        if found is not None:
            self._found = found
        return self._found

    def _told(self, rank: int) -> bool:
        return bool(self._store.check([self._key(rank)]))

    def _read(self, rank: int) -> RankStatus:
        return RankStatus.parsed(self._store.get(self._key(rank)).decode(errors="surrogatepass"))

    def _key(self, rank: int) -> str:
        return f"sonic_ep/notices/{self.number}/{rank}"

    def _answer(self, ask: Callable[[], AnswerT]) -> AnswerT | None:
        """What the store answers, in time; None if it does not."""
        if self._store is None or self.broken:
            return None
        answers: list[AnswerT] = []

        def asking() -> None:
            try:
                answers.append(ask())
            except (RuntimeError, EOFError, OSError):
                # The store is gone. No answer says so.
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
