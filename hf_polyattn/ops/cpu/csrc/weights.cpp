// The weights of a tile, for every kind of polynomial: apart, so that several compilers can share the work.

#include "polynomial.h"

namespace polyattn {
namespace {

// kPlain: no power, nothing hidden, no dropout.
template <typename mm_t, int P, bool kL1, bool kClamp, bool kMonomial, bool kPlain>
void weights_of(const ForwardTile<mm_t>& tile, const Polynomial& polynomial) {
  const Coefficients<P> c(polynomial.coefficients);
  const Vec slope(polynomial.slope);
  const int squarings = polynomial.squarings;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t row = i * tile.columns;
    const Vec offset(tile.offsets[i]);
    Vec sum(0.0f), other_sum(0.0f);
    auto weight = [&](int64_t j, Vec& total) {
      Vec t = at::vec::fmadd(Vec::loadu(tile.scores + row + j), slope, offset);
      if constexpr (kClamp) t = limited(t);
      Vec w = kMonomial ? c.c[P] * power_of<P>(t) : c.value(t);
      if constexpr (!kPlain) {
        for (int s = 0; s < squarings; ++s) w = w * w;
        if (tile.visible != nullptr) w = w & Vec::loadu(tile.visible + row + j);
      }
      if constexpr (kL1) total = total + w.abs();
      if constexpr (!kPlain) {
        if (tile.kept != nullptr) w = w * Vec::loadu(tile.kept + row + j);
      }
      return w;
    };
    int64_t j = 0;
    for (; j + 2 * kLanes <= tile.columns; j += 2 * kLanes) {
      const Vec w = weight(j, sum), next = weight(j + kLanes, other_sum);
      store(tile.weights + row + j, w, next);
    }
    if (j < tile.columns) store(tile.weights + row + j, weight(j, sum));
    if constexpr (kL1) {
      tile.sums[i] += polyattn::sum(sum + other_sum);
    }
  }
}

template <typename mm_t, int P, bool kL1, bool kClamp, bool kMonomial>
void weights(const ForwardTile<mm_t>& tile, const Polynomial& polynomial) {
  if (polynomial.squarings == 0 && tile.visible == nullptr && tile.kept == nullptr) {
    weights_of<mm_t, P, kL1, kClamp, kMonomial, true>(tile, polynomial);
  } else {
    weights_of<mm_t, P, kL1, kClamp, kMonomial, false>(tile, polynomial);
  }
}

}  // namespace

template <typename mm_t>
WeightsOf<mm_t> choose_weights(const Polynomial& p) {
  auto instance = []<int P, bool kL1, bool kClamp, bool kMonomial>() {
    return &weights<mm_t, P, kL1, kClamp, kMonomial>;
  };
  return choose(p, instance, std::make_integer_sequence<int, kMaxDegree>());
}

template WeightsOf<float> choose_weights<float>(const Polynomial&);
template WeightsOf<BFloat16> choose_weights<BFloat16>(const Polynomial&);

}  // namespace polyattn
