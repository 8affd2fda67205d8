"""Tags: one number for each place in a program, read back as that place, and told in words where two differ."""

from itertools import product

import pytest

from sonic_ep.distributed.sync_tag import CALL_BITS, Phase, Step, SyncTag, after_write, call_digest, mismatch

NUMBERS = (1, 2, 2**31, 2**32 - 1)
CALLS = (0, 1, 2**CALL_BITS - 1)
KNOWN = [phase for phase in Phase if phase != Phase.UNKNOWN]
MEETINGS = [
    SyncTag(step=Step(number=number, call=call), phase=phase, backward=backward)
    for number, call, phase, backward in product(NUMBERS, CALLS, KNOWN, (False, True))
]


def test_every_place_has_a_tag_of_its_own() -> None:
    tags = [tag for sync_tag in MEETINGS for tag in (sync_tag.tag, after_write(sync_tag.tag))]
    assert len(set(tags)) == 2 * len(MEETINGS)
    # No flag that is down, none that is merely up, and none that an int64 of a kernel cuts off.
    assert all(2**32 < tag < 2**63 for tag in tags)


def test_a_tag_is_read_back() -> None:
    for sync_tag in MEETINGS:
        assert SyncTag.decode(sync_tag.tag) == sync_tag
        assert SyncTag.decode(after_write(sync_tag.tag)) == sync_tag


def test_steps_beyond_the_bits_of_a_tag_count_anew() -> None:
    many = SyncTag(step=Step(number=2**32 + 7, call=5), phase=Phase.ROUTER)
    assert SyncTag.decode(many.tag) == SyncTag(step=Step(number=7, call=5), phase=Phase.ROUTER)


@pytest.mark.parametrize("tag", [5, 31 << 32, -1])
def test_what_is_no_tag_is_told_as_such(tag: int) -> None:
    """A rank may have sent what it meant for something else."""
    assert "unknown" in str(SyncTag.decode(tag))


def test_digests_fit_and_tell_calls_apart() -> None:
    digests = [call_digest(f"H={hidden} K={top_k}") for hidden, top_k in product(range(64), range(8))]
    assert all(0 <= digest < 2**CALL_BITS for digest in digests)
    # Of 512 words some two in 100 runs would share one of 2^24 numbers by chance.
    assert len(set(digests)) == len(digests)
    assert call_digest("H=1 K=2") == call_digest("H=1 K=2")


HERE = SyncTag(step=Step(number=3, call=9), phase=Phase.DISPATCH)


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (
            SyncTag(step=Step(number=3, call=8), phase=Phase.DISPATCH),
            "rank 1 came to phase dispatch of step 3 with another call: shapes, dtypes, options, config or the number "
            "of ExpertParallel objects before differ (check_collective=True tells which)",
        ),
        (
            SyncTag(step=Step(number=4, call=8), phase=Phase.DISPATCH),
            "rank 1 came to phase dispatch of step 4, expected phase dispatch of step 3: did it skip a call or a "
            "backward, or change their order?",
        ),
        (
            SyncTag(step=Step(number=3, call=9), phase=Phase.COMBINE),
            "rank 1 came to phase combine of step 3, expected phase dispatch of step 3: did it skip a call or a "
            "backward, or change their order?",
        ),
        (
            SyncTag(step=Step(number=3, call=9), phase=Phase.DISPATCH, backward=True),
            "rank 1 came to phase backward (dispatch) of step 3, expected phase dispatch of step 3: did it skip a call "
            "or a backward, or change their order?",
        ),
    ],
)
def test_how_a_rank_that_came_from_elsewhere_is_told(there: SyncTag, words: str) -> None:
    assert mismatch(HERE, 1, there) == words
