// Eight 16-bit values moved with one 128-bit access, and as floats in registers.
#pragma once

#include "common/platform.h"

namespace ledom {

constexpr int PACK = 8;

template <class T>
struct Pack;

template <>
struct Pack<__nv_bfloat16> {
  static __device__ __forceinline__ void unpack(const uint4& packed, float (&values)[PACK]) {
    const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {  // bf16 is the upper half of a float
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&values)[PACK]) {
    union {
      __nv_bfloat162 pairs[4];
      uint4 packed;
    } both;
#pragma unroll
    for (int i = 0; i < 4; i++) both.pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    return both.packed;
  }
};

template <>
struct Pack<__half> {
  static __device__ __forceinline__ void unpack(const uint4& packed, float (&values)[PACK]) {
    union {
      uint4 packed;
      __half2 pairs[4];
    } both;
    both.packed = packed;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 pair = __half22float2(both.pairs[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&values)[PACK]) {
    union {
      __half2 pairs[4];
      uint4 packed;
    } both;
#pragma unroll
    for (int i = 0; i < 4; i++) both.pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
    return both.packed;
  }
};

// Group `index` of eight values, counted from `base`.
template <class T>
__device__ __forceinline__ uint4 load_pack(const T* base, int index) {
  return reinterpret_cast<const uint4*>(base)[index];
}

template <class T>
__device__ __forceinline__ void store_pack(T* base, int index, const uint4& packed) {
  reinterpret_cast<uint4*>(base)[index] = packed;
}

}  // namespace ledom
