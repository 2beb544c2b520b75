// comm/: epochs that wrap, and what crosses to the host.
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "check.h"
#include "comm/epoch.h"
#include "comm/error_record.h"
#include "comm/peer_table.h"

using namespace dualpipe;

namespace {

void epochs_compare_across_the_wrap() {
  const uint32_t far = (uint32_t{1} << 31) - 1;
  for (const uint32_t expected : {0u, 1u, 77u, 0x7fffffffu, 0x80000000u, UINT32_MAX}) {
    CHECK(epoch_reached(expected, expected));
    CHECK(epoch_reached(expected + 1, expected));
    CHECK(epoch_reached(expected + far, expected));
    CHECK(!epoch_reached(expected - 1, expected));
    CHECK(!epoch_reached(expected - far, expected));
  }
}

void phases_have_names() {
  CHECK(std::strcmp(phase_name(Phase::kBarrier), "barrier") == 0);
  CHECK(std::strcmp(phase_name(Phase::kRoute), "route") == 0);
  CHECK(std::strcmp(phase_name(Phase::kDispatchPermit), "dispatch (permission)") == 0);
  CHECK(std::strcmp(phase_name(Phase::kCombineRows), "combine (rows)") == 0);
  CHECK(std::strcmp(phase_name(Phase::kSendRoom), "send (room)") == 0);
  CHECK(std::strcmp(phase_name(Phase::kSendPiece), "send (piece)") == 0);
  CHECK(std::strcmp(phase_name(static_cast<Phase>(999)), "unknown") == 0);
}

void an_empty_peer_table_names_nobody() {
  const PeerTable table;
  CHECK(table.num_ranks == 0 && table.base[kMaxRanks - 1] == nullptr);
}

}  // namespace

int main() {
  epochs_compare_across_the_wrap();
  phases_have_names();
  an_empty_peer_table_names_nobody();
}
