// The only header that depends on the compiler: nvcc, or a host compiler with the emulator (tests only).
//
// LEDOM_SHARED(type, name)   a typed object in the block's shared memory
// launch(kernel, grid, block, stream, arguments...)   starts a kernel; returns the cudaError, 0 is success
// for_dtype(dtype, function) calls function with a zero of the element type; returns cudaErrorInvalidValue for an unknown one
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulation/cuda.h"
#endif

#include "common/interface.h"

namespace ledom {

template <class T>
using Same = T;

#if defined(__CUDACC__)
#define LEDOM_SHARED(type, name) __shared__ ::ledom::Same<type> name

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
#else
#define LEDOM_SHARED(type, name)    \
  static const char name##_key = 0; \
  ::ledom::Same<type>& name =       \
      *static_cast<::ledom::Same<type>*>(::emulation::shared_object(&name##_key, sizeof(::ledom::Same<type>)))

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void*, Arguments&&... arguments) {
  return ::emulation::launch(grid, block, [&] { kernel(static_cast<Parameters>(arguments)...); });
}
#endif

template <class Function>
int for_dtype(int dtype, Function function) {
  if (dtype == LEDOM_BFLOAT16) return function(__nv_bfloat16{});
#ifndef LEDOM_BFLOAT16_ONLY  // sanitizer builds: half the code
  if (dtype == LEDOM_FLOAT16) return function(__half{});
#endif
  return cudaErrorInvalidValue;
}

inline bool is_aligned(const void* pointer) { return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// For a pointer that may be null.
inline bool is_aligned_or_null(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace ledom
