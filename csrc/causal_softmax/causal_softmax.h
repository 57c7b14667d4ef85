// Scaled causal softmax of attention scores, within a sample or a document.
//
//   output = softmax(scale * scores) over the visible keys of a query, 0 elsewhere
//
// Key k is visible to query q if k <= q + keys - queries and, with documents, documents[b, k] equals that of the last visible key.
// Numbers of documents must not decrease in a sample (a document is one run of positions).
//
// scores, output [batch, heads, queries, keys] of `dtype`, contiguous, 16-byte aligned; keys % 8 == 0, queries <= keys, batch and
// heads <= 65535. documents int32 [batch, keys], or null.
#pragma once

#include "common/interface.h"

// output may be scores.
LEDOM_API int ledom_causal_softmax_forward(const void* scores, const void* documents, void* output, float scale, int64_t batch,
                                           int heads, int queries, int keys, int dtype, void* stream);

// output: the output of the forward pass. scores_gradient may be output_gradient.
LEDOM_API int ledom_causal_softmax_backward(const void* output_gradient, const void* output, const void* documents,
                                            void* scores_gradient, float scale, int64_t batch, int heads, int queries, int keys,
                                            int dtype, void* stream);
