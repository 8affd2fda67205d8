"""Every kernel of the fast backend once, forward and backward, on a small shape: for tests, and for memory checkers.

As a program it runs on the ranks of torchrun, on GPUs, or with TRITON_INTERPRET=1 on the CPU; see ``make sanitize``.
"""

from dataclasses import replace

import torch

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel
from sonic_ep.activation import ACTIVATIONS
from sonic_ep.cli.launch import joined_group
from sonic_ep.distributed.group import resolve_group

TOKENS = 5
INTERMEDIATE = 64
WIDEST_PRODUCT = 256
SCORE_ORDERS = {"interleaved": "topk_then_softmax", "concat": "softmax_then_topk"}
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
    through_the_experts(device, dtype, hidden)
    by_own_products(device, dtype, hidden)
    over_the_link(device)


def through_the_experts(device: torch.device, dtype: torch.dtype, hidden: int) -> None:
    """Collective. The layer with every kind of activation and both layouts, with biases, x gathered again."""
    group = resolve_group(None)
    held, config = 2, EPConfig(redispatch_x_in_backward=True)
    router_w = torch.randn(held * group.world_size, hidden, device=device).to(dtype)
    for name, layout in zip(("swiglu", "relu_sq", "geglu", "relu"), ("interleaved", "concat") * 2, strict=True):
        width = ACTIVATIONS[name].up_width(INTERMEDIATE)
        shapes = ((TOKENS, hidden), (held, width, hidden), (held, hidden, INTERMEDIATE), (held, width), (held, hidden))
        x, w1, w2, b1, b2 = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
        with ExpertParallel(backend="fast", config=config) as ep:
            options = {"b1": b1, "b2": b2, "activation": name, "gate_layout": layout}
            out = ep.moe(x, router_w.requires_grad_(), w1, w2, 2, score_order=SCORE_ORDERS[layout], **options)
            out.y.sum().backward()
            ep.check()


def by_own_products(device: torch.device, dtype: torch.dtype, hidden: int) -> None:
    """The grouped products in the tiles that a GPU gets, also where PyTorch's would do."""
    # Not at the top, as below.
    from sonic_ep.fast.gemm import LARGEST, TritonGemm

    gemm, hidden = TritonGemm(tiles=LARGEST[dtype.itemsize]), min(hidden, WIDEST_PRODUCT)
    rows = torch.randn(TOKENS, hidden, device=device).to(dtype)
    weight = torch.randn(2, INTERMEDIATE, hidden, device=device).to(dtype)
    ends = torch.tensor([2, TOKENS], dtype=torch.int32, device=device)
    product = gemm.rows(rows, weight.transpose(1, 2), ends, weight[:, :, 0].contiguous())
    gemm.rows(product, weight, ends)
    gemm.weights(product, rows, ends)


def over_the_link(device: torch.device) -> None:
    """Collective. The kernels that measure the link, where there is one."""
    # Not at the top: triton asks whether it is to interpret when it is imported, and only ranks know.
    from sonic_ep.fast.workspace import Workspace
    from sonic_ep.profiler.link_kernels import KERNEL_COPIES, Link

    group = resolve_group(None)
    if group.world_size > 1:
        workspace = Workspace(group, device)
        link = Link(workspace, LINK_BYTES)
        following = (group.rank + 1) % group.world_size
        link.move(following, group.rank, KERNEL_COPIES[0])
        link.check(following, "kernel reads")
        link.move(group.rank, following, KERNEL_COPIES[0])
        link.check((group.rank - 1) % group.world_size, "kernel writes")
        workspace.close()


def main() -> None:
    """Run them on this rank of torchrun's, at a width of whole 16 bytes and at another."""
    with joined_group() as place:
        for dtype, hidden in ((torch.bfloat16, 4096), (torch.float32, 33), (torch.float16, 7)):
            run_every_kernel(place.device, dtype, hidden, top_k=3)
        print(f"every kernel has run on {place.device}", flush=True)


if __name__ == "__main__":
    main()
