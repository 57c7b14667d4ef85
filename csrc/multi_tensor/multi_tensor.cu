// AdamW, norm and scaling over many tensors; formulas and the table of chunks are in multi_tensor.h. fp32 inside.
//
// Work: a block processes a row of the table, a thread groups of eight neighbouring elements; all lists are read before any is written.
// The end of a row, or a whole row that is not aligned to 16 bytes, is processed element by element. Each block has a sum; then one
// block adds these sums in the order of the blocks.
#include "multi_tensor/multi_tensor.h"

#include "common/pack.h"
#include "common/reduce.h"

namespace ledom {
namespace {

constexpr int THREADS = 256, SUM_THREADS = 512;

template <class T>
__device__ __forceinline__ void load_eight(const T* from, int group, float (&values)[PACK]) {
  Pack<T>::unpack(load_pack(from, group), values);
}

__device__ __forceinline__ void load_eight(const float* from, int group, float (&values)[PACK]) {
  const float4 low = reinterpret_cast<const float4*>(from)[2 * group], high = reinterpret_cast<const float4*>(from)[2 * group + 1];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

template <class T>
__device__ __forceinline__ void store_eight(T* to, int group, const float (&values)[PACK]) {
  store_pack(to, group, Pack<T>::pack(values));
}

__device__ __forceinline__ void store_eight(float* to, int group, const float (&values)[PACK]) {
  reinterpret_cast<float4*>(to)[2 * group] = make_float4(values[0], values[1], values[2], values[3]);
  reinterpret_cast<float4*>(to)[2 * group + 1] = make_float4(values[4], values[5], values[6], values[7]);
}

__device__ __forceinline__ float load_one(const float* from) { return *from; }
__device__ __forceinline__ float load_one(const __nv_bfloat16* from) { return __bfloat162float(*from); }
__device__ __forceinline__ float load_one(const __half* from) { return __half2float(*from); }
__device__ __forceinline__ void store_one(float* to, float value) { *to = value; }
__device__ __forceinline__ void store_one(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void store_one(__half* to, float value) { *to = __float2half_rn(value); }

// A list's part of a row: column `list` after the number of elements.
template <class T>
__device__ __forceinline__ T* piece(T* base, const int64_t* row, int list) {
  using Byte = Same<const char>;
  return const_cast<T*>(reinterpret_cast<const T*>(reinterpret_cast<Byte*>(base) + row[1 + list]));
}

__device__ __forceinline__ bool is_on_grid(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

struct AdamScalars {
  float beta1, beta2, rest1, rest2, eps, rate, root, l2, kept;  // rest = 1 - beta, root = 1 / sqrt(correction2), kept of master
};

__device__ __forceinline__ void adam_step(float gradient, float& first, float& second, float& master, const AdamScalars& s) {
  gradient += s.l2 * master;
  first = s.beta1 * first + s.rest1 * gradient;
  second = s.beta2 * second + s.rest2 * gradient * gradient;
  master = s.kept * master - s.rate * first / (sqrtf(second) * s.root + s.eps);
}

template <class Gradient, class Weight, bool HAS_WEIGHTS>
__global__ void __launch_bounds__(THREADS)
    multi_tensor_adamw(const int64_t* __restrict__ chunks, const Gradient* __restrict__ gradients, float* __restrict__ exp_avgs,
                       float* __restrict__ exp_avg_sqs, float* __restrict__ masters, Weight* __restrict__ weights, AdamScalars s) {
  const int64_t* row = chunks + static_cast<int64_t>(blockIdx.x) * 6;
  const int count = static_cast<int>(row[0]), thread = threadIdx.x;
  const Gradient* gradient = piece(gradients, row, 0);
  float *exp_avg = piece(exp_avgs, row, 1), *exp_avg_sq = piece(exp_avg_sqs, row, 2), *master = piece(masters, row, 3);
  Weight* weight = HAS_WEIGHTS ? piece(weights, row, 4) : nullptr;
  const bool is_aligned_row = is_on_grid(gradient) && is_on_grid(exp_avg) && is_on_grid(exp_avg_sq) && is_on_grid(master) &&
                              (!HAS_WEIGHTS || is_on_grid(weight));
  const int groups = is_aligned_row ? count / PACK : 0;
  for (int group = thread; group < groups; group += THREADS) {
    float g[PACK], first[PACK], second[PACK], p[PACK];
    load_eight(gradient, group, g);
    load_eight(exp_avg, group, first);
    load_eight(exp_avg_sq, group, second);
    load_eight(master, group, p);
#pragma unroll
    for (int i = 0; i < PACK; i++) adam_step(g[i], first[i], second[i], p[i], s);
    store_eight(exp_avg, group, first);
    store_eight(exp_avg_sq, group, second);
    store_eight(master, group, p);
    if (HAS_WEIGHTS) store_eight(weight, group, p);
  }
#pragma unroll 1
  for (int i = groups * PACK + thread; i < count; i += THREADS) {
    float first = exp_avg[i], second = exp_avg_sq[i], p = master[i];
    adam_step(load_one(gradient + i), first, second, p, s);
    exp_avg[i] = first, exp_avg_sq[i] = second, master[i] = p;
    if (HAS_WEIGHTS) store_one(weight + i, p);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    multi_tensor_squares(const int64_t* __restrict__ chunks, const T* __restrict__ tensors, float* __restrict__ partials) {
  LEDOM_SHARED(ReduceScratch, scratch);
  const int64_t* row = chunks + static_cast<int64_t>(blockIdx.x) * 2;
  const int count = static_cast<int>(row[0]), thread = threadIdx.x;
  const T* values = piece(tensors, row, 0);
  const int groups = is_on_grid(values) ? count / PACK : 0;
  float total = 0.f;
  for (int group = thread; group < groups; group += THREADS) {
    float eight[PACK];
    load_eight(values, group, eight);
#pragma unroll
    for (int i = 0; i < PACK; i++) total += eight[i] * eight[i];
  }
#pragma unroll 1
  for (int i = groups * PACK + thread; i < count; i += THREADS) {
    const float value = load_one(values + i);
    total += value * value;
  }
  total = reduce_block<Sum>(total, scratch, 0, thread, THREADS);
  if (thread == 0) partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(SUM_THREADS) multi_tensor_root(const float* __restrict__ partials, float* __restrict__ norm, int64_t count) {
  LEDOM_SHARED(ReduceScratch, scratch);
  const int thread = threadIdx.x;
  float total = 0.f;
#pragma unroll 2
  for (int64_t quad = thread; quad < count / 4; quad += SUM_THREADS) {
    const float4 four = reinterpret_cast<const float4*>(partials)[quad];
    total += (four.x + four.y) + (four.z + four.w);
  }
  if (thread < count % 4) total += partials[count / 4 * 4 + thread];
  const float root = sqrtf(reduce_block<Sum>(total, scratch, 0, thread, SUM_THREADS));
  if (thread == 0) *norm = root;
}

// No __restrict__: targets may be the sources.
template <class Source, class Target>
__global__ void __launch_bounds__(THREADS)
    multi_tensor_scale(const int64_t* __restrict__ chunks, const Source* sources, Target* targets, float scale) {
  const int64_t* row = chunks + static_cast<int64_t>(blockIdx.x) * 3;
  const int count = static_cast<int>(row[0]), thread = threadIdx.x;
  const Source* source = piece(sources, row, 0);
  Target* target = piece(targets, row, 1);
  const int groups = is_on_grid(source) && is_on_grid(target) ? count / PACK : 0;
  for (int group = thread; group < groups; group += THREADS) {
    float values[PACK];
    load_eight(source, group, values);
#pragma unroll
    for (int i = 0; i < PACK; i++) values[i] *= scale;
    store_eight(target, group, values);
  }
#pragma unroll 1
  for (int i = groups * PACK + thread; i < count; i += THREADS) store_one(target + i, load_one(source + i) * scale);
}

bool is_grid(int64_t num_chunks) { return num_chunks >= 0 && num_chunks <= 0x7FFFFFFF; }

dim3 grid_of(int64_t num_chunks) { return dim3(static_cast<unsigned>(num_chunks)); }

// Calls function with a zero of `dtype`, or of fp32.
template <class Function>
int for_list(int is_16_bit, int dtype, Function function) {
  return is_16_bit ? for_dtype(dtype, function) : function(0.f);
}

}  // namespace
}  // namespace ledom

LEDOM_API int ledom_multi_tensor_adamw(const void* chunks, const void* gradients, void* exp_avgs, void* exp_avg_sqs, void* masters,
                                       void* weights, double lr, double beta1, double beta2, double eps, double weight_decay,
                                       double correction1, double correction2, int64_t num_chunks, int is_decoupled,
                                       int gradients_are_16_bit, int dtype, void* stream) {
  using namespace ledom;
  if (!is_grid(num_chunks) || !(correction1 > 0.) || !(correction2 > 0.)) return cudaErrorInvalidValue;
  if (num_chunks == 0) return cudaSuccess;
  if (!is_aligned(chunks) || !is_aligned(gradients) || !is_aligned(exp_avgs) || !is_aligned(exp_avg_sqs) || !is_aligned(masters) ||
      !is_aligned_or_null(weights))
    return cudaErrorMisalignedAddress;
  AdamScalars s;
  s.beta1 = static_cast<float>(beta1), s.beta2 = static_cast<float>(beta2);
  s.rest1 = static_cast<float>(1. - beta1), s.rest2 = static_cast<float>(1. - beta2);
  s.eps = static_cast<float>(eps), s.rate = static_cast<float>(lr / correction1), s.root = static_cast<float>(1. / sqrt(correction2));
  s.l2 = static_cast<float>(is_decoupled ? 0. : weight_decay), s.kept = static_cast<float>(is_decoupled ? 1. - lr * weight_decay : 1.);
  return for_dtype(dtype, [&](auto of_weights) {
    using T = decltype(of_weights);
    return for_list(gradients_are_16_bit, dtype, [&](auto of_gradients) -> int {
      using Gradient = decltype(of_gradients);
      const auto kernel = weights ? &multi_tensor_adamw<Gradient, T, true> : &multi_tensor_adamw<Gradient, T, false>;
      return launch(kernel, grid_of(num_chunks), dim3(THREADS), stream, static_cast<const int64_t*>(chunks),
                    static_cast<const Gradient*>(gradients), static_cast<float*>(exp_avgs), static_cast<float*>(exp_avg_sqs),
                    static_cast<float*>(masters), static_cast<T*>(weights), s);
    });
  });
}

LEDOM_API int ledom_multi_tensor_norm(const void* chunks, const void* tensors, void* norm, void* partials, int64_t num_chunks,
                                      int are_16_bit, int dtype, void* stream) {
  using namespace ledom;
  if (!is_grid(num_chunks)) return cudaErrorInvalidValue;
  if (!is_aligned(norm) || (num_chunks && (!is_aligned(chunks) || !is_aligned(tensors) || !is_aligned(partials))))
    return cudaErrorMisalignedAddress;
  if (dtype != LEDOM_BFLOAT16 && dtype != LEDOM_FLOAT16) return cudaErrorInvalidValue;
  if (num_chunks) {
    const int error = for_list(are_16_bit, dtype, [&](auto zero) -> int {
      using T = decltype(zero);
      return launch(&multi_tensor_squares<T>, grid_of(num_chunks), dim3(THREADS), stream, static_cast<const int64_t*>(chunks),
                    static_cast<const T*>(tensors), static_cast<float*>(partials));
    });
    if (error) return error;
  }
  return launch(&multi_tensor_root, dim3(1), dim3(SUM_THREADS), stream, static_cast<const float*>(partials), static_cast<float*>(norm),
                num_chunks);
}

LEDOM_API int ledom_multi_tensor_scale(const void* chunks, const void* sources, void* targets, double scale, int64_t num_chunks,
                                       int sources_are_16_bit, int targets_are_16_bit, int dtype, void* stream) {
  using namespace ledom;
  if (!is_grid(num_chunks) || (dtype != LEDOM_BFLOAT16 && dtype != LEDOM_FLOAT16)) return cudaErrorInvalidValue;
  if (num_chunks == 0) return cudaSuccess;
  if (!is_aligned(chunks) || !is_aligned(sources) || !is_aligned(targets)) return cudaErrorMisalignedAddress;
  return for_list(sources_are_16_bit, dtype, [&](auto of_sources) {
    return for_list(targets_are_16_bit, dtype, [&](auto of_targets) -> int {
      using Source = decltype(of_sources);
      using Target = decltype(of_targets);
      return launch(&multi_tensor_scale<Source, Target>, grid_of(num_chunks), dim3(THREADS), stream,
                    static_cast<const int64_t*>(chunks), static_cast<const Source*>(sources), static_cast<Target*>(targets),
                    static_cast<float>(scale));
    });
  });
}
