// Bytes that grow in place, at least 64-byte aligned, in memory or in a nameless file. What is large is mapped, so
// that growing moves pages instead of copying them (mremap on Linux), and pages never written are never resident.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

namespace hsr {

class Buffer {
public:
    Buffer() = default;
    // In a file in `directory`, which has no name there and vanishes with the buffer, however the process ends.
    // In memory if `directory` is empty. Throws std::system_error if no file can be made.
    explicit Buffer(const std::string& directory);
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    Buffer(const Buffer& other) {  // in memory
        reserve(other.capacity_);
        if (other.capacity_) std::memcpy(base_, other.base_, other.capacity_);
    }
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer();

    uint8_t* data() { return base_; }
    const uint8_t* data() const { return base_; }
    size_t capacity() const { return capacity_; }

    // At least `bytes`; grows by a share of what there is, so that n appends do O(n) work even where pages cannot be
    // moved. Throws std::bad_alloc, or std::system_error if the disk is full; the buffer is then as it was. Blocks
    // of a file are taken from the disk here: a write to a page without one would be a SIGBUS.
    void reserve(size_t bytes);

    bool in_file() const { return file_ >= 0; }
    // Of a file: take its pages out of this process, where they are read again when they are needed. They are
    // expected to be needed in no order, so that the system does not read ahead.
    void drop_pages() const;
    // Of a file: all will be read, front to back.
    void read_in_order() const;
    // In a forked child: the parent writes to the same file.
    bool inherited() const;

private:
    void take_blocks(size_t bytes);
    void prefer_large_pages();
    void swap(Buffer& other) {
        std::swap(base_, other.base_);
        std::swap(capacity_, other.capacity_);
        std::swap(mapped_, other.mapped_);
        std::swap(file_, other.file_);
        std::swap(owner_, other.owner_);
        std::swap(directory_, other.directory_);
    }
    uint8_t* base_ = nullptr;
    size_t capacity_ = 0;
    bool mapped_ = false;  // else from the heap
    int file_ = -1;
    pid_t owner_ = 0;
    std::string directory_;
};

}  // namespace hsr
