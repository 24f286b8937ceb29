#include "attention/layer_cache.h"

#include <algorithm>
#include <cmath>
#include <limits>

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

namespace {

constexpr size_t kPieceKeys = 512;  // coded by one task: its rows stay in the second cache between the passes

}  // namespace

// What some new tokens of one head add to its norms and ranges.
struct LayerCache::Piece {
    double norm = 0, squares = 0;
    std::vector<float> least, most;
};

// Two passes over (head, piece of the tokens): norms and ranges of the new ones, then the codes of all blocks that
// are complete now. Between them, centres are taken anew where it is time.
void LayerCache::code_from(size_t first) {
    const size_t tokens = size() - first, heads = size_t(batch_ * kv_heads_);
    appended_ += tokens;
    // For the few tokens of decoding, other threads would take longer to wake than the work takes.
    const bool small = tokens * heads * size_t(key_dim() + value_dim()) < (1u << 17);
    const int threads = small ? 1 : num_threads();
    const size_t pieces = (tokens + kPieceKeys - 1) / kPieceKeys;
    std::vector<Piece> measured(heads * pieces);
    parallel_for(measured.size(), threads, [&](size_t task) {
        const size_t from = first + task % pieces * kPieceKeys;
        measure(int(task / pieces), from, std::min(from + kPieceKeys, size()), measured[task]);
    });
    for (size_t task = 0; task < measured.size(); ++task) {
        const size_t head = task / pieces;
        key_norms_[head] = std::max(key_norms_[head], measured[task].norm);
        key_squares_[head] += measured[task].squares;
        value_sketches_[head].widen(measured[task].least.data(), measured[task].most.data());
    }
    parallel_for(heads, threads, [&](size_t head) {
        if (key_sketches_[head].wants_centre(size())) key_sketches_[head].set_centre(keys_, int(head));
        key_sketches_[head].reserve(coded());
        if (sketch_values_) value_sketches_[head].reserve(coded());
    });
    struct Task {
        size_t head, first, last;  // blocks
    };
    std::vector<Task> tasks;
    constexpr size_t kPieceBlocks = kPieceKeys / kBlock;
    for (size_t head = 0; head < heads; ++head)
        for (size_t block = key_sketches_[head].blocks(); block < coded() / kBlock; block += kPieceBlocks)
            tasks.push_back({head, block, std::min(block + kPieceBlocks, coded() / kBlock)});
    std::vector<KeySketch::CodedRange> ranges(tasks.size());
    parallel_for(tasks.size(), threads, [&](size_t i) {
        const Task& task = tasks[i];
        ranges[i] = key_sketches_[task.head].code_blocks(keys_, int(task.head), task.first, task.last);
        // Values are never coded again.
        ValueSketch& values = value_sketches_[task.head];
        if (sketch_values_)
            values.code_range(values_, int(task.head), std::max(task.first * kBlock, values.coded()),
                              task.last * kBlock);
    });
    for (size_t i = 0; i < tasks.size(); ++i) key_sketches_[tasks[i].head].coded_until(tasks[i].last, &ranges[i], 1);
    if (!sketch_values_) return;
    parallel_for(heads, threads, [&](size_t head) {
        value_sketches_[head].coded_until(coded());
        value_sketches_[head].sum_groups(values_, int(head));
    });
}

void LayerCache::measure(int head, size_t first, size_t last, Piece& piece) const {
    float row[kMaxHeadDim];
    piece.least.assign(size_t(value_dim()), std::numeric_limits<float>::infinity());
    piece.most.assign(size_t(value_dim()), -std::numeric_limits<float>::infinity());
    for (size_t t = first; t < last; ++t) {
        const uint8_t* key = keys_.row(t, head);
        kernels().to_float(dtype(), key, row, size_t(key_dim()));
        const double squares = kernels().dot64(dtype(), key, row, key_dim());
        piece.norm = std::max(piece.norm, std::sqrt(squares));
        piece.squares += squares;
        kernels().to_float(dtype(), values_.row(t, head), row, size_t(value_dim()));
        for (int i = 0; i < value_dim(); ++i) {
            piece.least[size_t(i)] = std::min(piece.least[size_t(i)], row[i]);
            piece.most[size_t(i)] = std::max(piece.most[size_t(i)], row[i]);
        }
    }
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
