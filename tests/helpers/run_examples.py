"""Runs examples of property tests on live ranks, and reports what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from exact_inputs import exact_inputs
from limits import HANG_SECONDS
from random_cases import Example, Kind, example_of
from torch import Tensor

from sonic_ep import ExpertParallel
from sonic_ep.backend import Experts
from sonic_ep.plan import row_ceiling
from sonic_ep.testing import Inputs, Rank, RankPool, draw, verify_moe, verify_routed
from sonic_ep.testing.oracle import Outcome, moe_oracle, routed_oracle, run_moe, run_routed

# What a rank holds of each result: the tokens, unless it is named here.
OF_EXPERTS = ("dw1", "dw2", "db1", "db2")
OF_ALL = ("drouter_w", "tokens_per_expert")
AGAIN = "python tests/helpers/property_run.py --examples 1 --backend {} --seed {}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An example that is wrong. said: every error."""

    backend: str
    seed: int
    said: tuple[str, ...]

    @property
    def again(self) -> str:
        """The command that runs this example alone."""
        return AGAIN.format(self.backend, self.seed)

    def __str__(self) -> str:
        first = f"seed {self.seed} on {self.backend}: {self.again}"
        return "\n  ".join([first, str(example_of(self.seed)), *self.said])


def failures(pool: RankPool, backend: str, seeds: Iterable[int]) -> list[Failure]:
    """Runs the examples, one call for each number of ranks. Returns failures, the smallest example first."""
    by_ranks: dict[int, list[int]] = {}
    for seed in seeds:
        by_ranks.setdefault(example_of(seed).world_size, []).append(seed)
    found = []
    for world_size, group in sorted(by_ranks.items()):
        timeout = HANG_SECONDS + 10 * len(group)
        said_by_rank = pool.run(errors_of_seeds, backend, group, world_size=world_size, timeout=timeout)
        for place, seed in enumerate(group):
            said = tuple(f"rank {rank}: {line}" for rank, said in enumerate(said_by_rank) for line in said[place])
            if said:
                found.append(Failure(backend=backend, seed=seed, said=said))
    return sorted(found, key=lambda failure: example_of(failure.seed).size)


def errors_of_seeds(rank: Rank, backend: str, seeds: Sequence[int]) -> list[list[str]]:
    """The errors of each example on this rank."""
    found = []
    for seed in seeds:
        example = example_of(seed)
        try:
            found.append((_exact if example.kind.exact else _accurate)(rank, backend, example))
        except Exception as error:
            again = AGAIN.format(backend, seed)
            raise AssertionError(f"seed {seed} on {backend}, {again}: {example} raised {error!r}") from error
    return found


def _exact(rank: Rank, backend: str, example: Example) -> list[str]:
    inputs = exact_inputs(example)
    if example.kind.routed:
        oracle, run, counts = routed_oracle(inputs), run_routed, {}
    else:
        oracle, run = moe_oracle(inputs, inputs.topk_idx), run_moe
        counts = {"tokens_per_expert": torch.bincount(inputs.topk_idx.flatten(), minlength=inputs.case.num_experts)}
    said = differences(oracle.plain, oracle.truth, lambda name: slice(None), "plain PyTorch, so the input is wrong, ")
    with _parallel(backend, example, inputs) as ep:
        outcome = run(_moved(inputs, rank.device), ep)
        ep.check()
    return said + differences(outcome, {**oracle.truth, **counts}, partial(_share, inputs, rank.rank), "")


def _accurate(rank: Rank, backend: str, example: Example) -> list[str]:
    verify = verify_routed if example.kind.routed else verify_moe
    with _parallel(backend, example, draw(example.case, example.world_size)) as ep:
        findings = verify(example.case, ep, rank.device)
        ep.check()
    return [str(finding) for finding in findings if not finding.ok]


def _parallel(backend: str, example: Example, inputs: Inputs) -> ExpertParallel:
    config = replace(example.config, max_rows=_rows(inputs, example) if example.tight else None)
    return ExpertParallel(backend=backend, config=config, max_tokens_per_rank=example.max_tokens)


def _rows(inputs: Inputs, example: Example) -> int:
    """The most rows that a rank receives, or may receive where the tested router decides; at least 1."""
    case, held = inputs.case, inputs.case.num_experts // inputs.world_size
    if example.kind is Kind.ACCURATE_MOE:
        most = max(case.tokens)
        sizes = {"world_size": inputs.world_size, "max_tokens": most, "top_k": case.top_k, "experts_per_rank": held}
        return max(1, row_ceiling(**sizes, distinct=True))
    owner_S = inputs.topk_idx[inputs.topk_idx >= 0] // held
    return max(1, int(torch.bincount(owner_S.long(), minlength=1).max()))


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    def moved(of: Inputs | Experts) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in vars(of).items() if isinstance(value, Tensor)}

    return replace(inputs, **moved(inputs), experts=replace(inputs.experts, **moved(inputs.experts)))


def _share(inputs: Inputs, rank: int, name: str) -> slice:
    if name in OF_ALL:
        return slice(None)
    return inputs.experts_of(rank) if name in OF_EXPERTS else inputs.tokens_of(rank)


def differences(outcome: Outcome, truth: Outcome, share: Callable[[str], slice], who: str) -> list[str]:
    """Where ``outcome`` differs from the truth. +0 equals -0."""
    said = []
    for name, whole in truth.items():
        got = outcome[name].cpu()
        expected = whole[share(name)].to(got.dtype)
        wrong = got != expected if got.shape == expected.shape else None
        if wrong is None:
            said.append(f"{who}{name}: got shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
        elif wrong.any():
            first = tuple(wrong.nonzero()[0].tolist())
            values = f"got {got[first].item()!r}, expected {expected[first].item()!r}"
            said.append(f"{who}{name}: {int(wrong.sum())} of {wrong.numel()} differ, the first at {first}: {values}")
    return said
