// Arguments of the CPU operators, and the table of operators for each instruction set. T is float or bf16, the same for all arrays of
// a call; rows are contiguous.
#pragma once
#include <cstdint>

namespace ledom {

// y = x / sqrt(mean(x^2) + eps) * weight over rows of `hidden` (Zhang and Sennrich, arXiv 1910.07467, equation 4). With a residual
// x + residual, rounded to T, is written to `sum` and replaces x.
struct RmsNorm {
  const void *x, *residual, *weight;  // T [rows, hidden]; the same or null; T [hidden]
  void *y, *sum;                      // T [rows, hidden]; null without a residual
  int64_t hidden;
  float eps;
};

constexpr int64_t kNormBlockRows = 64;  // rows whose weight gradients are summed first

// dx = (dy w - x mean(dy w x) r^2) r + dsum, and each block's sum of dy x r; r = 1 / sqrt(mean(x^2) + eps). dsum: the gradient of x
// that does not come through the norm, or null.
struct RmsNormGradient {
  const void *dy, *dsum, *x, *weight;
  void* dx;
  float* weight_sums;  // [blocks of rows, hidden]
  int64_t rows, hidden;
  float eps;
};

// y = silu(gate) up, of rows [gate, up] of 2 * width (Shazeer, arXiv 2002.05202, equation 5).
struct SwiGlu {
  const void* x;  // T [rows, 2 * width]
  void* y;        // T [rows, width]: output, or the incoming gradient
  void* dx;       // T [rows, 2 * width], backward only
  int64_t width;
};

// Rotary positions (Su et al., arXiv 2104.09864, equation 34, pairs (i, i + D/2)) on the output of a QKV projection: each group's
// query heads, its key, its value. Strides are those of position, sample and head, in elements.
struct Rope {
  void* mixed;                 // T [positions, batch, groups, (per_group + 2) * width]
  void *query, *key, *value;   // T, widths contiguous
  const float *cosine, *sine;  // [positions, width / 2]
  int64_t batch, groups, per_group, width;
  int64_t query_strides[3], key_strides[3], value_strides[3];
};

// For each row's first `counted` logits: the largest, the sum of exp(logit - largest), and the logit of the label (0 for a label below 0).
struct CrossEntropy {
  const void* logits;  // T [rows, stride]
  const int64_t* labels;
  float *largest, *sums, *targets;
  int64_t stride, counted;
};

// logits = softmax * from_softmax - onehot(label) * from_loss, in place; 0 after the first `counted`.
struct CrossEntropyGradient {
  void* logits;
  const int64_t* labels;
  const float *log_z, *from_softmax, *from_loss;
  int64_t stride, counted;
};

// sums += more, element by element.
struct Sum {
  float* sums;
  const void* more;
};

template <class Arguments>
using Operator = void (*)(const Arguments&, int64_t begin, int64_t end);

struct Operators {
  Operator<RmsNorm> rms_norm_forward;
  Operator<RmsNormGradient> rms_norm_backward;
  Operator<SwiGlu> swiglu_forward, swiglu_backward;
  Operator<Rope> rope_forward, rope_backward;
  Operator<CrossEntropy> cross_entropy_terms;
  Operator<CrossEntropyGradient> cross_entropy_gradient;
  Operator<Sum> add_into;
};

struct Table {
  Operators of[2];  // float, bf16
};

namespace baseline {
Table table();
}
namespace avx2 {
Table table();
}
namespace avx512 {
Table table();
}

}  // namespace ledom
