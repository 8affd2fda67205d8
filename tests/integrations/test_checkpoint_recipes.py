"""The recipes of docs/checkpoints.md run: a run goes on elsewhere as if it had never stopped."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from near import assert_near
from on_ranks import on_ranks
from recipes import (
    CHECKPOINTS,
    DDP,
    FSDP2,
    HIDDEN,
    SIZES,
    Model,
    Momentum,
    Names,
    blocks,
    given,
    run_block,
    whole,
    wrap,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from sonic_ep import MoE
from sonic_ep.testing import Rank, RankPool, assert_bitwise

TOKENS = 24
WEIGHTS = ("w1", "w2", "b1", "b2")


def test_every_block_is_run_here() -> None:
    of_0_1 = {"Version 0.1", "Version 0.1's README"}
    assert set(blocks(CHECKPOINTS)) == {"State", "Save", "Load", "Full", "One process", "Layouts", *of_0_1}


def run(names: Names, *parts: str) -> None:
    for part in parts:
        run_block(names, part, CHECKPOINTS)


def prepared(rank: Rank, ep_size: int, wrapper: str, folder: Path, **options: object) -> Names:
    """On a rank: a model and its optimizer before the first step."""
    names = given(rank, ep_size, **options) | {"folder": str(folder)}
    if wrapper:
        wrap(names, wrapper)
    names["optimizer"] = names.get("optimizers", []) or Momentum(names["model"].parameters())
    return names


def step(names: Names, number: int) -> None:
    """One step with the mean over all tokens, in equal shares."""
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(number))
    own = x.chunk(names["world"])[dist.get_rank()]
    names["losses"] = names["model"](own).square().mean(dim=1)
    run_block(names, "Loss")
    for optimizer in names["optimizers"]:
        optimizer.zero_grad()
    names["loss"].backward()
    if "of_experts" in names:
        run_block(names, "Means")
    for optimizer in names["optimizers"]:
        optimizer.step()


def parameters(names: Names) -> dict[str, Tensor]:
    root = names["model"]
    return {name: whole(parameter) for name, parameter in getattr(root, "module", root).named_parameters()}


def begun(rank: Rank, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters when they are saved, and one step later."""
    names = prepared(rank, 2, FSDP2, folder)
    step(names, 0)
    run(names, "State", "Save", "Full")
    saved = parameters(names)
    step(names, 1)
    return saved, parameters(names)


def resumed(rank: Rank, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same, from the checkpoint: on other ranks, in another wrapper, with two optimizers."""
    names = prepared(rank, 2, DDP, folder)
    for parameter in names["model"].parameters():
        parameter.detach().zero_()
    run(names, "State", "Load")
    loaded = parameters(names)
    step(names, 1)
    return loaded, parameters(names)


def refused(rank: Rank, folder: Path) -> None:
    """Another layout of gate and up."""
    names = prepared(rank, 2, FSDP2, folder, gate_layout="concat")
    run(names, "State")
    with pytest.raises(CheckpointException, match=re.escape(messages()["DCP"])):
        run(names, "Load")


def messages() -> dict[str, str]:
    """By who raises it, the message for the other layout."""
    return dict(re.findall(r"^\| (.*?) \| `(\w[^`]*)`", CHECKPOINTS.read_text(), re.MULTILINE))


def test_a_run_goes_on_with_other_ranks_and_another_wrapper(cpu_pool: RankPool, tmp_path: Path) -> None:
    ((saved, later), *_) = cpu_pool.run(begun, tmp_path, world_size=4)
    for loaded, found in cpu_pool.run(resumed, tmp_path, world_size=2):
        for name, expected in saved.items():
            assert_bitwise(loaded[name], expected, name)
            # Gradients are sums over all tokens, in another order.
            assert_near(found[name], later[name], units=TOKENS)
    cpu_pool.run(refused, tmp_path, world_size=2)
    for way in (["One process"], ["State", "Load"]):
        model = Model(None)
        names = {"model": model, "optimizer": Momentum(model.parameters()), "folder": str(tmp_path), "torch": torch}
        for parameter in model.parameters():
            parameter.detach().zero_()
        run(names, *way)
        for name, parameter in model.named_parameters():
            assert_bitwise(parameter.detach(), saved[name], name)


def test_the_other_layout_is_refused_and_can_be_converted() -> None:
    interleaved, concat = (MoE(*SIZES, bias=True, gate_layout=layout) for layout in ("interleaved", "concat"))
    with pytest.raises(ValueError, match=re.escape(messages()["`load_state_dict`"])):
        concat.load_state_dict(interleaved.state_dict())
    state = interleaved.state_dict() | {"experts._extra_state": concat.state_dict()["experts._extra_state"]}
    for name in ("experts.w1", "experts.b1"):
        names: Names = {"interleaved": torch.randn_like(state[name])}
        interleaved.get_parameter(name).data.copy_(names["interleaved"])
        run(names, "Layouts")
        assert_bitwise(names["again"], names["interleaved"])
        state[name] = names["concat"]
    concat.load_state_dict(state)
    x = torch.randn(5, HIDDEN)
    assert_bitwise(concat(x).y, interleaved(x).y)


@on_ranks(2, pool="cpu_pool")
def test_plain_experts_of_every_rank_are_saved(rank: Rank, tmp_path: Path) -> None:
    names = prepared(rank, 2, "", tmp_path, distribute=False)
    run(names, "State", "Save")
    saved = {name: weight.clone() for name, weight in names["model"].state_dict().items()}
    assert {f"layers.0.moe.experts.{name}@{rank.rank}/2" for name in WEIGHTS} <= saved.keys()
    for parameter in names["model"].parameters():
        parameter.detach().zero_()
    run(names, "State", "Load")
    for name, weight in names["model"].state_dict().items():
        assert_bitwise(weight, saved[name], name)


def as_in_0_1(names: Names) -> dict[str, Tensor]:
    """This rank's ``state_dict`` of a model of version 0.1: plain tensors, all of them the layer's own."""
    state = {}
    for name, weight in names["model"].state_dict().items():
        if not name.endswith("_extra_state"):
            old = name.replace("router.weight", "router_w").replace("experts.", "")
            state[old] = getattr(weight, "to_local", lambda weight=weight: weight)().clone()
    return state


@on_ranks(2, pool="cpu_pool")
def test_what_version_0_1_saved(rank: Rank, tmp_path: Path) -> None:
    names = prepared(rank, 2, "", tmp_path)
    saved, state = parameters(names), as_in_0_1(names)
    of_experts = [state.pop(name) for name in list(state) if name.split(".")[-1] in WEIGHTS and ".moe." in name]
    torch.save({"experts": of_experts}, tmp_path / f"experts_{rank.rank}.pt")
    names |= {"saved": as_in_0_1(names), "rest": state}
    for block in ("Version 0.1", "Version 0.1's README"):
        for parameter in names["model"].parameters():
            parameter.detach().zero_()
        run(names, block)
        for name, found in parameters(names).items():
            assert_bitwise(found, saved[name], f"{block}: {name}")
