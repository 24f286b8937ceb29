// Vectors of a fixed number of lanes, by the vector extensions of GCC and Clang. A vector that is wider than the
// registers of the level is a Pair of halves: left to the compiler, it would be kept in memory and pass through it with
// every operation. Private to the kernels, in their anonymous namespaces.

// The level is all of these or none: a compiler told of some of them for every file keeps to AVX2 here.
#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VNNI__)
#define HSR_AVX512
#endif

#if defined(HSR_AVX512)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class Half>
struct Pair {
    Half low, high;
};

template <class T, int Bytes, bool Wide = (Bytes > kRegisterBytes)>
struct VectorOf {
    typedef T type __attribute__((vector_size(Bytes)));
};
template <class T, int Bytes>
struct VectorOf<T, Bytes, true> {
    using type = Pair<typename VectorOf<T, Bytes / 2>::type>;
};
template <class T, int Lanes>
using Vector = typename VectorOf<T, int(sizeof(T)) * Lanes>::type;

using f32x16 = Vector<float, 16>;
using i32x16 = Vector<int32_t, 16>;
using u32x16 = Vector<uint32_t, 16>;
using u16x16 = Vector<uint16_t, 16>;
using i16x16 = Vector<int16_t, 16>;
using u8x16 = Vector<uint8_t, 16>;
using i8x16 = Vector<int8_t, 16>;
using u8x64 = Vector<uint8_t, 64>;
using f64x8 = Vector<double, 8>;
using f64x4 = Vector<double, 4>;
using f32x8 = Vector<float, 8>;
using i32x8 = Vector<int32_t, 8>;
using u32x8 = Vector<uint32_t, 8>;
using i8x8 = Vector<int8_t, 8>;

// ---- what a vector is made of

template <class V>
struct Shape {  // of one register
    using Lane = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V>()[0])>>;
    static constexpr int lanes = int(sizeof(V) / sizeof(Lane));
    using Half = typename VectorOf<Lane, int(sizeof(V)) / 2>::type;
    static constexpr bool pair = false;
};
template <class H>
struct Shape<Pair<H>> {
    using Lane = typename Shape<H>::Lane;
    static constexpr int lanes = 2 * Shape<H>::lanes;
    using Half = H;
    static constexpr bool pair = true;
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)  // GCC 12, Clang
#define HSR_SHUFFLES
#endif
#endif

template <class V, int... I>
inline typename Shape<V>::Half some_lanes(const V& x, std::integer_sequence<int, I...>) {
#if defined(HSR_SHUFFLES)
    return __builtin_shufflevector(x, x, I...);
#else
    return typename Shape<V>::Half{x[I]...};
#endif
}
template <int First, int... I>
constexpr std::integer_sequence<int, (First + I)...> from_lane(std::integer_sequence<int, I...>) {
    return {};
}

template <class V>
inline typename Shape<V>::Half lower(const V& x) {
    if constexpr (Shape<V>::pair)
        return x.low;
    else
        return some_lanes(x, std::make_integer_sequence<int, Shape<V>::lanes / 2>());
}
template <class V>
inline typename Shape<V>::Half upper(const V& x) {
    if constexpr (Shape<V>::pair)
        return x.high;
    else
        return some_lanes(x, from_lane<Shape<V>::lanes / 2>(std::make_integer_sequence<int, Shape<V>::lanes / 2>()));
}
template <class V, int... I>
inline V joined(const typename Shape<V>::Half& low, const typename Shape<V>::Half& high,
                std::integer_sequence<int, I...>) {
#if defined(HSR_SHUFFLES)
    return __builtin_shufflevector(low, high, I...);
#else
    constexpr int half = Shape<V>::lanes / 2;
    return V{(I < half ? low[I % half] : high[I % half])...};
#endif
}
// One register from two halves.
template <class V>
inline V join(const typename Shape<V>::Half& low, const typename Shape<V>::Half& high) {
    if constexpr (Shape<V>::pair)
        return V{low, high};
    else
        return joined<V>(low, high, std::make_integer_sequence<int, Shape<V>::lanes>());
}

// ---- memory

template <class V>
inline V load(const void* from) {
    if constexpr (Shape<V>::pair) {
        using Half = typename Shape<V>::Half;
        return {load<Half>(from), load<Half>((const uint8_t*)from + sizeof(Half))};
    } else {
        V value;
        __builtin_memcpy(&value, from, sizeof value);
        return value;
    }
}
template <class V>
inline void store(void* to, const V& value) {
    if constexpr (Shape<V>::pair) {
        store(to, value.low);
        store((uint8_t*)to + sizeof value.low, value.high);
    } else {
        __builtin_memcpy(to, &value, sizeof value);
    }
}

// ---- operations lane by lane

// The same numbers as another type (convert), or the same bits (as).
template <class To, class From>
inline To convert(const From& x) {
    if constexpr (Shape<To>::pair || Shape<From>::pair) {
        using Half = typename Shape<To>::Half;
        return join<To>(convert<Half>(lower(x)), convert<Half>(upper(x)));
    } else {
        return __builtin_convertvector(x, To);
    }
}
template <class To, class From>
inline To as(const From& x) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    if constexpr (Shape<To>::pair) {
        using Half = typename Shape<To>::Half;
        return {as<Half>(x.low), as<Half>(x.high)};
    } else {
        return (To)x;
    }
}

template <class Truth, class V>
inline V select(const Truth& truth, const V& yes, const V& no) {
    if constexpr (Shape<V>::pair)
        return {select(truth.low, yes.low, no.low), select(truth.high, yes.high, no.high)};
    else
        return truth ? yes : no;
}

template <class S>
using IfNumber = std::enable_if_t<std::is_arithmetic_v<S>>;

#define HSR_PAIRWISE(op)                                                         \
    template <class H>                                                           \
    inline auto operator op(const Pair<H>& a, const Pair<H>& b) {                \
        return Pair<decltype(a.low op b.low)>{a.low op b.low, a.high op b.high}; \
    }                                                                            \
    template <class H, class S, class = IfNumber<S>>                             \
    inline auto operator op(const Pair<H>& a, S b) {                             \
        return Pair<decltype(a.low op b)>{a.low op b, a.high op b};              \
    }                                                                            \
    template <class H, class S, class = IfNumber<S>>                             \
    inline auto operator op(S a, const Pair<H>& b) {                             \
        return Pair<decltype(a op b.low)>{a op b.low, a op b.high};              \
    }
HSR_PAIRWISE(+)
HSR_PAIRWISE(-)
HSR_PAIRWISE(*)
HSR_PAIRWISE(/)
HSR_PAIRWISE(&)
HSR_PAIRWISE(|)
HSR_PAIRWISE(^)
HSR_PAIRWISE(<<)
HSR_PAIRWISE(>>)
HSR_PAIRWISE(<)
HSR_PAIRWISE(>)
HSR_PAIRWISE(>=)
HSR_PAIRWISE(==)
#undef HSR_PAIRWISE

template <class H>
inline Pair<H> operator-(const Pair<H>& a) {
    return {-a.low, -a.high};
}
template <class H>
inline Pair<H> operator~(const Pair<H>& a) {
    return {~a.low, ~a.high};
}
template <class H, class B>
inline Pair<H>& operator+=(Pair<H>& a, const B& b) {
    return a = a + b;
}
template <class H, class B>
inline Pair<H>& operator*=(Pair<H>& a, const B& b) {
    return a = a * b;
}

template <class V>
inline V splat_to(typename Shape<V>::Lane x) {
    return x - V{};
}
inline f32x16 splat(float x) { return splat_to<f32x16>(x); }
inline i32x16 splat(int32_t x) { return splat_to<i32x16>(x); }

inline i32x16 lane_numbers() {
    alignas(64) static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load<i32x16>(numbers);
}

#if !defined(HSR_AVX512)
// A bit for each lane of a comparison.
template <class Truth>
inline uint32_t bits_of(const Truth& truth) {
    constexpr int lanes = Shape<Truth>::lanes;
    constexpr bool wide = sizeof(typename Shape<Truth>::Lane) == 8;
    if constexpr (Shape<Truth>::pair) {
        return bits_of(truth.low) | bits_of(truth.high) << (lanes / 2);
    } else {
#if defined(__AVX2__)
        if constexpr (wide)
            return uint32_t(_mm256_movemask_pd((__m256d)truth));
        else
            return uint32_t(_mm256_movemask_ps((__m256)truth));
#elif defined(__SSE2__)
        if constexpr (wide)
            return uint32_t(_mm_movemask_pd((__m128d)truth));
        else
            return uint32_t(_mm_movemask_ps((__m128)truth));
#elif defined(__aarch64__)
        if constexpr (wide)
            return uint32_t(truth[0] & 1) | uint32_t(truth[1] & 2);
        else
            return vaddvq_u32(vandq_u32((uint32x4_t)truth, uint32x4_t{1, 2, 4, 8}));
#else
        uint32_t mask = 0;
        for (int i = 0; i < lanes; ++i) mask |= uint32_t(truth[i] & 1) << i;
        return mask;
#endif
    }
}
#endif
