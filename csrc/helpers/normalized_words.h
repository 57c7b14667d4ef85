// Words of a text, without regard to case, punctuation, white space, accents and LaTeX spacing. Texts that read the same have the same words.
//
// A word is a run of letters, or a run of digits, folded by a table that Python computes (contamination/normalization.py):
//   table[code point]  0 a letter as it is, 1 a separator, 2 ignored inside words (accents, soft hyphens), 3 a word of its own
//                      (Chinese), otherwise 4 + offset in `pool` of its folded bytes, which end with 0; a space there separates
// Numbers lose their separators of thousands: 1,000 and 1{,}000 are 1000. A word that is hyphenated over a line break is joined.
// LaTeX commands of spacing and style are no words; \dfrac and \tfrac are \frac.
// Work: one pass. ASCII words of text take 8 bytes at a time; a word that touches other characters takes the slow path.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "utf8.h"

namespace ledom {

class NormalizedWords {
 public:
  NormalizedWords(std::vector<uint32_t> table, std::string pool, bool ignore_numbers, const std::vector<std::string>& no_words,
                  const std::vector<std::string>& fractions)
      : table_(std::move(table)), pool_(std::move(pool)), ignore_numbers_(ignore_numbers) {
    pool_.push_back('\0');
    for (uint32_t code : table_)
      if (code >= FOLDED && code - FOLDED >= pool_.size()) throw std::invalid_argument("table points beyond pool");
    for (const std::string& name : no_words) no_words_.push_back(hash_of(name));
    for (const std::string& name : fractions) fractions_.push_back(hash_of(name));
  }

  static uint64_t hash_of(std::string_view word) {
    uint64_t hash = START;
    const auto* p = reinterpret_cast<const uint8_t*>(word.data());
    for (size_t i = 0; i < word.size(); i += 8) hash = step(hash, load(p + i, p + word.size()) & low_bytes(std::min<size_t>(8, word.size() - i)));
    return hash;
  }

  // Calls visit(hash, word, begin, end) for each word; begin and end are its bytes in the text. The word may still be in capitals.
  template <class Visit>
  void each(std::string_view text, Visit&& visit) const {
    const auto* first = reinterpret_cast<const uint8_t*>(text.data());
    Scan<Visit> scan{*this, first, first + text.size(), visit, {}, 0, 0, 0, false};
    scan.run();
  }

 private:
  static constexpr uint32_t LETTER = 0, SEPARATOR = 1, IGNORED = 2, WORD = 3, FOLDED = 4;
  static constexpr uint64_t ONES = 0x0101010101010101ull, HIGH = 0x8080808080808080ull, START = 0x9E3779B97F4A7C15ull;

  static uint64_t low_bytes(size_t count) { return count >= 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * count) - 1; }
  static uint64_t step(uint64_t hash, uint64_t bytes) {
    const unsigned __int128 product = static_cast<unsigned __int128>(hash ^ bytes) * 0xD1B54A32D192ED03ull;
    return (static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64)) + START;
  }
  static uint64_t load(const uint8_t* p, const uint8_t* end) {
    if (end - p >= 8) return load_8_bytes(p);
    uint64_t value = 0;
    if (p < end) std::memcpy(&value, p, static_cast<size_t>(end - p));
    return value;
  }
  // The high bit of every byte in [low, high], for ASCII bytes.
  static uint64_t between(uint64_t bytes, uint64_t low, uint64_t high) {
    const uint64_t seven = bytes & ~HIGH;
    return (seven + ONES * (0x80 - low)) & ~(seven + ONES * (0x7F - high)) & ~bytes & HIGH;
  }
  static uint64_t letters(uint64_t bytes) { return between(bytes | ONES * 0x20, 'a', 'z'); }
  static uint64_t digits(uint64_t bytes) { return between(bytes, '0', '9'); }
  static size_t leading(uint64_t mask) { return mask ? static_cast<size_t>(__builtin_ctzll(mask)) >> 3 : 8; }
  static bool is_digit(uint8_t c) { return c >= '0' && c <= '9'; }
  static bool is_letter(uint8_t c) { return (c | 0x20) >= 'a' && (c | 0x20) <= 'z'; }
  static bool is_among(uint64_t hash, const std::vector<uint64_t>& hashes) {
    return std::find(hashes.begin(), hashes.end(), hash) != hashes.end();
  }

  template <class Visit>
  struct Scan {
    const NormalizedWords& words;
    const uint8_t *first, *end;
    Visit& visit;
    std::string word;  // of the slow path: folded bytes so far
    int kind;          // of `word`: 0 nothing yet, 1 letters, 2 digits
    size_t begin, stop;
    bool after_number;

    void run() {
      const uint8_t* p = first;
      while (p < end) {
        const uint64_t bytes = load(p, end), letter = letters(bytes);
        const uint64_t starts = letter | digits(bytes) | (bytes & HIGH);
        if (!starts) {
          p += 8;
          continue;
        }
        p += leading(starts);
        p = *p >= 0x80 ? slow(p) : is_digit(*p) ? fast<true>(p) : fast<false>(p);
      }
    }

    template <bool NUMBER>
    const uint8_t* fast(const uint8_t* p) {
      const uint8_t* start = p;
      uint64_t hash = START;
      for (;;) {
        const uint64_t bytes = load(p, end), inside = NUMBER ? digits(bytes) : letters(bytes);
        const size_t length = leading(~inside & HIGH);
        if (length) hash = step(hash, (bytes | ONES * 0x20) & low_bytes(length));
        p += length;
        if (length < 8) break;
      }
      if (p < end && (*p >= 0x80 || (NUMBER ? thousands(p) : hyphen(p)))) return slow(start);
      const size_t length = static_cast<size_t>(p - start);
      const size_t from = static_cast<size_t>(start - first);
      if (NUMBER || !command(hash, from, from + length)) {
        found(hash, std::string_view(reinterpret_cast<const char*>(start), length), from, from + length, NUMBER);
      }
      return p;
    }

    // Words that touch characters outside ASCII, up to the next separator.
    const uint8_t* slow(const uint8_t* p) {
      while (p < end) {
        const size_t at = static_cast<size_t>(p - first);
        if (*p < 0x80) {
          if (is_letter(*p)) {
            add(1, static_cast<char>(*p | 0x20), at, at + 1), p++;
          } else if (is_digit(*p)) {
            add(2, static_cast<char>(*p), at, at + 1), p++;
          } else {
            const size_t skipped = kind == 2 ? thousands(p) : kind == 1 ? hyphen(p) : 0;
            if (!skipped) break;
            p += skipped;
          }
          continue;
        }
        const uint32_t code = read_code_point(p);
        const size_t after = static_cast<size_t>(p - first);
        const uint32_t fold = code < words.table_.size() ? words.table_[code] : WORD;
        if (fold == SEPARATOR) break;
        if (fold == IGNORED) {
          if (kind) stop = after;
        } else if (fold == LETTER || fold == WORD) {
          if (fold == WORD) flush();
          for (size_t i = at; i < after; i++) add(1, static_cast<char>(first[i]), at, after);
          if (fold == WORD) flush();
        } else {
          for (const char* c = words.pool_.c_str() + (fold - FOLDED); *c; c++) {
            if (*c == ' ')
              flush();
            else
              add(is_digit(static_cast<uint8_t>(*c)) ? 2 : 1, *c, at, after);
          }
        }
      }
      flush();
      return p;
    }

    void add(int of_kind, char byte, size_t from, size_t to) {
      if (kind && kind != of_kind) flush();
      if (!kind) begin = from;
      kind = of_kind, stop = to;
      word.push_back(byte);
    }

    void flush() {
      if (kind) {
        const uint64_t hash = hash_of(word);
        if (kind == 2 || !command(hash, begin, stop)) found(hash, word, begin, stop, kind == 2);
      }
      word.clear();
      kind = 0;
    }

    void found(uint64_t hash, std::string_view text, size_t from, size_t to, bool is_number) {
      if (is_number && words.ignore_numbers_) {
        if (!after_number) visit(hash_of("0"), std::string_view("0"), from, to);
        after_number = true;
        return;
      }
      after_number = false;
      visit(hash, text, from, to);
    }

    // Bytes of a separator of thousands at p, or 0: one of , {,} \, before exactly three digits.
    size_t thousands(const uint8_t* p) const {
      const size_t size = *p == ',' ? 1 : starts(p, "{,}") ? 3 : starts(p, "\\,") ? 2 : 0;
      if (!size) return 0;
      p += size;
      if (end - p < 3 || !is_digit(p[0]) || !is_digit(p[1]) || !is_digit(p[2])) return 0;
      return end - p > 3 && is_digit(p[3]) ? 0 : size;
    }

    // Bytes of a hyphen and a line break at p inside a word, or 0.
    size_t hyphen(const uint8_t* p) const {
      const size_t size = starts(p, "-\n") ? 2 : starts(p, "-\r\n") ? 3 : 0;
      return size && end - p > static_cast<ptrdiff_t>(size) && p[size] >= 'a' && p[size] <= 'z' ? size : 0;
    }

    bool starts(const uint8_t* p, std::string_view with) const {
      return end - p >= static_cast<ptrdiff_t>(with.size()) && std::memcmp(p, with.data(), with.size()) == 0;
    }

    // Returns true for a LaTeX command that is not the word of its name; \dfrac is handled as \frac.
    bool command(uint64_t hash, size_t from, size_t to) {
      if (from == 0 || first[from - 1] != '\\') return false;
      if (is_among(hash, words.no_words_)) return true;
      if (!is_among(hash, words.fractions_)) return false;
      found(hash_of("frac"), "frac", from, to, false);
      return true;
    }
  };

  std::vector<uint32_t> table_;
  std::string pool_;
  bool ignore_numbers_;
  std::vector<uint64_t> no_words_, fractions_;
};

}  // namespace ledom
