// Vectors of LEDOM_LANES floats, as wide as the instruction set of the file that includes this; bf16 is widened when read and
// rounded to the nearest even when written. Only included by operators.h.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ledom::LEDOM_ISA {

constexpr int kLanes = LEDOM_LANES;
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
using All = std::integral_constant<int, kLanes>;  // a count: all lanes

struct BFloat16 {
  uint16_t bits;
};

inline Floats spread(float value) { return value - Floats{}; }

template <class Count>
inline Floats load(const float* from, Count count) {
  Floats values{};
  std::memcpy(&values, from, sizeof(float) * count);
  return values;
}

template <class Count>
inline Floats load(const BFloat16* from, Count count) {
  Halves bits{};
  std::memcpy(&bits, from, sizeof(BFloat16) * count);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

template <class Count>
inline void store(float* to, Floats values, Count count) {
  std::memcpy(to, &values, sizeof(float) * count);
}

template <class Count>
inline void store(BFloat16* to, Floats values, Count count) {
  const Words bits = (Words)values;
  Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = values == values ? rounded : Words{} + 0x7fc0u;  // rounding could change the bits of a NaN
  const Halves halves = __builtin_convertvector(rounded, Halves);
  std::memcpy(to, &halves, sizeof(BFloat16) * count);
}

// Calls f(i, count) for each group of lanes of n elements; the count of all groups but the last is a compile-time constant.
template <class F>
inline void over(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, All{});
  if (i < n) f(i, static_cast<int>(n - i));
}

inline float sum(Floats values) {
  float total = 0;
  for (int lane = 0; lane < kLanes; lane++) total += values[lane];
  return total;
}

inline Floats larger(Floats a, Floats b) { return a > b || a != a ? a : b; }  // a NaN in a is kept

// e^x within 2 ulp for x in [-87.3, 88.3]; 0 below, infinity above, NaN of NaN.
inline Floats exponential(Floats x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504f + kMagic;
  const Floats n = shifted - kMagic;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first of few bits
  Floats p = r * 1.98756915e-4f + 1.39819995e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats power = (Floats)(((Ints)shifted - (0x4B400000 - 127)) << 23);
  Floats result = p * power;
  result = x < -87.3f ? Floats{} : result;
  result = x > 88.3f ? spread(__builtin_inff()) : result;
  return x == x ? result : x;
}

}  // namespace ledom::LEDOM_ISA
