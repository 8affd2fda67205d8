"""What a private API behind ``sonic_ep.compat`` needs of the installed PyTorch, where no test of a feature tells."""

import weakref

import pytest
import torch
import torch.utils.checkpoint as checkpointing
from torch.utils.flop_counter import FlopCounterMode

from sonic_ep import compat


@pytest.mark.parametrize("kept_under", [compat.RENDEZVOUS_KEY, "another/{}"])
def test_the_number_of_a_rendezvous_is_read_from_its_store(kept_under: str) -> None:
    """``_register_process_group`` gives a group a name, under which the rendezvous finds its store."""
    from torch._C._distributed_c10d import _resolve_process_group

    def rendezvous(name: str) -> None:
        _resolve_process_group(name).get_group_store().set(kept_under.format(7), "a handle")

    assert compat.rendezvous_number(rendezvous) == (7 if kept_under == compat.RENDEZVOUS_KEY else -1)
    with pytest.raises(RuntimeError):
        _resolve_process_group(compat.LONE_GROUP)


def test_what_is_kept_forever_is_not_freed() -> None:
    """``Py_IncRef``."""
    kept = set[int]()
    held = weakref.ref(kept)
    compat.keep_forever(kept)
    del kept
    assert held() is not None


def test_modes_of_selective_checkpointing_are_off_and_others_on() -> None:
    """``_push_mode``, ``_pop_mode``, ``_len_torch_dispatch_stack``; the types that checkpointing uses."""
    must_save = checkpointing.CheckpointPolicy.MUST_SAVE
    caching, cached = checkpointing.create_selective_checkpoint_contexts(lambda *_, **__: must_save)
    assert (type(caching), type(cached)) == compat.CHECKPOINT_MODES
    assert not compat.dispatch_modes_active()
    with FlopCounterMode(display=False) as outer, caching, FlopCounterMode(display=False) as inner:
        with compat.without_dispatch_modes(compat.CHECKPOINT_MODES):
            assert torch._C._len_torch_dispatch_stack() == 2
            torch.mm(torch.ones(1, 1), torch.ones(1, 1))
        assert torch._C._len_torch_dispatch_stack() == 3
    assert outer.get_total_flops() == inner.get_total_flops() == 2
