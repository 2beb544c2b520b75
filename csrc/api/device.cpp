#include "api/device.h"

#include <cuda_runtime_api.h>

#include "api/check.h"

namespace dualpipe {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

int p2p_attribute(cudaDeviceP2PAttr which, int device, int peer) {
  int value = 0;
  check_cuda(cudaDeviceGetP2PAttribute(&value, which, device, peer), "cudaDeviceGetP2PAttribute");
  return value;
}

int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    (void)cudaGetLastError();
    return 0;
  }
  check_cuda(status, "cudaGetDeviceCount");
  return count;
}

}  // namespace

int driver_version() {
  int version = 0;
  check_cuda(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

int runtime_version() {
  int version = 0;
  check_cuda(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

std::vector<DeviceInfo> devices() {
  std::vector<DeviceInfo> found;
  for (int i = 0; i < device_count(); ++i) {
    cudaDeviceProp prop{};
    check_cuda(cudaGetDeviceProperties(&prop, i), "cudaGetDeviceProperties");
    char bus_id[32] = {};
    check_cuda(cudaDeviceGetPCIBusId(bus_id, sizeof(bus_id), i), "cudaDeviceGetPCIBusId");
    found.push_back({i, prop.name, bus_id, prop.major, prop.minor, prop.multiProcessorCount,
                     prop.totalGlobalMem,
                     static_cast<uint64_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, i)),
                     static_cast<uint64_t>(prop.l2CacheSize)});
  }
  return found;
}

PeerLink peer_link(int device, int peer) {
  return {p2p_attribute(cudaDevP2PAttrAccessSupported, device, peer) != 0,
          p2p_attribute(cudaDevP2PAttrNativeAtomicSupported, device, peer) != 0,
          p2p_attribute(cudaDevP2PAttrPerformanceRank, device, peer)};
}

uint64_t capture_id(uint64_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check_cuda(cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(stream), &status, &id),
             "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

uint64_t create_stream() {
  int lowest = 0, highest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&lowest, &highest),
             "cudaDeviceGetStreamPriorityRange");
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest),
             "cudaStreamCreateWithPriority");
  return reinterpret_cast<uint64_t>(stream);
}

void copy(uint64_t to, uint64_t from, uint64_t bytes, uint64_t stream) {
  if (bytes == 0) return;
  check_cuda(
      cudaMemcpyAsync(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes,
                      cudaMemcpyDeviceToDevice, reinterpret_cast<cudaStream_t>(stream)),
      "cudaMemcpyAsync");
}

void destroy_stream(uint64_t stream) {
  check_cuda(cudaStreamDestroy(reinterpret_cast<cudaStream_t>(stream)), "cudaStreamDestroy");
}

void enable_peer_access(int device, int peer) {
  int current = 0;
  check_cuda(cudaGetDevice(&current), "cudaGetDevice");
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  const cudaError_t status = cudaDeviceEnablePeerAccess(peer, 0);
  check_cuda(cudaSetDevice(current), "cudaSetDevice");
  if (status == cudaErrorPeerAccessAlreadyEnabled) {
    (void)cudaGetLastError();
    return;
  }
  check_cuda(status, "cudaDeviceEnablePeerAccess");
}

}  // namespace dualpipe
