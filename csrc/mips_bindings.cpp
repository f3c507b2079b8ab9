// The search as Python sees it; bindings.cpp adds it to the module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "buffers.h"
#include "mips.h"

namespace py = pybind11;

namespace fastrag {
namespace {

using OptionalBuffer = std::optional<py::buffer>;

void search(const py::buffer& query_emb, const py::buffer& index_emb, const py::buffer& scores,
            const py::buffer& rows, const OptionalBuffer& removed, const OptionalBuffer& exclude,
            int threads, const std::string& isa) {
  const Array<float> query("query_emb", query_emb, {-1, -1});
  const Array<float> matrix("index_emb", index_emb, {-1, query.size(1)}, false, true);
  const Array<float> best("scores", scores, {query.size(0), -1}, true);
  const Array<int64_t> best_rows("rows", rows, {query.size(0), best.size(1)}, true);
  if (matrix.size(0) > kMaxRows)
    throw py::value_error("index_emb: expected at most " + std::to_string(kMaxRows) +
                          " rows, got " + std::to_string(matrix.size(0)));
  if (best.size(1) < 1) throw py::value_error("scores: expected at least one column, got none");
  MipsQuestion question{
      query.data(), query.size(0), query.size(1), best.size(1), nullptr, nullptr, 0};
  std::optional<Array<bool>> mask;
  std::optional<Array<int64_t>> barred;
  if (removed) {
    mask.emplace("removed", *removed, std::vector<py::ssize_t>{matrix.size(0)});
    question.removed = mask->data();
  }
  if (exclude) {
    barred.emplace("exclude", *exclude, std::vector<py::ssize_t>{query.size(0), -1});
    question.exclude = barred->data();
    question.n_exclude = barred->size(1);
  }
  const MipsMatrix where{matrix.data(), matrix.size(0),
                         matrix.size(0) > 1 ? matrix.pitch() : matrix.size(1)};
  const Threads with = threads_of(threads, isa);
  const py::gil_scoped_release nogil;
  mips_topk(question, where, {best.data(), best_rows.data()}, with);
}

void merge(const py::buffer& part_scores, const py::buffer& part_rows, const py::buffer& scores,
           const py::buffer& rows) {
  const Array<float> parts("part_scores", part_scores, {-1, -1, -1});
  const Array<int64_t> rows_of_parts("part_rows", part_rows,
                                     {parts.size(0), parts.size(1), parts.size(2)});
  const Array<float> best("scores", scores, {parts.size(1), parts.size(2)}, true);
  const Array<int64_t> best_rows("rows", rows, {parts.size(1), parts.size(2)}, true);
  const py::gil_scoped_release nogil;
  merge_topk(parts.data(), rows_of_parts.data(), parts.size(0), parts.size(1), parts.size(2),
             {best.data(), best_rows.data()});
}

}  // namespace

void bind_mips(py::module_& m) {
  m.def("mips_topk", &search, py::arg("query_emb"), py::arg("index_emb"), py::arg("scores"),
        py::arg("rows"), py::kw_only(), py::arg("removed") = py::none(),
        py::arg("exclude") = py::none(), py::arg("threads") = 1, py::arg("isa") = "");
  m.def("merge_topk", &merge, py::arg("part_scores"), py::arg("part_rows"), py::arg("scores"),
        py::arg("rows"));
}

}  // namespace fastrag
