// Python bindings of turn_documents. Every array is checked here for type, contiguity and size; nothing is converted silently.
#include "turn_documents.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

namespace {

void check_lengths(const Array<int64_t>& lengths, int64_t total, int64_t capacity, bool closed) {
  if (lengths.ndim() != 1) throw std::invalid_argument("lengths must be one-dimensional");
  int64_t stored = 0, turned = 0;
  for (int64_t d = 0; d < lengths.size(); d++) {
    const int64_t length = lengths.data()[d];
    if (length < 0 || length > total - stored) throw std::invalid_argument("lengths must add up to the number of ids");
    stored += length;
    if (length > (closed ? 1 : 0)) turned += length + (closed ? 0 : 1);
  }
  if (stored != total) throw std::invalid_argument("lengths must add up to the number of ids");
  if (capacity != turned) throw std::invalid_argument("turned has the wrong size");
}

template <class In, class Out>
int64_t turn(const Array<In>& stored, const Array<int64_t>& lengths, Array<Out>& turned, bool closed, uint32_t eod, uint32_t vocab_size) {
  if (stored.ndim() != 1 || turned.ndim() != 1) throw std::invalid_argument("stored and turned must be one-dimensional");
  check_lengths(lengths, stored.size(), turned.size(), closed);
  Out* out = turned.mutable_data();
  py::gil_scoped_release release;
  return ledom::turn_documents<In, Out>(stored.data(), lengths.data(), lengths.size(), out, closed, eod, vocab_size);
}

template <class In, class Out>
void define_turn(py::module_& m) {
  m.def("turn_documents", &turn<In, Out>, py::arg("stored").noconvert(), py::arg("lengths").noconvert(),
        py::arg("turned").noconvert(), py::arg("closed"), py::arg("eod"), py::arg("vocab_size"));
}

template <class In>
void define_turn_to_both(py::module_& m) {
  define_turn<In, uint16_t>(m);
  define_turn<In, int32_t>(m);
}

}  // namespace

void define_turn_documents(py::module_& m) {
  define_turn_to_both<uint8_t>(m);
  define_turn_to_both<uint16_t>(m);
  define_turn_to_both<int32_t>(m);
  define_turn_to_both<int64_t>(m);
}
