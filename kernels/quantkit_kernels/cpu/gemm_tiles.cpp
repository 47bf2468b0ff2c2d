// y = x W^T with bfloat16 inputs on AMX tiles, for any number of tokens: y^T = W x^T, so that decoded rows of the weight
// are tiles as they are. Sums of a token are added in the same order however many tokens there are.
#include "tiles.h"

#if defined(QK_TILES)
namespace {

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
          // what takes long to decode is decoded while the span before is multiplied; the rest is quicker on its own
          constexpr bool MEANWHILE = D::CHUNK == 64 || RUN == 16;
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
        if (to == w.K) write(sums, nullptr, y, wide, inputs, w.N, n0, decoder.rows);
      }
    }
    QK_TILE_RELEASE();
  }
}

template <class D, int RUN>
void gemm_parts(const Weight& w, const uint16_t* x, long in, void* y, bool wide, long M) {
  constexpr long TOKENS = D::CHUNK == 64 || RUN == 16 ? 256 : 128;  // in one pass over the weight: some decode longer
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
