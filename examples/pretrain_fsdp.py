"""Pretrain a small Mixture-of-Experts model with FSDP2 and expert parallelism, and go on with fewer ranks.

    python examples/pretrain_fsdp.py

Four ranks, efsdp=2 times ep=2, train half of the steps and save a checkpoint. Two ranks, efsdp=1 times ep=2, load it
and train the other half on the same global batches. One process trains all steps without a restart. The picture shows
the three curves, and how far apart they are. The exit code is 1 if a loss or a gradient norm is further apart than
rounding in fp32 explains, else 0. Everything is on GPUs where there are four of them, with NCCL, else on the CPU.

A part alone, on ranks of your own:

    torchrun --nproc-per-node=4 examples/pretrain_fsdp.py --part=train
    torchrun --nproc-per-node=2 examples/pretrain_fsdp.py --part=resume
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from lm_batches import BATCH, batches, even_layouts, standard_library_text
from pretrain_model import HIDDEN, Block, LanguageModel
from pretrain_report import Curve, report
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from sonic_ep import MoE
from sonic_ep.cli.launch import joined_group, launch, launched_by_torchrun
from sonic_ep.distributed.group import device_of_rank
from sonic_ep.parallel import ExpertParallelStyle, clip_grad_norm_

RANKS = {"train": 4, "resume": 2}
EP = 2
LEARNING_RATE, MAX_NORM = 1e-3, 1.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """steps: in all; the first half of them are before the restart. context: S, the bytes of a sequence."""

    folder: Path
    steps: int = 40
    context: int = 16
    seed: int = 0

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint between both parts."""
        return self.folder / "checkpoint"

    @property
    def tokens(self) -> int:
        """N, of a batch: of all ranks."""
        return BATCH * self.context


def build(settings: Settings, device: torch.device) -> LanguageModel:
    """Collective. The model, spread over all ranks if there is a process group, with weights that W does not change."""
    with torch.device("meta"):
        model = LanguageModel(settings.context)
    if dist.is_initialized():
        spread(model, device)
    model.to_empty(device=device)
    fill(model, settings.seed)
    return model


def spread(model: LanguageModel, device: torch.device) -> None:
    """Collective. Experts over ep, then over efsdp; everything else over all ranks."""
    world_size = dist.get_world_size()
    ep = min(EP, world_size)
    mesh = init_device_mesh(device.type, (world_size // ep, ep), mesh_dim_names=("efsdp", "ep"))
    # All ranks in one dimension. PyTorch has no public name for it yet.
    dense = mesh._flatten("fsdp")
    style = ExpertParallelStyle(backend="auto" if device.type == "cuda" else "reference")
    parallelize_module(model, mesh["ep"], {"blocks.*.moe": style})
    for block in model.blocks:
        assert isinstance(block, Block)
        fully_shard(block.moe.experts, mesh=mesh["efsdp"])
        fully_shard(block, mesh=dense)
    fully_shard(model, mesh=dense)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums, since the loss is divided by the tokens of all ranks. Gloo knows no other reduction.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def fill(model: LanguageModel, seed: int) -> None:
    """Collective. Weights from ``seed``, the same for any W: a DTensor itself draws other numbers on each mesh."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, MoE | nn.RMSNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            weight, std = module.weight, HIDDEN**-0.5 if isinstance(module, nn.Linear) else 1.0
            whole = (torch.randn(weight.shape) * std).to(weight.device)
            if isinstance(weight, DTensor):
                whole = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
            weight.copy_(whole)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """Collective. What a checkpoint holds: mostly DTensors, which DCP loads on any mesh."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "step": torch.tensor(step)}


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Collective. Write a checkpoint of model and optimizer after ``step`` steps."""
    dcp.save(state_of(model, optimizer, step), checkpoint_id=folder)  # type: ignore[attr-defined]


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Collective. Fill model and optimizer from a checkpoint; the number of steps that it had done."""
    state = state_of(model, optimizer, 0)
    dcp.load(state, checkpoint_id=folder)  # type: ignore[attr-defined]
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, windows: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """Collective. One step on this rank's windows (b, S + 1); the loss of all ranks' tokens, and the gradient norm."""
    logits_bSV = model(windows[:, :-1])
    loss = F.cross_entropy(logits_bSV.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum") / tokens
    loss.backward()
    norm = clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total, norm


def pretrain(part: str, settings: Settings, device: torch.device) -> Curve:
    """Collective. "train": the first half of the steps, and a checkpoint; "resume": the others, from it; else all."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = build(settings, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    first = load(settings.checkpoint, model, optimizer) if part == "resume" else 0
    until = settings.steps // 2 if part == "train" else settings.steps
    layouts = even_layouts(settings.steps, settings.context, world_size)
    todo = islice(batches(standard_library_text(), layouts, settings.seed), first, until)
    done = [train_step(model, optimizer, batch.of_rank(rank).to(device), settings.tokens) for batch in todo]
    if part == "train":
        save(settings.checkpoint, model, optimizer, until)
    return Curve(first=first, losses=[loss.item() for loss, _ in done], norms=[norm.item() for _, norm in done])


def run_rank(part: str, settings: Settings) -> int:
    """One rank's share of a part; rank 0 writes the curve."""
    with joined_group() as place:
        place.say(f"{part}: {place.world_size} ranks on {place.device.type}")
        curve = pretrain(part, settings, place.device)
        if place.rank == 0:
            curve.write(settings.folder / f"{part}.json")
    return 0


def run_all(settings: Settings) -> int:
    """Start the ranks of both parts, train in this process, and compare; the exit code."""
    device = device_of_rank(0) if torch.cuda.device_count() >= max(RANKS.values()) else torch.device("cpu")
    if device.type == "cpu":
        # FSDP's collectives need NCCL for tensors on GPUs, and NCCL a GPU for each rank.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for part, ranks in RANKS.items():
        failed = launch(ranks, ["--", __file__, *sys.argv[1:], f"--part={part}"])
        if failed:
            return failed
    parts = {f"W={ranks}": Curve.read(settings.folder / f"{part}.json") for part, ranks in RANKS.items()}
    alone = pretrain("alone", settings, device)
    return 0 if report(parts, alone, settings.tokens, settings.folder) else 1


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(RANKS), help="this part alone; torchrun starts its ranks")
    parser.add_argument("--folder", type=Path, default=Path("pretrain_fsdp"), help="of checkpoint, curves and picture")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="in all (default %(default)s)")
    asked = parser.parse_args()
    if launched_by_torchrun() != (asked.part is not None) or asked.steps < 2:
        parser.error("expected --part under torchrun and nowhere else, and --steps of 2 or more")
    asked.folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(folder=asked.folder, steps=asked.steps)
    return run_all(settings) if asked.part is None else run_rank(asked.part, settings)


if __name__ == "__main__":
    sys.exit(main())
