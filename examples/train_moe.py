"""Train a small Mixture-of-Experts language model with expert parallelism: one file, to copy from.

    torchrun --nproc_per_node=2 examples/train_moe.py --save checkpoint
    torchrun --nproc_per_node=4 examples/train_moe.py --resume checkpoint

All ranks form one expert-parallel group. Experts are spread over it, everything else is the same on every rank. Each
rank has sequences of its own, and their number may differ. The model predicts the next byte of this file. Runs on GPUs,
one for each rank, or on the CPU.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import sonic_ep
from sonic_ep.parallel import clip_grad_norm_

BYTES, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 256, 64, 32, 8, 2, 2
CONTEXT, SEQUENCES, STEPS, LEARNING_RATE, MAX_NORM = 64, 16, 40, 3e-3, 1.0
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Block(nn.Module):
    """Causal attention, then experts, each with a norm before it and a residual around it."""

    def __init__(self, ep: sonic_ep.ExpertParallel) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.query_key_value, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.moe = sonic_ep.MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, ep=ep)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (sequences, S, H), fp32."""
        query, key, value = self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, is_causal=True))
        # The layer computes in the dtype of its input, and casts fp32 weights to it under autocast.
        y: Tensor = self.moe(self.moe_norm(x).bfloat16()).y
        return x + y


def model_of(ep: sonic_ep.ExpertParallel, device: torch.device) -> nn.Module:
    """The same on every rank, but for its experts. One seed gives one model on any number of ranks."""
    torch.manual_seed(0)
    with device:
        layers = [Block(ep) for _ in range(LAYERS)]
        return nn.Sequential(nn.Embedding(BYTES, HIDDEN), *layers, nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, BYTES))


def batch(step: int, device: torch.device) -> Tensor:
    """Sequences of this rank, (n, S + 1) bytes: a share of a batch that does not depend on the number of ranks."""
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8)
    drawn = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT, (SEQUENCES,), generator=drawn).tensor_split(dist.get_world_size())
    return torch.stack([text[start : start + CONTEXT + 1].long() for start in starts[dist.get_rank()]]).to(device)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, sequences: Tensor) -> tuple[float, float]:
    """One step over the whole group's batch; its loss and gradient norm, the same on every rank."""
    tokens = torch.tensor(float(sequences[:, 1:].numel()), device=sequences.device)
    dist.all_reduce(tokens)
    with torch.autocast(sequences.device.type, dtype=torch.bfloat16):
        logits = model(sequences[:, :-1])
    # A sum over this rank's tokens, divided by the tokens of the group: gradients of experts and routers come summed
    # over the ranks, so a mean over local tokens would make them W times too large.
    loss = F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten(), reduction="sum") / tokens
    loss.backward()
    for name, parameter in model.named_parameters():
        # The layer has summed those of its router and its experts.
        if ".moe." not in name:
            dist.all_reduce(parameter.grad)
    norm = clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach()
    dist.all_reduce(total)
    return total.item(), norm.item()


def train(save: Path | None, resume: Path | None, device: torch.device) -> list[float]:
    """Train on this rank of the default process group, from a checkpoint of any number of ranks; the losses."""
    with sonic_ep.ExpertParallel() as ep:
        model = model_of(ep, device)
        # Experts are DTensors, the rest are not: PyTorch's foreach optimizers take no list of both.
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)
        first = load(resume, model, optimizer) if resume else 0
        losses = []
        for step in range(first, first + STEPS):
            loss, norm = train_step(model, optimizer, batch(step, device))
            losses.append(loss)
            if ep.rank == 0 and (step + 1) % 10 == 0:
                print(f"step {step + 1}: loss {loss:.4f}, gradient norm {norm:.3f}", flush=True)
        if save:
            dcp.save({"step": first + STEPS, **state_of(model, optimizer)}, checkpoint_id=save)  # type: ignore[attr-defined]
        return losses


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds of both."""
    of_model, of_optimizer = get_state_dict(model, optimizer, options=FLAT)
    return {"model": of_model, "optimizer": of_optimizer}


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read a checkpoint into both; the number of steps that it has behind it."""
    state = {"step": 0, **state_of(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)  # type: ignore[attr-defined]
    states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(model, optimizer, **states, options=FLAT)
    return int(state["step"])


def main() -> None:
    """Join the process group, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write a checkpoint after the last step")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on from one, of any number of ranks")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group()
    train(options.save, options.resume, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
