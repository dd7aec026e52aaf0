// The output, by blocks of rows.

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

}  // namespace
}  // namespace polyattn
