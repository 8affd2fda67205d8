"""Checkpoints of earlier versions."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sonic_ep.experts import WEIGHTS
from sonic_ep.module import MoE
from sonic_ep.sharding import is_dtensor, sharded


def state_dict_of_0_1(model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """For ``model.load_state_dict``: what version 0.1 gave on this rank as ``model.state_dict()``.

    Version 0.1 kept plain tensors of each rank's experts, so each rank has to have saved its own and W has to be the
    same now. Call it before ``fully_shard``. ``model`` has its layers under the same names as then, and their
    ``gate_layout``, which 0.1 did not save. Raises ``ValueError`` where a weight of experts has the shape of another W,
    or is on the meta device.
    """
    state = dict(saved)
    for path, layer in model.named_modules():
        if isinstance(layer, MoE):
            prefix = f"{path}." if path else ""
            _rename(layer, state, prefix)
    return state


def _rename(layer: MoE, state: dict[str, Any], prefix: str) -> None:
    experts = layer.experts
    if f"{prefix}router_w" in state:
        state[f"{prefix}router.weight"] = state.pop(f"{prefix}router_w")
    for name in WEIGHTS:
        if f"{prefix}{name}" in state:
            local, now = state.pop(f"{prefix}{name}"), getattr(experts, name)
            state[f"{prefix}experts.{experts.registered_name(name)}"] = _as_held(f"{prefix}{name}", local, now)
    state[f"{prefix}experts._extra_state"] = experts.get_extra_state()


def _as_held(name: str, local: Tensor, now: Any) -> Tensor:
    """The share ``local`` as the layer holds the weight ``now``."""
    if now.is_meta or (is_dtensor(now) and now.device_mesh.ndim > 1):
        raise ValueError(f"{name}: got a model on the meta device or after fully_shard, expected one that is neither")
    expected = tuple(now.to_local().shape if is_dtensor(now) else now.shape)
    if tuple(local.shape) != expected:
        raise ValueError(f"{name}: got {tuple(local.shape)}, expected {expected}: load on as many ranks as saved it")
    return sharded(local.to(now.device), now.device_mesh) if is_dtensor(now) else local
