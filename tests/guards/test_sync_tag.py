"""Tags: one number for each place in a program, read back as that place, and named where two differ."""

from itertools import product
from typing import Any

import pytest

from sonic_ep.distributed.sync_tag import CALL_BITS, Phase, Step, SyncTag, after_write, call_digest, mismatch

TAGS = [
    SyncTag(step=Step(number=number, call=call), phase=phase, backward=backward)
    for number, call, phase, backward in product(
        (1, 2, 2**31, 2**32 - 1), (0, 1, 2**CALL_BITS - 1), set(Phase) - {Phase.UNKNOWN}, (False, True)
    )
]


def test_every_place_has_a_tag_of_its_own_and_is_read_back() -> None:
    numbers = [number for tag in TAGS for number in (tag.tag, after_write(tag.tag))]
    assert len(set(numbers)) == 2 * len(TAGS)
    # No lowered flag, none of another kind, and none that an int64 of a kernel cuts off.
    assert all(2**32 < number < 2**63 for number in numbers)
    for tag in TAGS:
        assert SyncTag.decode(tag.tag) == SyncTag.decode(after_write(tag.tag)) == tag


def test_steps_beyond_the_bits_of_a_tag_count_from_0_and_other_numbers_are_no_tags() -> None:
    many = SyncTag(step=Step(number=2**32 + 7, call=5), phase=Phase.ROUTER)
    assert SyncTag.decode(many.tag) == SyncTag(step=Step(number=7, call=5), phase=Phase.ROUTER)
    assert all("unknown" in str(SyncTag.decode(number)) for number in (5, 31 << 32, -1))


def test_digests_fit_and_tell_calls_apart() -> None:
    facts = [f"H={hidden} K={top_k}" for hidden, top_k in product(range(64), range(8))]
    digests = [call_digest(words, x_trained=trained) for words in facts for trained in (False, True)]
    assert all(0 <= digest < 2**CALL_BITS for digest in digests)
    # By chance, some two in 100 such sets would share one of 2^23 numbers.
    assert len(set(digests)) == len(digests)
    assert call_digest(facts[0]) == digests[0] == digests[1] ^ 1


HERE: dict[str, Any] = {"step": Step(number=3, call=8), "phase": Phase.DISPATCH}
EXPECTED = "expected phase dispatch of step 3: did it skip a call or a backward, or change their order?"
ANOTHER_CALL = "dispatch of step 3 with another call:"


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"step": Step(number=3, call=10)}, f"{ANOTHER_CALL} shapes, dtypes, options, config or the number of Expert"),
        ({"step": Step(number=3, call=9)}, f"{ANOTHER_CALL} x requires a gradient there, unlike here"),
        # One has written and the other has read.
        ({}, "dispatch of step 3 at another barrier: one rank came to the barrier after its write"),
        ({"step": Step(number=4, call=8)}, f"dispatch of step 4, {EXPECTED}"),
        ({"phase": Phase.COMBINE}, f"combine of step 3, {EXPECTED}"),
        ({"backward": True}, f"backward (dispatch) of step 3, {EXPECTED}"),
    ],
)
def test_how_a_rank_with_another_tag_is_named(there: dict[str, Any], words: str) -> None:
    assert mismatch(SyncTag(**HERE), 1, SyncTag(**{**HERE, **there})).startswith(f"rank 1 came to phase {words}")
