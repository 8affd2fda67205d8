"""``torch.ops.sonic_ep``: compiled, exported, faked or under selective checkpointing, calls are the eager ones."""

import copy
import gc
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from backends import both_backends
from layer_inputs import layer_inputs, routing_of
from on_ranks import on_ranks
from promises import promise
from recipes import COMPILING, INFERENCE, run_block
from same import assert_same_bits
from shards import local
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import sonic_ep
from sonic_ep import Activation, EPConfig, ExpertParallel, MoE, RecomputeError, RouterConfig, Swiglu, ops
from sonic_ep.ops.operator import _owners
from sonic_ep.plan import TENSOR_FIELDS
from sonic_ep.testing import CASES, Case, Rank

CASE = CASES["uniform"]
SIZES = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "top_k": 2}
GPT_OSS = Swiglu(alpha=1.702, limit=7.0, up_offset=1.0)
OPERATORS = torch.ops.sonic_ep


class Compiled:
    """``function``, compiled without a graph break. compilations: how often."""

    def __init__(self, function: Callable[..., Any], *, dynamic: bool | None = None, inductor: bool = False) -> None:
        torch._dynamo.reset()
        self.compilations = 0
        backend: Any = "inductor" if inductor else self._counted
        self.call = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)

    def _counted(self, graph: Any, inputs: Any) -> Any:
        self.compilations += 1
        return aot_eager(graph, inputs)


def results_of(function: Callable[..., Any], *given: Any, leaves: list[Tensor]) -> list[Tensor | None]:
    """What it returns, and gradients of a sum of all that is differentiable, with other factors for each number."""
    found = function(*given)
    found = list(found) if isinstance(found, tuple) else [found]
    factors = [torch.arange(1, 1 + tensor.numel(), device=tensor.device).view_as(tensor) for tensor in found]
    loss = sum(
        (tensor.float() * factor).sum() for tensor, factor in zip(found, factors, strict=True) if tensor.requires_grad
    )
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [None if tensor is None else local(tensor) for tensor in (*found, *grads)]


def calls_of(ep: ExpertParallel, rank: Rank, case: Case) -> dict[str, Callable[..., Any]]:
    """Calls with x, router_w, w1, w2 and scores."""
    idx, _ = routing_of(rank, case)
    router = RouterConfig(score_function="sigmoid", norm_topk_probs=True, scale=2.5)

    def moe(x: Tensor, router_w: Tensor, w1: Tensor, w2: Tensor, scores: Tensor) -> Any:
        # Other uses of x: sums of gradients depend on their order.
        out = ep.moe(x, router_w, w1, w2, case.top_k, activation=Swiglu(limit=1.0), router=router)
        return (out.y + x, *out[1:])

    def routed(x: Tensor, router_w: Tensor, w1: Tensor, w2: Tensor, scores: Tensor) -> Any:
        split = (w1[:, ::2], w1[:, 1::2])
        biases = (split[0].sum(2), split[1].mean(2)), w2.sum(2)
        out = ep.moe_routed(x, idx, scores, split, w2, *biases, GPT_OSS, "concat", return_routing=True)
        return out.y, out.tokens_per_expert, out.topk_scores * 2

    def functional(x: Tensor, router_w: Tensor, w1: Tensor, w2: Tensor, scores: Tensor) -> Any:
        return sonic_ep.moe(x, router_w, w1, w2, case.top_k, ep=ep, score_order="softmax_then_topk").y

    def parts(x: Tensor, router_w: Tensor, w1: Tensor, w2: Tensor, scores: Tensor) -> Any:
        plan = ep.plan(idx, case.num_experts)
        return ep.combine(ep.dispatch(x * 2, plan) * 1.5, scores, plan), plan.group_ends

    return {"moe": moe, "moe_routed": routed, "functional": functional, "parts": parts}


@promise("compile")
@pytest.mark.parametrize(
    ("backend", "again"),
    [
        ("fast", False),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in (("fast", True), ("reference", False))),
        pytest.param("reference", True, marks=pytest.mark.thorough),
    ],
)
@on_ranks(2)
def test_compiled_calls_are_the_eager_ones_without_a_graph_break(rank: Rank, backend: str, again: bool) -> None:
    x, weights, _ = layer_inputs(rank, CASE)
    scores = routing_of(rank, CASE)[1].requires_grad_()
    leaves = [x, *weights, scores]
    with ExpertParallel(backend=backend, config=EPConfig(redispatch_x_in_backward=again)) as ep:
        for name, call in calls_of(ep, rank, CASE).items():
            expected = results_of(call, *leaves, leaves=leaves)
            compiled = Compiled(call)
            for _ in range(2):
                assert_same_bits(results_of(compiled.call, *leaves, leaves=leaves), expected, name)
            assert compiled.compilations == 1
    assert freed()


def freed() -> bool:
    """Whether nothing is left of what calls saved."""
    gc.collect()
    return not _owners


@promise("compile")
@pytest.mark.parametrize(
    ("backend", "world_size"),
    [("reference", 2), *(pytest.param("fast", ranks, marks=pytest.mark.thorough) for ranks in (1, 2, 4))],
)
@on_ranks()
def test_a_module_is_compiled_once_for_any_number_of_tokens(rank: Rank, backend: str) -> None:
    """Weights are DTensors on two ranks; T differs between them."""
    with ExpertParallel(group_of(rank), backend=backend) as ep:
        layer = MoE(**SIZES, ep=ep, bias=True, router_bias=True, correction_bias=True, activation=GPT_OSS).to(
            rank.device
        )
        compiled = Compiled(layer, dynamic=True)
        for tokens in (64, 96, 100):
            x = torch.randn(tokens + rank.rank, 16, device=rank.device, requires_grad=True)
            leaves = [x, *layer.parameters()]
            expected = results_of(layer, x, leaves=leaves)
            assert_same_bits(results_of(compiled.call, x, leaves=leaves), expected, f"T={tokens}")
        assert compiled.compilations == 1
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
            y = compiled.call(x).y
        with pytest.raises(RuntimeError, match="graph: got a copy, expected the tensor that a call returned"):
            y.sum().backward()
    assert freed()


def group_of(rank: Rank) -> Any:
    return None if rank.world_size == 1 else init_device_mesh(rank.device.type, (rank.world_size,))


@promise("compile")
@both_backends
@on_ranks(1)
def test_autocast_and_no_grad_are_those_of_the_caller(rank: Rank, backend: str) -> None:
    layer = MoE(**SIZES, ep=ExpertParallel(backend=backend), device=rank.device)
    x = torch.randn(6, 16, device=rank.device, dtype=torch.bfloat16, requires_grad=True)
    compiled = Compiled(lambda x: layer(x).y)
    with torch.autocast(rank.device.type, dtype=torch.bfloat16):
        leaves = [x, *layer.parameters()]
        expected = results_of(lambda x: layer(x).y, x, leaves=leaves)
        assert_same_bits(results_of(compiled.call, x, leaves=leaves), expected)
        with torch.no_grad():
            assert torch.equal(compiled.call(x), expected[0])
        assert freed()
    with pytest.raises(ValueError, match=r"dtype of x: got torch.bfloat16, expected torch.float32, as w1, w2"):
        compiled.call(x)
    layer.ep.close()


@on_ranks(2, pool="cpu_pool")
def test_recipes_of_the_documents(rank: Rank) -> None:
    with ExpertParallel(backend="reference") as ep:
        layer = MoE(**SIZES, ep=ep)
        x = torch.randn(8 + rank.rank, 16, requires_grad=True)
        names = {"layer": layer, "x": x, "torch": torch}
        leaves = [x, *layer.parameters()]
        expected = results_of(layer, x, leaves=leaves)
        torch._dynamo.reset()
        run_block(names, "Compile", COMPILING)
        assert_same_bits(results_of(names["compiled"], x, leaves=leaves), expected)
        before = ep.steps
        run_block(names, "Selective checkpointing", COMPILING)
        assert_same_bits(torch.autograd.grad(names["out"].y.sum(), x), torch.autograd.grad(layer(x).y.sum(), x))
        assert ep.steps == before + 2
        run_block(names, "Export", INFERENCE)
        assert torch.equal(names["y"], expected[0])


@promise("compile")
@both_backends
@on_ranks(1)
def test_exported_for_inference_with_any_number_of_tokens(rank: Rank, backend: str) -> None:
    with ExpertParallel(backend=backend) as ep, torch.no_grad():
        layer = MoE(**SIZES, ep=ep, device=rank.device)
        some, others = (torch.randn(tokens, 16, device=rank.device) for tokens in (10, 33))
        dynamic = ({0: torch.export.Dim("T", min=2, max=4096)},)
        exported = torch.export.export(layer, (some,), dynamic_shapes=dynamic)
        assert OPERATORS.moe.default in {node.target for node in exported.graph.nodes}
        for x in (some, others):
            assert_same_bits(exported.module()(x), layer(x))
    with pytest.raises(ValueError, match="this ExpertParallel is closed"):
        exported.module()(some)
    del ep
    layer.experts.ep = None
    gc.collect()
    with pytest.raises(ValueError, match=r"ep: got 'ep\d+', expected an ExpertParallel that is alive"):
        exported.module()(some)


@promise("compile")
@both_backends
@on_ranks(1)
def test_fake_tensors_have_the_form_of_results_and_take_no_step(rank: Rank, backend: str) -> None:
    with ExpertParallel(backend=backend) as ep:
        layer = MoE(**SIZES, ep=ep, device=rank.device)
        real = layer(torch.randn(7, 16, device=rank.device))
        before = ep.steps
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(7, 16, device=rank.device, requires_grad=True)
            fake = layer(x)
            grads = torch.autograd.grad(fake.y.sum(), [x, *layer.parameters()])
        assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in (x, *layer.parameters())]
        assert ep.steps == before


@promise("selective-checkpoint")
@pytest.mark.parametrize(
    ("backend", "saved"),
    [
        ("reference", True),
        ("reference", False),
        ("fast", True),
        pytest.param("fast", False, marks=pytest.mark.thorough),
    ],
)
@on_ranks(2)
def test_selective_checkpointing_by_operator(rank: Rank, backend: str, saved: bool) -> None:
    """Where our operators are saved the exchange is not repeated: a call of forward, and its backward, is one step."""
    x, weights, _ = layer_inputs(rank, CASE)
    scores = routing_of(rank, CASE)[1].requires_grad_()
    leaves = [x, *weights, scores]
    kept = [getattr(OPERATORS, name).default for name in ("moe", "moe_routed", "plan", "dispatch", "combine")]
    context = partial(create_selective_checkpoint_contexts, kept if saved else [torch.ops.aten.mm.default])
    with ExpertParallel(backend=backend) as ep:
        for name, call in calls_of(ep, rank, CASE).items():
            expected = results_of(call, *leaves, leaves=leaves)
            before = ep.steps
            recomputed = partial(checkpoint, call, use_reentrant=False, context_fn=context)
            assert_same_bits(results_of(recomputed, *leaves, leaves=leaves), expected, name)
            assert ep.steps - before == (1 if saved else 2) * (3 if name == "parts" else 1)
    assert freed()


@promise("recompute")
@both_backends
@on_ranks(2)
def test_another_routing_in_selective_checkpointing_is_an_error(rank: Rank, backend: str) -> None:
    x, weights, dy = layer_inputs(rank, CASE)
    context = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    factors = iter([1.0, -1.0])
    with ExpertParallel(backend=backend) as ep:

        def layer(x: Tensor) -> Tensor:
            return ep.moe(x * next(factors), *weights, CASE.top_k).y

        y = checkpoint(layer, x, use_reentrant=False, context_fn=context)
        with pytest.raises(RecomputeError, match=f"rank {rank.rank} of 2: step 2: got another routing"):
            y.backward(dy)


class Overwriting(TorchDispatchMode):
    """Does to calls what a compiler may: overwrites their inputs, whose values backward gets from elsewhere."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if "sonic_ep" not in str(function) or function is OPERATORS.backward.default:
            return function(*arguments, **(options or {}))
        copies: list[Tensor] = []

        def copied(given: Any) -> Any:
            if isinstance(given, list):
                return [copied(item) for item in given]
            if not isinstance(given, Tensor) or given.data_ptr() in _owners:
                return given
            copies.append(given.clone(memory_format=torch.preserve_format))
            return copies[-1]

        results = function(*map(copied, arguments))
        for tensor in copies:
            tensor.fill_(0)
        return results


@promise("compile")
@both_backends
@on_ranks(2)
def test_backward_reads_nothing_that_a_compiler_may_overwrite(rank: Rank, backend: str) -> None:
    """Inductor reuses the memory of what operators took and returned, which no version counter shows."""
    x, (router_w, w1, w2), _ = layer_inputs(rank, CASE)
    idx, scores = routing_of(rank, CASE)
    leaves = [x, router_w, w1, w2, scores.requires_grad_()]
    returned: list[Tensor] = []

    def calls(ep: ExpertParallel) -> list[Tensor]:
        y, *others = ops.moe(
            ep, x * 2, router_w * 2, w1 * 2, w2.transpose(1, 2).contiguous().transpose(1, 2), CASE.top_k
        )
        halves = (w1[:, ::2], w1[:, 1::2])
        routed = ops.moe_routed(ep, x * 2, idx, scores * 2, halves, w2, (halves[0].sum(2), halves[1].sum(2)), w2.sum(2))
        plan = ops.plan(ep, idx, CASE.num_experts)
        returned.extend((*others, *(getattr(plan, name) for name in TENSOR_FIELDS)))
        return [y, routed, ops.combine(ep, ops.dispatch(ep, x, plan) * 2, scores * 3, plan)]

    for again in (True, False):
        with ExpertParallel(backend=backend, config=EPConfig(redispatch_x_in_backward=again)) as ep:
            expected = torch.autograd.grad(sum(y.float().square().sum() for y in calls(ep)), leaves)
            returned.clear()
            with Overwriting():
                loss = sum(y.float().square().sum() for y in calls(ep))
            for tensor in returned:
                tensor.data.fill_(0)
            assert_same_bits(torch.autograd.grad(loss, leaves), expected)


@on_ranks(1, pool="cpu_pool")
def test_a_loss_of_results_without_a_gradient_is_no_error(rank: Rank) -> None:
    """The router is frozen, and an operator's floats all seem differentiable."""
    layer = MoE(**SIZES, ep=ExpertParallel(backend="reference"))
    layer.router.requires_grad_(False)
    factor = torch.ones((), requires_grad=True)
    compiled = Compiled(lambda x, factor: layer(x).router_logits.sum() * factor)
    compiled.call(torch.randn(3, 16), factor).backward()
    assert factor.grad is not None
    assert all(weight.grad is None or not weight.grad.any() for weight in layer.experts.parameters())
    layer.experts.ep.close()


@on_ranks(1, pool="cpu_pool")
def test_compiled_code_of_a_layer_without_ep_serves_others_when_it_is_gone(rank: Rank) -> None:
    layers, x = [MoE(**SIZES), MoE(**SIZES)], torch.randn(3, 16)
    compiled = Compiled(lambda layer, x: layer(x).y)
    for layer in layers:
        compiled.call(layer, x)
    del layers[0], layer
    gc.collect()
    assert torch.equal(compiled.call(layers[0], x), layers[0](x).y)


@on_ranks(1, pool="cpu_pool")
def test_numbers_of_an_activation_may_come_from_the_compiled_code(rank: Rank) -> None:
    with ExpertParallel(backend="reference") as ep:
        experts, x = MoE(**SIZES, ep=ep).experts, torch.randn(3, 16)
        idx, scores = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)

        def call(x: Tensor, alpha: float) -> Tensor:
            return ep.moe_routed(x, idx, scores, experts.w1, experts.w2, activation=Swiglu(alpha=alpha))

        compiled = Compiled(call)
        for alpha in (1.5, 2.5, 2, 3.5):
            assert torch.equal(compiled.call(x, alpha), call(x, alpha))


@on_ranks(1, pool="cpu_pool")
def test_steps_are_the_calls_that_have_begun(rank: Rank) -> None:
    """A backward does not count them back to its own."""
    with ExpertParallel(backend="reference") as ep:
        layer, x = MoE(**SIZES, ep=ep), torch.randn(3, 16)
        before = ep.steps
        first, _ = layer(x).y, layer(x).y
        first.sum().backward()
        assert ep.steps == before + 2


@promise("compile", "second-derivatives")
@both_backends
@on_ranks(1)
def test_wrong_uses_of_compiled_calls_are_errors(rank: Rank, backend: str) -> None:
    x, weights, _ = layer_inputs(rank, CASE)
    with ExpertParallel(backend=backend) as ep:
        compiled = Compiled(lambda x, *weights: ep.moe(x, *weights, CASE.top_k).y)
        first = torch.autograd.grad(compiled.call(x, *weights).square().sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
            torch.autograd.grad(first.sum(), x)
        with pytest.raises(ValueError, match="top_k"):
            Compiled(lambda x, *weights: ep.moe(x, *weights, 99).y).call(x, *weights)
        with pytest.raises(ValueError, match="score_order"):
            Compiled(
                lambda x, *weights: ep.moe(x, *weights, 2, score_order="softmax_then_topk", router=RouterConfig()).y
            ).call(x, *weights)


@on_ranks(2, pool="cpu_pool")
def test_dtensors_of_other_placements_are_refused_while_compiling(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (2,))
    with ExpertParallel(mesh, backend="reference") as ep:
        layer = MoE(**SIZES, ep=ep)
        x, router_w = torch.randn(4, 16), layer.router.weight
        w1, w2 = layer.experts.w1, layer.experts.w2
        whole = w1.redistribute(placements=[Replicate()])
        replicated = distribute_tensor(router_w.detach(), mesh, [Replicate()])
        for given, options, said in (
            ((router_w, whole, w2), {}, "w1: got a DTensor"),
            # PyTorch 2.11 shows the text in parts.
            ((replicated, w1, w2), {"reduce_router_grad": False}, "reduce_router_grad=True, or plain tensors"),
        ):
            with pytest.raises(Exception, match=said):
                Compiled(lambda x, g=given, o=options: ep.moe(x, *g, 2, **o).y).call(x)


@on_ranks(1, pool="cpu_pool")
def test_own_activations_are_found_by_their_text(rank: Rank) -> None:
    """Also copies, that the original does not outlive."""
    own = Activation(name="tanh", gated=True, pointwise=torch.tanh)
    layers = [MoE(**SIZES, activation=own)]
    layers += [copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))]
    assert len({layer.experts.activation.text for layer in layers}) == 3
    x = torch.randn(5, 16)
    expected = layers[0](x).y
    del own, layers[0]
    gc.collect()
    for layer in layers:
        assert torch.equal(Compiled(layer).call(x).y, expected)


@pytest.mark.parametrize("name", ["moe", "moe_routed", "dispatch", "combine"])
@both_backends
@pytest.mark.thorough
@on_ranks(1)
def test_operators_keep_pytorchs_rules(rank: Rank, backend: str, name: str) -> None:
    """Schema, fakes and autograd, by ``torch.library.opcheck``, for the arguments of a real call."""
    x, weights, _ = layer_inputs(rank, CASE)
    scores = routing_of(rank, CASE)[1].requires_grad_()
    operator, seen = getattr(OPERATORS, name).default, []
    with ExpertParallel(backend=backend) as ep:

        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
                if function is operator:
                    seen.append(arguments)
                return function(*arguments, **(options or {}))

        # Its checks copy arguments, so that a plan has to be made eagerly.
        plan = ep.plan(routing_of(rank, CASE)[0], CASE.num_experts)

        def parts(x: Tensor, *_: Tensor) -> Tensor:
            return ep.combine(ep.dispatch(x, plan), scores, plan)

        call = {**calls_of(ep, rank, CASE), "dispatch": parts, "combine": parts}[name]
        context = partial(create_selective_checkpoint_contexts, [operator])
        with Seen():
            checkpoint(call, x, *weights, scores, use_reentrant=False, context_fn=context)
        assert seen
        torch.library.opcheck(operator, seen[0])


@pytest.mark.thorough
@both_backends
@on_ranks(1)
def test_inductor_compiles_calls(rank: Rank, backend: str) -> None:
    x, weights, _ = layer_inputs(rank, CASE)
    scores = routing_of(rank, CASE)[1].requires_grad_()
    leaves = [x, *weights, scores]
    with ExpertParallel(backend=backend) as ep:
        for name, call in calls_of(ep, rank, CASE).items():
            if name == "moe_routed":
                # The compiler's own sums of biases round otherwise.
                continue
            expected = results_of(call, *leaves, leaves=leaves)
            assert_same_bits(results_of(Compiled(call, inductor=True).call, *leaves, leaves=leaves), expected, name)
