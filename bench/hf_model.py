"""A Qwen3-MoE of transformers, forward and backward: its experts by sonic_ep, by transformers' own EP, and without EP.

torchrun --nproc_per_node=2 --standalone bench/hf_model.py --json bench/results/2xH200_hf_model.json

Two layers of the 30B's sizes, random weights in bf16, 4 x 2048 tokens a rank; only the vocabulary is small. Without a
GPU a smoke size. First each variant is compared with one model in fp32; then they are timed in turn, round by round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import transformers
from harness.context import run_script
from harness.results import shape_record, time_fields
from harness.steady import freeze_garbage
from schema import Entry, Environment, Suite
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism

from sonic_ep.backend import BACKEND_PACKAGES
from sonic_ep.cli import CommandParser, run_command
from sonic_ep.cli.measured import Run, add_output, checked_ranks
from sonic_ep.cli.options import add_config, add_nproc, config_of, parse_count
from sonic_ep.config import AUTO
from sonic_ep.distributed.group import EPGroup, resolve_group
from sonic_ep.integrations.transformers import configure
from sonic_ep.profiler.agreement import WrongResultError, in_step
from sonic_ep.profiler.machine import environment
from sonic_ep.profiler.problem import Shape
from sonic_ep.profiler.timing import Timing
from sonic_ep.testing.checks import Yardstick
from sonic_ep.testing.interpreted import install_interpreter

DTYPE = torch.bfloat16
WARMUP = 5
# Of the first layer: this rank's share of the gradient is compared.
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The model and a rank's batch. heads: of queries, of keys and values, and their dimension."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    heads: tuple[int, int, int]
    vocabulary: int
    batch: int
    context: int
    layers: int = 2

    def config(self) -> Qwen3MoeConfig:
        """For transformers."""
        queries, keys, width = self.heads
        return Qwen3MoeConfig(
            hidden_size=self.hidden,
            moe_intermediate_size=self.intermediate,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            num_hidden_layers=self.layers,
            num_attention_heads=queries,
            num_key_value_heads=keys,
            head_dim=width,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.context,
        )

    def shape(self) -> Shape:
        """Of a layer of experts."""
        experts = {"intermediate": self.intermediate, "num_experts": self.num_experts, "top_k": self.top_k}
        return Shape(tokens=self.batch * self.context, hidden=self.hidden, dtype=DTYPE, **experts)


QWEN3_30B = ModelSizes(
    hidden=2048,
    intermediate=768,
    num_experts=128,
    top_k=8,
    heads=(32, 4, 128),
    vocabulary=1024,
    batch=4,
    context=2048,
)
SMOKE = ModelSizes(
    hidden=32, intermediate=16, num_experts=8, top_k=2, heads=(4, 2, 8), vocabulary=64, batch=2, context=16
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the model. ep: ``ep_implementation``, or None for a whole model on each rank.

    identity: experts return their input times the sum of its scores, so that all but the experts is left.
    """

    name: str
    ep: str | None
    identity: bool = False


NO_EP = Variant(name="no EP, all experts on each GPU", ep=None)
VARIANTS = (
    Variant(name="sonic_ep", ep="sonic_ep"),
    Variant(name="sonic_ep_dispatch", ep="sonic_ep_dispatch"),
    Variant(name="transformers' all_to_all", ep="all_to_all"),
    NO_EP,
    Variant(name="not experts, FSDP", ep="all_to_all", identity=True),
    Variant(name="not experts, no FSDP", ep=None, identity=True),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Where the model lies, this rank's batch (B, S), and its device."""

    folder: Path
    ids: Tensor
    device: torch.device
    group: EPGroup

    def model(self, variant: Variant, dtype: torch.dtype = DTYPE) -> nn.Module:
        """Collective. The model, run as ``variant`` says; on each rank alone, if that is without EP."""
        options: dict[str, Any] = {"dtype": dtype, "experts_implementation": "grouped_mm"}
        ranks = self.group.world_size
        if variant.ep is not None and ranks > 1:
            distributed = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation=variant.ep)
            options["distributed_config"] = distributed
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.folder, **options)
        if variant.ep is not None and ranks == 1:
            self.apply_to_one_rank(model, variant.ep)
        if variant.identity:
            for name, module in model.named_modules():
                if name.endswith(".experts"):
                    vars(module)["forward"] = unchanged
        return model.to(self.device).train()

    def apply_to_one_rank(self, model: Any, ep: str) -> None:
        """Expert parallelism over one rank, which ``DistributedConfig`` leaves out: what it costs besides the link."""
        mesh = init_device_mesh(self.device.type, (1,), mesh_dim_names=("ep",))
        apply_expert_parallelism(model, mesh, mesh, model._expand_parallel_plan(model.ep_plan), ep_implementation=ep)

    def step(self, model: nn.Module) -> Any:
        """Collective. A forward with its loss, and a backward; what the model returns."""
        out = model(input_ids=self.ids, labels=self.ids, use_cache=False)
        out.loss.backward()
        return out


def unchanged(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The tokens, in place of what experts make of them; differentiable in the scores as well."""
    return hidden_states * top_k_weights.sum(dim=-1, keepdim=True).to(hidden_states.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """Of one step: the loss of this rank's batch, its logits (B*S, V), and gradients of this rank's experts by name."""

    loss: float
    tensors: Mapping[str, Tensor]


def outcome_of(model: nn.Module, problem: Problem) -> Outcome:
    """Collective. Gradients are means over the ranks' losses, as FSDP has them."""
    out = problem.step(model)
    tensors = {"logits": out.logits.detach().flatten(0, 1)}
    for name in EXPERT_WEIGHTS:
        grad = model.get_parameter(f"model.layers.0.mlp.experts.{name}").grad
        assert grad is not None
        tensors[name] = (grad.to_local() if isinstance(grad, DTensor) else of_this_rank(grad, problem.group)).flatten(
            0, 1
        )
    model.zero_grad()
    return Outcome(loss=out.loss.item(), tensors=tensors)


def of_this_rank(grad: Tensor, group: EPGroup) -> Tensor:
    """Collective. This rank's experts (e, ...) of a gradient of all (E, ...): the mean over ranks, rounded once."""
    mean = grad.float()
    dist.all_reduce(mean)
    return (mean / group.world_size).chunk(group.world_size)[group.rank].to(grad.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Yardsticks:
    """The model in fp32, and in bf16 without EP: a variant may be twice as far from the first as the second is."""

    truth: Outcome
    plain: Outcome

    @staticmethod
    def of(problem: Problem) -> Yardsticks:
        """Collective."""
        models = (partial(problem.model, NO_EP, dtype) for dtype in (torch.float32, DTYPE))
        truth, plain = (outcome_of(model(), problem) for model in models)
        return Yardsticks(truth=truth, plain=plain)

    def check(self, name: str, found: Outcome) -> list[str]:
        """What was compared, a line each. Raises ``AssertionError``.

        Norms only: near ties of a router decide what single rows are.
        """
        lines = [f"{name}: loss {found.loss:.6f}, without EP {self.plain.loss:.6f}, in fp32 {self.truth.loss:.6f}"]
        near = abs(found.loss - self.plain.loss) <= torch.finfo(DTYPE).eps * abs(self.plain.loss)
        if not near:
            raise AssertionError(lines[0])
        for what, tensor in found.tensors.items():
            yardstick = Yardstick(self.truth.tensors[what], self.plain.tensors[what])
            accuracy = yardstick.judge(f"{name}, {what}", [yardstick.part(tensor)])
            if not accuracy.got.norm <= accuracy.bound.norm:
                raise AssertionError(str(accuracy))
            lines.append(f"  {accuracy}")
        return lines


def check_all(models: Mapping[str, nn.Module], problem: Problem, say: Any) -> None:
    """Collective. Raises ``WrongResultError`` on every rank if a variant is wrong on any."""
    yardsticks = Yardsticks.of(problem)
    for name, model in models.items():
        found = outcome_of(model, problem)
        check = partial(yardsticks.check, name, found)
        for line in in_step(problem.group, check, expected=AssertionError, raised=WrongResultError):
            say(line)


def timed_step(model: nn.Module, problem: Problem) -> dict[str, float]:
    """Collective. Seconds of a step: until the host has launched it, until it is done, and between events around it."""
    on_gpu = problem.device.type == "cuda"
    model.zero_grad()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
    wait_for(problem.device)
    dist.barrier()
    wait_for(problem.device)
    begin = perf_counter()
    if on_gpu:
        events[0].record()
    problem.step(model)
    if on_gpu:
        events[1].record()
    host = perf_counter() - begin
    wait_for(problem.device)
    wall = perf_counter() - begin
    between = {"events": events[0].elapsed_time(events[1]) / 1e3} if on_gpu else {}
    return {"wall": wall, "host": host, **between}


def wait_for(device: torch.device) -> None:
    """Until the GPU is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timings(models: Mapping[str, nn.Module], problem: Problem, rounds: int) -> dict[str, dict[str, Timing]]:
    """Collective. By variant and by what is timed; of each round the slowest rank."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    with freeze_garbage():
        for number in range(WARMUP + rounds):
            for name, model in models.items():
                seconds = timed_step(model, problem)
                if number >= WARMUP:
                    found[name].append(seconds)
    result = {}
    for name, steps in found.items():
        slowest = torch.tensor([list(step.values()) for step in steps], dtype=torch.float64, device=problem.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        columns = zip(steps[0], slowest.T.tolist(), strict=True)
        result[name] = {how: Timing(rounds=tuple(seconds)) for how, seconds in columns}
    return result


@contextmanager
def saved_model(sizes: ModelSizes, run: Run) -> Iterator[Path]:
    """Collective. The folder, on this machine, of the model with weights of a seed, while the context lasts."""
    paths: list[Any] = [None]
    with tempfile.TemporaryDirectory() as mine:
        if run.place.rank == 0:
            torch.manual_seed(0)
            with run.place.device:
                model = AutoModelForCausalLM.from_config(sizes.config(), dtype=DTYPE)
            model.save_pretrained(mine)
            del model
            paths = [mine]
        dist.broadcast_object_list(paths, src=0)
        yield Path(paths[0])
        dist.barrier()


def documents(run: Run, options: argparse.Namespace) -> Iterator[Suite]:
    """Collective. Check, time, tell."""
    install_interpreter()
    transformers.utils.logging.disable_progress_bar()
    device, on_gpu = run.place.device, run.place.device.type == "cuda"
    sizes = QWEN3_30B if on_gpu else SMOKE
    rounds = options.rounds or (30 if on_gpu else 1)
    generator = torch.Generator().manual_seed(run.place.rank)
    ids = torch.randint(sizes.vocabulary, (sizes.batch, sizes.context), generator=generator).to(device)
    with saved_model(sizes, run) as folder:
        group = resolve_group(None)
        # Models over one group share an object, and so its options.
        configure(backend=options.backend, config=config_of(options))
        problem = Problem(folder=folder, ids=ids, device=device, group=group)
        models = {variant.name: problem.model(variant) for variant in VARIANTS}
        complete = {variant.name: models[variant.name] for variant in VARIANTS if not variant.identity}
        check_all(complete, problem, run.say)
        found = timings(models, problem, rounds)
        machine = environment(device, group.world_size, options.commit, run.command)
        told = f"transformers {transformers.__version__}, {sizes.layers} layers, vocabulary {sizes.vocabulary}"
        machine["note"] = f"{machine['note']}; {told}" if machine["note"] else told
    for name, times in found.items():
        run.say(f"{name:42} " + ", ".join(f"{how} {timing.median * 1e3:.2f} ms" for how, timing in times.items()))
    shape = shape_record(sizes.shape())
    entries = (
        Entry(name=f"{name}: forward and backward", how=how, shape=shape, **time_fields(timing))
        for name, times in found.items()
        for how, timing in times.items()
    )
    yield Suite(environment=msgspec.convert(machine, Environment), entries=tuple(entries))


def parser() -> argparse.ArgumentParser:
    """Options of the script."""
    found = CommandParser(prog="hf_model.py", description="A Qwen3-MoE of transformers: checked, then timed.")
    add_nproc(found)
    add_config(found)
    found.add_argument("--backend", choices=(AUTO, *BACKEND_PACKAGES), default=AUTO, help="of sonic_ep")
    found.add_argument("--rounds", type=parse_count, metavar="N", help="steps of each variant (default: 30; CPU: 1)")
    add_output(found)
    found.set_defaults(command=run, check=checked_ranks)
    return found


def run(options: argparse.Namespace) -> int:
    """Collective: the exit code."""
    return run_script(options, "bench/hf_model.py", partial(documents, options=options))


if __name__ == "__main__":
    sys.exit(run_command(parser(), sys.argv[1:], [__file__]))
