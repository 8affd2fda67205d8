"""Triton's interpreter, a third faster: kernels on the CPU, for tests.

It replaces the functions of Triton's language by its own whenever a kernel calls another function, which takes longer
than most of them. Once for each launch is enough, as long as that goes on.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import triton.language as tl
import triton.runtime.interpreter as interpreter


class Nothing:
    """A replacement of nothing: what has been replaced already stays until the launch is over."""

    def restore(self) -> None:
        """Nothing is left to restore."""


class OncePerLaunch:
    """Stands in for the interpreter's own ``replace``, a function of the function to be run."""

    def __init__(self, replace: Any) -> None:
        self._replace = replace
        self._replaced: frozenset[int] | None = None

    def __call__(self, function: Any) -> Any:
        """Replace the language as ``function`` sees it, unless this launch has done so."""
        seen = language_of(function)
        if self._replaced is not None and seen <= self._replaced:
            return Nothing()
        outermost = self._replaced is None
        scope = self._replace(function)
        self._replaced = seen | (self._replaced or frozenset())
        if outermost:
            self._forget_with(scope)
        return scope

    def _forget_with(self, scope: Any) -> None:
        restore = scope.restore

        def restore_and_forget() -> None:
            self._replaced = None
            restore()

        scope.restore = restore_and_forget


@cache
def language_of(function: Any) -> frozenset[int]:
    """Which modules of Triton's language a function sees, by their identity."""
    modules = (value for value in function.__globals__.values() if inspect.ismodule(value))
    return frozenset(id(module) for module in modules if module in (tl, tl.core))


def hasten() -> None:
    """Let the interpreter of this process replace the language once per launch; nothing where it works differently."""
    replace = getattr(interpreter, "_patch_lang", None)
    if replace is not None and not isinstance(replace, OncePerLaunch):
        interpreter._patch_lang = OncePerLaunch(replace)
