"""The calls of one ``ExpertParallel``: one at a time, compared across ranks by digest, until closed or failed."""

import sys
import warnings
import weakref
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache, partial

import torch
from torch import Tensor

from sonic_ep.backend import Backend, ExpertWeights, RouterWeights
from sonic_ep.call_memory import CallMemory, CallRecord, Facts
from sonic_ep.compat import STOP_RECOMPUTATION, is_second_backward
from sonic_ep.config import RouterOptions
from sonic_ep.distributed.call_lock import Admission
from sonic_ep.distributed.collectives import BoundedCollectives, differing
from sonic_ep.distributed.sync_tag import Phase, Step, call_digest
from sonic_ep.errors import (
    CollectiveMismatchError,
    MissingRowsError,
    PeerError,
    RecomputeError,
    RowOverflowError,
    SharedMemoryError,
)

DIGESTS_KEPT = 64
# PyTorch has no error type of its own for the memory of a CPU.
CPU_ALLOCATOR = "DefaultCPUAllocator"
# Raised on all ranks alike, as this library's ``ValueError``s are: the object stays usable.
ALIKE = (RowOverflowError, RecomputeError, SharedMemoryError)


class CallGuard:
    """Admits the calls of one object, numbers them, and releases what it holds. memory: of its calls, until ``close``.

    common: facts that are the same on every rank in all calls. check: whether ranks compare the facts of each call.
    """

    def __init__(
        self, collectives: BoundedCollectives, backend: Backend, common: Mapping[str, object], *, check: bool
    ) -> None:
        self._collectives = collectives
        self._common = facts = (*common.items(), ("objects before", collectives.object_number))
        self._check = check
        self._number = 0
        # Calls repeat, and formatting their facts again would be slow.
        self._digest = lru_cache(DIGESTS_KEPT)(lambda own, x: call_digest(repr((*own, *facts)), x_trained=x))
        self._backend = backend
        self.memory = CallMemory()
        collectives.tags_shown = partial(_tags_shown, weakref.ref(backend))
        self._release = weakref.finalize(self, _forgotten, backend, collectives, weakref.ref(self), warns=True)
        # By weak references: graphs hold the lock, and may outlive both.
        collectives.call_lock.after_error(partial(_after_error, weakref.ref(backend), weakref.ref(collectives)))

    @property
    def closed(self) -> bool:
        """Whether ``close`` or ``leave`` has been called."""
        return not self._release.alive

    @property
    def ended(self) -> bool:
        """Whether an error has ended the object, or ``close``."""
        return self._collectives.call_lock.ended is not None

    @property
    def calls(self) -> int:
        """How many calls have begun. The step of the collectives goes back in a backward."""
        return self._number

    @property
    def admits(self) -> bool:
        """Whether calls may follow in this process."""
        return not (self.closed or self.ended) and self._collectives.call_lock.is_of_this_process

    def one(self, *, begun: bool = False) -> Admission:
        """Holds the lock in a call, from its checks to its end. begun: without checks. See ``_after_error``, too."""
        lock = self._collectives.call_lock
        return lock.begun_call if begun else lock.call

    def begin(self, record: CallRecord, plan: tuple[int, ...] = ()) -> Step:
        """Begin the collective part of a call, whose arguments have been checked.

        Its facts, whether backward may ask for the gradient of x, and the identity of the plan that it uses have to be
        equal on every rank. Where calls are compared, raises ``CollectiveMismatchError`` naming the rank and facts.
        """
        self._number += 1
        call = record.digest
        if call is None:
            call = record.digest = self._digest(record.facts, record.x_trained)
        if plan:
            call = call_digest(repr(plan), x_trained=record.x_trained, before=call)
        step = Step(self._number, call)
        if self._check:
            of_plan: Facts = (("plan", plan),) if plan else ()
            of_x = ("x requires a gradient", record.x_trained)
            self._compare(step, (*record.facts, *of_plan, of_x, *self._common))
        self._collectives.begin(step)
        return step

    def close(self) -> None:
        """Give back what is held. Later calls raise. ``ConcurrentCallError`` while a thread is in a call."""
        lock = self._collectives.call_lock
        if not lock.is_of_this_process:
            self._release.detach()
            return
        with lock.last_call:
            if self._release.detach() is not None:
                lock.end("is closed: make a new one")
                self.memory.close()
                self._backend.close()

    def detach(self) -> None:
        """No call will follow; backward keeps what it needs."""
        if self._release.detach() is not None:
            self.memory.close()
            if self._number == 0:
                self._collectives.withdraw()
            self._backend.raise_in_backward()

    def release_with_owner(self) -> None:
        """Freeing the object without ``close()`` is as good: ``detach``, without a warning."""
        if self._release.detach() is not None:
            held = (self._backend, self._collectives, weakref.ref(self))
            self._release = weakref.finalize(self, _forgotten, *held, warns=False)

    def leave(self, error: BaseException) -> None:
        """Close because of ``error``, and report it to ranks that wait for this one."""
        if not self.closed and self._collectives.call_lock.is_of_this_process:
            _report(error, self._backend, self._collectives)
        # Where another thread is in a call, the caller has to see ``error``.
        with suppress(RuntimeError):
            self.close()

    def _compare(self, step: Step, facts: Facts) -> None:
        mine = {name: str(value) for name, value in facts}
        # Under a tag without the digest, which may differ.
        self._collectives.begin(Step(number=step.number))
        by_rank = self._collectives.objects(mine, Phase.CHECK)
        found = {name: differing([others.get(name) for others in by_rank]) for name in mine}
        if any(found.values()):
            # Every rank raises this: the next call may follow.
            self._collectives.call_lock.begun = False
            odd = "; ".join(f"{name}: {values}" for name, values in found.items() if values)
            where = f"{self._collectives.group}: step {step.number}"
            raise CollectiveMismatchError(f"{where}: calls have to be the same on every rank, and differ in {odd}")


def facts_of(x_NH: Tensor, experts: ExpertWeights | None = None) -> dict[str, object]:
    """What has to be the same on every rank of a call with these rows and experts."""
    facts: dict[str, object] = {"H": x_NH.shape[1], "dtype": x_NH.dtype, "device": x_NH.device.type}
    if experts is not None:
        ups = experts.up_weights
        facts["w1"] = tuple(ups[0].shape) if len(ups) == 1 else tuple(tuple(up.shape) for up in ups)
        facts["w1 trained"] = any(up.requires_grad for up in ups)
        facts["biases"], facts["gate_layout"] = experts.b1 is not None, experts.layout.name
        facts["activation"] = experts.activation.identity
    return facts


def facts_of_router(weights: RouterWeights, options: RouterOptions) -> dict[str, object]:
    """What of its router has to be the same on every rank of a call."""
    bias, summed = weights.bias, options.reduce_router_grad
    trained = {"router_w trained": summed and weights.weight.requires_grad}
    trained["router_b trained"] = summed and bias is not None and bias.requires_grad
    given = {"router_b": bias is not None, "correction_bias": weights.correction is not None}
    return {"router": options, **trained, **given}


def _tags_shown(backend: weakref.ref[Backend]) -> Mapping[int, int]:
    held = backend()
    return {} if held is None else held.tags_shown()


def _text_of(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _report(error: BaseException, backend: Backend | None, collectives: BoundedCollectives) -> None:
    """End the object, and report ``error`` to ranks that wait: on the host by the store, in kernels by a tag."""
    if collectives.call_lock.ended is not None:
        return
    text = _text_of(error)
    collectives.call_lock.end(f"has ended: {text}; make a new one after the process group is rebuilt")
    tag = collectives.sync_tag.tag if isinstance(error, CollectiveMismatchError) else 0
    collectives.leave(text, tag)
    # Kernels of other ranks find a mismatch themselves: by this rank's tag, which its own show in all phases but one.
    # On a lost GPU no kernel can run.
    if backend is not None and (not tag or collectives.sync_tag.phase is Phase.TOKENS):
        with suppress(Exception):
            backend.leave(tag)


def _after_error(
    backend: weakref.ref[Backend], collectives: weakref.ref[BoundedCollectives], error: BaseException
) -> None:
    """After a call or a backward: raise what says more than ``error``, and end the object if ranks are out of step.

    The error of a kernel that timed out replaces PyTorch's own; an out-of-memory error gets rank and phase.
    """
    held = collectives()
    if held is None or isinstance(error, STOP_RECOMPUTATION):
        return
    try:
        _raise_clearer(error, backend(), held)
    except RuntimeError as clearer:
        _end_if_out_of_step(clearer, backend(), held)
        raise
    _end_if_out_of_step(error, backend(), held)


def _raise_clearer(error: BaseException, backend: Backend | None, collectives: BoundedCollectives) -> None:
    if not isinstance(error, RuntimeError) or isinstance(error, PeerError):
        return
    if backend is not None:
        backend.explain(error)
    if isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error):
        place = f"{collectives.group}: out of memory in {collectives.sync_tag}"
        raise torch.OutOfMemoryError(f"{place}: {error}") from error


def _end_if_out_of_step(error: BaseException, backend: Backend | None, collectives: BoundedCollectives) -> None:
    # This library's errors begin with the group. Others come from a hook or a recomputed model, on this rank alone.
    own = f"{type(error).__name__}: {collectives.group}"
    refused = isinstance(error, ValueError) and _text_of(error).startswith(own)
    # A later call of this rank raises it, which the others make.
    refused = refused and not isinstance(error, MissingRowsError)
    alike = refused or isinstance(error, ALIKE) or is_second_backward(error)
    if collectives.call_lock.begun and not (collectives.group.world_size == 1 or alike or _capturing()):
        _report(error, backend, collectives)


def _capturing() -> bool:
    """Whether the error is of graph capture, where no kernel has run yet."""
    # A lost GPU raises here, too.
    with suppress(RuntimeError):
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return False


def _forgotten(
    backend: Backend, collectives: BoundedCollectives, guard: weakref.ref[CallGuard], *, warns: bool
) -> None:
    """Keep shared memory while graphs need it; report an uncaught error. warns: that ``close()`` was not called."""
    if not collectives.call_lock.is_of_this_process:
        return
    uncaught = getattr(sys, "last_value", None)
    # ``guard`` is alive only if this runs at exit, not where the object is garbage collected.
    if guard() is not None and isinstance(uncaught, BaseException):
        _report(uncaught, backend, collectives)
    if not warns:
        backend.raise_in_backward()
        backend.detach()
    elif backend.holds_memory():
        message = f"{collectives.group}: this ExpertParallel was not closed: call close(), or use it in a with"
        warnings.warn(message, ResourceWarning, stacklevel=2)
        backend.detach()
