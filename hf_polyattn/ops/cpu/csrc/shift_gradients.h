// The gradients of `row_centers`, of rows that see the same keys by the keys' mean and covariance, of others by scores.

#pragma once

#include "gradients.h"
#include "rows.h"

namespace polyattn {
namespace {

inline void add_scaled(float* to, float factor, const float* from, int64_t count) {
  for (int64_t d = 0; d < count; ++d) to[d] += factor * from[d];
}

// Of a row: d(loss)/dm and d(loss)/dv.
struct MomentGradients {
  float mean = 0.0f, variance = 0.0f;
};

// What the products of a block of scaled queries with the vectors of a head give back to both; the vectors are the columns
// of a `Matrix` behind its covariance.
struct VectorGradients {
  int64_t dim, width, count;  // count: of the vectors, padded
  Length own_length;
  std::vector<float> factors, vectors, partial;  // (kBlockRows, count), d(loss)/d(product); (count, width), twice

  explicit VectorGradients(const Shift& shift)
      : dim(shift.head_dim),
        width(round_up(dim, kPad)),
        count(round_up(kDirections + shift.squares, kPad)),
        factors(kBlockRows * count),
        vectors(count * width),
        partial(count * width) {}

  void take_head(const Shift& shift, int64_t h) {
    std::copy_n(shift.key_shift(h, 0, 0), dim, vectors.data() + kKeyShift * width);
    if (shift.weights) std::copy_n(shift.length_shift(h, 0, 0), dim, vectors.data() + kLengthShift * width);
    for (int64_t r = 0; r < shift.squares; ++r) {
      std::copy_n(shift.directions(h, r, 0), dim, vectors.data() + (kDirections + r) * width);
    }
  }

  // Takes a row with gradient `g` of its center, and adds what its features give their weights to `sums`. Returns the
  // gradients of its moments.
  MomentGradients take_row(const Shift& shift, const ParameterSums& place, int64_t h, int64_t i, float g, Moments own,
                           int64_t seen, const float* along, float* sums) {
    float* of = factors.data() + i * count;
    sums[place.center()] += g;
    of[kKeyShift] = g;
    if (!shift.weights) return {};

    const Length& length = own_length.of(shift, seen);
    const float m = own.mean, v = own.variance;
    const float features[kFeatures] = {m, v, m * m, m * v, v * v, v * v * v, length.log_known, 1.0f / length.known};
    const float *w = shift.weights(h, 0, 0), *means = shift.means(h, 0, 0);
    float* of_weights = sums + place.weights();
    for (int64_t f = 0; f < kFeatures; ++f) of_weights[f] += g * (features[f] - means[f]);
    for (int64_t r = 0; r < shift.squares; ++r) {
      const float a = along[kDirections + r];
      of_weights[kFeatures + r] += g * (a * a - means[kFeatures + r]);
      of[kDirections + r] = 2.0f * g * w[kFeatures + r] * a;
    }
    of[kLengthShift] = g * (length.log_known - means[kLogN]);
    return {g * (1.0f + w[0] + 2.0f * w[2] * m + w[3] * v),
            g * (0.5f + w[1] + w[3] * m + 2.0f * w[4] * v + 3.0f * w[5] * v * v)};
  }

  // to (rows, width): what the scaled queries get.
  void of_queries(int64_t rows, float* to) const {
    small_product<false>(factors.data(), count, vectors.data(), width, round_up(rows, kSharing), count, width, to);
  }

  // Adds what the vectors get of scaled queries (rows, width) to `sums`.
  void add_vectors(const float* queries, int64_t rows, const ParameterSums& place, float* sums) {
    small_product<true>(factors.data(), count, queries, width, count, rows, width, partial.data());
    auto add = [&](int64_t to, int64_t vector) {
      add_scaled(sums + to, 1.0f, partial.data() + vector * width, dim);
    };
    add(place.key_shift(), kKeyShift);
    if (place.features > 0) add(place.length_shift(), kLengthShift);
    for (int64_t r = 0; r < place.squares; ++r) add(place.directions() + r * dim, kDirections + r);
  }
};

// A block of moved rows: what the gradients of their centers give.
struct MovedBlock {
  ParameterSums place;
  Matrix matrix;
  VectorGradients vectors;
  int64_t head = -1;
  std::vector<float> queries, along, of_queries;  // (kBlockRows, width), (kBlockRows, columns), (kBlockRows, width)
  std::vector<float> shifts, slopes;              // (kBlockRows): a visible score gets shift + slope · score

  explicit MovedBlock(const Shift& shift)
      : place(shift),
        matrix(shift, false),
        vectors(shift),
        queries(kBlockRows * vectors.width),
        along(kBlockRows * matrix.columns),
        of_queries(kBlockRows * vectors.width),
        shifts(kBlockRows),
        slopes(kBlockRows) {}

  // Takes a block, whose centers have the gradients `grads`; fills `of_queries` with those of its scaled queries, but for
  // what their scores get, `shifts` and `slopes`, and adds to those of the head's parameters, `sums`.
  template <typename scalar_t>
  void take(const MovedRows& moved, const View<scalar_t>& all_queries, const RowBlock& block,
            const float* grads, float* sums) {
    const Shift& shift = moved.shift;
    const int64_t dim = vectors.dim, width = vectors.width, rows = block.rows;
    if (block.head != head) {
      head = block.head;
      matrix.take_head(shift, head);
      vectors.take_head(shift, head);
    }
    for (int64_t i = 0; i < rows; ++i) {
      read(all_queries(block.entry, head, block.first + i), shift.scaling, dim, queries.data() + i * width);
    }
    small_product<false>(queries.data(), width, matrix.values.data(), matrix.columns, round_up(rows, kSharing), dim,
                         matrix.columns, along.data());
    std::fill(shifts.begin(), shifts.end(), 0.0f);
    std::fill(slopes.begin(), slopes.end(), 0.0f);
    const int64_t first = (block.entry * shift.heads + head) * shift.q_len + block.first;
    for (int64_t i = 0; i < rows; ++i) {
      const Moments own = moved.mean ? Moments{moved.mean[first + i], moved.variance[first + i]} : Moments{};
      const int64_t seen = block.keys[i].stop - block.keys[i].start;
      const MomentGradients of = vectors.take_row(shift, place, head, i, grads[i], own, seen,
                                                  along.data() + i * matrix.columns, sums);
      const float each = shift.scaling / static_cast<float>(std::max<int64_t>(1, seen));
      shifts[i] = each * (of.mean - 2.0f * of.variance * own.mean);
      slopes[i] = each * 2.0f * of.variance * shift.scaling;
    }
    vectors.of_queries(rows, of_queries.data());
    if (moved.parameters) vectors.add_vectors(queries.data(), rows, place, sums);
  }
};

// The rows of all heads that share a key head.
template <typename scalar_t>
struct GroupGradients {
  const Shift& shift;
  const View<float>& grads;
  KeyHead<scalar_t> head;
  int64_t b, dim, width, padded_keys;
  ParameterSums place;
  VectorGradients vectors;
  std::vector<float> block, queries, weighted, products, of_queries, key_rows, of_keys, of_mean, covariance, partial;

  GroupGradients(const Shift& shift, const View<float>& grads, const View<scalar_t>& all_keys, int64_t b, int64_t g)
      : shift(shift),
        grads(grads),
        head(shift, all_keys, b, g),
        b(b),
        dim(shift.head_dim),
        width(round_up(dim, kPad)),
        padded_keys(round_up(shift.k_len, kPad)),
        place(shift),
        vectors(shift),
        block(kBlockRows * dim),
        queries(kBlockRows * width),
        weighted(kBlockRows * width),
        products(kBlockRows * head.matrix.columns),
        of_queries(kBlockRows * width),
        key_rows(head.transposed ? padded_keys * width : 0),
        of_keys(padded_keys * width),
        of_mean(width),
        covariance(round_up(dim, kSharing) * width),
        partial(std::max(padded_keys, std::max(kBlockRows, round_up(dim, kSharing))) * width) {
    for (int64_t j = 0; head.transposed && j < shift.k_len; ++j) {
      read(all_keys(b, g, j), 1.0f, dim, key_rows.data() + j * width);
    }
  }

  // Rows start, start + 1, … of a head: fills `of_queries` with the gradients of their scaled queries, and adds to those
  // of the keys and, in `sums`, of the head's parameters.
  void look(const View<scalar_t>& all_queries, int64_t h, int64_t start, int64_t rows, float* sums) {
    for (int64_t i = 0; i < rows; ++i) {
      read(all_queries(b, h, start + i), shift.scaling, dim, block.data() + i * dim);
      std::copy_n(block.data() + i * dim, dim, queries.data() + i * width);
    }
    std::fill(of_queries.begin(), of_queries.end(), 0.0f);
    vectors.take_head(shift, h);
    head.look(block.data(), start, rows, products.data());
    Range any{shift.k_len, 0};
    for (int64_t i = 0; head.transposed && i < rows; ++i) {
      const Range seen = head.seen_by(start + i);
      any = {std::min(any.start, seen.start), std::max(any.stop, seen.stop)};
    }
    const int64_t first = any.start / kPad * kPad, last = std::max(first, round_up(any.stop, kPad));
    for (int64_t i = 0; i < rows; ++i) {
      const float *query = block.data() + i * dim, *product = products.data() + i * head.matrix.columns;
      float* to = of_queries.data() + i * width;
      const Range seen = head.seen_by(start + i);
      const int64_t count = seen.stop - seen.start;
      const Moments own = head.moments ? head.of(i, seen, query, product) : Moments{};
      const MomentGradients of = vectors.take_row(shift, place, h, i, *grads(b, h, start + i), own, count,
                                                  product + head.matrix.covariance, sums);
      if (head.by_keys && count > 0) {
        add_scaled(to, of.mean, head.matrix.key_mean.data(), dim);
        add_scaled(to, 2.0f * of.variance, product, dim);
        add_scaled(of_mean.data(), of.mean, query, dim);
        for (int64_t d = 0; d < dim; ++d) weighted[i * width + d] = of.variance * query[d];
      } else if (head.transposed) {
        float* scores = head.scores.values.data() + i * head.scores.width;
        const float each = 1.0f / static_cast<float>(std::max<int64_t>(1, count));
        std::fill(scores + first, scores + std::max(first, seen.start), 0.0f);
        for (int64_t j = seen.start; j < seen.stop; ++j) {
          scores[j] = each * (of.mean + 2.0f * of.variance * (scores[j] - own.mean));
        }
        std::fill(scores + std::max(first, seen.stop), scores + std::max(last, seen.stop), 0.0f);
      }
    }
    vectors.add_vectors(queries.data(), rows, place, sums);
    vectors.of_queries(rows, partial.data());
    add_scaled(of_queries.data(), 1.0f, partial.data(), rows * width);
    if (head.by_keys) {
      small_product<true>(weighted.data(), width, queries.data(), width, round_up(dim, kSharing), rows, width,
                          partial.data());
      add_scaled(covariance.data(), 1.0f, partial.data(), dim * width);
    } else if (head.transposed && any.stop > any.start) {
      const float* scores = head.scores.values.data() + first;
      small_product<false>(scores, head.scores.width, key_rows.data() + first * width, width,
                           round_up(rows, kSharing), last - first, width, partial.data());
      add_scaled(of_queries.data(), 1.0f, partial.data(), rows * width);
      small_product<true>(scores, head.scores.width, queries.data(), width, last - first, rows, width, partial.data());
      add_scaled(of_keys.data() + first * width, 1.0f, partial.data(), (last - first) * width);
    }
  }

  // The covariance is that of centered keys, whose sum is 0: what it gives their mean is nothing.
  void finish() {
    if (!head.by_keys) return;
    const Range seen = head.seen_by(0);
    const int64_t count = seen.stop - seen.start;
    if (count == 0) return;
    const float each = 1.0f / static_cast<float>(count);
    small_product<false>(head.keys.data(), width, covariance.data(), width, round_up(shift.k_len, kSharing), dim, width,
                         partial.data());
    for (int64_t j = seen.start; j < seen.stop; ++j) {
      add_scaled(of_keys.data() + j * width, each, of_mean.data(), dim);
      add_scaled(of_keys.data() + j * width, 2.0f * each, partial.data() + j * width, dim);
    }
  }
};

template <typename scalar_t>
void write(const float* from, float factor, int64_t count, scalar_t* to) {
  for (int64_t d = 0; d < count; ++d) to[d] = static_cast<scalar_t>(factor * from[d]);
}

// `sums`: (B, H, ParameterSums::count()), zeros.
template <typename scalar_t>
void row_centers_gradients(const Shift& shift, const Tensor& grad, const Tensor& of_query, const Tensor& of_key,
                           float* sums) {
  const View<scalar_t> queries(shift.query), keys(shift.key);
  const View<float> grads(grad);
  const Target<scalar_t> to_query(of_query), to_key(of_key);
  const ParameterSums place(shift);
  run_tasks(
      shift.batch * shift.groups, [] { return 0; },
      [&](int64_t task, int) {
        const int64_t b = task / shift.groups, g = task % shift.groups;
        GroupGradients<scalar_t> group(shift, grads, keys, b, g);
        const int64_t repeats = group.head.repeats();
        for (int64_t h = g * repeats; h < (g + 1) * repeats; ++h) {
          group.head.matrix.take_head(shift, h);
          for (int64_t start = 0; start < shift.q_len; start += kBlockRows) {
            const int64_t rows = std::min(kBlockRows, shift.q_len - start);
            group.look(queries, h, start, rows, sums + (b * shift.heads + h) * place.count());
            for (int64_t i = 0; i < rows; ++i) {
              write(group.of_queries.data() + i * group.width, shift.scaling, group.dim, to_query(b, h, start + i));
            }
          }
        }
        group.finish();
        for (int64_t j = 0; j < shift.k_len; ++j) {
          write(group.of_keys.data() + j * group.width, 1.0f, group.dim, to_key(b, g, j));
        }
      });
}

}  // namespace
}  // namespace polyattn
