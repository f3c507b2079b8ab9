// Bindings of the scores of given rows; bindings.cpp adds them to the module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "buffers.h"
#include "retrieval/doc_scores.h"
#include "stored_matrix.h"

namespace py = pybind11;

namespace fastrag {
namespace {

class Call {
 public:
  Call(const Memory& query_emb, const Memory& index_emb, const Memory& rows, double tau,
       const OptionalBuffer& scale, const OptionalBuffer& offset, int threads,
       const std::string& isa)
      : query_("query_emb", query_emb, {-1, -1}),
        rows_("rows", rows, {query_.size(0), -1}),
        matrix_(index_emb, scale, offset, query_.size(1)),
        threads(threads_of(threads, isa)),
        scored{query_.data(), query_.size(0), rows_.size(1),          query_.size(1),
               rows_.data(),  matrix_.get(),  static_cast<float>(tau)} {
    for (int64_t p = 0; p < scored.n_pairs(); ++p)
      if (scored.rows[p] >= scored.matrix.n_rows)
        throw py::value_error("rows: expected values below " +
                              std::to_string(scored.matrix.n_rows) + ", or -1 for none, got " +
                              std::to_string(scored.rows[p]) + " at [" +
                              std::to_string(p / scored.n_passages) + ", " +
                              std::to_string(p % scored.n_passages) + "]");
  }

  Array<float> pairs(const char* name, const Memory& buffer, bool writable) const {
    return {name, buffer, {query_.size(0), rows_.size(1)}, writable};
  }

 private:
  const Array<float> query_;
  const Array<int64_t> rows_;
  const Matrix matrix_;

 public:
  const Threads threads;
  const ScoredRows scored;
};

void forward(const Memory& query_emb, const Memory& index_emb, const Memory& rows, double tau,
             const OptionalBuffer& scale, const OptionalBuffer& offset, int threads,
             const std::string& isa, const Memory& scores, const Memory& log_prior) {
  const Call call(query_emb, index_emb, rows, tau, scale, offset, threads, isa);
  const Array<float> out = call.pairs("scores", scores, true);
  const Array<float> prior = call.pairs("log_prior", log_prior, true);
  const py::gil_scoped_release nogil;
  doc_scores(call.scored, out.data(), prior.data(), call.threads);
}

void backward(const Memory& query_emb, const Memory& index_emb, const Memory& rows, double tau,
              const OptionalBuffer& scale, const OptionalBuffer& offset, int threads,
              const std::string& isa, const Memory& log_prior, const OptionalBuffer& dscores,
              const OptionalBuffer& dlog_prior, const OptionalBuffer& dquery,
              const OptionalBuffer& dpassage) {
  const Call call(query_emb, index_emb, rows, tau, scale, offset, threads, isa);
  const ScoredRows& scored = call.scored;
  const Array<float> prior = call.pairs("log_prior", log_prior, false);
  std::optional<Array<float>> of_scores, of_prior, of_query, of_passage;
  if (dscores) of_scores.emplace(call.pairs("dscores", *dscores, false));
  if (dlog_prior) of_prior.emplace(call.pairs("dlog_prior", *dlog_prior, false));
  if (dquery)
    of_query.emplace("dquery", *dquery, std::vector<py::ssize_t>{scored.n_queries, scored.dim},
                     true);
  if (dpassage)
    of_passage.emplace("dpassage", *dpassage,
                       std::vector<py::ssize_t>{scored.n_queries, scored.n_passages, scored.dim},
                       true);
  const auto pointer = [](const std::optional<Array<float>>& x) { return x ? x->data() : nullptr; };
  const py::gil_scoped_release nogil;
  doc_scores_backward(scored, prior.data(), {pointer(of_scores), pointer(of_prior)},
                      pointer(of_query), pointer(of_passage), call.threads);
}

}  // namespace

void bind_doc_scores(py::module_& m) {
  m.def("doc_scores", &forward, py::arg("query_emb"), py::arg("index_emb"), py::arg("rows"),
        py::arg("tau"), py::arg("scale"), py::arg("offset"), py::arg("threads"), py::arg("isa"),
        py::arg("scores"), py::arg("log_prior"));
  m.def("doc_scores_backward", &backward, py::arg("query_emb"), py::arg("index_emb"),
        py::arg("rows"), py::arg("tau"), py::arg("scale"), py::arg("offset"), py::arg("threads"),
        py::arg("isa"), py::arg("log_prior"), py::arg("dscores"), py::arg("dlog_prior"),
        py::arg("dquery"), py::arg("dpassage"));
}

}  // namespace fastrag
