// y = x W^T for a few tokens of int8 activations and integer weights: sums of codes are exact, then scaled in float32.
//
// T tokens, N rows, K columns (a multiple of 64), groups of 32 or of a multiple of 64.
#include "weight.h"

namespace {

typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));
typedef int8_t s8x32 __attribute__((vector_size(32)));

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define QK_VNNI 1
inline i32x8 dpbusd(i32x8 sum, u8x32 a, s8x32 b) { return (i32x8)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)a, (__m256i)b); }
#elif defined(QK_TEST_VNNI)  // the instruction spelled out, so that its path can be tested where it is missing
#define QK_VNNI 1
inline i32x8 dpbusd(i32x8 sum, u8x32 a, s8x32 b) {
  for (int i = 0; i < 32; i++) sum[i / 4] += (int)a[i] * b[i];
  return sum;
}
#endif

// sum + code * x over 32 columns, in eight parts
inline i32x8 dot_unsigned(i32x8 sum, u8x32 codes, const int8_t* x) {  // codes 0..15
  const s8x32 v = load<s8x32>(x);
#if defined(QK_VNNI)
  return dpbusd(sum, codes, v);
#elif defined(QK_AVX2)  // pairs are at most 2 * 15 * 128: their 16 bits never saturate
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)v);
  return sum + (i32x8)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int i = 0; i < 32; i++) sum[i / 4] += (int)codes[i] * v[i];
  return sum;
#endif
}

#if defined(QK_VNNI)
constexpr int SIGNED_BASE = 0;  // the instruction wants unsigned codes: 128 more than the stored ones
#else
constexpr int SIGNED_BASE = 128;
#endif

inline i32x8 dot_signed(i32x8 sum, s8x32 codes, const int8_t* x) {
#if defined(QK_VNNI)
  return dpbusd(sum, (u8x32)codes ^ 128, load<s8x32>(x));
#elif defined(QK_AVX2)  // maddubs would saturate
  for (int half = 0; half < 2; half++) {
    const __m256i c = _mm256_cvtepi8_epi16(((const __m128i*)&codes)[half]);
    const __m256i v = _mm256_cvtepi8_epi16(load<__m128i>(x + 16 * half));
    sum += (i32x8)_mm256_madd_epi16(c, v);
  }
  return sum;
#else
  for (int i = 0; i < 32; i++) sum[i / 4] += (int)codes[i] * x[i];
  return sum;
#endif
}

template <bool BYTES>
inline i32x8 dot32(i32x8 sum, const uint8_t* chunk, int half, const int8_t* x) {
  if (BYTES) return dot_signed(sum, load<s8x32>(chunk + 32 * half), x + 32 * half);
  const u8x32 both = load<u8x32>(chunk);
  return dot_unsigned(sum, half ? both >> 4 : both & 15, x + 32 * half);
}

// TWO: the halves of a chunk are groups of their own.
template <bool BYTES, bool TWO, int T>
void gemv_int8(const Weight& w, const int8_t* x, const float* x_scale, float* y) {
  constexpr int CHUNK = BYTES ? 64 : 32, PARTS = 1 + TWO, BASE = BYTES ? SIGNED_BASE : 0;
  const long bytes = w.K / 64 * CHUNK;
  std::vector<int> sums(T * (w.G + 1));  // of x over each group, times minus the zero point all groups have if they do
  for (int t = 0; t < T; t++)
    for (long g = 0; g < w.G; g++) {
      i32v total = {};
      for (long k = g * w.group; k < (g + 1) * w.group && k < w.K; k += V) total += wide_s8((const uint8_t*)x + t * w.K + k);
      for (int i = 0; i < V; i++) sums[t * w.G + g] += total[i];
      if (!w.zero) sums[t * w.G + g] *= BASE - w.middle;
    }
#pragma omp parallel num_threads(w.threads)
  {
    std::vector<float> scale = buffer(w.G), unused = buffer(w.G);
#pragma omp for schedule(static)
    for (long n = 0; n < w.N; n++) {
      row_scales(w, n, w.middle, 1, scale.data(), unused.data());
      const uint8_t* codes = w.codes + n * bytes;
      f32x8 acc[T] = {};
      for (long k0 = 0, g = 0; k0 < w.K; g += PARTS) {
        const long stop = k0 + (TWO ? 64 : w.group), end = stop < w.K ? stop : w.K;
        i32x8 part[T][PARTS];
        for (int t = 0; t < T; t++)
          for (int p = 0; p < PARTS; p++) {
            const int sum = sums[t * w.G + g + p];
            part[t][p] = i32x8{w.zero ? (BASE - w.zero[n * w.G + g + p]) * sum : sum, 0, 0, 0, 0, 0, 0, 0};
          }
        for (long k = k0; k < end; k += 64) {
          const uint8_t* chunk = codes + k / 64 * CHUNK;
          __builtin_prefetch(chunk + 2048);
#pragma GCC unroll 8
          for (int t = 0; t < T; t++)
            for (int half = 0; half < 2; half++)
              part[t][half % PARTS] = dot32<BYTES>(part[t][half % PARTS], chunk, half, x + t * w.K + k);
        }
        if (!TWO && w.G == 1) {  // one sum of integers, rounded once: the same whichever way computes it
          for (int t = 0; t < T; t++) {
            int sum = 0;
            for (int i = 0; i < 8; i++) sum += part[t][0][i];
            acc[t][0] = (float)sum * scale[0];
          }
          break;
        }
        for (int t = 0; t < T; t++)
          for (int p = 0; p < PARTS; p++) acc[t] += __builtin_convertvector(part[t][p], f32x8) * scale[g + p];
        k0 = end;
      }
      for (int t = 0; t < T; t++) {
        float total = 0;
        for (int i = 0; i < 8; i++) total += acc[t][i];
        y[t * w.N + n] = total * x_scale[t];
      }
    }
  }
}

template <bool BYTES, int T>
void gemv_int8_any(const Weight& w, const int8_t* x, const float* x_scale, float* y) {
  if (w.group % 64) gemv_int8<BYTES, true, T>(w, x, x_scale, y);
  else gemv_int8<BYTES, false, T>(w, x, x_scale, y);
}

template <bool BYTES>
void gemv_int8_tokens(const Weight& w, const int8_t* x, const float* x_scale, float* y, long M) {
  for (; M >= 4; M -= 4, x += 4 * w.K, x_scale += 4, y += 4 * w.N) gemv_int8_any<BYTES, 4>(w, x, x_scale, y);
  for (; M >= 2; M -= 2, x += 2 * w.K, x_scale += 2, y += 2 * w.N) gemv_int8_any<BYTES, 2>(w, x, x_scale, y);
  if (M) gemv_int8_any<BYTES, 1>(w, x, x_scale, y);
}

}  // namespace

extern "C" void quantkit_gemv_int8(QK_ARGUMENTS, const int8_t* x, const float* x_scale, float* y, long M) {
  const Weight w = QK_WEIGHT;
  if (format == 1) gemv_int8_tokens<true>(w, x, x_scale, y, M);
  else gemv_int8_tokens<false>(w, x, x_scale, y, M);
}
