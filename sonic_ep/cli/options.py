"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace

import torch

from sonic_ep.backend import BACKEND_PACKAGES
from sonic_ep.config import AUTO, CombineMode, DispatchMode, EPConfig

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True, kw_only=True)
class Thiek:
    """A shape of a layer: T over the whole group, H, I, E, K. The checks raise ``ValueError``."""

    tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int

    def __str__(self) -> str:
        return ",".join(map(str, astuple(self)))

    def tokens_of_ranks(self, world_size: int) -> tuple[int, ...]:
        """T of each rank, divided as evenly as possible."""
        share, rest = divmod(self.tokens, world_size)
        return tuple(share + (rank < rest) for rank in range(world_size))

    def require_experts_divide(self, world_size: int) -> None:
        """Raise unless W divides E."""
        _require_multiple("E", self.num_experts, world_size)

    def require_tokens_divide(self, world_size: int) -> None:
        """Raise unless W divides T."""
        _require_multiple("T", self.tokens, world_size)

    def of_rank(self, world_size: int) -> Thiek:
        """The same with T of one rank. Raises unless W divides E and T."""
        self.require_experts_divide(world_size)
        self.require_tokens_divide(world_size)
        return replace(self, tokens=self.tokens // world_size)

    def require_fits_one_rank(self, world_size: int, routing: str) -> None:
        """Raise if ``routing`` is "one_rank" and a rank has fewer than K experts."""
        held = self.num_experts // world_size
        if routing == "one_rank" and self.top_k > held:
            expected = f"at most the {held} experts of a rank for one_rank"
            raise ValueError(f"--thiek: got K={self.top_k}, expected {expected}")


def _require_multiple(letter: str, number: int, world_size: int) -> None:
    if number % world_size:
        raise ValueError(f"--thiek: got {letter}={number}, expected a multiple of the {world_size} ranks")


def parse_count(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def parse_thiek(text: str) -> Thiek:
    """T,H,I,E,K: five whole numbers of at least 1, T of the whole group."""
    parts = text.split(",")
    if len(parts) != 5:
        raise argparse.ArgumentTypeError(f"got {len(parts)} numbers in {text!r}, expected five: T,H,I,E,K")
    tokens, hidden, intermediate, num_experts, top_k = (parse_count(part.strip()) for part in parts)
    if top_k > num_experts:
        raise argparse.ArgumentTypeError(f"got K={top_k}, expected at most E={num_experts}")
    return Thiek(tokens=tokens, hidden=hidden, intermediate=intermediate, num_experts=num_experts, top_k=top_k)


def spellings(name: str, *more: str) -> tuple[str, ...]:
    """An option with underscores and with dashes, and so each of ``more``.

    >>> spellings("cpu_sync", "CPU_sync")
    ('--cpu_sync', '--cpu-sync', '--CPU_sync', '--CPU-sync')
    """
    spelt = [f"--{spelling}" for option in (name, *more) for spelling in (option, option.replace("_", "-"))]
    return tuple(dict.fromkeys(spelt))


def add_nproc(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """``--nproc N``; None leaves the ranks to torchrun, or is one rank."""
    text = f"ranks to start (default: {default or 1})"
    parser.add_argument("--nproc", type=parse_count, default=default, metavar="N", help=text)


def add_thiek(parser: argparse.ArgumentParser, before: str = "") -> None:
    """``--thiek``. before: in front of its help."""
    text = f"{before}tokens of the whole group, hidden, intermediate, experts, top-k"
    parser.add_argument("--thiek", type=parse_thiek, metavar="T,H,I,E,K", help=text)


def add_call(parser: argparse.ArgumentParser, routings: tuple[str, ...]) -> None:
    """Shape, dtype, routing and backend."""
    add_thiek(parser)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of tokens and weights")
    parser.add_argument("--routing", choices=routings, default="uniform", help="how experts are chosen")
    parser.add_argument("--backend", choices=(AUTO, *BACKEND_PACKAGES), default=AUTO, help="which one is timed")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Modes, of which those that are not "auto" stay, and flags."""
    for name, modes in (("dispatch_mode", DispatchMode), ("combine_mode", CombineMode)):
        choices = (AUTO, *(mode.value for mode in modes))
        parser.add_argument(*spellings(name), choices=choices, default=AUTO, help="auto: the fastest here")
    text = "save x instead of the received rows, and dispatch it again in backward"
    parser.add_argument(*spellings("redispatch_x_in_backward"), action="store_true", help=text)
    text = "size row buffers exactly, at the price of one host read a forward"
    parser.add_argument(*spellings("cpu_sync_on_runtime", "CPU_sync_on_runtime"), action="store_true", help=text)


def config_of(options: argparse.Namespace) -> EPConfig:
    """The config of the options of ``add_config``."""
    flags = (options.redispatch_x_in_backward, options.cpu_sync_on_runtime)
    return EPConfig(options.dispatch_mode, options.combine_mode, *flags)
