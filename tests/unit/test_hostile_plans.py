"""A plan that its caller has changed is right or refused, on the host, before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from backends import both_backends
from edge_calls import whole
from hostile import THINGS, Tagged, compressed, negated_in_name, sliced
from on_ranks import on_ranks
from promises import promise
from torch import Tensor

from sonic_ep import ExpertParallel, RoutingPlan
from sonic_ep.testing import Rank

HIDDEN = 8
# E and T=C differ from each other and from K, so that no wrong shape is right by chance.
EXPERTS, TOKENS, CHOICES = 3, 4, 2
TENSOR_FIELDS = [field.name for field in fields(RoutingPlan) if field.type == "Tensor"]

SHARED = (
    *("None", "a list", "without rows", "without columns", "of one more dimension", "of no dimension"),
    *("flat", "freed", "zeros of no memory", "on meta", "fake", "sparse", "nested", "of bool"),
)
FORMS: dict[str, Callable[[Tensor], object]] = {
    **{name: THINGS[name] for name in SHARED},
    "a number": lambda tensor: 3,
    "of int64": lambda tensor: tensor.long(),
    "of floats": lambda tensor: tensor.float(),
    "of one row less": lambda tensor: tensor[:-1],
    "of one row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "of one column more": lambda tensor: torch.cat([tensor, tensor[..., :1]], dim=-1),
    "of other rows and columns": lambda tensor: tensor.transpose(0, -1).contiguous(),
    "sliced": sliced,
    "negated in name": negated_in_name,
    "compressed": lambda tensor: compressed(tensor) if tensor.ndim == 2 else None,
    "tagged": lambda tensor: tensor.as_subclass(Tagged),
}
# The number of rows depends on values, which the host does not read.
MAY_BE_FEWER = {"without rows", "without columns", "of one row less"}
NUMBERS_OF_TOKENS = (-1, TOKENS + 1, True, 1.5, None, torch.tensor(TOKENS))


def changes_of(plan: RoutingPlan) -> dict[str, dict[str, object]]:
    """Every field in every form, all fields but one on meta, and fields that fit together but make no plan."""
    held = {name: getattr(plan, name) for name in TENSOR_FIELDS}
    meta = {name: tensor.to("meta") for name, tensor in held.items()}
    forms = [pair for pair in product(TENSOR_FIELDS, FORMS) if pair[0] != "slot_of_row" or pair[1] not in MAY_BE_FEWER]
    return {
        **{f"{name} {form}": {name: FORMS[form](held[name])} for name, form in forms},
        **{f"num_tokens {value}": {"num_tokens": value} for value in NUMBERS_OF_TOKENS},
        **{f"all but {name} on meta": {**meta, name: held[name]} for name in TENSOR_FIELDS},
        "no choice": {name: held[name][..., :0] for name in ("expert_ids", "row_of_slot", "slot_of_row")},
        "no expert": {"counts": plan.counts[:0], "group_ends": plan.group_ends[:0]},
    }


def assert_right_or_refused(call: Callable[[], Tensor], right: Tensor, what: str) -> None:
    refusal = " of plan: got "
    try:
        got = call()
    except (ValueError, TypeError) as error:
        refusal = str(error)
    else:
        assert torch.equal(got, right), f"{what}: other numbers"
    assert " of plan: got " in refusal, f"{what}: refused for something else"


@promise("plans")
@on_ranks(1)
@both_backends
def test_fields_of_a_plan_are_right_or_refused(rank: Rank, backend: str) -> None:
    x = whole((TOKENS, HIDDEN)).to(rank.device)
    ids = (torch.arange(TOKENS * CHOICES, device=rank.device) % EXPERTS).view(TOKENS, CHOICES)
    scores = torch.ones(TOKENS, CHOICES, device=rank.device)
    with ExpertParallel(backend=backend) as ep:
        plan = ep.plan(ids, EXPERTS)
        rows = ep.dispatch(x, plan)
        y = ep.combine(rows, scores, plan)
        for what, change in changes_of(plan).items():
            changed = replace(plan, **change)  # type: ignore[arg-type]
            assert_right_or_refused(lambda changed=changed: ep.dispatch(x, changed), rows, f"dispatch: {what}")
            assert_right_or_refused(lambda changed=changed: ep.combine(rows, scores, changed), y, f"combine: {what}")


@promise("plans")
def test_a_plan_on_meta_is_refused_with_everything_else_on_meta() -> None:
    with ExpertParallel(backend="reference") as ep:
        plan = ep.plan(torch.zeros(TOKENS, CHOICES, dtype=torch.int64), EXPERTS)
        on_meta = replace(plan, **{name: getattr(plan, name).to("meta") for name in TENSOR_FIELDS})
        rows = torch.zeros(plan.row_capacity, HIDDEN, device="meta")
        with pytest.raises(ValueError, match="device of x: got meta, expected a device that holds data"):
            ep.dispatch(torch.zeros(TOKENS, HIDDEN, device="meta"), on_meta)
        with pytest.raises(ValueError, match="device of rows: got meta, expected a device that holds data"):
            ep.combine(rows, torch.ones(TOKENS, CHOICES, device="meta"), on_meta)
