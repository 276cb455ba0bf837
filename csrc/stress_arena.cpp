// Stress of the arena's table: random operations against a model of it, the ledger compared after every one; and one
// owner with threads that read and drop at the same time. `make sanitize` runs it under the sanitizers, the tests run
// a million operations without them.
#include <atomic>
#include <map>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "arena_fixture.h"

namespace {

using namespace turboserve;

struct Known {
  ExtentName name;
  std::uint64_t slabs;
  bool committed;
  std::uint32_t partition;
  std::uint64_t session;
  std::int64_t chunk;
};

// Two owners, an onlooker, successors and sweeps, one operation at a time.
void fuzz(std::uint64_t operations) {
  constexpr std::uint32_t kSlabs = 24;
  std::mt19937_64 random(7);
  SmallArena arena(2, kSlabs);
  std::uint64_t epochs[2] = {1, 1};
  std::unique_ptr<ArenaTable> owners[2];
  for (std::uint32_t p = 0; p < 2; ++p) owners[p] = std::make_unique<ArenaTable>(arena.owner(p, 1));
  auto onlooker = arena.onlooker();
  std::vector<Known> known;
  std::vector<ExtentName> ended;
  std::uint64_t held[2] = {0, 0};
  const auto forget = [&](std::size_t at) {
    held[known[at].partition] -= known[at].slabs;
    ended.push_back(known[at].name);
    if (ended.size() > 100) ended.erase(ended.begin());
    known[at] = known.back();
    known.pop_back();
  };
  for (std::uint64_t i = 0; i < operations; ++i) {
    const auto partition = static_cast<std::uint32_t>(random() % 2);
    const std::uint64_t dice = random() % 1000;
    const std::size_t at = known.empty() ? 0 : random() % known.size();
    if (dice < 400) {
      const std::uint64_t bytes = random() % 5 ? random() % (4 * 4096) : random() % (16 * 4096);
      const std::uint64_t needed = bytes == 0 ? 1 : (bytes + 4095) / 4096;
      try {
        const std::uint64_t session = random() % 20;
        const auto name = owners[partition]->reserve(session_name(session).data(), i, bytes);
        require(needed <= kSlabs - held[partition], "a reservation without room");
        require(owners[partition]->slabs(name).size() == needed, "a wrong number of slabs");
        known.push_back({name, needed, false, partition, session, 0});
        held[partition] += needed;
      } catch (const RingError&) {
        require(needed > kSlabs - held[partition], "refused with room");
      }
    } else if (dice < 650 && !known.empty()) {
      ExtentNote note;
      note.chunk = static_cast<std::int64_t>(random() % 1000);
      note.meta = std::string(random() % 320, 'm');
      try {
        owners[known[at].partition]->commit(known[at].name, note);
        require(!known[at].committed, "committed twice");
        known[at].committed = true;
        known[at].chunk = note.chunk;
      } catch (const RingError&) {
        require(known[at].committed, "a commit was refused");
      }
    } else if (dice < 930 && !known.empty()) {
      auto& by = dice < 800 ? *owners[known[at].partition] : dice < 900 ? *owners[1 - known[at].partition] : onlooker;
      require(by.free(known[at].name), "an extent could not be freed");
      forget(at);
    } else if (dice < 980) {
      if (!ended.empty()) require(!onlooker.free(ended[random() % ended.size()]), "freed twice");
    } else if (dice < 990) {
      const bool dead = random() % 2;
      if (dead) onlooker.sweep(partition);
      owners[partition] = std::make_unique<ArenaTable>(arena.owner(partition, ++epochs[partition]));
      for (std::size_t k = known.size(); k-- > 0;) {
        if (known[k].partition == partition && !known[k].committed) forget(k);
      }
    } else if (!known.empty()) {
      const auto header = onlooker.header(known[at].name);
      require(header.has_value() == known[at].committed, "an extent is there and should not, or the other way");
      if (header) require(header->chunk == known[at].chunk, "another extent's header");
      std::uint64_t expected = 0;
      for (const auto& one : known) expected += one.committed && one.session == known[at].session;
      require(onlooker.headers(session_name(known[at].session).data()).size() == expected, "find missed one");
    }
    std::uint64_t reserved = 0, committed = 0;
    for (const auto& one : known) (one.committed ? committed : reserved) += one.slabs;
    const auto counts = onlooker.slab_counts(std::nullopt);
    require(counts.total == 2 * kSlabs && counts.reserved == reserved && counts.committed == committed,
            "the ledger is not exact");
    if (i % 512 == 0) {
      owners[0]->check();
      owners[1]->check();
    }
  }
}

// One owner that reserves, commits and frees as fast as it can; readers that find, read and drop meanwhile.
void share(std::uint64_t rounds) {
  SmallArena arena(2, 24);
  std::atomic<bool> over{false};
  std::vector<std::thread> readers;
  for (int r = 0; r < 2; ++r) {
    readers.emplace_back([&arena, &over, r] {
      auto table = arena.onlooker();
      std::mt19937_64 random(static_cast<std::uint64_t>(r));
      while (!over.load()) {
        for (const auto& header : table.headers(nullptr)) {
          require(header.meta_bytes == 8 && header.epoch == static_cast<std::uint64_t>(header.chunk), "a torn header");
          if (random() % 4 == 0) table.free({header.first_slab, header.generation});
        }
        const auto counts = table.slab_counts(std::nullopt);
        require(counts.reserved + counts.committed <= 2 * counts.total, "a wild ledger");
      }
    });
  }
  auto table = arena.owner(0, 1);
  std::mt19937_64 random(3);
  std::vector<ExtentName> mine;
  for (std::uint64_t i = 0; i < rounds; ++i) {
    try {
      const auto name = table.reserve(session_name(i % 5).data(), i, random() % (5 * 4096));
      ExtentNote note;
      note.chunk = static_cast<std::int64_t>(i);
      note.meta = "12345678";
      table.commit(name, note);
      mine.push_back(name);
    } catch (const RingError&) {
      for (const auto name : mine) table.free(name);
      mine.clear();
    }
  }
  over.store(true);
  for (auto& reader : readers) reader.join();
  table.check();
  touch_pages(arena.memory(), arena.bytes(), 3);
  table.check();
}

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t operations = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20000;
  fuzz(operations);
  share(operations);
  std::printf("stress_arena: %llu operations: fine\n", static_cast<unsigned long long>(operations));
  return 0;
}
