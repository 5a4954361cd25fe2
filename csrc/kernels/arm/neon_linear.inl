// The linears of the NEON tables, SDOT and SMMLA. (x86: simd_linear.inl.)
//
// Their cost is the number of instructions (docs/performance.md, "Instructions on ARM"): so a load takes 64 bytes and
// advances its pointer, few rows read the packed bytes and more rows an unpacked tile. Bytes are packed signed, as SDOT
// takes them. S has, beside Lanes:
//
//   kDirectRows                 up to so many rows (at most 4) read the packed bytes
//   kTileRows                   rows of activations in one pass over a tile
//   kPrefetch                   prefetch distance in bytes

// Defined by the including file.
template <class Q>
struct TileBlock;  // kBytes: of an unpacked block of a panel
template <class Q>
inline __attribute__((always_inline)) void unpack_block(const uint8_t* packed, uint8_t* tile);
// Unpacked blocks of a panel.
struct Tile {
  const uint8_t* data;  // `count` of TileBlock<Q>::kBytes
  int64_t first;        // its first 32 columns are those of this activation block
  int64_t count;
};
// y[row .. row + R) += a tile. The sums start from y, or from 0 if the tile's first block is 0.
template <class Q, int R>
inline __attribute__((always_inline)) void tile_rows(const LinearArgs& a, const Tile& tile, int64_t row, float* y,
                                                     int64_t lanes);

// ---- loads and stores that advance their pointer ------------------------------------------------------------------

// Without the empty asm GCC computes each address with an addition of its own.
template <int bytes, class Byte>
inline __attribute__((always_inline)) void advance(Byte*& p) {
  p += bytes;
  asm("" : "+r"(p));
}

inline __attribute__((always_inline)) S::W take(const uint8_t*& p) {
  const S::W w = S::load_w(p);
  advance<64>(p);
  return w;
}

inline __attribute__((always_inline)) F take_floats(const uint8_t*& p) {
  const float32x4x4_t v = vld1q_f32_x4(reinterpret_cast<const float*>(p));
  advance<64>(p);
  return {v.val[0], v.val[1], v.val[2], v.val[3]};
}

// The fp16 values before the weights of a block: 32 bytes, or 64.
template <int bytes>
inline __attribute__((always_inline)) auto take_head(const uint8_t*& p) {
  if constexpr (bytes == 64) {
    const uint8x16x4_t head = vld1q_u8_x4(p);
    advance<64>(p);
    return head;
  } else {
    const uint8x16x2_t head = vld1q_u8_x2(p);
    advance<32>(p);
    return head;
  }
}

// The asm keeps the four results in registers, so that two stores write them.
inline __attribute__((always_inline)) void put(uint8_t*& p, S::W w) {
  asm("" : "+w"(w.v[0]), "+w"(w.v[1]), "+w"(w.v[2]), "+w"(w.v[3]));
  S::store_w(p, w);
  advance<64>(p);
}

inline __attribute__((always_inline)) void put_floats(uint8_t*& p, F v) {
  S::store(reinterpret_cast<float*>(p), v);
  advance<64>(p);
}

// ---- few rows -----------------------------------------------------------------------------------------------------

// sum[r].v[j] += rows 4 j .. 4 j + 3 of a panel * columns 4 step .. 4 step + 3 of row r's 16 activations.
template <int step, int j, int R>
inline __attribute__((always_inline)) void dots(int8x16_t w, const S::X (&x)[R], I (&sum)[R]) {
  each<R>([&](auto r) __attribute__((always_inline)) { sum[r].v[j] = vdotq_laneq_s32(sum[r].v[j], w, x[r], step); });
}

// sum[r] += 16 columns of bytes. (Not `take`: with its copies GCC 12 leaves all sums of q8x128 in memory.)
template <int R>
inline __attribute__((always_inline)) void byte_dots(const uint8_t*& w, const S::X (&x)[R], I (&sum)[R]) {
  each<4>([&](auto step) __attribute__((always_inline)) {
    const int8x16x4_t four = vld1q_s8_x4(reinterpret_cast<const int8_t*>(w));
    advance<64>(w);
    each<4>([&](auto j) __attribute__((always_inline)) { dots<step.value, j.value>(four.val[j], x, sum); });
  });
}

// y[row .. row + R) of one panel, straight from the packed bytes: for decoding, which the memory bounds.
template <class Q, int R>
inline void direct_rows(const LinearArgs& a, const uint8_t* w, int64_t row, float* y, int64_t lanes) {
  const int64_t blocks = blocks_of(a.k);
  const int8_t* xq[R];
  const XBlock* xb[R];
  F acc[R];
  each<R>([&](auto r) __attribute__((always_inline)) {
    xq[r] = a.xq + (row + r) * blocks * kBlock;
    xb[r] = a.xb + (row + r) * blocks;
    acc[r] = f16(0.0f);
  });
  for (const uint8_t* end = w + blocks / Q::kParts * Q::kBytes; w != end;) {
    constexpr int64_t kPart = Q::kNibbles ? 256 : 512;  // bytes
    const auto prefetch = [&](int64_t bytes) __attribute__((always_inline)) {
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(w + line + S::kPrefetch, 0, 2);
    };
    prefetch(Q::kParts > 1 ? Q::kHead + kPart : Q::kBytes);  // the other parts of a wide block: each at its turn
    const auto head = take_head<Q::kHead>(w);
    I sum[R];
    each<R>([&](auto r) __attribute__((always_inline)) {
      sum[r] = S::iset1(Q::kCentred ? (Q::kParts > 1 ? xb[r]->offset_part : xb[r]->offset) >> 4 : 0);  // undoes + 8
    });
    const auto load = [&](S::X(&x)[R], int column) __attribute__((always_inline)) {
      each<R>([&](auto r) __attribute__((always_inline)) { x[r] = S::load_x(xq[r] + column); });
    };
    const auto add = [&](int scales, bool minimum) __attribute__((always_inline)) {
      constexpr int last = Q::kHead / 16 - 1;
      const F ws = S::widen(head.val[scales], head.val[scales + 1]);
      const F wm = minimum ? S::widen(head.val[last - 1], head.val[last]) : ws;
      each<R>([&](auto r) __attribute__((always_inline)) {
        F to = S::fma(S::to_float(sum[r]), S::mul(f16(xb[r]->scale), ws), acc[r]);
        if (minimum) to = S::fma(f16(xb[r]->scaled_sum), wm, to);
        acc[r] = to;
      });
    };
    if constexpr (Q::kNibbles && R <= 3) {  // nibbles are loaded once, for columns 0..15 and 16..31
      each<Q::kParts>([&](auto part) __attribute__((always_inline)) {
        if (part) prefetch(kPart);
        S::X low[R], high[R];
        load(low, 32 * part);
        load(high, 32 * part + 16);
        each<4>([&](auto step) __attribute__((always_inline)) {
          const S::W both = take(w);
          each<4>([&](auto j) __attribute__((always_inline)) {
            dots<step.value, j.value>(S::low_nibbles(both.v[j]), low, sum);
            dots<step.value, j.value>(S::high_nibbles(both.v[j]), high, sum);
          });
        });
      });
    } else if constexpr (Q::kNibbles) {
      each<2 * Q::kParts>([&](auto i) __attribute__((always_inline)) {  // 16 columns
        if (i && i % 2 == 0) prefetch(kPart);
        if (i % 2) w -= 256;
        S::X x[R];
        load(x, 16 * i);
        each<4>([&](auto step) __attribute__((always_inline)) {
          const S::W four = take(w);
          each<4>([&](auto j) __attribute__((always_inline)) {
            dots<step.value, j.value>(i % 2 ? S::high_nibbles(four.v[j]) : S::low_nibbles(four.v[j]), x, sum);
          });
        });
      });
    } else {
      each<2 * Q::kParts>([&](auto i) __attribute__((always_inline)) {
        if (i && i % 2 == 0) prefetch(kPart);
        S::X x[R];
        load(x, 16 * i);
        byte_dots(w, x, sum);
        if constexpr (Q::kHalves && i.value == 0) {
          add(0, false);
          each<R>([&](auto r) __attribute__((always_inline)) { sum[r] = S::iset1(0); });
        }
      });
    }
    add(Q::kHalves ? 2 : 0, Q::kMinimum);
    each<R>([&](auto r) __attribute__((always_inline)) { xq[r] += kBlock * Q::kParts, xb[r] += Q::kParts; });
    // 12 or 16 sums and their operands need all registers: the accumulators stay in memory, moved once a block.
    if constexpr (R > 2) asm volatile("" : : "r"(acc) : "memory");
  }
  each<R>([&](auto r) __attribute__((always_inline)) { store_tail(y + (row + r) * a.ldy, acc[r], lanes); });
}

// ---- more rows ----------------------------------------------------------------------------------------------------

// kTileBlocks blocks of a panel are unpacked into L1 once, for all rows. From one part of K to the next accumulators
// are stored in y and loaded again, which does not change their bits. The next part is prefetched during the products.
constexpr int64_t kTileBlocks = 24;

template <class Q>
inline void tiled_rows(const LinearArgs& a, const uint8_t* w, float* y, int64_t lanes) {
  alignas(64) uint8_t unpacked[kTileBlocks / Q::kParts * TileBlock<Q>::kBytes];
  const int64_t blocks = blocks_of(a.k), parts = (blocks + kTileBlocks - 1) / kTileBlocks, wides = blocks / Q::kParts;
  constexpr int fewest = fewest_rows(S::kDirectRows, S::kTileRows);
  const int64_t passes = (a.m + S::kTileRows - 1) / S::kTileRows;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = wides * part / parts, count = wides * (part + 1) / parts - first;
    for (int64_t g = 0; g < count; g++, w += Q::kBytes) {
      for (int64_t line = 0; line < Q::kBytes; line += 64) __builtin_prefetch(w + line + count * Q::kBytes, 0, 2);
      unpack_block<Q>(w, unpacked + g * TileBlock<Q>::kBytes);
    }
    const Tile tile = {unpacked, first * Q::kParts, count};
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t row = a.m * pass / passes, rows = a.m * (pass + 1) / passes - row;
      with_count<S::kTileRows, fewest>(rows, [&](auto R) __attribute__((always_inline)) {
        tile_rows<Q, decltype(R)::value>(a, tile, row, y, lanes);
      });
    }
  }
}

template <class Q>
inline void linear(const LinearArgs& a, int64_t panel_begin, int64_t panel_end) {
  const int64_t bytes = blocks_of(a.k) / Q::kParts * Q::kBytes;
  for (int64_t panel = panel_begin; panel < panel_end; panel++) {
    const uint8_t* w = static_cast<const uint8_t*>(a.w) + panel * bytes;
    float* y = a.y + (panel - panel_begin) * kLanes;
    const int64_t lanes = a.n - panel * kLanes;
    if (a.m > S::kDirectRows) {
      tiled_rows<Q>(a, w, y, lanes);
    } else {
      with_count<S::kDirectRows>(
          a.m, [&](auto R) __attribute__((always_inline)) { direct_rows<Q, decltype(R)::value>(a, w, 0, y, lanes); });
    }
  }
}
