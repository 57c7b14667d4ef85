// Adds the class PieceEncoder to the Python module.
#pragma once

#include <pybind11/pybind11.h>

void define_piece_encoder(pybind11::module_& m);
