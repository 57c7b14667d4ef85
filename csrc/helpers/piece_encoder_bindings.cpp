// Python bindings of piece_encoder.h.
#include "piece_encoder.h"
#include "encoder_bindings.h"

#include <pybind11/stl.h>

#include <memory>

namespace py = pybind11;

namespace {

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
      .def("encode", &ledom::encode<ledom::PieceEncoder>, py::arg("texts"))
      .def("statistics", &ledom::statistics<ledom::PieceEncoder>);
}
