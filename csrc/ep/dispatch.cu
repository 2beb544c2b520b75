// Dispatch: every token's row to every rank that has one of its experts, once, straight to its
// place.
//
//   sending CTA   send warps      x -> stage [-> FP8] ------> slab of a peer
//   local CTA     own warps       x -> stage [-> FP8] -> output        rows that stay
//                 receive warps   slab -> stage -> output              unless rows stay in the slab
//
// A send warp takes runs of a few consecutive tokens. It reads each row once by a bulk load,
// several rows ahead, and stores it by bulk copies to all the peers it goes to from the same stage.
// A receive warp waits for a run, and moves its rows on while later runs are still under way. Rows
// that stay are read by other SMs: what an SM stores locally waits behind what it stores to a peer
// (tuning.h).
//
// Where SMs are few, or rows are quantised, which costs more than reading them, every CTA has send
// warps, which then serve this rank as well, and receive warps.
//
// Protocol, with flags that hold the epoch of the call:
//   permit  receiver to sender: "slab s is yours". Sent when this kernel starts, so after whatever
//           read that slab before on this stream. A sender writes to a peer only with its permit.
//           It also says what call this is (hello.cuh). One warp waits for those of all peers, when
//           its rows are on their way: a rank that makes another call is found, by every rank.
//   run     sender to receiver: "run j has arrived".
//
// Ordering of a run. Bulk stores; wait_group by the lane that issued them: they are written;
// __syncwarp; release store of the flag at system scope. At the receiver: acquire load of the flag
// by lane 0; __syncwarp; proxy fence; bulk loads and ordinary ones. The flag of a run is sent one
// run later, so that the wait for its stores costs nothing.
//
// Ordering of the slab. The last read of call n and the permit of call n + 1 are on one stream, in
// this order; the permit's release and acquire, and a proxy fence, put the peer's stores after it.
//
// Rows of an output that nobody sends are zeroed by the receive warps. The kernel ends when all
// rows are where they belong, so the next kernel of the stream may read them.
#include "ep/dispatch.h"

#include "ep/dispatch_receive.cuh"
#include "ep/dispatch_send.cuh"
#include "ep/zero_rows.cuh"

namespace dualpipe {
namespace {

// Threads of a CTA, at most.
constexpr uint32_t kDispatchThreads = 512;

// How a CTA's shared memory is cut, the same on host and device.
struct SharedLayout {
  StageNumbers send_numbers, receive_numbers;
  StageLayout send_stage, receive_stage;
  uint32_t send_piece, receive_piece;                // bytes
  uint32_t send_stages, own_stages, receive_stages;  // of all warps

  __host__ __device__ explicit SharedLayout(const DispatchArgs& args) {
    const auto& shape = args.launch.layout.shape;
    const Tuning& t = args.tuning;
    const uint32_t places = round_up(static_cast<uint32_t>(shape.top_k), 4);
    const uint32_t ranks = round_up(static_cast<uint32_t>(shape.num_ranks), 4);
    const uint32_t scales = round_up(args.num_scales, 4);
    const uint32_t weight_words = round_up(shape.top_k * args.weight_bytes, 16) / 4;
    send_piece = args.in_bytes < t.send_piece ? args.in_bytes : t.send_piece;
    receive_piece = args.out_bytes < t.receive_piece ? args.out_bytes : t.receive_piece;
    send_numbers = {places, ranks, places, scales, weight_words};
    receive_numbers = {places, 0, 0, scales, 0};
    // A warp that quantises reads rows into registers; its stages hold what becomes of them.
    const uint32_t shrinks = args.payload == Payload::kAsIs ? 1 : 2;
    send_stage = {send_piece / shrinks, send_numbers.bytes()};
    receive_stage = {receive_piece, receive_numbers.bytes()};
    send_stages = t.send_warps * t.send_stages;
    own_stages = t.own_warps * t.own_stages;
    receive_stages = t.receive_warps * t.receive_stages;
  }

  // Sending CTAs: stages, barriers, outboxes. Local CTAs: own stages, receive stages, barriers.
  // CTAs that do all: first the one, then the other.
  __host__ __device__ uint32_t send_full() const { return send_stages * send_stage.bytes(); }
  __host__ __device__ uint32_t outboxes() const { return send_full() + 8 * send_stages; }
  __host__ __device__ uint32_t send_bytes(const DispatchArgs& args) const {
    const auto ranks = static_cast<uint32_t>(args.launch.layout.shape.num_ranks);
    return round_up(outboxes() + args.tuning.send_warps * ranks * 12, 128);
  }
  __host__ __device__ uint32_t receive_offset() const { return own_stages * send_stage.bytes(); }
  __host__ __device__ uint32_t local_full() const {
    return receive_offset() + receive_stages * receive_stage.bytes();
  }
  __host__ __device__ uint32_t bytes(const DispatchArgs& args) const {
    const uint32_t send = send_bytes(args);
    const uint32_t local = local_full() + 8 * (own_stages + receive_stages);
    if (args.tuning.mixed != 0) return send + local;
    return send > local ? send : local;
  }
};

// The place of a warp among those of its role, over all CTAs that have it. Neighbours in the work
// are in different CTAs: with little work, every SM has some.
struct Share {
  uint32_t index, count;

  __device__ Share(uint32_t warp, uint32_t warps, uint32_t cta, uint32_t ctas)
      : index(warp * ctas + cta), count(warps * ctas) {}

  __device__ WorkQueue of(const Dispatch& d, Queue queue) const {
    return {d.watchdog.state, queue, index, count};
  }
};

template <Payload kPayload, Way kWay>
__device__ void send_role(const Dispatch& d, const SharedLayout& shared, uint8_t* memory,
                          uint32_t warp, const Share& share, const StagedPart& staged) {
  const Tuning& tuning = d.args.tuning;
  const uint32_t stage = warp * tuning.send_stages;
  Ring ring(memory + stage * shared.send_stage.bytes(),
            reinterpret_cast<uint64_t*>(memory + shared.send_full()) + stage, shared.send_stage,
            tuning.send_stages);
  ring.init();
  delay(d.call.send_delay_ns);
  const uint32_t ranks = d.num_ranks();
  uint8_t* outbox = memory + shared.outboxes();
  const Outbox box{
      reinterpret_cast<uint8_t**>(outbox) + warp * ranks,
      reinterpret_cast<int32_t*>(outbox + 8 * tuning.send_warps * ranks) + warp * ranks};
  SendWork<kPayload, kWay> work(d, shared.send_numbers, shared.send_piece, box,
                                share.of(d, Queue::kSend), staged);
  pump(ring, work);
}

template <Payload kPayload>
__device__ void own_role(const Dispatch& d, const SharedLayout& shared, uint8_t* memory,
                         uint32_t warp, const Share& share) {
  const uint32_t stage = warp * d.args.tuning.own_stages;
  Ring ring(memory + stage * shared.send_stage.bytes(),
            reinterpret_cast<uint64_t*>(memory + shared.local_full()) + stage, shared.send_stage,
            d.args.tuning.own_stages);
  ring.init();
  SendWork<kPayload, Way::kOwn> work(d, shared.send_numbers, shared.send_piece, {},
                                     share.of(d, Queue::kOwn), {});
  pump(ring, work);
}

template <bool kStaging>
__device__ void receive_role(const Dispatch& d, const SharedLayout& shared, uint8_t* memory,
                             uint32_t warp, const Share& share, const SegmentPart& part) {
  delay(d.call.receive_delay_ns);
  if (part.begins()) ZeroRows(d, share.index, share.count).run();
  ReceiveWork<kStaging> work(d, shared.receive_numbers, shared.receive_piece,
                             share.of(d, Queue::kReceive), part);
  if (d.call.keep_in_slab != 0) return work.await_all();
  const uint32_t stage = warp * d.args.tuning.receive_stages;
  Ring ring(memory + shared.receive_offset() + stage * shared.receive_stage.bytes(),
            reinterpret_cast<uint64_t*>(memory + shared.local_full()) + shared.own_stages + stage,
            shared.receive_stage, d.args.tuning.receive_stages);
  ring.init();
  pump(ring, work);
}

// What a kernel does of a dispatch: all; the way into the staging slab, and to the output of this
// rank; or the way out of the slab. The latter two for one part of all segments.
enum class Half { kBoth, kPack, kUnpack };

template <Payload kPayload, Half kHalf>
__global__ void __launch_bounds__(kDispatchThreads, 1)
    dispatch_kernel(const __grid_constant__ DispatchArgs args,
                    const __grid_constant__ StagedPart staged) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Place place = Place::here(args.launch);
  const DispatchCall& call = args.calls[place.local];
  const Watchdog watchdog = make_watchdog(args.launch, place.local, call.rank, call.matrix);
  if (__syncthreads_or(watchdog.aborted())) return;
  const Dispatch d{{args, call, watchdog, watchdog.state->transfer_epoch + 1}};
  const SharedLayout shared(args);
  const Tuning& t = args.tuning;
  const uint32_t warp = threadIdx.x / 32, cta = place.cta;
  constexpr bool kSends = kHalf != Half::kUnpack, kReceives = kHalf != Half::kPack;
  constexpr bool kStaging = kHalf != Half::kBoth;
  // Whether this is the first kernel of the dispatch; and the last.
  const bool begins = kSends && staged.part.begins();
  const bool ends = kReceives && staged.part.ends();

  if (begins && !staged.together && cta == 0 && warp + 1 == blockDim.x / 32) {
    d.send_permits(call.slab);
  }
  if (kHalf == Half::kBoth && t.mixed != 0) {
    const uint32_t ctas = args.launch.ctas;
    if (warp < t.send_warps) {
      const Share share(warp, t.send_warps, cta, ctas);
      send_role<kPayload, Way::kEverywhere>(d, shared, memory, warp, share, staged);
    } else {
      const uint32_t receiver = warp - t.send_warps;
      receive_role<kStaging>(d, shared, memory + shared.send_bytes(args), receiver,
                             Share(receiver, t.receive_warps, cta, ctas), staged.part);
    }
  } else if (cta < t.send_ctas) {
    if (kSends && warp < t.send_warps) {
      const Share share(warp, t.send_warps, cta, t.send_ctas);
      send_role<kPayload, kStaging ? Way::kStaging : Way::kPeers>(d, shared, memory, warp, share,
                                                                  staged);
    }
  } else {
    const uint32_t local_cta = cta - t.send_ctas, ctas = args.launch.ctas - t.send_ctas;
    if (warp < t.own_warps) {
      if constexpr (!kStaging) {
        own_role<kPayload>(d, shared, memory, warp, Share(warp, t.own_warps, local_cta, ctas));
      }
    } else if (warp < t.own_warps + t.receive_warps) {
      if constexpr (kReceives) {
        const uint32_t receiver = warp - t.own_warps;
        receive_role<kStaging>(d, shared, memory, receiver,
                               Share(receiver, t.receive_warps, local_cta, ctas), staged.part);
      }
    }
  }
  if (cta == 0 && warp == 0) {
    // Its rows are on their way, so this takes no time of theirs.
    if (kHalf == Half::kBoth) d.await_all(Phase::kDispatchPermit);
    // The copies that follow on the stream write into the peers' slabs.
    if (kHalf == Half::kPack && begins) {
      if (staged.together) d.send_permits(call.slab);
      d.open_copies(Phase::kDispatchPermit);
    }
  }
  finish_epoch(watchdog.state, ends ? &watchdog.state->transfer_epoch : nullptr, args.launch.ctas);
}

template <Payload kPayload, Half kHalf>
cudaError_t launch(const DispatchArgs& args, const StagedPart& staged, cudaStream_t stream) {
  return launch_transfer(dispatch_kernel<kPayload, kHalf>, args, staged,
                         SharedLayout(args).bytes(args), stream);
}

template <Half kHalf>
cudaError_t launch_for_payload(const DispatchArgs& args, const StagedPart& staged,
                               cudaStream_t stream) {
  switch (args.payload) {
    case Payload::kQuantize:
      return launch<Payload::kQuantize, kHalf>(args, staged, stream);
    case Payload::kQuantizePow2:
      return launch<Payload::kQuantizePow2, kHalf>(args, staged, stream);
    default:
      return launch<Payload::kAsIs, kHalf>(args, staged, stream);
  }
}

}  // namespace

cudaError_t launch_dispatch(const DispatchArgs& args, cudaStream_t stream) {
  return launch_for_payload<Half::kBoth>(args, {0, SegmentPart::whole()}, stream);
}

cudaError_t launch_dispatch_pack(const DispatchArgs& args, const StagedPart& staged,
                                 cudaStream_t stream) {
  return launch_for_payload<Half::kPack>(args, staged, stream);
}

cudaError_t launch_dispatch_unpack(const DispatchArgs& args, const SegmentPart& part,
                                   cudaStream_t stream) {
  return launch<Payload::kAsIs, Half::kUnpack>(args, {0, part}, stream);
}

}  // namespace dualpipe
