#include "api/workspace.h"

#include <stdexcept>
#include <string>

#include "api/driver.h"

namespace dualpipe {
namespace {

void expect(bool condition, const std::string& expected, uint64_t got) {
  if (!condition) {
    throw std::invalid_argument("expected " + expected + ", got " + std::to_string(got));
  }
}

}  // namespace

WorkspaceLayout checked_layout(const WorkspaceShape& shape) {
  const std::string most = std::to_string(kMaxRanks);
  expect(shape.num_ranks >= 1 && shape.num_ranks <= kMaxRanks, "num_ranks from 1 to " + most,
         shape.num_ranks);
  expect(shape.num_experts >= 1 && shape.num_experts % shape.num_ranks == 0,
         "num_experts to be a multiple of num_ranks (" + std::to_string(shape.num_ranks) + ")",
         shape.num_experts);
  expect(shape.top_k >= 1 && shape.top_k <= 32, "top_k from 1 to 32", shape.top_k);
  expect(shape.max_tokens >= 1, "max_tokens of at least 1", shape.max_tokens);
  expect(shape.row_bytes >= 16 && shape.row_bytes % 16 == 0,
         "row_bytes to be a positive multiple of 16", shape.row_bytes);
  // Expert ids are exchanged as 16-bit numbers.
  expect(shape.num_experts <= INT16_MAX, "num_experts of at most 32767", shape.num_experts);
  expect(shape.weight_bytes == 4 || shape.weight_bytes == 8, "weight_bytes of 4 or 8",
         shape.weight_bytes);
  expect(shape.num_slabs >= 1, "num_slabs of at least 1", shape.num_slabs);
  const WorkspaceLayout layout = make_workspace_layout(shape);
  if (layout.bytes == 0) {
    throw std::invalid_argument(
        "expected a workspace of less than 2^63 bytes, got a shape that needs more (num_slabs " +
        std::to_string(shape.num_slabs) + ", max_tokens " + std::to_string(shape.max_tokens) +
        ", row_bytes " + std::to_string(shape.row_bytes) + ")");
  }
  return layout;
}

PeerTable checked_peer_table(const std::vector<uint64_t>& bases, uint64_t bytes) {
  expect(!bases.empty() && bases.size() <= kMaxRanks,
         "from 1 to " + std::to_string(kMaxRanks) + " base addresses", bases.size());
  PeerTable table;
  table.num_ranks = static_cast<uint32_t>(bases.size());
  table.bytes = bytes;
  for (size_t rank = 0; rank < bases.size(); ++rank) {
    const uint64_t base = bases[rank];
    const std::string of_rank = " for rank " + std::to_string(rank);
    expect(base != 0 && base % kRegionAlignment == 0,
           "a base address that is a multiple of " + std::to_string(kRegionAlignment) + of_rank,
           base);
    const AddressRange range = address_range(base);
    const uint64_t left = range.bytes - (base - range.start);
    expect(left >= bytes, "an allocation of at least " + std::to_string(bytes) + " bytes" + of_rank,
           left);
    table.base[rank] = reinterpret_cast<uint8_t*>(base);
  }
  return table;
}

}  // namespace dualpipe
