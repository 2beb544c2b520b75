"""Text as bytes, and the batch of every step as a function of the seed and the step.

B sequences per step, L tokens per sequence.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def load_text(path: Path | None) -> bytes:
    """The bytes of ``path``, or of the running interpreter's standard library (its top-level
    ``.py`` files in name order), which is some megabytes of real text on every machine."""
    if path is not None:
        return path.read_bytes()
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join(file.read_bytes() for file in sorted(folder.glob("*.py")))


def check_length(num_bytes: int, seq_len: int) -> None:
    """Refuse a text that holds no sequence of ``seq_len`` tokens and its last target."""
    if num_bytes < seq_len + 1:
        raise ValueError(
            f"expected training text of at least {seq_len + 1} bytes "
            f"(one sequence and its last target), got {num_bytes}"
        )


class ByteBatches:
    """Random windows of a text, the same for every process and every resumed run.

    Args:
        text: training text; one byte is one token.
        batch: sequences per step B.
        seq_len: tokens per sequence L.
        seed: of the window positions.
    """

    def __init__(self, text: bytes, *, batch: int, seq_len: int, seed: int) -> None:
        check_length(len(text), seq_len)
        self._tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._batch = batch
        self._seq_len = seq_len
        self._seed = seed

    def __len__(self) -> int:
        return self._tokens.numel()

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of ``step``: int64 [B, L] each, targets one byte further on."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        last = self._tokens.numel() - self._seq_len
        starts = torch.randint(last, (self._batch, 1), generator=generator)
        windows = self._tokens[starts + torch.arange(self._seq_len + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
