// The linears of the x86 tables: one body for AVX2, AVX-VNNI and AVX-512. S has, beside the primitives of simd.inl:
//
//   load_w(p), store_w(p, W)          64 bytes of an unpacked tile
//   nibble_low(p), nibble_high(p)     -> W: the low, the high halves of 64 packed bytes, 0 .. 15
//   nzero(c) -> NibbleSum             the start, for the final addend c
//   ndot<step>(s, W, X) -> NibbleSum  s[l] += sum over c in 0 .. 3 of w[l][c] * x[4 * step + c]
//   nsum(s, c) -> I                   the sum; c is added once, by nzero or by nsum
//
//   kLongNibbleSums                   NibbleSum takes more than 8 steps
//   kPackedRows, kPackedPanels        rows of activations and panels of weights that one pass over packed bytes meets
//   kTileRows, kTilePanels            the same of one pass over a tile

// A packed block: fp16 scales; nibbles are unpacked as they are read. part(i): the weights of its i-th 32 columns.
template <class Q>
struct PackedBlock {
  static constexpr int64_t kBytes = Q::kBytes;
  const uint8_t* p;
  template <int slice>
  S::W weights() const {
    if constexpr (!Q::kNibbles)
      return S::byte_weight(p + Q::kHead + 64 * slice);
    else if constexpr (slice < 4)
      return S::nibble_low(p + Q::kHead + 64 * slice);
    else
      return S::nibble_high(p + Q::kHead + 64 * (slice - 4));
  }
  F scale() const { return S::half(p); }
  F second() const { return S::half(p + 32); }  // q4a: minima; q8x16: scales of the columns 16 .. 31
  PackedBlock part(int64_t i) const { return {p + (Q::kNibbles ? 256 : 512) * i}; }
};

// The same block, unpacked for many rows of activations: 8 slices of W for each 32 columns, then scale() and second()
// as floats.
template <class Q>
struct TileBlock {
  static constexpr int64_t kScales = 512 * Q::kParts, kBytes = kScales + 128;
  const uint8_t* p;
  template <int slice>
  S::W weights() const {
    return S::load_w(p + 64 * slice);
  }
  F scale() const { return S::load(reinterpret_cast<const float*>(p + kScales)); }
  F second() const { return S::load(reinterpret_cast<const float*>(p + kScales + 64)); }
  TileBlock part(int64_t i) const { return {p + 512 * i}; }
};

// Quantized activations of up to 8 rows, from one block on. A row's blocks and its integers are at base + (1, 3, 5 or 7
// steps) * (1, 2, 4 or 8), which is one address of an instruction: an own pointer for each row and array would be more
// than there are registers.
template <int R>
struct XRows {
  const int8_t* xq;
  const XBlock* xb;
  int64_t step, step3, step5, step7;  // bytes from a row's blocks to the next row's, and multiples

  static_assert(2 * sizeof(XBlock) == kBlock, "a row's integers take twice the bytes of its blocks");
  XRows(const int8_t* q, const XBlock* b, int64_t blocks)
      : xq(q), xb(b), step(blocks * int64_t(sizeof(XBlock))), step3(3 * step), step5(5 * step), step7(7 * step) {
    asm("" : "+r"(step), "+r"(step3), "+r"(step5), "+r"(step7));  // else the compiler derives its own pointers
  }
  // The same rows, `blocks` further on.
  void advance(int64_t blocks) {
    xq += blocks * kBlock;
    xb += blocks;
    if constexpr (R > 2) asm("" : "+r"(xq), "+r"(xb));  // as above
  }
  template <int r>
  int64_t offset() const {
    static_assert(r < 8, "more rows than steps");
    return r == 7 ? step7 : r == 5 ? step5 : r == 3 ? step3 : r == 6 ? 2 * step3 : r * step;
  }
  template <int r>
  const int8_t* integers() const {
    return xq + 2 * offset<r>();
  }
  template <int r>
  const XBlock& block() const {
    return *reinterpret_cast<const XBlock*>(reinterpret_cast<const uint8_t*>(xb) + offset<r>());
  }
};

// sum[r][p] += 4 columns (slice `s` of 8) of panel p's block * row r, for R rows and P panels.
template <class Q, int s, int R, int P, class Block, class Sum>
inline __attribute__((always_inline)) void dot_slice(const Block (&block)[P], const S::X (&x)[R], Sum (&sum)[R][P]) {
  typename S::W w[P];
  each<P>([&](auto p) __attribute__((always_inline)) { w[p] = block[p].template weights<s>(); });
  each<R>([&](auto r) __attribute__((always_inline)) {
    each<P>([&](auto p) __attribute__((always_inline)) {
      if constexpr (Q::kNibbles)
        sum[r][p] = S::template ndot<s % 4>(sum[r][p], w[p], x[r]);
      else
        sum[r][p] = S::template bdot<s % 4>(sum[r][p], w[p], x[r]);
    });
  });
}

// What undoes the + 8 of q4's nibbles: -8 * sum of x.
template <class Q>
inline int32_t centre(const XBlock& xb) {
  return Q::kCentred ? xb.offset >> 4 : 0;
}

// acc[r][p] += one wide block of panel p * row r: all kParts of it under one scale.
template <class Q, int R, int P, class Block>
inline __attribute__((always_inline)) void add_wide(const Block (&block)[P], const XRows<R>& rows, F (&acc)[R][P]) {
  constexpr bool widens = Q::kNibbles && !S::kLongNibbleSums;  // after each part
  I sum[R][P], whole[R][P];                                    // every table's NibbleSum and ByteSum are I
  const auto start = [&](bool offset) __attribute__((always_inline)) {
    each<R>([&](auto r) __attribute__((always_inline)) {
      const int32_t c = offset ? rows.template block<r.value>().offset_part : 0;
      each<P>([&](auto p) __attribute__((always_inline)) {
        if constexpr (Q::kNibbles)
          sum[r][p] = S::nzero(c >> 4);
        else
          sum[r][p] = S::bzero(c);
      });
    });
  };
  start(true);
  each<Q::kParts>([&](auto i) __attribute__((always_inline)) {
    Block part[P];
    each<P>([&](auto p) __attribute__((always_inline)) { part[p] = block[p].part(i); });
    each<2>([&](auto half) __attribute__((always_inline)) {
      typename S::X x[R];
      each<R>([&](auto r) __attribute__((always_inline)) {
        x[r] = S::load_x(rows.template integers<r.value>() + i * kBlock + 16 * half);
      });
      each<4>([&](auto s)
                  __attribute__((always_inline)) { dot_slice<Q, 4 * half.value + s.value, R, P>(part, x, sum); });
    });
    if constexpr (widens) {
      each<R>([&](auto r) __attribute__((always_inline)) {
        const int32_t c = rows.template block<r.value>().offset_part >> 4;
        each<P>([&](auto p) __attribute__((always_inline)) {
          whole[r][p] = i ? S::iadd(whole[r][p], S::nsum(sum[r][p], 0)) : S::nsum(sum[r][p], c);
        });
      });
      start(false);
    }
  });
  each<P>([&](auto p) __attribute__((always_inline)) {
    const F ws = block[p].scale();
    each<R>([&](auto r) __attribute__((always_inline)) {
      if constexpr (!Q::kNibbles)
        whole[r][p] = S::bsum(sum[r][p]);
      else if constexpr (!widens)
        whole[r][p] = S::nsum(sum[r][p], 0);
      const F scale = S::mul(f16(rows.template block<r.value>().scale), ws);
      acc[r][p] = S::fma(S::to_float(whole[r][p]), scale, acc[r][p]);
    });
  });
}

// acc[r][p] += one block of panel p * row r, in the order of LinearFn's formula (kernels.h).
template <class Q, int R, int P, class Block>
inline __attribute__((always_inline)) void add_block(const Block (&block)[P], const XRows<R>& rows, F (&acc)[R][P]) {
  if constexpr (Q::kParts > 1) return add_wide<Q, R, P>(block, rows, acc);
  typename S::X x[R];
  const auto load = [&](int64_t column) __attribute__((always_inline)) {
    each<R>([&](auto r)
                __attribute__((always_inline)) { x[r] = S::load_x(rows.template integers<r.value>() + column); });
  };
  // acc += dot * (scale of the row * scale of the panel)
  const auto add = [&](auto r, int p, I dot, F ws) __attribute__((always_inline)) {
    acc[r][p] = S::fma(S::to_float(dot), S::mul(f16(rows.template block<r.value>().scale), ws), acc[r][p]);
  };
  if constexpr (Q::kNibbles) {
    typename S::NibbleSum sum[R][P];
    each<R>([&](auto r) __attribute__((always_inline)) {
      each<P>([&](auto p)
                  __attribute__((always_inline)) { sum[r][p] = S::nzero(centre<Q>(rows.template block<r.value>())); });
    });
    load(0);
    dot_slice<Q, 0, R, P>(block, x, sum);
    dot_slice<Q, 1, R, P>(block, x, sum);
    dot_slice<Q, 2, R, P>(block, x, sum);
    dot_slice<Q, 3, R, P>(block, x, sum);
    load(16);
    dot_slice<Q, 4, R, P>(block, x, sum);
    dot_slice<Q, 5, R, P>(block, x, sum);
    dot_slice<Q, 6, R, P>(block, x, sum);
    dot_slice<Q, 7, R, P>(block, x, sum);
    each<P>([&](auto p) __attribute__((always_inline)) {
      const F ws = block[p].scale();
      each<R>([&](auto r) __attribute__((always_inline)) {
        add(r, p, S::nsum(sum[r][p], centre<Q>(rows.template block<r.value>())), ws);
      });
      if constexpr (Q::kMinimum) {
        const F wm = block[p].second();
        each<R>([&](auto r) __attribute__((always_inline)) {
          acc[r][p] = S::fma(f16(rows.template block<r.value>().scaled_sum), wm, acc[r][p]);
        });
      }
    });
  } else {
    typename S::ByteSum sum[R][P];
    each<R>([&](auto r) __attribute__((always_inline)) {
      const int32_t offset =
          Q::kHalves ? rows.template block<r.value>().offset_part : rows.template block<r.value>().offset;
      each<P>([&](auto p) __attribute__((always_inline)) { sum[r][p] = S::bzero(offset); });
    });
    load(0);
    dot_slice<Q, 0, R, P>(block, x, sum);
    dot_slice<Q, 1, R, P>(block, x, sum);
    dot_slice<Q, 2, R, P>(block, x, sum);
    dot_slice<Q, 3, R, P>(block, x, sum);
    if constexpr (Q::kHalves) {
      each<P>([&](auto p) __attribute__((always_inline)) {
        const F ws = block[p].scale();
        each<R>([&](auto r) __attribute__((always_inline)) {
          add(r, p, S::bsum(sum[r][p]), ws);
          sum[r][p] = S::bzero(rows.template block<r.value>().offset - rows.template block<r.value>().offset_part);
        });
      });
    }
    load(16);
    dot_slice<Q, 4, R, P>(block, x, sum);
    dot_slice<Q, 5, R, P>(block, x, sum);
    dot_slice<Q, 6, R, P>(block, x, sum);
    dot_slice<Q, 7, R, P>(block, x, sum);
    each<P>([&](auto p) __attribute__((always_inline)) {
      const F ws = Q::kHalves ? block[p].second() : block[p].scale();
      each<R>([&](auto r) __attribute__((always_inline)) { add(r, p, S::bsum(sum[r][p]), ws); });
    });
  }
}

// Cache lines of a packed block.
template <class Q>
constexpr int64_t kLines = (Q::kBytes + 63) / 64;

// What a pass over panels prefetches at each block of one: the lines [begin, end) of the one `distance` bytes further on.
struct Fetch {
  int64_t distance, begin, end;
};

// y[row .. row + R) of P panels, straight from the packed bytes.
template <class Q, int R, int P>
inline void panel_rows(const LinearArgs& a, const uint8_t* panels, const Fetch& fetch, int64_t row, float* y,
                       int64_t lanes) {
  const bool whole = fetch.end - fetch.begin == kLines<Q>;
  const int64_t blocks = blocks_of(a.k), bytes = blocks / Q::kParts * Q::kBytes;
  F acc[R][P];
  each<R>([&](auto r) __attribute__((always_inline)) {
    each<P>([&](auto p) __attribute__((always_inline)) { acc[r][p] = f16(0.0f); });
  });
  XRows<R> rows(a.xq + row * blocks * kBlock, a.xb + row * blocks, blocks);
  for (int64_t g = 0; g < bytes; g += Q::kBytes, rows.advance(Q::kParts)) {
    PackedBlock<Q> block[P];
    each<P>([&](auto p) __attribute__((always_inline)) {
      block[p].p = panels + p * bytes + g;
      const uint8_t* const ahead = block[p].p + fetch.distance;
      if (whole)  // of a few rows, each instruction of a loop counts
        each<kLines<Q>>([&](auto line) __attribute__((always_inline)) { __builtin_prefetch(ahead + 64 * line, 0, 2); });
      else
        for (int64_t line = fetch.begin; line < fetch.end; line++) __builtin_prefetch(ahead + 64 * line, 0, 2);
    });
    add_block<Q, R, P>(block, rows, acc);
  }
  each<R>([&](auto r) __attribute__((always_inline)) {
    each<P>([&](auto p) __attribute__((always_inline)) {
      store_tail(y + (row + r) * a.ldy + 16 * p, acc[r][p], lanes - 16 * p);
    });
  });
}

// All rows of P panels, in passes of kPackedRows.
template <class Q, int P>
inline void packed_panels(const LinearArgs& a, int64_t panel, float* y) {
  const int64_t bytes = blocks_of(a.k) / Q::kParts * Q::kBytes;
  const uint8_t* const w = static_cast<const uint8_t*>(a.w) + panel * bytes;
  const int64_t passes = (a.m + S::kPackedRows - 1) / S::kPackedRows, lines = a.prefetch ? kLines<Q> : 0;
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t row = a.m * pass / passes, rows = a.m * (pass + 1) / passes - row;
    // Several passes share the lines of the next panels, so that memory is read all the time.
    const Fetch fetch = {passes * P > 1 ? P * bytes : a.prefetch, lines * pass / passes, lines * (pass + 1) / passes};
    with_count<S::kPackedRows>(rows, [&](auto R) __attribute__((always_inline)) {
      panel_rows<Q, decltype(R)::value, P>(a, w, fetch, row, y, a.n - panel * kLanes);
    });
  }
}

// Calls body with (P, the first panel) of each group of P panels: P is `most`, and 1 for the panels that are left.
template <int most, class Body>
inline void in_groups(int64_t panel, int64_t end, Body body) {
  for (; panel + most <= end; panel += most) body(Count<most>{}, panel);
  for (; panel < end; panel++) body(Count<1>{}, panel);
}

// More than kFewRows rows of nibbles: kTilePanels panels x kTileBlocks blocks are unpacked into L1 once, for all rows. From
// one part of K to the next the accumulators are stored in y and loaded again, which does not change their bits.
constexpr int64_t kTileBlocks = 24;

// The blocks [first, first + count) of kBlock columns of some panels, unpacked, one panel after another.
struct Tile {
  const uint8_t* data;
  int64_t first, count;
};

// y[row .. row + R) += a tile of P panels. The sums start from y, or from 0 if the tile's first block is 0.
template <class Q, int R, int P>
inline void tile_rows(const LinearArgs& a, const Tile& tile, int64_t row, float* y, int64_t lanes) {
  const int64_t blocks = blocks_of(a.k);
  F acc[R][P];
  each<R>([&](auto r) __attribute__((always_inline)) {
    each<P>([&](auto p) __attribute__((always_inline)) {
      acc[r][p] = tile.first ? load_tail(y + (row + r) * a.ldy + 16 * p, lanes - 16 * p) : f16(0.0f);
    });
  });
  XRows<R> rows(a.xq + (row * blocks + tile.first) * kBlock, a.xb + row * blocks + tile.first, blocks);
  for (int64_t g = 0; g < tile.count; g += Q::kParts, rows.advance(Q::kParts)) {
    TileBlock<Q> block[P];
    each<P>([&](auto p) __attribute__((always_inline)) {
      block[p].p = tile.data + (p * kTileBlocks + g) / Q::kParts * TileBlock<Q>::kBytes;
    });
    add_block<Q, R, P>(block, rows, acc);
  }
  each<R>([&](auto r) __attribute__((always_inline)) {
    each<P>([&](auto p) __attribute__((always_inline)) {
      store_tail(y + (row + r) * a.ldy + 16 * p, acc[r][p], lanes - 16 * p);
    });
  });
}

template <class Q>
inline void unpack_block(const uint8_t* packed, uint8_t* tile) {
  const PackedBlock<Q> block = {packed};
  for (int64_t i = 0; i < Q::kParts; i++) {
    const PackedBlock<Q> part = block.part(i);
    each<8>([&](auto s) __attribute__((always_inline)) {
      S::store_w(tile + 512 * i + 64 * s, part.template weights<s.value>());
    });
  }
  float* const scales = reinterpret_cast<float*>(tile + TileBlock<Q>::kScales);
  S::store(scales, block.scale());
  if constexpr (Q::kMinimum) S::store(scales + 16, block.second());
}

template <class Q, int P>
inline void tiled_panels(const LinearArgs& a, int64_t panel, float* y) {
  constexpr int64_t tile_bytes = kTileBlocks / Q::kParts * TileBlock<Q>::kBytes;
  alignas(64) uint8_t unpacked[P * tile_bytes];
  const int64_t blocks = blocks_of(a.k), parts = (blocks + kTileBlocks - 1) / kTileBlocks, wides = blocks / Q::kParts;
  const int64_t panel_bytes = wides * Q::kBytes;
  constexpr int fewest = fewest_rows(kFewRows, S::kTileRows);
  const int64_t passes = (a.m + S::kTileRows - 1) / S::kTileRows;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = wides * part / parts, count = wides * (part + 1) / parts - first;
    const uint8_t* const packed = static_cast<const uint8_t*>(a.w) + panel * panel_bytes + first * Q::kBytes;
    for (int p = 0; p < P; p++)
      for (int64_t g = 0; g < count; g++)
        unpack_block<Q>(packed + p * panel_bytes + g * Q::kBytes, unpacked + p * tile_bytes + g * TileBlock<Q>::kBytes);
    const Tile tile = {unpacked, first * Q::kParts, count * Q::kParts};
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t row = a.m * pass / passes, rows = a.m * (pass + 1) / passes - row;
      with_count<S::kTileRows, fewest>(rows, [&](auto R) __attribute__((always_inline)) {
        tile_rows<Q, decltype(R)::value, P>(a, tile, row, y, a.n - panel * kLanes);
      });
    }
  }
}

template <class Q>
inline void linear(const LinearArgs& a, int64_t panel_begin, int64_t panel_end) {
  // Bytes have nothing to unpack: with any number of rows they are read as packed.
  if constexpr (Q::kNibbles) {
    if (a.m > kFewRows)
      return in_groups<S::kTilePanels>(panel_begin, panel_end, [&](auto P, int64_t panel) {
        tiled_panels<Q, decltype(P)::value>(a, panel, a.y + (panel - panel_begin) * kLanes);
      });
  }
  in_groups<S::kPackedPanels>(panel_begin, panel_end, [&](auto P, int64_t panel) {
    packed_panels<Q, decltype(P)::value>(a, panel, a.y + (panel - panel_begin) * kLanes);
  });
}
