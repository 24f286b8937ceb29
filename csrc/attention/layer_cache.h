// Keys, values and codes of one attention layer: every batch row, every key head.
#pragma once

#include <cstdint>
#include <shared_mutex>
#include <string>
#include <vector>

#include "sketch/key_sketch.h"
#include "sketch/value_sketch.h"
#include "store/row_store.h"

namespace hsr {

class LayerCache {
public:
    // Rows in memory, or in files in `directory`; codes always in memory.
    LayerCache(int batch, int kv_heads, int key_dim, int value_dim, Dtype dtype, bool sketch_values,
               const std::string& directory = "");

    int batch() const { return batch_; }
    int kv_heads() const { return kv_heads_; }
    int key_dim() const { return keys_.dim(); }
    int value_dim() const { return values_.dim(); }
    Dtype dtype() const { return keys_.dtype(); }
    bool sketches_values() const { return sketch_values_; }
    size_t size() const { return keys_.size(); }
    size_t coded() const { return size() / kBlock * kBlock; }
    size_t row_nbytes() const { return keys_.nbytes() + values_.nbytes(); }
    size_t code_nbytes() const;

    void append(const TokenArray& keys, const TokenArray& values);
    void crop(size_t size);  // size <= this->size()
    // Rows in files: take their pages out of this process.
    void drop_pages() const;
    // New batch row i is old row sources[i].
    void reorder(const int64_t* sources, size_t count);

    const RowStore& keys() const { return keys_; }
    const RowStore& values() const { return values_; }
    const KeySketch& key_sketch(int head) const { return key_sketches_[size_t(head)]; }
    const ValueSketch& value_sketch(int head) const { return value_sketches_[size_t(head)]; }
    double largest_key_norm(int head) const { return key_norms_[size_t(head)]; }
    // Root mean square of the coordinates of the keys ever appended to one head.
    double key_rms(int head) const;

    // Held by callers from several threads: shared to read, alone to append, crop or reorder.
    std::shared_mutex& mutex() const { return mutex_; }

private:
    struct Piece;
    void code_from(size_t first);
    void measure(int head, size_t first, size_t last, Piece& piece) const;

    mutable std::shared_mutex mutex_;
    int batch_, kv_heads_;
    bool sketch_values_;
    RowStore keys_, values_;
    std::vector<KeySketch> key_sketches_;  // [batch * kv_heads]
    std::vector<ValueSketch> value_sketches_;
    std::vector<double> key_norms_, key_squares_;
    size_t appended_ = 0;
};

}  // namespace hsr
