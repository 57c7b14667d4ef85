// A table of bounded size from the bytes of a unit (usually a word) to its ids.
//
// Layout: open addressing over slots of 32 bytes.
//   low, high  a unit of up to 15 bytes itself, padded with zeros, its length in the top byte of high; for a longer unit its
//              hash in low and 255 << 56 | length << 32 | offset of its bytes in keys_ in high; an empty slot has high 0
//   count      number of ids; ids[3] contains up to three of them, otherwise ids[0] is their offset in long_ids_
// Memory: half of the allowed bytes are slots, a quarter keys_ and a quarter long_ids_; these two use pages only as they fill. When
// three quarters of the slots are used or another part is full, the table is emptied and fills again: frequent units return at
// once, and the table follows a change of subject.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "big_pages.h"
#include "utf8.h"

namespace ledom {

constexpr size_t MAX_CACHED_BYTES = 255;  // longer units are encoded every time
constexpr size_t READ_BEYOND = 64;        // bytes that must be readable after every unit

struct Slot {
  uint64_t low, high;
  uint32_t count, ids[3];
};

struct UnitKey {
  uint64_t low, high;
  bool is_long() const { return high >> 63; }
};

inline uint64_t mixed(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a ^ 0x9E3779B97F4A7C15ull) * (b ^ 0xD1B54A32D192ED03ull);
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

class UnitCache {
 public:
  explicit UnitCache(size_t bytes) {
    if (bytes < 4096 || bytes >> 32) throw std::invalid_argument("a cache must have 4096 bytes to 4 GB");
    size_t slots = 2;
    while (slots * 2 * sizeof(Slot) <= bytes / 2) slots *= 2;
    mask_ = slots - 1;
    max_used_ = slots * 3 / 4;
    slots_.resize(slots);
    max_keys_ = bytes / 4, max_long_ids_ = bytes / 4 / sizeof(uint32_t);
    keys_.reserve(max_keys_), long_ids_.reserve(max_long_ids_);
  }

  static UnitKey key_of(const uint8_t* unit, size_t length) {
    if (length > 15) return long_key(unit, length);
    // Shifts by 64 are undefined, so each mask needs two shifts.
    const size_t low_bits = 8 * std::min<size_t>(length, 8), high_bits = 8 * length - low_bits;
    const uint64_t low_mask = ~(~uint64_t{0} << low_bits / 2 << (low_bits - low_bits / 2));
    const uint64_t high_mask = ~(~uint64_t{0} << high_bits);
    return {load_8_bytes(unit) & low_mask, (load_8_bytes(unit + 8) & high_mask) | static_cast<uint64_t>(length) << 56};
  }

  // The slot at which the search for a unit begins.
  const Slot* first_slot(const UnitKey& key) const { return slots_.data() + (mixed(key.low, key.high) & mask_); }

  // The slot of a unit, or null.
  const Slot* find(const UnitKey& key, const uint8_t* unit, const Slot* slot) const {
    for (const Slot* end = slots_.data() + mask_;; slot = slot == end ? slots_.data() : slot + 1) {
      if (key.is_long() ? is_same(*slot, key, unit) : slot->low == key.low && slot->high == key.high) return slot;
      if (slot->high == 0) return nullptr;
    }
  }

  const uint32_t* long_ids(const Slot& slot) const { return long_ids_.data() + slot.ids[0]; }

  void insert(const UnitKey& key, const uint8_t* unit, const std::vector<uint32_t>& ids) {
    const size_t length = key.is_long() ? (key.high >> 32 & 0xFF) : 0, long_count = ids.size() > 3 ? ids.size() : 0;
    if (length > max_keys_ || long_count > max_long_ids_) return;
    if (used_ >= max_used_ || keys_.size() + length > max_keys_ || long_ids_.size() + long_count > max_long_ids_) clear();
    Slot slot{key.low, key.high, static_cast<uint32_t>(ids.size()), {0, 0, 0}};
    if (key.is_long()) {
      slot.high |= keys_.size();
      keys_.insert(keys_.end(), unit, unit + length);
    }
    if (long_count) {
      slot.ids[0] = static_cast<uint32_t>(long_ids_.size());
      long_ids_.insert(long_ids_.end(), ids.begin(), ids.end());
    } else {
      std::copy(ids.begin(), ids.end(), slot.ids);
    }
    size_t at = mixed(key.low, key.high) & mask_;
    while (slots_[at].high != 0) at = (at + 1) & mask_;
    slots_[at] = slot;
    used_++;
  }

  size_t used() const { return used_; }
  size_t clears() const { return clears_; }
  size_t bytes() const { return (mask_ + 1) * sizeof(Slot) + keys_.capacity() + long_ids_.capacity() * sizeof(uint32_t); }

 private:
  static UnitKey long_key(const uint8_t* unit, size_t length) {
    uint64_t hash = length;
    for (size_t i = 0; i + 16 <= length; i += 16) hash = mixed(load_8_bytes(unit + i) ^ hash, load_8_bytes(unit + i + 8));
    hash = mixed(load_8_bytes(unit + length - 16) ^ hash, load_8_bytes(unit + length - 8));
    return {hash, uint64_t{255} << 56 | static_cast<uint64_t>(length) << 32};
  }

  bool is_same(const Slot& slot, const UnitKey& key, const uint8_t* unit) const {
    if (slot.low != key.low || slot.high >> 32 != key.high >> 32) return false;
    return std::memcmp(keys_.data() + (slot.high & 0xFFFFFFFFu), unit, key.high >> 32 & 0xFF) == 0;
  }

  void clear() {
    std::fill(slots_.begin(), slots_.end(), Slot{});
    keys_.clear(), long_ids_.clear();
    used_ = 0;
    clears_++;
  }

  std::vector<Slot, BigPages<Slot>> slots_;
  std::vector<uint8_t> keys_;
  std::vector<uint32_t> long_ids_;
  size_t mask_ = 0, used_ = 0, max_used_ = 0, max_keys_ = 0, max_long_ids_ = 0, clears_ = 0;
};

}  // namespace ledom
