// Scaled causal softmax, forward and backward; formula and layout are in causal_softmax.h. 16-bit in and out, fp32 inside.
//
// Work: a warp processes a row of up to 2,048 keys, a block a longer one; the grid is query, head and sample. A thread processes
// groups of eight neighbouring keys and keeps HELD of them in registers until they are written, so that a row of up to 8,192 keys is
// read once. Groups that are not visible to the query are written, but not read.
//
// The whole warp searches for the beginning of a query's document, 32 probes at a time: three reads for 32,768 keys.
//
//   scores_gradient = scale * output * (output_gradient - sum(output * output_gradient))
#include "causal_softmax/causal_softmax.h"

#include "common/pack.h"
#include "common/reduce.h"

namespace ledom {
namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int WARP_THREADS = 128, BLOCK_THREADS = 256;
constexpr int WARP_HELD = 8, BLOCK_HELD = 4;
constexpr int LONGEST_OF_WARP = WARP * WARP_HELD * PACK, MAX_GRID_YZ = 65535;

struct Shape {
  int queries, keys;
};

// Keys [begin, end) that are visible to a query.
struct Seen {
  int begin, end;
  __device__ __forceinline__ bool has(int key) const { return key >= begin && key < end; }
};

// Returns the first position of the run of equal numbers that ends at `last`. The whole warp calls it and gets the same result.
__device__ __forceinline__ int begin_of_document(const int* documents, int last) {
  const int lane = threadIdx.x % WARP, document = documents[last];
  int low = 0, high = last;  // the answer is in [low, high]
  while (low < high) {
    const int step = (high - low + WARP - 1) / WARP;
    const int probe = min(low + lane * step, high);
    const unsigned same = __ballot_sync(ALL_LANES, documents[probe] == document);
    const int hit = same ? __ffs(static_cast<int>(same)) - 1 : WARP;  // the first probe inside the document
    high = min(low + hit * step, high);
    low = hit == 0 ? high : min(low + (hit - 1) * step + 1, high);
  }
  return high;
}

__device__ __forceinline__ Seen seen_keys(const int* documents, int query, Shape shape) {
  const int last = query + shape.keys - shape.queries;
  if (!documents) return {0, last + 1};
  return {begin_of_document(documents + static_cast<int64_t>(blockIdx.z) * shape.keys, last), last + 1};
}

__device__ __forceinline__ int64_t row_offset(int query, Shape shape) {
  return ((static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * shape.queries + query) * shape.keys;
}

// The row of this thread, and its number in the row.
template <int ROW_THREADS, int BLOCK>
struct Worker {
  int query = static_cast<int>(blockIdx.x) * (BLOCK / ROW_THREADS) + static_cast<int>(threadIdx.x) / ROW_THREADS;
  int thread = static_cast<int>(threadIdx.x) % ROW_THREADS;
};

// Eight scaled scores; -infinity where the key is not visible.
template <class T>
__device__ __forceinline__ void scaled(const uint4& packed, int group, const Seen& seen, float factor, float (&x)[PACK]) {
  Pack<T>::unpack(packed, x);
#pragma unroll
  for (int i = 0; i < PACK; i++) x[i] = seen.has(group * PACK + i) ? x[i] * factor : -INFINITY;
}

// Largest value, and the sum of 2^(x - largest), of the groups that are not in registers.
struct Running {
  float largest = Max::IDENTITY, sum = 0.f;

  __device__ __forceinline__ void add(const float (&x)[PACK]) {
    float new_largest = largest, added = 0.f;
#pragma unroll
    for (int i = 0; i < PACK; i++) new_largest = fmaxf(new_largest, x[i]);
#pragma unroll
    for (int i = 0; i < PACK; i++) added += exp2f(x[i] - new_largest);
    sum = sum * exp2f(largest - new_largest) + added;
    largest = new_largest;
  }
};

template <class T, int ROW_THREADS, int BLOCK, int HELD>
__global__ void __launch_bounds__(BLOCK, 512 / BLOCK)
    causal_softmax_forward(const T* scores, const int* __restrict__ documents, T* output, float scale, Shape shape) {
  LEDOM_SHARED(ReduceScratch, scratch);
  const Worker<ROW_THREADS, BLOCK> worker;
  if (worker.query >= shape.queries) return;  // a whole warp; a block has one row
  const Seen seen = seen_keys(documents, worker.query, shape);
  const int64_t offset = row_offset(worker.query, shape);
  const int first = worker.thread, groups = shape.keys / PACK;
  const int begin = seen.begin / PACK, end = (seen.end + PACK - 1) / PACK;
  const float factor = scale * LOG2_E;
  float x[HELD][PACK];
  Running running;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int group = first + i * ROW_THREADS;
    uint4 packed = make_uint4(0u, 0u, 0u, 0u);
    if (group >= begin && group < end) packed = load_pack(scores + offset, group);
    scaled<T>(packed, group, seen, factor, x[i]);
  }
  if (ROW_THREADS > WARP)
    for (int group = first + HELD * ROW_THREADS; group < end; group += ROW_THREADS)
      if (group >= begin) {
        float values[PACK];
        scaled<T>(load_pack(scores + offset, group), group, seen, factor, values);
        running.add(values);
      }
  float largest = running.largest;
#pragma unroll
  for (int i = 0; i < HELD; i++)
#pragma unroll
    for (int j = 0; j < PACK; j++) largest = fmaxf(largest, x[i][j]);
  largest = reduce_block<Max>(largest, scratch, 0, first, ROW_THREADS);
  float sum = running.sum * exp2f(running.largest - largest);
#pragma unroll
  for (int i = 0; i < HELD; i++)
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      x[i][j] = exp2f(x[i][j] - largest);
      sum += x[i][j];
    }
  const float reciprocal = 1.f / reduce_block<Sum>(sum, scratch, 1, first, ROW_THREADS);
#pragma unroll
  for (int i = 0; i < HELD; i++) {
#pragma unroll
    for (int j = 0; j < PACK; j++) x[i][j] *= reciprocal;
    if (first + i * ROW_THREADS < groups) store_pack(output + offset, first + i * ROW_THREADS, Pack<T>::pack(x[i]));
  }
  if (ROW_THREADS > WARP)
    for (int group = first + HELD * ROW_THREADS; group < groups; group += ROW_THREADS) {
      uint4 packed = make_uint4(0u, 0u, 0u, 0u);
      if (group >= begin && group < end) packed = load_pack(scores + offset, group);
      float values[PACK];
      scaled<T>(packed, group, seen, factor, values);
#pragma unroll
      for (int j = 0; j < PACK; j++) values[j] = exp2f(values[j] - largest) * reciprocal;
      store_pack(output + offset, group, Pack<T>::pack(values));
    }
}

// Output and its gradient, packed; zeros for keys that are not visible, where the output is 0 but the gradient may be anything.
template <class T>
struct Pair {
  uint4 output, gradient;

  __device__ __forceinline__ void load(const T* outputs, const T* gradients, int group, const Seen& seen) {
    output = gradient = make_uint4(0u, 0u, 0u, 0u);
    const int begin = group * PACK;
    if (begin + PACK <= seen.begin || begin >= seen.end) return;
    output = load_pack(outputs, group);
    gradient = load_pack(gradients, group);
  }

  // For a group at an end of the visible keys.
  __device__ __forceinline__ void clear_unseen(int group, const Seen& seen) {
    const int begin = group * PACK;
    if (begin >= seen.begin && begin + PACK <= seen.end) return;
    float values[PACK];
    Pack<T>::unpack(gradient, values);
#pragma unroll
    for (int i = 0; i < PACK; i++)
      if (!seen.has(begin + i)) values[i] = 0.f;
    gradient = Pack<T>::pack(values);
  }

  // Sum of output * gradient.
  __device__ __forceinline__ float product() const {
    float a[PACK], b[PACK], total = 0.f;
    Pack<T>::unpack(output, a);
    Pack<T>::unpack(gradient, b);
#pragma unroll
    for (int i = 0; i < PACK; i++) total += a[i] * b[i];
    return total;
  }

  __device__ __forceinline__ uint4 derivative(float scale, float product) const {
    float a[PACK], b[PACK];
    Pack<T>::unpack(output, a);
    Pack<T>::unpack(gradient, b);
#pragma unroll
    for (int i = 0; i < PACK; i++) a[i] = scale * a[i] * (b[i] - product);
    return Pack<T>::pack(a);
  }
};

template <class T, int ROW_THREADS, int BLOCK, int HELD>
__global__ void __launch_bounds__(BLOCK, ROW_THREADS == WARP ? 3 : 2)
    causal_softmax_backward(const T* output_gradient, const T* __restrict__ output, const int* __restrict__ documents,
                            T* scores_gradient, float scale, Shape shape) {
  LEDOM_SHARED(ReduceScratch, scratch);
  const Worker<ROW_THREADS, BLOCK> worker;
  if (worker.query >= shape.queries) return;
  const Seen seen = seen_keys(documents, worker.query, shape);
  const int64_t offset = row_offset(worker.query, shape);
  const int first = worker.thread, groups = shape.keys / PACK;
  const int end = (seen.end + PACK - 1) / PACK;
  const T *outputs = output + offset, *gradients = output_gradient + offset;
  Pair<T> held[HELD];
  float product = 0.f;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int group = first + i * ROW_THREADS;
    held[i].load(outputs, gradients, group, seen);
  }
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    held[i].clear_unseen(first + i * ROW_THREADS, seen);
    product += held[i].product();
  }
  if (ROW_THREADS > WARP)
    for (int group = first + HELD * ROW_THREADS; group < end; group += ROW_THREADS) {
      Pair<T> pair;
      pair.load(outputs, gradients, group, seen);
      pair.clear_unseen(group, seen);
      product += pair.product();
    }
  product = reduce_block<Sum>(product, scratch, 0, first, ROW_THREADS);
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int group = first + i * ROW_THREADS;
    if (group < groups) store_pack(scores_gradient + offset, group, held[i].derivative(scale, product));
  }
  if (ROW_THREADS > WARP)
    for (int group = first + HELD * ROW_THREADS; group < groups; group += ROW_THREADS) {
      Pair<T> pair;
      pair.load(outputs, gradients, group, seen);
      pair.clear_unseen(group, seen);
      store_pack(scores_gradient + offset, group, pair.derivative(scale, product));
    }
}

bool is_shape(int64_t batch, int heads, int queries, int keys) {
  return batch >= 0 && batch <= MAX_GRID_YZ && heads > 0 && heads <= MAX_GRID_YZ && queries > 0 && queries <= keys &&
         keys % PACK == 0;
}

dim3 grid_for(int64_t batch, int heads, int queries, int keys) {
  const int rows = keys <= LONGEST_OF_WARP ? WARP_THREADS / WARP : 1;
  return dim3(static_cast<unsigned>((queries + rows - 1) / rows), static_cast<unsigned>(heads), static_cast<unsigned>(batch));
}

}  // namespace
}  // namespace ledom

LEDOM_API int ledom_causal_softmax_forward(const void* scores, const void* documents, void* output, float scale, int64_t batch,
                                           int heads, int queries, int keys, int dtype, void* stream) {
  using namespace ledom;
  if (!is_shape(batch, heads, queries, keys)) return cudaErrorInvalidValue;
  if (batch == 0) return cudaSuccess;
  if (!is_aligned(scores) || !is_aligned_or_null(documents) || !is_aligned(output)) return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool is_short = keys <= LONGEST_OF_WARP;
    const auto kernel = is_short ? &causal_softmax_forward<T, WARP, WARP_THREADS, WARP_HELD>
                                 : &causal_softmax_forward<T, BLOCK_THREADS, BLOCK_THREADS, BLOCK_HELD>;
    return launch(kernel, grid_for(batch, heads, queries, keys), dim3(is_short ? WARP_THREADS : BLOCK_THREADS), stream,
                  static_cast<const T*>(scores), static_cast<const int*>(documents), static_cast<T*>(output), scale,
                  Shape{queries, keys});
  });
}

LEDOM_API int ledom_causal_softmax_backward(const void* output_gradient, const void* output, const void* documents,
                                            void* scores_gradient, float scale, int64_t batch, int heads, int queries, int keys,
                                            int dtype, void* stream) {
  using namespace ledom;
  if (!is_shape(batch, heads, queries, keys)) return cudaErrorInvalidValue;
  if (batch == 0) return cudaSuccess;
  if (!is_aligned(output_gradient) || !is_aligned(output) || !is_aligned_or_null(documents) || !is_aligned(scores_gradient))
    return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool is_short = keys <= LONGEST_OF_WARP;
    const auto kernel = is_short ? &causal_softmax_backward<T, WARP, WARP_THREADS, WARP_HELD>
                                 : &causal_softmax_backward<T, BLOCK_THREADS, BLOCK_THREADS, BLOCK_HELD>;
    return launch(kernel, grid_for(batch, heads, queries, keys), dim3(is_short ? WARP_THREADS : BLOCK_THREADS), stream,
                  static_cast<const T*>(output_gradient), static_cast<const T*>(output), static_cast<const int*>(documents),
                  static_cast<T*>(scores_gradient), scale, Shape{queries, keys});
  });
}
