// Bindings of the passes for decoding; see csrc/loss/decoding.h.
#include <optional>
#include <string>

#include "buffers.h"
#include "loss/decoding.h"
#include "stored_matrix.h"

namespace py = pybind11;

namespace fastrag {
namespace {

// The parameters of a head; holds a reference to the bias.
class BoundHead {
 public:
  BoundHead(const OptionalBuffer& bias, double logit_scale, double softcap, py::ssize_t n_ids) {
    if (bias) bias_.emplace("bias", *bias, std::vector<py::ssize_t>{n_ids});
    if (!(softcap >= 0.0))
      throw py::value_error("softcap: expected 0 (none) or more, got " + std::to_string(softcap));
    head_ = {bias_ ? bias_->data() : nullptr, static_cast<float>(logit_scale),
             static_cast<float>(softcap)};
  }

  const LogitHead& get() const { return head_; }

 private:
  std::optional<Array<float>> bias_;
  LogitHead head_;
};

void bound_head_products(const Memory& hidden, const Memory& weight, const Memory& z0,
                         const Memory& log_z, const OptionalBuffer& bias, double logit_scale,
                         double softcap, int threads, const std::string& isa) {
  const Array<float> x("hidden", hidden, {-1, -1});
  const Matrix matrix(weight, std::nullopt, std::nullopt, x.size(1));
  if (matrix.get().storage != Storage::kFloat32) throw py::value_error("weight: expected float32");
  const int64_t n_ids = matrix.get().n_rows;
  const Array<float> out("z0", z0, {x.size(0), n_ids}, true);
  const Array<float> sums("log_z", log_z, {x.size(0)}, true);
  const BoundHead head(bias, logit_scale, softcap, n_ids);
  const Threads with = threads_of(threads, isa);
  const py::gil_scoped_release nogil;
  head_products(x.data(), x.size(0), x.size(1), matrix.get(), head.get(), out.data(), sums.data(),
                with);
}

void bound_mixture_logp(const Memory& z0, const Memory& log_z, const Memory& log_prior,
                        const Memory& mixture, const OptionalBuffer& bias, double logit_scale,
                        double softcap, int threads, const std::string& isa) {
  const Array<float> prior("log_prior", log_prior, {-1, -1});
  const int64_t n_rows = prior.size(0) * prior.size(1);
  const Array<float> products("z0", z0, {n_rows, -1});
  const Array<float> sums("log_z", log_z, {n_rows});
  const Array<float> out("mixture", mixture, {prior.size(0), products.size(1)}, true);
  const BoundHead head(bias, logit_scale, softcap, products.size(1));
  const Threads with = threads_of(threads, isa);
  const py::gil_scoped_release nogil;
  mixture_logp(products.data(), products.size(1), head.get(), sums.data(), prior.data(),
               prior.size(0), prior.size(1), out.data(), with);
}

}  // namespace

void bind_decoding(py::module_& m) {
  m.def("head_products", &bound_head_products, py::arg("hidden"), py::arg("weight"), py::arg("z0"),
        py::arg("log_z"), py::kw_only(), py::arg("bias") = py::none(), py::arg("logit_scale") = 1.0,
        py::arg("softcap") = 0.0, py::arg("threads") = 1, py::arg("isa") = "");
  m.def("mixture_logp", &bound_mixture_logp, py::arg("z0"), py::arg("log_z"), py::arg("log_prior"),
        py::arg("mixture"), py::kw_only(), py::arg("bias") = py::none(),
        py::arg("logit_scale") = 1.0, py::arg("softcap") = 0.0, py::arg("threads") = 1,
        py::arg("isa") = "");
}

}  // namespace fastrag
