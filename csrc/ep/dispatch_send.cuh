// The warps of a dispatch that read this rank's rows and store them where they belong. See
// dispatch.cu for the protocol.
#pragma once

#include <cstdint>

#include "ep/dispatch_rows.cuh"
#include "ep/quantize.cuh"

namespace dualpipe {

// Where a sending warp writes: peers' slabs, or the staging slab of the copy engines.
struct Outbox {
  uint8_t** slabs;  // [R], shared, of this warp
  int32_t*
      shifts;  // [R], shared, of this warp: from the row in token layout to the row in the slab
};

// Which of a token's destinations a warp serves: other ranks, this rank itself, both, or both with
// the staging slab in the place of other ranks.
enum class Way { kPeers, kOwn, kEverywhere, kStaging };

// Tokens of a run that nobody is told of.
inline constexpr uint32_t kStagedRun = 2;

// Sends the runs of this rank's tokens that a queue hands out.
template <Payload kPayload, Way kWay>
class SendWork {
 public:
  __device__ SendWork(const Dispatch& dispatch, const StageNumbers& numbers, uint32_t piece_bytes,
                      const Outbox& outbox, const WorkQueue& queue, const StagedPart& staged)
      : d_(dispatch),
        numbers_(numbers),
        piece_bytes_(piece_bytes),
        outbox_(outbox),
        staging_slab_(staged.staging_slab),
        lane_(threadIdx.x % 32),
        run_length_(kWay == Way::kStaging ? kStagedRun : run_tokens(dispatch.call.num_tokens)),
        begin_(kWay == Way::kStaging ? d_.tokens_for_units(staged.part.first) : 0),
        end_(kWay == Way::kStaging ? d_.tokens_for_units(staged.part.last)
                                   : dispatch.call.num_tokens),
        queue_(queue),
        token_(begin_ + queue_.take() * run_length_) {
    fetch_numbers();
  }

  __device__ bool load(Ring& ring, uint32_t stage) {
    while (!failed_ && token_ < end_ && !goes_anywhere()) next_token();
    if (failed_ || token_ >= end_) return false;

    uint8_t* extra = ring.extra(stage);
    int32_t* slots = numbers_.rank(extra);
    if (lane_ < d_.num_ranks()) slots[lane_] = slots_[0];
    if (lane_ + 32 < d_.num_ranks()) slots[lane_ + 32] = slots_[1];
    const bool with_weights = d_.call.weights != nullptr && offset_ == 0;
    if (with_weights && lane_ < d_.top_k()) {
      numbers_.owner(extra)[lane_] = id_ >= 0 ? int32_t(id_ / d_.per_rank()) : -1;
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
      ptx::mbarrier_arrive_expect_tx(full, (kPayload == Payload::kAsIs ? bytes : 0) +
                                               (places ? 4 * d_.places() : 0) + scale_bytes +
                                               weight_bytes);
      if constexpr (kPayload == Payload::kAsIs) {
        ptx::bulk_load(ring.piece(stage), row_of(token_) + offset_, bytes, full);
      } else {
        ptx::bulk_prefetch(row_of(token_) + offset_, bytes);
      }
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
    const uint32_t run = (token - begin_) / run_length_;
    if (kToSlabs && run != run_) begin_run(run);
    if (failed_) return;
    if (steps_of_run_ == kStepsBeforeFlag) announce_previous();
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
      quantize<kPayload == Payload::kQuantizePow2>(row_of(token) + offset, ring.piece(stage),
                                                   numbers_.scale(extra), piece.bytes / 2);
      piece = {piece.first / 2, piece.bytes / 2};
    }

    const bool with_weights = d_.call.weights != nullptr && offset == 0;
    if (with_weights && kToOutput && bulk_own_weights()) keep_own_weights(extra);
    // What ordinary stores have written to the stage, bulk stores will read. The fence also waits
    // for the warp's ordinary stores to global memory, a microsecond: a warp that quantises should
    // have none under way.
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
      if (with_weights && bulk_own_weights()) {
        if (lane_ == 0 && uint64_t(own) < d_.call.num_rows) {
          ptx::bulk_store(d_.call.out_weights + uint64_t(own) * d_.top_k() * 4,
                          numbers_.owner(extra), 4 * d_.top_k());
        }
      } else if (with_weights) {
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
  static constexpr bool kToOutput = kWay != Way::kPeers;
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

  // One token ahead of their use, so that the trip to memory is over by then; nothing here may
  // look at what comes back.
  __device__ void fetch_numbers() {
    if ((token_ + 1 - begin_) % run_length_ == 0 && token_ < end_) queue_.ask();
    const uint32_t ranks = d_.num_ranks();
    const int32_t* slots = d_.call.slots + uint64_t(token_) * ranks;
    const bool valid = token_ < end_;
    slots_[0] = valid && lane_ < ranks ? __ldg(slots + lane_) : -1;
    slots_[1] = valid && lane_ + 32 < ranks ? __ldg(slots + lane_ + 32) : -1;
    if (d_.call.weights == nullptr || !valid || lane_ >= d_.top_k()) return;
    id_ = __ldg(d_.call.ids + uint64_t(token_) * d_.layout().id_pitch + lane_);
  }

  __device__ void next_token() {
    offset_ = 0;
    ++token_;
    if ((token_ - begin_) % run_length_ == 0) token_ = begin_ + queue_.take() * run_length_;
    fetch_numbers();
  }

  __device__ const uint8_t* row_of(uint32_t token) const {
    return d_.call.x + uint64_t(token) * d_.args.in_bytes;
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
  // Numbers of rows that stay, where ordinary stores would hold up a fence.
  __device__ bool bulk_own_weights() const {
    return kPayload != Payload::kAsIs && d_.call.expert_layout == 0 && d_.args.weight_bytes == 4 &&
           bulk_weights();
  }
  // Puts the numbers of this rank's choices, zero for the others, in the place of their owners.
  __device__ void keep_own_weights(uint8_t* extra) const {
    if (lane_ >= d_.top_k()) return;
    int32_t& owner = numbers_.owner(extra)[lane_];
    const bool here = owner == int32_t(d_.me());
    owner = here ? reinterpret_cast<const int32_t*>(numbers_.weights(extra))[lane_] : 0;
  }
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
    announce_previous();  // if this run had fewer steps than that
    previous_run_ = run_;
    run_ = run;
    steps_of_run_ = 0;
  }

  // Tells of the run before this one, once all groups but this one's have arrived. Some steps late,
  // when waiting for them costs little; and no later, for the receiver has work to do.
  __device__ void announce_previous() {
    if (!kTells || previous_run_ == kNoRun) return;
    bulk_wait_group_at_most(steps_of_run_);
    publish(previous_run_);
    previous_run_ = kNoRun;
  }

  // Learns where the rows go; waits for leave to write there. False if the rank has failed.
  __device__ bool open_outbox() {
    if constexpr (kWay == Way::kStaging) {
      for (uint32_t to = lane_; to < d_.num_ranks(); to += 32) {
        if (to == d_.me() || d_.sent(d_.me(), to) == 0) continue;
        // Segments of fixed size, so that the copies need no numbers from the device.
        outbox_.slabs[to] = d_.slab(d_.me(), staging_slab_);
        outbox_.shifts[to] = to * d_.max_tokens() - d_.first_row(d_.me(), to);
      }
      __syncwarp();
      return true;
    } else {
      return d_.wait_for_permits(
          Phase::kDispatchPermit, [&](uint32_t to) { return d_.sent(d_.me(), to) != 0; },
          [&](uint32_t to, uint32_t slab) {
            outbox_.slabs[to] = d_.slab(to, slab);
            outbox_.shifts[to] = 0;
          });
    }
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
  const uint32_t staging_slab_;
  const uint32_t lane_;
  const uint32_t run_length_;
  const uint32_t begin_, end_;                     // its tokens
  WorkQueue queue_;                                // of runs
  uint32_t token_;                                 // the next to load, from `offset_` on
  uint32_t offset_ = 0;                            // byte of its row
  int32_t slots_[2];                               // its row at ranks lane and lane + 32
  int16_t id_ = -1;                                // expert of choice `lane`
  uint32_t run_ = kNoRun, previous_run_ = kNoRun;  // being stored, and the one before
  uint32_t steps_of_run_ = 0;                      // committed
  bool failed_ = false;
};

}  // namespace dualpipe
