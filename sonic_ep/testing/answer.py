"""The outputs and gradients of a layer against the oracle: errors over all ranks, and their bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sonic_ep.distributed.group import EPGroup
from sonic_ep.reference.router import choose_experts
from sonic_ep.testing.checks import Accuracy, Yardstick
from sonic_ep.testing.oracle import ALONE, LOGITS, LayerCall, Oracle, Outcome, judge_parts

# Slots that the oracle takes at a time in the wider dtype.
MOST_SLOTS = 2**16


def oracle_of(call: LayerCall, group: EPGroup) -> Oracle:
    """The oracle of a call whose truth is in fp32, or in fp64 for fp32."""
    wide = torch.float64 if call.x.dtype is torch.float32 else torch.float32
    return Oracle(call=call, group=group, wide=wide, at_a_time=max(1, MOST_SLOTS // call.top_k))


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """The outcome of one forward and backward, and how accurate it is.

    plain: the outcome that bounds its errors. accuracies: of all ranks together, the same on each.
    same_choices: whether this rank's router has chosen the oracle's experts.
    """

    outcome: Outcome
    plain: Outcome
    truth: Outcome
    accuracies: tuple[Accuracy, ...]
    same_choices: bool = True

    @property
    def faults(self) -> list[str]:
        """What is wrong with the answer."""
        choices = [] if self.same_choices else ["other experts are chosen"]
        return [*choices, *(str(accuracy) for accuracy in self.accuracies if not accuracy.ok)]


def judge(oracle: Oracle, outcome: Outcome, reference: Outcome | None = None) -> Answer:
    """Collective: hold the outcome of a forward and backward against the oracle.

    reference: the outcome of the reference, which is compared with the oracle itself before it may say how accurate
    others have to be; None: plain PyTorch says so. The output is named o, as in reports.
    """
    truth, plain = oracle.truth, reference or oracle.plain
    accuracies = [] if reference is None else _accuracies(reference, truth, oracle.plain, oracle.group, "reference's ")
    accuracies += _accuracies(outcome, truth, plain, oracle.group)
    same = LOGITS not in truth or torch.equal(*(_chosen(each, oracle.call.top_k) for each in (outcome, truth)))
    return Answer(outcome=outcome, plain=plain, truth=truth, accuracies=tuple(accuracies), same_choices=same)


def faults_of(got: Outcome, truth: Outcome, plain: Outcome) -> list[str]:
    """Which of y and the gradients of this rank are less accurate than twice the error of plain PyTorch."""
    return [str(accuracy) for accuracy in _accuracies(got, truth, plain, ALONE) if not accuracy.ok]


def _chosen(outcome: Outcome, top_k: int) -> Tensor:
    return choose_experts(outcome[LOGITS], top_k).sort(dim=1).values


def _accuracies(got: Outcome, truth: Outcome, plain: Outcome, group: EPGroup, prefix: str = "") -> list[Accuracy]:
    """Collective: of the output and every gradient, on all ranks together, each with its own truth."""
    parts = {name: Yardstick(truth[name], plain[name]).parts(got[name]) for name in truth if name != LOGITS}
    found = judge_parts(parts, got, group)
    return [replace(each, name=prefix + ("o" if each.name == "y" else each.name)) for each in found]
