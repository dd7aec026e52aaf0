// Backend `cpu`: fused polynomial attention, forward and backward, without a tensor of the size Tq × Tk.
//
// A task is a group of query heads that share a key head, and a chunk of their rows. It packs each block of keys and
// values once and lets all its rows see it, a block of rows at a time: product, polynomial, product. Rows, heads and
// batch entries are independent in forward; in backward every task sums its own gradients of the keys and values,
// and those of the chunks are added in order. Which thread runs a task changes nothing in the result.

#include "polynomial.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace polyattn {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kRows = 64;           // of a tile
constexpr int64_t kKeys = 256;          // of a tile
constexpr int64_t kChunkRows = 512;     // of a forward task: their outputs stay in the cache
constexpr int64_t kTasksPerThread = 4;  // enough to even out the work of causal rows
constexpr int64_t kDecodeRows = 8;      // up to so many rows a key head, packing keys costs more than it saves
constexpr int64_t kDecodeKeys = 512;    // of a task then
constexpr float kEpsilon = 1e-37f;      // of the row sum of normalizer l1

enum Normalizer : int64_t { kRsqrt, kMean, kNone, kL1 };

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(c10::alloc_cpu(std::max<int64_t>(1, count) * sizeof(T)))) {}
  ~Buffer() { c10::free_cpu(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// Runs tasks 0 … count − 1 on all threads; whoever is free takes the next. `make` makes a thread's working memory.
template <typename Make, typename Run>
void run_tasks(int64_t count, const Make& make, const Run& run) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    int64_t task = next++;
    if (task >= count) return;
    auto memory = make();
    for (; task < count; task = next++) run(task, memory);
  });
}

// The arguments of one call ------------------------------------------------------------------------------------

struct Range {
  int64_t start, stop;
};

// A tensor of four dimensions, or of three, whose last dimension is contiguous or broadcast, by rows.
template <typename T>
struct View {
  const T* data = nullptr;
  int64_t strides[3] = {}, step = 1;

  View() = default;
  explicit View(const Tensor& tensor) : data(tensor.const_data_ptr<T>()) {
    for (int64_t n = 0; n < std::min<int64_t>(3, tensor.dim()); ++n) strides[n] = tensor.stride(n);
    step = tensor.stride(-1);
  }
  explicit View(const optional<Tensor>& tensor) : View(tensor ? View(*tensor) : View()) {}
  explicit operator bool() const { return data != nullptr; }
  const T* operator()(int64_t a, int64_t b, int64_t c) const {
    return data + a * strides[0] + b * strides[1] + c * strides[2];
  }
};

// Where rows (batch entry, head, token) of a gradient go; their columns are contiguous.
template <typename T>
struct Target {
  T* data;
  int64_t strides[3];

  explicit Target(const Tensor& tensor)
      : data(tensor.mutable_data_ptr<T>()), strides{tensor.stride(0), tensor.stride(1), tensor.stride(2)} {}
  T* operator()(int64_t a, int64_t b, int64_t c) const {
    return data + a * strides[0] + b * strides[1] + c * strides[2];
  }
};

struct Call {
  int64_t batch, heads, groups, q_len, k_len, head_dim, value_dim, terms;
  Tensor query, key, value;
  View<float> coefficients;  // (H, P + 1)
  View<float> center;        // (B, H, Tq)
  View<float> radius;        // (H)
  View<bool> mask;           // (B, H, Tq, Tk)
  View<int32_t> ranges;      // (B, Tq, 2)
  View<int64_t> seed;        // (1)
  bool causal;
  optional<int64_t> window;
  double scaling;
  int64_t squarings, normalizer;
  bool clamp, monomial;
  double dropout;

  int64_t repeats() const { return heads / groups; }
  bool l1() const { return normalizer == kL1; }

  double radius_of(int64_t head) const { return radius ? *radius(head, 0, 0) : 1.0; }

  Polynomial polynomial(int64_t head) const {
    return {coefficients(head, 0, 0), static_cast<int>(terms - 1), static_cast<int>(squarings),
            static_cast<float>(scaling / radius_of(head)), l1(), clamp, monomial};
  }

  float row_offset(int64_t b, int64_t h, int64_t i) const {
    return center ? static_cast<float>(-*center(b, h, i) / radius_of(h)) : 0.0f;
  }

  // The keys that a row may see, but for the mask.
  Range visible(int64_t b, int64_t i) const {
    Range keys{0, k_len};
    if (causal) keys.stop = std::min(keys.stop, i + 1);
    if (window) {
      keys.start = std::max(keys.start, i - *window + 1);
      keys.stop = std::min(keys.stop, i + *window);
    }
    if (ranges) {
      const int32_t* own = ranges(b, i, 0);
      keys.start = std::max<int64_t>(keys.start, own[0]);
      keys.stop = std::min<int64_t>(keys.stop, own[ranges.step]);
    }
    keys.stop = std::max(keys.start, keys.stop);
    return keys;
  }

  // r_i of the normalizers that depend on the mask only.
  float fixed_row_scale(int64_t b, int64_t h, int64_t i, Range keys) const {
    int64_t count = keys.stop - keys.start;
    if (mask) {
      const bool* seen = mask(b, h, i);
      count = 0;
      for (int64_t j = keys.start; j < keys.stop; ++j) count += seen[j * mask.step];
    }
    const auto n = static_cast<float>(std::max<int64_t>(1, count));
    return normalizer == kRsqrt ? 1.0f / std::sqrt(n) : normalizer == kMean ? 1.0f / n : 1.0f;
  }
};

// Dropout as hf_polyattn/ops/dropout.py has it: MurmurHash3's finalizer of (seed, row, column).
struct Dropout {
  uint32_t seed_word = 0;
  int32_t threshold = 0;
  float kept = 1.0f;

  static uint32_t mix(uint32_t word) {
    word ^= word >> 16;
    word *= 0x85EBCA6Bu;
    word ^= word >> 13;
    word *= 0xC2B2AE35u;
    return word ^ (word >> 16);
  }
  explicit Dropout(const Call& call) {
    if (!call.seed) return;
    seed_word = mix(static_cast<uint32_t>(*call.seed.data));
    threshold = static_cast<int32_t>(static_cast<int64_t>(call.dropout * 4294967296.0) - 2147483648LL);
    kept = static_cast<float>(1.0 / (1.0 - call.dropout));
  }
  uint32_t row_word(const Call& call, int64_t b, int64_t h, int64_t i) const {
    const int64_t number = (b * call.heads + h) * call.q_len + i;
    return mix(static_cast<uint32_t>(number ^ (number >> 32)) ^ seed_word);
  }
  float operator()(uint32_t row_word, int64_t column) const {
    const auto word = static_cast<int32_t>(mix(row_word + static_cast<uint32_t>(column) * 0x9E3779B9u));
    return word >= threshold ? kept : 0.0f;
  }
};

// Rows of one head, and what they see ----------------------------------------------------------------------------

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
void fill_visible(const Call& call, const RowBlock& block, Range keys, int64_t columns, int64_t row_step,
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

void fill_kept(const Call& call, const Dropout& dropout, const RowBlock& block, Range keys, int64_t columns,
               int64_t row_step, int64_t key_step, float* to) {
  for (int64_t i = 0; i < block.rows; ++i) {
    const uint32_t word = dropout.row_word(call, block.entry, block.head, block.first + i);
    for (int64_t j = 0; j < columns; ++j) to[i * row_step + j * key_step] = dropout(word, keys.start + j);
  }
}

// Cuts `length` into equal parts of at most `most`, each a multiple of kPad but the last; returns their size.
int64_t even_step(int64_t length, int64_t most) {
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

// Forward --------------------------------------------------------------------------------------------------------

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

// Backward -------------------------------------------------------------------------------------------------------

struct Gradients {
  Tensor query, key, value, coefficients, center;
};

// hf_polyattn/ops/call.py says why.
Tensor empty_gradient(const Tensor& operand) {
  const Tensor gradient = at::empty_like(operand);
  return gradient.stride(-1) == 1 ? gradient : at::empty(operand.sizes(), operand.options());
}

template <typename scalar_t, typename mm_t>
void backward(const Call& call, const Tensor& grad_output, const Tensor& row_scale, bool moments,
              Gradients& gradients) {
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
  const int64_t scores = call.l1() ? rows * call.k_len : tile;
  const View<scalar_t> queries(call.query), all_keys(call.key), all_values(call.value);
  const Dropout dropout(call);
  const bool hides = static_cast<bool>(call.mask);
  // Of every task: gradients of keys and values, and of the coefficients of its heads.
  const int64_t partial_size = call.k_len * (head_dim + value_dim);
  const bool alone = chunks.count == 1;  // else its gradients of keys and values wait for those of the other chunks
  const Buffer<float> partial(alone ? 0 : pairs * chunks.count * partial_size);
  std::vector<double> grad_coefficients(pairs * chunks.count * call.repeats() * terms, 0.0);

  struct Memory {
    Buffer<mm_t> key_rows, value_rows, keys_transposed;
    Buffer<mm_t> query_rows, query_columns, query_packed, grad_rows, grad_columns, grad_packed;
    Buffer<mm_t> weights, grad_scores, grad_scores_packed;
    Buffer<float> scores, grad_weights, visible, kept, row_values, sums, grad_query, grad_query_rows, partial;
  };
  auto make = [&] {
    return Memory{Buffer<mm_t>(call.k_len * depth), Buffer<mm_t>(call.k_len * width),
                  Buffer<mm_t>(head_dim * padded_keys), Buffer<mm_t>(rows * depth), Buffer<mm_t>(rows * depth),
                  Buffer<mm_t>(rows * head_dim), Buffer<mm_t>(rows * width), Buffer<mm_t>(rows * width),
                  Buffer<mm_t>(rows * value_dim), Buffer<mm_t>(tile), Buffer<mm_t>(tile),
                  Buffer<mm_t>(tile + 2 * rows), Buffer<float>(scores), Buffer<float>(scores), Buffer<float>(tile),
                  Buffer<float>(call.seed ? tile : 0), Buffer<float>(3 * rows), Buffer<float>(sum_count * rows),
                  Buffer<float>(head_dim * rows), Buffer<float>(rows * head_dim),
                  Buffer<float>(alone ? partial_size : 0)};
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
    float *offsets = memory.row_values, *scales = offsets + rows, *deltas = scales + rows;

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
      std::fill_n(offsets, 3 * rows, 0.0f);
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
        const int64_t count = keys.stop - keys.start, at = call.l1() ? keys.start * block_rows : 0;
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
            call.seed ? static_cast<float*>(memory.kept) : nullptr, sums, moments};
      };
      auto compute_scores = [&](Range keys) {
        const int64_t count = keys.stop - keys.start, at = call.l1() ? keys.start * block_rows : 0;
        multiply<mm_t>(count, block_rows, depth, key_operand + keys.start * ld_key, ld_key, memory.query_columns,
                       block_rows, memory.scores + at, block_rows, false);
        multiply<mm_t>(count, block_rows, width, value_operand + keys.start * ld_value, ld_value, memory.grad_columns,
                       block_rows, memory.grad_weights + at, block_rows, false);
      };
      const int64_t first_key = block.all.start / key_step * key_step;
      if (call.l1()) {  // δ needs the whole row, and is exact only if it is the sum of the very numbers it meets
        for (int64_t start = first_key; start < block.all.stop; start += key_step) {
          const Range keys{start, std::min(start + key_step, call.k_len)};
          compute_scores(keys);
          choose_weigh<mm_t>(polynomial)(tile_of(keys), polynomial);
        }
        for (int64_t i = 0; i < block.rows; ++i) deltas[i] = scales[i] * sums.weighted()[i];
      }
      for (int64_t start = first_key; start < block.all.stop; start += key_step) {
        const Range keys{start, std::min(start + key_step, call.k_len)};
        const int64_t count = keys.stop - keys.start;
        if (!call.l1()) compute_scores(keys);
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
      double* grad_c = grad_coefficients.data() +
                       ((pair * chunks.count + chunk) * call.repeats() + block.head % call.repeats()) * terms;
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t row = block.first + i;
        store_row(memory.grad_query_rows + i * head_dim, 1.0f, head_dim, to_query(entry, block.head, row));
        for (int64_t k = 0; k < terms; ++k) grad_c[k] += sums.moment(k)[i];
        if (!call.center) continue;
        grad_center[(entry * call.heads + block.head) * call.q_len + row] =
            static_cast<float>(-sums.slope()[i] / call.radius_of(block.head));
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
  std::vector<double> total(call.heads * terms, 0.0);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const double* from = grad_coefficients.data() + (pair * chunks.count + chunk) * call.repeats() * terms;
      double* to = total.data() + pair % call.groups * call.repeats() * terms;
      for (int64_t n = 0; n < call.repeats() * terms; ++n) to[n] += from[n];
    }
  }
  std::copy(total.begin(), total.end(), gradients.coefficients.mutable_data_ptr<float>());
}

// The operators --------------------------------------------------------------------------------------------------

Call make_call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& coefficients,
               const optional<Tensor>& center, const optional<Tensor>& radius, const optional<Tensor>& mask,
               const optional<Tensor>& ranges, const optional<Tensor>& seed, bool causal, optional<int64_t> window,
               double scaling, int64_t squarings, int64_t normalizer, bool clamp, bool monomial, double dropout) {
  return {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3),
          coefficients.size(1), query, key, value, View<float>(coefficients), View<float>(center), View<float>(radius),
          View<bool>(mask), View<int32_t>(ranges), View<int64_t>(seed), causal, window, scaling, squarings, normalizer,
          clamp, monomial, dropout};
}

// Calls run<scalar_t, mm_t>(): bf16 products where the machine has them, fp32 products otherwise.
template <typename Run>
void dispatch(at::ScalarType dtype, const Run& run) {
  if (dtype == at::kFloat) {
    run.template operator()<float, float>();
  } else if (dtype == at::kBFloat16 && has_brgemm<BFloat16>()) {
    run.template operator()<BFloat16, BFloat16>();
  } else if (dtype == at::kBFloat16) {
    run.template operator()<BFloat16, float>();
  } else {
    TORCH_CHECK(dtype == at::kHalf, "bf16, fp16 or fp32 expected, got ", dtype);
    run.template operator()<at::Half, float>();
  }
}

template <typename... Arguments>
std::tuple<Tensor, Tensor> attention(const Arguments&... arguments) {
  const Call call = make_call(arguments...);
  const auto options = call.query.options();
  const Tensor output = at::empty({call.batch, call.q_len, call.heads, call.value_dim}, options);
  Tensor row_scale = at::empty({0}, options.dtype(at::kFloat));
  if (call.l1()) row_scale = at::empty({call.batch, call.heads, call.q_len}, options.dtype(at::kFloat));
  dispatch(call.query.scalar_type(), [&]<typename scalar_t, typename mm_t>() {
    if (call.repeats() * call.q_len <= kDecodeRows) {
      decode<scalar_t>(call, output, row_scale);
    } else {
      forward<scalar_t, mm_t>(call, output, row_scale);
    }
  });
  return {output, row_scale};
}

template <typename... Arguments>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_output,
                                                                      const Tensor& row_scale, bool coefficients_grad,
                                                                      const Arguments&... arguments) {
  const Call call = make_call(arguments...);
  const auto options = call.query.options();
  Gradients gradients{empty_gradient(call.query), empty_gradient(call.key), empty_gradient(call.value),
                      at::empty({call.heads, call.terms}, options.dtype(at::kFloat)),
                      at::empty({0}, options.dtype(at::kFloat))};
  if (call.center) {
    gradients.center = at::empty({call.batch, call.heads, call.q_len}, options.dtype(at::kFloat));
  }
  dispatch(call.query.scalar_type(), [&]<typename scalar_t, typename mm_t>() {
    backward<scalar_t, mm_t>(call, grad_output, row_scale, coefficients_grad, gradients);
  });
  return {gradients.query, gradients.key, gradients.value, gradients.coefficients, gradients.center};
}

}  // namespace
}  // namespace polyattn

#define POLYATTN_ARGUMENTS                                                                                       \
  "Tensor query, Tensor key, Tensor value, Tensor coefficients, Tensor? center, Tensor? radius, Tensor? mask, "  \
  "Tensor? ranges, Tensor? seed, bool causal, int? window, float scaling, int squarings, int normalizer, "       \
  "bool clamp, bool monomial, float dropout"
#define POLYATTN_TYPES                                                                                             \
  at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>,            \
      std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>, bool,                       \
      std::optional<int64_t>, double, int64_t, int64_t, bool, bool, double

TORCH_LIBRARY(polyattn_cpu, library) {
  library.def("attention(" POLYATTN_ARGUMENTS ") -> (Tensor, Tensor)");
  library.def("attention_backward(Tensor grad_output, Tensor row_scale, bool coefficients_grad, " POLYATTN_ARGUMENTS
              ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(polyattn_cpu, CPU, library) {
  library.impl("attention", polyattn::attention<POLYATTN_TYPES>);
  library.impl("attention_backward", polyattn::attention_backward<POLYATTN_TYPES>);
}
