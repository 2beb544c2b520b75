// layout/segment.h: parts cover every segment, and a launch of a part finds all it needs done by
// those before it.
#include "layout/segment.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"

using namespace dualpipe;

namespace {

constexpr SegmentParts kParts[] = {
    {1, {8}}, {2, {4, 8}}, {3, {2, 5, 8}}, {8, {1, 2, 3, 4, 5, 6, 7, 8}}};

// 4096 rows in parts of 2, 3 and 3 units of 512; of 1100 rows the second part is the last.
static_assert(unit_rows(4096) == 512 && unit_rows(1) == 1 && unit_rows(9) == 2);
static_assert(kParts[2].used(4096, 0) == 1 && kParts[2].used(4096, 1024) == 1);
static_assert(kParts[2].used(4096, 1025) == 2 && kParts[2].used(4096, 4096) == 3);
static_assert(kParts[2].at(1, 3).first == 2 && kParts[2].at(1, 3).last == 5);
static_assert(kParts[2].at(1, 2).first == 2 && kParts[2].at(1, 2).ends());
static_assert(kParts[2].at(1, 3).first_row(4096, 1100) == 1024);
static_assert(kParts[2].at(1, 3).last_row(4096, 1100) == 1100);

// Every row is in one part of those that are used, and every one of these but the first has a row.
void parts_cover_every_segment() {
  for (const SegmentParts& parts : kParts) {
    for (uint32_t max_tokens : {1u, 3u, 8u, 13u, 64u, 150u}) {
      for (uint32_t rows = 0; rows <= max_tokens; ++rows) {
        const uint32_t used = parts.used(max_tokens, rows);
        uint32_t next = 0;
        for (uint32_t i = 0; i < used; ++i) {
          const SegmentPart part = parts.at(i, used);
          CHECK(part.begins() == (i == 0) && part.ends() == (i + 1 == used));
          CHECK(part.first_row(max_tokens, rows) == next);
          next = part.last_row(max_tokens, rows);
          CHECK(i == 0 || next > part.first_row(max_tokens, rows));
        }
        CHECK(next == rows);
      }
    }
  }
}

// Rows of a rank's tokens at its peers, -1 for none, and what the route notes of them.
struct Route {
  uint32_t max_tokens, num_tokens, peers;
  std::vector<int32_t> slots, noted;
  std::vector<uint32_t> rows;

  Route(std::mt19937& random, uint32_t most, uint32_t peers)
      : max_tokens(most),
        num_tokens(random() % (most + 1)),
        peers(peers),
        noted(kSegmentUnits * peers, -1),
        rows(peers) {
    for (uint32_t t = 0; t < num_tokens; ++t) {
      for (uint32_t p = 0; p < peers; ++p) {
        // Some peers get nearly all, some few, some none.
        const bool goes = random() % 8 < (p * 5 + most) % 9;
        slots.push_back(goes ? static_cast<int32_t>(rows[p]) : -1);
        if (goes && rows[p] % unit_rows(most) == 0)
          noted[rows[p] / unit_rows(most) * peers + p] = t;
        rows[p] += goes;
      }
    }
  }

  uint32_t token(uint32_t unit, uint32_t peer) const {
    return unit_token(unit, max_tokens, rows[peer], noted.data() + peer, peers, num_tokens);
  }
  // As Transfer does, without lanes.
  uint32_t tokens_for_units(uint32_t unit) const {
    if (unit == kSegmentUnits) return num_tokens;
    uint32_t end = 0;
    for (uint32_t p = 0; unit != 0 && p < peers; ++p) {
      if (rows[p] != 0) end = std::max(end, token(unit, p));
    }
    return end;
  }
  uint32_t tokens_of_units(uint32_t unit) const {
    if (unit == 0) return 0;
    uint32_t end = num_tokens;
    for (uint32_t p = 0; p < peers; ++p) end = std::min(end, token(unit, p));
    return end;
  }
};

// What a part's copies carry has been packed by then, and each token once; what a part's sums need
// has come by then, and each token is summed once. Senders may stop early, receivers too.
void launches_find_what_they_need() {
  std::mt19937 random(7);
  for (int trial = 0; trial < 2000; ++trial) {
    const Route route(random, 1 + random() % 70, 1 + random() % 5);
    for (const SegmentParts& parts : kParts) {
      uint32_t least = 0;
      for (uint32_t rows : route.rows) least = std::max(least, parts.used(route.max_tokens, rows));
      for (uint32_t used = least; used <= parts.count; ++used) {
        uint32_t packed = 0, summed = 0;
        for (uint32_t i = 0; i < used; ++i) {
          const SegmentPart part = parts.at(i, used);
          CHECK(route.tokens_for_units(part.first) == packed);
          CHECK(route.tokens_of_units(part.first) == summed);
          packed = route.tokens_for_units(part.last);
          summed = route.tokens_of_units(part.last);
          for (uint32_t t = 0; t < route.num_tokens; ++t) {
            for (uint32_t p = 0; p < route.peers; ++p) {
              const int32_t row = route.slots[t * route.peers + p];
              const auto last = part.last_row(route.max_tokens, route.rows[p]);
              if (row < 0) continue;
              CHECK(uint32_t(row) >= last || t < packed);
              CHECK(t >= summed || uint32_t(row) < last);
            }
          }
        }
        CHECK(packed == route.num_tokens && summed == route.num_tokens);
      }
    }
  }
}

}  // namespace

int main() {
  parts_cover_every_segment();
  launches_find_what_they_need();
}
