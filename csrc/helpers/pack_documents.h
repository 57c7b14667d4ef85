// pack_documents: documents in text order -> what a shard stores (model order, each opened by bos if asked, closed by eod).
//
// ids     [total]          ids of all documents one after the other, text order
// offsets [documents + 1]  document d is ids[offsets[d] .. offsets[d + 1])
// bos     -1 for none, else an id that stands first in model order
// packed  [total + kept]   document d, turned around if `reverse`, then eod; documents without ids leave nothing
//                          ([total + 2 kept] with bos)
//
// Every id is compared with vocab_size before it is narrowed, and with eod, which ends documents and may stand in none.
// One pass, one thread: it runs inside worker processes, one a core. Bytes moved: 4 read and sizeof(Out) written an id.
#pragma once
#include <cstdint>

namespace ledom {

// Returns -1, or the position in `ids` of the first id that is at or above vocab_size or is eod (then `packed` is incomplete).
template <class Out>
int64_t pack_documents(const uint32_t* ids, const int64_t* offsets, int64_t documents, Out* packed, bool reverse, int64_t bos,
                       uint32_t eod, uint32_t vocab_size) {
  for (int64_t d = 0; d < documents; d++) {
    const int64_t begin = offsets[d], end = offsets[d + 1];
    if (begin == end) continue;
    uint32_t largest = 0, has_eod = 0;
    for (int64_t i = begin; i < end; i++) {
      largest = ids[i] > largest ? ids[i] : largest;
      has_eod |= static_cast<uint32_t>(ids[i] == eod);
    }
    if (largest >= vocab_size || has_eod) {
      int64_t bad = begin;
      while (ids[bad] < vocab_size && ids[bad] != eod) bad++;
      return bad;
    }
    if (bos >= 0) *packed++ = static_cast<Out>(bos);
    if (reverse) {
      for (int64_t i = end - 1; i >= begin; i--) *packed++ = static_cast<Out>(ids[i]);
    } else {
      for (int64_t i = begin; i < end; i++) *packed++ = static_cast<Out>(ids[i]);
    }
    *packed++ = static_cast<Out>(eod);
  }
  return -1;
}

}  // namespace ledom
