// Memory of the indexes: vectors of floats that start at a cache line; and a growing array of plain values that
// never writes what its user will write, and whose memory can be handed over (release), to be freed with std::free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace hsr::tree {

// A block of 8 keys is whole cache lines when it starts at one.
template <class T>
struct LineAligned {
    using value_type = T;
    LineAligned() = default;
    template <class U>
    LineAligned(const LineAligned<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t(64)); }
    bool operator==(const LineAligned&) const { return true; }
    bool operator!=(const LineAligned&) const { return false; }
};
using Floats = std::vector<float, LineAligned<float>>;
using Codes = std::vector<int8_t, LineAligned<int8_t>>;

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
