// The warps of a dispatch that take in what the other ranks send. See dispatch.cu for the protocol.
#pragma once

#include <cstdint>

#include "ep/dispatch_rows.cuh"

namespace dualpipe {

// Rows of a run of those that the copy engines have brought, and that are all there.
inline constexpr uint32_t kStagedRows = 4;

// Takes in the runs of all other ranks that a queue hands out, earliest first; of what the copy
// engines bring, those of one part.
template <bool kStaging>
class ReceiveWork {
 public:
  __device__ ReceiveWork(const Dispatch& dispatch, const StageNumbers& numbers,
                         uint32_t piece_bytes, const WorkQueue& queue, const SegmentPart& part)
      : d_(dispatch),
        numbers_(numbers),
        piece_bytes_(piece_bytes),
        lane_(threadIdx.x % 32),
        slab_(dispatch.slab(dispatch.me(), dispatch.call.slab)),
        part_(part),
        queue_(queue) {
    uint32_t longest = 0;
    for (uint32_t s = 0; s < d_.num_ranks(); ++s) {
      if (s != d_.me()) longest = max(longest, num_runs(s));
    }
    end_ = longest * (d_.num_ranks() - 1);
  }

  __device__ bool load(Ring& ring, uint32_t stage) {
    while (row_ == row_end_) {
      if (!begin_run() || !arrived()) return false;
      open_run();
    }
    uint8_t* extra = ring.extra(stage);
    if (lane_ == 0) {
      const uint32_t bytes = min(piece_bytes_, d_.args.out_bytes - offset_);
      const uint32_t place_bytes = d_.call.expert_layout != 0 ? 4 * d_.places() : 0;
      // As in the slab.
      const uint32_t scale_bytes = offset_ == 0 ? round_up(4 * d_.args.num_scales, 16) : 0;
      numbers_.header(extra)[0] = row_;
      numbers_.header(extra)[1] = offset_;
      uint64_t* full = ring.full(stage);
      ptx::mbarrier_arrive_expect_tx(full, bytes + place_bytes + scale_bytes);
      ptx::bulk_load(ring.piece(stage), d_.slab_row(slab_, row_ + shift_) + offset_, bytes, full);
      if (place_bytes != 0) {
        ptx::bulk_load(numbers_.place(extra), d_.call.positions + uint64_t(row_) * d_.places(),
                       place_bytes, full);
      }
      if (scale_bytes != 0) {
        ptx::bulk_load(numbers_.scale(extra), d_.slab_scales(slab_, row_ + shift_), scale_bytes,
                       full);
      }
    }
    __syncwarp();
    offset_ += piece_bytes_;
    if (offset_ >= d_.args.out_bytes) {
      offset_ = 0;
      ++row_;
    }
    return true;
  }

  __device__ void store(Ring& ring, uint32_t stage) {
    uint8_t* extra = ring.extra(stage);
    const int32_t row = numbers_.header(extra)[0];
    const uint32_t offset = numbers_.header(extra)[1];
    const Piece piece{offset, min(piece_bytes_, d_.args.out_bytes - offset)};
    store_to_output(d_, numbers_, ring.piece(stage), extra, row, piece);
    if (offset == 0 && d_.args.num_scales != 0) {
      store_scales_to_output(d_, numbers_, extra, row, 0, d_.args.num_scales,
                             d_.call.out_scale_pitch);
    }
  }

  // Rows that stay in the slab: waits for them all.
  __device__ void await_all() {
    while (wait()) open_run();
  }

  __device__ bool wait() {
    for (uint32_t polls = 1; begin_run(); ++polls) {
      if (arrived()) return true;
      __nanosleep(32);
      if (polls % kPollsPerCheck != 0) continue;
      uint32_t seen = 0;
      if (lane_ == 0) seen = ptx::ld_relaxed_sys(flag_);
      const WaitSite site{Phase::kDispatchRows, d_.me(), source_, run_, d_.epoch};
      bool ended = false;
      if (lane_ == 0) ended = d_.watchdog.gives_up(site, d_.epoch, seen);
      if (__shfl_sync(~0u, ended, 0)) return false;
    }
    return false;
  }

 private:
  __device__ uint32_t num_runs(uint32_t source) const {
    if (kStaging) return ceil_div(last_row(source) - first_row(source), kStagedRows);
    const uint32_t tokens = d_.tokens_of(source);
    return ceil_div(tokens, run_tokens(tokens));
  }

  // Rows of the part that `source` has sent.
  __device__ uint32_t first_row(uint32_t source) const {
    return part_.first_row(d_.max_tokens(), d_.sent(source, d_.me()));
  }
  __device__ uint32_t last_row(uint32_t source) const {
    return part_.last_row(d_.max_tokens(), d_.sent(source, d_.me()));
  }

  // Goes to the next run that has rows for this rank, unless one is waited for already. False if
  // there is none.
  __device__ bool begin_run() {
    while (flag_ == nullptr) {
      const uint32_t next = queue_.take(), others = d_.num_ranks() - 1;
      if (next >= end_) return false;
      run_ = next / others;
      source_ = (d_.me() + 1 + next % others) % d_.num_ranks();
      if (kStaging && run_ < num_runs(source_)) {
        const uint32_t base = d_.first_row(source_, d_.me());
        const uint32_t row = first_row(source_) + run_ * kStagedRows;
        first_ = base + row;
        last_ = base + min(row + kStagedRows, last_row(source_));
        flag_ = d_.run_flags(d_.me(), source_);  // only says that there is a run
      } else if (!kStaging && run_ < num_runs(source_)) {
        const int32_t* starts = d_.call.run_starts + source_ * (d_.layout().control.runs + 1);
        first_ = starts[run_];
        last_ = starts[run_ + 1];
        if (first_ < last_) flag_ = d_.run_flags(d_.me(), source_) + run_;
      }
      if (flag_ == nullptr) queue_.ask();
    }
    return true;
  }

  __device__ bool arrived() const {
    if (kStaging) return true;  // the copies came before this kernel
    bool reached = false;
    if (lane_ == 0) reached = epoch_reached(ptx::ld_acquire_sys(flag_), d_.epoch);
    return __shfl_sync(~0u, reached, 0);
  }

  // The rows of the run may be read: lane 0 has acquired its flag, __syncwarp brings the other
  // lanes after it, and the fence brings bulk loads after ordinary ones. What came before this
  // kernel needs neither.
  __device__ void open_run() {
    __syncwarp();
    if (!kStaging) ptx::fence_proxy_async_global();
    flag_ = nullptr;
    queue_.ask();
    shift_ = kStaging ? int32_t(source_ * d_.max_tokens()) - d_.first_row(source_, d_.me()) : 0;
    if (d_.call.out_weights != nullptr) take_weights();
    row_ = first_;
    row_end_ = last_;
  }

  __device__ void take_weights() {
    const uint32_t top_k = d_.top_k();
    for (uint32_t i = lane_; i < (last_ - first_) * top_k; i += 32) {
      const uint64_t row = first_ + i / top_k;
      const uint32_t k = i % top_k;
      const uint8_t* from = d_.slab_weights(slab_, row + shift_);
      if (d_.call.expert_layout != 0) {
        const int32_t place = d_.call.positions[row * d_.places() + k];
        if (place >= 0) d_.copy_weight(d_.call.out_weights, place, from, k);
      } else if (row < d_.call.num_rows) {
        const bool here = d_.call.topk_local[row * top_k + k] >= 0;
        d_.copy_weight(d_.call.out_weights, row * top_k + k, here ? from : nullptr, k);
      }
    }
  }

  const Dispatch& d_;
  const StageNumbers numbers_;
  const uint32_t piece_bytes_;
  const uint32_t lane_;
  uint8_t* const slab_;
  const SegmentPart part_;
  WorkQueue queue_;  // of (run, source) pairs
  uint32_t end_;
  // The run that is waited for; no flag: none.
  const uint32_t* flag_ = nullptr;
  uint32_t run_ = 0, source_ = 0;
  int32_t first_ = 0, last_ = 0;
  // The run whose rows are being loaded.
  int32_t row_ = 0, row_end_ = 0, shift_ = 0;
  uint32_t offset_ = 0;
};

}  // namespace dualpipe
