// Bytes that grow in place, 64-byte aligned. realloc moves pages instead of copying them where the system
// can (mremap on Linux), and pages never written are never resident: growing costs neither time nor memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hsr {

class Buffer {
public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    Buffer(const Buffer& other) {
        reserve(other.capacity_);
        if (other.capacity_) std::memcpy(data(), other.data(), other.capacity_);
    }
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(base_); }

    uint8_t* data() { return base_ ? base_ + shift_ : nullptr; }
    const uint8_t* data() const { return base_ ? base_ + shift_ : nullptr; }
    size_t capacity() const { return capacity_; }

    // At least `bytes`; grows by half, so that n appends copy O(n) bytes even where realloc copies.
    void reserve(size_t bytes) {
        if (bytes <= capacity_) return;
        size_t wanted = capacity_ + capacity_ / 2;
        if (wanted < bytes) wanted = bytes;
        auto* moved = static_cast<uint8_t*>(std::realloc(base_, wanted + 64));
        if (!moved) throw std::bad_alloc();
        const size_t shift = (64 - reinterpret_cast<uintptr_t>(moved) % 64) % 64;
        if (capacity_ && shift != shift_) std::memmove(moved + shift, moved + shift_, capacity_);
        base_ = moved;
        shift_ = shift;
        capacity_ = wanted;
        prefer_large_pages(bytes);
    }

private:
    // Rows are read far apart, and a walk through the page tables for each costs as much as the read. Only whole
    // large pages inside what is about to be written: nothing becomes resident that would not have been.
    void prefer_large_pages(size_t bytes) {
#if defined(MADV_HUGEPAGE)
        constexpr uintptr_t large = uintptr_t(2) << 20;
        const uintptr_t first = (reinterpret_cast<uintptr_t>(data()) + large - 1) / large * large,
                        last = (reinterpret_cast<uintptr_t>(data()) + bytes) / large * large;
        if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: may fail
#else
        (void)bytes;
#endif
    }
    void swap(Buffer& other) {
        std::swap(base_, other.base_);
        std::swap(shift_, other.shift_);
        std::swap(capacity_, other.capacity_);
    }
    uint8_t* base_ = nullptr;
    size_t shift_ = 0, capacity_ = 0;
};

}  // namespace hsr
