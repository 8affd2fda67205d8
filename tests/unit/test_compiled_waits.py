"""What a kernel that waits becomes when it is compiled; no GPU is needed to see it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG_SECONDS

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sonic_ep.fast.device import barrier_kernel

kinds = {"flags_ptr": "*i64", "world_size": "i32", "expiry_ptr": "*i64", "rank": "i32", "tag": "i64", "limit": "i64"}
source = ASTSource(barrier_kernel, kinds, {})
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ttir"])
"""


def compiled(folder: Path) -> list[str]:
    """Triton's own form of the kernel at which ranks meet, for Hopper, line by line."""
    script = folder / "compiled.py"
    script.write_text(COMPILED)
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=HANG_SECONDS, env=settings
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.fast
def test_the_hosts_memory_is_read_only_after_a_wait_in_vain(tmp_path: Path) -> None:
    """It is far: a read of it in every wait makes a combine five times as long.

    Both waits of the kernel are followed by a read, and each stands deeper, behind a condition, than the wait.
    """
    depth, collectives, reads = 0, [], 0
    for line in compiled(tmp_path):
        if "tt.atomic_cas" in line:
            collectives.append(depth)
        if "tt.load %expiry_ptr" in line:
            assert depth > min(collectives), line
            collectives, reads = [], reads + 1
        depth += line.count("{") - line.count("}")
    assert reads == 2
