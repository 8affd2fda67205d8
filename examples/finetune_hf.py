"""Fine-tune a Qwen3-MoE of transformers with its experts over ranks by sonic_ep, and go on with other ranks.

    python examples/finetune_hf.py

A model of some five million parameters, made here from random weights, learns the bytes of Python's standard library.
Two ranks train half of the steps (FSDP2, ep=2) and save a checkpoint. Four ranks, efsdp=2 times ep=2, load it and train
the other half on the same global batches, and so does one process without expert parallelism. Another process of that
kind trains all steps without a restart. The picture shows the curves, and how far apart they are. The exit code is 1 if
a loss or a gradient norm is further apart than a near tie in a router explains, else 0. On GPUs where there are two
(four ranks only where there are four), else on the CPU; ``--size=seconds`` is a small model and a few steps.

A part alone, on ranks of your own:

    torchrun --nproc-per-node=2 examples/finetune_hf.py --part=train
    torchrun --nproc-per-node=4 examples/finetune_hf.py --part=resume
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
from lm_batches import BATCH, batches, even_layouts, standard_library_text
from pretrain_fsdp import LEARNING_RATE, MAX_NORM, load, save
from pretrain_report import Curve, compare, report
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from sonic_ep.cli.launch import joined_group, launch, launched_by_torchrun
from sonic_ep.distributed.group import device_of_rank
from sonic_ep.integrations.transformers import configure
from sonic_ep.parallel import clip_grad_norm_

TRAIN, RESUME, ALONE = "train", "resume", "alone"
RANKS = {TRAIN: 2, RESUME: 4}
EP = 2
BYTES = 256
PROMPT, WRITTEN = b"import ", 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and a run. steps: in all; the first half of them before the restart. context: bytes of a sequence."""

    hidden: int
    intermediate: int
    experts: int
    layers: int
    context: int
    steps: int

    def config(self) -> Qwen3MoeConfig:
        """For transformers: the bytes are its tokens."""
        return Qwen3MoeConfig(
            vocab_size=BYTES,
            hidden_size=self.hidden,
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=self.hidden // 4,
            max_position_embeddings=1024,
        )


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "minutes": Size(hidden=128, intermediate=192, experts=16, layers=4, context=64, steps=30),
        "seconds": Size(hidden=32, intermediate=16, experts=8, layers=2, context=16, steps=4),
    }
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where a run writes, and its size. implementation: "sonic_ep" or "sonic_ep_dispatch"."""

    folder: Path
    size: Size = SIZES["minutes"]
    implementation: str = "sonic_ep"
    seed: int = 0

    @property
    def pretrained(self) -> Path:
        """The model that is fine-tuned, as ``save_pretrained`` writes it."""
        return self.folder / "pretrained"

    @property
    def finetuned(self) -> Path:
        """The model after all steps, as ``save_pretrained`` writes it."""
        return self.folder / "finetuned"

    @property
    def checkpoint(self) -> Path:
        """The folder of model and optimizer between both halves."""
        return self.folder / "checkpoint"

    @property
    def tokens(self) -> int:
        """N, of a batch: of all ranks."""
        return BATCH * self.size.context

    @property
    def bound(self) -> float:
        """How far apart a loss or a norm may be, relatively.

        In so many steps rounding decides a near tie of a router sooner or later, and one of N tokens goes to another
        expert: that moves a mean over N tokens by about 1/N.
        """
        return 1 / self.tokens


def make_pretrained(settings: Settings) -> None:
    """Write a model of random weights, which stands for one that somebody has trained."""
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(settings.size.config(), dtype=torch.float32)
    model.save_pretrained(settings.pretrained)


def build(settings: Settings, device: torch.device) -> nn.Module:
    """Collective. The pretrained model, in this process, or over all ranks if there is a process group."""
    options = {}
    if dist.is_initialized():
        world_size = dist.get_world_size()
        configure(backend="auto" if device.type == "cuda" else "reference")
        sizes = {"fsdp_size": world_size, "ep_size": min(EP, world_size)}
        options["distributed_config"] = DistributedConfig(**sizes, ep_implementation=settings.implementation)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(settings.pretrained, dtype=torch.float32, **options)
    return model.to(device).train()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Collective. One step on this rank's windows (b, S + 1); the mean loss of all ranks, and the gradient norm.

    Every rank has as many windows, so the mean of the ranks' means is the mean over all tokens.
    """
    loss = model(input_ids=windows, labels=windows, use_cache=False).loss
    loss.backward()
    norm = clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean, norm


def finetune(part: str, settings: Settings, device: torch.device) -> Curve:
    """Collective. "train": the first half of the steps, and a checkpoint; "resume": the others, from it; else all."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, steps = build(settings, device), settings.size.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    first = load(settings.checkpoint, model, optimizer) if part == RESUME else 0
    until = steps // 2 if part == TRAIN else steps
    layouts = even_layouts(steps, settings.size.context, world_size)
    todo = islice(batches(standard_library_text(), layouts, settings.seed), first, until)
    done = [train_step(model, optimizer, batch.of_rank(rank).to(device)) for batch in todo]
    if part == TRAIN:
        save(settings.checkpoint, model, optimizer, until)
    if part == RESUME:
        model.save_pretrained(settings.finetuned)  # type: ignore[operator]
    return Curve(first=first, losses=[loss.item() for loss, _ in done], norms=[norm.item() for _, norm in done])


def written(settings: Settings, device: torch.device) -> str:
    """What the fine-tuned model goes on with, loaded without ranks."""
    model = AutoModelForCausalLM.from_pretrained(settings.finetuned, dtype=torch.float32).to(device)
    prompt = torch.tensor([list(PROMPT)], device=device)
    found = model.generate(prompt, max_new_tokens=WRITTEN, do_sample=False, pad_token_id=0)
    return bytes(found[0].tolist()).decode(errors="replace")


def run_rank(part: str, settings: Settings) -> int:
    """One rank's share of a part; rank 0 writes the curve."""
    with joined_group() as place:
        place.say(f"{part}: {place.world_size} ranks on {place.device.type}")
        curve = finetune(part, settings, place.device)
        if place.rank == 0:
            curve.write(settings.folder / f"{part}.json")
    return 0


def run_all(settings: Settings) -> int:
    """Start the ranks of both parts, train in this process, and compare; the exit code."""
    gpus = torch.cuda.device_count()
    device = device_of_rank(0) if gpus >= RANKS[TRAIN] else torch.device("cpu")
    if device.type == "cpu":
        # FSDP's collectives need NCCL for tensors on GPUs, and NCCL a GPU for each rank.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    make_pretrained(settings)
    on_ranks = {part: ranks for part, ranks in RANKS.items() if device.type == "cpu" or ranks <= gpus}
    for part, ranks in on_ranks.items():
        failed = launch(ranks, ["--", __file__, *sys.argv[1:], f"--part={part}"])
        if failed:
            return failed
    parts = {f"W={ranks}": Curve.read(settings.folder / f"{part}.json") for part, ranks in on_ranks.items()}
    resumed = finetune(RESUME, settings, device)
    alone = finetune(ALONE, settings, device)
    in_one = compare([parts[f"W={RANKS[TRAIN]}"], resumed], alone, settings.tokens, settings.bound)
    print(f"resumed in one process: {in_one}")
    shown = parts if RESUME in on_ranks else {**parts, "W=1": resumed}
    agree = report(shown, alone, settings.tokens, settings.folder, settings.bound)
    print(f"losses: {alone.losses[0]:.3f} to {alone.losses[-1]:.3f}; it writes: {written(settings, device)!r}")
    return 0 if agree and in_one.ok else 1


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(RANKS), help="this part alone; torchrun starts its ranks")
    parser.add_argument("--folder", type=Path, default=Path("finetune_hf"), help="of models, curves and picture")
    parser.add_argument("--size", choices=list(SIZES), default="minutes", help="of model and run")
    names = ("sonic_ep", "sonic_ep_dispatch")
    parser.add_argument("--implementation", choices=names, default=names[0], help="of expert parallelism")
    asked = parser.parse_args()
    if launched_by_torchrun() != (asked.part is not None):
        parser.error("expected --part under torchrun and nowhere else")
    asked.folder.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    settings = Settings(folder=asked.folder, size=SIZES[asked.size], implementation=asked.implementation)
    return run_all(settings) if asked.part is None else run_rank(asked.part, settings)


if __name__ == "__main__":
    sys.exit(main())
