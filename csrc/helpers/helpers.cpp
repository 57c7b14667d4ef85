// Python bindings of the C++ helpers. Every array is checked here for type, contiguity and size; nothing is converted silently.
#include "concatenate_documents.h"
#include "reverse_documents.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

namespace {

void check_offsets(const Array<int64_t>& offsets, int64_t total, int64_t capacity, int64_t added) {
  if (offsets.ndim() != 1 || offsets.size() < 1) throw std::invalid_argument("offsets must be one-dimensional and not empty");
  const int64_t* o = offsets.data();
  const int64_t documents = offsets.size() - 1;
  int64_t kept = 0;
  for (int64_t d = 0; d < documents; d++) {
    if (o[d] > o[d + 1]) throw std::invalid_argument("offsets must not decrease");
    kept += o[d] != o[d + 1];
  }
  if (o[0] != 0 || o[documents] != total) throw std::invalid_argument("offsets must begin at 0 and end at the number of ids");
  if (capacity != total + added * kept) throw std::invalid_argument("out has the wrong size");
}

template <class Out>
int64_t concatenate(const Array<uint32_t>& ids, const Array<int64_t>& offsets, Array<Out>& out, bool reverse, int64_t bos,
                    uint32_t eod, uint32_t vocab_size) {
  if (ids.ndim() != 1 || out.ndim() != 1) throw std::invalid_argument("ids and out must be one-dimensional");
  check_offsets(offsets, ids.size(), out.size(), bos >= 0 ? 2 : 1);
  Out* data = out.mutable_data();
  py::gil_scoped_release release;
  return ledom::concatenate_documents<Out>(ids.data(), offsets.data(), offsets.size() - 1, data, reverse, bos, eod, vocab_size);
}

template <class Out>
void define_concatenate(py::module_& m) {
  m.def("pack_documents", &concatenate<Out>, py::arg("ids").noconvert(), py::arg("offsets").noconvert(), py::arg("out").noconvert(),
        py::arg("reverse"), py::arg("bos"), py::arg("eod"), py::arg("vocab_size"));
}

void check_lengths(const Array<int64_t>& lengths, int64_t total, int64_t capacity, bool closed) {
  if (lengths.ndim() != 1) throw std::invalid_argument("lengths must be one-dimensional");
  int64_t stored = 0, written = 0;
  for (int64_t d = 0; d < lengths.size(); d++) {
    const int64_t length = lengths.data()[d];
    if (length < 0 || length > total - stored) throw std::invalid_argument("lengths must add up to the number of ids");
    stored += length;
    if (length > (closed ? 1 : 0)) written += length + (closed ? 0 : 1);
  }
  if (stored != total) throw std::invalid_argument("lengths must add up to the number of ids");
  if (capacity != written) throw std::invalid_argument("out has the wrong size");
}

template <class In, class Out>
int64_t reverse(const Array<In>& stored, const Array<int64_t>& lengths, Array<Out>& out, bool closed, uint32_t eod, uint32_t vocab_size) {
  if (stored.ndim() != 1 || out.ndim() != 1) throw std::invalid_argument("stored and out must be one-dimensional");
  check_lengths(lengths, stored.size(), out.size(), closed);
  Out* data = out.mutable_data();
  py::gil_scoped_release release;
  return ledom::reverse_documents<In, Out>(stored.data(), lengths.data(), lengths.size(), data, closed, eod, vocab_size);
}

template <class In, class Out>
void define_reverse_to(py::module_& m) {
  m.def("turn_documents", &reverse<In, Out>, py::arg("stored").noconvert(), py::arg("lengths").noconvert(),
        py::arg("out").noconvert(), py::arg("closed"), py::arg("eod"), py::arg("vocab_size"));
}

template <class In>
void define_reverse(py::module_& m) {
  define_reverse_to<In, uint16_t>(m);
  define_reverse_to<In, int32_t>(m);
}

}  // namespace

void define_piece_encoder(py::module_& m);  // piece_encoder_bindings.cpp
void define_byte_encoder(py::module_& m);   // byte_encoder_bindings.cpp
void define_ngram_index(py::module_& m);    // ngram_index_bindings.cpp

PYBIND11_MODULE(_helpers, m) {
  m.doc() = "C++ helpers of the data path; see csrc/helpers";
  define_concatenate<uint16_t>(m);
  define_concatenate<int32_t>(m);
  define_reverse<uint8_t>(m);
  define_reverse<uint16_t>(m);
  define_reverse<int32_t>(m);
  define_reverse<int64_t>(m);
  define_piece_encoder(m);
  define_byte_encoder(m);
  define_ngram_index(m);
}
