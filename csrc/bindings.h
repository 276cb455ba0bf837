// What the binding files share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace turboserve {

namespace py = pybind11;

// A borrowed C-contiguous buffer, given back on every way out.
class BufferView {
 public:
  BufferView(const py::object& owner, bool writable) {
    if (PyObject_GetBuffer(owner.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
      throw py::error_already_set();
    }
  }
  ~BufferView() { PyBuffer_Release(&view_); }
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;
  void* data() const { return view_.buf; }
  std::uint64_t bytes() const { return static_cast<std::uint64_t>(view_.len); }

 private:
  Py_buffer view_{};
};

// bindings_state.cpp: checksum, arena table, copy engine.
void bind_state(py::module_& module);

}  // namespace turboserve
