// The output, by blocks of rows (`forward`) or, for few rows against many keys, by parts of the keys (`decode`).

#pragma once

#include "rows.h"

namespace polyattn {
namespace {

// What forward returns, as hf_polyattn/ops/library.py has it.
template <typename scalar_t>
struct Results {
  scalar_t* output;
  float* row_scale;

  Results(const Tensor& output, const Tensor& row_scale)
      : output(output.mutable_data_ptr<scalar_t>()), row_scale(row_scale.mutable_data_ptr<float>()) {}

  // Writes one row: its output is r_i `from`, and for l1 `sum` is Σ |w|.
  void write(const Call& call, int64_t b, int64_t h, int64_t i, Range keys, const float* from, float sum) const {
    float scale = call.l1() ? 0.0f : call.fixed_row_scale(b, h, i, keys);
    if (call.l1()) {
      if (sum > 0.0f) scale = 1.0f / (kEpsilon + sum);
      row_scale[(b * call.heads + h) * call.q_len + i] = scale;
    }
    store_row(from, scale, call.value_dim, output + ((b * call.q_len + i) * call.heads + h) * call.value_dim);
  }
};

template <typename scalar_t, typename mm_t>
void forward(const Call& call, const Tensor& output, const Tensor& row_scale) {
  constexpr int64_t pack = kPack<mm_t>;
  const Chunks chunks(call, kTasksPerThread * at::get_num_threads(), kChunkRows);
  const int64_t depth = round_up(call.head_dim, pack), width = call.value_dim;
  const int64_t key_step = even_step(call.k_len, kKeys), chunk_rows = chunks.per_chunk * chunks.step;
  const int64_t tile = chunks.step * key_step, pairs = call.batch * call.groups;
  const View<scalar_t> queries(call.query), all_keys(call.key), all_values(call.value);
  const Results<scalar_t> results(output, row_scale);
  const Dropout dropout(call);
  const bool hides = static_cast<bool>(call.mask);

  struct Memory {
    Buffer<mm_t> query, keys, key_rows, values, value_rows, weights;
    Buffer<float> scores, visible, kept, offsets, outputs, sums;
  };
  auto make = [&] {
    return Memory{Buffer<mm_t>(chunks.step * depth), Buffer<mm_t>(depth * key_step), Buffer<mm_t>(key_step * depth),
                  Buffer<mm_t>(key_step * width), Buffer<mm_t>(key_step * round_up(width, pack)), Buffer<mm_t>(tile),
                  Buffer<float>(tile), Buffer<float>(tile), Buffer<float>(call.seed ? tile : 0),
                  Buffer<float>(chunks.step), Buffer<float>(chunk_rows * width), Buffer<float>(chunk_rows)};
  };

  run_tasks(pairs * chunks.count, make, [&](int64_t task, Memory& memory) {
    // The last rows see most under causality: they come first.
    const int64_t chunk = chunks.count - 1 - task / pairs, entry = task % pairs / call.groups;
    const int64_t group = task % call.groups;
    const std::vector<RowBlock> blocks = chunks.of(call, entry, group, chunk);
    std::fill_n(static_cast<float*>(memory.outputs), chunk_rows * width, 0.0f);
    std::fill_n(static_cast<float*>(memory.sums), chunk_rows, 0.0f);

    for (int64_t start = 0; start < call.k_len; start += key_step) {
      const Range keys{start, std::min(start + key_step, call.k_len)};
      if (std::none_of(blocks.begin(), blocks.end(), [&](const RowBlock& b) { return b.sees(keys); })) continue;
      const int64_t count = keys.stop - keys.start, ld_keys = all_keys.strides[2], ld_values = all_values.strides[2];
      const scalar_t *from_key = all_keys(entry, group, start), *from_value = all_values(entry, group, start);
      prefetch_rows(from_key, ld_keys, count, call.head_dim);
      prefetch_rows(from_value, ld_values, count, width);
      const auto [key, ld_key] = operand<scalar_t, mm_t>(from_key, ld_keys, count, call.head_dim, memory.key_rows);
      pack_b_transposed(key, ld_key, count, depth, memory.keys, key_step);
      const auto [value, ld_value] = operand<scalar_t, mm_t>(from_value, ld_values, count, width, memory.value_rows);
      pack_b(value, ld_value, count, width, memory.values, key_step);

      for (size_t n = 0; n < blocks.size(); ++n) {
        const RowBlock& block = blocks[n];
        if (!block.sees(keys)) continue;
        if (n + 1 < blocks.size()) {
          const RowBlock& next = blocks[n + 1];
          prefetch_rows(queries(entry, next.head, next.first), queries.strides[2], next.rows, call.head_dim);
        }
        const Polynomial polynomial = call.polynomial(block.head);
        const auto [query, ld_query] = operand<scalar_t, mm_t>(
            queries(entry, block.head, block.first), queries.strides[2], block.rows, call.head_dim, memory.query);
        multiply<mm_t>(block.rows, key_step, depth, query, ld_query, memory.keys, key_step, memory.scores, key_step,
                       false);
        for (int64_t i = 0; i < block.rows; ++i) {
          memory.offsets[i] = call.row_offset(entry, block.head, block.first + i);
        }
        const bool whole = !hides && count == key_step && block.sees_all(keys);
        if (!whole) fill_visible(call, block, keys, key_step, key_step, 1, memory.visible);
        if (call.seed) fill_kept(call, dropout, block, keys, key_step, key_step, 1, memory.kept);
        const int64_t row = static_cast<int64_t>(n) * chunks.step;
        const ForwardTile<mm_t> part{block.rows, key_step, memory.scores, memory.weights, memory.offsets,
                                     whole ? nullptr : static_cast<float*>(memory.visible),
                                     call.seed ? static_cast<float*>(memory.kept) : nullptr, memory.sums + row};
        choose_weights<mm_t>(polynomial)(part, polynomial);
        multiply<mm_t>(block.rows, width, key_step, memory.weights, key_step, memory.values, width,
                       memory.outputs + row * width, width, true);
      }
    }

    for (size_t n = 0; n < blocks.size(); ++n) {
      const RowBlock& block = blocks[n];
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t row = static_cast<int64_t>(n) * chunks.step + i;
        results.write(call, entry, block.head, block.first + i, block.keys[i], memory.outputs + row * width,
                      memory.sums[row]);
      }
    }
    release<mm_t>();
  });
}

// A few rows against many keys: reads keys and values once, where they lie. Parts of the keys are added in order.
template <typename scalar_t>
void decode(const Call& call, const Tensor& output, const Tensor& row_scale) {
  const int64_t repeats = call.repeats(), rows = repeats * call.q_len, width = call.value_dim, depth = call.head_dim;
  const int64_t parts = ceil_div(call.k_len, kDecodeKeys), pairs = call.batch * call.groups;
  const int64_t columns = std::min(kDecodeKeys, round_up(call.k_len, kPad)), size = rows * (width + 1);
  const Buffer<float> partial(pairs * parts * size);
  const View<scalar_t> queries(call.query), all_keys(call.key), all_values(call.value);
  const Results<scalar_t> results(output, row_scale);
  const Dropout dropout(call);

  struct Memory {
    Buffer<float> query, scores, weights, visible, kept, offsets;
  };
  auto make = [&] {
    return Memory{Buffer<float>(rows * depth), Buffer<float>(rows * columns), Buffer<float>(rows * columns),
                  Buffer<float>(columns), Buffer<float>(columns), Buffer<float>(rows)};
  };
  run_tasks(pairs * parts, make, [&](int64_t task, Memory& memory) {
    const int64_t entry = task / parts / call.groups, group = task / parts % call.groups;
    const Range keys{task % parts * kDecodeKeys, std::min((task % parts + 1) * kDecodeKeys, call.k_len)};
    const int64_t count = keys.stop - keys.start;
    float* outputs = partial + task * size;
    float* sums = outputs + rows * width;
    std::fill_n(outputs, size, 0.0f);

    for (int64_t n = 0; n < rows; ++n) {
      const int64_t head = group * repeats + n / call.q_len;
      pack_rows(queries(entry, head, n % call.q_len), 0, 1, depth, memory.query + n * depth, depth);
    }
    const int64_t vectors = depth / kLanes * kLanes;
    for (int64_t j = 0; j < columns; ++j) {
      const scalar_t* key = all_keys(entry, group, keys.start + std::min(j, count - 1));
      Vec totals[kDecodeRows];
      std::fill_n(totals, rows, Vec(0.0f));
      for (int64_t d = 0; d < depth; d += kLanes) {
        const bool whole = d < vectors;
        const Vec k = whole ? load_vec(key + d) : load_vec(key + d, depth - d);
        for (int64_t n = 0; n < rows; ++n) {
          const float* query = memory.query + n * depth + d;
          totals[n] = at::vec::fmadd(whole ? load_vec(query) : load_vec(query, depth - d), k, totals[n]);
        }
      }
      for (int64_t n = 0; n < rows; ++n) {
        memory.scores[n * columns + j] = sum(totals[n]);
      }
    }
    for (int64_t n = 0; n < rows; ++n) {
      const RowBlock block(call, entry, group * repeats + n / call.q_len, n % call.q_len, 1);
      const Polynomial polynomial = call.polynomial(block.head);
      memory.offsets[n] = call.row_offset(entry, block.head, block.first);
      fill_visible(call, block, keys, columns, 0, 1, memory.visible);
      if (call.seed) fill_kept(call, dropout, block, keys, columns, 0, 1, memory.kept);
      const ForwardTile<float> part{1, columns, memory.scores + n * columns, memory.weights + n * columns,
                                    memory.offsets + n, memory.visible,
                                    call.seed ? static_cast<float*>(memory.kept) : nullptr, sums + n};
      choose_weights<float>(polynomial)(part, polynomial);
    }
    const int64_t value_vectors = width / kLanes * kLanes;
    for (int64_t j = 0; j < count; ++j) {
      const scalar_t* value = all_values(entry, group, keys.start + j);
      for (int64_t d = 0; d < value_vectors; d += kLanes) {
        const Vec v = load_vec(value + d);
        for (int64_t n = 0; n < rows; ++n) {
          float* to = outputs + n * width + d;
          at::vec::fmadd(Vec(memory.weights[n * columns + j]), v, Vec::loadu(to)).store(to);
        }
      }
      for (int64_t d = value_vectors; d < width; ++d) {
        for (int64_t n = 0; n < rows; ++n) {
          outputs[n * width + d] += memory.weights[n * columns + j] * static_cast<float>(value[d]);
        }
      }
    }
  });

  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t entry = pair / call.groups, group = pair % call.groups;
    float* total = partial + pair * parts * size;
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t n = 0; n < size; ++n) total[n] += total[part * size + n];
    }
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t query = n % call.q_len;
      results.write(call, entry, group * repeats + n / call.q_len, query, call.visible(entry, query),
                    total + n * width, total[rows * width + n]);
    }
  }
}

}  // namespace
}  // namespace polyattn
