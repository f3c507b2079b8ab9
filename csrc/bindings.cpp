// fastrag._C: checks the arguments, releases the GIL and calls the kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "buffers.h"
#include "loss/row_pass.h"

namespace py = pybind11;

namespace fastrag {

template <>
struct Element<Bfloat16> {
  static constexpr const char* kName = "bfloat16 as uint16";
  static constexpr const char* kFormats = "H";
};

namespace {

// The arguments that all passes over the buffer of a chunk share.
class Pass {
 public:
  Pass(const py::buffer& z0, const py::buffer& gold, const std::optional<py::buffer>& bias,
       double logit_scale, double softcap, int threads, const std::string& isa)
      : threads_(threads_of(threads, isa)) {
    logits_.bfloat16 = z0.request().format == Element<Bfloat16>::kFormats;
    if (logits_.bfloat16)
      take<Bfloat16>(z0);
    else
      take<float>(z0);
    gold_.emplace("gold", gold, std::vector<py::ssize_t>{logits_.n_rows});
    logits_.gold = gold_->data();
    if (bias) bias_.emplace("bias", *bias, std::vector<py::ssize_t>{logits_.n_ids});
    logits_.bias = bias_ ? bias_->data() : nullptr;
    if (!(softcap >= 0.0))
      throw py::value_error("softcap: expected 0 (none) or more, got " + std::to_string(softcap));
    logits_.softcap = static_cast<float>(softcap);
    logits_.logit_scale = static_cast<float>(logit_scale);
    for (int64_t i = 0; i < logits_.n_rows; ++i)
      if (logits_.gold[i] < -1 || logits_.gold[i] >= logits_.n_ids)
        throw py::value_error("gold: expected labels in [0, " + std::to_string(logits_.n_ids) +
                              "), or -1 for none, got " + std::to_string(logits_.gold[i]) +
                              " at [" + std::to_string(i) + "]");
  }

  void statistics(const py::buffer& logp, const py::buffer& log_z,
                  const std::optional<py::buffer>& mean_logp) {
    const Array<float> out("logp", logp, {logits_.n_rows}, true);
    const Array<float> sums("log_z", log_z, {2, logits_.n_rows}, true);
    std::optional<Array<float>> mean;
    if (mean_logp)
      mean.emplace("mean_logp", *mean_logp, std::vector<py::ssize_t>{logits_.n_rows}, true);
    const RowStats stats{halves(sums), out.data(), mean ? mean->data() : nullptr};
    const py::gil_scoped_release nogil;
    row_statistics(logits_, stats, threads_);
  }

  void gradient(const py::buffer& log_z, const py::buffer& weight, double smoothing,
                std::optional<int64_t> vocab_size) {
    const Array<float> sums("log_z", log_z, {2, logits_.n_rows});
    const Array<float> weights("weight", weight, {logits_.n_rows});
    const Smoothing target{static_cast<float>(smoothing), vocab_size.value_or(logits_.n_ids)};
    if (target.vocab_size < logits_.n_ids)
      throw py::value_error("vocab_size: expected at least the " + std::to_string(logits_.n_ids) +
                            " token ids of z0, got " + std::to_string(target.vocab_size));
    const py::gil_scoped_release nogil;
    row_gradient(logits_, halves(sums), weights.data(), target, threads_);
  }

  void mixture_statistics(const py::buffer& log_z, const py::buffer& log_prior,
                          const py::buffer& mean_mixture, const py::buffer& mean_share) {
    const Array<float> sums("log_z", log_z, {2, logits_.n_rows});
    const Array<float> prior("log_prior", log_prior, {-1, -1});
    const py::ssize_t n_positions = positions(prior), n_passages = prior.size(1);
    const Array<float> mixtures("mean_mixture", mean_mixture, {n_positions}, true);
    const Array<float> shares("mean_share", mean_share, {n_positions, n_passages}, true);
    const py::gil_scoped_release nogil;
    fastrag::mixture_statistics(logits_, halves(sums), {prior.data(), n_passages}, mixtures.data(),
                                shares.data(), threads_);
  }

  void mixture_gradient(const py::buffer& log_z, const py::buffer& log_prior, const py::buffer& hit,
                        const py::buffer& target, const py::buffer& spread) {
    const Array<float> sums("log_z", log_z, {2, logits_.n_rows});
    const Array<float> prior("log_prior", log_prior, {-1, -1});
    const py::ssize_t n_positions = positions(prior), n_passages = prior.size(1);
    const Array<float> hits("hit", hit, {n_positions, n_passages});
    const Array<float> targets("target", target, {n_positions, n_passages});
    const Array<float> spreads("spread", spread, {n_positions});
    const py::gil_scoped_release nogil;
    fastrag::mixture_gradient(logits_, halves(sums), {prior.data(), n_passages}, hits.data(),
                              targets.data(), spreads.data(), threads_);
  }

 private:
  template <class T>
  void take(const py::buffer& z0) {
    const auto array =
        std::make_shared<Array<T>>("z0", z0, std::vector<py::ssize_t>{-1, -1}, true, true);
    logits_.z0 = array->data();
    logits_.n_ids = array->size(0);
    logits_.n_rows = array->size(1);
    logits_.pitch = array->size(0) > 1 ? array->pitch() : array->size(1);
    z0_ = array;
  }

  static LogZ halves(const Array<float>& log_z) {
    return {log_z.data(), log_z.data() + log_z.size(1)};
  }

  py::ssize_t positions(const Array<float>& prior) const {
    const int64_t n_rows = prior.size(0) * prior.size(1);
    if (n_rows != logits_.n_rows)
      throw py::value_error("log_prior: expected one number for each of the " +
                            std::to_string(logits_.n_rows) + " rows of z0, got " +
                            std::to_string(prior.size(0)) + " * " + std::to_string(prior.size(1)));
    return prior.size(0);
  }

  std::shared_ptr<void> z0_;  // an Array of float or Bfloat16
  std::optional<Array<int64_t>> gold_;
  std::optional<Array<float>> bias_;
  Threads threads_;
  Logits logits_{};
};

std::vector<std::string> instruction_sets(bool emulated) {
  std::vector<std::string> found;
  for (const Isa isa : kAllIsas)
    if ((emulated || isa != Isa::kEmulatedAmx) && has_isa(isa)) found.emplace_back(isa_name(isa));
  return found;
}

std::map<std::string, std::string> missing_instruction_sets() {
  std::map<std::string, std::string> reasons;
  for (const Isa isa : kAllIsas)
    if (const char* why = why_not(isa)) reasons[isa_name(isa)] = why;
  return reasons;
}

void apply(const std::string& name, const py::buffer& x, const py::buffer& y,
           const std::string& isa) {
  if (name != "exp" && name != "log" && name != "tanh" && name != "sech2")
    throw py::value_error("name: expected exp, log, tanh or sech2, got '" + name + "'");
  const Array<float> in("x", x, {-1});
  const Array<float> out("y", y, {in.size(0)}, true);
  elementwise(name.c_str(), in.data(), out.data(), in.size(0), threads_of(1, isa).isa);
}

// Asks the operating system for huge pages for a buffer that has not been accessed yet, so that it
// maps and clears 2 MiB at a time. It may ignore this.
void advise_huge_pages(const py::buffer& buffer) {
#ifdef MADV_HUGEPAGE
  const py::buffer_info info = buffer.request();
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t address = reinterpret_cast<uintptr_t>(info.ptr);
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + info.size * info.itemsize) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)buffer;
#endif
}

}  // namespace

void bind_decoding(py::module_& m);
void bind_doc_scores(py::module_& m);
void bind_gather(py::module_& m);
void bind_mips(py::module_& m);
void bind_peaks(py::module_& m);

}  // namespace fastrag

// setup.py defines FASTRAG_SOURCES, a digest of the sources of this build.
#define FASTRAG_TEXT_OF(x) #x
#define FASTRAG_TEXT(x) FASTRAG_TEXT_OF(x)

PYBIND11_MODULE(_C, m) {
  using fastrag::Pass;
  m.doc() = "Compiled parts of fastrag, with maths in float32. fastrag.ops calls them.";
  m.attr("SOURCES") = FASTRAG_TEXT(FASTRAG_SOURCES);
  py::class_<Pass>(m, "RowPass")
      .def(py::init<const py::buffer&, const py::buffer&, const std::optional<py::buffer>&, double,
                    double, int, const std::string&>(),
           py::arg("z0"), py::arg("gold"), py::kw_only(), py::arg("bias") = py::none(),
           py::arg("logit_scale") = 1.0, py::arg("softcap") = 0.0, py::arg("threads") = 1,
           py::arg("isa") = "")
      .def("statistics", &Pass::statistics, py::arg("logp"), py::arg("log_z"),
           py::arg("mean_logp") = py::none())
      .def("gradient", &Pass::gradient, py::arg("log_z"), py::arg("weight"),
           py::arg("smoothing") = 0.0, py::arg("vocab_size") = py::none())
      .def("mixture_statistics", &Pass::mixture_statistics, py::arg("log_z"), py::arg("log_prior"),
           py::arg("mean_mixture"), py::arg("mean_share"))
      .def("mixture_gradient", &Pass::mixture_gradient, py::arg("log_z"), py::arg("log_prior"),
           py::arg("hit"), py::arg("target"), py::arg("spread"));
  m.def("instruction_sets", &fastrag::instruction_sets, py::kw_only(), py::arg("emulated") = false);
  m.def("missing_instruction_sets", &fastrag::missing_instruction_sets);
  m.def("apply", &fastrag::apply, py::arg("name"), py::arg("x"), py::arg("y"), py::arg("isa") = "");
  m.def("advise_huge_pages", &fastrag::advise_huge_pages, py::arg("buffer"));
  fastrag::bind_decoding(m);
  fastrag::bind_doc_scores(m);
  fastrag::bind_gather(m);
  fastrag::bind_mips(m);
  fastrag::bind_peaks(m);
}
