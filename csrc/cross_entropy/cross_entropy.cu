// Cross-entropy over a slice of the vocabulary; formula and layout are in cross_entropy.h. 16-bit logits, fp32 inside.
//
// Work of both: a row is blockIdx.x, and the block's THREADS threads process groups of eight neighbouring logits. The terms are computed
// in one pass: a thread keeps the largest logit so far and the sum relative to it, and reads four groups before it uses the first; then
// the block computes the overall largest and the sum. A group that crosses `counted` is masked when it is used.
#include "cross_entropy/cross_entropy.h"

#include "common/pack.h"
#include "common/reduce.h"

namespace ledom {
namespace {

constexpr int THREADS = 256, LOADS = 4;
constexpr float LOG2_E = 1.4426950408889634f;

// Adds a group of logits to a thread's largest and sum.
template <class T>
__device__ __forceinline__ void add_group(const uint4& packed, int present, float& largest, float& sum) {
  float values[PACK];
  Pack<T>::unpack(packed, values);
  float highest = largest;
#pragma unroll
  for (int i = 0; i < PACK; i++)
    if (i < present) highest = fmaxf(highest, values[i]);
  float more = 0.f;
#pragma unroll
  for (int i = 0; i < PACK; i++)
    if (i < present) more += exp2f((values[i] - highest) * LOG2_E);
  sum = sum * exp2f((largest - highest) * LOG2_E) + more;
  largest = highest;
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    cross_entropy_terms(const T* __restrict__ logits, const int64_t* __restrict__ labels, float* __restrict__ largest_of,
                        float* __restrict__ sum_of, float* __restrict__ target_of, int stride, int counted) {
  LEDOM_SHARED(ReduceScratch, scratch);
  const int64_t row = blockIdx.x;
  const T* values = logits + row * stride;
  const int groups = (counted + PACK - 1) / PACK;
  float largest = Max::IDENTITY, sum = 0.f;
  for (int first = threadIdx.x; first < groups; first += LOADS * THREADS) {
    uint4 packed[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++)
      if (first + i * THREADS < groups) packed[i] = load_pack(values, first + i * THREADS);
#pragma unroll
    for (int i = 0; i < LOADS; i++)
      if (first + i * THREADS < groups) add_group<T>(packed[i], counted - (first + i * THREADS) * PACK, largest, sum);
  }
  const float highest = reduce_block<Max>(largest, scratch, 0, threadIdx.x, THREADS);
  const float total = reduce_block<Sum>(sum * exp2f((largest - highest) * LOG2_E), scratch, 1, threadIdx.x, THREADS);
  if (threadIdx.x != 0) return;
  const int64_t label = labels[row];
  float target[PACK];
  const unsigned bits = label >= 0 ? reinterpret_cast<const uint16_t*>(values)[label] : 0u;
  Pack<T>::unpack(make_uint4(bits, 0u, 0u, 0u), target);
  largest_of[row] = highest;
  sum_of[row] = total;
  target_of[row] = target[0];
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    cross_entropy_gradient(const int64_t* __restrict__ labels, const float* __restrict__ log_z_of,
                           const float* __restrict__ from_softmax_of, const float* __restrict__ from_loss_of, T* logits, int stride,
                           int counted) {
  const int64_t row = blockIdx.x;
  T* values = logits + row * stride;
  const int groups = stride / PACK, label = static_cast<int>(labels[row]);
  const float log_z = log_z_of[row], from_softmax = from_softmax_of[row], from_loss = from_loss_of[row];
  for (int group = threadIdx.x; group < groups; group += THREADS) {
    float gradient[PACK];
    const int start = group * PACK;
    uint4 packed = make_uint4(0u, 0u, 0u, 0u);
    if (start < counted) packed = load_pack(values, group);  // padding is not read
    Pack<T>::unpack(packed, gradient);
#pragma unroll
    for (int i = 0; i < PACK; i++) {
      const float share = exp2f((gradient[i] - log_z) * LOG2_E) * from_softmax;
      gradient[i] = start + i >= counted ? 0.f : start + i == label ? share - from_loss : share;
    }
    store_pack(values, group, Pack<T>::pack(gradient));
  }
}

bool is_shape(int64_t rows, int stride, int counted) {
  return rows >= 0 && rows <= 0x7FFFFFFF && stride > 0 && stride % PACK == 0 && counted > 0 && counted <= stride;
}

}  // namespace
}  // namespace ledom

LEDOM_API int ledom_cross_entropy_terms(const void* logits, const void* labels, void* largest, void* sums, void* targets,
                                        int64_t rows, int stride, int counted, int dtype, void* stream) {
  using namespace ledom;
  if (!is_shape(rows, stride, counted)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (!is_aligned(logits) || !is_aligned(labels) || !is_aligned(largest) || !is_aligned(sums) || !is_aligned(targets))
    return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(&cross_entropy_terms<T>, dim3(static_cast<unsigned>(rows)), dim3(THREADS), stream, static_cast<const T*>(logits),
                  static_cast<const int64_t*>(labels), static_cast<float*>(largest), static_cast<float*>(sums),
                  static_cast<float*>(targets), stride, counted);
  });
}

LEDOM_API int ledom_cross_entropy_gradient(const void* labels, const void* log_z, const void* from_softmax, const void* from_loss,
                                           void* logits, int64_t rows, int stride, int counted, int dtype, void* stream) {
  using namespace ledom;
  if (!is_shape(rows, stride, counted)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (!is_aligned(labels) || !is_aligned(log_z) || !is_aligned(from_softmax) || !is_aligned(from_loss) || !is_aligned(logits))
    return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(&cross_entropy_gradient<T>, dim3(static_cast<unsigned>(rows)), dim3(THREADS), stream,
                  static_cast<const int64_t*>(labels), static_cast<const float*>(log_z), static_cast<const float*>(from_softmax),
                  static_cast<const float*>(from_loss), static_cast<T*>(logits), stride, counted);
  });
}
