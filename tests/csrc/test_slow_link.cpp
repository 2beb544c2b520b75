// ep/copy_engine.cpp with a link that is made slower for measurements: what is copied again, where
// to, and who waits for it.
#include <map>

#include "copies.h"

namespace {

// Of the copies that have been enqueued on that stream: how many, and how many bytes, to or besides
// that place.
struct Found {
  size_t copies = 0;
  uint64_t bytes = 0;
};
Found found_on(cudaStream_t stream, const void* place, bool there) {
  Found found;
  for (const Copy& copy : enqueued_copies) {
    if (copy.stream != stream || (copy.to == place) != there) continue;
    ++found.copies;
    found.bytes += copy.bytes;
  }
  return found;
}

// With `host`, what is copied again goes there.
void slow_down(Group& group, double repeats, std::vector<uint8_t>* host) {
  for (CopyLanes& each : group.lanes) {
    each.repeats = repeats;
    each.detour = host == nullptr ? nullptr : host->data();
    each.detour_bytes = host == nullptr ? 0 : host->size();
  }
}

// A slower link takes longer for rows, here or on their way aside: numbers and flags are copied
// once.
void rows_are_repeated() {
  const uint32_t ranks = 2 + draw(3), most = 8 + draw(40);
  Group group(ranks, ranks, most);
  std::vector<uint8_t> host(1 + draw(500));
  std::vector<Found> link, aside;
  std::vector<size_t> others;
  struct Slower {
    double repeats;
    bool detour;
  };
  for (const Slower slower : {Slower{1.0, false}, Slower{2.5, false}, Slower{3.0, true}}) {
    Round round(ranks, most);
    round.known = round.direct = false;  // so all parts are copied, there and back
    round.in_turn = true;                // rows on a stream of their own
    round.parts = kParts[0];
    slow_down(group, slower.repeats, slower.detour ? &host : nullptr);
    enqueued_copies.clear();
    group.enqueue(round);
    link.push_back(found_on(group.lanes[0].turns(), host.data(), false));
    aside.push_back(found_on(group.lanes[0].turns(), host.data(), true));
    size_t rows = 0;
    for (const CopyLanes& each : group.lanes) {
      for (const bool there : {false, true}) {
        rows += found_on(each.turns(), host.data(), there).copies;
      }
    }
    others.push_back(enqueued_copies.size() - rows);
    CHECK(group.run());
    CHECK(round.rows.out == round.rows.want && round.numbers.out == round.numbers.want);
    CHECK(round.rows.y == round.rows.want_y && round.numbers.y == round.numbers.want_y);
  }
  CHECK(link[1].copies == 3 * link[0].copies && aside[1].copies == 0);
  CHECK(link[2].copies == link[0].copies && aside[2].bytes == 2 * link[2].bytes);
  CHECK(others[1] == others[0] && others[2] == others[0]);
}

// On the stream of a peer, the flag is behind what went aside, too: or its receiver would not wait
// for a slower link.
void flags_wait_for_what_goes_aside() {
  const uint32_t ranks = 2 + draw(3), most = 8 + draw(40);
  Group group(ranks, ranks, most);
  std::vector<uint8_t> host(1 + draw(500));
  slow_down(group, 2.0, &host);
  Round round(ranks, most);
  round.known = round.direct = round.in_turn = false;
  enqueued_copies.clear();
  group.enqueue(round);
  CHECK(!enqueued_copies.empty());
  std::map<cudaStream_t, const void*> last;
  size_t aside = 0;
  for (const Copy& copy : enqueued_copies) {
    last[copy.stream] = copy.to;
    aside += copy.to == host.data();
  }
  CHECK(aside > 0);
  for (const auto& [stream, to] : last) CHECK(to != host.data());
  CHECK(group.run());
}

}  // namespace

int main() {
  for (int i = 0; i < 20; ++i) rows_are_repeated();
  for (int i = 0; i < 20; ++i) flags_wait_for_what_goes_aside();
}
