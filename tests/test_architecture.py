"""Parts, imports, names and sizes are those of docs/architecture.md, and marks of tests those of docs/guarantees.md."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TypeVar

import pytest
from limits import HANG_SECONDS

import sonic_ep
from sonic_ep.backend import CombinePrimitive, DispatchPrimitive

NodeT = TypeVar("NodeT", bound=ast.AST)
PACKAGE = Path(sonic_ep.__file__).parent
ROOT = Path(__file__).parents[1]

# A part is a module or a folder right below sonic_ep. It imports parts of the rows above its own, and no other.
LAYERS = [
    {"errors", "compat", "version"},
    {"config", "autograd_utils", "profiler_names"},
    {"activation", "cost", "plan"},
    {"call_memory", "distributed"},
    {"backend", "sharding"},
    {"checks", "call_guard", "reference", "fast"},
    {"router_checks", "expert_checks"},
    {"call_checks"},
    {"ops"},
    {"api"},
    {"sharing", "router", "capture_conditions"},
    {"experts", "graphs"},
    {"module"},
    {"profiler", "parallel", "checkpoint"},
    {"__init__", "testing", "integrations"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
TRITON = {"profiler/link_kernels.py", "testing/interpreter.py"}
# What `import sonic_ep` and the reference need not load.
HEAVY = ("triton", "matplotlib", "sonic_ep.testing", "sonic_ep.cli", "schema", "harness", "report_page")

# What a primitive of the fast backend has besides the protocol: it allocates beforehand; dispatch comes in two steps,
# and combine also behind a barrier that has passed, or with scores that have not been gathered.
FAST_METHODS = {
    "dispatch": {"reserve", "before_staging", "stage", "pull"},
    "combine": {"reserve", "expect", "sums", "weighted"},
}

# Words that earlier versions used; docs/architecture.md has those of the field. A name is split at _ and at capitals.
FORMER_WORDS = re.compile(
    "meetings?|board|notices?|waits|fences?|publish|verdict|expiry|unheard|stray(ed)?|spoils?|movable|arenas?|ceilings"
    "|pieces|beside|arrivals?|homes?"
)
FORMER_NAMES = re.compile("Turn(Error)?|turn|Calls|Edge|Kit|Bar|usual|company|GREEN|RED|let_go|take_rows|power_of_two")
FORMER_MODULES = re.compile(
    "calls|group|once|precision|eager|split_backward|fields|words|memory|machine|layer|expert_layer|device|availability"
    "|rows|staging|receiving|grouped_gemm|rank_sum|(router|activation|bias|plan)_kernels|shared_files|validation|link"
)
# Modules whose place makes the word right, and names that other libraries give.
GOOD_MODULES = {"distributed/group.py", "profiler/machine.py", "fast/staging.py", "cli/memory.py"}
NOT_OURS = {"home", "HOME", "fence_async_shared"}

MOST_LINES, MOST_LINES_OF_FUNCTION, USUAL_LINES = 450, 100, 40


def files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


SOURCES = files(PACKAGE)
ALL = files(PACKAGE, ROOT / "bench")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def nodes(path: Path, kind: type[NodeT]) -> Iterator[NodeT]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind))


def imported(path: Path) -> set[str]:
    """Full names of everything that a file imports, at its top or inside a function."""
    found = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    for node in nodes(path, ast.ImportFrom):
        assert node.level == 0, f"{path}: a relative import hides where an arrow goes"
        found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_parts_are_those_of_the_layers() -> None:
    assert {part_of(path) for path in SOURCES} == LEVEL.keys()
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == {"distributed", "reference", "fast", "profiler", "integrations", "ops", "testing", "cli"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down_and_heavy_ones_stay_where_they_belong(path: Path) -> None:
    names, part, place = imported(path), part_of(path), path.relative_to(PACKAGE).as_posix()
    parts = {name.split(".")[1] for name in names if name.startswith("sonic_ep.")} - {part}
    # What `from sonic_ep import ...` names is a part, or comes from the top.
    assert {other for other in parts if LEVEL.get(other, LEVEL["__init__"]) >= LEVEL[part]} == set()
    assert part == "fast" or place in TRITON or "triton" not in {name.split(".")[0] for name in names}
    symmetric = [name for name in names if name.startswith("torch.distributed._symmetric_memory")]
    assert not symmetric or place == "fast/symmetric_memory.py"


def test_importing_the_package_and_running_the_reference_loads_nothing_heavy() -> None:
    program = (
        "import sys, torch, sonic_ep; sonic_ep.ExpertParallel(backend='reference').plan(torch.zeros(1, 1).int(), 2);"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    assert done.stdout.strip() == "[]"


def stems(backend: str, kind: str) -> set[str]:
    return {path.stem for path in (PACKAGE / backend / kind).glob("[a-z]*.py")} - {"base"}


def primitives(backend: str, kind: str) -> dict[str, type]:
    """The classes of a backend that move rows, by name, one in each module of its folder ``kind``."""
    modules = [importlib.import_module(f"sonic_ep.{backend}.{kind}.{stem}") for stem in stems(backend, kind)]
    own = [c for module in modules for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__]
    return {c.__name__: c for c in own if inspect.isclass(c) and c.__name__.endswith(kind.capitalize())}


def signatures(kind: type) -> dict[str, str]:
    methods = inspect.getmembers(kind, callable)
    return {name: str(inspect.signature(method)) for name, method in methods if not name.startswith("_")}


@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.parametrize(("kind", "protocol"), [("dispatch", DispatchPrimitive), ("combine", CombinePrimitive)])
def test_modes_are_mirrored_and_have_one_signature(backend: str, kind: str, protocol: type) -> None:
    assert stems("fast", kind) == stems("reference", kind)
    found = primitives(backend, kind)
    assert len(found) == 3
    assert found.keys() == primitives("reference", kind).keys()
    own = FAST_METHODS[kind] if backend == "fast" else set()
    for primitive in found.values():
        methods = signatures(primitive)
        assert {name: methods[name] for name in methods.keys() - own} == signatures(protocol), primitive
        assert own <= methods.keys()


def test_no_class_has_the_name_of_another() -> None:
    """But where backends mirror each other."""
    places = defaultdict(list)
    for path in ALL:
        for node in nodes(path, ast.ClassDef):
            places[node.name].append(part_of(path) if path.is_relative_to(PACKAGE) else "bench")
    twice = {name: sorted(owners) for name, owners in places.items() if len(owners) > 1}
    assert {name: owners for name, owners in twice.items() if owners != ["fast", "reference"]} == {}


def is_former(name: str) -> bool:
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return bool(FORMER_NAMES.fullmatch(name) or any(FORMER_WORDS.fullmatch(word.lower()) for word in words))


def test_names_are_those_of_the_field() -> None:
    for path in ALL:
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        names = {token.string for token in tokens if token.type == tokenize.NAME} - NOT_OURS
        assert [name for name in names | {path.stem} if is_former(name)] == [], path
    modules = {path.relative_to(PACKAGE).as_posix(): path.stem for path in SOURCES}
    assert {place for place, stem in modules.items() if FORMER_MODULES.fullmatch(stem)} <= GOOD_MODULES


def test_files_and_functions_are_short() -> None:
    """And nine functions of ten are read at a glance."""
    assert {path for path in ALL if len(path.read_text().splitlines()) > MOST_LINES} == set()
    functions = [(path, node) for path in ALL for node in nodes(path, ast.FunctionDef)]
    lengths = {f"{path}:{node.lineno}": node.end_lineno - node.lineno + 1 for path, node in functions}
    assert {place: n for place, n in lengths.items() if n > MOST_LINES_OF_FUNCTION} == {}
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= USUAL_LINES


def test_all_but_kernels_have_types() -> None:
    """Linter and type checker ignore this folder because of its kernels."""
    for function in (node for path in files(PACKAGE / "fast") for node in nodes(path, ast.FunctionDef)):
        decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
        if not decorators & {"triton.jit", "triton_kernel", "gluon.jit", "gluon_kernel"}:
            assert function.returns is not None, function.name
            parameters = [*function.args.args, *function.args.kwonlyargs]
            assert all(p.annotation is not None for p in parameters if p.arg != "self"), function.name


def test_every_promise_is_kept_by_a_test_and_every_mark_is_of_a_promise() -> None:
    """And files that docs/guarantees.md names exist."""
    text = (ROOT / "docs" / "guarantees.md").read_text()
    # Rows of tables: the promise, and last the words that `promise` marks its tests with.
    kept_by = [row.strip("| ").split(" | ")[-1] for row in re.findall(r"^\| .*$", text, re.MULTILINE)]
    kept_by = [by for by in kept_by if by not in ("kept by", "recorded in") and "bench/results" not in by]
    listed = [re.findall(r"`([a-z0-9-]+)`", by) for by in kept_by]
    assert len(kept_by) > 40
    assert all(words or by.startswith("see ") for words, by in zip(listed, kept_by, strict=True))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    marks = re.findall(r"^(?:@|pytestmark = )promise\((.*)\)$", sources, re.MULTILINE)
    assert sorted(chain(*listed)) == sorted({word.strip('"') for found in marks for word in found.split(", ")})
    named = re.findall(r"`([\w/]+/[\w/.]+\.\w+)`", text)
    assert named
    assert all((ROOT / target).exists() for target in named), named
