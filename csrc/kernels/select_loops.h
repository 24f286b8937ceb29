// Kernels of decoding: both planes of the codes of what may be kept, and what is kept of it. Private to loops.h, in its
// anonymous namespace.
//
// A selection goes over its blocks in passes without branches that depend on keys, each leaving its results in the
// first cache: which blocks are in doubt; estimates from both planes; weights; lists.

// What a refinement needs of a query's first digits, or of its second ones.
struct DigitRow {
    const int8_t* digits;
    float offset;  // codes are centred at 127.5
};
template <int Count>
struct DigitRows {
    DigitRow first[Count], second[Count];
    explicit DigitRows(const CodedQuery* queries) {
        for (int q = 0; q < Count; ++q) {
            first[q] = {queries[q].high, 127.5f * queries[q].high_sum};
            second[q] = {queries[q].low, 127.5f * queries[q].low_sum};
        }
    }
};

// Estimates of `Blocks` blocks for `Count` of the queries, refined[Blocks][all queries][16]. Two blocks share each load
// of the queries' digits.
template <int Count, int Blocks, int All>
inline void refine_together(const uint8_t* const* high, const uint8_t* const* low, int dim, const CodedQuery* queries,
                            const DigitRows<All>& rows, const int* which, float* refined) {
    const int pairs = (dim + 7) / 8;
    DigitRow first[Count], second[Count];
    for (int q = 0; q < Count; ++q) first[q] = rows.first[which[q]], second[q] = rows.second[which[q]];
    for (int part = 0; part < kParts; ++part) {
        Ints coarse[Blocks][Count] = {}, fine[Blocks][Count] = {};
        for (int p = 0; p < pairs; ++p) {
            const size_t at = size_t(p) * 64 + size_t(part) * kRegisterBytes;
            for (int k = 0; k < Blocks; ++k) {
                const Bytes h = load<Bytes>(high[k] + at), l = load<Bytes>(low[k] + at);
                const auto add = [&](Bytes codes, int from) {
                    for (int q = 0; q < Count; ++q) {
                        coarse[k][q] = add_scores(coarse[k][q], codes, four_digits(first[q].digits + from));
                        fine[k][q] = add_scores(fine[k][q], codes, four_digits(second[q].digits + from));
                    }
                };
                add(joined_low(h, l), 8 * p);
                add(joined_high(h, l), 8 * p + 4);
            }
        }
        for (int k = 0; k < Blocks; ++k) {
            const Floats step = part_of_bfloat16<Floats>(high[k] + size_t(pairs) * 64, part);
            for (int q = 0; q < Count; ++q) {
                const CodedQuery& query = queries[which[q]];
                const Floats sum = (convert<Floats>(coarse[k][q]) - first[q].offset) +
                                   (convert<Floats>(fine[k][q]) - second[q].offset) * (1.0f / kFiner);
                store(refined + (k * All + which[q]) * 16 + part * kPartLanes,
                      step * (query.unit * sum) + query.centre);
            }
        }
    }
}
constexpr int kEvery[kTile] = {0, 1, 2, 3};

template <int Count>
inline void refine_tile(const uint8_t* high, const uint8_t* low, int dim, size_t blocks, const CodedQuery* queries,
                        float* estimates, size_t stride, float* maxima) {
    const size_t bytes = size_t(dim + 7) / 8 * 64;
    alignas(64) float refined[Count * 16];
    f32x16 top[Count];
    const DigitRows<Count> rows(queries);
    for (int q = 0; q < Count; ++q) top[q] = splat(maxima[q]);
    for (size_t block = 0; block < blocks; ++block, high += bytes + 64, low += bytes + 32) {
        refine_together<Count, 1>(&high, &low, dim, queries, rows, kEvery, refined);
        for (int q = 0; q < Count; ++q) {
            const f32x16 own = load<f32x16>(refined + q * 16);
            top[q] = max_of(top[q], own);
            store(estimates + q * stride + block * 16, own);
        }
    }
    for (int q = 0; q < Count; ++q) maxima[q] = max_of_lanes(top[q]);
}

void refine(const uint8_t* high, const uint8_t* low, int dim, size_t blocks, const CodedQuery* queries, int count,
            float* estimates, size_t stride, float* maxima) {
    with_number<kTile>(count, [&](auto number) {
        refine_tile<decltype(number)::value>(high, low, dim, blocks, queries, estimates, stride, maxima);
    });
}

void refine_listed(const uint8_t* high, const uint8_t* low, int dim, const uint32_t* blocks, size_t count,
                   const CodedQuery* query, float* estimates) {
    const size_t bytes = size_t(dim + 7) / 8 * 64;
    const DigitRows<1> rows(query);
    for (size_t i = 0; i < count; ++i) {
        const uint8_t *h = high + blocks[i] * (bytes + 64), *l = low + blocks[i] * (bytes + 32);
        refine_together<1, 1>(&h, &l, dim, query, rows, kEvery, estimates + i * 16);
    }
}

constexpr int kRefineBlocks = kParts == 1 ? 2 : 1;
constexpr size_t kBlocksAhead = 6;  // the codes of blocks in doubt lie scattered: they are asked for in time

// Blocks with a key in doubt, by their order; behind the last one those of later calls, or it is repeated.
template <int Count>
struct Doubtful {
    size_t count = 0;
    uint16_t block[kSelectBlocks + kBlocksAhead + 2];
    uint16_t doubts[kSelectBlocks + 1][Count];             // lanes in doubt
    alignas(64) float keys[kSelectBlocks + 1][Count][16];  // estimates, then weights from codes
    uint16_t exact[kSelectBlocks][Count];                  // lanes to read at full precision
    size_t coded_count = 0;
    uint16_t coded[kSelectBlocks + 1], coded_lanes[kSelectBlocks + 1];  // which of these blocks, any query's lanes

    void add(size_t at, bool any) {
        block[count] = uint16_t(at);
        count += any;
    }
};

// By the upper masses of whole blocks, the bounds of single keys, or masks of keys known to reach the threshold. The
// mass of the rest, from above, is added to omitted[Count].
template <int Count, Sums Wanted>
inline void find_doubtful(size_t blocks, size_t later, const Selection* selection, const float* uppers, size_t stride,
                          const float* block_masses, size_t mass_stride, const uint16_t* reaching,
                          Doubtful<Count>& found, f32x16* omitted) {
    if (block_masses) {
        uint64_t all = 0, heavy[Count] = {};
        for (int q = 0; q < Count; ++q) {
            for (size_t at = 0; at < blocks; at += 16) {
                const size_t left = blocks - at;
                const uint32_t valid = left < 16 ? (1u << left) - 1 : 0xffffu;
                const f32x16 mass = load<f32x16>(block_masses + q * mass_stride + at);
                const uint32_t reach = mask_not_less(mass, splat(selection[q].mass_from)) & valid;
                omitted[q] += keep_lanes(valid & ~reach, mass);
                heavy[q] |= uint64_t(reach) << at;
            }
            all |= heavy[q];
        }
        for (; all; all &= all - 1) {
            const int block = __builtin_ctzll(all);
            for (int q = 0; q < Count; ++q) found.doubts[found.count][q] = uint16_t(-(heavy[q] >> block & 1));
            found.add(size_t(block), true);
        }
    } else if (reaching) {
        for (size_t block = 0; block < blocks; ++block, reaching += kTile) {
            uint32_t any = 0;
            for (int q = 0; q < Count; ++q) any |= found.doubts[found.count][q] = reaching[q];
            found.add(block, any != 0);
        }
    } else {
        f32x16 threshold[Count];  // hidden keys lie below kLowest and are never in doubt
        for (int q = 0; q < Count; ++q) threshold[q] = max_of(splat(selection[q].threshold), splat(kLowest));
        for (size_t block = 0; block < blocks; ++block) {
            uint32_t any = 0;
            for (int q = 0; q < Count; ++q) {
                const f32x16 upper = load<f32x16>(uppers + q * stride + block * 16);
                const uint32_t doubt = mask_ge(upper, threshold[q]);
                any |= found.doubts[found.count][q] = uint16_t(doubt);
                if (Wanted != Sums::none)
                    omitted[q] += keep_lanes(~doubt & 0xffffu, exp_above(upper, selection[q].reference));
            }
            found.add(block, any != 0);
        }
    }
    size_t listed = found.count;
    const size_t wanted = found.count + kBlocksAhead + 2;
    for (size_t at = blocks; block_masses && at < blocks + later && listed < wanted; at += 16) {
        const size_t left = blocks + later - at;
        uint32_t reach = 0;
        for (int q = 0; q < Count; ++q)
            reach |= mask_not_less(load<f32x16>(block_masses + q * mass_stride + at), splat(selection[q].mass_from));
        if (left < 16) reach &= (1u << left) - 1;
        for (; reach && listed < wanted; reach &= reach - 1)
            found.block[listed++] = uint16_t(at + size_t(__builtin_ctz(reach)));
    }
    const uint16_t last = listed ? found.block[listed - 1] : uint16_t(0);
    while (listed < wanted) found.block[listed++] = last;
}

// What a pass over weights adds up for one query.
struct WeightSums {
    f32x16 left{}, sketched{}, band{}, variance{};
    int64_t kept = 0;
};

template <int Count, Sums Wanted>
inline void weigh_doubtful(const uint8_t* high, const uint8_t* low, size_t bytes, const CodedQuery* queries,
                           const Selection* selection, Doubtful<Count>& found, WeightSums* sums) {
    for (size_t f = 0; f < found.count; ++f) {
        const size_t block = found.block[f];
        const f32x16 step = load_bfloat16<f32x16>(high + block * (bytes + 64) + bytes),
                     residual8 = load_bfloat16<f32x16>(low + block * (bytes + 32) + bytes);
        const Truth uncoded = truth_ge(residual8, splat(kInfinity));
        uint32_t any = 0;
        for (int q = 0; q < Count; ++q) {
            const CodedQuery& query = queries[q];
            const Selection& own = selection[q];
            const f32x16 estimate = load<f32x16>(found.keys[f][q]);
            const uint32_t doubts = found.doubts[f][q];
            if (kRefineBlocks == 1 && !doubts) {  // not refined
                store(found.keys[f][q], f32x16{});
                found.exact[f][q] = 0;
                continue;
            }
            const f32x16 band = query.slope8 * residual8 + query.slope8_step * step + query.slack;
            const f32x16 decisive = own.keep_upper ? estimate + band : estimate;
            const Truth seen = truth_of(doubts);
            const Truth keep = both(seen, either(truth_ge(decisive, splat(own.threshold)), uncoded));
            const Truth exact = both(keep, either(truth_ge(decisive, splat(own.exact_from)), uncoded));
            const Truth coded = without(keep, exact);
            const f32x16 every = exp_of(estimate - own.reference), weight = where(coded, every);
            store(found.keys[f][q], weight);
            const uint32_t kept = bits(keep), read = bits(exact);
            found.exact[f][q] = uint16_t(read);
            sums[q].sketched += weight;
            sums[q].kept += __builtin_popcount(kept);
            any |= kept & ~read;
            if (Wanted == Sums::none) continue;
            // exp(band) - 1 <= growth * band, and a band is finite where a key is coded.
            const f32x16 error = where(without(seen, exact), every * band);
            sums[q].left += where(without(seen, keep), every + own.growth * error);
            const f32x16 of_coded = where(coded, error);
            sums[q].band += of_coded;
            if (Wanted == Sums::all) sums[q].variance += of_coded * of_coded;
        }
        found.coded[found.coded_count] = uint16_t(f);
        found.coded_lanes[found.coded_count] = uint16_t(any);
        found.coded_count += any != 0;
    }
}

template <int Count, Sums Wanted>
inline void select_tile(const uint8_t* high, const uint8_t* low, const uint8_t* value_parameters, int dim,
                        int value_dim, size_t blocks, size_t later, uint32_t first_key, const CodedQuery* queries,
                        const Selection* selection, const float* uppers, size_t stride, const float* block_masses,
                        size_t mass_stride, const uint16_t* reaching, KeptKeys* kept, SelectionSums* sums) {
    constexpr int kMaxGroups = kMaxHeadDim / kValueGroup;
    const size_t bytes = size_t(dim + 7) / 8 * 64;
    const int groups = (value_dim + kValueGroup - 1) / kValueGroup;
    const i32x16 lane = lane_numbers();
    f32x16 omitted[Count] = {};
    Doubtful<Count> found;
    find_doubtful<Count, Wanted>(blocks, later, selection, uppers, stride, block_masses, mass_stride, reaching, found,
                                 omitted);
    const DigitRows<Count> rows(queries);
    for (size_t f = 0; f < found.count; f += kRefineBlocks) {
        const uint8_t *h[kRefineBlocks], *l[kRefineBlocks];
        for (int k = 0; k < kRefineBlocks; ++k) {
            h[k] = high + found.block[f + k] * (bytes + 64);
            l[k] = low + found.block[f + k] * (bytes + 32);
            const size_t ahead = found.block[f + kBlocksAhead + k];
            for (size_t line = 0; line < bytes + 64; line += 64) {
                __builtin_prefetch(high + ahead * (bytes + 64) + line);
                __builtin_prefetch(low + ahead * (bytes + 32) + line);
            }
            if (value_parameters)
                for (int g = 0; g < groups; ++g)
                    __builtin_prefetch(value_parameters + (ahead * size_t(groups) + size_t(g)) * 64);
        }
        if constexpr (kRefineBlocks == 1) {
            int which[kTile] = {}, some = 0;
            for (int q = 0; q < Count; ++q)
                if (found.doubts[f][q]) which[some++] = q;
            float* refined = found.keys[f][0];
            with_number<Count>(some, [&](auto number) {
                refine_together<decltype(number)::value, 1>(h, l, dim, queries, rows, which, refined);
            });
        } else {
            refine_together<Count, kRefineBlocks>(h, l, dim, queries, rows, kEvery, found.keys[f][0]);
        }
    }
    WeightSums own[Count];
    weigh_doubtful<Count, Wanted>(high, low, bytes, queries, selection, found, own);

    for (int q = 0; q < Count; ++q) {
        size_t count = 0;
        for (size_t f = 0; f < found.count; ++f) {
            compress(found.exact[f][q], lane + int32_t(first_key + found.block[f] * 16), kept->exact[q] + count);
            count += size_t(__builtin_popcount(found.exact[f][q]));
        }
        kept->exact_count[q] = count;
        kept->kept[q] = own[q].kept;
    }
    size_t count = 0;
    f32x16 offsets[Count][kMaxGroups];
    for (int q = 0; q < Count; ++q)
        for (int g = 0; g < groups; ++g) offsets[q][g] = f32x16{};
    for (size_t i = 0; i < found.coded_count; ++i) {
        const size_t f = found.coded[i], block = found.block[f];
        const uint32_t lanes = found.coded_lanes[i];
        compress(lanes, lane + int32_t(first_key + block * 16), kept->keys + count);
        const uint8_t* parameters = value_parameters + block * size_t(groups) * 64;
        for (int g = 0; g < groups; ++g, parameters += 64) {
            const f32x16 value_step = load_bfloat16<f32x16>(parameters),
                         value_offset = load_bfloat16<f32x16>(parameters + 32);
            for (int q = 0; q < Count; ++q) {
                const f32x16 weight = load<f32x16>(found.keys[f][q]), scaled = weight * value_step;
                offsets[q][g] += weight * value_offset;
                compress(lanes, as<i32x16>(scaled),
                         (uint32_t*)(kept->scaled + size_t(g * kTile + q) * kept->capacity + count));
            }
        }
        count += size_t(__builtin_popcount(lanes));
    }
    kept->count = count;
    sums->refined += int64_t(found.count);
    for (int q = 0; q < Count; ++q) {
        sums->omitted[q] += sum_of(omitted[q]);
        sums->left[q] += sum_of(own[q].left);
        sums->sketched[q] += sum_of(own[q].sketched);
        sums->weight_band[q] += sum_of(own[q].band);
        sums->weight_var[q] += sum_of(own[q].variance) / dim;
        for (int g = 0; g < groups; ++g) {
            sums->offsets[q * groups + g] += sum_of(offsets[q][g]);
            if (Wanted != Sums::all) continue;
            float* scaled = kept->scaled + size_t(g * kTile + q) * kept->capacity;
            store(scaled + count, f32x16{});  // there is room for 16 more
            f32x16 steps = {}, squares = {};
            for (size_t i = 0; i < count; i += 16) {
                const f32x16 here = load<f32x16>(scaled + i);
                steps += here;
                squares += here * here;
            }
            sums->steps[q * groups + g] += sum_of(steps);
            sums->squares[q * groups + g] += sum_of(squares);
        }
    }
}

void select(const uint8_t* high, const uint8_t* low, const uint8_t* value_parameters, int dim, int value_dim,
            size_t blocks, size_t later, uint32_t first_key, const CodedQuery* queries, int count,
            const Selection* selection, Sums wanted, const float* uppers, size_t stride, const float* block_masses,
            size_t mass_stride, const uint16_t* reaching, KeptKeys* kept, SelectionSums* sums) {
    with_number<kTile>(count, [&](auto number) {
        const auto sums_of = [&](auto sums_wanted) {
            select_tile<decltype(number)::value, decltype(sums_wanted)::value>(
                high, low, value_parameters, dim, value_dim, blocks, later, first_key, queries, selection, uppers,
                stride, block_masses, mass_stride, reaching, kept, sums);
        };
        switch (wanted) {
            case Sums::none: return sums_of(Number<Sums::none>());
            case Sums::masses: return sums_of(Number<Sums::masses>());
            case Sums::all: return sums_of(Number<Sums::all>());
        }
    });
}
