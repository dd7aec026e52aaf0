// The gradients of an attention module: those of its attention, of where its rows were moved, and of its parameters.

#include "gradients.h"
#include "module.h"

#include <ATen/ops/zeros.h>

namespace polyattn {
namespace {

// What the trained δ of c + δA gets of what the coefficients of all heads get.
Tensor of_delta(at::TensorList polynomial, const Tensor& of_coefficients) {
  const Tensor a = plain(polynomial[kBasis]);
  const int64_t heads = of_coefficients.size(0), terms = of_coefficients.size(1), rows = a.size(0);
  Tensor result = at::zeros({rows, terms}, of_coefficients.options());
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t row = rows == 1 ? 0 : h;
    const float* from = of_coefficients.const_data_ptr<float>() + h * terms;
    for (int64_t l = 0; l < terms; ++l) {
      const float* direction = a.const_data_ptr<float>() + (row * terms + l) * terms;
      float sum = 0.0f;
      for (int64_t k = 0; k < terms; ++k) sum += from[k] * direction[k];
      result.mutable_data_ptr<float>()[row * terms + l] += sum;
    }
  }
  return result;
}

// The gradients of a call and of where its rows were moved; rows whose moments were not kept take those apart.
Gradients differentiate_rows(const Module& module, Call call, const Tensor& grad_output, const Tensor& row_scale,
                             const Tensor& rows, bool coefficients_grad, bool shift_grad) {
  if (!module.shift) return differentiate(call, grad_output, row_scale, coefficients_grad);
  const Shift& shift = *module.shift;
  call.center = View<float>(rows[0]);
  if (shift.weights && rows.size(0) == 1) {
    Gradients found = differentiate(call, grad_output, row_scale, coefficients_grad);
    const auto [of_query, of_key, sums] = centers_gradients(shift, found.center);
    found.query.add_(of_query);
    found.key.add_(of_key);
    found.shift = sums;
    return found;
  }
  MovedRows moved{shift, nullptr, nullptr, shift_grad};
  if (shift.weights) {
    moved.mean = rows.const_data_ptr<float>() + rows.stride(0);
    moved.variance = moved.mean + rows.stride(0);
  }
  return differentiate(call, grad_output, row_scale, coefficients_grad, &moved);
}

// Returns the gradients of query, key, value, δ, center and what the shift has: key shift, weights, length shift and
// squares. Those of δ, and of the shift's parameters but its center, are right only where they are asked for.
template <typename... Arguments>
std::vector<Tensor> layer_backward(const Tensor& grad_output, const Tensor& row_scale, const Tensor& rows,
                                   bool delta_grad, bool shift_grad, const Arguments&... arguments) {
  const Module module = make_module(arguments...);
  Call call = module.call;
  // A monomial's kernel knows no coefficients but the highest, and not how a row is moved by its scores.
  if (delta_grad || module.shift) call.monomial = false;
  const Gradients found =
      differentiate_rows(module, call, by_rows(grad_output), row_scale, rows, delta_grad, shift_grad);
  std::vector<Tensor> results{found.query, found.key, found.value, of_delta(module.polynomial, found.coefficients)};
  if (!module.shift) {
    results.push_back(call.center ? found.center.sum(at::IntArrayRef{0, 2}) : found.center);
    return results;
  }
  const ParameterSums place(*module.shift);
  const int64_t dim = call.head_dim;
  auto part = [&](int64_t start, int64_t count) { return found.shift.slice(1, start, start + count).contiguous(); };
  results.push_back(part(place.center(), 1).squeeze(1));
  results.push_back(part(place.key_shift(), dim));
  if (!module.shift->weights) return results;
  results.push_back(part(place.weights(), place.features).div_(plain(module.shift_tensors[kScales])));
  results.push_back(part(place.length_shift(), dim));
  results.push_back(part(place.directions(), place.squares * dim).view({call.heads, place.squares, dim}));
  return results;
}

}  // namespace
}  // namespace polyattn

TORCH_LIBRARY_FRAGMENT(polyattn_cpu, library) {
  library.def("layer_backward(Tensor grad_output, Tensor row_scale, Tensor rows, bool delta_grad, bool shift_grad, "
              POLYATTN_MODULE ") -> Tensor[]");
}

TORCH_LIBRARY_IMPL(polyattn_cpu, CPU, library) {
  library.impl("layer_backward", polyattn::layer_backward<POLYATTN_MODULE_TYPES>);
}
