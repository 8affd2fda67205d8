"""The README's examples run as they stand, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG_SECONDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MOST_LINES = 150
# The ranks of each program in turn, as torchrun starts them, but forked from one process that has imported all.
RANKS = """
import os, socket, sys, torch, sonic_ep.parallel
nproc, failed = int(sys.argv[1]), 0
for path in sys.argv[2:]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(nproc):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            exec(compile(open(path).read(), path, "exec"), {"__name__": "__main__"})
            sys.exit()
    failed |= any(os.waitpid(rank, 0)[1] for rank in ranks)
sys.exit(failed)
"""
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_the_examples_run_on_one_rank_and_on_several(nproc: int, tmp_path: Path) -> None:
    assert len(EXAMPLES) == 2
    paths = [tmp_path / "train.py", tmp_path / "infer.py"]
    for path, example in zip(paths, EXAMPLES, strict=True):
        path.write_text(example)
    command = [sys.executable, "-c", RANKS, str(nproc), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("slots of each expert") == nproc


@pytest.mark.thorough
@pytest.mark.parametrize("example", EXAMPLES, ids=["train", "infer"])
def test_the_examples_run_under_torchrun(example: str, tmp_path: Path) -> None:
    script = tmp_path / "this_file.py"
    script.write_text(example)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_every_make_target_named_here_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([\w-]+)`", README))
    assert {"demo", "test", "test-thorough", "docs"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
