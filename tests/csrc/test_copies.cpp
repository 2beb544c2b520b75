// ep/copy_engine.cpp: whatever runs first of what it enqueues, rows come to their place.
#include "copies.h"

namespace {

// Several rounds enqueued before anything runs.
void rounds_in_a_row() {
  const uint32_t ranks = 1 + draw(4), most = 8 + draw(40);
  Group group(ranks, draw(2) != 0 ? 1 : ranks, most);
  std::vector<std::unique_ptr<Round>> rounds(1 + draw(4));
  for (auto& round : rounds) {
    round = std::make_unique<Round>(ranks, most);
    group.enqueue(*round);
  }
  CHECK(group.run());
  for (const auto& round : rounds) {
    for (const Round::Rows& of : {round->rows, round->numbers}) {
      CHECK(of.out == of.want);
      CHECK(of.y == of.want_y);
    }
  }
}

// In turn, rows go from rank r to r + 1, r + 2, ..., part by part, and nothing else is on that
// stream; no rank begins before all have packed.
void turns_are_fixed() {
  const uint32_t ranks = 3 + draw(3), most = 8 + draw(40);
  Group group(ranks, ranks, most);
  Round round(ranks, most);
  round.known = round.direct = false;  // so all parts are copied, there and back
  round.in_turn = round.together = true;
  enqueued_copies.clear();
  group.enqueue(round);
  for (uint32_t r = 0; r < ranks; ++r) {
    uint32_t turn = 0;
    for (const Copy& copy : enqueued_copies) {
      if (copy.stream != group.lanes[r].turns()) continue;
      CHECK(group.rank_of(copy.to) == (r + 1 + turn % (ranks - 1)) % ranks);
      ++turn;
    }
    CHECK(turn == 2 * (ranks - 1) * round.parts.used(most, most));
  }
  // Rank 0 packs, and gets no further.
  CHECK(group.streams[0].operations.front()());
  group.streams[0].operations.pop_front();
  std::vector<size_t> before;
  for (const CopyLanes& each : group.lanes) before.push_back(each.turns()->operations.size());
  CHECK(!group.run(1));
  for (uint32_t r = 0; r < ranks; ++r) {
    CHECK(group.lanes[r].turns()->operations.size() == before[r]);
  }
  CHECK(group.run());
}

}  // namespace

int main() {
  for (int i = 0; i < 600; ++i) rounds_in_a_row();
  for (int i = 0; i < 50; ++i) turns_are_fixed();
}
