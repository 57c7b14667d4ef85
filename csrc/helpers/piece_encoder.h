// piece_encoder: texts -> ids of a SentencePiece BPE vocabulary, the same ids as the sentencepiece library's.
//
// A text, with a space in front if the vocabulary has a dummy prefix, is cut wherever no merge can happen (PieceVocabulary::joins
// false), which in a usual vocabulary is around words. Such a unit has the same ids wherever it stands, so they are kept in a
// table (UnitCache) from its bytes; what is not there is merged by the rule in piece_vocabulary.h.
//
// texts   UTF-8, valid (Python's strings are)
// ids     [total]      of all texts one after the other, text order
// offsets [texts + 1]  text t has ids[offsets[t] .. offsets[t + 1])
//
// Work: one pass over the bytes, one thread, under a lock: it runs inside worker processes, one a core. A unit of n characters
// that is not in the table costs n^2 steps on few bytes up to SCAN_LIMIT characters, n log n above.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "piece_vocabulary.h"
#include "unit_cache.h"

namespace ledom {

constexpr size_t SCAN_LIMIT = 64;
constexpr size_t UNITS_AHEAD = 64;  // cut before the first of them is looked up, so that memory can be fetched meanwhile
constexpr size_t BLOCK = 64;        // bytes, one bit each
constexpr size_t KEPT_SCRATCH_BYTES = 1 << 22;
constexpr uint32_t NOTHING = 0xFFFFFFFFu;

// A growing array of ids whose memory can be handed on; new entries are not initialised.
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

class PieceEncoder {
 public:
  PieceEncoder(PieceVocabulary vocabulary, bool dummy_prefix, size_t cache_bytes)
      : vocabulary_(std::move(vocabulary)), dummy_prefix_(dummy_prefix), cache_(cache_bytes) {
    for (uint32_t code = 0; code < 0x80; code++) {
      Slot& slot = ascii_[code];
      slot.low = code, slot.high = uint64_t{1} << 56;
      slot.count = static_cast<uint32_t>(vocabulary_.write_ids(vocabulary_.symbol_of(code), slot.ids) - slot.ids);
    }
  }

  void encode(const std::vector<std::string_view>& texts, IdBuffer& ids, int64_t* offsets) {
    const std::lock_guard<std::mutex> lock(mutex_);
    offsets[0] = 0;
    for (size_t t = 0; t < texts.size(); t++) {
      const size_t begin = ids.size();
      if (!texts[t].empty()) encode_text(texts[t], ids);
      if (!vocabulary_.byte_fallback()) join_unknown(ids, begin);
      offsets[t + 1] = static_cast<int64_t>(ids.size());
      if (text_.size() > KEPT_SCRATCH_BYTES) free_scratch();
    }
  }

  const PieceVocabulary& vocabulary() const { return vocabulary_; }
  const UnitCache& cache() const { return cache_; }
  uint64_t num_units() const { return num_units_; }
  uint64_t num_misses() const { return num_misses_; }
  uint64_t num_steps() const { return num_steps_; }  // of merging: pairs looked up, symbols scanned, candidates taken

 private:
  struct Unit {
    const uint8_t* begin;
    size_t length;
    UnitKey key;
    const Slot* slot;  // where the search begins
  };

  struct Candidate {
    uint32_t rank, at, first, second;
    bool operator<(const Candidate& other) const {  // the top of a heap is the lowest rank, of equals the one that comes first
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };

  void encode_text(std::string_view text, IdBuffer& ids) {
    if (text.size() >= NOTHING - READ_BEYOND) throw std::length_error("a text must have less than 4 GB");
    text_.resize(text.size() + 1 + READ_BEYOND);
    uint8_t* begin = text_.data();
    begin[0] = ' ';
    std::memcpy(begin + 1, text.data(), text.size());
    std::memset(begin + 1 + text.size(), 0, READ_BEYOND);
    const uint8_t* end = begin + 1 + text.size();
    num_waiting_ = 0;
    const uint8_t* unit = begin + (dummy_prefix_ ? 0 : 1);
    const uint8_t* next = unit;
    uint32_t previous = read_character(next);
    for (const uint8_t* block = unit; block < end; block += BLOCK) {
      for (uint64_t cuts = cuts_in(block, end, next, previous); cuts; cuts &= cuts - 1) {
        const uint8_t* cut = block + __builtin_ctzll(cuts);
        add_unit(unit, cut);
        unit = cut;
      }
      if (num_waiting_ >= UNITS_AHEAD) encode_waiting(ids);
    }
    add_unit(unit, end);
    encode_waiting(ids);
  }

  // Bit i: a unit begins at block[i]. next is the first character not looked at, in or after the block; previous the one before.
  uint64_t cuts_in(const uint8_t* block, const uint8_t* end, const uint8_t*& next, uint32_t& previous) const {
    const uint8_t* block_end = block + std::min<size_t>(BLOCK, static_cast<size_t>(end - block));
    uint64_t all = previous, cuts = 0;
    for (size_t i = 0; i < BLOCK; i += 8) all |= load_8_bytes(block + i);
    if ((all & 0x8080808080808080ull) == 0 && previous < 0x80 && block_end - block == BLOCK) {
      const size_t first = static_cast<size_t>(next - block);
      for (size_t i = 0; i < BLOCK; i++) {
        const uint32_t code = block[i];
        cuts |= static_cast<uint64_t>(!vocabulary_.joins_ascii(previous, code)) << i;
        previous = code;
      }
      next = block_end;
      return cuts >> first << first;
    }
    while (next < block_end) {
      const size_t at = static_cast<size_t>(next - block);
      const uint32_t code = read_character(next);
      cuts |= static_cast<uint64_t>(!vocabulary_.joins(previous, code)) << at;
      previous = code;
    }
    return cuts;
  }

  void add_unit(const uint8_t* begin, const uint8_t* end) {
    Unit& unit = waiting_[num_waiting_++];
    unit.begin = begin;
    unit.length = static_cast<size_t>(end - begin);
    if (unit.length > MAX_CACHED_BYTES) return;
    unit.key = UnitCache::key_of(begin, unit.length);
    unit.slot = unit.length == 1 ? &ascii_[*begin & 0x7F] : cache_.first_slot(unit.key);
    __builtin_prefetch(unit.slot);
  }

  void encode_waiting(IdBuffer& ids) {
    for (size_t i = 0; i < num_waiting_; i++) encode_unit(waiting_[i], ids);
    num_units_ += num_waiting_;
    num_waiting_ = 0;
  }

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

  // The ids of a unit in unit_ids_.
  void merge_unit(const uint8_t* unit, size_t length) {
    num_misses_++;
    symbols_.clear();
    for (const uint8_t *p = unit, *end = unit + length; p < end;) symbols_.push_back(vocabulary_.symbol_of(read_character(p)));
    symbols_.size() <= SCAN_LIMIT ? merge_by_scan() : merge_by_heap();
    unit_ids_.resize(4 * symbols_.size());
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

  // Few symbols: look at all pairs for the best one every time. pair_[i] is what symbols i and i + 1 become.
  void merge_by_scan() {
    size_t size = symbols_.size();
    uint32_t pair[SCAN_LIMIT], rank[SCAN_LIMIT];
    const auto look_up = [&](size_t i) {
      pair[i] = merged(symbols_[i], symbols_[i + 1]);
      rank[i] = vocabulary_.rank_of(pair[i]);
    };
    for (size_t i = 0; i + 1 < size; i++) vocabulary_.prefetch(symbols_[i], symbols_[i + 1]);
    for (size_t i = 0; i + 1 < size; i++) look_up(i);
    while (size > 1) {
      num_steps_ += size;
      const size_t best = static_cast<size_t>(std::min_element(rank, rank + size - 1) - rank);
      if (rank[best] == NO_RANK) break;
      symbols_[best] = pair[best];
      if (best > 0) vocabulary_.prefetch(symbols_[best - 1], symbols_[best]);
      if (best + 2 < size) vocabulary_.prefetch(symbols_[best], symbols_[best + 2]);
      for (size_t i = best + 1; i + 1 < size; i++) {
        symbols_[i] = symbols_[i + 1];
        pair[i] = pair[i + 1];
        rank[i] = rank[i + 1];
      }
      size--;
      if (best > 0) look_up(best - 1);
      if (best + 1 < size) look_up(best);
    }
    symbols_.resize(size);
  }

  // Many symbols: a heap of candidates. Symbols that were merged into the one before them become NOTHING; a candidate whose two
  // symbols are no longer there is passed over.
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
      symbols_[best.at] = vocabulary_.merged(best.first, best.second);
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
    if (result == UNKNOWN) return false;
    heap_.push_back({vocabulary_.rank_of(result), at, first, second});
    return true;
  }

  // Without byte fallback a run of unknown characters is one id.
  void join_unknown(IdBuffer& ids, size_t begin) const {
    const uint32_t unknown = vocabulary_.unknown_id();
    uint32_t* first = ids.data() + begin;
    uint32_t* last = std::unique(first, ids.data() + ids.size(), [=](uint32_t a, uint32_t b) { return a == unknown && b == unknown; });
    ids.shrink_to(static_cast<size_t>(last - ids.data()));
  }

  void free_scratch() {
    std::vector<uint8_t>().swap(text_);
    for (auto* scratch : {&symbols_, &unit_ids_, &next_, &previous_}) std::vector<uint32_t>().swap(*scratch);
    std::vector<Candidate>().swap(heap_);
  }

  const PieceVocabulary vocabulary_;
  const bool dummy_prefix_;
  Slot ascii_[0x80] = {};  // of units of one byte
  UnitCache cache_;
  std::mutex mutex_;
  std::vector<uint8_t> text_;
  std::vector<uint32_t> symbols_, unit_ids_, next_, previous_;
  std::vector<Candidate> heap_;
  Unit waiting_[UNITS_AHEAD + BLOCK];
  size_t num_waiting_ = 0;
  uint64_t num_units_ = 0, num_misses_ = 0, num_steps_ = 0;
};

}  // namespace ledom
