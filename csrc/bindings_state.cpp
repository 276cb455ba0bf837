// Python's view of what carries session state: checksum, arena table, copy engine, page-locking.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "checksum.h"
#include "copy_engine.h"
#include "cuda_runtime.h"
#include "frame_ring.h"
#include "pinned_arena.h"

namespace turboserve {
namespace {

// Below this the work is shorter than the wait for a contended interpreter lock.
constexpr std::uint64_t kReleaseGilBytes = 64 * 1024;

py::bytes header_bytes(const ExtentHeader& header) {
  return py::bytes(reinterpret_cast<const char*>(&header), sizeof header);
}

std::uint64_t checksum64(const py::iterable& parts) {
  Checksum64 running;
  for (const auto& part : parts) {
    const BufferView view(py::reinterpret_borrow<py::object>(part), false);
    if (view.bytes() < kReleaseGilBytes) {
      running.update(view.data(), view.bytes());
    } else {
      const py::gil_scoped_release released;
      running.update(view.data(), view.bytes());
    }
  }
  return running.value();
}

// The table and the buffer it works on, which `close` gives back.
class HeldTable {
 public:
  HeldTable(const py::object& memory, std::optional<std::uint32_t> partition, std::uint64_t owner_epoch)
      : view_(std::make_unique<BufferView>(memory, true)) {
    table_ = std::make_unique<ArenaTable>(view_->data(), view_->bytes(), partition, owner_epoch);
  }
  ArenaTable& table() const {
    if (!table_) throw RingError("Conflict", "the arena is closed");
    return *table_;
  }
  void close() {
    table_.reset();
    view_.reset();
  }

 private:
  std::unique_ptr<BufferView> view_;
  std::unique_ptr<ArenaTable> table_;
};

const char* session_of(const std::string& session) {
  if (session.size() != sizeof ExtentHeader::session) throw py::value_error("a session id is 26 bytes");
  return session.data();
}

py::tuple reserve(HeldTable& self, const py::bytes& session, std::uint64_t epoch, std::uint64_t payload_bytes) {
  const ExtentName name = self.table().reserve(session_of(session), epoch, payload_bytes);
  return py::make_tuple(name.entry, name.generation);
}

void commit(HeldTable& self, std::uint64_t entry, std::uint64_t generation, std::uint16_t kind, std::int64_t chunk,
            const py::bytes& digest, const py::bytes& meta, std::uint64_t checksum) {
  self.table().commit({entry, generation}, ExtentNote{kind, chunk, digest, meta, checksum});
}

py::list headers(HeldTable& self, const std::optional<py::bytes>& session) {
  const std::string wanted = session ? std::string(*session) : std::string();
  py::list found;
  for (const auto& one : self.table().headers(session ? session_of(wanted) : nullptr)) found.append(header_bytes(one));
  return found;
}

std::vector<CopyJob> jobs_of(const py::object& copies) {
  const BufferView view(copies, false);
  if (view.bytes() % (3 * sizeof(std::uint64_t)) != 0) throw py::value_error("copies are rows of three 64-bit numbers");
  std::vector<CopyJob> jobs(view.bytes() / (3 * sizeof(std::uint64_t)));
  const auto* words = static_cast<const unsigned char*>(view.data());
  for (auto& job : jobs) {
    std::uint64_t row[3];
    std::memcpy(row, words, sizeof row);
    words += sizeof row;
    job = {reinterpret_cast<void*>(row[0]), reinterpret_cast<const void*>(row[1]), row[2]};
  }
  return jobs;
}

std::shared_ptr<CopyBatch> submit(CopyEngine& self, const py::object& copies, std::uintptr_t after) {
  return self.submit(jobs_of(copies), reinterpret_cast<CudaStream>(after));
}

}  // namespace

void bind_state(py::module_& module) {
  module.attr("ARENA_LAYOUT_VERSION") = kArenaLayoutVersion;
  module.def("checksum64", &checksum64, py::arg("parts"));
  py::class_<HeldTable>(module, "ArenaTable")
      .def(py::init<const py::object&, std::optional<std::uint32_t>, std::uint64_t>(), py::arg("memory"),
           py::arg("partition"), py::arg("owner_epoch"))
      .def("reserve", &reserve)
      .def("commit", &commit)
      .def("free", [](HeldTable& self, std::uint64_t entry,
                      std::uint64_t generation) { return self.table().free({entry, generation}); })
      .def("sweep", [](HeldTable& self, std::uint32_t partition) { return self.table().sweep(partition); })
      .def("headers", &headers, py::arg("session") = py::none())
      .def("header",
           [](HeldTable& self, std::uint64_t entry, std::uint64_t generation) -> std::optional<py::bytes> {
             const auto found = self.table().header({entry, generation});
             if (!found) return std::nullopt;
             return header_bytes(*found);
           })
      .def("slabs", [](HeldTable& self, std::uint64_t entry,
                       std::uint64_t generation) { return self.table().slabs({entry, generation}); })
      .def("slab_counts",
           [](HeldTable& self, std::optional<std::uint32_t> partition) {
             const SlabCounts counts = self.table().slab_counts(partition);
             return py::make_tuple(counts.total, counts.reserved, counts.committed);
           },
           py::arg("partition") = py::none())
      .def("check", [](HeldTable& self) { self.table().check(); })
      .def("close", &HeldTable::close);

  py::class_<CopyBatch, std::shared_ptr<CopyBatch>>(module, "CopyBatch")
      .def_property_readonly("size", &CopyBatch::size)
      .def_property_readonly("copied", &CopyBatch::copied)
      .def("done", &CopyBatch::done)
      .def("wait", &CopyBatch::wait, py::arg("timeout_s"), py::arg("copies"), py::call_guard<py::gil_scoped_release>());
  py::class_<CopyEngine>(module, "CopyEngine")
      .def(py::init<int, std::uint64_t, bool>(), py::arg("device"), py::arg("queue_max"), py::arg("stable_sources"))
      .def("submit", &submit, py::arg("copies"), py::arg("after"))
      .def("close", &CopyEngine::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("batched", &CopyEngine::batched);

  module.def(
      "copy_now",
      [](const py::object& copies) {
        const auto jobs = jobs_of(copies);
        const py::gil_scoped_release released;
        copy_now(jobs);
      },
      py::arg("copies"));
  module.def(
      "touch_pages",
      [](const py::object& memory, unsigned threads) {
        const BufferView view(memory, true);
        const py::gil_scoped_release released;
        touch_pages(view.data(), view.bytes(), threads);
      },
      py::arg("memory"), py::arg("threads"));
  module.def(
      "load_cuda",
      [](const std::vector<std::string>& paths) {
        const std::string found = cuda_runtime(paths).path;  // first: later calls know no paths
        return py::make_tuple(found, cuda_device_count());
      },
      py::arg("paths"), "(what was loaded or why nothing was, devices that can be used)");
  module.def(
      "cuda_register",
      [](const py::object& memory) {
        const BufferView view(memory, true);
        const py::gil_scoped_release released;
        cuda_register(view.data(), view.bytes());
      },
      py::arg("memory"));
  module.def(
      "cuda_unregister",
      [](const py::object& memory) {
        const BufferView view(memory, true);
        cuda_unregister(view.data(), view.bytes());
      },
      py::arg("memory"));
}

}  // namespace turboserve
