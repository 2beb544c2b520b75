"""Messages: rows of any dtype in, the same bits out. Exchanging them: test_migrate.py."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext.eplb.exchange import as_integers, new_message, pack, row_bytes, sections
from tests.eplb.ranks import LAYOUT, expert_tables, same_bits


def test_a_message_holds_every_bit_of_its_rows() -> None:
    tables = expert_tables(6, seed=3)
    rows = [4, 0, 4]
    message = pack(tables, rows)
    assert message.shape == new_message(tables, 3, torch.device("cpu")).shape
    for table, part, (dtype, shape) in zip(
        tables, sections(message, tables, 3), LAYOUT, strict=True
    ):
        assert (part.dtype, part.shape) == (dtype, (3, *shape))
        assert same_bits(part, torch.stack([table[row] for row in rows]))


def test_sections_start_where_any_dtype_may() -> None:
    # 3 bytes, then a double: without padding it could not be viewed in place.
    tensors = [torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.float64)]
    message = pack(tensors, [0, 1, 2])
    assert message.numel() == 16 + 32
    assert [part.tolist() for part in sections(message, tensors, 3)] == [[True] * 3, [1.0] * 3]
    assert [row_bytes(t) for t in tensors] == [1, 8]


def test_a_dtype_that_no_integer_matches() -> None:
    with pytest.raises(ValueError, match=r"1, 2, 4 or 8 bytes, got torch\.complex128"):
        as_integers(torch.ones(2, dtype=torch.complex128))
