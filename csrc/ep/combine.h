// Host side of the combine kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "comm/launch_args.h"
#include "ep/tuning.h"

namespace dualpipe {

enum class RowType : uint32_t { kBf16, kF16, kF32, kF64 };

// One rank's call. Shapes: T tokens, R ranks, K top-k.
struct CombineCall {
  uint32_t rank;
  uint32_t num_tokens;
  uint32_t send_delay_ns;  // test hooks
  uint32_t receive_delay_ns;
  const uint8_t* rows;  // [num_rows, row_bytes], on 16 bytes
  uint64_t num_rows;
  const void* weights;  // expert layout: [num_rows] factors of the accumulator's type, or null
  const uint8_t* bias;  // [T, row_bytes] or null
  const uint8_t* row_weights;  // numbers of single choices: [num_rows, K] or [num_rows]; or null
  // The route, see RouteCall.
  const int32_t* slots;
  const int16_t* ids;
  const int32_t* matrix;
  const int32_t* unit_tokens;  // the copy-engine path
  const int32_t* positions;
  // The output.
  uint8_t* y;              // [T, row_bytes]
  uint8_t* token_weights;  // [T, K], where row_weights are given
};

struct CombineArgs {
  LaunchArgs launch;
  RowType type;
  uint32_t expert_layout;  // 1: rows are in the expert layout
  uint32_t weighted;       // 1: with factors, on some rank of the launch
  uint32_t row_bytes;
  uint32_t weight_bytes;  // of a number of row_weights, 0 without them; alike on all ranks
  Tuning tuning;          // the receive warps are those that reduce; they have no stages
  CombineCall calls[kMaxLocalRanks];
};

// Enqueues the kernel that sends and reduces; does not wait.
cudaError_t launch_combine(const CombineArgs& args, cudaStream_t stream);

// The halves of the copy-engine path, one part of all segments at a time, in order: rows into the
// staging slab (without send warps, only the exchange of permits); the sums of the tokens whose
// last rows have come with that part.
cudaError_t launch_combine_pack(const CombineArgs& args, const StagedPart& staged,
                                cudaStream_t stream);
cudaError_t launch_combine_reduce(const CombineArgs& args, const SegmentPart& part,
                                  cudaStream_t stream);

}  // namespace dualpipe
