"""C, the most tokens of any rank: given for all calls, or agreed on in each.

Agreed on, C depends on the tokens of that call alone, not on earlier calls: so activation checkpointing, which makes
the call again in backward, makes the plan of forward again, whatever was called in between.
"""

from typing import Protocol

import torch
from torch import Tensor

from sonic_ep import compat
from sonic_ep.distributed.collectives import HOST, BoundedCollectives
from sonic_ep.distributed.group import EPGroup
from sonic_ep.distributed.mailbox import Mailbox, open_mailbox
from sonic_ep.distributed.sync_tag import Phase, kind_of


class MaxTokens(Protocol):
    """How an object comes to its C."""

    def check(self, tokens: int) -> None:
        """Before a call begins: raise ``ValueError`` for more tokens than a C that was given."""

    def agree(self, tokens_TN: Tensor) -> int:
        """C of the call that has begun, of which this rank brings T tokens. Collective, except in graph capture."""

    def close(self) -> None:
        """No call will follow."""


class FixedMaxTokens:
    """C = most, in all calls."""

    def __init__(self, group: EPGroup, most: int) -> None:
        self.most = most
        self._group = group

    def check(self, tokens: int) -> None:
        """Raise ``ValueError`` for more than C tokens."""
        if tokens > self.most:
            remedy = f"construct ExpertParallel with max_tokens_per_rank of at least {tokens}, the same on every rank"
            raise too_many(self._group, tokens, self.most, f": {remedy}")

    def agree(self, tokens_TN: Tensor) -> int:
        """C: nothing to exchange."""
        return self.most

    def close(self) -> None:
        """Nothing is held."""


class OwnMaxTokens:
    """C = T of a group of one rank, in every call."""

    def check(self, tokens: int) -> None:
        """No number is too large."""

    def agree(self, tokens_TN: Tensor) -> int:
        """T."""
        return tokens_TN.shape[0]

    def close(self) -> None:
        """Nothing is held."""


class AgreedMaxTokens:
    """C = the largest T of any rank in that call, exchanged on the host.

    The first call asks the process group; from the second on a mailbox does, where the ranks can have one.
    """

    def __init__(self, collectives: BoundedCollectives) -> None:
        self._collectives = collectives
        self._mailbox: Mailbox | None = None
        self._rounds = 0
        # The largest C by call, as ranks compare calls, with and without a gradient of x alike.
        self._most: dict[int, int] = {}

    def check(self, tokens: int) -> None:
        """No number is too large, before ranks have met."""

    def agree(self, tokens_TN: Tensor) -> int:
        """C; in graph capture, where ranks do not meet, the largest C of eager calls of this kind.

        Raises ``ValueError`` for more tokens than these had: in capture, and on all ranks in backward, where memory
        cannot be shared any more.
        """
        tokens, kind = tokens_TN.shape[0], kind_of(self._collectives.tag)
        most = self._most.get(kind, 0)
        if tokens_TN.is_cuda and torch.cuda.is_current_stream_capturing():
            if tokens > most:
                remedy = "in graph capture: run the call once at this T before it is captured"
                raise too_many(self._collectives.group, tokens, most, f" {remedy}")
            return most
        found = max(self._numbers(tokens))
        if found > most:
            if most and compat.backward_is_running():
                why = "in backward: activation checkpointing has to bring the tokens of forward again"
                raise too_many(self._collectives.group, found, most, f" {why}")
            self._most[kind] = found
        return found

    def close(self) -> None:
        """Unmap the mailbox."""
        self._mailbox = None

    def _numbers(self, own: int) -> list[int]:
        self._rounds += 1
        if self._rounds == 2:
            self._mailbox = open_mailbox(self._collectives)
        if self._mailbox is None:
            return self._collectives.sync(Phase.TOKENS, HOST, own)
        return self._mailbox.numbers(own)


def max_tokens_of(collectives: BoundedCollectives, given: int | None) -> MaxTokens:
    """The C of an object: given, or that of each call."""
    if given is not None:
        return FixedMaxTokens(collectives.group, given)
    return OwnMaxTokens() if collectives.group.world_size == 1 else AgreedMaxTokens(collectives)


def too_many(group: EPGroup, tokens: int, most: int, more: str) -> ValueError:
    """The error for T = ``tokens`` where there is room for C = ``most``."""
    return ValueError(f"{group}: tokens T: got {tokens}, expected at most C={most}{more}")
