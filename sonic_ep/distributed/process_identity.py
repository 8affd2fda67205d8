"""Which process a rank is, so that a rank of the same machine can see whether it still runs. Linux only."""

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

BOOT_ID, NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
# Of /proc/PID/stat after the name in parentheses: the state, and the start in clock ticks since boot.
STATE, STARTED = 0, 19
# A killed process that its parent has not waited for yet, and one that is being removed.
DEAD_STATES = ("Z", "X")


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """machine: boot and PID namespace, within which ``pid`` counts; None if not known. started: tells reuses apart."""

    machine: str | None
    pid: int
    started: str = ""

    @staticmethod
    def own() -> "ProcessIdentity":
        """This process."""
        return _identity_of(os.getpid())

    def has_died(self) -> bool | None:
        """Whether the process is gone; None where that cannot be known: it is on another machine or in a container."""
        if self.machine is None or self.machine != ProcessIdentity.own().machine:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            # It runs, but belongs to another user.
            return False
        found = _stat_of(self.pid)
        return len(found) > STARTED and (found[STATE] in DEAD_STATES or found[STARTED] != self.started)


@cache
def _identity_of(pid: int) -> ProcessIdentity:
    with suppress(OSError):
        machine = f"{BOOT_ID.read_text().strip()} {os.readlink(NAMESPACE)}"
        return ProcessIdentity(machine=machine, pid=pid, started=_stat_of(pid)[STARTED])
    return ProcessIdentity(machine=None, pid=pid)


def _stat_of(pid: int) -> list[str]:
    """Fields of the process from its state on; none if they cannot be read."""
    with suppress(OSError):
        # The name may hold spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []
