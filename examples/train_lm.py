"""Train a small Mixture-of-Experts language model on 4 ranks, and again on none: the losses are the same.

    python examples/train_lm.py

The model reads the bytes of the standard library's own source. Its experts are spread over the ranks, and so is every
batch. Then one process trains the same model densely, in fp32 and in fp64. How far those two are apart is what float
arithmetic alone does to the losses; the run on ranks may be a small multiple of that away from fp64. The exit code is
0 if it is not further away, 1 if it is, 2 for wrong arguments.

Also under torchrun: torchrun --nproc-per-node 2 examples/train_lm.py. CUDA is used where there is a GPU.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from lm_options import Settings, parse_settings, under_torchrun
from lm_report import Outcome, write_json, write_picture
from lm_runs import train_densely, train_on_ranks
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
    recorded = train_on_ranks(settings, device)
    if recorded is None:
        return 0
    outcome = train_densely(settings, recorded, device)
    report(outcome, settings)
    return 0 if outcome.ok else 1


def report(outcome: Outcome, settings: Settings) -> None:
    """Write the files asked for, and print the summary."""
    for agreement in (outcome.losses, outcome.logits):
        print(agreement)
    print(f"loss {outcome.ranks[0]:.3f} -> {outcome.ranks[-1]:.3f} in {len(outcome.ranks)} steps")
    if settings.json is not None:
        write_json(outcome, settings, settings.json)
        print(f"numbers: {settings.json}")
    try:
        write_picture(outcome, settings, settings.output)
        print(f"picture: {settings.output}")
    except ImportError:
        print("no picture, for want of matplotlib: pip install 'sonic-ep[viz]'")
    print(f"{time.time() - settings.started:.0f} s in all", flush=True)


if __name__ == "__main__":
    sys.exit(main())
