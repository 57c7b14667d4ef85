// Operators of an optimizer's step: lists of torch tensors to the launchers of csrc/. A list's pointer is its first tensor's address,
// rounded down to 16 bytes; the table of chunks, made by megatron_ledom/ops/multi_tensor.py, has offsets from there.
#include "bindings/tensors.h"
#include "multi_tensor/multi_tensor.h"

namespace ledom {
namespace {

using Tensors = std::vector<Tensor>;

bool is_16_bit(const Tensors& tensors) { return !tensors.empty() && tensors[0].scalar_type() != ScalarType::Float; }

void* base_of(const Tensors& tensors) {
  if (tensors.empty()) return nullptr;
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(tensors[0].const_data_ptr()) / 16 * 16);
}

// Checks that every list is contiguous, of one type, and on the table's device. Returns the number of rows.
int64_t check_lists(const Tensor& chunks, std::initializer_list<const Tensors*> lists) {
  const int64_t columns = 1 + static_cast<int64_t>(lists.size());
  STD_TORCH_CHECK(chunks.scalar_type() == ScalarType::Long && chunks.dim() == 2 && chunks.size(1) == columns && chunks.is_contiguous(),
                  "expected a table int64 [chunks, 1 + lists]");
  for (const Tensors* list : lists) {
    STD_TORCH_CHECK(list->size() == (*lists.begin())->size(), "expected lists of as many tensors");
    for (const Tensor& tensor : *list) {
      STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == (*list)[0].scalar_type(), "expected contiguous tensors of one type");
      STD_TORCH_CHECK(tensor.device() == chunks.device(), "expected the table and all tensors on one device");
    }
  }
  return chunks.size(0);
}

// Returns the one 16-bit type of the lists that are not fp32; any type if all are fp32.
int dtype_of_lists(std::initializer_list<const Tensors*> lists) {
  int found = -1;
  for (const Tensors* list : lists)
    if (is_16_bit(*list)) {
      const int dtype = dtype_of((*list)[0]);
      STD_TORCH_CHECK(found == -1 || found == dtype, "expected one 16-bit type");
      found = dtype;
    }
  return found == -1 ? LEDOM_BFLOAT16 : found;
}

void multi_tensor_adamw(const Tensor& chunks, const Tensors& gradients, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                        const Tensors& masters, const Tensors& weights, double lr, double beta1, double beta2, double eps,
                        double weight_decay, double correction1, double correction2, bool is_decoupled) {
  STD_TORCH_CHECK(!is_16_bit(exp_avgs) && !is_16_bit(exp_avg_sqs) && !is_16_bit(masters), "expected masters and moments of fp32");
  STD_TORCH_CHECK(weights.empty() || is_16_bit(weights), "expected weights of a 16-bit type, or none");
  const int64_t rows = weights.empty() ? check_lists(chunks, {&gradients, &exp_avgs, &exp_avg_sqs, &masters, &masters})
                                       : check_lists(chunks, {&gradients, &exp_avgs, &exp_avg_sqs, &masters, &weights});
  const On on(chunks);
  check_launch(ledom_multi_tensor_adamw(chunks.const_data_ptr(), base_of(gradients), base_of(exp_avgs), base_of(exp_avg_sqs),
                                        base_of(masters), base_of(weights), lr, beta1, beta2, eps, weight_decay, correction1,
                                        correction2, rows, is_decoupled, is_16_bit(gradients), dtype_of_lists({&gradients, &weights}),
                                        on.stream),
               "multi_tensor_adamw");
}

Tensor multi_tensor_norm(const Tensor& chunks, const Tensors& tensors) {
  const int64_t rows = check_lists(chunks, {&tensors});
  Tensor norm = torch::stable::new_empty(chunks, {1}, ScalarType::Float);
  Tensor partials = torch::stable::new_empty(chunks, {rows}, ScalarType::Float);
  const On on(chunks);
  check_launch(ledom_multi_tensor_norm(chunks.const_data_ptr(), base_of(tensors), norm.mutable_data_ptr(), partials.mutable_data_ptr(),
                                       rows, is_16_bit(tensors), dtype_of_lists({&tensors}), on.stream),
               "multi_tensor_norm");
  return norm;
}

void multi_tensor_scale(const Tensor& chunks, const Tensors& sources, const Tensors& targets, double scale) {
  const int64_t rows = check_lists(chunks, {&sources, &targets});
  const On on(chunks);
  check_launch(ledom_multi_tensor_scale(chunks.const_data_ptr(), base_of(sources), base_of(targets), scale, rows, is_16_bit(sources),
                                        is_16_bit(targets), dtype_of_lists({&sources, &targets}), on.stream),
               "multi_tensor_scale");
}

}  // namespace
}  // namespace ledom

LEDOM_IMPLEMENT(module) {
  module.impl("multi_tensor_adamw", TORCH_BOX(&ledom::multi_tensor_adamw));
  module.impl("multi_tensor_norm", TORCH_BOX(&ledom::multi_tensor_norm));
  module.impl("multi_tensor_scale", TORCH_BOX(&ledom::multi_tensor_scale));
}
