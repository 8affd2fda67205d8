"""The blocks of code in docs/training.md and other pages, and the model and the names that they expect."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sonic_ep import ExpertParallel, MoE
from sonic_ep.testing import Rank

DOCS = Path(__file__).parents[2] / "docs"
TRAINING, CHECKPOINTS = DOCS / "training.md", DOCS / "checkpoints.md"
INFERENCE, TRANSFORMERS = DOCS / "inference.md", DOCS / "transformers.md"
GRAPHS, COMPILING = DOCS / "graphs.md", DOCS / "compile.md"
PROFILING, MODES = DOCS / "profiling.md", DOCS / "modes.md"

DDP, FSDP1 = "DistributedDataParallel", "FullyShardedDataParallel"
FSDP2, ZERO = "FSDP2", "ZeroRedundancyOptimizer"

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 8, 4, 2
SIZES = (HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)
LR = 0.25
# For each step, the tokens of each rank. Some ranks, and once an EP group, have none.
TOKENS = 24
SHARES = {2: [[9, 15], [24, 0], [12, 12]], 4: [[9, 0, 11, 4], [20, 4, 0, 0], [6, 6, 6, 6]]}
STEPS = len(SHARES[2])

Names = dict[str, Any]


class Momentum(torch.optim.SGD):
    """The optimizer of these tests: it has a state, and a factor of all gradients is no secret, as it is with Adam."""

    def __init__(self, params: Iterable[Any], lr: float = LR, *, foreach: bool | None = None) -> None:
        super().__init__(params, lr=lr, momentum=0.5, foreach=foreach)


class Block(nn.Module):
    """A layer with a norm and a residual."""

    def __init__(self, ep: ExpertParallel | None, **options: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.moe = MoE(*SIZES, ep, bias=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        x_of_layer = self.norm(x).to(self.moe.router.weight.dtype)
        return x + self.moe(x_of_layer).y.to(x.dtype)


class Model(nn.Module):
    """Two layers between dense ones: the same on every rank, and without ranks."""

    def __init__(self, ep: ExpertParallel | None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(HIDDEN, HIDDEN)
        self.layers = nn.ModuleList(Block(ep, **options) for _ in range(2))
        self.head = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def blocks(document: Path) -> dict[str, str]:
    """A document's code by what its comment begins with: ``# Name``, or ``# Name: why``."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL))
    parts = re.split(r"^(?=# )", code, flags=re.MULTILINE)[1:]
    return {re.split("[:\n]", part)[0].removeprefix("# "): part for part in parts}


def run_block(names: Names, name: str, document: Path = TRAINING) -> None:
    """Run the code with ``names``, and what it names added to them."""
    code = blocks(document)[name].replace("torch.optim.AdamW", Momentum.__name__)
    exec(compile(code, f"{document.name}: {name}", "exec"), names)


def given(rank: Rank, ep_size: int, replicas: int = 1, **options: Any) -> Names:
    """On a rank: the names that the recipes expect, with the model."""
    names: Names = {"device": rank.device, "ep_size": ep_size, "replicas": replicas, "rank": rank.rank}
    names |= {"lr": LR, "max_norm": torch.inf, "Momentum": Momentum}
    for block in ("Imports", "Meshes", "Replicas")[: 3 if replicas > 1 else 2]:
        run_block(names, block)
    names["group"] = names["mesh"]["ep"].get_group()
    names["model"] = Model(names["ep"], **{"reduce_router_grad": False, **options})
    names["layer"] = names["model"].layers[0].moe
    return names


def wrap(names: Names, wrapper: str) -> None:
    """All lines before the first step. ZeRO comes with DDP."""
    if wrapper == FSDP2:
        run_block(names, FSDP2)
        run_block(names, "Prefetch")
        names["optimizers"] = [names["optimizer"]]
        return
    run_block(names, "Split")
    run_block(names, DDP if wrapper == ZERO else wrapper)
    run_block(names, "Optimizers")
    if wrapper == ZERO:
        run_block(names, ZERO)


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor; another tensor as it is."""
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def tokens_of(step: int, shares: list[int], rank: int) -> tuple[Tensor, Tensor]:
    """X and target of the tokens of a rank."""
    x, target = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(step))
    return x.split(shares)[rank], target.split(shares)[rank]


def losses_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """One for each token."""
    return (model(x) - target).square().mean(dim=1)


def loss_on_ranks(names: Names, step: int) -> None:
    """The block's loss of this rank's tokens."""
    shares = SHARES[names["world"]][step]
    names["losses"] = losses_of(names["model"], *tokens_of(step, shares, names["rank"]))
    run_block(names, "Loss")


def run_step(names: Names) -> None:
    loss_on_ranks(names, 0)
    names["loss"].backward()
