// Operators of the loss: torch tensors to the launchers of csrc/.
#include "bindings/tensors.h"
#include "cross_entropy/cross_entropy.h"

namespace ledom {
namespace {

void check_logits(const Tensor& logits, const Tensor& labels) {
  check_alike({&logits});
  STD_TORCH_CHECK(logits.dim() == 2, "expected logits [tokens, vocabulary]");
  check_type(labels, logits, ScalarType::Long, logits.size(0), "labels");
}

// logits [N, V], labels int64 [N]; largest, sums and targets fp32 [N].
std::tuple<Tensor, Tensor, Tensor> cross_entropy_terms(const Tensor& logits, const Tensor& labels, int64_t counted) {
  check_logits(logits, labels);
  const auto new_terms = [&] { return torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float); };
  Tensor largest = new_terms(), sums = new_terms(), targets = new_terms();
  const On on(logits);
  check_launch(ledom_cross_entropy_terms(logits.const_data_ptr(), labels.const_data_ptr(), largest.mutable_data_ptr(),
                                         sums.mutable_data_ptr(), targets.mutable_data_ptr(), logits.size(0),
                                         as_int(logits.size(1), "the vocabulary"), as_int(counted, "counted"), dtype_of(logits),
                                         on.stream),
               "cross_entropy_terms");
  return {largest, sums, targets};
}

void cross_entropy_gradient(Tensor logits, const Tensor& labels, const Tensor& log_z, const Tensor& from_softmax,
                            const Tensor& from_loss, int64_t counted) {
  check_logits(logits, labels);
  check_type(log_z, logits, ScalarType::Float, logits.size(0), "log_z");
  check_type(from_softmax, logits, ScalarType::Float, logits.size(0), "from_softmax");
  check_type(from_loss, logits, ScalarType::Float, logits.size(0), "from_loss");
  const On on(logits);
  check_launch(ledom_cross_entropy_gradient(labels.const_data_ptr(), log_z.const_data_ptr(), from_softmax.const_data_ptr(),
                                            from_loss.const_data_ptr(), logits.mutable_data_ptr(), logits.size(0),
                                            as_int(logits.size(1), "the vocabulary"), as_int(counted, "counted"), dtype_of(logits),
                                            on.stream),
               "cross_entropy_gradient");
}

}  // namespace
}  // namespace ledom

LEDOM_IMPLEMENT(module) {
  module.impl("cross_entropy_terms", TORCH_BOX(&ledom::cross_entropy_terms));
  module.impl("cross_entropy_gradient", TORCH_BOX(&ledom::cross_entropy_gradient));
}
