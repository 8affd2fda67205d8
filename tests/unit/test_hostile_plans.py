"""A plan that its caller has changed: what it is made of is right or refused, on the host, before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from backends import both_backends
from edge_calls import whole
from hostile import Tagged, compressed, fake, freed, negated_in_name, nested, sliced
from torch import Tensor

from sonic_ep import ExpertParallel, RoutingPlan
from sonic_ep.testing import Rank, RankPool

HIDDEN = 8
# E and T=C differ from each other and from K, so that no wrong shape is right by chance.
EXPERTS, TOKENS, CHOICES = 3, 4, 2
TENSOR_FIELDS = [field.name for field in fields(RoutingPlan) if field.type == "Tensor"]

FORMS: dict[str, Callable[[Tensor], object]] = {
    "None": lambda tensor: None,
    "a list": lambda tensor: tensor.tolist(),
    "a number": lambda tensor: 3,
    "of int64": lambda tensor: tensor.long(),
    "of floats": lambda tensor: tensor.float(),
    "of bools": lambda tensor: tensor.bool(),
    "without rows": lambda tensor: tensor[:0],
    "without columns": lambda tensor: tensor[..., :0],
    "of one row less": lambda tensor: tensor[:-1],
    "of one row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "of one column more": lambda tensor: torch.cat([tensor, tensor[..., :1]], dim=-1),
    "of one more dimension": lambda tensor: tensor[None],
    "of no dimension": lambda tensor: tensor.flatten()[0],
    "of other rows and columns": lambda tensor: tensor.transpose(0, -1).contiguous(),
    "flat": lambda tensor: tensor.flatten(),
    "sliced": sliced,
    "negated in name": negated_in_name,
    "freed": freed,
    "zeros of no memory": lambda tensor: torch._efficientzerotensor(
        tensor.shape, dtype=tensor.dtype, device=tensor.device
    ),
    "on meta": lambda tensor: tensor.to("meta"),
    "fake": fake,
    "sparse": lambda tensor: tensor.to_sparse(),
    "compressed": lambda tensor: compressed(tensor) if tensor.ndim == 2 else None,
    "nested": lambda tensor: nested(tensor, torch.strided),
    "tagged": lambda tensor: tensor.as_subclass(Tagged),
}
# How many rows there is room for is a matter of values.
MAY_BE_FEWER = {"without rows", "without columns", "of one row less"}
PLACES = {"num_tokens": (-1, TOKENS + 1, True, 1.5, None, torch.tensor(TOKENS))}


def changed_plans(rank: Rank, backend: str) -> list[str]:
    """Every field as everything that it may be: what is taken has to be right."""
    found = []
    x = whole((TOKENS, HIDDEN)).to(rank.device)
    ids = (torch.arange(TOKENS * CHOICES, device=rank.device) % EXPERTS).view(TOKENS, CHOICES)
    scores = torch.ones(TOKENS, CHOICES, device=rank.device)
    with ExpertParallel(backend=backend) as ep:
        plan = ep.plan(ids, EXPERTS)
        rows = ep.dispatch(x, plan)
        expected = ep.combine(rows, scores, plan)

        def said(changes: dict[str, object], call: Callable[[RoutingPlan], Tensor], right: Tensor) -> str:
            try:
                got = call(replace(plan, **changes))  # type: ignore[arg-type]
            except (ValueError, TypeError) as error:
                return "" if " of plan: got " in str(error) else f"refused for something else: {error}"
            except Exception as error:
                return f"raised {error!r}"[:200]
            return "" if got.shape == right.shape and torch.equal(got, right) else "other numbers"

        changes = [
            (f"{name} {what}", {name: make(getattr(plan, name))})
            for name in TENSOR_FIELDS
            for what, make in FORMS.items()
            if name != "slot_of_row" or what not in MAY_BE_FEWER
        ]
        changes += [(f"{name} {value}", {name: value}) for name, values in PLACES.items() for value in values]
        # All of them where no data is.
        meta = {name: getattr(plan, name).to("meta") for name in TENSOR_FIELDS}
        changes += [(f"all but {name} on meta", {**meta, name: getattr(plan, name)}) for name in TENSOR_FIELDS]
        # What fits together, and is no plan's all the same.
        none = {"expert_ids": plan.expert_ids[..., :0], "row_of_slot": plan.row_of_slot[..., :0]}
        changes += [
            ("no choice", {**none, "slot_of_row": plan.slot_of_row[:0]}),
            ("no expert", {"counts": plan.counts[:0], "group_ends": plan.group_ends[:0]}),
        ]
        for what, change in changes:
            for call, right in (
                (lambda changed: ep.dispatch(x, changed), rows),
                (lambda changed: ep.combine(rows, scores, changed), expected),
            ):
                complaint = said(change, call, right)
                found += [f"{what}: {complaint}"] if complaint else []
    return found


@both_backends
def test_fields_of_a_plan_are_right_or_refused(pool: RankPool, backend: str) -> None:
    assert pool.run(changed_plans, backend, world_size=1) == [[]]


def test_a_plan_that_is_nowhere_is_refused_with_all_that_goes_along() -> None:
    with ExpertParallel(backend="reference") as ep:
        plan = ep.plan(torch.zeros(TOKENS, CHOICES, dtype=torch.int64), EXPERTS)
        nowhere = replace(plan, **{name: getattr(plan, name).to("meta") for name in TENSOR_FIELDS})
        rows = torch.zeros(plan.row_capacity, HIDDEN, device="meta")
        with pytest.raises(ValueError, match="device of x: got meta, expected a device that holds data"):
            ep.dispatch(torch.zeros(TOKENS, HIDDEN, device="meta"), nowhere)
        with pytest.raises(ValueError, match="device of rows: got meta, expected a device that holds data"):
            ep.combine(rows, torch.ones(TOKENS, CHOICES, device="meta"), nowhere)
