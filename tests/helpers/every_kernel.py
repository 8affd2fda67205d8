"""Every kernel of the fast backend once, forward and backward, on a small shape: for tests, and for memory checkers.

As a program it runs on the ranks of torchrun, on GPUs, or with TRITON_INTERPRET=1 on the CPU; see ``make sanitize``.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sonic_ep import CombineMode, DispatchMode, EPConfig, ExpertParallel, RouterConfig
from sonic_ep.activation import ACTIVATIONS
from sonic_ep.cli.launch import joined_group
from sonic_ep.distributed.group import resolve_group
from sonic_ep.testing.cases import GPT_OSS

TOKENS, INTERMEDIATE, HELD = 5, 64, 4
WIDEST_PRODUCT, LINK_BYTES = 256, 2**15
# Of the modes in turn. Without a bound rows have room for the most, as in the layer.
FLAGS = ({"max_rows": 10_000}, {"cpu_sync_on_runtime": True}, {"cpu_sync_on_runtime": True})
ACTIVATIONS_AND_LAYOUTS = {"swiglu": "interleaved", "relu_sq": "concat", "geglu": "interleaved", "relu": "concat"}
OVER_ALL, GROUPS = {"score_order": "softmax_then_topk"}, {"num_groups": 2, "top_groups": 1}
# Of each activation, and whether it has a correction.
ROUTERS = {
    "swiglu": (RouterConfig(), False),
    "relu_sq": (RouterConfig(**OVER_ALL), False),
    "geglu": (RouterConfig(score_function="sigmoid", norm_topk_probs=True, scale=2.5, **GROUPS, group_top=1), True),
    "relu": (RouterConfig(**OVER_ALL), True),
}


def run_every_kernel(device: torch.device, dtype: torch.dtype, hidden: int, top_k: int) -> None:
    """Collective. All modes, with gradients."""
    # Not at the top, as below.
    from sonic_ep.fast.plan import FEW_TILES, tile_tokens

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    x, num_experts = drawn(TOKENS, hidden), 24 * top_k
    idx = torch.rand(TOKENS, num_experts, device=device).argsort(dim=1)[:, :top_k]
    for dispatch, combine, flags in zip(DispatchMode, CombineMode, FLAGS, strict=True):
        with ExpertParallel(backend="fast", config=EPConfig(dispatch=dispatch, combine=combine, **flags)) as ep:
            plan = ep.plan(idx, num_experts=num_experts)
            scores = torch.ones(TOKENS, top_k, device=device, requires_grad=True)
            ep.combine(ep.dispatch(x, plan), scores, plan).sum().backward()
            ep.check()
    with ExpertParallel(backend="fast") as ep:
        # More tiles of slots than the last kernel of a plan adds up by itself.
        tokens = (FEW_TILES + 1) * tile_tokens(top_k) // ep.world_size + 1
        ep.plan(idx.new_full((tokens, top_k), -1), num_experts)
    # The layer with every kind of activation and both layouts, with biases, x gathered again.
    for name, layout in ACTIVATIONS_AND_LAYOUTS.items():
        with ExpertParallel(backend="fast", config=EPConfig(redispatch_x_in_backward=True)) as ep:
            width = ACTIVATIONS[name].up_width(INTERMEDIATE)
            experts = HELD * ep.world_size
            weights = drawn(experts, hidden), drawn(HELD, width, hidden), drawn(HELD, hidden, INTERMEDIATE)
            options = {"activation": name, "gate_layout": layout, "router": ROUTERS[name][0]}
            if ROUTERS[name][1]:
                options |= {"router_b": drawn(experts), "correction_bias": torch.rand(experts, device=device)}
            ep.moe(x, *weights, 2, b1=drawn(HELD, width), b2=drawn(HELD, hidden), **options).y.sum().backward()
            ep.check()
    # Gate and up in two tensors, one of them transposed, an activation with numbers of its own, forward twice, and a
    # gradient of the router that is not summed over ranks.
    with ExpertParallel(backend="fast") as ep:
        up = drawn(HELD, hidden, INTERMEDIATE)
        split, w2 = (drawn(HELD, INTERMEDIATE, hidden), up.mT), drawn(HELD, hidden, INTERMEDIATE)
        weights = (drawn(HELD * ep.world_size, hidden), split, w2)
        run = partial(ep.moe, top_k=2, activation=GPT_OSS, reduce_router_grad=False)
        checkpoint(lambda x: run(x, *weights).y, x, use_reentrant=False).sum().backward()
        ep.check()
    leaving(x, idx, num_experts)
    by_own_products(drawn(TOKENS, min(hidden, WIDEST_PRODUCT)), drawn(HELD, INTERMEDIATE, min(hidden, WIDEST_PRODUCT)))
    over_the_link(device)


@torch.no_grad()
def leaving(x: Tensor, idx: Tensor, num_experts: int) -> None:
    """Collective. The kernels of ranks that leave, all of them between a dispatch and its combine."""
    with ExpertParallel(backend="fast") as ep:
        ep.dispatch(x, ep.plan(idx, num_experts=num_experts))
        ep._backend.leave()


@torch.no_grad()
def by_own_products(rows: Tensor, weight: Tensor) -> None:
    """The grouped products in the tiles that a GPU gets, also where PyTorch's would do."""
    # Not at the top, as below.
    from sonic_ep.fast.gemm import LARGEST, TritonGemm

    gemm = TritonGemm(tiles=LARGEST[rows.dtype.itemsize])
    ends = torch.tensor([2, *[TOKENS] * (HELD - 1)], dtype=torch.int32, device=rows.device)
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
        link, following = Link(workspace, LINK_BYTES), (group.rank + 1) % group.world_size
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
