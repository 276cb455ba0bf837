// The allocation table of the host arena, over memory that several processes share, and what page-locks that memory.
//
// turboserve/runtime/arena_table.py describes the layout and why a process killed at any instruction harms nobody; it
// works on the same memory, so change both or neither. In short: one state word an extent says whether it exists, only
// a partition's owner moves state words, everything else is written before the word that makes it count.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace turboserve {

constexpr std::uint32_t kArenaLayoutVersion = 1;
constexpr std::uint64_t kArenaMagic = 0x31414e4552415354ULL;  // "TSARENA1" in memory order
constexpr std::uint32_t kExtentMagic = 0x58455354U;           // "TSEX"
constexpr std::uint64_t kArenaControlBytes = 4096;
constexpr std::uint64_t kOwnerEpochsAt = 1024;
constexpr std::uint64_t kPartitionsMax = 256;
constexpr std::uint64_t kExtentHeaderBytes = 512;
constexpr std::uint64_t kExtentMetaBytesMax = 320;

enum class ExtentState : std::uint64_t { kFree = 0, kReserved = 1, kCommitted = 2 };

struct ArenaControl {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t control_bytes;
  std::uint32_t partition_count;
  std::uint32_t slabs_per_partition;
  std::uint64_t slab_bytes;
  std::uint32_t header_bytes;
  std::uint32_t crc;  // of the bytes before
};
static_assert(sizeof(ArenaControl) == 40 && offsetof(ArenaControl, crc) == 36);

struct ExtentHeader {
  std::uint32_t magic;
  std::uint16_t version;
  std::uint16_t kind;
  std::uint64_t generation;
  char session[26];
  std::uint8_t reserved_a[6];
  std::uint64_t epoch;
  std::int64_t chunk;
  std::uint64_t payload_bytes;
  std::uint64_t checksum;
  std::uint32_t first_slab;
  std::uint32_t slab_count;
  std::uint32_t meta_bytes;
  std::uint32_t reserved_b;
  std::uint8_t digest[32];
  std::uint64_t owner_epoch;
  std::uint8_t meta[kExtentMetaBytesMax];
  std::uint8_t reserved_c[52];
  std::uint32_t crc;  // CRC-32 (zlib's) of the bytes before
};
static_assert(sizeof(ExtentHeader) == kExtentHeaderBytes && offsetof(ExtentHeader, session) == 16 &&
              offsetof(ExtentHeader, epoch) == 48 && offsetof(ExtentHeader, first_slab) == 80 &&
              offsetof(ExtentHeader, digest) == 96 && offsetof(ExtentHeader, meta) == 136 &&
              offsetof(ExtentHeader, crc) == 508);

struct ExtentName {
  std::uint64_t entry;
  std::uint64_t generation;
};

// What a commit adds to a reservation.
struct ExtentNote {
  std::uint16_t kind = 0;
  std::int64_t chunk = 0;
  std::string digest;
  std::string meta;
  std::uint64_t checksum = 0;
};

struct SlabCounts {
  std::uint64_t total = 0, reserved = 0, committed = 0;
};

// For one thread at a time. Errors are RingError (frame_ring.h), by the name of the Python exception.
class ArenaTable {
 public:
  // `memory` stays the caller's and must outlive the table.
  ArenaTable(void* memory, std::uint64_t bytes, std::optional<std::uint32_t> partition, std::uint64_t owner_epoch);

  ExtentName reserve(const char* session, std::uint64_t epoch, std::uint64_t payload_bytes);
  void commit(ExtentName name, const ExtentNote& note);
  bool free(ExtentName name);
  std::uint64_t sweep(std::uint32_t partition);

  std::vector<ExtentHeader> headers(const char* session) const;  // null: of every session
  std::optional<ExtentHeader> header(ExtentName name) const;
  std::vector<std::uint64_t> slabs(ExtentName name) const;
  SlabCounts slab_counts(std::optional<std::uint32_t> partition) const;
  void check() const;

  std::uint64_t slab_bytes() const { return slab_bytes_; }
  std::uint64_t data_at() const { return data_at_; }

 private:
  using Word = std::atomic<std::uint64_t>;
  static_assert(Word::is_always_lock_free && sizeof(Word) == 8, "processes share these words");

  void attach(std::uint32_t partition);
  void check_owner() const;
  void check_entry(std::uint64_t entry) const;
  void reclaim();
  void release(std::uint64_t entry, std::uint64_t word);
  std::vector<std::uint32_t> choose(std::uint64_t needed) const;
  void write_header(std::uint64_t entry, ExtentHeader header) const;
  ExtentHeader read_header(std::uint64_t entry) const;
  ExtentHeader verified(std::uint64_t entry, std::uint64_t generation) const;
  std::uint32_t slab_count(std::uint64_t entry) const;
  std::vector<std::uint64_t> chain(std::uint64_t entry) const;
  bool visible(std::uint64_t entry, ExtentState state) const;
  std::uint64_t start_of(std::uint64_t partition) const { return partition * per_partition_; }

  std::uint32_t partition_count_ = 0;
  std::uint64_t per_partition_ = 0, slab_count_ = 0, slab_bytes_ = 0, data_at_ = 0;
  Word* epochs_ = nullptr;
  Word* state_ = nullptr;
  Word* dropped_ = nullptr;
  std::atomic<std::uint32_t>* links_ = nullptr;
  Word* headers_ = nullptr;
  std::optional<std::uint32_t> partition_;
  std::uint64_t owner_epoch_ = 0;
  std::vector<unsigned char> free_;  // of the own partition; rebuilt from the entries by a successor
  std::uint64_t free_count_ = 0;
};

// Brings the pages of [memory, memory + bytes) in with several threads, changing no byte.
void touch_pages(void* memory, std::uint64_t bytes, unsigned threads);

}  // namespace turboserve
