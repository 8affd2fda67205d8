"""The experts of a layer as an ``nn.Module``: DTensors of all experts, of which each rank holds its own."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sonic_ep import compat, ops
from sonic_ep.activation import GATE_LAYOUTS, Activation
from sonic_ep.api import ExpertParallel, MoEOutput
from sonic_ep.checks import ArgumentChecker, check_experts_divide
from sonic_ep.distributed.group import EPGroup
from sonic_ep.expert_checks import check_activation
from sonic_ep.router import SEEDS, Router, normal
from sonic_ep.sharding import Share, is_dtensor, mesh_of, originals, sharded

WEIGHTS = ("w1", "w2", "b1", "b2")
NO_GATE = "no gate"
ONE_PROCESS = EPGroup(rank=0, world_size=1)


class Experts(nn.Module):
    """E experts, spread over the ranks of ``ep``; without ``ep``, all of them in this process.

    hidden_size H, intermediate_size I, num_experts E (a multiple of W); activation, gate_layout: of
    ``ExpertParallel.moe``; ``bias`` adds b1 and b2. Construction is collective where there is an ``ep``.

    Parameters: w1 (E, 2I, H) for gated activations, else (E, I, H); w2 (E, H, I); b1 (E, 2I or I); b2 (E, H). Over
    several ranks they are DTensors, ``Shard(0)`` on ``ep.mesh``, or on a mesh made of its group, so that checkpoints,
    FSDP2, gradient clipping and optimizers see one tensor of all experts. Gradients are sums over all tokens of the
    group, undivided.

    distribute=False: plain tensors of this rank's experts, (E/W, ...), for tools that refuse DTensors. The names under
    which modules, optimizers and checkpoints know them carry the rank, ``w1@0/2``, since those of other ranks are no
    replicas; as attributes they are ``w1`` and so on.

    The order of gate and up is part of a checkpoint: loading one of another ``gate_layout`` raises ``ValueError``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        ep: ExpertParallel | None = None,
        *,
        activation: str | Activation = "swiglu",
        gate_layout: str = "interleaved",
        bias: bool = False,
        distribute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(ep, ExpertParallel | None):
            got = f"got {type(ep).__name__}, expected an ExpertParallel or None"
            raise TypeError(f"Experts: ep: {got}: make one of a group, sonic_ep.ExpertParallel(group)")
        self.ep, self.num_experts = ep, num_experts
        self.gate_layout = gate_layout
        self._alone: ExpertParallel | None = None
        self._names, self._marked = {name: name for name in WEIGHTS}, False
        checker = ArgumentChecker(group=self.group)
        checker.count("hidden_size", hidden_size)
        checker.count("intermediate_size", intermediate_size)
        checker.count("num_experts", num_experts)
        check_experts_divide(checker, num_experts)
        self.distribute = checker.flag("distribute", distribute)
        dtype = checker.dtype("dtype", dtype)
        device = torch.get_default_device() if device is None else checker.device("device", device)
        checker.named("gate_layout", gate_layout, GATE_LAYOUTS)
        self.activation = check_activation(checker, activation)
        width = self.activation.up_width(intermediate_size)
        shapes: dict[str, tuple[int, ...]] = {"w1": (width, hidden_size), "w2": (hidden_size, intermediate_size)}
        if checker.flag("bias", bias):
            shapes |= {"b1": (width,), "b2": (hidden_size,)}
        held = num_experts // self.group.world_size
        self._register({name: torch.empty(held, *shape, device=device, dtype=dtype) for name, shape in shapes.items()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Collective. Weights normal with variance 1/fan_in, biases zero, from a seed that rank 0 draws.

        Each expert is filled by its number: one seed gives one layer, whatever W, ``distribute``, and whatever
        ``fully_shard`` has cut; ranks that share a layer need the same seed. Does nothing on the meta device: call it
        again after ``to_empty``. Fills the original of a parametrized or pruned weight. Raises ``TypeError`` for a
        weight computed from several tensors, and for a DTensor with placements other than Shard and Replicate.
        """
        first = next(self.parameters())
        if not first.is_meta:
            # Refused before anything is sent.
            held = originals(self.group, self, self._names.values())
            self._fill(held, self.drawn_seed(first.device))

    def shard(self, ep: ExpertParallel) -> None:
        """Spread experts that are all in this process over ``ep``. Every rank has to hold the same values.

        Each rank clones its slice; the whole weights are freed once nothing else refers to them. Raises ``ValueError``
        if they are spread already, or sharded by ``fully_shard``.
        """
        if self.ep is ep:
            # A layer under two names.
            return
        if self.ep is not None:
            raise ValueError(f"{self.group}: Experts.shard: these experts are spread over an ExpertParallel already")
        check_experts_divide(ArgumentChecker(group=ep.group), self.num_experts)
        whole = originals(ep.group, self, WEIGHTS)
        if any(map(is_dtensor, whole.values())):
            got = "got weights that are DTensors, expected plain ones: call it before fully_shard"
            raise ValueError(f"{ep.group}: Experts.shard: {got}")
        held = self.num_experts // ep.world_size
        mine = {name: weight.detach()[ep.rank * held :][:held].clone() for name, weight in whole.items()}
        for name in WEIGHTS:
            delattr(self, name)
        self.ep, self._alone = ep, None
        self._register(mine)
        for name, weight in whole.items():
            getattr(self, name).requires_grad_(weight.requires_grad)

    def forward(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_scores: Tensor | None = None,
        *,
        router: Router | None = None,
    ) -> Tensor | MoEOutput:
        """The weighted sums of the outputs of each token's experts, for x (T, H) or (..., H). Collective.

        With topk_idx and topk_scores (T, K): y, as ``ExpertParallel.moe_routed``. With ``router``: ``MoEOutput``, as
        ``ExpertParallel.moe``. Either way it is one call of this module, before which FSDP gathers its weights.
        """
        self._check_weights()
        if router is not None and (topk_idx is not None or topk_scores is not None):
            raise ValueError(f"{self.group}: Experts: got a router and a routing, expected one or the other")
        if router is None and (topk_idx is None or topk_scores is None):
            expected = "expected topk_idx and topk_scores, or router=: sonic_ep.MoE has a router of its own"
            raise TypeError(f"{self.group}: Experts: got x without a routing, {expected}")
        given: dict[str, Any] = {name: getattr(self, name) for name in WEIGHTS}
        given |= {"activation": self.activation, "gate_layout": self.gate_layout}
        if router is not None:
            return self._runner(x).moe(x, **router.arguments(), **given)
        return self._runner(x).moe_routed(x, topk_idx, topk_scores, **given)  # type: ignore[arg-type, return-value]

    def registered_name(self, name: str) -> str:
        """The name of a weight among the parameters: ``name``, or with the rank if ``distribute=False``."""
        return self._names[name]

    def get_extra_state(self) -> Tensor:
        """The gate layout's name in ASCII, (letters,) uint8: a tensor, which every format of checkpoints holds."""
        return torch.tensor(list(self._order.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ``ValueError`` for a checkpoint of the other gate layout."""
        saved = bytes(state.tolist()).decode()
        if saved != self._order:
            got = f"gate_layout: got a checkpoint of {saved!r}, expected {self._order!r}"
            remedy = f"build the layer with gate_layout={saved!r}, or reorder w1 and b1"
            if NO_GATE in (saved, self._order):
                remedy = "build the layer with the activation of the checkpoint: one has a gate, the other has none"
            raise ValueError(f"{self.group}: {got}: {remedy}")

    def extra_repr(self) -> str:
        """The sizes, for ``print(layer)``."""
        here = self.num_experts // self.group.world_size
        sizes = f"hidden_size={self.w2.shape[1]}, intermediate_size={self.w2.shape[2]}"
        return f"{sizes}, num_experts={self.num_experts} ({here} here), activation={self.activation.identity}"

    def __getstate__(self) -> dict[str, Any]:
        # An ExpertParallel cannot be pickled; this one is made again when it is needed.
        return {**self.__dict__, "_alone": None}

    @property
    def group(self) -> EPGroup:
        """The ranks that the experts are spread over."""
        return ONE_PROCESS if self.ep is None else self.ep.group

    @property
    def _order(self) -> str:
        """The gate layout where it counts."""
        return self.gate_layout if self.activation.gated else NO_GATE

    def __getattr__(self, name: str) -> Any:
        """Parameters by their plain names, too."""
        return super().__getattr__(self.__dict__.get("_names", {}).get(name, name))

    def __setattr__(self, name: str, value: Any) -> None:
        """The same. Refuses a DTensor for a plain share: ``fully_shard`` would mix experts of several ranks."""
        name = self.__dict__.get("_names", {}).get(name, name)
        if is_dtensor(value) and self._marked:
            got = f"{name}: got a DTensor for the share of this rank alone (distribute=False)"
            raise ValueError(f"{self.group}: {got}, expected distribute=True for FSDP2")
        super().__setattr__(name, value)

    def _register(self, shares: dict[str, Tensor]) -> None:
        """Make parameters of this rank's share of each weight."""
        group, device = self.group, shares["w1"].device
        mesh = mesh_of(group, self.ep.mesh, device) if self.ep is not None and self.distribute else None
        self._marked = not self.distribute and group.world_size > 1
        if self._marked:
            self._names = {name: f"{name}@{group.rank}/{group.world_size}" for name in WEIGHTS}
        for registered, local in ((self._names[name], shares.get(name)) for name in WEIGHTS):
            weight = local if local is None or mesh is None else sharded(local, mesh)
            self.register_parameter(registered, None if weight is None else nn.Parameter(weight))

    def _check_weights(self) -> None:
        """Raise ``ValueError`` for weights of all experts on several ranks, and for shares that DDP averages."""
        if self._marked:
            for parameter in self.parameters():
                # For ``sonic_ep.parallel.clip_grad_norm_``. A copied or loaded parameter has lost the mark.
                parameter.is_share_of_experts = True  # type: ignore[attr-defined]
        if not is_dtensor(self.w2) and len(self.w2) * self.group.world_size != self.num_experts:
            got = f"experts: got plain weights of {len(self.w2)} experts on {self.group.world_size} ranks"
            remedy = f"expected a share of E={self.num_experts}: load a whole state by set_model_state_dict"
            raise ValueError(f"{self.group}: {got}, {remedy} (docs/checkpoints.md)")
        averaged = compat.ranks_reduced_by_ddp(self.parameters())
        if len(set(averaged) & set(self.group.of_world())) > 1:
            got = "DistributedDataParallel: got experts of several ranks, which it has overwritten by those of one"
            remedy = "name them in its list of ignored parameters (docs/training.md)"
            raise ValueError(f"{self.group}: {got}: {remedy}")

    def _runner(self, x: object) -> ExpertParallel | ops.ByName:
        if self.ep is not None:
            return self.ep
        backend = "auto" if isinstance(x, Tensor) and x.is_cuda else "reference"
        if torch.compiler.is_compiling():
            return ops.ByName(operator_name=_name_of_lone(backend), group=ONE_PROCESS)
        return self._run_alone(backend)

    def _run_alone(self, backend: str) -> ExpertParallel:
        if self._alone is None:
            self._alone = ExpertParallel(ONE_PROCESS, backend=backend)
            self._alone.release_with_last_user()
        return self._alone

    @torch.no_grad()
    def _fill(self, held: dict[str, Tensor], seed: int) -> None:
        # A plain share begins at this rank's first expert, whose number its rows do not know.
        before = self.group.rank * self.num_experts // self.group.world_size if self._marked else 0
        for place, (name, weight) in enumerate(held.items(), start=1):
            share = Share.of(weight)
            if name.startswith("b"):
                share.local.zero_()
            else:
                share.fill_rows(partial(_fill_expert, seed=seed + place + 2 * before))

    def drawn_seed(self, device: torch.device) -> int:
        """Collective. A new seed, the same on every rank: rank 0's."""
        seed = int(torch.randint(SEEDS, (), device="cpu"))
        return seed if self.ep is None else self.ep.agree(seed, device)


def _fill_expert(expert: int, row: Tensor, *, seed: int) -> None:
    # w1 and w2 of an expert take two consecutive seeds.
    normal(row, seed + 2 * expert)


@compat.constant_when_traced
def _name_of_lone(backend: str) -> str:
    return _lone(backend).operator_name


@cache
def _lone(backend: str) -> ExpertParallel:
    """One for the compiled code of layers without ``ep``, which has its name, serves all of them and outlives them."""
    made = ExpertParallel(ONE_PROCESS, backend=backend)
    made.release_with_last_user()
    return made
