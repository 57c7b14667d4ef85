// SwiGLU on megatron-core's fused layout (Shazeer, arXiv 2002.05202, equation 5): the last axis is [gate | up].
//
//   output = gate * sigmoid(gate) * up
//
// input [rows, 2 * width], output [rows, width] of `dtype`, contiguous, 16-byte aligned; width % 8 == 0.
#pragma once

#include "common/interface.h"

LEDOM_API int ledom_swiglu_forward(const void* input, void* output, int64_t rows, int width, int dtype, void* stream);

// Needs only the input. input_gradient [rows, 2 * width]; it may be `input`.
LEDOM_API int ledom_swiglu_backward(const void* output_gradient, const void* input, void* input_gradient, int64_t rows, int width,
                                    int dtype, void* stream);
