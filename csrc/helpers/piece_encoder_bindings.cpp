// Python bindings of piece_encoder.h. Texts are read where they are: an ASCII string costs nothing, of any other one Python makes
// its UTF-8 and keeps it with the string. The lock of the interpreter is released while texts are encoded.
#include "piece_encoder.h"
#include "piece_encoder_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>

namespace py = pybind11;

namespace {

std::vector<std::string_view> views_of(const py::tuple& texts) {
  std::vector<std::string_view> views;
  views.reserve(texts.size());
  for (size_t t = 0; t < texts.size(); t++) {
    PyObject* text = PyTuple_GET_ITEM(texts.ptr(), static_cast<Py_ssize_t>(t));
    if (!PyUnicode_Check(text)) throw py::type_error("text " + std::to_string(t) + " is not a str");
    Py_ssize_t length;
    const char* bytes = PyUnicode_AsUTF8AndSize(text, &length);
    if (!bytes) throw py::error_already_set();
    views.emplace_back(bytes, static_cast<size_t>(length));
  }
  return views;
}

std::pair<py::array_t<uint32_t>, py::array_t<int64_t>> encode(ledom::PieceEncoder& encoder, const py::sequence& sequence) {
  const auto texts = py::reinterpret_steal<py::tuple>(PySequence_Tuple(sequence.ptr()));  // keeps the strings alive
  if (!texts) throw py::error_already_set();
  const std::vector<std::string_view> views = views_of(texts);
  py::array_t<int64_t> offsets(static_cast<py::ssize_t>(views.size() + 1));
  int64_t* where = offsets.mutable_data();
  ledom::IdBuffer ids;
  {
    py::gil_scoped_release release;
    encoder.encode(views, ids, where);
  }
  const auto total = static_cast<py::ssize_t>(ids.size());
  ids.room_for(1);  // never null
  uint32_t* data = ids.release();
  py::capsule owner(data, [](void* memory) { std::free(memory); });
  return {py::array_t<uint32_t>(total, data, owner), std::move(offsets)};
}

py::dict statistics(const ledom::PieceEncoder& encoder) {
  py::dict found;
  found["units"] = encoder.num_units();
  found["misses"] = encoder.num_misses();
  found["steps"] = encoder.num_steps();
  found["cached"] = encoder.cache().used();
  found["clears"] = encoder.cache().clears();
  found["cache_bytes"] = encoder.cache().bytes();
  return found;
}

std::unique_ptr<ledom::PieceEncoder> make_encoder(const std::vector<std::string>& pieces, const std::vector<float>& scores,
                                                  const std::vector<int>& types, bool byte_fallback, bool dummy_prefix,
                                                  size_t cache_bytes) {
  ledom::PieceVocabulary vocabulary(pieces, scores, types, byte_fallback);
  return std::make_unique<ledom::PieceEncoder>(std::move(vocabulary), dummy_prefix, cache_bytes);
}

}  // namespace

void define_piece_encoder(py::module_& m) {
  py::class_<ledom::PieceEncoder>(m, "PieceEncoder")
      .def(py::init(&make_encoder), py::arg("pieces"), py::arg("scores"), py::arg("types"), py::arg("byte_fallback"),
           py::arg("dummy_prefix"), py::arg("cache_bytes"))
      .def("encode", &encode, py::arg("texts"))
      .def("statistics", &statistics);
}
