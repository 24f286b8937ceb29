// Full-precision rows in their own dtype, token-major: [n][heads][dim]. Appending never moves a token, and
// one head is a strided [n, dim] array that other libraries can read in place.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/kernels.h"
#include "store/buffer.h"

namespace hsr {

// A view of [batch, heads, tokens, dim] in memory, strides in elements.
struct TokenArray {
    Dtype dtype;
    const void* data;
    int64_t batch, heads, tokens, dim;
    int64_t batch_stride, head_stride, token_stride, dim_stride;

    // Where the row of one (batch, head, token) starts, and whether its numbers follow one another.
    const uint8_t* place(int64_t b, int64_t h, int64_t t) const {
        return static_cast<const uint8_t*>(data) +
               (b * batch_stride + h * head_stride + t * token_stride) * int64_t(item_size(dtype));
    }
    bool side_by_side() const { return dim_stride == 1 || dim == 1; }
    // The row as float32.
    void read(int64_t b, int64_t h, int64_t t, float* row) const;
    // Whether none of it is NaN, infinite or above `limit` in size.
    bool within(int64_t b, int64_t h, int64_t t, float limit) const;
    // Index of the first (b, h, t, i) that is NaN, infinite or above `limit` in size, or false.
    bool find_bad(float limit, int64_t index[4]) const;
};

class RowStore {
public:
    // In memory, or in a file in `directory`.
    RowStore(int heads, int dim, Dtype dtype, const std::string& directory = "");
    RowStore(const RowStore&);
    RowStore(RowStore&&) = default;
    RowStore& operator=(RowStore&&) = default;

    int heads() const { return heads_; }
    int dim() const { return dim_; }
    Dtype dtype() const { return dtype_; }
    size_t size() const { return size_; }
    size_t nbytes() const { return size_ * row_bytes_ * size_t(heads_); }
    size_t row_bytes() const { return row_bytes_; }
    size_t token_bytes() const { return row_bytes_ * size_t(heads_); }

    const uint8_t* row(size_t token, int head) const {
        return buffer_->data() + token * token_bytes() + size_t(head) * row_bytes_;
    }
    void append(const TokenArray& array);
    void crop(size_t size) { size_ = size; }
    // The store whose token rows are rows[sources[0]], rows[sources[1]], ...: `heads_per_row` heads each.
    RowStore reordered(const int64_t* sources, size_t count, int heads_per_row) const;
    void keep(const size_t* tokens, size_t count);  // ascending

    void drop_pages() const { buffer_->drop_pages(); }
    void read_in_order() const { buffer_->read_in_order(); }

    // For a reader outside: while it is held, its rows are neither moved nor written over.
    std::shared_ptr<const Buffer> share() const { return buffer_; }

private:
    void reserve(size_t bytes);
    void replace(size_t bytes);
    std::shared_ptr<Buffer> empty_buffer() const { return std::make_shared<Buffer>(directory_); }

    int heads_, dim_;
    Dtype dtype_;
    std::string directory_;
    size_t row_bytes_, size_ = 0;
    size_t written_ = 0;  // rows of this buffer that a reader may have seen; more than size_ after a crop
    std::shared_ptr<Buffer> buffer_;
};

}  // namespace hsr
