// Sums and maxima over a warp and over a block, in an order that depends only on the block's size: the same bits every time.
#pragma once

#include "common/platform.h"

namespace ledom {

constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
constexpr int WARP = 32, MAX_WARPS = 32;

struct Sum {
  static constexpr float IDENTITY = 0.f;
  static __device__ __forceinline__ float combine(float a, float b) { return a + b; }
};

struct Max {
  static constexpr float IDENTITY = -3.4e38f;  // finite: the difference of two of them is a number
  static __device__ __forceinline__ float combine(float a, float b) { return fmaxf(a, b); }
};

template <class Operation>
__device__ __forceinline__ float reduce_warp(float value) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance >>= 1)
    value = Operation::combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
  return value;
}

// Two floats per warp: a reduction writes one half while slow threads may still read the other, so that one barrier is enough.
struct ReduceScratch {
  float values[2][MAX_WARPS];
};

// Returns the result on every thread. The block consists of whole warps; `turn` alternates 0, 1, 0, ... for one scratch.
template <class Operation>
__device__ __forceinline__ float reduce_block(float value, ReduceScratch& scratch, int turn, int thread, int threads) {
  value = reduce_warp<Operation>(value);
  if (threads == WARP) return value;
  const int lane = thread % WARP;
  if (lane == 0) scratch.values[turn][thread / WARP] = value;
  __syncthreads();
  return reduce_warp<Operation>(lane < threads / WARP ? scratch.values[turn][lane] : Operation::IDENTITY);
}

}  // namespace ledom
