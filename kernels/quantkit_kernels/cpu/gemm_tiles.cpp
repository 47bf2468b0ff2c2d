// y = x W^T with bfloat16 inputs on AMX tiles, for any number of tokens: y^T = W x^T, so that decoded rows of the weight
// are tiles as they are. Sums of a token are added in the same order however many tokens there are.
#include <algorithm>
#include <memory>

#include "tiles.h"

#if defined(QK_TILES)
namespace {

constexpr int ROWS = 32;    // of the weight, decoded together: two tiles
constexpr int SPAN = 256;   // columns of them that lie decoded in the first-level cache, where there are many tokens
constexpr long INPUTS = 1 << 20;  // bytes of x that stay in the second-level cache
constexpr long ALIGNED = 64;

struct Buffer {  // of floats or of what is as large, on a line of the cache
  std::unique_ptr<float[]> memory;
  float* at;
  explicit Buffer(long floats) : memory(new float[floats + ALIGNED]) {
    at = (float*)(((uintptr_t)memory.get() + ALIGNED - 1) / ALIGNED * ALIGNED);
  }
};

// `blocks` blocks of columns of x^T in pairs of rows: [tiles][4 blocks][16 pairs][tokens of a tile]
struct Inputs {
  long M, blocks, tiles, tokens;
  Buffer memory;
  Inputs(long M, long blocks)
      : M(M), blocks(blocks), tiles((M + 15) / 16), tokens((M + tiles - 1) / tiles),
        memory(tiles * tokens * blocks * BLOCK / 2) {}
  uint32_t* at(long tile, long vector) { return (uint32_t*)memory.at + (tile * blocks * 4 + vector) * 16 * tokens; }

  // A block of a tile of tokens, from column k of x [M, in].
  template <class D>
  void place(const uint16_t* x, long in, long k, long tile, long block) {
    h32 ordered[4][16] = {};
    const long left = in - k, bytes = 2 * (left < BLOCK ? left : BLOCK);
    for (long t = 0; t < tokens && tile * tokens + t < M; t++) {
      h32 plain[4] = {}, out[4];
      if (bytes > 0) std::memcpy(plain, x + (tile * tokens + t) * in + k, bytes);
      arrange<D>(plain, out);
      for (int v = 0; v < 4; v++) ordered[v][t] = out[v];
    }
    for (int v = 0; v < 4; v++) {
      uint32_t* to = at(tile, block * 4 + v);
      if (tokens > 1) transpose((f32v*)ordered[v]);
      else std::memcpy(to, ordered[v], 64);
      for (int j = 0; tokens > 1 && j < 16; j++) std::memcpy(to + j * tokens, &ordered[v][j], 4 * tokens);
    }
  }
};

// Decoded rows of the weight: [SPAN / 32][ROWS] vectors.
template <class D, int RUN>
struct Decoder {
  const Weight& w;
  const Codes codes;
  const long bytes, runs;
  Buffer scale, zero;
  long n0 = 0;
  int rows = 0;

  explicit Decoder(const Weight& w)
      : w(w), codes(codes_of<D>(w)), bytes(w.K / 64 * D::CHUNK), runs(runs_of(w)), scale(ROWS * runs + V),
        zero(ROWS * runs + V) {
    std::memset(scale.at, 0, 4 * (ROWS * runs + V));  // what a half block lacks
    std::memset(zero.at, 0, 4 * (ROWS * runs + V));
  }

  void begin(long first) {
    n0 = first, rows = w.N - n0 < ROWS ? w.N - n0 : ROWS;
    for (int r = 0; r < rows; r++) row_scales_of<D>(w, n0 + r, scale.at + r * runs, zero.at + r * runs);
  }

  // Columns k ... k + 128 of row n0 + r; out: of its block.
  inline void row(long k, int r, h32* out) {
    const uint8_t* p = w.codes + (n0 + r) * bytes + k / 64 * D::CHUNK;
    const Row row{scale.at + r * runs, zero.at + r * runs};
    h32 decoded[4];
    for (int line = 0; line < 2 * D::CHUNK; line += 64) __builtin_prefetch(p + ROWS * bytes + line, 0, 2);
    if (__builtin_expect(k + 64 == w.K, false)) {
      alignas(64) uint8_t whole[2 * D::CHUNK] = {};
      std::memcpy(whole, p, D::CHUNK);
      decode_block<D, RUN>(whole, row, codes, k, decoded);
    } else
      decode_block<D, RUN>(p, row, codes, k, decoded);
    for (int v = 0; v < 4; v++) out[v * ROWS + r] = decoded[v];
  }

  void block(long k, h32* out) {
    for (int r = 0; r < rows; r++) row(k, r, out);
  }

  // Columns k ... k1, some rows of a block at each call.
  struct Part {
    Decoder& d;
    long k, k1;
    h32* out;
    int r = 0;
    inline void operator()(int count) {
      for (; count > 0 && k < k1; count--) {
        d.row(k, r, out);
        if (++r == d.rows) r = 0, k += BLOCK, out += 4 * ROWS;
      }
    }
    inline void rest() {
      (*this)(r ? d.rows - r : 0);
      for (; k < k1; k += BLOCK, out += 4 * ROWS) d.block(k, out);
    }
  };
};

// Tiles 0 to 3 += 32 decoded rows times PAIR tiles of inputs, over `vectors` times 32 columns; with each, something else is
// done meanwhile.
template <int PAIR, class Meanwhile>
inline void multiply(const h32* rows, const uint32_t* first, const uint32_t* second, long tokens, long vectors,
                     Meanwhile meanwhile) {
  for (long v = 0; v < vectors; v++, rows += ROWS, first += 16 * tokens, second += 16 * tokens) {
    QK_TILE_LOAD(4, rows, 64);
    QK_TILE_LOAD(6, first, 4 * tokens);
    QK_TILE_DOT(0, 4, 6);
    QK_TILE_LOAD(5, rows + 16, 64);
    QK_TILE_DOT(1, 5, 6);
    if (PAIR == 2) {
      QK_TILE_LOAD(7, second, 4 * tokens);
      QK_TILE_DOT(2, 4, 7);
      QK_TILE_DOT(3, 5, 7);
    }
    meanwhile();
  }
}

template <int PAIR>
inline void zero_sums() {
  QK_TILE_ZERO(0);
  QK_TILE_ZERO(1);
  if (PAIR == 2) {
    QK_TILE_ZERO(2);
    QK_TILE_ZERO(3);
  }
}
// Sums of PAIR tiles of inputs: [2 PAIR][16 rows][16 tokens]
template <int PAIR>
inline void load_sums(const float* sums) {
  QK_TILE_LOAD(0, sums, 64);
  QK_TILE_LOAD(1, sums + 256, 64);
  if (PAIR == 2) {
    QK_TILE_LOAD(2, sums + 512, 64);
    QK_TILE_LOAD(3, sums + 768, 64);
  }
}
template <int PAIR>
inline void store_sums(float* sums) {
  QK_TILE_STORE(0, sums, 64);
  QK_TILE_STORE(1, sums + 256, 64);
  if (PAIR == 2) {
    QK_TILE_STORE(2, sums + 512, 64);
    QK_TILE_STORE(3, sums + 768, 64);
  }
}

// y [M, N], float32 or bfloat16, from the sums of `rows` rows from n0 on.
void write(const float* sums, void* y, bool wide, const Inputs& inputs, long N, long n0, int rows) {
  for (long tile = 0; tile < inputs.tiles; tile++)
    for (int half = 0; half < rows; half += 16) {
      f32v by_token[16];
      std::memcpy(by_token, sums + (tile * 2 + half / 16) * 256, sizeof by_token);
      transpose(by_token);
      const int count = rows - half < 16 ? rows - half : 16;
      for (long t = tile * inputs.tokens; t < (tile + 1) * inputs.tokens && t < inputs.M; t++) {
        const f32v row = by_token[t - tile * inputs.tokens];
        const h32 rounded = halves(row, row);
        if (wide) std::memcpy((float*)y + t * N + n0 + half, &row, count * 4);
        else if (count == 16) std::memcpy((uint16_t*)y + t * N + n0 + half, &rounded, 32);
        else std::memcpy((uint16_t*)y + t * N + n0 + half, &rounded, count * 2);
      }
    }
}

// A few hundred tokens.
template <class D, int RUN>
void gemm(const Weight& w, const uint16_t* x, long in, void* y, bool wide, long M) {
  // columns whose inputs stay in the second-level cache while the weight is decoded
  const long all = (w.K + BLOCK - 1) / BLOCK * BLOCK;
  const long width = M <= 32 ? all : std::min(all, INPUTS / (2 * M) / SPAN * SPAN);
  Inputs inputs(M, width / BLOCK);
  const long tokens = inputs.tokens, tiles = inputs.tiles, size = (tiles + 1) * 512;
  Buffer kept(width < all ? (w.N + ROWS - 1) / ROWS * size : 0);  // sums of all rows
  TileShapes shapes;
  for (int t = 0; t < 8; t++) shapes.rows[t] = 16, shapes.bytes[t] = t == 4 || t == 5 ? 64 : 4 * tokens;
#pragma omp parallel num_threads(w.threads)
  {
    Decoder<D, RUN> decoder(w);
    Buffer decoded(ROWS * SPAN), own(size);
    h32* buffer = (h32*)decoded.at;
    QK_TILE_SHAPES(shapes);
    for (long from = 0; from < w.K; from += width) {
      const long to = std::min(from + width, w.K);
#pragma omp for schedule(static) collapse(2)
      for (long tile = 0; tile < tiles; tile++)
        for (long block = 0; block < inputs.blocks; block++) inputs.place<D>(x, in, from + block * BLOCK, tile, block);
#pragma omp for schedule(static)
      for (long n0 = 0; n0 < w.N; n0 += ROWS) {
        float* sums = width < all ? kept.at + n0 / ROWS * size : own.at;
        decoder.begin(n0);
        auto few = [&](auto pair) {  // sums stay in tiles, and a block is decoded while the one before is multiplied
          constexpr int PAIR = decltype(pair)::value;
          zero_sums<PAIR>();
          decoder.block(0, buffer);
          for (long k = 0, turn = 0; k < w.K; k += BLOCK, turn ^= 1) {
            if (k + BLOCK < w.K) decoder.block(k + BLOCK, buffer + (1 - turn) * 4 * ROWS);
            multiply<PAIR>(buffer + turn * 4 * ROWS, inputs.at(0, k / 32), inputs.at(PAIR - 1, k / 32), tokens, 4, [] {});
          }
          store_sums<PAIR>(sums);
        };
        h32* now = buffer;
        auto many = [&](auto pair, long tile, long k, long vectors, auto& next, int some) {
          constexpr int PAIR = decltype(pair)::value;
          if (k) load_sums<PAIR>(sums + tile * 512);
          else zero_sums<PAIR>();
          const long v = (k - from) / 32;
          multiply<PAIR>(now, inputs.at(tile, v), inputs.at(tile + PAIR - 1, v), tokens, vectors, [&] { next(some); });
          store_sums<PAIR>(sums + tile * 512);
        };
        const std::integral_constant<int, 1> one;
        const std::integral_constant<int, 2> two;
        if (tiles == 1) few(one);
        else if (tiles == 2) few(two);
        else {
          // eight-bit codes are decoded while the span before is multiplied; four-bit ones are quicker on their own
          constexpr bool MEANWHILE = D::CHUNK == 64;
          typedef typename Decoder<D, RUN>::Part Part;
          Part{decoder, from, std::min(from + SPAN, to), now}.rest();
          for (long k0 = from; k0 < to; k0 += SPAN) {
            const long k1 = std::min(k0 + SPAN, to), vectors = (k1 - k0 + BLOCK - 1) / BLOCK * 4;
            h32* other = MEANWHILE && now == buffer ? buffer + SPAN / 32 * ROWS : buffer;
            Part next{decoder, k1, std::min(k1 + SPAN, to), other};
            const int some = MEANWHILE ? SPAN / BLOCK * ROWS / (vectors * ((tiles + 1) / 2)) + 1 : 0;
            for (long tile = 0; tile + 1 < tiles; tile += 2) many(two, tile, k0, vectors, next, some);
            if (tiles % 2) many(one, tiles - 1, k0, vectors, next, some);
            next.rest();
            now = other;
          }
        }
        if (to == w.K) write(sums, y, wide, inputs, w.N, n0, decoder.rows);
      }
    }
    QK_TILE_RELEASE();
  }
}

template <class D, int RUN>
void gemm_parts(const Weight& w, const uint16_t* x, long in, void* y, bool wide, long M) {
  constexpr long TOKENS = D::CHUNK == 64 ? 256 : 128;  // in one pass over the weight: eight-bit codes take longer
  const long parts = (M + TOKENS - 1) / TOKENS, part = ((M + parts - 1) / parts + 31) / 32 * 32;
  for (long t = 0; t < M; t += part)
    gemm<D, RUN>(w, x + t * in, in, (char*)y + t * w.N * (wide ? 4 : 2), wide, std::min(part, M - t));
}

template <class D>
void gemm_runs(const Weight& w, const uint16_t* x, long in, void* y, bool wide, long M) {
  switch (run_in_block(w)) {
    case 128: return gemm_parts<D, 128>(w, x, in, y, wide, M);
    case 64: return gemm_parts<D, 64>(w, x, in, y, wide, M);
    case 32: return gemm_parts<D, 32>(w, x, in, y, wide, M);
    default: return gemm_parts<D, 16>(w, x, in, y, wide, M);
  }
}

}  // namespace
#endif

// Whether there are tiles: the processor's, which Linux lets a process use that asks.
extern "C" int quantkit_has_tiles() {
#if defined(QK_TEST_TILES)
  return 1;
#elif defined(QK_TILES)
  static const int granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return granted;
#else
  return 0;
#endif
}

// x bfloat16 [M, in], `in` at most K; y [M, N] in float32 (wide) or bfloat16. Only quantized weights.
extern "C" void quantkit_gemm_tiles(QK_ARGUMENTS, const uint16_t* x, long in, void* y, int wide, long M) {
#if defined(QK_TILES)
  const Weight w = QK_WEIGHT;
  switch (format) {
    case 0: return gemm_runs<Int4>(w, x, in, y, wide, M);
    case 1: return gemm_runs<Int8>(w, x, in, y, wide, M);
    case 2: return gemm_runs<Fp8>(w, x, in, y, wide, M);
    case 3: return gemm_runs<Fp4>(w, x, in, y, wide, M);
  }
#endif
}
