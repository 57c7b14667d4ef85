// Turns ids around inside the bounds of documents, in a flat buffer, as csrc/helpers/turn_documents.h does for files.
//
//   reversed[p] = ids[begin + end - 1 - p]      for p in a document [begin, end)
//
// ids, reversed [total], of `id_bytes` (2 or 4), 16-byte aligned; they may not overlap. bounds int64 [documents + 1]: where documents
// begin, and `total`; they do not decrease, and bounds[0] is 0. With `keep_last` a document's last id (its eod) stays where it is.
#pragma once

#include "common/interface.h"

LEDOM_API int ledom_segment_reverse(const void* ids, const void* bounds, void* reversed, int64_t total, int64_t documents,
                                    int keep_last, int id_bytes, void* stream);
