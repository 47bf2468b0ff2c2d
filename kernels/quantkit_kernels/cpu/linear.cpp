// y = x W^T with a quantized weight, for a few tokens (gemv: float32 sums; gemv_int8: exact sums of int8 activations),
// and the decoding of a weight for many. One row of the weight at a time is decoded in registers.
//
// T tokens, N rows, K columns (a multiple of 64: padded with columns whose x is zero), groups of a multiple of 16.
#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

struct Weight {
  const uint8_t* codes;  // [N, K / 64, CHUNK]
  const void* scale;     // [N, G] of scale_kind
  const uint8_t* zero;   // [N, G], or null: every zero point is `middle`
  long N, K, group, G;
  int scale_kind;          // 0 float32, 1 bfloat16, 2 float16, 3 e4m3
  int middle;
  int rounding;            // what decoded weights are rounded to, like scale_kind
  float factor;            // of all scales
  int threads;
};

// Columns that share a scale, in a chunk of 64: the rows' scales are laid out for each run of them (for each group where
// a group is whole chunks).
long run_of(const Weight& w) { return w.group % 64 == 0 ? w.group : w.group % 32 == 0 ? 32 : 16; }

float e4m3(int8_t code) {
  const int bits16 = (int)code << 7 & 0xBF80;  // float16 places, 256 times too small
  const uint32_t magnitude = bits16 & 0x7F80;
  const float f = magnitude < 0x400 ? magnitude * 0x1p-24f : bits<float>((magnitude << 13) + (112u << 23));
  return (bits16 & 0x8000 ? -f : f) * 256;
}

// What vectors need at the end of a buffer of floats.
std::vector<float> buffer(long floats) { return std::vector<float>(floats + V); }

// The scales of row n by runs, times all factors; and, where decoded codes are not the values yet (true), what is to be
// subtracted from scale * code: shift = scale * (zero point - base).
bool row_scales(const Weight& w, long n, int base, float format_factor, float* scale, float* shift) {
  const long at = n * w.G, repeat = (w.group % 64 ? w.group : 64) / (w.group % 64 ? run_of(w) : 64);
  const float factor = w.factor * format_factor;
  const bool shifted = w.zero || w.middle != base;
  for (long g = 0; g < w.G; g += V) {
    f32v s = {};
    const long left = w.G - g < V ? w.G - g : V;
    if (left == V && w.scale_kind == 0) s = load<f32v>((const float*)w.scale + at + g);
    else if (left == V && w.scale_kind == 1) s = Bf16::get((const uint8_t*)w.scale + 2 * (at + g), 0);
    else if (left == V && w.scale_kind == 2) s = F16::get((const uint8_t*)w.scale + 2 * (at + g), 0);
    else
      for (long i = 0; i < left; i++) {
        const long from = at + g + i;
        if (w.scale_kind == 0) s[i] = ((const float*)w.scale)[from];
        else if (w.scale_kind == 1) s[i] = bits<float>((uint32_t)((const uint16_t*)w.scale)[from] << 16);
        else if (w.scale_kind == 2) s[i] = (float)((const _Float16*)w.scale)[from];
        else s[i] = e4m3(((const int8_t*)w.scale)[from]);
      }
    s *= factor;
    std::memcpy(scale + g, &s, sizeof s);
    if (shifted) {
      f32v zero = f32v{} + (float)(w.middle - base);
      if (w.zero && left == V) zero = __builtin_convertvector(wide_u8(w.zero + at + g) - base, f32v);
      else if (w.zero)
        for (long i = 0; i < left; i++) zero[i] = w.zero[at + g + i] - base;
      s *= zero;
      std::memcpy(shift + g, &s, sizeof s);
    }
  }
  if (repeat > 1)
    for (long g = w.G - 1; g >= 0; g--)
      for (long i = repeat - 1; i >= 0; i--) {
        scale[g * repeat + i] = scale[g];
        if (shifted) shift[g * repeat + i] = shift[g];
      }
  return shifted;
}

// acc[t] += scale * sum of code * x over columns k0 ... k1 of one row. RUN: columns of a chunk that share a scale.
template <class D, int T, int RUN>
inline void add_row(const uint8_t* codes, const float* scale, const float* x, const Weight& w, long k0, long k1,
                    long ahead, f32v* acc) {
  constexpr int R = 64 / RUN, C = RUN < 64 || T >= 4 ? 1 : 2;  // runs of a chunk; chains of additions
  constexpr int S = T <= 2 ? R : 1;  // chains of sums
  f32v total[T][S] = {};
  long run = RUN < 64 ? k0 / RUN : k0 / w.group;  // among the row's scales
  while (k0 < k1) {
    f32v part[T][R][C] = {};
    const long stop = RUN < 64 ? k0 + 64 : (run + 1) * w.group, end = stop < k1 ? stop : k1;
    for (long k = k0; k < end; k += 64) {
      const uint8_t* chunk = codes + k / 64 * D::CHUNK;
      __builtin_prefetch(chunk + ahead);
#pragma GCC unroll 8
      for (int j = 0; j < 64 / V; j++) {
        const int i = j / 2 + j % 2 * (32 / V);  // both halves of a byte after one another
        const f32v c = D::get(chunk, i);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) part[t][i * V / RUN][j % C] += c * load<f32v>(x + t * w.K + k + i * V);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float s = scale[run + r];
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) total[t][r % S] += (C == 1 ? part[t][r][0] : part[t][r][0] + part[t][r][C - 1]) * s;
    }
    k0 = end;
    run += end == stop ? R : 0;
  }
  for (int t = 0; t < T; t++)
    for (int c = 0; c < S; c++) acc[t] += total[t][c];
}

constexpr int ROWS = 16;      // that meet a block of x while it is in the first-level cache
constexpr int BLOCK = 8192;   // floats of x in a block

template <class D, int T>
void gemv(const Weight& w, const float* x, float* y) {
  const long bytes = w.K / 64 * D::CHUNK;
  const long run = run_of(w), runs = (w.K + run - 1) / run;
  std::vector<float> sums = buffer(T * runs);  // of x over each run: what a zero point multiplies
  for (int t = 0; t < T; t++)
    for (long r = 0; r < runs; r++) {
      f32v total = {};
      for (long k = r * run; k < (r + 1) * run && k < w.K; k += V) total += load<f32v>(x + t * w.K + k);
      sums[t * runs + r] = sum(total);
    }
#pragma omp parallel num_threads(w.threads)
  {
    std::vector<float> scale = buffer(ROWS * runs), shift = buffer(runs);
#pragma omp for schedule(static)
    for (long n0 = 0; n0 < w.N; n0 += ROWS) {
      const int rows = n0 + ROWS < w.N ? ROWS : w.N - n0;
      f32v acc[ROWS][T] = {};
      float minus[ROWS][T] = {};
      for (int r = 0; r < rows; r++)
        if (row_scales(w, n0 + r, D::BASE, D::FACTOR, &scale[r * runs], shift.data()))
          for (int t = 0; t < T; t++) {
            f32v total = {};
            long g = 0;
            for (; g + V <= runs; g += V) total += load<f32v>(&shift[g]) * load<f32v>(&sums[t * runs + g]);
            minus[r][t] = sum(total);
            for (; g < runs; g++) minus[r][t] += shift[g] * sums[t * runs + g];
          }
      for (long k0 = 0; k0 < w.K; k0 += BLOCK / T)
        for (int r = 0; r < rows; r++) {
          const long k1 = k0 + BLOCK / T < w.K ? k0 + BLOCK / T : w.K;
          const uint8_t* codes = w.codes + (n0 + r) * bytes;
          const float* s = &scale[r * runs];
          if (w.group % 64 == 0) add_row<D, T, 64>(codes, s, x, w, k0, k1, 4 * bytes, acc[r]);
          else if (w.group % 32 == 0) add_row<D, T, 32>(codes, s, x, w, k0, k1, 4 * bytes, acc[r]);
          else add_row<D, T, 16>(codes, s, x, w, k0, k1, 4 * bytes, acc[r]);
        }
      for (int r = 0; r < rows; r++)
        for (int t = 0; t < T; t++) y[t * w.N + n0 + r] = sum(acc[r][t]) - minus[r][t];
    }
  }
}

// ---- int8 activations ----

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

template <bool BYTES, int T>
void gemv_int8(const Weight& w, const int8_t* x, const float* x_scale, float* y) {
  constexpr int CHUNK = BYTES ? 64 : 32;
  const long bytes = w.K / 64 * CHUNK;
  std::vector<int> sums(T * w.G);  // of x over each group: what a zero point multiplies
  for (int t = 0; t < T; t++)
    for (long g = 0; g < w.G; g++) {
      i32v total = {};
      for (long k = g * w.group; k < (g + 1) * w.group && k < w.K; k += V) total += wide_s8((const uint8_t*)x + t * w.K + k);
      for (int i = 0; i < V; i++) sums[t * w.G + g] += total[i];
    }
#pragma omp parallel num_threads(w.threads)
  {
    std::vector<float> scale = buffer(w.G), unused = buffer(w.G);
#pragma omp for schedule(static)
    for (long n = 0; n < w.N; n++) {
      row_scales(w, n, 0, 1, scale.data(), unused.data());
      f32x8 acc[T] = {};
      const bool two = w.group % 64;  // the halves of a chunk are groups of their own
      for (long k0 = 0, g = 0; k0 < w.K; g += 1 + two) {
        const long stop = two ? k0 + 64 : k0 + w.group, end = stop < w.K ? stop : w.K;
        i32x8 part[2][T];
        for (int half = 0; half < 2; half++) {
          const int zero = half > two ? 0 : (w.zero ? w.zero[n * w.G + g + half] : w.middle) - (BYTES ? SIGNED_BASE : 0);
          for (int t = 0; t < T; t++)
            part[half][t] = half > two ? i32x8{} : i32x8{-zero * sums[t * w.G + g + half], 0, 0, 0, 0, 0, 0, 0};
        }
        for (long k = k0; k < end; k += 64) {
          const uint8_t* chunk = w.codes + n * bytes + k / 64 * CHUNK;
#if defined(__GNUC__)
          __builtin_prefetch(chunk + 2048);
#endif
#pragma GCC unroll 8
          for (int t = 0; t < T; t++)
            for (int half = 0; half < 2; half++)
              part[half][t] = dot32<BYTES>(part[half][t], chunk, half, x + t * w.K + k);
        }
        const float low = scale[g], high = scale[g + two];
        for (int t = 0; t < T; t++)
          acc[t] += __builtin_convertvector(part[0][t], f32x8) * low + __builtin_convertvector(part[1][t], f32x8) * high;
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

// ---- decoding ----

inline f32v to_bf16(f32v v) {  // rounded to nearest even
  const i32v b = bits<i32v>(v);
  return bits<f32v>((b + 0x7FFF + (b >> 16 & 1)) & (int)0xFFFF0000);
}
inline f32v to_f16(f32v v) {
#if defined(QK_AVX512)
  return (f32v)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(QK_AVX2) && QK_WIDTH == 8
  return (f32v)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  typedef _Float16 f16v __attribute__((vector_size(2 * V)));
  return __builtin_convertvector(__builtin_convertvector(v, f16v), f32v);
#endif
}

inline void store(float* out, f32v v) { std::memcpy(out, &v, sizeof v); }
inline void store(uint16_t* out, f32v v) {  // as bfloat16
  const u16v h = __builtin_convertvector(bits<i32v>(to_bf16(v)) >> 16, u16v);
  std::memcpy(out, &h, sizeof h);
}

template <class D, class Out>
void decode(const Weight& w, long n0, long n1, Out* out) {
  const long bytes = w.K / 64 * D::CHUNK;
#pragma omp parallel num_threads(w.threads)
  {
    const long run = run_of(w), runs = (w.K + run - 1) / run;
    std::vector<float> scale = buffer(runs), unused = buffer(runs);
#pragma omp for schedule(static)
    for (long n = n0; n < n1; n++) {
      row_scales(w, n, D::BASE, D::FACTOR, scale.data(), unused.data());
      const uint8_t* chunk = w.codes + n * bytes;
      Out* to = out + (n - n0) * w.K;
      for (long r = 0; r < runs; r++)
        for (long k = r * run; k < (r + 1) * run && k < w.K;) {
          const int columns = run < 64 ? run : 64;
          const float zero = (w.zero ? w.zero[n * w.G + k / w.group] : w.middle) - D::BASE;  // code - zero is exact
          for (int i = 0; i < columns / V; i++) {
            f32v v = (D::get(chunk + k / 64 * D::CHUNK, k % 64 / V + i) - zero) * scale[r];
            if (w.rounding == 1) v = to_bf16(v);
            if (w.rounding == 2) v = to_f16(v);
            store(to + k + i * V, v);
          }
          k += columns;
        }
    }
  }
}

template <class D>
void gemv_tokens(const Weight& w, const float* x, float* y, long M) {
  for (; M >= 8; M -= 8, x += 8 * w.K, y += 8 * w.N) gemv<D, 8>(w, x, y);
  for (; M >= 4; M -= 4, x += 4 * w.K, y += 4 * w.N) gemv<D, 4>(w, x, y);
  for (; M >= 2; M -= 2, x += 2 * w.K, y += 2 * w.N) gemv<D, 2>(w, x, y);
  if (M) gemv<D, 1>(w, x, y);
}

template <bool BYTES>
void gemv_int8_tokens(const Weight& w, const int8_t* x, const float* x_scale, float* y, long M) {
  for (; M >= 4; M -= 4, x += 4 * w.K, x_scale += 4, y += 4 * w.N) gemv_int8<BYTES, 4>(w, x, x_scale, y);
  for (; M >= 2; M -= 2, x += 2 * w.K, x_scale += 2, y += 2 * w.N) gemv_int8<BYTES, 2>(w, x, x_scale, y);
  if (M) gemv_int8<BYTES, 1>(w, x, x_scale, y);
}

}  // namespace

// Formats: 0 int4, 1 int8, 2 fp8, 3 fp4, 4 bf16, 5 f16, 6 f32.
#define QK_EACH(call) \
  switch (format) { \
    case 0: return call(Int4); \
    case 1: return call(Int8); \
    case 2: return call(Fp8); \
    case 3: return call(Fp4); \
    case 4: return call(Bf16); \
    case 5: return call(F16); \
    case 6: return call(F32); \
  }
#define QK_WEIGHT Weight{codes, scale, zero, N, K, group, (K + group - 1) / group, scale_kind, middle, rounding, factor, threads}
#define QK_ARGUMENTS                                                                                              \
  int format, const uint8_t *codes, const void *scale, int scale_kind, const uint8_t *zero, int middle, int rounding, \
      float factor, long N, long K, long group, int threads

extern "C" void quantkit_gemv(QK_ARGUMENTS, const float* x, float* y, long M) {
  const Weight w = QK_WEIGHT;
#define QK_CALL(D) gemv_tokens<D>(w, x, y, M)
  QK_EACH(QK_CALL)
#undef QK_CALL
}

extern "C" void quantkit_gemv_int8(QK_ARGUMENTS, const int8_t* x, const float* x_scale, float* y, long M) {
  const Weight w = QK_WEIGHT;
  if (format == 1) gemv_int8_tokens<true>(w, x, x_scale, y, M);
  else gemv_int8_tokens<false>(w, x, x_scale, y, M);
}

// Rows n0 ... n1 as float32 or bfloat16 [n1 - n0, K].
extern "C" void quantkit_decode(QK_ARGUMENTS, long n0, long n1, void* out, int bf16) {
  const Weight w = QK_WEIGHT;
#define QK_CALL(D) (bf16 ? decode<D>(w, n0, n1, (uint16_t*)out) : decode<D>(w, n0, n1, (float*)out))
  QK_EACH(QK_CALL)
#undef QK_CALL
}
