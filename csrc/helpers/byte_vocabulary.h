// A byte-level BPE vocabulary: the id of every token by its bytes, and the result of merging two ids.
//
// Formula: a unit begins as one id per byte. Then the adjacent pair with the lowest rank (its position in the list of merges) is merged
// repeatedly, the first of equal ones. With whole_units a unit that is a token becomes that token, without merges.
//
// Layout: tokens by UnitCache's keys, in open addressing: up to 15 bytes are the key, longer tokens are compared with
// bytes_. Merges: see merge_table.h; the value is the rank.
// Work: everything is computed once, in one thread, and is constant afterwards.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "big_pages.h"
#include "merge_table.h"
#include "unit_cache.h"

namespace ledom {

constexpr size_t MAX_TOKEN_BYTES = 0xFFFF;

class ByteVocabulary {
 public:
  ByteVocabulary(size_t num_tokens, bool whole_units)
      : whole_units_(whole_units), tokens_(size_t{1} << MergeTable::bits_for(2 * num_tokens)), mask_(tokens_.size() - 1) {
    bytes_.reserve(2 * READ_BEYOND + 16 * num_tokens);
  }

  // Call for every token, then for every merge by its rank, then finish. READ_BEYOND bytes after the given ones must be readable.
  void add_token(const uint8_t* token, size_t length, uint32_t id) {
    if (length == 0 || length > MAX_TOKEN_BYTES) throw std::invalid_argument("a token has no bytes or too many");
    if (id >= MAX_SYMBOLS) throw std::invalid_argument("an id is too high");
    if (id >= is_used_.size()) is_used_.resize(id + 1);
    if (is_used_[id]) throw std::invalid_argument("two tokens have the id " + std::to_string(id));
    is_used_[id] = true;
    if (2 * ++num_tokens_ > tokens_.size()) throw std::length_error("there are more tokens than num_tokens");
    const UnitKey key = UnitCache::key_of(token, length);
    tokens_[place_of(key, token)] = {key, id, static_cast<uint32_t>(bytes_.size())};
    if (key.is_long()) bytes_.insert(bytes_.end(), token, token + length);
    max_length_ = std::max(max_length_, length);
  }

  // Merges the first `length` bytes with the rest of `joined_length` bytes.
  void add_merge(const uint8_t* joined, size_t length, size_t joined_length) {
    const uint32_t first = find(joined, length), second = find(joined + length, joined_length - length);
    const uint32_t result = find(joined, joined_length);
    if (first == NO_TOKEN || second == NO_TOKEN || result == NO_TOKEN)
      throw std::invalid_argument("merge " + std::to_string(results_.size()) + " has parts that are no tokens");
    if (results_.size() >= MAX_MERGES - 1) throw std::invalid_argument("there are too many merges");
    entries_.push_back(MergeTable::entry(first, second, static_cast<uint32_t>(results_.size())));
    results_.push_back(result);
  }

  void finish() {
    for (uint32_t byte = 0; byte < 0x100; byte++) {
      uint8_t token[1 + READ_BEYOND] = {static_cast<uint8_t>(byte)};
      byte_ids_[byte] = find(token, 1);
      if (byte_ids_[byte] == NO_TOKEN) throw std::invalid_argument("there is no token for the byte " + std::to_string(byte));
    }
    merges_.assign(entries_);
    for (const uint64_t entry : entries_) {
      if (!merges_.contains(entry)) throw std::invalid_argument("a merge is there twice");
    }
    for (uint32_t pair = 0; pair < 0x10000; pair++) low_merges_.push_back(merges_.find(pair >> 8, pair & 0xFF));
    first_result_ = results_.empty() ? 0 : results_[0];
    uint32_t rank = 0;
    const auto is_next = [&](uint32_t result) { return result == first_result_ + rank++; };
    if (std::all_of(results_.begin(), results_.end(), is_next)) std::vector<uint32_t>().swap(results_);
    std::vector<uint64_t>().swap(entries_);
    std::vector<bool>().swap(is_used_);
    if (!whole_units_) decltype(tokens_)().swap(tokens_);
  }

  void add_symbols(const uint8_t* p, const uint8_t* end, std::vector<uint32_t>& symbols) const {
    const size_t length = static_cast<size_t>(end - p);
    const uint32_t whole = whole_units_ && length <= max_length_ ? find(p, length) : NO_TOKEN;
    if (whole != NO_TOKEN) return symbols.push_back(whole);
    for (; p < end; p++) symbols.push_back(byte_ids_[*p]);
  }

  uint32_t merged(uint32_t first, uint32_t second) const {
    return (first | second) < 0x100 ? low_merges_[first << 8 | second] : merges_.find(first, second);
  }
  uint32_t rank_of(uint32_t merge) const { return merge == NO_MERGE ? NO_RANK : merge; }
  uint32_t result_of(uint32_t merge) const { return results_.empty() ? merge + first_result_ : results_[merge]; }
  void prefetch(uint32_t first, uint32_t second) const { merges_.prefetch(first, second); }

  static constexpr size_t MAX_IDS_OF_SYMBOL = 1;
  uint32_t* write_ids(uint32_t symbol, uint32_t* ids) const { return *ids = symbol, ids + 1; }

 private:
  static constexpr uint32_t NO_TOKEN = 0xFFFFFFFFu;

  struct Token {
    UnitKey key{0, 0};
    uint32_t id = NO_TOKEN, begin = 0;
  };

  uint32_t find(const uint8_t* bytes, size_t length) const {
    const UnitKey key = UnitCache::key_of(bytes, length);
    return tokens_[place_of(key, bytes)].id;
  }

  size_t place_of(const UnitKey& key, const uint8_t* bytes) const {
    for (size_t place = mixed(key.low, key.high) & mask_;; place = (place + 1) & mask_) {
      const Token& token = tokens_[place];
      if (token.id == NO_TOKEN) return place;
      if (token.key.low != key.low || token.key.high != key.high) continue;
      if (!key.is_long() || std::memcmp(bytes_.data() + token.begin, bytes, key.high >> 32 & MAX_TOKEN_BYTES) == 0) return place;
    }
  }

  const bool whole_units_;
  std::vector<Token, BigPages<Token>> tokens_;
  size_t mask_, num_tokens_ = 0, max_length_ = 0;
  std::vector<uint8_t> bytes_;  // of tokens above 15 bytes
  std::vector<bool> is_used_;
  std::vector<uint64_t> entries_;
  uint32_t byte_ids_[0x100] = {};
  MergeTable merges_;
  std::vector<uint32_t> low_merges_;  // of pairs of ids below 256, which are the single bytes in most vocabularies
  std::vector<uint32_t> results_;     // by rank; empty if the results are consecutive
  uint32_t first_result_ = 0;
};

}  // namespace ledom
