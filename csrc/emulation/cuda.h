// The parts of CUDA that kernels use, implemented with fibers.
#pragma once

#include "emulation/fibers.h"
#include "emulation/types.h"

#define threadIdx (::emulation::block.current->thread)
#define blockIdx (::emulation::block.index)
#define blockDim (::emulation::block.block_size)
#define gridDim (::emulation::block.grid_size)

#define EMULATION_TEXT(x) #x
#define EMULATION_LINE(x) EMULATION_TEXT(x)
#define __syncthreads() ::emulation::wait_at_barrier(__FILE__ ":" EMULATION_LINE(__LINE__))
#define __threadfence() ((void)0)

namespace emulation {

template <class T>
uint64_t as_word(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* where) {
  const uint64_t word = warp_collective(Collective::SHUFFLE, mask, as_word(value), source, where);
  T result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

inline int lane() { return block.current->index % WARP_LANES; }

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::shuffle(mask, value, source & 31, "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulation::shuffle(mask, value, emulation::lane() ^ bits, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int source = emulation::lane() + distance;
  return emulation::shuffle(mask, value, source < 32 ? source : emulation::lane(), "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int source = emulation::lane() - distance;
  return emulation::shuffle(mask, value, source >= 0 ? source : emulation::lane(), "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(emulation::warp_collective(emulation::Collective::BALLOT, mask, predicate != 0, 0, "__ballot_sync"));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  emulation::warp_collective(emulation::Collective::SYNC, mask, 0, 0, "__syncwarp");
}

template <class T>
T atomicAdd(T* address, T value) {
  T old, sum;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do sum = old + value;
  while (!__atomic_compare_exchange(address, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange(address, &old, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
