"""The end-to-end benchmark: verify a configuration, choose the modes, time the layer and what it is compared with.

Nothing is timed before it is right, and what is compared takes turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial

import msgspec
import torch
from schema import AccuracyRecord, Breakdown, Derived, Layer, MemoryUse, PassTimes, Profile, Settings, SetupRecord

from harness.context import BenchCase, BenchContext, Finding, Rounds
from harness.layer import LayerUnderTest, Pass, group_of_this_rank, modes_of
from harness.memory_use import memory_use
from harness.results import micros, shape_record, time_fields
from sonic_ep.api import ExpertParallel
from sonic_ep.config import EPConfig, ModePair
from sonic_ep.cost import Workload, choose_modes
from sonic_ep.distributed.group import EPGroup
from sonic_ep.profiler import NetworkProfiler, ProfileReport
from sonic_ep.profiler.problem import Shape
from sonic_ep.testing.checks import Accuracy
from sonic_ep.testing.layer_problem import LayerOptions, LayerProblem

Say = Callable[[str], None]
Found = Mapping[str, Finding]
CaseOfPass = Callable[[Pass], BenchCase]

LAYER, GEMMS, GIVEN = "layer", "grouped GEMMs", "given routing"
LOCAL, ONE_GPU = "same rows locally", "one GPU"
# The layer once more, where it takes turns with what takes much longer.
LAYER_AGAIN = "layer, beside these"
# Fields of ``Derived``, as people read them.
DERIVED = {
    "exposed_communication_us": "exposed communication",
    "link_us": "link at its ceilings",
    "over_gemms": "over the GEMMs alone",
    "over_gemms_and_link": "over GEMMs and link",
    "scaling_efficiency": "scaling efficiency against one GPU",
    "over_reference": "over the reference",
}
# With fewer tokens, more than 1 % of the right results have twice the error of another by chance.
FEW_TOKENS = 128

ROUNDS, ROUNDS_OF_SLOW = Rounds(rounds=12, warmup=2), Rounds(rounds=6, warmup=1)
# Where ranks share a GPU, a barrier takes milliseconds; on the CPU times mean nothing.
ROUNDS_SHARED = ROUNDS_ON_CPU = Rounds(rounds=3, warmup=1)


def rounds_of(context: BenchContext, on_gpus: Rounds = ROUNDS) -> Rounds:
    """``on_gpus`` where every rank has a GPU."""
    if not context.on_gpu:
        return ROUNDS_ON_CPU
    return ROUNDS_SHARED if context.group.world_size > torch.cuda.device_count() else on_gpus


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One layer and how it is run. shape: T of each rank. backend: its name. backward: whether it is timed."""

    shape: Shape
    world_size: int
    options: LayerOptions
    backend: str
    config: EPConfig
    backward: bool = True

    @property
    def record(self) -> SetupRecord:
        """Everything but the configuration; T is that of the whole group."""
        shape, options = self.shape, self.options
        sizes = (shape.hidden, shape.expert_width, shape.num_experts, shape.top_k)
        return SetupRecord(
            thiek=(shape.tokens * self.world_size, *sizes),
            world_size=self.world_size,
            dtype=shape_record(shape).dtype,
            activation=options.activation,
            gate_layout=options.gate_layout,
            score_order=options.score_order.value,
            add_bias=options.biased,
            norm_topk_probs=options.norm_topk_probs,
            routing=options.routing,
            backend=self.backend,
        )

    def lines(self) -> list[str]:
        """The setup as lines of text."""
        words = msgspec.to_builtins(self.record)
        thiek = ",".join(map(str, words.pop("thiek")))
        lines = [f"T,H,I,E,K = {thiek} (T of the whole group)", ", ".join(f"{name} {words[name]}" for name in words)]
        if self.backend != "reference" and self.shape.tokens < FEW_TOKENS:
            lines.append(
                f"note: {self.shape.tokens} tokens a rank are few: below {FEW_TOKENS} the error of plain PyTorch, of "
                "which twice is admitted, is luck, and a correct layer may FAIL"
            )
        return lines

    def predicted(self) -> ModePair:
        """The modes that the cost rule takes without a profile; those of the configuration that are not "auto" stay."""
        shape = self.shape
        load = Workload(world_size=self.world_size, top_k=shape.top_k, num_experts=shape.num_experts)
        return choose_modes(self.config, load)

    def with_modes(self, modes: ModePair) -> EPConfig:
        """The configuration with these modes."""
        return replace(self.config, dispatch=modes.dispatch, combine=modes.combine)

    def layer(self, context: BenchContext) -> LayerUnderTest:
        """Drawn for this rank, with the predicted modes."""
        problem = LayerProblem(shape=self.shape, group=context.group, device=context.device, options=self.options)
        return LayerUnderTest.of(context, problem, self.backend, self.with_modes(self.predicted()))

    def profiled(self, layer: LayerUnderTest) -> ProfileReport:
        """Collective: all modes at the layer's own routing, measured now; those that the setup fixes stay."""
        shape, context = self.shape, layer.context
        sizes = {name: getattr(shape, name) for name in ("tokens", "hidden", "top_k", "num_experts", "dtype")}
        with layer.over(self.config) as ep:
            profiler = NetworkProfiler(ep, cache=None, rates=context.results.bandwidth)
            return profiler.profile(**sizes, routing=layer.choices, device=context.device)


def run_end_to_end(setup: Setup, context: BenchContext, say: Say) -> Layer:
    """Collective: run the benchmark, reporting to ``say``. Raises ``WrongResultError`` if a result is wrong."""
    layer = verified(setup.layer(context), say)
    profile = setup.profiled(layer)
    if profile.config != layer.config:
        layer = verified(replace(layer, config=profile.config), say)
    with layer.over() as ep:
        document = EndToEnd(layer=layer, setup=setup, profile=profile, ep=ep).document()
    for table in (profile.table(), memory_lines(document.memory), time_lines(document.times), derived_lines(document)):
        for line in ("", *table):
            say(line)
    return document


def verified(layer: LayerUnderTest, say: Say) -> LayerUnderTest:
    """Collective: ``layer``, its errors printed. Raises ``WrongResultError`` on every rank if one exceeds its bound."""
    modes = modes_of(layer.config)
    flags = [name for name in ("redispatch_x_in_backward", "cpu_sync_on_runtime") if getattr(layer.config, name)]
    words = ", ".join([f"{modes.dispatch.value} dispatch", f"{modes.combine.value} combine", *flags])
    say(f"verifying {words} on backend {layer.backend}")
    say(f"{'against a wider dtype':<22} {'error':>10} {'at most':>10} {'worst row':>10} {'at most':>10}")
    for found in map(accuracy_record, layer.judged.accuracies):
        numbers = (found.error, found.bound, found.worst_row, found.worst_row_bound)
        figures = " ".join(f"{number:>10.2e}" for number in numbers)
        say(f"{found.name:<22} {figures} {'PASS' if found.ok else 'FAIL'}")
    _ = layer.answer
    return layer


def accuracy_record(accuracy: Accuracy) -> AccuracyRecord:
    """Errors and bounds by name."""
    got, bound = accuracy.got, accuracy.bound
    errors = {"error": got.norm, "worst_row": got.worst_row}
    bounds = {"bound": bound.norm, "worst_row_bound": bound.worst_row}
    return AccuracyRecord(name=accuracy.name, ok=accuracy.ok, **errors, **bounds)


@dataclass(frozen=True, kw_only=True, eq=False)
class EndToEnd:
    """A verified layer, and all that is measured of it, by all ranks together.

    Its baselines are made, proven, timed and freed in two batches: together they would not fit beside a large layer.
    """

    layer: LayerUnderTest
    setup: Setup
    profile: ProfileReport
    ep: ExpertParallel

    @cached_property
    def alone(self) -> EPGroup | None:
        """This rank's own group; None where there is no other rank."""
        return None if self.layer.context.group.world_size == 1 else group_of_this_rank(self.layer.context.group)

    def document(self) -> Layer:
        """Collective: measure everything."""
        memory, own = self.with_its_own_rows()
        slow = self.with_slow()
        # The floor stands first.
        found = {which: {GEMMS: own[which][GEMMS], **own[which], **slow[which]} for which in own}
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
        layer, call = self.layer, self.layer.given_routing()
        given = layer.prove_routed(call, layer.context.group)
        cases: list[CaseOfPass] = [partial(layer.case, LAYER, self.ep), partial(given.case, GIVEN, self.ep)]
        with ExitStack() as opened:
            if self.alone is not None:
                local = layer.prove_routed(layer.same_rows(), self.alone)
                cases.append(partial(local.case, LOCAL, opened.enter_context(self.over_alone(self.alone))))
            memory = memory_use(call, layer.shape, self.ep, backward=self.setup.backward)
            # Last: their results are the largest, and would take memory in the rounds of others.
            cases.append(partial(layer.products_alone, GEMMS, products=layer.products()))
            return memory, self.in_every_pass(cases, rounds_of(layer.context))

    def with_slow(self) -> Mapping[Pass, Found]:
        """Collective: the layer beside all experts on one GPU, and beside the reference."""
        layer = self.layer
        layer.context.free_cached_memory()
        cases: list[CaseOfPass] = []
        with ExitStack() as opened:
            if self.alone is not None:
                whole = layer.prove_one_gpu(self.alone)
                cases.append(partial(whole.case, ONE_GPU, opened.enter_context(self.over_alone(self.alone))))
            if layer.backend != "reference":
                # Exact sizes favour the reference.
                exact = replace(layer.config, cpu_sync_on_runtime=True)
                reference = opened.enter_context(layer.over(exact, "reference"))
                cases.append(partial(layer.case, self.reference_name, reference))
            if cases:
                cases.insert(0, partial(layer.case, LAYER_AGAIN, self.ep))
            return self.in_every_pass(cases, rounds_of(layer.context, ROUNDS_OF_SLOW))

    def over_alone(self, alone: EPGroup) -> ExpertParallel:
        """The layer's backend and configuration on this rank alone."""
        return ExpertParallel(alone.process_group, self.layer.backend, self.layer.config)

    def in_every_pass(self, cases: Sequence[CaseOfPass], rounds: Rounds) -> Mapping[Pass, Found]:
        """Collective: what each took in turn, by pass. Raises ``WrongResultError`` if it is wrong."""
        context, found = self.layer.context, {}
        for which in Pass:
            if which is not Pass.STEP or self.setup.backward:
                batch = context.alternate([case(which) for case in cases], context.behind_work, rounds)
                found[which] = {name: context.record(finding) for name, finding in batch.items()}
        return found

    @property
    def reference_name(self) -> str:
        """The reference, and what it communicates by."""
        return f"reference over {self.layer.context.results.environment.process_group or 'one rank'}"

    def timed(self, which: Pass, found: Finding) -> PassTimes:
        """The record of one time."""
        name, rate = found.entry.name, None if found.flops is None else found.flops / found.timing.median / 1e12
        ranks = 1 if name in (LOCAL, ONE_GPU) else self.layer.context.group.world_size
        return PassTimes(
            pass_name=which.value,
            what=name,
            tflop_per_s=None if rate is None else round(rate, 3),
            tflop_per_s_of_group=None if rate is None else round(rate * ranks, 3),
            **time_fields(found.timing),
        )

    def derived(self, which: Pass, found: Found) -> Derived:
        """Ratios of times that were measured in turn."""
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
        # The parts add up to more than the layer where they overlap in it.
        parts["rest"] = max(0.0, found[LAYER].timing.median * 1e6 - sum(parts.values()))
        return Breakdown(pass_name=which.value, parts={name: round(part, 2) for name, part in parts.items()})


def memory_lines(uses: Sequence[MemoryUse]) -> list[str]:
    """Measured beside the formula, in MiB."""
    lines = [f"{'memory, MiB':<30} {'measured':>12} {'formula':>12}"]
    for use in uses:
        measured, formula = (_number(nbytes, 12, 2**20) for nbytes in (use.measured_bytes, use.formula_bytes))
        lines.append(f"{use.what:<30} {measured} {formula}")
    if all(use.measured_bytes is None for use in uses):
        lines.append("not measured: the CPU has no allocator that could be asked")
    if all(use.formula_bytes is None for use in uses):
        lines.append("no formula: those are of the fast backend")
    return lines


def time_lines(times: Sequence[PassTimes]) -> list[str]:
    """Medians and spreads, rates of a rank and of the group."""
    width = max(len(timed.what) for timed in times)
    lines = [f"{'pass':<22} {'what':<{width}} {'ms':>10} {'p10..p90':>9} {'TFLOP/s a rank':>15} {'of the group':>13}"]
    for timed in times:
        figures = f"{timed.median_us / 1e3:>10.3f} {timed.spread_percent:>7.1f}%"
        rates = f"{_number(timed.tflop_per_s, 15)} {_number(timed.tflop_per_s_of_group, 13)}"
        lines.append(f"{timed.pass_name:<22} {timed.what:<{width}} {figures} {rates}".rstrip())
    return lines


def derived_lines(layer: Layer) -> list[str]:
    """One line for each pass and figure."""
    lines = []
    for each in layer.derived:
        lines.append(f"{each.pass_name}:")
        for name, text in DERIVED.items():
            value, is_time = getattr(each, name), name.endswith("_us")
            if value is not None:
                lines.append(f"    {text:<38} {value / 1e3 if is_time else value:>9.3f}{' ms' * is_time}")
    return lines


def _number(value: float | None, width: int, unit: float = 1) -> str:
    return f"{'-' if value is None else f'{value / unit:.2f}':>{width}}"
