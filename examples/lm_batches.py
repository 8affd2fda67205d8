"""The batches of ``train_lm.py``: its text, the shape of each step, and which rank has which sequences."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TEXT_BYTES = 4_000_000
BATCH = 16
# In a soak, every so many steps the text is one byte, again and again: all tokens want the same experts, or nearly.
ONE_BYTE_EVERY = 8


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shape of one step.

    context: S. sequences: of each rank, one after the other in the batch, ``BATCH`` in all. one_byte: whether one byte
    of the text is all that there is to read.
    """

    context: int
    sequences: tuple[int, ...]
    one_byte: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """T of each rank."""
        return tuple(count * self.context for count in self.sequences)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The global batch of a step. windows (B, S + 1) int64: S bytes to read, and each one's follower to predict."""

    windows: Tensor
    sequences: tuple[int, ...]

    def of_rank(self, rank: int) -> Tensor:
        """The windows of one rank, which may be none."""
        start = sum(self.sequences[:rank])
        return self.windows[start : start + self.sequences[rank]]


def even_layouts(steps: int, context: int, ranks: int) -> tuple[Layout, ...]:
    """Every step the same, its sequences spread as evenly as it goes."""
    sequences = tuple(BATCH // ranks + (rank < BATCH % ranks) for rank in range(ranks))
    return (Layout(context=context, sequences=sequences),) * steps


def changing_layouts(steps: int, context: int, ranks: int, seed: int) -> tuple[Layout, ...]:
    """Every step another: S from 1 to ``context``, cuts between the ranks wherever they fall, so that T may be 0.

    The first steps are the largest there can be, all sequences with the first rank, then all with the second, and so
    on: no later step needs more memory for its tokens.
    """
    draw = random.Random(seed)
    largest = [Layout(context=context, sequences=_all_with(rank, ranks)) for rank in range(ranks)]
    later = [
        Layout(context=draw.randint(1, context), sequences=_cut(draw, ranks), one_byte=step % ONE_BYTE_EVERY == 0)
        for step in range(ranks, steps)
    ]
    return tuple([*largest, *later][:steps])


def _all_with(rank: int, ranks: int) -> tuple[int, ...]:
    return tuple(BATCH if other == rank else 0 for other in range(ranks))


def _cut(draw: random.Random, ranks: int) -> tuple[int, ...]:
    cuts = sorted(draw.randint(0, BATCH) for _ in range(ranks - 1))
    return tuple(end - start for start, end in zip([0, *cuts], [*cuts, BATCH], strict=True))


def standard_library_text() -> Tensor:
    """The source of this Python's standard library, file after file by name, as (bytes,) uint8.

    Raises ``FileNotFoundError`` if it is not there as files.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= TEXT_BYTES:
            break
    if not text:
        raise FileNotFoundError(f"{folder}: got no *.py files, expected the source of the standard library")
    return torch.frombuffer(text[:TEXT_BYTES], dtype=torch.uint8)


def batches(text: Tensor, layouts: Sequence[Layout], seed: int) -> Iterator[Batch]:
    """The batch of each step: the same for every run with this seed, however its sequences are spread."""
    generator = torch.Generator().manual_seed(seed)
    for layout in layouts:
        starts = torch.randint(len(text) - layout.context, (BATCH, 1), generator=generator)
        places = starts + torch.arange(layout.context + 1)
        windows = text[places[:1, :1].expand_as(places) if layout.one_byte else places]
        yield Batch(windows=windows.long(), sequences=layout.sequences)
