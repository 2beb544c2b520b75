// Stands for the kernels and the CUDA runtime behind the bindings in csrc/api: launches write down
// what they are given and do nothing, but a route answers that it sends every token everywhere, and
// a plain push copies the rows of ranks that are all in this process. With it
// the bindings are a Python module that runs without a GPU: for tests of what kernels are given,
// and for measuring what a call costs the host.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "api/driver.h"
#include "bench/push.h"
#include "comm/barrier.h"
#include "ep/combine.h"
#include "ep/copy_engine.h"
#include "ep/dispatch.h"
#include "ep/low_latency.h"
#include "ep/route.h"
#include "eplb/planner.h"

namespace py = pybind11;

namespace {

struct Launch {
  std::string kernel;
  uint64_t stream;
  std::vector<char> args;
};

// The last launch of every kernel; kept only on demand, since benchmarks must not pay for it.
bool keep_launches = false;
// What routes report: an answer or none, and whether something is wrong with the call.
bool answers = true, faulty = false;
std::vector<Launch> launches;

template <class Args>
cudaError_t noted(const char* kernel, const Args& args, cudaStream_t stream) {
  if (keep_launches) {
    const auto* bytes = reinterpret_cast<const char*>(&args);
    launches.push_back({kernel, reinterpret_cast<uint64_t>(stream), {bytes, bytes + sizeof(args)}});
  }
  return cudaSuccess;
}

template <class T>
uint64_t number(const T* pointer) {
  return reinterpret_cast<uint64_t>(pointer);
}

py::dict launch_fields(const Launch& launch) {
  py::dict d;
  d["kernel"] = launch.kernel;
  d["stream"] = launch.stream;
  return d;
}

py::dict launch_fields(const Launch& launch, const dualpipe::LaunchArgs& args) {
  py::dict d = launch_fields(launch);
  d["num_local"] = args.num_local;
  d["ctas"] = args.ctas;
  return d;
}

void add_tuning(py::dict& d, const dualpipe::Tuning& t) {
  d["tuning"] = py::make_tuple(t.send_ctas, t.send_warps, t.send_stages, t.own_warps, t.own_stages,
                               t.receive_warps, t.receive_stages, t.send_piece, t.receive_piece,
                               t.mixed != 0);
}

template <class Args>
Args args_of(const Launch& launch) {
  Args args;
  std::memcpy(&args, launch.args.data(), sizeof(args));
  return args;
}

py::dict describe_route(const Launch& launch) {
  const auto args = args_of<dualpipe::RouteArgs>(launch);
  py::dict d = launch_fields(launch, args.launch);
  const auto& c = args.calls[0];
  d["rank"] = c.rank;
  d["num_tokens"] = c.num_tokens;
  d["expert_layout"] = c.expert_layout;
  d["alignment"] = c.alignment;
  d["max_rows"] = c.max_rows;
  d["zero_copy"] = c.zero_copy;
  d["delay_ns"] = c.delay_ns;
  d["topk_idx"] = number(c.topk_idx);
  d["slots"] = number(c.slots);
  d["ids"] = number(c.ids);
  d["matrix"] = number(c.matrix);
  d["run_starts"] = number(c.run_starts);
  d["unit_tokens"] = number(c.unit_tokens);
  d["topk_local"] = number(c.topk_local);
  d["positions"] = number(c.positions);
  d["counts"] = number(c.counts);
  d["offsets"] = number(c.offsets);
  d["num_rows"] = c.num_rows;
  return d;
}

py::dict describe_dispatch(const Launch& launch) {
  const auto args = args_of<dualpipe::DispatchArgs>(launch);
  py::dict d = launch_fields(launch, args.launch);
  d["payload"] = static_cast<uint32_t>(args.payload);
  d["in_bytes"] = args.in_bytes;
  d["out_bytes"] = args.out_bytes;
  d["num_scales"] = args.num_scales;
  d["weight_bytes"] = args.weight_bytes;
  add_tuning(d, args.tuning);
  const auto& c = args.calls[0];
  d["rank"] = c.rank;
  d["num_tokens"] = c.num_tokens;
  d["slab"] = c.slab;
  d["keep_in_slab"] = c.keep_in_slab;
  d["expert_layout"] = c.expert_layout;
  d["send_delay_ns"] = c.send_delay_ns;
  d["receive_delay_ns"] = c.receive_delay_ns;
  d["x"] = number(c.x);
  d["x_scales"] = number(c.x_scales);
  d["weights"] = number(c.weights);
  d["slots"] = number(c.slots);
  d["ids"] = number(c.ids);
  d["matrix"] = number(c.matrix);
  d["run_starts"] = number(c.run_starts);
  d["unit_tokens"] = number(c.unit_tokens);
  d["topk_local"] = number(c.topk_local);
  d["positions"] = number(c.positions);
  d["counts"] = number(c.counts);
  d["offsets"] = number(c.offsets);
  d["out_rows"] = number(c.out_rows);
  d["out_scales"] = number(c.out_scales);
  d["out_weights"] = number(c.out_weights);
  d["num_rows"] = c.num_rows;
  d["out_pitch"] = c.out_pitch;
  d["out_scale_pitch"] = c.out_scale_pitch;
  return d;
}

py::dict describe_combine(const Launch& launch) {
  const auto args = args_of<dualpipe::CombineArgs>(launch);
  py::dict d = launch_fields(launch, args.launch);
  d["type"] = static_cast<uint32_t>(args.type);
  d["weighted"] = args.weighted;
  d["row_bytes"] = args.row_bytes;
  d["weight_bytes"] = args.weight_bytes;
  add_tuning(d, args.tuning);
  const auto& c = args.calls[0];
  d["rank"] = c.rank;
  d["num_tokens"] = c.num_tokens;
  d["expert_layout"] = args.expert_layout;
  d["send_delay_ns"] = c.send_delay_ns;
  d["receive_delay_ns"] = c.receive_delay_ns;
  d["rows"] = number(c.rows);
  d["num_rows"] = c.num_rows;
  d["weights"] = reinterpret_cast<uint64_t>(c.weights);
  d["bias"] = number(c.bias);
  d["row_weights"] = number(c.row_weights);
  d["slots"] = number(c.slots);
  d["ids"] = number(c.ids);
  d["matrix"] = number(c.matrix);
  d["unit_tokens"] = number(c.unit_tokens);
  d["positions"] = number(c.positions);
  d["y"] = number(c.y);
  d["token_weights"] = number(c.token_weights);
  return d;
}

py::dict describe_push(const Launch& launch) {
  const auto args = args_of<dualpipe::PushArgs>(launch);
  py::dict d = launch_fields(launch);
  d["rank"] = args.rank;
  d["num_tokens"] = args.num_tokens;
  d["ctas"] = args.ctas;
  d["warps"] = args.warps;
  d["stages"] = args.stages;
  d["piece_bytes"] = args.piece_bytes;
  return d;
}

py::list take_launches() {
  py::list found;
  for (const Launch& launch : launches) {
    if (launch.kernel == "route") {
      found.append(describe_route(launch));
    } else if (launch.kernel.find("dispatch") != std::string::npos) {
      found.append(describe_dispatch(launch));
    } else if (launch.kernel.find("combine") != std::string::npos) {
      found.append(describe_combine(launch));
    } else if (launch.kernel == "push") {
      found.append(describe_push(launch));
    }
  }
  launches.clear();
  return found;
}

}  // namespace

namespace dualpipe {

cudaError_t launch_barrier(const BarrierArgs&, cudaStream_t) { return cudaSuccess; }
cudaError_t launch_planner(const PlannerArgs&, cudaStream_t) { return cudaSuccess; }

CopyLanes::~CopyLanes() = default;
cudaError_t CopyLanes::open(uint32_t num_ranks) {
  lanes_.resize(num_ranks);
  return cudaSuccess;
}

cudaError_t launch_route(const RouteArgs& args, cudaStream_t stream) {
  const auto num_ranks = static_cast<uint32_t>(args.launch.layout.shape.num_ranks);
  for (uint32_t i = 0; i < args.launch.num_local; ++i) {
    const RouteCall& call = args.calls[i];
    for (uint32_t j = 0; j < num_ranks * num_ranks; ++j) {
      call.report->matrix[j] = static_cast<int32_t>(call.num_tokens);
    }
    call.report->num_rows = int64_t{num_ranks} * call.num_tokens;
    const uint32_t epoch =
        ++args.launch.layout.control.state.in(args.launch.peers.base[call.rank])->route_epoch;
    if (faulty && call.report->fault == 0) {
      call.report->fault_limit = call.max_rows;
      call.report->fault_count = 1000;
      call.report->fault_epoch = epoch;
      call.report->fault = static_cast<uint32_t>(RouteFault::kOverflow);
    }
    if (answers) __atomic_store_n(&call.report->ready, 1u, __ATOMIC_RELEASE);
  }
  return noted("route", args, stream);
}

cudaError_t launch_dispatch(const DispatchArgs& args, cudaStream_t stream) {
  return noted("dispatch", args, stream);
}
cudaError_t carry_dispatch(const CopyLanes&, DispatchArgs args, const std::vector<CopyCall>&,
                           const CopyShape&, cudaStream_t stream) {
  return noted("dispatch", args, stream);
}
cudaError_t launch_combine(const CombineArgs& args, cudaStream_t stream) {
  return noted("combine", args, stream);
}
cudaError_t launch_low_latency_dispatch(const DispatchArgs& args, cudaStream_t stream) {
  return noted("low_latency_dispatch", args, stream);
}
cudaError_t launch_low_latency_combine(const CombineArgs& args, cudaStream_t stream) {
  return noted("low_latency_combine", args, stream);
}
cudaError_t carry_combine(const CopyLanes&, CombineArgs args, const std::vector<CopyCall>&,
                          const CopyShape&, bool, cudaStream_t stream) {
  return noted("combine", args, stream);
}

cudaError_t launch_push(const PushArgs& args, cudaStream_t stream) {
  const uint64_t pitch = args.layout.row_pitch;
  for (uint64_t token = 0; token < args.num_tokens; ++token) {
    for (uint32_t to = 0; to < args.peers.num_ranks; ++to) {
      const int32_t slot = args.slots[token * args.peers.num_ranks + to];
      if (to == args.rank || slot < 0) continue;
      std::memcpy(args.layout.rows.in(args.peers.base[to]) + slot * pitch, args.x + token * pitch,
                  args.layout.row_bytes);
    }
  }
  return noted("push", args, stream);
}

AddressRange address_range(uint64_t) { return {}; }

}  // namespace dualpipe

// A second module in the file of `_C`.
PYBIND11_MODULE(host_core, m) {
  m.def("keep_launches", [](bool keep) { keep_launches = keep; });
  m.def("take_launches", &take_launches);
  m.def(
      "set_reports",
      [](bool answer, bool fault) {
        answers = answer;
        faulty = fault;
      },
      py::arg("answers"), py::arg("faulty"));
}

// The few functions of the runtime that the bindings call themselves.
extern "C" {

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::calloc(1, bytes);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no CUDA here"; }
}
