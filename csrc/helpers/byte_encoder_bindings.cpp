// Python bindings of byte_encoder.h: vocabularies are read from the objects of a parsed tokenizer.json.
#include "byte_encoder.h"
#include "encoder_bindings.h"
#include "nfc_classes.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>

namespace py = pybind11;

namespace {

using ledom::READ_BEYOND;

// Reads the bytes of tokens, which a tokenizer.json writes as one printable character per byte: printable Latin-1 stands for itself,
// the other bytes are consecutive from U+0100 on.
class TokenReader {
 public:
  TokenReader() {
    uint32_t next = 0x100;
    for (uint32_t byte = 0; byte < 0x100; byte++) {
      const bool is_printable = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
      byte_of_[is_printable ? byte : next++] = static_cast<int16_t>(byte);
    }
  }

  void clear() { size_ = 0; }
  const uint8_t* data() const { return bytes_.data(); }
  size_t size() const { return size_; }

  // Appends characters from begin to end of a string; returns false if one is not in the alphabet, as in some added tokens.
  bool read(PyObject* text, Py_ssize_t begin, Py_ssize_t end) {
    bytes_.resize(std::max(bytes_.size(), size_ + static_cast<size_t>(end - begin) + READ_BEYOND));
    const int kind = PyUnicode_KIND(text);
    const void* characters = PyUnicode_DATA(text);
    for (Py_ssize_t i = begin; i < end; i++) {
      const Py_UCS4 code = PyUnicode_READ(kind, characters, i);
      if (code >= ALPHABET_END || byte_of_[code] < 0) return false;
      bytes_[size_++] = static_cast<uint8_t>(byte_of_[code]);
    }
    return true;
  }

 private:
  static constexpr size_t ALPHABET_END = 0x144;

  std::vector<int16_t> byte_of_ = std::vector<int16_t>(ALPHABET_END, -1);
  std::vector<uint8_t> bytes_;
  size_t size_ = 0;
};

void read_tokens(const py::dict& vocab, ledom::ByteVocabulary& vocabulary) {
  TokenReader reader;
  PyObject *token, *id;
  for (Py_ssize_t at = 0; PyDict_Next(vocab.ptr(), &at, &token, &id);) {
    if (!PyUnicode_Check(token) || !PyLong_Check(id)) throw py::type_error("the vocabulary is not {str: int}");
    const long value = PyLong_AsLong(id);
    if (value < 0 || value >= ledom::MAX_SYMBOLS) throw std::invalid_argument("an id is below 0 or too high");
    reader.clear();
    if (reader.read(token, 0, PyUnicode_GET_LENGTH(token)) && reader.size())  // no merge of bytes gives another token
      vocabulary.add_token(reader.data(), reader.size(), static_cast<uint32_t>(value));
  }
}

// A merge is two strings, or one string with a space in the middle.
void read_merge(PyObject* merge, TokenReader& reader, ledom::ByteVocabulary& vocabulary) {
  reader.clear();
  size_t first = 0;
  bool is_read = false;
  if (PyUnicode_Check(merge)) {
    const Py_ssize_t length = PyUnicode_GET_LENGTH(merge), space = PyUnicode_FindChar(merge, ' ', 0, length, 1);
    is_read = space > 0 && reader.read(merge, 0, space);
    first = reader.size();
    is_read = is_read && reader.read(merge, space + 1, length);
  } else if (PyList_Check(merge) && PyList_GET_SIZE(merge) == 2) {
    PyObject *left = PyList_GET_ITEM(merge, 0), *right = PyList_GET_ITEM(merge, 1);
    if (!PyUnicode_Check(left) || !PyUnicode_Check(right)) throw py::type_error("a merge is not of two strings");
    is_read = reader.read(left, 0, PyUnicode_GET_LENGTH(left));
    first = reader.size();
    is_read = is_read && reader.read(right, 0, PyUnicode_GET_LENGTH(right));
  }
  if (!is_read || first == 0 || first == reader.size()) throw std::invalid_argument("a merge is not of two tokens of bytes");
  vocabulary.add_merge(reader.data(), first, reader.size());
}

using Added = std::vector<std::tuple<std::string, uint32_t, bool>>;

template <class Scanner>
std::unique_ptr<ledom::AnyByteEncoder> make(ledom::ByteVocabulary vocabulary, ledom::AddedTokens added, size_t cache_bytes) {
  return std::make_unique<ledom::ByteEncoder<Scanner>>(std::move(vocabulary), std::move(added), cache_bytes);
}

std::unique_ptr<ledom::AnyByteEncoder> make_encoder(const py::dict& vocab, const py::list& merges, const std::string& pattern,
                                                    bool whole_units, const Added& added, size_t cache_bytes) {
  ledom::ByteVocabulary vocabulary(vocab.size(), whole_units);
  read_tokens(vocab, vocabulary);
  TokenReader reader;
  for (const py::handle merge : merges) read_merge(merge.ptr(), reader, vocabulary);
  vocabulary.finish();
  std::vector<ledom::AddedToken> tokens;
  for (const auto& [content, id, is_text] : added) tokens.push_back({content, id, is_text});
  const auto made = pattern == "gpt2"       ? &make<ledom::Gpt2Scanner>
                    : pattern == "cl100k"   ? &make<ledom::Cl100kScanner<3>>
                    : pattern == "cl100k_1" ? &make<ledom::Cl100kScanner<1>>
                    : pattern == "o200k"    ? &make<ledom::O200kScanner>
                                            : nullptr;
  if (!made) throw std::invalid_argument("there is no pattern " + pattern);
  return made(std::move(vocabulary), ledom::AddedTokens(tokens), cache_bytes);
}

template <class Unit>
bool is_nfc(const Unit* text, size_t length, const ledom::CodePoints& classes) {
  uint8_t previous = 0;
  for (size_t i = 0; i < length; i++) {
    const uint8_t combining = text[i] < 0x300 ? 0 : classes[text[i]];
    if (combining == 0xFF || (combining && combining < previous)) return false;
    previous = combining;
  }
  return true;
}

// Returns the positions of the texts that NFC may change; it does not change the others.
std::vector<size_t> not_nfc(const py::sequence& sequence) {
  static const ledom::CodePoints classes(ledom::NFC_CLASSES);
  const py::tuple texts = ledom::as_tuple(sequence);
  std::vector<size_t> found;
  for (size_t t = 0; t < texts.size(); t++) {
    PyObject* text = ledom::text_at(texts, t);
    const auto length = static_cast<size_t>(PyUnicode_GET_LENGTH(text));
    const int kind = PyUnicode_KIND(text);
    if (kind == PyUnicode_1BYTE_KIND) continue;
    const bool is_fine = kind == PyUnicode_2BYTE_KIND ? is_nfc(PyUnicode_2BYTE_DATA(text), length, classes)
                                                      : is_nfc(PyUnicode_4BYTE_DATA(text), length, classes);
    if (!is_fine) found.push_back(t);
  }
  return found;
}

}  // namespace

void define_byte_encoder(py::module_& m) {
  m.def("not_nfc", &not_nfc, py::arg("texts"));
  py::class_<ledom::AnyByteEncoder>(m, "ByteEncoder")
      .def(py::init(&make_encoder), py::arg("vocab"), py::arg("merges"), py::arg("pattern"), py::arg("whole_units"), py::arg("added"),
           py::arg("cache_bytes"))
      .def("encode", &ledom::encode<ledom::AnyByteEncoder>, py::arg("texts"))
      .def("statistics", &ledom::statistics<ledom::AnyByteEncoder>);
}
