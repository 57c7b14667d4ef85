// The pointwise operators of a training step on a CPU, each over rows [begin, end) of its arrays, fp32 inside.
//
// One file for each instruction set includes this one (baseline.cpp, avx2.cpp, avx512.cpp); table.h describes the operators and their
// arrays. Rows are independent, so their division among threads does not change the result. Sums over rows are made in blocks whose
// size does not depend on the number of threads.
#pragma once
#include <cmath>

#include "table.h"
#include "vectors.h"

namespace ledom::LEDOM_ISA {

template <class T>
void rms_norm_forward(const RmsNorm& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t row = begin; row < end; row++) {
    const T* x = static_cast<const T*>(a.x) + row * a.hidden;
    T* y = static_cast<T*>(a.y) + row * a.hidden;
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + row * a.hidden;
      T* added = static_cast<T*>(a.sum) + row * a.hidden;
      over(a.hidden, [&](int64_t i, auto count) { store(added + i, load(x + i, count) + load(residual + i, count), count); });
      x = added;
    }
    Floats squares{};
    over(a.hidden, [&](int64_t i, auto count) {
      const Floats v = load(x + i, count);
      squares += v * v;
    });
    const float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(a.hidden) + a.eps);
    over(a.hidden, [&](int64_t i, auto count) { store(y + i, load(x + i, count) * inverse * load(weight + i, count), count); });
  }
}

template <class T>
void rms_norm_backward(const RmsNormGradient& a, int64_t begin, int64_t end) {  // begin and end count blocks of rows
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t block = begin; block < end; block++) {
    float* weight_sums = a.weight_sums + block * a.hidden;
    std::memset(weight_sums, 0, sizeof(float) * a.hidden);
    const int64_t last = (block + 1) * kNormBlockRows < a.rows ? (block + 1) * kNormBlockRows : a.rows;
    for (int64_t row = block * kNormBlockRows; row < last; row++) {
      const T *x = static_cast<const T*>(a.x) + row * a.hidden, *dy = static_cast<const T*>(a.dy) + row * a.hidden;
      const T* dsum = a.dsum ? static_cast<const T*>(a.dsum) + row * a.hidden : nullptr;
      T* dx = static_cast<T*>(a.dx) + row * a.hidden;
      Floats squares{}, products{};
      over(a.hidden, [&](int64_t i, auto count) {
        const Floats v = load(x + i, count);
        squares += v * v;
        products += v * load(dy + i, count) * load(weight + i, count);
      });
      const float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(a.hidden) + a.eps);
      const float along = sum(products) / static_cast<float>(a.hidden) * inverse * inverse * inverse;
      over(a.hidden, [&](int64_t i, auto count) {
        const Floats v = load(x + i, count), g = load(dy + i, count);
        store(weight_sums + i, load(weight_sums + i, count) + g * v * inverse, count);
        const Floats through = g * load(weight + i, count) * inverse - v * along;
        store(dx + i, dsum ? through + load(dsum + i, count) : through, count);
      });
    }
  }
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

template <class T>
void swiglu_forward(const SwiGlu& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T *gate = static_cast<const T*>(a.x) + row * 2 * a.width, *up = gate + a.width;
    T* y = static_cast<T*>(a.y) + row * a.width;
    over(a.width, [&](int64_t i, auto count) {
      const Floats g = load(gate + i, count);
      store(y + i, g * sigmoid(g) * load(up + i, count), count);
    });
  }
}

template <class T>
void swiglu_backward(const SwiGlu& a, int64_t begin, int64_t end) {  // y is the incoming gradient
  for (int64_t row = begin; row < end; row++) {
    const T *gate = static_cast<const T*>(a.x) + row * 2 * a.width, *up = gate + a.width;
    const T* dy = static_cast<const T*>(a.y) + row * a.width;
    T *dgate = static_cast<T*>(a.dx) + row * 2 * a.width, *dup = dgate + a.width;
    over(a.width, [&](int64_t i, auto count) {
      const Floats g = load(gate + i, count), d = load(dy + i, count), s = sigmoid(g);
      store(dgate + i, d * load(up + i, count) * s * (1.0f + g * (1.0f - s)), count);
      store(dup + i, d * g * s, count);
    });
  }
}

// Rotates the pairs (i, i + D/2) of one head by their angles, or back with a negative `sign`.
template <class T>
inline void turn(const T* from, T* to, const float* cosine, const float* sine, int64_t half, float sign) {
  over(half, [&](int64_t i, auto count) {
    const Floats c = load(cosine + i, count), s = load(sine + i, count) * sign;
    const Floats first = load(from + i, count), second = load(from + half + i, count);
    store(to + i, first * c - second * s, count);
    store(to + half + i, second * c + first * s, count);
  });
}

template <class T>
void rope_forward(const Rope& a, int64_t begin, int64_t end) {  // rows are (position, sample)
  const int64_t heads = a.per_group + 2, half = a.width / 2;
  for (int64_t row = begin; row < end; row++) {
    const int64_t s = row / a.batch, b = row % a.batch;
    const float *cosine = a.cosine + s * half, *sine = a.sine + s * half;
    for (int64_t group = 0; group < a.groups; group++) {
      const T* from = static_cast<const T*>(a.mixed) + (row * a.groups + group) * heads * a.width;
      T* query = static_cast<T*>(a.query) + s * a.query_strides[0] + b * a.query_strides[1];
      for (int64_t head = 0; head < a.per_group; head++) {
        turn(from + head * a.width, query + (group * a.per_group + head) * a.query_strides[2], cosine, sine, half, 1.0f);
      }
      T* key = static_cast<T*>(a.key) + s * a.key_strides[0] + b * a.key_strides[1] + group * a.key_strides[2];
      T* value = static_cast<T*>(a.value) + s * a.value_strides[0] + b * a.value_strides[1] + group * a.value_strides[2];
      turn(from + a.per_group * a.width, key, cosine, sine, half, 1.0f);
      std::memcpy(value, from + (a.per_group + 1) * a.width, sizeof(T) * a.width);
    }
  }
}

template <class T>
void rope_backward(const Rope& a, int64_t begin, int64_t end) {  // query, key, value are gradients; mixed is written
  const int64_t heads = a.per_group + 2, half = a.width / 2;
  for (int64_t row = begin; row < end; row++) {
    const int64_t s = row / a.batch, b = row % a.batch;
    const float *cosine = a.cosine + s * half, *sine = a.sine + s * half;
    for (int64_t group = 0; group < a.groups; group++) {
      T* to = static_cast<T*>(a.mixed) + (row * a.groups + group) * heads * a.width;
      const T* query = static_cast<const T*>(a.query) + s * a.query_strides[0] + b * a.query_strides[1];
      for (int64_t head = 0; head < a.per_group; head++) {
        turn(query + (group * a.per_group + head) * a.query_strides[2], to + head * a.width, cosine, sine, half, -1.0f);
      }
      const T* key = static_cast<const T*>(a.key) + s * a.key_strides[0] + b * a.key_strides[1] + group * a.key_strides[2];
      const T* value = static_cast<const T*>(a.value) + s * a.value_strides[0] + b * a.value_strides[1] + group * a.value_strides[2];
      turn(key, to + a.per_group * a.width, cosine, sine, half, -1.0f);
      std::memcpy(to + (a.per_group + 1) * a.width, value, sizeof(T) * a.width);
    }
  }
}

template <class T>
void cross_entropy_terms(const CrossEntropy& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    Floats most = spread(-__builtin_inff());
    over(a.counted, [&](int64_t i, auto count) {
      Floats v = load(logits + i, count);
      for (int lane = count; lane < kLanes; lane++) v[lane] = -__builtin_inff();
      most = larger(v, most);
    });
    float largest = most[0];
    for (int lane = 1; lane < kLanes; lane++) largest = most[lane] > largest || most[lane] != most[lane] ? most[lane] : largest;
    Floats total{};
    over(a.counted, [&](int64_t i, auto count) {
      Floats v = exponential(load(logits + i, count) - largest);
      for (int lane = count; lane < kLanes; lane++) v[lane] = 0;
      total += v;
    });
    a.largest[row] = largest;
    a.sums[row] = sum(total);
    const int64_t label = a.labels[row];
    a.targets[row] = label < 0 ? 0.0f : load(logits + label, 1)[0];
  }
}

template <class T>
void cross_entropy_gradient(const CrossEntropyGradient& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    T* logits = static_cast<T*>(a.logits) + row * a.stride;
    const float log_z = a.log_z[row], scale = a.from_softmax[row];
    const int64_t label = a.labels[row];
    const float at_label = label < 0 ? 0.0f : std::exp(load(logits + label, 1)[0] - log_z) * scale - a.from_loss[row];
    over(a.counted, [&](int64_t i, auto count) { store(logits + i, exponential(load(logits + i, count) - log_z) * scale, count); });
    if (label >= 0) store(logits + label, spread(at_label), 1);
    std::memset(static_cast<void*>(logits + a.counted), 0, sizeof(T) * (a.stride - a.counted));
  }
}

template <class T>
void add_into(const Sum& a, int64_t begin, int64_t end) {
  const T* more = static_cast<const T*>(a.more) + begin;
  float* sums = a.sums + begin;
  over(end - begin, [&](int64_t i, auto count) { store(sums + i, load(sums + i, count) + load(more + i, count), count); });
}

template <class T>
constexpr Operators operators_of() {
  return {rms_norm_forward<T>, rms_norm_backward<T>,   swiglu_forward<T>,         swiglu_backward<T>, rope_forward<T>,
          rope_backward<T>,    cross_entropy_terms<T>, cross_entropy_gradient<T>, add_into<T>};
}

Table table() { return {{operators_of<float>(), operators_of<BFloat16>()}}; }

}  // namespace ledom::LEDOM_ISA
