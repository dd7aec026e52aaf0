// One attention module: its tensors and settings, as hf_polyattn/ops/layer.py hands them over.

#pragma once

#include "arguments.h"
#include "shift.h"

#include <vector>

#define POLYATTN_MODULE                                                                                             \
  "Tensor query, Tensor key, Tensor value, Tensor[] polynomial, Tensor[] shift, Tensor[] refinements, "             \
  "Tensor? mask, Tensor? ranges, Tensor? seed, bool causal, int? window, float scaling, int squarings, "            \
  "int normalizer, bool clamp, bool interval, float alpha, float dropout"
#define POLYATTN_MODULE_TYPES                                                                                       \
  at::Tensor, at::Tensor, at::Tensor, at::TensorList, at::TensorList, at::TensorList, std::optional<at::Tensor>,    \
      std::optional<at::Tensor>, std::optional<at::Tensor>, bool, std::optional<int64_t>, double, int64_t, int64_t, \
      bool, bool, double, double

namespace polyattn {

constexpr int64_t kKeptKeys = 1024;  // of a block's scores, which are kept in the second-level cache
constexpr int64_t kSteps = 5;        // coefficients of a refinement's step, and what its row sums are held within
constexpr float kFewest = 0.2f, kMost = 5.0f;

// The tensors of a polynomial, of a row shift and of a refinement, as hf_polyattn/ops/layer.py lists them.
enum PolynomialTensors : int64_t { kCoefficients, kDelta, kBasis, kCenter, kRadius, kPolynomialTensors };
enum ShiftTensors : int64_t { kMu, kWeights, kMeans, kScales, kNu, kSquares, kLengths, kShiftTensors };
enum RefinementTensors : int64_t { kStep = kPolynomialTensors, kRefinementTensors };

inline Tensor plain(const Tensor& tensor) {
  const bool is = tensor.scalar_type() == at::kFloat && tensor.is_contiguous();
  return is ? tensor : tensor.to(at::kFloat).contiguous();
}

// A tensor whose last dimension is contiguous.
inline Tensor by_rows(const Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

// c + δA of each head, (H, P + 1): c where δ is 0.
inline Tensor changed(at::TensorList polynomial, int64_t heads) {
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
inline bool is_monomial(const Tensor& coefficients) {
  const float* c = coefficients.const_data_ptr<float>();
  const int64_t terms = coefficients.size(1);
  for (int64_t n = 0; n < coefficients.numel(); ++n) {
    if (n % terms != terms - 1 && c[n] != 0.0f) return false;
  }
  return true;
}

inline Tensor ratio(const Tensor& a, const Tensor& b) {
  const Tensor from = plain(a), by = plain(b);
  Tensor result = at::empty(from.sizes(), from.options());
  for (int64_t n = 0; n < from.numel(); ++n) {
    result.mutable_data_ptr<float>()[n] = from.const_data_ptr<float>()[n] / by.const_data_ptr<float>()[n];
  }
  return result;
}

// A row's polynomial is summed at its center, and a polynomial of that sum is added to the center.
struct Refinement {
  Tensor coefficients;  // (H, P + 1)
  View<float> center, radius, steps;  // (H), (H), (H, kSteps)

  float step(int64_t h, float row_sum) const {
    const float z = std::clamp(row_sum, kFewest, kMost) - 1.0f;
    const float* c = steps(h, 0, 0);
    float g = c[kSteps - 1];
    for (int64_t k = kSteps - 2; k >= 0; --k) g = g * z + c[k];
    return g;
  }
};

// A module's call. `shift` is empty where no row is moved, μ alone, or all of a shift by moments, which no mask may go
// with, nor with refinements; the polynomial's center and radius count under `interval`, the radius of a refinement always.
struct Module {
  at::TensorList polynomial, shift_tensors;
  Call call;
  optional<Shift> shift;
  std::vector<Refinement> refinements;
  std::vector<Tensor> kept;  // what the others look at

  // Whether the scores of a block of rows are kept, and their moments with them.
  bool keeps_scores() const { return shift && (call.k_len <= kKeptKeys || call.decodes()); }
};

inline Module make_module(const Tensor& query, const Tensor& key, const Tensor& value, at::TensorList polynomial,
                          at::TensorList shift, at::TensorList refinements, const optional<Tensor>& mask,
                          const optional<Tensor>& ranges, const optional<Tensor>& seed, bool causal,
                          optional<int64_t> window, double scaling, int64_t squarings, int64_t normalizer, bool clamp,
                          bool interval, double alpha, double dropout) {
  const int64_t batch = query.size(0), heads = query.size(1), q_len = query.size(2), k_len = key.size(2);
  Module module{polynomial, shift};
  auto keep = [&](Tensor tensor) {
    module.kept.push_back(tensor);
    return tensor;
  };
  const Tensor q = by_rows(query), k = by_rows(key), v = by_rows(value);
  const Tensor coefficients = keep(changed(polynomial, heads));
  const Tensor center = keep(plain(polynomial[kCenter])), radius = keep(plain(polynomial[kRadius]));
  optional<Tensor> hidden, own_ranges, centers, own_radius;
  if (mask) hidden = keep(mask->expand({batch, heads, q_len, k_len}));
  if (ranges) own_ranges = keep(ranges->to(at::kInt).expand({batch, q_len, 2}));
  if (interval) {
    centers = center.view({1, heads, 1}).expand({batch, heads, q_len});
    own_radius = radius;
  }
  module.call = make_call(q, k, v, coefficients, centers, own_radius, hidden, own_ranges, seed, causal, window, scaling,
                          squarings, normalizer, clamp, is_monomial(coefficients), dropout);
  if (shift.empty()) return module;

  const bool moments = shift.size() == kShiftTensors;
  TORCH_CHECK(!mask || !(moments || refinements.size() > 0), "rows of a mask are moved by their scores in PyTorch");
  optional<Tensor> weights, means, nu, squares;
  double fewest = 1.0, most = 1.0;
  if (moments) {
    weights = keep(ratio(shift[kWeights], shift[kScales]));
    means = keep(plain(shift[kMeans]));
    nu = keep(plain(shift[kNu]));
    squares = keep(plain(shift[kSquares]));
    const Tensor lengths = plain(shift[kLengths]);
    fewest = lengths.const_data_ptr<float>()[0];
    most = lengths.const_data_ptr<float>()[1];
  }
  module.shift = make_shift(q, k, center, keep(plain(shift[kMu])), weights, means, nu, squares, own_ranges, causal,
                            window, scaling, alpha, fewest, most);
  for (size_t first = 0; first < refinements.size(); first += kRefinementTensors) {
    const at::TensorList own = refinements.slice(first, kRefinementTensors);
    const Tensor own_center = keep(plain(own[kCenter])), own_radii = keep(plain(own[kRadius]));
    module.refinements.push_back({changed(own, heads), View<float>(own_center), View<float>(own_radii),
                                  View<float>(keep(plain(own[kStep])))});
  }
  return module;
}

}  // namespace polyattn
