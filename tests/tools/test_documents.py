"""What documents quote: figures are those of recorded files, messages are those that the library raises."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import MODES, PROFILING, blocks, run_block

import sonic_ep
from sonic_ep.cli import COMMANDS, CommandParser, main

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
SOURCES = "".join(path.read_text() for path in sorted((ROOT / "sonic_ep").rglob("*.py")))


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", BENCHMARKS, re.MULTILINE | re.DOTALL)
    return found


def rows(text: str) -> list[list[str]]:
    """Cells of the rows of the tables, without heads."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    following = [*cells[1:], [""]]
    return [row for row, after in zip(cells, following, strict=True) if "---" not in (row[0][:3], after[0][:3])]


def medians(name: str, how: str) -> dict[str, list[dict[str, Any]]]:
    entries = json.loads((RESULTS / name).read_text())["entries"]
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        if entry["how"] == how:
            found.setdefault(entry["name"], []).append(entry)
    return found


def as_quoted(number: float, text: str) -> bool:
    """Whether the text is the number, to as many digits as the text has."""
    digits = len(text.partition(".")[2])
    return f"{number:.{digits}f}" == text


LAYERS = ("", "_redispatch", "_cpu_sync", "_both_flags")
LIBRARIES = {
    '`ep_implementation="sonic_ep"`': "sonic_ep",
    '`ep_implementation="sonic_ep_dispatch"`': "sonic_ep_dispatch",
    '`ep_implementation="all_to_all"`': "transformers' all_to_all",
    "no expert parallelism, `grouped_mm`": "no EP, all experts on each GPU",
    "the model without its experts": "not experts, FSDP",
    "override `routed_experts`": "sonic_ep, routed_experts",
    "override `token_dispatcher`": "sonic_ep, token_dispatcher",
    "its standard dispatcher": "torchtitan, standard all-to-all",
    "its `minimal_async_ep`, whose gradients of w1 failed the check": "torchtitan, minimal_async_ep",
}
SUITE_ROWS = {
    "GEMMs alone": ("grouped_mm of a layer", "queued"),
    "the layer": ("layer all_to_all, rank_dedup", "queued"),
    "with `redispatch_x_in_backward`": ("layer all_to_all, rank_dedup, redispatch", "queued"),
    "with `cpu_sync_on_runtime`": ("layer all_to_all, rank_dedup, cpu_sync", "queued"),
    "with biases": ("layer all_to_all, rank_dedup, biases", "queued"),
    "in a CUDA graph": ("layer all_to_all, rank_dedup", "graph"),
    "`reference` over NCCL": ("reference layer", "queued"),
    "the layer, timed in turn with the reference": ("layer all_to_all, rank_dedup, beside the reference", "queued"),
}
EXCHANGE_ROWS = {
    "dispatch `rank_dedup`, barrier and link": "dispatch rank_dedup: barrier and link",
    "dispatch `all_gather`, barrier and link": "dispatch all_gather: barrier and link",
    "dispatch `all_to_all`, barrier and link": "dispatch all_to_all: barrier and link",
    "dispatch `all_to_all`, x to expert-sorted rows": "dispatch all_to_all: staging, barriers and link",
    "plan and dispatch `all_to_all`, ids to expert-sorted rows": "ids to rows, all_to_all: plan and dispatch",
    "combine `rank_dedup`, scores and barriers included": "combine rank_dedup: scores, barriers, sums and link",
}
HOST_ROWS = {
    "`plan` and `dispatch`": "ids to rows, max_tokens_per_rank=T",
    "`combine`": "combine, max_tokens_per_rank=T",
    "`moe` without gradients": "forward, inference, max_tokens_per_rank=T",
    "`moe` and its backward": "forward and backward, max_tokens_per_rank=T",
}
# Columns of the table.
HOST_FILES = [f"1xH200_host_time{name}.json" for name in ("_before", "", "_in_group", "_in_group_again")]
HOST_PARTS = {
    "memory of a tensor": "one tensor's memory",
    "launch of a kernel": "one launch of a kernel",
    "product of the router": "one product of the router",
    "grouped product": "one grouped product",
    "three autograd functions, forward and backward": "three autograd functions, forward and backward",
}


def test_layers_are_those_recorded() -> None:
    """Of the layer with each flag, in the order of the columns."""
    table = {row[0]: row[1:] for row in rows(section("How far is a layer from its GEMMs and its link?"))}
    for column, flags in enumerate(LAYERS):
        document = json.loads((RESULTS / f"2xH200_layer{flags}.json").read_text())
        times = {time["what"]: time for time in document["times"] if time["pass"] == "forward and backward"}
        (derived,) = [found for found in document["derived"] if found["pass"] == "forward and backward"]
        memory = {use["what"]: (use["measured_bytes"] or 0) / 2**30 for use in document["memory"]}
        recorded = {
            "ms": times["layer"]["median_us"] / 1e3,
            "TFLOP/s of a rank": times["layer"]["tflop_per_s"],
            "times its GEMMs": derived["over_gemms"],
            "times its GEMMs and link": derived["over_gemms_and_link"],
            "exposed communication, ms": derived["exposed_communication_us"] / 1e3,
            "one GPU takes, times the layer": derived["scaling_efficiency"],
            "`reference` over NCCL takes, times the layer": 1 / derived["over_reference"],
            "saved activations, GiB (the formula's to 0.01 %)": memory["saved activations"],
            "peak of backward, GiB": memory["peak of backward"],
        }
        assert set(recorded) == set(table)
        assert {
            name: table[name][column] for name, number in recorded.items() if not as_quoted(number, table[name][column])
        } == {}


def test_times_inside_other_libraries_are_those_recorded() -> None:
    found = {**medians("1xH200_hf_model.json", "wall"), **medians("1xH200_titan_layer.json", "queued")}
    table = rows(section("Inside transformers and torchtitan"))
    assert {row[0] for row in table} == set(LIBRARIES)
    for name, text in table:
        (entry,) = found[f"{LIBRARIES[name]}: forward and backward"]
        assert as_quoted(entry["median_us"] / 1e3, text), name


def test_the_parts_of_a_layer_are_those_recorded() -> None:
    table = rows(section("What do the parts of a layer take?"))
    assert {row[0] for row in table} == set(SUITE_ROWS)
    for name, forward, both in table:
        recorded, how = SUITE_ROWS[name]
        found = medians("2xH200_suite.json", how)
        for text, direction in ((forward, "forward, inference"), (both, "forward and backward")):
            if text:
                assert as_quoted(found[f"{recorded}: {direction}"][0]["median_us"] / 1e3, text), (name, text)


def test_times_of_dispatch_and_combine_are_those_recorded() -> None:
    table = {row[0]: row[1:] for row in rows(section("What do dispatch and combine cost against the link and NCCL?"))}
    found = medians("2xH200_suite.json", "queued")
    for name, recorded in EXCHANGE_ROWS.items():
        assert as_quoted(found[recorded][0]["median_us"], table.pop(name)[0]), name
    plans = {entry["shape"]["T"]: entry["median_us"] for entry in found["plan"]}
    assert as_quoted(plans[16384], table.pop("plan of 262144 slots")[0])
    assert as_quoted(plans[65536], table.pop("plan of 1048576 slots")[0])
    small = medians("2xH200_suite.json", "graph")["small all_to_all, rank_dedup: dispatch and combine"]
    assert int(small[0]["median_us"]) == int(table.pop("128 tokens, E=32: dispatch and combine, in a graph")[0])
    assert table == {}


def tables(part: str) -> list[list[list[str]]]:
    """The rows of each table of a part of the page."""
    return [rows(block) for block in part.split("\n\n") if block.startswith("|")]


SHAPES_OF_STEPS = {
    "Qwen3-30B": "qwen3-30b",
    "OLMoE": "olmoe",
    "gpt-oss-20b": "gpt-oss-20b",
    "Qwen3-235B": "qwen3-235b",
    "the large one": "large",
}
KERNELS_OF_STEP = {
    "pull": "pull_to_rows_kernel",
    "activation": "activate_kernel",
    "combine": "exchange_partial_sums_kernel",
    "activation's gradient": "activate_backward_kernel",
}


def test_layers_over_their_products_are_those_recorded() -> None:
    table = tables(section("What does each kernel of a step take?"))[0]
    found, before = (medians(f"1xH200_timeline{name}.json", "graph") for name in ("", "_before"))
    assert [row[0] for row in table] == list(SHAPES_OF_STEPS)
    for name, sizes, *quoted in table:
        which, expected = SHAPES_OF_STEPS[name], list[list[float]]()
        passes = ("forward, inference", "forward and backward")
        layers = [found[f"{which}: layer, {of}"][0] for of in passes]
        products = [found[f"{which}: grouped products alone, {of}"][0] for of in passes]
        shape = layers[0]["shape"]
        assert sizes == ", ".join(str(shape[letter]) for letter in "THIEK")
        expected = [[entry["median_us"] / 1e3 for entry in entries] for entries in (products, layers)]
        expected.append([layer["against"][0]["ratio"] for layer in layers])
        if quoted[-1]:
            expected.append([before[f"{which}: layer, {of}"][0]["against"][0]["ratio"] for of in passes])
        for numbers, text in zip(expected, quoted, strict=False):
            assert all(map(as_quoted, numbers, text.split(", "))), (name, text, numbers)
    small = medians("1xH200_timeline_128_tokens.json", "graph")
    ratios = [small[f"qwen3-30b: layer, {of}"][0]["against"][0]["ratio"] for of in passes]
    text = "With 128 tokens of Qwen3-30B the layer takes {:.2f} and {:.2f} times the products"
    assert text.format(*ratios) in section("What does each kernel of a step take?")


def test_kernels_of_a_step_are_those_recorded() -> None:
    part = section("What does each kernel of a step take?")
    table = tables(part)[1]
    document = json.loads((RESULTS / "1xH200_timeline.json").read_text())
    kernels = [
        [entry for entry in document["entries"] if f"{which}: kernel" in entry["name"]]
        for which in ("qwen3-30b", "large")
    ]
    for column, entries in enumerate(kernels):
        known = [entry for entry in entries if "floor_us" in entry]
        for (name, *quoted), entry in zip(table[:-1], known, strict=True):
            assert entry["name"].split(", ", 1)[1] == KERNELS_OF_STEP.get(name, f"grouped {name}")
            assert as_quoted(entry["median_us"], quoted[2 * column]), (name, column)
            assert as_quoted(entry["floor_us"], quoted[2 * column + 1]), (name, column)
        rest = [entry["median_us"] for entry in entries if "floor_us" not in entry]
        assert table[-1][0] == f"router and plan, {len(rest)} kernels"
        assert as_quoted(sum(rest), table[-1][1 + 2 * column])
    passes = [
        e["median_us"] / e["floor_us"] for of in kernels for e in of if "floor_us" in e and "product" not in e["name"]
    ]
    assert f"Passes over rows take {min(passes):.2f} to {max(passes):.2f} times what memory needs" in part
    assert f"{document['rates_gb_per_s']['memory']:.0f} GB/s" in part


def test_host_times_are_those_recorded() -> None:
    calls, parts = tables(section("What does a call cost the host?"))
    for known, columns, table in ((HOST_ROWS, HOST_FILES, calls), (HOST_PARTS, HOST_FILES[2:], parts)):
        assert [row[0] for row in table] == list(known)
        for name, *quoted in table:
            for file, text in zip(columns, quoted, strict=False):
                (entry,) = medians(file, "host")[known[name]]
                assert as_quoted(entry["against"][0]["ratio"], text), (name, file)


def test_the_parts_of_a_step_add_up_to_what_the_page_says() -> None:
    part = section("What does a call cost the host?")
    tensors, launches, products, grouped = map(
        int, re.findall(r"make (\d+) tensors, (\d+) launches, (\d+) products of the router and (\d+) grouped", part)[0]
    )
    counts = dict(zip(HOST_PARTS.values(), (tensors, launches, products, grouped, 1), strict=True))
    sums = [
        sum(count * medians(file, "host")[name][0]["against"][0]["ratio"] for name, count in counts.items())
        for file in HOST_FILES[2:]
    ]
    assert re.findall(r"(\d+) and (\d+)\s+of its", part) == [tuple(f"{total:.0f}" for total in sums)]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+\.json)`", BENCHMARKS))))
def test_every_file_named_is_there_with_its_commit(name: str) -> None:
    document = json.loads((RESULTS / name).read_text())
    for commit in re.findall(rf"`{name}`,? \(?(\w{{7}})\)?", BENCHMARKS):
        assert document["environment"]["commit"].startswith(commit)


def test_every_message_that_troubleshooting_quotes_is_raised() -> None:
    """The longest piece between placeholders of each message stands in the sources."""
    shown = re.findall(r"^\| `([^`]+)` \|", TROUBLESHOOTING.read_text(), re.MULTILINE)
    assert len(shown) > 20
    for message in shown:
        piece = max(re.split(r" ?\.\.\. ?|\d+", message), key=len)
        assert piece.strip() in SOURCES, message


def test_what_the_memory_page_shows_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "memory.md").read_text()
    (arguments,) = re.findall(r"^sonic-ep (memory .*)$", page, re.MULTILINE)
    assert main(arguments.split()) == 0
    assert f"```\n{capsys.readouterr().out}```" in page


@pytest.mark.parametrize("page", [MODES, PROFILING], ids=lambda page: page.name)
def test_the_lines_about_profiles_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, page: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert set(blocks(page)) == {"Profile"}
    with sonic_ep.ExpertParallel(backend="reference") as ep:
        names = {"sonic_ep": sonic_ep, "torch": torch, "ep": ep, "group": None, "T": 8, "H": 16, "K": 2, "E": 4}
        run_block(names, "Profile", page)
    assert names["ep"].config == names["profile"].config
    assert list((tmp_path / ".cache" / "sonic_ep" / "profiles").iterdir())


def shell_lines() -> list[str]:
    """Commands of the blocks of README and docs, and of README's table of commands."""
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(path.read_text() for path in documents)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(
        r"`((?:\.venv/bin/)?sonic-ep [^`]*|(?:python|torchrun) [^`]*\.py[^`]*|make [a-z-]+(?: [A-Z]+=\S+)*)`", text
    )
    return sorted({line.split("  #")[0].split(" # ")[0].strip() for line in lines if line.strip()})


@pytest.mark.parametrize("line", shell_lines())
def test_commands_that_documents_show_exist(line: str) -> None:
    """Options are parsed, files and targets are there; nothing is run."""
    words = shlex.split(line)
    program = words[0].removeprefix(".venv/bin/")
    if program == "sonic-ep":
        name, *arguments = words[1:]
        if name != "--version":
            parser = CommandParser()
            COMMANDS[name][0](parser)
            # W stands for a number.
            parser.parse_args([{"W": "2", "PATH": "path.png"}.get(word, word) for word in arguments])
    elif program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)
    elif program in ("python", "torchrun"):
        files = [word for word in words if word.endswith(".py")]
        assert all((ROOT / file).exists() or file in ("program.py", "train.py", "infer.py") for file in files)
    else:
        assert program in ("git", "pip", "--override.imports", ".venv/bin/python", "py-spy", "cd"), line


def test_the_figures_of_the_readme_are_those_recorded() -> None:
    suite, models = medians("2xH200_suite.json", "queued"), medians("1xH200_hf_model.json", "wall")
    experts, ours = medians("1xH200_titan_layer.json", "queued"), "layer all_to_all, rank_dedup, beside the reference"
    compared = (
        (suite[f"{ours}: forward, inference"], suite["reference layer: forward, inference"]),
        (models["sonic_ep: forward and backward"], models["transformers' all_to_all: forward and backward"]),
        (
            experts["sonic_ep, routed_experts: forward and backward"],
            experts["torchtitan, standard all-to-all: forward and backward"],
        ),
    )
    readme = (ROOT / "README.md").read_text()
    quoted = re.findall(r"(\d+\.\d) ms", readme)
    assert quoted == [f"{entry['median_us'] / 1e3:.1f}" for pair in compared for (entry,) in pair]
