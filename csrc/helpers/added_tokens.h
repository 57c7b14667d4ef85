// Tokens that are cut out of a text before anything else: at each position the longest one, then the search continues after it. Some
// tokens are found only to hide shorter ones; they stay in the text as text.
//
// Layout: tokens by their first byte, the longest first.
// Work: one pass over the text, with memchr if all tokens begin with the same byte.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ledom {

struct AddedToken {
  std::string content;
  uint32_t id;
  bool is_text;  // found, but stays in the text
};

class AddedTokens {
 public:
  explicit AddedTokens(const std::vector<AddedToken>& tokens) {
    for (const AddedToken& token : tokens) {
      if (token.content.empty()) throw std::invalid_argument("an added token is empty");
      by_first_[static_cast<uint8_t>(token.content[0])].push_back(token);
    }
    for (auto& group : by_first_) {
      std::stable_sort(group.begin(), group.end(),
                       [](const AddedToken& a, const AddedToken& b) { return a.content.size() > b.content.size(); });
    }
    const auto begins = [](const std::vector<AddedToken>& group) { return !group.empty(); };
    num_first_ = std::count_if(std::begin(by_first_), std::end(by_first_), begins);
    only_first_ = static_cast<int>(std::find_if(std::begin(by_first_), std::end(by_first_), begins) - std::begin(by_first_));
  }

  // Returns the next token to cut out at or after `from`, or null. Sets `at` to its beginning.
  const AddedToken* next(std::string_view text, size_t from, size_t& at) const {
    while (from < text.size() && num_first_) {
      if (num_first_ == 1) {
        const void* found = std::memchr(text.data() + from, only_first_, text.size() - from);
        if (!found) return nullptr;
        from = static_cast<size_t>(static_cast<const char*>(found) - text.data());
      }
      const AddedToken* token = at_place(text, from);
      if (token && !token->is_text) return at = from, token;
      from += token ? token->content.size() : 1;
    }
    return nullptr;
  }

 private:
  const AddedToken* at_place(std::string_view text, size_t place) const {
    for (const AddedToken& token : by_first_[static_cast<uint8_t>(text[place])]) {
      if (text.compare(place, token.content.size(), token.content) == 0) return &token;
    }
    return nullptr;
  }

  std::vector<AddedToken> by_first_[0x100];
  std::ptrdiff_t num_first_ = 0;
  int only_first_ = 0;
};

}  // namespace ledom
