// Shared by the Python bindings of the encoders. Texts are read in place: an ASCII string needs no conversion; for any other string
// Python makes UTF-8 and keeps it with the string. The interpreter's lock is released during encoding.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "unit_encoder.h"

namespace ledom {

// Returns the str at a position of a tuple. Throws TypeError for anything else.
inline PyObject* text_at(const pybind11::tuple& texts, size_t place) {
  PyObject* text = PyTuple_GET_ITEM(texts.ptr(), static_cast<Py_ssize_t>(place));
  if (!PyUnicode_Check(text)) throw pybind11::type_error("text " + std::to_string(place) + " is not a str");
  return text;
}

inline pybind11::tuple as_tuple(const pybind11::sequence& sequence) {
  auto texts = pybind11::reinterpret_steal<pybind11::tuple>(PySequence_Tuple(sequence.ptr()));
  if (!texts) throw pybind11::error_already_set();
  return texts;
}

inline std::vector<std::string_view> views_of(const pybind11::tuple& texts) {
  std::vector<std::string_view> views;
  views.reserve(texts.size());
  for (size_t t = 0; t < texts.size(); t++) {
    Py_ssize_t length;
    const char* bytes = PyUnicode_AsUTF8AndSize(text_at(texts, t), &length);
    if (!bytes) throw pybind11::error_already_set();
    views.emplace_back(bytes, static_cast<size_t>(length));
  }
  return views;
}

template <class Encoder>
std::pair<pybind11::array_t<uint32_t>, pybind11::array_t<int64_t>> encode(Encoder& encoder, const pybind11::sequence& sequence) {
  const pybind11::tuple texts = as_tuple(sequence);  // keeps the strings alive
  const std::vector<std::string_view> views = views_of(texts);
  pybind11::array_t<int64_t> offsets(static_cast<pybind11::ssize_t>(views.size() + 1));
  int64_t* where = offsets.mutable_data();
  IdBuffer ids;
  {
    pybind11::gil_scoped_release release;
    encoder.encode(views, ids, where);
  }
  const auto total = static_cast<pybind11::ssize_t>(ids.size());
  ids.room_for(1);  // never null
  uint32_t* data = ids.release();
  pybind11::capsule owner(data, [](void* memory) { std::free(memory); });
  return {pybind11::array_t<uint32_t>(total, data, owner), std::move(offsets)};
}

template <class Encoder>
pybind11::dict statistics(const Encoder& encoder) {
  const auto& units = encoder.units();
  pybind11::dict found;
  found["units"] = units.num_units();
  found["misses"] = units.num_misses();
  found["steps"] = units.num_steps();
  found["cached"] = units.cache().used();
  found["clears"] = units.cache().clears();
  found["cache_bytes"] = units.cache().bytes();
  return found;
}

}  // namespace ledom
