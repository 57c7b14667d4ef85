// Python bindings of the CPU operators. They get addresses and sizes, which megatron_ledom/ops has checked. They use torch's threads
// through the address of torch_parallel_for; without it everything runs on the calling thread.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "table.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
constexpr int64_t kGrain = 1 << 14;  // fewest elements for a thread

struct State {
  ledom::Table table = ledom::baseline::table();
  std::string isa = "baseline";
  ParallelFor parallel_for = nullptr;
};

State& state() {
  static State it;
  return it;
}

void use_isa(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && (isa == "best" || isa == "avx512")) {
    state().table = ledom::avx512::table(), state().isa = "avx512";
    return;
  }
  if (has_avx2 && (isa == "best" || isa == "avx2")) {
    state().table = ledom::avx2::table(), state().isa = "avx2";
    return;
  }
#endif
  if (isa != "best" && isa != "baseline") throw std::invalid_argument("this machine has no " + isa);
  state().table = ledom::baseline::table(), state().isa = "baseline";
}

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Arguments>
void run(ledom::Operator<Arguments> each, const Arguments& arguments, int64_t rows, int64_t elements_a_row) {
  struct Context {
    ledom::Operator<Arguments> each;
    const Arguments& arguments;
  } context{each, arguments};
  py::gil_scoped_release release;
  if (state().parallel_for == nullptr) return each(arguments, 0, rows);
  const int64_t grain = elements_a_row >= kGrain ? 1 : kGrain / (elements_a_row > 0 ? elements_a_row : 1);
  const Body body = [](int64_t begin, int64_t end, void* it) {
    const Context& c = *static_cast<const Context*>(it);
    c.each(c.arguments, begin, end);
  };
  if (state().parallel_for(0, rows, grain, body, &context)) throw std::runtime_error("torch_parallel_for failed");
}

const ledom::Operators& of(bool is_bf16) { return state().table.of[is_bf16]; }

using Strides = std::array<int64_t, 3>;

void rope(bool is_bf16, bool backward, std::array<Address, 6> arrays, std::array<int64_t, 5> sizes, const Strides& query,
          const Strides& key, const Strides& value) {
  ledom::Rope a{at<void>(arrays[0]), at<void>(arrays[1]),        at<void>(arrays[2]),        at<void>(arrays[3]),
                at<const float>(arrays[4]), at<const float>(arrays[5]), sizes[1], sizes[2], sizes[3], sizes[4], {}, {}, {}};
  for (int i = 0; i < 3; i++) a.query_strides[i] = query[i], a.key_strides[i] = key[i], a.value_strides[i] = value[i];
  run(backward ? of(is_bf16).rope_backward : of(is_bf16).rope_forward, a, sizes[0] * sizes[1], sizes[2] * (sizes[3] + 2) * sizes[4]);
}

void define_norm_and_activation(py::module_& m) {
  // Address 0 of residual, sum or dsum means none.
  m.def("rms_norm_forward", [](bool is_bf16, Address x, Address residual, Address weight, Address y, Address sum, int64_t rows,
                               int64_t hidden, float eps) {
    run(of(is_bf16).rms_norm_forward,
        {at<void>(x), at<void>(residual), at<void>(weight), at<void>(y), at<void>(sum), hidden, eps}, rows, hidden);
  });
  m.def("rms_norm_backward", [](bool is_bf16, Address dy, Address dsum, Address x, Address weight, Address dx, Address sums,
                                int64_t rows, int64_t hidden, float eps) {
    const int64_t blocks = (rows + ledom::kNormBlockRows - 1) / ledom::kNormBlockRows;
    run(of(is_bf16).rms_norm_backward,
        {at<void>(dy), at<void>(dsum), at<void>(x), at<void>(weight), at<void>(dx), at<float>(sums), rows, hidden, eps}, blocks,
        hidden * ledom::kNormBlockRows);
  });
  m.def("swiglu_forward", [](bool is_bf16, Address x, Address y, int64_t rows, int64_t width) {
    run(of(is_bf16).swiglu_forward, {at<void>(x), at<void>(y), nullptr, width}, rows, 2 * width);
  });
  m.def("swiglu_backward", [](bool is_bf16, Address x, Address dy, Address dx, int64_t rows, int64_t width) {
    run(of(is_bf16).swiglu_backward, {at<void>(x), at<void>(dy), at<void>(dx), width}, rows, 2 * width);
  });
}

void define_loss_and_sums(py::module_& m) {
  m.def("cross_entropy_terms", [](bool is_bf16, Address logits, Address labels, Address largest, Address sums, Address targets,
                                  int64_t rows, int64_t stride, int64_t counted) {
    run(of(is_bf16).cross_entropy_terms,
        {at<void>(logits), at<int64_t>(labels), at<float>(largest), at<float>(sums), at<float>(targets), stride, counted}, rows, stride);
  });
  m.def("cross_entropy_gradient", [](bool is_bf16, Address logits, Address labels, Address log_z, Address from_softmax,
                                     Address from_loss, int64_t rows, int64_t stride, int64_t counted) {
    run(of(is_bf16).cross_entropy_gradient,
        {at<void>(logits), at<int64_t>(labels), at<float>(log_z), at<float>(from_softmax), at<float>(from_loss), stride, counted}, rows,
        stride);
  });
  m.def("add_into", [](bool is_bf16, Address sums, Address more, int64_t elements) {
    run(of(is_bf16).add_into, {at<float>(sums), at<void>(more)}, elements, 1);
  });
}

}  // namespace

PYBIND11_MODULE(_cpu_ops, m) {
  m.doc() = "Pointwise operators on CPU tensors; see csrc/cpu_ops";
  m.attr("NORM_BLOCK_ROWS") = ledom::kNormBlockRows;
  m.def("use_isa", &use_isa);
  m.def("isa", [] { return state().isa; });
  m.def("use_parallel_for", [](Address address) { state().parallel_for = reinterpret_cast<ParallelFor>(address); });
  define_norm_and_activation(m);
  m.def("rope", &rope);
  define_loss_and_sums(m);
  use_isa("best");
}
