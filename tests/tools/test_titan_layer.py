"""``bench/titan_layer.py``: its smoke size on CPU ranks."""

from pathlib import Path

import msgspec
import pytest
import titan_layer
from end_to_end import TORCHRUN, python_in_root
from schema import Suite
from titan import needs_torchtitan

from sonic_ep.cli.exit_codes import PASS
from sonic_ep.cli.options import parse_thiek


def test_shapes() -> None:
    assert titan_layer.shape_of(parse_thiek("12,16,8,4,2"), 2).tokens == 6
    with pytest.raises(ValueError, match="expected a multiple of the 2 ranks"):
        titan_layer.shape_of(parse_thiek("12,16,8,5,2"), 2)


@pytest.mark.thorough
@needs_torchtitan
def test_the_smoke_size_runs_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "titan.json"
    done = python_in_root(*TORCHRUN, "bench/titan_layer.py", "--commit", "a name", "--json", str(path))
    assert done.returncode == PASS, done.stderr
    for name in (titan_layer.STANDARD, *titan_layer.OURS):
        assert f"{name}: right" in done.stdout
    # It has kernels for GPUs only.
    assert f"not run: {titan_layer.MINIMAL}" in done.stdout
    suite = msgspec.json.decode(path.read_bytes(), type=Suite)
    names = [f"{name}: forward and backward" for name in (titan_layer.STANDARD, *titan_layer.OURS)]
    assert [entry.name for entry in suite.entries] == names
    assert [len(entry.baselines) for entry in suite.entries] == [0, 1, 1, 1]
    parts = ("o", "dx", "dscores", "dw1[0]", "dw1[1]", "dw2")
    judged = {f"{name}: {part}" for name in (titan_layer.STANDARD, *titan_layer.OURS) for part in parts}
    assert {each.name for each in suite.accuracy} == judged
