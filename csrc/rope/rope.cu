// RoPE; formula and layouts are in rope.h. 16-bit in and out, fp32 inside.
//
// Work: a block processes blockDim.z positions of the sequence, with all heads of all their tokens. It first writes the cosines and
// sines of its positions to shared memory, each once. Then a thread keeps those of eight angles and loops over heads: threadIdx.x is the
// group of angles, threadIdx.y the first head, threadIdx.z the position. A thread reads only the values that it overwrites.
//
// All layouts have the same form: a token has groups of heads, a group has queries and possibly a key and a value, and each of the three
// has its own memory and strides.
#include "rope/rope.h"

#include "common/pack.h"

namespace ledom {
namespace {

constexpr int THREADS = 128, MAX_ROTATED = 512;
constexpr int TABLE = THREADS * PACK;  // angles of a block

// One of query, key, value: element 0 of group g, head h of token t is at t * token + g * group + h * head_dim.
template <class T>
struct Part {
  T* base;
  int64_t token, group;
};

template <class T>
struct Heads {
  Part<T> query, key, value;
};

struct Shape {
  int64_t length;
  int batch, groups, queries, in_group, head_dim, rotated;  // in_group: queries + 2, or queries without key and value
};

// Sine and cosine for |angle| < 2^22: the angle less a multiple of pi / 2 (Cody and Waite's reduction, pi / 2 in three floats), then
// polynomials on [-pi/4, pi/4]; absolute error below 2^-23. sincosf is correct as well, but keeps an array of its slow path in local memory.
__device__ __forceinline__ void sine_and_cosine(float angle, float& sine, float& cosine) {
  const float quarters = rintf(angle * 0.636619772f);
  float r = fmaf(quarters, -1.57079625f, angle);
  r = fmaf(quarters, -7.54978942e-08f, r);
  r = fmaf(quarters, -5.39030253e-15f, r);
  const float square = r * r;
  float s = fmaf(fmaf(-1.95152959e-4f, square, 8.33216087e-3f), square, -1.66666546e-1f);
  s = fmaf(s * square, r, r);
  float c = fmaf(fmaf(2.44331571e-5f, square, -1.38873162e-3f), square, 4.16666456e-2f);
  c = fmaf(c, square, -0.5f);
  c = fmaf(c, square, 1.f);
  const int quadrant = static_cast<int>(quarters);
  sine = quadrant & 1 ? c : s;
  cosine = quadrant & 1 ? s : c;
  if (quadrant & 2) sine = -sine;
  if ((quadrant + 1) & 2) cosine = -cosine;
}

template <class T>
__device__ __forceinline__ void rotate(uint4& first, uint4& second, const float (&cosines)[PACK], const float (&sines)[PACK]) {
  float a[PACK], b[PACK];
  Pack<T>::unpack(first, a);
  Pack<T>::unpack(second, b);
#pragma unroll
  for (int i = 0; i < PACK; i++) {
    const float x = a[i], y = b[i];
    a[i] = x * cosines[i] - y * sines[i];
    b[i] = y * cosines[i] + x * sines[i];
  }
  first = Pack<T>::pack(a);
  second = Pack<T>::pack(b);
}

// Eight floats from shared memory.
__device__ __forceinline__ void load_floats(const float* from, float (&values)[PACK]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float4 quad = reinterpret_cast<const float4*>(from)[i];
    values[4 * i] = quad.x;
    values[4 * i + 1] = quad.y;
    values[4 * i + 2] = quad.z;
    values[4 * i + 3] = quad.w;
  }
}

// Cosines and sines of the block's positions, four angles per thread and pass.
__device__ __forceinline__ void fill_table(const float* freqs, const Shape& shape, int64_t position, float scale, float sign,
                                           float* cosines, float* sines) {
  const int quads = shape.rotated / 8, positions = blockDim.z;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  for (int i = thread; i < quads * positions; i += threads) {
    const int row = i / quads, quad = i - row * quads;
    if (position + row >= shape.length) break;
    const float4 angles = reinterpret_cast<const float4*>(freqs + (position + row) * shape.rotated)[quad];
    float4 s, c;
    sine_and_cosine(angles.x, s.x, c.x);
    sine_and_cosine(angles.y, s.y, c.y);
    sine_and_cosine(angles.z, s.z, c.z);
    sine_and_cosine(angles.w, s.w, c.w);
    const float factor = scale * sign;
    reinterpret_cast<float4*>(cosines)[i] = make_float4(c.x * scale, c.y * scale, c.z * scale, c.w * scale);
    reinterpret_cast<float4*>(sines)[i] = make_float4(s.x * factor, s.y * factor, s.z * factor, s.w * factor);
  }
}

template <class T>
__device__ __forceinline__ T* place(const Heads<T>& heads, int64_t token, int group, int slot, const Shape& shape) {
  const bool is_query = slot < shape.queries, is_key = slot == shape.queries;
  T* base = is_query ? heads.query.base : is_key ? heads.key.base : heads.value.base;
  const int64_t of_token = is_query ? heads.query.token : is_key ? heads.key.token : heads.value.token;
  const int64_t of_group = is_query ? heads.query.group : is_key ? heads.key.group : heads.value.group;
  return base + token * of_token + group * of_group + (is_query ? slot * shape.head_dim : 0);
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    rope(Heads<const T> input, Heads<T> output, const float* __restrict__ freqs, Shape shape, float scale, float sign) {
  LEDOM_SHARED(float4[TABLE / 4], cosine_table);
  LEDOM_SHARED(float4[TABLE / 4], sine_table);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * blockDim.z, position = begin + threadIdx.z;
  fill_table(freqs, shape, begin, scale, sign, &cosine_table[0].x, &sine_table[0].x);
  __syncthreads();
  if (position >= shape.length) return;
  const int lane = threadIdx.x, half = shape.rotated / 2;
  float cosines[PACK], sines[PACK];
  load_floats(&cosine_table[0].x + threadIdx.z * half + lane * PACK, cosines);
  load_floats(&sine_table[0].x + threadIdx.z * half + lane * PACK, sines);
  const int heads = shape.groups * shape.in_group;
  for (int unit = threadIdx.y; unit < shape.batch * heads; unit += blockDim.y) {
    const int sample = unit / heads, head = unit - sample * heads;
    const int group = head / shape.in_group, slot = head - group * shape.in_group;
    const int64_t token = position * shape.batch + sample;
    const T* from = place(input, token, group, slot, shape);
    T* to = place(output, token, group, slot, shape);
    const bool is_rotated = slot <= shape.queries;
    if (is_rotated) {
      uint4 first = load_pack(from, lane), second = load_pack(from + half, lane);
      rotate<T>(first, second, cosines, sines);
      store_pack(to, lane, first);
      store_pack(to + half, lane, second);
    }
    if (from != to)
      for (int i = (is_rotated ? shape.rotated / PACK : 0) + lane; i < shape.head_dim / PACK; i += blockDim.x)
        store_pack(to, i, load_pack(from, i));
  }
}

// Query, key and value inside the fused projection.
template <class T>
Heads<T> packed_heads(T* qkv, const Shape& shape) {
  const int64_t group = static_cast<int64_t>(shape.in_group) * shape.head_dim, token = shape.groups * group;
  T* key = qkv + shape.queries * shape.head_dim;
  return {{qkv, token, group}, {key, token, group}, {key + shape.head_dim, token, group}};
}

// Query, key and value as three contiguous tensors.
template <class T>
Heads<T> separate_heads(T* query, T* key, T* value, const Shape& shape) {
  const int64_t of_key = shape.head_dim, of_query = of_key * shape.queries;
  return {{query, shape.groups * of_query, of_query}, {key, shape.groups * of_key, of_key}, {value, shape.groups * of_key, of_key}};
}

bool is_shape(const Shape& shape) {
  const int64_t units = static_cast<int64_t>(shape.batch) * shape.groups * shape.in_group;
  return shape.length >= 0 && shape.length <= 0x7FFFFFFF && shape.batch > 0 && shape.groups > 0 && shape.queries > 0 &&
         units <= 0x3FFFFFFF && shape.rotated > 0 && shape.rotated % (2 * PACK) == 0 && shape.rotated <= MAX_ROTATED &&
         shape.rotated <= shape.head_dim && shape.head_dim % PACK == 0;
}

template <class T>
int start(const Heads<const T>& input, const Heads<T>& output, const void* freqs, const Shape& shape, float scale, int inverse,
          void* stream) {
  const unsigned units = static_cast<unsigned>(shape.batch * shape.groups * shape.in_group), x = shape.rotated / (2 * PACK);
  const unsigned y = units < THREADS / x ? units : THREADS / x, z = THREADS / (x * y);
  const unsigned blocks = static_cast<unsigned>((shape.length + z - 1) / z);
  return launch(&rope<T>, dim3(blocks), dim3(x, y, z), stream, input, output, static_cast<const float*>(freqs), shape, scale,
                inverse ? -1.f : 1.f);
}

}  // namespace
}  // namespace ledom

LEDOM_API int ledom_rope(const void* input, const void* freqs, void* output, float scale, int64_t length, int batch, int heads,
                         int head_dim, int rotated, int64_t input_token_stride, int64_t input_head_stride,
                         int64_t output_token_stride, int64_t output_head_stride, int inverse, int dtype, void* stream) {
  using namespace ledom;
  const Shape shape{length, batch, heads, 1, 1, head_dim, rotated};
  const bool equal = input_token_stride == output_token_stride && input_head_stride == output_head_stride;
  if (!is_shape(shape) || (input == output && !equal)) return cudaErrorInvalidValue;
  if ((input_token_stride | input_head_stride | output_token_stride | output_head_stride) % PACK) return cudaErrorInvalidValue;
  if (length == 0) return cudaSuccess;
  if (!is_aligned(input) || !is_aligned(freqs) || !is_aligned(output)) return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Part<const T> from{static_cast<const T*>(input), input_token_stride, input_head_stride};
    const Part<T> to{static_cast<T*>(output), output_token_stride, output_head_stride};
    return start<T>({from, from, from}, {to, to, to}, freqs, shape, scale, inverse, stream);
  });
}

LEDOM_API int ledom_rope_qkv(void* qkv, const void* freqs, float scale, int64_t length, int batch, int groups, int queries,
                             int head_dim, int rotated, int inverse, int dtype, void* stream) {
  using namespace ledom;
  const Shape shape{length, batch, groups, queries, queries + 2, head_dim, rotated};
  if (!is_shape(shape)) return cudaErrorInvalidValue;
  if (length == 0) return cudaSuccess;
  if (!is_aligned(qkv) || !is_aligned(freqs)) return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return start<T>(packed_heads(static_cast<const T*>(qkv), shape), packed_heads(static_cast<T*>(qkv), shape), freqs, shape, scale,
                    inverse, stream);
  });
}

LEDOM_API int ledom_rope_split_qkv(const void* qkv, const void* freqs, void* query, void* key, void* value, float scale,
                                   int64_t length, int batch, int groups, int queries, int head_dim, int rotated, int inverse,
                                   int dtype, void* stream) {
  using namespace ledom;
  const Shape shape{length, batch, groups, queries, queries + 2, head_dim, rotated};
  if (!is_shape(shape)) return cudaErrorInvalidValue;
  if (length == 0) return cudaSuccess;
  if (!is_aligned(qkv) || !is_aligned(freqs) || !is_aligned(query) || !is_aligned(key) || !is_aligned(value))
    return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto parts = separate_heads(static_cast<T*>(query), static_cast<T*>(key), static_cast<T*>(value), shape);
    return start<T>(packed_heads(static_cast<const T*>(qkv), shape), parts, freqs, shape, scale, inverse, stream);
  });
}

LEDOM_API int ledom_rope_join_qkv(const void* query, const void* key, const void* value, const void* freqs, void* qkv, float scale,
                                  int64_t length, int batch, int groups, int queries, int head_dim, int rotated, int inverse,
                                  int dtype, void* stream) {
  using namespace ledom;
  const Shape shape{length, batch, groups, queries, queries + 2, head_dim, rotated};
  if (!is_shape(shape)) return cudaErrorInvalidValue;
  if (length == 0) return cudaSuccess;
  if (!is_aligned(qkv) || !is_aligned(freqs) || !is_aligned(query) || !is_aligned(key) || !is_aligned(value))
    return cudaErrorMisalignedAddress;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto parts =
        separate_heads(static_cast<const T*>(query), static_cast<const T*>(key), static_cast<const T*>(value), shape);
    return start<T>(parts, packed_heads(static_cast<T*>(qkv), shape), freqs, shape, scale, inverse, stream);
  });
}
