"""NetworkProfiler: the fastest pair of modes for a shape and a routing, measured on this machine."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache as remembered
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sonic_ep.api import ExpertParallel
from sonic_ep.backend import choose_backend
from sonic_ep.checks import ArgumentChecker
from sonic_ep.config import AUTO
from sonic_ep.cost import LinkBandwidth
from sonic_ep.errors import ClosedError
from sonic_ep.profiler.agreement import gathered, in_step, require_alike
from sonic_ep.profiler.bandwidth import ROUNDS, ROUNDS_OF_SHARED_GPUS, measured_bandwidth
from sonic_ep.profiler.cache import DEFAULT_FOLDER, Cache
from sonic_ep.profiler.choice import link_loads, mode_times, pick, require_answer
from sonic_ep.profiler.machine import commit, date_now, this_machine
from sonic_ep.profiler.measuring import Stage
from sonic_ep.profiler.problem import RoutingProblem, Shape, open_lanes, works_of
from sonic_ep.profiler.report import EVERY_PAIR, REFERENCE, Origin, PairTime, ProfileReport, Spread, whole_numbers
from sonic_ep.profiler.request import GroupRequest, ProfileRequest, RequestSummary
from sonic_ep.profiler.timing import AboveCeilingError, RoundTimer, Timing

# Of all timed rounds together. Few, because the start of a training run waits for them.
SECONDS_OF_ROUNDS = 1.5
FEWEST_ROUNDS, MOST_ROUNDS = 3, 50
# Works on rows of at most so many bytes are timed in CUDA graphs.
MOST_BYTES_OF_GRAPHS = 2**28


class NetworkProfiler:
    """Times all dispatch and combine modes of a group at a caller's shape, and picks the fastest pair.

    ep: its group, backend and flags are profiled; modes of its config that are not "auto" stay.
    rounds: how often each mode is timed; None for as many as take about 1.5 s, between 3 and 50.
    cache: the folder that keeps profiles, None for none. Rank 0 reads and writes it.
    rates: bandwidth of the link that was measured in this run already, the same on every rank. None: each profile
        measures it. With ``rates`` the cache is neither read nor written.

    Raises ``TypeError`` or ``ValueError`` for wrong arguments, on the rank that passes them.
    """

    def __init__(
        self,
        ep: ExpertParallel,
        *,
        rounds: int | None = None,
        cache: Path | str | None = DEFAULT_FOLDER,
        rates: LinkBandwidth | None = None,
    ) -> None:
        if not isinstance(ep, ExpertParallel):
            raise TypeError(f"NetworkProfiler: ep: got {type(ep).__name__}, expected an ExpertParallel")
        self._ep, self._rounds, self._rates = ep, rounds, rates
        self._checker = ArgumentChecker(group=ep.group)
        if rounds is not None:
            self._checker.count("rounds", rounds)
        fits = cache is None or isinstance(cache, Path | str)
        self._checker.require(fits, "cache", repr(cache), "a Path, or None for no cache")
        if rates is not None:
            self._check_rates(rates)
        keeps = rates is None and ep.rank == 0
        self._cache = Cache(folder=Path(cache)) if keeps and cache is not None else None
        # The driver takes its time to answer.
        self._machine = remembered(this_machine)

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
        """Collective. The times of every mode and every pair at this shape, and the config that follows.

        tokens: T of this rank; differs from rank to rank and may be 0. All else is the same on every rank.
        routing: "uniform", "skewed" (expert j about as likely as 1/(j+1)), "one_rank" (all to the last rank), each
            drawn for this rank; or this rank's own ids (T, K), int32 or int64, -1 for a dropped slot.
        device: where rows live; None for the current CUDA device, or for the CPU where there is none.

        A dispatch is timed up to rows in expert order. Rates are those of the rank that receives most. Results are
        compared bit for bit with the reference before and after they are timed.

        Raises on every rank: ``ClosedError`` if ``ep`` is closed on any, ``ValueError`` for wrong arguments and for
        ranks that disagree, ``WrongResultError`` for a wrong result, ``AboveCeilingError`` for a rate above the
        ceiling (of the busiest rank where traffic is balanced within 10%, else of the mean rank), ``RuntimeError`` for
        errors between the primitives. A rank that fails inside a primitive raises alone, and the others time out.
        """
        group = self._ep.group
        in_step(group, self._ep.check, ClosedError)

        def checked() -> tuple[ProfileRequest, RequestSummary]:
            place = default_device(self._ep) if device is None else device
            sizes = {"tokens": tokens, "hidden": hidden, "top_k": top_k, "num_experts": num_experts}
            asked = ProfileRequest(**sizes, dtype=dtype, routing=routing, device=place).checked(self._checker)
            return asked, asked.summary(self._ep, self._rounds, self._rates, self._machine(asked.device))

        request, summary = in_step(group, checked, ValueError)
        agreed = GroupRequest(summaries=tuple(gathered(group, summary)))
        require_alike(group, [each.alike for each in agreed.summaries])
        some = max(agreed.shape.tokens) > 0
        self._checker.require(some, "tokens", "none on any rank", "at least one in the group")
        key = agreed.key(self._process_group())
        require = partial(require_answer, shape=agreed.shape, backend=self._ep.backend, config=self._ep.config)
        # None on ranks other than 0.
        cached = self._cache and self._cache.read(key, require)
        if report := gathered(group, cached)[0]:
            return replace(report, from_cache=True)
        report = self._measured(request, agreed)
        if self._cache is not None:
            self._cache.write(key, report)
        return report

    def _check_rates(self, rates: object) -> None:
        rates = self._checker.instance("rates", rates, LinkBandwidth, "LinkBandwidth or None")
        for name, rate in asdict(rates).items():
            number = isinstance(rate, float | int) and not isinstance(rate, bool)
            fits = number and 0 < rate <= sys.float_info.max
            self._checker.require(fits, f"{name} of rates", repr(rate), "a finite rate above 0, in bytes/s")

    def _measured(self, request: ProfileRequest, agreed: GroupRequest) -> ProfileReport:
        """Collective. Rank 0 makes the report of all ranks."""
        group, device, rates = self._ep.group, request.device, self._rates
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if rates is None:
                rounds = ROUNDS_OF_SHARED_GPUS if (agreed.ranks_per_gpu or 1) > 1 else ROUNDS
                rates = measured_bandwidth(group, device, rounds=rounds)
            timings, problem = self._timed(request, agreed)

        def judge() -> ProfileReport | None:
            return None if group.rank else self._judged(agreed, timings, problem, rates)

        report = gathered(group, in_step(group, judge, AboveCeilingError))[0]
        assert report is not None
        return report

    def _timed(self, request: ProfileRequest, agreed: GroupRequest) -> tuple[list[Timing], RoutingProblem]:
        """Collective. Draw inputs, get the reference's results, and time all works."""
        ep, config, device, tokens = self._ep, self._ep.config, request.device, agreed.shape.tokens
        sizes = {name: getattr(request, name) for name in ("tokens", "hidden", "num_experts", "top_k", "dtype")}
        problem = RoutingProblem(
            shape=Shape(**sizes),
            group=ep.group,
            device=device,
            routing=request.routing,
            tokens=tokens,
            config=replace(config, max_rows=None),
        )
        problem.draw()
        with open_lanes(ep, max(tokens)) as lanes:
            # A read on the host cannot be captured, and the reference reads everywhere.
            captures = device.type == "cuda" and ep.backend != REFERENCE and not config.cpu_sync_on_runtime
            timer = RoundTimer(group=ep.group, device=device, barrier=partial(lanes[0].meet, device))
            stage = Stage(timer=timer, as_graphs=captures and problem.rows_RH.nbytes <= MOST_BYTES_OF_GRAPHS)
            works = [stage.launched(work) for work in works_of(problem, lanes)]
            for work in works:
                stage.prove(work)
            # Interpreted kernels take seconds a round.
            fewest = 1 if ep.backend != REFERENCE and device.type == "cpu" else FEWEST_ROUNDS
            fitting = stage.rounds_within(works, SECONDS_OF_ROUNDS, fewest=fewest, most=MOST_ROUNDS)
            results = stage.time(works, rounds=self._rounds or fitting)
            for result in results:
                stage.confirm(result)
            return [result.timing for result in results], problem

    def _judged(
        self, agreed: GroupRequest, timings: list[Timing], problem: RoutingProblem, rates: LinkBandwidth | None
    ) -> ProfileReport:
        """The report. Raises ``AboveCeilingError`` if a rate is above its ceiling."""
        shape, backend = agreed.shape, self._ep.backend
        loads = link_loads(shape, backend, problem.counts)
        pairs = tuple(
            PairTime(dispatch=dispatch, combine=combine, spread=Spread.of(timing))
            for (dispatch, combine), timing in zip(EVERY_PAIR, timings[len(loads) :], strict=True)
        )
        picked = pick(pairs, self._ep.config, shape)
        command = shlex.join([Path(sys.argv[0]).name if sys.argv else "", *sys.argv[1:]])
        return ProfileReport(
            config=replace(self._ep.config, dispatch=picked.dispatch, combine=picked.combine),
            modes=mode_times(timings[: len(loads)], loads, rates),
            pairs=pairs,
            shape=shape,
            machine=agreed.summaries[0].machine,
            rates=None if rates is None else whole_numbers(rates),
            backend=backend,
            ranks_per_gpu=agreed.ranks_per_gpu,
            origin=Origin(process_group=self._process_group(), commit=commit(), command=command, date=date_now()),
        )

    def _process_group(self) -> str | None:
        group = self._ep.group.process_group
        return None if group is None else str(dist.get_backend(group))


def default_device(ep: ExpertParallel) -> torch.device:
    """Where the backend of ``ep`` runs here: the current CUDA device, or the CPU."""
    # "auto" passes the fast backend over only where its kernels are interpreted.
    interpreted = ep.backend != REFERENCE and choose_backend(AUTO, ep.group).name == REFERENCE
    on_gpu = torch.cuda.is_available() and "cuda" in (ep.group.device_types() or {"cuda"}) and not interpreted
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
