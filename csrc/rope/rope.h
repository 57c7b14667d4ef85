// Rotary position embedding (Su et al., arXiv 2104.09864, equation 34), pairing the two halves of a head as
// megatron-core does without rotary_interleaved.
//
//   out[i]        = x[i]        * cos(a[i]) - x[i + half] * sin(a[i])        half = rotated / 2, 0 <= i < half
//   out[i + half] = x[i + half] * cos(a[i]) + x[i]        * sin(a[i])        cos and sin times `scale`
//   out[i]        = x[i]                                                     rotated <= i < head_dim
//
// freqs   fp32 [length, rotated], the angles a: megatron-core's tensor, whose second half repeats the first and is not read;
//         |a| < 2^22
// tokens  [length, batch]: token s * batch + b has the angles of position s
// inverse not 0: rotates back; this is the gradient of the rotation
//
// Heads are of `head_dim` values of `dtype`, next to each other, 16-byte aligned; head_dim % 8 == 0, rotated % 16 == 0,
// rotated <= head_dim, rotated <= 512. Cosine and sine are fp32, computed once for each position.
#pragma once

#include "common/interface.h"

// input, output [length, batch, heads, head_dim]; strides in elements, multiples of 8, between tokens and between heads. output may be
// input if their strides are equal; otherwise they must not overlap.
LEDOM_API int ledom_rope(const void* input, const void* freqs, void* output, float scale, int64_t length, int batch, int heads,
                         int head_dim, int rotated, int64_t input_token_stride, int64_t input_head_stride,
                         int64_t output_token_stride, int64_t output_head_stride, int inverse, int dtype, void* stream);

// In place on megatron-core's fused projection, qkv [length, batch, groups, queries + 2, head_dim], contiguous: a group's query
// heads, its key, its value. Queries and keys are rotated, values are neither read nor written.
LEDOM_API int ledom_rope_qkv(void* qkv, const void* freqs, float scale, int64_t length, int batch, int groups, int queries,
                             int head_dim, int rotated, int inverse, int dtype, void* stream);

// The same with separate outputs: query [length, batch, groups * queries, head_dim], key and value [length, batch, groups, head_dim],
// contiguous.
LEDOM_API int ledom_rope_split_qkv(const void* qkv, const void* freqs, void* query, void* key, void* value, float scale,
                                   int64_t length, int batch, int groups, int queries, int head_dim, int rotated, int inverse,
                                   int dtype, void* stream);

// The opposite for gradients (inverse = 1): query, key and value are joined into qkv.
LEDOM_API int ledom_rope_join_qkv(const void* query, const void* key, const void* value, const void* freqs, void* qkv, float scale,
                                  int64_t length, int batch, int groups, int queries, int head_dim, int rotated, int inverse,
                                  int dtype, void* stream);
