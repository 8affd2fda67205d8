"""The house rules that a reader relies on: imports go down, stems are mirrored, primitives have one signature."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from limits import HANG_SECONDS

import sonic_ep
from sonic_ep.backend import CombinePrimitive, DispatchPrimitive

PACKAGE = Path(sonic_ep.__file__).parent
TESTS = Path(__file__).parent
LEAVES = {
    *{"config", "plan", "activation", "cost", "memory", "group", "machine", "fields"},
    *{"meeting", "board", "turn", "waits", "once", "precision", "eager", "split_backward"},
}

# What each part may import of the package. A part is a module or a folder right below sonic_ep.
MAY_IMPORT = {
    **{leaf: {"config"} for leaf in LEAVES},
    "config": set(),
    "board": {"group"},
    "once": {"precision"},
    "split_backward": {"eager"},
    "waits": {"config", "eager", "group", "meeting", "board", "turn"},
    "backend": LEAVES,
    "validation": {*LEAVES, "backend"},
    "reference": {*LEAVES, "backend"},
    "fast": {*LEAVES, "backend"},
    "calls": {*LEAVES, "backend"},
    "api": {*LEAVES, "backend", "validation", "calls"},
    "module": {*LEAVES, "api", "validation"},
    "testing": {*LEAVES, "backend", "api", "module", "reference"},
    "ceilings": {*LEAVES, "backend", "testing", "fast"},
    "profiler": {*LEAVES, "backend", "api", "validation", "testing", "ceilings"},
    "benchmark": {*LEAVES, "backend", "api", "testing", "reference", "fast", "ceilings", "profiler"},
    "report": LEAVES,
    "cli": {*LEAVES, "backend", "api", "testing", "fast", "ceilings", "profiler", "benchmark", "report"},
    "__init__": {*LEAVES, "api", "module", "profiler"},
    "__main__": {"cli"},
}
# Stems of one backend that the other need not have.
FAST_ALONE = {
    # Shared memory and what stands on it.
    *{"workspace", "shared_files", "expiry", "device", "staging", "receiving", "copy_engine", "link"},
    # What only a backend that never reads the host has: kernels of the plan and of rows, and what the device found.
    *{"availability", "plan_kernels", "planner", "rows", "verdict", "unheard"},
    # Kernels of the router and the experts, their products, and the autograd functions around both.
    *{"router_kernels", "activation_kernels", "bias_kernels", "grouped_gemm", "grouped_gemm_kernels"},
    *{"exchange", "expert_layer", "rank_sum", "interpreter"},
}
# What a primitive of the fast backend has besides the protocol: it allocates beforehand, and dispatch has two halves.
FAST_METHODS = {"dispatch": {"reserve", "stage", "pull"}, "combine": {"reserve"}}
REFERENCE_ALONE = {"dense", "collectives"}


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of everything that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where an arrow goes"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_parts_are_those_we_know() -> None:
    assert {part_of(path) for path in modules(PACKAGE)} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", modules(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_go_down_only(path: Path) -> None:
    own = [name for name in imported(path) if name.startswith("sonic_ep.")]
    parts = {name.split(".")[1] for name in own} - {part_of(path)}
    assert parts <= MAY_IMPORT[part_of(path)]


@pytest.mark.parametrize("path", modules(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_imports_stay_where_they_belong(path: Path) -> None:
    names = imported(path)
    triton = {name for name in names if name.split(".")[0] == "triton"}
    assert not triton or part_of(path) == "fast", "only the fast backend imports triton"
    symmetric = {name for name in names if "_symmetric_memory" in name}
    assert not symmetric or path == PACKAGE / "fast" / "workspace.py"


def stems(backend: str) -> set[str]:
    """Stems of a backend's modules, those of a folder as folder/stem."""
    folder = PACKAGE / backend
    names = {str(path.relative_to(folder).with_suffix("")) for path in modules(folder)}
    return {name for name in names if not name.endswith("__init__")}


def test_stems_of_the_backends_are_mirrored() -> None:
    assert stems("fast") - FAST_ALONE <= stems("reference")
    for kind in ("dispatch/", "combine/"):
        assert {stem for stem in stems("fast") if stem.startswith(kind)} == {
            stem for stem in stems("reference") if stem.startswith(kind)
        }
    assert stems("reference") >= REFERENCE_ALONE


def test_every_stem_has_its_tests() -> None:
    tested = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    tops = {part_of(path) for path in modules(PACKAGE)} - {"__init__", "__main__"}
    inside = {name.split("/")[0] for name in stems("reference")}
    # A folder of the package is covered by the tests of what it holds.
    expected = (tops - {"reference", "fast", "testing"}) | inside | {"checks", "cases", "ranks", "timing"}
    assert expected <= tested


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("path", modules(PACKAGE / "fast"), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_all_but_kernels_have_types(path: Path) -> None:
    """Linter and type checker look away in this folder, because of its kernels; here nothing else slips through."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        if not is_kernel(function):
            assert function.returns is not None, function.name
            parameters = [*function.args.args, *function.args.kwonlyargs]
            assert all(p.annotation is not None for p in parameters if p.arg != "self"), function.name


def primitives(backend: str, kind: str) -> list[type]:
    """The classes of a backend that move rows, one in each module of its folder ``kind``."""
    found = []
    for path in sorted((PACKAGE / backend / kind).glob("[a-z]*.py")):
        module = importlib.import_module(f"sonic_ep.{backend}.{kind}.{path.stem}")
        own = [
            value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        found += [value for value in own if value.__name__.endswith(kind.capitalize())]
    return found


def signatures(kind: type) -> dict[str, str]:
    methods = inspect.getmembers(kind, callable)
    return {name: str(inspect.signature(method)) for name, method in methods if not name.startswith("_")}


@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.parametrize(("kind", "protocol"), [("dispatch", DispatchPrimitive), ("combine", CombinePrimitive)])
def test_primitives_of_both_backends_have_one_signature(backend: str, kind: str, protocol: type) -> None:
    found = primitives(backend, kind)
    assert len(found) == 3
    own = FAST_METHODS[kind] if backend == "fast" else set()
    for primitive in found:
        methods = signatures(primitive)
        assert {name: methods[name] for name in methods.keys() - own} == signatures(protocol), primitive
        assert own <= methods.keys()
    names = {primitive.__name__ for primitive in found}
    assert names == {primitive.__name__ for primitive in primitives("reference", kind)}


def test_the_library_never_needs_its_tests_or_triton() -> None:
    """A fresh interpreter that imports the package and runs the reference has loaded neither."""
    import subprocess
    import sys

    program = (
        "import sys, torch, sonic_ep; sonic_ep.ExpertParallel(backend='reference').plan(torch.zeros(1, 1).int(), 2);"
        "print([name for name in ('triton', 'sonic_ep.testing', 'sonic_ep.cli', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    assert done.stdout.strip() == "[]"
