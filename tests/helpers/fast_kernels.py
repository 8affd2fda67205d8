"""The kernels of the library and their launches."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest


def jit_functions() -> dict[str, Any]:
    """Every compiled function of the fast backend and of the profiler by name."""
    import sonic_ep.fast

    names = [found.name for found in pkgutil.walk_packages(sonic_ep.fast.__path__, "sonic_ep.fast.")]
    modules = map(importlib.import_module, [*names, "sonic_ep.profiler.link_kernels"])
    functions = {name: value for module in modules for name, value in vars(module).items()}
    return {name: value for name, value in functions.items() if inspect.isfunction(getattr(value, "fn", None))}


def kernels() -> dict[str, Any]:
    """Those that the host launches."""
    return {name: value for name, value in jit_functions().items() if name.endswith("_kernel")}


@contextmanager
def before_each_launch(note: Callable[[str], object]) -> Iterator[None]:
    """``note(name of the kernel)`` before every launch in this process, on any device. An empty grid is no launch."""
    from sonic_ep.fast.launch import Launcher

    run = Launcher.__call__

    def noted(launcher: Any, grid: tuple[int, ...], *arguments: Any) -> None:
        if 0 not in grid:
            note(launcher._kernel.fn.__name__)
        run(launcher, grid, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launcher, "__call__", noted)
        yield


@contextmanager
def each_launch(record: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], None]) -> Iterator[None]:
    """Under the interpreter: ``record(kernel, arguments, constants and options)`` before every launch."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def recorded(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        record(kernel, arguments, constants)
        return run(kernel, *arguments, grid=grid, warmup=warmup, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", recorded)
        yield
