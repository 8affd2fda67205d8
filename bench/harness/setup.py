"""What one end-to-end benchmark is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sonic_ep.benchmark.layer_problem import LayerOptions
from sonic_ep.benchmark.workload import Shape
from sonic_ep.config import EPConfig

# With fewer tokens than that, one right result in a hundred and more has twice the error of another, by chance.
FEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One layer and how it is run. shape: T of each rank. backend: its name. backward: whether it is timed."""

    shape: Shape
    world_size: int
    options: LayerOptions
    backend: str
    config: EPConfig
    backward: bool = True

    @property
    def thiek(self) -> tuple[int, int, int, int, int]:
        """T of the whole group, H, I, E, K."""
        shape = self.shape
        assert shape.intermediate is not None, "a shape without experts"
        tokens = shape.tokens * self.world_size
        return tokens, shape.hidden, shape.intermediate, shape.num_experts, shape.top_k

    def as_json(self) -> dict[str, Any]:
        """Everything but the configuration."""
        options = self.options
        return {
            "thiek": list(self.thiek),
            "world_size": self.world_size,
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "activation": options.activation,
            "gate_layout": options.gate_layout,
            "score_order": options.score_order.value,
            "add_bias": options.biased,
            "norm_topk_probs": options.norm_topk_probs,
            "routing": options.routing.value,
            "backend": self.backend,
        }

    def lines(self) -> list[str]:
        """For people."""
        words = self.as_json()
        thiek = ",".join(map(str, words.pop("thiek")))
        lines = [f"T,H,I,E,K = {thiek} (T of the whole group)", ", ".join(f"{name} {words[name]}" for name in words)]
        if self.backend != "reference" and self.shape.tokens < FEW_TOKENS:
            lines.append(
                f"note: {self.shape.tokens} tokens a rank are few: below {FEW_TOKENS} the error of plain PyTorch, of "
                "which twice is admitted, is luck, and a right layer may be RED"
            )
        return lines
