"""What a layer allocates, measured by PyTorch's allocator, beside the formulas of ``sonic_ep.memory``."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sonic_ep.activation import ACTIVATIONS
from sonic_ep.api import ExpertParallel
from sonic_ep.benchmark.routed_call import RoutedCall
from sonic_ep.config import CombineMode, DispatchMode, ModePair
from sonic_ep.memory import (
    LayerShape,
    backward_peak_bytes,
    forward_peak_bytes,
    saved_bytes,
    symmetric_bytes,
)


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of the rank with most of it; None where there is no formula, or no allocator that could be asked.

    formulas are those of the fast backend.
    """

    what: str
    formula: int | None
    measured: int | None

    def as_json(self) -> dict[str, Any]:
        """By name."""
        return {"what": self.what, "formula_bytes": self.formula, "measured_bytes": self.measured}


SAVED, INFERENCE = "saved activations", "peak of forward, inference"
FORWARD, BACKWARD, SHARED = "peak of forward, training", "peak of backward", "shared memory"


def memory_use(call: RoutedCall, ep: ExpertParallel, *, backward: bool) -> list[MemoryUse]:
    """Collective: what one call allocates beyond what there was, and what it should."""
    modes = ModePair(dispatch=DispatchMode(ep.config.dispatch), combine=CombineMode(ep.config.combine))
    formula = formulas(call, ep, modes) if ep.backend == "fast" else {}
    found = measured(call, ep, backward=backward) if call.x.device.type == "cuda" else {}
    names = [SAVED, INFERENCE, FORWARD, *([BACKWARD] if backward else []), SHARED]
    mine = [(formula.get(name), found.get(name)) for name in names]
    every = [mine] * ep.world_size
    if ep.world_size > 1:
        dist.all_gather_object(every, mine, group=ep.group.process_group)
    return [
        MemoryUse(
            what=name, formula=most([rank[place][0] for rank in every]), measured=most([r[place][1] for r in every])
        )
        for place, name in enumerate(names)
    ]


def most(numbers: list[int | None]) -> int | None:
    """The largest of them, None if there are none."""
    return max((number for number in numbers if number is not None), default=None)


def formulas(call: RoutedCall, ep: ExpertParallel, modes: ModePair) -> dict[str, int]:
    """Collective: what the fast backend's formulas say of this rank."""
    plan = ep.plan(call.topk_idx, call.shape.num_experts)
    assert call.shape.intermediate is not None, "a shape without experts"
    shape = LayerShape(
        world_size=ep.world_size,
        capacity=plan.capacity,
        tokens=call.x.shape[0],
        top_k=call.shape.top_k,
        num_experts=call.shape.num_experts,
        hidden=call.shape.hidden,
        intermediate=call.shape.intermediate,
        itemsize=call.shape.dtype.itemsize,
        rows=plan.row_capacity,
        gated=ACTIVATIONS[call.options.activation].gated,
        biases=call.options.biased,
    )
    again = ep.config.redispatch_x_in_backward
    return {
        SAVED: saved_bytes(shape, modes.dispatch, redispatch_x_in_backward=again).total,
        INFERENCE: forward_peak_bytes(shape, modes.dispatch, training=False, redispatch_x_in_backward=again),
        FORWARD: forward_peak_bytes(shape, modes.dispatch, training=True, redispatch_x_in_backward=again),
        BACKWARD: backward_peak_bytes(shape, modes.dispatch, redispatch_x_in_backward=again),
        SHARED: symmetric_bytes(shape, modes, redispatch_x_in_backward=again).total,
    }


def measured(call: RoutedCall, ep: ExpertParallel, *, backward: bool) -> dict[str, int]:
    """Collective: what the allocator of this rank's GPU says. Shared memory is not its own to count."""
    device = call.x.device
    # Kernels are compiled, and what stays is allocated.
    for _ in range(2):
        torch.autograd.grad(call.forward(ep), call.leaves, call.out_grad)
    with torch.no_grad():
        _, inference, _ = allocated(lambda: call.forward(ep), device)
    y, forward, kept = allocated(lambda: call.forward(ep), device)
    found = {SAVED: kept - y.nbytes, INFERENCE: inference, FORWARD: forward}
    if backward:
        _, found[BACKWARD], _ = allocated(lambda: torch.autograd.grad(y, call.leaves, call.out_grad), device)
    return found


def allocated(action: Callable[[], Any], device: torch.device) -> tuple[Any, int, int]:
    """What the action returns, and by how many bytes what is allocated rose: at the most, and in the end."""
    gc.collect()
    torch.cuda.synchronize(device)
    # Large blocks that are left over would be used whole where less than 1 MiB of them stayed.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = action()
    highest, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    return result, highest - before, after - before
