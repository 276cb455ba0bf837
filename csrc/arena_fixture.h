// What the arena's test programs share: a small arena in ordinary memory, and a requirement that ends the program.
#pragma once

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "frame_ring.h"
#include "pinned_arena.h"

namespace turboserve {

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "arena: %s\n", what);
  std::exit(1);
}

// Shared, so that a forked child works on the same bytes.
class SmallArena {
 public:
  SmallArena(std::uint32_t partitions, std::uint32_t slabs_per_partition) {
    const std::uint64_t slabs = std::uint64_t{partitions} * slabs_per_partition;
    const auto up = [](std::uint64_t value, std::uint64_t step) { return (value + step - 1) / step * step; };
    table_bytes_ = up(up(kArenaControlBytes + 20 * slabs, 512) + 512 * slabs, 4096);
    bytes_ = table_bytes_ + 4096 * slabs;
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    require(memory_ != MAP_FAILED, "mmap");
    ArenaControl control{kArenaMagic, kArenaLayoutVersion, 4096, partitions, slabs_per_partition, 4096, 512, 0};
    control.crc = crc32(&control, offsetof(ArenaControl, crc));
    std::memcpy(memory_, &control, sizeof control);
  }
  ~SmallArena() { munmap(memory_, bytes_); }
  SmallArena(const SmallArena&) = delete;
  SmallArena& operator=(const SmallArena&) = delete;

  ArenaTable owner(std::uint32_t partition, std::uint64_t epoch) { return {memory_, bytes_, partition, epoch}; }
  ArenaTable onlooker() { return {memory_, bytes_, std::nullopt, 0}; }
  unsigned char* memory() { return static_cast<unsigned char*>(memory_); }
  std::uint64_t bytes() const { return bytes_; }
  std::uint64_t table_bytes() const { return table_bytes_; }

 private:
  void* memory_ = nullptr;
  std::uint64_t bytes_ = 0, table_bytes_ = 0;
};

inline std::string session_name(std::uint64_t number) {
  std::string name(26, 'a');
  for (std::size_t i = 0; number > 0; ++i, number /= 26) name[i] = static_cast<char>('a' + number % 26);
  return name;
}

}  // namespace turboserve
