// Rows of one head, what they see, and how they are cut into blocks and chunks.

#pragma once

#include "call.h"

#include <type_traits>
#include <utility>
#include <vector>

namespace polyattn {
namespace {

struct RowBlock {
  int64_t entry, head, first, rows;
  std::vector<Range> keys;
  Range all;    // the union of the rows' keys
  Range every;  // their intersection

  RowBlock(const Call& call, int64_t entry, int64_t head, int64_t first, int64_t rows)
      : entry(entry), head(head), first(first), rows(rows), all{call.k_len, 0}, every{0, call.k_len} {
    keys.reserve(rows);
    for (int64_t i = first; i < first + rows; ++i) {
      const Range own = call.visible(entry, i);
      keys.push_back(own);
      every = {std::max(every.start, own.start), std::min(every.stop, own.stop)};
      if (own.start < own.stop) all = {std::min(all.start, own.start), std::max(all.stop, own.stop)};
    }
  }
  bool sees(Range block) const { return all.start < block.stop && block.start < all.stop; }
  bool sees_all(Range block) const { return every.start <= block.start && block.stop <= every.stop; }
};

// Fills what hides elements of a tile of a block's rows and `columns` keys from keys.start on, of which those beyond
// keys.stop are hidden: all bits set where row i sees key j. Element (i, j) is at i · row_step + j · key_step, and one
// of the steps is 1.
inline void fill_visible(const Call& call, const RowBlock& block, Range keys, int64_t columns, int64_t row_step,
                  int64_t key_step, float* to) {
  auto* bits = reinterpret_cast<int32_t*>(to);
  if (key_step == 1) {
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t start = std::clamp(block.keys[i].start, keys.start, keys.stop) - keys.start;
      const int64_t stop = std::clamp(block.keys[i].stop, keys.start, keys.stop) - keys.start;
      int32_t* row = bits + i * row_step;
      std::fill(row, row + start, 0);
      std::fill(row + start, row + stop, -1);
      std::fill(row + stop, row + columns, 0);
    }
  } else {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t key = keys.start + j;
      for (int64_t i = 0; i < block.rows; ++i) {
        bits[j * key_step + i] = block.keys[i].start <= key && key < block.keys[i].stop ? -1 : 0;
      }
    }
  }
  if (!call.mask) return;
  for (int64_t i = 0; i < block.rows; ++i) {
    const bool* seen = call.mask(block.entry, block.head, block.first + i) + keys.start * call.mask.step;
    for (int64_t j = 0; j < keys.stop - keys.start; ++j) {
      if (!seen[j * call.mask.step]) bits[i * row_step + j * key_step] = 0;
    }
  }
}

inline void fill_kept(const Call& call, const Dropout& dropout, const RowBlock& block, Range keys, int64_t columns,
               int64_t row_step, int64_t key_step, float* to) {
  for (int64_t i = 0; i < block.rows; ++i) {
    const uint32_t word = dropout.row_word(call, block.entry, block.head, block.first + i);
    for (int64_t j = 0; j < columns; ++j) to[i * row_step + j * key_step] = dropout(word, keys.start + j);
  }
}

// Cuts `length` into equal parts of at most `most`, each a multiple of kPad but the last; returns their size.
inline int64_t even_step(int64_t length, int64_t most) {
  return round_up(ceil_div(length, ceil_div(length, most)), kPad);
}

// The rows of the R heads of a group, cut into blocks, and the blocks into chunks.
struct Chunks {
  int64_t step, blocks_per_head, blocks, per_chunk, count;

  Chunks(const Call& call, int64_t tasks, int64_t most_rows) {
    step = even_step(call.q_len, kRows);
    blocks_per_head = ceil_div(call.q_len, step);
    blocks = call.repeats() * blocks_per_head;
    const int64_t wanted = std::max(ceil_div(tasks, call.batch * call.groups), ceil_div(blocks * step, most_rows));
    per_chunk = ceil_div(blocks, std::clamp<int64_t>(wanted, 1, blocks));
    count = ceil_div(blocks, per_chunk);
  }
  std::vector<RowBlock> of(const Call& call, int64_t entry, int64_t group, int64_t chunk) const {
    std::vector<RowBlock> result;
    for (int64_t n = chunk * per_chunk; n < std::min(blocks, (chunk + 1) * per_chunk); ++n) {
      const int64_t head = group * call.repeats() + n / blocks_per_head, first = n % blocks_per_head * step;
      result.emplace_back(call, entry, head, first, std::min(step, call.q_len - first));
    }
    return result;
  }
};

// Returns rows as an A operand whose columns are a multiple of kPack: in place if they are one already, else in `to`.
template <typename scalar_t, typename mm_t>
std::pair<const mm_t*, int64_t> operand(const scalar_t* from, int64_t ld, int64_t n, int64_t d, mm_t* to) {
  constexpr int64_t pack = kPack<mm_t>;
  if constexpr (std::is_same_v<scalar_t, mm_t>) {
    if (d % pack == 0 && ld % pack == 0) return {from, ld};
  }
  const int64_t padded = round_up(d, pack);
  pack_rows(from, ld, n, d, to, padded);
  return {to, padded};
}

}  // namespace
}  // namespace polyattn
