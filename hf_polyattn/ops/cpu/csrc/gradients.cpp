// Backend `cpu`: the gradients of fused polynomial attention, apart so that two compilers can share the work.

#include "arguments.h"
#include "backward.h"

namespace polyattn {
namespace {

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

}  // namespace
}  // namespace polyattn

TORCH_LIBRARY_IMPL(polyattn_cpu, CPU, library) {
  library.impl("attention_backward", polyattn::attention_backward<POLYATTN_TYPES>);
}
