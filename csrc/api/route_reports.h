// The reports of routes: memory that kernels write and the host reads without touching the GPU.
#pragma once

#include <cstdint>

#include "api/error_channel.h"
#include "ep/route.h"

namespace dualpipe {

class RouteReports {
 public:
  explicit RouteReports(uint32_t count);
  ~RouteReports();
  RouteReports(const RouteReports&) = delete;
  RouteReports& operator=(const RouteReports&) = delete;

  RouteReport& at(uint32_t index) const;
  // Whether some report tells a fault. Does not wait for the GPU.
  bool any_fault() const;
  // Before a route whose report the host will wait for.
  void expect(uint32_t index) const;
  // Until the report is there. False if `record` of the channel tells a failure first, or if it
  // takes longer than `timeout_ns`.
  bool wait(uint32_t index, const ErrorChannel& channel, uint32_t record,
            uint64_t timeout_ns) const;

 private:
  uint32_t count_;
  RouteReport* reports_ = nullptr;
};

}  // namespace dualpipe
