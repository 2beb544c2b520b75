"""Tickets keep their targets alive, and nothing else does."""

from __future__ import annotations

import weakref

import pytest
import torch

from dualpipe_ext.ep.tickets import make_ticket, num_tickets, redeem


class Target:
    pass


def test_the_memory_of_a_ticket_keeps_its_target() -> None:
    target = Target()
    gone = weakref.ref(target)
    before = num_tickets()
    ticket = make_ticket(target)
    assert (ticket.dtype, ticket.shape, ticket.device.type) == (torch.int64, (1,), "cpu")
    assert redeem(ticket) is target
    del target
    alias = ticket.detach().view(1, 1)
    del ticket
    assert redeem(alias) is gone()
    assert num_tickets() == before + 1
    del alias
    assert gone() is None
    assert num_tickets() == before


def test_tickets_of_one_target_are_different() -> None:
    target = Target()
    first, second = make_ticket(target), make_ticket(target)
    assert int(first) != int(second)
    assert redeem(first) is redeem(second) is target


def test_a_copy_of_a_ticket_does_not_outlive_it() -> None:
    ticket = make_ticket("target")
    view, copy = ticket[0], ticket.clone()
    assert redeem(copy) == redeem(view) == "target"
    del ticket
    assert redeem(copy) == "target"
    del view
    with pytest.raises(ValueError, match=r"^expected the ticket of a live object, got a copy"):
        redeem(copy)
