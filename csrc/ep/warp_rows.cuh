// What a warp knows of rows without asking memory again: rows of a rank by their source, and rows
// of a token by where it goes. Lane l holds what concerns ranks l and l + 32; all lanes of a warp
// ask together, and alike.
#pragma once

#include <cstdint>

#include "ep/scan.cuh"

namespace dualpipe {

// Rows of one token at each rank.
class TokenRows {
 public:
  // `slots` is [T, R], -1 where a token does not go.
  __device__ TokenRows(const int32_t* slots, uint32_t token, uint32_t num_ranks) {
    const uint32_t lane = threadIdx.x % 32;
    const int32_t* row_at = slots + uint64_t{token} * num_ranks;
    rows_[0] = lane < num_ranks ? row_at[lane] : -1;
    rows_[1] = lane + 32 < num_ranks ? row_at[lane + 32] : -1;
  }

  // A bit for each rank that the token goes to.
  __device__ uint64_t ranks() const {
    return __ballot_sync(~0u, rows_[0] >= 0) | uint64_t{__ballot_sync(~0u, rows_[1] >= 0)} << 32;
  }
  __device__ int32_t at(uint32_t rank) const {
    return __shfl_sync(~0u, rank < 32 ? rows_[0] : rows_[1], rank % 32);
  }

 private:
  int32_t rows_[2];
};

// Rows of this rank in token layout, by the rank that their tokens come from.
class RowsBySource {
 public:
  // `matrix` is [R, R], tokens that rank s sends to rank d.
  __device__ RowsBySource(const int32_t* matrix, uint32_t num_ranks, uint32_t me) {
    int32_t before = 0;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t source = threadIdx.x % 32 + 32 * half;
      const int32_t rows = source < num_ranks ? matrix[source * num_ranks + me] : 0;
      ends_[half] = before + warp_inclusive_scan(rows);
      before = __shfl_sync(~0u, ends_[half], 31);
    }
    total_ = before;
  }

  __device__ uint32_t total() const { return total_; }
  __device__ uint32_t first(uint32_t source) const { return source == 0 ? 0 : end(source - 1); }
  __device__ uint32_t end(uint32_t source) const {
    return __shfl_sync(~0u, source < 32 ? ends_[0] : ends_[1], source % 32);
  }
  // Whose token has row `row`, which is less than the total.
  __device__ uint32_t source(uint32_t row) const {
    return __popc(__ballot_sync(~0u, uint32_t(ends_[0]) <= row)) +
           __popc(__ballot_sync(~0u, uint32_t(ends_[1]) <= row));
  }

 private:
  int32_t ends_[2];  // row behind the last of each, in the order of the sources
  uint32_t total_;
};

}  // namespace dualpipe
