"""The operators of the parts: ``sonic_ep::plan``, ``sonic_ep::dispatch``, ``sonic_ep::combine``."""

from typing import Any

import torch
from torch import Tensor

from sonic_ep.ops.operator import Given, Operator, Owner, flags_of, registered
from sonic_ep.plan import INDEX_DTYPE, TENSOR_FIELDS, RoutingPlan

# made: owns the plan if ``sonic_ep::plan`` made it; else the plan is of these tensors, step and object.
_OF_PLAN = "Tensor[] plan, Tensor? made, int step, int object_number"
_CALL = "str ep, bool autocast, bool[] trained"
_TENSORS = ", ".join(f"Tensor {name}" for name in TENSOR_FIELDS)
PLAN = f"(Tensor topk_idx, int num_experts, str ep) -> ({_TENSORS}, Tensor made)"
DISPATCH = f"(Tensor x, {_OF_PLAN}, {_CALL}) -> (Tensor rows, Tensor graph)"
COMBINE = f"(Tensor rows, Tensor topk_scores, {_OF_PLAN}, {_CALL}) -> (Tensor y, Tensor graph)"


def _plan(topk_idx: Tensor, num_experts: int, ep: str) -> tuple[Tensor, ...]:
    plan, _ = registered(ep).plan.with_ids(registered(ep), topk_idx.clone(), num_experts)
    # Copies: a caller may overwrite them, and ``made`` owns the plan.
    return (*(getattr(plan, name).clone() for name in TENSOR_FIELDS), Owner.tensor_of(plan))


def _plan_fake(topk_idx: Tensor, num_experts: int, ep: str) -> tuple[Tensor, ...]:
    """Sizes that other ranks' tokens (C) or the routing (R) decide are unknown to the compiler."""
    found, sizes = registered(ep), torch.library.get_ctx()
    world_size, max_tokens = found.world_size, found.max_tokens_per_rank
    if max_tokens is None:
        max_tokens = topk_idx.shape[0] if world_size == 1 else sizes.new_dynamic_size()
    slots = (world_size, max_tokens, topk_idx.shape[1])
    shapes = {"expert_ids": slots, "counts": (num_experts,), "row_of_slot": slots}
    shapes |= {"group_ends": (num_experts // world_size,), "slot_of_row": (sizes.new_dynamic_size(),)}
    shapes |= {"pair_tokens": (world_size, world_size), "packed_of_token": (world_size, max_tokens)}
    return (*(topk_idx.new_empty(shapes[name], dtype=INDEX_DTYPE) for name in TENSOR_FIELDS), Owner.fake())


torch.library.custom_op("sonic_ep::plan", _plan, mutates_args=(), schema=PLAN).register_fake(_plan_fake)


def _plan_of(ep: Any, given: Given, num_tokens: int) -> RoutingPlan:
    if given["made"] is not None:
        made: RoutingPlan = Owner.owned_by(given["made"])
        return made
    origin = {"step": given["step"], "object_number": given["object_number"]}
    tensors = dict(zip(TENSOR_FIELDS, given["plan"], strict=True))
    return RoutingPlan(rank=ep.rank, num_tokens=num_tokens, **tensors, **origin)


def _dispatch(ep: Any, given: Given) -> tuple[Tensor, ...]:
    plan = _plan_of(ep, given, given["x"].shape[:-1].numel())
    rows, expert_ids = ep.dispatch.with_ids(ep, given["x"], plan)
    return rows, expert_ids


def _dispatch_fake(given: Given) -> tuple[Tensor, ...]:
    slot_of_row = given["plan"][TENSOR_FIELDS.index("slot_of_row")]
    return (given["x"].new_empty(slot_of_row.shape[0], given["x"].shape[-1]),)


def _combine(ep: Any, given: Given) -> tuple[Tensor, ...]:
    plan = _plan_of(ep, given, given["topk_scores"].shape[0])
    y, expert_ids = ep.combine.with_ids(ep, given["rows"], given["topk_scores"], plan)
    return y, expert_ids


def _combine_fake(given: Given) -> tuple[Tensor, ...]:
    return (given["rows"].new_empty(given["topk_scores"].shape[0], given["rows"].shape[1]),)


Operator(name="dispatch", schema=DISPATCH, run=_dispatch, fake=_dispatch_fake).define()
Operator(name="combine", schema=COMBINE, run=_combine, fake=_combine_fake).define()


# The calls below are traced: Dynamo inlines them, so they hold no more than the operator and what it takes.


def plan(ep: Any, topk_idx: Tensor, num_experts: int) -> RoutingPlan:
    """``ExpertParallel.plan`` by its operator."""
    *tensors, made = torch.ops.sonic_ep.plan(topk_idx, num_experts, ep.operator_name)
    fields = dict(zip(TENSOR_FIELDS, tensors, strict=True))
    return RoutingPlan(rank=ep.rank, num_tokens=topk_idx.shape[0], **fields, made=made)


def dispatch(ep: Any, x: Tensor, plan: RoutingPlan) -> Tensor:
    """``ExpertParallel.dispatch`` by its operator."""
    arguments = [x, *_plan_given(plan)]
    rows: Tensor = torch.ops.sonic_ep.dispatch(*arguments, ep.operator_name, *flags_of(arguments))[0]
    return rows


def combine(ep: Any, rows: Tensor, topk_scores: Tensor, plan: RoutingPlan) -> Tensor:
    """``ExpertParallel.combine`` by its operator."""
    arguments = [rows, topk_scores, *_plan_given(plan)]
    y: Tensor = torch.ops.sonic_ep.combine(*arguments, ep.operator_name, *flags_of(arguments))[0]
    return y


def _plan_given(plan: RoutingPlan) -> list[Any]:
    tensors = [getattr(plan, name) for name in TENSOR_FIELDS]
    return [tensors, plan.made, plan.step, plan.object_number]
