"""Every kernel of the fast backend once, forward and backward, on a small shape: for tests, and for memory checkers.

As a program it runs on the ranks of torchrun, on GPUs, or with TRITON_INTERPRET=1 on the CPU; see ``make sanitize``.
"""

from dataclasses import replace

import torch

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.cli.launch import joined_group
from sonic_ep.group import resolve_group

TOKENS = 5
LINK_BYTES = 2**15


def run_every_kernel(device: torch.device, dtype: torch.dtype, hidden: int, top_k: int) -> None:
    """Collective. All modes, bounded and with exact sizes, with gradients."""
    x = torch.randn(TOKENS, hidden, device=device).to(dtype).requires_grad_()
    num_experts = 24 * top_k
    idx = torch.rand(TOKENS, num_experts, device=device).argsort(dim=1)[:, :top_k]
    for dispatch, combine in zip(DispatchMode, CombineMode, strict=True):
        modes = EPConfig(dispatch=dispatch, combine=combine)
        for config in (replace(modes, max_rows=10_000), replace(modes, cpu_sync_on_runtime=True)):
            with ExpertParallel(backend="fast", config=config) as ep:
                plan = ep.plan(idx, num_experts=num_experts)
                scores = torch.ones(TOKENS, top_k, device=device, requires_grad=True)
                y = ep.combine(ep.dispatch(x, plan), scores, plan)
                y.sum().backward()
                ep.check()
    over_the_link(device)


def over_the_link(device: torch.device) -> None:
    """Collective. The kernels that measure the link, where there is one."""
    # Not at the top: triton asks whether it is to interpret when it is imported, and only ranks know.
    from sonic_ep.fast.link import Link
    from sonic_ep.fast.workspace import Workspace

    group = resolve_group(None)
    if group.world_size > 1:
        workspace = Workspace(group, device)
        link = Link(workspace, LINK_BYTES)
        link.read(link.launches[0])
        link.expect_next("kernel reads")
        link.write(link.launches[0])
        link.expect_last("kernel writes")
        workspace.close()


def main() -> None:
    """Run them on this rank of torchrun's, at a width of whole 16 bytes and at another."""
    with joined_group() as place:
        for dtype, hidden in ((torch.bfloat16, 4096), (torch.float32, 33), (torch.float16, 7)):
            run_every_kernel(place.device, dtype, hidden, top_k=3)
        print(f"every kernel has run on {place.device}", flush=True)


if __name__ == "__main__":
    main()
