"""The README's lines around ``MoE`` run, and train like one process that has all tokens."""

import re
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from near import assert_near
from on_ranks import on_ranks
from same import assert_same_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parametrize

from sonic_ep import ExpertParallel, MoE
from sonic_ep.testing import Rank, RankPool, assert_bitwise

README = Path(__file__).parents[2] / "README.md"
HEADING = "## Inside a training stack\n"

NONE = "no wrapper"
DDP, FSDP1 = "DistributedDataParallel", "FullyShardedDataParallel"
FSDP2, ZERO = "fully_shard", "ZeroRedundancyOptimizer"
WRAPPERS = [DDP, FSDP1, FSDP2, ZERO]
BLOCKS = {"Imports", "Experts", *WRAPPERS, "Optimizers", "GradScaler", "Means", "clip_grad_norm_", "Checkpoint"}
PLAIN, CLIPPED, SCALED, ADAPTED = "plain", "clipped", "scaled", "adapted"

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 8, 4, 2
SIZES = (HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)
NARROW = 2
TOKENS = 24
# Of each step, where rank 1 begins; once it has no token.
CUTS = [9, TOKENS, 12]
LR = 0.5
# Less than any norm here.
MAX_NORM = 0.1

Names = dict[str, Any]


def blocks() -> dict[str, str]:
    """The section's code by the first word of its comment: ``# Name``, ``# Name, and more`` or ``# Name: why``."""
    section = README.read_text().split(HEADING)[1].split("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    parts = re.split(r"^(?=# )", code, flags=re.MULTILINE)[1:]
    return {re.split("[,:\n]", part)[0].removeprefix("# "): part for part in parts}


def run_block(names: Names, name: str) -> None:
    exec(compile(blocks()[name], f"README.md: {name}", "exec"), names)


def test_every_block_is_run_here() -> None:
    assert set(blocks()) == BLOCKS


class Model(nn.Module):
    """A layer between dense ones."""

    def __init__(self, ep: ExpertParallel, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(HIDDEN, HIDDEN)
        self.layer = MoE(*SIZES, ep, bias=True, **options)
        self.head = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).to(self.layer.w1.dtype)
        return self.head((x + self.layer(x).y).to(self.head.bias.dtype))


class Adapter(nn.Module):
    """LoRA of a frozen ``layer.w1``: two narrow weights of each expert."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        held, width, hidden = layer.w1.shape
        narrow = torch.randn(EXPERTS, NARROW, hidden, generator=torch.Generator().manual_seed(1))
        self.down = nn.Parameter(narrow.split(held)[layer.ep.rank].clone())
        self.up = nn.Parameter(torch.zeros(held, width, NARROW))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def given(rank: Rank, **options: Any) -> Names:
    """The names that the README's lines expect."""
    torch.manual_seed(0)
    mesh = init_device_mesh(rank.device.type, (rank.world_size,)) if rank.world_size > 1 else None
    ep = ExpertParallel(mesh, backend="reference", max_tokens_per_rank=TOKENS)
    model = Model(ep, **{"reduce_router_grad": False, **options})
    names = {"group": mesh and mesh.get_group(), "W": ep.world_size, "device": rank.device, "lr": LR}
    names |= {"mesh": mesh, "ep": ep, "model": model, "layer": model.layer, "max_norm": MAX_NORM}
    run_block(names, "Imports")
    return names


def wrap(names: Names, wrapper: str, parts: Iterable[str] = ()) -> None:
    """The lines of one wrapper, for some parts of the model first and then for the rest of it."""
    root = names["model"]
    for part in parts:
        names["model"] = root.get_submodule(part)
        run_block(names, wrapper)
        root.set_submodule(part, names["model"])
    names["model"] = root
    run_block(names, wrapper)


def prepare(names: Names, wrapper: str) -> None:
    """All lines before the first step. ``fully_shard`` goes over the parts, and ZeRO comes with DDP."""
    run_block(names, "Experts")
    if wrapper != NONE:
        wrap(names, DDP if wrapper == ZERO else wrapper, ["embed", "layer", "head"] if wrapper == FSDP2 else [])
    run_block(names, "Optimizers")
    if wrapper == ZERO:
        run_block(names, ZERO)


def loss_of(names: Names, step: int) -> Tensor:
    """The mean over this rank's tokens, as the README has it for unequal numbers of tokens."""
    generator = torch.Generator().manual_seed(step)
    x, target = torch.randn(2, TOKENS, HIDDEN, generator=generator)
    if names["W"] > 1:
        sizes = [CUTS[step], TOKENS - CUTS[step]]
        x, target = (whole.split(sizes)[names["ep"].rank] for whole in (x, target))
    losses = (names["model"](x) - target).square().mean(dim=1)
    return losses.sum() * names["W"] / TOKENS


def train_step(names: Names, step: int, scaler: torch.amp.GradScaler, clips: bool, overflows: bool) -> None:
    """Forward, backward and the optimizers' step. overflows: one gradient of the third expert becomes infinite."""
    for optimizer in names["optimizers"]:
        optimizer.zero_grad()
    scaler.scale(loss_of(names, step)).backward()
    owner, place = divmod(2, EXPERTS // names["W"])
    if overflows and names["ep"].rank == owner:
        names["layer"].w1.grad[place, 0, 0] = torch.inf
    run_block(names, "Means")
    for optimizer in names["optimizers"]:
        scaler.unscale_(optimizer)
    if clips and names["W"] > 1:
        run_block(names, "clip_grad_norm_")
    elif clips:
        torch.nn.utils.clip_grad_norm_(names["model"].parameters(), MAX_NORM)
    for optimizer in names["optimizers"]:
        scaler.step(optimizer)
    scaler.update()


def parameters(names: Names) -> dict[str, Tensor]:
    """All of the model, unsharded, by the names without wrappers."""
    root = names["model"]
    fsdp1 = names[FSDP1]
    inside = root.module if isinstance(root, fsdp1 | names[DDP]) else root
    with fsdp1.summon_full_params(root):
        found = {name: parameter.detach() for name, parameter in inside.named_parameters()}
        sharded = names["DTensor"]
        return {name: (p.full_tensor() if isinstance(p, sharded) else p).clone() for name, p in found.items()}


def trained(rank: Rank, wrapper: str, way: str) -> tuple[dict[str, Tensor], float]:
    """Parameters after three steps, and the scale of the loss."""
    names = given(rank)
    if way == ADAPTED:
        names["layer"].w1.requires_grad_(False)
        parametrize.register_parametrization(names["layer"], "w1", Adapter(names["layer"]))
    prepare(names, wrapper)
    scaler = torch.amp.GradScaler(rank.device.type, enabled=way == SCALED)
    if way == SCALED and rank.world_size > 1:
        run_block(names, "GradScaler")
        scaler = names["scaler"]
    for step in range(len(CUTS)):
        train_step(names, step, scaler, clips=way == CLIPPED, overflows=way == SCALED and step == 0)
    return parameters(names), scaler.get_scale()


@pytest.mark.parametrize("way", [PLAIN, CLIPPED, SCALED, ADAPTED])
def test_a_wrapped_model_trains_like_one_process_with_all_tokens(cpu_pool: RankPool, way: str) -> None:
    ((alone, scale),) = cpu_pool.run(trained, NONE, way, world_size=1)
    for wrapper in WRAPPERS:
        shares = cpu_pool.run(trained, wrapper, way, world_size=2)
        assert [scale_there for _, scale_there in shares] == [scale, scale], wrapper
        for name, expected in alone.items():
            here, there = (share[name] for share, _ in shares)
            of_experts = name.startswith("layer.") and name != "layer.router_w"
            # Gradients are sums over all tokens, in another order.
            assert_near(torch.cat([here, there]) if of_experts else here, expected, units=len(CUTS) * TOKENS)
            if not of_experts:
                assert_bitwise(there, here, f"{name} in {wrapper}")


def in_ddp(rank: Rank, **options: Any) -> Names:
    names = given(rank, **options)
    prepare(names, DDP)
    return names


@on_ranks(2, pool="cpu_pool")
def test_reduced_router_gradients_are_w_times_the_mean(rank: Rank) -> None:
    grads = []
    for reduced in (True, False):
        names = in_ddp(rank, reduce_router_grad=reduced)
        loss_of(names, 0).backward()
        grads.append(names["layer"].router_w.grad.clone())
    assert_bitwise(grads[0], 2 * grads[1])


@on_ranks(2, pool="cpu_pool")
def test_experts_in_fp16_need_the_line(rank: Rank) -> None:
    names = in_ddp(rank, dtype=torch.float16)
    run_block(names, "GradScaler")
    by_itself, of_experts = torch.amp.GradScaler(rank.device.type), names["optimizers"][1]
    by_itself.scale(loss_of(names, 0)).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        by_itself.step(of_experts)
    names["scaler"].scale(loss_of(names, 0)).backward()
    names["scaler"].step(of_experts)


@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("wrapper", [FSDP1, FSDP2])
def test_a_layer_of_another_dtype_is_wrapped_by_itself_first(rank: Rank, wrapper: str) -> None:
    refused = pytest.raises((ValueError, AssertionError), match="uniform")
    for parts, expectation in (([], refused), (["layer"], nullcontext())):
        names = given(rank, dtype=torch.bfloat16)
        run_block(names, "Experts")
        with expectation:
            wrap(names, wrapper, parts)
            loss_of(names, 0).backward()


@on_ranks(2, pool="cpu_pool")
def test_every_rank_saves_its_experts(rank: Rank, tmp_path: Path) -> None:
    names = {**given(rank), "folder": str(tmp_path)}
    prepare(names, NONE)
    run_block(names, "Checkpoint")
    again, layer = MoE(*SIZES, names["ep"], bias=True), names["layer"]
    state = torch.load(tmp_path / f"experts_{rank.rank}.pt")
    for own, saved in zip(again.expert_parameters(), state["experts"], strict=True):
        own.data.copy_(saved)
    assert_same_bits(again.expert_parameters(), layer.expert_parameters())
    assert state["optimizer"]["param_groups"][0]["lr"] == LR
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == 2
