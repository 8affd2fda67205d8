"""The backends that a test body runs on, and the primitives of each."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from sonic_ep.distributed.group import resolve_group

BACKENDS = ["reference", "fast"]
# Eight ranks share the GPUs of a machine; interpreted, they would take minutes.
ON_GPUS = [8] if torch.cuda.device_count() > 1 else []
WORLD_SIZES = [1, 2, 3, 4, *ON_GPUS]
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def dispatch_primitives_of(backend: str, device: torch.device) -> Mapping[Any, Any]:
    """Every dispatch mode of ``backend`` for the world. Collective."""
    if backend == "reference":
        from sonic_ep.distributed.collectives import BoundedCollectives
        from sonic_ep.reference.dispatch import dispatch_primitives

        return dispatch_primitives(BoundedCollectives(resolve_group(None)))
    # Not at the top: Triton decides at import whether it interprets, which only ranks know.
    from sonic_ep.fast.dispatch import dispatch_primitives as fast_primitives
    from sonic_ep.fast.workspace import Workspace

    return fast_primitives(Workspace(resolve_group(None), device))
