// byte_encoder: texts -> ids of a byte-level BPE vocabulary, the same ids as the tokenizers library's.
//
// Added tokens are cut out of a text; the splitting pattern (split_patterns.h) cuts the text between them into units. A table maps the
// bytes of a unit to its ids; a unit that is not in the table is merged by the rule in byte_vocabulary.h.
//
// texts   valid UTF-8 (as Python's strings), normalised
// ids     [total]      of all texts, one text after the other, in text order
// offsets [texts + 1]  text t has ids[offsets[t] .. offsets[t + 1])
//
// Work: one pass over the bytes; see unit_encoder.h for the rest.
#pragma once

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "added_tokens.h"
#include "byte_vocabulary.h"
#include "split_patterns.h"
#include "unit_encoder.h"

namespace ledom {

class AnyByteEncoder {
 public:
  virtual ~AnyByteEncoder() = default;
  virtual void encode(const std::vector<std::string_view>& texts, IdBuffer& ids, int64_t* offsets) = 0;
  virtual const UnitEncoder<ByteVocabulary>& units() const = 0;
};

template <class Scanner>
class ByteEncoder final : public AnyByteEncoder {
 public:
  ByteEncoder(ByteVocabulary vocabulary, AddedTokens added, size_t cache_bytes)
      : units_(std::move(vocabulary), cache_bytes), added_(std::move(added)) {}

  void encode(const std::vector<std::string_view>& texts, IdBuffer& ids, int64_t* offsets) override {
    units_.encode(texts, ids, offsets, [this](std::string_view text, IdBuffer& found) { encode_text(text, found); });
  }

  const UnitEncoder<ByteVocabulary>& units() const override { return units_; }

 private:
  void encode_text(std::string_view text, IdBuffer& ids) {
    size_t from = 0, at = 0;
    while (const AddedToken* token = added_.next(text, from, at)) {
      encode_between(text.substr(from, at - from), ids);
      *ids.room_for(1) = token->id;
      ids.add(1);
      from = at + token->content.size();
    }
    encode_between(text.substr(from), ids);
  }

  void encode_between(std::string_view text, IdBuffer& ids) {
    const uint8_t* unit = units_.copied(text, 0);
    const uint8_t* const end = unit + text.size();
    while (unit < end) {
      for (size_t i = 0; i < UNITS_AT_ONCE && unit < end; i++) {
        const uint8_t* next = scanner_.unit_end(unit, end);
        units_.add_unit(unit, next);
        unit = next;
      }
      units_.encode_waiting(ids);
    }
  }

  UnitEncoder<ByteVocabulary> units_;
  const AddedTokens added_;
  const Scanner scanner_;
};

}  // namespace ledom
