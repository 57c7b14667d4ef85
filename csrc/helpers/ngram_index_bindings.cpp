// Python bindings of the search for n-grams. Texts are read in place, as by the encoders; the interpreter's lock is released.
#include <pybind11/stl.h>

#include "encoder_bindings.h"
#include "ngram_index.h"

namespace py = pybind11;

namespace {

using Numbers = py::array_t<int64_t>;
template <class Value>
using Array = py::array_t<Value, py::array::c_style | py::array::forcecast>;

Numbers array_of(const std::vector<int64_t>& values, py::ssize_t columns) {
  Numbers array({static_cast<py::ssize_t>(values.size()) / columns, columns});
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

// A word as a str: its letters may be in capitals in the text.
py::str folded(std::string_view word) {
  std::string text(word);
  for (char& c : text)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c | 0x20);
  return py::str(text);
}

template <class Value>
std::vector<Value> vector_of(const Array<Value>& array) {
  return {array.data(), array.data() + array.size()};
}

class Index {
 public:
  Index(const Array<uint32_t>& table, std::string pool, bool ignore_numbers, const std::vector<std::string>& no_words,
        const std::vector<std::string>& fractions, size_t length, size_t shortest)
      : words_(vector_of(table), std::move(pool), ignore_numbers, no_words, fractions), index_(words_, length, shortest) {}

  py::tuple build(const py::sequence& sequence) {
    check_empty();
    const py::tuple parts = ledom::as_tuple(sequence);
    Numbers num_words(static_cast<py::ssize_t>(parts.size()));
    std::vector<int64_t> flat;
    for (const ledom::NgramPlace& place : index_.build(ledom::views_of(parts), num_words.mutable_data()))
      flat.insert(flat.end(), {place.part, place.word, place.ngram});
    return py::make_tuple(array_of(flat, 3), num_words);
  }

  // Uses the tables of `tables`, which may be mapped from a file: slots [n, 2] of uint32, bits [n / 8] of uint64, lengths of the n-grams.
  void use(const py::array& slots, const py::array& bits, const std::vector<size_t>& lengths) {
    check_empty();
    check_memory<uint32_t>(slots, 2 * sizeof(uint32_t));
    check_memory<uint64_t>(bits, sizeof(uint64_t));
    index_.use(static_cast<const ledom::NgramSlot*>(slots.data()), static_cast<size_t>(slots.size()) / 2,
               static_cast<const uint64_t*>(bits.data()), static_cast<size_t>(bits.size()), lengths);
    owners_ = py::make_tuple(slots, bits);
  }

  // (slots, bits, lengths) as for `use`, read in place.
  static py::tuple tables(const py::object& self) {
    const auto& index = self.cast<const Index&>().index_;
    const auto slots = static_cast<py::ssize_t>(index.num_slots());
    return py::make_tuple(py::array_t<uint32_t>({slots, py::ssize_t{2}}, reinterpret_cast<const uint32_t*>(index.slots()), self),
                          py::array_t<uint64_t>(static_cast<py::ssize_t>(index.num_bits_words()), index.bits(), self), index.lengths());
  }

  // Rows (text, first word, number of the n-gram, its words), in order.
  Numbers search(const py::sequence& sequence) const {
    const py::tuple texts = ledom::as_tuple(sequence);
    const std::vector<std::string_view> views = ledom::views_of(texts);
    std::vector<int64_t> rows;
    {
      py::gil_scoped_release release;
      for (size_t text = 0; text < views.size(); text++) {
        index_.search(views[text], [&](size_t word, int64_t ngram, size_t length) {
          rows.insert(rows.end(), {static_cast<int64_t>(text), static_cast<int64_t>(word), ngram, static_cast<int64_t>(length)});
        });
      }
    }
    return array_of(rows, 4);
  }

  // (words, their bytes in the text [words, 2])
  py::tuple words(const py::str& text) const { return words_in(text, Numbers(std::vector<py::ssize_t>{0, 2}), true); }

  // As `words`, for the words with numbers in `ranges` [n, 2], which are sorted and do not overlap: (first, last + 1).
  py::tuple words_in(const py::str& text, const Array<int64_t>& ranges, bool all = false) const {
    if (ranges.ndim() != 2 || ranges.shape(1) != 2) throw std::invalid_argument("ranges must be [n, 2]");
    const int64_t* range = ranges.data();
    const int64_t* const end = range + ranges.size();
    py::list found;
    std::vector<int64_t> spans;
    int64_t number = 0;
    words_.each(ledom::views_of(py::make_tuple(text))[0], [&](uint64_t, std::string_view word, size_t begin, size_t stop) {
      while (range < end && number >= range[1]) range += 2;
      if (all || (range < end && number >= range[0])) {
        found.append(folded(word));
        spans.insert(spans.end(), {static_cast<int64_t>(begin), static_cast<int64_t>(stop)});
      }
      number++;
    });
    return py::make_tuple(found, array_of(spans, 2));
  }

  size_t num_ngrams() const { return index_.num_ngrams(); }
  size_t bytes() const { return index_.bytes(); }

 private:
  void check_empty() const {
    if (index_.num_slots()) throw std::invalid_argument("the index is built already");
  }

  template <class Value>
  static void check_memory(const py::array& array, size_t alignment) {
    const bool is_good = py::isinstance<py::array_t<Value>>(array) && (array.flags() & py::array::c_style);
    if (!is_good || reinterpret_cast<uintptr_t>(array.data()) % alignment) throw std::invalid_argument("wrong type or layout of a table");
  }

  ledom::NormalizedWords words_;
  ledom::NgramIndex index_;
  py::object owners_;  // of mapped tables
};

}  // namespace

void define_ngram_index(py::module_& m) {
  py::class_<Index>(m, "NgramIndex")
      .def(py::init<const Array<uint32_t>&, std::string, bool, const std::vector<std::string>&, const std::vector<std::string>&, size_t,
                    size_t>(),
           py::arg("table"), py::arg("pool"), py::arg("ignore_numbers"), py::arg("no_words"), py::arg("fractions"), py::arg("length"),
           py::arg("shortest"))
      .def("build", &Index::build, py::arg("parts"))
      .def("use", &Index::use, py::arg("slots"), py::arg("bits"), py::arg("lengths"))
      .def("tables", [](const py::object& self) { return Index::tables(self); })
      .def_property_readonly_static("version", [](const py::object&) { return ledom::NgramIndex::VERSION; })
      .def("search", &Index::search, py::arg("texts"))
      .def("words", &Index::words, py::arg("text"))
      .def("words_in", [](const Index& self, const py::str& text, const Array<int64_t>& ranges) { return self.words_in(text, ranges); },
           py::arg("text"), py::arg("ranges"))
      .def_property_readonly("num_ngrams", &Index::num_ngrams)
      .def_property_readonly("bytes", &Index::bytes);
}
