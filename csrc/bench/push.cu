// A plain push: every token's row to every other rank that it goes to, straight to its place, and
// nothing else. No flags, no permits, no weights, no rows that stay, and nobody waits for what
// arrives. So a dispatch of the same rows cannot be faster with as many SMs: the bytes that cross
// the link, their sources and their places are the same.
//
// The rest is as good as in a dispatch, or the baseline would be too low: each row is read once, by
// bulk loads ahead of the stores, and stored to all peers from its one stage; warps take tokens
// from a queue, as SMs are not equally fast beside each other.
//
// No protocol: peers read the rows only after the host has seen this kernel end. Ranks that push
// again overwrite rows with the same bytes.
#include "bench/push.h"

#include "comm/launch.cuh"
#include "ep/ring.cuh"
#include "ep/work_queue.cuh"

namespace dualpipe {
namespace {

// A lane looks after this many ranks.
constexpr uint32_t kRanksPerLane = kMaxRanks / 32;

// Pushes the tokens that a queue hands out.
class PushWork {
 public:
  __device__ PushWork(const PushArgs& args, const WorkQueue& queue)
      : args_(args), lane_(threadIdx.x % 32), queue_(queue), token_(queue_.take()) {
#pragma unroll
    for (uint32_t i = 0; i < kRanksPerLane; ++i) {
      const uint32_t to = lane_ + 32 * i;
      const bool peer = to < args_.peers.num_ranks && to != args_.rank;
      rows_[i] = peer ? args_.layout.rows.in(args_.peers.base[to]) : nullptr;
    }
    fetch_slots();
  }

  __device__ bool load(Ring& ring, uint32_t stage) {
    while (token_ < args_.num_tokens && !goes_anywhere()) next_token();
    if (token_ >= args_.num_tokens) return false;
    // Read again by the lane that writes them.
    int32_t* slots = reinterpret_cast<int32_t*>(ring.extra(stage));
#pragma unroll
    for (uint32_t i = 0; i < kRanksPerLane; ++i) {
      if (rows_[i] != nullptr) slots[lane_ + 32 * i] = slots_[i];
    }
    const uint32_t bytes = piece_bytes(loaded_);
    if (lane_ == 0) {
      uint64_t* full = ring.full(stage);
      ptx::mbarrier_arrive_expect_tx(full, bytes);
      ptx::bulk_load(ring.piece(stage), args_.x + token_ * args_.layout.row_pitch + loaded_, bytes,
                     full);
    }
    loaded_ += bytes;
    if (loaded_ == args_.layout.row_bytes) next_token();
    return true;
  }

  __device__ void store(Ring& ring, uint32_t stage) {
    const int32_t* slots = reinterpret_cast<const int32_t*>(ring.extra(stage));
    const uint32_t bytes = piece_bytes(stored_);
#pragma unroll
    for (uint32_t i = 0; i < kRanksPerLane; ++i) {
      if (rows_[i] == nullptr) continue;
      const int32_t slot = slots[lane_ + 32 * i];
      if (!has_room(slot)) continue;
      ptx::bulk_store(rows_[i] + slot * args_.layout.row_pitch + stored_, ring.piece(stage), bytes);
    }
    // Steps are stored in the order in which they were loaded.
    stored_ += bytes;
    if (stored_ == args_.layout.row_bytes) stored_ = 0;
  }

  __device__ bool wait() { return false; }

 private:
  // False too for -1, no place, and for a place that the memory does not have.
  __device__ bool has_room(int32_t slot) const {
    return static_cast<uint32_t>(slot) < args_.layout.num_rows;
  }

  __device__ bool goes_anywhere() const {
    bool goes = false;
#pragma unroll
    for (uint32_t i = 0; i < kRanksPerLane; ++i) goes = goes || has_room(slots_[i]);
    return __any_sync(~0u, goes) != 0;
  }

  // Bytes of the piece that begins there in a row.
  __device__ uint32_t piece_bytes(uint32_t first) const {
    return min(args_.piece_bytes, static_cast<uint32_t>(args_.layout.row_bytes) - first);
  }

  // Some time before their use; nothing here may look at what comes back.
  __device__ void fetch_slots() {
    const bool valid = token_ < args_.num_tokens;
    if (valid) queue_.ask();
    const int32_t* slots = args_.slots + uint64_t(token_) * args_.peers.num_ranks;
#pragma unroll
    for (uint32_t i = 0; i < kRanksPerLane; ++i) {
      slots_[i] = valid && rows_[i] != nullptr ? __ldg(slots + lane_ + 32 * i) : -1;
    }
  }

  // Every answer of the queue is taken before the warp ends, so that none comes after the counter
  // has been set back.
  __device__ void next_token() {
    loaded_ = 0;
    token_ = queue_.take();
    fetch_slots();
  }

  const PushArgs& args_;
  const uint32_t lane_;
  WorkQueue queue_;               // of tokens
  uint32_t token_;                // the next to load, from `loaded_` on
  uint32_t loaded_ = 0;           // bytes of its row
  uint32_t stored_ = 0;           // bytes of the row that is being stored
  uint8_t* rows_[kRanksPerLane];  // of ranks lane and lane + 32; null without such a peer
  int32_t slots_[kRanksPerLane];  // the token's row there
};

__global__ void __launch_bounds__(kPushThreads, 1)
    push_kernel(const __grid_constant__ PushArgs args) {
  extern __shared__ __align__(128) uint8_t memory[];
  ControlState* state = args.layout.state.in(args.peers.base[args.rank]);
  const StageLayout layout = push_stage(args.piece_bytes, args.peers.num_ranks);
  const uint32_t warp = threadIdx.x / 32, stage = warp * args.stages;
  Ring ring(memory + stage * layout.bytes(),
            reinterpret_cast<uint64_t*>(memory + args.warps * args.stages * layout.bytes()) + stage,
            layout, args.stages);
  ring.init();
  // Neighbours in the work are in different CTAs: with little work, every SM has some.
  const WorkQueue queue(state, Queue::kSend, warp * args.ctas + blockIdx.x, args.warps * args.ctas);
  PushWork work(args, queue);
  pump(ring, work);
  finish_epoch(state, nullptr, args.ctas);
}

}  // namespace

cudaError_t launch_push(const PushArgs& args, cudaStream_t stream) {
  const uint32_t stages = args.warps * args.stages;
  const uint32_t shared = stages * (push_stage(args.piece_bytes, args.peers.num_ranks).bytes() + 8);
  const cudaError_t status = cudaFuncSetAttribute(
      push_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (status != cudaSuccess) return status;
  push_kernel<<<args.ctas, 32 * args.warps, shared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace dualpipe
