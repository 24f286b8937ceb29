#include "store/row_store.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "threads.h"

namespace hsr {
namespace {

constexpr size_t kWorthThreads = 1u << 18;  // bytes: for fewer, others would wake too late to help

// body(first, last) over all rows, in pieces where other threads are worth it.
template <class Body>
void in_pieces(size_t rows, size_t row_bytes, const Body& body) {
    if (rows * row_bytes < kWorthThreads) return body(0, rows);
    const size_t pieces = 8 * size_t(num_threads());
    parallel_for(pieces, [&](size_t piece) { body(rows * piece / pieces, rows * (piece + 1) / pieces); });
}

}  // namespace

void TokenArray::read(int64_t b, int64_t h, int64_t t, float* row) const {
    const uint8_t* first = place(b, h, t);
    if (side_by_side()) {
        kernels().to_float(dtype, first, row, size_t(dim));
        return;
    }
    for (int64_t i = 0; i < dim; ++i)
        kernels().to_float(dtype, first + i * dim_stride * int64_t(item_size(dtype)), row + i, 1);
}

bool TokenArray::within(int64_t b, int64_t h, int64_t t, float limit) const {
    const uint8_t* first = place(b, h, t);
    if (side_by_side()) return kernels().all_within(dtype, first, size_t(dim), limit);
    bool all = true;
    for (int64_t i = 0; i < dim; ++i)
        all &= kernels().all_within(dtype, first + i * dim_stride * int64_t(item_size(dtype)), 1, limit);
    return all;
}

bool TokenArray::find_bad(float limit, int64_t index[4]) const {
    const size_t rows = size_t(batch * heads * tokens);
    std::atomic<size_t> bad_row{rows};  // the first one
    in_pieces(rows, size_t(dim) * item_size(dtype), [&](size_t first, size_t last) {
        for (size_t at = first; at < last; ++at) {
            const int64_t head = int64_t(at) / tokens;
            if (within(head / heads, head % heads, int64_t(at) % tokens, limit)) continue;
            size_t known = bad_row;
            while (at < known && !bad_row.compare_exchange_weak(known, at)) {}
            return;
        }
    });
    if (bad_row == rows) return false;
    const int64_t at = int64_t(bad_row.load()), head = at / tokens;
    index[0] = head / heads, index[1] = head % heads, index[2] = at % tokens;
    std::vector<float> row(static_cast<size_t>(dim));
    read(index[0], index[1], index[2], row.data());
    const auto bad = std::find_if(row.begin(), row.end(), [&](float x) { return !(std::fabs(x) <= limit); });
    index[3] = bad - row.begin();
    return true;
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
    const size_t item = item_size(dtype_), tokens = size_t(array.tokens);
    const bool plain = array.side_by_side();
    in_pieces(tokens, token_bytes(), [&](size_t first, size_t last) {
        uint8_t* to = buffer_->data() + (size_ + first) * token_bytes();
        for (int64_t t = int64_t(first); t < int64_t(last); ++t)
            for (int64_t b = 0; b < array.batch; ++b)
                for (int64_t h = 0; h < array.heads; ++h, to += row_bytes_) {
                    const uint8_t* from = array.place(b, h, t);
                    if (plain) {
                        std::memcpy(to, from, row_bytes_);
                    } else {
                        for (int64_t i = 0; i < array.dim; ++i)
                            std::memcpy(to + size_t(i) * item, from + i * array.dim_stride * int64_t(item), item);
                    }
                }
    });
    size_ += tokens;
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
