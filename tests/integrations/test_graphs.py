"""``sonic_ep.graphed``: bits of eager calls, in the recipes of docs/graphs.md and among eager calls; its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from promises import promise
from recipes import GRAPHS, Names, blocks, run_block
from recomputed import Recomputed, recomputed
from same import assert_same_bits
from torch import Tensor, nn

import sonic_ep
from sonic_ep import ClosedError, EPConfig, ExpertParallel, MoE
from sonic_ep.capture_conditions import CaptureConditions
from sonic_ep.checks import ArgumentChecker
from sonic_ep.distributed.group import EPGroup
from sonic_ep.graphs import ReplayOrder
from sonic_ep.testing import Rank, assert_bitwise

# What captures by PyTorch's own products.
HIDDEN, SIZES, TOKENS = 64, (64, 32, 8, 2), 12
ALONE = ArgumentChecker(group=EPGroup(rank=0, world_size=1))
RAISES_OF_BACKWARD = "activations that were overwritten by "


class Residual(nn.Module):
    """A norm, a layer and a residual."""

    def __init__(self, ep: ExpertParallel, device: torch.device) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN, device=device, dtype=torch.bfloat16)
        self.moe = MoE(*SIZES, ep, device=device, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x)).y


def residuals(ep: ExpertParallel, rank: Rank, count: int = 3) -> list[Residual]:
    torch.manual_seed(0)
    return [Residual(ep, rank.device) for _ in range(count)]


def drawn(rank: Rank, seed: int, tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator(rank.device).manual_seed(10 * seed + rank.rank)
    return torch.randn(tokens, HIDDEN, generator=generator, device=rank.device).bfloat16().requires_grad_()


def chained(functions: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for function in functions:
        x = function(x)
    return x


def local(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else getattr(tensor, "to_local", lambda: tensor)()


def taken_gradients(x: Tensor, modules: Sequence[nn.Module]) -> list[Tensor | None]:
    """Gradients of x and all parameters, which have none afterwards."""
    tensors = [x, *(parameter for module in modules for parameter in module.parameters())]
    found = [local(tensor.grad) for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return found


@contextmanager
def fast(rank: Rank, **options: Any) -> Iterator[ExpertParallel]:
    with ExpertParallel(backend="fast", **options) as ep, torch.device(rank.device):
        yield ep
        ep.check()


@promise("graphs")
@pytest.mark.fast
@on_ranks(1, 2, pool="cuda_pool")
def test_steps_of_chained_blocks_equal_eager_ones_bit_for_bit(rank: Rank) -> None:
    """Two micro-batches a step, weights that change, eager calls of longer batches in between, all on one ``ep``."""
    with fast(rank) as ep:
        modules = residuals(ep, rank)
        graphs = [sonic_ep.graphed(module, drawn(rank, 0)) for module in modules]
        optimizer = torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1, foreach=False)
        for step in range(3):
            x, *gradients = (drawn(rank, 10 * step + number) for number in range(1, 4))
            outcomes = []
            for functions in (graphs, modules):
                results = []
                for gradient in gradients:
                    results.append(chained(functions, x))
                    results[-1].backward(gradient.detach())
                    chained(modules, drawn(rank, step, tokens=3 * TOKENS)).sum()
                outcomes.append([*(y.detach() for y in results), *taken_gradients(x, modules)])
            assert_same_bits(*outcomes, f"of step {step}")
            chained(graphs, x).backward(gradients[0].detach())
            optimizer.step()
            optimizer.zero_grad()


@promise("graphs")
@pytest.mark.fast
@on_ranks(1, 2, pool="cuda_pool")
@pytest.mark.parametrize("with_logits", [False, True])
def test_a_layer_with_all_its_results(rank: Rank, with_logits: bool) -> None:
    with fast(rank) as ep:
        layer = MoE(*SIZES, ep, dtype=torch.bfloat16, device=rank.device)
        graph, x = sonic_ep.graphed(layer, drawn(rank, 0)), drawn(rank, 1)
        outcomes = []
        for function in (graph, layer):
            out = function(x)
            assert isinstance(out, sonic_ep.MoEOutput)
            loss = out.y.float().sum() + (out.router_logits.square().sum() if with_logits else 0)
            loss.backward()
            outcomes.append([*(result.detach() for result in out), *taken_gradients(x, [layer])])
        # Zeros in place of no gradient: -0 may become 0.
        for found, expected in zip(*outcomes, strict=True):
            assert torch.equal(found, expected)


@promise("graphs")
@pytest.mark.fast
@on_ranks(1, 2, pool="cuda_pool")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(rank: Rank, mode: Any) -> None:
    """Results stay, whatever is replayed next; in training such a graph is refused."""
    with fast(rank) as ep:
        modules = residuals(ep, rank)
        for module in modules:
            module.eval()
        with mode():
            graphs = [sonic_ep.graphed(module, drawn(rank, 0)) for module in modules]
            found = [chained(graphs, drawn(rank, seed)) for seed in range(3)]
            for seed, y in enumerate(found):
                assert_bitwise(y, chained(modules, drawn(rank, seed)))
        with pytest.raises(ValueError, match="grad mode of graphed: got True, expected False, as captured"):
            graphs[0](drawn(rank, 0))


@promise("graphed-order")
@pytest.mark.fast
@on_ranks(1, 2, pool="cuda_pool")
def test_no_gradient_is_wrong_where_activations_are_overwritten(rank: Rank) -> None:
    with fast(rank) as ep:
        modules, x = residuals(ep, rank, 2), drawn(rank, 1)
        graphs = [sonic_ep.graphed(module, drawn(rank, 0)) for module in modules]
        lost, y = graphs[0](x), graphs[0](2 * x)
        y.sum().backward()
        found = taken_gradients(x, modules)
        for result, by in ((lost, "another forward"), (y, "their own backward")):
            with pytest.raises(RuntimeError, match=RAISES_OF_BACKWARD + by):
                result.sum().backward()
        modules[0](2 * x).sum().backward()
        assert_same_bits(found, taken_gradients(x, modules))
        # The second before the first, and in memory of their own.
        y = chained(graphs[::-1], x)
        with pytest.raises(RuntimeError, match=RAISES_OF_BACKWARD + "a graph that was captured before"):
            y.sum().backward()
        taken_gradients(x, modules)
        apart = [sonic_ep.graphed(module, drawn(rank, 0), shares_memory=False) for module in modules]
        outcomes = []
        for functions in (apart, modules):
            chained(functions[::-1], x).sum().backward()
            outcomes.append(taken_gradients(x, modules))
        assert_same_bits(*outcomes)


@pytest.mark.fast
@on_ranks(1, 2, pool="cuda_pool")
def test_graphs_share_memory(rank: Rank) -> None:
    """A second graph takes less than one with memory of its own."""

    def reserved() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    with fast(rank) as ep:
        module, sample, taken = Residual(ep, rank.device), drawn(rank, 0, tokens=16384), {}
        graphs = [sonic_ep.graphed(module, sample)]
        for shares in (True, False):
            before = reserved()
            graphs.append(sonic_ep.graphed(module, sample, shares_memory=shares))
            taken[shares] = reserved() - before
        assert taken[True] < taken[False], taken


@pytest.mark.fast
@on_ranks(1, 2, pool="cuda_pool")
def test_what_cannot_be_captured_is_named(rank: Rank) -> None:
    x = drawn(rank, 0)
    for options, words in (
        ({"backend": "reference"}, "backend of graphed: got 'reference', expected 'fast'"),
        ({"backend": "fast", "config": EPConfig(cpu_sync_on_runtime=True)}, "cpu_sync_on_runtime of graphed: got True"),
    ):
        with ExpertParallel(**options) as ep:
            layer = MoE(*SIZES, ep, dtype=torch.bfloat16, device=rank.device)
            with pytest.raises(ValueError, match=words):
                sonic_ep.graphed(layer, x)
            layer(x).y.sum().backward()
    with fast(rank) as ep:
        module, graph = Residual(ep, rank.device), None
        with pytest.raises(ValueError, match=r"one that reads a tensor \(.*\) that requires a gradient"):
            sonic_ep.graphed(lambda x: module(x), x)
        graph = sonic_ep.graphed(module, x)
        with pytest.raises(ValueError, match=r"shape of argument 0 of graphed: got \(11, 64\), expected \(12, 64\)"):
            graph(drawn(rank, 0, tokens=11))
        y = graph(x)
        assert_bitwise(y, module(x))
    with pytest.raises(ClosedError, match="is closed"):
        graph(x)
    with pytest.raises(ClosedError, match="is closed"):
        y.sum().backward()


@pytest.mark.fast
@on_ranks(1, 2, pool="cuda_pool")
def test_autocast_is_that_of_capture_and_no_cast_weight_is_kept(rank: Rank) -> None:
    with fast(rank):
        linear, x = nn.Linear(HIDDEN, HIDDEN, device=rank.device), drawn(rank, 0).float().detach()
        with torch.autocast("cuda", torch.bfloat16):
            linear(x)
            graph = sonic_ep.graphed(linear, x)
            with torch.no_grad():
                linear.weight.mul_(2)
            torch.clear_autocast_cache()
            assert_bitwise(graph(x), linear(x))
        with pytest.raises(ValueError, match="autocast"):
            graph(x)


# What the recipes expect; in some tests below they are modules without ranks.
def names_of_recipes(rank: Rank, ep: ExpertParallel) -> Names:
    modules = residuals(ep, rank)
    names: Names = {"ep": ep, "blocks": modules, "model": nn.Sequential(*modules), "block": modules[0]}
    names |= {"embed": nn.Identity(), "head": nn.Identity(), "x": drawn(rank, 5).detach().requires_grad_()}
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=0.0, foreach=False)
    run_block(names, "Imports", GRAPHS)
    return names


def test_every_block_is_run_here() -> None:
    recipes = {"Capture", "Step", "Inside", "Eager again", "Shapes", "Function", "Inference", "Apart"}
    assert set(blocks(GRAPHS)) == {"Imports", *recipes}


@pytest.mark.fast
@on_ranks(1, 2, pool="cuda_pool")
def test_the_recipes_of_training(rank: Rank) -> None:
    with fast(rank) as ep:
        names = names_of_recipes(rank, ep)
        x, modules = names["x"], names["blocks"]
        names["optimizer"].zero_grad = lambda: None
        for recipe in ("Capture", "Step"):
            run_block(names, recipe, GRAPHS)
        found = taken_gradients(x, modules)
        expected = chained(modules, x)
        expected.square().mean().backward()
        assert_same_bits(found, taken_gradients(x, modules))
        for recipe in ("Inside", "Eager again", "Shapes"):
            run_block(names, recipe, GRAPHS)
            assert_bitwise(names["y"], expected, recipe)
        assert_bitwise(names["short"], chained(modules, x[: TOKENS // 2]))
        run_block(names, "Apart", GRAPHS)
        found = taken_gradients(x, modules)
        for part in (x, 2 * x):
            names["block"](part).square().mean().backward()
        assert_same_bits(found, taken_gradients(x, modules))
        run_block(names, "Inference", GRAPHS)
        assert_bitwise(names["y"], expected)


@pytest.mark.fast
@on_ranks(1, 2, pool="cuda_pool")
def test_the_recipe_of_functions(rank: Rank) -> None:
    with fast(rank) as ep:
        names = names_of_recipes(rank, ep)
        layer = names["blocks"][0].moe
        w1, w2 = (nn.Parameter(local(weight).detach().clone()) for weight in (layer.experts.w1, layer.experts.w2))
        idx = torch.arange(2 * TOKENS, device=rank.device).view(TOKENS, 2) % 8
        scores = torch.rand(TOKENS, 2, device=rank.device).requires_grad_()
        names |= {"topk_idx": idx, "topk_scores": scores, "w1": w1, "w2": w2}
        run_block(names, "Function", GRAPHS)
        outcomes = []
        trained = [names["x"], scores, w1, w2]
        with torch.no_grad():
            w1.mul_(2)
        for function in (names["graph"], names["experts"]):
            y = function(names["x"], idx, scores, w1, w2)
            outcomes.append([y.detach(), *torch.autograd.grad(y.float().sum(), trained)])
        assert_same_bits(*outcomes)
        with pytest.raises(ValueError, match="argument 4 of graphed: got another tensor"):
            names["graph"](names["x"], idx, scores, w1, w2.detach())


# On ranks: what ``autograd.grad`` imports takes seconds, and they have it.
@on_ranks(1, 2, pool="cpu_pool")
def test_the_autograd_of_graphs(rank: Rank) -> None:
    """With graphs that compute again: gradients of two chained layers, accumulated, are those of eager calls."""
    with ExpertParallel(backend="reference") as ep, pytest.MonkeyPatch.context() as patch:
        graph_of = partial(recomputed, patch, Recomputed())
        modules, outcomes = residuals(ep, rank, 2), []
        graphs = [graph_of(module, drawn(rank, 0)) for module in modules]
        for functions in (graphs, modules):
            x = drawn(rank, 1)
            held = [chained(functions, x)]
            for factor in (2, 3):
                held.append(functions[0](x))
                y = chained(functions, x * factor)
                y.square().mean().backward()
                held.append(y)
            outcomes.append([*(y.detach() for y in held), *taken_gradients(x, modules)])
        assert_same_bits(*outcomes)
        lost, y = graphs[0](x), graphs[0](2 * x)
        y.sum().backward()
        for result, by in ((lost, "another forward"), (y, "their own backward")):
            with pytest.raises(RuntimeError, match=RAISES_OF_BACKWARD + by):
                result.sum().backward()
        out = graph_of(modules[0].moe, x)(x)
        assert [result.requires_grad for result in out] == [True, True, False, False, True]
        found = torch.autograd.grad(out.y.sum(), [x])
        assert_same_bits(found, torch.autograd.grad(modules[0].moe(x).y.sum(), [x]))
        with torch.no_grad():
            assert not graphs[0](x).requires_grad
        with pytest.raises(ValueError, match=r"one that reads a tensor \(.*\) that requires a gradient"):
            graph_of(lambda x: modules[0](x), x)


@on_ranks(1, pool="cpu_pool")
def test_a_parameter_among_the_arguments_is_read_in_place(rank: Rank) -> None:
    x, weight = torch.randn(3, 4), nn.Parameter(torch.randn(4, 4))
    with pytest.MonkeyPatch.context() as patch:
        graph = recomputed(patch, Recomputed(), torch.matmul, x, weight)
        with torch.no_grad():
            weight.mul_(2)
        graph(x, weight).sum().backward()
        expected = [x @ weight.detach(), torch.autograd.grad((x @ weight).sum(), [weight])[0]]
        assert_same_bits([graph(x, weight).detach(), weight.grad], expected)
        with refused("argument 1 of graphed: got another tensor"):
            graph(x, nn.Parameter(weight.detach().clone()))


def refused(*words: str) -> Any:
    return pytest.raises((ValueError, TypeError), match="^rank 0 of 1: " + ".*".join(words))


def test_what_no_device_is_needed_for_is_refused_first() -> None:
    x, linear = torch.zeros(2, 4), nn.Linear(4, 4)
    for function, given, words in (
        ("layer", (x,), ("function of graphed: got str",)),
        (linear, (), ("sample_args of graphed: got none",)),
        (linear, (x, 3), ("argument 1 of graphed: got int",)),
        (linear, (x,), ("device of argument 0 of graphed: got cpu, expected one CUDA device",)),
    ):
        with refused(*words):
            sonic_ep.graphed(function, *given)  # type: ignore[arg-type]
    with refused("shares_memory: got 1"):
        sonic_ep.graphed(linear, x, shares_memory=1)  # type: ignore[arg-type]
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *given: None)
    with refused("hooks of Linear 0: got _forward_hooks, expected none"):
        sonic_ep.graphed(hooked, x)
    linear.register_buffer("scale", torch.ones(4, requires_grad=True))
    with refused("requires_grad of buffer scale: got True"):
        sonic_ep.graphed(linear, x)


def frozen(module: nn.Module) -> None:
    next(module.parameters()).requires_grad_(False)


def moved(module: nn.Module) -> None:
    module.weight.data = module.weight.data.clone()


def replaced(module: nn.Module) -> None:
    module.bias = nn.Parameter(module.bias.detach())


@pytest.mark.parametrize(
    ("change", "given", "words"),
    [
        (None, lambda x: (x, x), "arguments of graphed: got 2, expected 1"),
        (None, lambda x: (3,), "argument 0 of graphed: got int"),
        (None, lambda x: (x[:1],), r"shape of argument 0 of graphed: got \(1, 4\), expected \(2, 4\), as captured"),
        (None, lambda x: (x.double(),), "dtype of argument 0 of graphed: got torch.float64, expected torch.float32"),
        (None, lambda x: (x.to("meta"),), "device of argument 0 of graphed: got meta, expected cpu"),
        (None, lambda x: (x.detach(),), "requires_grad of argument 0 of graphed: got False, expected True"),
        (nn.Module.eval, lambda x: (x,), "training of graphed: got False, expected True"),
        (frozen, lambda x: (x,), "parameters of graphed: got some that were replaced, moved, frozen or unfrozen"),
        (moved, lambda x: (x,), "parameters of graphed: "),
        (replaced, lambda x: (x,), "parameters of graphed: "),
    ],
)
def test_a_call_unlike_the_captured_one_is_refused(change: Any, given: Any, words: str) -> None:
    module, x = nn.Linear(4, 4), torch.zeros(2, 4, requires_grad=True)
    conditions = CaptureConditions.of(ALONE, module, [x])
    conditions.check((x,), {})
    if change is not None:
        change(module)
    with refused(words):
        conditions.check(given(x), {})


def test_modes_unlike_the_captured_ones_are_refused() -> None:
    module, x = nn.Linear(4, 4), torch.zeros(2, 4)
    conditions = CaptureConditions.of(ALONE, module, [x])
    with torch.no_grad():
        conditions.check((x,), {})
        without = CaptureConditions.of(ALONE, module, [x])
    for context, checked, options, words in (
        (nullcontext(), without, {}, "grad mode of graphed: got True, expected False"),
        (torch.autocast("cpu"), conditions, {}, r"autocast \(enabled, dtype\) of graphed: got \(True, "),
        (nullcontext(), conditions, {"mask": x}, "arguments of graphed: got mask by name"),
    ):
        with context, refused(words):
            checked.check((x,), options)
    with ExpertParallel(backend="reference") as ep:
        conditions.eps.append(ep)
        conditions.check((x,), {})
    with pytest.raises(ClosedError, match="graphed: the ExpertParallel of this graph is closed"):
        conditions.check((x,), {})


@promise("graphed-order")
def test_which_replays_overwrite_which_activations() -> None:
    """Blocks forward in order, and backward in reverse, overwrite nothing; each departure does."""
    order = ReplayOrder()
    first, second = order.new_number(), order.new_number()

    def forward(number: int) -> Any:
        order.overwrite(number)
        return order.expect_backward(number)

    passes = [forward(first), forward(second)]
    order.overwrite(second)
    assert "same graph" in passes[1].overwritten_by
    assert not passes[0].overwritten_by
    passes = [forward(first), forward(first)]
    assert "same graph" in passes[0].overwritten_by
    assert not passes[1].overwritten_by
    passes = [forward(second), forward(first)]
    assert "before" in passes[0].overwritten_by
    assert not passes[1].overwritten_by
