// y = x W^T with a quantized weight for a few tokens, in float32, and the decoding of a weight for many tokens. A row of
// the weight is decoded in registers while x is multiplied.
//
// T tokens, N rows, K columns (a multiple of 64: padded with columns whose x is zero), groups of a multiple of 16.
#include <algorithm>

#include "weight.h"

namespace {

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
    run += R;
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
          if constexpr (D::CHUNK > 64) add_row<D, T, 64>(codes, s, x, w, k0, k1, 4 * bytes, acc[r]);  // not quantized
          else if (w.group % 64 == 0) add_row<D, T, 64>(codes, s, x, w, k0, k1, 4 * bytes, acc[r]);
          else if (w.group % 32 == 0) add_row<D, T, 32>(codes, s, x, w, k0, k1, 4 * bytes, acc[r]);
          else add_row<D, T, 16>(codes, s, x, w, k0, k1, 4 * bytes, acc[r]);
        }
      for (int r = 0; r < rows; r++)
        for (int t = 0; t < T; t++) y[t * w.N + n0 + r] = sum(acc[r][t]) - minus[r][t];
    }
  }
}

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

}  // namespace

extern "C" void quantkit_gemv(QK_ARGUMENTS, const float* x, float* y, long M) {
  const Weight w = QK_WEIGHT;
#define QK_CALL(D) gemv_tokens<D>(w, x, y, M)
  QK_EACH(QK_CALL)
#undef QK_CALL
}

// Rows n0 ... n1 as float32 or bfloat16 [n1 - n0, K].
extern "C" void quantkit_decode(QK_ARGUMENTS, long n0, long n1, void* out, int bf16) {
  const Weight w = QK_WEIGHT;
#define QK_CALL(D) (bf16 ? decode<D>(w, n0, n1, (uint16_t*)out) : decode<D>(w, n0, n1, (float*)out))
  QK_EACH(QK_CALL)
#undef QK_CALL
}
