// Segment reverse; formula and layout are in segment_reverse.h.
//
// Work: a thread writes one group of 16 bytes. It finds the document of the group's first id by bisection in `bounds`. If the whole
// group is inside what is turned of one document, its source is as many neighbouring ids, which lie across two aligned groups of
// 16 bytes at most: both are read (the second is the neighbour's first, and in the cache) and shifted into place in registers.
// Groups across a document's end go id by id, and so does what would be read from beyond the
// buffer's end. Nothing is shared.
#include "segment_reverse/segment_reverse.h"

#include "common/platform.h"

namespace ledom {
namespace {

constexpr int THREADS = 128, GROUP_BYTES = 16;

// The last document that begins at or before `position` and is not empty; bounds[document] <= position < bounds[document + 1].
__device__ __forceinline__ int64_t document_of(const int64_t* bounds, int64_t documents, int64_t position) {
  int64_t low = 0, high = documents;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (bounds[middle] <= position)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Where the id that comes to `position` is, in a document [begin, end).
__device__ __forceinline__ int64_t source_of(int64_t position, int64_t begin, int64_t end, int keep_last) {
  const int64_t last = end - (keep_last ? 1 : 0);
  return position < last ? begin + last - 1 - position : position;
}

template <class Id>
__device__ __forceinline__ void turn_words(const uint4& low, const uint4& high, int offset, Id (&turned)[GROUP_BYTES / sizeof(Id)]) {
  constexpr int IDS = GROUP_BYTES / sizeof(Id), A_WORD = 4 / sizeof(Id);
  const unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  Id ids[2 * IDS];
#pragma unroll
  for (int i = 0; i < 2 * IDS; i++) ids[i] = static_cast<Id>(words[i / A_WORD] >> (i % A_WORD * 8 * sizeof(Id)));
#pragma unroll
  for (int i = 0; i < IDS; i++) {
    Id id = 0;
#pragma unroll
    for (int j = 0; j < IDS; j++)  // `offset` chooses; an index that is not constant would put the ids in local memory
      if (j == offset) id = ids[j + IDS - 1 - i];
    turned[i] = id;
  }
}

template <class Id>
__device__ __forceinline__ uint4 pack_ids(const Id (&ids)[GROUP_BYTES / sizeof(Id)]) {
  constexpr int A_WORD = 4 / sizeof(Id);
  unsigned words[4] = {0u, 0u, 0u, 0u};
#pragma unroll
  for (int i = 0; i < GROUP_BYTES / static_cast<int>(sizeof(Id)); i++)
    words[i / A_WORD] |= static_cast<unsigned>(ids[i]) << (i % A_WORD * 8 * sizeof(Id));
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class Id>
__global__ void __launch_bounds__(THREADS)
    segment_reverse(const Id* __restrict__ ids, const int64_t* __restrict__ bounds, Id* __restrict__ reversed, int64_t total,
                    int64_t documents, int keep_last) {
  constexpr int IDS = GROUP_BYTES / sizeof(Id);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * IDS;
  if (first >= total) return;
  int64_t document = document_of(bounds, documents, first);
  int64_t begin = bounds[document], end = bounds[document + 1];
  const int64_t last = end - (keep_last ? 1 : 0), source = begin + last - first - IDS;  // of the group's last id
  const int offset = static_cast<int>(source % IDS);  // of no use where it is negative: then the group reaches over the end
  if (first + IDS <= last && source - offset + 2 * IDS <= total) {
    const uint4* groups = reinterpret_cast<const uint4*>(ids) + source / IDS;
    const uint4 low = groups[0];
    uint4 high = low;
    if (offset != 0) high = groups[1];
    Id turned[IDS];
    turn_words<Id>(low, high, offset, turned);
    reinterpret_cast<uint4*>(reversed)[first / IDS] = pack_ids<Id>(turned);
    return;
  }
  for (int64_t position = first; position < total && position < first + IDS; position++) {
    while (position >= end) {  // empty documents, too
      document++;
      begin = bounds[document], end = bounds[document + 1];
    }
    reversed[position] = ids[source_of(position, begin, end, keep_last)];
  }
}

template <class Id>
int start(const void* ids, const void* bounds, void* reversed, int64_t total, int64_t documents, int keep_last, void* stream) {
  constexpr int64_t A_BLOCK = THREADS * GROUP_BYTES / sizeof(Id);
  const int64_t blocks = (total + A_BLOCK - 1) / A_BLOCK;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
  return launch(&segment_reverse<Id>, dim3(static_cast<unsigned>(blocks)), dim3(THREADS), stream, static_cast<const Id*>(ids),
                static_cast<const int64_t*>(bounds), static_cast<Id*>(reversed), total, documents, keep_last);
}

}  // namespace
}  // namespace ledom

LEDOM_API int ledom_segment_reverse(const void* ids, const void* bounds, void* reversed, int64_t total, int64_t documents,
                                    int keep_last, int id_bytes, void* stream) {
  using namespace ledom;
  if (total < 0 || documents < 0 || (documents == 0 && total > 0) || (id_bytes != 2 && id_bytes != 4)) return cudaErrorInvalidValue;
  if (total == 0) return cudaSuccess;
  if (!is_aligned(ids) || !is_aligned(bounds) || !is_aligned(reversed)) return cudaErrorMisalignedAddress;
  return id_bytes == 2 ? start<uint16_t>(ids, bounds, reversed, total, documents, keep_last, stream)
                       : start<uint32_t>(ids, bounds, reversed, total, documents, keep_last, stream);
}
