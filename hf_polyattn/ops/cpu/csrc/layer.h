// The forward pass of one attention module: where its rows are shifted to, its refinements and its attention.
//
// The first product of a block of rows is kept for all keys, as long as it fits the cache: moments, shift, refinements,
// polynomial and second product follow on it, and so for few rows of any length. Longer rows take `row_centers`, a pass
// for each refinement, and `forward`.

#pragma once

#include "decode.h"
#include "module.h"

namespace polyattn {
namespace {

// Rows of moments from tiles of scores, and what follows from them.
struct KeptScores {
  int64_t rows, step, tiles;  // a tile holds `step` keys of all rows
  float* values;

  const float* row(int64_t tile, int64_t i) const { return values + (tile * rows + i) * step; }

  // Sums of a row's visible scores less a number, or of their squares.
  float sum(int64_t i, Range seen, float less, bool squared) const {
    float total = 0.0f;
    for (int64_t tile = seen.start / step; tile * step < seen.stop; ++tile) {
      const int64_t start = std::max(seen.start - tile * step, int64_t{0});
      const int64_t stop = std::min(seen.stop - tile * step, step);
      total += sum_of(row(tile, i) + start, stop - start, less, squared);
    }
    return total;
  }
  // The moments of the row's scores, each times `scaling`.
  Moments moments(int64_t i, Range seen, float scaling) const {
    const int64_t count = seen.stop - seen.start;
    if (count == 0) return {};
    const auto n = static_cast<float>(count);
    const float mean = sum(i, seen, 0.0f, false) / n;
    return {scaling * mean, scaling * scaling * sum(i, seen, mean, true) / n};
  }
};

// Σ p(t)^s over a row's visible scores `from`, `count` of them.
inline float sum_of_weights(const float* from, int64_t count, const Polynomial& p, float offset) {
  auto weigh = [&](Vec score) {
    Vec t = at::vec::fmadd(score, Vec(p.slope), Vec(offset));
    if (p.clamp) t = limited(t);
    Vec w(p.coefficients[p.degree]);
    for (int k = p.degree - 1; k >= 0; --k) w = at::vec::fmadd(w, t, Vec(p.coefficients[k]));
    for (int n = 0; n < p.squarings; ++n) w = w * w;
    return w;
  };
  Vec total(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) total = total + weigh(Vec::loadu(from + j));
  float result = sum(total);
  if (j < count) {
    alignas(64) float rest[kLanes];
    weigh(load_vec(from + j, count - j)).store(rest);
    for (int64_t n = 0; n < count - j; ++n) result += rest[n];
  }
  return result;
}

// What is kept of each row, (B, H, Tq): what others need, else null.
struct KeptRows {
  float *center = nullptr, *mean = nullptr, *variance = nullptr;

  // Of planes (1 or 3, B, H, Tq).
  explicit KeptRows(const Tensor& planes) {
    if (!planes.defined()) return;
    center = planes.mutable_data_ptr<float>();
    if (planes.size(0) == 1) return;
    mean = center + planes.stride(0);
    variance = mean + planes.stride(0);
  }
};

// What a module's rows are shifted by.
struct Rows {
  const Call& call;
  const Shift& shift;
  const std::vector<Refinement>& refinements;
  KeptRows kept;
  bool moments;

  // The number that a row's Σ w is multiplied by in a refinement, which divides by nothing that the data decide.
  float scale(int64_t b, int64_t h, int64_t i, Range seen) const {
    return call.l1() ? 1.0f : call.fixed_row_scale(b, h, i, seen);
  }
  Polynomial polynomial(const Refinement& part, int64_t h) const {
    Polynomial p = call.polynomial(h);
    p.coefficients = part.coefficients.const_data_ptr<float>() + h * part.coefficients.size(1);
    p.slope = static_cast<float>(call.scaling) / *part.radius(h, 0, 0);
    return p;
  }

  // The center of row i of head h, which is row n of the scores; `along` are the products of its scaled query with the
  // columns of a `Matrix`. It is kept, with the row's moments.
  float center(int64_t b, int64_t h, int64_t i, Range seen, const KeptScores& scores, int64_t n,
               const float* along, Length& length) const {
    float found = *shift.center(h, 0, 0) + along[kKeyShift];
    const int64_t row = (b * call.heads + h) * call.q_len + i;
    if (moments) {
      const Moments own = scores.moments(n, seen, static_cast<float>(call.scaling));
      found += predicted(shift, h, along, own, length.of(shift, seen.stop - seen.start));
      if (kept.mean) {
        kept.mean[row] = own.mean;
        kept.variance[row] = own.variance;
      }
    }
    for (const Refinement& part : refinements) {
      const Polynomial p = polynomial(part, h);
      const float offset = -(found + *part.center(h, 0, 0)) / *part.radius(h, 0, 0);
      float total = 0.0f;
      for (int64_t tile = seen.start / scores.step; tile * scores.step < seen.stop; ++tile) {
        const int64_t start = std::max(seen.start - tile * scores.step, int64_t{0});
        const int64_t stop = std::min(seen.stop - tile * scores.step, scores.step);
        total += sum_of_weights(scores.row(tile, n) + start, stop - start, p, offset);
      }
      found += part.step(h, scale(b, h, i, seen) * total);
    }
    if (kept.center) kept.center[row] = found;
    return found;
  }
};

// The output. Where a mask hides keys, no row is moved by its scores.
template <typename scalar_t, typename mm_t>
void shifted_forward(const Call& call, const Shift& shift, const std::vector<Refinement>& refinements,
                     const Tensor& output, const Tensor& row_scale, const KeptRows& kept) {
  constexpr int64_t pack = kPack<mm_t>;
  const Chunks chunks(call, kTasksPerThread * at::get_num_threads(), kChunkRows);
  const int64_t dim = call.head_dim, depth = round_up(dim, pack), width = call.value_dim;
  const int64_t step = even_step(call.k_len, kKeys), tiles = ceil_div(call.k_len, step), keys = tiles * step;
  const int64_t pairs = call.batch * call.groups, rows = round_up(chunks.step, kSharing);
  const View<scalar_t> queries(call.query), all_keys(call.key), all_values(call.value);
  const Results<scalar_t> results(output, row_scale);
  const Dropout dropout(call);
  const Rows of{call, shift, refinements, kept, static_cast<bool>(shift.weights)};

  struct Memory {
    Matrix matrix;
    Length length;
    Buffer<mm_t> query, keys, key_rows, values, value_rows, weights;
    Buffer<float> scaled, along, scores, visible, kept, offsets, outputs, sums;
  };
  auto make = [&] {
    Matrix matrix(shift, false);
    const int64_t columns = matrix.columns;
    return Memory{std::move(matrix), Length(), Buffer<mm_t>(chunks.step * depth), Buffer<mm_t>(depth * keys),
                  Buffer<mm_t>(step * depth), Buffer<mm_t>(keys * width), Buffer<mm_t>(step * round_up(width, pack)),
                  Buffer<mm_t>(chunks.step * step), Buffer<float>(rows * dim), Buffer<float>(rows * columns),
                  Buffer<float>(chunks.step * keys), Buffer<float>(chunks.step * step),
                  Buffer<float>(call.seed ? chunks.step * step : 0), Buffer<float>(chunks.step),
                  Buffer<float>(chunks.step * width), Buffer<float>(chunks.step)};
  };

  run_tasks(pairs * chunks.count, make, [&](int64_t task, Memory& memory) {
    // The last rows see most under causality: they come first.
    const int64_t chunk = chunks.count - 1 - task / pairs, entry = task % pairs / call.groups;
    const int64_t group = task % call.groups;
    const std::vector<RowBlock> blocks = chunks.of(call, entry, group, chunk);

    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Range own{tile * step, std::min((tile + 1) * step, call.k_len)};
      if (std::none_of(blocks.begin(), blocks.end(), [&](const RowBlock& b) { return b.sees(own); })) continue;
      const int64_t count = own.stop - own.start, ld_keys = all_keys.strides[2], ld_values = all_values.strides[2];
      const scalar_t *from_key = all_keys(entry, group, own.start), *from_value = all_values(entry, group, own.start);
      prefetch_rows(from_key, ld_keys, count, dim);
      prefetch_rows(from_value, ld_values, count, width);
      const auto [key, ld_key] = operand<scalar_t, mm_t>(from_key, ld_keys, count, dim, memory.key_rows);
      pack_b_transposed(key, ld_key, count, depth, memory.keys + tile * depth * step, step);
      const auto [value, ld_value] = operand<scalar_t, mm_t>(from_value, ld_values, count, width, memory.value_rows);
      pack_b(value, ld_value, count, width, memory.values + tile * step * width, step);
    }

    int64_t head = -1;
    for (const RowBlock& block : blocks) {
      if (block.head != head) {
        head = block.head;
        memory.matrix.take_head(shift, head);
      }
      for (int64_t i = 0; i < block.rows; ++i) {
        read(queries(entry, head, block.first + i), shift.scaling, dim, memory.scaled + i * dim);
      }
      const int64_t columns = memory.matrix.columns;
      small_product<false>(memory.scaled, dim, memory.matrix.values.data(), columns, round_up(block.rows, kSharing), dim,
                           columns, memory.along);
      const auto [query, ld_query] = operand<scalar_t, mm_t>(queries(entry, head, block.first), queries.strides[2],
                                                             block.rows, dim, memory.query);
      const KeptScores scores{block.rows, step, tiles, memory.scores};
      for (int64_t tile = 0; tile < tiles; ++tile) {
        if (!block.sees({tile * step, (tile + 1) * step})) continue;
        multiply<mm_t>(block.rows, step, depth, query, ld_query, memory.keys + tile * depth * step, step,
                       memory.scores + tile * block.rows * step, step, false);
      }
      const auto radius = static_cast<float>(call.radius_of(head));
      for (int64_t i = 0; i < block.rows; ++i) {
        const float center = of.center(entry, head, block.first + i, block.keys[i], scores, i,
                                       memory.along + i * columns, memory.length);
        memory.offsets[i] = -center / radius;
      }

      const Polynomial polynomial = call.polynomial(head);
      std::fill_n(static_cast<float*>(memory.outputs), block.rows * width, 0.0f);
      std::fill_n(static_cast<float*>(memory.sums), block.rows, 0.0f);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const Range own{tile * step, std::min((tile + 1) * step, call.k_len)};
        if (!block.sees(own)) continue;
        const bool whole = !call.mask && own.stop - own.start == step && block.sees_all(own);
        if (!whole) fill_visible(call, block, own, step, step, 1, memory.visible);
        if (call.seed) fill_kept(call, dropout, block, own, step, step, 1, memory.kept);
        const ForwardTile<mm_t> part{block.rows, step, scores.row(tile, 0), memory.weights, memory.offsets,
                                     whole ? nullptr : static_cast<float*>(memory.visible),
                                     call.seed ? static_cast<float*>(memory.kept) : nullptr, memory.sums};
        choose_weights<mm_t>(polynomial)(part, polynomial);
        multiply<mm_t>(block.rows, width, step, memory.weights, step, memory.values + tile * step * width, width,
                       memory.outputs, width, true);
      }
      for (int64_t i = 0; i < block.rows; ++i) {
        results.write(call, entry, head, block.first + i, block.keys[i], memory.outputs + i * width, memory.sums[i]);
      }
    }
    release<mm_t>();
  });
}

// The same for few rows: the scores of all keys are kept between two passes over the parts of the keys.
template <typename scalar_t>
void shifted_decode(Call call, const Shift& shift, const std::vector<Refinement>& refinements, const Tensor& output,
                    const Tensor& row_scale, const Tensor& planes) {
  const Tensor centers = planes[0];
  call.center = View<float>(centers);
  const Decoder<scalar_t> decoder(call);
  const int64_t tile = decoder.padded_rows * decoder.columns, repeats = decoder.repeats, q_len = call.q_len;
  const Buffer<float> scores(decoder.tasks * tile);
  run_tasks(
      decoder.tasks, [&] { return decoder.memory(); },
      [&](int64_t task, auto& memory) { decoder.score(task, memory, scores + task * tile); });

  const Rows of{call, shift, refinements, KeptRows(planes), static_cast<bool>(shift.weights)};
  run_tasks(
      decoder.pairs, [&] { return Matrix(shift, false); },
      [&](int64_t pair, Matrix& matrix) {
        const int64_t b = pair / call.groups, g = pair % call.groups, dim = call.head_dim;
        const KeptScores kept{decoder.padded_rows, decoder.columns, decoder.parts, scores + pair * decoder.parts * tile};
        Length length;
        std::vector<float> scaled(kSharing * dim), along(kSharing * matrix.columns);
        for (int64_t h = g * repeats; h < (g + 1) * repeats; ++h) {
          matrix.take_head(shift, h);
          for (int64_t i = 0; i < q_len; ++i) read(decoder.queries(b, h, i), shift.scaling, dim, scaled.data() + i * dim);
          small_product<false>(scaled.data(), dim, matrix.values.data(), matrix.columns, kSharing, dim, matrix.columns,
                               along.data());
          for (int64_t i = 0; i < q_len; ++i) {
            of.center(b, h, i, call.visible(b, i), kept, (h - g * repeats) * q_len + i,
                      along.data() + i * matrix.columns, length);
          }
        }
      });
  run_tasks(
      decoder.tasks, [&] { return decoder.memory(); },
      [&](int64_t task, auto& memory) { decoder.attend(task, memory, scores + task * tile); });
  decoder.finish(output, row_scale);
}

}  // namespace
}  // namespace polyattn
