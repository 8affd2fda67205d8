"""Where a rank is when it meets others: the step, the phase of it, and which call it is making. One number says it all.

Ranks that meet show each other that number. So whoever skips a call, makes another or comes in another order is found
at the first meeting, instead of taking for its own what was meant for something else.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import IntEnum

# The bits of a tag, from the lowest: step, phase, backward, publish, call.
STEP_BITS = 32
PHASE_BITS = 5
CALL_BITS = 24
_BACKWARD = 1 << (STEP_BITS + PHASE_BITS)
_PUBLISH = _BACKWARD << 1
_CALL_SHIFT = STEP_BITS + PHASE_BITS + 2


class Phase(IntEnum):
    """What ranks meet for. UNKNOWN: something that is none of ours. LEFT: this rank has left and meets no more."""

    UNKNOWN = 0
    AGREEMENT = 1
    CHECK = 2
    MEMORY = 3
    ROUTER = 4
    EXCHANGE = 5
    DISPATCH = 6
    COMBINE = 7
    MEETING = 8
    LEFT = 9

    @classmethod
    def _missing_(cls, value: object) -> Phase:
        return cls.UNKNOWN

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, kw_only=True)
class Step:
    """One collective call of an ``ExpertParallel``.

    number: counted from 1, the same on every rank. call: what is called and how, as ``call_digest``.
    """

    number: int = 0
    call: int = 0


@dataclass(frozen=True, kw_only=True)
class SyncTag:
    """One phase of a step. backward: of the gradient of that step, whenever it is computed."""

    step: Step
    phase: Phase
    backward: bool = False

    def __str__(self) -> str:
        phase = f"backward ({self.phase})" if self.backward else str(self.phase)
        return f"phase {phase} of step {self.step.number}"

    @property
    def tag(self) -> int:
        """The meeting as a number below 2^63, never 0, and above 2^32.

        Step 3 with call 1 in phase dispatch (6), forward: 3 + 6 * 2^32 + 1 * 2^39.
        """
        place = self.step.number % (1 << STEP_BITS) | self.phase << STEP_BITS | self.step.call << _CALL_SHIFT
        return place | _BACKWARD if self.backward else place

    @staticmethod
    def decode(tag: int) -> SyncTag:
        """The meeting of a ``tag``, or of its ``after_write``; any other number is one of phase ``UNKNOWN``.

        >>> here = Meeting(step=Step(number=3, call=1), phase=Phase.DISPATCH)
        >>> here.tag == 3 + 6 * 2**32 + 1 * 2**39, Meeting.of_tag(published(here.tag)) == here
        (True, True)
        """
        step = Step(number=tag % (1 << STEP_BITS), call=tag >> _CALL_SHIFT)
        return SyncTag(step=step, phase=Phase(tag >> STEP_BITS & (1 << PHASE_BITS) - 1), backward=bool(tag & _BACKWARD))


def after_write(tag: int) -> int:
    """The tag of the second of two meetings in one phase, in which ranks say that they have written."""
    return tag | _PUBLISH


def call_digest(facts: str) -> int:
    """A number of 24 bits that is the same on every rank whose ``facts`` are, and hardly ever where they are not."""
    return zlib.crc32(facts.encode()) & (1 << CALL_BITS) - 1


def mismatch(here: SyncTag, peer: int, there: SyncTag) -> str:
    """How a ``peer`` that came from ``there`` to a meeting ``here`` is told."""
    same_place = (here.step.number, here.phase, here.backward) == (there.step.number, there.phase, there.backward)
    if same_place and here.step.call != there.step.call:
        what = "shapes, dtypes, options, config or the number of ExpertParallel objects before differ"
        return f"rank {peer} came to {there} with another call: {what} (check_collective=True tells which)"
    return f"rank {peer} came to {there}, expected {here}: did it skip a call or a backward, or change their order?"
