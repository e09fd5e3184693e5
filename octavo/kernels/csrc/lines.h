// Vectors that begin on a cache line, large ones in huge pages.
//
// A tile's row is a cache line; of memory that begins elsewhere every row is two, and tiles from the caches load a third
// slower (decision 0104).
#pragma once

#include <cstddef>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace octavo {

template <class T>
struct LineAllocator {
  typedef T value_type;
  LineAllocator() = default;
  template <class Other>
  LineAllocator(const LineAllocator<Other>&) {}

  static constexpr size_t kHuge = 2 << 20;
  static std::align_val_t alignment(size_t count) { return std::align_val_t(count * sizeof(T) >= kHuge ? kHuge : 64); }

  T* allocate(size_t count) {
    void* memory = ::operator new(count * sizeof(T), alignment(count));
#if defined(MADV_HUGEPAGE)
    if (count * sizeof(T) >= kHuge) madvise(memory, count * sizeof(T), MADV_HUGEPAGE);
#endif
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t count) { ::operator delete(memory, alignment(count)); }

  template <class Other>
  bool operator==(const LineAllocator<Other>&) const { return true; }
};

template <class T>
using Lines = std::vector<T, LineAllocator<T>>;

}  // namespace octavo
