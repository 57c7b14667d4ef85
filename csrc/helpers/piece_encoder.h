// piece_encoder: texts -> ids of a SentencePiece BPE vocabulary, the same ids as the sentencepiece library's.
//
// A text, after a space if the vocabulary has a dummy prefix, is cut wherever no merge can happen (PieceVocabulary::joins is false),
// usually around words. Such a unit always has the same ids, so a table (UnitCache) maps its bytes to its ids; a unit that is not in
// the table is merged by the rule in piece_vocabulary.h.
//
// texts   valid UTF-8 (as Python's strings)
// ids     [total]      of all texts, one text after the other, in text order
// offsets [texts + 1]  text t has ids[offsets[t] .. offsets[t + 1])
//
// Work: one pass over the bytes; see unit_encoder.h for the rest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "piece_vocabulary.h"
#include "unit_encoder.h"

namespace ledom {

constexpr size_t BLOCK = UNITS_AT_ONCE;  // bytes, one bit each

class PieceEncoder {
 public:
  PieceEncoder(PieceVocabulary vocabulary, bool dummy_prefix, size_t cache_bytes)
      : units_(std::move(vocabulary), cache_bytes), dummy_prefix_(dummy_prefix) {}

  void encode(const std::vector<std::string_view>& texts, IdBuffer& ids, int64_t* offsets) {
    units_.encode(texts, ids, offsets, [this](std::string_view text, IdBuffer& found) { encode_text(text, found); });
  }

  const UnitEncoder<PieceVocabulary>& units() const { return units_; }

 private:
  void encode_text(std::string_view text, IdBuffer& ids) {
    const size_t first_id = ids.size();
    uint8_t* begin = units_.copied(text, 1);
    begin[0] = ' ';
    const uint8_t* end = begin + 1 + text.size();
    const uint8_t* unit = begin + (dummy_prefix_ ? 0 : 1);
    const uint8_t* next = unit;
    uint32_t previous = read_character(next);
    for (const uint8_t* block = unit; block < end; block += BLOCK) {
      for (uint64_t cuts = cuts_in(block, end, next, previous); cuts; cuts &= cuts - 1) {
        const uint8_t* cut = block + __builtin_ctzll(cuts);
        units_.add_unit(unit, cut);
        unit = cut;
      }
      if (units_.many_are_waiting()) units_.encode_waiting(ids);
    }
    units_.add_unit(unit, end);
    units_.encode_waiting(ids);
    if (!vocabulary().byte_fallback()) join_unknown(ids, first_id);
  }

  // Bit i: a unit begins at block[i]. next is the first character not yet read, in or after the block; previous the one before.
  uint64_t cuts_in(const uint8_t* block, const uint8_t* end, const uint8_t*& next, uint32_t& previous) const {
    const uint8_t* block_end = block + std::min<size_t>(BLOCK, static_cast<size_t>(end - block));
    uint64_t all = previous, cuts = 0;
    for (size_t i = 0; i < BLOCK; i += 8) all |= load_8_bytes(block + i);
    if ((all & 0x8080808080808080ull) == 0 && previous < 0x80 && block_end - block == BLOCK) {
      const size_t first = static_cast<size_t>(next - block);
      for (size_t i = 0; i < BLOCK; i++) {
        const uint32_t code = block[i];
        cuts |= static_cast<uint64_t>(!vocabulary().joins_ascii(previous, code)) << i;
        previous = code;
      }
      next = block_end;
      return cuts >> first << first;
    }
    while (next < block_end) {
      const size_t at = static_cast<size_t>(next - block);
      const uint32_t code = read_character(next);
      cuts |= static_cast<uint64_t>(!vocabulary().joins(previous, code)) << at;
      previous = code;
    }
    return cuts;
  }

  // Without byte fallback a run of unknown characters is one id.
  void join_unknown(IdBuffer& ids, size_t begin) const {
    const uint32_t unknown = vocabulary().unknown_id();
    uint32_t* first = ids.data() + begin;
    uint32_t* last = std::unique(first, ids.data() + ids.size(), [=](uint32_t a, uint32_t b) { return a == unknown && b == unknown; });
    ids.shrink_to(static_cast<size_t>(last - ids.data()));
  }

  const PieceVocabulary& vocabulary() const { return units_.vocabulary(); }

  UnitEncoder<PieceVocabulary> units_;
  const bool dummy_prefix_;
};

}  // namespace ledom
