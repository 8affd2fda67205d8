"""Train a small Mixture-of-Experts language model on 4 ranks, and again in one process: the losses are the same.

    python examples/train_lm.py

The model reads the bytes of the standard library's own source. Its experts are spread over the ranks, and so is every
batch. The ranks train it with the reference backend and, where the fast backend can run, once more with that: from
the same weights, on the same batches. For each of these runs one process then trains the model densely, in fp32 and in
fp64. How far those two are apart is what float arithmetic alone does to the losses; a run on ranks may be a small
multiple of that away from fp64. The exit code is 0 if none is further away, 1 if one is, 2 for wrong arguments.

    python examples/train_lm.py --soak --nproc 2 --json soak.json

--soak trains for 2000 steps, slowly, each with a context length of its own and with its sequences cut anew between the
ranks, so that T goes from nothing to the whole batch; every eighth batch is one byte again and again, which sends all
tokens to the same few experts. The losses are compared with dense runs as above. And each rank samples, 40 times, what
it holds between two steps. After a quarter of the steps, open files, threads, tensors and the bytes of PyTorch's
allocator have to stay exactly the same. The memory of process and device may grow by one number for each token, or by
what a system hands out at a time. The exit code is 1 if something grows. A process that has done a few steps has not
settled: a short soak may be red for the bytes of the process alone.

The fast backend needs a GPU for each rank. Without one, TRITON_INTERPRET=1 and --backend fast run its kernels on the
CPU, thousands of times slower: add --steps 2 --context 2.

Also under torchrun: torchrun --nproc-per-node 2 examples/train_lm.py. CUDA is used where there is a GPU.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence

import torch
from lm_options import Settings, parse_settings, under_torchrun
from lm_report import Outcome, as_json, write_picture
from lm_runs import Recorded, train_all_densely, train_on_ranks
from lm_soak import Soak, soaked
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from sonic_ep.distributed.group import device_of_rank

EXIT_BY_SIGNAL = 128


def main() -> int:
    """The exit code."""
    settings = parse_settings(sys.argv[1:], __doc__)
    return run_rank(settings) if under_torchrun() else launch(settings)


def launch(settings: Settings) -> int:
    """Start the ranks and wait for them; 0 if all went well, 1 if one failed, 130 after Ctrl-C."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    script = [__file__, *sys.argv[1:], f"--started={settings.started}"]
    try:
        # Behind "--" torchrun leaves our options alone; it would take --nproc for one of its own.
        torchrun(["--standalone", f"--nproc-per-node={settings.ranks}", "--", *script])
    except ChildFailedError:
        return 1
    except SignalException as stop:
        return EXIT_BY_SIGNAL + stop.sigval
    except KeyboardInterrupt:
        return EXIT_BY_SIGNAL + signal.SIGINT
    return 0


def run_rank(settings: Settings) -> int:
    """One rank's part: it trains with the others, then densely for its share of runs; rank 0 tells."""
    # The launcher ends the ranks with this signal, and one that waits in a collective would not see an exception.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    device = device_of_rank(int(os.environ["LOCAL_RANK"]))
    runs = train_on_ranks(settings, device)
    outcomes = train_all_densely(runs, settings, device)
    return judge(outcomes, list(runs.recorded.values()), settings, device) if outcomes else 0


def judge(outcomes: Sequence[Outcome], runs: Sequence[Recorded], settings: Settings, device: torch.device) -> int:
    """Tell how the runs on ranks agree with the dense ones; the exit code, 0 if all is well."""
    soak = soaked(outcomes, runs, settings, device) if settings.course.is_soak else None
    report(outcomes, settings, soak)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def report(outcomes: Sequence[Outcome], settings: Settings, soak: Soak | None) -> None:
    """Write the files asked for, and print the summary. soak: its results, if there was one."""
    for run in outcomes:
        print(run.losses)
        print(run.logits)
        print(f"{run.backend}: loss {run.ranks[0]:.3f} -> {run.ranks[-1]:.3f} in {len(run.ranks)} steps")
    for line in soak.lines() if soak else []:
        print(line)
    if settings.json is not None:
        document = soak.as_json() if soak else as_json(outcomes, settings)
        settings.json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"numbers: {settings.json}")
    try:
        write_picture(outcomes, settings, settings.output)
        print(f"picture: {settings.output}")
    except ImportError:
        print("no picture: matplotlib is not installed: pip install matplotlib")
    print(f"{time.time() - settings.started:.0f} s in all", flush=True)


if __name__ == "__main__":
    sys.exit(main())
