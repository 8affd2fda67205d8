"""The errors that the library raises, besides ``ValueError`` and ``TypeError`` for wrong arguments."""


class BackendUnavailableError(RuntimeError):
    """The requested backend cannot run here; the message lists every reason."""


class RowOverflowError(RuntimeError):
    """More rows were routed to a rank than ``EPConfig.max_rows``; the message gives both numbers."""


class PeerError(RuntimeError):
    """Another rank failed or is missing; the message names it, and this rank's phase and step."""


class PeerTimeoutError(PeerError):
    """A rank did not arrive within the ``timeout`` of its ``ExpertParallel``."""


class PeerLostError(PeerError):
    """A rank died or left while another waited for it."""


class CollectiveMismatchError(PeerError):
    """Ranks made different calls, or the same calls in different order."""


class SharedMemoryError(RuntimeError):
    """Shared memory could not be allocated: a rank, named in the message, is out of memory, or sizes differ."""


class RecomputeError(RuntimeError):
    """Activation checkpointing ran forward again and tokens were routed differently."""


class MissingRowsError(ValueError):
    """``combine`` got fewer rows than the plan has valid ones on this rank. Other ranks do not raise it."""


class ClosedError(ValueError):
    """An ``ExpertParallel`` was used after ``close()``, or after its process group was destroyed."""


class PlanError(AssertionError):
    """A plan contradicts its own definition: a bug in this library."""


class ConcurrentCallError(RuntimeError):
    """Another thread is inside a call, or the object belongs to another process."""
