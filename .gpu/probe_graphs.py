"""Probe: what torch.cuda.make_graphed_callables does with chained residual blocks, and sonic_ep.graphed beside it."""

import gc, os, sys, time, torch
from torch import nn
import sonic_ep

dev = torch.device("cuda", 0)
torch.cuda.set_device(dev)
H, T = 64, 32
print(torch.__version__, sonic_ep.__file__)


class Block(nn.Module):
    def __init__(self, h=H):
        super().__init__()
        self.norm = nn.RMSNorm(h)
        self.lin = nn.Linear(h, h, bias=False)

    def forward(self, x):
        return x + self.lin(self.norm(x))


def chain(fs, x):
    for f in fs:
        x = f(x)
    return x


def names(blocks):
    return ["x"] + [f"{i}.{n}" for i, b in enumerate(blocks) for n, _ in b.named_parameters()]


def grads(x, blocks):
    found = [x.grad] + [p.grad for b in blocks for p in b.parameters()]
    found = [None if g is None else g.clone() for g in found]
    x.grad = None
    for b in blocks:
        b.zero_grad(set_to_none=True)
    return found


def differing(a, b, blocks):
    return [
        n
        for n, g, w in zip(names(blocks), a, b)
        if (g is None) != (w is None) or (g is not None and not torch.equal(g, w))
    ]


def run(fs, x, dys, order):
    if order == "fbfb":
        for dy in dys:
            chain(fs, x).backward(dy)
    else:
        ys = [chain(fs, x * (1 + i)) for i in range(len(dys))]
        for y, dy in zip(ys, dys):
            y.backward(dy)


def build(n, how):
    torch.manual_seed(0)
    blocks = [Block().to(dev) for _ in range(n)]
    eager = [Block().to(dev) for _ in range(n)]
    for a, b in zip(eager, blocks):
        a.load_state_dict(b.state_dict())
    x0 = torch.randn(T, H, device=dev, requires_grad=True)
    fresh = lambda: torch.randn(T, H, device=dev, requires_grad=True)
    if how == "torch, one sample for all":
        fs = torch.cuda.make_graphed_callables(tuple(blocks), tuple((x0,) for _ in blocks))
    elif how == "torch, a sample each":
        fs = torch.cuda.make_graphed_callables(tuple(blocks), tuple((fresh(),) for _ in blocks))
    elif how == "torch, each by itself":
        fs = [torch.cuda.make_graphed_callables(b, (fresh(),)) for b in blocks]
    elif how == "torch, first sample is x":
        fs = torch.cuda.make_graphed_callables(
            tuple(blocks), tuple((x0,) if i == 0 else (fresh(),) for i, _ in enumerate(blocks))
        )
    else:
        fs = [sonic_ep.graphed(b, x0) for b in blocks]
    return blocks, eager, fs, x0


def probe(n, how):
    blocks, eager, fs, x0 = build(n, how)
    for what in (
        "one backward, x of the sample",
        "one backward, x new",
        "accumulated fbfb",
        "two forwards, then two backwards",
    ):
        x = x0 if "of the sample" in what else torch.randn(T, H, device=dev, requires_grad=True)
        values = x.detach().clone()
        dys = [torch.randn(T, H, device=dev) for _ in range(1 if "one" in what else 2)]
        order = "ffbb" if "forwards" in what else "fbfb"
        xe = values.clone().requires_grad_()
        run(eager, xe, dys, order)
        expected = grads(xe, eager)
        try:
            run(fs, x, dys, order)
            torch.cuda.synchronize()
            found = grads(x, blocks)
            print(
                f"{n} blocks | {how} | {what} | differ: {differing(found, expected, blocks)} | x changed: {not torch.equal(x.detach(), values)}"
            )
        except Exception as e:
            x.grad = None
            for b in blocks:
                b.zero_grad(set_to_none=True)
            print(f"{n} blocks | {how} | {what} | {type(e).__name__}: {str(e)[:150]}")
    # outputs held over a replay
    with torch.no_grad():
        y = chain(fs, torch.randn(T, H, device=dev))
        before = y.clone()
        chain(fs, torch.randn(T, H, device=dev))
        print(f"{n} blocks | {how} | an output held over the next replay stays: {torch.equal(y, before)}")


if __name__ == "__main__":
    for n in (2, 3):
        for how in (
            "torch, one sample for all",
            "torch, first sample is x",
            "torch, a sample each",
            "torch, each by itself",
            "sonic_ep",
        ):
            try:
                probe(n, how)
            except Exception as e:
                print(n, how, "FAILED", type(e).__name__, str(e)[:300])

    # Speed and memory, one rank: four MoE blocks.
    class MoEBlock(nn.Module):
        def __init__(self, ep):
            super().__init__()
            self.norm = nn.RMSNorm(2048, dtype=torch.bfloat16, device=dev)
            self.moe = sonic_ep.MoE(2048, 768, 32, 8, ep, dtype=torch.bfloat16, device=dev)

        def forward(self, x):
            return x + self.moe(self.norm(x)).y

    with sonic_ep.ExpertParallel(backend="fast") as ep:
        blocks = [MoEBlock(ep) for _ in range(4)]
        x = torch.randn(2048, 2048, device=dev, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn_like(x)

        def step(fs):
            chain(fs, x).backward(dy)
            x.grad = None
            for b in blocks:
                b.zero_grad(set_to_none=True)

        def timed(fs, what):
            for _ in range(5):
                step(fs)
            torch.cuda.synchronize()
            t = time.perf_counter()
            for _ in range(20):
                step(fs)
            host = time.perf_counter() - t
            torch.cuda.synchronize()
            wall = time.perf_counter() - t
            print(
                f"{what}: a layer's forward + backward, wall {wall / 80 * 1e3:.3f} ms, host {host / 80 * 1e3:.3f} ms; allocated {torch.cuda.memory_allocated() >> 20} MiB, reserved {torch.cuda.memory_reserved() >> 20} MiB"
            )

        def grads_of(fs):
            chain(fs, x).backward(dy)
            return grads(x, blocks)

        timed(blocks, "eager")
        expected = grads_of(blocks)
        base = torch.cuda.memory_reserved()
        for shares in (True, False):
            fs = []
            for b in blocks:
                fs.append(sonic_ep.graphed(b, x, shares_memory=shares))
                print("   reserved", torch.cuda.memory_reserved() - base >> 20, "MiB more")
            timed(fs, f"graphed, shares_memory={shares}")
            print("   differ:", differing(grads_of(fs), expected, blocks))
            del fs
            gc.collect()
            torch.cuda.empty_cache()
            print("   after del: reserved", torch.cuda.memory_reserved() - base >> 20, "MiB more")
        tfs = torch.cuda.make_graphed_callables(
            tuple(blocks), tuple((torch.randn_like(x).requires_grad_(),) for _ in blocks)
        )
        timed(tfs, "torch's")
        print("   differ:", differing(grads_of(tfs), expected, blocks))
