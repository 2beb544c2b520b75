// Dispatch: every token's row to every rank that has one of its experts, once, straight to its
// place.
//
//      CTA (one of num_sms)                       CTA of a peer
//   send warps     x -> stage [-> FP8] ------->  slab          rows of other ranks
//                          \--> output                         rows that stay
//   receive warps  slab -> stage -> output                     unless they stay in the slab
//
// A send warp takes runs of 16 consecutive tokens. It reads each row once by a bulk load, several
// rows ahead, and stores it by bulk copies to all its destinations from the same stage. A receive
// warp waits for a run, and moves its rows on while later runs are still under way.
//
// Protocol, with flags that hold the epoch of the call:
//   permit  receiver to sender: "slab s is yours". Sent when this kernel starts, so after whatever
//           read that slab before on this stream. A sender writes to a peer only with its permit.
//   run     sender to receiver: "run j has arrived".
//
// Ordering of a run. Bulk stores -> wait_group by the lane that issued them: written -> __syncwarp
// -> release store of the flag at system scope. Receiver: acquire load of the flag by lane 0 ->
// shuffle
// -> proxy fence -> bulk loads, ordinary loads. The flag of a run is sent one run later, so that
// the wait for its stores costs nothing. Ordering of the slab. The last read of call n and the
// permit of call n + 1 are on one stream, in this order; the permit's release and acquire put the
// peer's stores after it.
//
// Rows of an output that nobody sends are zeroed by the receive warps. The kernel ends when all
// rows are where they belong, so the next kernel of the stream may read them.
#include "ep/dispatch.h"

#include "ep/dispatch_roles.cuh"

namespace dualpipe {
namespace {

// Threads of a CTA, at most.
constexpr uint32_t kDispatchThreads = 640;

// How a CTA's shared memory is cut, the same on host and device.
struct SharedLayout {
  StageNumbers send_numbers, receive_numbers;
  StageLayout send_stage, receive_stage;
  uint32_t send_piece, receive_piece;    // bytes
  uint32_t send_stages, receive_stages;  // of all warps

  __host__ __device__ explicit SharedLayout(const DispatchArgs& args) {
    const auto& shape = args.launch.layout.shape;
    const uint32_t places = round_up(static_cast<uint32_t>(shape.top_k), 4);
    const uint32_t ranks = round_up(static_cast<uint32_t>(shape.num_ranks), 4);
    const uint32_t weight_words = round_up(shape.top_k * args.weight_bytes, 16) / 4;
    send_piece = args.in_bytes < args.tuning.send_piece ? args.in_bytes : args.tuning.send_piece;
    receive_piece =
        args.out_bytes < args.tuning.receive_piece ? args.out_bytes : args.tuning.receive_piece;
    const uint32_t scales = round_up(args.num_scales, 4);
    send_numbers = {places, ranks, places, scales, weight_words};
    receive_numbers = {places, 0, 0, scales, 0};
    send_stage = {send_piece, send_numbers.bytes()};
    receive_stage = {receive_piece, receive_numbers.bytes()};
    send_stages = args.tuning.send_warps * args.tuning.send_stages;
    receive_stages = args.tuning.receive_warps * args.tuning.receive_stages;
  }

  __host__ __device__ uint32_t receive_offset() const { return send_stages * send_stage.bytes(); }
  __host__ __device__ uint32_t full_offset() const {
    return receive_offset() + receive_stages * receive_stage.bytes();
  }
  __host__ __device__ uint32_t outbox_offset() const {
    return full_offset() + 8 * round_up(send_stages + receive_stages, 2);
  }
  __host__ __device__ uint32_t bytes(const DispatchArgs& args) const {
    return outbox_offset() +
           args.tuning.send_warps * static_cast<uint32_t>(args.launch.layout.shape.num_ranks) * 12;
  }
};

template <Payload kPayload, bool kStaging>
__device__ void send_role(const Dispatch& d, const SharedLayout& shared, uint8_t* memory,
                          uint32_t warp, uint32_t cta, uint32_t staging_slab) {
  const Tuning& tuning = d.args.tuning;
  const uint32_t stage = warp * tuning.send_stages;
  Ring ring(memory + stage * shared.send_stage.bytes(),
            reinterpret_cast<uint64_t*>(memory + shared.full_offset()) + stage, shared.send_stage,
            tuning.send_stages);
  ring.init();
  delay(d.call.send_delay_ns);
  const uint32_t ranks = d.num_ranks();
  uint8_t* outbox = memory + shared.outbox_offset();
  const Outbox box{
      reinterpret_cast<uint8_t**>(outbox) + warp * ranks,
      reinterpret_cast<int32_t*>(outbox + 8 * tuning.send_warps * ranks) + warp * ranks};
  // Runs go round the CTAs first: with few runs, every SM has some.
  SendWork<kPayload, kStaging> work(d, shared.send_numbers, shared.send_piece, box,
                                    warp * d.launch().ctas + cta,
                                    tuning.send_warps * d.launch().ctas, staging_slab);
  pump(ring, work);
}

template <bool kStaging>
__device__ void receive_role(const Dispatch& d, const SharedLayout& shared, uint8_t* memory,
                             uint32_t warp, uint32_t cta) {
  const Tuning& tuning = d.args.tuning;
  delay(d.call.receive_delay_ns);
  const uint32_t index = warp * d.launch().ctas + cta;
  const uint32_t count = tuning.receive_warps * d.launch().ctas;
  ZeroRows(d, index, count).run();
  ReceiveWork<kStaging> work(d, shared.receive_numbers, shared.receive_piece, index, count);
  if (d.call.keep_in_slab != 0) return work.await_all();
  const uint32_t stage = warp * tuning.receive_stages;
  Ring ring(memory + shared.receive_offset() + stage * shared.receive_stage.bytes(),
            reinterpret_cast<uint64_t*>(memory + shared.full_offset()) + shared.send_stages + stage,
            shared.receive_stage, tuning.receive_stages);
  ring.init();
  pump(ring, work);
}

// Gives every peer leave to write into a slab of this rank. One warp.
__device__ void send_permits(const Dispatch& d) {
  for (uint32_t to = threadIdx.x % 32; to < d.num_ranks(); to += 32) {
    if (to == d.me()) continue;
    PermitLine* line = d.layout().control.permits.in(d.launch().peers.base[to]) + d.me();
    ptx::st_relaxed_sys(&line->slab, d.call.slab);
    ptx::st_release_sys(&line->epoch, d.epoch);
  }
}

// Until every peer that gets rows has given leave. One warp; false if the rank has failed.
__device__ void wait_for_permits(const Dispatch& d) {
  for (uint32_t to = threadIdx.x % 32; to < d.num_ranks(); to += 32) {
    if (to == d.me()) continue;
    const PermitLine* permit = d.layout().control.permits.in(d.launch().peers.base[d.me()]) + to;
    wait_epoch(&permit->epoch, d.epoch, {Phase::kDispatchPermit, d.me(), to, 0, d.epoch},
               d.watchdog);
  }
}

// Which halves of a dispatch a kernel does.
enum class Half { kBoth, kPack, kUnpack };

template <Payload kPayload, Half kHalf>
__global__ void __launch_bounds__(kDispatchThreads, 1)
    dispatch_kernel(const __grid_constant__ DispatchArgs args, uint32_t staging_slab) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Place place = Place::here(args.launch);
  const DispatchCall& call = args.calls[place.local];
  const Watchdog watchdog = make_watchdog(args.launch, place.local, call.rank);
  if (__syncthreads_or(watchdog.aborted())) return;
  const Dispatch d{args, call, watchdog, watchdog.state->transfer_epoch + 1};
  const SharedLayout shared(args);
  const uint32_t warp = threadIdx.x / 32;
  constexpr bool kStaging = kHalf != Half::kBoth;

  if (kHalf != Half::kUnpack && place.cta == 0 && warp + 1 == blockDim.x / 32) send_permits(d);
  if (warp < args.tuning.send_warps) {
    send_role<kPayload, kStaging>(d, shared, memory, warp, place.cta, staging_slab);
  } else {
    receive_role<kStaging>(d, shared, memory, warp - args.tuning.send_warps, place.cta);
  }
  if (kHalf == Half::kPack) {
    // The copies that follow on the stream write into the peers' slabs.
    if (place.cta == 0 && warp == 0) wait_for_permits(d);
    if (place.cta == 0 && threadIdx.x == 0) watchdog.state->copy_epoch = d.epoch;
    return;
  }
  finish_epoch(watchdog.state, &watchdog.state->transfer_epoch, args.launch.ctas);
}

template <Payload kPayload, Half kHalf>
cudaError_t launch(const DispatchArgs& args, uint32_t staging_slab, cudaStream_t stream) {
  const auto kernel = dispatch_kernel<kPayload, kHalf>;
  const int bytes = static_cast<int>(SharedLayout(args).bytes(args));
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const uint32_t threads = 32 * (args.tuning.send_warps + args.tuning.receive_warps);
  kernel<<<args.launch.num_local * args.launch.ctas, threads, bytes, stream>>>(args, staging_slab);
  return cudaGetLastError();
}

template <Half kHalf>
cudaError_t launch_for_payload(const DispatchArgs& args, uint32_t staging_slab,
                               cudaStream_t stream) {
  switch (args.payload) {
    case Payload::kQuantize:
      return launch<Payload::kQuantize, kHalf>(args, staging_slab, stream);
    case Payload::kQuantizePow2:
      return launch<Payload::kQuantizePow2, kHalf>(args, staging_slab, stream);
    default:
      return launch<Payload::kAsIs, kHalf>(args, staging_slab, stream);
  }
}

}  // namespace

cudaError_t launch_dispatch(const DispatchArgs& args, cudaStream_t stream) {
  return launch_for_payload<Half::kBoth>(args, 0, stream);
}

cudaError_t launch_dispatch_pack(const DispatchArgs& args, uint32_t staging_slab,
                                 cudaStream_t stream) {
  return launch_for_payload<Half::kPack>(args, staging_slab, stream);
}

cudaError_t launch_dispatch_unpack(const DispatchArgs& args, cudaStream_t stream) {
  return launch<Payload::kAsIs, Half::kUnpack>(args, 0, stream);
}

}  // namespace dualpipe
