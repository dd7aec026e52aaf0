// The derivatives of a tile of weights, by scores, coefficients and centers.

#pragma once

#include "polynomial.h"

namespace polyattn {

// Backward: transposed tiles (keys, rows), so that what belongs to a row of the attention sits in a lane ---------

// Sums over the keys of one row, kept for every row of a block: [sum][row].
struct RowSums {
  float* data;
  int64_t stride;
  int degree;

  static int64_t count(int degree) { return degree + 4; }
  float* moment(int k) const { return data + k * stride; }           // Σ dp t^k
  float* slope() const { return data + (degree + 1) * stride; }      // Σ dp p'(t)
  float* weighted() const { return data + (degree + 2) * stride; }   // Σ g w
  float* magnitude() const { return data + (degree + 3) * stride; }  // Σ d|w|/dt
};

template <typename mm_t>
struct BackwardTile {
  int64_t keys, rows;           // rows: a multiple of kPad, and the stride of all that follow
  const float* scores;
  const float* grad_weights;    // dO_i · v_j
  mm_t* weights;                // out: r w, kept
  mm_t* grad_scores;            // out
  mm_t* grad_scores_packed;     // out: the same as a B operand
  const float *offsets, *row_scales, *deltas;  // of the rows
  const float *visible, *kept;                 // as in ForwardTile
  RowSums sums;
  bool moments;  // whether the coefficients need a gradient
  const float *shifts = nullptr, *slopes = nullptr;  // of the rows: a visible score gets shift + slope · score besides
};

// Keys over which a lane adds up before the sum joins the others: rounding grows with the length of a sum.
constexpr int64_t kRun = 32;

// One vector of a tile: t, w = p(t)^s and q = s p(t)^(s−1), nil where hidden, and g = r dO·v.
template <typename mm_t, int P, bool kClamp, bool kMonomial>
struct Element {
  Vec raw, t, w, q, g, kept;

  Element(const BackwardTile<mm_t>& tile, int64_t at, const Coefficients<P>& c, int squarings, Vec slope, Vec offset,
          Vec scale) {
    raw = at::vec::fmadd(Vec::loadu(tile.scores + at), slope, offset);
    t = kClamp ? limited(raw) : raw;
    w = kMonomial ? c.c[P] * power_of<P>(t) : c.value(t);
    q = Vec(1.0f);
    if (squarings > 0) {
      q = w * Vec(static_cast<float>(1 << squarings));
      w = w * w;
      for (int s = 1; s < squarings; ++s) {
        q = q * w;
        w = w * w;
      }
    }
    if (tile.visible != nullptr) {
      const Vec visible = Vec::loadu(tile.visible + at);
      w = w & visible;
      q = q & visible;
    }
    g = Vec::loadu(tile.grad_weights + at) * scale;
    if (tile.kept != nullptr) {
      kept = Vec::loadu(tile.kept + at);
      g = g * kept;
    }
  }
};

inline void accumulate(float* to, Vec x) { (Vec::loadu(to) + x).store(to); }

// l1: adds Σ_j g_ij w_ij of a tile to the sums of its rows.
template <typename mm_t, int P, bool kClamp, bool kMonomial>
void weigh(const BackwardTile<mm_t>& tile, const Polynomial& polynomial) {
  const Coefficients<P> c(polynomial.coefficients);
  const Vec slope(polynomial.slope);
  for (int64_t i = 0; i < tile.rows; i += kLanes) {
    const Vec offset = Vec::loadu(tile.offsets + i), scale = Vec::loadu(tile.row_scales + i);
    for (int64_t start = 0; start < tile.keys; start += kRun) {
      Vec total(0.0f);
      for (int64_t j = start; j < std::min(tile.keys, start + kRun); ++j) {
        const Element<mm_t, P, kClamp, kMonomial> e(tile, j * tile.rows + i, c, polynomial.squarings, slope, offset,
                                                    scale);
        total = at::vec::fmadd(e.g, e.w, total);
      }
      accumulate(tile.sums.weighted() + i, total);
    }
  }
}

// p'(t), 0 where t is clamped.
template <int P, bool kClamp, bool kMonomial>
Vec slope_of(const Coefficients<P>& c, Vec raw, Vec t) {
  Vec slope;
  if constexpr (kMonomial) {
    slope = c.c[P] * Vec(static_cast<float>(P));
    if constexpr (P > 1) slope = slope * power_of<P - 1>(t);
  } else {
    slope = c.derivative(t);
  }
  if constexpr (kClamp) slope = slope & (raw > Vec(-1.0f)) & (raw < Vec(1.0f));
  return slope;
}

// Adds what the gradients of the rows' centers are made of to the sums of its rows: Σ_j g_ij dw_ij/dt as their slope
// and, for l1, Σ_j g_ij w_ij and Σ_j d|w_ij|/dt.
template <typename mm_t, int P, bool kL1, bool kClamp>
void survey(const BackwardTile<mm_t>& tile, const Polynomial& polynomial) {
  const Coefficients<P> c(polynomial.coefficients);
  const Vec slope(polynomial.slope), zero(0.0f);
  for (int64_t i = 0; i < tile.rows; i += kLanes) {
    const Vec offset = Vec::loadu(tile.offsets + i), scale = Vec::loadu(tile.row_scales + i);
    for (int64_t start = 0; start < tile.keys; start += kRun) {
      Vec slopes(0.0f), weighted(0.0f), magnitude(0.0f);
      for (int64_t j = start; j < std::min(tile.keys, start + kRun); ++j) {
        const Element<mm_t, P, kClamp, false> e(tile, j * tile.rows + i, c, polynomial.squarings, slope, offset, scale);
        const Vec dw = e.q * slope_of<P, kClamp, false>(c, e.raw, e.t);
        slopes = at::vec::fmadd(e.g, dw, slopes);
        if constexpr (kL1) {
          weighted = at::vec::fmadd(e.g, e.w, weighted);
          magnitude = magnitude + Vec::blendv(dw, dw.neg(), e.w < zero);
        }
      }
      accumulate(tile.sums.slope() + i, slopes);
      if constexpr (kL1) {
        accumulate(tile.sums.weighted() + i, weighted);
        accumulate(tile.sums.magnitude() + i, magnitude);
      }
    }
  }
}

// With ± the sign of w, d(loss)/dp = (g ∓ δ) q.
template <typename mm_t, int P, bool kL1, bool kClamp, bool kMonomial>
void gradients(const BackwardTile<mm_t>& tile, const Polynomial& polynomial) {
  const Coefficients<P> c(polynomial.coefficients);
  const Vec slope(polynomial.slope), zero(0.0f);
  const int squarings = polynomial.squarings;
  for (int64_t i = 0; i < tile.rows; i += kLanes) {
    const Vec offset = Vec::loadu(tile.offsets + i), scale = Vec::loadu(tile.row_scales + i);
    const Vec delta = kL1 ? Vec::loadu(tile.deltas + i) : zero;
    for (int64_t start = 0; start < tile.keys; start += kRun) {
      Vec moments[P + 1], total_slope(0.0f);
      for (int k = 0; k <= P; ++k) moments[k] = zero;

      auto grad_score = [&](int64_t j) {
        const int64_t at = j * tile.rows + i;
        const Element<mm_t, P, kClamp, kMonomial> e(tile, at, c, squarings, slope, offset, scale);
        const Vec out = e.w * scale;
        store(tile.weights + at, tile.kept == nullptr ? out : out * e.kept);

        Vec dp = e.g;
        if constexpr (kL1) {
          if (squarings > 0) {
            dp = dp - delta;
          } else {  // w may be negative
            dp = dp - Vec::blendv(Vec::blendv(zero, delta, e.w > zero), delta.neg(), e.w < zero);
          }
        }
        dp = dp * e.q;
        const Vec dt = dp * slope_of<P, kClamp, kMonomial>(c, e.raw, e.t);
        total_slope = total_slope + dt;
        if (tile.moments) {
          if constexpr (kMonomial) {
            moments[P] = at::vec::fmadd(dp, power_of<P>(e.t), moments[P]);
          } else {
            moments[0] = moments[0] + dp;
            for (int k = 1; k <= P; ++k) {
              dp = dp * e.t;
              moments[k] = moments[k] + dp;
            }
          }
        }
        Vec result = dt * slope;
        if (tile.shifts != nullptr) {
          Vec besides = at::vec::fmadd(Vec::loadu(tile.scores + at), Vec::loadu(tile.slopes + i),
                                       Vec::loadu(tile.shifts + i));
          if (tile.visible != nullptr) besides = besides & Vec::loadu(tile.visible + at);
          result = result + besides;
        }
        store(tile.grad_scores + at, result);
        return result;
      };

      const int64_t stop = std::min(tile.keys, start + kRun);
      for (int64_t j = start; j < stop; j += 2) {
        const Vec first = grad_score(j), second = j + 1 < stop ? grad_score(j + 1) : zero;
        store_packed(tile.grad_scores_packed + j * tile.rows + kPack<mm_t> * i, tile.rows, first, second);
      }
      for (int k = kMonomial ? P : 0; k <= P && tile.moments; ++k) accumulate(tile.sums.moment(k) + i, moments[k]);
      accumulate(tile.sums.slope() + i, total_slope);
    }
  }
}

template <typename mm_t>
auto choose_gradients(const Polynomial& p) {
  auto instance = []<int P, bool kL1, bool kClamp, bool kMonomial>() {
    return &gradients<mm_t, P, kL1, kClamp, kMonomial>;
  };
  return choose(p, instance, std::make_integer_sequence<int, kMaxDegree>());
}

template <typename mm_t>
auto choose_survey(const Polynomial& p) {
  auto instance = []<int P, bool kL1, bool kClamp, bool>() { return &survey<mm_t, P, kL1, kClamp>; };
  return choose(p, instance, std::make_integer_sequence<int, kMaxDegree>());
}

template <typename mm_t>
auto choose_weigh(const Polynomial& p) {
  auto instance = []<int P, bool, bool kClamp, bool kMonomial>() { return &weigh<mm_t, P, kClamp, kMonomial>; };
  return choose(p, instance, std::make_integer_sequence<int, kMaxDegree>());
}

}  // namespace polyattn
