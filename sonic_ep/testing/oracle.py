"""The oracle: what one call of the layer has to give, forward and every gradient, and how far it is from that.

``dense_moe`` in a wider dtype is the truth; plain PyTorch in the dtype of the call says how accurate an answer has to
be. Each rank measures its share, and the shares of all ranks are judged together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import inf
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.backend import ExpertWeights
from sonic_ep.config import RouterOptions
from sonic_ep.distributed.group import EPGroup
from sonic_ep.reference.dense import dense_moe, dense_scores
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing.cases import Case, Inputs, draw
from sonic_ep.testing.checks import Accuracy, Yardstick, pooled

NO_FACTS: Mapping[str, bool] = MappingProxyType({})
ALONE = EPGroup(rank=0, world_size=1)
ALL = slice(None)
ROUTER, LOGITS = "router_w", "router_logits"
BY_TOKENS = ("y", LOGITS, "dx", "dscores")

# A call's results by name: y, router_logits, dx, dscores or drouter_w, dw1, dw2, db1, db2.
Outcome = Mapping[str, Tensor]
Leaves = Mapping[str, Tensor]


def leaf(tensor: Tensor) -> Tensor:
    """A copy that requires a gradient."""
    return tensor.detach().clone().requires_grad_()


def leaf_experts(experts: ExpertWeights, share: slice = ALL, dtype: torch.dtype | None = None) -> ExpertWeights:
    """Copies of the experts in ``share`` that require gradients, in ``dtype`` if one is given."""
    copies = {name: leaf(weight[share].to(dtype or weight.dtype)) for name, weight in weights_of(experts).items()}
    return with_weights(experts, copies)


def with_weights(experts: ExpertWeights, weights: Leaves) -> ExpertWeights:
    """``experts`` with other weights, given by name."""
    return experts.with_tensors(weights)


def weights_of(experts: ExpertWeights) -> dict[str, Tensor]:
    """Weights and the biases if there are any, by name: see ``ExpertWeights.tensors``."""
    return dict(experts.tensors)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerCall(ABC):
    """One rank's call of the layer: x and the gradient dy of its output, (T, H), and its experts; leaves require grad.

    tokens: the leaves of the tokens, by name; weights: the others, the router alike on all ranks, and the experts.
    """

    x: Tensor
    dy: Tensor
    experts: ExpertWeights

    @property
    @abstractmethod
    def top_k(self) -> int:
        """K."""

    @property
    def tokens(self) -> Leaves:
        """Leaves of the tokens: x, and the scores of ``moe_routed``."""
        return {"x": self.x}

    @property
    def weights(self) -> Leaves:
        """Leaves of the weights: the experts, and the router of ``moe``."""
        return weights_of(self.experts)

    @property
    def leaves(self) -> Leaves:
        """What gradients are taken of, in the order of the results."""
        return {**self.tokens, **self.weights}

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``moe`` and ``moe_routed`` both take."""
        experts = self.experts
        options = {"activation": experts.activation, "gate_layout": experts.layout.name}
        return {"x": self.x, **{name: getattr(experts, name) for name in ("w1", "w2", "b1", "b2")}, **options}

    @abstractmethod
    def forward(self, ep: ExpertParallel) -> Outcome:
        """The outputs of the layer."""

    @abstractmethod
    def dense(self, tokens: Leaves, weights: Leaves, place: slice) -> Outcome:
        """The outputs of the tokens in ``place`` by plain PyTorch, given their leaves and the weights of all ranks."""

    def output_gradients(self, place: slice = ALL) -> Leaves:
        """The gradients of the outputs, by name."""
        return {"y": self.dy[place]}

    def run(self, ep: ExpertParallel, *, training: bool = True, backward: bool = True) -> Outcome:
        """The outputs and, if ``backward``, the gradients of all leaves."""
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
    def tokens(self) -> Leaves:
        """Leaves of the tokens: x and the scores."""
        return {"x": self.x, "scores": self.topk_scores}

    def forward(self, ep: ExpertParallel) -> Outcome:
        """``ep.moe_routed``."""
        return {"y": ep.moe_routed(topk_idx=self.topk_idx, topk_scores=self.topk_scores, **self.arguments)}

    def dense(self, tokens: Leaves, weights: Leaves, place: slice) -> Outcome:
        """The sums."""
        experts = with_weights(self.experts, weights)
        return {"y": dense_moe(tokens["x"], self.topk_idx[place], tokens["scores"], experts)}


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
    def weights(self) -> Leaves:
        """The router and this rank's experts."""
        return {ROUTER: self.router_w, **super().weights}

    def output_gradients(self, place: slice = ALL) -> Leaves:
        """Those of y, and of the logits if they have one."""
        logits = {} if self.dlogits is None else {LOGITS: self.dlogits[place]}
        return {**super().output_gradients(place), **logits}

    def forward(self, ep: ExpertParallel) -> Outcome:
        """``ep.moe``."""
        top_k, reduced = self.options.top_k, self.options.reduce_router_grad
        given = {"router_w": self.router_w, **self.arguments, "router": self.options}
        out = ep.moe(**given, top_k=top_k, reduce_router_grad=reduced)
        return {"y": out.y, LOGITS: out.router_logits, "tokens_per_expert": out.tokens_per_expert}

    def dense(self, tokens: Leaves, weights: Leaves, place: slice) -> Outcome:
        """The sums and the logits."""
        x, router_w = tokens["x"], weights[ROUTER]
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), router_w.to(wide))
        chosen = choose_experts(logits, self.top_k) if self.choices is None else self.choices[place]
        scores = dense_scores(logits, chosen, self.options)
        return {"y": dense_moe(x, chosen, scores, with_weights(self.experts, weights)), LOGITS: logits}


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


def dense_outcome(call: LayerCall, group: EPGroup, dtype: torch.dtype, at_a_time: int | None = None) -> Outcome:
    """Collective: what ``dense_moe`` gives for this rank's tokens, ``at_a_time`` of them, and for its experts.

    Gradients of weights are summed in fp32 or wider over tokens and ranks, and rounded once.
    """

    def widened(tensor: Tensor) -> Tensor:
        return tensor.detach().to(torch.promote_types(tensor.dtype, dtype)).requires_grad_()

    whole = {name: w if name == ROUTER else gathered_experts(w, group) for name, w in call.weights.items()}
    weights = {name: widened(weight) for name, weight in whole.items()}
    sums: dict[str, Tensor] = {}
    kept: list[Outcome] = []
    count = max(1, call.x.shape[0])
    for first in range(0, count, at_a_time or count):
        place = slice(first, first + (at_a_time or count))
        with torch.enable_grad():
            tokens = {name: widened(tensor[place]) for name, tensor in call.tokens.items()}
            outputs = call.dense(tokens, weights, place)
            found = gradients(outputs, {**tokens, **weights}, call.output_gradients(place))
        for name in weights:
            gradient = found.pop(f"d{name}")
            wide = torch.promote_types(gradient.dtype, torch.float32)
            sums[name] = sums[name].add_(gradient) if name in sums else gradient.to(wide)
        kept.append({**{name: output.detach() for name, output in outputs.items()}, **found})
    outcome = {name: torch.cat([part[name] for part in kept]) for name in kept[0]}
    for name, total in sums.items():
        if group.world_size > 1:
            dist.all_reduce(total, group=group.process_group)
        share = total if name == ROUTER else total.chunk(group.world_size)[group.rank]
        outcome[f"d{name}"] = share.to(dtype, copy=True)
    return outcome


def gradients(outputs: Outcome, leaves: Leaves, of_outputs: Leaves) -> dict[str, Tensor]:
    """The gradients of the leaves by name, where the outputs have those of ``of_outputs``, cast to their dtype."""
    given = [gradient.to(outputs[name].dtype) for name, gradient in of_outputs.items()]
    found = torch.autograd.grad([outputs[name] for name in of_outputs], list(leaves.values()), given)
    return {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def gathered_experts(share: Tensor, group: EPGroup) -> Tensor:
    """Collective: the experts of all ranks, (E, ...), from those of each."""
    if group.world_size == 1:
        return share.detach()
    share = share.detach().contiguous()
    shares = [torch.empty_like(share) for _ in range(group.world_size)]
    dist.all_gather(shares, share, group=group.process_group)
    return torch.cat(shares)


def gather_parts(parts: Iterable[Tensor], group: EPGroup) -> Tensor:
    """Collective: the parts of every rank, (W, parts, ...)."""
    mine = torch.stack(list(parts))
    return gathered_experts(mine[None], group) if group.process_group is not None else mine[None]


def judge_parts(measured: Mapping[str, Tensor], outcome: Outcome, group: EPGroup) -> list[Accuracy]:
    """Collective: how accurate tensors are on all ranks together, from ``Yardstick.parts`` of each rank."""
    of_ranks = gather_parts(measured.values(), group).cpu()
    findings = []
    for name, shares in zip(measured, of_ranks.unbind(dim=1), strict=True):
        dtype = outcome[name].dtype if name in outcome else torch.float64
        # Every rank holds the whole gradient of the router; the worst of them counts.
        wholes = shares[:, None] if name == f"d{ROUTER}" else shares[None]
        findings.append(max((pooled(name, whole, dtype) for whole in wholes), key=lambda found: found.ratio))
    return findings


def compare(
    outcome: Outcome, oracle: Oracle, inputs: Inputs, ep: ExpertParallel, facts: Mapping[str, bool] = NO_FACTS
) -> list[Accuracy]:
    """Collective: the outcome of all ranks against the oracle's, one finding for each tensor the oracle knows.

    facts: what else has to be true on every rank, by name; an infinite error where it is not.
    """
    shares = dict.fromkeys(BY_TOKENS, inputs.tokens_of(ep.rank)) | {f"d{ROUTER}": ALL}
    measured = {
        name: Yardstick(truth, oracle.plain[name]).parts(outcome[name], shares.get(name, inputs.experts_of(ep.rank)))
        for name, truth in oracle.truth.items()
    }
    for name, holds in facts.items():
        measured[name] = outcome["y"].new_zeros((3, 2), dtype=torch.float64)
        measured[name][1] = 0.0 if holds else inf
    return judge_parts(measured, outcome, ep.group)


def routed_call(inputs: Inputs, rank: int | None = None) -> RoutedCall:
    """The case through ``moe_routed``: the share of ``rank``, or all ranks' together."""
    tokens, shared = _shared(inputs, rank)
    return RoutedCall(topk_idx=inputs.topk_idx[tokens], topk_scores=leaf(inputs.topk_scores[tokens]), **shared)


def run_routed(inputs: Inputs, ep: ExpertParallel) -> Outcome:
    """This rank's share of the case through ``ep.moe_routed``, forward and backward."""
    return routed_call(inputs, ep.rank).run(ep)


def routed_oracle(inputs: Inputs) -> Oracle:
    """What ``run_routed`` should give, for all ranks at once."""
    return Oracle(call=routed_call(inputs))


def run_moe(inputs: Inputs, ep: ExpertParallel) -> Outcome:
    """This rank's share of the case through ``ep.moe``, forward and backward, the logits' gradient included."""
    return _router_call(inputs, ep.rank).run(ep)


def moe_oracle(inputs: Inputs, topk_idx: Tensor) -> Oracle:
    """What ``run_moe`` should give, for all ranks at once, where the choices (N, K) are known."""
    return Oracle(call=replace(_router_call(inputs), choices=topk_idx))


def _router_call(inputs: Inputs, rank: int | None = None) -> RouterCall:
    tokens, shared = _shared(inputs, rank)
    router_w, options = leaf(inputs.router_w), inputs.case.router_options()
    return RouterCall(router_w=router_w, options=options, dlogits=inputs.dlogits[tokens], **shared)


def _shared(inputs: Inputs, rank: int | None) -> tuple[slice, dict[str, Any]]:
    """The tokens of ``rank`` or of all, and what both kinds of calls have of them."""
    tokens, experts = (ALL, ALL) if rank is None else (inputs.tokens_of(rank), inputs.experts_of(rank))
    shared = {"x": leaf(inputs.x[tokens]), "dy": inputs.dy[tokens], "experts": leaf_experts(inputs.experts, experts)}
    return tokens, shared


# Kept for the next call with the same case.
drawn = lru_cache(maxsize=4)(draw)


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

    Also found: whether its choices are distinct and the largest of its own logits, and its counts those choices'.
    """
    inputs = drawn(case, ep.world_size, device)
    outcome = run_moe(inputs, ep)
    logits = outcome[LOGITS]
    mine = logits.sort(dim=1, descending=True, stable=True).indices[:, : case.top_k]
    plan = ep.plan(mine, case.num_experts)
    held = [plan.expert_ids[rank, : case.tokens_of_rank(rank)] for rank in range(ep.world_size)]
    largest = torch.equal(logits.gather(1, mine), logits.topk(case.top_k, dim=1).values)
    facts = {
        "plan": torch.equal(held[ep.rank].long(), mine),
        "choices": largest and bool((mine.sort(dim=1).values.diff(dim=1) > 0).all()),
        "counts": torch.equal(plan.counts, outcome["tokens_per_expert"]),
    }
    choices = torch.cat(held).flatten().tolist()
    return compare(outcome, drawn_oracle(case, ep.world_size, device, tuple(choices)), inputs, ep, facts)
