// The arguments of one call of backend `cpu`, and what its tasks run on.

#pragma once

#include "polynomial.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>

namespace polyattn {

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

// The keys that a row may see, but for a mask.
inline Range visible_keys(int64_t b, int64_t i, int64_t k_len, bool causal, optional<int64_t> window,
                          const View<int32_t>& ranges) {
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
  bool decodes() const { return repeats() * q_len <= kDecodeRows; }

  double radius_of(int64_t head) const { return radius ? *radius(head, 0, 0) : 1.0; }

  Polynomial polynomial(int64_t head) const {
    return {coefficients(head, 0, 0), static_cast<int>(terms - 1), static_cast<int>(squarings),
            static_cast<float>(scaling / radius_of(head)), l1(), clamp, monomial};
  }

  float row_offset(int64_t b, int64_t h, int64_t i) const {
    return center ? static_cast<float>(-*center(b, h, i) / radius_of(h)) : 0.0f;
  }

  // The keys that a row may see, but for the mask.
  Range visible(int64_t b, int64_t i) const { return visible_keys(b, i, k_len, causal, window, ranges); }

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

}  // namespace polyattn
