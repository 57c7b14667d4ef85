// The n-grams of the evaluation items, and the search for them in texts.
//
// hash of an n-gram: H(i) - H(i - n) B^n of the rolling H(i) = H(i - 1) B + word(i), modulo 2^64, then mixed with n. Equal hashes are not
// proof: the caller compares the words of the few places that are found.
// Layout: a blocked Bloom filter (three bits in one word of 64, 16 bits per n-gram or more), looked up for each word of a text, and after
// it a table of open addressing with (upper half of the hash, number of the n-gram), at most half full. Both are constant during a search,
// so processes share them: after a fork, or mapped from a file (`use`). A look-up is fetched into the cache DELAY look-ups before it is used.
// VERSION is part of the name of stored indexes: raise it whenever a word, a hash or the layout changes.
// An n-gram has `length` words, or all words of a part that has fewer, at least `shortest`.
// Work: two multiplications and one word of the filter per word of the text and distinct length.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "big_pages.h"
#include "normalized_words.h"

namespace ledom {

struct NgramPlace {
  int64_t part, word, ngram;  // an n-gram of a part: where it begins, and its number; equal n-grams have equal numbers
};

struct NgramSlot {
  uint32_t tag = 0;  // the upper half of the hash
  int32_t number = -1;
};

class NgramIndex {
 public:
  static constexpr size_t LONGEST = 64;
  static constexpr int VERSION = 2;

  NgramIndex(const NormalizedWords& words, size_t length, size_t shortest) : words_(words), length_(length), shortest_(shortest) {
    if (shortest < 1 || shortest > length || length > LONGEST) throw std::invalid_argument("lengths must be 1 <= shortest <= length <= 64");
    powers_.push_back(1);
    for (size_t i = 0; i < LONGEST; i++) powers_.push_back(powers_.back() * BASE);
  }

  NgramIndex(const NgramIndex&) = delete;  // it points into itself
  NgramIndex& operator=(const NgramIndex&) = delete;

  // Adds the n-grams of all parts; returns them with equal ones under one number. Call it once.
  std::vector<NgramPlace> build(const std::vector<std::string_view>& parts, int64_t* num_words) {
    std::vector<NgramPlace> places;
    std::vector<uint64_t> keys, hashes;
    for (size_t part = 0; part < parts.size(); part++) {
      hashes.clear();
      words_.each(parts[part], [&](uint64_t hash, std::string_view, size_t, size_t) { hashes.push_back(hash); });
      num_words[part] = static_cast<int64_t>(hashes.size());
      const size_t length = std::min(length_, hashes.size());
      if (length < shortest_) continue;
      for (size_t begin = 0; begin + length <= hashes.size(); begin++) {
        uint64_t rolling = 0;
        for (size_t i = begin; i < begin + length; i++) rolling = rolling * BASE + hashes[i];
        places.push_back({static_cast<int64_t>(part), static_cast<int64_t>(begin), 0});
        keys.push_back(mixed(rolling, length));
      }
      if (std::find(lengths_.begin(), lengths_.end(), length) == lengths_.end()) lengths_.push_back(length);
    }
    if (keys.size() > std::numeric_limits<int32_t>::max()) throw std::length_error("more than 2^31 n-grams");
    std::sort(lengths_.begin(), lengths_.end());
    size_t slots = 64;
    while (slots < 2 * keys.size()) slots *= 2;
    own_slots_.resize(slots);
    own_bits_.resize(slots / 8);  // 8 slots to a word of 64 bits: 8 bits a slot
    set(own_slots_.data(), own_bits_.data(), slots);
    for (size_t i = 0; i < keys.size(); i++) places[i].ngram = insert(keys[i]);
    return places;
  }

  // Uses the tables of another index, which must outlive this one. Throws std::invalid_argument if they do not fit together.
  void use(const NgramSlot* slots, size_t num_slots, const uint64_t* bits, size_t num_bits_words, const std::vector<size_t>& lengths) {
    const auto check = [](bool is_good) {
      if (!is_good) throw std::invalid_argument("the tables are not those of an index");
    };
    check(num_slots >= 64 && (num_slots & (num_slots - 1)) == 0 && num_bits_words == num_slots / 8);
    check(std::is_sorted(lengths.begin(), lengths.end()));
    check(lengths.empty() || (lengths.front() >= shortest_ && lengths.back() <= length_));
    size_t used = 0;
    int64_t last = -1;
    for (size_t i = 0; i < num_slots; i++) {
      used += slots[i].number >= 0;
      last = std::max<int64_t>(last, slots[i].number);
    }
    check(2 * used <= num_slots && last + 1 == static_cast<int64_t>(used));  // an empty slot ends every look-up
    lengths_ = lengths;
    num_ngrams_ = last + 1;
    set(slots, bits, num_slots);
  }

  // Calls visit(first word, number of the n-gram, words of the n-gram) for each place of an n-gram in a text. Returns its words.
  template <class Visit>
  size_t search(std::string_view text, Visit&& visit) const {
    uint64_t rolling[2 * LONGEST] = {0};  // H after each of the last words, by number modulo its size
    uint64_t last = 0;
    size_t count = 0;
    const size_t num_lengths = lengths_.size();
    Pending pending[DELAY];
    size_t pushed = 0;
    const auto check = [&](const Pending& one) {
      if ((bits_[block_of(one.key)] & mask_of(one.key)) != mask_of(one.key)) return;
      const int64_t number = find(one.key);
      if (number >= 0) visit(one.word, number, one.length);
    };
    words_.each(text, [&](uint64_t hash, std::string_view, size_t, size_t) {
      last = last * BASE + hash;
      rolling[++count % (2 * LONGEST)] = last;
      for (size_t i = 0; i < num_lengths && lengths_[i] <= count; i++) {
        const size_t length = lengths_[i];
        const uint64_t key = mixed(last - rolling[(count - length) % (2 * LONGEST)] * powers_[length], length);
        __builtin_prefetch(&bits_[block_of(key)]);
        Pending& oldest = pending[pushed++ % DELAY];
        if (pushed > DELAY) check(oldest);
        oldest = {key, count - length, length};
      }
    });
    for (size_t i = pushed > DELAY ? pushed - DELAY : 0; i < pushed; i++) check(pending[i % DELAY]);
    return count;
  }

  size_t num_ngrams() const { return static_cast<size_t>(num_ngrams_); }
  size_t num_slots() const { return slots_ ? slot_mask_ + 1 : 0; }
  size_t num_bits_words() const { return bits_ ? block_mask_ + 1 : 0; }
  size_t bytes() const { return num_slots() * sizeof(NgramSlot) + num_bits_words() * sizeof(uint64_t); }
  const NgramSlot* slots() const { return slots_; }
  const uint64_t* bits() const { return bits_; }
  const std::vector<size_t>& lengths() const { return lengths_; }

 private:
  struct Pending {
    uint64_t key;
    size_t word, length;
  };

  static constexpr size_t DELAY = 16;
  static constexpr uint64_t BASE = 0xF1357AEA2E62A9C5ull;

  static uint64_t mixed(uint64_t rolling, size_t length) {
    const unsigned __int128 product = static_cast<unsigned __int128>(rolling + length) * 0x9E3779B97F4A7C15ull;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }
  void set(const NgramSlot* slots, const uint64_t* bits, size_t num_slots) {
    slots_ = slots, bits_ = bits;
    slot_mask_ = num_slots - 1, block_mask_ = num_slots / 8 - 1;
  }

  size_t block_of(uint64_t key) const { return (key >> 24) & block_mask_; }
  static uint64_t mask_of(uint64_t key) {
    return uint64_t{1} << (key & 63) | uint64_t{1} << (key >> 6 & 63) | uint64_t{1} << (key >> 12 & 63);
  }

  int64_t insert(uint64_t key) {
    const uint32_t tag = static_cast<uint32_t>(key >> 32);
    size_t at = key & slot_mask_;
    while (own_slots_[at].number >= 0 && own_slots_[at].tag != tag) at = (at + 1) & slot_mask_;
    own_bits_[block_of(key)] |= mask_of(key);  // also for another key of the same tag, which gets the same number
    if (own_slots_[at].number < 0) own_slots_[at] = {tag, static_cast<int32_t>(num_ngrams_++)};
    return own_slots_[at].number;
  }

  int64_t find(uint64_t key) const {
    for (size_t at = key & slot_mask_;; at = (at + 1) & slot_mask_) {
      if (slots_[at].number < 0) return -1;
      if (slots_[at].tag == key >> 32) return slots_[at].number;
    }
  }

  const NormalizedWords& words_;
  size_t length_, shortest_;
  std::vector<size_t> lengths_;
  std::vector<uint64_t> powers_;
  const NgramSlot* slots_ = nullptr;
  const uint64_t* bits_ = nullptr;
  size_t slot_mask_ = 0, block_mask_ = 0;
  std::vector<NgramSlot, BigPages<NgramSlot>> own_slots_;  // empty if the tables are those of another index
  std::vector<uint64_t, BigPages<uint64_t>> own_bits_;
  int64_t num_ngrams_ = 0;
};

}  // namespace ledom
