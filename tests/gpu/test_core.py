"""The CUDA core on one GPU: eight virtual ranks behave as eight GPUs would."""

from __future__ import annotations

import pytest
import torch

from dualpipe_ext import core
from dualpipe_ext.errors import CommTimeoutError

RANKS = 8
LONG_S = 10.0
SHORT_S = 0.2
STATE_EPOCH = 1  # word of ControlState
FLAG_WORDS = 32  # 32-bit words of a FlagLine


class VirtualRanks:
    """Workspaces of several ranks on the current GPU, and the barrier between them."""

    def __init__(self, num_ranks=RANKS):
        self.c = core.module()
        self.num_ranks = num_ranks
        self.layout = self.c.WorkspaceLayout(
            num_ranks=num_ranks, num_experts=num_ranks, top_k=1, max_tokens=16, row_bytes=256
        )
        self.memory = [
            torch.zeros(self.layout.bytes, dtype=torch.uint8, device="cuda")
            for _ in range(num_ranks)
        ]
        bases = [memory.data_ptr() for memory in self.memory]
        self.table = self.c.PeerTable(bases, bytes=self.layout.bytes)
        # A launch takes the channel of its first rank.
        self.channels = [self.c.ErrorChannel(num_ranks) for _ in range(num_ranks)]

    def words(self, rank, region):
        offset, size = self.layout.regions()[region]
        return self.memory[rank][offset : offset + size].view(torch.int32)

    def epochs(self):
        return [self.words(rank, "state")[STATE_EPOCH].item() for rank in range(self.num_ranks)]

    def set_epoch(self, value):
        """As if that many barriers had gone before."""
        for rank in range(self.num_ranks):
            self.words(rank, "state")[STATE_EPOCH] = value
            self.words(rank, "barrier_flags")[::FLAG_WORDS] = value

    def barrier(self, first, count, *, timeout_s=LONG_S, stream=None):
        self.c.barrier(
            self.table,
            self.layout,
            self.channels[first],
            first_rank=first,
            num_local=count,
            timeout_ns=int(timeout_s * 1e9),
            stream=(stream or torch.cuda.current_stream()).cuda_stream,
        )

    def reset(self):
        for channel in self.channels:
            channel.clear()
        for memory in self.memory:
            memory.zero_()


@pytest.fixture
def ranks():
    return VirtualRanks()


def test_devices_agree_with_torch():
    c = core.module()
    devices = c.devices()
    assert len(devices) == torch.cuda.device_count()
    for device in devices:
        seen = torch.cuda.get_device_properties(device.index)
        assert device.name == seen.name
        assert device.capability == (seen.major, seen.minor)
        assert device.num_sms == seen.multi_processor_count
        assert device.memory_bytes == seen.total_memory
        assert device.shared_memory_bytes >= 227 * 1024
    assert c.driver_version() >= 12000


def test_barriers_of_one_launch(ranks):
    for _ in range(100):
        ranks.barrier(0, RANKS)
    torch.cuda.synchronize()
    assert ranks.epochs() == [100] * RANKS
    assert all(ranks.channels[0].read(rank) is None for rank in range(RANKS))


def test_a_rank_on_each_stream_and_one_late(ranks):
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        # The second stream starts late: the first seven ranks really wait.
        with torch.cuda.stream(streams[1]):
            torch.cuda._sleep(100_000)
        ranks.barrier(0, RANKS - 1, stream=streams[0])
        ranks.barrier(RANKS - 1, 1, stream=streams[1])
    torch.cuda.synchronize()
    assert ranks.epochs() == [20] * RANKS


def test_what_was_written_before_is_visible_after(ranks):
    value = torch.zeros(1, device="cuda")
    seen = []
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for step in range(1, 51):
        with torch.cuda.stream(streams[1]):
            torch.cuda._sleep(20_000)
            value.fill_(step)
        ranks.barrier(0, RANKS - 1, stream=streams[0])
        ranks.barrier(RANKS - 1, 1, stream=streams[1])
        with torch.cuda.stream(streams[0]):
            seen.append(value.clone())
        # Both sides have read before the next value is written.
        ranks.barrier(0, RANKS - 1, stream=streams[0])
        ranks.barrier(RANKS - 1, 1, stream=streams[1])
    torch.cuda.synchronize()
    assert torch.cat(seen).tolist() == list(range(1, 51))


def test_epochs_wrap(ranks):
    ranks.set_epoch(-3)  # 2^32 - 3
    for _ in range(5):
        ranks.barrier(0, RANKS)
    torch.cuda.synchronize()
    assert ranks.epochs() == [2] * RANKS


@pytest.mark.parametrize("num_ranks", [1, 2, 64])
def test_any_number_of_ranks(num_ranks):
    ranks = VirtualRanks(num_ranks)
    ranks.barrier(0, num_ranks)
    ranks.barrier(0, num_ranks)
    torch.cuda.synchronize()
    assert ranks.epochs() == [2] * num_ranks


def test_a_rank_that_never_calls_is_named(ranks):
    ranks.barrier(0, RANKS)
    ranks.barrier(0, RANKS - 1, timeout_s=SHORT_S)  # the last rank is missing
    torch.cuda.synchronize()  # returns: the wait is bounded and the context is intact
    for rank in range(RANKS - 1):
        record = ranks.channels[0].read(rank)
        assert (record["rank"], record["peer"], record["phase"]) == (rank, RANKS - 1, "barrier")
        assert (record["expected"], record["seen"], record["epoch"]) == (2, 1, 2)
        with pytest.raises(CommTimeoutError, match=f"rank {rank} waited .* for rank 7 in phase"):
            core.raise_on_failure(record, timeout_s=SHORT_S)
    assert ranks.epochs() == [2] * (RANKS - 1) + [1]


def test_after_a_time_out_kernels_leave_at_once_until_reset(ranks):
    ranks.barrier(0, RANKS - 1, timeout_s=SHORT_S)
    torch.cuda.synchronize()
    first = ranks.channels[0].read(0)

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    ranks.barrier(0, RANKS - 1, timeout_s=LONG_S)
    end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) < 1e3 * SHORT_S
    assert ranks.channels[0].read(0) == first  # the first failure stays

    # The context works, and so does the barrier once its state is cleared.
    a = torch.randn(64, 64, device="cuda")
    torch.testing.assert_close((a @ a).cpu(), a.cpu() @ a.cpu(), rtol=1e-3, atol=1e-3)
    ranks.reset()
    ranks.barrier(0, RANKS)
    torch.cuda.synchronize()
    assert ranks.epochs() == [1] * RANKS
    assert ranks.channels[0].read(0) is None


def test_replays_from_a_graph(ranks):
    # The epoch lives on the device: a captured barrier counts on with every replay.
    graph = torch.cuda.CUDAGraph()
    ranks.barrier(0, RANKS)  # loads the kernel
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        ranks.barrier(0, RANKS)
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    assert ranks.epochs() == [11] * RANKS


def test_memory_that_is_too_small_or_not_on_a_gpu_is_refused(ranks):
    c = ranks.c
    small = torch.zeros(1024, dtype=torch.uint8, device="cuda").data_ptr()
    with pytest.raises(ValueError, match=r"allocation of at least \d+ bytes for rank 0"):
        c.PeerTable([small], bytes=2**40)
    host = torch.zeros(4096, dtype=torch.uint8)
    address = (host.data_ptr() + 127) // 128 * 128
    with pytest.raises(ValueError, match="expected an address in GPU memory"):
        c.PeerTable([address], bytes=16)


@pytest.mark.parametrize(("first", "count"), [(0, 9), (8, 1), (3, 0), (7, 2)])
def test_local_ranks_outside_the_table_are_refused(ranks, first, count):
    with pytest.raises(ValueError, match=r"expected local ranks within 0\.\.7"):
        ranks.c.barrier(
            ranks.table,
            ranks.layout,
            ranks.channels[0],
            first_rank=first,
            num_local=count,
            timeout_ns=1,
            stream=0,
        )
