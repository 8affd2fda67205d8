"""Train a small Mixture-of-Experts language model on 4 ranks, and again in one process: the losses are the same.

    python examples/train_lm.py

The model reads the bytes of the standard library's own source. Its experts are spread over the ranks, and so is every
batch. The ranks train it with the reference backend and, where the fast backend is at home, once more with that: from
the same weights, on the same batches. For each of these runs one process then trains the model densely, in fp32 and in
fp64. How far those two are apart is what float arithmetic alone does to the losses; a run on ranks may be a small
multiple of that away from fp64. The exit code is 0 if none is further away, 1 if one is, 2 for wrong arguments.

The fast backend needs a GPU for each rank. Without one, TRITON_INTERPRET=1 and --backend fast run its kernels on the
CPU, thousands of times slower: add --steps 2 --context 2.

Also under torchrun: torchrun --nproc-per-node 2 examples/train_lm.py. CUDA is used where there is a GPU.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import torch
from lm_options import Settings, parse_settings, under_torchrun
from lm_report import Outcome, write_json, write_picture
from lm_runs import Recorded, train_densely, train_on_ranks
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from sonic_ep.group import device_of_rank

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
    """One rank's part. Rank 0 goes on when the others are done: trains densely, compares, writes."""
    # The launcher ends the ranks with this signal, and one that waits in a collective would not see an exception.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    device = device_of_rank(int(os.environ["LOCAL_RANK"]))
    runs = train_on_ranks(settings, device)
    return judge(runs, settings, device) if runs else 0


def judge(runs: Sequence[Recorded], settings: Settings, device: torch.device) -> int:
    """Hold each of the runs on ranks against dense ones, and tell; the exit code, 0 if all agree."""
    outcomes = [train_densely(settings, run, device) for run in runs]
    report(outcomes, settings)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def report(outcomes: Sequence[Outcome], settings: Settings) -> None:
    """Write the files asked for, and print the summary."""
    for run in outcomes:
        print(run.losses)
        print(run.logits)
        print(f"{run.backend}: loss {run.ranks[0]:.3f} -> {run.ranks[-1]:.3f} in {len(run.ranks)} steps")
    if settings.json is not None:
        write_json(outcomes, settings, settings.json)
        print(f"numbers: {settings.json}")
    try:
        write_picture(outcomes, settings, settings.output)
        print(f"picture: {settings.output}")
    except ImportError:
        print("no picture, for want of matplotlib: pip install 'sonic-ep[viz]'")
    print(f"{time.time() - settings.started:.0f} s in all", flush=True)


if __name__ == "__main__":
    sys.exit(main())
