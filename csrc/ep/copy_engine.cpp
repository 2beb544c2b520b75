// The copy-engine path: kernels only at both ends, the link is driven by the copy engines. What one
// rank sends to another is a segment of a slab; all segments are cut into the same parts, so that
// the copies of one part run beside the packing of the next and the taking in of the one before.
//
//   stream of the call     pack 0 --- pack 1 --- ... wait 0 --- take 0 --- wait 1 --- take 1 --- +
//   stream of each peer      +-> rows, flag 0   +-> rows, flag 1 ------------------------------> +
//
//   pack    the first gives the peers leave to write (permits) and ends when the peers' permits are
//           there. Brings rows into the staging slab, segment by segment of their destinations; in
//           a dispatch also those that stay, from the same reading, to the output
//   rows    cudaMemcpyAsync from a segment of the staging slab, or straight from rows in token
//           layout, to the segment of this rank in the peer's slab
//   flag    cudaMemcpyAsync of the word `copy_epochs[part]`, which the first pack has written, to
//           the peer's flag of that part. Copies of one stream come one after the other, so the
//           flag is there only after the rows. It takes no SM, and since the epoch lives on the
//           device, a CUDA graph can replay it. A sender that has no more rows tells of all
//           parts that are left with one copy.
//   wait    one thread per peer, with the time-out of every wait
//   take    dispatch.cu's receive role, combine.cu's sums
//
// To all peers at once, or in turn: with more than two ranks, several may write to one receiver
// while others get nothing. In turn, rows go on one stream, part by part, from rank r to r + 1, r +
// 2,
// ...: in every turn, each rank receives from one other. Small arrays and flags stay on the streams
// of the peers, for between the copies of one stream the link stands idle.
//
//   stream of the call      pack 0 --- pack 1 --- ...
//   stream of turns           +-> rows to r+1 --> rows to r+2 --> rows to r+3 --> rows 1 to r+1 ...
//   stream of peer r+1        +-> numbers --+-> flag 0 |               |
//   stream of peer r+2        +-> numbers -------------+-> flag 0      |
//   stream of peer r+3        +-> numbers -----------------------------+-> flag 0
//
// No rank waits for a turn of another: being out of step costs time, not rows. Permits bring ranks
// into step, in every call anew: given when the first part is packed, they let the copies of all
// ranks begin within microseconds. From there on who is late shares a receiver with the next one,
// and is later by twice as much in the turn after; so turns are to be few, and parts large
// (segment_parts in ep/tuning.py).
//
// A receiver that knows that nobody has rows for it beyond some part takes in no further ones, but
// waits for everybody's flag of the last: what is copied before it must not land in a later call.
// At the end the call's stream waits for this rank's own copies: the next pack overwrites what they
// read.
#include "ep/copy_engine.h"

#include <algorithm>
#include <utility>

#include "ep/arrivals.h"

namespace dualpipe {
namespace {

// One array of a segment.
struct CopyArray {
  uint64_t offset;        // in a slab
  uint64_t pitch;         // from row to row of a slab
  const uint8_t* direct;  // rows in token layout to be copied instead of staged ones; or null
  uint64_t direct_pitch;  // whole rows
};

// `rows` runs of `bytes`, `to_pitch` and `from_pitch` apart.
cudaError_t copy_rows(uint8_t* to, uint64_t to_pitch, const uint8_t* from, uint64_t from_pitch,
                      uint64_t bytes, uint64_t rows, cudaStream_t stream) {
  if (bytes == to_pitch && bytes == from_pitch) {
    return cudaMemcpyAsync(to, from, bytes * rows, cudaMemcpyDeviceToDevice, stream);
  }
  return cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, rows, cudaMemcpyDeviceToDevice,
                           stream);
}

// Enqueues one transfer. `arrays` are those of each rank of the launch, empty ones left out.
class Carrier {
 public:
  Carrier(const CopyLanes& lanes, const LaunchArgs& launch, const CopyShape& shape,
          const std::vector<CopyCall>& calls, cudaStream_t stream)
      : lanes_(lanes), launch_(launch), shape_(shape), calls_(calls), stream_(stream) {
    arrivals_.launch = launch;
    arrivals_.launch.ctas = 1;
  }

  void add(uint32_t rank, std::vector<CopyArray> arrays) {
    arrivals_.calls[ranks_.size()].rank = rank;
    ranks_.push_back(rank);
    arrays_.push_back(std::move(arrays));
  }

  // `pack` and `take` launch the kernels of a part on the call's stream. `pack_once`: the first
  // pack does for all parts.
  template <class Pack, class Take>
  cudaError_t run(Phase phase, bool pack_once, Pack pack, Take take) {
    const uint32_t sent = parts_used(&CopyCall::sends);
    for (uint32_t i = 0; i < sent; ++i) {
      if (i == 0 || !pack_once) {
        if (const auto status = pack(pack_once ? SegmentPart::whole() : shape_.parts.at(i, sent))) {
          return status;
        }
        if (const auto status = lanes_after(i)) return status;
      }
      if (const auto status = copy_part(i, sent)) return status;
    }
    const uint32_t come = parts_used(&CopyCall::receives);
    for (uint32_t i = 0; i < come; ++i) {
      if (const auto status = await(phase, i + 1 == come ? shape_.parts.count - 1 : i)) {
        return status;
      }
      if (const auto status = take(shape_.parts.at(i, come))) return status;
    }
    return after_lanes();
  }

 private:
  uint32_t num_ranks() const { return launch_.peers.num_ranks; }
  uint32_t max_tokens() const { return static_cast<uint32_t>(launch_.layout.shape.max_tokens); }

  // Parts that any rank of the launch has rows of, in the segments of other ranks.
  uint32_t parts_used(std::vector<uint32_t> CopyCall::* which) const {
    uint32_t most = 0;
    for (size_t local = 0; local < ranks_.size(); ++local) {
      const std::vector<uint32_t>& rows = calls_[local].*which;
      for (uint32_t peer = 0; peer < num_ranks(); ++peer) {
        if (peer != ranks_[local]) most = std::max(most, rows[peer]);
      }
    }
    return shape_.parts.used(max_tokens(), most);
  }

  // Whether something goes to that peer in this launch: also flags do.
  bool serves(uint32_t peer) const {
    return std::any_of(ranks_.begin(), ranks_.end(), [&](uint32_t rank) { return rank != peer; });
  }

  // Orders the copies that follow after what is on the call's stream.
  cudaError_t lanes_after(uint32_t part) const {
    if (num_ranks() == 1) return cudaSuccess;
    if (const auto status = cudaEventRecord(lanes_.packed(part), stream_)) return status;
    if (shape_.in_turn) {
      const auto status = cudaStreamWaitEvent(lanes_.turns(), lanes_.packed(part), 0);
      if (status != cudaSuccess) return status;
    }
    for (uint32_t peer = 0; peer < num_ranks(); ++peer) {
      if (!serves(peer)) continue;
      const auto status = cudaStreamWaitEvent(lanes_.lane(peer), lanes_.packed(part), 0);
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  }

  // Orders the call's stream after all copies: rows that went in turn have a flag behind them.
  cudaError_t after_lanes() const {
    for (uint32_t peer = 0; num_ranks() > 1 && peer < num_ranks(); ++peer) {
      if (!serves(peer)) continue;
      auto status = cudaEventRecord(lanes_.carried(peer), lanes_.lane(peer));
      if (status == cudaSuccess) status = cudaStreamWaitEvent(stream_, lanes_.carried(peer), 0);
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  }

  // In turn i, every rank of the launch sends to the i-th after it.
  cudaError_t copy_part(uint32_t index, uint32_t used) const {
    for (uint32_t i = 1; i < num_ranks(); ++i) {
      for (size_t local = 0; local < ranks_.size(); ++local) {
        const uint32_t peer = (ranks_[local] + i) % num_ranks();
        if (const auto status = copy_segment(local, peer, index, used)) return status;
      }
    }
    return cudaSuccess;
  }

  cudaError_t copy_segment(size_t local, uint32_t peer, uint32_t index, uint32_t used) const {
    const SegmentPart part = shape_.parts.at(index, used);
    const cudaStream_t lane = lanes_.lane(peer);
    for (const CopyArray& array : arrays_[local]) {
      const bool rows = &array == &arrays_[local].front();
      const cudaStream_t stream = rows && shape_.in_turn ? lanes_.turns() : lane;
      // Rows are what a slower link takes longer for; few bytes a run cost time by their number.
      const double repeats = rows ? lanes_.repeats : 1.0;
      if (const auto status = copy_array(array, local, peer, part, repeats, stream)) return status;
    }
    if (shape_.in_turn) {
      auto status = cudaEventRecord(lanes_.turn_over(), lanes_.turns());
      if (status == cudaSuccess) status = cudaStreamWaitEvent(lane, lanes_.turn_over(), 0);
      if (status != cudaSuccess) return status;
    }
    const uint32_t flags = index + 1 == used ? shape_.parts.count - index : 1;
    return copy_flags(ranks_[local], peer, index, flags);
  }

  cudaError_t copy_array(const CopyArray& array, size_t local, uint32_t peer,
                         const SegmentPart& part, double repeats, cudaStream_t stream) const {
    const uint32_t rank = ranks_[local];
    const std::vector<uint32_t>& sends = calls_[local].sends;
    const uint64_t first = part.first_row(max_tokens(), sends[peer]);
    const uint64_t rows = part.last_row(max_tokens(), sends[peer]) - first;
    if (rows == 0) return cudaSuccess;
    const auto in_slab = [&](uint32_t at, uint32_t slab, uint32_t segment) {
      return launch_.peers.base[at] + launch_.layout.slab_offset(slab) + array.offset +
             (uint64_t{segment} * max_tokens() + first) * array.pitch;
    };
    const uint8_t* from = in_slab(rank, shape_.staging_slab, peer);
    uint64_t from_pitch = array.pitch;
    if (array.direct != nullptr) {
      // Rows of one source rank are consecutive in token layout.
      uint64_t row = first;
      for (uint32_t s = 0; s < peer; ++s) row += sends[s];
      from = array.direct + row * array.direct_pitch;
      from_pitch = array.direct_pitch;
    }
    for (double left = repeats; left > 0; left -= 1) {
      const auto count = left >= 1 ? rows : static_cast<uint64_t>(left * static_cast<double>(rows));
      if (count == 0) break;
      const auto status = left < repeats && lanes_.detour != nullptr
                              ? copy_aside(from, count * from_pitch, stream)
                              : copy_rows(in_slab(peer, 0, rank), array.pitch, from, from_pitch,
                                          from_pitch, count, stream);
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  }

  // Nobody reads it, so each piece goes over the one before.
  cudaError_t copy_aside(const uint8_t* from, uint64_t bytes, cudaStream_t stream) const {
    for (uint64_t done = 0; done < bytes; done += lanes_.detour_bytes) {
      const uint64_t piece = std::min(bytes - done, lanes_.detour_bytes);
      const auto status =
          cudaMemcpyAsync(lanes_.detour, from + done, piece, cudaMemcpyDeviceToHost, stream);
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  }

  cudaError_t copy_flags(uint32_t rank, uint32_t peer, uint32_t part, uint32_t count) const {
    const ControlLayout& control = launch_.layout.control;
    uint32_t* to = control.run_flags.in(launch_.peers.base[peer]) + rank * control.runs + part;
    const uint32_t* from = control.state.in(launch_.peers.base[rank])->copy_epochs + part;
    return cudaMemcpyAsync(to, from, count * sizeof(uint32_t), cudaMemcpyDeviceToDevice,
                           lanes_.lane(peer));
  }

  cudaError_t await(Phase phase, uint32_t part) {
    arrivals_.phase = phase;
    arrivals_.part = part;
    return launch_arrivals(arrivals_, stream_);
  }

  const CopyLanes& lanes_;
  const LaunchArgs& launch_;
  const CopyShape& shape_;
  const std::vector<CopyCall>& calls_;
  const cudaStream_t stream_;
  ArrivalsArgs arrivals_{};
  std::vector<uint32_t> ranks_;                 // of the launch
  std::vector<std::vector<CopyArray>> arrays_;  // of each, rows first
};

template <class Args>
Args with_warps(Args args, const Tuning& tuning, uint32_t ctas) {
  args.tuning = tuning;
  args.launch.ctas = ctas;
  return args;
}

}  // namespace

CopyLanes::~CopyLanes() {
  // Nobody is left to tell of an error; at the end of a process the driver may be gone.
  for (cudaStream_t lane : lanes_) (void)cudaStreamDestroy(lane);
  if (turns_ != nullptr) (void)cudaStreamDestroy(turns_);
  if (turn_over_ != nullptr) (void)cudaEventDestroy(turn_over_);
  for (cudaEvent_t event : packed_) (void)cudaEventDestroy(event);
  for (cudaEvent_t event : carried_) (void)cudaEventDestroy(event);
}

cudaError_t CopyLanes::open(uint32_t num_ranks) {
  const auto make_events = [](std::vector<cudaEvent_t>& events, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) {
      cudaEvent_t event;
      const auto status = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
      if (status != cudaSuccess) return status;
      events.push_back(event);
    }
    return cudaSuccess;
  };
  for (uint32_t i = 0; i < num_ranks; ++i) {
    cudaStream_t lane;
    const auto status = cudaStreamCreateWithFlags(&lane, cudaStreamNonBlocking);
    if (status != cudaSuccess) return status;
    lanes_.push_back(lane);
  }
  auto status = cudaStreamCreateWithFlags(&turns_, cudaStreamNonBlocking);
  if (status == cudaSuccess) {
    status = cudaEventCreateWithFlags(&turn_over_, cudaEventDisableTiming);
  }
  if (status == cudaSuccess) status = make_events(packed_, kSegmentUnits);
  return status != cudaSuccess ? status : make_events(carried_, num_ranks);
}

cudaError_t carry_dispatch(const CopyLanes& lanes, DispatchArgs args,
                           const std::vector<CopyCall>& calls, const CopyShape& shape,
                           cudaStream_t stream) {
  const SlabLayout& slab = args.launch.layout.slab;
  Carrier carrier(lanes, args.launch, shape, calls, stream);
  for (uint32_t local = 0; local < args.launch.num_local; ++local) {
    std::vector<CopyArray> arrays = {
        {slab.rows.offset, round_up(args.out_bytes, kRegionAlignment), nullptr, 0}};
    if (args.num_scales != 0) arrays.push_back({slab.scales.offset, slab.scale_pitch, nullptr, 0});
    if (args.calls[local].weights != nullptr) {
      arrays.push_back({slab.weights.offset, slab.weight_pitch, nullptr, 0});
    }
    carrier.add(args.calls[local].rank, std::move(arrays));
  }
  const DispatchArgs pack = with_warps(args, shape.pack, shape.pack_ctas);
  const DispatchArgs take = with_warps(args, shape.take, shape.take_ctas);
  return carrier.run(
      Phase::kDispatchRows, false,
      [&](const SegmentPart& part) {
        return launch_dispatch_pack(pack, {shape.staging_slab, part, shape.together}, stream);
      },
      [&](const SegmentPart& part) { return launch_dispatch_unpack(take, part, stream); });
}

cudaError_t carry_combine(const CopyLanes& lanes, CombineArgs args,
                          const std::vector<CopyCall>& calls, const CopyShape& shape, bool direct,
                          cudaStream_t stream) {
  const SlabLayout& slab = args.launch.layout.slab;
  Carrier carrier(lanes, args.launch, shape, calls, stream);
  for (uint32_t local = 0; local < args.launch.num_local; ++local) {
    const CombineCall& call = args.calls[local];
    std::vector<CopyArray> arrays = {{slab.rows.offset, round_up(args.row_bytes, kRegionAlignment),
                                      direct ? call.rows : nullptr, args.row_bytes}};
    if (call.row_weights != nullptr) {
      arrays.push_back({slab.weights.offset, slab.weight_pitch, direct ? call.row_weights : nullptr,
                        slab.weight_pitch});
    }
    carrier.add(call.rank, std::move(arrays));
  }
  const CombineArgs pack = with_warps(args, shape.pack, shape.pack_ctas);
  const CombineArgs take = with_warps(args, shape.take, shape.take_ctas);
  return carrier.run(
      Phase::kCombineRows, direct,
      [&](const SegmentPart& part) {
        return launch_combine_pack(pack, {shape.staging_slab, part, shape.together}, stream);
      },
      [&](const SegmentPart& part) { return launch_combine_reduce(take, part, stream); });
}

}  // namespace dualpipe
