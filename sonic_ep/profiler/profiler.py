"""NetworkProfiler: the fastest pair of modes for a shape and a routing, measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.backend import choose_backend
from sonic_ep.ceilings import ROUNDS, ROUNDS_OF_SHARED_GPUS, measured_ceilings
from sonic_ep.checks import ArgumentChecker
from sonic_ep.config import AUTO
from sonic_ep.cost import LinkCeilings
from sonic_ep.errors import ClosedError
from sonic_ep.machine import Machine, this_machine
from sonic_ep.profiler.agreement import gathered, in_step, require_alike
from sonic_ep.profiler.cache import DEFAULT_FOLDER, Cache
from sonic_ep.profiler.choice import config_of, link_loads, mode_times, origin_now, require_answer
from sonic_ep.profiler.measuring import FEWEST_ROUNDS, MOST_BYTES_OF_GRAPHS, Stage
from sonic_ep.profiler.problem import REFERENCE, Answers, Drawn, Inputs, Work, draw_rows, open_lanes, works_of
from sonic_ep.profiler.report import ProfileReport, whole_bytes
from sonic_ep.profiler.request import (
    Offer,
    Request,
    agreed_shape,
    key_of,
    most_ranks_of_a_gpu,
    read_request,
    require_rates,
)
from sonic_ep.profiler.times import EVERY_PAIR, PairTime, ProfileShape, Spread
from sonic_ep.testing.timing import AboveCeilingError, Timing

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What the ranks have measured. rates: of the link; None where there is none to measure."""

    timings: Sequence[Timing]
    answers: Answers
    rates: LinkCeilings | None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all ranks have agreed to profile: the same on each of them."""

    shape: ProfileShape
    offers: tuple[Offer, ...]

    @property
    def ranks_per_gpu(self) -> int | None:
        """How many ranks share a GPU; None on the CPU."""
        return most_ranks_of_a_gpu(self.offers)


class NetworkProfiler:
    """Times all dispatch and combine modes of a group at a caller's shape, and picks the fastest pair.

    ep: gives the group, the backend, the flags, and the modes that are not to be chosen: those of its config that are
        not "auto". It may be used before and afterwards.
    rounds: how often each mode is timed; None for as many as take about 1.5 s, between 3 and 50.
    cache: the folder that keeps profiles, None for none. Rank 0 reads and writes it.
    rates: ceilings of the link that all ranks have measured in this run already, the same on every rank; None: each
        profile measures them. With ``rates`` the cache is neither read nor written: what another run measured may be
        above them, and what this run measures was not held against ceilings of the profile's own.

    Raises ``TypeError`` or ``ValueError`` for wrong arguments: here, a rank raises what is wrong with its own.
    """

    def __init__(
        self,
        ep: ExpertParallel,
        *,
        rounds: int | None = None,
        cache: Path | str | None = DEFAULT_FOLDER,
        rates: LinkCeilings | None = None,
    ) -> None:
        if not isinstance(ep, ExpertParallel):
            raise TypeError(f"NetworkProfiler: ep: got {type(ep).__name__}, expected an ExpertParallel")
        self._ep = ep
        self._checker = ArgumentChecker(group=ep.group)
        if rounds is not None:
            self._checker.count("rounds", rounds)
        fits = cache is None or isinstance(cache, Path | str)
        self._checker.require(fits, "cache", repr(cache), "a Path, or None for no cache")
        require_rates(self._checker, rates)
        self._rounds, self._rates = rounds, rates
        self._cache = None if cache is None or rates is not None else Cache(folder=Path(cache))
        self._machines: dict[torch.device, Machine] = {}

    def profile(
        self,
        *,
        tokens: int,
        hidden: int,
        top_k: int,
        num_experts: int,
        dtype: torch.dtype = torch.bfloat16,
        routing: str | Tensor = "uniform",
        device: torch.device | None = None,
    ) -> ProfileReport:
        """Collective: the times of every mode and every pair at this shape, and the config that follows.

        tokens: T of this rank; differs from rank to rank and may be 0. All else is the same on every rank.
        routing: "uniform", "skewed" (expert j about as likely as 1/(j+1)), "one_rank" (all to the last rank), each
            drawn for this rank; or this rank's own ids (T, K), int32 or int64, -1 for a dropped slot.
        device: where rows live; None for the current CUDA device, or for the CPU where there is none.

        A dispatch is timed up to rows in expert order. A layer runs the same grouped GEMMs whatever the mode: what a
        mode implies for them is how their rows come into that order, which is part of the dispatch that is timed
        (``all_to_all`` writes it as rows arrive, the others gather into it afterwards).

        Rates are those of the busiest rank, the one that most comes to. A rate above the ceiling is refused: that of
        the busiest rank where all ranks receive and send about as much (within 10%), that of the mean over the ranks
        where they do not, because traffic in one direction may be faster than a ceiling that was measured with both
        directions busy.

        Results are held bit for bit against the reference before and after they are timed. These errors are raised on
        every rank: ``ClosedError`` if ``ep`` is closed on any, ``ValueError`` for wrong arguments and for ranks that
        disagree, ``WrongResultError`` for a wrong result, ``AboveCeilingError`` for a rate that the link cannot have
        carried, ``RuntimeError`` for what goes wrong between the primitives: drawing, capturing, checking, judging, and
        what ``ep`` has flagged before. A rank that fails inside a primitive or in measuring the link (out of memory,
        say) raises alone, and the timeout of the process group, or the fast backend's own, ends the wait of the others.
        """
        group = self._ep.group
        # Nothing is exchanged by it.
        in_step(group, self._ep.check, expected=ClosedError, raised=ClosedError)

        def read() -> tuple[Request, Offer]:
            request = read_request(
                self._checker,
                tokens=tokens,
                hidden=hidden,
                top_k=top_k,
                num_experts=num_experts,
                dtype=dtype,
                routing=routing,
                device=default_device(self._ep) if device is None else device,
            )
            return request, Offer.of(request, self._ep, self._rounds, self._rates, self._machine_of(request.device))

        request, offer = in_step(group, read, expected=ValueError, raised=ValueError)
        setting = self._agreed(gathered(group, offer))
        kept = self._kept(setting)
        return self._measured(request, setting) if kept is None else kept

    def _agreed(self, offers: Sequence[Offer]) -> Setting:
        """What all ranks ask for. Raises ``ValueError`` on every rank if they ask for different things."""
        require_alike(self._ep.group, [offer.alike for offer in offers])
        return Setting(shape=agreed_shape(self._checker, offers), offers=tuple(offers))

    def _machine_of(self, device: torch.device) -> Machine:
        """Asked for once: the driver takes its time to answer."""
        if device not in self._machines:
            self._machines[device] = this_machine(device)
        return self._machines[device]

    def _kept(self, setting: Setting) -> ProfileReport | None:
        """The profile that rank 0 finds in the cache, on every rank."""
        found = None
        if self._cache is not None and self._ep.rank == 0:
            config, backend = self._ep.config, self._ep.backend
            require = partial(require_answer, shape=setting.shape, backend=backend, config=config)
            found = self._cache.read(self._key(setting), require)
        kept = gathered(self._ep.group, found)[0]
        return None if kept is None else replace(kept, from_cache=True)

    def _key(self, setting: Setting) -> dict[str, Any]:
        return key_of(setting.offers, self._ep.config, self._process_group())

    def _measured(self, request: Request, setting: Setting) -> ProfileReport:
        group, on_gpu = self._ep.group, request.device.type == "cuda"
        with torch.no_grad(), torch.cuda.device(request.device) if on_gpu else nullcontext():
            measured = self._run(request, setting)

        def judge() -> ProfileReport | None:
            return None if group.rank else self._judged(setting, measured)

        judged = in_step(group, judge, expected=AboveCeilingError, raised=AboveCeilingError)
        report = gathered(group, judged)[0]
        assert report is not None
        if self._cache is not None and self._ep.rank == 0:
            self._cache.write(self._key(setting), report)
        return report

    def _run(self, request: Request, setting: Setting) -> Measured:
        """Collective: draw, prove, time, prove again."""
        group, shape, device = self._ep.group, setting.shape, request.device
        rates = self._rates or self._measured_rates(setting, device)
        drawn = self._drawn(lambda: Drawn.of(request.draw_ids(group.rank, group.world_size), shape, group.rank))
        with open_lanes(self._ep, self._ep.backend, self._ep.config, shape.max_tokens) as lanes:
            plan = lanes.first.plan(drawn.ids_TK, shape.num_experts)
            rows_RH = self._drawn(lambda: draw_rows(plan, shape))
            inputs = Inputs(drawn=drawn, num_experts=shape.num_experts, plan=plan, rows_RH=rows_RH)
            exact = replace(self._ep.config, cpu_sync_on_runtime=True)
            with open_lanes(self._ep, REFERENCE, exact, shape.max_tokens) as right:
                answers = Answers.of(inputs, right)
            works = works_of(lanes, answers).all
            # Interpreted kernels take seconds a round.
            interpreted = self._ep.backend != REFERENCE and device.type == "cpu"
            fewest = 1 if interpreted else FEWEST_ROUNDS
            # A read on the host cannot be captured, and the reference reads everywhere.
            fits = rows_RH.nbytes <= MOST_BYTES_OF_GRAPHS and not self._ep.config.cpu_sync_on_runtime
            as_graphs = device.type == "cuda" and self._ep.backend != REFERENCE and fits
            stage = Stage(lane=lanes.first, device=device, fewest_rounds=fewest, as_graphs=as_graphs)
            timings = self._timed(stage, works, inputs)
        return Measured(timings=timings, answers=answers, rates=rates)

    def _drawn(self, draw: Callable[[], ValueT]) -> ValueT:
        """Collective. What ``draw`` gives; a rank without memory for it is an error on every rank."""
        return in_step(self._ep.group, draw, expected=RuntimeError, raised=RuntimeError)

    def _measured_rates(self, setting: Setting, device: torch.device) -> LinkCeilings | None:
        shared = (setting.ranks_per_gpu or 1) > 1
        rounds = ROUNDS_OF_SHARED_GPUS if shared else ROUNDS
        return measured_ceilings(self._ep.group, device, rounds=rounds)

    def _timed(self, stage: Stage, works: Sequence[Work], inputs: Inputs) -> list[Timing]:
        """Right first, then timed, then right still."""
        stage.prove(works, inputs)
        timings = stage.time(works, inputs, rounds=self._rounds)
        stage.prove_last(works)
        return timings

    def _judged(self, setting: Setting, measured: Measured) -> ProfileReport:
        """What is made of the numbers. Raises ``AboveCeilingError`` if a rate is above its ceiling."""
        rates, shape = measured.rates, setting.shape
        loads = link_loads(shape, self._ep.backend, measured.answers.counts(shape.tokens))
        of_modes, of_pairs = measured.timings[: len(loads)], measured.timings[len(loads) :]
        pairs = tuple(
            PairTime(dispatch=dispatch, combine=combine, spread=Spread.of(timing))
            for (dispatch, combine), timing in zip(EVERY_PAIR, of_pairs, strict=True)
        )
        return ProfileReport(
            config=config_of(pairs, self._ep.config, shape),
            modes=mode_times(of_modes, loads, rates),
            pairs=pairs,
            shape=shape,
            machine=setting.offers[0].machine,
            rates=None if rates is None else whole_bytes(rates),
            backend=self._ep.backend,
            ranks_per_gpu=setting.ranks_per_gpu,
            origin=origin_now(self._process_group()),
        )

    def _process_group(self) -> str | None:
        group = self._ep.group.process_group
        return None if group is None else str(dist.get_backend(group))


def default_device(ep: ExpertParallel) -> torch.device:
    """Where the backend of ``ep`` runs here: the current CUDA device, or the CPU."""
    # "auto" passes the fast backend over where its kernels are interpreted, and nowhere else.
    interpreted = ep.backend != REFERENCE and choose_backend(AUTO, ep.group).name == REFERENCE
    if interpreted or not torch.cuda.is_available():
        return torch.device("cpu")
    movable = ep.group.device_types()
    if movable is not None and "cuda" not in movable:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
