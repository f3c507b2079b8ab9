// Helpers of all bindings: checked pointers to memory of Python, and the choice of threads.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "dlpack.h"
#include "isa.h"

namespace fastrag {

inline std::string shape_text(const std::vector<pybind11::ssize_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i)
    text += (i ? ", " : "") + (shape[i] < 0 ? "n" : std::to_string(shape[i]));
  return text + "]";
}

template <class T>
struct Element;

template <>
struct Element<float> {
  static constexpr const char* kName = "float32";
  static constexpr const char* kFormats = "f";
};

template <>
struct Element<int64_t> {
  static constexpr const char* kName = "int64";
  static constexpr const char* kFormats = "lq";
};

template <>
struct Element<bool> {
  static constexpr const char* kName = "bool";
  static constexpr const char* kFormats = "?";
};

template <>
struct Element<int32_t> {
  static constexpr const char* kName = "int32";
  static constexpr const char* kFormats = "i";
};

// A float16, or the bits of a bfloat16, for which the buffer protocol has no format.
template <>
struct Element<uint16_t> {
  static constexpr const char* kName = "float16, or bfloat16 as uint16";
  static constexpr const char* kFormats = "eH";
};

template <>
struct Element<int8_t> {
  static constexpr const char* kName = "int8";
  static constexpr const char* kFormats = "b";
};

template <class T>
bool has_type(const pybind11::buffer_info& info) {
  return info.itemsize == sizeof(T) && info.format.size() == 1 &&
         std::strchr(Element<T>::kFormats, info.format[0]);
}

// A Python buffer or a DLPack capsule. torch makes a capsule in a tenth of the time of an ndarray.
class Memory : public pybind11::object {
 public:
  static bool is_memory(PyObject* x) { return PyObject_CheckBuffer(x) || is_dlpack(x); }
  PYBIND11_OBJECT_DEFAULT(Memory, object, is_memory)

  pybind11::buffer_info request(bool writable = false) const {
    if (!is_dlpack(ptr()))
      return pybind11::reinterpret_borrow<pybind11::buffer>(*this).request(writable);
    return dlpack_info(PyCapsule_GetPointer(ptr(), kDlpackName));
  }
};

// A checked pointer to memory of Python. A size of -1 in `shape` allows any size.
template <class T>
class Array {
 public:
  Array(const char* name, const Memory& memory, std::vector<pybind11::ssize_t> shape,
        bool writable = false, bool pitched = false)
      : owner_(memory), info_(memory.request(writable)) {
    bool good = has_type<T>(info_) && info_.shape.size() == shape.size();
    for (size_t i = 0; good && i < shape.size(); ++i)
      good = shape[i] < 0 || shape[i] == info_.shape[i];
    if (!good)
      throw pybind11::value_error(std::string(name) + ": expected " + Element<T>::kName + " " +
                                  shape_text(shape) + ", got format '" + info_.format + "' " +
                                  shape_text(info_.shape));
    if (reinterpret_cast<uintptr_t>(info_.ptr) % alignof(T) != 0)
      throw pybind11::value_error(std::string(name) +
                                  ": expected an address that is a multiple of " +
                                  std::to_string(alignof(T)) + ", got one that is not");
    if (info_.size == 0) return;  // the strides of an empty array have no meaning
    pybind11::ssize_t dense = sizeof(T);
    for (size_t i = shape.size(); i-- > 0;) {
      const bool free = info_.shape[i] == 1 || (pitched && i == 0 && info_.strides[i] >= dense &&
                                                info_.strides[i] % sizeof(T) == 0);
      if (info_.strides[i] != dense && !free)
        throw pybind11::value_error(
            std::string(name) + ": expected " +
            (pitched ? "lines without gaps between numbers" : "numbers without gaps between them") +
            ", got strides of " + shape_text(info_.strides) + " bytes for shape " +
            shape_text(info_.shape));
      dense *= info_.shape[i];
    }
  }

  T* data() const { return static_cast<T*>(info_.ptr); }
  int64_t size(size_t i) const { return info_.shape[i]; }
  const std::string& format() const { return info_.format; }
  int64_t pitch() const { return info_.strides[0] / static_cast<pybind11::ssize_t>(sizeof(T)); }

 private:
  Memory owner_;
  pybind11::buffer_info info_;
};

inline Threads threads_of(int count, const std::string& isa) {
  if (count < 1)
    throw pybind11::value_error("threads: expected at least 1, got " + std::to_string(count));
  if (isa.empty()) return {count, best_isa()};
  std::string names;
  for (const Isa known : kAllIsas) {
    if (!has_isa(known)) continue;
    if (isa == isa_name(known)) return {count, known};
    if (known == Isa::kEmulatedAmx) continue;  // for tests
    names += (names.empty() ? "" : ", ") + std::string(isa_name(known));
  }
  throw pybind11::value_error("isa: expected one of " + names +
                              " (what this machine and this build have), got '" + isa + "'");
}

}  // namespace fastrag
