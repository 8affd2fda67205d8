"""bench/hf_model.py at smoke size, on two ranks."""

import json
import re
from pathlib import Path

import pytest
from end_to_end import TORCHRUN, python_in_root

pytest.importorskip("transformers.distributed", reason="needs transformers: pip install 'transformers>=5.23'")

CHECKED = ("sonic_ep", "sonic_ep_dispatch", "transformers' all_to_all", "no EP, all experts on each GPU")
UNCHECKED = ("not experts, FSDP", "not experts, no FSDP")


@pytest.mark.thorough
@pytest.mark.parametrize("flag", [(), ("--cpu-sync-on-runtime",)])
def test_each_variant_is_checked_and_timed(tmp_path: Path, flag: tuple[str, ...]) -> None:
    path = tmp_path / "hf.json"
    done = python_in_root(*TORCHRUN, "bench/hf_model.py", f"--json={path}", "--commit=a name", "--rounds=2", *flag)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["environment"]["commit"] == "a name"
    assert "the times mean nothing for GPUs; transformers 5." in found["environment"]["note"]
    assert {(entry["name"], entry["how"], entry["rounds"]) for entry in found["entries"]} == {
        (f"{name}: forward and backward", how, 2) for name in (*CHECKED, *UNCHECKED) for how in ("wall", "host")
    }
    for name in CHECKED:
        assert f"{name}: loss 4." in done.stdout
        assert f"  {name}, gate_up_proj: relative error 0." in done.stdout


@pytest.mark.thorough
def test_one_rank_and_wrong_results_are_refused(tmp_path: Path) -> None:
    alone = python_in_root("bench/hf_model.py")
    assert alone.returncode == 2
    assert "expected at least 2 ranks" in alone.stderr
    # An activation that is not the model's.
    wrong = (
        "import sys; sys.argv[:] = ['bench/hf_model.py'];"
        "import hf_model; from sonic_ep.activation import ACTIVATIONS; from sonic_ep.integrations import transformers;"
        "transformers.proven_activation = lambda *given: ACTIVATIONS['geglu'];"
        "sys.exit(hf_model.run_command(hf_model.parser(), [], ['hf_model.py']))"
    )
    program = tmp_path / "wrong.py"
    program.write_text(wrong)
    done = python_in_root(*TORCHRUN, str(program), PYTHONPATH="bench:.")
    assert done.returncode != 0
    assert re.search(r"FAIL: rank \d of 2: sonic_ep, \w+: relative error", done.stdout)
