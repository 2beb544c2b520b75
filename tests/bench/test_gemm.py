"""The GEMM benchmark checks before it measures, and its rows say what was measured."""

from __future__ import annotations

import pytest

from dualpipe_ext.bench import gemm
from dualpipe_ext.bench.gemm import GemmOptions, run
from dualpipe_ext.bench.ranks import start

SMALL = GemmOptions(experts=3, rows=20, hidden=256, inner=128, rounds=2, calls=1)


def measure():
    return start(run, 1, SMALL, virtual=True, device_type="cpu")


def test_rows_say_what_was_measured():
    rows = measure()
    assert len({tuple(row) for row in rows}) == 1
    found = {(row["k"], row["n"], row["product"], row["variant"]) for row in rows}
    products = {
        (product, variant)
        for product in ("forward", "input_grad", "weight_grad", "weight_grad_add")
        for variant in ("torch", "persistent", "fp8", "short", "fp8-short")
    } | {("quantize", "rows"), ("quantize", "weights")}
    assert found == {(256, 256, *p) for p in products} | {(128, 256, *p) for p in products}
    assert len(rows) == len(found)
    for row in rows:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["rows"] == 60
        assert row["sms"] == ("1" if row["variant"] in ("persistent", "fp8") else "")
        if row["product"] != "quantize":
            flop = 2 * 60 * row["k"] * row["n"]
            assert row["tflops"] == round(flop / row["us_p50"] / 1e6, 1)


def test_a_sum_that_is_no_sum_is_found(monkeypatch):
    right = gemm.grouped_mm_fp8_weight_grad

    def wrong(*args, total=None, **kwargs):
        out = right(*args, **kwargs)
        return out if total is None else total.copy_(out)

    monkeypatch.setattr(gemm, "grouped_mm_fp8_weight_grad", wrong)
    with pytest.raises(AssertionError, match="expected weight_grad_add fp8@1 within"):
        measure()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grouped_mm", "expected forward torch within"),
        ("grouped_mm_fp8", "expected forward fp8@1 within"),
        ("grouped_mm_fp8_weight_grad", "expected weight_grad fp8@1 within"),
    ],
)
def test_a_wrong_result_is_found(monkeypatch, name, message):
    right = getattr(gemm, name)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        out.flatten(0, -2)[:10] *= 1.3
        return out

    monkeypatch.setattr(gemm, name, wrong)
    with pytest.raises(AssertionError, match=message):
        measure()


def test_a_result_that_is_no_number_is_found(monkeypatch):
    monkeypatch.setattr(gemm, "grouped_mm", lambda x, w, *_, **__: x @ w[0] * float("nan"))
    with pytest.raises(AssertionError, match="expected forward torch within"):
        measure()
