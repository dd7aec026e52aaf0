// What a call is differentiated into, and how its rows were moved.

#pragma once

#include "shift.h"

#include <tuple>

namespace polyattn {

struct Gradients {
  Tensor query, key, value, coefficients;
  Tensor center;  // (B, H, Tq), or (0) if there is none
  Tensor shift;   // (H, ParameterSums::count()) of rows that were moved, else undefined
};

// What a head's parameters get, side by side.
struct ParameterSums {
  int64_t dim, features, squares;

  explicit ParameterSums(const Shift& shift)
      : dim(shift.head_dim), features(shift.weights ? kFeatures + shift.squares : 0), squares(shift.squares) {}
  int64_t center() const { return 0; }
  int64_t key_shift() const { return 1; }
  int64_t length_shift() const { return key_shift() + dim; }
  int64_t weights() const { return length_shift() + dim; }
  int64_t directions() const { return weights() + features; }
  int64_t count() const { return directions() + squares * dim; }
};

// Rows whose centers are those of a shift: their gradients go on to queries, keys and the parameters of the shift.
struct MovedRows {
  const Shift& shift;
  const float *mean, *variance;  // of the rows' scaled scores, (B, H, Tq); null for the key shift alone
  bool parameters;               // whether key shift, length shift or squares need gradients
};

// The gradients of a call; in gradients.cpp.
Gradients differentiate(const Call& call, const Tensor& grad_output, const Tensor& row_scale, bool coefficients_grad,
                        const MovedRows* moved = nullptr);

// Returns what gradients (B, H, Tq) of centers give query, key and parameters, (H, ParameterSums::count()); in shift.cpp.
std::tuple<Tensor, Tensor, Tensor> centers_gradients(const Shift& shift, const Tensor& grad);

}  // namespace polyattn
