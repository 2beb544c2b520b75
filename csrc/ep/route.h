// Host side of the route kernel: from expert ids to the place of every row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "comm/launch_args.h"
#include "ep/row_layout.h"

namespace dualpipe {

// Experts of one rank: their counts have to fit the shared memory of the kernel.
inline constexpr uint32_t kMaxLocalExperts = 2048;

// What is wrong with a call that all ranks have made.
enum class RouteFault : uint32_t { kNone = 0, kBadIds = 1, kMismatch = 2, kOverflow = 3 };

// What a route tells the host; one per rank, in host-mapped memory. `ready` is stored last, with
// release semantics.
struct RouteReport {
  uint32_t ready;  // 1 once a route has written it
  uint32_t fault;  // RouteFault; the first one stays until the host has cleared it
  uint32_t fault_rank;
  uint32_t fault_epoch;                   // of the route
  int32_t fault_layout;                   // kMismatch: the settings of that rank
  int32_t fault_alignment;                //
  int32_t fault_zero_copy;                //
  int32_t fault_limit;                    // the room of that rank, or of its groups; -1: any
  int64_t fault_count;                    // kBadIds: how many; kOverflow: rows that would arrive
  int64_t num_rows;                       // rows that arrive at this rank, in the layout asked for
  int32_t matrix[kMaxRanks * kMaxRanks];  // [R, R] tokens that rank s sends to rank d
  int32_t counts[kMaxLocalExperts];       // [G] rows of each local expert; for calls without bound
};

// One rank's call.
struct RouteCall {
  uint32_t rank;
  uint32_t num_tokens;
  uint32_t expert_layout;  // RowLayout
  uint32_t alignment;      // kExpertGroups: rows of a group
  int32_t max_rows;        // -1 for any number; kExpertGroups: rows of a group
  uint32_t zero_copy;
  uint32_t delay_ns;
  const int64_t* topk_idx;  // [T, K], on 16 bytes
  // What the call finds out.
  int32_t* slots;   // [T, R]                     row of each token at each rank, -1 for none
  int16_t* ids;     // [T, id_pitch]              expert ids, -1 where dropped
  int32_t* matrix;  // [R + 1, R]                 tokens that rank s sends to rank d; last, T of s
  int32_t* run_starts;  // [R, max_runs + 1]          first row of each run that arrives here
  int32_t*
      unit_tokens;      // [kSegmentUnits, R] or null: token with the first row of each unit of what
                        //                            this rank sends; unset where there is none
  int64_t* topk_local;  // [num_rows, K] or null      local expert ids of the rows that arrive
  int32_t* positions;   // [R * T, K rounded up to 4] or null: rows of the expert layout
  int64_t* counts;      // [G]                        rows of each local expert
  int32_t* offsets;     // [G]                        END row of each expert's group
  uint64_t num_rows;    // rows of the output
  RouteReport* report;
};

struct RouteArgs {
  LaunchArgs launch;
  RouteCall calls[kMaxLocalRanks];
};

// Enqueues the kernel; does not wait.
cudaError_t launch_route(const RouteArgs& args, cudaStream_t stream);

}  // namespace dualpipe
