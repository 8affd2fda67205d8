"""The layer: ``ep.moe`` forward, and forward with backward, beside its GEMMs alone and beside the reference.

What is compared takes turns, round by round, so one alternation is measured for several benches: the first of them that
runs has it measured, each reports its own share. Thresholds are held where the host gets ahead, as it does in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property

import pytest
from harness.context import Comparison, Finding, Method, Rounds, SuiteContext, Tell
from harness.layer import LayerUnderTest, Pass, modes_of
from harness.products import Products

from sonic_ep import CombineMode, DispatchMode, EPConfig
from sonic_ep.profiler.agreement import WrongResultError
from sonic_ep.testing.layer_problem import LayerOptions, LayerProblem

Found = Mapping[str, Finding | WrongResultError]

ROUNDS = Rounds(rounds=20, warmup=3)
ROUNDS_OF_REFERENCE = Rounds(rounds=10, warmup=2)
# Thresholds: times over those of the GEMMs and the link,
MOST = {Pass.INFERENCE: 1.15, Pass.STEP: 1.20}
# over the reference's time, and over the time without the flag.
MOST_OF_REFERENCE = 0.5
MOST_WITH_X_AGAIN = 1.03


BASE = EPConfig(DispatchMode.ALL_TO_ALL, CombineMode.RANK_DEDUP)
AGAIN, SYNC = replace(BASE, redispatch_x_in_backward=True), replace(BASE, cpu_sync_on_runtime=True)
BOTH = replace(AGAIN, cpu_sync_on_runtime=True)
BY_RANK, GATHERED = replace(BASE, dispatch=DispatchMode.RANK_DEDUP), replace(BASE, dispatch=DispatchMode.ALL_GATHER)
SETTINGS = (BASE, AGAIN, SYNC, BOTH, BY_RANK, GATHERED)
# What takes turns. A graph keeps its memory for itself, and has no place for a read on the host.
TOGETHER = (SETTINGS,)
TOGETHER_INTERPRETED = ((BASE, BOTH),)
TOGETHER_AS_GRAPHS = ((BASE, AGAIN), (BY_RANK, GATHERED))

# The names of cases.
PRODUCTS, LAYER, REFERENCE = "grouped_mm of a layer: {}", "layer {}: {}", "reference layer: {}"


def words_of(setting: EPConfig, *more: str) -> str:
    """Modes, the flags that are set, and ``more``."""
    flags = {"redispatch": setting.redispatch_x_in_backward, "cpu_sync": setting.cpu_sync_on_runtime}
    return ", ".join([setting.dispatch, setting.combine, *(name for name, given in flags.items() if given), *more])


AGAINST_REFERENCE = LAYER.format(words_of(BASE, "beside the reference"), "{}")


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerBatches:
    """All that is measured of one layer, each alternation once, by all ranks together."""

    context: SuiteContext
    layer: LayerUnderTest
    found: dict[tuple[tuple[EPConfig, ...], Pass, Method], Found] = field(default_factory=dict)

    @cached_property
    def products(self) -> Products:
        """The GEMMs of the layer, with operands of their own."""
        return self.layer.products()

    @staticmethod
    def of(context: SuiteContext, options: LayerOptions) -> LayerBatches:
        """A layer of the fast backend, drawn for this rank."""
        shape = context.sizes.layer
        problem = LayerProblem(shape=shape, options=options, group=context.group, device=context.device)
        return LayerBatches(context=context, layer=LayerUnderTest.of(context, problem, "fast", BASE))

    def measured(self, settings: tuple[EPConfig, ...], which: Pass, method: Method) -> Found:
        """The GEMMs, then each setting, in turn; no settings: the reference and the layer."""
        place = (settings, which, method)
        if place not in self.found:
            self.found[place] = self._alternation(*place) if settings else self._against_reference(which, method)
        return self.found[place]

    def _alternation(self, settings: Sequence[EPConfig], which: Pass, method: Method) -> Found:
        cases = [self.layer.products_alone(PRODUCTS.format(which.value), which, self.products)]
        biased = self.layer.problem.options.biased
        with ExitStack() as stack:
            for setting in settings:
                ep = stack.enter_context(self.layer.over(setting))
                compared_with = self._comparisons(setting, which, held=method is Method.QUEUED and not biased)
                name = LAYER.format(words_of(setting, *["biases"] * biased), which.value)
                cases.append(self.layer.case(name, ep, which, compared_with))
            return self.context.alternate(cases, method, self.context.rounds(ROUNDS))

    def _against_reference(self, which: Pass, method: Method) -> Found:
        """The reference has exact sizes, in its favour."""
        name, own_name = REFERENCE.format(which.value), AGAINST_REFERENCE.format(which.value)
        against = Comparison(name=name, text="the reference", most=MOST_OF_REFERENCE)
        with self.layer.over(SYNC, "reference") as reference, self.layer.over() as fast:
            cases = [self.layer.case(name, reference, which), self.layer.case(own_name, fast, which, (against,))]
            return self.context.alternate(cases, method, self.context.rounds(ROUNDS_OF_REFERENCE))

    def _comparisons(self, setting: EPConfig, which: Pass, *, held: bool) -> tuple[Comparison, ...]:
        """What a setting is compared with: its GEMMs and bytes, and with a flag the same without any."""
        found = []
        link = self.layer.link_seconds(modes_of(setting), which)
        if link is not None:
            most = MOST[which] if held and setting == BASE else None
            found.append(Comparison(name=PRODUCTS.format(which.value), text="products and bytes", link=link, most=most))
        if setting in (AGAIN, SYNC, BOTH):
            most = MOST_WITH_X_AGAIN if held and setting == AGAIN else None
            without = LAYER.format(words_of(BASE), which.value)
            found.append(Comparison(name=without, text="that without flags", most=most))
        return tuple(found)


def together_with(context: SuiteContext, setting: EPConfig, which: Pass, method: Method) -> tuple[EPConfig, ...]:
    """What takes turns with ``setting``, itself among it; skips the bench where it has no place."""
    groups = TOGETHER_AS_GRAPHS if method is Method.GRAPH else TOGETHER if context.on_gpu else TOGETHER_INTERPRETED
    if which is Pass.INFERENCE and setting.redispatch_x_in_backward:
        pytest.skip("without a backward nothing is gathered again")
    for group in groups:
        if setting in group:
            return tuple(other for other in group if which is Pass.STEP or not other.redispatch_x_in_backward)
    skip_if_interpreted(context)
    pytest.skip("a graph has no place for a read on the host")


def skip_if_interpreted(context: SuiteContext) -> None:
    """Leave to GPUs what says nothing new."""
    if not context.on_gpu:
        pytest.skip("interpreted, a layer takes long, and the tests run it in every setting")


@pytest.fixture(scope="session")
def batches(context: SuiteContext) -> LayerBatches:
    """What is measured of the layer, for all benches of this file."""
    return LayerBatches.of(context, LayerOptions())


each_pass = pytest.mark.parametrize("which", [Pass.INFERENCE, Pass.STEP], ids=lambda which: which.name.lower())


@each_pass
def bench_products(context: SuiteContext, batches: LayerBatches, tell: Tell, method: Method, which: Pass) -> None:
    """The GEMMs of the layer alone: two forward, and four more in backward."""
    found = batches.measured(together_with(context, BASE, which, method), which, method)
    tell(context.record(found[PRODUCTS.format(which.value)]))


@each_pass
@pytest.mark.parametrize("setting", SETTINGS, ids=words_of)
def bench_layer(
    context: SuiteContext, batches: LayerBatches, tell: Tell, method: Method, setting: EPConfig, which: Pass
) -> None:
    """``ep.moe``. Every setting gives the same bits, eager and as a graph."""
    found = batches.measured(together_with(context, setting, which, method), which, method)
    tell(context.record(found[LAYER.format(words_of(setting), which.value)]))


@each_pass
@pytest.mark.parametrize("name", [REFERENCE, AGAINST_REFERENCE], ids=["reference", "fast"])
def bench_reference(context: SuiteContext, batches: LayerBatches, tell: Tell, name: str, which: Pass) -> None:
    """``ep.moe`` of the reference backend, over NCCL on GPUs, and that of the fast one."""
    if which is Pass.STEP:
        skip_if_interpreted(context)
    tell(context.record(batches.measured((), which, context.behind_work)[name.format(which.value)]))


@each_pass
def bench_biased(context: SuiteContext, tell: Tell, which: Pass) -> None:
    """``ep.moe`` with biases."""
    skip_if_interpreted(context)
    batches = LayerBatches.of(context, LayerOptions(biased=True))
    found = batches.measured((BASE,), which, context.behind_work)
    tell(context.record(found[LAYER.format(words_of(BASE, "biases"), which.value)]))
