"""The registry of backends: a backend by name means that one, or an error that lists every reason."""

import pytest
import torch

from sonic_ep import BackendUnavailableError, ExpertParallel
from sonic_ep.backend import choose_backend, unavailable_reasons
from sonic_ep.distributed.group import EPGroup
from sonic_ep.fast import capabilities

ALONE = EPGroup(rank=0, world_size=1)


def test_the_error_and_auto_name_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(capabilities, "version", lambda name: "3.5.1+git0")
    reasons = unavailable_reasons("fast", ALONE)
    assert len(reasons) == 2
    assert any("no CUDA device: torch.cuda.is_available() is False" in reason for reason in reasons)
    with pytest.raises(BackendUnavailableError, match=r"^rank 0 of 1: backend 'fast' cannot run here: ") as raised:
        ExpertParallel(backend="fast")
    choice = choose_backend("auto", ALONE)
    assert choice.name == "reference"
    assert all(reason in str(raised.value) and reason in choice.why for reason in reasons)


def test_auto_prefers_the_fast_backend_but_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sonic_ep.fast.unavailable_reasons", lambda group: ())
    choice = choose_backend("auto", ALONE)
    assert (choice.name, choice.why) == ("fast", "the preferred one")
    monkeypatch.setattr(capabilities, "interpreted", lambda: True)
    choice = choose_backend("auto", ALONE)
    assert choice.name == "reference"
    assert choice.why.startswith("backend 'fast' is taken by name only: Triton's interpreter runs its kernels")
    assert choose_backend("fast", ALONE).name == "fast"
    with pytest.raises(ValueError, match="backend: got 'turbo', expected one of 'auto', 'fast', 'reference'"):
        choose_backend("turbo", ALONE)


def test_versions_of_triton_and_a_torch_without_symmetric_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise capabilities.PackageNotFoundError(name)

    old = ("triton 3.5.1+git0 is installed, expected 3.6 or newer",)
    expected = {absent: ("triton is not installed",), lambda name: "3.5.1+git0": old, lambda name: "3.10.0": ()}
    for version, reasons in expected.items():
        monkeypatch.setattr(capabilities, "version", version)
        assert capabilities.software_reasons() == reasons
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(capabilities.importlib.util, "find_spec", lambda name: None)
    assert capabilities.symmetric_memory_reasons() == (f"torch {torch.__version__} has no symmetric memory",)


def test_interpreted_ranks_need_an_older_numpy_and_shared_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    from sonic_ep.fast import symmetric_memory

    monkeypatch.setattr("sonic_ep.fast.interpreted", lambda: True)
    failing = (
        "the interpreter of triton 3.6.0 fails with numpy 2.4.0: expected triton 3.7 or newer, or numpy older than 2.4"
    )
    for triton, numpy, reasons in (("3.6.0", "2.4.0", (failing,)), ("3.6.0", "2.3.5", ()), ("3.7.0", "2.4.6", ())):
        monkeypatch.setattr(capabilities, "version", {"triton": triton, "numpy": numpy}.__getitem__)
        assert unavailable_reasons("fast", ALONE) == capabilities.interpreter_reasons() == reasons
    monkeypatch.setattr(symmetric_memory, "host_transport", None)
    assert unavailable_reasons("fast", ALONE) == ()
    reasons = unavailable_reasons("fast", EPGroup(rank=0, world_size=2))
    assert reasons == ("interpreted kernels of several ranks share memory of the host: import sonic_ep.testing first",)


def test_gpus_that_are_old_or_without_peer_access(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0) if index == 1 else (9, 0))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: 2 not in (a, b))
    assert capabilities.device_reasons() == (
        "GPU 1 has compute capability 8.0, expected 9.0 or newer",
        "no peer access between GPUs 0->2, 1->2, 2->0, 2->1",
    )
