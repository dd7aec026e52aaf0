// What the operators of the library take, and the types of products that they run with.

#pragma once

#include "call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#define POLYATTN_ARGUMENTS                                                                                       \
  "Tensor query, Tensor key, Tensor value, Tensor coefficients, Tensor? center, Tensor? radius, Tensor? mask, "  \
  "Tensor? ranges, Tensor? seed, bool causal, int? window, float scaling, int squarings, int normalizer, "       \
  "bool clamp, bool monomial, float dropout"
#define POLYATTN_TYPES                                                                                             \
  at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>,            \
      std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>, bool,                       \
      std::optional<int64_t>, double, int64_t, int64_t, bool, bool, double

namespace polyattn {

inline Call make_call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& coefficients,
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

// hf_polyattn/ops/call.py says why.
inline Tensor empty_gradient(const Tensor& operand) {
  const Tensor gradient = at::empty_like(operand);
  return gradient.stride(-1) == 1 ? gradient : at::empty(operand.sizes(), operand.options());
}

// Returns the output and the row scale, as hf_polyattn/ops/library.py has them; in attention.cpp.
std::tuple<Tensor, Tensor> attend(const Call& call);

}  // namespace polyattn
