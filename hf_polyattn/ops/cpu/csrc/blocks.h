// Blocks of memory and of matrix products: what the attention kernels are made of.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

namespace polyattn {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();
constexpr int64_t kPad = 16;  // columns of a tile come in multiples of this
static_assert(kPad % kLanes == 0, "a tile's columns are whole vectors");

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Rows that a B operand of a product packs together: two for bf16 (VNNI), one for fp32.
template <typename mm_t>
constexpr int64_t kPack = std::is_same_v<mm_t, BFloat16> ? 2 : 1;

// Rounding to the type of the matrix products ------------------------------------------------------------------

inline void store(float* to, Vec x) { x.store(to); }
inline void store(float* to, Vec x, Vec y) {
  x.store(to);
  y.store(to + kLanes);
}

inline void store(BFloat16* to, Vec x, Vec y) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x)));
#else
  at::vec::convert_from_float<BFloat16>(x, y).store(to);
#endif
}
inline void store(BFloat16* to, Vec x) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
  at::vec::convert_from_float<BFloat16>(x, x).store(to, kLanes);
#endif
}

inline void store(at::Half* to, Vec x, Vec y) { at::vec::convert_from_float<at::Half>(x, y).store(to); }

// Writes scale · from, rounded.
template <typename T>
void store_row(const float* from, float scale, int64_t count, T* to) {
  const Vec factor(scale);
  int64_t d = 0;
  for (; d + 2 * kLanes <= count; d += 2 * kLanes) {
    store(to + d, Vec::loadu(from + d) * factor, Vec::loadu(from + d + kLanes) * factor);
  }
  for (; d < count; ++d) to[d] = static_cast<T>(from[d] * scale);
}

// Stores a row of a packed B operand: columns x of one row and y of the next.
inline void store_packed(float* to, int64_t ld, Vec x, Vec y) {
  x.store(to);
  y.store(to + ld);
}
inline void store_packed(BFloat16* to, int64_t, Vec x, Vec y) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  alignas(64) BFloat16 rows[2][2 * kLanes];
  at::vec::convert_from_float<BFloat16>(x, y).store(rows[0]);
  for (int64_t i = 0; i < kLanes; ++i) {
    to[2 * i] = rows[0][i];
    to[2 * i + 1] = rows[0][kLanes + i];
  }
#endif
}

// Loads kLanes numbers as float.
inline Vec load_vec(const float* from) { return Vec::loadu(from); }
template <typename T>
inline Vec load_vec(const T* from) {
  return std::get<0>(at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from, kLanes)));
}
template <typename T>
inline Vec load_vec(const T* from, int64_t count) {
  alignas(64) float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(from[i]);
  return Vec::loadu(values);
}

inline float sum(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

// Packing ------------------------------------------------------------------------------------------------------
//
// A row-major block of n rows and d columns, at `from` with stride ld, becomes an operand of a product. Missing rows
// and columns up to the padded sizes are zeros.

// A operand: as it is.
template <typename scalar_t, typename mm_t>
void pack_rows(const scalar_t* from, int64_t ld, int64_t n, int64_t d, mm_t* to, int64_t ld_to) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < d; ++k) to[i * ld_to + k] = static_cast<mm_t>(from[i * ld + k]);
    for (int64_t k = d; k < ld_to; ++k) to[i * ld_to + k] = mm_t(0);
  }
}

// A operand: transposed, (d, ld_to), columns up to `padded` filled.
template <typename mm_t>
void transpose(const mm_t* from, int64_t ld, int64_t n, int64_t d, mm_t* to, int64_t ld_to, int64_t padded) {
  constexpr int64_t kTile = 16;
  for (int64_t i = 0; i < n; i += kTile) {
    for (int64_t k = 0; k < d; k += kTile) {
      const int rows = std::min(kTile, n - i), columns = std::min(kTile, d - k);
      at::vec::transpose_mxn<mm_t>(from + i * ld + k, ld, to + k * ld_to + i, ld_to, rows, columns);
    }
  }
  for (int64_t k = 0; k < d; ++k) {
    for (int64_t i = n; i < padded; ++i) to[k * ld_to + i] = mm_t(0);
  }
}

// B operand with the rows as its rows: (padded n / kPack, d, kPack).
inline void pack_b(const float* from, int64_t ld, int64_t n, int64_t d, float* to, int64_t padded) {
  pack_rows(from, ld, n, d, to, d);
  std::fill(to + n * d, to + padded * d, 0.0f);
}
inline void pack_b(const BFloat16* from, int64_t ld, int64_t n, int64_t d, BFloat16* to, int64_t padded) {
  const auto* rows = reinterpret_cast<const uint16_t*>(from);
  auto* pairs = reinterpret_cast<uint32_t*>(to);
  for (int64_t i = 0; i + 1 < n; i += 2) {
    for (int64_t k = 0; k < d; ++k) {
      pairs[i / 2 * d + k] = rows[i * ld + k] | static_cast<uint32_t>(rows[(i + 1) * ld + k]) << 16;
    }
  }
  if (n % 2 == 1) {
    for (int64_t k = 0; k < d; ++k) pairs[n / 2 * d + k] = rows[(n - 1) * ld + k];
  }
  std::fill(pairs + ceil_div(n, 2) * d, pairs + padded / 2 * d, 0u);
}

// B operand with the rows as its columns: (d / kPack, columns, kPack). d is a multiple of kPack.
inline void pack_b_transposed(const float* from, int64_t ld, int64_t n, int64_t d, float* to, int64_t columns) {
  transpose(from, ld, n, d, to, columns, columns);
}
inline void pack_b_transposed(const BFloat16* from, int64_t ld, int64_t n, int64_t d, BFloat16* to, int64_t columns) {
  // pairs of bf16 move as one fp32
  transpose(reinterpret_cast<const float*>(from), ld / 2, n, d / 2, reinterpret_cast<float*>(to), columns, columns);
}

// Asks for rows that will be read soon: those of one head lie far apart, where no hardware looks ahead.
template <typename T>
void prefetch_rows(const T* from, int64_t ld, int64_t n, int64_t d) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < d; k += kLine) __builtin_prefetch(from + i * ld + k);
  }
}

// Products -----------------------------------------------------------------------------------------------------

// Whether oneDNN multiplies blocks of this type here; probed once, as ATen offers no question to ask.
template <typename mm_t>
bool has_brgemm() {
  static const bool supported = [] {
    try {
      mm_t a[2 * 16] = {}, b[16 * 16] = {};
      float c[2 * 16];
      at::native::cpublas::brgemm(2, 16, 16, 16, 16, 16, false, a, b, c, kPack<mm_t> == 2);
      at::native::cpublas::brgemm_release(kPack<mm_t> == 2);
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return supported;
}

// Rows × (columns × kLanes) of C = or += A · B, held in registers; for machines without brgemm.
template <int kRows, int kColumns>
void multiply_registers(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                        bool add) {
  Vec total[kRows][kColumns];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) total[i][j] = add ? Vec::loadu(c + i * ldc + j * kLanes) : Vec(0.0f);
  }
  for (int64_t n = 0; n < k; ++n) {
    Vec row[kColumns];
    for (int j = 0; j < kColumns; ++j) row[j] = Vec::loadu(b + n * ldb + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) total[i][j] = at::vec::fmadd(Vec(a[i * lda + n]), row[j], total[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) total[i][j].store(c + i * ldc + j * kLanes);
  }
}

inline void multiply_plain(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                           float* c, int64_t ldc, bool add) {
  constexpr int64_t kWide = 2 * kLanes;
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) multiply_registers<4, 2>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, add);
    for (; i < m; ++i) multiply_registers<1, 2>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, add);
  }
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t i = 0; i < m; ++i) {
      multiply_registers<1, 1>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, add);
    }
  }
  for (; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      float total = add ? c[i * ldc + j] : 0.0f;
      for (int64_t l = 0; l < k; ++l) total += a[i * lda + l] * b[l * ldb + j];
      c[i * ldc + j] = total;
    }
  }
}

// fp32 sums of more products than these are made of two: their rounding would show beside that of a BLAS.
constexpr int64_t kDepth = 128;

// C (m, n) = or += A (m, k) · B (k, n), with B packed and k a multiple of kPack.
template <typename mm_t>
void multiply(int64_t m, int64_t n, int64_t k, const mm_t* a, int64_t lda, const mm_t* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  if constexpr (std::is_same_v<mm_t, float>) {
    if (!add && k > kDepth) {
      std::vector<float> rest(m * n);
      multiply(m, n, k - kDepth, a + kDepth, lda, b + kDepth * ldb, ldb, rest.data(), n, false);
      multiply(m, n, kDepth, a, lda, b, ldb, c, ldc, false);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) c[i * ldc + j] += rest[i * n + j];
      }
      return;
    }
    if (!has_brgemm<float>()) return multiply_plain(m, n, k, a, lda, b, ldb, c, ldc, add);
  }
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, kPack<mm_t> == 2);
}

// Frees what brgemm holds of the matrix unit (AMX tiles), at the end of a thread's work.
template <typename mm_t>
void release() {
  if (has_brgemm<mm_t>()) at::native::cpublas::brgemm_release(kPack<mm_t> == 2);
}

}  // namespace polyattn
