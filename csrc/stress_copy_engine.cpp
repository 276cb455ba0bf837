// Stress of the copy engine for the sanitizers: several threads submit, wait and drop tickets; one engine is closed
// while batches wait. Every byte is compared.
#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "arena_fixture.h"
#include "checksum.h"
#include "copy_engine.h"

namespace {

using namespace turboserve;

void submit_and_wait(CopyEngine& engine, std::uint64_t seed, std::uint64_t rounds) {
  std::mt19937_64 random(seed);
  std::vector<unsigned char> source(40000), target(40000);
  for (auto& byte : source) byte = static_cast<unsigned char>(random());
  for (std::uint64_t round = 0; round < rounds; ++round) {
    std::fill(target.begin(), target.end(), static_cast<unsigned char>(0));
    std::vector<CopyJob> jobs;
    for (std::uint64_t at = 0; at < source.size();) {
      const std::uint64_t count = std::min<std::uint64_t>(random() % 9000, source.size() - at);
      jobs.push_back({target.data() + at, source.data() + at, count});
      at += count;
    }
    std::shared_ptr<CopyBatch> batch;
    while (!batch) {
      try {
        batch = engine.submit(jobs, nullptr);
      } catch (const RingError&) {
        std::this_thread::yield();
      }
    }
    const std::uint64_t some = random() % jobs.size() + 1;
    require(batch->wait(60, some) && batch->copied() >= some, "a wait for the first copies ended early");
    for (std::uint64_t i = 0; i < some; ++i) {
      require(std::memcmp(jobs[i].target, jobs[i].source, jobs[i].bytes) == 0, "a copy that had not landed");
    }
    require(batch->wait(60, jobs.size()) && batch->done() && target == source, "wrong bytes");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20000;
  CopyEngine engine(-1, 2, false);
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    threads.emplace_back([&engine, seed, rounds] { submit_and_wait(engine, seed, rounds / 10 + 1); });
  }
  for (auto& thread : threads) thread.join();
  engine.close();
  for (std::uint64_t round = 0; round < rounds / 10 + 1; ++round) {
    std::vector<unsigned char> source(5000, 3), target(5000, 0);
    std::shared_ptr<CopyBatch> batch;
    {
      CopyEngine short_lived(-1, 4, false);
      batch = short_lived.submit({{target.data(), source.data(), source.size()}}, nullptr);
    }
    require(batch->done() && target == source, "a closed engine left a batch behind");
  }
  require(cuda_runtime().loaded || cuda_device_count() == 0, "devices without a runtime");
  std::printf("stress_copy_engine: %llu rounds: fine\n", static_cast<unsigned long long>(rounds));
  return 0;
}
