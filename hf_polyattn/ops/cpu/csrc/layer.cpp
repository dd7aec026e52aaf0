// The whole forward pass of an attention module.

#include "layer.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

namespace polyattn {
namespace {

// The centers of long rows: one pass for the shift and one for each refinement.
Tensor refined_centers(const Call& call, const Shift& shift, const std::vector<Refinement>& refinements) {
  const Tensor centers = centers_of(shift);
  if (refinements.empty()) return centers;
  const Tensor moved = at::empty_like(centers);
  float *center = centers.mutable_data_ptr<float>(), *from = moved.mutable_data_ptr<float>();
  Call sums = call;
  sums.value = at::ones({call.batch, call.groups, call.k_len, 1}, call.key.options());
  sums.value_dim = 1;
  sums.center = View<float>(moved);
  sums.monomial = false;
  if (call.l1()) sums.normalizer = kNone;
  const int64_t rows = call.batch * call.heads * call.q_len;
  for (const Refinement& part : refinements) {
    auto head_of = [&](int64_t row) { return row / call.q_len % call.heads; };
    for (int64_t row = 0; row < rows; ++row) from[row] = center[row] + *part.center(head_of(row), 0, 0);
    sums.coefficients = View<float>(part.coefficients);
    sums.radius = part.radius;
    const Tensor found = std::get<0>(attend(sums)).to(at::kFloat);  // (B, Tq, H, 1)
    const float* row_sums = found.const_data_ptr<float>();
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t b = row / call.q_len / call.heads, h = head_of(row), i = row % call.q_len;
      center[row] += part.step(h, row_sums[(b * call.q_len + i) * call.heads + h]);
    }
  }
  return centers;
}

struct Found {
  Tensor output, row_scale;
  Tensor rows;  // (1 or 3, B, H, Tq): centers and, of kept scores, their means and variances; (0) where none is moved
};

Found run(const Module& module, bool keep_rows) {
  Call call = module.call;
  if (!module.shift) {
    auto [output, row_scale] = attend(call);
    return {output, row_scale, at::empty({0}, row_scale.options())};
  }
  const Shift& shift = *module.shift;
  if (!module.keeps_scores()) {
    const Tensor centers = refined_centers(call, shift, module.refinements);
    call.center = View<float>(centers);
    auto [output, row_scale] = attend(call);
    return {output, row_scale, centers.unsqueeze(0)};
  }
  const std::vector<int64_t> rows{call.batch, call.heads, call.q_len};
  const auto options = call.query.options(), floats = options.dtype(at::kFloat);
  Found found{at::empty({call.batch, call.q_len, call.heads, call.value_dim}, options),
              call.l1() ? at::empty(rows, floats) : at::empty({0}, floats), Tensor()};
  if (keep_rows || call.decodes()) {
    found.rows = at::empty({shift.weights ? 3 : 1, call.batch, call.heads, call.q_len}, floats);
  }
  dispatch(call.query.scalar_type(), [&]<typename scalar_t, typename mm_t>() {
    if (call.decodes()) {
      shifted_decode<scalar_t>(call, shift, module.refinements, found.output, found.row_scale, found.rows);
    } else {
      shifted_forward<scalar_t, mm_t>(call, shift, module.refinements, found.output, found.row_scale,
                                        KeptRows(found.rows));
    }
  });
  return found;
}

template <typename... Arguments>
Tensor layer(const Arguments&... arguments) {
  const Module module = make_module(arguments...);
  const Call& call = module.call;
  if (call.query.numel() == 0 || call.key.numel() == 0 || call.value.numel() == 0) {
    return at::zeros({call.batch, call.q_len, call.heads, call.value_dim}, call.query.options());
  }
  return run(module, false).output;
}

// The same, and what `layer_backward` needs of it: the row scale and the rows.
template <typename... Arguments>
std::tuple<Tensor, Tensor, Tensor> layer_forward(const Arguments&... arguments) {
  const Found found = run(make_module(arguments...), true);
  return {found.output, found.row_scale, found.rows};
}

}  // namespace
}  // namespace polyattn

TORCH_LIBRARY_FRAGMENT(polyattn_cpu, library) {
  library.def("layer(" POLYATTN_MODULE ") -> Tensor");
  library.def("layer_forward(" POLYATTN_MODULE ") -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(polyattn_cpu, CPU, library) {
  library.impl("layer", polyattn::layer<POLYATTN_MODULE_TYPES>);
  library.impl("layer_forward", polyattn::layer_forward<POLYATTN_MODULE_TYPES>);
}
