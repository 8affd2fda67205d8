"""The expert-parallel group: which ranks share the experts of a layer."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sonic_ep import compat
from sonic_ep.errors import ClosedError

# An int is what torch.distributed.new_group gives to ranks that are not in the new group.
Group = dist.ProcessGroup | DeviceMesh | int | None


@dataclass(frozen=True, kw_only=True)
class EPGroup:
    """This rank's place in the group. rank: r within the group. world_size: W.

    handle: a weak reference to the process group, or None: PyTorch aborts a process that exits with a gloo group.
    world_ranks: the group's ranks as numbered in the world; empty where the numbers are the same.
    """

    rank: int
    world_size: int
    handle: weakref.ref[dist.ProcessGroup] | None = None
    world_ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        place = f"rank {self.rank} of {self.world_size}"
        return f"{place} (ranks {_in_ranges(self.world_ranks)} of the world)" if self.world_ranks else place

    def of_world(self) -> tuple[int, ...]:
        """The group's ranks, in its order, as numbered in the world."""
        return self.world_ranks or tuple(range(self.world_size))

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The process group, or None if there never was one. Raises ``ClosedError`` if it has been destroyed."""
        if self.handle is None:
            return None
        group = self.handle()
        if group is None or not dist.is_initialized():
            raise ClosedError(f"{self}: the process group has been destroyed")
        return group

    def device_for(self, preferred: torch.device) -> torch.device:
        """``preferred`` if the group moves tensors of that type, else a device that it does move."""
        moved = self.device_types()
        return preferred if moved is None or preferred.type in moved else torch.device(min(moved))

    def timeout(self) -> float | None:
        """Seconds that collectives of the process group may take, the least of its devices; None if it has none."""
        group, kinds = self.process_group, self.device_types() or ()
        found = [compat.timeout_of(group, torch.device(kind)) for kind in kinds] if group is not None else []
        return min((seconds for seconds in found if seconds), default=None)

    def device_types(self) -> frozenset[str] | None:
        """Device types whose tensors the group can move; None if any will do (no process group)."""
        if self.process_group is None:
            return None
        return frozenset(entry.split(":")[0] for entry in dist.get_backend_config(self.process_group).split(","))


def resolve_group(group: Group | EPGroup) -> EPGroup:
    """The EP group of a process group or a 1-D device mesh; None is the world, or one rank without a process group.

    Raises ``ValueError`` for anything else, and for a group that this process is no member of.
    """
    if isinstance(group, EPGroup):
        return group
    if group is None:
        return _world()
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{_world()}: group: got a device mesh of {group.ndim} dimensions, expected one dimension")
        group = group.get_group()
    outside = isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER
    if outside or (isinstance(group, dist.ProcessGroup) and dist.get_rank(group) < 0):
        raise ValueError(f"{_world()}: group: got a group without this rank, expected one that it is a member of")
    if not isinstance(group, dist.ProcessGroup):
        got = type(group).__name__
        raise ValueError(f"{_world()}: group: got {got}, expected ProcessGroup, 1-D DeviceMesh or None")
    ranks, handle = dist.get_process_group_ranks(group), weakref.ref(group)
    numbers = () if ranks == list(range(len(ranks))) else tuple(ranks)
    return EPGroup(rank=dist.get_rank(group), world_size=len(ranks), handle=handle, world_ranks=numbers)


def _in_ranges(ranks: Sequence[int]) -> str:
    """Runs of consecutive ranks.

    >>> _in_ranges([8, 9, 10, 11, 2, 5])
    '8-11 2 5'
    """
    starts = [place for place, rank in enumerate(ranks) if place == 0 or rank != ranks[place - 1] + 1]
    runs = [ranks[start:end] for start, end in zip(starts, [*starts[1:], len(ranks)], strict=True)]
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _world() -> EPGroup:
    if not (dist.is_available() and dist.is_initialized()):
        return EPGroup(rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    return EPGroup(rank=dist.get_rank(), world_size=dist.get_world_size(), handle=weakref.ref(world))


def device_of_rank(rank: int) -> torch.device:
    """The CUDA device that local rank ``rank`` uses, several ranks to a device if need be; the CPU without CUDA."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
