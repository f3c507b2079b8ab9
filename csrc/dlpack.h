// What DLPack (github.com/dmlc/dlpack, of before its versions) says of a tensor in a capsule.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fastrag {

constexpr const char* kDlpackName = "dltensor";

// The first member of what the capsule points to, and all that is looked at: the capsule stays the
// owner.
struct DlpackTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null where there are no gaps
  uint64_t byte_offset;
};

inline bool is_dlpack(PyObject* x) {
  return PyCapsule_CheckExact(x) && PyCapsule_IsValid(x, kDlpackName);
}

// The letter of the buffer protocol; bfloat16 has none and goes as its bits. Empty for any other.
inline const char* dlpack_format(const DlpackTensor& x) {
  enum { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };
  if (x.type_lanes != 1) return "";
  switch (x.type_code << 8 | x.type_bits) {
    case kFloat << 8 | 32:
      return "f";
    case kFloat << 8 | 16:
      return "e";
    case kBfloat << 8 | 16:
      return "H";
    case kInt << 8 | 64:
      return "q";
    case kInt << 8 | 32:
      return "i";
    case kInt << 8 | 8:
      return "b";
    case kBool << 8 | 8:
      return "?";
    default:
      return "";
  }
}

inline pybind11::buffer_info dlpack_info(const void* of_capsule) {
  constexpr int32_t kCpu = 1;
  const auto& x = *static_cast<const DlpackTensor*>(of_capsule);
  if (x.device_type != kCpu)
    throw pybind11::value_error("expected memory of the CPU, got device type " +
                                std::to_string(x.device_type) + " of DLPack");
  const pybind11::ssize_t itemsize = x.type_bits / 8;
  std::vector<pybind11::ssize_t> shape(x.shape, x.shape + x.ndim), strides(x.ndim);
  pybind11::ssize_t dense = itemsize;
  for (int32_t i = x.ndim; i-- > 0;) {
    strides[i] = x.strides ? x.strides[i] * itemsize : dense;
    dense *= shape[i];
  }
  return {static_cast<char*>(x.data) + x.byte_offset,
          itemsize,
          dlpack_format(x),
          x.ndim,
          std::move(shape),
          std::move(strides)};
}

}  // namespace fastrag
