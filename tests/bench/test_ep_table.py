"""The table, the picture: every figure is shown, and so is what went wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualpipe_ext.bench.ep_picture import draw
from dualpipe_ext.bench.ep_result import (
    ERROR,
    FAILED,
    OK,
    UNAVAILABLE,
    EpRow,
    columns,
    set_fractions,
)
from dualpipe_ext.bench.ep_table import print_table

COMMON = {
    "device": "cuda",
    "ranks": 2,
    "virtual": False,
    "tokens": 4096,
    "hidden": 7168,
    "experts": 256,
    "top_k": 8,
    "rounds": 5,
    "calls": 30,
}


def row(case: str, transport: str, num_sms: int | None, us: float | None, **more: object) -> EpRow:
    found = EpRow(
        **{**COMMON, "case": case, "transport": transport, "num_sms": num_sms, "status": OK, **more}
    )
    if us is not None:
        found.set_times("us", {"p20": us - 1, "p50": us, "p80": us + 2})
        found.set_traffic(58_700_000, 58_700_000, 117_400_000)
    return found


def rows() -> list[EpRow]:
    """As a run on two GPUs gives them; the figures are made up."""
    gemm = {"gemm_us": 590.0, "gemm_slow_down": 1.3, "overlap_speed_up": 1.5}
    many = [
        row(case, "nvlink", sms, 200.0 + 400 / sms, sm_us=sms * 210.0, nominal_sm_us=sms * 200.0,
            **gemm)
        for case in ("dispatch-bf16-token", "combine-token")
        for sms in (8, 16, 24)
    ]  # fmt: skip
    many += [
        row("dispatch-bf16-token", "copy_engine", None, 190.5, sm_us=2500.0, nominal_sm_us=0.0,
            graph_us_p50=189.0, uncached_us_p50=205.5, routing_us=15.0,
            **{**gemm, "gemm_slow_down": 1.05, "overlap_speed_up": 1.82}),
        row("dispatch-bf16-token", "nccl-per-rank", None, 800.0),
        row("combine-token", "nccl-per-rank", None, None, status=FAILED, reason="rank 1: bad [x]"),
        row("combine-expert", "nvlink", 8, 300.0, status=ERROR, reason="beside a GEMM: late"),
        row("peer-copy", "copy_", None, 700.0),
        row("", "gloo-per-rank", None, None, status=UNAVAILABLE, reason="only on a CPU"),
        row("", "gloo-per-expert", None, None, status=UNAVAILABLE, reason="only on a CPU"),
    ]  # fmt: skip
    return many


def rows_with_limits() -> list[EpRow]:
    """With plain pushes, all of them faster than what is measured against them."""
    limits = [row("push-bf16", "push_kernel", sms, 190.0 + 300 / sms) for sms in (8, 24)]
    limits += [row("push-fp8", "push_kernel", 24, 100.0, reason="fastest with 8 warps")]
    many = [*rows(), *limits, row("dispatch-fp8-token", "nvlink", 24, 125.0)]
    (plain_copy,) = [one for one in many if one.case == "peer-copy"]
    (copies,) = [one for one in many if one.transport == "copy_engine"]
    copies.copy_gb_s = 0.96 * plain_copy.wire_gb_s
    pushes = ("dispatch-bf16-token", "combine-token")
    set_fractions(many, dict.fromkeys(pushes, "push-bf16") | {"dispatch-fp8-token": "push-fp8"})
    return many


def lines_of(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if word in line]


def test_figures_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(rows(), "NVIDIA H200")
    out = capsys.readouterr().out
    assert "2 x NVIDIA H200; 4096 tokens per rank x 7168, 256 experts, top-8" in out
    assert "…" not in out
    (line,) = lines_of(out, "│ copy_engine")
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == [
        *("", "copy_engine", "190.5", "189.5-192.5", "205.5", "+15.0", "189.0", "308", "616"),
        *("2.50 (0.00)", "1.05x", "1.82x"),
    ]
    assert "│ dispatch-bf16-token │ nvlink 8 SMs " in out


def test_fractions_of_plain_pushes_and_copies(capsys: pytest.CaptureFixture[str]) -> None:
    many = rows_with_limits()
    found = {(one.case, one.transport, one.num_sms): one for one in many}
    for case in ("dispatch-bf16-token", "combine-token"):
        for sms in (8, 24):
            one, push = found[case, "nvlink", sms], found["push-bf16", "push_kernel", sms]
            assert one.of_push == pytest.approx(push.us_p50 / one.us_p50, rel=2e-3)
        # Nothing was pushed with 16 SMs.
        assert found[case, "nvlink", 16].of_push is None
    assert found["dispatch-fp8-token", "nvlink", 24].of_push == pytest.approx(0.8, abs=1e-3)
    (copies,) = [one for one in many if one.of_peer_copy is not None]
    assert (copies.transport, copies.of_push) == ("copy_engine", None)
    assert copies.of_peer_copy == pytest.approx(0.96)
    assert all(one.of_push is None for one in many if one.transport != "nvlink")
    print_table(many, "NVIDIA H200")
    out = capsys.readouterr().out
    (line,) = lines_of(out, "│ dispatch-fp8-token ")
    assert "80.0%" in line
    (line,) = lines_of(out, "│ copy_engine ")
    assert "96.0%" in line
    assert "note: push-fp8, push_kernel 24 SMs: fastest with 8 warps" in out


def test_what_failed_is_compared_with_nothing() -> None:
    many = [
        row("push-bf16", "push_kernel", 8, None, status=FAILED),
        row("combine-token", "nvlink", 8, 100.0),
        row("peer-copy", "copy_", None, None, status=UNAVAILABLE),
        row("combine-token", "copy_engine", None, 100.0, copy_gb_s=300.0),
    ]
    set_fractions(many, {"combine-token": "push-bf16"})
    assert all(one.of_push is one.of_peer_copy is None for one in many)


def test_what_went_wrong_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(rows(), "NVIDIA H200")
    out = capsys.readouterr().out
    assert "FAILED: combine-token, nccl-per-rank: rank 1: bad [x]" in out
    assert "error: combine-expert, nvlink 8 SMs: beside a GEMM: late" in out
    assert "unavailable: gloo-per-rank, gloo-per-expert: only on a CPU" in out
    assert len(lines_of(out, "only on a CPU")) == 1
    (failed,) = [line for line in lines_of(out, "FAILED") if "│" in line]
    assert not any(character.isdigit() for character in failed)


def test_columns_that_nothing_was_measured_for_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table([row("combine-token", "collective", None, 9.0, device="cpu")], "none")
    out = capsys.readouterr().out
    header = out[: out.index("combine-token")]
    assert "2 ranks on a CPU" in header
    assert "logical" in header
    assert not any(word in header for word in ("graph", "GEMM", "overlap", "nominal", "routing"))


def test_virtual_ranks_claim_no_wire() -> None:
    virtual = row("combine-token", "nvlink", 8, 100.0, virtual=True)
    assert virtual.wire_bytes is virtual.wire_gb_s is virtual.useful_gb_s is None
    assert virtual.logical_gb_s == 1174.0


def test_columns_are_those_of_a_row() -> None:
    assert list(rows()[0].to_dict()) == columns()


def test_a_picture_of_everything(tmp_path: Path) -> None:
    draw(rows(), tmp_path / "ep.svg", "NVIDIA H200")
    text = (tmp_path / "ep.svg").read_text()
    for label in (
        "dispatch-bf16-token, nvlink",
        "combine-token, nvlink",
        "dispatch-bf16-token, copy_engine",
        "dispatch-bf16-token, nccl-per-rank",
        "plain copy",
        "nvlink 24 SMs",
        "1.82x",
        "2 x NVIDIA H200",
    ):
        assert f"<!-- {label}" in text
    assert "<!-- plain push" not in text
    # It was wrong: nobody draws it.
    assert "<!-- combine-token, nccl-per-rank" not in text
    draw(rows(), tmp_path / "ep.png", "NVIDIA H200")
    assert (tmp_path / "ep.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_with_plain_pushes(tmp_path: Path) -> None:
    draw(rows_with_limits(), tmp_path / "ep.svg", "NVIDIA H200")
    text = (tmp_path / "ep.svg").read_text()
    assert "<!-- plain push-bf16 " in text
    assert "<!-- plain push-fp8 " in text
    # Alone, they are drawn as limits of nothing, not as cases.
    alone = [one for one in rows_with_limits() if one.transport == "push_kernel"]
    draw(alone, tmp_path / "alone.svg", "NVIDIA H200")
    assert "push-bf16, push_kernel" not in (tmp_path / "alone.svg").read_text()


def test_a_picture_of_nothing(tmp_path: Path) -> None:
    draw(rows()[-2:], tmp_path / "ep.svg", "NVIDIA H200")
    assert "<!-- not measured" in (tmp_path / "ep.svg").read_text()
    with pytest.raises(ValueError, match="expected a picture ending in"):
        draw(rows(), tmp_path / "ep.gif", "NVIDIA H200")
