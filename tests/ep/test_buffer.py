"""Buffer on one rank without a process group: choice of transport, and every user mistake.

One mistake needs a group.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dualpipe_ext.ep import Buffer, Event, ExpertMajor, TokenMajor, quantize, transport_status
from dualpipe_ext.integrations import deep_ep
from dualpipe_ext.launch import run_ranks

CONFIG = {"hidden": 8, "num_experts": 4, "top_k": 2, "max_tokens": 4}
X = torch.arange(24, dtype=torch.float32).view(3, 8)
IDX = torch.tensor([[0, 1], [3, -1], [-1, -1]])
WEIGHTS = torch.tensor([[0.5, 0.25], [1.0, 9.0], [9.0, 9.0]])


@pytest.fixture
def buffer() -> Buffer:
    return Buffer(**CONFIG)


def test_round_trip(buffer: Buffer) -> None:
    recv, handle = buffer.dispatch(X, IDX, WEIGHTS)
    assert isinstance(recv, TokenMajor)
    assert torch.equal(recv.tokens, X[:2])
    assert torch.equal(recv.topk_weights, torch.tensor([[0.5, 0.25], [1.0, 0.0]]))
    y, event = buffer.combine(recv.tokens, handle)
    assert isinstance(event, Event)
    assert torch.equal(y, torch.cat([X[:2], torch.zeros(1, 8)]))

    recv, handle = buffer.dispatch(X, IDX, WEIGHTS, layout="expert")
    assert isinstance(recv, ExpertMajor)
    y, _ = buffer.combine(recv.tokens, handle, weights=recv.weights, bias=X)
    assert torch.equal(y, X * torch.tensor([[1.75], [2.0], [1.0]]))


def test_a_handle_serves_other_dtypes_and_new_weights(buffer: Buffer) -> None:
    _, handle = buffer.dispatch(X, IDX, layout="expert", alignment=2)
    recv, same = buffer.dispatch(X.bfloat16(), None, WEIGHTS, handle=handle)
    assert same is handle
    assert recv.tokens.dtype == torch.bfloat16
    assert recv.weights.tolist() == [0.5, 0.0, 0.25, 0.0, 1.0, 0.0]
    y, _ = buffer.combine(recv.tokens.double(), handle)
    assert y.dtype == torch.float64


def test_handles_are_not_tensors(buffer: Buffer) -> None:
    _, handle = buffer.dispatch(X, IDX)
    assert not isinstance(handle, torch.Tensor)
    assert "Tensor" not in repr(handle)


def test_many_experts_and_choices() -> None:
    buffer = Buffer(hidden=4, num_experts=64, top_k=32, max_tokens=2)
    idx = torch.stack([torch.arange(32), torch.arange(63, 31, -1)])
    recv, handle = buffer.dispatch(torch.ones(2, 4), idx, layout="expert")
    assert recv.counts.tolist() == [1] * 64
    assert buffer.combine(recv.tokens, handle)[0].tolist() == [[32.0] * 4] * 2


def test_deterministic(buffer: Buffer) -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=gen).bfloat16()
    results = []
    for _ in range(2):
        recv, handle = buffer.dispatch(x, IDX, WEIGHTS, layout="expert")
        results.append(buffer.combine(recv.tokens, handle, weights=recv.weights)[0])
    assert torch.equal(*results)


# --- choice of transport -------------------------------------------------------------------------


def test_auto_takes_what_there_is(buffer: Buffer) -> None:
    usable = [name for name, reason in transport_status(buffer.config).items() if reason is None]
    assert buffer.transport == usable[0]
    assert transport_status(buffer.config)["collective"] is None


def test_unknown_transport() -> None:
    with pytest.raises(
        ValueError, match=r"^expected transport to be one of .*collective, got 'pigeon'$"
    ):
        Buffer(**CONFIG, transport="pigeon")


@pytest.mark.parametrize("transport", ["nvlink", "copy_engine"])
def test_a_transport_that_this_machine_lacks_says_why(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"got '{transport}': no (GPU|compiled)"):
        Buffer(**CONFIG, transport=transport)


def test_of_several_transports_the_first_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for names in (("low_latency", "collective", "nvlink"), ["nvlink", "auto"], ("collective",)):
        assert Buffer(**CONFIG, transport=names).transport == "collective"
    with pytest.raises(ValueError, match=r"got 'copy_engine': no (GPU|compiled)"):
        Buffer(**CONFIG, transport=("nvlink", "copy_engine"))
    for names in (("collective", "pigeon"), ("pigeon", "auto")):
        with pytest.raises(ValueError, match=r"transport to be one of .* got 'pigeon'"):
            Buffer(**CONFIG, transport=names)
    for names in ((), {"auto"}, 5, None):
        with pytest.raises(ValueError, match="expected transport to be a name or a list of names"):
            Buffer(**CONFIG, transport=names)


def test_no_sm_is_for_the_copy_engines() -> None:
    with pytest.raises(ValueError, match="num_sms=0 leaves it no SM"):
        Buffer(**CONFIG, transport="nvlink", num_sms=0)


def test_environment_decides_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALPIPE_TRANSPORT", "collective")
    assert Buffer(**CONFIG).transport == "collective"
    monkeypatch.setenv("DUALPIPE_TRANSPORT", "pigeon")
    with pytest.raises(
        ValueError, match=r"expected DUALPIPE_TRANSPORT to be one of .*got 'pigeon'"
    ):
        Buffer(**CONFIG)
    # A transport named in code is not overruled.
    assert Buffer(**CONFIG, transport="collective").transport == "collective"


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 0}, "expected hidden to be an integer of at least 1, got 0"),
        ({"hidden": 8.0}, "expected hidden to be an integer of at least 1, got 8.0"),
        ({"num_experts": -4}, "expected num_experts to be an integer of at least 1, got -4"),
        ({"top_k": 0}, "expected top_k to be an integer of at least 1, got 0"),
        ({"top_k": 33}, "expected top_k of at most 32, got 33"),
        ({"max_tokens": -1}, "expected max_tokens to be an integer of at least 0, got -1"),
        ({"num_sms": -1}, "expected num_sms to be an integer of at least 0, got -1"),
        ({"timeout_s": 0}, "expected timeout_s above 0 and at most 1e+09 seconds, got 0"),
        ({"timeout_s": "x"}, "expected timeout_s above 0 and at most 1e+09 seconds, got 'x'"),
        (
            {"timeout_s": float("inf")},
            "expected timeout_s above 0 and at most 1e+09 seconds, got inf",
        ),
    ],
)
def test_bad_configuration(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Buffer(**{**CONFIG, **changes})
    assert str(error.value) == message


def with_a_group_of_two() -> str | None:
    """What a rank that is not in the group is told."""
    group = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        assert Buffer(group, **CONFIG).config.num_ranks == 2
        return None
    with pytest.raises(ValueError, match="expected a group") as error:
        Buffer(group, **CONFIG)
    with pytest.raises(ValueError, match=str(error.value)):
        deep_ep.Buffer(group)
    return str(error.value)


def test_a_group_that_this_rank_is_not_in() -> None:
    told = run_ranks(with_a_group_of_two, 3, backend="gloo", run_timeout_s=60)
    assert told == [None, None, "expected a group that this rank is in, got one without rank 2"]


F8 = quantize(torch.ones(3, 128))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, "expected x of shape [8, 8], got [8]"),
        ({"x": X[:, :4]}, "expected x of shape [3, 8], got [3, 4]"),
        ({"x": X.int()}, "got torch.int32"),
        ({"x": X.tolist()}, "expected x to be a tensor, got list"),
        ({"x": (X,)}, "expected x as a tensor or as (values, scales), got a tuple of 1"),
        ({"x": (X, X)}, "expected fp8=True with x given as (values, scales), got fp8=False"),
        ({"x": X.repeat(2, 1)}, "expected x of at most max_tokens=4 rows, got 6"),
        ({"fp8": True}, "expected hidden to be a multiple of 128 for fp8=True, got 8"),
        ({"topk_idx": None}, "expected topk_idx or handle, got neither"),
        ({"topk_idx": IDX[:2]}, "expected topk_idx of shape [3, 2], got [2, 2]"),
        ({"topk_idx": IDX[:, :1]}, "expected topk_idx of shape [3, 2], got [3, 1]"),
        ({"topk_idx": IDX.int()}, "expected topk_idx of dtype torch.int64, got torch.int32"),
        ({"topk_idx": IDX.to("meta")}, "expected topk_idx on cpu, got meta"),
        ({"topk_idx": IDX + 1}, "ids from -1 to 3 in topk_idx, got 4 at topk_idx[1, 0]"),
        ({"topk_idx": IDX - 1}, "ids from -1 to 3 in topk_idx, got -2 at topk_idx[1, 1]"),
        ({"topk_weights": WEIGHTS[:2]}, "expected topk_weights of shape [3, 2], got [2, 2]"),
        ({"topk_weights": WEIGHTS.half()}, "got torch.float16"),
        ({"topk_weights": WEIGHTS.tolist()}, "expected topk_weights to be a tensor, got list"),
        ({"x": X.to_sparse()}, "expected x to be a dense tensor, got torch.sparse_coo"),
        ({"layout": "expert", "alignment": 2**40}, "expected alignment of at most 2147483647"),
        ({"max_recv_tokens": 2**70}, "expected max_recv_tokens of at most 2147483647"),
        ({"layout": "row"}, "expected layout to be one of token, expert, got 'row'"),
        ({"alignment": 8}, "expected alignment=1 with layout='token', got 8"),
        ({"alignment": 0}, "expected alignment to be an integer of at least 1, got 0"),
        ({"max_recv_tokens": 1}, "expected at most max_recv_tokens=1 rows at rank 0, got 2"),
        ({"max_recv_tokens": -1}, "max_recv_tokens to be an integer of at least 0, got -1"),
        ({"rows_per_expert": 4}, "expected layout='expert' with rows_per_expert, got 'token'"),
        ({"layout": "expert", "rows_per_expert": 0}, "rows_per_expert to be an integer of at"),
        ({"layout": "expert", "rows_per_expert": 2**30}, "rows_per_expert of at most 536870911"),
        ({"layout": "expert", "rows_per_expert": 4, "alignment": 4}, "got alignment=4 and max"),
        ({"layout": "expert", "rows_per_expert": 4, "max_recv_tokens": 9}, "max_recv_tokens=9"),
    ],
)  # fmt: skip
def test_bad_dispatch(buffer: Buffer, arguments: dict[str, Any], message: str) -> None:
    arguments = {"x": X, "topk_idx": IDX, **arguments}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        buffer.dispatch(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((F8.values[:, :64], F8.scales), "expected x[0] of shape [3, 128], got [3, 64]"),
        ((F8.values, F8.scales[:2]), "expected x[1] of shape [3, 1], got [2, 1]"),
        ((F8.values.float(), F8.scales), "expected x[0] of dtype torch.float8_e4m3fn, got"),
        ((F8.values, F8.scales.half()), "expected x[1] of dtype torch.float32, got torch.float16"),
    ],
)
def test_bad_quantised_input(x: Any, message: str) -> None:
    buffer = Buffer(**{**CONFIG, "hidden": 128})
    with pytest.raises(ValueError) as error:  # noqa: PT011
        buffer.dispatch(x, IDX, fp8=True)
    assert message in str(error.value)


def test_rows_must_be_whole_16_bytes() -> None:
    buffer = Buffer(**{**CONFIG, "hidden": 4})
    buffer.dispatch(torch.zeros(3, 4), IDX)
    message = "expected rows of x to be a multiple of 16 bytes, got 4 x torch.bfloat16 = 8 bytes"
    with pytest.raises(ValueError, match=message):
        buffer.dispatch(torch.zeros(3, 4).bfloat16(), IDX)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk_idx": IDX}, "expected no topk_idx and no max_recv_tokens with a handle"),
        ({"max_recv_tokens": 9}, "expected no topk_idx and no max_recv_tokens with a handle"),
        ({"layout": "expert"}, "expected the handle's layout='token', got 'expert'"),
        ({"alignment": 0}, "expected the handle's alignment=1, got 0"),
        ({"zero_copy": True}, "expected the handle's zero_copy=False, got True"),
        ({"rows_per_expert": 3}, "expected the handle's rows_per_expert=None, got 3"),
        ({"x": X[:2]}, "expected x of the handle's 3 rows, got 2"),
        ({"handle": 7}, "expected a Handle from Buffer.dispatch, got int"),
        ({"handle": "other"}, "a handle that this Buffer's dispatch returned, got another's"),
    ],
)  # fmt: skip
def test_bad_cached_dispatch(buffer: Buffer, arguments: dict[str, Any], message: str) -> None:
    _, handle = buffer.dispatch(X, IDX)
    if arguments.get("handle") == "other":
        arguments = {"handle": Buffer(**CONFIG).dispatch(X, IDX)[1]}
    arguments = {"x": X, "handle": handle, **arguments}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        buffer.dispatch(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("layout", "arguments", "message"),
    [
        ("token", {"rows": X}, "expected rows of shape [2, 8], got [3, 8]"),
        ("expert", {"rows": X[:2]}, "expected rows of shape [3, 8], got [2, 8]"),
        ("token", {"rows": X[:2].long()}, "got torch.int64"),
        ("token", {"weights": torch.ones(2)}, "expected weights=None with layout='token'"),
        ("expert", {"weights": torch.ones(2)}, "expected weights of shape [3], got [2]"),
        ("expert", {"weights": torch.ones(3).half()}, "got torch.float16"),
        ("expert", {"weights": [1.0] * 3}, "expected weights to be a tensor, got list"),
        ("token", {"rows": X[:2].to("meta")}, "expected rows on cpu, got meta"),
        ("token", {"bias": 0.5}, "expected bias to be a tensor, got float"),
        ("token", {"bias": X[:2]}, "expected bias of shape [3, 8], got [2, 8]"),
        ("token", {"bias": X.half()}, "expected bias of dtype torch.float32, got torch.float16"),
        ("token", {"out": X[:2]}, "expected out of shape [3, 8], got [2, 8]"),
        ("token", {"out": X.half()}, "expected out of dtype torch.float32, got torch.float16"),
        ("token", {"out": X.to("meta")}, "expected out on cpu, got meta"),
        ("token", {"out": X.clone()}, "expected out=None where gradients are recorded"),
        ("token", {"handle": None}, "expected a Handle from Buffer.dispatch, got NoneType"),
    ],
)
def test_bad_combine(buffer: Buffer, layout: str, arguments: dict[str, Any], message: str) -> None:
    recv, handle = buffer.dispatch(X, IDX, layout=layout)
    arguments = {"rows": recv.tokens, "handle": handle, **arguments}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        buffer.combine(**arguments)
    assert message in str(error.value)


def test_numbers_of_8_bytes_need_a_buffer_of_float64(buffer: Buffer) -> None:
    """Over peers' memory they have no room in others: so nowhere."""
    recv, handle = buffer.dispatch(X, IDX, WEIGHTS)
    wide, numbers = WEIGHTS.double(), recv.topk_weights.double()
    for name, call in (
        ("topk_weights", lambda: buffer.dispatch(X, IDX, wide)),
        ("topk_weights", lambda: buffer.dispatch(X, None, wide, handle=handle)),
        ("topk_weights", lambda: buffer.dispatch_weights(wide, handle)),
        ("row_weights", lambda: buffer.combine_with_weights(recv.tokens, numbers, handle)),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call()
        assert str(error.value) == (
            f"expected {name} of 4 bytes a value with a Buffer of torch.bfloat16, got torch.float64"
        )

    # What a combine weights rows with does not travel.
    recv, handle = buffer.dispatch(X, IDX, WEIGHTS, layout="expert")
    factors = recv.weights.detach().double().requires_grad_()
    buffer.combine(recv.tokens, handle, weights=factors)[0].sum().backward()
    assert factors.grad.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_in_a_buffer_of_float64(dtype: torch.dtype) -> None:
    """Either kind goes and comes back as it is, and so do its gradients."""
    buffer = Buffer(**CONFIG, dtype=torch.float64)
    numbers = WEIGHTS.to(dtype)
    given = numbers.clone().requires_grad_()
    recv, handle = buffer.dispatch(X.double(), IDX, given, layout="expert")
    y, _ = buffer.combine(recv.tokens, handle, weights=recv.weights)
    y.sum().backward()
    assert given.grad.dtype == dtype
    assert given.grad[0].tolist() == [X[0].sum()] * 2
    rows, weights = recv.tokens.detach(), recv.weights.detach()
    _, back, _ = buffer.combine_with_weights(rows, weights, handle)
    assert torch.equal(back, numbers.where(IDX >= 0, 0))
    assert torch.equal(buffer.dispatch_weights(numbers, handle)[0], weights)


def test_only_fp8_rows_can_be_dequantised(buffer: Buffer) -> None:
    recv, _ = buffer.dispatch(X, IDX)
    with pytest.raises(ValueError, match="expected rows dispatched with fp8=True, got"):
        recv.dequantize()
