"""What a caller asks to have profiled: checked, and compared over the ranks."""

from __future__ import annotations

import hashlib
import socket
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.autograd_utils import for_kernels
from sonic_ep.checks import INDEX_DTYPES, ROW_DTYPES, ArgumentChecker, check_experts_divide
from sonic_ep.config import EPConfig
from sonic_ep.cost import LinkCeilings
from sonic_ep.machine import Machine
from sonic_ep.plan import NO_ROW
from sonic_ep.profiler.report import config_as_json
from sonic_ep.profiler.times import ProfileShape
from sonic_ep.testing.cases import Case, Chooser, one_rank, skewed, uniform

ROUTINGS: Mapping[str, Chooser] = MappingProxyType({"uniform": uniform, "skewed": skewed, "one_rank": one_rank})
GIVEN = "given"
SEED = 7919


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
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
        """Experts of this rank's tokens, (T, K) int64, on the device."""
        if self.given_TK is not None:
            return self.given_TK.to(self.device, torch.int64).contiguous()
        generator = torch.Generator().manual_seed(SEED + rank)
        case = Case(name=self.routing, num_experts=self.num_experts, top_k=self.top_k)
        return ROUTINGS[self.routing](generator, self.tokens, case, world_size).to(self.device)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What one rank tells the others before anything is drawn.

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
        request: Request, ep: ExpertParallel, rounds: int | None, rates: LinkCeilings | None, machine: Machine
    ) -> Offer:
        """What this rank tells."""
        alike = {
            "hidden": request.hidden,
            "top_k": request.top_k,
            "num_experts": request.num_experts,
            "dtype": _name(request.dtype),
            "routing": request.routing,
            "backend": ep.backend,
            "kind of device": request.device.type,
            "rounds": rounds,
            "rates": None if rates is None else asdict(rates),
            **{f"{name} of the config": value for name, value in config_as_json(ep.config).items()},
        }
        return Offer(
            alike=alike,
            tokens=request.tokens,
            machine=machine,
            gpu=_gpu(request.device),
            ids=None if request.given_TK is None else _digest(request.given_TK),
        )


def read_request(
    checker: ArgumentChecker,
    *,
    tokens: object,
    hidden: object,
    top_k: object,
    num_experts: object,
    dtype: object,
    routing: object,
    device: object,
) -> Request:
    """The request, each argument checked. Raises ``ValueError`` with what was got and what is expected."""
    sizes = {"hidden": hidden, "top_k": top_k, "num_experts": num_experts}
    counts = {"tokens": _count(checker, "tokens", tokens, least=0)}
    counts |= {name: _count(checker, name, size, least=1) for name, size in sizes.items()}
    check_experts_divide(checker, counts["num_experts"])
    checker.require(counts["top_k"] <= counts["num_experts"], "top_k", top_k, f"at most E={num_experts}")
    checker.require(dtype in ROW_DTYPES, "dtype", dtype, " or ".join(map(str, ROW_DTYPES)))
    assert isinstance(dtype, torch.dtype)
    given_TK = _read_routing(checker, routing, (counts["tokens"], counts["top_k"]), counts["num_experts"])
    return Request(
        **counts,
        dtype=dtype,
        routing=routing if isinstance(routing, str) else GIVEN,
        given_TK=given_TK,
        device=_read_device(checker, device),
    )


def _count(checker: ArgumentChecker, name: str, value: object, *, least: int) -> int:
    checker.count(name, value, least=least)
    assert isinstance(value, int)
    return value


def _read_device(checker: ArgumentChecker, device: object) -> torch.device:
    """With the index that tensors there have."""
    checker.require(isinstance(device, torch.device), "device", repr(device), "a torch.device, or None")
    assert isinstance(device, torch.device)
    movable = checker.group.device_types()
    kinds = {"cpu", "cuda"} if movable is None else {"cpu", "cuda"} & movable
    checker.require(device.type in kinds, "device", device, f"one that the group moves: {', '.join(sorted(kinds))}")
    if device.type == "cpu":
        return torch.device("cpu")
    checker.require(torch.cuda.is_available(), "device", device, "the CPU: there is no CUDA device")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _read_routing(checker: ArgumentChecker, routing: object, shape: tuple[int, int], num_experts: int) -> Tensor | None:
    """The ids, if ``routing`` is a tensor; None if it is one of the names."""
    if isinstance(routing, Tensor):
        checker.require(routing.device.type != "meta", "device of routing", routing.device, "a device that holds data")
        # On any device: the ids are brought to where rows live.
        routing = checker.tensor("routing", routing, INDEX_DTYPES, like=routing)
        checker.shape("routing", routing, shape, "(T, K)")
        routing = for_kernels(routing)
        least, most = (int(id_) for id_ in routing.aminmax()) if routing.numel() else (0, 0)
        fits = least >= NO_ROW and most < num_experts
        checker.require(fits, "expert ids of routing", f"{least} to {most}", f"0 to {num_experts - 1}, or -1")
        return routing
    names = ", ".join(map(repr, ROUTINGS))
    checker.require(isinstance(routing, str) and routing in ROUTINGS, "routing", repr(routing), f"{names} or a tensor")
    held = num_experts // checker.group.world_size
    if routing == "one_rank":
        checker.require(shape[1] <= held, "top_k for routing 'one_rank'", shape[1], f"at most E/W={held}")
    return None


def require_rates(checker: ArgumentChecker, rates: object) -> None:
    """Ceilings, each a finite rate above 0, or None."""
    if rates is None:
        return
    if not isinstance(rates, LinkCeilings):
        raise TypeError(f"{checker.group}: rates: got {type(rates).__name__}, expected LinkCeilings or None")
    for name, rate in asdict(rates).items():
        number = isinstance(rate, float | int) and not isinstance(rate, bool)
        fits = number and 0 < rate <= sys.float_info.max
        checker.require(fits, f"{name} of rates", repr(rate), "a finite rate above 0, in bytes/s")


def agreed_shape(checker: ArgumentChecker, offers: Sequence[Offer]) -> ProfileShape:
    """The shape of the group from what each rank asks for. Raises ``ValueError`` if there is no token at all."""
    tokens = tuple(offer.tokens for offer in offers)
    checker.require(max(tokens) > 0, "tokens", "none on any rank", "at least one in the group")
    alike = offers[0].alike
    return ProfileShape(
        tokens=tokens,
        hidden=alike["hidden"],
        top_k=alike["top_k"],
        num_experts=alike["num_experts"],
        dtype=alike["dtype"],
        routing=alike["routing"],
    )


def most_ranks_of_a_gpu(offers: Sequence[Offer]) -> int | None:
    """How many ranks share the GPU that most of them share; None on the CPU."""
    gpus = Counter(offer.gpu for offer in offers if offer.gpu is not None)
    return max(gpus.values(), default=None)


def key_of(offers: Sequence[Offer], config: EPConfig, process_group: str | None) -> dict[str, Any]:
    """All that a profile depends on, as JSON."""
    return {
        "machines": [asdict(offer.machine) for offer in offers],
        "ranks_per_gpu": most_ranks_of_a_gpu(offers),
        "process_group": process_group,
        "call": dict(offers[0].alike),
        "config": config_as_json(config),
        "tokens": [offer.tokens for offer in offers],
        "ids": [offer.ids for offer in offers],
    }


def _digest(ids_TK: Tensor) -> str:
    return hashlib.sha256(ids_TK.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()


def _gpu(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
