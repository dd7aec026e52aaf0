// Backend `cpu`: fused polynomial attention, forward and backward, without a tensor of the size Tq × Tk.
//
// A task is a group of query heads that share a key head, and a chunk of their rows. It packs each block of keys and
// values once and lets all its rows see it, a block of rows at a time: product, polynomial, product. Rows, heads and
// batch entries are independent in forward; in backward every task sums its own gradients of the keys and values,
// and those of the chunks are added in order. Which thread runs a task changes nothing in the result.

#include "arguments.h"
#include "decode.h"

namespace polyattn {

std::tuple<Tensor, Tensor> attend(const Call& call) {
  const auto options = call.query.options();
  const Tensor output = at::empty({call.batch, call.q_len, call.heads, call.value_dim}, options);
  Tensor row_scale = at::empty({0}, options.dtype(at::kFloat));
  if (call.l1()) row_scale = at::empty({call.batch, call.heads, call.q_len}, options.dtype(at::kFloat));
  dispatch(call.query.scalar_type(), [&]<typename scalar_t, typename mm_t>() {
    if (call.decodes()) {
      decode<scalar_t>(call, output, row_scale);
    } else {
      forward<scalar_t, mm_t>(call, output, row_scale);
    }
  });
  return {output, row_scale};
}

namespace {

template <typename... Arguments>
std::tuple<Tensor, Tensor> attention(const Arguments&... arguments) {
  return attend(make_call(arguments...));
}

}  // namespace
}  // namespace polyattn

TORCH_LIBRARY(polyattn_cpu, library) {
  library.def("attention(" POLYATTN_ARGUMENTS ") -> (Tensor, Tensor)");
  library.def("attention_backward(Tensor grad_output, Tensor row_scale, bool coefficients_grad, " POLYATTN_ARGUMENTS
              ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(polyattn_cpu, CPU, library) {
  library.impl("attention", polyattn::attention<POLYATTN_TYPES>);
}
