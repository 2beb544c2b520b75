// Host side of the plain push kernel: what the link gives to the rows of a dispatch if nothing but
// these rows is moved, a baseline of `dualpipe bench ep`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "comm/peer_table.h"
#include "ep/stage_layout.h"
#include "layout/carver.h"
#include "layout/workspace.h"

namespace dualpipe {

// Threads of a CTA, at most.
inline constexpr uint32_t kPushThreads = 512;
// Stages of a warp: more rows ahead bring nothing.
inline constexpr uint32_t kMostPushStages = 4;
// Shared memory that a CTA can have.
inline constexpr uint32_t kPushSharedBytes = 227 * 1024;

// What one rank's memory holds and where; the same on every rank.
struct PushLayout {
  Region<ControlState> state;  // [1], zero at first; of it only the queue and the ticket are used
  Region<uint8_t> rows;        // [num_rows, row_pitch], grouped by the rank that sent them
  uint64_t num_rows = 0;
  uint64_t row_bytes = 0;
  uint64_t row_pitch = 0;  // bytes from one row to the next
  uint64_t bytes = 0;      // of it all; 0 if that does not fit 63 bits
};

// Both counts are at least 1.
DUALPIPE_HD constexpr PushLayout make_push_layout(uint64_t num_rows, uint64_t row_bytes) {
  PushLayout layout;
  layout.num_rows = num_rows;
  layout.row_bytes = row_bytes;
  if (row_bytes > kMaxBytes - kRegionAlignment) return layout;
  layout.row_pitch = Carver::align_up(row_bytes);
  Carver carver;
  layout.state = carver.take<ControlState>(1);
  layout.rows = carver.take<uint8_t>(num_rows, layout.row_pitch);
  layout.bytes = carver.overflowed() ? 0 : carver.bytes();
  return layout;
}

// A piece of a row, and behind it the row's place at every rank.
DUALPIPE_HD constexpr StageLayout push_stage(uint32_t piece_bytes, uint32_t num_ranks) {
  return {piece_bytes, 4 * num_ranks};
}

// Stages that each warp of a CTA can have, and a barrier with each; with fewer than two nothing
// would be loaded.
DUALPIPE_HD constexpr uint32_t push_stages(uint32_t warps, uint32_t piece_bytes,
                                           uint32_t num_ranks) {
  if (warps == 0 || piece_bytes > kPushSharedBytes) return 0;
  const uint32_t fitting =
      kPushSharedBytes / (warps * (push_stage(piece_bytes, num_ranks).bytes() + 8));
  return fitting < kMostPushStages ? fitting : kMostPushStages;
}

// One rank's launch. T tokens, R ranks.
struct PushArgs {
  PeerTable peers;
  PushLayout layout;
  uint32_t rank;
  uint32_t num_tokens;
  uint32_t ctas;
  uint32_t warps;        // of a CTA
  uint32_t stages;       // of a warp
  uint32_t piece_bytes;  // of a row in a stage, at most; a multiple of 16
  const uint8_t* x;      // [T, row_pitch], on 16 bytes
  const int32_t* slots;  // [T, R], a token's row at each rank, -1 where it does not go
};

// Enqueues the kernel; does not wait. When it ends, the peers' memory has the rows.
cudaError_t launch_push(const PushArgs& args, cudaStream_t stream);

}  // namespace dualpipe
