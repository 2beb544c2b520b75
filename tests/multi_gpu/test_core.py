"""The CUDA core across GPUs of one process: peer access, links, and the barrier over them."""

from __future__ import annotations

import torch

from dualpipe_ext import core


def test_barrier_between_gpus():
    c = core.module()
    num_ranks = torch.cuda.device_count()
    layout = c.WorkspaceLayout(
        num_ranks=num_ranks, num_experts=num_ranks, top_k=1, max_tokens=16, row_bytes=256
    )
    memory = []
    for device in range(num_ranks):
        for peer in range(num_ranks):
            if peer != device:
                assert c.peer_link(device, peer).access
                c.enable_peer_access(device, peer)
                c.enable_peer_access(device, peer)  # allowed twice
        memory.append(torch.zeros(layout.bytes, dtype=torch.uint8, device=f"cuda:{device}"))
    table = c.PeerTable([m.data_ptr() for m in memory], bytes=layout.bytes)
    channels = [c.ErrorChannel(1) for _ in range(num_ranks)]
    for device in range(num_ranks):
        torch.cuda.synchronize(device)
    for _ in range(100):
        for device in range(num_ranks):
            with torch.cuda.device(device):
                c.barrier(
                    table,
                    layout,
                    channels[device],
                    first_rank=device,
                    num_local=1,
                    timeout_ns=10**10,
                    stream=torch.cuda.current_stream().cuda_stream,
                )
    for device in range(num_ranks):
        torch.cuda.synchronize(device)
        assert channels[device].read(0) is None
        assert memory[device][:8].view(torch.int32).tolist() == [0, 100]
