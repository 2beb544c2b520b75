import json
import time
from pathlib import Path

import pytest
import torch

from dualpipe_ext.errors import CheckpointError
from dualpipe_ext.training import checkpoint

LAYOUT = {"pp": 2, "ep": 2, "model": {"hidden": 8}}
STATE = {"weights": torch.arange(5.0), "steps_done": 3}


def test_a_saved_state_comes_back(tmp_path: Path):
    path = checkpoint.save(tmp_path, 3, LAYOUT, STATE)
    assert path == tmp_path / "step-00000003" == checkpoint.find(tmp_path)
    assert checkpoint.check_layout(path, LAYOUT) == 3
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["weights"], STATE["weights"])
    assert loaded["steps_done"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_the_newest_two_are_kept(tmp_path: Path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, LAYOUT, STATE)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]
    assert checkpoint.find(tmp_path).name == "step-00000010"


def test_a_resumed_runs_checkpoints_outlive_those_it_left_behind(tmp_path: Path):
    for step in (4, 8, 6):  # 6: resumed from 4 and saved again
        checkpoint.save(tmp_path, step, LAYOUT, STATE)
        time.sleep(0.02)  # file systems' clocks tick in milliseconds
    assert checkpoint.find(tmp_path).name == "step-00000006"
    checkpoint.save(tmp_path, 7, LAYOUT, STATE)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000006", "step-00000007"]


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path, monkeypatch):
    checkpoint.save(tmp_path, 1, LAYOUT, STATE)

    def disk_full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(tmp_path, 2, LAYOUT, STATE)
    assert checkpoint.find(tmp_path).name == "step-00000001"
    monkeypatch.undo()
    # What the failure left does not disturb the next save of the same step.
    assert checkpoint.save(tmp_path, 2, LAYOUT, STATE).name == "step-00000002"
    assert not list(tmp_path.glob(".*"))


def test_a_runs_folder_names_its_newest_checkpoint(tmp_path: Path):
    checkpoint.save(tmp_path / "checkpoints", 4, LAYOUT, STATE)
    assert checkpoint.find(tmp_path).name == "step-00000004"
    with pytest.raises(CheckpointError, match=r"a checkpoint or a run's folder, got .*nope"):
        checkpoint.find(tmp_path / "nope")


def test_another_layout_is_refused_by_name(tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, LAYOUT, STATE)
    with pytest.raises(CheckpointError, match=r"pp = 2 \(this run: 4\)"):
        checkpoint.check_layout(path, {**LAYOUT, "pp": 4})


@pytest.mark.parametrize("damage", ["truncate", "remove", "garbage"])
def test_damage_is_one_clear_line(tmp_path: Path, damage: str):
    path = checkpoint.save(tmp_path, 1, LAYOUT, STATE)
    file = path / "rank-00000.pt"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "remove":
        file.unlink()
    else:
        file.write_bytes(b"not a checkpoint")
    with pytest.raises(
        CheckpointError, match=r"expected a readable checkpoint in .*rank-00000\.pt"
    ) as e:
        checkpoint.load(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("damage", ["none", "truncate", "remove", "flip"])
def test_a_file_is_checked_against_its_checksums(tmp_path: Path, damage: str):
    path = checkpoint.save(tmp_path, 1, LAYOUT, {"weights": torch.arange(10_000)})
    file = path / "rank-00000.pt"
    if damage == "none":
        checkpoint.check_file(path, 0)
        return
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:1000])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        checkpoint.load(path)  # would go unnoticed
    with pytest.raises(CheckpointError, match=r"expected a readable checkpoint in .*rank-00000"):
        checkpoint.check_file(path, 0)


def test_a_damaged_layout_is_one_clear_line(tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, LAYOUT, STATE)
    (path / "layout.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected a readable checkpoint"):
        checkpoint.check_layout(path, LAYOUT)
    (path / "layout.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a readable checkpoint"):
        checkpoint.check_layout(path, LAYOUT)
    (path / "layout.json").write_text(json.dumps({"pp": 2}))
    with pytest.raises(CheckpointError, match="expected a readable checkpoint"):
        checkpoint.check_layout(path, LAYOUT)
