// What all warps of a dispatch know, and how rows get from a stage to the output of this rank. See
// dispatch.cu for the protocol.
#pragma once

#include <cstdint>

#include "ep/dispatch.h"
#include "ep/fp8.cuh"
#include "ep/ring.cuh"
#include "ep/scan.cuh"
#include "ep/transfer.cuh"
#include "ep/work_queue.cuh"

namespace dualpipe {

// What all warps of a CTA know.
struct Dispatch : Transfer<DispatchArgs, DispatchCall> {
  __device__ uint32_t tokens_of(uint32_t source) const {
    return call.matrix[num_ranks() * num_ranks() + source];
  }
  // Rows lie in a slab at whole lines.
  __device__ uint8_t* slab_row(uint8_t* slab, uint64_t row) const {
    return layout().slab.rows.in(slab) + row * round_up(args.out_bytes, kRegionAlignment);
  }
  __device__ float* slab_scales(uint8_t* slab, uint64_t row) const {
    return reinterpret_cast<float*>(layout().slab.scales.in(slab) +
                                    row * layout().slab.scale_pitch);
  }
};

// The numbers behind the payload in a stage, each part on 16 bytes: a header, the row's places in
// the expert layout, its row at each rank and the ranks of its choices (sending only), its scales,
// its weights.
struct StageNumbers {
  uint32_t places;
  uint32_t ranks;
  uint32_t owners;
  uint32_t scales;
  uint32_t weight_words;

  __host__ __device__ uint32_t bytes() const {
    return 4 * (4 + places + ranks + owners + scales + weight_words);
  }
  __device__ int32_t* header(uint8_t* extra) const { return reinterpret_cast<int32_t*>(extra); }
  __device__ int32_t* place(uint8_t* extra) const { return header(extra) + 4; }
  __device__ int32_t* rank(uint8_t* extra) const { return place(extra) + places; }
  __device__ int32_t* owner(uint8_t* extra) const { return rank(extra) + ranks; }
  __device__ float* scale(uint8_t* extra) const {
    return reinterpret_cast<float*>(owner(extra) + owners);
  }
  __device__ uint8_t* weights(uint8_t* extra) const {
    return reinterpret_cast<uint8_t*>(scale(extra) + scales);
  }
};

// A run of bytes of a row that is moved at once.
struct Piece {
  uint32_t first;  // byte of the row
  uint32_t bytes;
};

// A piece of a row from its stage to the output of this rank: in token layout to its row, in expert
// layout to the rows of all its experts. `row` is in token layout.
__device__ inline void store_to_output(const Dispatch& d, const StageNumbers& numbers,
                                       const uint8_t* payload, uint8_t* extra, int32_t row,
                                       const Piece& piece) {
  const uint32_t lane = threadIdx.x % 32;
  const auto put = [&](int32_t to) {
    ptx::bulk_store(d.call.out_rows + uint64_t(to) * d.call.out_pitch + piece.first, payload,
                    piece.bytes);
  };
  if (d.call.expert_layout == 0) {
    if (lane == 0 && uint64_t(row) < d.call.num_rows) put(row);
  } else if (lane < d.top_k() && numbers.place(extra)[lane] >= 0) {
    put(numbers.place(extra)[lane]);
  }
}

// The numbers of a row's choices from its stage to the output.
__device__ inline void store_weights_to_output(const Dispatch& d, const StageNumbers& numbers,
                                               uint8_t* extra, int32_t row, bool here) {
  const uint32_t k = threadIdx.x % 32;
  if (k >= d.top_k()) return;
  const uint8_t* weights = numbers.weights(extra);
  if (d.call.expert_layout != 0) {
    const int32_t place = numbers.place(extra)[k];
    if (place >= 0) d.copy_weight(d.call.out_weights, place, weights, k);
  } else if (uint64_t(row) < d.call.num_rows) {
    d.copy_weight(d.call.out_weights, uint64_t(row) * d.top_k() + k, here ? weights : nullptr, k);
  }
}

// The same for `count` scales, the first of which is number `first` of its row. By bulk stores
// where they can be: ordinary ones, a later proxy fence of the warp would wait for.
__device__ inline void store_scales_to_output(const Dispatch& d, const StageNumbers& numbers,
                                              uint8_t* extra, int32_t row, uint32_t first,
                                              uint32_t count, uint64_t pitch) {
  const uint32_t lane = threadIdx.x % 32;
  const float* scales = numbers.scale(extra);
  const uint32_t copies = d.call.expert_layout == 0 ? 1 : d.top_k();
  if (pitch % 4 == 0 && first % 4 == 0 && count % 4 == 0) {
    const int32_t to = d.call.expert_layout == 0 ? row
                       : lane < copies           ? numbers.place(extra)[lane]
                                                 : -1;
    if (lane < copies && to >= 0 && uint64_t(to) < d.call.num_rows) {
      ptx::bulk_store(d.call.out_scales + uint64_t(to) * pitch + first, scales, 4 * count);
    }
    return;
  }
  for (uint32_t k = 0; k < copies; ++k) {
    const int32_t to = d.call.expert_layout == 0 ? row : numbers.place(extra)[k];
    if (to < 0 || uint64_t(to) >= d.call.num_rows) continue;
    float* out = d.call.out_scales + uint64_t(to) * pitch + first;
    for (uint32_t i = lane; i < count; i += 32) out[i] = scales[i];
  }
}

}  // namespace dualpipe
