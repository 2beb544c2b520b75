"""A file is there whole, or as it was before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dualpipe_ext.files import check_picture, replacing


def test_replaces_when_done(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with replacing(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_leaves_the_old_one_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail_half_way() -> None:
        with replacing(target) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_has_the_usual_permissions(tmp_path: Path) -> None:
    plain, replaced = tmp_path / "plain", tmp_path / "replaced"
    plain.touch()
    with replacing(replaced):
        pass
    assert replaced.stat().st_mode == plain.stat().st_mode


def test_bad_targets(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="expected a file in an existing folder"),
        replacing(tmp_path / "none" / "file"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="expected a file name, got the folder"),
        replacing(tmp_path),
    ):
        pass


def test_a_pipe_or_device_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="expected a regular file or a new one"), replacing(pipe):
        pass
    assert pipe.is_fifo()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    with replacing(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_picture_formats() -> None:
    assert check_picture("a.SVG") == ".svg"
    with pytest.raises(ValueError, match=r"expected a picture ending in .svg, .png, .pdf, got a"):
        check_picture("a.jpg")
