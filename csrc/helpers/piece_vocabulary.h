// A SentencePiece BPE vocabulary: the merges of symbols, their order, and the pairs of characters between which no merge can
// happen.
//
// Formula: a text begins as one symbol per character. Then the adjacent pair whose joined string is the piece with the highest score is
// merged repeatedly, the first of equal ones in the text. A merge across the characters a, b makes a piece that has b directly after a.
// If there is no such piece, texts may be cut between a and b and encoded separately: joins(a, b) is false. It may be true needlessly
// (hash collisions, see below), which only makes units longer.
//
// Layout: a character is its code point, but U+2581 (a space inside a piece) is stored as U+0020: both mean the same in a text.
// A symbol is a number: below num_pieces the id of a piece; from there on characters that occur in pieces but are not pieces;
// UNKNOWN | code point for a character in no piece. Merges: see merge_table.h. Joins: one bit for each ASCII pair; for other pairs one
// bit at a hash of the pair, in a bitmap with at least 16 bits per pair.
// Work: everything is computed once, in one thread, and is constant afterwards.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "merge_table.h"
#include "utf8.h"

namespace ledom {

constexpr uint32_t SPACE_CODE = 0x20;
constexpr uint32_t SPACE_MARK = 0x2581;
constexpr uint32_t UNKNOWN = 0x80000000u;

enum PieceType : int { NORMAL_PIECE = 1, UNKNOWN_PIECE = 2, CONTROL_PIECE = 3, BYTE_PIECE = 6 };

// Returns the code point at p of valid UTF-8, U+2581 as a space; moves p past it.
inline uint32_t read_character(const uint8_t*& p) {
  const uint32_t code = read_code_point(p);
  return code == SPACE_MARK ? SPACE_CODE : code;
}

// Writes the UTF-8 of a code point to bytes[4], a space as U+2581; returns the number of bytes.
inline int write_character(uint32_t code, uint8_t* bytes) {
  if (code == SPACE_CODE) code = SPACE_MARK;
  const auto tail = [code](int shift) { return static_cast<uint8_t>(0x80 | (code >> shift & 0x3F)); };
  if (code < 0x80) return bytes[0] = static_cast<uint8_t>(code), 1;
  if (code < 0x800) return bytes[0] = static_cast<uint8_t>(0xC0 | code >> 6), bytes[1] = tail(0), 2;
  if (code < 0x10000) return bytes[0] = static_cast<uint8_t>(0xE0 | code >> 12), bytes[1] = tail(6), bytes[2] = tail(0), 3;
  bytes[0] = static_cast<uint8_t>(0xF0 | code >> 18), bytes[1] = tail(12), bytes[2] = tail(6), bytes[3] = tail(0);
  return 4;
}

class PieceVocabulary {
 public:
  PieceVocabulary(const std::vector<std::string>& pieces, const std::vector<float>& scores, const std::vector<int>& types,
                  bool byte_fallback)
      : byte_fallback_(byte_fallback) {
    if (pieces.size() != scores.size() || pieces.size() != types.size())
      throw std::invalid_argument("pieces, scores and types must be equally many");
    if (pieces.size() >= MAX_SYMBOLS / 2) throw std::invalid_argument("too many pieces");
    num_pieces_ = static_cast<uint32_t>(pieces.size());
    read_reserved(pieces, types);
    std::unordered_map<std::string, uint32_t> symbols;
    for (uint32_t id = 0; id < num_pieces_; id++) {
      // Spaces are U+2581 when pieces are matched, so a piece with a real one never matches.
      if (types[id] == NORMAL_PIECE && pieces[id].find(' ') == std::string::npos) symbols.emplace(pieces[id], id);
    }
    add_characters(symbols);
    rank(symbols, scores);
    add_merges(symbols);
    add_joins(symbols);
  }

  // Returns false if no merge can happen across a directly followed by b.
  bool joins(uint32_t a, uint32_t b) const { return (a | b) < 0x80 ? joins_ascii(a, b) : joins_other(a, b); }
  bool joins_ascii(uint32_t a, uint32_t b) const { return ascii_joins_[2 * a + (b >> 6)] >> (b & 63) & 1; }

  uint32_t symbol_of(uint32_t code) const {
    if (code < 0x80) return ascii_symbols_[code];
    const auto found = symbols_.find(code);
    return found == symbols_.end() ? UNKNOWN | code : found->second;
  }

  void add_symbols(const uint8_t* p, const uint8_t* end, std::vector<uint32_t>& symbols) const {
    while (p < end) symbols.push_back(symbol_of(read_character(p)));
  }

  // Returns the symbol that two symbols become, or NO_MERGE if no piece is their concatenation.
  uint32_t merged(uint32_t first, uint32_t second) const {
    return (first | second) & UNKNOWN ? NO_MERGE : merges_.find(first, second);
  }
  uint32_t result_of(uint32_t merge) const { return merge; }
  void prefetch(uint32_t first, uint32_t second) const { merges_.prefetch(first, second); }

  // Lower ranks merge first; pieces of equal score have equal ranks.
  uint32_t rank_of(uint32_t symbol) const { return symbol == NO_MERGE ? NO_RANK : ranks_[symbol]; }

  static constexpr size_t MAX_IDS_OF_SYMBOL = 4;
  // Writes the ids of a symbol; returns the position after them.
  uint32_t* write_ids(uint32_t symbol, uint32_t* ids) const {
    if (symbol < num_pieces_) return *ids = symbol, ids + 1;
    if (!byte_fallback_) return *ids = unknown_id_, ids + 1;
    uint8_t bytes[4];
    const int length = write_character(symbol & UNKNOWN ? symbol & ~UNKNOWN : characters_[symbol - num_pieces_], bytes);
    for (int i = 0; i < length; i++) *ids++ = byte_ids_[bytes[i]];
    return ids;
  }

  bool byte_fallback() const { return byte_fallback_; }
  uint32_t unknown_id() const { return unknown_id_; }

 private:
  bool joins_other(uint32_t a, uint32_t b) const {
    const uint64_t bit = MergeTable::hash(static_cast<uint64_t>(a) << 21 | b) >> join_shift_;
    return other_joins_[bit >> 6] >> (bit & 63) & 1;
  }

  void read_reserved(const std::vector<std::string>& pieces, const std::vector<int>& types) {
    int num_bytes = 0, num_unknown = 0;
    for (uint32_t id = 0; id < num_pieces_; id++) {
      if (types[id] == BYTE_PIECE) {
        byte_ids_[std::stoul(pieces[id].substr(1, 4), nullptr, 16) & 0xFF] = id;  // "<0x0A>"
        num_bytes++;
      } else if (types[id] == UNKNOWN_PIECE) {
        unknown_id_ = id;
        num_unknown++;
      } else if (types[id] != NORMAL_PIECE && types[id] != CONTROL_PIECE) {
        throw std::invalid_argument("piece " + std::to_string(id) + " has a type that is not supported");
      }
    }
    if (num_unknown != 1) throw std::invalid_argument("there must be one unknown piece");
    if (num_bytes != (byte_fallback_ ? 256 : 0)) throw std::invalid_argument("byte fallback needs 256 byte pieces");
  }

  static std::vector<uint32_t> characters_of(const std::string& piece) {
    std::vector<uint32_t> codes;
    const uint8_t* p = reinterpret_cast<const uint8_t*>(piece.data());
    for (const uint8_t* end = p + piece.size(); p < end;) codes.push_back(read_character(p));
    return codes;
  }

  // Gives every character of a piece a symbol.
  void add_characters(std::unordered_map<std::string, uint32_t>& symbols) {
    std::fill(ascii_symbols_, ascii_symbols_ + 0x80, UNKNOWN);
    for (uint32_t code = 0; code < 0x80; code++) ascii_symbols_[code] |= code;
    std::vector<std::string> pieces;
    for (const auto& item : symbols) pieces.push_back(item.first);
    for (const std::string& piece : pieces) {
      for (const uint32_t code : characters_of(piece)) {
        if (!(symbol_of(code) & UNKNOWN)) continue;
        uint8_t bytes[4];
        const std::string spelled(reinterpret_cast<char*>(bytes), write_character(code, bytes));
        const auto added = symbols.emplace(spelled, num_pieces_ + static_cast<uint32_t>(characters_.size()));
        if (added.second) characters_.push_back(code);
        (code < 0x80 ? ascii_symbols_[code] : symbols_[code]) = added.first->second;
      }
    }
    if (num_pieces_ + characters_.size() >= MAX_SYMBOLS) throw std::invalid_argument("too many pieces");
  }

  void rank(const std::unordered_map<std::string, uint32_t>& symbols, const std::vector<float>& scores) {
    std::vector<uint32_t> order;
    for (const auto& item : symbols) {
      if (item.second >= num_pieces_) continue;
      if (std::isnan(scores[item.second])) throw std::invalid_argument("a score is not a number");
      order.push_back(item.second);
    }
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return scores[a] > scores[b]; });
    ranks_.assign(num_pieces_, NO_RANK);
    uint32_t rank = 0;
    for (size_t i = 0; i < order.size(); i++) {
      if (i > 0 && scores[order[i]] != scores[order[i - 1]]) rank++;
      ranks_[order[i]] = rank;
    }
  }

  // Adds every split of a piece into two symbols.
  void add_merges(const std::unordered_map<std::string, uint32_t>& symbols) {
    std::vector<uint64_t> found;
    for (const auto& [piece, symbol] : symbols) {
      for (size_t cut = 1; cut < piece.size(); cut++) {
        if ((piece[cut] & 0xC0) == 0x80) continue;  // inside a character
        const auto first = symbols.find(piece.substr(0, cut));
        if (first == symbols.end()) continue;
        const auto second = symbols.find(piece.substr(cut));
        if (second == symbols.end()) continue;
        found.push_back(MergeTable::entry(first->second, second->second, symbol));
      }
    }
    merges_.assign(found);
  }

  void add_joins(const std::unordered_map<std::string, uint32_t>& symbols) {
    std::vector<std::pair<uint32_t, uint32_t>> others;
    for (const auto& item : symbols) {
      const std::vector<uint32_t> codes = characters_of(item.first);
      for (size_t i = 1; i < codes.size(); i++) {
        const uint32_t a = codes[i - 1], b = codes[i];
        if ((a | b) < 0x80) {
          ascii_joins_[2 * a + (b >> 6)] |= uint64_t{1} << (b & 63);
        } else {
          others.emplace_back(a, b);
        }
      }
    }
    std::sort(others.begin(), others.end());
    others.erase(std::unique(others.begin(), others.end()), others.end());
    const int bits = MergeTable::bits_for(16 * others.size());
    join_shift_ = 64 - bits;
    other_joins_.assign(size_t{1} << (bits - 6), 0);
    for (const auto& [a, b] : others) {
      const uint64_t bit = MergeTable::hash(static_cast<uint64_t>(a) << 21 | b) >> join_shift_;
      other_joins_[bit >> 6] |= uint64_t{1} << (bit & 63);
    }
  }

  bool byte_fallback_;
  uint32_t num_pieces_ = 0, unknown_id_ = 0;
  uint32_t byte_ids_[256] = {};
  uint32_t ascii_symbols_[0x80] = {};
  uint64_t ascii_joins_[0x100] = {};
  std::unordered_map<uint32_t, uint32_t> symbols_;  // of characters that are not ASCII
  std::vector<uint32_t> characters_;                // code points of the symbols from num_pieces_ on
  std::vector<uint32_t> ranks_;
  MergeTable merges_;
  std::vector<uint64_t> other_joins_;
  int join_shift_ = 0;
};

}  // namespace ledom
