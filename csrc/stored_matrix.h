// A matrix in any storage format, from buffers of Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "buffers.h"
#include "mips/mips.h"

namespace fastrag {

using OptionalBuffer = std::optional<Memory>;

// A matrix in any storage format; holds references to its memory.
class Matrix {
 public:
  Matrix(const Memory& index_emb, const OptionalBuffer& scale, const OptionalBuffer& offset,
         pybind11::ssize_t dim) {
    const std::string format = index_emb.request().format;
    if (format == "b") {
      if (!scale || !offset)
        throw pybind11::value_error(
            "scale and offset: expected both with an index_emb of int8, got none");
      matrix_.scale = kept<float>("scale", *scale, {dim})->data();
      matrix_.offset = kept<float>("offset", *offset, {dim})->data();
      take<int8_t>(index_emb, dim, Storage::kInt8);
    } else {
      if (scale || offset)
        throw pybind11::value_error("scale and offset: expected none without an index_emb of int8");
      if (format == "e" || format == "H")
        take<uint16_t>(index_emb, dim, format == "e" ? Storage::kFloat16 : Storage::kBfloat16);
      else
        take<float>(index_emb, dim, Storage::kFloat32);
    }
  }

  const MipsMatrix& get() const { return matrix_; }

 private:
  template <class T>
  void take(const Memory& buffer, pybind11::ssize_t dim, Storage storage) {
    const Array<T>& array = *kept<T>("index_emb", buffer, {-1, dim});
    if (array.size(0) > kMaxRows)
      throw pybind11::value_error("index_emb: expected at most " + std::to_string(kMaxRows) +
                                  " rows, got " + std::to_string(array.size(0)));
    matrix_.data = array.data();
    matrix_.n_rows = array.size(0);
    matrix_.pitch = array.size(0) > 1 ? array.pitch() : array.size(1);
    matrix_.storage = storage;
  }

  template <class T>
  const Array<T>* kept(const char* name, const Memory& buffer,
                       std::vector<pybind11::ssize_t> shape) {
    auto array = std::make_shared<Array<T>>(name, buffer, std::move(shape), false, true);
    kept_.push_back(array);
    return array.get();
  }

  std::vector<std::shared_ptr<void>> kept_;
  MipsMatrix matrix_{};
};

}  // namespace fastrag
