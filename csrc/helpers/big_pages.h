// Memory for tables with random access, aligned to cache lines. It is in big pages if the system has them, so that fewer accesses walk the
// page table.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>

namespace ledom {

template <class T>
struct BigPages {
  using value_type = T;
  static constexpr std::size_t BIG_PAGE = std::size_t{1} << 21;

  BigPages() = default;
  template <class Other>
  BigPages(const BigPages<Other>&) {}

  T* allocate(std::size_t count) {
    const std::size_t bytes = count * sizeof(T), page = bytes < BIG_PAGE ? 64 : BIG_PAGE;
    void* memory = std::aligned_alloc(page, (bytes + page - 1) / page * page);
    if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (page == BIG_PAGE) madvise(memory, bytes, MADV_HUGEPAGE);  // only a hint; its result does not matter
#endif
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, std::size_t) { std::free(memory); }

  bool operator==(const BigPages&) const { return true; }
  bool operator!=(const BigPages&) const { return false; }
};

}  // namespace ledom
