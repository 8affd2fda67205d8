"""Files of shared memory on this host, as a test sees them from outside."""

import time
from pathlib import Path

PATTERN = "sonic_ep_" + "[0-9a-f]" * 32


def shared_files(folder: Path = Path("/dev/shm")) -> list[Path]:
    return sorted(folder.glob(PATTERN))


def lasting_files() -> list[Path]:
    """Those that stay 5 s: files of other tests go when all of their ranks have mapped them."""
    lasting, deadline = set(shared_files()), time.monotonic() + 5
    while lasting and time.monotonic() < deadline:
        time.sleep(0.05)
        lasting &= set(shared_files())
    return sorted(lasting)
