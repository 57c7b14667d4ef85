// The result of merging two adjacent symbols: a table from pairs of symbols to numbers.
//
// Layout: open addressing over one u64 each, first << 43 | second << 22 | value; symbols below MAX_SYMBOLS, values below 2^22.
// Most requested pairs are missing; a bitmap with at least 8 bits per pair, which stays in the cache, rejects most of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "big_pages.h"

namespace ledom {

constexpr uint32_t MAX_SYMBOLS = (1u << 21) - 1;
constexpr uint32_t MAX_MERGES = 1u << 22;
constexpr uint32_t NO_MERGE = 0x80000000u;
constexpr uint32_t NO_RANK = std::numeric_limits<uint32_t>::max();

class MergeTable {
 public:
  static uint64_t entry(uint32_t first, uint32_t second, uint32_t value) { return pair_of(first, second) << 22 | value; }

  // Of entries with equal pairs the first is found.
  void assign(const std::vector<uint64_t>& entries) {
    const int bits = bits_for(2 * entries.size());
    shift_ = 64 - bits, mask_ = (size_t{1} << bits) - 1;
    slots_.assign(size_t{1} << bits, EMPTY);
    const int bitmap_bits = bits_for(8 * entries.size());
    bitmap_shift_ = 64 - bitmap_bits;
    bitmap_.assign(size_t{1} << (bitmap_bits - 6), 0);
    for (const uint64_t entry : entries) {
      const uint64_t bit = hash(entry >> 22) >> bitmap_shift_;
      bitmap_[bit >> 6] |= uint64_t{1} << (bit & 63);
      size_t slot = hash(entry >> 22) >> shift_;
      while (slots_[slot] != EMPTY) slot = (slot + 1) & mask_;
      slots_[slot] = entry;
    }
  }

  // Returns the value of a pair, or NO_MERGE.
  uint32_t find(uint32_t first, uint32_t second) const {
    const uint64_t pair = pair_of(first, second), hashed = hash(pair), bit = hashed >> bitmap_shift_;
    if (!(bitmap_[bit >> 6] >> (bit & 63) & 1)) return NO_MERGE;
    for (size_t slot = hashed >> shift_;; slot = (slot + 1) & mask_) {
      const uint64_t entry = slots_[slot];
      if (entry >> 22 == pair) return entry & (MAX_MERGES - 1);
      if (entry == EMPTY) return NO_MERGE;
    }
  }

  // Returns true if a search for its pair finds this entry.
  bool contains(uint64_t entry) const {
    return find(static_cast<uint32_t>(entry >> 43), entry >> 22 & MAX_SYMBOLS) == (entry & (MAX_MERGES - 1));
  }

  // Prefetches the memory that `find` reads.
  void prefetch(uint32_t first, uint32_t second) const { __builtin_prefetch(&slots_[hash(pair_of(first, second)) >> shift_]); }

  static uint64_t hash(uint64_t key) { return (key ^ key >> 32) * 0x9E3779B97F4A7C15ull; }

  // Returns the bits of the smallest power of two that is not below a number, at least 10.
  static int bits_for(size_t number) {
    int bits = 10;
    while ((size_t{1} << bits) < number) bits++;
    return bits;
  }

 private:
  static constexpr uint64_t EMPTY = std::numeric_limits<uint64_t>::max();

  static uint64_t pair_of(uint32_t first, uint32_t second) { return static_cast<uint64_t>(first) << 21 | second; }

  std::vector<uint64_t, BigPages<uint64_t>> slots_;
  std::vector<uint64_t> bitmap_;
  size_t mask_ = 0;
  int shift_ = 0, bitmap_shift_ = 0;
};

}  // namespace ledom
