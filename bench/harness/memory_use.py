"""What a layer allocates, measured by PyTorch's allocator, beside the formulas of the memory model."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from schema import MemoryUse

from harness.layer import modes_of
from sonic_ep.api import ExpertParallel
from sonic_ep.profiler.agreement import gathered
from sonic_ep.profiler.problem import Shape
from sonic_ep.testing import memory_model
from sonic_ep.testing.oracle import RoutedCall, gradients

SAVED, INFERENCE = "saved activations", "peak of forward, inference"
FORWARD, BACKWARD, SHARED = "peak of forward, training", "peak of backward", "shared memory"


def memory_use(call: RoutedCall, shape: Shape, ep: ExpertParallel, *, backward: bool) -> tuple[MemoryUse, ...]:
    """Collective: bytes that one call allocates, by formula and as measured, on the rank with most.

    None where there is no formula (only the fast backend has them) or no allocator (on the CPU).
    """
    formula = formulas(call, shape, ep) if ep.backend == "fast" else {}
    found = measured(call, ep, backward=backward) if call.x.device.type == "cuda" else {}
    names = [SAVED, INFERENCE, FORWARD, *([BACKWARD] if backward else []), SHARED]
    of_ranks = gathered(ep.group, (formula, found))
    most = [{name: max(of_rank[kind][name] for of_rank in of_ranks) for name in of_ranks[0][kind]} for kind in (0, 1)]
    return tuple(
        MemoryUse(what=name, formula_bytes=most[0].get(name), measured_bytes=most[1].get(name)) for name in names
    )


def formulas(call: RoutedCall, shape: Shape, ep: ExpertParallel) -> dict[str, int]:
    """Collective: what the fast backend's formulas give for this rank."""
    modes, plan = modes_of(ep.config), ep.plan(call.topk_idx, shape.num_experts)
    layer = memory_model.LayerShape(
        world_size=ep.world_size,
        max_tokens=plan.max_tokens,
        tokens=call.x.shape[0],
        top_k=call.top_k,
        num_experts=shape.num_experts,
        hidden=shape.hidden,
        intermediate=shape.expert_width,
        itemsize=shape.dtype.itemsize,
        rows=plan.row_capacity,
        gated=call.experts.activation.gated,
        biases=call.experts.b1 is not None,
        split=len(call.experts.up_weights) == 2,
    )
    again = {"redispatch_x_in_backward": ep.config.redispatch_x_in_backward}
    return {
        SAVED: sum(memory_model.saved_bytes(layer, modes.dispatch, **again).values()),
        INFERENCE: memory_model.forward_peak_bytes(layer, modes.dispatch, training=False, **again),
        FORWARD: memory_model.forward_peak_bytes(layer, modes.dispatch, training=True, **again),
        BACKWARD: memory_model.backward_peak_bytes(layer, modes.dispatch, **again),
        SHARED: sum(memory_model.symmetric_bytes(layer, modes, **again).values()),
    }


def measured(call: RoutedCall, ep: ExpertParallel, *, backward: bool) -> dict[str, int]:
    """Collective: what the allocator of this rank's GPU counts. It does not own shared memory."""

    def step(outputs: Any) -> Any:
        return gradients(outputs, call.leaves, call.output_gradients())

    # Kernels are compiled, and what stays is allocated.
    for _ in range(2):
        step(call.forward(ep))
    with torch.no_grad():
        _, inference, _ = allocated(lambda: call.forward(ep), call.x.device)
    outputs, forward, kept = allocated(lambda: call.forward(ep), call.x.device)
    found = {SAVED: kept - outputs["y"].nbytes, INFERENCE: inference, FORWARD: forward}
    if backward:
        _, found[BACKWARD], _ = allocated(lambda: step(outputs), call.x.device)
    return found


def allocated(action: Callable[[], Any], device: torch.device) -> tuple[Any, int, int]:
    """What the action returns, and by how many bytes allocated memory rose: at its peak, and in the end."""
    gc.collect()
    torch.cuda.synchronize(device)
    # Large blocks that are left over would be used whole where less than 1 MiB of them stayed.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = action()
    highest, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    return result, highest - before, after - before
