// concatenate_documents: documents in text order -> the content of a shard (model order, each with an optional bos, closed by eod).
//
// ids     [total]          ids of all documents, one document after the other, in text order
// offsets [documents + 1]  document d is ids[offsets[d] .. offsets[d + 1])
// bos     -1 for none, else an id that comes first in model order
// out     [total + kept]   document d, reversed if `reverse`, then eod; documents without ids add nothing
//                          ([total + 2 kept] with bos)
//
// Every id is compared with vocab_size before it is narrowed, and with eod, which must not occur inside a document.
// One pass, one thread: it runs inside worker processes, one per core. Bytes moved per id: 4 read and sizeof(Out) written.
#pragma once
#include <cstdint>

namespace ledom {

// Returns -1, or the position in `ids` of the first id that is vocab_size or more, or is eod (then `out` is incomplete).
template <class Out>
int64_t concatenate_documents(const uint32_t* ids, const int64_t* offsets, int64_t documents, Out* out, bool reverse, int64_t bos,
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
    if (bos >= 0) *out++ = static_cast<Out>(bos);
    if (reverse) {
      for (int64_t i = end - 1; i >= begin; i--) *out++ = static_cast<Out>(ids[i]);
    } else {
      for (int64_t i = begin; i < end; i++) *out++ = static_cast<Out>(ids[i]);
    }
    *out++ = static_cast<Out>(eod);
  }
  return -1;
}

}  // namespace ledom
