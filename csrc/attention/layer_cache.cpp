#include "attention/layer_cache.h"

#include <algorithm>
#include <cmath>

#include "threads.h"

namespace hsr {
namespace {

// Rows of a prompt are dropped once they are coded; those of a single token are about to be read.
constexpr size_t kManyBytes = 1u << 20;

}  // namespace

LayerCache::LayerCache(int batch, int kv_heads, int key_dim, int value_dim, Dtype dtype, bool sketch_values,
                       const std::string& directory)
    : batch_(batch),
      kv_heads_(kv_heads),
      sketch_values_(sketch_values),
      keys_(batch * kv_heads, key_dim, dtype, directory),
      values_(batch * kv_heads, value_dim, dtype, directory),
      key_sketches_(size_t(batch * kv_heads), KeySketch(key_dim)),
      value_sketches_(size_t(batch * kv_heads), ValueSketch(value_dim)),
      key_norms_(size_t(batch * kv_heads), 0.0),
      key_squares_(size_t(batch * kv_heads), 0.0) {}

size_t LayerCache::code_nbytes() const {
    size_t total = 0;
    for (const auto& sketch : key_sketches_) total += sketch.nbytes();
    for (const auto& sketch : value_sketches_) total += sketch.nbytes();
    return total;
}

void LayerCache::append(const TokenArray& keys, const TokenArray& values) {
    const size_t first = size();
    try {
        keys_.append(keys);
        values_.append(values);
        code_from(first);
        if ((size() - first) * (keys_.token_bytes() + values_.token_bytes()) >= kManyBytes) drop_pages();
    } catch (...) {  // out of memory, or of disk: as before, but for norms and ranges, which stay bounds
        crop(first);
        throw;
    }
}

void LayerCache::code_from(size_t first) {
    const size_t tokens = size() - first;
    appended_ += tokens;
    // For the few tokens of decoding, other threads would take longer to wake than the work takes.
    const size_t heads = size_t(batch_ * kv_heads_);
    const bool small = tokens * heads * size_t(key_dim() + value_dim()) < (1u << 17);
    parallel_for(heads, small ? 1 : num_threads(), [&](size_t head) {
        float row[kMaxHeadDim];
        for (size_t t = first; t < size(); ++t) {
            kernels().to_float(dtype(), keys_.row(t, int(head)), row, size_t(key_dim()));
            const double norm = norm_of(row, key_dim());
            key_norms_[head] = std::max(key_norms_[head], norm);
            key_squares_[head] += norm * norm;
            kernels().to_float(dtype(), values_.row(t, int(head)), row, size_t(value_dim()));
            value_sketches_[head].widen(row);
        }
        key_sketches_[head].code(keys_, int(head));
        if (sketch_values_) value_sketches_[head].code(values_, int(head), coded());
    });
}

double LayerCache::key_rms(int head) const {
    return appended_ ? std::sqrt(key_squares_[size_t(head)] / (double(appended_) * key_dim())) : 0.0;
}

void LayerCache::crop(size_t size) {
    keys_.crop(size);
    values_.crop(size);
    for (auto& sketch : key_sketches_) sketch.crop(size);
    for (auto& sketch : value_sketches_) sketch.crop(coded());
}

void LayerCache::drop_pages() const {
    keys_.drop_pages();
    values_.drop_pages();
}

void LayerCache::reorder(const int64_t* sources, size_t count) {
    RowStore keys = keys_.reordered(sources, count, kv_heads_);
    RowStore values = values_.reordered(sources, count, kv_heads_);
    // A row used for the last time is moved, not copied.
    std::vector<size_t> last(size_t(batch_), count);
    for (size_t i = 0; i < count; ++i) last[size_t(sources[i])] = i;
    std::vector<KeySketch> key_sketches;
    std::vector<ValueSketch> value_sketches;
    std::vector<double> norms, squares;
    for (size_t i = 0; i < count; ++i)
        for (int h = 0; h < kv_heads_; ++h) {
            const size_t from = size_t(sources[i]) * size_t(kv_heads_) + size_t(h);
            const bool move = last[size_t(sources[i])] == i;
            if (move) {
                key_sketches.push_back(std::move(key_sketches_[from]));
                value_sketches.push_back(std::move(value_sketches_[from]));
            } else {
                key_sketches.push_back(key_sketches_[from]);
                value_sketches.push_back(value_sketches_[from]);
            }
            norms.push_back(key_norms_[from]);
            squares.push_back(key_squares_[from]);
        }
    keys_ = std::move(keys);
    values_ = std::move(values);
    key_sketches_ = std::move(key_sketches);
    value_sketches_ = std::move(value_sketches);
    key_norms_ = std::move(norms);
    key_squares_ = std::move(squares);
    batch_ = int(count);
    drop_pages();
}

}  // namespace hsr
