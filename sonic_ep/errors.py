"""The errors that the library raises, besides ``ValueError`` and ``TypeError`` for wrong arguments."""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot run here; the message lists every reason."""


class RowOverflowError(RuntimeError):
    """More rows were routed to a rank than ``EPConfig.max_rows`` admits; names the rows needed and the bound."""


class PeerError(RuntimeError):
    """Another rank did not do its part; the message names that rank, and the phase and the step of this one."""


class PeerTimeoutError(PeerError):
    """A rank waited for another in vain, for the whole ``timeout`` of its ``ExpertParallel``."""


class PeerLostError(PeerError):
    """A rank has gone while another waited for it."""


class CollectiveMismatchError(PeerError):
    """Ranks came to one meeting from different places, or with different calls."""


class SharedMemoryError(RuntimeError):
    """Memory for all ranks cannot be had: it is used up on the rank that the message names, or sizes differ."""


class RecomputeError(RuntimeError):
    """Tokens were routed in one way in forward, and in another when activation checkpointing ran it again."""


class ClosedError(ValueError):
    """An ``ExpertParallel`` was used after ``close()``, or after its process group was destroyed."""


class PlanError(AssertionError):
    """A plan contradicts its own definition: a defect of the library, never of its caller."""


class ConcurrentCallError(RuntimeError):
    """It is not the caller's turn."""
