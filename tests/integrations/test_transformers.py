"""Models of transformers whose experts sonic_ep spreads over ranks: as in one process, trained, saved, generating."""

import importlib.metadata
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from backends import both_backends
from hf_models import (
    FAMILIES,
    IMPLEMENTATIONS,
    UNITS,
    assert_all_near,
    close_shared,
    configured,
    experts_of_all_families,
    farthest,
    implementations,
    imported,
    loaded,
    save,
    tokens,
    trained,
    trained_on_ranks,
)
from on_ranks import on_ranks
from same import assert_same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sonic_ep
from sonic_ep import EPConfig
from sonic_ep.distributed.group import resolve_group
from sonic_ep.integrations.stored_experts import Refusal, StoredExperts, proven_activation
from sonic_ep.testing import Rank

# transformers builds its meshes on the accelerator that it finds.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs: ranks on the CPU")

TWO = {"fsdp_size": 2, "ep_size": 2}
EXACT_ROWS = EPConfig(cpu_sync_on_runtime=True)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def assert_as_in_one_process(path: Path, **distributed: Any) -> nn.Module:
    """Loss, logits and all gradients of a model whose ranks have batches of their own. Returns it."""
    ids = tokens(2 * dist.get_world_size())
    model = loaded(path, **distributed)
    assert_all_near(trained_on_ranks(model, ids), trained(loaded(path), ids))
    return model


@on_ranks(2, pool="cpu_pool")
def test_six_families_are_as_in_one_process(rank: Rank, tmp_path: Path) -> None:
    """And all layers share one object."""
    close_shared()
    for family in FAMILIES:
        path, ids = save(tmp_path, family), tokens(4)
        expected = trained(loaded(path), ids)
        for implementation in IMPLEMENTATIONS:
            with configured():
                model = loaded(path, ep_implementation=implementation, **TWO)
            assert_all_near(trained_on_ranks(model, ids), expected)
            first, second = implementations(model)
            assert first.ep is second.ep
            assert first.ep.backend == "reference"


@pytest.mark.fast
@on_ranks(2, pool="cpu_pool")
def test_gpt_oss_by_interpreted_kernels(rank: Rank, tmp_path: Path) -> None:
    close_shared()
    path = save(tmp_path, "GptOss", num_hidden_layers=1, layer_types=["full_attention"])
    with configured(backend="fast"):
        model = assert_as_in_one_process(path, ep_implementation="sonic_ep", **TWO)
    (one,) = implementations(model)
    assert one.activation == sonic_ep.Swiglu(alpha=1.702, limit=7.0, up_offset=1.0)


@pytest.mark.thorough
@pytest.mark.fast
@pytest.mark.parametrize("family", FAMILIES)
@every_implementation
@on_ranks(2, pool="cpu_pool")
def test_families_by_interpreted_kernels(rank: Rank, family: str, implementation: str, tmp_path: Path) -> None:
    with configured(backend="fast"):
        assert_as_in_one_process(save(tmp_path, family), ep_implementation=implementation, **TWO)


@both_backends
@pytest.mark.parametrize("config", [EPConfig(), EXACT_ROWS], ids=["room", "exact"])
@pytest.mark.thorough
@on_ranks(2, pool="cpu_pool")
def test_a_rank_whose_experts_get_no_rows(rank: Rank, backend: str, config: EPConfig, tmp_path: Path) -> None:
    """Its gradients are zeros. Rows past the valid ones, which are NaN on ranks, touch nothing."""
    path, ids = tmp_path / "skewed", tokens(4)
    alone = loaded(save(tmp_path, "GptOss"))
    with torch.no_grad():
        router = alone.model.layers[0].mlp.router
        router.weight.mul_(0.1)
        router.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    if rank.rank == 0:
        alone.save_pretrained(path)
    dist.barrier()
    expected = trained(alone, ids)
    runs = [("sonic_ep", "eager"), *(("sonic_ep_dispatch", own) for own in ("eager", "grouped_mm", "batched_mm"))]
    for implementation, own in runs:
        with configured(backend=backend, config=config):
            model = loaded(path, ep_implementation=implementation, experts_implementation=own, **TWO)
        assert_all_near(trained_on_ranks(model, ids), expected)
        of_experts = model.get_parameter("model.layers.0.mlp.experts.down_proj").grad.to_local()
        assert bool((of_experts == 0).all()) == (rank.rank == 1)


# World size, and fields of DistributedConfig.
LAYOUTS = {
    "all ranks share a batch": (2, {"tp_size": 2, "ep_size": 2}),
    "pairs share a batch": (4, {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}),
    "pairs share a batch, ep_size < world": (4, {"tp_size": 2, "fsdp_size": 2, "ep_size": 2}),
    "ep_size < fsdp_size": (4, {"fsdp_size": 4, "ep_size": 2}),
    "replicas": (4, {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2}),
}


def assert_as_all_to_all(path: Path, ids: Tensor, **distributed: int) -> None:
    """Either as near to one process as without TP, or at most twice as far as transformers' own implementation.

    TP cuts the sums of attention and of the head too, and so few tokens have gradients that nearly vanish.
    """
    expected, tp_size = trained(loaded(path), ids), distributed.get("tp_size", 1)
    with configured():
        models = [loaded(path, ep_implementation=name, **distributed) for name in ("all_to_all", *IMPLEMENTATIONS)]
    theirs, *ours = (farthest(trained_on_ranks(model, ids, tp_size), expected) for model in models)
    assert max(ours) <= max(UNITS * torch.finfo(torch.float32).eps, 2 * theirs)


@pytest.mark.thorough
@pytest.mark.parametrize(("world_size", "distributed"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@on_ranks(pool="cpu_pool")
def test_layouts(rank: Rank, world_size: int, distributed: dict[str, int], family: str, tmp_path: Path) -> None:
    groups = world_size // distributed.get("tp_size", 1)
    assert_as_all_to_all(save(tmp_path, family), tokens(groups, length=15), **distributed)


@pytest.mark.thorough
@on_ranks(4, pool="cpu_pool")
def test_slices_of_a_shared_batch_are_uneven_or_empty(rank: Rank, tmp_path: Path) -> None:
    """Of 2 tokens two ranks get none, of 5 they get 2, 2, 1 and none."""
    path = save(tmp_path, "GptOss", num_key_value_heads=4)
    for length in (2, 3, 5):
        assert_as_all_to_all(path, tokens(1, length), tp_size=4, ep_size=4)


@pytest.mark.thorough
@on_ranks(2, pool="cpu_pool")
def test_gradients_have_the_scale_of_all_to_all(rank: Rank, tmp_path: Path) -> None:
    path, ids = save(tmp_path, "Mixtral"), tokens(4)
    expected = trained_on_ranks(loaded(path, ep_implementation="all_to_all", **TWO), ids)
    with configured():
        for implementation in IMPLEMENTATIONS:
            assert_all_near(trained_on_ranks(loaded(path, ep_implementation=implementation, **TWO), ids), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("use_reentrant", [False, True])
@every_implementation
@on_ranks(2, pool="cpu_pool")
def test_gradient_checkpointing(rank: Rank, implementation: str, use_reentrant: bool, tmp_path: Path) -> None:
    with configured():
        model = loaded(save(tmp_path, "GptOss"), ep_implementation=implementation, **TWO)
    mine = tokens(4).chunk(2)[rank.rank]
    expected = trained(model, mine)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    model.train()
    assert_same_bits(trained(model, mine), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("config", [EPConfig(), EXACT_ROWS], ids=["room", "exact"])
@every_implementation
@on_ranks(2, pool="cpu_pool")
def test_experts_compile_without_a_graph_break(
    rank: Rank, implementation: str, config: EPConfig, tmp_path: Path
) -> None:
    path, mine = save(tmp_path, "Mixtral"), tokens(4).chunk(2)[rank.rank]
    with configured(config=config):
        model = loaded(path, ep_implementation=implementation, experts_implementation="batched_mm", **TWO)
    expected = trained(model, mine)
    for layer in model.model.layers:
        layer.mlp.experts.compile(backend="aot_eager", fullgraph=True)
    assert_same_bits(trained(model, mine), expected)


@pytest.mark.thorough
@on_ranks(2, pool="cpu_pool")
def test_a_model_without_fsdp_compiles_without_a_graph_break(rank: Rank, tmp_path: Path) -> None:
    path, ids = save(tmp_path, "Mixtral"), tokens(1)
    with configured():
        model = loaded(path, ep_implementation="sonic_ep", tp_size=2, ep_size=2)
    expected = trained(model, ids)
    model.compile(backend="aot_eager", fullgraph=True)
    assert_all_near(trained(model, ids), expected)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in model.state_dict().items()}


CHECKPOINTS: dict[str, Path] = {}


def save_on_four(rank: Rank, folder: str) -> None:
    path = save(Path(folder), "GptOss")
    with configured():
        model = loaded(path, ep_implementation="sonic_ep", fsdp_size=4, ep_size=4)
        model.save_pretrained(Path(folder) / "four")
        distributed = loaded(path, ep_implementation="sonic_ep", fsdp_size=4, ep_size=2)
        distributed.save_pretrained(Path(folder) / "dcp", distributed_checkpoint=True)


def load_on_fewer(rank: Rank, folder: str) -> None:
    expected = state_of(loaded(Path(folder) / "GptOss"))
    assert_same_bits(state_of(loaded(Path(folder) / "four")), expected)
    if rank.world_size == 2:
        with configured():
            for implementation in IMPLEMENTATIONS:
                model = loaded(Path(folder) / "four", ep_implementation=implementation, **TWO)
                assert_same_bits(state_of(model), expected)
                assert len(model.get_parameter("model.layers.0.mlp.experts.down_proj").to_local()) == 2


@pytest.mark.thorough
def test_checkpoints_of_four_ranks_on_two_and_one(cpu_pool: Any, tmp_path: Path) -> None:
    cpu_pool.run(save_on_four, str(tmp_path), world_size=4)
    for world_size in (2, 1):
        cpu_pool.run(load_on_fewer, str(tmp_path), world_size=world_size)


@pytest.mark.thorough
@every_implementation
@on_ranks(2, pool="cpu_pool")
def test_generate_gives_the_tokens_of_one_process(rank: Rank, implementation: str, tmp_path: Path) -> None:
    """Ranks that finish early go on for the others."""
    path, ids = save(tmp_path, "Qwen3Moe"), tokens(4)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = loaded(path).generate(ids, attention_mask=torch.ones_like(ids), **options)
    for distributed in (TWO, {"tp_size": 2, "ep_size": 2}):
        shared_batch = "tp_size" in distributed
        mine, want = (ids, expected) if shared_batch else (t.chunk(2)[rank.rank] for t in (ids, expected))
        with configured():
            model = loaded(path, ep_implementation=implementation, **distributed)
        got = model.generate(mine, attention_mask=torch.ones_like(mine), **options)
        # Alone, a rank's sequences may all end before those of the others, and need less padding.
        assert torch.equal(got, want[:, : got.shape[1]])
        assert bool((want[:, got.shape[1] :] == 0).all())


LR, STEPS = 0.1, 3


@pytest.mark.thorough
@every_implementation
@on_ranks(2, pool="cpu_pool")
def test_trainer(rank: Rank, implementation: str, tmp_path: Path) -> None:
    """Losses and gradient norms, clipped, are those of a loop in one process."""
    transformers = imported()
    path, ids = save(tmp_path, "Qwen3Moe"), tokens(4 * STEPS)
    alone = loaded(path)
    optimizer, expected = torch.optim.SGD(alone.parameters(), LR), []
    for batch in ids.chunk(STEPS):
        loss = trained(alone, batch)["loss"]
        expected.append((loss.item(), nn.utils.clip_grad_norm_(alone.parameters(), 1.0).item()))
        optimizer.step()
    settings = {"RANK": str(rank.rank), "LOCAL_RANK": str(rank.rank), "WORLD_SIZE": "2"}
    with patch.dict("os.environ", settings | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}), configured():
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            max_steps=STEPS,
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            logging_steps=1,
            disable_tqdm=True,
        )
        model = loaded(path, ep_implementation=implementation, **TWO)
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
    log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(torch.tensor(log), torch.tensor(expected))


@pytest.mark.thorough
@on_ranks(2, pool="cpu_pool")
def test_half_precision_and_autocast(rank: Rank, tmp_path: Path) -> None:
    path, mine = save(tmp_path, "GptOss"), tokens(4).chunk(2)[rank.rank]
    alone = loaded(path)
    for implementation in IMPLEMENTATIONS:
        with configured():
            model = loaded(path, ep_implementation=implementation, **TWO)
            mixed = loaded(path, ep_implementation=implementation, fsdp_mixed_precision=True, **TWO)
        with torch.autocast("cpu", torch.bfloat16):
            expected, got = alone(input_ids=mine).logits, model(input_ids=mine).logits
        exact = alone(input_ids=mine).logits.detach()
        # Rounded to bf16 at the same places, up to the order of a token's two products.
        of_bf16 = (expected - exact).norm()
        assert (got - exact).norm() <= 2 * of_bf16
        assert (mixed(input_ids=mine).logits - exact).norm() <= 4 * of_bf16


def exact_gelu(folder: Path) -> None:
    loaded(save(folder, "Mixtral", hidden_act="gelu"), ep_implementation="sonic_ep", **TWO)


def norm_after_experts(folder: Path) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    normed = {"has_post_expert_norm": property(lambda self: True, lambda self, value: None)}
    with patch.multiple(MixtralExperts, **normed, create=True):
        loaded(save(folder, "Mixtral"), ep_implementation="sonic_ep", **TWO)


def another_forward(folder: Path) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    plain = MixtralExperts.forward
    with patch.object(MixtralExperts, "forward", lambda self, *given: 2 * plain(self, *given)):
        loaded(save(folder, "Mixtral"), ep_implementation="sonic_ep", **TWO)


def own_implementation(folder: Path) -> None:
    imported()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

    ExpertsInterface.register("mine", lambda self, *given: ALL_EXPERTS_FUNCTIONS["batched_mm"](self, *given))
    loaded(save(folder, "Mixtral"), ep_implementation="sonic_ep", experts_implementation="mine", **TWO)


def rule_left_out(folder: Path) -> None:
    """Of a family whose plan names no biases."""
    path = save(folder, "GptOss")
    base = imported().GptOssConfig.base_model_ep_plan
    plan = {name: rule for name, rule in base.items() if not name.endswith("_bias")}
    with patch.object(imported().GptOssConfig, "base_model_ep_plan", plan):
        loaded(path, ep_implementation="sonic_ep", **TWO)


def parametrized(folder: Path) -> None:
    model = loaded(save(folder, "Mixtral"), ep_implementation="sonic_ep", tp_size=2, ep_size=2)
    parametrize.register_parametrization(model.model.layers[0].mlp.experts, "down_proj", nn.Identity())
    trained(model, tokens(1))


def another_gate(folder: Path) -> None:
    model = loaded(save(folder, "Mixtral"), ep_implementation="sonic_ep", **TWO)
    model.model.layers[0].mlp.experts.act_fn = nn.ReLU()
    trained(model, tokens(1))


def another_option(folder: Path) -> None:
    path = save(folder, "Mixtral")
    model = loaded(path, ep_implementation="sonic_ep", **TWO)
    with configured(backend="fast"):
        loaded(path, ep_implementation="sonic_ep", **TWO)
    trained(model, tokens(1))


def no_backend(folder: Path) -> None:
    path = save(folder, "Mixtral")
    with configured(backend="faster"):
        loaded(path, ep_implementation="sonic_ep", **TWO)


REMEDY = 'use ep_implementation="sonic_ep_dispatch"'
WRONG: dict[str, Callable[[Path], None]] = {
    rf"rank \d of 2: MixtralExperts: got outputs that no activation .*GELUActivation.*{REMEDY}": exact_gelu,
    rf"MixtralExperts: got experts that end with a norm.*{REMEDY}": norm_after_experts,
    rf"MixtralExperts: got outputs that no activation.*{REMEDY}": another_forward,
    rf"MixtralExperts: got experts_implementation='mine', which others registered.*{REMEDY}": own_implementation,
    "GptOssExperts: got gate_up_proj_bias that is not sharded by expert, expected .*grouped_gemm": rule_left_out,
    "MixtralExperts: got down_proj computed from other tensors": parametrized,
    rf"MixtralExperts: got an act_fn that was replaced .*{REMEDY}": another_gate,
    "backend of shared: got 'fast'": another_option,
    "backend: got 'faster'": no_backend,
}


@on_ranks(2, pool="cpu_pool")
def test_wrong_uses(rank: Rank, tmp_path: Path) -> None:
    close_shared()
    for number, (message, use) in enumerate(WRONG.items()):
        with configured(), pytest.raises(ValueError, match=message):
            use(tmp_path / str(number))


# A norm after each expert, and gates that end in a tanh.
NOT_FUSED = {"MuseSparkExperts", "Inkling2Experts", "Inkling2LoopExperts"}


@pytest.mark.thorough
def test_experts_of_all_families() -> None:
    """Some 60 families are fused, and few refused."""
    implementations, found = ("eager", "batched_mm"), {True: set(), False: set()}
    for experts in experts_of_all_families():
        refusal = Refusal(group=resolve_group(None), module=type(experts).__name__, remedy="")
        try:
            proven_activation(experts, StoredExperts.of(experts, refusal), implementations, refusal)
            found[True].add(refusal.module)
        except ValueError:
            found[False].add(refusal.module)
    assert len(found[True]) >= 50
    assert found[False] <= NOT_FUSED


@pytest.mark.thorough
@on_ranks(2, pool="cpu_pool")
def test_what_the_fused_layer_refuses_is_dispatched(rank: Rank, tmp_path: Path) -> None:
    imported()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

    calls = []

    def mine(experts: nn.Module, *given: Tensor) -> Tensor:
        calls.append(given)
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, *given)

    ExpertsInterface.register("counted", mine)
    path = save(tmp_path, "Mixtral", hidden_act="gelu")
    with configured():
        assert_as_in_one_process(path, ep_implementation="sonic_ep_dispatch", **TWO)
        model = loaded(path, ep_implementation="sonic_ep_dispatch", experts_implementation="counted", **TWO)
        trained(model, tokens(1))
    assert len(calls) == 2


def old_version(name: str) -> str:
    return "5.22.0"


def no_version(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("version", "message"), [(old_version, "got transformers 5.22.0"), (no_version, "got no transformers")]
)
def test_an_older_transformers_is_named(
    version: Callable[[str], str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.distributed.expert_parallel", None)
    monkeypatch.setattr(importlib.metadata, "version", version)
    expected = rf"{message}, expected transformers 5.23 or later.*pip install 'transformers>=5.23'"
    with pytest.raises(ImportError, match=expected):
        runpy.run_path(str(Path(sonic_ep.__file__).parent / "integrations" / "transformers.py"))
