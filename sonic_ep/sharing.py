"""One ``ExpertParallel`` for each process group, for layers that are made in different places."""

import gc
import inspect
import weakref
from collections.abc import Mapping
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from sonic_ep.api import ExpertParallel
from sonic_ep.config import EPConfig
from sonic_ep.distributed.group import Group, resolve_group

OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(ExpertParallel).parameters.items()
    if name != "group"
}
# The shared objects of this process that have a user, with the options that they were made with.
_made: weakref.WeakKeyDictionary[ExpertParallel, Mapping[str, Any]] = weakref.WeakKeyDictionary()


def shared(group: Group = None, **options: Any) -> ExpertParallel:
    """The ``ExpertParallel`` that all callers with this process group share, made by the first of them.

    group: as for ``ExpertParallel``; a mesh and its process group are the same. options: those of ``ExpertParallel``.
    An option that is not given is not compared; with none, any object will do. One that is closed, or that an error
    has ended, is replaced by a new one; so is that of a process group which has been destroyed.

    It is freed with its last user, without ``close()``: only those who asked hold it, and graphs keep what backward
    needs. All ranks have to make the first call, and to drop the last reference, at the same place of their programs.
    Models in FSDP2 are cycles of references, which the garbage collector frees at other times on other ranks: so a call
    that finds an object collects garbage first.

    Raises ``ValueError`` for an option other than the shared object's, ``TypeError`` for one that does not exist.
    """
    place = resolve_group(group)
    if unknown := sorted(options.keys() - OPTIONS.keys()):
        raise TypeError(f"{place}: shared: got options {', '.join(unknown)}, expected some of {', '.join(OPTIONS)}")
    if any(held.group == place for held in _made):
        gc.collect()
    for held, made_with in list(_made.items()):
        if held.group == place and held.usable:
            for name, value in options.items():
                if _effective(name, value) != made_with[name]:
                    expected = f"{made_with[name]!r}, as the object that is shared was made"
                    raise ValueError(f"{place}: {name} of shared: got {value!r}, expected {expected}")
            if isinstance(group, DeviceMesh):
                held.mesh = held.mesh or group
            return held
    made = ExpertParallel(group, **options)
    made.release_with_last_user()
    _made[made] = {name: _effective(name, value) for name, value in {**OPTIONS, **options}.items()}
    return made


def _effective(name: str, value: Any) -> Any:
    """The option as it counts: no config is the default one."""
    return EPConfig() if name == "config" and value is None else value
