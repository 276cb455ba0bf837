// The few CUDA runtime calls we use, found at run time: one source builds with and without CUDA.
//
// libcudart is looked for among the libraries that are already loaded (torch's own), then under the paths that Python
// names (the nvidia wheels), then where the system looks. Without it, or without a device, `cuda_device_count` is 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace turboserve {

using CudaStream = void*;
using CudaEvent = void*;

// CUDA's own layout of cudaMemcpyAttributes and cudaMemLocation up to CUDA 13 (driver ABI of 12.8).
struct MemLocation {
  int type = 0;  // 1 = device, 2 = host
  int id = 0;
};
struct MemcpyAttributes {
  int src_access_order = 1;  // 1 = stream order, 3 = any
  MemLocation src_hint;
  MemLocation dst_hint;
  unsigned flags = 0;  // 1 = prefer overlap with compute
};

struct CudaRuntime {
  int (*get_device_count)(int*) = nullptr;
  int (*set_device)(int) = nullptr;
  int (*host_register)(void*, std::size_t, unsigned) = nullptr;
  int (*host_unregister)(void*) = nullptr;
  int (*memcpy_async)(void*, const void*, std::size_t, int, CudaStream) = nullptr;
  int (*stream_create)(CudaStream*, unsigned) = nullptr;
  int (*stream_destroy)(CudaStream) = nullptr;
  int (*stream_synchronize)(CudaStream) = nullptr;
  int (*stream_wait_event)(CudaStream, CudaEvent, unsigned) = nullptr;
  int (*event_create)(CudaEvent*, unsigned) = nullptr;
  int (*event_destroy)(CudaEvent) = nullptr;
  int (*event_record)(CudaEvent, CudaStream) = nullptr;
  int (*event_synchronize)(CudaEvent) = nullptr;
  const char* (*get_error_string)(int) = nullptr;
  // cuMemcpyBatchAsync of the driver, in the one ABI that version 12080 names; null before driver 12.8.
  int (*memcpy_batch)(std::uintptr_t*, std::uintptr_t*, std::size_t*, std::size_t, MemcpyAttributes*, std::size_t*,
                      std::size_t, std::size_t*, CudaStream) = nullptr;
  std::string path;  // what was loaded, or why nothing was
  bool loaded = false;

  // Throws RingError WorkerError when `code` is not 0.
  void check(int code, const char* what) const;
};

// Loads once; later calls give the same. `paths` are tried between the loaded libraries and the system's.
const CudaRuntime& cuda_runtime(const std::vector<std::string>& paths = {});

// Devices that can be used; 0 without library, driver or device.
int cuda_device_count();

// Page-locks memory for the devices, at most 64 GiB a registration (some drivers refuse 512 GiB and more).
void cuda_register(void* memory, std::uint64_t bytes);
void cuda_unregister(void* memory, std::uint64_t bytes);

}  // namespace turboserve
