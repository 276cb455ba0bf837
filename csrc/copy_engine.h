// Batches of copies in the background, in the order they came: a thread with memcpy, or a CUDA stream of its own.
//
// turboserve/runtime/copy_engine.py is the public face and has the same in Python.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

namespace turboserve {

struct CopyJob {
  void* target;
  const void* source;
  std::uint64_t bytes;
};

// Runs the copies in the calling thread.
void copy_now(const std::vector<CopyJob>& jobs);

// One submitted batch. `copied` counts from the front.
class CopyBatch {
 public:
  explicit CopyBatch(std::vector<CopyJob> jobs) : jobs_(std::move(jobs)) {}
  std::uint64_t size() const { return jobs_.size(); }
  std::uint64_t copied() const { return copied_.load(std::memory_order_acquire); }
  // Throws RingError with what went wrong.
  bool done() const;
  // False when the time was over; `copies` at most size().
  bool wait(double timeout_s, std::uint64_t copies) const;

 private:
  friend class CopyEngine;
  void advance(std::uint64_t copied);
  void fail(const std::string& why);

  static constexpr std::uint64_t kNobodyWaits = ~std::uint64_t{0};
  const std::vector<CopyJob> jobs_;
  CudaEvent after_ = nullptr;
  std::atomic<std::uint64_t> copied_{0};
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  mutable std::atomic<std::uint64_t> awaited_{kNobodyWaits};  // the fewest copies that a waiter wants
  std::string error_;
};

class CopyEngine {
 public:
  // `device` < 0: memcpy. `stable_sources`: the sources do not change while they are copied (host to device from the
  // arena), so the driver may read them in any order; otherwise reads follow the stream's order.
  CopyEngine(int device, std::uint64_t queue_max, bool stable_sources);
  ~CopyEngine();
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  // RingError Overloaded when `queue_max` batches wait, Conflict after close. The copies begin after what is already
  // on the caller's stream `after` (CUDA only; null: at once).
  std::shared_ptr<CopyBatch> submit(std::vector<CopyJob> jobs, CudaStream after);
  // Finishes what was submitted, then ends the thread.
  void close();
  bool batched() const { return device_ >= 0 && cuda_runtime().memcpy_batch != nullptr; }

 private:
  void run();
  void copy_on_cpu(CopyBatch& batch);
  void copy_on_device(CopyBatch& batch);
  void issue(const CopyJob* jobs, std::size_t count);

  const int device_;
  const std::uint64_t queue_max_;
  const bool stable_sources_;
  CudaStream stream_ = nullptr;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<CopyBatch>> queue_;
  bool closing_ = false;
  std::mutex join_mutex_;
  std::thread thread_;
};

}  // namespace turboserve
