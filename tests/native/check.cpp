// The native core against float64, without Python: for machines whose Python cannot be run here. Prints a line a check;
// the exit code is the number of checks that failed. tests/test_other_machines.py builds and runs it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "attention/prefill.h"
#include "index/flat_index.h"
#include "index/sketch_index.h"
#include "kernels/kernels.h"
#include "threads.h"
#include "tree/convex_layers.h"
#include "tree/forest.h"
#include "tree/partition_tree.h"

using namespace hsr;

namespace {

int failed = 0;

void check(const std::string& what, bool fine, const std::string& found) {
    std::printf("%-44s %s  %s\n", what.c_str(), found.c_str(), fine ? "ok" : "WRONG");
    failed += !fine;
}

float bfloat16_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits &= 0xffff0000u;
    std::memcpy(&x, &bits, 4);
    return x;
}

// [heads, tokens, dim], in the dtype and as float32.
struct Rows {
    int64_t heads, tokens, dim;
    Dtype dtype;
    std::vector<float> exact;
    std::vector<uint8_t> bytes;

    Rows(int64_t h, int64_t n, int64_t d, Dtype type, std::mt19937& rng, float spread)
        : heads(h), tokens(n), dim(d), dtype(type), exact(size_t(h * n * d)) {
        std::normal_distribution<float> normal;
        std::vector<float> common(static_cast<size_t>(d));
        for (float& x : common) x = spread * normal(rng);
        for (size_t i = 0; i < exact.size(); ++i) exact[i] = normal(rng) + common[i % size_t(d)];
        bytes.resize(exact.size() * item_size(type));
        for (size_t i = 0; i < exact.size(); ++i) {
            if (type == Dtype::bfloat16) {
                exact[i] = bfloat16_of(exact[i]);
                uint32_t bits;
                std::memcpy(&bits, &exact[i], 4);
                const uint16_t half = uint16_t(bits >> 16);
                std::memcpy(bytes.data() + 2 * i, &half, 2);
            } else {
                std::memcpy(bytes.data() + 4 * i, &exact[i], 4);
            }
        }
    }
    TokenArray array(int64_t from = 0) const {
        return {dtype,
                bytes.data() + size_t(from * dim) * item_size(dtype),
                1,
                heads,
                tokens - from,
                dim,
                heads * tokens * dim,
                tokens * dim,
                dim,
                1};
    }
    const float* row(int64_t h, int64_t t) const { return exact.data() + size_t((h * tokens + t) * dim); }
};

double dot(const float* a, const float* b, int64_t dim) {
    double sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += double(a[i]) * b[i];
    return sum;
}

void attention(Dtype dtype, int64_t dim, int64_t m, Rule rule, std::mt19937& rng) {
    const int64_t n = 3000 + 5, kv_heads = 2, group = 3, heads = kv_heads * group;
    const Rows keys(kv_heads, n, dim, dtype, rng, 1.0f), values(kv_heads, n, dim, dtype, rng, 0.5f);
    const Rows queries(heads, m, dim, dtype, rng, 0.7f);
    LayerCache cache(1, int(kv_heads), int(dim), int(dim), dtype, true);
    cache.append(keys.array(), values.array());
    AttendSettings settings;
    settings.rule = rule;
    settings.scale = 1.5 / std::sqrt(double(dim));
    settings.epsilon = 0.03;
    settings.power = 2;
    std::vector<int64_t> visible;
    for (int64_t i = 0; i < m; ++i) visible.push_back(n - m + i + 1);
    const size_t rows = size_t(heads * m);
    // ReLU: what a tenth of the keys reach, about.
    std::vector<double> thresholds(rows);
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < m; ++i) {
            std::vector<double> logits;
            for (int64_t j = 0; j < visible[size_t(i)]; j += 7)
                logits.push_back(settings.scale * dot(queries.row(h, i), keys.row(h / group, j), dim));
            std::nth_element(logits.begin(), logits.begin() + int64_t(logits.size() / 10), logits.end(),
                             std::greater<>());
            thresholds[size_t(h * m + i)] = logits[logits.size() / 10];
        }
    const bool relu = rule == Rule::relu;
    const AttendQueries call{queries.array(), visible.data(), relu ? thresholds.data() : nullptr, nullptr, 0, 0};
    std::vector<float> out(rows * size_t(dim)), facts(5 * rows);
    float* fact = facts.data();
    const AttendResult result{out.data(), fact, fact + rows, fact + 2 * rows, fact + 3 * rows, fact + 4 * rows};
    const bool prompt = prefill_serves(cache, settings, call);
    if (prompt)
        prefill(cache, settings, call, result);
    else
        attend(cache, settings, call, result);
    double error = 0, size = 0;
    int64_t broken = 0;
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < m; ++i) {
            std::vector<double> logits, exact(static_cast<size_t>(dim));
            for (int64_t j = 0; j < visible[size_t(i)]; ++j)
                logits.push_back(settings.scale * dot(queries.row(h, i), keys.row(h / group, j), dim));
            const double top = *std::max_element(logits.begin(), logits.end());
            double mass = 0;
            for (size_t j = 0; j < logits.size(); ++j) {
                const double excess = logits[j] - thresholds[size_t(h * m + i)];
                const double weight = relu ? (excess > 0 ? excess * excess : 0) : std::exp(logits[j] - top);
                mass += weight;
                for (int64_t c = 0; c < dim; ++c) exact[size_t(c)] += weight * values.row(h / group, int64_t(j))[c];
            }
            double worst = 0, squares = 0, norm = 0;
            for (int64_t c = 0; c < dim; ++c) {
                const double e = exact[size_t(c)] / mass, found = out[size_t((h * m + i) * dim + c)];
                worst = std::max(worst, std::fabs(e - found));
                squares += (e - found) * (e - found);
                norm += e * e;
            }
            broken += worst > fact[h * m + i];
            error += std::sqrt(squares);
            size += std::sqrt(norm);
        }
    const std::string what = std::string(relu ? "relu" : "softmax") + (prompt ? ", prompt" : ", decoding") +
                             (dtype == Dtype::float32 ? ", float32" : ", bfloat16") + ", d = " + std::to_string(dim);
    char found[96];
    std::snprintf(found, sizeof found, "error %.2e, certificates broken %lld of %zu", error / size,
                  static_cast<long long>(broken), rows);
    check(what, broken == 0 && error / size < (relu ? 1e-5 : 0.02), found);
}

// A rotated vector of one of the shapes that codes of 8 bits are hardest on: their sums in 16 bits come closest to the
// edge where all coordinates, or all of an eight (kernels.h), are large.
std::vector<float> shaped(int shape, int dim, std::mt19937& rng) {
    std::normal_distribution<float> normal;
    std::vector<float> y(size_t(padded16(dim)), 0.0f);
    for (int i = 0; i < dim; ++i) {
        const float sign = rng() % 2 ? 1.0f : -1.0f;
        const float of_shape[] = {1, sign, i / 2 % 2 ? 1.0f : 0.1f, i < 16 ? sign : 0.2f * sign, normal(rng)};
        y[size_t(i)] = of_shape[shape];
    }
    const float length = float(std::sqrt(dot(y.data(), y.data(), dim)));
    for (float& x : y) x /= length;
    return y;
}

// Scores of panels lie within the bands that their codes promise.
void panel(int dim, std::mt19937& rng) {
    constexpr int kShapes = 5, kKeys = 64, kQueries = 6;
    double largest = 0;
    int64_t wrong = 0;
    for (int turn = 0; turn < 20; ++turn) {
        std::vector<std::vector<float>> keys, queries;
        std::vector<uint8_t> high(kKeys / kBlock * high_stride(dim)), low(kKeys / kBlock * low_stride(dim));
        for (int block = 0; block < kKeys / kBlock; ++block) {
            std::vector<float> rotated;
            double norms[kBlock];
            for (double& norm : norms) {
                keys.push_back(shaped(int(rng() % kShapes), dim, rng));
                rotated.insert(rotated.end(), keys.back().begin(), keys.back().end());
                norm = 1.0;
            }
            kernels().code_keys(dim, rotated.data(), norms, 1e-6, high.data() + size_t(block) * high_stride(dim),
                                low.data() + size_t(block) * low_stride(dim));
        }
        std::vector<uint8_t> codes(panel_bytes(dim) + 64);
        std::vector<float> steps(kPanelKeys), logits(kQueries * kKeys), scores(kQueries * kKeys);
        CodedPanel coded{codes.data() + (64 - reinterpret_cast<uintptr_t>(codes.data()) % 64) % 64, steps.data(), 0, 0};
        kernels().unpack_panel(high.data(), low.data(), dim, kKeys / kBlock, 0, &coded);
        std::vector<PanelQuery> panel_queries(kQueries);
        for (PanelQuery& query : panel_queries) {
            queries.push_back(shaped(int(rng() % kShapes), dim, rng));
            kernels().code_query(queries.back().data(), dim, &query);
            query.unit = query.step;
            query.centre = 0.25f;
        }
        const int count = 1 + turn % kQueries;
        kernels().score_panel(&coded, dim, 0, 1, panel_queries.data(), count, false, logits.data(), kKeys);
        kernels().score_panel(&coded, dim, 0, 1, panel_queries.data(), count, true, scores.data(), kKeys);
        for (int q = 0; q < count; ++q)
            for (int k = 0; k < kKeys; ++k) {
                const PanelQuery& query = panel_queries[size_t(q)];
                const float logit = logits[size_t(q * kKeys + k)], score = scores[size_t(q * kKeys + k)];
                const double off =
                    std::fabs(dot(queries[size_t(q)].data(), keys[size_t(k)].data(), dim) + 0.25 - logit);
                wrong += std::fabs(double(query.unit) * score + query.centre - logit) > 1e-5;
                const double band = (1 + double(query.rest)) * double(coded.residual) + double(query.rest) +
                                    0.5 * double(query.unit) * double(coded.step) + 1e-4;
                wrong += off > band;
                largest = std::max(largest, off / band);
            }
    }
    check("panel, d = " + std::to_string(dim), wrong == 0,
          std::to_string(wrong) + " wrong, off by " + std::to_string(largest) + " of the band");
}

// Digits of weights are within one of the weights, and meet the values that their keys have.
void digits(int dim, std::mt19937& rng) {
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform;
    int64_t wrong = 0, coded = 0, listed = 0;
    double largest = 0;
    for (int turn = 0; turn < 40; ++turn) {
        const size_t count = (1 + size_t(turn) % kRanges) * kRangeKeys, wide = size_t(padded16(dim));
        std::vector<float> scores(count), values(count * size_t(dim));
        float drift = 0;
        for (float& score : scores) score = 10.0f * ((drift = 0.9f * drift + normal(rng)) + 0.5f * normal(rng));
        for (float& value : values) value = normal(rng);
        WeightLimits limits;
        limits.unit = turn == 0 ? 0.0f : 0.02f + 0.3f * uniform(rng);
        limits.centre = 20.0f * normal(rng);
        limits.from = limits.centre + (turn == 0 ? -1.0f : limits.unit * 10.0f * normal(rng));
        limits.exact_from = turn % 4 == 1 ? 1e4f : limits.from + limits.unit * 20.0f * uniform(rng);
        if (turn % 8 == 2) limits.from = -INFINITY;
        limits.reference = limits.centre + 5.0f * normal(rng);
        limits.first = 1000;
        std::vector<int8_t> own(kPanelKeys, 99);
        std::vector<uint32_t> positions(kPanelKeys + 64);
        WeighedRow found;
        kernels().weigh_panel(scores.data(), count, &limits, own.data(), positions.data(), &found);
        const std::set<uint32_t> exact(positions.begin(), positions.begin() + found.exact);
        double omitted = 0, at_most = 0, mass = 0;
        size_t kept = 0;
        std::vector<uint32_t> sums(kRanges);
        for (size_t k = 0; k < count; ++k) {
            const double logit = double(limits.unit) * double(scores[k]) + double(limits.centre);
            const double weight = std::exp2(logit - double(found.cap)), digit = own[k];
            const bool large = exact.count(uint32_t(k) + limits.first) > 0;
            const auto off = [&](double from, bool above) { return above ? from - logit : logit - from; };
            wrong += off(limits.exact_from, large) > 1e-3;
            sums[k / kRangeKeys] += uint32_t(own[k]);
            wrong += own[k] && !(found.words >> (k / 64) & 1);
            if (large) {
                wrong += own[k] != 0;
            } else if (logit >= double(limits.from) + 1e-3 || own[k]) {
                wrong += off(limits.from, true) > 1e-3 || digit < 0 || digit > 63;
                wrong += std::fabs(digit - weight * kDigits) > 1 + 2e-3 * kDigits;
                mass += weight;
            } else {
                const double mass_here = std::exp2(logit - double(limits.reference));
                at_most += mass_here;  // a logit at the threshold may be on either side
                if (logit < double(limits.from) - 1e-3) omitted += mass_here;
            }
            kept += logit >= double(limits.from);
        }
        wrong += omitted > double(found.omitted) || double(found.omitted) > at_most * 1.07 + 1e-3;
        wrong += std::fabs(mass - double(found.mass)) > 2e-3 * mass + 1e-3;
        wrong += std::abs(int64_t(kept) - int64_t(found.coded) - int64_t(found.exact)) > 2;
        for (size_t range = 0; range < kRanges; ++range) wrong += sums[range] != found.digit_sums[range];
        coded += found.coded, listed += found.exact;

        std::vector<uint8_t> codes(count * wide);
        std::vector<float> ranges(count / kRangeKeys * range_floats(dim)), total(wide, 1.0f);
        for (size_t range = 0; range < count / kRangeKeys; ++range)
            kernels().code_values(Dtype::float32, values.data() + range * kRangeKeys * size_t(dim), size_t(dim) * 4,
                                  dim, codes.data() + range * kRangeKeys * wide,
                                  ranges.data() + range * range_floats(dim));
        const float unit = 1.0f / 64.0f;
        kernels().multiply_panel(codes.data(), ranges.data(), dim, &found.words, own.data(), &unit, found.digit_sums, 1,
                                 total.data(), wide);
        for (int j = 0; j < dim; ++j) {
            double sum = 1.0, band = 1e-3;
            for (size_t k = 0; k < count; ++k) {
                const double step = double(ranges[k / kRangeKeys * range_floats(dim) + wide + size_t(j)]);
                sum += double(own[k]) * double(unit) * double(values[k * size_t(dim) + size_t(j)]);
                band += double(own[k]) * double(unit) * 0.501 * step;
            }
            wrong += std::fabs(sum - double(total[size_t(j)])) > band;
            largest = std::max(largest, std::fabs(sum - double(total[size_t(j)])) / band);
        }
    }
    check("digits, d = " + std::to_string(dim), wrong == 0 && coded > 0 && listed > 0,
          std::to_string(coded) + " coded, " + std::to_string(listed) + " listed, " + std::to_string(wrong) +
              " wrong, sums off by " + std::to_string(largest) + " of the band");
}

template <class Index>
void sketched(const char* name, int dim, std::mt19937& rng) {
    const int64_t n = 5000, m = 20;
    const Rows keys(1, n, dim, Dtype::float32, rng, 0.5f), queries(1, m, dim, Dtype::float32, rng, 0.0f);
    Index index(dim, Dtype::float32);
    index.append(keys.array());
    std::vector<double> thresholds(size_t(m), 1.3 * std::sqrt(double(dim)));
    const ReportArrays found = index.report(queries.exact.data(), thresholds.data(), size_t(m));
    int64_t wrong = 0;
    for (int64_t i = 0; i < m; ++i) {
        std::set<int64_t> reported(found.indices.begin() + found.indptr[size_t(i)],
                                   found.indices.begin() + found.indptr[size_t(i) + 1]);
        for (int64_t j = 0; j < n; ++j)
            wrong += (dot(queries.row(0, i), keys.row(0, j), dim) >= thresholds[0]) != (reported.count(j) == 1);
    }
    check(std::string(name) + ", d = " + std::to_string(dim), wrong == 0 && !found.indices.empty(),
          std::to_string(found.indices.size()) + " reported, " + std::to_string(wrong) + " wrong");
}

template <class Structure>
void structure(const char* name, int dim, std::mt19937& rng, bool sphere = false) {
    const int64_t n = 20000, m = 20;
    Rows keys(1, n, dim, Dtype::float32, rng, 0.0f);
    const Rows queries(1, m, dim, Dtype::float32, rng, 0.0f);
    for (int64_t i = 0; sphere && i < n; ++i) {
        float* key = keys.exact.data() + i * dim;
        const float norm = float(std::sqrt(dot(key, key, dim)));
        for (int j = 0; j < dim; ++j) key[j] /= norm;
    }
    std::vector<int64_t> ids(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) ids[size_t(i)] = i;
    tree::Forest forest(dim);
    std::shared_ptr<tree::StaticIndex> part;
    if constexpr (std::is_same_v<Structure, tree::ConvexLayers>)
        part = std::make_shared<Structure>(n, keys.exact.data(), ids.data());
    else
        part = std::make_shared<Structure>(dim, n, keys.exact.data(), ids.data(), 32);
    forest.replace_from(0, part, n);
    std::vector<double> thresholds;
    for (int64_t i = 0; i < m; ++i)
        thresholds.push_back((sphere ? 0.9999 : 2.2) * std::sqrt(dot(queries.row(0, i), queries.row(0, i), dim)));
    const tree::Report found = forest.report(queries.exact.data(), m, thresholds.data());
    int64_t wrong = 0;
    for (int64_t i = 0; i < m; ++i) {
        std::set<int64_t> reported(found.ids.data() + found.indptr[size_t(i)],
                                   found.ids.data() + found.indptr[size_t(i) + 1]);
        for (int64_t j = 0; j < n; ++j)
            wrong += (dot(queries.row(0, i), keys.row(0, j), dim) >= thresholds[size_t(i)]) != (reported.count(j) == 1);
    }
    check(std::string(name) + ", d = " + std::to_string(dim), wrong == 0 && found.indptr.back() > 0,
          std::to_string(found.indptr.back()) + " reported, " + std::to_string(wrong) + " wrong");
}

}  // namespace

int main() {
    std::mt19937 rng(1);
    set_num_threads(2);
    for (const std::string& level : isa_available()) {
        use_isa(level);
        std::printf("-- %s\n", level.c_str());
        for (Dtype dtype : {Dtype::float32, Dtype::bfloat16})
            for (Rule rule : {Rule::epsilon, Rule::relu})
                for (int64_t m : {1, 40})
                    for (int64_t dim : {40, 64, 80}) attention(dtype, dim, m, rule, rng);
        for (int dim : {8, 40, 64, 80, 128, 256}) panel(dim, rng);
        for (int dim : {8, 64, 80}) digits(dim, rng);
        sketched<SketchIndex>("sketch index", 64, rng);
        sketched<FlatIndex>("flat index", 24, rng);
        structure<tree::ConvexLayers>("convex layers", 2, rng);
        structure<tree::ConvexLayers>("convex layers of a circle", 2, rng, true);
        for (int dim : {3, 5}) structure<tree::PartitionTree>("partition tree", dim, rng);
    }
    return failed;
}
