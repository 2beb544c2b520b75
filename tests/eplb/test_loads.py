"""Synthetic loads, and loads from files, with what can be wrong with them."""

from __future__ import annotations

import json
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dualpipe_ext.eplb import drifting_loads, read_loads, synthetic_loads

ROWS = [[1.0, 2.5, 0.0], [3.0, 4.0, 1e6]]


def test_lognormal_loads_have_the_spread_asked_for() -> None:
    loads = synthetic_loads("lognormal", 40, 256, seed=3, spread=0.7)
    assert (loads.shape, loads.dtype) == ((40, 256), torch.float32)
    assert float(loads.log().std(1).mean()) == pytest.approx(0.7, abs=0.03)
    assert loads.mean(1).tolist() == pytest.approx([1000.0] * 40, rel=1e-5)


def test_zipf_loads_are_a_permuted_power_law() -> None:
    loads = synthetic_loads("zipf", 2, 64, spread=1.2).double()
    ordered = loads.sort(dim=1, descending=True).values
    want = torch.arange(1, 65, dtype=torch.float64) ** -1.2
    torch.testing.assert_close(ordered / ordered[:, :1], want.expand(2, -1), rtol=1e-6, atol=0)
    assert loads[0].argmax() != loads[1].argmax()


def test_same_seed_same_loads() -> None:
    for kind in ("lognormal", "zipf"):
        first, again, other = (synthetic_loads(kind, 2, 16, seed=s) for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(synthetic_loads("uniform", 2, 4), torch.full((2, 4), 1000.0))


def test_drifting_loads_stay_lognormal_and_forget_slowly() -> None:
    draws = [x.log() for x in islice(drifting_loads(20, 256, seed=0, memory=50), 51)]
    draws = [x - x.mean(1, keepdim=True) for x in draws]
    assert float(draws[50].std()) == pytest.approx(1.0, abs=0.05)
    for later, correlation in ((1, np.exp(-1 / 50)), (50, np.exp(-1))):
        found = float((draws[0] * draws[later]).mean()) / float(draws[0].std() * draws[later].std())
        assert found == pytest.approx(correlation, abs=0.04)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "normal"}, "lognormal, zipf, uniform, got 'normal'"),
        ({"num_layers": 0}, "at least one layer"),
        ({"spread": float("nan")}, "spread from 0 to 10, got nan"),
    ],
)
def test_synthetic_loads_that_cannot_be(kwargs: dict[str, object], message: str) -> None:
    arguments = {"kind": "lognormal", "num_layers": 1, "num_experts": 4, **kwargs}
    with pytest.raises(ValueError, match=message):
        synthetic_loads(**arguments)
    with pytest.raises(ValueError, match="memory"):
        next(drifting_loads(1, 4, memory=0.0))


def write(path: Path, rows: object) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    elif path.suffix == ".npy":
        np.save(path, np.array(rows))
    else:
        torch.save(torch.tensor(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".csv", ".npy", ".pt"])
def test_every_format(tmp_path: Path, suffix: str) -> None:
    loads = read_loads(write(tmp_path / f"loads{suffix}", ROWS))
    assert loads.tolist() == ROWS
    assert loads.dtype == torch.float64


def test_variants_of_the_formats(tmp_path: Path) -> None:
    (tmp_path / "named.csv").write_text("expert 0, expert 1\n1,2\n\n3,4\n")
    assert read_loads(tmp_path / "named.csv").tolist() == [[1, 2], [3, 4]]
    (tmp_path / "object.json").write_text('{"loads": [[1, 2]]}')
    assert read_loads(tmp_path / "object.json").tolist() == [[1, 2]]
    (tmp_path / "flat.json").write_text("[1, 2]")
    assert read_loads(tmp_path / "flat.json").tolist() == [[1, 2]]
    torch.save({"loads": torch.tensor([[1, 2]])}, tmp_path / "named.PT")
    assert read_loads(tmp_path / "named.PT").tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"1,2", "ending in .json, .csv, .npy, .pt, got"),
        ("x.json", b"{", "got: Expecting property name"),
        ("x.json", b'{"load": 1}', r"without \"loads\" \(it has \['load'\]\)"),
        ("x.json", b"[[1, 2], [3]]", "1 experts in layer 1 but 2 in layer 0"),
        ("x.json", b"[[1, null]]", "None for expert 1 of layer 0"),
        ("x.json", b"[[1, true]]", "True for expert 1 of layer 0"),
        ("x.json", b"3", "int instead of a list"),
        ("x.json", b"[]", r"shape \[(1, )?0\]"),
        ("x.json", b"\xff\xfe", "decode"),
        ("x.csv", b"a,b\n1,x\n", "'x' for expert 1 of layer 0"),
        ("x.csv", b"", r"shape \[1, 0\]"),
        ("x.csv", b"1," * 3 + b"1" * 140_000, "field larger"),
        ("x.npy", b"no array", "got: "),
        ("x.npy", b"", "got: "),
        ("x.pt", b"no archive", "got: "),
        ("x.pt", pickle.dumps(print, protocol=2), "got: "),
    ],
)
def test_files_that_are_no_loads(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_loads(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arrays_and_tensors_of_something_else(tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    torch.save([1, 2], tmp_path / "list.pt")
    for name, message in (
        ("text.npy", "numbers of type"),
        ("cube.npy", r"shape \[2, 2, 2\]"),
        ("object.npy", "allow_pickle"),
        ("list.pt", "list instead of real numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            read_loads(tmp_path / name)
    with pytest.raises(OSError, match="No such file"):
        read_loads(tmp_path / "missing.json")
