// RMSNorm forward and backward; formula and layout are in rms_norm.h. 16-bit in and out, fp32 inside.
//
// Work: a block processes rows blockIdx.x, blockIdx.x + gridDim.x, ...; a thread processes groups of eight neighbouring values and keeps
// HELD of them in registers until they are written; the rest (of rows above 16,384 values forward, 8,192 backward) is read again. There
// are few blocks, so that each reads the weight once and keeps it in registers. Only the input is kept for the backward pass, which
// computes the sum of squares again, together with another sum that it needs.
//
//   g = output_gradient * weight, r = 1 / sqrt(mean(x^2) + eps)
//   input_gradient = r * g - x * r^3 * mean(g * x)  (+ sum_gradient)
//   weight_gradient = sum over rows of output_gradient * x * r: per block, then over blocks in their order
#include "rms_norm/rms_norm.h"

#include "common/pack.h"
#include "common/reduce.h"

namespace ledom {
namespace {

constexpr int HELD = 4, FORWARD_THREADS = 512, BACKWARD_THREADS = 256;
constexpr int FORWARD_BLOCKS = 1024, BACKWARD_BLOCKS = 256;
constexpr int COLUMNS = 32, SLICES = 32;  // of the block that adds partial sums: 8 threads with 4 columns each, 32 slices of the rows

template <class T>
__device__ __forceinline__ float sum_of_squares(const uint4& packed) {
  float values[PACK], total = 0.f;
  Pack<T>::unpack(packed, values);
#pragma unroll
  for (int i = 0; i < PACK; i++) total += values[i] * values[i];
  return total;
}

template <class T>
__device__ __forceinline__ uint4 normalised(const uint4& packed, const uint4& weight, float reciprocal) {
  float x[PACK], w[PACK];
  Pack<T>::unpack(packed, x);
  Pack<T>::unpack(weight, w);
#pragma unroll
  for (int i = 0; i < PACK; i++) x[i] = x[i] * reciprocal * w[i];
  return Pack<T>::pack(x);
}

// Adds and rounds, so that the normalised values are those that later layers read as the sum.
template <class T>
__device__ __forceinline__ uint4 added(const uint4& first, const uint4& second) {
  float a[PACK], b[PACK];
  Pack<T>::unpack(first, a);
  Pack<T>::unpack(second, b);
#pragma unroll
  for (int i = 0; i < PACK; i++) a[i] += b[i];
  return Pack<T>::pack(a);
}

template <class T, bool HAS_RESIDUAL>
__global__ void __launch_bounds__(FORWARD_THREADS)
    rms_norm_forward(const T* input, const T* residual, const T* __restrict__ weight, T* __restrict__ output, T* sum, float eps,
                     int64_t rows, int hidden) {
  LEDOM_SHARED(ReduceScratch, scratch);
  const int groups = hidden / PACK, threads = blockDim.x, first = threadIdx.x;
  const float inverse = 1.f / hidden;
  uint4 w[HELD], x[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (first + i * threads < groups) w[i] = load_pack(weight, first + i * threads);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
    const int64_t offset = row * hidden;
    const auto read = [&](int group) {
      uint4 packed = load_pack(input + offset, group);
      if (HAS_RESIDUAL) packed = added<T>(packed, load_pack(residual + offset, group));
      return packed;
    };
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++)
      if (first + i * threads < groups) x[i] = read(first + i * threads);
#pragma unroll
    for (int i = 0; i < HELD; i++)
      if (first + i * threads < groups) {
        squares += sum_of_squares<T>(x[i]);
        if (HAS_RESIDUAL) store_pack(sum + offset, first + i * threads, x[i]);
      }
    for (int group = first + HELD * threads; group < groups; group += threads) {
      const uint4 packed = read(group);
      squares += sum_of_squares<T>(packed);
      if (HAS_RESIDUAL) store_pack(sum + offset, group, packed);
    }
    const float reciprocal = rsqrtf(reduce_block<Sum>(squares, scratch, turn, first, threads) * inverse + eps);
#pragma unroll
    for (int i = 0; i < HELD; i++)
      if (first + i * threads < groups)
        store_pack(output + offset, first + i * threads, normalised<T>(x[i], w[i], reciprocal));
    for (int group = first + HELD * threads; group < groups; group += threads) {
      const uint4 packed = load_pack((HAS_RESIDUAL ? sum : input) + offset, group);
      store_pack(output + offset, group, normalised<T>(packed, load_pack(weight, group), reciprocal));
    }
  }
}

// Sums over a row that the backward pass needs: of x^2 and of g * x.
struct RowSums {
  float squares = 0.f, products = 0.f;

  template <class T>
  __device__ __forceinline__ void add(const uint4& input, const uint4& gradient, const uint4& weight) {
    float x[PACK], g[PACK], w[PACK];
    Pack<T>::unpack(input, x);
    Pack<T>::unpack(gradient, g);
    Pack<T>::unpack(weight, w);
#pragma unroll
    for (int i = 0; i < PACK; i++) {
      squares += x[i] * x[i];
      products += g[i] * w[i] * x[i];
    }
  }
};

// A row's factors: input_gradient = direct * g - along * x.
struct RowFactors {
  float direct, along;
};

// The input's gradient, packed; adds this row's part of the weight's gradient to `total`.
template <class T>
__device__ __forceinline__ uint4 gradients(const uint4& input, const uint4& gradient, const uint4& weight, const uint4& passed,
                                           RowFactors row, float (&total)[PACK]) {
  float x[PACK], g[PACK], w[PACK], p[PACK];
  Pack<T>::unpack(input, x);
  Pack<T>::unpack(gradient, g);
  Pack<T>::unpack(weight, w);
  Pack<T>::unpack(passed, p);
#pragma unroll
  for (int i = 0; i < PACK; i++) {
    total[i] += g[i] * (x[i] * row.direct);
    x[i] = row.direct * (g[i] * w[i]) - row.along * x[i] + p[i];
  }
  return Pack<T>::pack(x);
}

// Adds `part` to eight floats in memory, or stores it if it is the first.
__device__ __forceinline__ void accumulate(float* memory, int group, const float (&part)[PACK], bool begin) {
  float4* at = reinterpret_cast<float4*>(memory) + 2 * group;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float4 held = begin ? make_float4(0.f, 0.f, 0.f, 0.f) : at[i];
    held.x += part[4 * i];
    held.y += part[4 * i + 1];
    held.z += part[4 * i + 2];
    held.w += part[4 * i + 3];
    at[i] = held;
  }
}

template <class T, bool HAS_SUM_GRADIENT>
__global__ void __launch_bounds__(BACKWARD_THREADS)
    rms_norm_backward(const T* output_gradient, const T* sum_gradient, const T* __restrict__ input, const T* __restrict__ weight,
                      T* input_gradient, float* __restrict__ partials, float eps, int64_t rows, int hidden) {
  LEDOM_SHARED(ReduceScratch, scratch);
  const int groups = hidden / PACK, threads = blockDim.x, first = threadIdx.x;
  float* partial = partials + static_cast<int64_t>(blockIdx.x) * hidden;
  const float inverse = 1.f / hidden;
  uint4 w[HELD], x[HELD], g[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (first + i * threads < groups) w[i] = load_pack(weight, first + i * threads);
  float total[HELD][PACK] = {};
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t offset = row * hidden;
    RowSums sums;
#pragma unroll
    for (int i = 0; i < HELD; i++)
      if (first + i * threads < groups) {
        x[i] = load_pack(input + offset, first + i * threads);
        g[i] = load_pack(output_gradient + offset, first + i * threads);
      }
#pragma unroll
    for (int i = 0; i < HELD; i++)
      if (first + i * threads < groups) sums.add<T>(x[i], g[i], w[i]);
    for (int group = first + HELD * threads; group < groups; group += threads)
      sums.add<T>(load_pack(input + offset, group), load_pack(output_gradient + offset, group), load_pack(weight, group));
    const float squares = reduce_block<Sum>(sums.squares, scratch, 0, first, threads);
    const float products = reduce_block<Sum>(sums.products, scratch, 1, first, threads);
    const float reciprocal = rsqrtf(squares * inverse + eps);
    const RowFactors factors{reciprocal, reciprocal * reciprocal * reciprocal * (products * inverse)};
    const auto passed = [&](int group) {
      return HAS_SUM_GRADIENT ? load_pack(sum_gradient + offset, group) : make_uint4(0u, 0u, 0u, 0u);
    };
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      const int group = first + i * threads;
      if (group < groups)
        store_pack(input_gradient + offset, group,
                   gradients<T>(x[i], g[i], w[i], passed(group), factors, total[i]));
    }
    for (int group = first + HELD * threads; group < groups; group += threads) {
      float part[PACK] = {};
      store_pack(input_gradient + offset, group,
                 gradients<T>(load_pack(input + offset, group), load_pack(output_gradient + offset, group),
                              load_pack(weight, group), passed(group), factors, part));
      accumulate(partial, group, part, row == blockIdx.x);
    }
  }
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (first + i * threads < groups) accumulate(partial, first + i * threads, total[i], true);
}

// Adds up `partials` for COLUMNS columns: each slice of the rows in one thread, then the slices.
template <class T>
__global__ void __launch_bounds__(COLUMNS / 4 * SLICES)
    rms_norm_add_partials(const float* __restrict__ partials, T* __restrict__ weight_gradient, int num_partials, int hidden) {
  LEDOM_SHARED(float[SLICES][COLUMNS + 4], slices);
  LEDOM_SHARED(float[COLUMNS], columns);
  const int quad = threadIdx.x % (COLUMNS / 4), slice = threadIdx.x / (COLUMNS / 4);
  const int column = blockIdx.x * COLUMNS + quad * 4;
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
  if (column < hidden)
    for (int row = slice; row < num_partials; row += SLICES) {
      const float4 part = *reinterpret_cast<const float4*>(partials + static_cast<int64_t>(row) * hidden + column);
      total.x += part.x;
      total.y += part.y;
      total.z += part.z;
      total.w += part.w;
    }
  *reinterpret_cast<float4*>(&slices[slice][quad * 4]) = total;
  __syncthreads();
  const int thread = threadIdx.x;
  if (thread < COLUMNS) {
    float sum = 0.f;
    for (int i = 0; i < SLICES; i++) sum += slices[i][thread];
    columns[thread] = sum;
  }
  __syncthreads();
  if (thread < COLUMNS / PACK && static_cast<int>(blockIdx.x) * COLUMNS + thread * PACK < hidden) {
    float values[PACK];
#pragma unroll
    for (int i = 0; i < PACK; i++) values[i] = columns[thread * PACK + i];
    store_pack(weight_gradient, blockIdx.x * (COLUMNS / PACK) + thread, Pack<T>::pack(values));
  }
}

dim3 block_for(int hidden, int most) {
  const int warps = (hidden / PACK + HELD * WARP - 1) / (HELD * WARP);
  return dim3(static_cast<unsigned>(warps * WARP < most ? warps * WARP : most));
}

unsigned blocks_for(int64_t rows, int most) { return static_cast<unsigned>(rows < most ? rows : most); }

template <class T>
int forward(const void* input, const void* residual, const void* weight, void* output, void* sum, float eps, int64_t rows,
            int hidden, void* stream) {
  const auto kernel = residual ? &rms_norm_forward<T, true> : &rms_norm_forward<T, false>;
  return launch(kernel, dim3(blocks_for(rows, FORWARD_BLOCKS)), block_for(hidden, FORWARD_THREADS), stream, static_cast<const T*>(input),
                static_cast<const T*>(residual), static_cast<const T*>(weight), static_cast<T*>(output), static_cast<T*>(sum),
                eps, rows, hidden);
}

template <class T>
int backward(const void* output_gradient, const void* sum_gradient, const void* input, const void* weight, void* input_gradient,
             void* weight_gradient, float* partials, float eps, int64_t rows, int hidden, void* stream) {
  const unsigned blocks = blocks_for(rows, BACKWARD_BLOCKS);
  const auto kernel = sum_gradient ? &rms_norm_backward<T, true> : &rms_norm_backward<T, false>;
  if (blocks) {
    const int error = launch(kernel, dim3(blocks), block_for(hidden, BACKWARD_THREADS), stream, static_cast<const T*>(output_gradient),
                             static_cast<const T*>(sum_gradient), static_cast<const T*>(input), static_cast<const T*>(weight),
                             static_cast<T*>(input_gradient), partials, eps, rows, hidden);
    if (error) return error;
  }
  return launch(&rms_norm_add_partials<T>, dim3((hidden + COLUMNS - 1) / COLUMNS), dim3(COLUMNS / 4 * SLICES), stream, partials,
                static_cast<T*>(weight_gradient), static_cast<int>(blocks), hidden);
}

bool is_shape(int64_t rows, int hidden) { return rows >= 0 && hidden > 0 && hidden % PACK == 0; }

}  // namespace
}  // namespace ledom

LEDOM_API int64_t ledom_rms_norm_partials(int64_t rows) { return ledom::blocks_for(rows, ledom::BACKWARD_BLOCKS); }

LEDOM_API int ledom_rms_norm_forward(const void* input, const void* residual, const void* weight, void* output, void* sum,
                                     float eps, int64_t rows, int hidden, int dtype, void* stream) {
  using namespace ledom;
  if (!is_shape(rows, hidden) || !residual != !sum) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (!is_aligned(input) || !is_aligned_or_null(residual) || !is_aligned(weight) || !is_aligned(output) ||
      !is_aligned_or_null(sum))
    return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    return forward<decltype(zero)>(input, residual, weight, output, sum, eps, rows, hidden, stream);
  });
}

LEDOM_API int ledom_rms_norm_backward(const void* output_gradient, const void* sum_gradient, const void* input,
                                      const void* weight, void* input_gradient, void* weight_gradient, void* partials,
                                      float eps, int64_t rows, int hidden, int dtype, void* stream) {
  using namespace ledom;
  if (!is_shape(rows, hidden)) return cudaErrorInvalidValue;
  if (!is_aligned(weight_gradient)) return cudaErrorMisalignedAddress;
  if (rows && (!is_aligned(output_gradient) || !is_aligned_or_null(sum_gradient) || !is_aligned(input) || !is_aligned(weight) ||
               !is_aligned(input_gradient) || !is_aligned(partials)))
    return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    return backward<decltype(zero)>(output_gradient, sum_gradient, input, weight, input_gradient, weight_gradient,
                                    static_cast<float*>(partials), eps, rows, hidden, stream);
  });
}
