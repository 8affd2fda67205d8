"""The compiled form of a kernel that waits; it takes no GPU to compile it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG_SECONDS

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sonic_ep.fast.sync import barrier_kernel

kinds = dict(zip(barrier_kernel.arg_names, ("*i64", "i32", "*i64", "i32", "i64", "i64"), strict=True))
source = ASTSource(barrier_kernel, kinds, {})
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ttir"])
"""


@pytest.mark.fast
def test_host_memory_is_read_only_after_a_timeout(tmp_path: Path) -> None:
    """A read of it in every wait makes a combine five times as long.

    A read follows each of the kernel's two waits, and is nested deeper, behind a condition, than the wait.
    """
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    script = tmp_path / "compiled.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, env=settings)
    assert done.returncode == 0, done.stderr
    depth, waits, reads = 0, [], 0
    for line in done.stdout.splitlines():
        if "tt.atomic_cas" in line:
            waits.append(depth)
        if "tt.load %wait_errors_ptr" in line:
            assert depth > min(waits), line
            waits, reads = [], reads + 1
        depth += line.count("{") - line.count("}")
    assert reads == 2
