// The output for few rows against many keys: keys and values are read once, where they lie, in parts side by side.

#pragma once

#include "forward.h"

namespace polyattn {
namespace {

// Up to kLanes numbers as float; the lanes beyond them are 0.
inline Vec load_part(const float* from, int64_t count) { return Vec::loadu(from, count); }
template <typename T>
Vec load_part(const T* from, int64_t count) {
  return std::get<0>(at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from, count)));
}

// Keys or values of a key head.
template <typename scalar_t>
struct Part {
  const scalar_t* rows;
  int64_t stride, count, width;
};

// scores (kR, columns): products of kR queries, (kR, round_up(width, kLanes)) with zeros at their ends, and the keys; those
// of columns beyond the keys are of the last one.
template <int kR, typename scalar_t>
void decode_scores(const float* queries, const Part<scalar_t>& keys, float* scores, int64_t columns) {
  const int64_t depth = round_up(keys.width, kLanes), whole = keys.width / kLanes * kLanes;
  for (int64_t j = 0; j < columns; ++j) {
    const scalar_t* key = keys.rows + std::min(j, keys.count - 1) * keys.stride;
    Vec totals[kR];
    for (Vec& total : totals) total = Vec(0.0f);
    auto add = [&](int64_t d, Vec k) {
      for (int r = 0; r < kR; ++r) totals[r] = at::vec::fmadd(Vec::loadu(queries + r * depth + d), k, totals[r]);
    };
    for (int64_t d = 0; d < whole; d += kLanes) add(d, load_vec(key + d));
    if (whole < keys.width) add(whole, load_part(key + whole, keys.width - whole));
    for (int r = 0; r < kR; ++r) scores[r * columns + j] = sum(totals[r]);
  }
}

// outputs (rows, width), columns d … of them: products of the weights (kR, columns) and the values, held in registers.
template <int kR, int kVectors, typename scalar_t>
void decode_values(const float* weights, int64_t columns, const Part<scalar_t>& values, int64_t d, int64_t rows,
                   float* outputs) {
  const int64_t rest = std::min(values.width - d, kVectors * kLanes);
  Vec totals[kR][kVectors];
  for (auto& row : totals) {
    for (Vec& total : row) total = Vec(0.0f);
  }
  for (int64_t j = 0; j < values.count; ++j) {
    const scalar_t* value = values.rows + j * values.stride + d;
    for (int n = 0; n < kVectors; ++n) {
      const Vec v = rest < kLanes ? load_part(value, rest) : load_vec(value + n * kLanes);
      for (int r = 0; r < kR; ++r) {
        totals[r][n] = at::vec::fmadd(Vec(weights[r * columns + j]), v, totals[r][n]);
      }
    }
  }
  for (int64_t r = 0; r < std::min<int64_t>(rows, kR); ++r) {
    for (int n = 0; n < kVectors; ++n) {
      totals[r][n].store(outputs + r * values.width + d + n * kLanes, std::min(kLanes, rest));
    }
  }
}

template <int kR, typename scalar_t>
void decode_values(const float* weights, int64_t columns, const Part<scalar_t>& values, int64_t rows, float* outputs) {
  constexpr int kVectors = kR <= 4 ? 4 : 2;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= values.width; d += kVectors * kLanes) {
    decode_values<kR, kVectors>(weights, columns, values, d, rows, outputs);
  }
  for (; d < values.width; d += kLanes) decode_values<kR, 1>(weights, columns, values, d, rows, outputs);
}

// The number of rows, rounded up to one that there are instances for.
inline int64_t instance_rows(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : kDecodeRows; }

// Calls run<kR>() with that number.
template <typename Run>
void with_rows(int64_t rows, const Run& run) {
  static_assert(kDecodeRows == 8);
  if (rows == 1) return run.template operator()<1>();
  if (rows == 2) return run.template operator()<2>();
  if (rows <= 4) return run.template operator()<4>();
  run.template operator()<8>();
}

// The tasks: the rows of a key head and a part of its keys. Parts are added in order.
template <typename scalar_t>
struct Decoder {
  const Call& call;
  int64_t repeats, rows, padded_rows, dim, depth, width, parts, pairs, tasks, columns, size;
  View<scalar_t> queries, all_keys, all_values;
  Dropout dropout;
  Buffer<float> partial;  // of each task: outputs (rows, width) and Σ w (rows)

  struct Memory {  // rows beyond those there are stay 0
    std::vector<float> query, scores, weights, visible, kept, offsets;
  };

  explicit Decoder(const Call& call)
      : call(call),
        repeats(call.repeats()),
        rows(repeats * call.q_len),
        padded_rows(instance_rows(rows)),
        dim(call.head_dim),
        depth(round_up(dim, kLanes)),
        width(call.value_dim),
        parts(ceil_div(call.k_len, kDecodeKeys)),
        pairs(call.batch * call.groups),
        tasks(pairs * parts),
        columns(std::min(kDecodeKeys, round_up(call.k_len, kPad))),
        size(rows * (width + 1)),
        queries(call.query),
        all_keys(call.key),
        all_values(call.value),
        dropout(call),
        partial(tasks * size) {}

  Memory memory() const {
    const std::vector<float> tile(padded_rows * columns), row(columns);
    return {std::vector<float>(padded_rows * depth), tile, tile, row, row, std::vector<float>(rows)};
  }
  int64_t entry_of(int64_t task) const { return task / parts / call.groups; }
  int64_t group_of(int64_t task) const { return task / parts % call.groups; }
  int64_t head_of(int64_t group, int64_t n) const { return group * repeats + n / call.q_len; }
  Range keys_of(int64_t task) const {
    const int64_t start = task % parts * kDecodeKeys;
    return {start, std::min(start + kDecodeKeys, call.k_len)};
  }
  Part<scalar_t> part_of(const View<scalar_t>& all, int64_t task, int64_t columns_of) const {
    const Range keys = keys_of(task);
    return {all(entry_of(task), group_of(task), keys.start), all.strides[2], keys.stop - keys.start, columns_of};
  }

  // Fills `scores` (padded_rows, columns).
  void score(int64_t task, Memory& memory, float* scores) const {
    for (int64_t n = 0; n < rows; ++n) {
      const scalar_t* query = queries(entry_of(task), head_of(group_of(task), n), n % call.q_len);
      pack_rows(query, 0, 1, dim, memory.query.data() + n * depth, depth);
    }
    const Part<scalar_t> keys = part_of(all_keys, task, dim);
    with_rows(rows, [&]<int kR>() { decode_scores<kR>(memory.query.data(), keys, scores, columns); });
  }

  void attend(int64_t task, Memory& memory, const float* scores) const {
    const int64_t entry = entry_of(task), group = group_of(task);
    const Range keys = keys_of(task);
    float *outputs = partial + task * size, *sums = outputs + rows * width;
    std::fill_n(sums, rows, 0.0f);
    for (int64_t n = 0; n < rows; ++n) {
      const RowBlock block(call, entry, head_of(group, n), n % call.q_len, 1);
      const Polynomial polynomial = call.polynomial(block.head);
      memory.offsets[n] = call.row_offset(entry, block.head, block.first);
      const bool whole = !call.mask && keys.stop - keys.start == columns && block.sees_all(keys);
      if (!whole) fill_visible(call, block, keys, columns, 0, 1, memory.visible.data());
      if (call.seed) fill_kept(call, dropout, block, keys, columns, 0, 1, memory.kept.data());
      const ForwardTile<float> part{1, columns, scores + n * columns, memory.weights.data() + n * columns,
                                    memory.offsets.data() + n, whole ? nullptr : memory.visible.data(),
                                    call.seed ? memory.kept.data() : nullptr, sums + n};
      choose_weights<float>(polynomial)(part, polynomial);
    }
    const Part<scalar_t> values = part_of(all_values, task, width);
    with_rows(rows, [&]<int kR>() { decode_values<kR>(memory.weights.data(), columns, values, rows, outputs); });
  }

  void finish(const Tensor& output, const Tensor& row_scale) const {
    const Results<scalar_t> results(output, row_scale);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t entry = pair / call.groups, group = pair % call.groups;
      float* total = partial + pair * parts * size;
      for (int64_t part = 1; part < parts; ++part) {
        for (int64_t n = 0; n < size; ++n) total[n] += total[part * size + n];
      }
      for (int64_t n = 0; n < rows; ++n) {
        const int64_t query = n % call.q_len;
        results.write(call, entry, head_of(group, n), query, call.visible(entry, query), total + n * width,
                      total[rows * width + n]);
      }
    }
  }
};

template <typename scalar_t>
void decode(const Call& call, const Tensor& output, const Tensor& row_scale) {
  const Decoder<scalar_t> decoder(call);
  run_tasks(
      decoder.tasks, [&] { return decoder.memory(); },
      [&](int64_t task, auto& memory) {
        decoder.score(task, memory, memory.scores.data());
        decoder.attend(task, memory, memory.scores.data());
      });
  decoder.finish(output, row_scale);
}

}  // namespace
}  // namespace polyattn
