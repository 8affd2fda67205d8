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
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.thorough), 2])
@pytest.mark.parametrize("example", EXAMPLES, ids=["train", "infer"])
def test_the_examples_run_on_one_rank_and_on_several(example: str, nproc: int, tmp_path: Path) -> None:
    script = tmp_path / "this_file.py"
    script.write_text(example)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("slots of each expert") == (nproc if "infer.py" in example else 0)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_every_make_target_named_here_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([\w-]+)`", README))
    assert {"demo", "test", "test-thorough", "docs"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
