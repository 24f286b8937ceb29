// Prompts: tiles of queries, and the panels of keys they go through.
#include "attention/prompts.h"

#include <algorithm>
#include <cmath>

#include "threads.h"

namespace hsr {
namespace prompts {

AttendWork Prefill::run() {
    const size_t per_head = size_t(m_) * size_t(group_), heads = size_t(cache_.batch() * cache_.kv_heads());
    // Enough tiles for all threads, of at most kTileRows rows, whole positions if possible.
    const size_t wanted = std::max<size_t>(1, per_head * heads / size_t(num_threads()) / 4);
    tile_rows_ = std::clamp<size_t>(wanted, kFewestRows, kTileRows);
    if (tile_rows_ > size_t(group_)) tile_rows_ -= tile_rows_ % size_t(group_);
    const size_t tiles = (per_head + tile_rows_ - 1) / tile_rows_;
    if (stands_in()) code_values(heads);
    parallel_for(heads * tiles, [&](size_t task) { run_tile(int(task / tiles), task % tiles); });
    AttendWork work;
    work.sketch_scored = scored_;
    work.refined = scored_;
    work.full_scored = full_;
    work.sketched = sketched_;
    work.skipped = skipped_;
    work.panels = panels_;
    work.selected_again = again_;
    return work;
}

// The values of every whole range that a query may see, in 8 bits.
void Prefill::code_values(size_t heads) {
    const int64_t most = *std::max_element(queries_.visible, queries_.visible + m_);
    ranges_ = size_t(std::clamp<int64_t>(most, 0, int64_t(cache_.size()))) / kRangeKeys;
    value_codes_.reset(new uint8_t[heads * ranges_ * range_bytes()]);
    value_ranges_.reset(new float[heads * ranges_ * range_floats(value_dim_)]);
    parallel_for(heads * ranges_, [&](size_t at) {
        const int head = int(at / ranges_);
        const RowStore& rows = cache_.values();
        kernels().code_values(rows.dtype(), rows.row(at % ranges_ * kRangeKeys, head), rows.token_bytes(), value_dim_,
                              value_codes_.get() + at * range_bytes(),
                              value_ranges_.get() + at * range_floats(value_dim_));
    });
}

void Prefill::run_tile(int head, size_t tile) {
    static thread_local Workspace space;
    space.reserve(dim_, value_dim_);
    const size_t per_head = size_t(m_) * size_t(group_), from = tile * tile_rows_;
    const size_t count = std::min(tile_rows_, per_head - from);
    size_t blocks = 0;
    for (size_t i = 0; i < count; ++i) fetch_query(head, from + i);
    for (size_t i = 0; i < count; ++i) {
        start_row(space, i, head, from + i);
        blocks = std::max(blocks, space.rows[i].blocks);
    }
    size_t fewest = blocks;
    for (size_t i = 0; i < count; ++i) fewest = std::min(fewest, space.rows[i].blocks);
    if (!exact_rule() && fewest >= kPanelBlocks) sample(space, head, count, fewest);
    const size_t panels = (blocks + kPanelBlocks - 1) / kPanelBlocks;
    // The newest keys and the first ones hold most of the mass: with them, the thresholds of the rest are known.
    for (size_t p = 0; p < panels; ++p) {
        const size_t panel = p == 0 ? panels - 1 : p == 1 ? 0 : panels - p;
        run_panel(space, head, count, panel, double(panels - p) / double(panels));
    }
    for (size_t i = 0; i < count; ++i) finish_row(space, i, head);
}

void Prefill::run_panel(Workspace& space, int head, size_t count, size_t panel, double remaining) {
    const KeySketch& sketch = cache_.key_sketch(head);
    const size_t first = panel * kPanelBlocks;
    size_t blocks = 0;
    for (size_t i = 0; i < count; ++i) blocks = std::max(blocks, blocks_of(space.rows[i], first));
    kernels().unpack_panel(sketch.high(first), sketch.low(first), dim_, blocks, 0, &space.panel);
    fetch_rows(first * kBlock, blocks * kBlock, head);
    space.mean_keys = 0;
    int64_t scored = 0, skipped = 0;
    for (size_t at = 0; at < count; at += kRowsAtOnce) {
        const size_t here = std::min<size_t>(kRowsAtOnce, count - at);
        size_t most = 0, least = kPanelBlocks;
        bool masked = false;
        for (size_t i = at; i < at + here; ++i) {
            const size_t own = blocks_of(space.rows[i], first);
            most = std::max(most, own);
            least = std::min(least, own);
            masked |= space.rows[i].mask != nullptr;
            scored += int64_t(own * kBlock);
        }
        if (!most) continue;
        // Ranges of coded values that all of these rows see; no code knows of a value that a row may not.
        const size_t ranges = masked || !ranges_ ? 0 : least * kBlock / kRangeKeys, begin = ranges * kRangeKeys;
        const size_t words = (most + 3) / 4, coded_words = begin / 64;
        const auto score = [&](size_t from, size_t to, bool in_units) {
            if (from < to)
                kernels().score_panel(&space.panel, dim_, from, to, &space.queries[at], int(here), in_units,
                                      space.logits.data(), kLogitStride);
        };
        score(0, coded_words, true);
        score(coded_words, words, false);
        if (ranges) skipped += run_ranges(space, at, here, head, first * kBlock, ranges, remaining);
        if (begin < most * kBlock) skipped += run_rest(space, at, here, head, first, begin, most * kBlock, remaining);
    }
    scored_ += scored;
    skipped_ += skipped;
    ++panels_;
}

// Rows at once over the first ranges of a panel: values from codes, except for the keys that are read exactly.
int64_t Prefill::run_ranges(Workspace& space, size_t at, size_t here, int head, size_t first, size_t ranges,
                            double remaining) {
    const size_t begin = size_t(head) * ranges_ + first / kRangeKeys, floats = range_floats(value_dim_);
    const float* own = value_ranges_.get() + begin * floats;
    if (space.mean_keys != ranges * kRangeKeys) mean_of_ranges(space, own, ranges);
    float widest = 0;
    for (size_t range = 0; range < ranges; ++range) widest = std::max(widest, own[(range + 1) * floats - 1]);
    int64_t skipped = 0;
    for (size_t slot = 0; slot < here; ++slot) {
        space.take(slot);
        skipped += select_digits(space, at + slot, head, first, ranges * kRangeKeys, slot, remaining, widest);
    }
    kernels().multiply_panel(value_codes_.get() + begin * range_bytes(), own, value_dim_, space.words,
                             space.digits.data(), space.units, space.digit_sums, int(here), coded_sum(space, at),
                             size_t(padded16(value_dim_)));
    for (size_t slot = 0; slot < here; ++slot) accumulate(space, at + slot, head, slot);
    return skipped;
}

void Prefill::mean_of_ranges(Workspace& space, const float* own, size_t ranges) {
    const size_t wide = size_t(padded16(value_dim_));
    std::fill(space.mean_value.begin(), space.mean_value.end(), 0.0f);
    for (size_t range = 0; range < ranges; ++range)
        kernels().axpy(Dtype::float32, own + range * range_floats(value_dim_) + 2 * wide, 1.0f / float(ranges),
                       value_dim_, space.mean_value.data());
    space.mean_keys = ranges * kRangeKeys;
}

// Rows at once over keys begin .. end of a panel, whose values are read in full.
int64_t Prefill::run_rest(Workspace& space, size_t at, size_t here, int head, size_t first, size_t begin, size_t end,
                          double remaining) {
    int64_t skipped = 0;
    size_t kept = 0;
    for (size_t slot = 0; slot < here; ++slot) {
        space.take(slot);
        const Row& row = space.rows[at + slot];
        const size_t own = blocks_of(row, first) * kBlock;
        if (own <= begin) continue;
        float* logits = space.logits.data() + slot * kLogitStride;
        if (own % 64) std::fill(logits + own, logits + (own + 63) / 64 * 64, -kInf);
        if (row.mask) kernels().hide_masked(row.mask + first * kBlock, own, logits);
        skipped += select(space, at + slot, head, first * kBlock + begin, own - begin, logits + begin, remaining);
        kept += *space.count;
    }
    if (here == kRowsAtOnce && double(kept) > kDenseShare * double(here * (end - begin)))
        accumulate_dense(space, at, head, first * kBlock + begin, end - begin);
    else
        for (size_t slot = 0; slot < here; ++slot) accumulate(space, at + slot, head, slot);
    return skipped;
}

void Prefill::fetch_query(int head, size_t at) const {
    const TokenArray& q = queries_.queries;
    const uint8_t* row = q.place(head / cache_.kv_heads(), head % cache_.kv_heads() * group_ + int(at % size_t(group_)),
                                 int64_t(at / size_t(group_)));
    for (size_t byte = 0; byte < size_t(dim_) * item_size(q.dtype); byte += 64) __builtin_prefetch(row + byte);
}

// Rows of a panel will be read here and there: ask for all of them in order.
void Prefill::fetch_rows(size_t first, size_t count, int head) const {
    for (const RowStore* rows : {&cache_.keys(), &cache_.values()})
        for (size_t key = first; key < first + count; ++key) {
            const uint8_t* row = rows->row(key, head);
            for (size_t byte = 0; byte < rows->row_bytes(); byte += 64) __builtin_prefetch(row + byte, 0, 2);
        }
}

}  // namespace prompts

bool prefill_serves(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries) {
    if (settings.rule == Rule::top_r) return false;
    if (!(settings.scale > 1e-6 && settings.scale < 1e6)) return false;
    const TokenArray& q = queries.queries;
    if (size_t(q.tokens) * size_t(q.heads / cache.kv_heads()) < prompts::kFewestRows) return false;
    std::atomic<bool> safe{true};
    parallel_for(size_t(q.batch * q.heads), [&](size_t at) {
        const int64_t b = int64_t(at) / q.heads, h = int64_t(at) % q.heads;
        const int head = int(b) * cache.kv_heads() + int(h) / int(q.heads / cache.kv_heads());
        const KeySketch& sketch = cache.key_sketch(head);
        // 0.01: more than the rounding of a unit query to 8 bits, up to 512 coordinates
        const double band = settings.scale * (sketch.extent().residual8 * 1.02 + 0.02 * sketch.largest_norm());
        const double logit = settings.scale * (cache.largest_key_norm(head) + sketch.centre_norm());
        const double longest = std::min(prompts::kSafeBand / band, 1e5 / logit);  // of the queries that are served
        if (!(longest > 0)) safe = false;  // keys that have no codes: not even a query of length 0 has a band then
        // Queries of such coordinates are shorter than that, whatever the others are.
        const float sure = float(std::min(longest / std::sqrt(double(q.dim)) * (1 - 1e-6), 1e30));
        std::vector<float> row(static_cast<size_t>(q.dim));
        for (int64_t t = 0; t < q.tokens && safe; ++t) {
            if (q.within(b, h, t, sure)) continue;
            q.read(b, h, t, row.data());
            if (!(std::sqrt(kernels().dot64(Dtype::float32, row.data(), row.data(), int(q.dim))) < longest))
                safe = false;
        }
    });
    return safe;
}

AttendWork prefill(const LayerCache& cache, const AttendSettings& settings, const AttendQueries& queries,
                   const AttendResult& result) {
    return prompts::Prefill(cache, settings, queries, result).run();
}

}  // namespace hsr
