// A handle as kernels see it: where the route wrote what the later calls follow. Made once per
// handle, so that a call passes only what is its own.
#pragma once

#include <cstdint>

#include "api/route_reports.h"
#include "ep/combine.h"
#include "ep/dispatch.h"
#include "ep/route.h"
#include "layout/workspace.h"

namespace dualpipe {

// Addresses are integers, 0 for what is not given. Whoever makes the calls keeps the memory.
class HandleArrays {
 public:
  using Address = uint64_t;

  // `arrays`: bytes() of memory on 16 bytes, the unit of bulk copies. `topk_local` in the token
  // layout, `offsets` in the expert layout.
  HandleArrays(const WorkspaceLayout& layout, uint32_t rank, uint32_t num_tokens,
               RowLayout row_layout, bool moves_parts, Address arrays, Address topk_local,
               Address counts, Address offsets);

  static uint64_t bytes(const WorkspaceLayout& layout, uint32_t num_tokens, RowLayout row_layout,
                        bool moves_parts);

  RouteCall route_call(uint32_t alignment, int32_t max_rows, bool zero_copy, uint32_t delay_ns,
                       Address topk_idx, uint64_t num_rows, const RouteReports& reports,
                       uint32_t report) const;
  DispatchCall dispatch_call(uint32_t slab, bool keep_in_slab, uint32_t send_delay_ns,
                             uint32_t receive_delay_ns, Address x, Address x_scales,
                             Address weights, Address out_rows, Address out_scales,
                             Address out_weights, uint64_t num_rows, uint64_t out_pitch,
                             uint64_t out_scale_pitch) const;
  CombineCall combine_call(uint32_t send_delay_ns, uint32_t receive_delay_ns, Address rows,
                           uint64_t num_rows, Address weights, Address bias, Address row_weights,
                           Address y, Address token_weights) const;

 private:
  uint32_t rank_, num_tokens_;
  RowLayout row_layout_;
  int32_t *slots_, *matrix_, *run_starts_, *unit_tokens_, *positions_, *offsets_;
  int16_t* ids_;
  int64_t *topk_local_, *counts_;
};

}  // namespace dualpipe
