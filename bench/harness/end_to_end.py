"""The end-to-end benchmark: verify a configuration, choose the modes, time the layer and what it is compared with.

Nothing is timed before it is right, and what is compared takes turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from schema import Breakdown, Derived, Layer, MemoryUse, PassTimes, Profile, Settings

from harness.baselines import given_routing, group_of_this_rank, prove_one_gpu, prove_routed, same_rows
from harness.context import BenchCase, BenchContext, Finding, Rounds
from harness.layer import LayerUnderTest, Pass, modes_of
from harness.layer_report import Setup, accuracy_lines, accuracy_record, report_lines
from harness.memory_use import memory_use
from harness.results import micros, time_fields
from sonic_ep.api import ExpertParallel
from sonic_ep.config import EPConfig, ModePair
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.distributed.group import EPGroup
from sonic_ep.profiler import NetworkProfiler, ProfileReport
from sonic_ep.testing.layer_problem import LayerProblem

Say = Callable[[str], None]
Found = Mapping[str, Finding]
CaseOfPass = Callable[[Pass], BenchCase]

LAYER, GEMMS, GIVEN = "layer", "grouped GEMMs", "given routing"
LOCAL, ONE_GPU = "same rows locally", "one GPU"
# The layer once more, where it takes turns with what takes much longer.
LAYER_AGAIN = "layer, beside these"

ROUNDS, ROUNDS_OF_SLOW = Rounds(rounds=12, warmup=2), Rounds(rounds=6, warmup=1)
# Where ranks share a GPU, a barrier takes milliseconds; on the CPU times mean nothing.
ROUNDS_SHARED = ROUNDS_ON_CPU = Rounds(rounds=3, warmup=1)


def rounds_of(context: BenchContext, on_gpus: Rounds = ROUNDS) -> Rounds:
    """``on_gpus`` where every rank has a GPU."""
    if not context.on_gpu:
        return ROUNDS_ON_CPU
    return ROUNDS_SHARED if context.group.world_size > torch.cuda.device_count() else on_gpus


def run_end_to_end(setup: Setup, context: BenchContext, say: Say) -> Layer:
    """Collective: everything, told to ``say`` as it comes. Raises ``WrongResultError`` if it is wrong."""
    problem = LayerProblem(shape=setup.shape, group=context.group, device=context.device, options=setup.options)
    first = with_modes(setup.config, predicted_modes(setup))
    layer = verified(LayerUnderTest.of(context, problem, setup.backend, first), say)
    profile = profiled(layer, setup)
    if profile.config != first:
        layer = verified(replace(layer, config=profile.config), say)
    with layer.over() as ep:
        document = EndToEnd(layer=layer, setup=setup, profile=profile, ep=ep).document()
    for line in report_lines(document, profile):
        say(line)
    return document


def verified(layer: LayerUnderTest, say: Say) -> LayerUnderTest:
    """Collective: the layer, its errors told, found right. Raises ``WrongResultError`` on every rank if it is not."""
    say(f"verifying {config_words(layer.config)} on backend {layer.backend}")
    for line in accuracy_lines([*map(accuracy_record, layer.judged.accuracies)]):
        say(line)
    _ = layer.answer
    return layer


def profiled(layer: LayerUnderTest, setup: Setup) -> ProfileReport:
    """Collective: all modes at the layer's own routing, measured now; those that the setup fixes stay."""
    shape, chosen_TK = setup.shape, layer.choices
    with layer.over(setup.config) as ep:
        return NetworkProfiler(ep, cache=None, rates=layer.context.results.bandwidth).profile(
            tokens=shape.tokens,
            hidden=shape.hidden,
            top_k=shape.top_k,
            num_experts=shape.num_experts,
            dtype=shape.dtype,
            routing=chosen_TK,
            device=layer.context.device,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class EndToEnd:
    """A verified layer, and all that is measured of it, by all ranks together.

    Its baselines are made, proven, timed and freed in two batches: together they would not fit beside a large layer.
    """

    layer: LayerUnderTest
    setup: Setup
    profile: ProfileReport
    ep: ExpertParallel

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What is timed."""
        return tuple(Pass) if self.setup.backward else (Pass.INFERENCE, Pass.TRAINING)

    @cached_property
    def alone(self) -> EPGroup | None:
        """This rank's own group; None where there is no other rank."""
        return None if self.layer.context.group.world_size == 1 else group_of_this_rank(self.layer.context.group)

    def document(self) -> Layer:
        """Collective: measure everything."""
        memory, own = self.with_its_own_rows()
        slow = self.with_slow()
        # The floor stands first.
        found = {which: {GEMMS: own[which][GEMMS], **own[which], **slow[which]} for which in self.passes}
        return self.layer.context.results.document(
            Layer,
            setup=self.setup.record,
            config=Settings.of(self.layer.config),
            accuracy=tuple(map(accuracy_record, self.layer.answer.accuracies)),
            profile=Profile.of(self.profile),
            memory=memory,
            times=tuple(self.timed(which, finding) for which in found for finding in found[which].values()),
            derived=tuple(self.derived(which, found[which]) for which in found),
            breakdown=tuple(self.breakdown(which, found[which]) for which in found),
        )

    def with_its_own_rows(self) -> tuple[tuple[MemoryUse, ...], Mapping[Pass, Found]]:
        """Collective: memory; and the layer beside its GEMMs, its routing given, and its rows without a link."""
        layer = self.layer
        call = given_routing(layer)
        given = prove_routed(layer, call, self.layer.context.group)
        cases: list[CaseOfPass] = [partial(layer.case, LAYER, self.ep), partial(given.case, GIVEN, self.ep)]
        with ExitStack() as opened:
            if self.alone is not None:
                local = prove_routed(layer, same_rows(layer), self.alone)
                cases.append(partial(local.case, LOCAL, opened.enter_context(self.over_alone(self.alone))))
            memory = memory_use(call, layer.shape, self.ep, backward=self.setup.backward)
            # Last: their results are the largest, and would take memory in the rounds of others.
            cases.append(partial(layer.products_alone, GEMMS, products=layer.products()))
            return memory, self.in_every_pass(cases, rounds_of(self.layer.context))

    def with_slow(self) -> Mapping[Pass, Found]:
        """Collective: the layer beside all experts on one GPU, and beside the reference."""
        self.layer.context.free_cached_memory()
        layer = self.layer
        cases: list[CaseOfPass] = []
        with ExitStack() as opened:
            if self.alone is not None:
                whole = prove_one_gpu(layer, self.alone)
                cases.append(partial(whole.case, ONE_GPU, opened.enter_context(self.over_alone(self.alone))))
            if layer.backend != "reference":
                # It has exact sizes, in its favour.
                exact = replace(layer.config, cpu_sync_on_runtime=True)
                reference = opened.enter_context(layer.over(exact, "reference"))
                cases.append(partial(layer.case, self.reference_name, reference))
            if cases:
                cases.insert(0, partial(layer.case, LAYER_AGAIN, self.ep))
            return self.in_every_pass(cases, rounds_of(self.layer.context, ROUNDS_OF_SLOW))

    def over_alone(self, alone: EPGroup) -> ExpertParallel:
        """The layer's backend and configuration on this rank alone."""
        return ExpertParallel(alone.process_group, self.layer.backend, self.layer.config)

    def in_every_pass(self, cases: Sequence[CaseOfPass], rounds: Rounds) -> Mapping[Pass, Found]:
        """Collective: what each took in turn, by pass. Raises ``WrongResultError`` if it is wrong."""
        found = {}
        for which in self.passes:
            batch = self.layer.context.alternate(
                [case(which) for case in cases], self.layer.context.behind_work, rounds
            )
            found[which] = {name: self.layer.context.record(finding) for name, finding in batch.items()}
        return found

    @property
    def reference_name(self) -> str:
        """The reference, and what it communicates by."""
        return f"reference over {self.layer.context.results.environment.process_group or 'one rank'}"

    def timed(self, which: Pass, found: Finding) -> PassTimes:
        """For the report."""
        name, flops = found.entry.name, found.flops
        ranks = 1 if name in (LOCAL, ONE_GPU) else self.layer.context.group.world_size
        rate = None if flops is None else flops / found.timing.median / 1e12
        return PassTimes(
            pass_name=which.value,
            what=name,
            tflop_per_s=None if rate is None else round(rate, 3),
            tflop_per_s_of_group=None if rate is None else round(rate * ranks, 3),
            **time_fields(found.timing),
        )

    def derived(self, which: Pass, found: Found) -> Derived:
        """What follows from what took turns."""
        median = {name: finding.timing.median for name, finding in found.items()}
        link = self.layer.link_seconds(modes_of(self.layer.config), which)

        def ratio(above: str, below: str) -> float | None:
            return round(median[above] / median[below], 4) if {above, below} <= median.keys() else None

        return Derived(
            pass_name=which.value,
            exposed_communication_us=micros(median[GIVEN] - median[LOCAL]) if LOCAL in median else None,
            link_us=None if link is None else micros(link),
            over_gemms=ratio(LAYER, GEMMS),
            over_gemms_and_link=None if link is None else round(median[LAYER] / (median[GEMMS] + link), 4),
            scaling_efficiency=ratio(ONE_GPU, LAYER_AGAIN),
            over_reference=ratio(LAYER_AGAIN, self.reference_name),
        )

    def breakdown(self, which: Pass, found: Found) -> Breakdown:
        """Parts that were timed by themselves, and what the layer takes beyond them."""
        modes = modes_of(self.layer.config)
        alone = {(each.kind, each.mode): each.spread.median_us for each in self.profile.modes}
        parts = {
            "plan": alone["plan", ""],
            "dispatch": which.trips * alone["dispatch", modes.dispatch.value],
            GEMMS: found[GEMMS].timing.median * 1e6,
            "combine": which.trips * alone["combine", modes.combine.value],
        }
        # Less than nothing is left where they overlap.
        parts["rest"] = max(0.0, found[LAYER].timing.median * 1e6 - sum(parts.values()))
        return Breakdown(pass_name=which.value, parts={name: round(part, 2) for name, part in parts.items()})


def predicted_modes(setup: Setup) -> ModePair:
    """The modes that the cost rule takes without a profile; those of the setup that are not "auto" stay."""
    shape = setup.shape
    load = Workload(world_size=setup.world_size, top_k=shape.top_k, num_experts=shape.num_experts)
    return choose_modes(setup.config, load)


def with_modes(config: EPConfig, modes: ModePair) -> EPConfig:
    """The configuration with these modes."""
    return replace(config, dispatch=modes.dispatch, combine=modes.combine)


def config_words(config: EPConfig) -> str:
    """Modes and the flags that are set."""
    modes = modes_of(config)
    flags = [name for name in ("redispatch_x_in_backward", "cpu_sync_on_runtime") if getattr(config, name)]
    return ", ".join([f"{modes.dispatch.value} dispatch", f"{modes.combine.value} combine", *flags])
