// Reading characters of valid UTF-8.
#pragma once

#include <cstdint>
#include <cstring>

namespace ledom {

// Returns the code point at p and moves p past it.
inline uint32_t read_code_point(const uint8_t*& p) {
  const uint32_t first = *p;
  if (first < 0x80) return p++, first;
  if (first < 0xE0) return p += 2, (first & 0x1F) << 6 | (p[-1] & 0x3F);
  if (first < 0xF0) return p += 3, (first & 0x0F) << 12 | (p[-2] & 0x3Fu) << 6 | (p[-1] & 0x3Fu);
  p += 4;
  return (first & 0x07) << 18 | (p[-3] & 0x3Fu) << 12 | (p[-2] & 0x3Fu) << 6 | (p[-1] & 0x3Fu);
}

inline uint64_t load_8_bytes(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, 8);
  return value;
}

}  // namespace ledom
