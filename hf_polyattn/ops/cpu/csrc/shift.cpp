// The centers of rows, and their gradients.

#include "shift_gradients.h"

#include <ATen/ops/zeros.h>

namespace polyattn {

std::tuple<Tensor, Tensor, Tensor> centers_gradients(const Shift& shift, const Tensor& grad) {
  const Tensor of_query = empty_gradient(shift.query), of_key = empty_gradient(shift.key);
  const auto options = shift.query.options().dtype(at::kFloat);
  const Tensor sums = at::zeros({shift.batch, shift.heads, ParameterSums(shift).count()}, options);
  dispatch(shift.query.scalar_type(), [&]<typename scalar_t, typename mm_t>() {
    row_centers_gradients<scalar_t>(shift, grad, of_query, of_key, sums.mutable_data_ptr<float>());
  });
  return {of_query, of_key, sums.sum(0)};
}

namespace {

template <typename... Arguments>
Tensor centers(const Arguments&... arguments) {
  return centers_of(make_shift(arguments...));
}

// Returns the gradients of query, key, center, key shift, weights, length shift and directions, the last three empty
// for the key shift alone.
template <typename... Arguments>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> centers_backward(const Tensor& grad,
                                                                                    const Arguments&... arguments) {
  const Shift shift = make_shift(arguments...);
  const ParameterSums place(shift);
  const auto [of_query, of_key, total] = centers_gradients(shift, grad);
  const Tensor& sums = total;  // no structured bindings: older compilers capture none in a lambda
  auto part = [&](int64_t start, int64_t count) { return sums.slice(1, start, start + count); };
  const int64_t dim = shift.head_dim;
  return {of_query,
          of_key,
          part(place.center(), 1).squeeze(1),
          part(place.key_shift(), dim),
          part(place.weights(), place.features),
          part(place.length_shift(), place.features > 0 ? dim : 0),
          part(place.directions(), shift.squares * dim).reshape({shift.heads, shift.squares, dim})};
}

}  // namespace
}  // namespace polyattn

#define POLYATTN_SHIFT                                                                                           \
  "Tensor query, Tensor key, Tensor center, Tensor key_shift, Tensor? weights, Tensor? means, "                  \
  "Tensor? length_shift, Tensor? directions, Tensor? ranges, bool causal, int? window, float scaling, "          \
  "float alpha, float fewest, float most"
#define POLYATTN_SHIFT_TYPES                                                                                     \
  at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>,          \
      std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>, bool,                     \
      std::optional<int64_t>, double, double, double, double

TORCH_LIBRARY_FRAGMENT(polyattn_cpu, library) {
  library.def("row_centers(" POLYATTN_SHIFT ") -> Tensor");
  library.def("row_centers_backward(Tensor grad, " POLYATTN_SHIFT
              ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(polyattn_cpu, CPU, library) {
  library.impl("row_centers", polyattn::centers<POLYATTN_SHIFT_TYPES>);
  library.impl("row_centers_backward", polyattn::centers_backward<POLYATTN_SHIFT_TYPES>);
}
