"""The layer: ``ep.moe`` forward, and forward with backward, beside its matrix products alone and beside the reference.

What is compared takes turns, round by round, so one alternation is measured for several benches: the first of them that
runs has it measured, each reports its own share. Bars are held where the host gets ahead, as it does in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import pytest
from sonic_ep.benchmark.arena import Beside, How, Rounds, SuiteArena, WrongError
from sonic_ep.benchmark.layer import LayerUnderTest, Pass
from sonic_ep.benchmark.layer_problem import LayerOptions, LayerProblem
from sonic_ep.benchmark.oracle import Oracle
from sonic_ep.benchmark.products import Products
from sonic_ep.benchmark.results import Entry

from sonic_ep import CombineMode, DispatchMode, EPConfig
from sonic_ep.config import ModePair

Found = Mapping[str, Entry | WrongError]
Tell = Callable[[Entry], None]

ROUNDS = Rounds(timed=20, warmup=3)
ROUNDS_BESIDE_REFERENCE = Rounds(timed=10, warmup=2)
# Under the interpreter a step takes half a second and more.
ROUNDS_INTERPRETED = Rounds(timed=1, warmup=0)
COMBINE = CombineMode.RANK_DEDUP
PASSES = (Pass.INFERENCE, Pass.STEP)
# At most so many times the products and the bytes.
MOST: Mapping[Pass, float] = MappingProxyType({Pass.INFERENCE: 1.15, Pass.STEP: 1.20})
# At most so many times the reference's time, and the time without flags.
MOST_OF_REFERENCE = 0.5
MOST_WITH_X_AGAIN = 1.03


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A dispatch mode and flags of ``EPConfig``, and whether there are biases."""

    dispatch: DispatchMode = DispatchMode.ALL_TO_ALL
    again: bool = False
    sync: bool = False
    biased: bool = False

    @property
    def config(self) -> EPConfig:
        """As the layer wants it."""
        flags = {"redispatch_x_in_backward": self.again, "cpu_sync_on_runtime": self.sync}
        return EPConfig(dispatch=self.dispatch, combine=COMBINE, **flags)

    def __str__(self) -> str:
        flags = {"redispatch": self.again, "cpu_sync": self.sync, "biases": self.biased}
        words = [f"{self.dispatch.value}, {COMBINE.value}", *(name for name, given in flags.items() if given)]
        return ", ".join(words)


BASE = Setting()
AGAIN = Setting(again=True)
SYNC = Setting(sync=True)
BOTH = Setting(again=True, sync=True)
BY_RANK = Setting(dispatch=DispatchMode.RANK_DEDUP)
GATHERED = Setting(dispatch=DispatchMode.ALL_GATHER)
BIASED = Setting(biased=True)
SETTINGS = (BASE, AGAIN, SYNC, BOTH, BY_RANK, GATHERED)
# What takes turns. A graph keeps its memory for itself, and has no place for a read on the host.
TOGETHER = (SETTINGS,)
TOGETHER_INTERPRETED = ((BASE, BOTH),)
TOGETHER_AS_GRAPHS = ((BASE, AGAIN), (BY_RANK, GATHERED))


@dataclass(frozen=True, kw_only=True, eq=False)
class Bout:
    """All that is measured of one layer, each alternation once, by all ranks together."""

    arena: SuiteArena
    layer: LayerUnderTest
    found: dict[tuple[tuple[Setting, ...], Pass, How], Found] = field(default_factory=dict)

    @cached_property
    def products(self) -> Products:
        """The layer's."""
        return self.layer.products()

    @staticmethod
    def of_layer(arena: SuiteArena, options: LayerOptions) -> Bout:
        """A layer of the fast backend, drawn for this rank."""
        problem = LayerProblem(shape=arena.sizes.layer, options=options, group=arena.group, device=arena.device)
        oracle = Oracle(problem=problem)
        layer = LayerUnderTest(arena=arena, oracle=oracle, backend="fast", config=BASE.config)
        return Bout(arena=arena, layer=layer)

    def of(self, settings: tuple[Setting, ...], which: Pass, how: How) -> Found:
        """The products, then each setting, in turn; no settings: the reference and the layer."""
        place = (settings, which, how)
        if place not in self.found:
            self.found[place] = self._alternation(*place) if settings else self._beside_reference(which, how)
        return self.found[place]

    def _alternation(self, settings: Sequence[Setting], which: Pass, how: How) -> Found:
        held = self.layer.problem.shape.barred and how is How.QUEUED
        works = [self.layer.products_alone(products_name(which), which, self.products)]
        with ExitStack() as stack:
            for setting in settings:
                ep = stack.enter_context(self.layer.over(setting.config))
                works.append(
                    self.layer.work(layer_name(setting, which), ep, which, self._beside(setting, which, held=held))
                )
            return self.arena.alternate(works, how, ROUNDS if self.arena.on_gpu else ROUNDS_INTERPRETED)

    def _beside_reference(self, which: Pass, how: How) -> Found:
        """The reference has exact sizes, in its favour."""
        most = MOST_OF_REFERENCE if self.layer.problem.shape.barred else None
        beside = Beside(name=reference_name(which), text="the reference", most=most)
        with self.layer.over(SYNC.config, "reference") as reference, self.layer.over() as fast:
            works = [
                self.layer.work(reference_name(which), reference, which),
                self.layer.work(beside_name(which), fast, which, (beside,)),
            ]
            rounds = ROUNDS_BESIDE_REFERENCE if self.arena.on_gpu else ROUNDS_INTERPRETED
            return self.arena.alternate(works, how, rounds)

    def _beside(self, setting: Setting, which: Pass, *, held: bool) -> tuple[Beside, ...]:
        """What a setting is held against: its products and bytes, and with a flag the same without any."""
        found = []
        modes = ModePair(dispatch=setting.dispatch, combine=COMBINE)
        link = self.layer.link_seconds(modes, which)
        if link is not None:
            most = MOST[which] if held and setting == BASE else None
            name = products_name(which)
            found.append(Beside(name=name, text="products and bytes", link=link, most=most))
        if setting.again or setting.sync:
            most = MOST_WITH_X_AGAIN if held and setting == AGAIN else None
            found.append(Beside(name=layer_name(BASE, which), text="that without flags", most=most))
        return tuple(found)


def products_name(which: Pass) -> str:
    """The name of the matrix products alone."""
    return f"grouped_mm of a layer: {which.value}"


def layer_name(setting: Setting, which: Pass) -> str:
    """The name of a layer."""
    return f"layer {setting}: {which.value}"


def reference_name(which: Pass) -> str:
    """The name of the reference's layer."""
    return f"reference layer: {which.value}"


def beside_name(which: Pass) -> str:
    """The name of the layer that takes turns with the reference's."""
    return f"layer {BASE}, beside the reference: {which.value}"


def together_with(arena: SuiteArena, setting: Setting, which: Pass, how: How) -> tuple[Setting, ...]:
    """What takes turns with ``setting``, itself among it; skips the bench where it has no place."""
    groups = TOGETHER_AS_GRAPHS if how is How.GRAPH else TOGETHER if arena.on_gpu else TOGETHER_INTERPRETED
    if which is Pass.INFERENCE and setting.again:
        pytest.skip("without a backward nothing is gathered again")
    for group in groups:
        if setting in group:
            return tuple(other for other in group if which is Pass.STEP or not other.again)
    skip_if_interpreted(arena)
    pytest.skip("a graph has no place for a read on the host")


def skip_if_interpreted(arena: SuiteArena) -> None:
    """Leave to GPUs what says nothing new."""
    if not arena.on_gpu:
        pytest.skip("interpreted, a layer takes long, and the tests run it in every setting")


@pytest.fixture(scope="session")
def bout(arena: SuiteArena) -> Bout:
    """The layer."""
    return Bout.of_layer(arena, LayerOptions())


@pytest.fixture(scope="session")
def biased_bout(arena: SuiteArena) -> Bout:
    """The layer with biases."""
    return Bout.of_layer(arena, LayerOptions(biased=True))


each_pass = pytest.mark.parametrize("which", PASSES, ids=lambda which: which.name.lower())


@each_pass
def bench_products(arena: SuiteArena, bout: Bout, tell: Tell, how: How, which: Pass) -> None:
    """The matrix products of the layer alone: two forward, and four more in backward."""
    found = bout.of(together_with(arena, BASE, which, how), which, how)
    tell(arena.record(found[products_name(which)]))


@each_pass
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def bench_layer(arena: SuiteArena, bout: Bout, tell: Tell, how: How, setting: Setting, which: Pass) -> None:
    """``ep.moe``. Every setting gives the same bits, eager and as a graph."""
    found = bout.of(together_with(arena, setting, which, how), which, how)
    tell(arena.record(found[layer_name(setting, which)]))


@each_pass
@pytest.mark.parametrize("name", [reference_name, beside_name], ids=["reference", "fast"])
def bench_reference(arena: SuiteArena, bout: Bout, tell: Tell, name: Callable[[Pass], str], which: Pass) -> None:
    """``ep.moe`` of the reference backend, over NCCL on GPUs, and that of the fast one."""
    if which is Pass.STEP:
        skip_if_interpreted(arena)
    tell(arena.record(bout.of((), which, arena.behind_work)[name(which)]))


@each_pass
def bench_biased(arena: SuiteArena, biased_bout: Bout, tell: Tell, which: Pass) -> None:
    """``ep.moe`` with biases."""
    skip_if_interpreted(arena)
    found = biased_bout.of((BIASED,), which, arena.behind_work)
    tell(arena.record(found[layer_name(BIASED, which)]))
