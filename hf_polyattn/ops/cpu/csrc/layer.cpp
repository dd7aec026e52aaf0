// The whole forward pass of an attention module.

#include "layer.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

namespace polyattn {
namespace {

// The tensors of a polynomial, of a row shift and of a refinement, as hf_polyattn/ops/layer.py lists them.
enum PolynomialTensors : int64_t { kCoefficients, kDelta, kBasis, kCenter, kRadius, kPolynomialTensors };
enum ShiftTensors : int64_t { kMu, kWeights, kMeans, kScales, kNu, kSquares, kLengths, kShiftTensors };
enum RefinementTensors : int64_t { kStep = kPolynomialTensors, kRefinementTensors };

Tensor plain(const Tensor& tensor) {
  const bool is = tensor.scalar_type() == at::kFloat && tensor.is_contiguous();
  return is ? tensor : tensor.to(at::kFloat).contiguous();
}

// A tensor whose last dimension is contiguous.
Tensor by_rows(const Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

// c + δA of each head, (H, P + 1): c where δ is 0.
Tensor changed(at::TensorList polynomial, int64_t heads) {
  const Tensor c = plain(polynomial[kCoefficients]), delta = plain(polynomial[kDelta]), a = plain(polynomial[kBasis]);
  const int64_t terms = c.size(1);
  Tensor result = at::empty({heads, terms}, c.options());
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t row = c.size(0) == 1 ? 0 : h;
    const float *from = c.const_data_ptr<float>() + row * terms, *steps = delta.const_data_ptr<float>() + row * terms;
    const float* directions = a.const_data_ptr<float>() + row * terms * terms;
    float* to = result.mutable_data_ptr<float>() + h * terms;
    for (int64_t k = 0; k < terms; ++k) {
      float change = 0.0f;
      for (int64_t l = 0; l < terms; ++l) change += steps[l] * directions[l * terms + k];
      to[k] = from[k] + change;
    }
  }
  return result;
}

// Whether no head has a coefficient but the highest.
bool is_monomial(const Tensor& coefficients) {
  const float* c = coefficients.const_data_ptr<float>();
  const int64_t terms = coefficients.size(1);
  for (int64_t n = 0; n < coefficients.numel(); ++n) {
    if (n % terms != terms - 1 && c[n] != 0.0f) return false;
  }
  return true;
}

Tensor ratio(const Tensor& a, const Tensor& b) {
  const Tensor from = plain(a), by = plain(b);
  Tensor result = at::empty(from.sizes(), from.options());
  for (int64_t n = 0; n < from.numel(); ++n) {
    result.mutable_data_ptr<float>()[n] = from.const_data_ptr<float>()[n] / by.const_data_ptr<float>()[n];
  }
  return result;
}

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

// A module's forward pass. `shift` is empty where no row is moved, μ alone, or all of a shift by moments, which no mask
// may go with; the polynomial's center and radius count under `interval`, the radius of a refinement always.
Tensor layer(const Tensor& query, const Tensor& key, const Tensor& value, at::TensorList polynomial,
             at::TensorList shift, at::TensorList refinements, const optional<Tensor>& mask,
             const optional<Tensor>& ranges, bool causal, optional<int64_t> window, double scaling, int64_t squarings,
             int64_t normalizer, bool clamp, bool interval, double alpha) {
  const int64_t batch = query.size(0), heads = query.size(1), q_len = query.size(2), k_len = key.size(2);
  if (query.numel() == 0 || key.numel() == 0 || value.numel() == 0) {
    return at::zeros({batch, q_len, heads, value.size(3)}, query.options());
  }
  const Tensor q = by_rows(query), k = by_rows(key), v = by_rows(value), coefficients = changed(polynomial, heads);
  const Tensor center = plain(polynomial[kCenter]), radius = plain(polynomial[kRadius]);
  optional<Tensor> hidden, own_ranges, centers, own_radius;
  if (mask) hidden = mask->expand({batch, heads, q_len, k_len});
  if (ranges) own_ranges = ranges->to(at::kInt).expand({batch, q_len, 2});
  if (interval) {
    centers = center.view({1, heads, 1}).expand({batch, heads, q_len});
    own_radius = radius;
  }
  Call call = make_call(q, k, v, coefficients, centers, own_radius, hidden, own_ranges, std::nullopt, causal, window,
                        scaling, squarings, normalizer, clamp, is_monomial(coefficients), 0.0);
  if (shift.empty()) return std::get<0>(attend(call));

  TORCH_CHECK(!mask, "rows that a mask hides keys from are moved in PyTorch");
  const Tensor mu = plain(shift[kMu]);
  optional<Tensor> weights, means, nu, squares;
  double fewest = 1.0, most = 1.0;
  if (shift.size() == kShiftTensors) {
    weights = ratio(shift[kWeights], shift[kScales]);
    means = plain(shift[kMeans]);
    nu = plain(shift[kNu]);
    squares = plain(shift[kSquares]);
    const Tensor lengths = plain(shift[kLengths]);
    fewest = lengths.const_data_ptr<float>()[0];
    most = lengths.const_data_ptr<float>()[1];
  }
  const Shift moved = make_shift(q, k, center, mu, weights, means, nu, squares, own_ranges, causal, window, scaling,
                                 alpha, fewest, most);
  std::vector<Refinement> parts;
  std::vector<Tensor> kept;  // what the parts look at
  for (size_t first = 0; first < refinements.size(); first += kRefinementTensors) {
    const at::TensorList own = refinements.slice(first, kRefinementTensors);
    for (const int64_t n : {kCenter, kRadius, static_cast<PolynomialTensors>(kStep)}) kept.push_back(plain(own[n]));
    const Tensor* last = kept.data() + kept.size() - 3;
    parts.push_back({changed(own, heads), View<float>(last[0]), View<float>(last[1]), View<float>(last[2])});
  }
  if (k_len > kKeptKeys && !call.decodes()) {
    const Tensor found = refined_centers(call, moved, parts);
    call.center = View<float>(found);
    return std::get<0>(attend(call));
  }
  const Tensor output = at::empty({batch, q_len, heads, value.size(3)}, query.options());
  const Tensor row_scale =
      at::empty({call.l1() ? batch * heads * q_len : 0}, query.options().dtype(at::kFloat));
  dispatch(query.scalar_type(), [&]<typename scalar_t, typename mm_t>() {
    if (call.decodes()) {
      shifted_decode<scalar_t>(call, moved, parts, output, row_scale);
    } else {
      shifted_forward<scalar_t, mm_t>(call, moved, parts, output, row_scale);
    }
  });
  return output;
}

}  // namespace
}  // namespace polyattn

TORCH_LIBRARY_IMPL(polyattn_cpu, CPU, library) {
  library.impl("layer", polyattn::layer);
}
