"""Tickets: tensors that stand for Python objects, and keep them alive, where only tensors can go.

Compiled graphs are such a place: they hold tensors and numbers, and save tensors for the backward.
A ticket is an int64 CPU tensor of one element. Its memory is a Python object that refers to the
target, so that whatever keeps the memory alive (a variable, saved activations) keeps the target
alive, and nothing else does. Reading it is reading host memory: nothing waits for a device.
"""

from __future__ import annotations

import itertools
import sys
import weakref

import torch
from torch import Tensor


class _Memory(bytearray):
    """The memory of a ticket: its number, and what it stands for."""

    target: object


_numbers = itertools.count()
_memories: weakref.WeakValueDictionary[int, _Memory] = weakref.WeakValueDictionary()


def make_ticket(target: object) -> Tensor:
    """int64 [1] on the CPU that stands for ``target``.

    >>> ticket = make_ticket("a handle")
    >>> saved = ticket.view(1, 1)
    >>> del ticket
    >>> redeem(saved)
    'a handle'
    """
    number = next(_numbers)
    memory = _Memory(number.to_bytes(8, sys.byteorder))
    memory.target = target
    _memories[number] = memory
    return torch.frombuffer(memory, dtype=torch.int64)


def redeem(ticket: Tensor) -> object:
    """What a ticket stands for.

    Raises:
        ValueError: it is a copy (hooks that move saved tensors elsewhere make some) and the memory
            of the ticket itself is gone.
    """
    memory = _memories.get(int(ticket))
    if memory is None:
        raise ValueError("expected the ticket of a live object, got a copy that outlived it")
    return memory.target


def num_tickets() -> int:
    """Tickets alive in this process."""
    return len(_memories)
