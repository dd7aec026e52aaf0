// The gradients. Every task sums its own of the keys and values, and those of the chunks are added in order.

#pragma once

#include "derivatives.h"
#include "shift_gradients.h"

#include <limits>
#include <tuple>

namespace polyattn {
namespace {

template <typename scalar_t, typename mm_t>
void backward(const Call& call, const Tensor& grad_output, const Tensor& row_scale, bool moments,
              const MovedRows* moved, Gradients& gradients) {
  constexpr int64_t pack = kPack<mm_t>;
  const int64_t pairs = call.batch * call.groups, terms = call.terms;
  const Chunks chunks(call, call.batch * call.groups >= 2 * at::get_num_threads() ? 1 : 2 * at::get_num_threads(),
                      std::numeric_limits<int64_t>::max() / 4);
  const int64_t depth = round_up(call.head_dim, pack), width = round_up(call.value_dim, pack);
  const int64_t head_dim = call.head_dim, value_dim = call.value_dim;
  const int64_t key_step = std::min(kKeys, round_up(call.k_len, kPad)), padded_keys = round_up(call.k_len, pack);
  const int64_t rows = chunks.step, tile = key_step * rows, sum_count = RowSums::count(static_cast<int>(terms) - 1);
  const View<scalar_t> grads(grad_output);
  const Target<scalar_t> to_query(gradients.query), to_key(gradients.key), to_value(gradients.value);
  auto* grad_center = gradients.center.mutable_data_ptr<float>();
  const View<float> row_scales(row_scale);
  const bool follows = moved && moved->mean;     // scores get a part of what the moments of their row get
  const bool surveyed = call.l1() || follows;    // what a row needs as a whole before its scores have gradients
  const int64_t scores = surveyed ? rows * call.k_len : tile;
  const View<scalar_t> queries(call.query), all_keys(call.key), all_values(call.value);
  const Dropout dropout(call);
  const bool hides = static_cast<bool>(call.mask);
  // Of every task: gradients of keys and values, and of the coefficients of its heads and of what moves their rows.
  const int64_t partial_size = call.k_len * (head_dim + value_dim);
  const bool alone = chunks.count == 1;  // else its gradients of keys and values wait for those of the other chunks
  const Buffer<float> partial(alone ? 0 : pairs * chunks.count * partial_size);
  const int64_t heads = pairs * chunks.count * call.repeats();
  const int64_t shift_terms = moved ? gradients.shift.size(1) : 0;
  std::vector<double> grad_coefficients(heads * terms, 0.0);
  std::vector<float> grad_shift(heads * shift_terms, 0.0f);

  struct Memory {
    Buffer<mm_t> key_rows, value_rows, keys_transposed;
    Buffer<mm_t> query_rows, query_columns, query_packed, grad_rows, grad_columns, grad_packed;
    Buffer<mm_t> weights, grad_scores, grad_scores_packed;
    Buffer<float> scores, grad_weights, visible, kept, row_values, sums, grad_query, grad_query_rows, partial;
    optional<MovedBlock> moved;
  };
  auto make = [&] {
    return Memory{Buffer<mm_t>(call.k_len * depth), Buffer<mm_t>(call.k_len * width),
                  Buffer<mm_t>(head_dim * padded_keys), Buffer<mm_t>(rows * depth), Buffer<mm_t>(rows * depth),
                  Buffer<mm_t>(rows * head_dim), Buffer<mm_t>(rows * width), Buffer<mm_t>(rows * width),
                  Buffer<mm_t>(rows * value_dim), Buffer<mm_t>(tile), Buffer<mm_t>(tile),
                  Buffer<mm_t>(tile + 2 * rows), Buffer<float>(scores), Buffer<float>(scores), Buffer<float>(tile),
                  Buffer<float>(call.seed ? tile : 0), Buffer<float>(4 * rows), Buffer<float>(sum_count * rows),
                  Buffer<float>(head_dim * rows), Buffer<float>(rows * head_dim),
                  Buffer<float>(alone ? partial_size : 0), moved ? optional<MovedBlock>(moved->shift) : std::nullopt};
  };

  run_tasks(pairs * chunks.count, make, [&](int64_t task, Memory& memory) {
    const int64_t chunk = chunks.count - 1 - task / pairs, pair = task % pairs;
    const int64_t entry = pair / call.groups, group = pair % call.groups;
    const int64_t ld_keys = all_keys.strides[2], ld_values = all_values.strides[2];
    const scalar_t *from_key = all_keys(entry, group, 0), *from_value = all_values(entry, group, 0);
    prefetch_rows(from_key, ld_keys, std::min(call.k_len, kKeys), head_dim);
    prefetch_rows(from_value, ld_values, std::min(call.k_len, kKeys), value_dim);
    const mm_t *key_operand, *value_operand;  // no structured bindings: older compilers capture none in a lambda
    int64_t ld_key, ld_value;
    std::tie(key_operand, ld_key) =
        operand<scalar_t, mm_t>(from_key, ld_keys, call.k_len, head_dim, memory.key_rows);
    std::tie(value_operand, ld_value) =
        operand<scalar_t, mm_t>(from_value, ld_values, call.k_len, value_dim, memory.value_rows);
    transpose<mm_t>(key_operand, ld_key, call.k_len, head_dim, memory.keys_transposed, padded_keys, padded_keys);
    float* grad_key = alone ? memory.partial : partial + (pair * chunks.count + chunk) * partial_size;
    float* grad_value = grad_key + call.k_len * head_dim;
    std::fill_n(grad_key, partial_size, 0.0f);
    float *offsets = memory.row_values, *scales = offsets + rows, *deltas = scales + rows, *centers = deltas + rows;

    for (const RowBlock& block : chunks.of(call, entry, group, chunk)) {
      const Polynomial polynomial = call.polynomial(block.head);
      const int64_t block_rows = round_up(block.rows, kPad);
      const int64_t ld_queries = queries.strides[2], ld_grads = grads.strides[1];
      const scalar_t* from_query = queries(entry, block.head, block.first);
      const scalar_t* from_grad = grads(entry, block.first, block.head);
      prefetch_rows(from_query, ld_queries, block.rows, head_dim);
      prefetch_rows(from_grad, ld_grads, block.rows, value_dim);
      const auto [query, ld_query] =
          operand<scalar_t, mm_t>(from_query, ld_queries, block.rows, head_dim, memory.query_rows);
      const auto [grad, ld_grad] =
          operand<scalar_t, mm_t>(from_grad, ld_grads, block.rows, value_dim, memory.grad_rows);
      pack_b_transposed(query, ld_query, block.rows, depth, memory.query_columns, block_rows);
      pack_b(query, ld_query, block.rows, head_dim, memory.query_packed, block_rows);
      pack_b_transposed(grad, ld_grad, block.rows, width, memory.grad_columns, block_rows);
      pack_b(grad, ld_grad, block.rows, value_dim, memory.grad_packed, block_rows);
      std::fill_n(offsets, 4 * rows, 0.0f);
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t row = block.first + i;
        offsets[i] = call.row_offset(entry, block.head, row);
        if (call.l1()) {
          scales[i] = *row_scales(entry, block.head, row);
        } else {
          scales[i] = call.fixed_row_scale(entry, block.head, row, block.keys[i]);
        }
      }
      const RowSums sums{memory.sums, rows, static_cast<int>(terms) - 1};
      std::fill_n(sums.data, sum_count * rows, 0.0f);
      std::fill_n(static_cast<float*>(memory.grad_query), head_dim * block_rows, 0.0f);

      auto tile_of = [&](Range keys) {
        const bool whole = !hides && block.sees_all(keys);
        const int64_t count = keys.stop - keys.start, at = surveyed ? keys.start * block_rows : 0;
        if (!whole) {
          std::fill_n(static_cast<float*>(memory.visible), count * block_rows, 0.0f);
          fill_visible(call, block, keys, count, 1, block_rows, memory.visible);
        }
        if (call.seed) {
          std::fill_n(static_cast<float*>(memory.kept), count * block_rows, 0.0f);
          fill_kept(call, dropout, block, keys, count, 1, block_rows, memory.kept);
        }
        return BackwardTile<mm_t>{
            count, block_rows, memory.scores + at, memory.grad_weights + at, memory.weights, memory.grad_scores,
            memory.grad_scores_packed, offsets, scales, deltas, whole ? nullptr : static_cast<float*>(memory.visible),
            call.seed ? static_cast<float*>(memory.kept) : nullptr, sums, moments,
            follows ? memory.moved->shifts.data() : nullptr, follows ? memory.moved->slopes.data() : nullptr};
      };
      auto compute_scores = [&](Range keys) {
        const int64_t count = keys.stop - keys.start, at = surveyed ? keys.start * block_rows : 0;
        multiply<mm_t>(count, block_rows, depth, key_operand + keys.start * ld_key, ld_key, memory.query_columns,
                       block_rows, memory.scores + at, block_rows, false);
        multiply<mm_t>(count, block_rows, width, value_operand + keys.start * ld_value, ld_value, memory.grad_columns,
                       block_rows, memory.grad_weights + at, block_rows, false);
      };
      const int64_t first_key = block.all.start / key_step * key_step;
      const int64_t own_head = (pair * chunks.count + chunk) * call.repeats() + block.head % call.repeats();
      auto take_centers = [&] {
        for (int64_t i = 0; i < block.rows; ++i) {
          const float slope = sums.slope()[i] - (follows ? deltas[i] * sums.magnitude()[i] : 0.0f);
          centers[i] = static_cast<float>(-slope / call.radius_of(block.head));
        }
        float* own_shift = grad_shift.data() + own_head * shift_terms;
        if (moved) memory.moved->take(*moved, queries, block, centers, own_shift);
      };
      if (surveyed) {  // δ is exact only if it is the sum of the very numbers it meets
        for (int64_t start = first_key; start < block.all.stop; start += key_step) {
          const Range keys{start, std::min(start + key_step, call.k_len)};
          compute_scores(keys);
          (follows ? choose_survey<mm_t> : choose_weigh<mm_t>)(polynomial)(tile_of(keys), polynomial);
        }
        for (int64_t i = 0; i < block.rows; ++i) deltas[i] = scales[i] * sums.weighted()[i];
        if (follows) take_centers();
      }
      for (int64_t start = first_key; start < block.all.stop; start += key_step) {
        const Range keys{start, std::min(start + key_step, call.k_len)};
        const int64_t count = keys.stop - keys.start;
        if (!surveyed) compute_scores(keys);
        choose_gradients<mm_t>(polynomial)(tile_of(keys), polynomial);
        multiply<mm_t>(count, value_dim, block_rows, memory.weights, block_rows, memory.grad_packed, value_dim,
                       grad_value + start * value_dim, value_dim, true);
        multiply<mm_t>(count, head_dim, block_rows, memory.grad_scores, block_rows, memory.query_packed, head_dim,
                       grad_key + start * head_dim, head_dim, true);
        multiply<mm_t>(head_dim, block_rows, round_up(count, pack), memory.keys_transposed + start, padded_keys,
                       memory.grad_scores_packed, block_rows, memory.grad_query, block_rows, true);
      }

      transpose(static_cast<const float*>(memory.grad_query), block_rows, head_dim, block.rows,
                static_cast<float*>(memory.grad_query_rows), head_dim, head_dim);
      if (call.center && !follows) take_centers();
      double* grad_c = grad_coefficients.data() + own_head * terms;
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t row = block.first + i;
        float* grad_row = memory.grad_query_rows + i * head_dim;
        if (moved) {
          add_scaled(grad_row, moved->shift.scaling, memory.moved->of_queries.data() + i * memory.moved->vectors.width,
                     head_dim);
        }
        store_row(grad_row, 1.0f, head_dim, to_query(entry, block.head, row));
        for (int64_t k = 0; k < terms; ++k) grad_c[k] += sums.moment(k)[i];
        if (call.center) grad_center[(entry * call.heads + block.head) * call.q_len + row] = centers[i];
      }
    }
    if (alone) {
      for (int64_t j = 0; j < call.k_len; ++j) {
        store_row(grad_key + j * head_dim, 1.0f, head_dim, to_key(entry, group, j));
        store_row(grad_value + j * value_dim, 1.0f, value_dim, to_value(entry, group, j));
      }
    }
    release<mm_t>();
  });

  // Adds the chunks in order.
  at::parallel_for(0, alone ? 0 : pairs * call.k_len, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t pair = n / call.k_len, j = n % call.k_len;
      float* first = partial + pair * chunks.count * partial_size;
      float *grad_key = first + j * head_dim, *grad_value = first + call.k_len * head_dim + j * value_dim;
      for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
        for (int64_t d = 0; d < head_dim; ++d) grad_key[d] += grad_key[chunk * partial_size + d];
        for (int64_t d = 0; d < value_dim; ++d) grad_value[d] += grad_value[chunk * partial_size + d];
      }
      store_row(grad_key, 1.0f, head_dim, to_key(pair / call.groups, pair % call.groups, j));
      store_row(grad_value, 1.0f, value_dim, to_value(pair / call.groups, pair % call.groups, j));
    }
  });
  // Adds what the heads got of batch entries and chunks, in order.
  auto total = [&](const auto& partials, int64_t count, const Tensor& to) {
    std::vector<double> sums(call.heads * count, 0.0);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        const auto* from = partials.data() + (pair * chunks.count + chunk) * call.repeats() * count;
        double* own = sums.data() + pair % call.groups * call.repeats() * count;
        for (int64_t n = 0; n < call.repeats() * count; ++n) own[n] += from[n];
      }
    }
    std::copy(sums.begin(), sums.end(), to.mutable_data_ptr<float>());
  };
  total(grad_coefficients, terms, gradients.coefficients);
  if (shift_terms > 0) total(grad_shift, shift_terms, gradients.shift);
}

}  // namespace
}  // namespace polyattn
