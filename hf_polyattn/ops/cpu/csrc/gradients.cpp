// Backend `cpu`: the gradients of fused polynomial attention, apart so that two compilers can share the work.

#include "arguments.h"
#include "backward.h"

namespace polyattn {

Gradients differentiate(const Call& call, const Tensor& grad_output, const Tensor& row_scale, bool coefficients_grad,
                        const MovedRows* moved) {
  const auto options = call.query.options().dtype(at::kFloat);
  Gradients gradients{empty_gradient(call.query), empty_gradient(call.key), empty_gradient(call.value),
                      at::empty({call.heads, call.terms}, options), at::empty({0}, options), Tensor()};
  if (call.center) gradients.center = at::empty({call.batch, call.heads, call.q_len}, options);
  if (moved) gradients.shift = at::empty({call.heads, ParameterSums(moved->shift).count()}, options);
  dispatch(call.query.scalar_type(), [&]<typename scalar_t, typename mm_t>() {
    backward<scalar_t, mm_t>(call, grad_output, row_scale, coefficients_grad, moved, gradients);
  });
  return gradients;
}

namespace {

template <typename... Arguments>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_output,
                                                                      const Tensor& row_scale, bool coefficients_grad,
                                                                      const Arguments&... arguments) {
  const Gradients found = differentiate(make_call(arguments...), grad_output, row_scale, coefficients_grad);
  return {found.query, found.key, found.value, found.coefficients, found.center};
}

}  // namespace
}  // namespace polyattn

TORCH_LIBRARY_IMPL(polyattn_cpu, CPU, library) {
  library.impl("attention_backward", polyattn::attention_backward<POLYATTN_TYPES>);
}
