// The arena's owner killed at every instruction. A child works on a shared arena under ptrace, one instruction at a
// time; whenever the memory differs from the step before, a copy of it is what kill -9 at this instruction would leave:
// a successor takes the copy over and everything is compared with what the child had finished by then.
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <set>
#include <vector>

#include "arena_fixture.h"

namespace {

using namespace turboserve;

constexpr std::uint32_t kSlabs = 8;

// What the child does; `done` counts finished steps.
void work(SmallArena& arena, std::atomic<std::uint64_t>& done) {
  auto table = arena.owner(0, 2);
  done = 1;
  ExtentNote note;
  note.meta = "meta";
  note.digest = std::string(32, 'd');
  std::vector<ExtentName> names;
  for (std::uint64_t i = 0; i < 3; ++i) {  // steps 2..7: reserve and commit chunk 10, 11, 12; 2 slabs each
    names.push_back(table.reserve(session_name(1).data(), 2, 2 * 4096));
    done = 2 + 2 * i;
    note.chunk = static_cast<std::int64_t>(10 + i);
    table.commit(names.back(), note);
    done = 3 + 2 * i;
  }
  table.free(names[1]);
  done = 8;
  names.push_back(table.reserve(session_name(2).data(), 2, 3 * 4096));  // takes back what the parent dropped
  done = 9;
  note.chunk = 20;
  table.commit(names.back(), note);
  done = 10;
}

// The chunks that must be there after `done` steps; the step that was under way may have happened or not.
std::multiset<std::int64_t> chunks_after(std::uint64_t done) {
  std::multiset<std::int64_t> chunks{1};
  if (done >= 3) chunks.insert(10);
  if (done >= 5) chunks.insert(11);
  if (done >= 7) chunks.insert(12);
  if (done >= 8) chunks.erase(11);
  if (done >= 10) chunks.insert(20);
  return chunks;
}

void check_copy(SmallArena& copy, std::uint64_t done) {
  auto successor = copy.owner(0, 99);
  successor.check();
  std::multiset<std::int64_t> found;
  std::uint64_t slabs = 0;
  for (const auto& header : successor.headers(nullptr)) {
    found.insert(header.chunk);
    slabs += header.slab_count;
    require(header.chunk == 1 || std::string(reinterpret_cast<const char*>(header.meta), 4) == "meta", "torn meta");
  }
  require(found == chunks_after(done) || found == chunks_after(done + 1), "neither before nor after the step");
  const auto counts = successor.slab_counts(0);
  require(counts.committed == slabs && counts.reserved == 0, "the ledger is not exact");
  if (slabs == kSlabs) return;
  // What is free can be taken, all of it at once.
  const auto name = successor.reserve(session_name(3).data(), 1, (kSlabs - slabs) * 4096);
  require(successor.slab_counts(0).reserved == kSlabs - slabs, "free slabs are lost");
  successor.commit(name, {});
  successor.check();
}

}  // namespace

int main() {
  SmallArena arena(1, kSlabs), copy(1, kSlabs);
  auto* done = new (mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))
      std::atomic<std::uint64_t>(0);
  {
    // Left by a predecessor: a committed extent, a reservation, and one that somebody else dropped.
    auto before = arena.owner(0, 1);
    ExtentNote note;
    note.chunk = 1;
    before.commit(before.reserve(session_name(9).data(), 1, 100), note);
    before.reserve(session_name(9).data(), 1, 4096);
    const auto dropped = before.reserve(session_name(9).data(), 1, 4096);
    note.chunk = 2;
    before.commit(dropped, note);
    arena.onlooker().free(dropped);
  }
  const pid_t child = fork();
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(77);
    raise(SIGSTOP);
    work(arena, *done);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFEXITED(status)) {
    std::printf("kill_arena: ptrace is not allowed here: skipped\n");
    return 77;
  }
  std::vector<unsigned char> last(arena.memory(), arena.memory() + arena.table_bytes());
  std::uint64_t instructions = 0, states = 0;
  while (true) {
    require(ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) == 0, "single step");
    waitpid(child, &status, 0);
    if (WIFEXITED(status)) break;
    require(WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP, "the child stopped for another reason");
    ++instructions;
    if (std::memcmp(last.data(), arena.memory(), last.size()) == 0) continue;
    std::memcpy(last.data(), arena.memory(), last.size());
    std::memcpy(copy.memory(), last.data(), last.size());
    check_copy(copy, done->load());
    ++states;
  }
  require(WEXITSTATUS(status) == 0 && done->load() == 10, "the child did not finish");
  std::printf("kill_arena: killed at %llu instructions, %llu different memories: fine\n",
              static_cast<unsigned long long>(instructions), static_cast<unsigned long long>(states));
  require(states > 50, "too few states were seen");
  return 0;
}
