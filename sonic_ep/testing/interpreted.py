"""The fast backend on the CPU: what its kernels need under Triton's interpreter."""

from __future__ import annotations

import os

from sonic_ep.fast.capabilities import interpreted, software_reasons


def install_interpreter() -> None:
    """Give ``backend="fast"`` shared host memory, and a faster interpreter, in this process.

    Nothing where ``TRITON_INTERPRET`` is not set, or was set after Triton was imported.
    """
    if "TRITON_INTERPRET" not in os.environ or software_reasons() or not interpreted():
        return
    from sonic_ep.fast import symmetric_memory
    from sonic_ep.testing.host_memory import HostSharedMemory
    from sonic_ep.testing.interpreter import hasten

    symmetric_memory.host_transport = HostSharedMemory
    hasten()
