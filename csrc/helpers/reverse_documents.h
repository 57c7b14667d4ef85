// reverse_documents: stored documents -> the same documents in the other direction, each closed by eod.
//
// stored  [sum(lengths)]  documents, one after the other; with `closed` each ends with eod, otherwise none contains one
// lengths [documents]     stored ids of each document, including its eod if it has one
// out     [kept]          document d reversed, then eod; documents without another id add nothing
//
// Every id is compared with vocab_size before it is narrowed, and eod may occur only at the end of a closed document. Reversing
// closed documents twice gives the same bytes. One pass over each document while it is in cache, one thread. Bytes moved per
// id: sizeof(In) read and sizeof(Out) written.
#pragma once
#include <cstdint>
#include <type_traits>

namespace ledom {

// Returns -1, or the position in `stored` of the first id that is out of range, an eod inside a document, or a closed
// document's last id that is not eod (then `out` is incomplete).
template <class In, class Out>
int64_t reverse_documents(const In* stored, const int64_t* lengths, int64_t documents, Out* out, bool closed, uint32_t eod,
                          uint32_t vocab_size) {
  using Id = std::make_unsigned_t<In>;  // a negative id becomes a large one
  const auto is_bad = [=](Id id) { return id >= vocab_size || id == eod; };
  const In* document = stored;
  for (int64_t d = 0; d < documents; d++) {
    if (lengths[d] == 0) continue;
    const int64_t count = lengths[d] - (closed ? 1 : 0);
    unsigned bad = 0;
    for (int64_t i = 0; i < count; i++) bad |= is_bad(static_cast<Id>(document[i]));
    if (bad) {
      while (!is_bad(static_cast<Id>(*document))) document++;
      return document - stored;
    }
    if (closed && static_cast<Id>(document[count]) != eod) return document + count - stored;
    if (count) {
      for (int64_t i = 0; i < count; i++) out[i] = static_cast<Out>(document[count - 1 - i]);
      out[count] = static_cast<Out>(eod);
      out += count + 1;
    }
    document += lengths[d];
  }
  return -1;
}

}  // namespace ledom
