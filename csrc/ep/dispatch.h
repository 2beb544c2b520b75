// Host side of the dispatch kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "comm/launch_args.h"
#include "ep/row_layout.h"
#include "ep/tuning.h"

namespace dualpipe {

// What rows become on their way.
enum class Payload : uint32_t {
  kAsIs,          // bytes; scales, if any, come with them
  kQuantize,      // BF16 to FP8 E4M3 with a float32 scale per 128 values
  kQuantizePow2,  // likewise, with scales that are powers of two
};

// One rank's call. Shapes: T tokens, R ranks, K top-k, G local experts.
struct DispatchCall {
  uint32_t rank;
  uint32_t num_tokens;
  uint32_t slab;           // of this rank: where its rows shall arrive
  uint32_t keep_in_slab;   // 1: they stay there (token layout), 0: they are copied to `out_rows`
  uint32_t expert_layout;  // RowLayout
  uint32_t send_delay_ns;  // test hooks
  uint32_t receive_delay_ns;
  const uint8_t* x;        // [T, in_bytes], on 16 bytes
  const float* x_scales;   // [T, num_scales] or null
  const uint8_t* weights;  // [T, K] numbers or null
  // The route, see RouteCall.
  const int32_t* slots;
  const int16_t* ids;
  const int32_t* matrix;
  const int32_t* run_starts;
  const int32_t* unit_tokens;  // the copy-engine path
  const int64_t* topk_local;   // token layout with weights
  const int32_t* positions;    // expert layout
  const int64_t* counts;
  const int32_t* offsets;
  // The output.
  uint8_t* out_rows;     // [num_rows, out_bytes]; of the slab if rows are kept there
  float* out_scales;     // [num_rows, num_scales] or null; likewise
  uint8_t* out_weights;  // [num_rows, K] or, in the expert layout, [num_rows]; or null
  uint64_t num_rows;
  uint64_t out_pitch;        // bytes from one row to the next
  uint64_t out_scale_pitch;  // numbers from one row's scales to the next
};

struct DispatchArgs {
  LaunchArgs launch;
  Payload payload;
  uint32_t in_bytes;      // of a row before, a multiple of 16
  uint32_t out_bytes;     // of a row after
  uint32_t num_scales;    // of a row
  uint32_t weight_bytes;  // of a number of `weights`, 0 without them; alike on all ranks
  Tuning tuning;
  DispatchCall calls[kMaxLocalRanks];
};

// Enqueues the kernel that sends and receives; does not wait.
cudaError_t launch_dispatch(const DispatchArgs& args, cudaStream_t stream);

// The halves of the copy-engine path, one part of all segments at a time, in order: rows of peers
// into the staging slab, and those that stay to their place; rows that have come to their place.
cudaError_t launch_dispatch_pack(const DispatchArgs& args, const StagedPart& staged,
                                 cudaStream_t stream);
cudaError_t launch_dispatch_unpack(const DispatchArgs& args, const SegmentPart& part,
                                   cudaStream_t stream);

}  // namespace dualpipe
