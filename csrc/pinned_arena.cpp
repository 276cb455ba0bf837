#include "pinned_arena.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "frame_ring.h"

namespace turboserve {
namespace {

constexpr unsigned kStateBits = 2;
constexpr std::uint64_t kStateMask = (1U << kStateBits) - 1;
constexpr std::uint64_t kTouchStep = 4096;

std::uint64_t word_of(std::uint64_t generation, ExtentState state) {
  return generation << kStateBits | static_cast<std::uint64_t>(state);
}
std::uint64_t generation_of(std::uint64_t word) { return word >> kStateBits; }
ExtentState state_of(std::uint64_t word) { return static_cast<ExtentState>(word & kStateMask); }

std::string name_text(ExtentName name) { return std::to_string(name.entry) + "." + std::to_string(name.generation); }

[[noreturn]] void fail(const char* type, const std::string& what) { throw RingError(type, what); }

std::uint64_t round_up(std::uint64_t value, std::uint64_t step) { return (value + step - 1) / step * step; }

}  // namespace

ArenaTable::ArenaTable(void* memory, std::uint64_t bytes, std::optional<std::uint32_t> partition,
                       std::uint64_t owner_epoch)
    : partition_(partition), owner_epoch_(owner_epoch) {
  ArenaControl control{};
  if (bytes < kArenaControlBytes) fail("CorruptState", "arena: no control page");
  std::memcpy(&control, memory, sizeof control);
  if (control.magic != kArenaMagic || control.crc != crc32(&control, offsetof(ArenaControl, crc))) {
    fail("CorruptState", "arena: the control page does not verify");
  }
  if (control.version != kArenaLayoutVersion || control.control_bytes != kArenaControlBytes ||
      control.header_bytes != kExtentHeaderBytes) {
    fail("LayoutMismatch", "arena layout " + std::to_string(control.version) + "; expected " +
                               std::to_string(kArenaLayoutVersion) + "; restart all processes of one version");
  }
  partition_count_ = control.partition_count;
  per_partition_ = control.slabs_per_partition;
  slab_count_ = per_partition_ * partition_count_;
  slab_bytes_ = control.slab_bytes;
  const std::uint64_t dropped_at = kArenaControlBytes + 8 * slab_count_;
  const std::uint64_t links_at = dropped_at + 8 * slab_count_;
  const std::uint64_t headers_at = round_up(links_at + 4 * slab_count_, kExtentHeaderBytes);
  data_at_ = round_up(headers_at + kExtentHeaderBytes * slab_count_, 4096);
  if (partition_count_ < 1 || partition_count_ > kPartitionsMax || slab_count_ < 1 || slab_bytes_ < 4096 ||
      bytes != data_at_ + slab_count_ * slab_bytes_) {
    fail("CorruptState", "arena: " + std::to_string(bytes) + " B mapped do not fit its geometry");
  }
  auto* base = static_cast<unsigned char*>(memory);
  epochs_ = reinterpret_cast<Word*>(base + kOwnerEpochsAt);
  state_ = reinterpret_cast<Word*>(base + kArenaControlBytes);
  dropped_ = reinterpret_cast<Word*>(base + dropped_at);
  links_ = reinterpret_cast<std::atomic<std::uint32_t>*>(base + links_at);
  headers_ = reinterpret_cast<Word*>(base + headers_at);
  if (partition_) attach(*partition_);
}

// ---------------------------------------------------------------- owner

void ArenaTable::attach(std::uint32_t partition) {
  if (partition >= partition_count_) {
    fail("ConfigError", "arena partition " + std::to_string(partition) + "; expected below " +
                            std::to_string(partition_count_));
  }
  const std::uint64_t current = epochs_[partition].load();
  if (owner_epoch_ <= current) {
    fail("Conflict", "arena partition " + std::to_string(partition) + " belongs to epoch " + std::to_string(current) +
                         "; expected a higher one");
  }
  epochs_[partition].store(owner_epoch_);
  free_.assign(per_partition_, 1);
  free_count_ = per_partition_;
  const std::uint64_t start = start_of(partition);
  for (std::uint64_t entry = start; entry < start + per_partition_; ++entry) {
    const std::uint64_t word = state_[entry].load(std::memory_order_acquire);
    if (state_of(word) == ExtentState::kFree) continue;
    std::vector<std::uint64_t> kept;
    if (state_of(word) == ExtentState::kCommitted && dropped_[entry].load() != generation_of(word)) {
      try {
        verified(entry, generation_of(word));
        kept = chain(entry);
      } catch (const RingError&) {
        kept.clear();
      }
    }
    // Slab by slab, so that a chain that meets itself is found too.
    std::size_t taken = 0;
    while (taken < kept.size() && free_[kept[taken] - start]) free_[kept[taken++] - start] = 0;
    if (taken == kept.size() && taken > 0) {
      free_count_ -= taken;
      continue;
    }
    while (taken > 0) free_[kept[--taken] - start] = 1;
    state_[entry].store(word_of(generation_of(word), ExtentState::kFree), std::memory_order_release);
  }
}

void ArenaTable::check_owner() const {
  if (!partition_) {
    fail("Conflict", "arena: this process owns no partition; map the arena with one to reserve");
  }
  const std::uint64_t current = epochs_[*partition_].load();
  if (current != owner_epoch_) {
    fail("Conflict", "arena partition " + std::to_string(*partition_) + " was taken over by epoch " +
                         std::to_string(current) + "; epoch " + std::to_string(owner_epoch_) + " must stop");
  }
}

ExtentName ArenaTable::reserve(const char* session, std::uint64_t epoch, std::uint64_t payload_bytes) {
  check_owner();
  const std::uint64_t needed =
      payload_bytes == 0 ? 1 : payload_bytes / slab_bytes_ + (payload_bytes % slab_bytes_ != 0);
  if (free_count_ < needed) reclaim();
  if (free_count_ < needed) {
    fail("ArenaFull", std::to_string(payload_bytes) + " B need " + std::to_string(needed) + " slabs of " +
                          std::to_string(slab_bytes_) + " B; " + std::to_string(free_count_) + " of " +
                          std::to_string(per_partition_) +
                          " are free; drop or spill a session, or make the arena larger");
  }
  const std::uint64_t start = start_of(*partition_);
  const auto slabs = choose(needed);
  const std::uint64_t entry = start + slabs[0];
  const std::uint64_t generation = generation_of(state_[entry].load()) + 1;
  for (std::size_t i = 0; i + 1 < slabs.size(); ++i) {
    links_[start + slabs[i]].store(static_cast<std::uint32_t>(start + slabs[i + 1]), std::memory_order_release);
  }
  ExtentHeader header{};
  header.generation = generation;
  std::memcpy(header.session, session, sizeof header.session);
  header.epoch = epoch;
  header.chunk = -1;
  header.payload_bytes = payload_bytes;
  header.first_slab = static_cast<std::uint32_t>(entry);
  header.slab_count = static_cast<std::uint32_t>(needed);
  header.owner_epoch = owner_epoch_;
  write_header(entry, header);
  state_[entry].store(word_of(generation, ExtentState::kReserved), std::memory_order_release);
  for (const auto slab : slabs) free_[slab] = 0;
  free_count_ -= needed;
  return {entry, generation};
}

// The first run that is long enough, else the lowest slabs: few pieces make few copies.
std::vector<std::uint32_t> ArenaTable::choose(std::uint64_t needed) const {
  std::vector<std::uint32_t> lowest;
  lowest.reserve(needed);
  std::uint64_t run = 0;
  for (std::uint32_t slab = 0; slab < per_partition_; ++slab) {
    run = free_[slab] ? run + 1 : 0;
    if (run == needed) {
      lowest.resize(needed);
      for (std::uint64_t i = 0; i < needed; ++i) lowest[i] = static_cast<std::uint32_t>(slab + 1 - needed + i);
      return lowest;
    }
    if (free_[slab] && lowest.size() < needed) lowest.push_back(slab);
  }
  return lowest;
}

void ArenaTable::commit(ExtentName name, const ExtentNote& note) {
  check_owner();
  check_entry(name.entry);
  const std::uint64_t reserved = word_of(name.generation, ExtentState::kReserved);
  if (name.entry / per_partition_ != *partition_ || state_[name.entry].load() != reserved ||
      dropped_[name.entry].load() == name.generation) {
    fail("Conflict", "arena extent " + name_text(name) + " is not reserved; reserve anew");
  }
  ExtentHeader header = read_header(name.entry);
  header.kind = note.kind;
  header.chunk = note.chunk;
  header.checksum = note.checksum;
  header.meta_bytes = static_cast<std::uint32_t>(std::min<std::size_t>(note.meta.size(), sizeof header.meta));
  std::memset(header.digest, 0, sizeof header.digest);
  std::memcpy(header.digest, note.digest.data(), std::min(note.digest.size(), sizeof header.digest));
  std::memcpy(header.meta, note.meta.data(), header.meta_bytes);
  header.owner_epoch = owner_epoch_;
  write_header(name.entry, header);
  check_owner();
  // Last: until here the extent does not exist.
  state_[name.entry].store(word_of(name.generation, ExtentState::kCommitted), std::memory_order_release);
}

void ArenaTable::reclaim() {
  const std::uint64_t start = start_of(*partition_);
  for (std::uint64_t entry = start; entry < start + per_partition_; ++entry) {
    const std::uint64_t word = state_[entry].load();
    if (state_of(word) != ExtentState::kFree && dropped_[entry].load() == generation_of(word)) release(entry, word);
  }
}

void ArenaTable::release(std::uint64_t entry, std::uint64_t word) {
  const auto slabs = chain(entry);
  state_[entry].store(word_of(generation_of(word), ExtentState::kFree), std::memory_order_release);
  for (const auto slab : slabs) free_[slab - start_of(*partition_)] = 1;
  free_count_ += slabs.size();
}

// ---------------------------------------------------------------- anybody

bool ArenaTable::free(ExtentName name) {
  check_entry(name.entry);
  const std::uint64_t word = state_[name.entry].load(std::memory_order_acquire);
  if (generation_of(word) != name.generation || state_of(word) == ExtentState::kFree) return false;
  if (partition_ && name.entry / per_partition_ == *partition_) {
    check_owner();
    release(name.entry, word);
    return true;
  }
  std::uint64_t seen = dropped_[name.entry].load();
  while (seen < name.generation) {
    if (dropped_[name.entry].compare_exchange_weak(seen, name.generation)) return true;
  }
  return false;
}

std::uint64_t ArenaTable::sweep(std::uint32_t partition) {
  if (partition >= partition_count_ || partition_ == partition) {
    fail("Conflict", "arena partition " + std::to_string(partition) + " cannot be swept; expected a dead owner's");
  }
  std::uint64_t swept = 0;
  for (std::uint64_t entry = start_of(partition); entry < start_of(partition + 1); ++entry) {
    const std::uint64_t word = state_[entry].load(std::memory_order_acquire);
    if (state_of(word) != ExtentState::kReserved) continue;
    const std::uint64_t count = slab_count(entry);
    if (free({entry, generation_of(word)})) swept += count;
  }
  return swept;
}

std::vector<ExtentHeader> ArenaTable::headers(const char* session) const {
  std::vector<ExtentHeader> found;
  for (std::uint64_t entry = 0; entry < slab_count_; ++entry) {
    if (!visible(entry, ExtentState::kCommitted)) continue;
    const std::uint64_t generation = generation_of(state_[entry].load(std::memory_order_acquire));
    if (session != nullptr && std::memcmp(read_header(entry).session, session, sizeof ExtentHeader::session) != 0) {
      continue;
    }
    if (auto one = header({entry, generation})) found.push_back(*one);
  }
  return found;
}

std::optional<ExtentHeader> ArenaTable::header(ExtentName name) const {
  check_entry(name.entry);
  const std::uint64_t expected = word_of(name.generation, ExtentState::kCommitted);
  if (state_[name.entry].load(std::memory_order_acquire) != expected || dropped_[name.entry].load() == name.generation) {
    return std::nullopt;
  }
  try {
    const ExtentHeader found = verified(name.entry, name.generation);
    if (state_[name.entry].load(std::memory_order_acquire) == expected) return found;
  } catch (const RingError&) {
    if (state_[name.entry].load() == expected) throw;
  }
  return std::nullopt;  // it ended while it was read
}

std::vector<std::uint64_t> ArenaTable::slabs(ExtentName name) const {
  check_entry(name.entry);
  const std::uint64_t word = state_[name.entry].load(std::memory_order_acquire);
  if (generation_of(word) == name.generation && state_of(word) != ExtentState::kFree) {
    auto found = chain(name.entry);
    const std::uint64_t after = state_[name.entry].load(std::memory_order_acquire);
    if (generation_of(after) == name.generation && state_of(after) != ExtentState::kFree) return found;
  }
  fail("NotFound", "arena extent " + name_text(name) + " has ended");
}

SlabCounts ArenaTable::slab_counts(std::optional<std::uint32_t> partition) const {
  if (partition && *partition >= partition_count_) fail("ConfigError", "no such arena partition");
  const std::uint64_t first = partition ? start_of(*partition) : 0;
  const std::uint64_t end = partition ? first + per_partition_ : slab_count_;
  SlabCounts counts{end - first, 0, 0};
  for (std::uint64_t entry = first; entry < end; ++entry) {
    if (visible(entry, ExtentState::kReserved)) counts.reserved += slab_count(entry);
    if (visible(entry, ExtentState::kCommitted)) counts.committed += slab_count(entry);
  }
  return counts;
}

void ArenaTable::check() const {
  for (std::uint32_t partition = 0; partition < partition_count_; ++partition) {
    const std::uint64_t start = start_of(partition);
    std::vector<unsigned char> unheld(per_partition_, 1);
    for (std::uint64_t entry = start; entry < start + per_partition_; ++entry) {
      const std::uint64_t word = state_[entry].load(std::memory_order_acquire);
      if (state_of(word) == ExtentState::kFree) continue;
      // A reserved one's header may be torn: its owner may be dead.
      if (state_of(word) == ExtentState::kCommitted) verified(entry, generation_of(word));
      for (const auto slab : chain(entry)) {
        if (!unheld[slab - start]) {
          fail("CorruptState", "arena: extent " + std::to_string(entry) + " holds a slab of another");
        }
        unheld[slab - start] = 0;
      }
    }
    if (partition_ == partition) {
      const auto count = static_cast<std::uint64_t>(std::count(free_.begin(), free_.end(), 1));
      if (unheld != free_ || count != free_count_) {
        fail("CorruptState", "arena: the free map of partition " + std::to_string(partition) + " differs from its entries");
      }
    }
  }
}

// ---------------------------------------------------------------- entries

void ArenaTable::check_entry(std::uint64_t entry) const {
  if (entry >= slab_count_) {
    fail("NotFound", "arena extent " + std::to_string(entry) + "; expected below " + std::to_string(slab_count_));
  }
}

bool ArenaTable::visible(std::uint64_t entry, ExtentState state) const {
  const std::uint64_t word = state_[entry].load(std::memory_order_acquire);
  return state_of(word) == state && dropped_[entry].load(std::memory_order_acquire) != generation_of(word);
}

// Word by word, so that a reader sees torn headers at worst, never torn words. Each store is a release and each load
// an acquire: a reader that got a word of the next generation then finds that the state word has moved on.
void ArenaTable::write_header(std::uint64_t entry, ExtentHeader header) const {
  header.magic = kExtentMagic;
  header.version = static_cast<std::uint16_t>(kArenaLayoutVersion);
  header.crc = crc32(&header, offsetof(ExtentHeader, crc));
  std::uint64_t words[kExtentHeaderBytes / 8];
  std::memcpy(words, &header, sizeof words);
  Word* at = headers_ + entry * (kExtentHeaderBytes / 8);
  for (const auto word : words) (at++)->store(word, std::memory_order_release);
}

ExtentHeader ArenaTable::read_header(std::uint64_t entry) const {
  std::uint64_t words[kExtentHeaderBytes / 8];
  const Word* at = headers_ + entry * (kExtentHeaderBytes / 8);
  for (auto& word : words) word = (at++)->load(std::memory_order_acquire);
  ExtentHeader header;
  std::memcpy(&header, words, sizeof header);
  return header;
}

std::uint32_t ArenaTable::slab_count(std::uint64_t entry) const {
  const Word& word = headers_[entry * (kExtentHeaderBytes / 8) + offsetof(ExtentHeader, first_slab) / 8];
  return static_cast<std::uint32_t>(word.load(std::memory_order_acquire) >> 32);
}

ExtentHeader ArenaTable::verified(std::uint64_t entry, std::uint64_t generation) const {
  const ExtentHeader header = read_header(entry);
  if (header.magic != kExtentMagic || header.version != kArenaLayoutVersion ||
      header.crc != crc32(&header, offsetof(ExtentHeader, crc))) {
    fail("CorruptState", "arena: the header of extent " + std::to_string(entry) + " does not verify");
  }
  const std::uint64_t needed = header.payload_bytes / slab_bytes_ + (header.payload_bytes % slab_bytes_ != 0);
  if (header.generation != generation || header.first_slab != entry || needed > header.slab_count ||
      header.meta_bytes > kExtentMetaBytesMax) {
    fail("CorruptState", "arena: the header of extent " + std::to_string(entry) + " belongs to another");
  }
  return header;
}

std::vector<std::uint64_t> ArenaTable::chain(std::uint64_t entry) const {
  const std::uint64_t start = entry / per_partition_ * per_partition_;
  const std::uint64_t count = slab_count(entry);
  std::vector<std::uint64_t> found;
  if (count >= 1 && count <= per_partition_) {
    found.reserve(count);
    found.push_back(entry);
    while (found.size() < count) {
      const std::uint64_t next = links_[found.back()].load(std::memory_order_acquire);
      if (next < start || next >= start + per_partition_) break;
      found.push_back(next);
    }
  }
  if (found.size() != count || count == 0) {
    fail("CorruptState", "arena: the chain of extent " + std::to_string(entry) + " leaves its partition");
  }
  return found;
}

// ---------------------------------------------------------------- pages

void touch_pages(void* memory, std::uint64_t bytes, unsigned threads) {
  auto* base = static_cast<unsigned char*>(memory);
  const std::uint64_t count = std::max(1U, threads);
  const std::uint64_t part = round_up(bytes / count + 1, kTouchStep);
  std::vector<std::thread> workers;
  for (std::uint64_t begin = 0; begin < bytes; begin += part) {
    workers.emplace_back([base, begin, end = std::min(bytes, begin + part)] {
      // Adds nothing, atomically: others may be writing there.
      for (std::uint64_t at = begin; at < end; at += kTouchStep) __atomic_fetch_or(base + at, 0, __ATOMIC_RELAXED);
    });
  }
  for (auto& worker : workers) worker.join();
}

}  // namespace turboserve
