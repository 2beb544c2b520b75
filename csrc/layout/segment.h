// How the copy-engine path cuts what one rank sends to another into parts, so that packing, copying
// and unpacking overlap. A segment of a slab holds max_tokens rows; it is cut into units of equal
// size, whatever it holds, and a part is a run of units. So sender and receiver cut alike even
// where only one of them knows how many rows there are.
#pragma once

#include <cstdint>

#include "layout/carver.h"

namespace dualpipe {

inline constexpr uint32_t kSegmentUnits = 8;

DUALPIPE_HD constexpr uint32_t unit_rows(uint32_t max_tokens) {
  return (max_tokens + kSegmentUnits - 1) / kSegmentUnits;
}

// Rows of a segment are in the order of the sender's tokens. The token that has the first row of
// unit `unit` of a segment with `rows` rows, as the route has noted it (of the first units, as many
// as have a row), or the end of the tokens: all rows before that unit are of tokens before this
// one, all others are not.
DUALPIPE_HD constexpr uint32_t unit_token(uint32_t unit, uint32_t max_tokens, uint32_t rows,
                                          const int32_t* noted, uint32_t pitch,
                                          uint32_t num_tokens) {
  return unit * unit_rows(max_tokens) < rows ? noted[unit * pitch] : num_tokens;
}

// Units [first, last) of every segment.
struct SegmentPart {
  uint32_t first, last;

  DUALPIPE_HD static constexpr SegmentPart whole() { return {0, kSegmentUnits}; }
  DUALPIPE_HD constexpr bool begins() const { return first == 0; }
  DUALPIPE_HD constexpr bool ends() const { return last == kSegmentUnits; }
  // Rows of a segment that holds `rows`.
  DUALPIPE_HD constexpr uint32_t first_row(uint32_t max_tokens, uint32_t rows) const {
    return row_of(first, max_tokens, rows);
  }
  DUALPIPE_HD constexpr uint32_t last_row(uint32_t max_tokens, uint32_t rows) const {
    return row_of(last, max_tokens, rows);
  }

 private:
  DUALPIPE_HD static constexpr uint32_t row_of(uint32_t unit, uint32_t max_tokens, uint32_t rows) {
    const uint32_t row = unit * unit_rows(max_tokens);
    return row < rows ? row : rows;
  }
};

// What one launch packs or takes in.
struct StagedPart {
  uint32_t staging_slab;
  SegmentPart part;
  // Peers get leave to write when the first part is packed, not before: so all ranks' copies, each
  // of which waits for the leave of all, begin at once.
  bool together = false;
};

// The parts of all segments of a transfer, equal on all ranks.
struct SegmentParts {
  uint32_t count;
  uint32_t ends[kSegmentUnits];  // of each part, in units; ascending, the last is kSegmentUnits

  // Parts that hold a row of a segment with `rows` rows; one if it has none.
  constexpr uint32_t used(uint32_t max_tokens, uint32_t rows) const {
    uint32_t used = 1;
    while (used < count && ends[used - 1] * unit_rows(max_tokens) < rows) ++used;
    return used;
  }
  // Part `index` if `used` are: the last of these stands for all that follow.
  constexpr SegmentPart at(uint32_t index, uint32_t used) const {
    return {index == 0 ? 0 : ends[index - 1], index + 1 == used ? kSegmentUnits : ends[index]};
  }
};

}  // namespace dualpipe
