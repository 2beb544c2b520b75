// layout/workspace.h and layout/handle_arrays.h: what is where, and that nothing overlaps.
#include "layout/workspace.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "layout/handle_arrays.h"

using namespace dualpipe;

namespace {

// 8 ranks, 256 experts, top-8, 4096 tokens of 7168 bfloat16 values.
constexpr WorkspaceShape kShape{8, 256, 8, 4096, 14336, 0, 4, 2};
constexpr WorkspaceLayout kLayout = make_workspace_layout(kShape);

static_assert(kLayout.slab.row_pitch == 14336);
static_assert(kLayout.slab.rows.bytes() == uint64_t{8} * 4096 * 14336);
static_assert(kLayout.slab.scales.bytes() == 0);
static_assert(kLayout.slab.weights.bytes() == 8 * 4096 * 8 * 4);
// Twice, by turns; every part of every rank has its tokens for each rank and for each expert.
static_assert(kLayout.counts.count == 2 * 8 * kMostRouteParts * (RouteCounts::kHeader + 8 + 256));
static_assert(kLayout.ids.count == 2 * 8 * 4096 * 8);

struct Span {
  uint64_t begin, end;
};

template <class T>
Span span(uint64_t start, const Region<T>& region) {
  return {start + region.offset, start + region.offset + region.bytes()};
}

std::vector<Span> spans(const WorkspaceLayout& layout, uint64_t num_slabs) {
  std::vector<Span> all = {span(0, layout.control.state),
                           span(0, layout.control.barrier_flags),
                           span(0, layout.control.permits),
                           span(0, layout.control.route_flags),
                           span(0, layout.control.run_flags),
                           span(0, layout.ids),
                           span(0, layout.counts)};
  for (uint64_t i = 0; i < num_slabs; ++i) {
    const uint64_t slab = layout.slab_offset(i);
    all.push_back(span(slab, layout.slab.rows));
    all.push_back(span(slab, layout.slab.scales));
    all.push_back(span(slab, layout.slab.weights));
  }
  return all;
}

void regions_are_aligned_inside_and_disjoint() {
  for (const WorkspaceShape& shape : {kShape, WorkspaceShape{1, 1, 1, 1, 16, 0, 4, 1},
                                      WorkspaceShape{7, 14, 3, 13, 7168, 224, 8, 3}}) {
    const WorkspaceLayout layout = make_workspace_layout(shape);
    std::vector<Span> all = spans(layout, shape.num_slabs);
    std::sort(all.begin(), all.end(), [](const Span& a, const Span& b) {
      return a.begin < b.begin || (a.begin == b.begin && a.end < b.end);
    });
    uint64_t end = 0;
    for (const Span& region : all) {
      CHECK(region.begin % kRegionAlignment == 0);
      CHECK(region.begin >= end);
      end = region.end;
    }
    CHECK(end <= layout.bytes);
    CHECK(layout.bytes - end < kRegionAlignment);
  }
}

void pitches_are_padded() {
  const WorkspaceLayout layout = make_workspace_layout({2, 2, 1, 3, 7184, 225, 4, 1});
  CHECK(layout.slab.row_pitch == 7296);   // 57 lines
  CHECK(layout.slab.scale_pitch == 240);  // 15 times 16 bytes
  CHECK(layout.slab.weight_pitch == 16);
  CHECK(layout.id_pitch == 8);
  CHECK(layout.slab.rows.bytes() == 2 * 3 * 7296);
}

void more_than_4_gib_keeps_all_bits() {
  const WorkspaceLayout layout = make_workspace_layout({64, 256, 8, 65536, 14336, 0, 4, 1});
  CHECK(layout.slab.rows.bytes() == 60129542144u);
  CHECK(layout.slab.weights.offset == 60129542144u);
}

// Sender and receiver cut a rank's tokens alike, and there is a flag for every run.
void runs_and_parts_cover_all_tokens() {
  for (const uint32_t tokens : {0u, 1u, 3u, 128u, 1024u, 1025u, 4096u, 100003u}) {
    CHECK(ceil_div(tokens, run_tokens(tokens)) <= max_runs(tokens < 1 ? 1 : tokens));
    for (const uint32_t parts : {1u, 3u, kMostRouteParts}) {
      CHECK(part_tokens(tokens, parts) * parts >= tokens);
      CHECK(part_tokens(tokens, parts) % kRunTokens == 0);
    }
  }
  // Fewer tokens than there is room for never make more runs.
  CHECK(max_runs(4096) >= 1024);
  CHECK(route_parts(1) == 1 && route_parts(512) == 1 && route_parts(513) == 2);
  CHECK(route_parts(4096) == kMostRouteParts && route_parts(1u << 31) == kMostRouteParts);
}

void arrays_of_a_handle_follow_each_other() {
  for (const uint64_t tokens : {uint64_t{0}, uint64_t{13}, uint64_t{4096}}) {
    for (const bool expert : {false, true}) {
      const HandleLayout handle = make_handle_layout(kLayout, tokens, expert, expert);
      CHECK(handle.slots.count == tokens * 8);
      CHECK(handle.ids.count == tokens * kLayout.id_pitch);
      CHECK(handle.matrix.count == 9 * 8);
      CHECK(handle.run_starts.count == 8 * (kLayout.control.runs + 1));
      CHECK(handle.unit_tokens.count == (expert ? kSegmentUnits * 8 : 0));
      CHECK(handle.positions.count == (expert ? 8 * 4096 * 8 : 0));
      uint64_t end = 0;
      for (const Span& region :
           {span(0, handle.slots), span(0, handle.ids), span(0, handle.matrix),
            span(0, handle.run_starts), span(0, handle.unit_tokens), span(0, handle.positions)}) {
        if (region.begin == region.end) continue;
        CHECK(region.begin % kRegionAlignment == 0);
        CHECK(region.begin >= end);
        end = region.end;
      }
      CHECK(end <= handle.bytes);
      CHECK(handle.bytes % kRegionAlignment == 0);
    }
  }
  CHECK(make_handle_layout(kLayout, UINT64_MAX / 2, false, false).bytes == 0);
}

void shapes_beyond_63_bits_have_no_layout() {
  const uint64_t huge = uint64_t{1} << 60;
  CHECK(make_workspace_layout({8, 8, 8, huge, 14336, 0, 4, 1}).bytes == 0);
  CHECK(make_workspace_layout({8, 8, 8, 1, UINT64_MAX - 5, 0, 4, 1}).bytes == 0);
  CHECK(make_workspace_layout({8, 8, 8, 1, 16, UINT64_MAX - 5, 4, 1}).bytes == 0);
  CHECK(make_workspace_layout({8, 8, 8, 4096, 14336, 0, 4, huge}).bytes == 0);
  CHECK(make_workspace_layout({8, huge, 8, 1, 16, 0, 4, 1}).bytes == 0);
}

}  // namespace

int main() {
  regions_are_aligned_inside_and_disjoint();
  pitches_are_padded();
  more_than_4_gib_keeps_all_bits();
  runs_and_parts_cover_all_tokens();
  arrays_of_a_handle_follow_each_other();
  shapes_beyond_63_bits_have_no_layout();
}
