"""The recipes of docs/inference.md run, and give what the layer gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import both_backends
from on_ranks import on_ranks
from promises import promise
from recipes import EXPERTS, HIDDEN, INFERENCE, SIZES, TOP_K, Model, Names, blocks, run_block
from torch import Tensor

from sonic_ep import EPConfig, ExpertParallel, MoE
from sonic_ep.plan import RoutingPlan
from sonic_ep.testing import CASES, Rank, assert_bitwise
from sonic_ep.testing.oracle import verify_routed

ALONE, CUT = "Dispatch only", "Valid rows only"
TOKENS = 12


def test_every_block_is_run_here() -> None:
    on_ranks = {"Evaluate", "Until all are done", "Bound", "Graph", "Replay", "Export", "Load"}
    assert set(blocks(INFERENCE)) == {"Imports", *on_ranks, ALONE, CUT}


def run(names: Names, *parts: str) -> Names:
    for part in ("Imports", *parts):
        run_block(names, part, INFERENCE)
    return names


class ByRecipe:
    """An ``ExpertParallel`` whose ``moe_routed`` is a recipe; what dispatch leaves unspecified is NaN."""

    def __init__(self, ep: ExpertParallel, recipe: str) -> None:
        self.rank, self.world_size, self.group = ep.rank, ep.world_size, ep.group
        self.plan, self.combine = ep.plan, ep.combine
        self._ep, self._recipe = ep, recipe

    def dispatch(self, x: Tensor, plan: RoutingPlan) -> Tensor:
        rows = self._ep.dispatch(x, plan)
        past = torch.arange(len(rows), device=rows.device) >= plan.rows()
        return rows.masked_fill(past[:, None], float("nan"))

    def moe_routed(self, w1: Tensor, b1: Tensor | None, activation: Any, gate_layout: str, **given: Any) -> Tensor:
        assert (activation.name, gate_layout) == ("swiglu", "concat")
        names = {**given, "w1": w1, "b1": b1, "ep": self, "num_experts": len(w1) * self.world_size}
        return run(names, self._recipe)["y"]


# Not fp32: PyTorch has grouped products of bf16 on GPUs.
OF_RECIPES = {"gate_layout": "concat", "dtype": torch.bfloat16, "hidden": 64, "intermediate": 32}


@promise("rows")
@pytest.mark.parametrize("recipe", [ALONE, CUT])
@pytest.mark.parametrize("name", ["uneven_tokens", pytest.param("one_rank", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.thorough)])
@both_backends
@on_ranks(2)
def test_experts_of_a_user_between_dispatch_and_combine(
    rank: Rank, backend: str, exact: bool, name: str, recipe: str
) -> None:
    """Output and every gradient, whatever is in the rows past the valid ones."""
    case = replace(CASES[name], bias=recipe == CUT, **OF_RECIPES)
    with ExpertParallel(backend=backend, config=EPConfig(cpu_sync_on_runtime=exact)) as ep:
        findings = verify_routed(case, ByRecipe(ep, recipe), rank.device)
    assert not (wrong := [str(finding) for finding in findings if not finding.ok]), "\n".join(wrong)


@on_ranks(2, pool="cpu_pool")
def test_evaluation_of_ranks_with_other_numbers_of_batches(rank: Rank) -> None:
    """One has none. Results are those of training mode, bit for bit, and a batch past the bound is refused."""
    names: Names = {"device": rank.device, "group": None}
    run(names, "Bound")
    assert names["ep"].config == EPConfig()
    model = Model(names["ep"])
    x = torch.randn(3, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)) if rank.rank else torch.empty(0)
    expected = []
    for number in range(3):
        tokens = x[number] if rank.rank else torch.empty(0, HIDDEN)
        expected.append(model(tokens).detach())
    run(names | {"model": model, "x": x[0] if rank.rank else torch.empty(0, HIDDEN)}, "Evaluate")
    names |= {"model": model, "batches": iter(x), "empty": torch.empty(0, HIDDEN)}
    results = run(names, "Until all are done")["results"]
    assert len(results) == 3
    for result, trained in zip(results, expected, strict=True):
        assert not result.requires_grad
        assert_bitwise(result, trained)
    with pytest.raises(ValueError, match="tokens T: got 4097, expected at most C=4096"):
        model(torch.zeros(4097, HIDDEN))


@on_ranks(2, pool="cpu_pool")
def test_the_load_of_experts_and_of_ranks(rank: Rank) -> None:
    with ExpertParallel(backend="reference") as ep:
        layer = MoE(*SIZES, ep)
        names = run({"ep": ep, "layer": layer, "x": torch.randn(TOKENS, HIDDEN)}, "Load")
        plan = ep.plan(names["out"].topk_idx, EXPERTS)
    rows = names["rows_of_rank"]
    assert rows.sum() == rank.world_size * TOKENS * TOP_K
    assert rows[rank.rank] == plan.rows() == plan.tokens_per_expert.sum()
    assert names["of_ranks"] == rows.max() / rows.mean()
    assert names["of_experts"] >= names["of_ranks"] >= 1


@pytest.mark.fast
@on_ranks(1, 2, pool="cuda_pool")
def test_a_graph_is_replayed_with_other_tokens(rank: Rank) -> None:
    with ExpertParallel(backend="fast") as ep, torch.device(rank.device):
        layer = MoE(64, 32, 8, 2, ep, dtype=torch.bfloat16, device=rank.device)
        x, other = torch.randn(2, TOKENS, 64, dtype=torch.bfloat16)
        names = run({"layer": layer, "x": x}, "Graph")
        for tokens in (other, x):
            y = run(names | {"x": tokens}, "Replay")["y"]
            with torch.inference_mode():
                assert_bitwise(y, layer(tokens).y)
