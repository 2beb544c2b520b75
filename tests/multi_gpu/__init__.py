"""Tests between GPUs, on as many of them as make ranks here."""

import torch

RANKS = next((n for n in (8, 4) if torch.cuda.device_count() >= n), 2)
# Of trainings that take both: the grid of ranks.
GRID = {"pp": RANKS // 2 if RANKS < 8 else 2, "ep": 2 if RANKS < 8 else 4}
