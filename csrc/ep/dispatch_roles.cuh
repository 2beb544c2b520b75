// The two roles of a dispatch: warps that send this rank's rows, and warps that take in what the
// others send. See dispatch.cu for the protocol.
#pragma once

#include <cstdint>

#include "comm/launch.cuh"
#include "ep/dispatch.h"
#include "ep/quantize.cuh"
#include "ep/ring.cuh"
#include "ep/scan.cuh"
#include "ptx/memory.cuh"

namespace dualpipe {

// What all warps of a CTA know.
struct Dispatch {
  const DispatchArgs& args;
  const DispatchCall& call;
  Watchdog watchdog;
  uint32_t epoch;

  __device__ const LaunchArgs& launch() const { return args.launch; }
  __device__ const WorkspaceLayout& layout() const { return args.launch.layout; }
  __device__ uint32_t me() const { return call.rank; }
  __device__ uint32_t num_ranks() const { return args.launch.peers.num_ranks; }
  __device__ uint32_t top_k() const { return static_cast<uint32_t>(layout().shape.top_k); }
  // Numbers of one row of `positions`.
  __device__ uint32_t places() const { return round_up(top_k(), 4); }
  __device__ uint32_t max_tokens() const {
    return static_cast<uint32_t>(layout().shape.max_tokens);
  }
  // Tokens that rank `source` sends to rank `to`.
  __device__ int32_t sent(uint32_t source, uint32_t to) const {
    return call.matrix[source * num_ranks() + to];
  }
  __device__ uint32_t tokens_of(uint32_t source) const {
    return call.matrix[num_ranks() * num_ranks() + source];
  }
  // First row at `to` of what `source` sends.
  __device__ int32_t first_row(uint32_t source, uint32_t to) const {
    int32_t row = 0;
    for (uint32_t s = 0; s < source; ++s) row += sent(s, to);
    return row;
  }
  // Rows lie in a slab at whole lines.
  __device__ uint64_t slab_pitch() const { return round_up(args.out_bytes, kRegionAlignment); }
  __device__ uint8_t* slab(uint32_t rank, uint32_t index) const {
    return launch().peers.base[rank] + layout().slab_offset(index);
  }
  __device__ uint8_t* slab_row(uint8_t* slab, uint64_t row) const {
    return layout().slab.rows.in(slab) + row * slab_pitch();
  }
  __device__ float* slab_scales(uint8_t* slab, uint64_t row) const {
    return reinterpret_cast<float*>(layout().slab.scales.in(slab) +
                                    row * layout().slab.scale_pitch);
  }
  __device__ uint8_t* slab_weights(uint8_t* slab, uint64_t row) const {
    return layout().slab.weights.in(slab) + row * layout().slab.weight_pitch;
  }
  __device__ uint32_t* run_flags(uint32_t at, uint32_t source) const {
    return layout().control.run_flags.in(launch().peers.base[at]) + source * layout().control.runs;
  }
  __device__ void copy_weight(uint8_t* to, uint64_t i, const uint8_t* from, uint64_t j) const {
    if (args.weight_bytes == 4) {
      reinterpret_cast<uint32_t*>(to)[i] = from ? reinterpret_cast<const uint32_t*>(from)[j] : 0;
    } else {
      reinterpret_cast<uint64_t*>(to)[i] = from ? reinterpret_cast<const uint64_t*>(from)[j] : 0;
    }
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

// The same for `count` scales, the first of which is number `first` of its row.
__device__ inline void store_scales_to_output(const Dispatch& d, const StageNumbers& numbers,
                                              uint8_t* extra, int32_t row, uint32_t first,
                                              uint32_t count, uint64_t pitch) {
  const uint32_t lane = threadIdx.x % 32;
  const float* scales = numbers.scale(extra);
  const uint32_t copies = d.call.expert_layout == 0 ? 1 : d.top_k();
  for (uint32_t k = 0; k < copies; ++k) {
    const int32_t to = d.call.expert_layout == 0 ? row : numbers.place(extra)[k];
    if (to < 0 || uint64_t(to) >= d.call.num_rows) continue;
    float* out = d.call.out_scales + uint64_t(to) * pitch + first;
    for (uint32_t i = lane; i < count; i += 32) out[i] = scales[i];
  }
}

// --- sending -------------------------------------------------------------------------------------

// Where a sending warp writes: peers' slabs, or the staging slab of the copy engines.
struct Outbox {
  uint8_t** slabs;  // [R], shared, of this warp
  int32_t*
      shifts;  // [R], shared, of this warp: from the row in token layout to the row in the slab
};

// Which of a token's destinations a warp serves: other ranks, those by way of the staging slab,
// this rank itself, or other ranks and this one.
enum class Way { kPeers, kStaging, kOwn, kEverywhere };

// Sends runs `first`, `first + step`, ... of this rank's tokens.
template <Payload kPayload, Way kWay>
class SendWork {
 public:
  __device__ SendWork(const Dispatch& dispatch, const StageNumbers& numbers, uint32_t piece_bytes,
                      const Outbox& outbox, uint32_t first, uint32_t step, uint32_t staging_slab)
      : d_(dispatch),
        numbers_(numbers),
        piece_bytes_(piece_bytes),
        outbox_(outbox),
        step_(step),
        staging_slab_(staging_slab),
        lane_(threadIdx.x % 32),
        run_length_(run_tokens(dispatch.call.num_tokens)),
        token_(first * run_length_) {
    fetch_slots();
  }

  __device__ bool load(Ring& ring, uint32_t stage) {
    while (!failed_ && token_ < d_.call.num_tokens && !goes_anywhere()) next_token();
    if (failed_ || token_ >= d_.call.num_tokens) return false;

    uint8_t* extra = ring.extra(stage);
    int32_t* slots = numbers_.rank(extra);
    if (lane_ < d_.num_ranks()) slots[lane_] = slots_[0];
    if (lane_ + 32 < d_.num_ranks()) slots[lane_ + 32] = slots_[1];
    const bool with_weights = d_.call.weights != nullptr && offset_ == 0;
    if (with_weights && lane_ < d_.top_k()) {
      numbers_.owner(extra)[lane_] = owner_;
      if (!bulk_weights())
        d_.copy_weight(numbers_.weights(extra), lane_, weights_of(token_), lane_);
    }
    const int32_t own = kToOutput ? own_row() : -1;
    const uint32_t bytes = min(piece_bytes_, d_.args.in_bytes - offset_);
    if (lane_ == 0) {
      numbers_.header(extra)[0] = token_;
      numbers_.header(extra)[1] = offset_;
      uint64_t* full = ring.full(stage);
      const bool places = d_.call.expert_layout != 0 && own >= 0;
      const uint32_t scale_bytes = bulk_scales() ? 4 * (bytes / kQuantBlock) : 0;
      const uint32_t weight_bytes =
          with_weights && bulk_weights() ? d_.top_k() * d_.args.weight_bytes : 0;
      ptx::mbarrier_arrive_expect_tx(
          full, bytes + (places ? 4 * d_.places() : 0) + scale_bytes + weight_bytes);
      ptx::bulk_load(ring.piece(stage), d_.call.x + uint64_t(token_) * d_.args.in_bytes + offset_,
                     bytes, full);
      if (places) {
        ptx::bulk_load(numbers_.place(extra), d_.call.positions + uint64_t(own) * d_.places(),
                       4 * d_.places(), full);
      }
      if (scale_bytes != 0) {
        ptx::bulk_load(numbers_.scale(extra), scales_of(token_) + offset_ / kQuantBlock,
                       scale_bytes, full);
      }
      if (weight_bytes != 0) {
        ptx::bulk_load(numbers_.weights(extra), weights_of(token_), weight_bytes, full);
      }
    }
    __syncwarp();
    offset_ += bytes;
    if (offset_ == d_.args.in_bytes) next_token();
    return true;
  }

  __device__ void store(Ring& ring, uint32_t stage) {
    uint8_t* extra = ring.extra(stage);
    const uint32_t token = numbers_.header(extra)[0], offset = numbers_.header(extra)[1];
    if (kToSlabs && token / run_length_ != run_) begin_run(token / run_length_);
    if (failed_) return;
    ++steps_of_run_;

    Piece piece{offset, min(piece_bytes_, d_.args.in_bytes - offset)};
    uint32_t first_scale = offset / kQuantBlock, num_scales = 0;
    if constexpr (kPayload == Payload::kAsIs) {
      if (d_.call.x_scales != nullptr) {
        num_scales = piece.bytes / kQuantBlock;
        if (!bulk_scales()) fetch_scales(extra, token, first_scale, num_scales);
      }
    } else {
      first_scale /= 2;  // two bytes a value
      num_scales = piece.bytes / 2 / kQuantBlock;
      quantize_in_place<kPayload == Payload::kQuantizePow2>(ring.piece(stage),
                                                            numbers_.scale(extra), piece.bytes / 2);
      piece = {piece.first / 2, piece.bytes / 2};
    }

    const bool with_weights = d_.call.weights != nullptr && offset == 0;
    // What ordinary stores have written to the stage, bulk stores will read.
    if (kPayload != Payload::kAsIs || (with_weights && !bulk_weights()) ||
        (num_scales != 0 && !bulk_scales())) {
      ptx::fence_proxy_async_shared();
      __syncwarp();
    }

    if constexpr (kToSlabs) {
      store_to_slabs(ring, stage, piece, first_scale, num_scales, with_weights);
    }
    if constexpr (kToOutput) {
      const int32_t own = numbers_.rank(extra)[d_.me()];
      if (own < 0) return;
      store_to_output(d_, numbers_, ring.piece(stage), extra, own, piece);
      if (num_scales != 0) {
        store_scales_to_output(d_, numbers_, extra, own, first_scale, num_scales,
                               d_.call.out_scale_pitch);
      }
      if (with_weights) {
        const bool here = lane_ < d_.top_k() && numbers_.owner(extra)[lane_] == int32_t(d_.me());
        store_weights_to_output(d_, numbers_, extra, own, here);
      }
    }
  }

  // Nothing is in flight and nothing is left: the last runs are complete.
  __device__ bool wait() {
    if (failed_ || !kTells) return false;
    ptx::bulk_wait_group<0>();
    publish(previous_run_);
    publish(run_);
    return false;
  }

 private:
  static constexpr uint32_t kNoRun = ~0u;
  static constexpr bool kToSlabs = kWay != Way::kOwn;
  static constexpr bool kToOutput = kWay == Way::kOwn || kWay == Way::kEverywhere;
  static constexpr bool kTells = kWay == Way::kPeers || kWay == Way::kEverywhere;

  __device__ bool goes_anywhere() const {
    if (kWay == Way::kOwn) return own_row() >= 0;
    const bool low = slots_[0] >= 0 && (kToOutput || lane_ != d_.me());
    const bool high = slots_[1] >= 0 && (kToOutput || lane_ + 32 != d_.me());
    return __any_sync(~0u, low || high) != 0;
  }

  // To every other rank that has an expert of the token, from the one stage.
  __device__ __forceinline__ void store_to_slabs(Ring& ring, uint32_t stage, const Piece& piece,
                                                 uint32_t first_scale, uint32_t num_scales,
                                                 bool with_weights) const {
    uint8_t* extra = ring.extra(stage);
    const int32_t* slots = numbers_.rank(extra);
    for (uint32_t to = lane_; to < d_.num_ranks(); to += 32) {
      if (to == d_.me() || slots[to] < 0) continue;
      uint8_t* slab = outbox_.slabs[to];
      const uint64_t row = slots[to] + outbox_.shifts[to];
      ptx::bulk_store(d_.slab_row(slab, row) + piece.first, ring.piece(stage), piece.bytes);
      if (num_scales != 0) {
        ptx::bulk_store(d_.slab_scales(slab, row) + first_scale, numbers_.scale(extra),
                        4 * round_up(num_scales, 4));
      }
      if (with_weights) {
        ptx::bulk_store(d_.slab_weights(slab, row), numbers_.weights(extra),
                        round_up(d_.top_k() * d_.args.weight_bytes, 16));
      }
    }
  }

  __device__ int32_t own_row() const {
    return __shfl_sync(~0u, d_.me() < 32 ? slots_[0] : slots_[1], d_.me() % 32);
  }

  // One token ahead of its use, so that the trip to memory is over by then.
  __device__ void fetch_slots() {
    const uint32_t ranks = d_.num_ranks();
    const int32_t* slots = d_.call.slots + uint64_t(token_) * ranks;
    const bool valid = token_ < d_.call.num_tokens;
    slots_[0] = valid && lane_ < ranks ? __ldg(slots + lane_) : -1;
    slots_[1] = valid && lane_ + 32 < ranks ? __ldg(slots + lane_ + 32) : -1;
    if (d_.call.weights == nullptr || !valid || lane_ >= d_.top_k()) return;
    const int32_t id = __ldg(d_.call.ids + uint64_t(token_) * d_.layout().id_pitch + lane_);
    const uint32_t per_rank = static_cast<uint32_t>(d_.layout().shape.num_experts) / ranks;
    owner_ = id >= 0 ? int32_t(id / per_rank) : -1;
  }

  __device__ void next_token() {
    offset_ = 0;
    ++token_;
    if (token_ % run_length_ == 0) token_ += (step_ - 1) * run_length_;
    fetch_slots();
  }

  __device__ const float* scales_of(uint32_t token) const {
    return d_.call.x_scales + uint64_t(token) * d_.args.num_scales;
  }
  // Bulk copies move whole 16 bytes.
  __device__ bool bulk_scales() const {
    return kPayload == Payload::kAsIs && d_.call.x_scales != nullptr && d_.args.num_scales % 4 == 0;
  }
  __device__ const uint8_t* weights_of(uint32_t token) const {
    return d_.call.weights + uint64_t(token) * d_.top_k() * d_.args.weight_bytes;
  }
  __device__ bool bulk_weights() const { return d_.top_k() * d_.args.weight_bytes % 16 == 0; }
  __device__ void fetch_scales(uint8_t* extra, uint32_t token, uint32_t first, uint32_t count) {
    for (uint32_t i = lane_; i < count; i += 32) {
      numbers_.scale(extra)[i] = scales_of(token)[first + i];
    }
    __syncwarp();
  }

  // Called before the first store of a run: what came before has been committed.
  __device__ void begin_run(uint32_t run) {
    if (run_ == kNoRun && !open_outbox()) {
      failed_ = true;
      return;
    }
    // All but the groups of the run that has just ended have arrived: the run before it is
    // complete.
    if (kTells && previous_run_ != kNoRun) {
      bulk_wait_group_at_most(steps_of_run_);
      publish(previous_run_);
    }
    previous_run_ = run_;
    run_ = run;
    steps_of_run_ = 0;
  }

  // Learns where the rows go; waits for leave to write there. False if the rank has failed.
  __device__ bool open_outbox() {
    bool open = true;
    for (uint32_t to = lane_; to < d_.num_ranks(); to += 32) {
      if (to == d_.me() || d_.sent(d_.me(), to) == 0) continue;
      if constexpr (kWay == Way::kStaging) {
        // Segments of fixed size, so that the copies need no numbers from the device.
        outbox_.slabs[to] = d_.slab(d_.me(), staging_slab_);
        outbox_.shifts[to] = to * d_.max_tokens() - d_.first_row(d_.me(), to);
      } else {
        const PermitLine* permit =
            d_.layout().control.permits.in(d_.launch().peers.base[d_.me()]) + to;
        const WaitSite site{Phase::kDispatchPermit, d_.me(), to, 0, d_.epoch};
        open = open && wait_epoch(&permit->epoch, d_.epoch, site, d_.watchdog);
        outbox_.slabs[to] = d_.slab(to, ptx::ld_relaxed_sys(&permit->slab));
        outbox_.shifts[to] = 0;
      }
    }
    return __all_sync(~0u, open) != 0;
  }

  // Tells every peer that a run has arrived. Its bulk stores are complete, each as its own lane has
  // seen; __syncwarp brings them before the release. Nothing goes to a peer by ordinary stores: the
  // release would wait for them, behind all that is queued for the link.
  __device__ void publish(uint32_t run) {
    if (!kTells || run == kNoRun) return;
    __syncwarp();
    for (uint32_t to = lane_; to < d_.num_ranks(); to += 32) {
      if (to == d_.me()) continue;
      ptx::st_release_sys(d_.run_flags(to, d_.me()) + run, d_.epoch);
    }
  }

  const Dispatch& d_;
  const StageNumbers numbers_;
  const uint32_t piece_bytes_;
  const Outbox outbox_;
  const uint32_t step_;
  const uint32_t staging_slab_;
  const uint32_t lane_;
  const uint32_t run_length_;
  uint32_t token_;                                 // the next to load, from `offset_` on
  uint32_t offset_ = 0;                            // byte of its row
  int32_t slots_[2];                               // its row at ranks lane and lane + 32
  int32_t owner_ = -1;                             // rank of that choice
  uint32_t run_ = kNoRun, previous_run_ = kNoRun;  // being stored, and the one before
  uint32_t steps_of_run_ = 0;
  bool failed_ = false;
};

// --- receiving -----------------------------------------------------------------------------------

// Takes in runs `first`, `first + step`, ... of all other ranks, earliest first.
template <bool kStaging>
class ReceiveWork {
 public:
  __device__ ReceiveWork(const Dispatch& dispatch, const StageNumbers& numbers,
                         uint32_t piece_bytes, uint32_t first, uint32_t step)
      : d_(dispatch),
        numbers_(numbers),
        piece_bytes_(piece_bytes),
        step_(step),
        lane_(threadIdx.x % 32),
        slab_(dispatch.slab(dispatch.me(), dispatch.call.slab)),
        next_(first) {
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
    const uint32_t tokens = d_.tokens_of(source);
    return ceil_div(tokens, run_tokens(tokens));
  }

  // Goes to the next run that has rows for this rank, unless one is waited for already. False if
  // there is none.
  __device__ bool begin_run() {
    while (flag_ == nullptr && next_ < end_) {
      const uint32_t others = d_.num_ranks() - 1;
      run_ = next_ / others;
      source_ = (d_.me() + 1 + next_ % others) % d_.num_ranks();
      next_ += step_;
      if (run_ >= num_runs(source_)) continue;
      const int32_t* starts = d_.call.run_starts + source_ * (d_.layout().control.runs + 1);
      first_ = starts[run_];
      last_ = starts[run_ + 1];
      if (first_ < last_) flag_ = d_.run_flags(d_.me(), source_) + run_;
    }
    return flag_ != nullptr;
  }

  __device__ bool arrived() const {
    if (kStaging) return true;  // the copies came before this kernel
    bool reached = false;
    if (lane_ == 0) reached = epoch_reached(ptx::ld_acquire_sys(flag_), d_.epoch);
    return __shfl_sync(~0u, reached, 0);
  }

  // The rows of the run may be read: lane 0 has acquired its flag, the shuffle in arrived() brings
  // the other lanes after it, and the fence brings bulk loads after ordinary ones.
  __device__ void open_run() {
    __syncwarp();
    ptx::fence_proxy_async_global();
    flag_ = nullptr;
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
  const uint32_t step_;
  const uint32_t lane_;
  uint8_t* const slab_;
  uint32_t next_, end_;  // (run, source) pairs not yet begun
  // The run that is waited for; no flag: none.
  const uint32_t* flag_ = nullptr;
  uint32_t run_ = 0, source_ = 0;
  int32_t first_ = 0, last_ = 0;
  // The run whose rows are being loaded.
  int32_t row_ = 0, row_end_ = 0, shift_ = 0;
  uint32_t offset_ = 0;
};

// --- rows that nobody sends ----------------------------------------------------------------------

// Zeroes padding and unused rows of the output. Warp `index` of `count`.
class ZeroRows {
 public:
  __device__ ZeroRows(const Dispatch& dispatch, uint32_t index, uint32_t count)
      : d_(dispatch), index_(index), count_(count) {}

  __device__ void run() const {
    const int64_t num_rows = static_cast<int64_t>(d_.call.num_rows);
    if (d_.call.expert_layout == 0) return rows(d_.first_row(d_.num_ranks(), d_.me()), num_rows);
    const uint32_t num_local =
        static_cast<uint32_t>(d_.layout().shape.num_experts) / d_.num_ranks();
    for (uint32_t e = 0; e < num_local; ++e) {
      const int64_t start = e == 0 ? 0 : d_.call.offsets[e - 1];
      rows(start + d_.call.counts[e], d_.call.offsets[e]);
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
