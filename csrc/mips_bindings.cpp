// Bindings of the search; bindings.cpp adds them to the module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "buffers.h"
#include "mips/mips.h"
#include "stored_matrix.h"

namespace py = pybind11;

namespace fastrag {
namespace {

// The question and its answer, with references to their memory.
struct Call {
  Call(const py::buffer& query_emb, const py::buffer& scores, const py::buffer& rows,
       const OptionalBuffer& removed, const OptionalBuffer& exclude, int64_t n_rows)
      : query("query_emb", query_emb, {-1, -1}),
        best("scores", scores, {query.size(0), -1}, true),
        best_rows("rows", rows, {query.size(0), best.size(1)}, true),
        question{query.data(), query.size(0), query.size(1), best.size(1), nullptr, nullptr, 0},
        answer{best.data(), best_rows.data()} {
    if (best.size(1) < 1) throw py::value_error("scores: expected at least one column, got none");
    if (removed) {
      mask.emplace("removed", *removed, std::vector<py::ssize_t>{n_rows});
      question.removed = mask->data();
    }
    if (exclude) {
      excluded.emplace("exclude", *exclude, std::vector<py::ssize_t>{query.size(0), -1});
      question.exclude = excluded->data();
      question.n_exclude = excluded->size(1);
    }
  }

  const Array<float> query, best;
  const Array<int64_t> best_rows;
  std::optional<Array<bool>> mask;
  std::optional<Array<int64_t>> excluded;
  MipsQuestion question;
  MipsAnswer answer;
};

py::ssize_t width_of(const py::buffer& query_emb) {
  return Array<float>("query_emb", query_emb, {-1, -1}).size(1);
}

void search(const py::buffer& query_emb, const py::buffer& index_emb, const py::buffer& scores,
            const py::buffer& rows, const OptionalBuffer& removed, const OptionalBuffer& exclude,
            const OptionalBuffer& scale, const OptionalBuffer& offset, int threads,
            const std::string& isa) {
  const Matrix matrix(index_emb, scale, offset, width_of(query_emb));
  const Call call(query_emb, scores, rows, removed, exclude, matrix.get().n_rows);
  const Threads with = threads_of(threads, isa);
  const py::gil_scoped_release nogil;
  mips_topk(call.question, matrix.get(), call.answer, with);
}

// A float32 matrix with its codes and the bounds of their difference.
class CodedMatrix {
 public:
  CodedMatrix(const py::buffer& index_emb, const py::buffer& codes, const py::buffer& scale,
              const py::buffer& offset, const py::buffer& code_norm, const py::buffer& rest_norm,
              const py::buffer& code_sum, bool writable)
      : codes_(codes, scale, offset, dim_of(scale)),
        matrix_(index_emb, std::nullopt, std::nullopt, dim_of(scale)),
        code_norm_("code_norm", code_norm, {matrix_.get().n_rows}, writable),
        rest_norm_("rest_norm", rest_norm, {matrix_.get().n_rows}, writable),
        code_sum_("code_sum", code_sum, {matrix_.get().n_rows}, writable) {
    if (matrix_.get().storage != Storage::kFloat32 || codes_.get().storage != Storage::kInt8)
      throw py::value_error("index_emb and codes: expected float32 and int8");
    if (matrix_.get().n_rows != codes_.get().n_rows)
      throw py::value_error("codes: expected " + std::to_string(matrix_.get().n_rows) +
                            " rows, got " + std::to_string(codes_.get().n_rows));
  }

  const MipsMatrix& matrix() const { return matrix_.get(); }
  const MipsMatrix& codes() const { return codes_.get(); }
  CodeBounds bounds() const { return {code_norm_.data(), rest_norm_.data(), code_sum_.data()}; }

  static py::ssize_t dim_of(const py::buffer& scale) {
    return Array<float>("scale", scale, {-1}).size(0);
  }

 private:
  Matrix codes_, matrix_;
  Array<float> code_norm_, rest_norm_;
  Array<int32_t> code_sum_;
};

// The codes of the leading coordinates of n_rows rows of width dim.
class Lead {
 public:
  Lead(const py::buffer& rotation, const py::buffer& codes, const py::buffer& code_norm,
       const py::buffer& rest_norm, const py::buffer& code_sum, const py::buffer& constants,
       int64_t n_rows, int64_t dim, bool writable)
      : rotation_("rotation", rotation, {-1, dim}),
        codes_("lead_codes", codes, {n_rows, rotation_.size(0)}, writable),
        code_norm_("lead_norm", code_norm, {n_rows}, writable),
        rest_norm_("tail_norm", rest_norm, {n_rows}, writable),
        code_sum_("lead_sum", code_sum, {n_rows}, writable),
        constants_("lead_constants", constants, {3}) {}

  LeadCodes get() const {
    LeadCodes lead;
    lead.codes.data = codes_.data();
    lead.codes.n_rows = codes_.size(0);
    lead.codes.pitch = codes_.size(0) > 1 ? codes_.pitch() : codes_.size(1);
    lead.codes.storage = Storage::kInt8;
    lead.bounds = {code_norm_.data(), rest_norm_.data(), code_sum_.data()};
    lead.rotation = rotation_.data();
    lead.n_lead = rotation_.size(0);
    lead.step = constants_.data()[0];
    lead.share = constants_.data()[1];
    lead.defect = constants_.data()[2];
    return lead;
  }

 private:
  Array<float> rotation_;
  Array<int8_t> codes_;
  Array<float> code_norm_, rest_norm_;
  Array<int32_t> code_sum_;
  Array<float> constants_;
};

std::pair<int64_t, int64_t> search_by_codes(
    const py::buffer& query_emb, const py::buffer& index_emb, const py::buffer& codes,
    const py::buffer& scale, const py::buffer& offset, const py::buffer& code_norm,
    const py::buffer& rest_norm, const py::buffer& code_sum, const py::buffer& scores,
    const py::buffer& rows, const OptionalBuffer& rotation, const OptionalBuffer& lead_codes,
    const OptionalBuffer& lead_norm, const OptionalBuffer& tail_norm,
    const OptionalBuffer& lead_sum, const OptionalBuffer& lead_constants,
    const OptionalBuffer& removed, const OptionalBuffer& exclude, int threads,
    const std::string& isa) {
  const CodedMatrix coded(index_emb, codes, scale, offset, code_norm, rest_norm, code_sum, false);
  const int64_t dim = CodedMatrix::dim_of(scale), n_rows = coded.matrix().n_rows;
  const Call call(query_emb, scores, rows, removed, exclude, n_rows);
  if (call.question.dim != dim)
    throw py::value_error("query_emb: expected " + std::to_string(dim) + " numbers each, got " +
                          std::to_string(call.question.dim));
  std::optional<Lead> lead;
  if (rotation) {
    if (!lead_codes || !lead_norm || !tail_norm || !lead_sum || !lead_constants)
      throw py::value_error("rotation: expected lead_codes and their bounds with it, got none");
    lead.emplace(*rotation, *lead_codes, *lead_norm, *tail_norm, *lead_sum, *lead_constants, n_rows,
                 dim, false);
  }
  const LeadCodes found = lead ? lead->get() : LeadCodes{};
  const Threads with = threads_of(threads, isa);
  const py::gil_scoped_release nogil;
  const RowsRead read =
      mips_topk_by_codes(call.question, coded.matrix(), coded.codes(), coded.bounds(),
                         lead ? &found : nullptr, call.answer, with);
  return {read.rows, read.codes};
}

void lead_of(const py::buffer& index_emb, const py::buffer& offset, const py::buffer& rotation,
             const py::buffer& lead_codes, const py::buffer& lead_norm, const py::buffer& tail_norm,
             const py::buffer& lead_sum, const py::buffer& lead_constants, int threads) {
  const Array<float> centre("offset", offset, {-1});
  const py::ssize_t dim = centre.size(0);
  const Matrix matrix(index_emb, std::nullopt, std::nullopt, dim);
  if (matrix.get().storage != Storage::kFloat32)
    throw py::value_error("index_emb: expected float32");
  const Lead lead(rotation, lead_codes, lead_norm, tail_norm, lead_sum, lead_constants,
                  matrix.get().n_rows, dim, true);
  const Threads with = threads_of(threads, "");
  const py::gil_scoped_release nogil;
  make_lead_codes(matrix.get(), centre.data(), dim, lead.get(), with);
}

void measure(const py::buffer& index_emb, const py::buffer& codes, const py::buffer& scale,
             const py::buffer& offset, const py::buffer& code_norm, const py::buffer& rest_norm,
             const py::buffer& code_sum, int threads) {
  const CodedMatrix coded(index_emb, codes, scale, offset, code_norm, rest_norm, code_sum, true);
  const Threads with = threads_of(threads, "");
  const int64_t dim = CodedMatrix::dim_of(scale);
  const py::gil_scoped_release nogil;
  measure_codes(coded.matrix(), coded.codes(), dim, coded.bounds(), with);
}

void widen_rows(const py::buffer& index_emb, const py::buffer& out, const OptionalBuffer& scale,
                const OptionalBuffer& offset, int threads, const std::string& isa) {
  const Array<float> wide("out", out, {-1, -1}, true);
  const Matrix matrix(index_emb, scale, offset, wide.size(1));
  if (matrix.get().n_rows != wide.size(0))
    throw py::value_error("out: expected " + std::to_string(matrix.get().n_rows) + " rows, got " +
                          std::to_string(wide.size(0)));
  const Threads with = threads_of(threads, isa);
  const py::gil_scoped_release nogil;
  widen(matrix.get(), wide.size(1), wide.data(), with);
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
        py::arg("exclude") = py::none(), py::arg("scale") = py::none(),
        py::arg("offset") = py::none(), py::arg("threads") = 1, py::arg("isa") = "");
  m.def("widen", &widen_rows, py::arg("index_emb"), py::arg("out"), py::kw_only(),
        py::arg("scale") = py::none(), py::arg("offset") = py::none(), py::arg("threads") = 1,
        py::arg("isa") = "");
  m.def("measure_codes", &measure, py::arg("index_emb"), py::arg("codes"), py::arg("scale"),
        py::arg("offset"), py::arg("code_norm"), py::arg("rest_norm"), py::arg("code_sum"),
        py::kw_only(), py::arg("threads") = 1);
  m.def("mips_topk_by_codes", &search_by_codes, py::arg("query_emb"), py::arg("index_emb"),
        py::arg("codes"), py::arg("scale"), py::arg("offset"), py::arg("code_norm"),
        py::arg("rest_norm"), py::arg("code_sum"), py::arg("scores"), py::arg("rows"),
        py::kw_only(), py::arg("rotation") = py::none(), py::arg("lead_codes") = py::none(),
        py::arg("lead_norm") = py::none(), py::arg("tail_norm") = py::none(),
        py::arg("lead_sum") = py::none(), py::arg("lead_constants") = py::none(),
        py::arg("removed") = py::none(), py::arg("exclude") = py::none(), py::arg("threads") = 1,
        py::arg("isa") = "");
  m.def("make_lead_codes", &lead_of, py::arg("index_emb"), py::arg("offset"), py::arg("rotation"),
        py::arg("lead_codes"), py::arg("lead_norm"), py::arg("tail_norm"), py::arg("lead_sum"),
        py::arg("lead_constants"), py::kw_only(), py::arg("threads") = 1);
  m.def("merge_topk", &merge, py::arg("part_scores"), py::arg("part_rows"), py::arg("scores"),
        py::arg("rows"));
}

}  // namespace fastrag
