// Backend `cpu`: fused polynomial attention, forward and backward, without a tensor of the size Tq × Tk.
//
// A task is a group of query heads that share a key head, and a chunk of their rows. It packs each block of keys and
// values once and lets all its rows see it, a block of rows at a time: product, polynomial, product. Rows, heads and
// batch entries are independent in forward; in backward every task sums its own gradients of the keys and values,
// and those of the chunks are added in order. Which thread runs a task changes nothing in the result.

#include "backward.h"
#include "forward.h"
#include "shift.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

namespace polyattn {
namespace {

Call make_call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& coefficients,
               const optional<Tensor>& center, const optional<Tensor>& radius, const optional<Tensor>& mask,
               const optional<Tensor>& ranges, const optional<Tensor>& seed, bool causal, optional<int64_t> window,
               double scaling, int64_t squarings, int64_t normalizer, bool clamp, bool monomial, double dropout) {
  return {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3),
          coefficients.size(1), query, key, value, View<float>(coefficients), View<float>(center), View<float>(radius),
          View<bool>(mask), View<int32_t>(ranges), View<int64_t>(seed), causal, window, scaling, squarings, normalizer,
          clamp, monomial, dropout};
}

// Calls run<scalar_t, mm_t>(): bf16 products where the machine has them, fp32 products otherwise.
template <typename Run>
void dispatch(at::ScalarType dtype, const Run& run) {
  if (dtype == at::kFloat) {
    run.template operator()<float, float>();
  } else if (dtype == at::kBFloat16 && has_brgemm<BFloat16>()) {
    run.template operator()<BFloat16, BFloat16>();
  } else if (dtype == at::kBFloat16) {
    run.template operator()<BFloat16, float>();
  } else {
    TORCH_CHECK(dtype == at::kHalf, "bf16, fp16 or fp32 expected, got ", dtype);
    run.template operator()<at::Half, float>();
  }
}

template <typename... Arguments>
std::tuple<Tensor, Tensor> attention(const Arguments&... arguments) {
  const Call call = make_call(arguments...);
  const auto options = call.query.options();
  const Tensor output = at::empty({call.batch, call.q_len, call.heads, call.value_dim}, options);
  Tensor row_scale = at::empty({0}, options.dtype(at::kFloat));
  if (call.l1()) row_scale = at::empty({call.batch, call.heads, call.q_len}, options.dtype(at::kFloat));
  dispatch(call.query.scalar_type(), [&]<typename scalar_t, typename mm_t>() {
    if (call.repeats() * call.q_len <= kDecodeRows) {
      decode<scalar_t>(call, output, row_scale);
    } else {
      forward<scalar_t, mm_t>(call, output, row_scale);
    }
  });
  return {output, row_scale};
}

template <typename... Arguments>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_output,
                                                                      const Tensor& row_scale, bool coefficients_grad,
                                                                      const Arguments&... arguments) {
  const Call call = make_call(arguments...);
  const auto options = call.query.options();
  Gradients gradients{empty_gradient(call.query), empty_gradient(call.key), empty_gradient(call.value),
                      at::empty({call.heads, call.terms}, options.dtype(at::kFloat)),
                      at::empty({0}, options.dtype(at::kFloat))};
  if (call.center) {
    gradients.center = at::empty({call.batch, call.heads, call.q_len}, options.dtype(at::kFloat));
  }
  dispatch(call.query.scalar_type(), [&]<typename scalar_t, typename mm_t>() {
    backward<scalar_t, mm_t>(call, grad_output, row_scale, coefficients_grad, gradients);
  });
  return {gradients.query, gradients.key, gradients.value, gradients.coefficients, gradients.center};
}

Tensor centers(const Tensor& query, const Tensor& key, const Tensor& center, const Tensor& key_shift,
               const optional<Tensor>& weights, const optional<Tensor>& means, const optional<Tensor>& length_shift,
               const optional<Tensor>& directions, const optional<Tensor>& ranges, bool causal,
               optional<int64_t> window, double scaling, double alpha, double fewest, double most) {
  const Shift shift{query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3),
                    directions ? directions->size(1) : 0, query, key, View<float>(center), View<float>(key_shift),
                    View<float>(weights), View<float>(means), View<float>(length_shift), View<float>(directions),
                    View<int32_t>(ranges), causal, window, static_cast<float>(scaling), static_cast<float>(alpha),
                    static_cast<float>(fewest), static_cast<float>(most)};
  const Tensor found = at::empty({shift.batch, shift.heads, shift.q_len}, query.options().dtype(at::kFloat));
  dispatch(query.scalar_type(), [&]<typename scalar_t, typename mm_t>() {
    row_centers<scalar_t>(shift, found.mutable_data_ptr<float>());
  });
  return found;
}

}  // namespace
}  // namespace polyattn

#define POLYATTN_ARGUMENTS                                                                                       \
  "Tensor query, Tensor key, Tensor value, Tensor coefficients, Tensor? center, Tensor? radius, Tensor? mask, "  \
  "Tensor? ranges, Tensor? seed, bool causal, int? window, float scaling, int squarings, int normalizer, "       \
  "bool clamp, bool monomial, float dropout"
#define POLYATTN_TYPES                                                                                             \
  at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>,            \
      std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>, bool,                       \
      std::optional<int64_t>, double, int64_t, int64_t, bool, bool, double

TORCH_LIBRARY(polyattn_cpu, library) {
  library.def("attention(" POLYATTN_ARGUMENTS ") -> (Tensor, Tensor)");
  library.def("attention_backward(Tensor grad_output, Tensor row_scale, bool coefficients_grad, " POLYATTN_ARGUMENTS
              ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "row_centers(Tensor query, Tensor key, Tensor center, Tensor key_shift, Tensor? weights, Tensor? means, "
      "Tensor? length_shift, Tensor? directions, Tensor? ranges, bool causal, int? window, float scaling, "
      "float alpha, float fewest, float most) -> Tensor");
}

TORCH_LIBRARY_IMPL(polyattn_cpu, CPU, library) {
  library.impl("attention", polyattn::attention<POLYATTN_TYPES>);
  library.impl("attention_backward", polyattn::attention_backward<POLYATTN_TYPES>);
  library.impl("row_centers", polyattn::centers);
}
