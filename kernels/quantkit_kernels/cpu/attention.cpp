// Decode attention over keys and values that lie contiguous for each sequence and head: every key and value is read
// once for all queries that share it, and decoded in registers.
//
// B sequences, H key/value heads, Q queries of a head, D features (a multiple of 16), L tokens a cache has room for.
#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

constexpr int TILE = 64;  // tokens between two looks at the largest score

struct Cache {
  const uint8_t* codes;  // [B, H, L, D]
  const float* scale;    // [B, H, L], or null: all one
  long stride;           // tokens from one head to the next
};

// exp to 2 units in the last place, for arguments <= 0 (Cephes' polynomial)
inline f32v exponential(f32v x) {
  x = x < -87.f ? x * 0 - 87.f : x;
  const i32v n = __builtin_convertvector(x * 1.44269504f - 0.5f, i32v);  // towards zero: rounds negative arguments
  const f32v m = __builtin_convertvector(n, f32v);
  x = x - m * 0.693359375f + m * 2.12194440e-4f;
  f32v p = x * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * (x * x) + x + 1.f;
  return p * bits<f32v>((n + 127) << 23);
}

// Attention of Q queries (already scaled) over tokens begin ... end of one head: out [Q, D] is not yet divided by sum.
template <class KV, int Q>
void attend(const float* q, const Cache& k, const Cache& v, long head, long begin, long end, long D, float* out,
            float* largest, float* total) {
  const long row = D / 64.0 * KV::CHUNK, at = head * k.stride;
  float p[Q][TILE];
  for (int i = 0; i < Q; i++) largest[i] = -INFINITY, total[i] = 0;
  std::fill(out, out + Q * D, 0.f);
  for (long l0 = begin; l0 < end; l0 += TILE) {
    const int tokens = std::min<long>(TILE, end - l0);
    for (int l = 0; l < tokens; l += 2) {  // two keys for each load of a query
      const uint8_t* codes = k.codes + (at + l0 + l) * row;
      const uint8_t* next = codes + (l + 1 < tokens ? row : 0);
      for (long ahead = 0; ahead < 2 * row; ahead += 64) __builtin_prefetch(codes + 8 * row + ahead);
      f32v sums[2][Q] = {};
      for (int i = 0; i < D / V; i++) {
        const f32v a = KV::get(codes, i), b = KV::get(next, i);
#pragma GCC unroll 8
        for (int j = 0; j < Q; j++) {
          const f32v c = load<f32v>(q + j * D + i * V);
          sums[0][j] += a * c;
          sums[1][j] += b * c;
        }
      }
      for (int j = 0; j < Q; j++) p[j][l] = sum(sums[0][j]), p[j][l + 1] = sum(sums[1][j]);
    }
    for (int l = 0; l < tokens; l++) {
      const float s = KV::FACTOR * (k.scale ? k.scale[at + l0 + l] : 1.f);
      for (int j = 0; j < Q; j++) p[j][l] *= s;
    }
    for (int j = 0; j < Q; j++) {
      float now = largest[j];
      for (int l = 0; l < tokens; l++) now = std::max(now, p[j][l]);
      for (int l = tokens; l < TILE; l++) p[j][l] = -INFINITY;  // their share is no more than exp(-87)
      const float before = std::exp(largest[j] - now);
      f32v sums = {};
      for (int l = 0; l < TILE; l += V) {
        f32v e = exponential(load<f32v>(&p[j][l]) - now);
        std::memcpy(&p[j][l], &e, sizeof e);
        if (l + V <= tokens) sums += e;
        else for (int i = 0; l + i < tokens; i++) sums[i] += e[i];
      }
      total[j] = total[j] * before + sum(sums);
      largest[j] = now;
      if (before != 1)
        for (long d = 0; d < D; d++) out[j * D + d] *= before;
    }
    for (int l = 0; l < tokens; l++) {
      const float s = KV::FACTOR * (v.scale ? v.scale[at + l0 + l] : 1.f);
      for (int j = 0; j < Q; j++) p[j][l] *= s;
    }
    for (int i = 0; i < D / V; i += 2) {  // the tile's values stay in the cache over this loop
      const int other = i + 1 < D / V ? i + 1 : i;
      f32v sums[2][Q] = {};
      const uint8_t* codes = v.codes + (at + l0) * row;
      for (int l = 0; l < tokens; l++, codes += row) {
        if (i == 0) for (long ahead = 0; ahead < row; ahead += 64) __builtin_prefetch(codes + 8 * row + ahead);
        const f32v a = KV::get(codes, i), b = KV::get(codes, other);
#pragma GCC unroll 8
        for (int j = 0; j < Q; j++) {
          sums[0][j] += a * p[j][l];
          sums[1][j] += b * p[j][l];
        }
      }
      for (int j = 0; j < Q; j++)
        for (int m = 0; m <= other - i; m++) {
          const f32v o = load<f32v>(out + j * D + (i + m) * V) + sums[m][j];
          std::memcpy(out + j * D + (i + m) * V, &o, sizeof o);
        }
    }
  }
}

template <class KV>
void attend_any(int Q, const float* q, const Cache& k, const Cache& v, long head, long begin, long end, long D,
                float* out, float* largest, float* total) {
  for (int done = 0; done < Q;) {
    const int left = Q - done;
    const float* from = q + done * D;
    float* to = out + done * D;
    if (left >= 8) attend<KV, 8>(from, k, v, head, begin, end, D, to, largest + done, total + done), done += 8;
    else if (left >= 4) attend<KV, 4>(from, k, v, head, begin, end, D, to, largest + done, total + done), done += 4;
    else if (left >= 2) attend<KV, 2>(from, k, v, head, begin, end, D, to, largest + done, total + done), done += 2;
    else attend<KV, 1>(from, k, v, head, begin, end, D, to, largest + done, total + done), done += 1;
  }
}

template <class KV>
void decode_attention(const float* q, const Cache& k, const Cache& v, const int64_t* lengths, float* out, long B,
                      long H, long Q, long D, long window, long splits, int threads) {
  std::vector<float> partial(B * H * splits * Q * (D + 2));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long job = 0; job < B * H * splits; job++) {
    const long head = job / splits, split = job % splits, length = lengths[head / H];
    const long first = window && length > window ? length - window : 0, tokens = length - first;
    float* to = &partial[job * Q * (D + 2)];
    attend_any<KV>(Q, q + head * Q * D, k, v, head, first + tokens * split / splits,
                   first + tokens * (split + 1) / splits, D, to, to + Q * D, to + Q * D + Q);
  }
  for (long head = 0; head < B * H; head++)
    for (long j = 0; j < Q; j++) {  // the parts, in their order
      float largest = -INFINITY, total = 0;
      float* to = out + (head * Q + j) * D;
      std::fill(to, to + D, 0.f);
      for (int pass = 0; pass < 2; pass++)
        for (long split = 0; split < splits; split++) {
          const float* from = &partial[(head * splits + split) * Q * (D + 2)];
          if (from[Q * D + Q + j] == 0) continue;  // no tokens
          if (pass == 0) { largest = std::max(largest, from[Q * D + j]); continue; }
          const float share = std::exp(from[Q * D + j] - largest);
          total += share * from[Q * D + Q + j];
          for (long d = 0; d < D; d++) to[d] += share * from[j * D + d];
        }
      for (long d = 0; d < D && total > 0; d++) to[d] /= total;
    }
}

}  // namespace

// kind: 1 int8, 2 fp8, 4 bf16, 5 f16, 6 f32. q [B, H, Q, D], scaled; out likewise. window 0: all tokens.
extern "C" void quantkit_decode_attention(int kind, const float* q, const uint8_t* k, const float* k_scale,
                                          const uint8_t* v, const float* v_scale, const int64_t* lengths, float* out,
                                          long B, long H, long Q, long L, long D, long window, long splits,
                                          int threads) {
  const Cache keys{k, k_scale, L}, values{v, v_scale, L};
  switch (kind) {
    case 1: return decode_attention<Int8>(q, keys, values, lengths, out, B, H, Q, D, window, splits, threads);
    case 2: return decode_attention<Fp8>(q, keys, values, lengths, out, B, H, Q, D, window, splits, threads);
    case 4: return decode_attention<Bf16>(q, keys, values, lengths, out, B, H, Q, D, window, splits, threads);
    case 5: return decode_attention<F16>(q, keys, values, lengths, out, B, H, Q, D, window, splits, threads);
    case 6: return decode_attention<F32>(q, keys, values, lengths, out, B, H, Q, D, window, splits, threads);
  }
}
