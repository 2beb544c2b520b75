// What dispatch and combine have in common: finding one's way in the workspaces, the permits before
// the first store, and the launch.
#pragma once

#include <cstdint>

#include "comm/launch.cuh"
#include "ep/hello.cuh"
#include "ptx/bulk.cuh"
#include "ptx/memory.cuh"

namespace dualpipe {

// What all warps of a CTA know. Args and Call are those of a dispatch or of a combine.
template <class Args, class Call>
struct Transfer {
  const Args& args;
  const Call& call;
  Watchdog watchdog;
  uint32_t epoch;

  __device__ const LaunchArgs& launch() const { return args.launch; }
  __device__ const WorkspaceLayout& layout() const { return args.launch.layout; }
  __device__ uint32_t me() const { return call.rank; }
  __device__ uint32_t num_ranks() const { return args.launch.peers.num_ranks; }
  __device__ uint32_t top_k() const { return static_cast<uint32_t>(layout().shape.top_k); }
  // Numbers of one row of `positions`.
  __device__ uint32_t places() const { return round_up(top_k(), 4); }
  // Experts of one rank.
  __device__ uint32_t per_rank() const {
    return static_cast<uint32_t>(layout().shape.num_experts) / num_ranks();
  }
  __device__ uint32_t max_tokens() const {
    return static_cast<uint32_t>(layout().shape.max_tokens);
  }
  // Tokens that rank `source` sends to rank `to`.
  __device__ int32_t sent(uint32_t source, uint32_t to) const {
    return call.matrix[source * num_ranks() + to];
  }
  // First row at `to` of what `source` sends.
  __device__ int32_t first_row(uint32_t source, uint32_t to) const {
    int32_t row = 0;
    for (uint32_t s = 0; s < source; ++s) row += sent(s, to);
    return row;
  }
  // Tokens that have, between them, all rows before unit `unit` of all that this rank sends: those
  // before the one that is returned. One warp, all lanes alike.
  __device__ uint32_t tokens_for_units(uint32_t unit) const {
    if (unit == kSegmentUnits) return call.num_tokens;
    uint32_t end = 0;
    for (uint32_t to = threadIdx.x % 32; unit != 0 && to < num_ranks(); to += 32) {
      if (to != me() && sent(me(), to) != 0) end = max(end, token_of_unit(unit, to));
    }
    return __reduce_max_sync(~0u, end);
  }
  // Tokens that have no other rows than those before unit `unit`: those before the one that is
  // returned. One warp, all lanes alike.
  __device__ uint32_t tokens_of_units(uint32_t unit) const {
    if (unit == 0) return 0;
    uint32_t end = call.num_tokens;
    for (uint32_t to = threadIdx.x % 32; to < num_ranks(); to += 32) {
      if (to != me()) end = min(end, token_of_unit(unit, to));
    }
    return __reduce_min_sync(~0u, end);
  }
  // The token at which that unit of what this rank sends to `to` begins.
  __device__ uint32_t token_of_unit(uint32_t unit, uint32_t to) const {
    return unit_token(unit, max_tokens(), sent(me(), to), call.unit_tokens + to, num_ranks(),
                      call.num_tokens);
  }
  __device__ uint8_t* slab(uint32_t rank, uint32_t index) const {
    return launch().peers.base[rank] + layout().slab_offset(index);
  }
  __device__ uint8_t* slab_weights(uint8_t* slab, uint64_t row) const {
    return layout().slab.weights.in(slab) + row * layout().slab.weight_pitch;
  }
  // Flags at rank `at` of what `source` sends there: a run each, or a chunk.
  __device__ uint32_t* run_flags(uint32_t at, uint32_t source) const {
    return layout().control.run_flags.in(launch().peers.base[at]) + source * layout().control.runs;
  }
  // One number of a choice; zero if `from` is null.
  __device__ void copy_weight(uint8_t* to, uint64_t i, const uint8_t* from, uint64_t j) const {
    if (args.weight_bytes == 4) {
      reinterpret_cast<uint32_t*>(to)[i] = from ? reinterpret_cast<const uint32_t*>(from)[j] : 0;
    } else {
      reinterpret_cast<uint64_t*>(to)[i] = from ? reinterpret_cast<const uint64_t*>(from)[j] : 0;
    }
  }

  // Gives every peer leave to write into a slab of this rank, and says what call this is. One warp.
  __device__ void send_permits(uint32_t slab) const {
    for (uint32_t to = threadIdx.x % 32; to < num_ranks(); to += 32) {
      if (to == me()) continue;
      PermitLine* line = layout().control.permits.in(launch().peers.base[to]) + me();
      ptx::st_relaxed_sys(&line->slab, slab);
      ptx::st_relaxed_sys(&line->call, hello(args, epoch));
      ptx::st_release_sys(&line->epoch, epoch);
    }
  }

  // For the copy engines: waits for the leave of all peers, for they write to all, whatever these
  // are sent; then sets what the copies' flags take along. Without all permits they must not vouch
  // for the copies. One warp.
  __device__ void open_copies(Phase phase) const {
    if (await_all(phase) && threadIdx.x % 32 < kSegmentUnits) {
      watchdog.state->copy_epochs[threadIdx.x % 32] = epoch;
    }
  }

  // Waits until every peer is in this call, also those that it has nothing to do with, and sees
  // that it makes the same call: so all ranks learn of it if one does not. One warp; false if the
  // rank has failed.
  __device__ bool await_all(Phase phase) const {
    bool same = true;
    const bool open = wait_for_permits(
        phase, [](uint32_t) { return true; },
        [&](uint32_t from, uint32_t) { same = same && makes_same_call(phase, from); });
    return __all_sync(~0u, open && same) != 0;
  }

  // Waits for the leave of every peer that `writes_to` names, then calls `opened` with the peer and
  // the slab it offers. Lane l does so for peers l and l + 32. One warp; false if the rank has
  // failed.
  template <class WritesTo, class Opened>
  __device__ bool wait_for_permits(Phase phase, WritesTo writes_to, Opened opened) const {
    bool open = true;
    for (uint32_t to = threadIdx.x % 32; to < num_ranks(); to += 32) {
      if (to == me() || !writes_to(to)) continue;
      const PermitLine* permit = layout().control.permits.in(launch().peers.base[me()]) + to;
      open = open && wait_epoch(&permit->epoch, epoch, {phase, me(), to, 0, epoch}, watchdog);
      opened(to, ptx::ld_relaxed_sys(&permit->slab));
    }
    ptx::fence_proxy_async_global();  // bulk stores come after the permits
    return __all_sync(~0u, open) != 0;
  }

  // Whether a peer whose permit has come makes the call that this rank makes. If not, one of the
  // two would wait for what the other never sends, or take something else for it. A peer can
  // already be in the next call: it has seen the word of this rank by then.
  __device__ bool makes_same_call(Phase phase, uint32_t peer) const {
    const PermitLine* permit = layout().control.permits.in(launch().peers.base[me()]) + peer;
    const uint32_t own = hello(args, epoch), theirs = ptx::ld_relaxed_sys(&permit->call);
    if (theirs == own || !is_of_same_epoch(theirs, own)) return true;
    watchdog.report({phase, me(), peer, 0, epoch}, said(own), said(theirs), ErrorCode::kMismatch);
    return false;
  }
};

// Enqueues a kernel on the CTAs of all ranks of the launch, with that much shared memory.
template <class Kernel, class Args>
cudaError_t launch_transfer(Kernel kernel, const Args& args, const StagedPart& staged,
                            uint32_t shared_bytes, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status != cudaSuccess) return status;
  kernel<<<args.launch.num_local * args.launch.ctas, args.tuning.threads(), shared_bytes, stream>>>(
      args, staged);
  return cudaGetLastError();
}

}  // namespace dualpipe
