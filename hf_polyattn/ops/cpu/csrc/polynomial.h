// A polynomial of scores, and the weights of a tile.
#pragma once

#include "blocks.h"

#include <algorithm>
#include <cstdint>
#include <utility>

namespace polyattn {

constexpr int kMaxDegree = 8;

// What a head's polynomial is; t = slope · score + offset of the row.
struct Polynomial {
  const float* coefficients;  // degree + 1, ascending powers of t
  int degree;
  int squarings;   // log2 of the power s
  float slope;     // scaling / radius
  bool l1, clamp, monomial;
};

template <int P>
inline Vec power_of(Vec t) {
  if constexpr (P == 1) {
    return t;
  } else if constexpr (P % 2 == 0) {
    const Vec half = power_of<P / 2>(t);
    return half * half;
  } else {
    return power_of<P - 1>(t) * t;
  }
}

template <int P>
struct Coefficients {
  Vec c[P + 1];

  explicit Coefficients(const float* from) {
    for (int k = 0; k <= P; ++k) c[k] = Vec(from[k]);
  }
  Vec value(Vec t) const {
    Vec p = c[P];
    for (int k = P - 1; k >= 0; --k) p = at::vec::fmadd(p, t, c[k]);
    return p;
  }
  Vec derivative(Vec t) const {
    Vec p = c[P] * Vec(static_cast<float>(P));
    for (int k = P - 1; k >= 1; --k) p = at::vec::fmadd(p, t, c[k] * Vec(static_cast<float>(k)));
    return p;
  }
};

inline Vec limited(Vec t) { return at::vec::clamp(t, Vec(-1.0f), Vec(1.0f)); }

// Forward: scores (rows, columns) -> weights -------------------------------------------------------------------

template <typename mm_t>
struct ForwardTile {
  int64_t rows, columns;  // columns: a multiple of kPad, and the stride of all that follow
  const float* scores;
  mm_t* weights;
  const float* offsets;  // of the rows
  const float* visible;  // all bits set or none, an element; null where all are visible
  const float* kept;     // dropout: 0 or 1 / (1 − probability) an element; null without
  float* sums;           // l1: Σ w of the rows is added here
};

template <typename mm_t>
using WeightsOf = void (*)(const ForwardTile<mm_t>&, const Polynomial&);

// The function that makes the weights of a polynomial; in weights.cpp, for float and BFloat16.
template <typename mm_t>
WeightsOf<mm_t> choose_weights(const Polynomial& polynomial);

// The instance of a template for a polynomial --------------------------------------------------------------------

// Calls instance<P, kL1, kClamp, kMonomial>() for every kind of polynomial, and returns what it gave for this one. A
// clamped monomial counts as clamped.
template <typename Instance, int... P>
auto choose(const Polynomial& p, Instance, std::integer_sequence<int, P...>) {
  using Function = decltype(Instance().template operator()<1, false, false, false>());
  static constexpr Function table[][6] = {{Instance().template operator()<P + 1, false, false, false>(),
                                           Instance().template operator()<P + 1, false, true, false>(),
                                           Instance().template operator()<P + 1, false, false, true>(),
                                           Instance().template operator()<P + 1, true, false, false>(),
                                           Instance().template operator()<P + 1, true, true, false>(),
                                           Instance().template operator()<P + 1, true, false, true>()}...};
  return table[p.degree - 1][3 * p.l1 + (p.clamp ? 1 : 2 * p.monomial)];
}

}  // namespace polyattn
