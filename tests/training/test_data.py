from pathlib import Path

import pytest
import torch

from dualpipe_ext.training.data import ByteBatches, load_text


def test_default_text_is_the_standard_library():
    text = load_text(None)
    assert len(text) > 1_000_000
    assert b"def namedtuple" in text or b"class OrderedDict" in text or b"import sys" in text


def test_file_is_read_as_bytes(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xff\x00abc")
    assert load_text(tmp_path / "a.txt") == b"\xff\x00abc"


def test_targets_are_the_next_byte_and_every_window_is_reachable():
    text = bytes(range(10))
    batches = ByteBatches(text, batch=64, seq_len=4, seed=0)
    seen = set()
    for step in range(4):
        inputs, targets = batches.at(step)
        assert inputs.shape == targets.shape == (64, 4)
        assert torch.equal(targets, inputs + 1)
        seen.update(inputs[:, 0].tolist())
    assert seen == set(range(6))


def test_batches_depend_on_seed_and_step_only():
    text = bytes(torch.randint(256, (5000,), dtype=torch.uint8).tolist())
    first, again = (ByteBatches(text, batch=4, seq_len=32, seed=5) for _ in range(2))
    assert torch.equal(first.at(7)[0], again.at(7)[0])
    assert not torch.equal(first.at(7)[0], first.at(8)[0])
    other = ByteBatches(text, batch=4, seq_len=32, seed=6)
    assert not torch.equal(first.at(7)[0], other.at(7)[0])


def test_text_shorter_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"at least 33 bytes .*got 32"):
        ByteBatches(bytes(32), batch=1, seq_len=32, seed=0)
