// The error records of the ranks that this process runs: memory that kernels write and the host
// reads without touching the GPU.
#pragma once

#include <cstdint>
#include <optional>

#include "comm/error_record.h"

namespace dualpipe {

class ErrorChannel {
 public:
  explicit ErrorChannel(uint32_t num_local);
  ~ErrorChannel();
  ErrorChannel(const ErrorChannel&) = delete;
  ErrorChannel& operator=(const ErrorChannel&) = delete;

  uint32_t num_local() const { return num_local_; }
  ErrorRecord* records() const { return records_; }
  // The record of local rank `index`, if that rank has failed. Does not wait for the GPU.
  std::optional<ErrorRecord> read(uint32_t index) const;
  // Only when no kernel that may write to it is running.
  void clear();

 private:
  uint32_t num_local_;
  ErrorRecord* records_ = nullptr;
};

}  // namespace dualpipe
