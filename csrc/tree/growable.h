// Memory of the indexes: vectors of floats that start at a cache line; and a growing array of plain values that
// never writes what its user will write, and whose memory can be handed over (release), to be freed with std::free.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace hsr::tree {

// From kLarge bytes on memory is asked for in pages of 2 MiB: a search that jumps about in an index misses the cache,
// but not the translation of addresses besides, and a report is not written to 512 pages that come one by one.
constexpr size_t kHugePage = size_t(2) << 20, kLarge = 2 * kHugePage;
inline void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
    const auto first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
    const auto last = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// A block of 8 keys is whole cache lines when it starts at one.
template <class T>
struct LineAligned {
    using value_type = T;
    LineAligned() = default;
    template <class U>
    LineAligned(const LineAligned<U>&) {}
    T* allocate(size_t n) {
        void* data = ::operator new(n * sizeof(T), alignment(n));
        if (n * sizeof(T) >= kLarge) use_huge_pages(data, n * sizeof(T));
        return static_cast<T*>(data);
    }
    void deallocate(T* data, size_t n) { ::operator delete(data, alignment(n)); }
    static std::align_val_t alignment(size_t n) {
        return std::align_val_t(n * sizeof(T) >= kLarge ? kHugePage : size_t(64));
    }
    bool operator==(const LineAligned&) const { return true; }
    bool operator!=(const LineAligned&) const { return false; }
};
template <class T>
using Lines = std::vector<T, LineAligned<T>>;
using Floats = Lines<float>;
using Codes = Lines<int8_t>;

template <class T>
class Growable {
    static_assert(std::is_trivially_copyable<T>::value, "moved by realloc");

public:
    Growable() = default;
    Growable(Growable&& other) noexcept { swap(other); }
    Growable& operator=(Growable&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Growable() { std::free(data_); }

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return size_; }
    void clear() { size_ = 0; }

    // Room for `extra` more values behind the last; write there, then `added(count)`.
    T* room(size_t extra) {
        if (size_ + extra > capacity_) grow(size_ + extra);
        return data_ + size_;
    }
    void added(size_t count) { size_ += count; }
    void push(T value) {
        *room(1) = value;
        ++size_;
    }
    void resize(size_t size) {  // new values are undefined
        if (size > capacity_) grow(size);
        size_ = size;
    }
    void trim(size_t most) {  // empties, and gives back memory for more than `most`
        size_ = 0;
        if (capacity_ <= most) return;
        std::free(data_);
        data_ = nullptr;
        capacity_ = 0;
    }
    T* release() {
        if (!data_) grow(1);
        size_ = capacity_ = 0;
        return std::exchange(data_, nullptr);
    }

private:
    void grow(size_t wanted) {
        if (wanted < 2 * capacity_) wanted = 2 * capacity_;
        if (wanted < 64) wanted = 64;
        auto* moved = static_cast<T*>(std::realloc(data_, wanted * sizeof(T)));
        if (!moved) throw std::bad_alloc();
        data_ = moved;
        capacity_ = wanted;
        if (wanted * sizeof(T) >= kLarge) use_huge_pages(data_, wanted * sizeof(T));
    }
    void swap(Growable& other) {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(capacity_, other.capacity_);
    }
    T* data_ = nullptr;
    size_t size_ = 0, capacity_ = 0;
};

}  // namespace hsr::tree
