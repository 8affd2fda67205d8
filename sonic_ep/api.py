"""The public API: check the arguments, call the backend. No arithmetic."""

from __future__ import annotations

import logging
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sonic_ep import ops
from sonic_ep.activation import Activation
from sonic_ep.autograd_utils import runs_eagerly
from sonic_ep.backend import MoEOutput as MoEOutput
from sonic_ep.backend import RoutedOutput, Slots, choose_backend
from sonic_ep.call_checks import CallChecks
from sonic_ep.call_guard import CallGuard
from sonic_ep.call_memory import CallRecord
from sonic_ep.checks import ArgumentChecker
from sonic_ep.config import AUTO, EPConfig, RouterConfig, ScoreOrder
from sonic_ep.distributed.collectives import BoundedCollectives
from sonic_ep.distributed.group import EPGroup, Group, resolve_group
from sonic_ep.distributed.max_tokens import max_tokens_of
from sonic_ep.plan import RoutingPlan

logger = logging.getLogger("sonic_ep")


class ExpertParallel:
    """The experts of a group of ranks. Every method that moves data is collective and may raise ``PeerError``.

    group: a ``ProcessGroup``, a 1-D ``DeviceMesh``, or None for the world (one rank if there is no process group).
        ``.mesh`` is that mesh, else None.
    backend: "reference", "fast", or "auto" for the fastest that runs here. ``.backend`` and ``.why`` report the choice.
    config: modes and flags, the same on every rank.
    max_tokens_per_rank: C, the most tokens of any rank in any call, the same on every rank. None: no limit; ranks agree
        in each call on the largest T of that call, on the host, before anything is sent, and shared memory grows with
        it. In a captured graph C is the largest of the eager calls alike before, and more tokens raise ``ValueError``.
    timeout: seconds to wait for another rank before raising ``PeerTimeoutError``, which names it and says whether its
        process is alive, where that can be known. None: the timeout of the process group. A process of the same machine
        that has died is found within seconds where the host waits, and raises ``PeerLostError``.
    check_collective: before each call compare its arguments across ranks and name those that differ, at the price of
        two exchanges on the host. Without it a difference still raises, but is not named.

    Ranks create the same objects in the same order, and call them one call at a time, in the process that created
    them. An error on one rank, once a call has begun, ends the object: later calls raise ``ClosedError``. A context
    manager: leaving it calls ``close()``. Warns if it is garbage-collected without ``close()`` while it holds memory.

    Raises ``ValueError`` for wrong arguments and ``BackendUnavailableError``, with every reason, if ``backend`` cannot
    run here.
    """

    def __init__(
        self,
        group: Group | EPGroup = None,
        backend: str = AUTO,
        config: EPConfig | None = None,
        max_tokens_per_rank: int | None = None,
        timeout: float | None = None,
        check_collective: bool = False,
    ) -> None:
        self.group = resolve_group(group)
        self.mesh = group if isinstance(group, DeviceMesh) else None
        self._checker = ArgumentChecker(group=self.group)
        config = EPConfig() if config is None else config
        self.config = self._checker.instance("config", config, EPConfig, "an EPConfig")
        if max_tokens_per_rank is not None:
            self._checker.count("max_tokens_per_rank", max_tokens_per_rank)
        if timeout is not None:
            self._checker.seconds("timeout", timeout)
        self._checker.flag("check_collective", check_collective)
        choice = choose_backend(backend, self.group)
        self.backend, self.why = choice.name, choice.why
        self._collectives = BoundedCollectives(self.group, None if timeout is None else float(timeout))
        self.max_tokens_per_rank = max_tokens_per_rank
        self._max_tokens = max_tokens_of(self._collectives, max_tokens_per_rank)
        self._backend = choice.module.create(self._collectives, self.config)
        common = {"backend": self.backend, "config": self.config, "max_tokens_per_rank": max_tokens_per_rank}
        self._call_guard = CallGuard(self._collectives, self._backend, common, check=check_collective)
        self._checks = CallChecks(self._checker, self._backend, self._max_tokens, self._call_guard.memory)
        self.operator_name = ops.register(self)
        if self.group.rank == 0:
            logger.info("backend=%s, %d ranks (%s)", self.backend, self.group.world_size, self.why)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(value, 'value', value)!r}" for name, value in vars(self.config).items())
        known = {"backend": self.backend, "rank": self.rank, "world_size": self.world_size}
        known["max_tokens_per_rank"] = self.max_tokens_per_rank
        shown = ", ".join(f"{name}={value!r}" for name, value in known.items())
        guard = self._call_guard
        why = "closed" if guard.closed else "ended by an error" if guard.ended else "made in another process"
        return f"ExpertParallel({shown}, config=EPConfig({settings})){'' if self.usable else f' ({why})'}"

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return self.group.rank

    @property
    def world_size(self) -> int:
        """W, the number of ranks in the group."""
        return self.group.world_size

    @property
    def usable(self) -> bool:
        """Whether calls may follow: neither ``close`` nor an error has ended it, and it is of this process."""
        return self._call_guard.admits

    @property
    def steps(self) -> int:
        """How many collective calls have begun on this rank: the number of the last step, which errors name."""
        return self._call_guard.calls

    def release_with_last_user(self) -> None:
        """From now on it may be freed without ``close()``: it warns of nothing, and graphs keep what backward needs."""
        self._call_guard.release_with_owner()

    @ops.by_operator(ops.moe)
    def moe(
        self,
        x: Tensor,
        router_w: Tensor,
        w1: Tensor | tuple[Tensor, Tensor],
        w2: Tensor,
        top_k: int,
        b1: Tensor | tuple[Tensor, Tensor] | None = None,
        b2: Tensor | None = None,
        activation: str | Activation = "swiglu",
        gate_layout: str = "interleaved",
        score_order: ScoreOrder | str = ScoreOrder.TOPK_THEN_SOFTMAX,
        norm_topk_probs: bool = False,
        reduce_router_grad: bool = True,
        router: RouterConfig | None = None,
        router_b: Tensor | None = None,
        correction_bias: Tensor | None = None,
    ) -> tuple[MoEOutput, Tensor]:
        """Route each token to ``top_k`` of E experts, apply them, and return the weighted sums. Collective.

        x (T, H) or (..., H), bf16, fp16 or fp32; T differs from rank to rank and may be 0.
        router_w (E, H), as x or fp32, the same on every rank. w1 (e, 2I, H) for gated activations, else (e, I, H);
        w2 (e, H, I); b1 (e, 2I or I) and b2 (e, H), both or neither: this rank's experts, in the dtype of x. Under
        autocast they may be fp32 and are cast to the dtype of x. Weights of any strides are read as they lie: pass
        those stored as (e, H, 2I) and (e, I, H) as ``w.transpose(1, 2)``. DTensors are ``Shard(0)`` on this group.
        gate_layout: rows of w1 alternate gate and up ("interleaved"), or all gates come first ("concat"). Or w1 is
        split: ``w1=(gate, up)``, each (e, I, H), and ``b1=(gate, up)``, each (e, I).
        activation: "swiglu", "geglu", "reglu", "silu", "gelu", "relu", "relu_sq", a ``Swiglu`` with numbers of its own,
        or, on backend "reference", any ``Activation``.
        router: how experts are chosen and scored, see ``RouterConfig``; score_order and norm_topk_probs abbreviate one
        with these two fields, and come without it. Scores and the returned logits are fp32.
        router_b (E,), as x or fp32: added to the logits. correction_bias (E,) fp32, requiring no gradient: added to
        what experts are chosen by, not to scores. Both the same on every rank.

        Gradients of expert weights and biases are sums over all tokens of the group, undivided; so are those of
        router_w and router_b unless ``reduce_router_grad`` is False. Each of x, w1, w2, router_w and router_b requires
        a gradient on every rank or on none. Ranks compare x (without tokens it counts as requiring one if a weight
        does), w1, and router_w and router_b where their gradients are summed. Wrong arguments raise ``ValueError`` or
        ``TypeError`` before any communication.
        """
        with self._call_guard.one():
            of_router, of_experts = (router_w, router_b, correction_bias), (w1, w2, b1, b2)
            options = (router, score_order, norm_topk_probs, top_k, reduce_router_grad)
            call = self._checks.moe(x, of_router, of_experts, (activation, gate_layout, *options))
            record, x_TH = call.record, call.x_TH
            self._call_guard.begin(record)
            max_tokens = self._max_tokens.agree(x_TH)
            assert record.options is not None
            routing = self._backend.route(x_TH, call.router, record.options, max_tokens, record)
            idx_TK, scores_TK, staged = routing.topk_idx, routing.topk_scores, routing.staged
            slots = Slots(topk_idx=idx_TK, topk_scores=scores_TK, max_tokens=max_tokens, distinct=True, staged=staged)
            out = self._backend.layer(x_TH, slots, call.experts, x.shape, record)
            return MoEOutput(out.y, routing.logits, out.counts, idx_TK, scores_TK), out.expert_ids

    @overload
    def moe_routed(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_scores: Tensor,
        w1: Tensor | tuple[Tensor, Tensor],
        w2: Tensor,
        b1: Tensor | tuple[Tensor, Tensor] | None = None,
        b2: Tensor | None = None,
        activation: str | Activation = "swiglu",
        gate_layout: str = "interleaved",
        return_routing: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def moe_routed(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_scores: Tensor,
        w1: Tensor | tuple[Tensor, Tensor],
        w2: Tensor,
        b1: Tensor | tuple[Tensor, Tensor] | None = None,
        b2: Tensor | None = None,
        activation: str | Activation = "swiglu",
        gate_layout: str = "interleaved",
        *,
        return_routing: Literal[True],
    ) -> RoutedOutput: ...

    @ops.by_operator(ops.moe_routed)
    def moe_routed(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_scores: Tensor,
        w1: Tensor | tuple[Tensor, Tensor],
        w2: Tensor,
        b1: Tensor | tuple[Tensor, Tensor] | None = None,
        b2: Tensor | None = None,
        activation: str | Activation = "swiglu",
        gate_layout: str = "interleaved",
        return_routing: bool = False,
    ) -> tuple[Tensor | RoutedOutput, Tensor]:
        """``moe`` with the caller's routing: the weighted sums, shape and dtype of x. Collective.

        return_routing: return them in a ``RoutedOutput``, with the routing.

        topk_idx (T, K), int32 or int64: experts 0..E-1 with E = W*e; -1 drops the slot; an expert may appear twice.
        topk_scores (T, K), any float, used in fp32, differentiable. Scores of dropped slots are not read.
        """
        with self._call_guard.one():
            of_experts, options = (w1, w2, b1, b2), (activation, gate_layout, return_routing)
            call = self._checks.moe_routed(x, (topk_idx, topk_scores), of_experts, options)
            record, idx_TK, scores_TK = call.record, call.topk_idx, call.topk_scores
            self._call_guard.begin(record)
            max_tokens = self._max_tokens.agree(idx_TK)
            slots = Slots(topk_idx=idx_TK, topk_scores=scores_TK, max_tokens=max_tokens, distinct=False)
            out = self._backend.layer(call.x_TH, slots, call.experts, x.shape, record)
            if not return_routing:
                return out.y, out.expert_ids
            return RoutedOutput(out.y, out.counts, idx_TK, scores_TK), out.expert_ids

    @ops.by_operator(ops.plan)
    def plan(self, topk_idx: Tensor, num_experts: int) -> tuple[RoutingPlan, Tensor]:
        """The plan of ``topk_idx`` (T, K), as in ``moe_routed``, over E experts; may be used often. Collective."""
        with self._call_guard.one():
            record, idx_TK = self._checks.plan(topk_idx, num_experts)
            step = self._call_guard.begin(record)
            plan = self._backend.plan(
                idx_TK,
                num_experts=num_experts,
                max_tokens=self._max_tokens.agree(idx_TK),
                distinct=False,
                record=record,
                step=step.number,
                object_number=self._collectives.object_number,
            )
            return plan, plan.expert_ids

    @ops.by_operator(ops.dispatch)
    def dispatch(self, x: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
        """Rows (R, H) of x (T, H) or (..., H), by expert, source rank, token, k. Collective, differentiable in x.

        Expert i has ``plan.tokens_per_expert[i]`` rows, which end at ``plan.group_ends[i]``. Rows past the last end are
        unspecified: do not read them.
        """
        with self._call_guard.one():
            record, form, x_TH = self._checks.dispatch(x, plan)
            self._call_guard.begin(record, form.identity)
            return self._backend.dispatch(x_TH, plan, record), plan.expert_ids

    @ops.by_operator(ops.combine)
    def combine(self, rows: Tensor, topk_scores: Tensor, plan: RoutingPlan) -> tuple[Tensor, Tensor]:
        """(T, H), dtype of rows: each token's sum over k of score * row. Collective, differentiable in rows and scores.

        rows (N, H) in the order of ``dispatch``. N is from ``plan.rows()``, the number of valid rows, to R; other rows
        are not read. Fewer raise ``MissingRowsError``, a ``ValueError``; on "fast" without ``cpu_sync_on_runtime``
        ``check()`` raises it or, ending the object, a later call of this rank, and tokens that lack a row are NaN.
        topk_scores (T, K): as in ``moe_routed``.
        """
        with self._call_guard.one():
            record, form, rows_NH, scores_TK = self._checks.combine(rows, topk_scores, plan)
            self._call_guard.begin(record, form.identity)
            return self._backend.combine(rows_NH, scores_TK, plan, record), plan.expert_ids

    @runs_eagerly
    def agree(self, number: int, device: torch.device) -> int:
        """Rank 0's ``number``, on every rank. Collective; travels over ``device`` if the group moves its tensors."""
        with self._call_guard.one():
            self._checker.whole("number", number)
            device = self._checker.device("device", device)
            self._call_guard.begin(CallRecord(facts=(("call", "agree"),)))
            return self._collectives.numbers(number, device)[0]

    @runs_eagerly
    def meet(self, device: torch.device) -> None:
        """Collective. A barrier, to begin timing with: on the current stream of ``device``, on the host for the CPU."""
        with self._call_guard.one():
            device = self._checker.device("device", device)
            self._checker.transportable("device", device)
            self._call_guard.begin(CallRecord(facts=(("call", "meet"),)))
            self._backend.meet(device)

    @runs_eagerly
    def check(self) -> None:
        """Collective. Raise, on every rank, the errors that devices have flagged since the last check.

        ``ValueError``: expert ids out of range. ``RowOverflowError``: more rows than ``max_rows``. ``PeerError``: a
        kernel's wait for another rank failed.
        """
        with self._call_guard.one(begun=True):
            self._backend.check()

    @runs_eagerly
    def close(self) -> None:
        """Free shared memory, then raise what ``check`` would. Later calls raise ``ClosedError``; may be called twice.

        Not collective: waits for this rank's kernels and for no other rank. Each rank closes after its last backward.
        """
        if self._call_guard.closed:
            return
        try:
            if not self._call_guard.ended:
                self.check()
        except BaseException:
            # Releasing memory of a lost GPU may raise too: the first error says more.
            with suppress(RuntimeError):
                self._call_guard.close()
            raise
        self._call_guard.close()
        self._max_tokens.close()

    def __enter__(self) -> ExpertParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the caller has to see that one, not another from close().
        if error is None:
            self.close()
        else:
            self._call_guard.leave(error)

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertParallel:
        """Itself: copies of a module (such as an EMA) share the group and its memory."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("an ExpertParallel belongs to its process and cannot be pickled; save a module's state_dict()")


def moe(
    x: Tensor,
    router_w: Tensor,
    w1: Tensor | tuple[Tensor, Tensor],
    w2: Tensor,
    top_k: int,
    *,
    ep: ExpertParallel | None = None,
    group: Group = None,
    backend: str = AUTO,
    config: EPConfig | None = None,
    **options: object,
) -> MoEOutput:
    """``ep.moe``; without ``ep``, of a new ``ExpertParallel(group, backend, config)``. options: of ``ep.moe``."""
    if ep is not None:
        if group is not None or config is not None or backend != AUTO:
            raise ValueError("moe: got ep together with group, backend or config, expected one or the other")
        if not isinstance(ep, ExpertParallel):
            raise TypeError(f"moe: ep: got {type(ep).__name__}, expected an ExpertParallel")
        return ep.moe(x, router_w, w1, w2, top_k, **options)  # type: ignore[arg-type]
    return _moe_once((group, backend, config), x, router_w, w1, w2, top_k, **options)


@runs_eagerly
def _moe_once(of_ep: tuple[Any, ...], *given: object, **options: object) -> MoEOutput:
    for_once = ExpertParallel(*of_ep)
    try:
        out = for_once.moe(*given, **options)  # type: ignore[arg-type]
        if for_once.config.max_rows is not None:
            # An overflow would otherwise be raised by a later call, and there is none.
            for_once.check()
        return out
    finally:
        for_once._call_guard.detach()
