"""Loads from files, and synthetic ones for those who have none.

Here belongs where loads come from before a model runs; a running one has ``monitor.py``.

Shapes: L layers, E logical experts. Loads are float32 [L, E], in tokens.
"""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

KINDS = ("lognormal", "zipf", "uniform")
_MEAN_TOKENS = 1000.0


def synthetic_loads(
    kind: str, num_layers: int, num_experts: int, *, seed: int = 0, spread: float | None = None
) -> Tensor:
    """Random loads with a mean of 1000 tokens, another order of the experts in every layer.

    Args:
        kind: "lognormal" (``spread`` is sigma, by default 1: what DeepSeek-R1 shows), "zipf" (the
            n-th expert has 1/n**spread, by default 1) or "uniform" (all alike; no spread).
        num_layers: L.
        num_experts: E.
        seed: same seed, same loads.

    Returns:
        [L, E] float32.
    """
    if kind not in KINDS:
        raise ValueError(f"expected synthetic loads of {', '.join(KINDS)}, got {kind!r}")
    spread = _checked(num_layers, num_experts, 1.0 if spread is None else spread)
    rng = np.random.default_rng(seed)
    if kind == "lognormal":
        loads = np.exp(spread * rng.standard_normal((num_layers, num_experts)))
    elif kind == "zipf":
        row = np.arange(1, num_experts + 1, dtype=np.float64) ** -spread
        loads = np.stack([rng.permutation(row) for _ in range(num_layers)])
    else:
        loads = np.ones((num_layers, num_experts))
    return _with_mean(loads)


def drifting_loads(
    num_layers: int,
    num_experts: int,
    *,
    seed: int = 0,
    spread: float = 1.0,
    memory: float = 100.0,
) -> Iterator[Tensor]:
    """Lognormal loads that drift, without end.

    The logarithm of every load is a stationary random walk that is drawn back to its mean: each
    draw looks like ``synthetic_loads("lognormal")``, two that are ``memory`` draws apart correlate
    by 1/e, and one draw changes a load by a factor of about ``exp(±spread * sqrt(2 / memory))``.

    Args:
        num_layers: L.
        num_experts: E.
        seed: same seed, same loads.
        spread: sigma of the logarithms.
        memory: draws after which a load has forgotten most of what it was.

    Yields:
        [L, E] float32.
    """
    spread = _checked(num_layers, num_experts, spread)
    if not (math.isfinite(memory) and memory > 0):
        raise ValueError(f"expected a memory that is finite and positive, got {memory}")
    rng = np.random.default_rng(seed)
    keep = math.exp(-1 / memory)
    state = rng.standard_normal((num_layers, num_experts))
    while True:
        yield _with_mean(np.exp(spread * state))
        fresh = rng.standard_normal((num_layers, num_experts))
        state = keep * state + math.sqrt(1 - keep**2) * fresh


def _checked(num_layers: int, num_experts: int, spread: float) -> float:
    if num_layers < 1 or num_experts < 1:
        raise ValueError(
            f"expected at least one layer and one expert, got {num_layers} and {num_experts}"
        )
    if not (math.isfinite(spread) and 0 <= spread <= 10):
        raise ValueError(f"expected a spread from 0 to 10, got {spread}")
    return spread


def _with_mean(loads: np.ndarray) -> Tensor:
    loads = loads * (_MEAN_TOKENS / loads.mean(axis=1, keepdims=True))
    return torch.from_numpy(loads.astype(np.float32))


def read_loads(path: str | os.PathLike[str]) -> Tensor:
    """Read loads [layers, experts] from a file; its suffix says what it is.

    - .json: a list of layers, each a list of numbers, or an object with such a list as "loads".
    - .csv: a line per layer; one line of names may come first.
    - .npy: an array. Nothing pickled is loaded.
    - .pt: a tensor, or a dictionary with a tensor as "loads". Nothing but tensors is loaded.

    Returns:
        [L, E] float64; a single row is one layer. What the numbers are is checked by the planner.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
        OSError: the file cannot be read.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"expected loads in a file ending in {', '.join(_READERS)}, got {path}")
    try:
        loads = reader(path)
    except _UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"expected loads [layers, experts] in {path}, got: {reason}") from None
    if loads.dim() == 1:
        loads = loads[None]
    if loads.dim() != 2 or loads.numel() == 0:
        raise ValueError(
            f"expected loads [layers, experts] in {path}, got the shape {list(loads.shape)}"
        )
    return loads


_UNREADABLE = (
    ValueError,  # also what json and Unicode raise
    TypeError,
    KeyError,
    RuntimeError,
    EOFError,
    OverflowError,
    RecursionError,
    csv.Error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def _read_json(path: Path) -> Tensor:
    data = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(data, dict):
        if "loads" not in data:
            raise ValueError(f'an object without "loads" (it has {sorted(data)[:5]})')
        data = data["loads"]
    if not isinstance(data, list):
        raise ValueError(f"{type(data).__name__} instead of a list of layers")
    rows = data if all(isinstance(row, list) for row in data) else [data]
    return _from_rows(rows)


def _read_csv(path: Path) -> Tensor:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if rows and not any(_is_number(cell) for cell in rows[0]):
        rows = rows[1:]
    return _from_rows(rows)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _from_rows(rows: list[list[object]]) -> Tensor:
    for layer, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"{len(row)} experts in layer {layer} but {len(rows[0])} in layer 0")
        for expert, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                raise ValueError(f"{value!r} for expert {expert} of layer {layer}")
            if isinstance(value, str) and not _is_number(value):
                raise ValueError(f"{value!r} for expert {expert} of layer {layer}")
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)


def _read_npy(path: Path) -> Tensor:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise ValueError(f"numbers of type {getattr(array, 'dtype', type(array).__name__)}")
    return torch.from_numpy(array.astype(np.float64))


def _read_pt(path: Path) -> Tensor:
    data = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(data, dict):
        if "loads" not in data:
            raise ValueError(f'a dictionary without "loads" (it has {sorted(map(str, data))[:5]})')
        data = data["loads"]
    if not isinstance(data, Tensor) or data.is_complex() or data.dtype == torch.bool:
        raise ValueError(f"{getattr(data, 'dtype', type(data).__name__)} instead of real numbers")
    return data.detach().to_dense().double()


_READERS: dict[str, Callable[[Path], Tensor]] = {
    ".json": _read_json,
    ".csv": _read_csv,
    ".npy": _read_npy,
    ".pt": _read_pt,
}
