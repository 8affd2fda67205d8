"""Kernels around helpers of the library that are no kernels by themselves."""

import triton
import triton.language as tl

from sonic_ep.fast.combine.base import origin_and_group, receive_slot_of
from sonic_ep.fast.device_functions import rank_and_token, rounded


@triton.jit
def receive_slots_kernel(senders_ptr, places_ptr, origin, group, world_size, chunk):
    """Where three senders write what they have for one token."""
    program = tl.program_id(0)
    sender = tl.load(senders_ptr + program)
    tl.store(places_ptr + program, receive_slot_of(sender, origin, group, world_size, chunk))


@triton.jit
def dispatch_order_kernel(order_ptr, rank, world_size):
    """The rank and the token that each program of a dispatch serves."""
    program = tl.program_id(0)
    source, token = rank_and_token(program, rank, world_size)
    tl.store(order_ptr + 2 * program, source)
    tl.store(order_ptr + 2 * program + 1, token)


@triton.jit
def combine_order_kernel(order_ptr, rank, world_size, lag):
    """The rank and the group of tokens that each program of a combine serves."""
    program = tl.program_id(0)
    origin, group = origin_and_group(program, rank, world_size, lag)
    tl.store(order_ptr + 2 * program, origin)
    tl.store(order_ptr + 2 * program + 1, group)


@triton.jit
def round_kernel(values_ptr, rounded_ptr, COUNT: tl.constexpr, GIVEN: tl.constexpr):
    """Round fp32 to the dtype of the result."""
    place = tl.arange(0, COUNT)
    value = tl.load(values_ptr + place, mask=place < GIVEN, other=0.0)
    tl.store(rounded_ptr + place, rounded(value, rounded_ptr), mask=place < GIVEN)


@triton.jit
def occupy_kernel(state_ptr, running_ptr, programs):
    """Occupy the GPU until the host sets state_ptr[0]; state_ptr[1] says that all programs run."""
    here = tl.atomic_add(running_ptr, 1) + 1
    if here == programs:
        tl.store(state_ptr + 1, 1)
    released = tl.load(state_ptr, volatile=True)
    while released == 0:
        released = tl.load(state_ptr, volatile=True)
