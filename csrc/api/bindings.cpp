// The Python module dualpipe_ext._C. Addresses and streams are integers, sizes are in bytes unless
// they say otherwise: no type of torch appears here, so the module serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "api/bench_bindings.h"
#include "api/check.h"
#include "api/device.h"
#include "api/dlpack_bindings.h"
#include "api/ep_bindings.h"
#include "api/error_channel.h"
#include "api/planner.h"
#include "api/workspace.h"
#include "comm/barrier.h"
#include "comm/flag_wait.h"

namespace py = pybind11;

namespace dualpipe {
namespace {

py::dict to_dict(const ErrorRecord& record) {
  py::dict fields;
  fields["code"] = record.code;
  fields["phase"] = phase_name(static_cast<Phase>(record.phase));
  fields["rank"] = record.rank;
  fields["peer"] = record.peer;
  fields["chunk"] = record.chunk;
  fields["expected"] = record.expected;
  fields["seen"] = record.seen;
  fields["epoch"] = record.epoch;
  return fields;
}

// name -> (offset, bytes); those inside a slab count from the start of slab 0.
py::dict regions(const WorkspaceLayout& layout) {
  py::dict found;
  const auto add = [&](const char* name, uint64_t start, const auto& region) {
    found[name] = py::make_tuple(start + region.offset, region.bytes());
  };
  add("state", 0, layout.control.state);
  add("barrier_flags", 0, layout.control.barrier_flags);
  add("permits", 0, layout.control.permits);
  add("route_flags", 0, layout.control.route_flags);
  add("run_flags", 0, layout.control.run_flags);
  add("ids", 0, layout.ids);
  add("counts", 0, layout.counts);
  const uint64_t slab = layout.slab_offset(0);
  add("rows", slab, layout.slab.rows);
  add("scales", slab, layout.slab.scales);
  add("weights", slab, layout.slab.weights);
  return found;
}

void barrier(const PeerTable& peers, const WorkspaceLayout& layout, const ErrorChannel& channel,
             uint32_t first_rank, uint32_t num_local, uint64_t timeout_ns, uint64_t stream) {
  if (layout.control.barrier_flags.count != peers.num_ranks) {
    throw std::invalid_argument("expected a layout for " + std::to_string(peers.num_ranks) +
                                " ranks, got one for " +
                                std::to_string(layout.control.barrier_flags.count));
  }
  if (layout.bytes > peers.bytes) {
    throw std::invalid_argument("expected a layout of at most " + std::to_string(peers.bytes) +
                                " bytes, as the peer table has, got " +
                                std::to_string(layout.bytes));
  }
  if (num_local == 0 || num_local > peers.num_ranks || first_rank > peers.num_ranks - num_local) {
    throw std::invalid_argument("expected local ranks within 0.." +
                                std::to_string(peers.num_ranks - 1) + ", got " +
                                std::to_string(num_local) + " from " + std::to_string(first_rank));
  }
  if (num_local > channel.num_local()) {
    throw std::invalid_argument("expected an error record for each of " +
                                std::to_string(num_local) + " local ranks, got " +
                                std::to_string(channel.num_local()));
  }
  const BarrierArgs args{peers,      layout.control, channel.records(),
                         timeout_ns, first_rank,     num_local};
  check_cuda(launch_barrier(args, reinterpret_cast<cudaStream_t>(stream)), "barrier");
}

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

void flag_wait(const ErrorChannel& channel, uint64_t state, uint64_t flag, uint32_t expected,
               uint64_t word, uint32_t number, bool for_room, uint32_t rank, uint32_t peer,
               uint64_t timeout_ns, uint64_t stream) {
  const Phase phase = for_room ? Phase::kSendRoom : Phase::kSendPiece;
  const FlagWaitArgs args{pointer<ControlState>(state),
                          channel.records(),
                          pointer<const uint32_t>(flag),
                          pointer<uint32_t>(word),
                          expected,
                          number,
                          phase,
                          rank,
                          peer,
                          timeout_ns};
  check_cuda(launch_flag_wait(args, pointer<CUstream_st>(stream)), "flag_wait");
}

void bind_devices(py::module_& m) {
  py::class_<DeviceInfo>(m, "DeviceInfo")
      .def_readonly("index", &DeviceInfo::index)
      .def_readonly("name", &DeviceInfo::name)
      .def_readonly("pci_bus_id", &DeviceInfo::pci_bus_id)
      .def_property_readonly("capability",
                             [](const DeviceInfo& d) {
                               return py::make_tuple(d.capability_major, d.capability_minor);
                             })
      .def_readonly("num_sms", &DeviceInfo::num_sms)
      .def_readonly("memory_bytes", &DeviceInfo::memory_bytes)
      .def_readonly("shared_memory_bytes", &DeviceInfo::shared_memory_bytes)
      .def_readonly("l2_bytes", &DeviceInfo::l2_bytes);
  py::class_<PeerLink>(m, "PeerLink")
      .def_readonly("access", &PeerLink::access)
      .def_readonly("native_atomics", &PeerLink::native_atomics)
      .def_readonly("performance_rank", &PeerLink::performance_rank);
  m.def("driver_version", &driver_version);
  m.def("runtime_version", &runtime_version);
  m.def("devices", &devices);
  m.def("peer_link", &peer_link, py::arg("device"), py::arg("peer"));
  m.def("enable_peer_access", &enable_peer_access, py::arg("device"), py::arg("peer"));
  m.def("create_stream", &create_stream);
  m.def("copy", &copy, py::kw_only(), py::arg("to"), py::arg("source"), py::arg("bytes"),
        py::arg("stream"));
  m.def("destroy_stream", &destroy_stream, py::arg("stream"));
  m.def("capture_id", &capture_id, py::arg("stream"));
}

void bind_workspace(py::module_& m) {
  m.attr("MAX_RANKS") = kMaxRanks;
  py::class_<WorkspaceLayout>(m, "WorkspaceLayout")
      .def(py::init([](uint64_t num_ranks, uint64_t num_experts, uint64_t top_k,
                       uint64_t max_tokens, uint64_t row_bytes, uint64_t scale_bytes,
                       uint64_t weight_bytes, uint64_t num_slabs) {
             return checked_layout({num_ranks, num_experts, top_k, max_tokens, row_bytes,
                                    scale_bytes, weight_bytes, num_slabs});
           }),
           py::kw_only(), py::arg("num_ranks"), py::arg("num_experts"), py::arg("top_k"),
           py::arg("max_tokens"), py::arg("row_bytes"), py::arg("scale_bytes") = 0,
           py::arg("weight_bytes") = 4, py::arg("num_slabs") = 1)
      .def_readonly("bytes", &WorkspaceLayout::bytes)
      .def_property_readonly("control_bytes",
                             [](const WorkspaceLayout& l) { return l.control.bytes; })
      .def_property_readonly("slab_bytes", [](const WorkspaceLayout& l) { return l.slab.bytes; })
      .def_property_readonly("row_pitch", [](const WorkspaceLayout& l) { return l.slab.row_pitch; })
      .def_property_readonly("scale_pitch",
                             [](const WorkspaceLayout& l) { return l.slab.scale_pitch; })
      .def_property_readonly("weight_pitch",
                             [](const WorkspaceLayout& l) { return l.slab.weight_pitch; })
      .def_property_readonly("id_pitch", [](const WorkspaceLayout& l) { return l.id_pitch; })
      .def_property_readonly("max_runs", [](const WorkspaceLayout& l) { return l.control.runs; })
      .def("slab_offset", &WorkspaceLayout::slab_offset, py::arg("slab"))
      .def("regions", &regions);
  py::class_<PeerTable>(m, "PeerTable")
      .def(py::init(&checked_peer_table), py::arg("bases"), py::kw_only(), py::arg("bytes"))
      .def_readonly("num_ranks", &PeerTable::num_ranks);
}

void bind_comm(py::module_& m) {
  py::class_<ErrorChannel>(m, "ErrorChannel")
      .def(py::init<uint32_t>(), py::arg("num_local"))
      .def(
          "read",
          [](const ErrorChannel& channel, uint32_t index) -> py::object {
            const auto record = channel.read(index);
            return record ? py::object(to_dict(*record)) : py::none();
          },
          py::arg("index"))
      .def("clear", &ErrorChannel::clear);
  m.def("barrier", &barrier, py::arg("peers"), py::arg("layout"), py::arg("channel"), py::kw_only(),
        py::arg("first_rank"), py::arg("num_local"), py::arg("timeout_ns"), py::arg("stream"));
  m.def("flag_wait", &flag_wait, py::arg("channel"), py::kw_only(), py::arg("state"),
        py::arg("flag"), py::arg("expected"), py::arg("word"), py::arg("number"),
        py::arg("for_room"), py::arg("rank"), py::arg("peer"), py::arg("timeout_ns"),
        py::arg("stream"));
}

void bind_eplb(py::module_& m) {
  m.attr("MAX_PLANNER_EXPERTS") = kMaxPlannerExperts;
  m.attr("MAX_PLANNER_SLOTS") = kMaxPlannerSlots;
  m.attr("MAX_PLANNER_GPUS") = kMaxPlannerGpus;
  py::class_<PlannerSizes>(m, "PlannerSizes")
      .def(py::init([](uint32_t num_layers, uint32_t num_experts, uint32_t num_slots,
                       uint32_t num_groups, uint32_t num_nodes, uint32_t num_gpus) {
             const PlannerSizes sizes{num_layers, num_experts, num_slots,
                                      num_groups, num_nodes,   num_gpus};
             check_planner_sizes(sizes);
             return sizes;
           }),
           py::kw_only(), py::arg("num_layers"), py::arg("num_experts"), py::arg("num_slots"),
           py::arg("num_groups"), py::arg("num_nodes"), py::arg("num_gpus"));
  m.def(
      "plan_experts",
      [](const PlannerSizes& sizes, uint64_t loads, uint64_t phy2log, uint64_t replica,
         uint64_t log2phy, uint64_t logcnt, uint64_t status, uint32_t width, float max_load,
         float suspect_load, uint64_t stream) {
        plan_experts(
            {sizes, PlannerLayout{}, pointer<const float>(loads), max_load, suspect_load, width,
             pointer<int64_t>(phy2log), pointer<int64_t>(replica), pointer<int64_t>(log2phy),
             pointer<int64_t>(logcnt), pointer<int32_t>(status)},
            stream);
      },
      py::arg("sizes"), py::kw_only(), py::arg("loads"), py::arg("phy2log"), py::arg("replica"),
      py::arg("log2phy"), py::arg("logcnt"), py::arg("status"), py::arg("width"),
      py::arg("max_load"), py::arg("suspect_load"), py::arg("stream"));
}

}  // namespace
}  // namespace dualpipe

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA core of dualpipe_ext; use it through dualpipe_ext.core";
  dualpipe::bind_devices(m);
  dualpipe::bind_workspace(m);
  dualpipe::bind_comm(m);
  dualpipe::bind_dlpack(m);
  dualpipe::bind_ep(m);
  dualpipe::bind_eplb(m);
  dualpipe::bind_bench(m);
}
