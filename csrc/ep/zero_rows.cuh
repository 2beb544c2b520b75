// Rows of a dispatch's output that no token fills.
#pragma once

#include <cstdint>

#include "ep/dispatch_rows.cuh"

namespace dualpipe {

// Zeroes padding and unused rows of the output, but for groups of fixed size. Warp `index` of
// `count`.
class ZeroRows {
 public:
  __device__ ZeroRows(const Dispatch& dispatch, uint32_t index, uint32_t count)
      : d_(dispatch), index_(index), count_(count) {}

  __device__ void run() const {
    if (d_.call.expert_layout == kExpertGroups) return;
    const int64_t num_rows = static_cast<int64_t>(d_.call.num_rows);
    if (d_.call.expert_layout == 0) return rows(d_.first_row(d_.num_ranks(), d_.me()), num_rows);
    // Of 32 experts at once: few have padding, and looking at one after the other would take longer
    // than all rows of a small call.
    const uint32_t num_local = d_.per_rank(), lane = threadIdx.x % 32;
    for (uint32_t e0 = 0; e0 < num_local; e0 += 32) {
      const uint32_t e = e0 + lane;
      int64_t first = 0, last = 0;
      if (e < num_local) {
        first = (e == 0 ? 0 : d_.call.offsets[e - 1]) + d_.call.counts[e];
        last = d_.call.offsets[e];
      }
      for (uint32_t left = __ballot_sync(~0u, first < last); left != 0; left &= left - 1) {
        const uint32_t from = __ffs(left) - 1;
        rows(__shfl_sync(~0u, first, from), __shfl_sync(~0u, last, from));
      }
    }
    rows(d_.call.offsets[num_local - 1], num_rows);
  }

 private:
  __device__ void rows(int64_t first, int64_t last) const {
    for (int64_t row = first + index_; row < last; row += count_) zero(row);
  }

  __device__ void zero(int64_t row) const {
    const uint32_t lane = threadIdx.x % 32;
    uint8_t* out = d_.call.out_rows + row * d_.call.out_pitch;
    for (uint32_t i = lane; i < d_.args.out_bytes / 16; i += 32) {
      reinterpret_cast<uint4*>(out)[i] = uint4{};
    }
    for (uint32_t i = lane; d_.call.out_scales != nullptr && i < d_.args.num_scales; i += 32) {
      d_.call.out_scales[row * d_.call.out_scale_pitch + i] = 0.0f;
    }
    if (d_.call.out_weights == nullptr) return;
    const uint32_t each = d_.call.expert_layout != 0 ? 1 : d_.top_k();
    for (uint32_t i = lane; i < each; i += 32) {
      d_.copy_weight(d_.call.out_weights, row * each + i, nullptr, 0);
    }
  }

  const Dispatch& d_;
  const uint32_t index_, count_;
};

}  // namespace dualpipe
