#include "store/row_store.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace hsr {

void TokenArray::read(int64_t b, int64_t h, int64_t t, float* row) const {
    const auto* first = static_cast<const uint8_t*>(data) +
                        (b * batch_stride + h * head_stride + t * token_stride) * int64_t(item_size(dtype));
    if (dim_stride == 1 || dim == 1) {
        kernels().to_float(dtype, first, row, size_t(dim));
        return;
    }
    for (int64_t i = 0; i < dim; ++i)
        kernels().to_float(dtype, first + i * dim_stride * int64_t(item_size(dtype)), row + i, 1);
}

bool TokenArray::find_bad(float limit, int64_t place[4]) const {
    std::vector<float> row(static_cast<size_t>(dim));
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t t = 0; t < tokens; ++t) {
                read(b, h, t, row.data());
                bool good = true;
                for (float x : row) good &= std::fabs(x) <= limit;
                if (good) continue;
                for (int64_t i = 0; i < dim; ++i)
                    if (!(std::fabs(row[size_t(i)]) <= limit)) {
                        place[0] = b, place[1] = h, place[2] = t, place[3] = i;
                        return true;
                    }
            }
    return false;
}

RowStore::RowStore(int heads, int dim, Dtype dtype, const std::string& directory)
    : heads_(heads),
      dim_(dim),
      dtype_(dtype),
      directory_(directory),
      row_bytes_(size_t(dim) * item_size(dtype)),
      buffer_(empty_buffer()) {}

RowStore::RowStore(const RowStore& other) : RowStore(other.heads_, other.dim_, other.dtype_, other.directory_) {
    reserve(other.nbytes());
    if (other.size_) std::memcpy(buffer_->data(), other.buffer_->data(), other.nbytes());
    size_ = written_ = other.size_;
}

void RowStore::reserve(size_t bytes) {
    if (bytes <= buffer_->capacity()) return;
    if (buffer_.use_count() == 1) {
        buffer_->reserve(bytes);
        return;
    }
    replace(bytes + bytes / 2);
}

void RowStore::replace(size_t bytes) {
    auto fresh = empty_buffer();
    fresh->reserve(bytes);
    if (size_) std::memcpy(fresh->data(), buffer_->data(), nbytes());
    buffer_ = std::move(fresh);
    written_ = size_;
}

void RowStore::append(const TokenArray& array) {
    const size_t bytes = (size_ + size_t(array.tokens)) * token_bytes();
    const bool read_elsewhere = size_ < written_ && buffer_.use_count() > 1;  // cropped, and somebody reads the rest
    if (read_elsewhere || buffer_->inherited()) replace(bytes);
    reserve(bytes);
    uint8_t* to = buffer_->data() + size_ * token_bytes();
    const size_t item = item_size(dtype_);
    const bool plain = array.dim_stride == 1 || array.dim == 1;
    for (int64_t t = 0; t < array.tokens; ++t)
        for (int64_t b = 0; b < array.batch; ++b)
            for (int64_t h = 0; h < array.heads; ++h, to += row_bytes_) {
                const auto* from =
                    static_cast<const uint8_t*>(array.data) +
                    (b * array.batch_stride + h * array.head_stride + t * array.token_stride) * int64_t(item);
                if (plain) {
                    std::memcpy(to, from, row_bytes_);
                } else {
                    for (int64_t i = 0; i < array.dim; ++i)
                        std::memcpy(to + size_t(i) * item, from + i * array.dim_stride * int64_t(item), item);
                }
            }
    size_ += size_t(array.tokens);
    written_ = std::max(written_, size_);
}

RowStore RowStore::reordered(const int64_t* sources, size_t count, int heads_per_row) const {
    const size_t piece = row_bytes_ * size_t(heads_per_row);
    RowStore out(int(count) * heads_per_row, dim_, dtype_, directory_);
    out.reserve(size_ * out.token_bytes());
    uint8_t* to = out.buffer_->data();
    for (size_t t = 0; t < size_; ++t)
        for (size_t i = 0; i < count; ++i, to += piece)
            std::memcpy(to, buffer_->data() + t * token_bytes() + size_t(sources[i]) * piece, piece);
    out.size_ = out.written_ = size_;
    return out;
}

void RowStore::keep(const size_t* tokens, size_t count) {
    auto moved = empty_buffer();
    moved->reserve(count * token_bytes());
    for (size_t i = 0; i < count; ++i)
        std::memcpy(moved->data() + i * token_bytes(), buffer_->data() + tokens[i] * token_bytes(), token_bytes());
    buffer_ = std::move(moved);
    size_ = written_ = count;
}

}  // namespace hsr
