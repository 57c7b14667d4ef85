// Operators of a transformer layer: torch tensors to the launchers of csrc/. megatron_ledom/ops defines their schemas.
#include "bindings/tensors.h"
#include "causal_softmax/causal_softmax.h"
#include "rms_norm/rms_norm.h"
#include "rope/rope.h"
#include "swiglu/swiglu.h"

namespace ledom {
namespace {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_alike({&x, &weight});
  const int64_t rows = rows_of(x);
  STD_TORCH_CHECK(weight.numel() == x.size(-1), "weight has another size than rows");
  Tensor y = torch::stable::empty_like(x);
  const On on(x);
  check_launch(ledom_rms_norm_forward(x.const_data_ptr(), nullptr, weight.const_data_ptr(), y.mutable_data_ptr(), nullptr,
                                      static_cast<float>(eps), rows, as_int(x.size(-1), "hidden"), dtype_of(x), on.stream),
               "rms_norm");
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  check_alike({&x, &residual, &weight});
  const int64_t rows = rows_of(x);
  STD_TORCH_CHECK(weight.numel() == x.size(-1) && residual.numel() == x.numel(), "residual or weight has another size than rows");
  Tensor y = torch::stable::empty_like(x), sum = torch::stable::empty_like(x);
  const On on(x);
  check_launch(ledom_rms_norm_forward(x.const_data_ptr(), residual.const_data_ptr(), weight.const_data_ptr(), y.mutable_data_ptr(),
                                      sum.mutable_data_ptr(), static_cast<float>(eps), rows, as_int(x.size(-1), "hidden"),
                                      dtype_of(x), on.stream),
               "add_rms_norm");
  return {y, sum};
}

// dsum: the gradient of x that does not come through the norm; may be absent.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& x,
                                             const Tensor& weight, double eps) {
  check_alike({&x, &dy, &weight, dsum ? &*dsum : &x});
  const int64_t rows = rows_of(x);
  STD_TORCH_CHECK(!dsum || dsum->numel() == x.numel(), "the gradient of the sum has another size than rows");
  STD_TORCH_CHECK(weight.numel() == x.size(-1) && dy.numel() == x.numel(), "gradient or weight has another size than rows");
  Tensor dx = torch::stable::empty_like(x), dweight = torch::stable::empty_like(weight);
  if (rows == 0) return {dx, torch::stable::zero_(dweight)};
  Tensor partials = torch::stable::new_empty(x, {ledom_rms_norm_partials(rows), x.size(-1)}, ScalarType::Float);
  const On on(x);
  check_launch(ledom_rms_norm_backward(dy.const_data_ptr(), dsum ? dsum->const_data_ptr() : nullptr, x.const_data_ptr(),
                                       weight.const_data_ptr(), dx.mutable_data_ptr(), dweight.mutable_data_ptr(),
                                       partials.mutable_data_ptr(), static_cast<float>(eps), rows, as_int(x.size(-1), "hidden"), dtype_of(x), on.stream),
               "rms_norm_backward");
  return {dx, dweight};
}

Tensor swiglu(const Tensor& x) {
  check_alike({&x});
  const int64_t rows = rows_of(x), width = x.size(-1) / 2;
  STD_TORCH_CHECK(x.size(-1) == 2 * width, "expected rows of gate and up");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = width;
  Tensor y = torch::stable::new_empty(x, shape);
  const On on(x);
  check_launch(ledom_swiglu_forward(x.const_data_ptr(), y.mutable_data_ptr(), rows, as_int(width, "width"), dtype_of(x), on.stream),
               "swiglu");
  return y;
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& x) {
  check_alike({&x, &dy});
  STD_TORCH_CHECK(2 * dy.numel() == x.numel(), "gradient has another size than expected");
  Tensor dx = torch::stable::empty_like(x);
  const On on(x);
  check_launch(ledom_swiglu_backward(dy.const_data_ptr(), x.const_data_ptr(), dx.mutable_data_ptr(), rows_of(x),
                                     as_int(dy.size(-1), "width"), dtype_of(x), on.stream),
               "swiglu_backward");
  return dx;
}

// mixed [S, B, G, (R + 2) * D], angles fp32 [S, 1, 1, D].
std::tuple<Tensor, Tensor, Tensor> rope(const Tensor& mixed, const Tensor& angles) {
  check_alike({&mixed});
  STD_TORCH_CHECK(mixed.dim() == 4 && angles.size(-1) > 0, "expected [positions, batch, groups, heads * width] and angles");
  const int64_t s = mixed.size(0), b = mixed.size(1), groups = mixed.size(2), width = angles.size(-1);
  const int64_t queries = mixed.size(3) / width - 2;
  STD_TORCH_CHECK(queries > 0 && (queries + 2) * width == mixed.size(3), "heads and angles have different widths");
  check_type(angles, mixed, ScalarType::Float, s * width, "angles");
  Tensor query = torch::stable::new_empty(mixed, {s, b, groups * queries, width});
  Tensor key = torch::stable::new_empty(mixed, {s, b, groups, width}), value = torch::stable::empty_like(key);
  const On on(mixed);
  check_launch(ledom_rope_split_qkv(mixed.const_data_ptr(), angles.const_data_ptr(), query.mutable_data_ptr(), key.mutable_data_ptr(),
                                    value.mutable_data_ptr(), 1.f, s, as_int(b, "batch"), as_int(groups, "groups"),
                                    as_int(queries, "queries"), as_int(width, "width"), as_int(width, "width"), 0, dtype_of(mixed),
                                    on.stream),
               "rope");
  return {query, key, value};
}

Tensor rope_backward(const Tensor& any_query, const Tensor& any_key, const Tensor& any_value, const Tensor& angles) {
  const Tensor query = torch::stable::contiguous(any_query), key = torch::stable::contiguous(any_key),
               value = torch::stable::contiguous(any_value);  // attention returns them in another memory order
  check_alike({&query, &key, &value});
  STD_TORCH_CHECK(key.dim() == 4 && query.dim() == 4 && value.numel() == key.numel(), "expected [positions, batch, heads, width]");
  const int64_t s = key.size(0), b = key.size(1), groups = key.size(2), width = key.size(3), queries = query.size(2) / groups;
  STD_TORCH_CHECK(query.numel() == key.numel() * queries, "query and key do not belong together");
  check_type(angles, key, ScalarType::Float, s * width, "angles");
  Tensor mixed = torch::stable::new_empty(key, {s, b, groups, (queries + 2) * width});
  const On on(key);
  check_launch(ledom_rope_join_qkv(query.const_data_ptr(), key.const_data_ptr(), value.const_data_ptr(), angles.const_data_ptr(),
                                   mixed.mutable_data_ptr(), 1.f, s, as_int(b, "batch"), as_int(groups, "groups"),
                                   as_int(queries, "queries"), as_int(width, "width"), as_int(width, "width"), 1, dtype_of(key),
                                   on.stream),
               "rope_backward");
  return mixed;
}

const void* documents_of(const Tensor& scores, const std::optional<Tensor>& documents) {
  if (!documents) return nullptr;
  check_type(*documents, scores, ScalarType::Int, scores.size(0) * scores.size(3), "documents");
  return documents->const_data_ptr();
}

// scores [B, H, queries, keys], documents int32 [B, keys] or none.
Tensor causal_softmax(const Tensor& scores, const std::optional<Tensor>& documents, double scale) {
  check_alike({&scores});
  STD_TORCH_CHECK(scores.dim() == 4, "expected scores [batch, heads, queries, keys]");
  Tensor output = torch::stable::empty_like(scores);
  const On on(scores);
  check_launch(ledom_causal_softmax_forward(scores.const_data_ptr(), documents_of(scores, documents), output.mutable_data_ptr(),
                                            static_cast<float>(scale), scores.size(0), as_int(scores.size(1), "heads"),
                                            as_int(scores.size(2), "queries"), as_int(scores.size(3), "keys"), dtype_of(scores),
                                            on.stream),
               "causal_softmax");
  return output;
}

Tensor causal_softmax_backward(const Tensor& gradient, const Tensor& output, const std::optional<Tensor>& documents, double scale) {
  check_alike({&output, &gradient});
  STD_TORCH_CHECK(output.dim() == 4 && gradient.numel() == output.numel(), "expected gradients [batch, heads, queries, keys]");
  Tensor scores = torch::stable::empty_like(output);
  const On on(output);
  check_launch(ledom_causal_softmax_backward(gradient.const_data_ptr(), output.const_data_ptr(), documents_of(output, documents),
                                             scores.mutable_data_ptr(), static_cast<float>(scale), output.size(0),
                                             as_int(output.size(1), "heads"), as_int(output.size(2), "queries"),
                                             as_int(output.size(3), "keys"), dtype_of(output), on.stream),
               "causal_softmax_backward");
  return scores;
}

}  // namespace
}  // namespace ledom

LEDOM_IMPLEMENT(module) {
  module.impl("rms_norm", TORCH_BOX(&ledom::rms_norm));
  module.impl("add_rms_norm", TORCH_BOX(&ledom::add_rms_norm));
  module.impl("rms_norm_backward", TORCH_BOX(&ledom::rms_norm_backward));
  module.impl("swiglu", TORCH_BOX(&ledom::swiglu));
  module.impl("swiglu_backward", TORCH_BOX(&ledom::swiglu_backward));
  module.impl("rope", TORCH_BOX(&ledom::rope));
  module.impl("rope_backward", TORCH_BOX(&ledom::rope_backward));
  module.impl("causal_softmax", TORCH_BOX(&ledom::causal_softmax));
  module.impl("causal_softmax_backward", TORCH_BOX(&ledom::causal_softmax_backward));
}
