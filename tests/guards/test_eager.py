"""torch.compile around calls: what surrounds them is compiled, and results and gradients are what they were."""

from pathlib import Path

import pytest
from programs import output_at_end, start_program
from promises import promise

COMPILED = """
import sys, torch, sonic_ep.testing
from sonic_ep import ExpertParallel, MoE

def layer(ep, x, *weights):
    return (ep.moe(x * 2, *weights, 2).y * 3).sum()

def in_parts(ep, x, *weights):
    plan = ep.plan(torch.tensor([[0, 1]] * 5), 4)
    return ep.combine(ep.dispatch(x * 2, plan) * 1.5, torch.ones(5, 2), plan).sum()

shapes = ((5, 8), (4, 8), (4, 8, 8), (4, 8, 4))
leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
with ExpertParallel(backend=sys.argv[1]) as ep:
    for function in (layer, in_parts):
        expected = function(ep, *leaves)
        grads = torch.autograd.grad(expected, leaves, allow_unused=True)
        compiled = torch.compile(function, backend="aot_eager")
        for _ in range(2):
            found = compiled(ep, *leaves)
            assert torch.equal(found, expected)
            for got, want in zip(torch.autograd.grad(found, leaves, allow_unused=True), grads):
                assert (got is None and want is None) or torch.equal(got, want)
    module = MoE(8, 4, num_experts=4, top_k=2, ep=ep)
    assert torch.equal(torch.compile(module, backend="aot_eager")(leaves[0]).y, module(leaves[0]).y)
print("as they were")
"""


@promise("compile")
@pytest.mark.parametrize("backend", ["reference", pytest.param("fast", marks=pytest.mark.fast)])
def test_calls_in_what_is_compiled_run_as_they_are(backend: str, tmp_path: Path) -> None:
    process = start_program(tmp_path, COMPILED, backend)
    said = output_at_end(process)
    assert process.returncode == 0, said
    assert "as they were" in said
