// Access to a tensor in a DLPack capsule (github.com/dmlc/dlpack, the unversioned protocol).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fastrag {

constexpr const char* kDlpackName = "dltensor";

// The first member of the struct in the capsule. The other members are not needed, because the
// capsule keeps ownership.
struct DlpackTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null if the tensor is contiguous
  uint64_t byte_offset;
};

inline bool is_dlpack(PyObject* x) {
  return PyCapsule_CheckExact(x) && PyCapsule_IsValid(x, kDlpackName);
}

// The format letter of the buffer protocol. bfloat16, which has none, gets that of its bits; other
// dtypes get an empty string.
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
