// What a route leaves for the kernels of every call with its handle, in one allocation that only
// kernels read: one struct cuts it on whichever side. What each array holds is said at RouteCall.
#pragma once

#include <cstdint>

#include "layout/carver.h"
#include "layout/segment.h"
#include "layout/workspace.h"

namespace dualpipe {

// T tokens of the rank, R ranks, K top-k.
struct HandleLayout {
  Region<int32_t> slots;        // [T, R]
  Region<int16_t> ids;          // [T, id_pitch]
  Region<int32_t> matrix;       // [R + 1, R]
  Region<int32_t> run_starts;   // [R, max_runs + 1]
  Region<int32_t> unit_tokens;  // [kSegmentUnits, R]; only where rows travel in parts
  Region<int32_t> positions;    // [R * max_tokens, K rounded up to 4]; expert layout only
  uint64_t bytes = 0;           // 0 if that does not fit 63 bits
};

DUALPIPE_HD constexpr HandleLayout make_handle_layout(const WorkspaceLayout& workspace,
                                                      uint64_t num_tokens, bool expert_layout,
                                                      bool moves_parts) {
  const WorkspaceShape& shape = workspace.shape;
  Carver carver;
  HandleLayout handle;
  handle.slots = carver.take<int32_t>(num_tokens, shape.num_ranks);
  handle.ids = carver.take<int16_t>(num_tokens, workspace.id_pitch);
  handle.matrix = carver.take<int32_t>(shape.num_ranks + 1, shape.num_ranks);
  handle.run_starts = carver.take<int32_t>(shape.num_ranks, workspace.control.runs + 1);
  if (moves_parts) handle.unit_tokens = carver.take<int32_t>(kSegmentUnits, shape.num_ranks);
  if (expert_layout) {
    handle.positions =
        carver.take<int32_t>(shape.num_ranks, shape.max_tokens, (shape.top_k + 3) / 4 * 4);
  }
  handle.bytes = carver.overflowed() ? 0 : carver.bytes();
  return handle;
}

}  // namespace dualpipe
