// Bindings of the gather of token ids; bindings.cpp adds them to the module.
#include <pybind11/pybind11.h>

#include "buffers.h"
#include "retrieval/gather.h"

namespace py = pybind11;

namespace fastrag {
namespace {

class Tokens {
 public:
  Tokens(const py::buffer& tokens, const py::buffer& offsets)
      : tokens_("tokens", tokens, {-1}), offsets_("offsets", offsets, {-1}) {
    if (offsets_.size(0) < 1) throw py::value_error("offsets: expected at least one, got none");
  }

  TokenTable table() const {
    return {tokens_.data(), tokens_.size(0), offsets_.data(), offsets_.size(0) - 1};
  }

 private:
  Array<int32_t> tokens_;
  Array<int64_t> offsets_;
};

int64_t lengths_of(const py::buffer& tokens, const py::buffer& offsets, const py::buffer& rows,
                   const py::buffer& lengths, int64_t max_length) {
  const Tokens all(tokens, offsets);
  const Array<int64_t> wanted("rows", rows, {-1});
  const Array<int64_t> out("lengths", lengths, {wanted.size(0)}, true);
  if (max_length < 0)
    throw py::value_error("max_length: expected at least 0, got " + std::to_string(max_length));
  const py::gil_scoped_release nogil;
  return passage_lengths(all.table(), wanted.data(), wanted.size(0), max_length, out.data());
}

void gather(const py::buffer& tokens, const py::buffer& offsets, const py::buffer& rows,
            const py::buffer& token_ids) {
  const Tokens all(tokens, offsets);
  const Array<int64_t> wanted("rows", rows, {-1});
  const Array<int64_t> out("token_ids", token_ids, {wanted.size(0), -1}, true);
  const py::gil_scoped_release nogil;
  gather_tokens(all.table(), wanted.data(), wanted.size(0), out.size(1), out.data());
}

}  // namespace

void bind_gather(py::module_& m) {
  m.def("passage_lengths", &lengths_of, py::arg("tokens"), py::arg("offsets"), py::arg("rows"),
        py::arg("lengths"), py::arg("max_length"));
  m.def("gather_tokens", &gather, py::arg("tokens"), py::arg("offsets"), py::arg("rows"),
        py::arg("token_ids"));
}

}  // namespace fastrag
