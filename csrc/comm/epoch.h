// Epochs: flags that only ever grow, so nothing is cleared between calls and a late writer cannot
// be taken for an early one.
#pragma once

#include <cstdint>

#include "layout/carver.h"

namespace dualpipe {

// Whether a flag that reads `seen` has come to `expected`. Counters wrap after 2^32 calls, so the
// difference is compared; two sides that are less than 2^31 apart are told apart correctly.
DUALPIPE_HD constexpr bool epoch_reached(uint32_t seen, uint32_t expected) {
  return static_cast<int32_t>(seen - expected) >= 0;
}

static_assert(epoch_reached(5, 5) && epoch_reached(6, 5) && !epoch_reached(4, 5));
static_assert(epoch_reached(0, UINT32_MAX) && !epoch_reached(UINT32_MAX, 0));

}  // namespace dualpipe
