"""The arguments of a profile: checked, and compared over the ranks."""

from __future__ import annotations

import hashlib
import socket
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.config import EPConfig
from sonic_ep.cost import LinkCeilings
from sonic_ep.once import as_kernels_read
from sonic_ep.plan import NO_ROW
from sonic_ep.profiler.machine import Machine
from sonic_ep.profiler.record import written
from sonic_ep.profiler.report import ProfileShape
from sonic_ep.profiler.routings import ROUTINGS
from sonic_ep.validation import INDEX_DTYPES, Edge, check_experts_divide

GIVEN = "given"
SEED = 7919


@dataclass(frozen=True, kw_only=True, eq=False)
class ProfileRequest:
    """What one rank asks for. tokens: T of this rank. given_TK: the caller's own ids, if ``routing`` is "given"."""

    tokens: int
    hidden: int
    top_k: int
    num_experts: int
    dtype: torch.dtype
    routing: str
    given_TK: Tensor | None
    device: torch.device

    def draw_ids(self, rank: int, world_size: int) -> Tensor:
        """Experts of this rank's tokens, (T, K) int64, on the device, in memory of its own."""
        if self.given_TK is not None:
            return self.given_TK.to(self.device, torch.int64, copy=True).contiguous()
        generator = torch.Generator().manual_seed(SEED + rank)
        return ROUTINGS[self.routing](generator, self.tokens, self, world_size).to(self.device)


@dataclass(frozen=True, kw_only=True)
class RequestSummary:
    """What one rank tells the others of its request.

    alike: what has to be the same on all ranks. gpu: host and GPU of the rank, None on the CPU. ids: a digest of the
    routing, if it is given.
    """

    alike: Mapping[str, Any]
    tokens: int
    machine: Machine
    gpu: str | None
    ids: str | None

    @staticmethod
    def of(
        request: ProfileRequest, ep: ExpertParallel, rounds: int | None, rates: LinkCeilings | None, machine: Machine
    ) -> RequestSummary:
        """Of this rank."""
        device, given_TK = request.device, request.given_TK
        alike = {
            **{name: getattr(request, name) for name in ("hidden", "top_k", "num_experts", "routing")},
            "dtype": str(request.dtype).removeprefix("torch."),
            "backend": ep.backend,
            "kind of device": device.type,
            "rounds": rounds,
            "rates": None if rates is None else asdict(rates),
            **{f"{name} of the config": value for name, value in written(ep.config).items()},
        }
        on_gpu = device.type == "cuda"
        gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}" if on_gpu else None
        ids = None if given_TK is None else _digest(given_TK)
        return RequestSummary(alike=alike, tokens=request.tokens, machine=machine, gpu=gpu, ids=ids)


def read_request(
    edge: Edge,
    *,
    tokens: object,
    hidden: object,
    top_k: object,
    num_experts: object,
    dtype: object,
    routing: object,
    device: object,
) -> ProfileRequest:
    """The request, each argument checked. Raises ``ValueError`` with what was got and what is expected."""
    sizes = {"hidden": hidden, "top_k": top_k, "num_experts": num_experts}
    counts = {"tokens": _count(edge, "tokens", tokens, least=0)}
    counts |= {name: _count(edge, name, size, least=1) for name, size in sizes.items()}
    check_experts_divide(edge, counts["num_experts"])
    edge.require(counts["top_k"] <= counts["num_experts"], "top_k", top_k, f"at most E={num_experts}")
    return ProfileRequest(
        **counts,
        dtype=edge.dtype("dtype", dtype),
        routing=routing if isinstance(routing, str) else GIVEN,
        given_TK=_read_routing(edge, routing, (counts["tokens"], counts["top_k"]), counts["num_experts"]),
        device=_read_device(edge, device),
    )


def _count(edge: Edge, name: str, value: object, *, least: int) -> int:
    edge.count(name, value, least=least)
    assert isinstance(value, int)
    return value


def _read_device(edge: Edge, device: object) -> torch.device:
    """With the index that tensors there have."""
    edge.require(isinstance(device, torch.device), "device", repr(device), "a torch.device, or None")
    assert isinstance(device, torch.device)
    movable = edge.group.device_types()
    kinds = {"cpu", "cuda"} if movable is None else {"cpu", "cuda"} & movable
    edge.require(device.type in kinds, "device", device, f"one that the group moves: {', '.join(sorted(kinds))}")
    if device.type == "cpu":
        return torch.device("cpu")
    edge.require(torch.cuda.is_available(), "device", device, "the CPU: there is no CUDA device")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _read_routing(edge: Edge, routing: object, shape: tuple[int, int], num_experts: int) -> Tensor | None:
    """The ids, if ``routing`` is a tensor; None if it is one of the names."""
    if isinstance(routing, Tensor):
        edge.require(routing.device.type != "meta", "device of routing", routing.device, "a device that holds data")
        # On any device: the ids are copied to where rows live.
        routing = edge.tensor("routing", routing, INDEX_DTYPES, like=routing)
        edge.shape("routing", routing, shape, "(T, K)")
        routing = as_kernels_read(routing)
        least, most = (int(id_) for id_ in routing.aminmax()) if routing.numel() else (0, 0)
        fits = least >= NO_ROW and most < num_experts
        edge.require(fits, "expert ids of routing", f"{least} to {most}", f"0 to {num_experts - 1}, or -1")
        return routing
    names = ", ".join(map(repr, ROUTINGS))
    edge.require(isinstance(routing, str) and routing in ROUTINGS, "routing", repr(routing), f"{names} or a tensor")
    held = num_experts // edge.group.world_size
    if routing == "one_rank":
        edge.require(shape[1] <= held, "top_k for routing 'one_rank'", shape[1], f"at most E/W={held}")
    return None


def require_rates(edge: Edge, rates: object) -> None:
    """Ceilings, each a finite rate above 0, or None."""
    if rates is None:
        return
    if not isinstance(rates, LinkCeilings):
        raise TypeError(f"{edge.group}: rates: got {type(rates).__name__}, expected LinkCeilings or None")
    for name, rate in asdict(rates).items():
        number = isinstance(rate, float | int) and not isinstance(rate, bool)
        fits = number and 0 < rate <= sys.float_info.max
        edge.require(fits, f"{name} of rates", repr(rate), "a finite rate above 0, in bytes/s")


def agreed_shape(edge: Edge, summaries: Sequence[RequestSummary]) -> ProfileShape:
    """The shape of the group. Raises ``ValueError`` if there is no token at all."""
    tokens = tuple(summary.tokens for summary in summaries)
    edge.require(max(tokens) > 0, "tokens", "none on any rank", "at least one in the group")
    alike = {name: summaries[0].alike[name] for name in ("hidden", "top_k", "num_experts", "dtype", "routing")}
    return ProfileShape(tokens=tokens, **alike)


def most_ranks_of_a_gpu(summaries: Sequence[RequestSummary]) -> int | None:
    """How many ranks share the GPU that most of them share; None on the CPU."""
    gpus = Counter(summary.gpu for summary in summaries if summary.gpu is not None)
    return max(gpus.values(), default=None)


def key_of(summaries: Sequence[RequestSummary], config: EPConfig, process_group: str | None) -> dict[str, Any]:
    """All that a profile depends on, as JSON."""
    return {
        "machines": [asdict(summary.machine) for summary in summaries],
        "ranks_per_gpu": most_ranks_of_a_gpu(summaries),
        "process_group": process_group,
        "call": dict(summaries[0].alike),
        "config": written(config),
        "tokens": [summary.tokens for summary in summaries],
        "ids": [summary.ids for summary in summaries],
    }


def _digest(ids_TK: Tensor) -> str:
    return hashlib.sha256(ids_TK.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()
