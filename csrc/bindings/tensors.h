// Shared by all bindings: argument checks, the element type, the device and stream of a tensor.
//
// With LEDOM_EMULATED (tests) the launchers are those of the emulator, and the operators accept CPU tensors.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))  // binaries load in torch 2.10 and later
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "common/interface.h"

#ifdef LEDOM_EMULATED
#define LEDOM_DEVICE CPU
#else
#define LEDOM_DEVICE CUDA
// Defined in libtorch_cuda. Weak, so that this library also links and loads with a CPU torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

#define LEDOM_IMPLEMENT(module) LEDOM_IMPLEMENT_ON(LEDOM_DEVICE, module)  // expands the device name before it becomes a string
#define LEDOM_IMPLEMENT_ON(device, module) STABLE_TORCH_LIBRARY_IMPL(ledom, device, module)

namespace ledom {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int dtype_of(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::BFloat16) return LEDOM_BFLOAT16;
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Half, "expected a tensor of bfloat16 or float16");
  return LEDOM_FLOAT16;
}

// Checks that all are contiguous, with the type and device of the first.
inline void check_alike(std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(tensor->is_contiguous(), "expected contiguous tensors");
    STD_TORCH_CHECK(tensor->scalar_type() == first.scalar_type(), "expected tensors of one type");
    STD_TORCH_CHECK(tensor->device() == first.device(), "expected tensors on one device");
  }
}

inline void check_type(const Tensor& tensor, const Tensor& beside, ScalarType type, int64_t elements, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == elements, name,
                  " has another type, size or layout than expected");
  STD_TORCH_CHECK(tensor.device() == beside.device(), name, " is on another device");
}

inline int as_int(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value <= 0x7FFFFFFF, name, " is too large");
  return static_cast<int>(value);
}

// The product of all sizes but the last.
inline int64_t rows_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 1 && tensor.size(-1) > 0, "expected a tensor with a last axis that is not empty");
  return tensor.numel() / tensor.size(-1);
}

// Makes the tensor's device the current one during its lifetime.
struct On {
  void* stream = nullptr;
#ifdef LEDOM_EMULATED
  explicit On(const Tensor&) {}
#else
  torch::stable::accelerator::DeviceGuard guard;
  explicit On(const Tensor& tensor) : guard(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
#endif
};

inline void check_launch(int error, const char* name) {
  STD_TORCH_CHECK(error == 0, name, " was not launched: cudaError ", error);
}

}  // namespace ledom
