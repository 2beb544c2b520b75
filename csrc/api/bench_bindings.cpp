// Python's view of the kernels that only benchmarks use. Addresses are integers.
#include "api/bench_bindings.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "api/check.h"
#include "bench/push.h"

namespace py = pybind11;

namespace dualpipe {
namespace {

void expect(bool condition, const std::string& expected, uint64_t got) {
  if (!condition) {
    throw std::invalid_argument("expected " + expected + ", got " + std::to_string(got));
  }
}

PushLayout push_layout(uint64_t num_rows, uint64_t row_bytes) {
  // Places are 32-bit numbers.
  expect(num_rows >= 1 && num_rows <= INT32_MAX, "num_rows from 1 to 2^31 - 1", num_rows);
  expect(row_bytes >= 16 && row_bytes % 16 == 0 && row_bytes <= INT32_MAX,
         "row_bytes to be a positive multiple of 16 below 2^31", row_bytes);
  return make_push_layout(num_rows, row_bytes);
}

PushArgs push_args(const PeerTable& peers, const PushLayout& layout, uint32_t rank, uint64_t x,
                   uint32_t num_tokens, uint64_t slots, uint32_t ctas, uint32_t warps,
                   uint32_t piece_bytes) {
  expect(layout.bytes <= peers.bytes,
         "a layout of at most " + std::to_string(peers.bytes) + " bytes, as the peer table has",
         layout.bytes);
  expect(rank < peers.num_ranks, "a rank below " + std::to_string(peers.num_ranks), rank);
  expect(x % 16 == 0, "rows on a multiple of 16 bytes", x);
  expect(ctas != 0, "at least one SM", ctas);
  expect(warps >= 1 && warps <= kPushThreads / 32,
         "warps from 1 to " + std::to_string(kPushThreads / 32), warps);
  expect(piece_bytes >= 16 && piece_bytes % 16 == 0, "piece_bytes to be a positive multiple of 16",
         piece_bytes);
  const uint32_t stages = push_stages(warps, piece_bytes, peers.num_ranks);
  expect(stages >= 2, "pieces of which two stages for every warp fit the shared memory",
         piece_bytes);
  return {peers,
          layout,
          rank,
          num_tokens,
          ctas,
          warps,
          stages,
          piece_bytes,
          reinterpret_cast<const uint8_t*>(x),
          reinterpret_cast<const int32_t*>(slots)};
}

void push(const PushArgs& args, uint64_t stream) {
  check_cuda(launch_push(args, reinterpret_cast<cudaStream_t>(stream)), "push");
}

}  // namespace

void bind_bench(py::module_& m) {
  py::class_<PushLayout>(m, "PushLayout")
      .def(py::init(&push_layout), py::kw_only(), py::arg("num_rows"), py::arg("row_bytes"))
      .def_readonly("bytes", &PushLayout::bytes)
      .def_readonly("num_rows", &PushLayout::num_rows)
      .def_readonly("row_bytes", &PushLayout::row_bytes)
      .def_readonly("row_pitch", &PushLayout::row_pitch)
      .def_property_readonly("rows_offset", [](const PushLayout& l) { return l.rows.offset; });
  py::class_<PushArgs>(m, "PushArgs")
      .def(py::init(&push_args), py::arg("peers"), py::arg("layout"), py::kw_only(),
           py::arg("rank"), py::arg("x"), py::arg("num_tokens"), py::arg("slots"), py::arg("ctas"),
           py::arg("warps"), py::arg("piece_bytes"))
      .def_readonly("stages", &PushArgs::stages);
  m.def("push_stages", &push_stages, py::kw_only(), py::arg("warps"), py::arg("piece_bytes"),
        py::arg("num_ranks"));
  m.def("push", &push, py::arg("args"), py::arg("stream"));
}

}  // namespace dualpipe
