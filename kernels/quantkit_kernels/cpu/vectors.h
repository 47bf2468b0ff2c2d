// Vectors of V floats, and the codes of each format decoded into them. Compiles with GCC and Clang; AVX2, F16C and
// AVX-512 have their own instructions here, other machines get what the compiler makes of plain vector arithmetic.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define QK_AVX512 1
#define QK_WIDTH 16
#elif defined(__AVX2__) && defined(__F16C__)
#define QK_AVX2 1
#endif
#ifndef QK_WIDTH
#define QK_WIDTH 8
#endif

constexpr int V = QK_WIDTH;
typedef float f32v __attribute__((vector_size(4 * V)));
typedef int32_t i32v __attribute__((vector_size(4 * V)));
typedef int16_t i16v __attribute__((vector_size(2 * V)));
typedef uint16_t u16v __attribute__((vector_size(2 * V)));
typedef uint8_t u8v __attribute__((vector_size(V)));
typedef int8_t s8v __attribute__((vector_size(V)));

template <class T>
static inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class To, class From>
static inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// V bytes or halves, widened
#if defined(QK_AVX512)
static inline i32v wide_u8(const uint8_t* p) { return (i32v)_mm512_cvtepu8_epi32(load<__m128i>(p)); }
static inline i32v wide_s8(const uint8_t* p) { return (i32v)_mm512_cvtepi8_epi32(load<__m128i>(p)); }
static inline i32v wide_u16(const uint8_t* p) { return (i32v)_mm512_cvtepu16_epi32(load<__m256i>(p)); }
static inline i16v half_u8(const uint8_t* p) { return (i16v)_mm256_cvtepu8_epi16(load<__m128i>(p)); }
static inline i16v half_s8(const uint8_t* p) { return (i16v)_mm256_cvtepi8_epi16(load<__m128i>(p)); }
static inline f32v from_half(i16v h) { return (f32v)_mm512_cvtph_ps((__m256i)h); }
#elif defined(QK_AVX2) && QK_WIDTH == 8
static inline i32v wide_u8(const uint8_t* p) { return (i32v)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline i32v wide_s8(const uint8_t* p) { return (i32v)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline i32v wide_u16(const uint8_t* p) { return (i32v)_mm256_cvtepu16_epi32(load<__m128i>(p)); }
static inline i16v half_u8(const uint8_t* p) { return (i16v)_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)); }
static inline i16v half_s8(const uint8_t* p) { return (i16v)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)); }
static inline f32v from_half(i16v h) { return (f32v)_mm256_cvtph_ps((__m128i)h); }
#else
static inline i32v wide_u8(const uint8_t* p) { return __builtin_convertvector(load<u8v>(p), i32v); }
static inline i32v wide_s8(const uint8_t* p) { return __builtin_convertvector(load<s8v>(p), i32v); }
static inline i32v wide_u16(const uint8_t* p) { return __builtin_convertvector(load<u16v>(p), i32v); }
static inline i16v half_u8(const uint8_t* p) { return (i16v)__builtin_convertvector(load<u8v>(p), u16v); }
static inline i16v half_s8(const uint8_t* p) { return __builtin_convertvector(load<s8v>(p), i16v); }
static inline f32v from_half(i16v h) {
  typedef _Float16 f16v __attribute__((vector_size(2 * V)));
  return __builtin_convertvector(bits<f16v>(h), f32v);
}
#endif

static inline float sum(f32v v) {
  typedef float quarter __attribute__((vector_size(16)));
  quarter part[V / 4];
  std::memcpy(part, &v, sizeof v);
  quarter s = part[0] + part[1];
  if (V == 16) s += part[V / 4 - 2] + part[V / 4 - 1];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// Rounded to nearest even
static inline f32v to_bf16(f32v v) {
#if defined(QK_AVX512) && defined(__AVX512BF16__)
  return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)), 16);
#else
  const i32v b = bits<i32v>(v);
  return bits<f32v>((b + 0x7FFF + (b >> 16 & 1)) & (int)0xFFFF0000);
#endif
}
static inline f32v to_f16(f32v v) {
#if defined(QK_AVX512)
  return (f32v)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(QK_AVX2) && QK_WIDTH == 8
  return (f32v)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  typedef _Float16 f16v __attribute__((vector_size(2 * V)));
  return __builtin_convertvector(__builtin_convertvector(v, f16v), f32v);
#endif
}
static inline f32v rounded(f32v v, int rounding) {
  return rounding == 1 ? to_bf16(v) : rounding == 2 ? to_f16(v) : v;
}

// Each format: columns i * V ... of a chunk of 64 columns that lies in CHUNK bytes, as value / FACTOR + BASE.
// STEADY: a product's sums are in one order however many tokens there are, where a chunk has one scale.
// Four-bit codes: byte j of a chunk holds column j in its low half and column 32 + j in its high half.
struct Int4 {  // codes 0..15
  static constexpr int CHUNK = 32, BASE = 0;
  static constexpr bool STEADY = false;
  static constexpr float FACTOR = 1, VALUES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static inline f32v get(const uint8_t* p, int i) {
    const i32v b = wide_u8(p + i % (32 / V) * V);
    return __builtin_convertvector(i < 32 / V ? b & 15 : b >> 4, f32v);
  }
};
struct Int8 {  // code ^ 128: two's complement of code - 128
  static constexpr int CHUNK = 64, BASE = 128;
  static constexpr bool STEADY = false;
  static constexpr float FACTOR = 1;
  static inline f32v get(const uint8_t* p, int i) { return __builtin_convertvector(wide_s8(p + i * V), f32v); }
};
struct Fp8 {  // e4m3: its bits, moved to float16's places, are the value / 256, subnormals included
  static constexpr int CHUNK = 64, BASE = 0;
  static constexpr bool STEADY = true;
  static constexpr float FACTOR = 256;
  static inline f32v get(const uint8_t* p, int i) { return from_half(half_s8(p + i * V) << 7 & (int16_t)0xBF80); }
};
struct Fp4 {  // e2m1, likewise: value / 2^14
  static constexpr int CHUNK = 32, BASE = 0;
  static constexpr bool STEADY = false;
  static constexpr float FACTOR = 16384, VALUES[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6};
  static inline f32v get(const uint8_t* p, int i) {
    const i16v b = half_u8(p + i % (32 / V) * V);
    return from_half((i < 32 / V ? b << 12 : b << 8) >> 3 & (int16_t)0x8E00);
  }
};
struct Bf16 {
  static constexpr int CHUNK = 128, BASE = 0;
  static constexpr bool STEADY = false;
  static constexpr float FACTOR = 1;
  static inline f32v get(const uint8_t* p, int i) { return bits<f32v>(wide_u16(p + i * V * 2) << 16); }
};
struct F16 {
  static constexpr int CHUNK = 128, BASE = 0;
  static constexpr bool STEADY = false;
  static constexpr float FACTOR = 1;
  static inline f32v get(const uint8_t* p, int i) { return from_half(load<i16v>(p + i * V * 2)); }
};
struct F32 {
  static constexpr int CHUNK = 256, BASE = 0;
  static constexpr bool STEADY = false;
  static constexpr float FACTOR = 1;
  static inline f32v get(const uint8_t* p, int i) { return load<f32v>(p + i * V * 4); }
};

// What the sixteen codes of a group of four-bit ones stand for, value * scale - shift, rounded; and, looked up in
// registers, the 64 weights of a chunk, each half from the table of its group. LEAST: columns of a group from which on that
// is fast here.
template <int ROUND>
struct Table {
#if defined(QK_AVX512)
  static constexpr int LEAST = 32;
  f32v all;
  inline void set(const float* values, float scale, float shift) {
    all = rounded(load<f32v>(values) * scale - shift, ROUND);
  }
  static inline void get(const Table& first, const Table& second, const uint8_t* chunk, f32v* out) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const i32v b = wide_u8(chunk + i % 2 * V), code = i < 2 ? b : b >> 4;
      out[i] = (f32v)_mm512_permutexvar_ps((__m512i)code, (__m512)(i < 2 ? first : second).all);  // by the lowest four bits
    }
  }
#else
  static constexpr int LEAST = 128;  // never
  inline void set(const float*, float, float) {}
  static inline void get(const Table&, const Table&, const uint8_t*, f32v*) {}
#endif
};

#if defined(QK_AVX2) && QK_WIDTH == 8
// bfloat16 numbers as two tables of bytes, because a shuffle of bytes looks up 32 at a time.
template <>
struct Table<1> {
  static constexpr int LEAST = 64;
  __m256i low, high;
  inline void set(const float* values, float scale, float shift) {
    __m256i half[2];
    for (int i = 0; i < 2; i++) {
      const __m256i b = (__m256i)(load<f32v>(values + 8 * i) * scale - shift);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));  // ties go to even
      half[i] = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7FFF)), odd), 16);
    }
    const __m256i words = _mm256_packus_epi32(half[0], half[1]);
    const __m256i lows = _mm256_and_si256(words, _mm256_set1_epi16(255)), highs = _mm256_srli_epi16(words, 8);
    const __m256i bytes = _mm256_packus_epi16(lows, highs);  // [l0-3 l8-11 h0-3 h8-11 | l4-7 l12-15 h4-7 h12-15]
    low = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
    high = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(2, 6, 3, 7, 2, 6, 3, 7));
  }
  static inline void get(const Table& first, const Table& second, const uint8_t* chunk, f32v* out) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);  // so that unpacking leaves columns in their order
    const __m256i both = _mm256_permutevar8x32_epi32(load<__m256i>(chunk), order), zero = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const __m256i codes = _mm256_and_si256(i ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
      const Table& table = i ? second : first;
      const __m256i l = _mm256_shuffle_epi8(table.low, codes), h = _mm256_shuffle_epi8(table.high, codes);
      const __m256i a = _mm256_unpacklo_epi8(l, h), b = _mm256_unpackhi_epi8(l, h);
      out[4 * i] = (f32v)_mm256_unpacklo_epi16(zero, a);
      out[4 * i + 1] = (f32v)_mm256_unpackhi_epi16(zero, a);
      out[4 * i + 2] = (f32v)_mm256_unpacklo_epi16(zero, b);
      out[4 * i + 3] = (f32v)_mm256_unpackhi_epi16(zero, b);
    }
  }
};
#endif
