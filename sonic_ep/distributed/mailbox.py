"""A number of each rank to all others, through memory of the host: some microseconds if all are there.

Each rank writes to a page of its own, which the others read. A round's word holds the round and the number, so that one
store of 8 bytes shows both. Two words are enough, used in turn: a rank begins round n + 2 after it has read everyone's
word of round n + 1, and these were written after their ranks had read every word of round n.
"""

import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from sonic_ep.distributed.collectives import HOST, BoundedCollectives
from sonic_ep.distributed.process_identity import ProcessIdentity
from sonic_ep.distributed.sync_tag import Phase

NUMBER_BITS = 32
MOST_NUMBER, ROUNDS = 2**NUMBER_BITS - 1, 2**31
# Before a wait: some 20 microseconds.
LOOKS = 50
# Bytes of a page: two words, then a key that says whose page it is.
KEY_AT, KEY_BYTES = 16, 16


@dataclass(frozen=True, kw_only=True)
class PageOffer:
    """Where a rank's page can be opened; path None: nowhere. key: what it holds at ``KEY_AT``."""

    process: ProcessIdentity
    path: str | None = None
    key: bytes = b""


class Mailbox:
    """Words of all ranks. Every rank posts and then reads, round by round. pages: of all ranks, in rank order."""

    def __init__(self, collectives: BoundedCollectives, pages: Sequence[mmap.mmap]) -> None:
        self._collectives = collectives
        self._words = [memoryview(page)[:KEY_AT].cast("q") for page in pages]
        self._own = self._words[collectives.group.rank]
        self._round = 0

    def numbers(self, own: int) -> list[int]:
        """Collective. ``own`` of every rank, 0 to ``MOST_NUMBER``, in rank order; a larger one counts as that.

        Raises as the collectives do. Tags are not compared, but by the next collective, or after a second of waiting.
        """
        self._round = now = (self._round + 1) % ROUNDS
        here = now % 2
        self._own[here] = now << NUMBER_BITS | min(own, MOST_NUMBER)
        # Ranks come some microseconds apart, in which a wait that may last would only have begun.
        for _ in range(LOOKS):
            for words in self._words:
                if words[here] >> NUMBER_BITS != now:
                    break
            else:
                break
        self._collectives.wait_for(self._absent, Phase.TOKENS)
        return [words[here] & MOST_NUMBER for words in self._words]

    def _absent(self) -> list[int]:
        """Ranks that have not posted in this round."""
        here, now = self._round % 2, self._round
        return [rank for rank, words in enumerate(self._words) if words[here] >> NUMBER_BITS != now]


def open_mailbox(collectives: BoundedCollectives) -> Mailbox | None:
    """Collective. None on every rank where one cannot map the pages of all, as on several machines."""
    rank = collectives.group.rank
    with ExitStack() as stack:
        own, offer = _own_page(stack)
        offers = collectives.objects(offer, Phase.MEMORY)
        pages = [own if number == rank else _page_of(other) for number, other in enumerate(offers)]
        mapped = [page for page in pages if page is not None]
        # Until all have opened it, this rank's page stays open, too.
        complete = collectives.numbers(int(len(mapped) == len(pages)), HOST)
    collectives.know({number: other.process for number, other in enumerate(offers)})
    return Mailbox(collectives, mapped) if all(complete) else None


def _own_page(stack: ExitStack) -> tuple[mmap.mmap | None, PageOffer]:
    """A page without a name, open in ``stack``, that only this user's processes can open."""
    process = ProcessIdentity.own()
    try:
        descriptor = os.memfd_create("sonic_ep_mailbox")
        stack.callback(os.close, descriptor)
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, mmap.PAGESIZE)
        page = mmap.mmap(descriptor, mmap.PAGESIZE)
    # Other systems have no such call.
    except (OSError, AttributeError):
        return None, PageOffer(process=process)
    key = os.urandom(KEY_BYTES)
    page[KEY_AT : KEY_AT + KEY_BYTES] = key
    return page, PageOffer(process=process, path=f"/proc/{process.pid}/fd/{descriptor}", key=key)


def _page_of(offer: PageOffer) -> mmap.mmap | None:
    """The page of another rank, to read; None if it cannot be opened here, or the file is another one."""
    if offer.path is None or offer.process.machine != ProcessIdentity.own().machine:
        return None
    try:
        descriptor = os.open(offer.path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        page = mmap.mmap(descriptor, mmap.PAGESIZE, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)
    return page if page[KEY_AT : KEY_AT + KEY_BYTES] == offer.key else None
