#include "api/handle_arrays.h"

#include <stdexcept>
#include <string>

#include "layout/handle_arrays.h"

namespace dualpipe {
namespace {

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

HandleLayout checked_handle_layout(const WorkspaceLayout& layout, uint32_t num_tokens,
                                   RowLayout row_layout, bool moves_parts) {
  const HandleLayout handle =
      make_handle_layout(layout, num_tokens, row_layout != kTokenRows, moves_parts);
  if (handle.bytes == 0)
    throw std::invalid_argument("expected arrays of a handle below 2^63 bytes");
  return handle;
}

}  // namespace

HandleArrays::HandleArrays(const WorkspaceLayout& layout, uint32_t rank, uint32_t num_tokens,
                           RowLayout row_layout, bool moves_parts, Address arrays,
                           Address topk_local, Address counts, Address offsets)
    : rank_(rank),
      num_tokens_(num_tokens),
      row_layout_(row_layout),
      offsets_(pointer<int32_t>(offsets)),
      topk_local_(pointer<int64_t>(topk_local)),
      counts_(pointer<int64_t>(counts)) {
  if (arrays == 0 || arrays % 16 != 0) {
    throw std::invalid_argument("expected arrays of a handle on 16 bytes, got address " +
                                std::to_string(arrays));
  }
  const HandleLayout handle = checked_handle_layout(layout, num_tokens, row_layout, moves_parts);
  auto* base = pointer<uint8_t>(arrays);
  slots_ = handle.slots.in(base);
  ids_ = handle.ids.in(base);
  matrix_ = handle.matrix.in(base);
  run_starts_ = handle.run_starts.in(base);
  unit_tokens_ = moves_parts ? handle.unit_tokens.in(base) : nullptr;
  positions_ = row_layout != kTokenRows ? handle.positions.in(base) : nullptr;
}

uint64_t HandleArrays::bytes(const WorkspaceLayout& layout, uint32_t num_tokens,
                             RowLayout row_layout, bool moves_parts) {
  return checked_handle_layout(layout, num_tokens, row_layout, moves_parts).bytes;
}

RouteCall HandleArrays::route_call(uint32_t alignment, int32_t max_rows, bool zero_copy,
                                   uint32_t delay_ns, Address topk_idx, uint64_t num_rows,
                                   const RouteReports& reports, uint32_t report) const {
  return {rank_,
          num_tokens_,
          row_layout_,
          alignment,
          max_rows,
          zero_copy,
          delay_ns,
          pointer<int64_t>(topk_idx),
          slots_,
          ids_,
          matrix_,
          run_starts_,
          unit_tokens_,
          topk_local_,
          positions_,
          counts_,
          offsets_,
          num_rows,
          &reports.at(report)};
}

DispatchCall HandleArrays::dispatch_call(uint32_t slab, bool keep_in_slab, uint32_t send_delay_ns,
                                         uint32_t receive_delay_ns, Address x, Address x_scales,
                                         Address weights, Address out_rows, Address out_scales,
                                         Address out_weights, uint64_t num_rows, uint64_t out_pitch,
                                         uint64_t out_scale_pitch) const {
  return {rank_,
          num_tokens_,
          slab,
          keep_in_slab,
          row_layout_,
          send_delay_ns,
          receive_delay_ns,
          pointer<uint8_t>(x),
          pointer<float>(x_scales),
          pointer<uint8_t>(weights),
          slots_,
          ids_,
          matrix_,
          run_starts_,
          unit_tokens_,
          topk_local_,
          positions_,
          counts_,
          offsets_,
          pointer<uint8_t>(out_rows),
          pointer<float>(out_scales),
          pointer<uint8_t>(out_weights),
          num_rows,
          out_pitch,
          out_scale_pitch};
}

CombineCall HandleArrays::combine_call(uint32_t send_delay_ns, uint32_t receive_delay_ns,
                                       Address rows, uint64_t num_rows, Address weights,
                                       Address bias, Address row_weights, Address y,
                                       Address token_weights) const {
  return {rank_,
          num_tokens_,
          send_delay_ns,
          receive_delay_ns,
          pointer<uint8_t>(rows),
          num_rows,
          pointer<void>(weights),
          pointer<uint8_t>(bias),
          pointer<uint8_t>(row_weights),
          slots_,
          ids_,
          matrix_,
          unit_tokens_,
          positions_,
          pointer<uint8_t>(y),
          pointer<uint8_t>(token_weights)};
}

}  // namespace dualpipe
