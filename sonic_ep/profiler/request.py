"""The arguments of a profile: checked, and compared over the ranks."""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.autograd_utils import for_kernels
from sonic_ep.checks import INDEX_DTYPES, ROW_DTYPES, ArgumentChecker, check_experts_divide, check_top_k
from sonic_ep.cost import LinkBandwidth
from sonic_ep.plan import NO_ROW
from sonic_ep.profiler.machine import Machine
from sonic_ep.profiler.record import written
from sonic_ep.profiler.report import ProfileShape
from sonic_ep.profiler.routings import ROUTINGS

GIVEN = "given"
# Of files in the cache; incremented whenever their contents change in meaning.
FORMAT = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class ProfileRequest:
    """What one rank asks for. tokens: T of this rank. routing: a name, or this rank's ids (T, K)."""

    tokens: int
    hidden: int
    top_k: int
    num_experts: int
    dtype: torch.dtype
    routing: str | Tensor
    device: torch.device

    def checked(self, checker: ArgumentChecker) -> ProfileRequest:
        """With ids as kernels read them and a device with its index. Raises ``ValueError`` for a wrong argument."""
        checker.count("tokens", self.tokens, least=0)
        for name in ("hidden", "num_experts"):
            checker.count(name, getattr(self, name))
        check_experts_divide(checker, self.num_experts)
        check_top_k(checker, self.top_k, self.num_experts)
        checker.require(self.dtype in ROW_DTYPES, "dtype", repr(self.dtype), " or ".join(map(str, ROW_DTYPES)))
        return replace(self, routing=self._checked_routing(checker), device=_checked_device(checker, self.device))

    def summary(
        self, ep: ExpertParallel, rounds: int | None, rates: LinkBandwidth | None, machine: Machine
    ) -> RequestSummary:
        """What the other ranks are told."""
        device, routing, digest, gpu = self.device, self.routing, None, None
        if isinstance(routing, Tensor):
            digest = hashlib.sha256(routing.to("cpu", torch.int64).numpy().tobytes()).hexdigest()
            routing = GIVEN
        if device.type == "cuda":
            gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
        alike = {
            **{name: getattr(self, name) for name in ("hidden", "top_k", "num_experts")},
            "dtype": str(self.dtype).removeprefix("torch."),
            "routing": routing,
            "backend": ep.backend,
            "kind of device": device.type,
            "rounds": rounds,
            "rates": rates and asdict(rates),
            **{f"{name} of the config": value for name, value in written(ep.config).items()},
        }
        return RequestSummary(alike=alike, tokens=self.tokens, machine=machine, gpu=gpu, ids=digest)

    def _checked_routing(self, checker: ArgumentChecker) -> str | Tensor:
        ids, held = self.routing, self.num_experts // checker.group.world_size
        if not isinstance(ids, Tensor):
            known = isinstance(ids, str) and ids in ROUTINGS
            checker.require(known, "routing", repr(ids), f"{', '.join(map(repr, ROUTINGS))} or a tensor")
            fits = ids != "one_rank" or self.top_k <= held
            checker.require(fits, "top_k for routing 'one_rank'", self.top_k, f"at most E/W={held}")
            return ids
        # On any device: the ids are copied to where rows live.
        checker.require(ids.device.type != "meta", "device of routing", ids.device, "a device that holds data")
        ids = for_kernels(checker.tensor("routing", ids, INDEX_DTYPES, like=ids))
        checker.shape("routing", ids, (self.tokens, self.top_k), "(T, K)")
        least, most = map(int, ids.aminmax()) if ids.numel() else (0, 0)
        fits = least >= NO_ROW and most < self.num_experts
        checker.require(fits, "expert ids of routing", f"{least} to {most}", f"0 to {self.num_experts - 1}, or -1")
        return ids


def _checked_device(checker: ArgumentChecker, device: object) -> torch.device:
    checker.require(isinstance(device, torch.device), "device", repr(device), "a torch.device, or None")
    assert isinstance(device, torch.device)
    kinds = {"cpu", "cuda"} & (checker.group.device_types() or {"cpu", "cuda"})
    checker.require(device.type in kinds, "device", device, f"one that the group moves: {', '.join(sorted(kinds))}")
    if device.type == "cpu":
        return torch.device("cpu")
    checker.require(torch.cuda.is_available(), "device", device, "the CPU: there is no CUDA device")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


@dataclass(frozen=True, kw_only=True)
class RequestSummary:
    """What one rank tells the others of its request.

    alike: what has to be the same on all ranks. gpu: host and GPU, None on the CPU. ids: a digest of a given routing.
    """

    alike: dict[str, Any]
    tokens: int
    machine: Machine
    gpu: str | None
    ids: str | None


@dataclass(frozen=True, kw_only=True)
class GroupRequest:
    """The summaries of all ranks, in rank order; the same on each of them."""

    summaries: tuple[RequestSummary, ...]

    @property
    def shape(self) -> ProfileShape:
        """T of each rank, and what is alike."""
        alike = self.summaries[0].alike
        sizes = {name: alike[name] for name in ("hidden", "top_k", "num_experts", "dtype", "routing")}
        return ProfileShape(tokens=tuple(summary.tokens for summary in self.summaries), **sizes)

    @property
    def ranks_per_gpu(self) -> int | None:
        """How many ranks share the GPU that most of them share; None on the CPU."""
        return max(Counter(each.gpu for each in self.summaries if each.gpu is not None).values(), default=None)

    def key(self, process_group: str | None) -> dict[str, Any]:
        """All that a profile depends on, as JSON. Of the GPUs only how many ranks share one."""
        ranks = [asdict(replace(summary, gpu=None)) for summary in self.summaries]
        return {"format": FORMAT, "ranks_per_gpu": self.ranks_per_gpu, "process_group": process_group, "ranks": ranks}
