"""Kernels around helpers of the library that are no kernels by themselves."""

import triton
import triton.language as tl

from sonic_ep.fast.combine.base import origin_and_group, receive_slot_of
from sonic_ep.fast.device_functions import rank_and_token, rounded


@triton.jit
def arrivals_kernel(senders_ptr, places_ptr, home, group, world_size, chunk):
    """Places of what three senders have for one token."""
    program = tl.program_id(0)
    sender = tl.load(senders_ptr + program)
    tl.store(places_ptr + program, receive_slot_of(sender, home, group, world_size, chunk))


@triton.jit
def turns_kernel(turns_ptr, rank, world_size):
    """Which rank and token each program of a dispatch takes."""
    program = tl.program_id(0)
    source, token = rank_and_token(program, rank, world_size)
    tl.store(turns_ptr + 2 * program, source)
    tl.store(turns_ptr + 2 * program + 1, token)


@triton.jit
def homes_kernel(turns_ptr, rank, world_size, lag):
    """Whose token each program of a combine takes, and which."""
    program = tl.program_id(0)
    home, group = origin_and_group(program, rank, world_size, lag)
    tl.store(turns_ptr + 2 * program, home)
    tl.store(turns_ptr + 2 * program + 1, group)


@triton.jit
def round_kernel(values_ptr, rounded_ptr, COUNT: tl.constexpr, GIVEN: tl.constexpr):
    """Round fp32 to the dtype of the result."""
    place = tl.arange(0, COUNT)
    value = tl.load(values_ptr + place, mask=place < GIVEN, other=0.0)
    tl.store(rounded_ptr + place, rounded(value, rounded_ptr), mask=place < GIVEN)


@triton.jit
def occupy_kernel(state_ptr, running_ptr, programs):
    """Sit on the GPU until the host says so. state_ptr (2,): [0] is what the host says, [1] that all programs run."""
    here = tl.atomic_add(running_ptr, 1) + 1
    if here == programs:
        tl.store(state_ptr + 1, 1)
    released = tl.load(state_ptr, volatile=True)
    while released == 0:
        released = tl.load(state_ptr, volatile=True)
