// A number for each code point, read from runs of equal numbers.
//
// Layout: the code points in pages of 128; equal pages are stored once. numbers_[pages_[code >> 7] << 7 | code & 127].
// Work: one pass over all code points at construction (2 ms); constant afterwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ledom {

constexpr uint32_t NUM_CODE_POINTS = 0x110000;

class CodePoints {
 public:
  // runs: first code point << 8 | number, ascending, the first for code point 0.
  template <size_t COUNT>
  explicit CodePoints(const uint32_t (&runs)[COUNT]) : pages_(NUM_CODE_POINTS >> PAGE_BITS) {
    std::map<std::string, uint16_t> known;
    size_t run = 0;
    for (uint32_t first = 0; first < NUM_CODE_POINTS; first += PAGE) {
      std::string page(PAGE, '\0');
      for (uint32_t i = 0; i < PAGE; i++) {
        while (run + 1 < COUNT && runs[run + 1] >> 8 <= first + i) run++;
        page[i] = static_cast<char>(runs[run] & 0xFF);
      }
      const auto added = known.emplace(page, static_cast<uint16_t>(known.size()));
      if (added.second) numbers_.insert(numbers_.end(), page.begin(), page.end());
      pages_[first >> PAGE_BITS] = added.first->second;
    }
  }

  uint8_t operator[](uint32_t code) const {
    return numbers_[static_cast<size_t>(pages_[code >> PAGE_BITS]) << PAGE_BITS | (code & (PAGE - 1))];
  }

 private:
  static constexpr uint32_t PAGE_BITS = 7, PAGE = 1u << PAGE_BITS;

  std::vector<uint16_t> pages_;
  std::vector<uint8_t> numbers_;
};

}  // namespace ledom
