"""What makes a layer's answer right: the dense oracle on this rank's tokens, its experts' gradients summed over ranks.

Plain PyTorch in the dtype of the layer says how accurate an answer has to be, PyTorch in a wider one what is true.
Truth is computed a few tokens at a time, so that a large shape fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sonic_ep.activation import ACTIVATIONS, GATE_LAYOUTS
from sonic_ep.backend import Experts
from sonic_ep.benchmark.layer_problem import LayerOptions, LayerProblem, Outcome, tensors_of
from sonic_ep.benchmark.routed_call import RoutedCall
from sonic_ep.distributed.group import EPGroup
from sonic_ep.reference.dense import dense_moe, dense_scores
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing.checks import Accuracy, Share, Yardstick, assert_as_accurate, pooled

# Slots that the oracle takes at a time in the wider dtype.
MOST_SLOTS = 2**16
NAMES = {"y": "o", "x_grad": "dx"}
ROUTER = "router_w"
Leaves = Mapping[str, Tensor]
RunPiece = Callable[[Leaves, slice], tuple[list[Tensor], Sequence[Tensor]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What every call has to give, by one call of the layer, and what the oracle says of that.

    plain: by plain PyTorch in the dtype of the layer; truth: in a wider one. accuracies: of all ranks together, the
    same on each. alike: whether this rank's router has chosen what the oracle's did.
    """

    outcome: Outcome
    plain: Outcome
    truth: Outcome
    accuracies: tuple[Accuracy, ...]
    alike: bool

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with the answer."""
        red = [str(accuracy) for accuracy in self.accuracies if not accuracy.ok]
        return (*(() if self.alike else ("other experts are chosen",)), *red)


def wider(dtype: torch.dtype) -> torch.dtype:
    """What truth is computed in: fp32, or fp64 for fp32."""
    return torch.float64 if dtype is torch.float32 else torch.float32


@dataclass(frozen=True, kw_only=True, eq=False)
class Oracle:
    """The oracle of one layer: what is true of it is computed once, whatever is held against it."""

    problem: LayerProblem

    @cached_property
    def truth(self) -> Outcome:
        """Collective: in a wider dtype, a few tokens at a time."""
        shape = self.problem.shape
        return dense_outcome(self.problem, wider(shape.dtype), at_a_time=max(1, MOST_SLOTS // shape.top_k))

    @cached_property
    def plain(self) -> Outcome:
        """Collective: in the dtype of the layer."""
        return dense_outcome(self.problem, self.problem.shape.dtype, at_a_time=max(1, self.problem.shape.tokens))

    def plain_in_pieces(self) -> Outcome:
        """Collective: in the dtype of the layer, a few tokens at a time: what the reference is held against."""
        at_a_time = max(1, MOST_SLOTS // self.problem.shape.top_k)
        return dense_outcome(self.problem, self.problem.shape.dtype, at_a_time=at_a_time)


def judged(oracle: Oracle, outcome: Outcome, plain: Outcome | None = None) -> Answer:
    """Collective: hold the outcome of a forward and backward against the oracle.

    plain: the same by the reference, which is held against the oracle itself before it may say how accurate others have
    to be; None: the oracle in the dtype of the layer says so.
    """
    problem, truth = oracle.problem, oracle.truth
    of_reference = (
        [] if plain is None else accuracies_of(problem, plain, truth, oracle.plain_in_pieces(), "reference's ")
    )
    plain = plain or oracle.plain
    accuracies = [*of_reference, *accuracies_of(problem, outcome, truth, plain)]
    chosen = [problem.choices(each).sort(dim=1).values for each in (outcome, truth)]
    return Answer(outcome=outcome, plain=plain, truth=truth, accuracies=tuple(accuracies), alike=torch.equal(*chosen))


def accuracies_of(
    problem: LayerProblem, outcome: Outcome, truth: Outcome, plain: Outcome, whose: str = ""
) -> list[Accuracy]:
    """Collective: how accurate the output and every gradient are."""
    right, yardsticks, found = tensors_of(truth), tensors_of(plain), tensors_of(outcome)
    return [
        accuracy_of_all(
            f"{whose}{named(name)}",
            found[name],
            Yardstick(as_rows(right[name]), as_rows(yardsticks[name])),
            problem.group,
        )
        for name in right
        if name != "logits"
    ]


def named(field: str) -> str:
    """What people call a part of an answer."""
    return NAMES.get(field, f"d{field.removesuffix('_grad')}")


def faults_of(got: Outcome, truth: Outcome, plain: Outcome) -> tuple[str, ...]:
    """Which of y and the gradients of this rank are not as accurate as those of plain PyTorch."""
    found = []
    found_by_name, yardsticks = tensors_of(got), tensors_of(plain)
    for name, right in tensors_of(truth).items():
        if name == "logits":
            continue
        try:
            assert_as_accurate(found_by_name[name], right, yardsticks[name], name)
        except AssertionError as error:
            found.append(str(error))
    return tuple(found)


def accuracy_of_all(name: str, got: Tensor, stick: Yardstick, group: EPGroup) -> Accuracy:
    """Collective: the errors of the shares of all ranks together, the same on every rank."""
    mine = Share(norm=stick.norm, got=stick.part(as_rows(got)), plain=stick.plain_part)
    shares = [mine] * group.world_size
    if group.world_size > 1:
        dist.all_gather_object(shares, mine, group=group.process_group)
    return pooled(name, shares, got.dtype)


def as_rows(tensor: Tensor) -> Tensor:
    """A vector is one row."""
    return tensor if tensor.ndim > 1 else tensor.reshape(1, -1)


def dense_outcome(problem: LayerProblem, dtype: torch.dtype, *, at_a_time: int) -> Outcome:
    """Collective: what ``dense_moe`` gives for this rank's tokens, ``at_a_time`` of them, and for its experts."""
    inputs, options, top_k = problem.inputs, problem.options, problem.shape.top_k

    def run(leaves: Leaves, place: slice) -> tuple[list[Tensor], Sequence[Tensor]]:
        x = inputs.x.detach()[place].to(dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        with torch.enable_grad():
            logits = F.linear(x.to(wide), leaves[ROUTER].to(wide))
            chosen = choose_experts(logits, top_k)
            scores = dense_scores(logits, chosen, options.router(top_k))
            y = dense_moe(x, chosen, scores, experts_of(leaves, options))
            x_grad, *gradients = torch.autograd.grad(y, [x, *leaves.values()], inputs.out_grad[place].to(dtype))
        return [y.detach(), logits.detach(), x_grad], gradients

    pieces = slices_of(inputs.x.shape[0], at_a_time)
    weights = {ROUTER: inputs.router_w, **inputs.experts}
    (y, logits, x_grad), gradients = in_pieces(pieces, weights, problem.group, dtype, run)
    return Outcome(y=y, logits=logits, x_grad=x_grad, **{f"{name}_grad": found for name, found in gradients.items()})


def dense_routed(call: RoutedCall, group: EPGroup, dtype: torch.dtype, *, at_a_time: int) -> list[Tensor]:
    """Collective: what ``dense_moe`` gives for a call of this rank with its routing given, in the order of its results.

    The output (T, H), then the gradients of x, the scores and this rank's experts.
    """

    def run(leaves: Leaves, place: slice) -> tuple[list[Tensor], Sequence[Tensor]]:
        x = call.x.detach()[place].to(dtype).requires_grad_()
        scores = call.topk_scores.detach()[place].to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        with torch.enable_grad():
            y = dense_moe(x, call.topk_idx[place], scores, experts_of(leaves, call.options))
            inputs = [x, scores, *leaves.values()]
            x_grad, scores_grad, *gradients = torch.autograd.grad(y, inputs, call.out_grad[place].to(dtype))
        return [y.detach(), x_grad, scores_grad], gradients

    of_tokens, gradients = in_pieces(slices_of(call.x.shape[0], at_a_time), call.experts, group, dtype, run)
    return [*of_tokens, *gradients.values()]


def in_pieces(
    pieces: Sequence[slice], weights: Mapping[str, Tensor], group: EPGroup, dtype: torch.dtype, run: RunPiece
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Collective: what ``run`` gives for all tokens, and the gradients of this rank's weights.

    weights: of this rank's experts, by name, and of the router, which all ranks have alike. run: given all of them in
    ``dtype`` and a piece, what is of its tokens, and the gradients of the weights. Gradients are summed in fp32 or
    wider over pieces and ranks, and rounded once where there are several.
    """
    leaves: dict[str, Tensor] = {}
    for name, weight in weights.items():
        whole = weight.detach() if name == ROUTER else gathered(weight, group)
        leaves[name] = whole.to(dtype).requires_grad_()
    sums: dict[str, Tensor] = {}
    kept: list[list[Tensor]] = []
    for place in pieces:
        of_tokens, gradients = run(leaves, place)
        kept.append(of_tokens)
        for name, gradient in zip(leaves, gradients, strict=True):
            add_to(sums, name, gradient)
    shares: dict[str, Tensor] = {}
    for name, weight in weights.items():
        total, held = over_ranks(sums[name], group), weight.shape[0]
        share = total if name == ROUTER else total[group.rank * held : (group.rank + 1) * held]
        shares[name] = share.to(dtype, copy=True)
    return [torch.cat(parts) for parts in zip(*kept, strict=True)], shares


def slices_of(count: int, at_a_time: int) -> list[slice]:
    """``count`` tokens, ``at_a_time`` of them; one piece of none where there are none.

    >>> slices_of(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    return [slice(first, first + at_a_time) for first in range(0, max(1, count), at_a_time)]


def add_to(sums: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    """Add a piece's gradient to its sum, in fp32 or wider."""
    if name in sums:
        sums[name] += gradient
    else:
        sums[name] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def experts_of(weights: Mapping[str, Tensor], options: LayerOptions) -> Experts:
    """Experts as the oracle wants them."""
    return Experts(
        w1=weights["w1"],
        w2=weights["w2"],
        b1=weights.get("b1"),
        b2=weights.get("b2"),
        activation=ACTIVATIONS[options.activation],
        layout=GATE_LAYOUTS[options.gate_layout],
    )


def gathered(share: Tensor, group: EPGroup) -> Tensor:
    """Collective: the experts of all ranks, (E, ...), from those of each."""
    if group.world_size == 1:
        return share.detach()
    shares = [torch.empty_like(share.detach()) for _ in range(group.world_size)]
    dist.all_gather(shares, share.detach().contiguous(), group=group.process_group)
    return torch.cat(shares)


def over_ranks(total: Tensor, group: EPGroup) -> Tensor:
    """Collective: the sum over ranks, in place."""
    if group.world_size > 1:
        dist.all_reduce(total, group=group.process_group)
    return total
