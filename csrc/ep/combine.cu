// Combine: a token's rows come back to its rank and are summed, in a fixed order.
//
//      CTA (one of num_sms)                            CTA of the token's rank
//   send warps    token layout:  row -> stage ----->  slab
//                 expert layout: sum of rows ------>  slab
//   reduce warps                                       slab + own rows [+ bias] -> y
//
// The rows of one source rank are consecutive in token layout and stay so in its slab: segment s of
// the slab holds, in order, what rank s sends. Each CTA has both kinds of warps: sending is bound
// by the link, reducing by memory.
//
// Protocol and ordering are those of dispatch.cu, with chunks of 16 rows in the place of runs:
// permit -> rows -> flag of the chunk -> reduction of the tokens whose rows it holds. Own rows need
// no flag: kernels before this one on the stream wrote them.
//
// Order of a sum: on the rank of the experts by top-k place, rounded once; at the token's rank by
// rank, in float32 (float64 for float64), the bias last, rounded once.
#include "ep/combine.h"

#include "ep/combine_roles.cuh"

namespace dualpipe {
namespace {

// Threads of a CTA, at most; what the registers of the sums leave room for.
constexpr uint32_t kCombineThreads = 512;

// How a CTA's shared memory is cut, the same on host and device.
struct SharedLayout {
  StageLayout send_stage, sum_stage;
  uint32_t send_piece;               // bytes
  uint32_t send_stages, sum_stages;  // of all warps
  uint32_t sources;                  // bytes of a warp's list

  __host__ __device__ explicit SharedLayout(const CombineArgs& args) {
    const auto& shape = args.launch.layout.shape;
    const StageLayout sum{kSumPiece, sizeof(SumHeader)};
    send_piece = args.row_bytes < args.tuning.send_piece ? args.row_bytes : args.tuning.send_piece;
    send_stage = args.expert_layout != 0
                     ? sum
                     : StageLayout{send_piece, round_up(shape.top_k * args.weight_bytes, 16)};
    sum_stage = sum;
    send_stages = args.tuning.send_warps * args.tuning.send_stages;
    sum_stages = args.tuning.receive_warps * args.tuning.receive_stages;
    sources = static_cast<uint32_t>((shape.num_ranks + shape.top_k) * sizeof(SumSource<F64Row>));
  }

  __host__ __device__ uint32_t sum_offset() const { return send_stages * send_stage.bytes(); }
  __host__ __device__ uint32_t full_offset() const {
    return sum_offset() + sum_stages * sum_stage.bytes();
  }
  __host__ __device__ uint32_t sources_offset() const {
    return full_offset() + 8 * (send_stages + sum_stages);
  }
  __host__ __device__ uint32_t first_rows_offset(const CombineArgs& args) const {
    return sources_offset() + (args.tuning.send_warps + args.tuning.receive_warps) * sources;
  }
  __host__ __device__ uint32_t bytes(const CombineArgs& args) const {
    return first_rows_offset(args) + 4 * static_cast<uint32_t>(args.launch.layout.shape.num_ranks);
  }
};

// What the warps of a CTA share, and this warp's part of it.
struct Shared {
  const SharedLayout& layout;
  uint8_t* memory;
  uint32_t warp;  // of the CTA

  // `index`-th stages of the ring, of those of `stage`'s kind that start at `offset`.
  __device__ Ring ring(const StageLayout& stage, uint32_t offset, uint32_t index, uint32_t full,
                       uint32_t stages) const {
    return Ring(memory + offset + index * stage.bytes(),
                reinterpret_cast<uint64_t*>(memory + layout.full_offset()) + full + index, stage,
                stages);
  }
  template <class Row>
  __device__ SumSource<Row>* sources() const {
    return reinterpret_cast<SumSource<Row>*>(memory + layout.sources_offset() +
                                             warp * layout.sources);
  }
};

template <class Row, bool kExpert, bool kWeighted, bool kStaging>
__device__ void send_role(const Combine& c, const Shared& shared, uint32_t cta,
                          uint32_t staging_slab) {
  const Tuning& tuning = c.args.tuning;
  const uint32_t first = shared.warp * c.launch().ctas + cta;
  const uint32_t step = tuning.send_warps * c.launch().ctas;
  delay(c.call.send_delay_ns);
  Ring ring = shared.ring(shared.layout.send_stage, 0, shared.warp * tuning.send_stages, 0,
                          tuning.send_stages);
  ring.init();
  if constexpr (kExpert) {
    ExpertSums<Row, kStaging> sums(c, first, step, staging_slab);
    SumWork<Row, kWeighted, false, ExpertSums<Row, kStaging>> work(c, sums, shared.sources<Row>());
    pump(ring, work);
  } else {
    CopyChunks<kStaging> work(c, shared.layout.send_piece, first, step, staging_slab);
    pump(ring, work);
  }
}

template <class Row, bool kExpert, bool kWeighted, bool kStaging>
__device__ void reduce_role(const Combine& c, const Shared& shared, uint32_t cta) {
  const Tuning& tuning = c.args.tuning;
  const uint32_t warp = shared.warp - tuning.send_warps;
  delay(c.call.receive_delay_ns);
  Ring ring =
      shared.ring(shared.layout.sum_stage, shared.layout.sum_offset(), warp * tuning.receive_stages,
                  shared.layout.send_stages, tuning.receive_stages);
  ring.init();
  using Sums = TokenSums<Row, kExpert, kStaging>;
  Sums sums(c, warp * c.launch().ctas + cta, tuning.receive_warps * c.launch().ctas);
  SumWork<Row, kWeighted, kExpert, Sums> work(c, sums, shared.sources<Row>());
  pump(ring, work);
}

// Gives every peer leave to write into slab 0 of this rank. One warp.
__device__ void send_permits(const Combine& c) {
  for (uint32_t to = threadIdx.x % 32; to < c.num_ranks(); to += 32) {
    if (to == c.me()) continue;
    PermitLine* line = c.layout().control.permits.in(c.launch().peers.base[to]) + c.me();
    ptx::st_relaxed_sys(&line->slab, 0);
    ptx::st_release_sys(&line->epoch, c.epoch);
  }
}

// Which halves of a combine a kernel does.
enum class Half { kBoth, kPack, kReduce };

template <class Row, bool kExpert, bool kWeighted, Half kHalf>
__global__ void __launch_bounds__(kCombineThreads, 1)
    combine_kernel(const __grid_constant__ CombineArgs args, uint32_t staging_slab) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Place place = Place::here(args.launch);
  const CombineCall& call = args.calls[place.local];
  const Watchdog watchdog = make_watchdog(args.launch, place.local, call.rank);
  if (__syncthreads_or(watchdog.aborted())) return;
  const SharedLayout shared(args);
  int32_t* first_rows = reinterpret_cast<int32_t*>(memory + shared.first_rows_offset(args));
  const Combine c{args, call, watchdog, watchdog.state->transfer_epoch + 1, first_rows};
  const uint32_t warp = threadIdx.x / 32;
  constexpr bool kStaging = kHalf != Half::kBoth;

  if (kHalf != Half::kReduce && place.cta == 0 && warp + 1 == blockDim.x / 32) send_permits(c);
  for (uint32_t r = threadIdx.x; r < c.num_ranks(); r += blockDim.x) {
    first_rows[r] = c.first_row(c.me(), r);
  }
  __syncthreads();
  const Shared mine{shared, memory, warp};
  if (kHalf != Half::kReduce && warp < args.tuning.send_warps) {
    send_role<Row, kExpert, kWeighted, kStaging>(c, mine, place.cta, staging_slab);
  } else if (kHalf != Half::kPack && warp >= args.tuning.send_warps) {
    reduce_role<Row, kExpert, kWeighted, kStaging>(c, mine, place.cta);
  }
  if (kHalf == Half::kPack) {
    // The copies that follow on the stream write into the peers' slabs.
    if (place.cta == 0 && warp == 0) ChunkSender<false>(c, staging_slab).open();
    if (place.cta == 0 && threadIdx.x == 0) watchdog.state->copy_epoch = c.epoch;
    return;
  }
  finish_epoch(watchdog.state, &watchdog.state->transfer_epoch, args.launch.ctas);
}

template <class Row, Half kHalf>
cudaError_t launch(const CombineArgs& args, uint32_t staging_slab, cudaStream_t stream) {
  const auto kernel = args.expert_layout == 0 ? combine_kernel<Row, false, false, kHalf>
                      : args.weighted == 0    ? combine_kernel<Row, true, false, kHalf>
                                              : combine_kernel<Row, true, true, kHalf>;
  const int bytes = static_cast<int>(SharedLayout(args).bytes(args));
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const uint32_t threads = 32 * (args.tuning.send_warps + args.tuning.receive_warps);
  kernel<<<args.launch.num_local * args.launch.ctas, threads, bytes, stream>>>(args, staging_slab);
  return cudaGetLastError();
}

template <Half kHalf>
cudaError_t launch_for_type(const CombineArgs& args, uint32_t staging_slab, cudaStream_t stream) {
  switch (args.type) {
    case RowType::kF16:
      return launch<F16Row, kHalf>(args, staging_slab, stream);
    case RowType::kF32:
      return launch<F32Row, kHalf>(args, staging_slab, stream);
    case RowType::kF64:
      return launch<F64Row, kHalf>(args, staging_slab, stream);
    default:
      return launch<Bf16Row, kHalf>(args, staging_slab, stream);
  }
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, cudaStream_t stream) {
  return launch_for_type<Half::kBoth>(args, 0, stream);
}

cudaError_t launch_combine_pack(const CombineArgs& args, uint32_t staging_slab,
                                cudaStream_t stream) {
  return launch_for_type<Half::kPack>(args, staging_slab, stream);
}

cudaError_t launch_combine_reduce(const CombineArgs& args, cudaStream_t stream) {
  return launch_for_type<Half::kReduce>(args, 0, stream);
}

}  // namespace dualpipe
