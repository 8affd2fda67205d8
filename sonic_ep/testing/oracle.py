"""The oracle: what one call of the layer has to give, forward and every gradient, and how far it is from that.

``dense_moe`` in a wider dtype is the truth; plain PyTorch in the dtype of the call says how accurate an answer has to
be. Each rank measures its share, and the shares of all ranks are judged together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import inf
from types import MappingProxyType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.backend import Experts
from sonic_ep.config import RouterOptions
from sonic_ep.distributed.group import EPGroup
from sonic_ep.reference.dense import dense_moe, dense_scores
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing.cases import Case, Inputs, draw
from sonic_ep.testing.checks import Accuracy, Errors, Part, Yardstick, pooled

NO_FACTS: Mapping[str, bool] = MappingProxyType({})
HOLDS, BROKEN = Part(square=0.0, worst_row=0.0), Part(square=inf, worst_row=inf)
EXACT = Errors(norm=0.0, worst_row=0.0)
ALONE = EPGroup(rank=0, world_size=1)
ROUTER = "router_w"
LOGITS = "router_logits"

# A call's results by name: y, router_logits, dx, dscores or drouter_w, dw1, dw2, db1, db2.
Outcome = Mapping[str, Tensor]
Leaves = Mapping[str, Tensor]


def leaf(tensor: Tensor) -> Tensor:
    """A copy that requires a gradient."""
    return tensor.detach().clone().requires_grad_()


def leaf_experts(experts: Experts, share: slice = slice(None), dtype: torch.dtype | None = None) -> Experts:
    """Copies of the experts in ``share`` that require gradients, in ``dtype`` if one is given."""
    copies = {name: leaf(weight[share].to(dtype or weight.dtype)) for name, weight in weights_of(experts).items()}
    return with_weights(experts, copies)


def with_weights(experts: Experts, weights: Leaves) -> Experts:
    """``experts`` with other weights, given by name."""
    b1, b2 = weights.get("b1"), weights.get("b2")
    return replace(experts, w1=weights["w1"], w2=weights["w2"], b1=b1, b2=b2)


def weights_of(experts: Experts) -> dict[str, Tensor]:
    """w1, w2 and the biases if there are any, by name."""
    named = {"w1": experts.w1, "w2": experts.w2, "b1": experts.b1, "b2": experts.b2}
    return {name: weight for name, weight in named.items() if weight is not None}


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerCall(ABC):
    """One rank's call of the layer: x and the gradient dy of its output, (T, H), and the experts of this rank.

    All leaves (x, scores or router, weights) require gradients.
    """

    x: Tensor
    dy: Tensor
    experts: Experts

    @property
    @abstractmethod
    def top_k(self) -> int:
        """K."""

    @property
    @abstractmethod
    def leaves(self) -> Leaves:
        """What gradients are taken of, in the order of the results."""

    @property
    def weights(self) -> Leaves:
        """Leaves that are not of the tokens: the router, alike on all ranks, and this rank's experts."""
        return weights_of(self.experts)

    @abstractmethod
    def forward(self, ep: ExpertParallel) -> Outcome:
        """The outputs of the layer."""

    @abstractmethod
    def dense(self, weights: Leaves, place: slice, dtype: torch.dtype) -> tuple[Leaves, Outcome]:
        """The leaves and outputs of the tokens in ``place`` by plain PyTorch. weights: all experts', in ``dtype``."""

    def output_gradients(self, place: slice = slice(None)) -> Leaves:
        """The gradients of the outputs, by name."""
        return {"y": self.dy[place]}

    def run(self, ep: ExpertParallel, *, training: bool = True, backward: bool = True) -> Outcome:
        """The outputs, and behind a backward the gradients of all leaves."""
        with torch.set_grad_enabled(training):
            outputs = self.forward(ep)
            found = gradients(outputs, self.leaves, self.output_gradients()) if backward else {}
        return {**{name: output.detach() for name, output in outputs.items()}, **found}


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedCall(LayerCall):
    """A call of ``moe_routed``: topk_idx and topk_scores are (T, K)."""

    topk_idx: Tensor
    topk_scores: Tensor

    @property
    def top_k(self) -> int:
        """K."""
        return self.topk_idx.shape[1]

    @property
    def leaves(self) -> Leaves:
        """The tokens, the scores and the weights."""
        return {"x": self.x, "scores": self.topk_scores, **self.weights}

    def forward(self, ep: ExpertParallel) -> Outcome:
        """``ep.moe_routed``."""
        experts = self.experts
        y = ep.moe_routed(
            self.x,
            self.topk_idx,
            self.topk_scores,
            experts.w1,
            experts.w2,
            b1=experts.b1,
            b2=experts.b2,
            activation=experts.activation.name,
            gate_layout=experts.layout.name,
        )
        return {"y": y}

    def dense(self, weights: Leaves, place: slice, dtype: torch.dtype) -> tuple[Leaves, Outcome]:
        """Tokens and scores; y."""
        scores_dtype = torch.promote_types(dtype, torch.float32)
        tokens = {
            "x": self.x.detach()[place].to(dtype).requires_grad_(),
            "scores": self.topk_scores.detach()[place].to(scores_dtype).requires_grad_(),
        }
        experts = with_weights(self.experts, weights)
        return tokens, {"y": dense_moe(tokens["x"], self.topk_idx[place], tokens["scores"], experts)}


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterCall(LayerCall):
    """A call of ``moe``: router_w (E, H).

    dlogits: the gradient of the logits (T, E), or None. choices: the experts (T, K) that the oracle takes, where they
    are known from the run under test: near ties are decided by the last bit of the logits.
    """

    router_w: Tensor
    options: RouterOptions
    dlogits: Tensor | None = None
    choices: Tensor | None = None

    @property
    def top_k(self) -> int:
        """K."""
        return self.options.top_k

    @property
    def leaves(self) -> Leaves:
        """The tokens and the weights."""
        return {"x": self.x, **self.weights}

    @property
    def weights(self) -> Leaves:
        """The router and this rank's experts."""
        return {ROUTER: self.router_w, **super().weights}

    def output_gradients(self, place: slice = slice(None)) -> Leaves:
        """Those of y, and of the logits if they have one."""
        logits = {} if self.dlogits is None else {LOGITS: self.dlogits[place]}
        return {**super().output_gradients(place), **logits}

    def forward(self, ep: ExpertParallel) -> Outcome:
        """``ep.moe``."""
        experts, options = self.experts, self.options
        out = ep.moe(
            self.x,
            self.router_w,
            experts.w1,
            experts.w2,
            options.top_k,
            b1=experts.b1,
            b2=experts.b2,
            activation=experts.activation.name,
            gate_layout=experts.layout.name,
            score_order=options.score_order,
            norm_topk_probs=options.norm_topk_probs,
        )
        return {"y": out.y, LOGITS: out.router_logits, "tokens_per_expert": out.tokens_per_expert}

    def dense(self, weights: Leaves, place: slice, dtype: torch.dtype) -> tuple[Leaves, Outcome]:
        """Tokens; y and the logits."""
        x = self.x.detach()[place].to(dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        logits = F.linear(x.to(wide), weights[ROUTER].to(wide))
        chosen = choose_experts(logits, self.top_k) if self.choices is None else self.choices[place]
        scores = dense_scores(logits, chosen, self.options)
        y = dense_moe(x, chosen, scores, with_weights(self.experts, weights))
        return {"x": x}, {"y": y, LOGITS: logits}


@dataclass(frozen=True, kw_only=True, eq=False)
class Oracle:
    """What a call has to give, in the dtype ``wide``, and what plain PyTorch gives; each is computed once.

    group: the ranks that share the experts of the call. at_a_time: tokens that the truth is computed for at a time, so
    that a large shape fits; None for all.
    """

    call: LayerCall
    group: EPGroup = ALONE
    wide: torch.dtype = torch.float64
    at_a_time: int | None = None

    @cached_property
    def truth(self) -> Outcome:
        """Collective: in the wider dtype."""
        return dense_outcome(self.call, self.group, self.wide, self.at_a_time)

    @cached_property
    def plain(self) -> Outcome:
        """Collective: in the dtype of the call, all tokens at once."""
        return dense_outcome(self.call, self.group, self.call.x.dtype)

    def plain_in_parts(self) -> Outcome:
        """Collective: in the dtype of the call, ``at_a_time`` tokens at a time."""
        return dense_outcome(self.call, self.group, self.call.x.dtype, self.at_a_time)


def dense_outcome(call: LayerCall, group: EPGroup, dtype: torch.dtype, at_a_time: int | None = None) -> Outcome:
    """Collective: what ``dense_moe`` gives for this rank's tokens, ``at_a_time`` of them, and for its experts.

    Gradients of weights are summed in fp32 or wider over tokens and ranks, and rounded once.
    """
    weights: dict[str, Tensor] = {}
    for name, weight in call.weights.items():
        whole = weight.detach() if name == ROUTER else gathered_experts(weight, group)
        weights[name] = whole.to(dtype).requires_grad_()
    sums: dict[str, Tensor] = {}
    kept: list[Outcome] = []
    count = call.x.shape[0]
    for first in range(0, max(1, count), at_a_time or max(1, count)):
        place = slice(first, first + (at_a_time or max(1, count)))
        with torch.enable_grad():
            tokens, outputs = call.dense(weights, place, dtype)
            found = gradients(outputs, {**tokens, **weights}, call.output_gradients(place))
        for name in weights:
            _add_to(sums, name, found.pop(f"d{name}"))
        kept.append({**{name: output.detach() for name, output in outputs.items()}, **found})
    of_tokens = {name: torch.cat([part[name] for part in kept]) for name in kept[0]}
    return {**of_tokens, **{f"d{name}": _share(name, sums[name], call, group).to(dtype, copy=True) for name in weights}}


def gradients(outputs: Outcome, leaves: Leaves, of_outputs: Leaves) -> dict[str, Tensor]:
    """The gradients of the leaves by name, where the outputs have those of ``of_outputs``, cast to their dtype."""
    given = [gradient.to(outputs[name].dtype) for name, gradient in of_outputs.items()]
    found = torch.autograd.grad([outputs[name] for name in of_outputs], list(leaves.values()), given)
    return {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def gathered_experts(share: Tensor, group: EPGroup) -> Tensor:
    """Collective: the experts of all ranks, (E, ...), from those of each."""
    if group.world_size == 1:
        return share.detach()
    shares = [torch.empty_like(share.detach()) for _ in range(group.world_size)]
    dist.all_gather(shares, share.detach().contiguous(), group=group.process_group)
    return torch.cat(shares)


def accuracies_of(outcome: Outcome, truth: Outcome, plain: Outcome, group: EPGroup) -> list[Accuracy]:
    """Collective: how accurate the output and every gradient are, on all ranks together, each with its own truth."""
    found = []
    for name, right in truth.items():
        if name != LOGITS:
            stick, got = Yardstick(_rows(right), _rows(plain[name])), outcome[name]
            mine = [Part(square=stick.norm**2, worst_row=0.0), stick.part(_rows(got)), stick.plain_part]
            found.append(pooled(name, gather_parts(mine, group, got.device), got.dtype))
    return found


def gather_parts(parts: list[Part], group: EPGroup, device: torch.device) -> list[list[Part]]:
    """Collective: the parts of every rank, in rank order."""
    mine = torch.tensor([[part.square, part.worst_row] for part in parts], dtype=torch.float64, device=device)
    every = [mine]
    if group.process_group is not None:
        every = [torch.empty_like(mine) for _ in range(group.world_size)]
        dist.all_gather(every, mine, group=group.process_group)
    return [[Part(square=square, worst_row=worst) for square, worst in rank.tolist()] for rank in every]


def routed_call(inputs: Inputs, rank: int | None = None) -> RoutedCall:
    """The case through ``moe_routed``: the share of ``rank``, or all ranks' together."""
    tokens, experts = _shares(inputs, rank)
    return RoutedCall(
        x=leaf(inputs.x[tokens]),
        dy=inputs.dy[tokens],
        experts=leaf_experts(inputs.experts, experts),
        topk_idx=inputs.topk_idx[tokens],
        topk_scores=leaf(inputs.topk_scores[tokens]),
    )


def router_call(inputs: Inputs, rank: int | None = None, choices: Tensor | None = None) -> RouterCall:
    """The case through ``moe``: the share of ``rank``, or all ranks' together, whose choices (N, K) may be known."""
    tokens, experts = _shares(inputs, rank)
    return RouterCall(
        x=leaf(inputs.x[tokens]),
        dy=inputs.dy[tokens],
        experts=leaf_experts(inputs.experts, experts),
        router_w=leaf(inputs.router_w),
        options=inputs.case.router_options(),
        dlogits=inputs.dlogits[tokens],
        choices=choices,
    )


def run_routed(inputs: Inputs, ep: ExpertParallel) -> Outcome:
    """This rank's share of the case through ``ep.moe_routed``, forward and backward."""
    return routed_call(inputs, ep.rank).run(ep)


def run_moe(inputs: Inputs, ep: ExpertParallel) -> Outcome:
    """This rank's share of the case through ``ep.moe``, forward and backward, the logits' gradient included."""
    return router_call(inputs, ep.rank).run(ep)


def routed_oracle(inputs: Inputs) -> Oracle:
    """What ``run_routed`` should give, for all ranks at once."""
    return Oracle(call=routed_call(inputs))


def moe_oracle(inputs: Inputs, topk_idx: Tensor) -> Oracle:
    """What ``run_moe`` should give, for all ranks at once, where the choices (N, K) are known."""
    return Oracle(call=router_call(inputs, choices=topk_idx))


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
    by_tokens = {"y", LOGITS, "dx", "dscores"}
    sticks = {name: Yardstick(truth, oracle.plain[name]) for name, truth in oracle.truth.items()}
    parts = []
    for name, stick in sticks.items():
        share = inputs.tokens_of(ep.rank) if name in by_tokens else inputs.experts_of(ep.rank)
        parts.append(stick.part(outcome[name], slice(None) if name == f"d{ROUTER}" else share))
    parts += [HOLDS if holds else BROKEN for holds in facts.values()]
    by_tensor = list(zip(*gather_parts(parts, ep.group, inputs.x.device), strict=True))
    findings = []
    for (name, stick), of_ranks in zip(sticks.items(), by_tensor, strict=False):
        # Every rank holds the whole gradient of the router; the worst of them counts.
        shares = [[part] for part in of_ranks] if name == f"d{ROUTER}" else [of_ranks]
        findings.append(max((stick.judge(name, share) for share in shares), key=lambda found: found.ratio))
    for name, of_ranks in zip(facts, by_tensor[len(sticks) :], strict=True):
        worst = max(part.worst_row for part in of_ranks)
        findings.append(Accuracy(name=name, got=Errors(norm=worst, worst_row=worst), bound=EXACT))
    return findings


@lru_cache(maxsize=4)
def drawn(case: Case, world_size: int, device: torch.device) -> Inputs:
    """``draw``, kept for the next call with the same case."""
    return draw(case, world_size, device)


@lru_cache(maxsize=4)
def drawn_oracle(case: Case, world_size: int, device: torch.device, choices: tuple[int, ...] | None = None) -> Oracle:
    """The oracle of a case, kept for the next call: of ``moe_routed``, or of ``moe`` with the ``choices`` (N*K)."""
    inputs = drawn(case, world_size, device)
    if choices is None:
        return routed_oracle(inputs)
    return moe_oracle(inputs, torch.tensor(choices, dtype=torch.int64, device=device).view(-1, case.top_k))


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
    mine = outcome[LOGITS].sort(dim=1, descending=True, stable=True).indices[:, : case.top_k]
    plan = ep.plan(mine, case.num_experts)
    held = [plan.expert_ids[rank, : case.tokens_of_rank(rank)] for rank in range(ep.world_size)]
    topk_idx = torch.cat(held).long()
    facts = {
        "plan": torch.equal(held[ep.rank].long(), mine),
        "choices": choices_agree(mine, outcome[LOGITS]),
        "counts": torch.equal(plan.counts, outcome["tokens_per_expert"]),
    }
    oracle = drawn_oracle(case, ep.world_size, device, tuple(topk_idx.flatten().tolist()))
    return compare(outcome, oracle, inputs, ep, facts)


def _shares(inputs: Inputs, rank: int | None) -> tuple[slice, slice]:
    """The tokens and the experts of a rank, or of all."""
    return (slice(None), slice(None)) if rank is None else (inputs.tokens_of(rank), inputs.experts_of(rank))


def _add_to(sums: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    if name in sums:
        sums[name] += gradient
    else:
        sums[name] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _share(name: str, total: Tensor, call: LayerCall, group: EPGroup) -> Tensor:
    """Collective: this rank's part of the sum over ranks."""
    if group.world_size > 1:
        dist.all_reduce(total, group=group.process_group)
    held = call.weights[name].shape[0]
    return total if name == ROUTER else total[group.rank * held : (group.rank + 1) * held]


def _rows(tensor: Tensor) -> Tensor:
    """A vector is one row."""
    return tensor if tensor.ndim > 1 else tensor.reshape(1, -1)
