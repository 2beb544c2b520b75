#include "api/route_reports.h"

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "api/check.h"

namespace dualpipe {

RouteReports::RouteReports(uint32_t count) : count_(count) {
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, count * sizeof(RouteReport),
                           cudaHostAllocMapped | cudaHostAllocPortable),
             "cudaHostAlloc");
  reports_ = static_cast<RouteReport*>(memory);
  std::memset(memory, 0, count * sizeof(RouteReport));
}

RouteReports::~RouteReports() {
  // Fails when the process is already ending and the driver is gone; there is nothing left to free.
  (void)cudaFreeHost(reports_);
}

RouteReport& RouteReports::at(uint32_t index) const {
  if (index >= count_) {
    throw std::invalid_argument("expected a report below " + std::to_string(count_) + ", got " +
                                std::to_string(index));
  }
  return reports_[index];
}

bool RouteReports::any_fault() const {
  for (uint32_t i = 0; i < count_; ++i) {
    if (__atomic_load_n(&reports_[i].fault, __ATOMIC_ACQUIRE) != 0) return true;
  }
  return false;
}

void RouteReports::expect(uint32_t index) const {
  __atomic_store_n(&at(index).ready, 0u, __ATOMIC_RELEASE);
}

bool RouteReports::wait(uint32_t index, const ErrorChannel& channel, uint32_t record,
                        uint64_t timeout_ns) const {
  const uint32_t* ready = &at(index).ready;
  const auto end = std::chrono::steady_clock::now() + std::chrono::nanoseconds(timeout_ns);
  for (uint32_t polls = 1;; ++polls) {
    // Pairs with the kernel's release store: the rest of the report was written before it.
    if (__atomic_load_n(ready, __ATOMIC_ACQUIRE) != 0) return true;
    if (polls % 1024 != 0) continue;
    if (channel.read(record) || std::chrono::steady_clock::now() >= end) return false;
  }
}

}  // namespace dualpipe
