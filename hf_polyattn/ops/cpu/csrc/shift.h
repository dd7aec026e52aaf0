// Where the scores of each row are moved to: the key shift and, of rows whose moments count, what they predict.
//
// The formula is that of hf_polyattn/patching/row_shift.py. Rows that see the same keys take the moments of the keys,
// their mean and covariance; the others take those of their scores.

#pragma once

#include "arguments.h"

#include <vector>

namespace polyattn {

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

inline Shift make_shift(const Tensor& query, const Tensor& key, const Tensor& center, const Tensor& key_shift,
                        const optional<Tensor>& weights, const optional<Tensor>& means,
                        const optional<Tensor>& length_shift, const optional<Tensor>& directions,
                        const optional<Tensor>& ranges, bool causal, optional<int64_t> window, double scaling,
                        double alpha, double fewest, double most) {
  return {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3),
          directions ? directions->size(1) : 0, query, key, View<float>(center), View<float>(key_shift),
          View<float>(weights), View<float>(means), View<float>(length_shift), View<float>(directions),
          View<int32_t>(ranges), causal, window, static_cast<float>(scaling), static_cast<float>(alpha),
          static_cast<float>(fewest), static_cast<float>(most)};
}

namespace {

constexpr int64_t kSharing = 8;    // rows of a product that share what they load
constexpr int64_t kBlockRows = 64;  // queries that are looked at together, a multiple of it

// to = a · b, (rows, columns) of (rows, depth) and (depth, columns): rows in multiples of kSharing, columns of kPad.
// The rows of b and of the result are `stride` apart. With kTransposed a is stored (depth, rows).
template <bool kTransposed>
void small_product(const float* a, int64_t a_stride, const float* b, int64_t stride, int64_t rows, int64_t depth,
                   int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; i += kSharing) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec sums[kSharing];
      for (Vec& sum : sums) sum = Vec(0.0f);
      for (int64_t d = 0; d < depth; ++d) {
        const Vec from = Vec::loadu(b + d * stride + c);
        for (int64_t r = 0; r < kSharing; ++r) {
          const float factor = kTransposed ? a[d * a_stride + i + r] : a[(i + r) * a_stride + d];
          sums[r] = at::vec::fmadd(Vec(factor), from, sums[r]);
        }
      }
      for (int64_t r = 0; r < kSharing; ++r) sums[r].store(to + (i + r) * stride + c);
    }
  }
}

// The sum of a[d] · b[d].
inline float dot(const float* a, const float* b, int64_t count) {
  Vec sum(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) sum = at::vec::fmadd(Vec::loadu(a + d), Vec::loadu(b + d), sum);
  float total = at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, sum);
  for (; d < count; ++d) total += a[d] * b[d];
  return total;
}

template <typename scalar_t>
void read(const scalar_t* from, float factor, int64_t count, float* to) {
  for (int64_t d = 0; d < count; ++d) to[d] = factor * static_cast<float>(from[d]);
}

// The moments of a row, of the scores with its scaled query.
struct Moments {
  float mean = 0.0f, variance = 0.0f;
};

inline float sum_of(const float* values, int64_t count, float less, bool squared) {
  const Vec shift(less);
  Vec sum(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Vec x = Vec::loadu(values + j) - shift;
    sum = squared ? at::vec::fmadd(x, x, sum) : sum + x;
  }
  float total = at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, sum);
  for (; j < count; ++j) {
    const float x = values[j] - less;
    total += squared ? x * x : x;
  }
  return total;
}

// Of a row's visible scores.
inline Moments of_scores(const float* scores, int64_t count) {
  if (count == 0) return {};
  const auto n = static_cast<float>(count);
  const float mean = sum_of(scores, count, 0.0f, false) / n;
  return {mean, sum_of(scores, count, mean, true) / n};
}

// What the queries of a head are multiplied by, side by side: the covariance of the keys, if all rows see the same, and
// kKeyMean, kKeyShift, kLengthShift and the directions of the squares.
enum Column : int64_t { kKeyMean, kKeyShift, kLengthShift, kDirections };

struct Matrix {
  int64_t dim, covariance, columns;  // columns of the covariance, and of all
  std::vector<float> values;         // (dim, columns), the rows of the covariance padded
  std::vector<float> key_mean;       // (dim)

  Matrix(const Shift& shift, bool by_keys)
      : dim(shift.head_dim),
        covariance(by_keys ? round_up(dim, kPad) : 0),
        columns(covariance + round_up(kDirections + shift.squares, kPad)),
        values(round_up(dim, kSharing) * columns) {}

  void set(Column column, int64_t number, const float* from) {
    for (int64_t d = 0; d < dim; ++d) values[d * columns + covariance + column + number] = from[d];
  }

  // Takes what a head's queries are looked at with, whatever they see.
  void take_head(const Shift& shift, int64_t h) {
    set(kKeyShift, 0, shift.key_shift(h, 0, 0));
    if (shift.weights) set(kLengthShift, 0, shift.length_shift(h, 0, 0));
    for (int64_t r = 0; r < shift.squares; ++r) set(kDirections, r, shift.directions(h, r, 0));
  }

  // Takes mean and covariance of keys that lie `covariance` columns apart, the last ones 0; they are centered in place.
  void take(float* keys, Range seen) {
    const int64_t count = seen.stop - seen.start, width = covariance;
    if (count == 0) return;
    std::vector<float> mean(width), products(round_up(dim, kSharing) * width);
    float* first = keys + seen.start * width;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t d = 0; d < width; ++d) mean[d] += first[j * width + d];
    }
    for (float& m : mean) m /= static_cast<float>(count);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t d = 0; d < width; ++d) first[j * width + d] -= mean[d];
    }
    small_product<true>(first, width, first, width, round_up(dim, kSharing), count, width, products.data());
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t c = 0; c < width; ++c) {
        values[d * columns + c] = products[d * width + c] / static_cast<float>(count);
      }
    }
    set(kKeyMean, 0, mean.data());
    key_mean = std::move(mean);
  }
};

// The length of a row: how many keys it sees, and that number held within the lengths of the calibration. Most rows are
// as long as the row before, and logarithms take time.
struct Length {
  int64_t count = -1;
  float log = 0.0f, known = 1.0f, log_known = 0.0f;

  const Length& of(const Shift& shift, int64_t keys) {
    if (keys == count) return *this;
    count = keys;
    const auto n = static_cast<float>(std::max<int64_t>(1, keys));
    known = std::min(std::max(n, shift.fewest), shift.most);
    log = std::log(n);
    log_known = std::log(known);
    return *this;
  }
};

// s_i less the key shift; `along` are the products of the row's scaled query with the columns of the matrix.
inline float predicted(const Shift& shift, int64_t h, const float* along, Moments of, const Length& length) {
  const float m = of.mean, v = of.variance;
  const float features[kFeatures] = {m, v, m * m, m * v, v * v, v * v * v, length.log_known, 1.0f / length.known};
  const float *weights = shift.weights(h, 0, 0), *means = shift.means(h, 0, 0);
  float s = m + v / 2.0f + (1.0f - shift.alpha) * length.log;
  for (int64_t f = 0; f < kFeatures; ++f) s += weights[f] * (features[f] - means[f]);
  for (int64_t r = 0; r < shift.squares; ++r) {
    const float of_direction = along[kDirections + r];
    s += weights[kFeatures + r] * (of_direction * of_direction - means[kFeatures + r]);
  }
  return s + (length.log_known - means[kLogN]) * along[kLengthShift];
}

// The scores of a block of rows, from keys that are stored (dim, keys), or of fewer rows from keys as they lie.
struct Scores {
  int64_t dim, width;
  std::vector<float> keys, values;  // (dim, width); (kBlockRows, width)

  Scores(int64_t dim, int64_t k_len, int64_t rows)
      : dim(dim), width(round_up(k_len, kPad)), keys(dim * width), values(round_up(rows, kSharing) * width) {}

  void set(int64_t number, const float* key) {
    for (int64_t d = 0; d < dim; ++d) keys[d * width + number] = key[d];
  }
  void of(const float* queries, int64_t rows, Range seen) {
    const int64_t start = seen.start / kPad * kPad;
    small_product<false>(queries, dim, keys.data() + start, width, round_up(rows, kSharing), dim,
                         round_up(seen.stop - start, kPad), values.data() + start);
  }
};

// A key head: what its rows are looked at with, and how their moments are found.
template <typename scalar_t>
struct KeyHead {
  const Shift& shift;
  const View<scalar_t>& all_keys;
  int64_t b, g, dim, width;
  bool moments, by_keys, transposed;  // else the keys are read for each row: once, or little more
  std::vector<float> keys, own_scores;
  Matrix matrix;
  Scores scores;

  KeyHead(const Shift& shift, const View<scalar_t>& all_keys, int64_t b, int64_t g)
      : shift(shift),
        all_keys(all_keys),
        b(b),
        g(g),
        dim(shift.head_dim),
        width(round_up(dim, kPad)),
        moments(static_cast<bool>(shift.weights)),
        by_keys(moments && shift.rows_see_the_same() && shift.q_len > 1 && shift.k_len > dim),
        transposed(moments && !by_keys && repeats() * shift.q_len >= kSharing),
        keys(by_keys ? round_up(shift.k_len, kSharing) * width : dim),
        own_scores(moments && !by_keys && !transposed ? shift.k_len : 0),
        matrix(shift, by_keys),
        scores(transposed ? dim : 0, shift.k_len, std::min(kBlockRows, shift.q_len)) {
    for (int64_t j = 0; (by_keys || transposed) && j < shift.k_len; ++j) {
      float* key = keys.data() + (by_keys ? j * width : 0);
      read(all_keys(b, g, j), 1.0f, dim, key);
      if (transposed) scores.set(j, key);
    }
    if (by_keys) matrix.take(keys.data(), seen_by(0));
  }

  int64_t repeats() const { return shift.heads / shift.groups; }
  Range seen_by(int64_t i) const {
    return visible_keys(b, i, shift.k_len, shift.causal, shift.window, shift.ranges);
  }

  // Looks at rows `start`, start + 1, … whose scaled queries are given.
  void look(const float* queries, int64_t start, int64_t rows, float* products) {
    small_product<false>(queries, dim, matrix.values.data(), matrix.columns, round_up(rows, kSharing), dim,
                         matrix.columns, products);
    if (!transposed) return;
    Range any{shift.k_len, 0};
    for (int64_t i = 0; i < rows; ++i) {
      const Range seen = seen_by(start + i);
      any = {std::min(any.start, seen.start), std::max(any.stop, seen.stop)};
    }
    if (any.stop > any.start) scores.of(queries, rows, any);
  }

  // The moments of the i-th of the rows that were looked at.
  Moments of(int64_t i, Range seen, const float* query, const float* product) {
    const int64_t count = seen.stop - seen.start;
    if (by_keys) return {product[matrix.covariance + kKeyMean], std::max(0.0f, dot(product, query, dim))};
    if (transposed) return of_scores(scores.values.data() + i * scores.width + seen.start, count);
    for (int64_t j = 0; j < count; ++j) {
      read(all_keys(b, g, seen.start + j), 1.0f, dim, keys.data());
      own_scores[j] = dot(query, keys.data(), dim);
    }
    return of_scores(own_scores.data(), count);
  }
};

// The centers of the rows of all heads that share a key head.
template <typename scalar_t>
void shift_group(const Shift& shift, const View<scalar_t>& queries, const View<scalar_t>& all_keys, int64_t b,
                 int64_t g, float* centers) {
  const int64_t dim = shift.head_dim;
  KeyHead<scalar_t> head(shift, all_keys, b, g);
  const int64_t columns = head.matrix.columns;
  Length length;
  std::vector<float> block(kBlockRows * dim), products(kBlockRows * columns);
  for (int64_t h = g * head.repeats(); h < (g + 1) * head.repeats(); ++h) {
    head.matrix.take_head(shift, h);
    for (int64_t start = 0; start < shift.q_len; start += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, shift.q_len - start);
      for (int64_t i = 0; i < rows; ++i) read(queries(b, h, start + i), shift.scaling, dim, block.data() + i * dim);
      head.look(block.data(), start, rows, products.data());
      for (int64_t i = 0; i < rows; ++i) {
        const float *product = products.data() + i * columns, *along = product + head.matrix.covariance;
        float center = *shift.center(h, 0, 0) + along[kKeyShift];
        if (head.moments) {
          const Range seen = head.seen_by(start + i);
          const Moments own = head.of(i, seen, block.data() + i * dim, product);
          center += predicted(shift, h, along, own, length.of(shift, seen.stop - seen.start));
        }
        centers[(b * shift.heads + h) * shift.q_len + start + i] = center;
      }
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

inline Tensor centers_of(const Shift& shift) {
  const auto options = shift.query.options().dtype(at::kFloat);
  const Tensor found = at::empty({shift.batch, shift.heads, shift.q_len}, options);
  dispatch(shift.query.scalar_type(), [&]<typename scalar_t, typename mm_t>() {
    row_centers<scalar_t>(shift, found.mutable_data_ptr<float>());
  });
  return found;
}

}  // namespace
}  // namespace polyattn
