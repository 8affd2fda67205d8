"""The recipes of docs/training.md run, and train like one process that has all tokens."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from near import assert_near
from on_ranks import on_ranks
from recipes import (
    DDP,
    DOCS,
    EXPERTS,
    FSDP1,
    FSDP2,
    HIDDEN,
    TOP_K,
    TRAINING,
    ZERO,
    Model,
    Momentum,
    Names,
    blocks,
    given,
    run_block,
    whole,
    wrap,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from sonic_ep import RouterConfig
from sonic_ep.parallel import clip_grad_norm_
from sonic_ep.testing import Rank, RankPool, assert_bitwise

PLAIN, CLIPPED, SCALED, ADAPTED = "plain", "clipped", "scaled", "adapted"
# Wrapper, number of ranks, ranks of an EP group, and replicas.
WRAPPED = [(DDP, 2, 2, 1), (FSDP1, 2, 2, 1), (ZERO, 2, 2, 1), (FSDP2, 2, 2, 1), (FSDP2, 4, 2, 1), (FSDP2, 4, 2, 2)]
# For each step, the tokens of each rank. Some ranks, and once an EP group, have none.
TOKENS = 24
SHARES = {2: [[9, 15], [24, 0], [12, 12]], 4: [[9, 0, 11, 4], [20, 4, 0, 0], [6, 6, 6, 6]]}
STEPS = len(SHARES[2])
# Less than any norm here.
MAX_NORM = 0.1


def test_every_block_is_run_here() -> None:
    alone = {
        "Imports",
        "Meshes",
        "Replicas",
        "parallelize_module",
        "Loss",
        "Step",
        "Means",
        "Norm",
        "GradScaler",
        "Adapter",
    }
    balance = {"Load balancing", "Bias update"}
    assert set(blocks(TRAINING)) == {*alone, *balance, "Split", "Optimizers", "Prefetch", DDP, FSDP1, FSDP2, ZERO}


def test_the_readme_shows_the_same_lines() -> None:
    readme = (DOCS.parent / "README.md").read_text()
    (shown,) = re.findall(r"## Inside a training stack\n.*?```python\n(.*?)```", readme, re.DOTALL)
    assert [line for line in shown.splitlines() if line] == [
        line for name in ("Meshes", FSDP2) for line in blocks(TRAINING)[name].splitlines() if line
    ]


def tokens_of(step: int, shares: list[int], rank: int) -> tuple[Tensor, Tensor]:
    """X and target of the tokens of a rank."""
    x, target = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(step))
    return x.split(shares)[rank], target.split(shares)[rank]


def losses_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """One for each token."""
    return (model(x) - target).square().mean(dim=1)


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


def loss_on_ranks(names: Names, step: int) -> None:
    """The block's loss of this rank's tokens."""
    shares = SHARES[names["world"]][step]
    names["losses"] = losses_of(names["model"], *tokens_of(step, shares, names["rank"]))
    run_block(names, "Loss")


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


@pytest.mark.parametrize("way", [PLAIN, CLIPPED, SCALED, ADAPTED])
def test_a_wrapped_model_trains_like_one_process_with_all_tokens(cpu_pool: RankPool, way: str) -> None:
    for wrapper, world_size, ep_size, replicas in WRAPPED:
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


def run_step(names: Names) -> None:
    loss_on_ranks(names, 0)
    names["loss"].backward()


def fully_shard_all(names: Names) -> None:
    fully_shard(names["model"])
    run_step(names)


def fully_shard_over_dense(names: Names) -> None:
    fully_shard(names["model"], mesh=names["mesh"]._flatten("flat"))
    run_step(names)


def ddp_over_all(names: Names) -> None:
    DistributedDataParallel(names["model"])


def ddp_over_plain_experts(names: Names) -> None:
    names["model"] = DistributedDataParallel(Model(names["ep"], distribute=False))
    run_step(names)


def foreach_over_all(names: Names) -> None:
    run_step(names)
    torch.optim.AdamW(names["model"].parameters(), foreach=True).step()


def fused_over_all(names: Names) -> None:
    run_step(names)
    torch.optim.AdamW(names["model"].parameters(), fused=True).step()


def experts_outside_of_their_forward(names: Names) -> None:
    wrap(names, FSDP2)
    experts = names["layer"].experts
    x, idx, scores = torch.randn(3, HIDDEN), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    names["ep"].moe_routed(x, idx, scores, experts.w1, experts.w2, experts.b1, experts.b2)


def divided_over_gloo(names: Names) -> None:
    experts = names["layer"].experts
    fully_shard(experts, mesh=names["mesh"]["efsdp"])
    experts.set_gradient_divide_factor(names["world"])
    run_step(names)


def another_dtype(names: Names) -> None:
    names["model"] = Model(names["ep"], dtype=torch.bfloat16, reduce_router_grad=False)
    wrap(names, FSDP2)
    run_step(names)


def plain_scaler(names: Names) -> None:
    names["model"] = Model(names["ep"], dtype=torch.float16)
    scaler = torch.amp.GradScaler(names["device"].type)
    run_block(names, "Split")
    loss_on_ranks(names, 0)
    scaler.scale(names["loss"]).backward()
    scaler.unscale_(torch.optim.SGD(names["of_experts"]))


def norm_of_plain_experts(names: Names) -> None:
    names["model"] = Model(names["ep"], distribute=False)
    run_step(names)
    clip_grad_norm_(names["model"].parameters(), 1.0)


def norm_of_torch(names: Names) -> None:
    wrap(names, FSDP2)
    run_step(names)
    nn.utils.clip_grad_norm_(names["model"].parameters(), 1.0)


# By what the table of the document says of each: a part of the message.
FAILURES: dict[str, list[Callable[[Names], None]]] = {
    "Invariant encountered: value was None": [fully_shard_all],
    "Cannot concatenate overlapping meshes": [fully_shard_over_dense],
    "got mixed torch.Tensor and DTensor": [ddp_over_all, foreach_over_all, fused_over_all],
    "DistributedDataParallel: got experts of several ranks": [ddp_over_plain_experts],
    "clip_grad_norm_: got expert weights of this rank alone": [norm_of_plain_experts],
    "must have the same mesh": [norm_of_torch],
    "FSDP gathers a weight only while the forward of its module runs": [experts_outside_of_their_forward],
    "Cannot use ReduceOp.PREMUL_SUM with Gloo": [divided_over_gloo],
    "FSDP expects uniform original parameter dtype": [another_dtype],
    "Attempting to unscale FP16 gradients": [plain_scaler],
}


def test_every_message_of_the_table_is_seen_here() -> None:
    (table,) = re.findall(r"\| message \|.*?\n\n", TRAINING.read_text(), re.DOTALL)
    assert re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE) == list(FAILURES)


@on_ranks(4, pool="cpu_pool")
def test_what_raises(rank: Rank) -> None:
    for message, failures in FAILURES.items():
        for failure in failures:
            names = given(rank, ep_size=2)
            with pytest.raises((ValueError, TypeError, RuntimeError, AssertionError), match=re.escape(message)):
                failure(names)


def switch_loss(logits: Tensor, topk_idx: Tensor) -> Tensor:
    """E times the sum over experts of (share of slots) x (mean probability)."""
    shares = torch.bincount(topk_idx.flatten(), minlength=EXPERTS) / topk_idx.numel()
    return EXPERTS * (shares * logits.softmax(-1).mean(0)).sum()


@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("summed", [False, True])
def test_the_load_balancing_loss_is_that_of_all_tokens(rank: Rank, summed: bool) -> None:
    """Value and gradient, as a mean over ranks, or as a sum beside ``reduce_router_grad=True``."""
    names = given(rank, ep_size=2, reduce_router_grad=summed)
    run_block(names, "Load balancing")
    layer = names["layer"]
    x, shares = tokens_of(0, [TOKENS], 0)[0], SHARES[2][0]
    out = layer(x.split(shares)[rank.rank])
    loss = names["load_balancing_loss"](out, TOP_K, ranks=1 if summed else 2)
    loss.backward()
    grad = layer.router.weight.grad
    value = loss.detach().clone()
    for of_ranks in [value] if summed else [value, grad]:
        dist.all_reduce(of_ranks)
        of_ranks /= 1 if summed else 2
    weight = layer.router.weight.detach().requires_grad_()
    logits = x @ weight.T
    expected = switch_loss(logits, logits.topk(TOP_K).indices)
    expected.backward()
    assert_near(value, expected, units=TOKENS)
    assert_near(grad, weight.grad, units=TOKENS * HIDDEN)


@on_ranks(4, pool="cpu_pool")
def test_the_bias_update_evens_a_skewed_load(rank: Rank) -> None:
    """Over both EP groups, to the same bias on every rank; scores do not know it."""
    router = RouterConfig(score_function="sigmoid", norm_topk_probs=True)
    names = given(rank, ep_size=2, router=router, correction_bias=True)
    run_block(names, "Bias update")
    layer, efsdp = names["layer"], names["mesh"]["efsdp"].get_group()
    x = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(rank.rank)).abs()
    excess = []
    with torch.no_grad():
        # Towards the first half of the experts.
        layer.router.weight[: EXPERTS // 2] += 0.1
        for _ in range(60):
            out = layer(x)
            load = out.tokens_per_expert.float()
            dist.all_reduce(load, group=efsdp)
            excess.append(load.max() / load.mean() - 1)
            names["update_correction_bias"](layer, out.tokens_per_expert, efsdp, rate=0.01)
    assert excess[-1] < excess[0] / 4
    bias = layer.router.correction_bias
    of_first = bias.clone()
    dist.broadcast(of_first, src=0)
    assert_bitwise(bias, of_first)
    bases = out.router_logits.sigmoid().gather(1, out.topk_idx.long())
    assert_near(out.topk_scores, bases / bases.sum(dim=1, keepdim=True), units=EXPERTS)
