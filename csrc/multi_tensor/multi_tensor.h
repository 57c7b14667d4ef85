// AdamW, the norm of gradients and scaling over thousands of tensors, in one or two launches.
//
// `chunks` has the addresses of a list's tensors: int64 [num_chunks, 1 + lists], contiguous. A row describes a chunk of one tensor: its
// number of elements (below 2^31), and for each list, in the order below, its offset in bytes from the list's pointer (may be
// negative). A chunk of a multiple of 8 elements that begins at a multiple of 16 bytes in all lists is moved 128 bits at a time; any
// other is correct, but slower. An element belongs to one chunk.
//
// A list is fp32, or of `dtype` if its flag is 1. Scalars are doubles: in fp32, 1 - 0.999 would have a relative error of
// 1e-5.
#pragma once

#include "common/interface.h"

// One step of Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), decay decoupled (Loshchilov and Hutter, arXiv 1711.05101,
// algorithm 2), or as L2 if `is_decoupled` is 0 (then gradient += weight_decay * master, and master does not decay):
//
//   exp_avg    = beta1 * exp_avg + (1 - beta1) * gradient
//   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient^2
//   master     = (1 - lr * weight_decay) * master - lr / correction1 * exp_avg / (sqrt(exp_avg_sq / correction2) + eps)
//   weight     = master, rounded
//
// correctionN is 1 - betaN^step, or 1. Lists: gradients (fp32, or dtype if `gradients_are_16_bit`), exp_avgs, exp_avg_sqs, masters
// (fp32), weights (dtype; null if masters are the weights, and then its column is not used).
LEDOM_API int ledom_multi_tensor_adamw(const void* chunks, const void* gradients, void* exp_avgs, void* exp_avg_sqs, void* masters,
                                       void* weights, double lr, double beta1, double beta2, double eps, double weight_decay,
                                       double correction1, double correction2, int64_t num_chunks, int is_decoupled,
                                       int gradients_are_16_bit, int dtype, void* stream);

// norm fp32 [1] = sqrt(sum of squares over a list); partials fp32 [num_chunks]: a sum for each row. They are added in the order of the rows.
LEDOM_API int ledom_multi_tensor_norm(const void* chunks, const void* tensors, void* norm, void* partials, int64_t num_chunks,
                                      int are_16_bit, int dtype, void* stream);

// target = source * scale, rounded to the target's type. Lists: sources, targets, which may be the sources.
LEDOM_API int ledom_multi_tensor_scale(const void* chunks, const void* sources, void* targets, double scale, int64_t num_chunks,
                                       int sources_are_16_bit, int targets_are_16_bit, int dtype, void* stream);
