"""Load balancing by docs/training.md, and the errors that it explains."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from near import assert_near
from on_ranks import on_ranks
from promises import promise
from recipes import (
    EXPERTS,
    FSDP2,
    HIDDEN,
    LR,
    SHARES,
    TOKENS,
    TOP_K,
    TRAINING,
    Model,
    Momentum,
    Names,
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
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sonic_ep import RouterConfig
from sonic_ep.parallel import clip_grad_norm_
from sonic_ep.testing import Rank, assert_bitwise


def switch_loss(logits: Tensor, topk_idx: Tensor) -> Tensor:
    """E times the sum over experts of (share of slots) x (mean probability)."""
    shares = torch.bincount(topk_idx.flatten(), minlength=EXPERTS) / topk_idx.numel()
    return EXPERTS * (shares * logits.softmax(-1).mean(0)).sum()


def recipe(rank: Rank, shares: list[int]) -> Names:
    """Of docs/training.md: a step of this rank's share of the tokens, its gradients before the optimizer."""
    grads: dict[str, Tensor] = {}

    def clip(parameters: object, max_norm: float) -> None:
        names["norm"] = clip_grad_norm_(parameters, max_norm)
        grads.update({name: whole(p.grad) for name, p in names["model"].named_parameters()})

    names: Names = {"device": rank.device, "build_model": Model, "losses_of": losses_of}
    names |= {"lr": LR, "max_norm": torch.inf, "Momentum": Momentum}
    run_block(names, "Recipe")
    names |= {"clip_grad_norm_": clip, "grads": grads}
    names["x"], names["target"] = tokens_of(0, shares, rank.rank)
    run_block(names, "Recipe step")
    return names


@pytest.mark.parametrize("share", [0, 1])
@on_ranks(2, pool="cpu_pool")
def test_the_recipe_has_the_gradients_of_one_process(rank: Rank, share: int) -> None:
    """With all tokens; also where a rank has none. Means over each rank's own tokens would give others."""
    names = recipe(rank, SHARES[2][share])
    alone = Model(None)
    losses_of(alone, *tokens_of(0, [TOKENS], 0)).mean().backward()
    for name, parameter in alone.named_parameters():
        assert_near(names["grads"][name], parameter.grad, units=TOKENS * HIDDEN)
    assert_near(
        names["norm"], torch.nn.utils.get_total_norm([p.grad for p in alone.parameters()]), units=TOKENS * HIDDEN
    )


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


def fully_shard_plain_experts(names: Names) -> None:
    fully_shard(Model(names["ep"], distribute=False), mesh=names["dense"])


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
    "got a DTensor for the share of this rank alone": [fully_shard_plain_experts],
    "FSDP expects uniform original parameter dtype": [another_dtype],
    "Attempting to unscale FP16 gradients": [plain_scaler],
}


def test_every_message_of_the_table_is_seen_here() -> None:
    (table,) = re.findall(r"\| message \|.*?\n\n", TRAINING.read_text(), re.DOTALL)
    assert re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE) == list(FAILURES)


@promise("torch-tools")
@on_ranks(4, pool="cpu_pool")
def test_what_raises(rank: Rank) -> None:
    for message, failures in FAILURES.items():
        for failure in failures:
            names = given(rank, ep_size=2)
            with pytest.raises((ValueError, TypeError, RuntimeError, AssertionError), match=re.escape(message)):
                failure(names)
