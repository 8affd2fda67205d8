"""The recipes of docs/training.md run, and train like one process that has all tokens."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from near import assert_near
from on_ranks import on_ranks
from recipes import (
    DDP,
    EXPERTS,
    FSDP1,
    FSDP2,
    HIDDEN,
    STEPS,
    TOKENS,
    TRAINING,
    ZERO,
    Model,
    Momentum,
    Names,
    blocks,
    given,
    loss_on_ranks,
    losses_of,
    run_block,
    run_step,
    tokens_of,
    whole,
    wrap,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.utils import parametrize

from sonic_ep.testing import Rank, RankPool, assert_bitwise

PLAIN, CLIPPED, SCALED, ADAPTED = "plain", "clipped", "scaled", "adapted"
# Wrapper, number of ranks, ranks of an EP group, and replicas.
WRAPPED = [(DDP, 2, 2, 1), (FSDP1, 2, 2, 1), (ZERO, 2, 2, 1), (FSDP2, 4, 2, 1)]
MORE_MESHES = [(FSDP2, 2, 2, 1), (FSDP2, 4, 2, 2)]
# Less than any norm here.
MAX_NORM = 0.1


def test_every_block_is_run() -> None:
    """Some in test_training_recipes.py."""
    small = (
        "Imports Meshes Replicas parallelize_module Prefetch Loss Step Split Optimizers Means Norm GradScaler Adapter"
    )
    wrappers = {DDP, FSDP1, FSDP2, ZERO}
    assert set(blocks(TRAINING)) == {
        *small.split(),
        *wrappers,
        "Load balancing",
        "Bias update",
        "Recipe",
        "Recipe step",
    }


class Adapter(nn.Module):
    """What docs/training.md has for DTensors, of plain weights."""

    def __init__(self, weight: Tensor, down: Tensor) -> None:
        super().__init__()
        weight.requires_grad_(False)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(*weight.shape[:2], down.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def drawn(place: int) -> Tensor:
    """The ``down`` of all experts of a layer."""
    return torch.randn(EXPERTS, 8, HIDDEN, generator=torch.Generator().manual_seed(place))


def advance(names: Names, wrapper: str, way: str, step: int) -> None:
    """Backward of the loss and the optimizers' step."""
    scaler, optimizers = names["scaler"], names["optimizers"]
    for optimizer in optimizers:
        optimizer.zero_grad()
    scaler.scale(names["loss"]).backward()
    if way == SCALED and step == 0 and names["rank"] % 2:
        # On the second rank of each EP group: replicas have the same gradients.
        grad = names["layer"].experts.w2.grad
        getattr(grad, "to_local", lambda: grad)().view(-1)[0] = torch.inf
    if wrapper in (DDP, FSDP1, ZERO):
        run_block(names, "Means")
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    if way == CLIPPED and wrapper == FSDP1:
        run_block(names, "Norm")
    elif way == CLIPPED:
        names["clip_grad_norm_"](names["model"].parameters(), MAX_NORM)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()


def trained_alone(way: str, split: bool = False) -> tuple[dict[str, Tensor], float]:
    """Parameters after all steps in this process, and the scale. split: experts have an optimizer of their own."""
    model = Model(None)
    if way == ADAPTED:
        for place, block in enumerate(model.layers):
            adapter = Adapter(block.moe.experts.w1, drawn(place))
            parametrize.register_parametrization(block.moe.experts, "w1", adapter)
    parts: list[list[nn.Parameter]] = [[], []]
    for name, parameter in model.named_parameters():
        parts[split and ".experts." in name].append(parameter)
    names = {"model": model, "layer": model.layers[0].moe, "optimizers": [Momentum(part) for part in parts if part]}
    names |= {"rank": 1, "clip_grad_norm_": nn.utils.clip_grad_norm_}
    names["scaler"] = torch.amp.GradScaler("cpu", enabled=way == SCALED)
    for step in range(STEPS):
        names["loss"] = losses_of(model, *tokens_of(step, [TOKENS], 0)).mean()
        advance(names, "", way, step)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, names["scaler"].get_scale()


def parameters(names: Names) -> dict[str, Tensor]:
    """All of the model, unsharded, by the names without wrappers."""
    root = names["model"]
    fsdp1 = names.get(FSDP1, ())
    with fsdp1.summon_full_params(root) if fsdp1 else nullcontext():
        return {name: whole(p) for name, p in getattr(root, "module", root).named_parameters()}


def trained(rank: Rank, wrapper: str, ep_size: int, replicas: int, way: str) -> tuple[dict[str, Tensor], float]:
    """Parameters after all steps, and the scale of the loss."""
    names = given(rank, ep_size, replicas)
    if way == ADAPTED:
        run_block(names, "Adapter")
        for place, block in enumerate(names["model"].layers):
            own = drawn(place).chunk(ep_size)[names["ep"].rank]
            block.moe.experts.parametrizations.w1[0].down.detach().to_local().copy_(own)
    wrap(names, wrapper)
    names["scaler"] = torch.amp.GradScaler(rank.device.type, enabled=way == SCALED)
    if way == SCALED and wrapper != FSDP2:
        run_block(names, "GradScaler")
    names["max_norm"] = MAX_NORM if way == CLIPPED else torch.inf
    for step in range(STEPS):
        loss_on_ranks(names, step)
        if wrapper == FSDP2 and way != SCALED:
            run_block(names, "Step")
        else:
            advance(names, wrapper, way, step)
    return parameters(names), names["scaler"].get_scale()


# Scalers and adapters have everyday tests of their own.
@pytest.mark.parametrize(
    "way", [PLAIN, CLIPPED, *(pytest.param(w, marks=pytest.mark.thorough) for w in (SCALED, ADAPTED))]
)
def test_a_wrapped_model_trains_like_one_process_with_all_tokens(cpu_pool: RankPool, way: str) -> None:
    for wrapper, world_size, ep_size, replicas in WRAPPED + (MORE_MESHES if way == PLAIN else []):
        alone, scale = trained_alone(way, split=wrapper != FSDP2)
        shares = cpu_pool.run(trained, wrapper, ep_size, replicas, way, world_size=world_size)
        for found, scale_there in shares:
            assert scale_there == scale, wrapper
            assert found.keys() == alone.keys()
            for name, expected in alone.items():
                # Gradients are sums over all tokens, in another order.
                assert_near(found[name], expected, units=STEPS * TOKENS)
                assert_bitwise(found[name], shares[0][0][name], f"{name} in {wrapper}")


def in_ddp(rank: Rank, **options: Any) -> Names:
    names = given(rank, rank.world_size, **options)
    wrap(names, DDP)
    return names


@on_ranks(2, pool="cpu_pool")
def test_reduced_router_gradients_are_w_times_the_mean(rank: Rank) -> None:
    grads = []
    for reduced in (True, False):
        names = in_ddp(rank, reduce_router_grad=reduced)
        loss_on_ranks(names, 0)
        names["loss"].backward()
        grads.append(names["layer"].router.weight.grad.clone())
    assert_bitwise(grads[0], 2 * grads[1])


@on_ranks(4, pool="cpu_pool")
def test_experts_built_without_ranks_and_spread_later(rank: Rank) -> None:
    """One object for all layers, the values of the whole layer, and FSDP2 over them."""
    names = given(rank, ep_size=2)
    expected = dict(names["model"].named_parameters())
    names["model"] = Model(None, reduce_router_grad=False)
    run_block(names, "parallelize_module")
    assert {block.moe.ep for block in names["model"].layers} == {names["ep"]}
    wrap(names, FSDP2)
    for name, parameter in names["model"].named_parameters():
        assert_bitwise(whole(parameter), whole(expected[name]), name)


@on_ranks(2, pool="cpu_pool")
def test_experts_in_fp16_need_the_sharded_scaler(rank: Rank) -> None:
    names = in_ddp(rank, dtype=torch.float16)
    run_block(names, "GradScaler")
    loss_on_ranks(names, 0)
    of_experts = names["optimizers"][1]
    names["scaler"].scale(names["loss"]).backward()
    names["scaler"].step(of_experts)
    assert of_experts.state[names["layer"].experts.w1]["momentum_buffer"].to_local().isfinite().all()


@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("option", ["foreach", "fused"])
def test_optimizers_over_groups_of_one_kind(rank: Rank, option: str) -> None:
    """All parameters under FSDP2; beside DDP, plain tensors and DTensors in two groups."""
    for wrapper in (FSDP2, DDP):
        names = given(rank, ep_size=2)
        wrap(names, wrapper)
        run_step(names)
        parts = [names[part] for part in ("of_experts", "others")] if wrapper == DDP else [names["model"].parameters()]
        before = whole(names["layer"].experts.w1)
        torch.optim.AdamW([{"params": part} for part in parts], **{option: True}).step()
        assert not torch.equal(whole(names["layer"].experts.w1), before)


@on_ranks(2, pool="cpu_pool")
def test_one_policy_of_mixed_precision_for_experts_and_the_rest(rank: Rank) -> None:
    names = given(rank, ep_size=2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    names["fully_shard"] = partial(fully_shard, mp_policy=policy)
    wrap(names, FSDP2)
    seen = []
    names["layer"].register_forward_hook(lambda layer, x, out: seen.append(out.y.dtype))
    loss_on_ranks(names, 0)
    names["loss"].backward()
    assert seen == [torch.bfloat16]
    assert {parameter.grad.dtype for parameter in names["model"].parameters()} == {torch.float32}


def wrap_layers(names: Names, wrapper: str) -> None:
    """Each layer as a unit of its own."""
    for block in names["model"].layers:
        if wrapper == FSDP1:
            options = {"process_group": names["group"], "device_id": names["device"]}
            ignored = list(block.moe.expert_parameters())
            block.moe = FullyShardedDataParallel(block.moe, ignored_states=ignored, **options)
        else:
            # Before the block's lines, which leave out what is sharded already.
            fully_shard(block.moe.experts, mesh=names["mesh"]["efsdp"])
            fully_shard(block.moe, mesh=names["dense"])


@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("wrapper", [FSDP1, FSDP2])
def test_a_layer_of_another_dtype_is_wrapped_by_itself(rank: Rank, wrapper: str) -> None:
    names = given(rank, ep_size=2, dtype=torch.bfloat16)
    if wrapper == FSDP1:
        run_block(names, "Split")
    wrap_layers(names, wrapper)
    if wrapper == FSDP1:
        run_block(names, FSDP1)
    else:
        fully_shard(names["model"], mesh=names["dense"])
    loss_on_ranks(names, 0)
    names["loss"].backward()
    assert whole(names["layer"].experts.w1.grad).dtype == torch.bfloat16
