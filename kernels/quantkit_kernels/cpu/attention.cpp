// Decode attention over keys and values that lie contiguous for each sequence and head, or in pages of P tokens that a
// table names: every key and value is read once for all queries that share it, and decoded in registers. Keys and values
// are each of a kind of their own.
//
// B sequences, H key/value heads, Q queries of a head, D features (a multiple of 16), L tokens a cache has room for.
#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

constexpr int TILE = 64;  // tokens between two looks at the largest score

struct UInt8 {  // codes 0..255
  static constexpr int CHUNK = 64;
  static constexpr float FACTOR = 1;
  static inline f32v get(const uint8_t* p, int i) { return __builtin_convertvector(wide_u8(p + i * V), f32v); }
};
struct Nibbles {  // codes 0..15, as Int4, any number of chunks
  static constexpr int CHUNK = 32;
  static constexpr float FACTOR = 1;
  static inline f32v get(const uint8_t* p, int i) { return Int4::get(p + i * V / 64 * 32, i % (64 / V)); }
};
struct SignedNibbles : Nibbles {  // codes 0..15 for -8..7
  static inline f32v get(const uint8_t* p, int i) { return Nibbles::get(p, i) - 8.f; }
};

using Scores = float[][TILE];
using Score = void(const float* q, const uint8_t* codes, long row, int tokens, long D, Scores p);
using Weigh = void(const uint8_t* codes, long row, int tokens, long D, const Scores p, float* out);

struct Kind {  // how codes of a kind are read, by queries at a time: 1, 2, 4, 8
  int chunk;   // bytes of 64 features
  float factor;
  Score* score[4];
  Weigh* weigh[4];
};

struct Cache {
  const Kind* kind;
  const uint8_t* codes;
  const float *scale, *shift;  // of each token and head: value = (code - shift) * scale; null: one, zero
};

struct Places {          // of the tokens of each sequence and head
  const int64_t* table;  // [B, width] pages [pages, H, P, D]; null: contiguous [B, H, P, D]
  long width, H, P;
  long at(long head, long token) const {
    if (!table) return head * P + token;
    return (table[head / H * width + token / P] * H + head % H) * P + token % P;
  }
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

// p[j][l] = query j times key l
template <class KV, int Q>
void score(const float* q, const uint8_t* codes, long row, int tokens, long D, Scores p) {
  for (int l = 0; l < tokens; l += 2, codes += 2 * row) {  // two keys for each load of a query
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
}

// out[j] += the values, each times p[j][l]
template <class KV, int Q>
void weigh(const uint8_t* first, long row, int tokens, long D, const Scores p, float* out) {
  for (int i = 0; i < D / V; i += 2) {  // the tile's values stay in the cache over this loop
    const int other = i + 1 < D / V ? i + 1 : i;
    f32v sums[2][Q] = {};
    const uint8_t* codes = first;
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

// Attention of Q queries (already scaled) over tokens begin ... end of one head: out [Q, D] is not yet divided by sum.
template <int Q>
void attend(const float* q, const Cache& k, const Cache& v, const Places& places, long head, long begin, long end,
            long D, float* out, float* largest, float* total) {
  constexpr int N = Q == 8 ? 3 : Q == 4 ? 2 : Q - 1;
  const long k_row = D * k.kind->chunk / 64, v_row = D * v.kind->chunk / 64;
  float p[Q][TILE], q_sum[Q];
  for (int j = 0; j < Q; j++) {
    largest[j] = -INFINITY, total[j] = 0, q_sum[j] = 0;
    if (k.shift) for (long d = 0; d < D; d++) q_sum[j] += q[j * D + d];
  }
  std::fill(out, out + Q * D, 0.f);
  int tokens;
  for (long l0 = begin; l0 < end; l0 += tokens) {
    tokens = std::min({(long)TILE, end - l0, places.P - l0 % places.P});
    const long at = places.at(head, l0);
    k.kind->score[N](q, k.codes + at * k_row, k_row, tokens, D, p);
    for (int l = 0; l < tokens; l++) {
      const float s = k.kind->factor * (k.scale ? k.scale[at + l] : 1.f), z = k.shift ? k.shift[at + l] : 0;
      for (int j = 0; j < Q; j++) p[j][l] = (p[j][l] - z * q_sum[j]) * s;
    }
    for (int j = 0; j < Q; j++) {
      float now = largest[j];
      for (int l = 0; l < tokens; l++) now = std::max(now, p[j][l]);
      for (int l = tokens; l < TILE; l++) p[j][l] = -INFINITY;  // their share is no more than exp(-87)
      const float before = std::exp(largest[j] - now);
      f32v sums = {};
      for (int l = 0; l < tokens; l += V) {
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
    float shifts[Q] = {};
    for (int l = 0; l < tokens; l++) {
      const float s = v.kind->factor * (v.scale ? v.scale[at + l] : 1.f), z = v.shift ? v.shift[at + l] : 0;
      for (int j = 0; j < Q; j++) p[j][l] *= s, shifts[j] += p[j][l] * z;
    }
    v.kind->weigh[N](v.codes + at * v_row, v_row, tokens, D, p, out);
    if (v.shift)
      for (int j = 0; j < Q; j++)
        for (long d = 0; d < D; d++) out[j * D + d] -= shifts[j];
  }
}

template <class KV>
Kind kind() {
  return {KV::CHUNK, KV::FACTOR, {score<KV, 1>, score<KV, 2>, score<KV, 4>, score<KV, 8>},
          {weigh<KV, 1>, weigh<KV, 2>, weigh<KV, 4>, weigh<KV, 8>}};
}

// By number: int4 with a shift, int8, fp8, uint8 with a shift, bf16, f16, f32, int4
const Kind KINDS[] = {kind<Nibbles>(), kind<Int8>(), kind<Fp8>(), kind<UInt8>(),
                      kind<Bf16>(),    kind<F16>(),  kind<F32>(), kind<SignedNibbles>()};

void attend_any(int Q, const float* q, const Cache& k, const Cache& v, const Places& places, long head, long begin,
                long end, long D, float* out, float* largest, float* total) {
  for (int done = 0; done < Q;) {
    const int left = Q - done, now = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto run = now == 8 ? attend<8> : now == 4 ? attend<4> : now == 2 ? attend<2> : attend<1>;
    run(q + done * D, k, v, places, head, begin, end, D, out + done * D, largest + done, total + done);
    done += now;
  }
}

}  // namespace

// Kinds by their numbers above. q [B, H, Q, D], scaled; out likewise. window 0: all tokens. Scales and shifts lie as the
// tokens and heads do; places as in Places.
extern "C" void quantkit_decode_attention(int k_kind, int v_kind, const float* q, const uint8_t* k,
                                          const float* k_scale, const float* k_shift, const uint8_t* v,
                                          const float* v_scale, const float* v_shift, const int64_t* table,
                                          const int64_t* lengths, float* out, long B, long H, long Q, long P, long D,
                                          long width, long window, long splits, int threads) {
  const Cache keys{&KINDS[k_kind], k, k_scale, k_shift}, values{&KINDS[v_kind], v, v_scale, v_shift};
  const Places places{table, width, H, P};
  std::vector<float> partial(B * H * splits * Q * (D + 2));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long job = 0; job < B * H * splits; job++) {
    const long head = job / splits, split = job % splits, length = lengths[head / H];
    const long first = window && length > window ? length - window : 0, tokens = length - first;
    float* to = &partial[job * Q * (D + 2)];
    attend_any(Q, q + head * Q * D, keys, values, places, head, first + tokens * split / splits,
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
