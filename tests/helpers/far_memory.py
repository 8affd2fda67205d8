"""Tensors of more elements than 32 bits can count, of which a test touches few.

On the CPU they are files with holes: untouched parts take neither memory nor disk.
"""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sonic_ep.testing import Rank


def far_tensor(rank: Rank, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without values: on a GPU in its memory, on the CPU over a file of nothing but a hole."""
    if rank.device.type == "cuda":
        return torch.empty(shape, dtype=dtype, device=rank.device)
    with tempfile.TemporaryDirectory(prefix="sonic_ep_far_") as folder:
        path = str(Path(folder) / "hole")
        return torch.from_file(path, shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def skip_without_memory(device_type: str, needed: int) -> None:
    """Skip the test, with the reason, where fewer than ``needed`` bytes are free."""
    if device_type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of memory on {device_type}")
