#include "store/buffer.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <new>
#include <system_error>
#include <vector>

namespace hsr {
namespace {

// From here on in pages of its own: the heap would copy a block to let it grow, and keep the hole.
constexpr size_t kMappedBytes = 1u << 20;

[[noreturn]] void fail(int error, const std::string& what) {
    throw std::system_error(error, std::generic_category(), what);
}

int nameless_file(const std::string& directory) {
#ifdef O_TMPFILE
    const int nameless = open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (nameless >= 0) return nameless;
#endif
    // File systems that know only files with a name.
    std::vector<char> path(directory.begin(), directory.end());
    for (char c : std::string("/hsr-XXXXXX")) path.push_back(c);
    path.push_back('\0');
    const int file = mkstemp(path.data());
    if (file < 0) fail(errno, "no file for keys and values can be made in directory " + directory);
    unlink(path.data());
    fcntl(file, F_SETFD, FD_CLOEXEC);
    return file;
}

constexpr size_t kLargePage = 2u << 20;

// Address space for `bytes` that starts at a large page; null if there is none.
void* aligned_space(size_t bytes) {
    const size_t most = bytes + kLargePage;
    void* const space = mmap(nullptr, most, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return nullptr;
    uint8_t* const from = static_cast<uint8_t*>(space);
    const size_t before = (kLargePage - reinterpret_cast<uintptr_t>(from) % kLargePage) % kLargePage;
    if (before) munmap(from, before);
    munmap(from + before + bytes, kLargePage - before);
    return from + before;
}

// `base` is null at first. Pages in memory stand where large ones may, from one of those on.
void* map(void* base, size_t have, size_t wanted, int file) {
    void* const place = file < 0 && wanted >= kLargePage ? aligned_space(wanted) : nullptr;
    const int flags = (file >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS) | (place ? MAP_FIXED : 0);
    void* moved;
#ifdef MREMAP_MAYMOVE
    if (base) {
        moved = place ? mremap(base, have, wanted, MREMAP_MAYMOVE | MREMAP_FIXED, place)
                      : mremap(base, have, wanted, MREMAP_MAYMOVE);
        if (moved == MAP_FAILED) {
            if (place) munmap(place, wanted);
            throw std::bad_alloc();
        }
        return moved;
    }
#endif
    moved = mmap(place, wanted, PROT_READ | PROT_WRITE, flags, file, 0);
    if (moved == MAP_FAILED) throw std::bad_alloc();
    if (base) {
        if (file < 0) std::memcpy(moved, base, have);
        munmap(base, have);
    }
    return moved;
}

}  // namespace

Buffer::Buffer(const std::string& directory) : directory_(directory) {
    if (directory.empty()) return;
    file_ = nameless_file(directory);
    owner_ = getpid();
}

Buffer::~Buffer() {
    if (mapped_)
        munmap(base_, capacity_);
    else
        std::free(base_);
    if (in_file()) close(file_);
}

void Buffer::reserve(size_t bytes) {
    if (bytes <= capacity_) return;
    // Pages are moved, not copied: they need less room to grow into.
    size_t wanted = std::max(bytes, capacity_ + capacity_ / (mapped_ ? 8 : 2));
    const bool map_it = in_file() || wanted >= kMappedBytes;
    const size_t unit = map_it ? size_t(sysconf(_SC_PAGESIZE)) : 64;
    wanted = (wanted + unit - 1) / unit * unit;
    if (in_file()) take_blocks(wanted);
    if (map_it && (mapped_ || !base_)) {
        base_ = static_cast<uint8_t*>(map(base_, capacity_, wanted, file_));
    } else {
        void* fresh = map_it ? map(nullptr, 0, wanted, -1) : std::aligned_alloc(64, wanted);
        if (!fresh) throw std::bad_alloc();
        if (capacity_) std::memcpy(fresh, base_, capacity_);
        std::free(base_);
        base_ = static_cast<uint8_t*>(fresh);
    }
    mapped_ = map_it;
    capacity_ = wanted;
    prefer_large_pages();
}

// Each small page read costs a walk through the page tables, which in a virtual machine takes as long as reading some
// lines. The whole mapping or nothing, since mremap moves only what the system holds as one piece. No large page
// reaches beyond the mapping: what is not written yet, at most an eighth, is all that may be taken too early.
void Buffer::prefer_large_pages() {
#if defined(MADV_HUGEPAGE)
    if (mapped_ && !in_file() && capacity_ >= kLargePage) madvise(base_, capacity_, MADV_HUGEPAGE);  // a wish: may fail
#endif
}

void Buffer::take_blocks(size_t bytes) {
    int error;
    do { error = posix_fallocate(file_, off_t(capacity_), off_t(bytes - capacity_)); } while (error == EINTR);
    if (!error) return;
    if (ftruncate(file_, off_t(capacity_))) {}  // gives back what was taken; nothing depends on it
    fail(error, "keys and values need " + std::to_string(bytes) + " bytes in a file in directory " + directory_);
}

void Buffer::drop_pages() const {
    if (!in_file() || !base_) return;
    madvise(base_, capacity_, MADV_RANDOM);
    madvise(base_, capacity_, MADV_DONTNEED);
}

void Buffer::read_in_order() const {
    if (in_file() && base_) madvise(base_, capacity_, MADV_NORMAL);
}

bool Buffer::inherited() const { return in_file() && getpid() != owner_; }

}  // namespace hsr
