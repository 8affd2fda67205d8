"""Compile the products in Gluon for Hopper and print, as JSON, what the compiler made of each. Needs no GPU.

A program of its own: in a process that interprets kernels, none can be compiled.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import triton
from compile_kernels import HOPPER, spilled
from triton.experimental.gluon._runtime import GluonASTSource

from sonic_ep.fast.hopper_gemm import (
    DEPTH,
    HEIGHT,
    STAGES,
    WARPS,
    hopper_rows_kernel,
    hopper_weights_kernel,
    tile_width,
)
from sonic_ep.fast.hopper_tiles import LAYOUTS

# Of the instructions that the kernels are for.
NAMES = {"multiplies": "wgmma.mma_async", "loads": "cp.async.bulk.tensor", "stores": "cp.async.bulk.tensor.{}d.global"}


def blocks_of(constants: Mapping[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    """The blocks of a kernel's descriptors, as ``HopperGemm`` makes them."""
    if "M" in constants:
        return {"a_desc": (1, 1, DEPTH, HEIGHT), "b_desc": (1, 1, DEPTH, width), "out_desc": (1, HEIGHT, width)}
    b = (1, width, DEPTH) if constants["TRANSPOSED"] else (1, DEPTH, width)
    return {"a_desc": (HEIGHT, DEPTH), "b_desc": b, "out_desc": (1, 1, HEIGHT, width)}


def compiled(kernel: Any, dtype: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about the machine code of one kernel."""
    width = tile_width(sizes["N"])
    constants = {**sizes, "HEIGHT": HEIGHT, "WIDTH": width, "DEPTH": DEPTH, "STAGES": STAGES}
    blocks = blocks_of(constants, width)
    kinds = {"bias_ptr": f"*{dtype}", "group_ends_ptr": "*i32", "experts": "i32", "rows": "i32"}
    kinds |= {name: f"tensordesc<{dtype}{list(block)},{LAYOUTS[len(block)]!r}>" for name, block in blocks.items()}
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    # As at run time: tensors start at 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    given = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, given, aligned)
    code = triton.compile(source, target=HOPPER, options={"num_warps": WARPS.value, "enable_fp_fusion": False})
    ptx = code.asm["ptx"]
    return {
        "name": f"{kernel.__name__} {dtype} {constants}",
        "spilled_bytes": spilled(code.asm["cubin"]),
        "shared_bytes": code.metadata.shared,
        "frees_in_order": stages_are_freed_by_all_warps(ptx),
        "stores_in_order": tiles_are_stored_in_order(ptx),
        **{what: name.format(len(blocks["out_desc"])) in ptx for what, name in NAMES.items()},
    }


def stages_are_freed_by_all_warps(ptx: str) -> bool:
    """Whether a barrier of all that multiply stands between a product that has ended and the freeing of its stage.

    One thread frees it, and Triton puts that barrier there by itself.
    """
    freed = [found.start() for found in re.finditer(r"mbarrier\.arrive\.shared", ptx)]
    ended = [ptx.rfind("wgmma.wait_group", 0, at) for at in freed]
    return len(freed) == 2 and all(
        ptx.find("bar.sync", end, at) > end > 0 for end, at in zip(ended, freed, strict=True)
    )


def tiles_are_stored_in_order(ptx: str) -> bool:
    """Whether a tile is in shared memory, for TMA to see, before it is stored, and read before it is overwritten."""
    store = ptx.find("cp.async.bulk.tensor", ptx.find("wgmma.wait_group.sync.aligned 0"))
    fence, read = ptx.rfind("fence.proxy.async", 0, store), ptx.rfind("cp.async.bulk.wait_group.read", 0, store)
    return 0 < read < fence < ptx.rfind("bar.sync", 0, store) < store


def main() -> None:
    """Every form of both, at a width of whole tiles and at one of less than a tile."""
    found = []
    for dtype, width in (("bf16", 3072), ("fp16", 40)):
        for transposed, has_bias in ((True, True), (False, False)):
            sizes = {"K": 4096, "N": width, "TRANSPOSED": transposed, "HAS_BIAS": has_bias}
            found.append(compiled(hopper_rows_kernel, dtype, sizes))
        found.append(compiled(hopper_weights_kernel, dtype, {"M": 2880, "N": width}))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
