"""A model of the hardware that the products in Gluon run on, in Python: their code runs on the CPU as it stands.

Copies by TMA, barriers in shared memory and products behave as on Hopper as far as the kernels' own logic can tell: a
copy checks each coordinate against its bound and computes addresses in 64 bits; a barrier has a phase, arrivals and
bytes; a product reads its operands only when it is waited for, so a stage that is overwritten too early gives a wrong
sum. Biases, layouts, registers and the order of memory are not modelled.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sonic_ep.fast import device_functions, hopper_gemm, hopper_tiles

PROGRAMS, DEADLOCK_SECONDS = 3, 10.0


class Memory:
    """The tensors that there are, by address; nothing else may be touched."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def elements(self, addresses: Tensor) -> tuple[Tensor, Tensor]:
        """The flat tensor that all ``addresses`` are in, and the numbers of its elements there."""
        first = int(addresses.min())
        for tensor in self.tensors:
            begin = tensor.data_ptr()
            if begin <= first and int(addresses.max()) < begin + tensor.nbytes:
                return tensor.view(-1), (addresses - begin) // tensor.element_size()
        raise AssertionError(f"memory that is not there: {first:#x}")


class Pointer:
    """To an element of a tensor."""

    def __init__(self, tensor: Tensor, at: Any = 0) -> None:
        self.flat, self.at = tensor.view(-1), at

    def __add__(self, by: Any) -> "Pointer":
        return Pointer(self.flat, self.at + by)

    def __sub__(self, by: Any) -> "Pointer":
        return self + -by


class Shared:
    """Shared memory: (.) of one dtype; views share it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def index(self, at: int) -> "Shared":
        return Shared(self.values[at])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return Shared(self.values.view(tuple(shape)))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.values.permute(tuple(order)))

    def store(self, value: Tensor) -> None:
        self.values.copy_(value)


class Barrier:
    """One in shared memory. Its phase ends with the last arrival, once all bytes that were expected have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase = self.count = self.left = self.nbytes = 0

    def init(self, count: int) -> None:
        self.count = self.left = count

    def arrive(self, nbytes: int = 0) -> None:
        with self.changed:
            assert self.left > 0, "more arrivals than a phase has"
            self.left -= 1
            self.nbytes += nbytes
            self._end_if_complete()

    def receive(self, nbytes: int) -> None:
        with self.changed:
            self.nbytes -= nbytes
            self._end_if_complete()

    def wait(self, parity: int) -> None:
        """Until the phase of this parity has ended: the one before the first has the parity 1."""
        with self.changed:
            ended = self.changed.wait_for(lambda: self.phase % 2 != parity, DEADLOCK_SECONDS)
            assert ended, "a barrier that nobody completes"

    def _end_if_complete(self) -> None:
        if self.left == 0 and self.nbytes == 0:
            self.phase, self.left = self.phase + 1, self.count
            self.changed.notify_all()


class Barriers:
    """Some, side by side."""

    def __init__(self, count: int) -> None:
        self.each = [Barrier() for _ in range(count)]

    def index(self, at: int) -> Barrier:
        return self.each[at]


class Total:
    """A sum of products, of which the last may not have read their operands yet."""

    def __init__(self, value: Tensor, running: Sequence[tuple[Shared, Shared]] = ()) -> None:
        self.value, self.running = value, list(running)


class Device:
    """Runs one program after the other, and both parts of each at the same time."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.program = 0

    def places(self, desc: Any, first: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of a block at ``first``: addresses, and which are within every bound."""
        address = torch.tensor(desc.base.data_ptr(), dtype=torch.int64)
        inside = torch.ones((), dtype=torch.bool)
        assert len(first) == len(desc.shape)
        # Of TMA, which has no other.
        assert desc.strides[-1] == 1
        for axis, (begin, size) in enumerate(zip(first, desc.block_shape, strict=True)):
            form = [-1 if axis == other else 1 for other in range(len(first))]
            at = (int(begin) + torch.arange(size, dtype=torch.int64)).view(form)
            # In 64 bits, as the hardware: the sum wraps around.
            address = address + at * (desc.strides[axis] * desc.base.dtype.itemsize)
            inside = inside & (at >= 0) & (at < desc.shape[axis])
        return torch.broadcast_tensors(address, inside)  # type: ignore[return-value]

    def load(self, desc: Any, first: Sequence[int], barrier: Barrier, into: Shared) -> None:
        addresses, inside = self.places(desc, first)
        block = torch.zeros(addresses.shape, dtype=into.dtype)
        if inside.any():
            flat, at = self.memory.elements(addresses[inside])
            block[inside] = flat[at]
        into.values.copy_(block.view(into.values.shape))
        barrier.receive(block.nbytes)

    def store(self, desc: Any, first: Sequence[int], staged: Shared) -> None:
        addresses, inside = self.places(desc, first)
        if inside.any():
            flat, at = self.memory.elements(addresses[inside])
            flat[at] = staged.values.view(addresses.shape)[inside]

    @staticmethod
    def multiply(a: Shared, b: Shared, total: Any, is_async: bool) -> Total:
        assert is_async
        held = total if isinstance(total, Total) else Total(total)
        return Total(held.value, [*held.running, (a, b)])

    @staticmethod
    def wait(num_outstanding: int, deps: Sequence[Any]) -> Any:
        total = deps[0] if isinstance(deps[0], Total) else Total(deps[0])
        while len(total.running) > num_outstanding:
            a, b = total.running.pop(0)
            total.value = total.value + a.values.float() @ b.values.float()
        return total if total.running else total.value

    @staticmethod
    def both(parts: Sequence[tuple[Callable[..., None], Sequence[Any]]], *warps: object) -> None:
        errors: list[BaseException] = []

        def run(part: Callable[..., None], given: Sequence[Any]) -> None:
            try:
                part(*given)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def language(device: Device) -> SimpleNamespace:
    """What the kernels take from Gluon."""

    def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
        if isinstance(pointer.at, Tensor):
            return torch.where(mask, pointer.flat[pointer.at.clamp(max=pointer.flat.numel() - 1)], other)
        return int(pointer.flat[pointer.at]) if mask else other

    def allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Any:
        # What was in it before must not matter.
        return Barriers(shape[0]) if dtype is torch.int64 else Shared(torch.full(tuple(shape), 1e4, dtype=dtype))

    def static_assert(condition: bool) -> None:
        assert condition

    return SimpleNamespace(
        static_assert=static_assert,
        constexpr=int,
        float32=torch.float32,
        int64=torch.int64,
        program_id=lambda axis: device.program,
        num_programs=lambda axis: PROGRAMS,
        cdiv=lambda a, b: -(-a // b),
        minimum=min,
        static_range=range,
        load=load,
        zeros=lambda shape, dtype, layout: torch.zeros(tuple(shape), dtype=dtype),
        arange=lambda begin, end, layout: torch.arange(begin, end),
        SliceLayout=lambda *given: None,
        NVMMADistributedLayout=lambda *given: None,
        allocate_shared_memory=allocate,
        warp_specialize=device.both,
    )


def barriers() -> SimpleNamespace:
    """What the kernels take of Gluon's module of barriers."""

    def arrive(barrier: Barrier, pred: object = True) -> None:
        if pred:
            barrier.arrive()

    return SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, parity: barrier.wait(parity),
        expect=lambda barrier, nbytes: barrier.arrive(nbytes),
        arrive=arrive,
    )


class Constant(int):
    """A compile-time integer, which the host reads by ``value``."""

    @property
    def value(self) -> int:
        return int(self)


class ModelLauncher:
    """In place of ``Launcher``."""

    def __init__(self, device: Device, kernel: Any, constants: Mapping[str, Any]) -> None:
        self._device, self._kernel = device, kernel
        self._constants = {name: value for name, value in constants.items() if name != "num_warps"}

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        given = [Pointer(each) if isinstance(each, Tensor) else each for each in arguments]
        assert grid == (PROGRAMS,)
        for desc in given:
            if hasattr(desc, "base"):
                desc.dtype = desc.base.dtype
        for self._device.program in range(PROGRAMS):
            self._kernel.fn(*given, **self._constants)


@contextmanager
def on_model(*tensors: Tensor) -> Iterator[Memory]:
    """While this lasts ``HopperGemm`` runs on the CPU, with no memory but ``tensors`` and what it makes itself."""
    memory = Memory()
    memory.tensors += tensors
    device, new_empty = Device(memory), Tensor.new_empty
    waits = {"fence_async_shared": lambda: None, "part_barrier": lambda: None}
    moves = {"load_by_tma": device.load, "store_by_tma": device.store}
    products = {"warpgroup_mma": device.multiply, "warpgroup_mma_wait": device.wait}
    given = {"gl": language(device), "mbarrier": barriers(), "tma": SimpleNamespace(store_wait=lambda pending: None)}
    given |= {**waits, **moves, **products, "multiprocessors": lambda device: PROGRAMS}
    given["Launcher"] = lambda kernel, where, constants: ModelLauncher(device, kernel, constants)

    def made(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        memory.tensors.append(new_empty(like, *shape, **options).fill_(float("nan")))
        return memory.tensors[-1]

    with pytest.MonkeyPatch.context() as patch:
        # Of what Triton's kernels and these share.
        patch.setattr(device_functions, "tl", SimpleNamespace(minimum=min))
        patch.setattr(device_functions, "BAND", device_functions.BAND.value)
        for module in (hopper_tiles, hopper_gemm):
            for name, value in list(vars(module).items()):
                if name in given:
                    patch.setattr(module, name, given[name])
                elif inspect.isfunction(getattr(value, "fn", None)) and not name.endswith("_kernel"):
                    patch.setattr(module, name, value.fn)
                elif name in ("MOST_ROWS", "ITEM_BYTES", "COPY_REGISTERS"):
                    patch.setattr(module, name, Constant(value.value))
        # Those of before would launch on a GPU, and those of the model not.
        for name in ("_rows", "_weights"):
            patch.setattr(hopper_gemm, name, getattr(hopper_gemm, name).__wrapped__)
        patch.setattr(Tensor, "new_empty", made)
        yield memory
