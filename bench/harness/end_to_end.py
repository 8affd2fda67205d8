"""The end-to-end benchmark: verify a configuration, choose the modes, time the layer and what it is held against.

Nothing is timed before it is right, and what is compared takes turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from sonic_ep.api import ExpertParallel
from sonic_ep.benchmark.arena import Arena, Rounds, Work
from sonic_ep.benchmark.beside import OneGpu, given_routing, group_of_this_rank, same_rows
from sonic_ep.benchmark.layer import LayerUnderTest, Pass
from sonic_ep.benchmark.layer_problem import LayerProblem
from sonic_ep.benchmark.layer_report import Breakdown, Derived, LayerReport, Timed, accuracy_lines
from sonic_ep.benchmark.memory_use import MemoryUse, memory_use
from sonic_ep.benchmark.oracle import Oracle
from sonic_ep.benchmark.results import Entry
from sonic_ep.benchmark.routed import RoutedUnderTest
from sonic_ep.benchmark.routed_call import RoutedCall
from sonic_ep.benchmark.setup import Setup
from sonic_ep.config import CombineMode, DispatchMode, EPConfig, ModePair
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.group import EPGroup
from sonic_ep.profiler import NetworkProfiler, ProfileReport

Say = Callable[[str], None]
Found = Mapping[str, Entry]
WorkOfPass = Callable[[Pass], Work]

LAYER, GEMMS, GIVEN = "layer", "grouped GEMMs", "given routing"
LOCAL, ONE_GPU = "same rows locally", "one GPU"
# The layer once more, where it takes turns with what takes much longer.
BESIDE = "layer, beside these"

ROUNDS, ROUNDS_OF_SLOW = Rounds(timed=12, warmup=2), Rounds(timed=6, warmup=1)
# Where ranks share a GPU, a meeting of all takes milliseconds; on the CPU times mean nothing.
ROUNDS_SHARED = ROUNDS_ON_CPU = Rounds(timed=3, warmup=1)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How many rounds are timed: of what takes about as long as the layer, and of what takes much longer."""

    usual: Rounds
    slow: Rounds

    @staticmethod
    def of(arena: Arena) -> Pace:
        """By where it runs."""
        if not arena.on_gpu:
            return Pace(usual=ROUNDS_ON_CPU, slow=ROUNDS_ON_CPU)
        if arena.group.world_size > torch.cuda.device_count():
            return Pace(usual=ROUNDS_SHARED, slow=ROUNDS_SHARED)
        return Pace(usual=ROUNDS, slow=ROUNDS_OF_SLOW)


def run_end_to_end(setup: Setup, arena: Arena, say: Say) -> LayerReport:
    """Collective: everything, told to ``say`` as it comes; the report is the same on every rank.

    Raises ``WrongError`` on every rank if the layer is wrong on any: then nothing was timed, or nothing of it told.
    """
    problem = LayerProblem(shape=setup.shape, group=arena.group, device=arena.device, options=setup.options)
    oracle = Oracle(problem=problem)
    load = Workload(world_size=arena.group.world_size, top_k=setup.shape.top_k, num_experts=setup.shape.num_experts)
    first = with_modes(setup.config, choose_modes(setup.config, load))
    layer = verified(LayerUnderTest(arena=arena, oracle=oracle, backend=setup.backend, config=first), say)
    profile = profiled(layer, setup)
    if profile.config != first:
        layer = verified(replace(layer, config=profile.config), say)
    with layer.over() as ep:
        report = EndToEnd(layer=layer, setup=setup, profile=profile, ep=ep).report()
    for line in ["", *report.lines()]:
        say(line)
    return report


def verified(layer: LayerUnderTest, say: Say) -> LayerUnderTest:
    """Collective: the layer, its errors told, found right. Raises ``WrongError`` on every rank if it is wrong."""
    say(f"verifying {words_of(layer.config)} on backend {layer.backend}")
    for line in accuracy_lines(layer.judged.accuracies):
        say(line)
    _ = layer.answer
    return layer


def profiled(layer: LayerUnderTest, setup: Setup) -> ProfileReport:
    """Collective: all modes at the layer's own routing, measured now; those that the setup fixes stay."""
    shape, chosen_TK = setup.shape, layer.problem.choices(layer.answer.outcome)
    with layer.over(setup.config) as ep:
        return NetworkProfiler(ep, cache=None, rates=layer.arena.results.ceilings).profile(
            tokens=shape.tokens,
            hidden=shape.hidden,
            top_k=shape.top_k,
            num_experts=shape.num_experts,
            dtype=shape.dtype,
            routing=chosen_TK,
            device=layer.problem.device,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class EndToEnd:
    """A verified layer, and all that is measured of it, by all ranks together.

    What it is held against is made, found right, timed in every pass and let go, one company of works after the other:
    together they would not fit beside a layer that fills a GPU.
    """

    layer: LayerUnderTest
    setup: Setup
    profile: ProfileReport
    ep: ExpertParallel

    @property
    def arena(self) -> Arena:
        """Where it runs."""
        return self.layer.arena

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What is timed."""
        return tuple(Pass) if self.setup.backward else (Pass.INFERENCE, Pass.TRAINING)

    @cached_property
    def alone(self) -> EPGroup | None:
        """This rank's own group; None where there is no other rank."""
        return None if self.arena.group.world_size == 1 else group_of_this_rank(self.arena.group)

    def report(self) -> LayerReport:
        """Collective: measure everything."""
        memory, usual = self.with_its_own_rows()
        slow = self.with_slow()
        # The floor stands first.
        found = {which: {GEMMS: usual[which][GEMMS], **usual[which], **slow[which]} for which in self.passes}
        return LayerReport(
            results=self.arena.results,
            setup=self.setup,
            config=self.layer.config,
            accuracy=self.layer.answer.accuracies,
            profile=self.profile,
            memory=memory,
            times=tuple(self.timed(which, entry) for which in found for entry in found[which].values()),
            derived=tuple(self.derived(which, found[which]) for which in found),
            breakdown=tuple(self.breakdown(which, found[which]) for which in found),
        )

    def with_its_own_rows(self) -> tuple[tuple[MemoryUse, ...], Mapping[Pass, Found]]:
        """Collective: the layer beside its products, its routing given, and its rows without a link; what it takes."""
        layer = self.layer
        given = self.routed(given_routing(layer), self.arena.group)
        works: list[WorkOfPass] = [partial(layer.work, LAYER, self.ep), self.pass_of(given, GIVEN, self.ep)]
        with ExitStack() as opened:
            if self.alone is not None:
                local = self.routed(same_rows(layer), self.alone)
                works.append(self.pass_of(local, LOCAL, opened.enter_context(local.over())))
            memory = tuple(memory_use(given.call, self.ep, backward=self.setup.backward))
            # At the end: what they leave is the largest, and so lies beside nobody's round.
            works.append(partial(layer.products_alone, GEMMS, products=layer.products()))
            return memory, self.in_every_pass(works, Pace.of(self.arena).usual)

    def with_slow(self) -> Mapping[Pass, Found]:
        """Collective: the layer beside all experts on one GPU, and beside the reference."""
        self.arena.give_back_memory()
        layer, alone = self.layer, self.alone
        works: list[WorkOfPass] = []
        with ExitStack() as opened:
            if alone is not None:
                whole = OneGpu.of(layer, alone)
                on_one = opened.enter_context(ExpertParallel(alone.process_group, layer.backend, layer.config))
                works.append(partial(whole.work, ONE_GPU, on_one))
            if layer.backend != "reference":
                # It has exact sizes, in its favour.
                exact = replace(layer.config, cpu_sync_on_runtime=True)
                reference = opened.enter_context(layer.over(exact, "reference"))
                works.append(partial(layer.work, self.reference_name, reference))
            if works:
                works.insert(0, partial(layer.work, BESIDE, self.ep))
            return self.in_every_pass(works, Pace.of(self.arena).slow)

    def pass_of(self, routed: RoutedUnderTest, name: str, ep: ExpertParallel) -> WorkOfPass:
        """Collective: a call with its routing given, found right now, before anything else takes memory."""
        _ = routed.answer
        return lambda which: routed.work(name, ep, which, self.layer.flops(which))

    def in_every_pass(self, works: Sequence[WorkOfPass], rounds: Rounds) -> Mapping[Pass, Found]:
        """Collective: what each of them took in turn, pass by pass."""
        return {which: self.right([work(which) for work in works], rounds) for which in self.passes}

    def routed(self, call: RoutedCall, group: EPGroup) -> RoutedUnderTest:
        """A call with its routing given, over ``group``."""
        layer = self.layer
        return RoutedUnderTest(arena=layer.arena, group=group, call=call, backend=layer.backend, config=layer.config)

    def right(self, works: list[Work], rounds: Rounds) -> Found:
        """Collective: what each of them took. Raises ``WrongError`` on every rank if any is wrong on any."""
        found = self.arena.alternate(works, self.arena.behind_work, rounds)
        return {name: self.arena.record(entry) for name, entry in found.items()}

    @property
    def reference_name(self) -> str:
        """The reference, and what it communicates by."""
        return f"reference over {self.arena.results.environment['process_group'] or 'one rank'}"

    def timed(self, which: Pass, entry: Entry) -> Timed:
        """For the report."""
        world_size = 1 if entry.name in (LOCAL, ONE_GPU) else self.arena.group.world_size
        return Timed(which=which, what=entry.name, timing=entry.timing, flops=entry.flops, world_size=world_size)

    def derived(self, which: Pass, found: Found) -> Derived:
        """What follows from what took turns."""
        median = {name: entry.timing.median for name, entry in found.items()}
        link = self.layer.link_seconds(modes_of(self.layer.config), which)
        return Derived(
            which=which,
            exposed_communication=median[GIVEN] - median[LOCAL] if LOCAL in median else None,
            link=link,
            over_gemms=median[LAYER] / median[GEMMS],
            over_gemms_and_link=None if link is None else median[LAYER] / (median[GEMMS] + link),
            scaling_efficiency=median[ONE_GPU] / median[BESIDE] if ONE_GPU in median else None,
            over_reference=median[BESIDE] / median[self.reference_name] if self.reference_name in median else None,
        )

    def breakdown(self, which: Pass, found: Found) -> Breakdown:
        """Parts that were timed by themselves, and what the layer takes beyond them."""
        modes = modes_of(self.layer.config)
        alone = {
            "plan": seconds_of(self.profile, "plan", ""),
            "dispatch": which.trips * seconds_of(self.profile, "dispatch", modes.dispatch.value),
            GEMMS: found[GEMMS].timing.median,
            "combine": which.trips * seconds_of(self.profile, "combine", modes.combine.value),
        }
        # Less than nothing is left where they overlap.
        rest = max(0.0, found[LAYER].timing.median - sum(alone.values()))
        return Breakdown(which=which, parts=(*alone.items(), ("rest", rest)))


def seconds_of(profile: ProfileReport, kind: str, mode: str) -> float:
    """The median of a mode by itself."""
    (found,) = (each for each in profile.modes if (each.kind, each.mode) == (kind, mode))
    return found.spread.median_us / 1e6


def with_modes(config: EPConfig, modes: ModePair) -> EPConfig:
    """The configuration with these modes."""
    return replace(config, dispatch=modes.dispatch, combine=modes.combine)


def modes_of(config: EPConfig) -> ModePair:
    """The modes of a configuration that has them."""
    return ModePair(dispatch=DispatchMode(config.dispatch), combine=CombineMode(config.combine))


def words_of(config: EPConfig) -> str:
    """Modes and the flags that are set."""
    modes = modes_of(config)
    flags = [name for name in ("redispatch_x_in_backward", "cpu_sync_on_runtime") if getattr(config, name)]
    return ", ".join([f"{modes.dispatch.value} dispatch", f"{modes.combine.value} combine", *flags])
