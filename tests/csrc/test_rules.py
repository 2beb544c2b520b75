"""Rules of the house that a compiler does not check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cpp"})

# Lower may not include higher; folders of one level may not include each other.
LEVEL = {"ptx": 0, "layout": 1, "comm": 2, "ep": 3, "eplb": 3, "bench": 4, "api": 5}

# Instructions that synchronise: the compiler may move nothing across them.
SYNCHRONISING = re.compile(r'"(ld|st|red|atom|fence|mbarrier|cp\.async|barrier)[.\w:]*')


def folder_of(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_go_downward_only(path):
    own = folder_of(path)
    for included in re.findall(r'#include "([^"]+)"', path.read_text()):
        other = Path(included).parts[0]
        assert other in LEVEL, f"expected an include from csrc/, got {included}"
        assert other == own or LEVEL[other] < LEVEL[own], f"{own} may not include {included}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_no_torch_header(path):
    assert not re.search(r"#include\s+[<\"](torch|ATen|c10)/", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_inline_assembly_lives_in_ptx_and_orders_memory(path):
    statements = re.findall(r"\basm\b.*?\);", path.read_text(), re.DOTALL)
    assert folder_of(path) == "ptx" or not statements
    for statement in statements:
        assert "asm volatile" in statement
        if SYNCHRONISING.search(statement):
            assert '"memory"' in statement, statement


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_files_are_rooms(path):
    assert len(path.read_text().splitlines()) < 500


CHAINED = [p for p in SOURCES if p.suffix == ".cu" and "comm/chained_launch.cuh" in p.read_text()]


def included_by(path: Path) -> set[Path]:
    """The file and all that it includes of csrc/, however deep."""
    found, left = set(), [path]
    while left:
        found.add(one := left.pop())
        names = re.findall(r'#include "([^"]+)"', one.read_text())
        left += [CSRC / name for name in names if CSRC / name not in found]
    return found


@pytest.mark.parametrize("path", CHAINED, ids=lambda p: str(p.relative_to(CSRC)))
def test_kernels_that_start_early_read_nothing_early(path):
    """What __ldg and ld.nc read must not change while the kernel is there, and it is there before
    the kernels before it have ended; a compiler may even move __ldg ahead of the wait for them."""
    assert "ptx::griddepcontrol_wait();" in path.read_text()
    ours = [one for one in included_by(path) if folder_of(one) != "ptx"]
    assert len(ours) > 5
    for one in ours:
        assert not re.search(r"__ldg\(|ld_nc", one.read_text()), one
