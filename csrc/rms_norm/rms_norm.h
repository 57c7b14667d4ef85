// RMSNorm (Zhang and Sennrich, arXiv 1910.07467, equation 4), alone and after a residual add.
//
//   sum    = input + residual                    rounded to the element type; sum = input without a residual
//   output = sum / sqrt(mean(sum^2) + eps) * weight
//
// input, residual, sum, output [rows, hidden] and weight [hidden] of `dtype`, contiguous, 16-byte aligned; hidden % 8 == 0.
#pragma once

#include "common/interface.h"

// `residual` and `sum` are both given or both null; `sum` may be `input` or `residual`.
LEDOM_API int ledom_rms_norm_forward(const void* input, const void* residual, const void* weight, void* output, void* sum,
                                     float eps, int64_t rows, int hidden, int dtype, void* stream);

// input: the normalised values (the sum, with a residual). sum_gradient [rows, hidden] or null: the gradient of the sum that does not
// come through the norm; it is added. input_gradient is the gradient of input and of residual; it may be output_gradient or sum_gradient.
// partials: fp32 [ledom_rms_norm_partials(rows), hidden], overwritten.
LEDOM_API int ledom_rms_norm_backward(const void* output_gradient, const void* sum_gradient, const void* input,
                                      const void* weight, void* input_gradient, void* weight_gradient, void* partials,
                                      float eps, int64_t rows, int hidden, int dtype, void* stream);

// Rows of `partials`, in which the weight's gradient is summed in a fixed order; at most 256.
LEDOM_API int64_t ledom_rms_norm_partials(int64_t rows);
