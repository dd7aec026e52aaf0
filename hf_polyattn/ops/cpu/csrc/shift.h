// Where the scores of each row are moved to: the key shift and, of rows whose moments count, what they predict.
//
// The formula is that of hf_polyattn/patching/row_shift.py. Rows that see the same keys take the moments of the keys,
// their mean and covariance; the others take those of their scores.

#pragma once

#include "call.h"

#include <vector>

namespace polyattn {
namespace {

constexpr int64_t kFeatures = 8;  // m, v, m², m v, v², v³, log n, 1/n; squares of queries follow
constexpr int64_t kLogN = 6;

struct Shift {
  int64_t batch, heads, groups, q_len, k_len, head_dim, squares;
  Tensor query, key;
  View<float> center;        // (H)
  View<float> key_shift;     // (H, D)
  View<float> weights;       // (H, 8 + R), nats a unit of each feature; null for the key shift alone
  View<float> means;         // (H, 8 + R)
  View<float> length_shift;  // (H, D)
  View<float> directions;    // (H, R, D)
  View<int32_t> ranges;      // (B, Tq, 2)
  bool causal;
  optional<int64_t> window;
  float scaling, alpha, fewest, most;

  bool rows_see_the_same() const { return !causal && !window && (!ranges || ranges.strides[1] == 0); }
};

// The sum of a[d] · b[d].
inline float dot(const float* a, const float* b, int64_t count) {
  Vec sum(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) sum = at::vec::fmadd(Vec::loadu(a + d), Vec::loadu(b + d), sum);
  float total = at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, sum);
  for (; d < count; ++d) total += a[d] * b[d];
  return total;
}

// to += factor · from
inline void add(float factor, const float* from, int64_t count, float* to) {
  const Vec f(factor);
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) at::vec::fmadd(f, Vec::loadu(from + d), Vec::loadu(to + d)).store(to + d);
  for (; d < count; ++d) to[d] += factor * from[d];
}

template <typename scalar_t>
void read(const scalar_t* from, float factor, int64_t count, float* to) {
  for (int64_t d = 0; d < count; ++d) to[d] = factor * static_cast<float>(from[d]);
}

// The moments of a row, of the scores with its scaled query.
struct Moments {
  float mean = 0.0f, variance = 0.0f;
};

// Of rows that all see the keys `seen`.
struct OfKeys {
  std::vector<float> mean, covariance, product;

  OfKeys(const float* keys, Range seen, int64_t dim) : mean(dim), covariance(dim * dim), product(dim) {
    const int64_t count = seen.stop - seen.start;
    if (count == 0) return;
    for (int64_t j = seen.start; j < seen.stop; ++j) add(1.0f, keys + j * dim, dim, mean.data());
    for (float& m : mean) m /= static_cast<float>(count);
    std::vector<float> centered(dim);
    for (int64_t j = seen.start; j < seen.stop; ++j) {
      for (int64_t d = 0; d < dim; ++d) centered[d] = keys[j * dim + d] - mean[d];
      for (int64_t d = 0; d < dim; ++d) add(centered[d], centered.data(), dim, covariance.data() + d * dim);
    }
    for (float& c : covariance) c /= static_cast<float>(count);
  }
  Moments operator()(const float* query, int64_t dim) {
    std::fill(product.begin(), product.end(), 0.0f);
    for (int64_t d = 0; d < dim; ++d) add(query[d], covariance.data() + d * dim, dim, product.data());
    return {dot(query, mean.data(), dim), std::max(0.0f, dot(product.data(), query, dim))};
  }
};

// Of a row's scores, which stand in `scores`.
inline Moments of_scores(const float* query, const float* keys, Range seen, int64_t dim, float* scores) {
  const int64_t count = seen.stop - seen.start;
  if (count == 0) return {};
  double sum = 0.0, square = 0.0;
  for (int64_t j = 0; j < count; ++j) {
    scores[j] = dot(query, keys + (seen.start + j) * dim, dim);
    sum += scores[j];
  }
  const auto mean = static_cast<float>(sum / static_cast<double>(count));
  for (int64_t j = 0; j < count; ++j) square += (scores[j] - mean) * (scores[j] - mean);
  return {mean, static_cast<float>(square / static_cast<double>(count))};
}

// s_i less the key shift; `query` is scaled.
inline float predicted(const Shift& shift, int64_t h, const float* query, Moments of, int64_t count) {
  const auto n = static_cast<float>(std::max<int64_t>(1, count));
  const float known = std::min(std::max(n, shift.fewest), shift.most), log_known = std::log(known);
  const float m = of.mean, v = of.variance;
  const float features[kFeatures] = {m, v, m * m, m * v, v * v, v * v * v, log_known, 1.0f / known};
  const float *weights = shift.weights(h, 0, 0), *means = shift.means(h, 0, 0);
  float s = m + v / 2.0f + (1.0f - shift.alpha) * std::log(n);
  for (int64_t f = 0; f < kFeatures; ++f) s += weights[f] * (features[f] - means[f]);
  for (int64_t r = 0; r < shift.squares; ++r) {
    const float along = dot(query, shift.directions(h, r, 0), shift.head_dim);
    s += weights[kFeatures + r] * (along * along - means[kFeatures + r]);
  }
  return s + (log_known - means[kLogN]) * dot(query, shift.length_shift(h, 0, 0), shift.head_dim);
}

// The centers of the rows of all heads that share a key head.
template <typename scalar_t>
void shift_group(const Shift& shift, const View<scalar_t>& queries, const View<scalar_t>& all_keys, int64_t b,
                 int64_t g, float* centers) {
  const int64_t dim = shift.head_dim, repeats = shift.heads / shift.groups;
  const bool moments = static_cast<bool>(shift.weights);
  std::vector<float> keys(moments ? shift.k_len * dim : 0), scores(moments ? shift.k_len : 0), query(dim);
  for (int64_t j = 0; moments && j < shift.k_len; ++j) read(all_keys(b, g, j), 1.0f, dim, keys.data() + j * dim);
  const bool by_keys = moments && shift.rows_see_the_same() && shift.q_len > 1 && shift.k_len > dim;
  optional<OfKeys> of_keys;
  for (int64_t h = g * repeats; h < (g + 1) * repeats; ++h) {
    for (int64_t i = 0; i < shift.q_len; ++i) {
      read(queries(b, h, i), shift.scaling, dim, query.data());
      float center = *shift.center(h, 0, 0) + dot(query.data(), shift.key_shift(h, 0, 0), dim);
      if (moments) {
        const Range seen = visible_keys(b, i, shift.k_len, shift.causal, shift.window, shift.ranges);
        if (by_keys && !of_keys) of_keys.emplace(keys.data(), seen, dim);
        const Moments own = by_keys ? (*of_keys)(query.data(), dim)
                                    : of_scores(query.data(), keys.data(), seen, dim, scores.data());
        center += predicted(shift, h, query.data(), own, seen.stop - seen.start);
      }
      centers[(b * shift.heads + h) * shift.q_len + i] = center;
    }
  }
}

template <typename scalar_t>
void row_centers(const Shift& shift, float* centers) {
  const View<scalar_t> queries(shift.query), keys(shift.key);
  run_tasks(
      shift.batch * shift.groups, [] { return 0; },
      [&](int64_t task, int) {
        shift_group<scalar_t>(shift, queries, keys, task / shift.groups, task % shift.groups, centers);
      });
}

}  // namespace
}  // namespace polyattn
