// SwiGLU forward and backward; formula and layout are in swiglu.h. 16-bit in and out, fp32 inside.
//
// Work: a row is blockIdx.x; a thread processes LOADS groups of eight neighbouring columns of gate and up, and reads all of them
// before it writes the first. Threads share nothing.
//
//   s = sigmoid(gate)
//   gate_gradient = output_gradient * up * s * (1 + gate * (1 - s))
//   up_gradient   = output_gradient * gate * s
#include "swiglu/swiglu.h"

#include "common/pack.h"

namespace ledom {
namespace {

constexpr int LOADS = 2, MAX_THREADS = 128, MAX_GRID_Y = 65535;

// The error of __expf grows with |x|, to 2^-17 of the value at the ends of fp32: far below a 16-bit type's rounding.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

template <class T>
__device__ __forceinline__ uint4 swiglu(const uint4& packed_gate, const uint4& packed_up) {
  float gate[PACK], up[PACK];
  Pack<T>::unpack(packed_gate, gate);
  Pack<T>::unpack(packed_up, up);
#pragma unroll
  for (int i = 0; i < PACK; i++) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
  return Pack<T>::pack(gate);
}

// Replaces gate and up by their gradients.
template <class T>
__device__ __forceinline__ void swiglu_gradients(uint4& packed_gate, uint4& packed_up, const uint4& packed_gradient) {
  float gate[PACK], up[PACK], gradient[PACK];
  Pack<T>::unpack(packed_gate, gate);
  Pack<T>::unpack(packed_up, up);
  Pack<T>::unpack(packed_gradient, gradient);
#pragma unroll
  for (int i = 0; i < PACK; i++) {
    const float s = sigmoid(gate[i]), silu = gate[i] * s;
    gate[i] = gradient[i] * up[i] * (s + silu * (1.f - s));
    up[i] = gradient[i] * silu;
  }
  packed_gate = Pack<T>::pack(gate);
  packed_up = Pack<T>::pack(up);
}

template <class T>
__global__ void __launch_bounds__(MAX_THREADS) swiglu_forward(const T* __restrict__ input, T* __restrict__ output, int width) {
  const int groups = width / PACK, threads = blockDim.x, first = blockIdx.y * LOADS * threads + threadIdx.x;
  const T* gates = input + static_cast<int64_t>(blockIdx.x) * 2 * width;
  T* row = output + static_cast<int64_t>(blockIdx.x) * width;
  uint4 gate[LOADS], up[LOADS];
#pragma unroll
  for (int i = 0; i < LOADS; i++)
    if (first + i * threads < groups) {
      gate[i] = load_pack(gates, first + i * threads);
      up[i] = load_pack(gates + width, first + i * threads);
    }
#pragma unroll
  for (int i = 0; i < LOADS; i++)
    if (first + i * threads < groups) store_pack(row, first + i * threads, swiglu<T>(gate[i], up[i]));
}

template <class T>
__global__ void __launch_bounds__(MAX_THREADS)
    swiglu_backward(const T* __restrict__ output_gradient, const T* input, T* input_gradient, int width) {
  const int groups = width / PACK, threads = blockDim.x, first = blockIdx.y * LOADS * threads + threadIdx.x;
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * 2 * width;
  const T* gradients = output_gradient + static_cast<int64_t>(blockIdx.x) * width;
  uint4 gate[LOADS], up[LOADS], gradient[LOADS];
#pragma unroll
  for (int i = 0; i < LOADS; i++)
    if (first + i * threads < groups) {
      gate[i] = load_pack(input + offset, first + i * threads);
      up[i] = load_pack(input + offset + width, first + i * threads);
      gradient[i] = load_pack(gradients, first + i * threads);
    }
#pragma unroll
  for (int i = 0; i < LOADS; i++)
    if (first + i * threads < groups) {
      swiglu_gradients<T>(gate[i], up[i], gradient[i]);
      store_pack(input_gradient + offset, first + i * threads, gate[i]);
      store_pack(input_gradient + offset + width, first + i * threads, up[i]);
    }
}

bool is_shape(int64_t rows, int width) {
  return rows >= 0 && rows <= 0x7FFFFFFF && width > 0 && width % PACK == 0 && width / (PACK * LOADS * MAX_THREADS) < MAX_GRID_Y;
}

dim3 block_for(int width) {
  const int warps = (width / PACK + LOADS * 32 - 1) / (LOADS * 32);
  return dim3(static_cast<unsigned>(warps * 32 < MAX_THREADS ? warps * 32 : MAX_THREADS));
}

dim3 grid_for(int64_t rows, int width) {
  const unsigned columns = block_for(width).x * LOADS * PACK;
  return dim3(static_cast<unsigned>(rows), (static_cast<unsigned>(width) + columns - 1) / columns);
}

}  // namespace
}  // namespace ledom

LEDOM_API int ledom_swiglu_forward(const void* input, void* output, int64_t rows, int width, int dtype, void* stream) {
  using namespace ledom;
  if (!is_shape(rows, width)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (!is_aligned(input) || !is_aligned(output)) return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(&swiglu_forward<T>, grid_for(rows, width), block_for(width), stream, static_cast<const T*>(input),
                  static_cast<T*>(output), width);
  });
}

LEDOM_API int ledom_swiglu_backward(const void* output_gradient, const void* input, void* input_gradient, int64_t rows, int width,
                                    int dtype, void* stream) {
  using namespace ledom;
  if (!is_shape(rows, width)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (!is_aligned(output_gradient) || !is_aligned(input) || !is_aligned(input_gradient)) return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(&swiglu_backward<T>, grid_for(rows, width), block_for(width), stream, static_cast<const T*>(output_gradient),
                  static_cast<const T*>(input), static_cast<T*>(input_gradient), width);
  });
}
