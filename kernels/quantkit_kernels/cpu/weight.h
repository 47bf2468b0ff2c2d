// A quantized weight as Python hands it over, and the scales of one of its rows. Formats: 0 int4, 1 int8, 2 fp8, 3 fp4,
// 4 bf16, 5 f16, 6 f32.
#pragma once
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
  int rounding, second;    // what weights are rounded to, one after the other: 0 not, 1 bfloat16, 2 float16
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
// subtracted from scale * code: shift = scale * (zero point - base). Else shift is left as it is.
bool row_scales(const Weight& w, long n, int base, float format_factor, float* scale, float* shift) {
  const long at = n * w.G, run = run_of(w), runs = (w.K + run - 1) / run, repeat = w.group / run;
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
    for (long r = runs - 1; r >= 0; r--) {  // from the end, where they lie
      scale[r] = scale[r / repeat];
      if (shifted) shift[r] = shift[r / repeat];
    }
  return shifted;
}

}  // namespace

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
#define QK_WEIGHT Weight{codes, scale, zero, N, K, group, (K + group - 1) / group, scale_kind, middle, rounding, second, factor, threads}
#define QK_ARGUMENTS                                                                                              \
  int format, const uint8_t *codes, const void *scale, int scale_kind, const uint8_t *zero, int middle, int rounding, \
      int second, float factor, long N, long K, long group, int threads
