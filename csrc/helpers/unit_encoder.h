// unit_encoder: units of text -> ids, each merged once and then cached. Shared by the encoders, which cut texts into units.
//
// A unit is a string that no merge crosses (usually a word), so it always has the same ids; a table (UnitCache) maps its bytes to
// them. A unit that is not in the table is merged: it begins as the symbols of Vocabulary::add_symbols, then the adjacent pair of the
// lowest rank becomes one symbol repeatedly, the first of equal ones.
//
// Vocabulary has: add_symbols(begin, end, symbols); merged(first, second) -> a merge, NO_MERGE if there is none;
// rank_of(merge), NO_RANK for NO_MERGE; result_of(merge) -> symbol; prefetch(first, second);
// write_ids(symbol, ids) -> the position after them, at most MAX_IDS_OF_SYMBOL.
//
// Work: one thread, under a lock: it runs inside worker processes, one per core. A unit of n symbols that is not in the table needs
// n^2 steps on few bytes up to SCAN_LIMIT symbols, n log n above.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "merge_table.h"
#include "unit_cache.h"

namespace ledom {

constexpr int SCAN_BITS = 6;
constexpr size_t SCAN_LIMIT = 1 << SCAN_BITS;
constexpr int32_t NO_KEY = 0x7FFFFFFF;
constexpr size_t UNITS_AHEAD = 64;  // cut before the first of them is looked up, so that memory can be prefetched
constexpr size_t UNITS_AT_ONCE = 64;
constexpr size_t KEPT_SCRATCH_BYTES = 1 << 22;
constexpr uint32_t NOTHING = 0xFFFFFFFFu;

// A growing array of ids whose memory can be passed on; new entries are not initialised.
class IdBuffer {
 public:
  uint32_t* room_for(size_t count) {
    if (size_ + count > capacity_) grow(count);
    return data_.get() + size_;
  }
  void add(size_t count) { size_ += count; }
  void shrink_to(size_t size) { size_ = size; }
  uint32_t* data() { return data_.get(); }
  size_t size() const { return size_; }
  uint32_t* release() { return data_.release(); }

 private:
  struct Free {
    void operator()(uint32_t* ids) const { std::free(ids); }
  };

  void grow(size_t count) {
    capacity_ = std::max(size_ + count, 2 * capacity_ + 1024);
    auto* moved = static_cast<uint32_t*>(std::realloc(data_.get(), capacity_ * sizeof(uint32_t)));
    if (!moved) throw std::bad_alloc();
    static_cast<void>(data_.release());
    data_.reset(moved);
  }

  std::unique_ptr<uint32_t, Free> data_;
  size_t size_ = 0, capacity_ = 0;
};

template <class Vocabulary>
class UnitEncoder {
 public:
  UnitEncoder(Vocabulary vocabulary, size_t cache_bytes) : vocabulary_(std::move(vocabulary)), cache_(cache_bytes) {
    for (uint32_t code = 0; code < 0x80; code++) {
      const uint8_t unit[1 + READ_BEYOND] = {static_cast<uint8_t>(code)};
      std::vector<uint32_t> symbols;
      vocabulary_.add_symbols(unit, unit + 1, symbols);
      Slot& slot = ascii_[code];
      slot.low = code, slot.high = uint64_t{1} << 56;
      slot.count = static_cast<uint32_t>(vocabulary_.write_ids(symbols[0], slot.ids) - slot.ids);
    }
  }

  // Encodes each text with encode_text(text, ids); offsets[t] is the beginning of text t.
  template <class EncodeText>
  void encode(const std::vector<std::string_view>& texts, IdBuffer& ids, int64_t* offsets, EncodeText encode_text) {
    const std::lock_guard<std::mutex> lock(mutex_);
    offsets[0] = 0;
    for (size_t t = 0; t < texts.size(); t++) {
      if (!texts[t].empty()) encode_text(texts[t], ids);
      offsets[t + 1] = static_cast<int64_t>(ids.size());
      if (text_.size() > KEPT_SCRATCH_BYTES) free_scratch();
    }
  }

  // Copies the text after `before` bytes, followed by READ_BEYOND zero bytes; for the units of encode_text.
  uint8_t* copied(std::string_view text, size_t before) {
    if (text.size() >= NOTHING - before - READ_BEYOND) throw std::length_error("a text must have less than 4 GB");
    text_.resize(before + text.size() + READ_BEYOND);
    std::memcpy(text_.data() + before, text.data(), text.size());
    std::memset(text_.data() + before + text.size(), 0, READ_BEYOND);
    num_waiting_ = 0;
    return text_.data();
  }

  // Adds a unit; at most UNITS_AT_ONCE between two calls of many_are_waiting.
  void add_unit(const uint8_t* begin, const uint8_t* end) {
    Unit& unit = waiting_[num_waiting_++];
    unit.begin = begin;
    unit.length = static_cast<size_t>(end - begin);
    if (unit.length > MAX_CACHED_BYTES) return;
    unit.key = UnitCache::key_of(begin, unit.length);
    unit.slot = unit.length == 1 ? &ascii_[*begin & 0x7F] : cache_.first_slot(unit.key);
    __builtin_prefetch(unit.slot);
  }

  bool many_are_waiting() const { return num_waiting_ >= UNITS_AHEAD; }

  void encode_waiting(IdBuffer& ids) {
    for (size_t i = 0; i < num_waiting_; i++) encode_unit(waiting_[i], ids);
    num_units_ += num_waiting_;
    num_waiting_ = 0;
  }

  const Vocabulary& vocabulary() const { return vocabulary_; }
  const UnitCache& cache() const { return cache_; }
  uint64_t num_units() const { return num_units_; }
  uint64_t num_misses() const { return num_misses_; }
  uint64_t num_steps() const { return num_steps_; }  // steps of merging: pairs looked up, symbols scanned, candidates taken

 private:
  struct Unit {
    const uint8_t* begin;
    size_t length;
    UnitKey key;
    const Slot* slot;  // the slot at which the search begins
  };

  struct Candidate {
    uint32_t rank, at, first, second;
    bool operator<(const Candidate& other) const {  // the top of a heap has the lowest rank, the first of equal ones
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };

  void encode_unit(const Unit& unit, IdBuffer& ids) {
    const bool is_cached = unit.length <= MAX_CACHED_BYTES;
    if (const Slot* slot = is_cached ? cache_.find(unit.key, unit.begin, unit.slot) : nullptr) {
      if (slot->count > 3) return append(cache_.long_ids(*slot), slot->count, ids);
      std::memcpy(ids.room_for(3), slot->ids, sizeof(slot->ids));
      return ids.add(slot->count);
    }
    merge_unit(unit.begin, unit.length);
    if (is_cached) cache_.insert(unit.key, unit.begin, unit_ids_);
    append(unit_ids_.data(), unit_ids_.size(), ids);
  }

  static void append(const uint32_t* from, size_t count, IdBuffer& ids) {
    std::memcpy(ids.room_for(count), from, count * sizeof(uint32_t));
    ids.add(count);
  }

  // Writes the ids of a unit to unit_ids_.
  void merge_unit(const uint8_t* unit, size_t length) {
    num_misses_++;
    symbols_.clear();
    vocabulary_.add_symbols(unit, unit + length, symbols_);
    symbols_.size() <= SCAN_LIMIT ? merge_by_scan() : merge_by_heap();
    unit_ids_.resize(Vocabulary::MAX_IDS_OF_SYMBOL * symbols_.size());
    uint32_t* written = unit_ids_.data();
    for (const uint32_t symbol : symbols_) {
      if (symbol != NOTHING) written = vocabulary_.write_ids(symbol, written);
    }
    unit_ids_.resize(static_cast<size_t>(written - unit_ids_.data()));
  }

  uint32_t merged(uint32_t first, uint32_t second) {
    num_steps_++;
    return vocabulary_.merged(first, second);
  }

  // For few symbols, which stay at their positions: the key of position i is rank << 6 | i, with the rank of merging its symbol with
  // the next one, so the smallest key is the next merge. Symbols that were merged into the one before them become NOTHING.
  void merge_by_scan() {
    const size_t size = symbols_.size();
    alignas(16) int32_t keys[SCAN_LIMIT];
    uint32_t merges[SCAN_LIMIT];
    uint8_t next[SCAN_LIMIT], previous[SCAN_LIMIT];
    const auto look_up = [&](size_t i) {
      merges[i] = next[i] < size ? merged(symbols_[i], symbols_[next[i]]) : NO_MERGE;
      const uint32_t rank = vocabulary_.rank_of(merges[i]);
      keys[i] = rank == NO_RANK ? NO_KEY : static_cast<int32_t>(rank << SCAN_BITS | i);
    };
    for (size_t i = 0; i + 1 < size; i++) vocabulary_.prefetch(symbols_[i], symbols_[i + 1]);
    for (size_t i = 0; i < size; i++) next[i] = static_cast<uint8_t>(i + 1), previous[i] = static_cast<uint8_t>(i - 1);
    for (size_t i = 0; i < size; i++) look_up(i);
    const size_t blocks = (size + 3) / 4;
    for (size_t i = size; i < 4 * blocks; i++) keys[i] = NO_KEY;
    for (int32_t best; (best = smallest(keys, blocks)) != NO_KEY;) {
      num_steps_ += blocks;
      const size_t at = best & (SCAN_LIMIT - 1), second = next[at];
      symbols_[at] = vocabulary_.result_of(merges[at]);
      symbols_[second] = NOTHING;
      keys[second] = NO_KEY;
      next[at] = next[second];
      if (next[at] < size) vocabulary_.prefetch(symbols_[at], symbols_[next[at]]), previous[next[at]] = static_cast<uint8_t>(at);
      if (at > 0) look_up(previous[at]);
      look_up(at);
    }
  }

  // Returns the smallest of 4 * blocks keys, four at once.
  static int32_t smallest(const int32_t* keys, size_t blocks) {
    typedef int32_t Four __attribute__((vector_size(16)));
    const auto* block = reinterpret_cast<const Four*>(keys);
    Four best = block[0];
    for (size_t i = 1; i < blocks; i++) best = block[i] < best ? block[i] : best;
    return std::min(std::min(best[0], best[1]), std::min(best[2], best[3]));
  }

  // For many symbols: a heap of candidates. Symbols that were merged into the one before them become NOTHING; a candidate whose two
  // symbols have changed is skipped.
  void merge_by_heap() {
    const uint32_t size = static_cast<uint32_t>(symbols_.size());
    next_.resize(size), previous_.resize(size);
    for (uint32_t i = 0; i < size; i++) next_[i] = i + 1 < size ? i + 1 : NOTHING, previous_[i] = i ? i - 1 : NOTHING;
    heap_.clear();
    for (uint32_t i = 0; i + 1 < size; i++) add_candidate(i);
    std::make_heap(heap_.begin(), heap_.end());
    while (!heap_.empty()) {
      num_steps_++;
      const Candidate best = heap_.front();
      std::pop_heap(heap_.begin(), heap_.end());
      heap_.pop_back();
      const uint32_t second = next_[best.at];
      if (symbols_[best.at] != best.first || second == NOTHING || symbols_[second] != best.second) continue;
      symbols_[best.at] = vocabulary_.result_of(vocabulary_.merged(best.first, best.second));
      symbols_[second] = NOTHING;
      next_[best.at] = next_[second];
      if (next_[second] != NOTHING) previous_[next_[second]] = best.at;
      if (previous_[best.at] != NOTHING && add_candidate(previous_[best.at])) std::push_heap(heap_.begin(), heap_.end());
      if (next_[best.at] != NOTHING && add_candidate(best.at)) std::push_heap(heap_.begin(), heap_.end());
    }
  }

  bool add_candidate(uint32_t at) {
    const uint32_t first = symbols_[at], second = symbols_[next_[at]];
    const uint32_t result = merged(first, second);
    if (result == NO_MERGE) return false;
    heap_.push_back({vocabulary_.rank_of(result), at, first, second});
    return true;
  }

  void free_scratch() {
    std::vector<uint8_t>().swap(text_);
    for (auto* scratch : {&symbols_, &unit_ids_, &next_, &previous_}) std::vector<uint32_t>().swap(*scratch);
    std::vector<Candidate>().swap(heap_);
  }

  const Vocabulary vocabulary_;
  Slot ascii_[0x80] = {};  // for units of one byte
  UnitCache cache_;
  std::mutex mutex_;
  std::vector<uint8_t> text_;
  std::vector<uint32_t> symbols_, unit_ids_, next_, previous_;
  std::vector<Candidate> heap_;
  Unit waiting_[UNITS_AHEAD + UNITS_AT_ONCE];
  size_t num_waiting_ = 0;
  uint64_t num_units_ = 0, num_misses_ = 0, num_steps_ = 0;
};

}  // namespace ledom
