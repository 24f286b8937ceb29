// AVX-512 and AVX-VNNI by SIMDe (https://github.com/simd-everywhere/simde, Debian's libsimde-dev) for machines without
// them: with HSR_EMULATE, the sources of these levels find this file in place of the compiler's. What SIMDe 0.7.4 lacks
// stands below, lane by lane.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#pragma GCC diagnostic pop

#if defined(HSR_EMULATE_AVXVNNI)
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#else
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1

#define HSR_EACH_LANE(To, Lane, n, value)                                          \
    To to;                                                                         \
    for (int i = 0; i < n; ++i) {                                                  \
        const Lane lane = value;                                                   \
        __builtin_memcpy((char*)&to + i * int(sizeof(Lane)), &lane, sizeof(Lane)); \
    }                                                                              \
    return to

namespace emulated {

inline __m512d cvtps_pd(__m256 x) { HSR_EACH_LANE(__m512d, double, 8, double(x[i])); }
inline __m256 cvtpd_ps(__m512d x) { HSR_EACH_LANE(__m256, float, 8, float(x[i])); }
// Out of the range of 32 bits: the least number, as in hardware.
inline __m256i cvttpd_epi32(__m512d x) {
    HSR_EACH_LANE(__m256i, int32_t, 8, x[i] > -2147483649.0 && x[i] < 2147483648.0 ? int32_t(x[i]) : INT32_MIN);
}
inline __m512i cvtepu32_epi64(__m256i x) {
    using Lanes = uint32_t __attribute__((vector_size(32)));
    HSR_EACH_LANE(__m512i, uint64_t, 8, ((Lanes)x)[i]);
}
inline __m512i cvtepu8_epi32(__m128i x) {
    using Lanes = uint8_t __attribute__((vector_size(16)));
    HSR_EACH_LANE(__m512i, uint32_t, 16, ((Lanes)x)[i]);
}
inline __m512 cvtph_ps(__m256i x) {
    using Lanes = uint16_t __attribute__((vector_size(32)));
    HSR_EACH_LANE(__m512, float, 16, _cvtsh_ss(((Lanes)x)[i]));
}
inline __m256 extractf32x8_ps(__m512 x, int half) { HSR_EACH_LANE(__m256, float, 8, x[half * 8 + i]); }
inline __m256i maskz_loadu_epi32(unsigned mask, const void* from) {
    HSR_EACH_LANE(__m256i, int32_t, 8, mask >> i & 1 ? ((const int32_t*)from)[i] : 0);
}
// x - floor(x), the one rounding that is asked for; of an infinity, zero.
inline __m512 reduce_ps(__m512 x, int) {
    HSR_EACH_LANE(__m512, float, 16, __builtin_isinf(x[i]) ? 0.0f : x[i] - __builtin_floorf(x[i]));
}

// SIMDe's is a product; here a quiet NaN times 2^-inf is zero, as in hardware.
inline __m512 scalef_ps(__m512 a, __m512 b) {
    HSR_EACH_LANE(__m512, float, 16, b[i] == -__builtin_inff() ? 0.0f : a[i] * __builtin_exp2f(__builtin_floorf(b[i])));
}

}  // namespace emulated

#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_cvtps_pd emulated::cvtps_pd
#define _mm512_cvtpd_ps emulated::cvtpd_ps
#define _mm512_cvttpd_epi32 emulated::cvttpd_epi32
#define _mm512_cvtepu32_epi64 emulated::cvtepu32_epi64
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm256_maskz_loadu_epi32 emulated::maskz_loadu_epi32
#undef _mm512_reduce_ps
#define _mm512_reduce_ps emulated::reduce_ps
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4
#endif
