// How the rows of a dispatch lie at the rank that they are for.
#pragma once

#include <cstdint>

namespace dualpipe {

enum RowLayout : uint32_t {
  kTokenRows = 0,    // by source rank, one row for a token
  kExpertRows = 1,   // by expert: groups follow each other, each rounded up to the alignment
  kExpertGroups = 2  // by expert: groups of fixed size; rows that are not filled are not written
};

}  // namespace dualpipe
