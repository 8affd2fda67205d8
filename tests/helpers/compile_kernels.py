"""Compile recorded launches and print, as JSON, what the compiler made of each. Needs no GPU.

Arguments: the file of the launches, and the compute capability times ten: 90 is Hopper, 100 datacenter Blackwell.

A program of its own: in a process that interprets kernels, none can be compiled.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
# Kernels that take a row apart or sum it up, so that not all their accesses can be wide.
NARROW = {"poison_kernel", "activate_kernel", "activate_backward_kernel", "add_bias_dots_kernel", "sum_groups_kernel"}
OPTIONS = ("num_warps", "enable_fp_fusion", "debug", "sanitize_overflow")


VECTOR_BYTES = 16


def moves_rows(constants: dict[str, Any]) -> bool:
    """Whether a kernel copies rows or computes over them. Products of matrices have tiles of a HEIGHT."""
    return "COLUMNS" in constants or {"WIDTH", "BLOCK"} <= constants.keys()


def stages(launch: dict[str, Any]) -> bool:
    """Whether a launch copies rows to shared memory. The router's kernel also runs without."""
    return "VECTOR" in launch["constants"] and launch["constants"].get("STAGED", True)


def compiled(launch: dict[str, Any], target: GPUTarget = HOPPER) -> dict[str, Any]:
    """Facts about the machine code of one launch."""
    kernel = getattr(importlib.import_module(launch["module"]), launch["name"])
    constants = dict(launch["constants"])
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    signature = dict(zip(kernel.arg_names, launch["types"], strict=False)) | dict.fromkeys(constants, "constexpr")
    # As at run time: tensors start at 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(launch["types"]) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    code = triton.compile(source, target=target, options=options)
    ptx = code.asm["ptx"]
    return {
        "name": launch["name"],
        "constants": launch["constants"],
        "moves_rows": moves_rows(constants) and launch["name"] not in NARROW,
        "stages_bytes": VECTOR_BYTES // constants["VECTOR"] * constants["BLOCK"] if stages(launch) else 0,
        "wide_loads": len(re.findall(r"ld\.global[.:\w]*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global[.:\w]*\.v4\.b32", ptx)),
        "single_elements": len(re.findall(r"(?:ld|st)\.global[.:\w]*(?<!\.v[24])\.b16", ptx)),
        "spilled_bytes": spilled(code.asm["cubin"]),
        "waits": "wait_errors_ptr" in kernel.arg_names,
        "orders": {
            "acquire": bool(re.search(r"atom\.global[.\w]*acquire", ptx)),
            "release": bool(re.search(r"atom\.global[.\w]*release", ptx)),
            "trap": "__assertfail" in ptx,
            "signals_after_stores": signals_after_stores(ptx),
        },
        "passes_first_cache": "ld.global.cg" in ptx,
        "host_reads_are_deeper": host_reads_are_deeper(code.asm["ttir"]),
    }


def signals_after_stores(ptx: str) -> bool:
    """Whether a barrier of the program's threads stands between their stores and each flag that announces them."""
    raised = [found.start() for found in re.finditer(r"atom\.global[.\w]*release", ptx)]
    stored = [(at, ptx.rfind("st.global", 0, at)) for at in raised]
    return all(store < 0 or ptx.rfind("bar.sync", 0, at) > store for at, store in stored)


def host_reads_are_deeper(ttir: str) -> list[bool]:
    """Of each read of host memory, whether it is nested deeper than the wait before it, so follows a timeout only."""
    depth, waits, found = 0, list[int](), []
    for line in ttir.splitlines():
        if "tt.atomic_cas" in line:
            waits.append(depth)
        if "tt.load %wait_errors_ptr" in line:
            found.append(depth > min(waits, default=depth))
            waits = []
        depth += line.count("{") - line.count("}")
    return found


def spilled(cubin: bytes) -> int:
    """Bytes of stack and local memory, where the assembler keeps what finds no register, from the code itself."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", report)
    assert found is not None, report
    return int(found[1]) + int(found[2])


if __name__ == "__main__":
    found, target = json.loads(Path(sys.argv[1]).read_text()), GPUTarget("cuda", int(sys.argv[2]), 32)
    json.dump([compiled(launch, target) for launch in found], sys.stdout)
