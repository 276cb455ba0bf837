// Python's view of csrc/: turboserve._native. No PyTorch headers, no CUDA; payloads are anything with a buffer.
#include <pybind11/pybind11.h>

#include <memory>

#include "bindings.h"
#include "frame_ring.h"

namespace py = pybind11;
using turboserve::BufferView;
using turboserve::Mapping;
using turboserve::RecordHeader;
using turboserve::RingError;

namespace {

// Below this a copy is shorter than the wait for a contended interpreter lock.
constexpr std::uint64_t kReleaseGilBytes = 64 * 1024;

// One end of a ring, used by one thread at a time: copies run without the interpreter lock, so a second thread
// could otherwise push into the same place or unmap the memory under a copy. All else here runs under that lock,
// which is why plain reads need no turn and `close` may leave the unmapping to whoever has the turn.
template <typename End>
class Held {
 public:
  template <typename... Args>
  explicit Held(int fd, Args... args) : end_(std::make_unique<End>(std::make_shared<Mapping>(fd), args...)) {}

  const End& end() const {
    if (!end_ || closing_) throw RingError("Conflict", "frame ring: this end is closed");
    return *end_;
  }

  class Turn {
   public:
    explicit Turn(Held& held) : held_(held) {
      held_.end();
      if (held_.busy_) throw RingError("Conflict", "frame ring: two threads use one end at a time; expected one");
      held_.busy_ = true;
    }
    ~Turn() {
      held_.busy_ = false;
      if (held_.closing_) held_.end_.reset();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    End& operator*() const { return *held_.end_; }
    End* operator->() const { return held_.end_.get(); }

   private:
    Held& held_;
  };

  void close() {
    closing_ = true;
    if (!busy_) end_.reset();
  }

 private:
  std::unique_ptr<End> end_;
  bool busy_ = false;
  bool closing_ = false;
};

using Producer = Held<turboserve::RingProducer>;
using Consumer = Held<turboserve::RingConsumer>;

bool push(Producer& self, const py::object& header, const py::object& payload) {
  const BufferView head(header, false);
  const BufferView body(payload, false);
  if (head.bytes() != sizeof(RecordHeader)) throw py::value_error("a record header is 192 bytes");
  const Producer::Turn end(self);
  if (body.bytes() < kReleaseGilBytes) return end->push(head.data(), body.data(), body.bytes());
  const py::gil_scoped_release released;
  return end->push(head.data(), body.data(), body.bytes());
}

py::bytes header_bytes(const RecordHeader& header) {
  return py::bytes(reinterpret_cast<const char*>(&header), sizeof header);
}

py::object peek(Consumer& self) {
  const Consumer::Turn end(self);
  const auto header = end->peek();
  return header ? py::object(header_bytes(*header)) : py::none();
}

void take(turboserve::RingConsumer& end, const RecordHeader& header, void* target) {
  if (header.payload_bytes < kReleaseGilBytes) {
    end.take(header, target);
    return;
  }
  const py::gil_scoped_release released;
  end.take(header, target);
}

py::object pop(Consumer& self) {
  const Consumer::Turn end(self);
  const auto header = end->peek();
  if (!header) return py::none();
  // Nobody else can see the new bytes object yet, so writing into it is allowed.
  auto payload = py::reinterpret_steal<py::object>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(header->payload_bytes)));
  if (!payload) throw py::error_already_set();
  take(*end, *header, PyBytes_AS_STRING(payload.ptr()));
  return py::make_tuple(header_bytes(*header), payload);
}

py::object pop_into(Consumer& self, const py::object& target) {
  const BufferView body(target, true);
  const Consumer::Turn end(self);
  const auto header = end->peek();
  if (!header) return py::none();
  if (body.bytes() < header->payload_bytes) {
    throw py::value_error("the next payload has " + std::to_string(header->payload_bytes) + " B, the target " +
                          std::to_string(body.bytes()));
  }
  take(*end, *header, body.data());
  return header_bytes(*header);
}

void raise_typed(std::exception_ptr raised) {
  try {
    if (raised) std::rethrow_exception(raised);
  } catch (const RingError& error) {
    py::set_error(py::module_::import("turboserve.errors").attr(error.python_type), error.what());
  }
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "Compiled parts of TurboServe. Public faces: turboserve.runtime.frame_ring, .arena, .checksum, .copy_engine.";
  module.attr("LAYOUT_VERSION") = turboserve::kLayoutVersion;
  py::register_exception_translator(raise_typed);

  turboserve::bind_state(module);
  module.def("create_ring", &turboserve::create_ring, py::arg("capacity_bytes"));
  py::class_<Producer>(module, "RingProducer")
      .def(py::init<int, std::uint64_t>(), py::arg("fd"), py::arg("worker_epoch"))
      .def("push", &push, py::arg("header"), py::arg("payload"))
      .def("close", &Producer::close)
      .def_property_readonly("worker_epoch", [](const Producer& self) { return self.end().worker_epoch(); })
      .def_property_readonly("capacity_bytes", [](const Producer& self) { return self.end().capacity(); })
      .def_property_readonly("used_bytes", [](const Producer& self) { return self.end().used_now(); });
  py::class_<Consumer>(module, "RingConsumer")
      .def(py::init<int>(), py::arg("fd"))
      .def("peek", &peek)
      .def("pop", &pop)
      .def("pop_into", &pop_into, py::arg("target"))
      .def("discard", [](Consumer& self) { return Consumer::Turn(self)->discard(); })
      .def("close", &Consumer::close)
      .def_property_readonly("capacity_bytes", [](const Consumer& self) { return self.end().capacity(); })
      .def_property_readonly("used_bytes", [](const Consumer& self) { return self.end().used_now(); });
}
