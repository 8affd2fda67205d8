"""The order of a token's experts: by a number that stands for a value and its expert, and by groups of experts."""

import triton
import triton.language as tl

# Below the key of any logit: for experts that do not exist or are chosen already.
NO_CHOICE: tl.constexpr = tl.constexpr(-(2**63))
# The bits of a NaN, above those of infinity; as a mask, all bits of an fp32 number but the sign's.
ALL_BUT_SIGN: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def key_of(value, expert, E: tl.constexpr):
    """An int64 key that orders the experts of a token: the larger value first, then the lower expert.

    The high half holds the value (fp32): its bits ascend with it where the sign is clear and descend where it is set.
    The low half holds E-1-expert. All NaNs are one, above infinity; -0 is 0. Values 1 2 1 NaN give experts 3 1 0 2.
    """
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ ALL_BUT_SIGN, bits)
    ordered = tl.where(value != value, ALL_BUT_SIGN, ordered)
    return (ordered.to(tl.int64) << 32) | (E - 1 - expert).to(tl.int64)


@triton.jit
def value_of(key):
    """The value of a key of ``key_of``, where every NaN is the same and -0 is 0."""
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ ALL_BUT_SIGN, ordered).to(tl.float32, bitcast=True)


@triton.jit
def in_best_groups(
    key,
    expert,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_TOP: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
):
    """Which experts are in the TOP_GROUPS best of GROUPS groups of SIZE. key: of each expert, (TOKENS, EXPERTS_PADDED).

    A group's value is the sum of its GROUP_TOP largest, added in descending order; of equal ones the lower group comes
    first. Values 4 3 | 2 6 in two groups, the best one, GROUP_TOP=1: the second. With GROUP_TOP=2: 7 and 8, the second.
    """
    tokens: tl.constexpr = key.shape[0]
    group_of = (expert // SIZE)[None, :]
    group = tl.arange(0, GROUPS_PADDED)[None, :]
    totals = tl.zeros((tokens, GROUPS_PADDED), dtype=tl.float32)
    for g in range(GROUPS):
        left = tl.where(group_of == g, key, NO_CHOICE)
        for _ in range(GROUP_TOP):
            best = tl.max(left, axis=1)[:, None]
            totals += tl.where(group == g, value_of(best), 0.0)
            left = tl.where(left == best, NO_CHOICE, left)
    group_key = tl.where(group < GROUPS, key_of(totals, group, GROUPS), NO_CHOICE)
    stays = tl.zeros(key.shape, dtype=tl.int1)
    for _ in range(TOP_GROUPS):
        best = tl.max(group_key, axis=1)[:, None]
        stays = stays | (group_of == GROUPS - 1 - best.to(tl.int32))
        group_key = tl.where(group_key == best, NO_CHOICE, group_key)
    return stays
