// y = x W^T with a quantized weight for a few tokens, in float32, and the decoding of a weight for many tokens. A row of
// the weight is decoded in registers while x is multiplied. Where weights are rounded, each is before it meets x:
// what four-bit codes stand for is looked up in a table of their group, if that is large enough.
//
// T tokens, N rows, K columns (a multiple of 64: padded with columns whose x is zero), groups of a multiple of 16.
#include <algorithm>

#include "weight.h"

namespace {

// acc[t] += scale * sum of code * x over columns k0 ... k1 of one row. RUN: columns of a chunk that share a scale.
template <class D, int T, int RUN>
inline void add_row(const uint8_t* codes, const float* scale, const float* x, const Weight& w, long k0, long k1,
                    long ahead, f32v* acc) {
  constexpr int R = 64 / RUN, C = RUN < 64 || (T >= 4 && !D::STEADY) ? 1 : 2;  // runs of a chunk; chains of additions
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

// Whether a group of this format, whose runs are RUN columns, is worth a table of its codes' rounded values.
template <class D, int RUN, int ROUND>
constexpr bool LOOKS_UP = D::CHUNK == 32 && RUN >= Table<ROUND>::LEAST;

// acc[t] += sum of weight * x over columns k0 ... k1 of one row, the weights rounded.
template <class D, int T, int RUN, int ROUND>
inline void add_row_rounded(const uint8_t* codes, const float* scale, const float* shift, const float* x,
                            const Weight& w, long k0, long k1, long ahead, f32v* acc) {
  constexpr int R = 64 / RUN, VECTORS = 64 / V, S = T == 1 ? 4 : T == 2 ? 2 : 1;  // chains of sums
  f32v total[T][S] = {};
  long run = RUN < 64 ? k0 / RUN : k0 / w.group;
  while (k0 < k1) {
    const long stop = RUN < 64 ? k0 + 64 : (run + 1) * w.group, end = stop < k1 ? stop : k1;
    Table<ROUND> table[R];
    if constexpr (LOOKS_UP<D, RUN, ROUND>)
      for (int r = 0; r < R; r++) table[r].set(D::VALUES, scale[run + r], shift[run + r]);
    for (long k = k0; k < end; k += 64) {
      const uint8_t* chunk = codes + k / 64 * D::CHUNK;
      __builtin_prefetch(chunk + ahead);
      f32v v[VECTORS];
      if constexpr (LOOKS_UP<D, RUN, ROUND>) Table<ROUND>::get(table[0], table[R - 1], chunk, v);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; j++) {
        const int i = j / 2 + j % 2 * (VECTORS / 2), r = i * V / RUN;  // both halves of a byte after one another
        if constexpr (!LOOKS_UP<D, RUN, ROUND>) v[i] = rounded(D::get(chunk, i) * scale[run + r] - shift[run + r], ROUND);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) total[t][j % S] += v[i] * load<f32v>(x + t * w.K + k + i * V);
      }
    }
    k0 = end;
    run += R;
  }
  for (int t = 0; t < T; t++)
    for (int s = 0; s < S; s++) acc[t] += total[t][s];
}

constexpr int ROWS = 16;      // that meet a block of x while it is in the first-level cache
constexpr int BLOCK = 8192;   // floats of x in a block

// Columns of a block. A sum's order depends on it: where that must be the same for any number of tokens, so is this.
template <class D, int T>
constexpr long COLUMNS = BLOCK / (D::STEADY ? 8 : T);

// ROUND: what each weight is rounded to, like Weight::rounding.
template <class D, int T, int ROUND>
void gemv(const Weight& w, const float* x, float* y) {
  const long bytes = w.K / 64 * D::CHUNK;
  const long run = run_of(w), runs = (w.K + run - 1) / run;
  std::vector<float> sums = buffer(T * runs);  // of x over each run: what a zero point multiplies
  for (int t = 0; t < T; t++)
    for (long r = 0; !ROUND && r < runs; r++) {
      f32v total = {};
      for (long k = r * run; k < (r + 1) * run && k < w.K; k += V) total += load<f32v>(x + t * w.K + k);
      sums[t * runs + r] = sum(total);
    }
#pragma omp parallel num_threads(w.threads)
  {
    std::vector<float> scale = buffer(ROWS * runs), shift = buffer(ROUND ? ROWS * runs : runs);
#pragma omp for schedule(static)
    for (long n0 = 0; n0 < w.N; n0 += ROWS) {
      const int rows = n0 + ROWS < w.N ? ROWS : w.N - n0;
      f32v acc[ROWS][T] = {};
      float minus[ROWS][T] = {};
      for (int r = 0; r < rows; r++) {
        // a table holds the values themselves
        const bool table = ROUND && w.group % 32 == 0 && (w.group % 64 ? LOOKS_UP<D, 32, ROUND> : LOOKS_UP<D, 64, ROUND>);
        float* row_shift = &shift[ROUND ? r * runs : 0];
        if (row_scales(w, n0 + r, D::BASE, table ? 1 : D::FACTOR, &scale[r * runs], row_shift) && !ROUND)
          for (int t = 0; t < T; t++) {
            f32v total = {};
            long g = 0;
            for (; g + V <= runs; g += V) total += load<f32v>(&shift[g]) * load<f32v>(&sums[t * runs + g]);
            minus[r][t] = sum(total);
            for (; g < runs; g++) minus[r][t] += shift[g] * sums[t * runs + g];
          }
      }
      for (long k0 = 0; k0 < w.K; k0 += COLUMNS<D, T>)
        for (int r = 0; r < rows; r++) {
          const long k1 = k0 + COLUMNS<D, T> < w.K ? k0 + COLUMNS<D, T> : w.K;
          const uint8_t* codes = w.codes + (n0 + r) * bytes;
          const float* s = &scale[r * runs];
#define QK_ADD_ROW(RUN)                                                                                          \
  if constexpr (ROUND != 0)                                                                                      \
    add_row_rounded<D, T, RUN, ROUND>(codes, s, &shift[r * runs], x, w, k0, k1, 4 * bytes, acc[r]);              \
  else add_row<D, T, RUN>(codes, s, x, w, k0, k1, 4 * bytes, acc[r])
          if (D::CHUNK > 64 || w.group % 64 == 0) { QK_ADD_ROW(64); }  // what is not quantized is one group
          else if constexpr (D::CHUNK <= 64) {
            if (w.group % 32 == 0) { QK_ADD_ROW(32); }
            else { QK_ADD_ROW(16); }
          }
#undef QK_ADD_ROW
        }
      for (int r = 0; r < rows; r++)
        for (int t = 0; t < T; t++) y[t * w.N + n0 + r] = sum(acc[r][t]) - minus[r][t];
    }
  }
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
            store(to + k + i * V, rounded(rounded(v, w.rounding), w.second));
          }
          k += columns;
        }
    }
  }
}

template <class D, int ROUND>
void gemv_tokens(const Weight& w, const float* x, float* y, long M) {
  if constexpr (V == 16 || !D::STEADY)  // two chains for each of eight tokens are more than AVX2 has registers
    for (; M >= 8; M -= 8, x += 8 * w.K, y += 8 * w.N) gemv<D, 8, ROUND>(w, x, y);
  for (; M >= 4; M -= 4, x += 4 * w.K, y += 4 * w.N) gemv<D, 4, ROUND>(w, x, y);
  for (; M >= 2; M -= 2, x += 2 * w.K, y += 2 * w.N) gemv<D, 2, ROUND>(w, x, y);
  if (M) gemv<D, 1, ROUND>(w, x, y);
}

// Quantized weights are rounded once at most here, others never.
template <class D>
void gemv_rounded(const Weight& w, const float* x, float* y, long M) {
  if (w.rounding == 0) return gemv_tokens<D, 0>(w, x, y, M);
  if constexpr (D::CHUNK <= 64) return w.rounding == 1 ? gemv_tokens<D, 1>(w, x, y, M) : gemv_tokens<D, 2>(w, x, y, M);
}

}  // namespace

extern "C" void quantkit_gemv(QK_ARGUMENTS, const float* x, float* y, long M) {
  const Weight w = QK_WEIGHT;
#define QK_CALL(D) gemv_rounded<D>(w, x, y, M)
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
