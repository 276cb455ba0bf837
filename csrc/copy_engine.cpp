#include "copy_engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "frame_ring.h"

namespace turboserve {
namespace {

constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr int kMemcpyDefault = 4;           // the driver knows which address lies where
constexpr std::size_t kBatchGroup = 16;     // copies between two events: how finely `copied` moves on a device
constexpr int kSourceOrderStream = 1, kSourceOrderAny = 3;
constexpr unsigned kPreferOverlap = 1;

// Ends with its scope on every way out.
struct EventHolder {
  explicit EventHolder(const CudaRuntime& runtime) : cuda(runtime) {
    cuda.check(cuda.event_create(&event, kEventDisableTiming), "creating an event");
  }
  ~EventHolder() {
    if (event != nullptr) cuda.event_destroy(event);
  }
  EventHolder(const EventHolder&) = delete;
  EventHolder& operator=(const EventHolder&) = delete;
  const CudaRuntime& cuda;
  CudaEvent event = nullptr;
};

}  // namespace

void copy_now(const std::vector<CopyJob>& jobs) {
  for (const CopyJob& job : jobs) std::memcpy(job.target, job.source, job.bytes);
}

bool CopyBatch::done() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!error_.empty()) throw RingError("WorkerError", error_);
  return copied() == jobs_.size();
}

bool CopyBatch::wait(double timeout_s, std::uint64_t copies) const {
  const std::uint64_t wanted = std::min<std::uint64_t>(copies, jobs_.size());
  std::unique_lock<std::mutex> lock(mutex_);
  // A time of day far ahead overflows the clock; a year is for ever here.
  const auto limit = std::chrono::duration<double>(std::min(std::max(timeout_s, 0.0), 3e7));
  const bool landed = changed_.wait_for(lock, limit, [&] {
    awaited_.store(std::min(awaited_.load(), wanted));
    return copied_.load() >= wanted || !error_.empty();
  });
  if (!error_.empty()) throw RingError("WorkerError", error_);
  return landed;
}

// Wakes only a waiter whose copies have landed: a wake for each of many small copies costs more than the copies. Both
// sides store first and read then, in one order for all (seq_cst), so one of the two sees the other.
void CopyBatch::advance(std::uint64_t copied) {
  copied_.store(copied);
  if (copied < awaited_.load()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  awaited_.store(kNobodyWaits);
  changed_.notify_all();
}

void CopyBatch::fail(const std::string& why) {
  const std::lock_guard<std::mutex> lock(mutex_);
  error_ = why;
  changed_.notify_all();
}

CopyEngine::CopyEngine(int device, std::uint64_t queue_max, bool stable_sources)
    : device_(device), queue_max_(queue_max), stable_sources_(stable_sources) {
  if (device_ >= 0) {
    const CudaRuntime& cuda = cuda_runtime();
    if (device_ >= cuda_device_count()) {
      throw RingError("ConfigError", "no CUDA device " + std::to_string(device_) + " to copy with: " + cuda.path);
    }
    cuda.check(cuda.set_device(device_), "choosing the device");
    cuda.check(cuda.stream_create(&stream_, kStreamNonBlocking), "creating a stream");
  }
  thread_ = std::thread([this] { run(); });
}

CopyEngine::~CopyEngine() { close(); }

std::shared_ptr<CopyBatch> CopyEngine::submit(std::vector<CopyJob> jobs, CudaStream after) {
  auto batch = std::make_shared<CopyBatch>(std::move(jobs));
  if (device_ >= 0 && after != nullptr) {
    const CudaRuntime& cuda = cuda_runtime();
    EventHolder event(cuda);
    cuda.check(cuda.event_record(event.event, after), "recording an event");
    std::swap(batch->after_, event.event);
  }
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) throw RingError("Conflict", "the copy engine is closed");
    if (queue_.size() >= queue_max_) {
      throw RingError("Overloaded", std::to_string(queue_.size()) + " batches of copies wait; wait for a ticket first");
    }
    queue_.push_back(batch);
    changed_.notify_one();
  } catch (...) {
    if (batch->after_ != nullptr) cuda_runtime().event_destroy(batch->after_);
    throw;
  }
  return batch;
}

void CopyEngine::close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    changed_.notify_all();
  }
  const std::lock_guard<std::mutex> lock(join_mutex_);
  if (thread_.joinable()) thread_.join();
  if (stream_ != nullptr) {
    cuda_runtime().stream_destroy(stream_);
    stream_ = nullptr;
  }
}

void CopyEngine::run() {
  if (device_ >= 0) cuda_runtime().set_device(device_);  // the device is chosen thread by thread
  for (;;) {
    std::shared_ptr<CopyBatch> batch;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return !queue_.empty() || closing_; });
      if (queue_.empty()) return;
      batch = std::move(queue_.front());
      queue_.pop_front();
    }
    try {
      device_ >= 0 ? copy_on_device(*batch) : copy_on_cpu(*batch);
    } catch (const std::exception& error) {
      // What was issued before may still be running: whoever hears of the failure may free the memory.
      if (stream_ != nullptr) cuda_runtime().stream_synchronize(stream_);
      batch->fail(error.what());
    }
    if (batch->after_ != nullptr) cuda_runtime().event_destroy(batch->after_);
  }
}

void CopyEngine::copy_on_cpu(CopyBatch& batch) {
  std::uint64_t copied = 0;
  for (const CopyJob& job : batch.jobs_) {
    std::memcpy(job.target, job.source, job.bytes);
    batch.advance(++copied);
  }
}

// All groups are issued first, each with an event behind it, then waited for in order.
void CopyEngine::copy_on_device(CopyBatch& batch) {
  const CudaRuntime& cuda = cuda_runtime();
  if (batch.after_ != nullptr) {
    cuda.check(cuda.stream_wait_event(stream_, batch.after_, 0), "waiting for the caller's stream");
  }
  std::deque<EventHolder> events;
  const std::size_t count = batch.jobs_.size();
  for (std::size_t at = 0; at < count; at += kBatchGroup) {
    issue(batch.jobs_.data() + at, std::min(kBatchGroup, count - at));
    events.emplace_back(cuda);
    cuda.check(cuda.event_record(events.back().event, stream_), "recording an event");
  }
  std::size_t copied = 0;
  for (const auto& event : events) {
    cuda.check(cuda.event_synchronize(event.event), "copying");
    copied = std::min(count, copied + kBatchGroup);
    batch.advance(copied);
  }
}

void CopyEngine::issue(const CopyJob* jobs, std::size_t count) {
  const CudaRuntime& cuda = cuda_runtime();
  // The batched call takes no empty copy.
  const bool all_real = std::all_of(jobs, jobs + count, [](const CopyJob& job) { return job.bytes > 0; });
  if (cuda.memcpy_batch == nullptr || count < 2 || !all_real) {
    for (std::size_t i = 0; i < count; ++i) {
      cuda.check(cuda.memcpy_async(jobs[i].target, jobs[i].source, jobs[i].bytes, kMemcpyDefault, stream_), "copying");
    }
    return;
  }
  std::uintptr_t targets[kBatchGroup], sources[kBatchGroup];
  std::size_t sizes[kBatchGroup];
  for (std::size_t i = 0; i < count; ++i) {
    targets[i] = reinterpret_cast<std::uintptr_t>(jobs[i].target);
    sources[i] = reinterpret_cast<std::uintptr_t>(jobs[i].source);
    sizes[i] = jobs[i].bytes;
  }
  MemcpyAttributes attributes;
  // "Any" would let the copy read a page before the pass that writes it has run.
  attributes.src_access_order = stable_sources_ ? kSourceOrderAny : kSourceOrderStream;
  attributes.flags = kPreferOverlap;
  std::size_t first = 0, failed = 0;
  cuda.check(cuda.memcpy_batch(targets, sources, sizes, count, &attributes, &first, 1, &failed, stream_),
             "copying a batch");
}

}  // namespace turboserve
