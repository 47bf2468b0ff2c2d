// Weights as vectors of 32 bfloat16 numbers, rounded from code * scale in registers, and the products of such vectors:
// by AVX512_BF16, by AMX tiles, or spelled out (QK_TEST_BF16, QK_TEST_TILES) so that they can be tested where they are
// missing.
#pragma once
#include "weight.h"

#if defined(QK_AVX512) && defined(__AVX512BF16__)
#define QK_BF16 1
#elif defined(QK_TEST_BF16) && QK_WIDTH == 16
#define QK_BF16 1
#define QK_SPELLED_OUT 1
#endif

#if defined(QK_BF16)
namespace {

typedef uint16_t h32 __attribute__((vector_size(64)));  // 32 bfloat16 numbers

// first and second rounded to bfloat16, side by side
inline h32 halves(f32v first, f32v second) {
#if !defined(QK_SPELLED_OUT)
  return (h32)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  const u16v half[2] = {__builtin_convertvector(bits<i32v>(to_bf16(first)) >> 16 & 0xFFFF, u16v),
                        __builtin_convertvector(bits<i32v>(to_bf16(second)) >> 16 & 0xFFFF, u16v)};
  return load<h32>(half);
#endif
}

// sum + products of neighbouring pairs
inline f32v dot_pairs(f32v sum, h32 a, h32 b) {
#if !defined(QK_SPELLED_OUT)
  return (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  const i32v p = bits<i32v>(a), q = bits<i32v>(b);
  const int top = (int)0xFFFF0000;
  sum += bits<f32v>(p & top) * bits<f32v>(q & top);
  return sum + bits<f32v>(p << 16) * bits<f32v>(q << 16);
#endif
}

// table[index], by the lowest five bits
inline h32 lookup(h32 table, h32 index) {
#if !defined(QK_SPELLED_OUT)
  return (h32)_mm512_permutexvar_epi16((__m512i)index, (__m512i)table);
#else
  h32 out;
  for (int i = 0; i < 32; i++) out[i] = table[index[i] & 31];
  return out;
#endif
}

// The same in two tables, by the lowest six bits
inline h32 lookup(h32 low, h32 high, h32 index) {
#if !defined(QK_SPELLED_OUT)
  return (h32)_mm512_permutex2var_epi16((__m512i)low, (__m512i)index, (__m512i)high);
#else
  h32 out;
  for (int i = 0; i < 32; i++) out[i] = index[i] & 32 ? high[index[i] & 31] : low[index[i] & 31];
  return out;
#endif
}

// A vector of constants: what a function says of each place.
template <class T, int N, class F>
struct Constants {
  alignas(64) T at[N] = {};
  constexpr Constants(F f) {
    for (int i = 0; i < N; i++) at[i] = f(i);
  }
};
template <class T, int N, class F>
constexpr Constants<T, N, F> constants(F f) {
  return Constants<T, N, F>(f);
}

// Sixteen vectors: rows become columns, by four perfect shuffles.
inline void transpose(f32v* rows) {
  static constexpr auto PLACES = constants<int32_t, 16>([](int i) { return i / 2 + i % 2 * 16; });
  const i32v low = load<i32v>(PLACES.at), high = low + 8;  // interleave the first halves of two vectors; their second ones
  auto mix = [](f32v a, i32v index, f32v b) {
#if !defined(QK_SPELLED_OUT)
    return (f32v)_mm512_permutex2var_ps((__m512)a, (__m512i)index, (__m512)b);
#else
    f32v out;
    for (int i = 0; i < 16; i++) out[i] = index[i] < 16 ? a[index[i]] : b[index[i] - 16];
    return out;
#endif
  };
  for (int round = 0; round < 4; round++) {
    f32v mixed[16];
    for (int i = 0; i < 8; i++) {
      mixed[2 * i] = mix(rows[i], low, rows[i + 8]);
      mixed[2 * i + 1] = mix(rows[i], high, rows[i + 8]);
    }
    for (int i = 0; i < 16; i++) rows[i] = mixed[i];
  }
}

constexpr int BLOCK = 128;  // columns that are decoded together: four vectors

// A row's scales and zero points by runs of columns, and what all rows share.
struct Row {
  const float *scale, *zero;
};
struct Codes {
  f32v values;  // of four-bit codes, less the zero point all groups have if they do
  float base;   // the same zero point of eight-bit codes
  bool zeros;   // groups have their own zero points
  bool f16;     // weights are rounded to float16 before they are to bfloat16
  long group;
};

// Columns that share a scale, as decode_block has to know it.
inline int run_in_block(const Weight& w) { return w.group % BLOCK == 0 ? BLOCK : w.group % 64 == 0 ? 64 : (int)run_of(w); }

// Columns k ... k + 128 of a row whose codes are at p. Four-bit codes come out in the order of `arrange`: the low halves
// of even bytes, the high ones, and those of odd bytes.
template <class D, int RUN>
inline void decode_block(const uint8_t* p, Row row, const Codes& c, long k, h32* out) {
  const long run = RUN >= 64 ? k / c.group : k / RUN, next = RUN == 64 ? (k + 64) / c.group : run + 1;
  auto finish = [&](f32v first, f32v second) {
    return c.f16 ? halves(to_f16(first), to_f16(second)) : halves(first, second);
  };
  if constexpr (D::CHUNK == 32) {
    auto table = [&](long first, long second) {
      f32v a = c.values, b = c.values;
      if (c.zeros) a -= row.zero[first], b -= row.zero[second];
      return finish(a * row.scale[first], b * row.scale[second]);
    };
    const h32 all = load<h32>(p);
    if constexpr (RUN == BLOCK) {
      const h32 t = table(run, run);
      out[0] = lookup(t, all), out[1] = lookup(t, all >> 4), out[2] = lookup(t, all >> 8), out[3] = lookup(t, all >> 12);
    } else {
      constexpr int EIGHTH = RUN == 16 ? 16 : 0, HALF = RUN == 16 ? 32 : 16;
      static constexpr auto TABLES = constants<uint16_t, 32>([](int i) { return i / 16 * HALF + i / 8 % 2 * EIGHTH; });
      const h32 tables = load<h32>(TABLES.at);  // which one a lane reads
      h32 index[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) index[i] = (all >> 4 * i & 15) | tables;
      if constexpr (RUN == 64) {
        const h32 t = table(run, next);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) out[i] = lookup(t, index[i]);
      } else if constexpr (RUN == 32) {
        const h32 low = table(run, run + 2), high = table(run + 1, run + 3);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) out[i] = lookup(i % 2 ? high : low, index[i]);
      } else {
        const h32 low[2] = {table(run, run + 1), table(run + 4, run + 5)};
        const h32 high[2] = {table(run + 2, run + 3), table(run + 6, run + 7)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) out[i] = i % 2 ? lookup(high[0], high[1], index[i]) : lookup(low[0], low[1], index[i]);
      }
    }
  } else {
    auto value = [&](int i) {
      const long r = RUN == BLOCK ? run : RUN == 64 ? (i < 4 ? run : next) : run + i * 16 / RUN;
      f32v v = D::get(p + i / 4 * D::CHUNK, i % 4);
      if (c.zeros) v -= row.zero[r];
      else if (D::BASE) v -= c.base;
      return v * row.scale[r];
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) out[i] = finish(value(2 * i), value(2 * i + 1));
  }
}

// The inputs of 128 columns in the order of decode_block.
template <class D>
inline void arrange(const h32* x, h32* out) {
  if constexpr (D::CHUNK == 32) {
    static constexpr auto EVEN = constants<uint16_t, 32>([](int i) { return i / 16 * 32 + i % 16 * 2; });
    const h32 even = load<h32>(EVEN.at);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) out[i] = lookup(x[i % 2], x[2 + i % 2], i < 2 ? even : even + 1);
  } else
    for (int i = 0; i < 4; i++) out[i] = x[i];
}

// Scales (and zero points) of row n, as decode_block reads them; scale and zero hold at least runs_of(w) numbers.
template <class D>
inline void row_scales_of(const Weight& w, long n, float* scale, float* zero) {
  row_scales(w, n, w.middle, D::CHUNK == 32 ? 1 : D::FACTOR, scale, zero);
  if (!w.zero) return;
  const uint8_t* from = w.zero + n * w.G;
  const long run = run_of(w), runs = (w.K + run - 1) / run, repeat = w.group / run;
  long g = 0;
  for (; repeat == 1 && g + V <= w.G; g += V) {
    const f32v z = __builtin_convertvector(wide_u8(from + g) - D::BASE, f32v);
    std::memcpy(zero + g, &z, sizeof z);
  }
  for (long r = g; r < runs; g++)
    for (long i = 0; i < repeat && r < runs; i++) zero[r++] = (float)from[g] - D::BASE;
}

// Places of a row's scales, with those of a last block that is half there.
inline long runs_of(const Weight& w) { return (w.K + run_of(w) - 1) / run_of(w) + 8; }

template <class D>
inline Codes codes_of(const Weight& w) {
  Codes c{{}, (float)(w.middle - D::BASE), w.zero != nullptr, w.rounding == 2, w.group};
  if constexpr (D::CHUNK == 32) c.values = load<f32v>(D::VALUES) - (w.zero ? 0.f : c.base);
  return c;
}

}  // namespace
#endif
