"""A tag says where a rank is: the step, its phase and the call. Ranks compare tags whenever they synchronize.

So a rank that skips a call, makes another or changes the order is found, and no rank takes data of another step.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

# The bits of a tag, from the lowest: step, phase, backward, after_write, call.
STEP_BITS = 32
PHASE_BITS = 5
CALL_BITS = 24
_BACKWARD = 1 << (STEP_BITS + PHASE_BITS)
_AFTER_WRITE = _BACKWARD << 1
_CALL_SHIFT = STEP_BITS + PHASE_BITS + 2
# The lowest bit of a call's number: whether x requires a gradient.
_X_TRAINED = 1
# The bits of a tag that its step has: its number and its call.
_OF_STEP = (1 << STEP_BITS) - 1 | (1 << CALL_BITS) - 1 << _CALL_SHIFT


class Phase(IntEnum):
    """What ranks synchronize for. UNKNOWN: no phase of this package. LEFT: the rank has left and comes no more."""

    UNKNOWN = 0
    TOKENS = 1
    CHECK = 2
    MEMORY = 3
    ROUTER = 4
    EXCHANGE = 5
    DISPATCH = 6
    COMBINE = 7
    SYNC = 8
    LEFT = 9

    @classmethod
    def _missing_(cls, value: object) -> Phase:
        return cls.UNKNOWN

    def __str__(self) -> str:
        return self.name.lower()


class Step(NamedTuple):
    """One collective call of an object. number: counted from 1 on every rank. call: its ``call_digest``."""

    number: int = 0
    call: int = 0

    @property
    def bits(self) -> int:
        """Its part of every tag, see ``at_phase``."""
        return self.call << _CALL_SHIFT | self.number % (1 << STEP_BITS)


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
        """The tag as a number above 2^32 and below 2^63, see ``decode``."""
        return at_phase(self.step.bits, self.phase, self.backward)

    @staticmethod
    def decode(tag: int) -> SyncTag:
        """The ``SyncTag`` of a ``tag``, or of its ``after_write``; any other number is of phase ``UNKNOWN``.

        >>> here = SyncTag(step=Step(number=3, call=1), phase=Phase.DISPATCH)
        >>> here.tag == 3 + 6 * 2**32 + 1 * 2**39, SyncTag.decode(after_write(here.tag)) == here
        (True, True)
        """
        phase = Phase(tag >> STEP_BITS & (1 << PHASE_BITS) - 1)
        return SyncTag(step=step_of(tag), phase=phase, backward=bool(tag & _BACKWARD))


def step_of(tag: int) -> Step:
    """The step of a tag, whatever its phase."""
    return Step(tag % (1 << STEP_BITS), tag >> _CALL_SHIFT)


def number_of(tag: int) -> int:
    """The number of a tag's step."""
    return tag % (1 << STEP_BITS)


def kind_of(tag: int) -> int:
    """The call of a tag, without whether x requires a gradient."""
    return tag >> _CALL_SHIFT & ~_X_TRAINED


def at_phase(tag: int, phase: Phase, backward: bool = False) -> int:
    """The tag of a phase of the step that ``tag`` is of.

    >>> at_phase(3 + 6 * 2**32 + 1 * 2**39, Phase.COMBINE) == 3 + 7 * 2**32 + 1 * 2**39
    True
    """
    place = tag & _OF_STEP | phase << STEP_BITS
    return place | _BACKWARD if backward else place


def after_write(tag: int) -> int:
    """The tag of the second of two barriers in one phase, which says that ranks have written."""
    return tag | _AFTER_WRITE


def call_digest(facts: str, *, x_trained: bool = False, before: int = 0) -> int:
    """A hash of 23 bits that ranks with equal ``facts`` share, and one bit for whether x requires a gradient.

    before: the digest of facts that precede these.
    """
    hashed = zlib.crc32(facts.encode(), before & ~_X_TRAINED) << 1 & (1 << CALL_BITS) - 1
    return hashed | _X_TRAINED if x_trained else hashed


def mismatch(here: SyncTag, peer: int, there: SyncTag) -> str:
    """What is wrong where this rank is at ``here`` and ``peer`` at ``there``."""
    if here == there:
        barriers = "one rank came to the barrier after its write, the other to that before it"
        return f"rank {peer} came to {there} at another barrier: {barriers}"
    if replace(here, step=there.step) != there or here.step.number != there.step.number:
        return f"rank {peer} came to {there}, expected {here}: did it skip a call or a backward, or change their order?"
    if here.step.call ^ there.step.call == _X_TRAINED:
        trained = "requires" if there.step.call & _X_TRAINED else "does not require"
        what = f"x {trained} a gradient there, unlike here (an x without tokens counts as requiring one)"
        return f"rank {peer} came to {there} with another call: {what}: x.requires_grad_() on every rank or on none"
    what = "shapes, dtypes, options, config or the number of ExpertParallel objects before differ"
    return f"rank {peer} came to {there} with another call: {what} (check_collective=True tells which)"
