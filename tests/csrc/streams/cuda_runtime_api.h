// Stands for CUDA's header where host code that enqueues work is compiled for the CPU: streams are
// lists of operations, of which any that may go next goes next, drawn at random. So a missing event
// shows as a wrong result under some seed, and a wait without end as a deadlock.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <vector>

enum cudaError_t { cudaSuccess };
enum {
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDeviceToHost,
  cudaEventDisableTiming,
  cudaStreamNonBlocking
};

// An operation returns false while it waits.
struct CUstream_st {
  std::deque<std::function<bool()>> operations;
};
struct CUevent_st {
  uint64_t recorded = 0, reached = 0;
};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;

// What has been enqueued on which stream, in this order.
struct Copy {
  cudaStream_t stream;
  const void* to;
  uint64_t bytes;
};
inline std::vector<Copy> enqueued_copies;

inline cudaError_t enqueue(cudaStream_t stream, std::function<bool()> operation) {
  stream->operations.push_back(std::move(operation));
  return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const uint64_t turn = ++event->recorded;
  return enqueue(stream, [=] { return (event->reached = turn) != 0; });
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const uint64_t turn = event->recorded;
  return enqueue(stream, [=] { return event->reached >= turn; });
}
inline cudaError_t cudaMemcpy2DAsync(void* to, uint64_t to_pitch, const void* from,
                                     uint64_t from_pitch, uint64_t bytes, uint64_t rows, int,
                                     cudaStream_t stream) {
  enqueued_copies.push_back({stream, to, bytes * rows});
  return enqueue(stream, [=] {
    for (uint64_t i = 0; i < rows; ++i) {
      std::memcpy(static_cast<char*>(to) + i * to_pitch,
                  static_cast<const char*>(from) + i * from_pitch, bytes);
    }
    return true;
  });
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, uint64_t bytes, int kind,
                                   cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}

// Until all is done; false if nothing can go on. Mostly the first that can, in an order that is
// drawn once: some streams are far behind others.
inline bool run_streams(std::vector<cudaStream_t> streams, std::mt19937& random) {
  std::shuffle(streams.begin(), streams.end(), random);
  for (;;) {
    if (random() % 8 == 0) std::swap(streams[0], streams[random() % streams.size()]);
    bool left = false, went = false;
    for (size_t i = 0; i < streams.size() && !went; ++i) {
      auto& operations = streams[i]->operations;
      if (operations.empty()) continue;
      left = true;
      went = operations.front()();
      if (went) operations.pop_front();
    }
    if (!left) return true;
    if (!went) return false;
  }
}
