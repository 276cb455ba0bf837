// A CUDA runtime for a machine without one: the calls that csrc/cuda_runtime.h looks for, over plain memory. It shows
// that our code finds, calls and waits in the right order and what it does when a call fails; nothing about a GPU.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr std::size_t kPoisonedBytes = 13;  // a copy of this size fails
int open_things = 0;

struct Location {
  int type, id;
};
struct Attributes {
  int src_access_order;
  Location src_hint, dst_hint;
  unsigned flags;
};

int copy_batch(std::uintptr_t* targets, std::uintptr_t* sources, std::size_t* sizes, std::size_t count,
               Attributes* attributes, std::size_t* first, std::size_t attribute_count, std::size_t*, void* stream) {
  if (stream == nullptr || attribute_count != 1 || first[0] != 0) return 1;
  if (attributes->src_access_order != 1 && attributes->src_access_order != 3) return 1;
  for (std::size_t i = 0; i < count; ++i) {
    if (sizes[i] == 0 || sizes[i] == kPoisonedBytes) return 1;
    std::memcpy(reinterpret_cast<void*>(targets[i]), reinterpret_cast<void*>(sources[i]), sizes[i]);
  }
  return 0;
}

int make(void** made) {
  ++open_things;
  *made = std::malloc(1);
  return 0;
}
int unmake(void* made) {
  --open_things;
  std::free(made);
  return 0;
}

}  // namespace

extern "C" {
int fake_open_things() { return open_things; }
int cudaGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
int cudaSetDevice(int device) { return device == 0 ? 0 : 101; }
int cudaHostRegister(void*, std::size_t, unsigned) {
  ++open_things;
  return 0;
}
int cudaHostUnregister(void*) {
  --open_things;
  return 0;
}
int cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, int, void* stream) {
  if (stream == nullptr || bytes == kPoisonedBytes) return 1;
  std::memcpy(target, source, bytes);
  return 0;
}
int cudaStreamCreateWithFlags(void** stream, unsigned) { return make(stream); }
int cudaStreamDestroy(void* stream) { return unmake(stream); }
int cudaStreamSynchronize(void*) { return 0; }
int cudaStreamWaitEvent(void* stream, void* event, unsigned) { return stream && event ? 0 : 1; }
int cudaEventCreateWithFlags(void** event, unsigned) { return make(event); }
int cudaEventDestroy(void* event) { return unmake(event); }
int cudaEventRecord(void* event, void*) { return event ? 0 : 1; }
int cudaEventSynchronize(void* event) { return event ? 0 : 1; }
const char* cudaGetErrorString(int) { return "as asked"; }
int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long, int* status) {
  const bool here = std::getenv("FAKE_BATCH") != nullptr && std::strcmp(name, "cuMemcpyBatchAsync") == 0;
  *function = here && version == 12080 ? reinterpret_cast<void*>(&copy_batch) : nullptr;
  *status = *function ? 0 : 1;
  return 0;
}
}
