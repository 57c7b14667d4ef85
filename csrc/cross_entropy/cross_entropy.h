// Cross-entropy over one rank's slice of the vocabulary: the terms that ranks then add up, and the gradient in the memory of the logits.
// With log Z (computed by the caller over all ranks) the loss is log Z - target; log Z itself serves a z-loss.
//
//   largest = max_i logit_i       sum = sum_i exp(logit_i - largest)       target = logit_label, 0 for a label below 0
//   logit_i = exp(logit_i - log_z) * from_softmax - (i == label) * from_loss,  0 for i >= counted
//
// with 0 <= i < counted: the rest of a row is padding of the vocabulary.
//
// logits [rows, stride] of `dtype`, contiguous, 16-byte aligned; stride % 8 == 0, 0 < counted <= stride. labels int64 [rows], in
// [0, counted) or negative if another rank has the label. largest, sums, targets, log_z, from_softmax and from_loss: fp32 [rows].
// A row whose counted logits are all -infinity has largest = -3.4e38 and sum 0.
#pragma once

#include "common/interface.h"

LEDOM_API int ledom_cross_entropy_terms(const void* logits, const void* labels, void* largest, void* sums, void* targets,
                                        int64_t rows, int stride, int counted, int dtype, void* stream);

LEDOM_API int ledom_cross_entropy_gradient(const void* labels, const void* log_z, const void* from_softmax, const void* from_loss,
                                           void* logits, int64_t rows, int stride, int counted, int dtype, void* stream);
