"""The differential harness: one call of the layer, forward and every gradient, against the oracle.

Each rank draws the whole case, runs its share, and measures that against its share of the oracle's answer; the parts
of all ranks are judged together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.backend import Experts
from sonic_ep.config import RouterOptions
from sonic_ep.reference.dense import dense_moe, dense_scores
from sonic_ep.testing.cases import Case, Inputs, draw
from sonic_ep.testing.checks import Accuracy, Errors, Part, Yardstick

NO_FACTS: Mapping[str, bool] = MappingProxyType({})
HOLDS, BROKEN = Part(square=0.0, worst_row=0.0), Part(square=inf, worst_row=inf)
EXACT = Errors(norm=0.0, worst_row=0.0)

# A call's results by name: y, dx, dw1, dw2, db1, db2, then d(scores), or router_logits and d(router_w).
Outcome = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Oracle:
    """The layer's answer for all ranks: in fp64, and by plain PyTorch in the dtype of the case."""

    truth: Outcome
    plain: Outcome


def leaf(tensor: Tensor) -> Tensor:
    """A copy that requires a gradient."""
    return tensor.detach().clone().requires_grad_()


def leaf_experts(experts: Experts, share: slice = slice(None), dtype: torch.dtype | None = None) -> Experts:
    """Copies of the experts in ``share`` that require gradients, in ``dtype`` if one is given."""

    def take(weight: Tensor) -> Tensor:
        return leaf(weight[share].to(dtype or weight.dtype))

    b1 = None if experts.b1 is None else take(experts.b1)
    b2 = None if experts.b2 is None else take(experts.b2)
    return replace(experts, w1=take(experts.w1), w2=take(experts.w2), b1=b1, b2=b2)


def run_routed(inputs: Inputs, ep: ExpertParallel) -> Outcome:
    """This rank's share of the case through ``ep.moe_routed``, forward and backward."""
    tokens = inputs.tokens_of(ep.rank)
    x, scores = leaf(inputs.x[tokens]), leaf(inputs.topk_scores[tokens])
    experts = leaf_experts(inputs.experts, inputs.experts_of(ep.rank))
    y = ep.moe_routed(
        x,
        inputs.topk_idx[tokens],
        scores,
        experts.w1,
        experts.w2,
        b1=experts.b1,
        b2=experts.b2,
        activation=experts.activation.name,
        gate_layout=experts.layout.name,
    )
    y.backward(inputs.dy[tokens])
    return {"y": y.detach(), **_gradients(x=x, scores=scores), **_expert_gradients(experts)}


def run_moe(inputs: Inputs, ep: ExpertParallel) -> Outcome:
    """This rank's share of the case through ``ep.moe``, forward and backward, the logits' gradient included."""
    case, tokens = inputs.case, inputs.tokens_of(ep.rank)
    x, router_w = leaf(inputs.x[tokens]), leaf(inputs.router_w)
    experts = leaf_experts(inputs.experts, inputs.experts_of(ep.rank))
    out = ep.moe(
        x,
        router_w,
        experts.w1,
        experts.w2,
        case.top_k,
        b1=experts.b1,
        b2=experts.b2,
        activation=case.activation,
        gate_layout=case.gate_layout,
        score_order=case.score_order,
        norm_topk_probs=case.norm_topk_probs,
    )
    torch.autograd.backward([out.y, out.router_logits], [inputs.dy[tokens], inputs.dlogits[tokens]])
    return {
        "y": out.y.detach(),
        "router_logits": out.router_logits.detach(),
        "tokens_per_expert": out.tokens_per_expert,
        **_gradients(x=x, router_w=router_w),
        **_expert_gradients(experts),
    }


def routed_oracle(inputs: Inputs) -> Oracle:
    """What ``run_routed`` should give, for all ranks at once."""
    return Oracle(truth=_dense_routed(inputs, torch.float64), plain=_dense_routed(inputs, inputs.case.dtype))


def moe_oracle(inputs: Inputs, topk_idx: Tensor) -> Oracle:
    """What ``run_moe`` should give, for all ranks at once, where the choices (N, K) are known.

    The choices are taken from the run under test, because near ties are decided by the last bit of the logits; the
    logits themselves are compared, and ``choices_agree`` holds the choices against them.
    """
    return Oracle(
        truth=_dense_moe(inputs, torch.float64, topk_idx),
        plain=_dense_moe(inputs, inputs.case.dtype, topk_idx),
    )


def choices_agree(topk_idx: Tensor, logits: Tensor) -> bool:
    """Whether ``topk_idx`` (N, K) are distinct and have the K largest of ``logits`` (N, E), largest first."""
    top_k = topk_idx.shape[1]
    chosen = logits.gather(1, topk_idx)
    distinct = bool((topk_idx.sort(dim=1).values.diff(dim=1) > 0).all())
    return distinct and torch.equal(chosen, logits.topk(top_k, dim=1).values)


def compare(
    outcome: Outcome, oracle: Oracle, inputs: Inputs, ep: ExpertParallel, facts: Mapping[str, bool] = NO_FACTS
) -> list[Accuracy]:
    """Collective: the outcome of all ranks against the oracle's, one finding for each tensor the oracle knows.

    facts: what else has to be true on every rank, by name; an infinite error where it is not.
    """
    shares = {"tokens": inputs.tokens_of(ep.rank), "experts": inputs.experts_of(ep.rank), "all": slice(None)}
    sticks = {name: Yardstick(truth, oracle.plain[name]) for name, truth in oracle.truth.items()}
    kinds = {name: _SHARE.get(name, "experts") for name in sticks}
    parts = [stick.part(outcome[name], shares[kinds[name]]) for name, stick in sticks.items()]
    parts += [HOLDS if holds else BROKEN for holds in facts.values()]
    by_rank = gather_parts(parts, ep, inputs.x.device)
    findings = []
    for place, (name, stick) in enumerate(sticks.items()):
        if kinds[name] == "all":
            # Every rank holds the whole; the worst of them counts.
            found = [stick.judge(name, [parts[place]]) for parts in by_rank]
            findings.append(max(found, key=lambda accuracy: accuracy.ratio))
        else:
            findings.append(stick.judge(name, [parts[place] for parts in by_rank]))
    for place, name in enumerate(facts, start=len(sticks)):
        worst = max(parts[place].worst_row for parts in by_rank)
        findings.append(Accuracy(name=name, got=Errors(norm=worst, worst_row=worst), bound=EXACT))
    return findings


def gather_parts(parts: list[Part], ep: ExpertParallel, device: torch.device) -> list[list[Part]]:
    """Collective: the parts of every rank, in rank order."""
    mine = torch.tensor([[part.square, part.worst_row] for part in parts], dtype=torch.float64, device=device)
    every = [torch.empty_like(mine) for _ in range(ep.world_size)]
    if ep.group.process_group is None:
        every = [mine]
    else:
        dist.all_gather(every, mine, group=ep.group.process_group)
    return [[Part(square=square, worst_row=worst) for square, worst in rank.tolist()] for rank in every]


@lru_cache(maxsize=4)
def drawn(case: Case, world_size: int, device: torch.device) -> Inputs:
    """``draw``, kept for the next call with the same case."""
    return draw(case, world_size, device)


@lru_cache(maxsize=4)
def drawn_oracle(case: Case, world_size: int, device: torch.device) -> Oracle:
    """``routed_oracle``, kept for the next call with the same case."""
    return routed_oracle(drawn(case, world_size, device))


@lru_cache(maxsize=4)
def drawn_moe_oracle(case: Case, world_size: int, device: torch.device, choices: tuple[int, ...]) -> Oracle:
    """``moe_oracle``, kept for the next call with the same case and the same choices (N*K, token by token)."""
    topk_idx = torch.tensor(choices, dtype=torch.int64, device=device).view(-1, case.top_k)
    return moe_oracle(drawn(case, world_size, device), topk_idx)


def verify_routed(case: Case, ep: ExpertParallel, device: torch.device) -> list[Accuracy]:
    """Collective: ``ep.moe_routed`` against the oracle; the same findings on every rank."""
    inputs = drawn(case, ep.world_size, device)
    return compare(run_routed(inputs, ep), drawn_oracle(case, ep.world_size, device), inputs, ep)


def verify_moe(case: Case, ep: ExpertParallel, device: torch.device) -> list[Accuracy]:
    """Collective: ``ep.moe`` against the oracle; the same findings on every rank.

    Also found: whether its choices are the largest of its own logits, and its counts those choices'.
    """
    inputs = drawn(case, ep.world_size, device)
    outcome = run_moe(inputs, ep)
    mine = outcome["router_logits"].sort(dim=1, descending=True, stable=True).indices[:, : case.top_k]
    plan = ep.plan(mine, case.num_experts)
    held = [plan.expert_ids[rank, : case.tokens_of_rank(rank)] for rank in range(ep.world_size)]
    topk_idx = torch.cat(held).long()
    facts = {
        "plan": torch.equal(held[ep.rank].long(), mine),
        "choices": choices_agree(mine, outcome["router_logits"]),
        "counts": torch.equal(plan.counts, outcome["tokens_per_expert"]),
    }
    oracle = drawn_moe_oracle(case, ep.world_size, device, tuple(topk_idx.flatten().tolist()))
    return compare(outcome, oracle, inputs, ep, facts)


_SHARE: Mapping[str, str] = {
    "y": "tokens",
    "dx": "tokens",
    "dscores": "tokens",
    "router_logits": "tokens",
    "drouter_w": "all",
}


def _dense_routed(inputs: Inputs, dtype: torch.dtype) -> Outcome:
    x = leaf(inputs.x.to(dtype))
    scores = leaf(inputs.topk_scores.to(torch.promote_types(dtype, torch.float32)))
    experts = leaf_experts(inputs.experts, dtype=dtype)
    y = dense_moe(x, inputs.topk_idx, scores, experts)
    y.backward(inputs.dy.to(dtype))
    return {"y": y.detach(), **_gradients(x=x, scores=scores), **_expert_gradients(experts)}


def _dense_moe(inputs: Inputs, dtype: torch.dtype, topk_idx: Tensor) -> Outcome:
    options: RouterOptions = inputs.case.router_options()
    wide = torch.promote_types(dtype, torch.float32)
    x, router_w = leaf(inputs.x.to(dtype)), leaf(inputs.router_w.to(dtype))
    experts = leaf_experts(inputs.experts, dtype=dtype)
    logits = torch.nn.functional.linear(x.to(wide), router_w.to(wide))
    y = dense_moe(x, topk_idx, dense_scores(logits, topk_idx, options), experts)
    torch.autograd.backward([y, logits], [inputs.dy.to(dtype), inputs.dlogits.to(wide)])
    return {
        "y": y.detach(),
        "router_logits": logits.detach(),
        **_gradients(x=x, router_w=router_w),
        **_expert_gradients(experts),
    }


def _gradients(**leaves: Tensor | None) -> Outcome:
    given = {name: tensor for name, tensor in leaves.items() if tensor is not None}
    return {f"d{name}": _gradient(name, tensor) for name, tensor in given.items()}


def _gradient(name: str, tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise AssertionError(f"d{name}: no gradient arrived")
    return tensor.grad


def _expert_gradients(experts: Experts) -> Outcome:
    return _gradients(w1=experts.w1, w2=experts.w2, b1=experts.b1, b2=experts.b2)
