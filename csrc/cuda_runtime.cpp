#include "cuda_runtime.h"

#include <dlfcn.h>

#include <algorithm>
#include <mutex>

#include "frame_ring.h"

namespace turboserve {
namespace {

constexpr std::uint64_t kRegisterBytesMax = 64ULL << 30;
constexpr unsigned kRegisterPortable = 1;
constexpr unsigned kBatchApiVersion = 12080;

void* open_library(const std::vector<std::string>& paths, std::string& path) {
  const std::vector<std::string> names = {"libcudart.so.13", "libcudart.so.12"};
  for (const auto& name : names) {
    path = name;
    if (void* found = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD)) return found;
  }
  for (const auto* list : {&paths, &names}) {
    for (const auto& name : *list) {
      path = name;
      if (void* found = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return found;
    }
  }
  path = "no libcudart.so.13 or .12 was found";
  return nullptr;
}

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

void find_batch_copy(void* library, CudaRuntime& cuda) {
  int (*entry_point)(const char*, void**, unsigned, unsigned long long, int*) = nullptr;
  if (!find(library, "cudaGetDriverEntryPointByVersion", entry_point)) return;
  void* function = nullptr;
  int status = 0;
  // One ABI whatever the driver: later versions of this entry point dropped an argument.
  if (entry_point("cuMemcpyBatchAsync", &function, kBatchApiVersion, 0, &status) == 0 && status == 0) {
    cuda.memcpy_batch = reinterpret_cast<decltype(cuda.memcpy_batch)>(function);
  }
}

CudaRuntime load(const std::vector<std::string>& paths) {
  CudaRuntime cuda;
  void* library = open_library(paths, cuda.path);
  if (library == nullptr) return cuda;
  const bool whole = find(library, "cudaGetDeviceCount", cuda.get_device_count) &&
                     find(library, "cudaSetDevice", cuda.set_device) &&
                     find(library, "cudaHostRegister", cuda.host_register) &&
                     find(library, "cudaHostUnregister", cuda.host_unregister) &&
                     find(library, "cudaMemcpyAsync", cuda.memcpy_async) &&
                     find(library, "cudaStreamCreateWithFlags", cuda.stream_create) &&
                     find(library, "cudaStreamDestroy", cuda.stream_destroy) &&
                     find(library, "cudaStreamSynchronize", cuda.stream_synchronize) &&
                     find(library, "cudaStreamWaitEvent", cuda.stream_wait_event) &&
                     find(library, "cudaEventCreateWithFlags", cuda.event_create) &&
                     find(library, "cudaEventDestroy", cuda.event_destroy) &&
                     find(library, "cudaEventRecord", cuda.event_record) &&
                     find(library, "cudaEventSynchronize", cuda.event_synchronize) &&
                     find(library, "cudaGetErrorString", cuda.get_error_string);
  if (!whole) {
    cuda.path += " lacks a function that we need";
    return cuda;
  }
  cuda.loaded = true;
  int count = 0;
  if (cuda.get_device_count(&count) == 0 && count > 0) find_batch_copy(library, cuda);
  return cuda;
}

}  // namespace

void CudaRuntime::check(int code, const char* what) const {
  if (code == 0) return;
  throw RingError("WorkerError", std::string("CUDA: ") + what + ": " + get_error_string(code));
}

const CudaRuntime& cuda_runtime(const std::vector<std::string>& paths) {
  static const CudaRuntime cuda = load(paths);
  return cuda;
}

int cuda_device_count() {
  const CudaRuntime& cuda = cuda_runtime();
  int count = 0;
  return cuda.loaded && cuda.get_device_count(&count) == 0 ? count : 0;
}

void cuda_register(void* memory, std::uint64_t bytes) {
  const CudaRuntime& cuda = cuda_runtime();
  if (cuda_device_count() == 0) throw RingError("ConfigError", "no CUDA device to page-lock memory for: " + cuda.path);
  auto* base = static_cast<unsigned char*>(memory);
  for (std::uint64_t at = 0; at < bytes; at += kRegisterBytesMax) {
    try {
      cuda.check(cuda.host_register(base + at, std::min(kRegisterBytesMax, bytes - at), kRegisterPortable),
                 "page-locking the arena");
    } catch (...) {
      cuda_unregister(memory, at);
      throw;
    }
  }
}

void cuda_unregister(void* memory, std::uint64_t bytes) {
  const CudaRuntime& cuda = cuda_runtime();
  auto* base = static_cast<unsigned char*>(memory);
  for (std::uint64_t at = 0; at < bytes; at += kRegisterBytesMax) cuda.host_unregister(base + at);
}

}  // namespace turboserve
