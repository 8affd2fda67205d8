"""A call like an earlier one is not checked again, and no guard is skipped by that: all that differs is looked at."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP_K, good_call, good_routed_call
from hostile import Tagged, negated_in_name, shifted, sliced, transposed
from on_ranks import on_ranks
from promises import promise
from torch import Tensor
from torch.autograd import forward_ad

from sonic_ep import Activation, ExpertParallel, RouterConfig, RoutingPlan, call_checks
from sonic_ep.backend import ExpertWeights, LayerOutput, RouterWeights, Routing, Slots
from sonic_ep.call_memory import RECORDS_KEPT, CallRecord
from sonic_ep.testing import Rank

pytestmark = promise("arguments")

Change = Callable[[Tensor], Any]
HOW_MANY = 3


def freed(tensor: Tensor) -> Tensor:
    """A copy whose memory is gone."""
    held = tensor.clone()
    held.untyped_storage().resize_(0)
    return held


def shrunk(held: Tensor) -> Tensor:
    """Its memory ends before its last element."""
    held.untyped_storage().resize_(held.nbytes - held.itemsize)
    return held


def of_inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


FORMS: dict[str, Change] = {
    "of another float": lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor.float(),
    "of double size": lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.int(),
    "on meta": lambda tensor: tensor.to("meta"),
    "freed": freed,
    "freed in part": lambda tensor: shrunk(tensor.clone()),
    "freed and transposed": lambda tensor: shrunk(tensor.mT.contiguous().mT),
    "negated in name": negated_in_name,
    "zeros of no memory": lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
    "of inference": of_inference,
    "trained": lambda tensor: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor,
    "transposed": transposed,
    "sliced": sliced,
    "shifted": shifted,
    "of other rows": lambda tensor: tensor[:-1],
    "of no rows": lambda tensor: tensor[:0],
    "of other columns": lambda tensor: tensor[..., :-1].contiguous(),
    "of one more dimension": lambda tensor: tensor[None],
    "of no dimension": lambda tensor: tensor.flatten()[0],
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "tagged": lambda tensor: tensor.as_subclass(Tagged),
    "a parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "sparse": lambda tensor: tensor.to_sparse(),
    "nested": lambda tensor: torch.nested.nested_tensor(list(tensor)) if tensor.is_floating_point() else tensor,
    "None": lambda tensor: None,
    "a list": lambda tensor: tensor.tolist(),
    "a pair": lambda tensor: (tensor, tensor),
}
OPTIONS: dict[str, list[Any]] = {
    "activation": ["geglu", "relu", "none", ["swiglu"], Activation(name="own", gated=True, pointwise=F.silu), None],
    "gate_layout": ["concat", "none", {}, None],
    "top_k": [1, 3, EXPERTS + 1, float(TOP_K), torch.tensor(TOP_K), True, [TOP_K]],
    "norm_topk_probs": [True, 0, None],
    "reduce_router_grad": [False, 1, None],
    "score_order": ["softmax_then_topk", "none", []],
    "router": [RouterConfig(scale=2.0), RouterConfig(num_groups=3), {}],
    "return_routing": [True, 0, None],
}


def bias(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, EXPERTS * shape[-1]).view(shape)


def arguments_of(name: str, plan: RoutingPlan) -> dict[str, Any]:
    torch.manual_seed(0)
    biases = {"b1": bias(EXPERTS, 2 * INTERMEDIATE), "b2": bias(EXPERTS, HIDDEN)}
    of_router = {"router_b": torch.zeros(EXPERTS), "correction_bias": torch.zeros(EXPERTS)}
    rows = torch.randn(plan.row_capacity, HIDDEN)
    found: dict[str, dict[str, Any]] = {
        "moe": good_call(**biases, **of_router),
        "moe_routed": good_routed_call(**biases),
        "plan": {"topk_idx": torch.arange(TOP_K).repeat(TOKENS, 1), "num_experts": EXPERTS},
        "dispatch": {"x": torch.randn(TOKENS, HIDDEN), "plan": plan},
        "combine": {"rows": rows, "topk_scores": torch.rand(TOKENS, TOP_K), "plan": plan},
    }
    return found[name]


CALLS = ("moe", "moe_routed", "plan", "dispatch", "combine")


def planned(ep: ExpertParallel) -> RoutingPlan:
    return ep.plan(torch.arange(TOP_K).repeat(TOKENS, 1), EXPERTS)


def described(value: Any) -> object:
    """What a backend sees of an argument."""
    if isinstance(value, Tensor):
        held = (value.is_neg(), value._is_zerotensor(), value.is_inference(), value.untyped_storage().nbytes())
        lies = (value.dtype, value.device, value.shape, value.stride(), value.storage_offset())
        return repr((value.tolist(), value.requires_grad, *lies, *held))
    if isinstance(value, ExpertWeights | RouterWeights | Slots):
        return {field.name: described(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, CallRecord):
        return (value.facts, repr(value.options), value.x_trained, value.joins)
    return "a plan" if isinstance(value, RoutingPlan) else repr(value)


class Seen:
    """An object whose backend notes what it is given, unless it is ``quiet``, and computes nothing. plan: its plans."""

    def __init__(self, plan: RoutingPlan) -> None:
        self.ep = ExpertParallel(backend="reference", max_tokens_per_rank=TOKENS)
        self.given: list[object] = []
        self.quiet = False
        idx, y = torch.zeros(TOKENS, TOP_K, dtype=torch.int64), torch.zeros(TOKENS, HIDDEN)
        routing = Routing(logits=torch.zeros(TOKENS, EXPERTS), topk_idx=idx, topk_scores=torch.zeros(TOKENS, TOP_K))
        layer = LayerOutput(y=y, counts=plan.counts, expert_ids=plan.expert_ids)
        answers = {"route": routing, "layer": layer, "plan": plan, "dispatch": y, "combine": y}
        for method, answer in answers.items():
            setattr(self.ep._backend, method, partial(self._note, method, answer))

    def _note(self, method: str, answer: object, *given: object, **options: object) -> object:
        if not self.quiet:
            self.given += [method, *map(described, given), *map(described, options.values())]
        return answer

    def outcome(self, name: str, arguments: dict[str, Any]) -> tuple[object, ...]:
        """The error, or all that the backend was given and what ranks would compare; and how many calls began."""
        before, self.given = self.ep.steps, []
        try:
            getattr(self.ep, name)(**arguments)
        except Exception as error:
            return type(error), str(error), self.ep.steps - before
        given = [one for one in self.given if name != "plan" or not isinstance(one, str) or not one.isdigit()]
        return given, self.ep._collectives.step.call, self.ep.steps - before


@pytest.fixture(scope="module")
def plan() -> RoutingPlan:
    with ExpertParallel(backend="reference") as ep:
        return planned(ep)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on a call that is checked fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("checked")

    def begin() -> None:
        for check in ("check_tokens", "check_routing", "check_tokens_of_plan", "check_rows_of_plan"):
            monkeypatch.setattr(call_checks, check, refuse)

    return begin


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_repeats_is_not_checked_again_whatever_its_tokens(
    name: str, unchecked: Callable[[], None], plan: RoutingPlan
) -> None:
    known, arguments = Seen(plan), arguments_of(name, plan)
    fewer = {key: arguments[key][:3].clone() for key in ("x", "topk_idx", "topk_scores") if key in arguments}
    if "plan" in arguments:
        with ExpertParallel(backend="reference") as ep:
            fewer["plan"] = ep.plan(plan_ids(3), EXPERTS)
    if "rows" in arguments:
        fewer["rows"] = arguments["rows"][: fewer["plan"].row_capacity]
    cases = [arguments, arguments | fewer]
    expected = [Seen(plan).outcome(name, case) for case in cases]
    known.outcome(name, arguments)
    unchecked()
    assert [known.outcome(name, case) for case in cases] == expected
    with torch.no_grad():
        assert known.outcome(name, arguments)[0] is AssertionError


def changes_of(name: str, arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    changed = {
        f"{key} {form}": {key: change(value)}
        for key, value in arguments.items()
        if isinstance(value, Tensor)
        for form, change in FORMS.items()
        # A dimension has to be there to be changed.
        if value.ndim > 1 or form not in ("freed and transposed", "transposed")
    }
    for key, values in OPTIONS.items():
        if key in arguments or (name == "moe" and key != "return_routing") or key in ("activation", "gate_layout"):
            changed |= {f"{key} {value!r}": {key: value} for value in values}
    return changed


@pytest.mark.parametrize("grad_mode", [True, pytest.param(False, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", CALLS)
def test_a_known_call_skips_no_guard(name: str, grad_mode: bool, plan: RoutingPlan) -> None:
    """Whatever is changed in it: the result, or the error, is that of an object that has made no call before."""
    known, arguments = Seen(plan), arguments_of(name, plan)
    changes = changes_of(name, arguments)
    with torch.set_grad_enabled(grad_mode):
        right = known.outcome(name, arguments)
        assert right[-1] == 1, right
        different = 0
        for what, change in changes.items():
            expected = Seen(plan).outcome(name, arguments | change)
            for _ in range(2):
                assert known.outcome(name, arguments | change) == expected, what
                assert known.outcome(name, arguments) == right, what
            different += expected != right
    assert different > len(changes) / 2


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "as it was": nullcontext,
    "without gradients": torch.no_grad,
    "in inference mode": torch.inference_mode,
    "under autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "under forward-mode differentiation": forward_ad.dual_level,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_in_another_mode_is_another_call(name: str, plan: RoutingPlan) -> None:
    known, arguments = Seen(plan), arguments_of(name, plan)
    leaves = {key: arguments[key].requires_grad_() for key in ("x", "rows", "w1") if key in arguments}
    for _ in range(2):
        for mode in MODES.values():
            fresh = Seen(plan)
            with mode():
                assert known.outcome(name, arguments) == fresh.outcome(name, arguments)
    for key, leaf in leaves.items():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf.detach(), leaf.detach())
            error, said, begun = known.outcome(name, arguments | {key: dual})
        assert (error, begun) == (NotImplementedError, 0)
        assert f"{key}: got a tensor with a tangent" in str(said)


def test_weights_of_half_precision_are_cast_under_autocast_alone() -> None:
    arguments = good_call()
    half = arguments | {"x": arguments["x"].bfloat16()}
    with ExpertParallel(backend="reference") as ep:
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert ep.moe(**half).y.dtype == torch.bfloat16
            with pytest.raises(ValueError, match=r"dtype of x: got torch.bfloat16, expected torch.float32, as w1, w2"):
                ep.moe(**half)
        # Copies are made in every call: there is nothing to know.
        assert len(ep._call_guard.memory) == 0


def test_numbers_of_tokens_that_do_not_fit_are_refused_in_a_known_call() -> None:
    with ExpertParallel(backend="reference", max_tokens_per_rank=TOKENS) as ep:
        plan, routed = planned(ep), good_routed_call()
        x, scores = routed["x"], routed["topk_scores"]
        rows = ep.dispatch(x, plan)
        more = torch.cat([rows, rows[:1]])
        ep.combine(rows, scores, plan)
        ep.moe_routed(**routed)
        ep.moe(**good_call())
        known = len(ep._call_guard.memory)
        refused: dict[str, Callable[[], object]] = {
            "tokens of topk_idx: got 4, expected T=5": lambda: ep.moe_routed(**routed | {"topk_idx": plan_ids(4)}),
            r"shape of topk_scores: got \(4, 2\)": lambda: ep.moe_routed(**routed | {"topk_scores": scores[:4]}),
            "tokens of x: got 4, expected T=5 of the plan": lambda: ep.dispatch(x[:4], plan),
            r"shape of topk_scores: got \(4, 2\), expected \(5, 2\)": lambda: ep.combine(rows, scores[:4], plan),
            r"shape of rows: got \(11, 8\)": lambda: ep.combine(more, scores, plan),
            "rows of combine: got 1 fewer": lambda: ep.combine(rows[: plan.rows() - 1], scores, plan),
            "topk_idx: got expert ids from 0 to 4": lambda: ep.plan(plan_ids(TOKENS) * 4, EXPERTS),
            "topk_idx: got expert ids from 0 to 6": lambda: ep.moe_routed(
                **routed | {"topk_idx": plan_ids(TOKENS) * 6}
            ),
            "tokens T: got 10, expected at most C=5": lambda: ep.moe(**good_call() | {"x": torch.cat([x, x])}),
            "tokens T: got 6, expected at most C=5": lambda: ep.plan(plan_ids(6), EXPERTS),
        }
        for message, call in refused.items():
            with pytest.raises(ValueError, match=message):
                call()
        assert len(ep._call_guard.memory) == known


def test_a_weight_behind_an_offset_whose_memory_ends_early_is_refused_in_a_known_call() -> None:
    arguments = good_call()
    flat, w1 = torch.randn(1000 + arguments["w1"].numel()), arguments["w1"]
    arguments["w1"] = flat[1000:].view(w1.shape)
    with ExpertParallel(backend="reference") as ep:
        ep.moe(**arguments)
        flat.untyped_storage().resize_(w1.nbytes)
        with pytest.raises(ValueError, match=r"memory of w1: got .* bytes, expected at least"):
            ep.moe(**arguments)


def test_weights_of_one_expert_that_lie_otherwise_are_another_call() -> None:
    """PyTorch calls them contiguous, whatever their first stride, by which grouped products are chosen."""
    arguments = good_call(experts=1, held=1, top_k=1)
    with ExpertParallel(backend="reference") as ep:
        ep.moe(**arguments)
        w1 = arguments["w1"]
        ep.moe(**arguments | {"w1": w1.as_strided(w1.shape, (7, *w1.stride()[1:]))})
        assert len(ep._call_guard.memory) == 2


def plan_ids(tokens: int) -> Tensor:
    return torch.arange(TOP_K).repeat(tokens, 1)


def test_a_plan_that_is_changed_in_place_is_looked_at_again() -> None:
    with ExpertParallel(backend="reference") as ep:
        plan, x = planned(ep), torch.randn(TOKENS, HIDDEN)
        expected = ep.dispatch(x, plan)
        values = plan.counts.clone()
        plan.counts.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="counts of plan: got "):
            ep.dispatch(x, plan)
        plan.counts.untyped_storage().resize_(values.nbytes)
        plan.counts.copy_(values)
        assert torch.equal(ep.dispatch(x, plan), expected)
        plan.pair_tokens.resize_(4)
        with pytest.raises(ValueError, match="pair_tokens of plan: got "):
            ep.dispatch(x, plan)
        foreign = replace(planned(ep), rank=1)
        with pytest.raises(ValueError, match="plan: got a plan for rank 1 of 1"):
            ep.dispatch(x, foreign)


class Scaled(Activation):
    """Equal to one of another scale, as a dataclass compares the fields of ``Activation`` alone."""

    def __init__(self, scale: float) -> None:
        super().__init__(name="scaled", gated=True, pointwise=F.silu)
        object.__setattr__(self, "scale", scale)

    def of_gate_and_up(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.scale * super().of_gate_and_up(gate, up)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["moe", "moe_routed"])
def test_an_activation_of_the_caller_s_own_is_asked_in_every_call(name: str) -> None:
    call: dict[str, Any] = good_call() if name == "moe" else good_routed_call()
    with ExpertParallel(backend="reference") as ep:
        once, thrice = [getattr(ep, name)(**call, activation=Scaled(scale)) for scale in (1.0, 3.0)]
        ones = (once, thrice) if name == "moe_routed" else (once.y, thrice.y)
        assert not torch.equal(*ones)
        # It may hold tensors.
        assert len(ep._call_guard.memory) == 0


@pytest.mark.parametrize("field", ["expert_ids", "counts", "packed_of_token"])
def test_a_plan_whose_memory_is_read_as_another_dtype_is_refused(field: str) -> None:
    with ExpertParallel(backend="reference") as ep:
        plan, x = planned(ep), torch.randn(TOKENS, HIDDEN)
        ep.dispatch(x, plan)
        held = getattr(plan, field)
        held.data = held.data.view(torch.float32)
        with pytest.raises(ValueError, match=f"{field} of plan: got torch.float32"):
            ep.dispatch(x, plan)


def test_a_plan_whose_memory_is_read_in_another_order_is_refused() -> None:
    with ExpertParallel(backend="reference") as ep:
        # As many tokens as experts each.
        plan, x = ep.plan(plan_ids(TOP_K), EXPERTS), torch.randn(TOP_K, HIDDEN)
        ep.dispatch(x, plan)
        plan.expert_ids.data = plan.expert_ids.data.mT
        with pytest.raises(ValueError, match="expert_ids of plan: got "):
            ep.dispatch(x, plan)


def test_memory_of_calls_is_bounded_and_dropped_at_close(plan: RoutingPlan) -> None:
    closed, left = Seen(plan).ep, Seen(plan).ep
    for ep in (closed, left):
        for number in range(RECORDS_KEPT + 2):
            ep.plan(plan_ids(1), TOP_K + number)
        assert len(ep._call_guard.memory) == 2
    closed.close()
    left.__exit__(KeyError, KeyError("labels"), None)
    assert [len(ep._call_guard.memory) for ep in (closed, left)] == [0, 0]


@on_ranks(2, pool="cpu_pool")
@pytest.mark.parametrize("check", [False, True])
def test_a_rank_without_tokens_joins_backward_in_known_calls(rank: Rank, check: bool) -> None:
    """Its x need not require a gradient, and gets none."""
    with ExpertParallel(backend="reference", check_collective=check) as ep:
        arguments = good_call(experts=EXPERTS, held=EXPERTS // rank.world_size)
        trained = {key: arguments[key].requires_grad_() for key in ("router_w", "w1", "w2")}
        for _ in range(HOW_MANY):
            x = arguments["x"][: TOKENS * rank.rank].detach().requires_grad_(rank.rank == 1)
            y = ep.moe(**arguments | {"x": x}).y
            grads = torch.autograd.grad(y.sum(), list(trained.values()))
            assert [len(grad) for grad in grads] == [len(weight) for weight in trained.values()]
        assert len(ep._call_guard.memory) == 1


# Python functions that a known call enters, those of the backend left out, in the order of ``CALLS``.
FRAMES = {"moe": 27, "moe_routed": 25, "plan": 19, "dispatch": 22, "combine": 21}


@pytest.mark.parametrize("name", CALLS)
def test_a_known_call_enters_few_functions(name: str, plan: RoutingPlan) -> None:
    """Each takes the host a tenth of a microsecond, before anything is queued on a GPU."""
    seen, arguments = Seen(plan), arguments_of(name, plan)
    seen.quiet = True
    for check in ("check_expert_ids", "check_rows"):
        setattr(seen.ep._backend, check, lambda *_: None)
    assert len(entered(partial(getattr(seen.ep, name), **arguments))) <= FRAMES[name]


def entered(call: Callable[[], object]) -> list[str]:
    """The names of the Python functions that a second ``call`` enters, without the stubs of this file."""
    call()
    names: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename != __file__:
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names
