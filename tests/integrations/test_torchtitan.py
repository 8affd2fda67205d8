"""Routed experts of torchtitan under both overrides of ``sonic_ep.integrations.torchtitan``, on live ranks."""

import importlib
import json
import re
import shlex
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from near import assert_near
from on_ranks import on_ranks
from recipes import DOCS, Names, run_block
from titan import (
    DIM,
    DISPATCHER,
    EXPERTS,
    GPT_OSS,
    MODULE,
    REGION,
    SWIGLU,
    TOP_K,
    Routed,
    built,
    in_one_process,
    meshes,
    moe_config,
    needs_torchtitan,
    of_group,
    overridden,
    place,
    qwen3_gradients,
    truth,
)
from torch import Tensor

from sonic_ep.testing import Rank, assert_as_accurate, assert_bitwise

TORCHTITAN = DOCS / "torchtitan.md"
EVEN, UNEVEN, ONE_SIDED = (12, 12), (9, 15), (24, 0)


def with_options(override: str, **options: Any) -> str:
    """As a command line spells it."""
    return f"{override}={json.dumps(options)}" if options else override


def parallelized(config: Any, dims: Any, rank: Rank, dtype: torch.dtype) -> Any:
    """The routed experts of a ``MoE.Config`` with placements, spread over the ranks."""
    from torchtitan.distributed.utils import get_spmd_context

    experts = built(config.routed_experts, rank.device, dtype)
    with get_spmd_context(parallel_dims=dims)():
        experts.parallelize(dims)
    return experts


def found_on_ranks(rank: Rank, dims: Any, config: Any, routed: Routed) -> dict[str, Tensor]:
    from torchtitan.distributed.utils import get_spmd_context

    experts = parallelized(config, dims, rank, routed.dtype)
    with get_spmd_context(parallel_dims=dims)():
        return of_group(routed.run(experts, rank.rank))


def assert_all_accurate(got: dict[str, Tensor], config: Any, routed: Routed) -> None:
    """At most twice as far from the truth as torchtitan itself in one process."""
    exact, plain = truth(config, routed), in_one_process(config, routed)
    assert got.keys() == plain.keys()
    for name, value in got.items():
        flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (value, exact[name], plain[name])]
        assert_as_accurate(*flat, name=name)


def assert_all_near(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Experts compute alike, so only sums over K and D, in fp32, have another order."""
    for name, value in got.items():
        assert_near(value, expected[name], units=DIM if name == "scores" else TOP_K)


@needs_torchtitan
@on_ranks(2, pool="cpu_pool")
def test_routed_experts_over_the_reference(rank: Rank) -> None:
    dims, config = meshes(rank, ep=2), moe_config()
    place(config)
    for tokens, options in ((UNEVEN, {}), (ONE_SIDED, {"cpu_sync_on_runtime": False})):
        routed = Routed(tokens=tokens)
        expected = in_one_process(config, routed)
        # torchtitan's own all-to-all finds the same here.
        assert_all_near(found_on_ranks(rank, dims, config, routed), expected)
        dispatching = overridden(config, with_options(DISPATCHER, backend="reference", **options))
        assert_all_near(found_on_ranks(rank, dims, dispatching, routed), expected)
        fused = overridden(config, with_options(REGION, backend="reference", **options))
        for dtype in (torch.float32, torch.bfloat16):
            routed = Routed(tokens=tokens, dtype=dtype)
            assert_all_accurate(found_on_ranks(rank, dims, fused, routed), config, routed)
    # As checkpoints have them.
    states = [parallelized(each, dims, rank, torch.float32).state_dict() for each in (config, dispatching, fused)]
    assert len({tuple((name, t.shape, t.placements) for name, t in state.items()) for state in states}) == 1
    del states
    # A rank whose experts get no rows.
    routed = Routed(tokens=EVEN, chosen=EXPERTS // 2)
    assert_all_near(found_on_ranks(rank, dims, dispatching, routed), in_one_process(config, routed))
    exact = overridden(config, with_options(DISPATCHER, backend="reference"))
    assert_all_near(found_on_ranks(rank, dims, exact, routed), in_one_process(config, routed))
    assert_all_accurate(found_on_ranks(rank, dims, fused, routed), config, routed)


class ReadsEveryRow:
    """Adds one vector to all rows, also to those of no expert, so that its gradient sums them all."""

    def __init__(self, experts: Any) -> None:
        self.forward, self.bias = experts.forward, torch.zeros(DIM, requires_grad=True)

    def __call__(self, x_RD: Tensor, counts_e: Tensor) -> Tensor:
        return self.forward(x_RD, counts_e) + self.bias


@needs_torchtitan
@on_ranks(2, pool="cpu_pool")
def test_routed_experts_over_the_fast_backend(rank: Rank) -> None:
    """Without a host read rows past the valid ones are NaN, in forward and backward; experts see zeros."""
    dims, config = meshes(rank, ep=2), moe_config()
    place(config)
    routed = Routed(tokens=(5, 3))
    dispatching = overridden(config, with_options(DISPATCHER, backend="fast", cpu_sync_on_runtime=False))
    experts = parallelized(dispatching, dims, rank, routed.dtype)
    leaky = experts.inner_experts.forward = ReadsEveryRow(experts.inner_experts)
    found = of_group({**routed.run(experts, rank.rank), "bias": leaky.bias.grad[None]})
    # The next one has other options.
    bias, experts = found.pop("bias").sum(0), None
    assert_all_near(found, in_one_process(config, routed))
    assert_near(bias, (routed.grad * routed.scores.sum(-1, keepdim=True)).sum((0, 1)), units=sum(routed.tokens) * TOP_K)
    fused = overridden(config, with_options(REGION, backend="fast", dispatch="rank_dedup", combine="rank_dedup"))
    assert_all_accurate(found_on_ranks(rank, dims, fused, routed), config, routed)


@pytest.mark.thorough
@needs_torchtitan
@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.parametrize("spmd", ["partial_dtensor", "spmd_types"])
@pytest.mark.parametrize("names", [SWIGLU, GPT_OSS], ids=["swiglu", "gpt_oss"])
def test_every_backend_of_torchtitan_and_both_kinds_of_experts(
    rank: Rank, backend: str, spmd: str, names: tuple[str, ...]
) -> None:
    dims, config = meshes(rank, spmd, ep=2), moe_config(names)
    place(config)
    # Its experts of GPT-OSS return bf16, which its own dispatchers do not add to anything else.
    dtypes = (torch.bfloat16,) if names == GPT_OSS else (torch.float32, torch.bfloat16)
    for tokens in (UNEVEN, ONE_SIDED):
        for dtype in dtypes:
            routed = Routed(tokens=tokens, dtype=dtype)
            for override in (DISPATCHER, REGION):
                got = found_on_ranks(rank, dims, overridden(config, with_options(override, backend=backend)), routed)
                assert_all_accurate(got, config, routed)


@pytest.mark.thorough
@needs_torchtitan
@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [UNEVEN, ONE_SIDED])
def test_rows_of_each_expert_are_padded_for_quantized_products(
    rank: Rank, backend: str, exact: bool, tokens: tuple[int, ...]
) -> None:
    """Where the dispatcher that is replaced says so. No row moves to another expert, and none is lost."""
    dims, config = meshes(rank, ep=2), moe_config(pad_multiple=4)
    place(config)
    routed, seen = Routed(tokens=tokens, chosen=EXPERTS // 2 + 1), []
    options = {"backend": backend, "cpu_sync_on_runtime": exact}
    experts = parallelized(overridden(config, with_options(DISPATCHER, **options)), dims, rank, routed.dtype)
    forward = experts.inner_experts.forward

    def recorded(x_RD: Tensor, counts_e: Tensor) -> Tensor:
        seen.append((len(x_RD), counts_e))
        return forward(x_RD, counts_e)

    experts.inner_experts.forward = recorded
    assert_all_near(of_group(routed.run(experts, rank.rank)), in_one_process(config, routed))
    ((rows, counts_e),) = seen
    assert rows % 4 == 0
    assert all(count % 4 == 0 and count > 0 for count in counts_e.tolist())
    assert sum(counts_e) <= rows


# In units of bf16, in which experts compute: what reaches their last bits differs in its last bits of fp32, or by the
# roundings of both layers.
UNITS = {DISPATCHER: 1, REGION: 4}


@pytest.mark.thorough
@needs_torchtitan
@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("override", [DISPATCHER, REGION], ids=["dispatcher", "region"])
@pytest.mark.parametrize(("checkpointing", "tp"), [("none", 1), ("full", 1), ("selective", 1), ("none", 2)])
def test_a_model_of_torchtitan(rank: Rank, override: str, checkpointing: str, tp: int) -> None:
    """Qwen3 under FSDP2, activation checkpointing and sequence parallelism, like its standard dispatcher."""
    expected = qwen3_gradients(rank, tp=tp)
    got = qwen3_gradients(rank, with_options(override, backend="reference"), checkpointing=checkpointing, tp=tp)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert_near(value.bfloat16(), expected[name], units=UNITS[override])


@pytest.mark.thorough
@needs_torchtitan
@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize(
    "options", [{"cpu_sync_on_runtime": False}, {"cpu_sync_on_runtime": True}], ids=["room", "exact"]
)
@pytest.mark.parametrize("override", [DISPATCHER, REGION], ids=["dispatcher", "region"])
def test_a_model_that_torchtitan_compiles(rank: Rank, override: str, options: dict[str, Any]) -> None:
    """Each block without a graph break, with the bits of an eager run."""
    given = with_options(override, backend="reference", **options)
    expected = qwen3_gradients(rank, given)
    for name, value in qwen3_gradients(rank, given, compiled=True).items():
        assert_bitwise(value, expected[name], name)


@needs_torchtitan
@on_ranks(1, pool="cpu_pool")
def test_options_and_wrong_uses(rank: Rank) -> None:
    from torchtitan.models.common.moe import GroupedExperts

    from sonic_ep import EPConfig
    from sonic_ep.integrations import torchtitan as ours

    config = moe_config()
    options: dict[str, Any] = {"dispatch": "rank_dedup", "redispatch_x_in_backward": True}
    options |= {"max_tokens_per_rank": 24, "backend": "reference"}
    for override, exact in ((DISPATCHER, True), (REGION, False)):
        # Without expert parallelism, and never told of a mesh.
        experts = built(overridden(config, with_options(override, **options)).routed_experts, rank.device)
        routed = Routed(tokens=(24,))
        found, expected = routed.run(experts), in_one_process(config, routed)
        assert_all_near(found, expected) if exact else assert_all_accurate(found, config, routed)
        ep = experts.token_dispatcher.expert_parallel(routed.x)
        wanted = EPConfig(dispatch="rank_dedup", redispatch_x_in_backward=True, cpu_sync_on_runtime=exact)
        assert (ep.config, ep.backend, ep.world_size) == (wanted, "reference", 1)
        del experts, ep
        with pytest.raises(TypeError, match="got options chunks, expected some of backend, max_tokens_per_rank"):
            overridden(config, with_options(override, chunks=2))
        with pytest.raises(ValueError, match="dispatch: got 'push', expected one of"):
            overridden(config, with_options(override, dispatch="push"))

    class Quantized(GroupedExperts):
        Config = type("Config", (GroupedExperts.Config,), {"__slots__": ()})

    config.routed_experts.inner_experts = Quantized.Config(
        **{name: getattr(config.routed_experts.inner_experts, name) for name in ("dim", "hidden_dim", "num_experts")}
    )
    message = rf"inner_experts: got .*Quantized, expected .*GptOssGroupedExperts: override by {DISPATCHER}"
    with pytest.raises(TypeError, match=message):
        overridden(config, REGION)
    assert isinstance(overridden(config, DISPATCHER).routed_experts.token_dispatcher, ours.TokenDispatcherConfig)
    with pytest.raises(ValueError, match="claims 'routed_experts', an ancestor of"):
        overridden(moe_config(), DISPATCHER, REGION)


def test_without_torchtitan_the_error_names_the_extra() -> None:
    message = r"needs torchtitan 0\.3 .* pip install 'torchtitan>=0.3'"
    with patch.dict(sys.modules, {"torchtitan": None, "spmd_types": None}):
        sys.modules.pop(MODULE, None)
        with pytest.raises(ImportError, match=message):
            importlib.import_module(MODULE)


@needs_torchtitan
@on_ranks(1, pool="cpu_pool")
def test_the_commands_of_the_document(rank: Rank) -> None:
    from torchtitan.config.override import format_cli_imports

    text = TORCHTITAN.read_text()
    commands = re.findall(r"^--override\.imports (.*)$", text, re.MULTILINE)
    names: Names = {}
    run_block(names, "Override", TORCHTITAN)
    tokens = [token for command in commands for token in shlex.split(command)]
    tokens += format_cli_imports(names["override"].imports)
    assert len(tokens) == 4
    for token in tokens:
        replaced = overridden(moe_config(), token).routed_experts
        assert (type(replaced).__name__ == "FusedRoutedExpertsConfig") == ("routed_experts" in token)
        built_again = replaced.token_dispatcher.build()
        assert type(built_again).__name__ == "SonicEPTokenDispatcher"
