// The splitting patterns of byte-level BPE vocabularies, as scanners that find the end of the unit that begins at p.
//
// Each finds the leftmost match of its regular expression (listed in tokenizers/encoders.py), with alternatives in their order and the
// classes of code points of the `tokenizers` library. Every pattern matches at every character, so the units make up the whole text.
//
// Text is valid UTF-8, followed by at least READ_BEYOND zero bytes. Zero is no letter, digit or space, so only loops over other
// characters check for the end.
// Work: a few steps per character, one pass; a run of spaces is read at most twice.
#pragma once

#include <cstddef>
#include <cstdint>

#include "code_points.h"
#include "unicode_classes.h"
#include "utf8.h"

namespace ledom {

enum CodePointClass : uint8_t {
  OTHER,
  UPPER,    // \p{Lu} \p{Lt}
  LOWER,    // \p{Ll}
  CASELESS, // \p{Lm} \p{Lo}
  MARK,     // \p{M}
  NUMBER,   // \p{N}
  NEWLINE,  // \r \n
  SPACE,    // any other \s
};

constexpr uint32_t bit(CodePointClass kind) { return 1u << kind; }

constexpr uint32_t LETTERS = bit(UPPER) | bit(LOWER) | bit(CASELESS);
constexpr uint32_t SPACES = bit(SPACE) | bit(NEWLINE);
constexpr uint32_t UNLIMITED = 0xFFFFFFFFu;

struct Character {
  uint32_t kind;  // bit(CodePointClass)
  const uint8_t* end;
};

class Scanner {
 public:
  Scanner() : classes_(UNICODE_CLASSES) {
    for (uint32_t code = 0; code < 0x80; code++) ascii_[code] = static_cast<uint8_t>(1u << classes_[code]);
  }

 protected:
  Character look(const uint8_t* p) const {
    if (*p < 0x80) return {ascii_[*p], p + 1};
    const uint32_t code = read_code_point(p);
    return {1u << classes_[code], p};
  }

  // Returns the end of all characters from p on that are of some kinds, which must not include OTHER.
  const uint8_t* skip(const uint8_t* p, uint32_t kinds) const {
    for (Character c = look(p); c.kind & kinds; c = look(p)) p = c.end;
    return p;
  }

  const uint8_t* skip_letters(const uint8_t* p, uint32_t letters) const {
    for (;;) {
      const uint64_t others = other_than_ascii_letters(load_8_bytes(p));
      if (!others) {
        p += 8;
        continue;
      }
      p += __builtin_ctzll(others) / 8;
      if (*p < 0x80) return p;
      const Character c = look(p);
      if (!(c.kind & letters)) return p;
      p = c.end;
    }
  }

  const uint8_t* skip_numbers(const uint8_t* p, uint32_t at_most) const {
    Character c = look(p);
    for (; at_most && c.kind & bit(NUMBER); at_most--, c = look(p)) p = c.end;
    return p;
  }

  // Returns the end of all characters from p on that are of none of some kinds, at most `end`.
  const uint8_t* skip_others(const uint8_t* p, const uint8_t* end, uint32_t kinds) const {
    while (p < end) {
      const Character c = look(p);
      if (c.kind & kinds) break;
      p = c.end;
    }
    return p;
  }

  static const uint8_t* skip_newlines(const uint8_t* p) {
    while (*p == '\n' || *p == '\r') p++;
    return p;
  }

  // For spaces from p on, with none before: \s*[\r\n]+ if lines end a unit, else \s+(?!\S), else \s+.
  const uint8_t* skip_spaces(const uint8_t* p, const uint8_t* end, bool lines_end) const {
    const uint8_t *last = p, *line_end = nullptr;
    const uint8_t* after = p;
    for (Character c = look(after); c.kind & SPACES; c = look(after)) {
      last = after;
      after = c.end;
      if (c.kind & bit(NEWLINE)) line_end = after;
    }
    if (lines_end && line_end) return line_end;
    return after == end || last == p ? after : last;
  }

  // Returns the end of 's, 't, 're, 've, 'm, 'll or 'd with the apostrophe at p, or p without one. Small letters only, or any:
  // then U+017F is an s.
  static const uint8_t* skip_contraction(const uint8_t* p, bool any_case) {
    const uint8_t fold = any_case ? 0x20 : 0, first = p[1] | fold;
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return p + 2;
    if (any_case && p[1] == 0xC5 && p[2] == 0xBF) return p + 3;
    const uint8_t second = p[2] | fold;
    const bool is_two = (first == 'l' && second == 'l') || ((first == 'r' || first == 'v') && second == 'e');
    return is_two ? p + 3 : p;
  }

 private:
  // Sets the high bit of each byte that is no ASCII letter.
  static uint64_t other_than_ascii_letters(uint64_t bytes) {
    constexpr uint64_t ones = 0x0101010101010101ull, high = 0x80 * ones;
    const uint64_t small = (bytes | 0x20 * ones) & ~high;
    const uint64_t from_a = small + (0x80 - 'a') * ones, beyond_z = small + (0x7F - 'z') * ones;
    return (~from_a | beyond_z | bytes) & high;
  }

  uint8_t ascii_[0x80];
  CodePoints classes_;
};

// GPT-2: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
class Gpt2Scanner : public Scanner {
 public:
  const uint8_t* unit_end(const uint8_t* p, const uint8_t* end) const {
    if (*p == '\'') {
      const uint8_t* contraction = skip_contraction(p, false);
      if (contraction != p) return contraction;
    }
    const uint8_t* first = p + (*p == ' ');
    if (first == end) return end;
    const Character c = look(first);
    if (c.kind & LETTERS) return skip_letters(c.end, LETTERS);
    if (c.kind & bit(NUMBER)) return skip_numbers(c.end, UNLIMITED);
    if (c.kind & SPACES) return skip_spaces(p, end, false);
    return skip_others(c.end, end, SPACES | LETTERS | bit(NUMBER));
  }
};

// cl100k and its successors, with up to D digits:
// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,D}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
template <uint32_t DIGITS>
class Cl100kScanner : public Scanner {
 public:
  const uint8_t* unit_end(const uint8_t* p, const uint8_t* end) const {
    const Character first = look(p);
    if (first.kind & LETTERS) return skip_letters(first.end, LETTERS);
    if (first.kind & bit(NUMBER)) return skip_numbers(first.end, DIGITS - 1);
    if (first.kind & bit(NEWLINE)) return skip_spaces(p, end, true);
    if (*p == '\'') {
      const uint8_t* contraction = skip_contraction(p, true);
      if (contraction != p) return contraction;
    }
    if (first.end == end) return end;
    const Character second = look(first.end);
    if (second.kind & LETTERS) return skip_letters(second.end, LETTERS);
    constexpr uint32_t not_other = SPACES | LETTERS | bit(NUMBER);
    if (first.kind & bit(SPACE) && (*p != ' ' || second.kind & not_other)) return skip_spaces(p, end, true);
    return skip_newlines(skip_others(first.end, end, not_other));
  }
};

// o200k. With U = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}], W = [\p{Ll}\p{Lm}\p{Lo}\p{M}] and C = (?i:'s|'t|'re|'ve|'m|'ll|'d)?:
// [^\r\n\p{L}\p{N}]?U*W+C|[^\r\n\p{L}\p{N}]?U+W*C|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
class O200kScanner : public Scanner {
 public:
  const uint8_t* unit_end(const uint8_t* p, const uint8_t* end) const {
    const Character first = look(p);
    if (first.kind & bit(NUMBER)) return skip_numbers(first.end, 2);
    if (first.kind & bit(NEWLINE)) return skip_spaces(p, end, true);
    // A mark may stand for [^\r\n\p{L}\p{N}]? or begin U*; the result is the same.
    const uint8_t* word = first.kind & (LETTERS | bit(MARK)) ? p : first.end;
    const uint8_t* word_end = skip_word(word);
    if (word_end != word) return *word_end == '\'' ? skip_contraction(word_end, true) : word_end;
    if (first.end == end) return end;
    constexpr uint32_t not_other = SPACES | LETTERS | bit(NUMBER);
    if (first.kind & bit(SPACE) && (*p != ' ' || look(first.end).kind & not_other)) return skip_spaces(p, end, true);
    p = skip_others(first.end, end, not_other);
    while (*p == '\n' || *p == '\r' || *p == '/') p++;
    return p;
  }

 private:
  // Returns the end of U*W+, else of U+W*, else p.
  const uint8_t* skip_word(const uint8_t* p) const {
    constexpr uint32_t lower = bit(LOWER) | bit(CASELESS) | bit(MARK), upper = bit(UPPER) | bit(CASELESS) | bit(MARK);
    const uint8_t* given_back = nullptr;  // after the last character of U* that is also in W
    Character c = look(p);
    for (; c.kind & upper; c = look(p)) {
      p = c.end;
      if (c.kind & lower) given_back = p;
    }
    if (c.kind & bit(LOWER)) return skip(c.end, lower);
    return given_back ? given_back : p;
  }
};

}  // namespace ledom
