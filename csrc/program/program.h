// A lowered graph as C++ sees it: plain data, filled by the bindings from edgeformer/engines/native/program/program.py.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "program/names.h"

namespace edgeformer {

constexpr int kMaxRank = 8;

// A fault in the caller's arguments that only the engine can see (an id outside its table): becomes InputError.
struct InputProblem : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A size as a postfix program: pairs (code, number). 0 number, 1 symbol, 2 add, 3 mul, 4 floor div, 5 min, 6 max,
// 7 clip(v, d): v < 0 counts from the end, then clamped to [0, d].
struct SizeExpr {
  std::vector<int64_t> code;
  int64_t evaluate(const std::vector<int64_t>& symbols) const;
};

struct SlotSpec {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int> shape;         // indices into ProgramSpec::sizes
  int view_of = -1;               // the slot whose memory it uses, -1: its own
  std::vector<uint8_t> constant;  // the bytes of a constant
  bool is_constant = false;
};

struct OpSpec {
  std::string kind;
  std::vector<int> inputs, outputs;  // slots, -1 for none
  std::vector<int> weights;
  std::map<std::string, std::vector<int64_t>> ints;
  std::map<std::string, std::vector<double>> floats;
  std::map<std::string, std::vector<std::string>> names;  // of enums, see names.h
  std::map<std::string, std::vector<int>> sizes;          // indices into ProgramSpec::sizes

  int64_t integer(const char* name) const { return ints.at(name).at(0); }
  bool flag(const char* name) const { return integer(name) != 0; }
  float number(const char* name) const { return static_cast<float>(floats.at(name).at(0)); }
  const std::string& name(const char* key) const { return names.at(key).at(0); }
};

struct WeightSpec {
  WeightType type;
  int64_t n, k;
};

struct ProgramSpec {
  std::vector<std::string> symbols;
  std::vector<SizeExpr> sizes;
  std::vector<SlotSpec> slots;
  std::vector<WeightSpec> weights;
  std::vector<OpSpec> ops;
  KvType kv = KvType::int8;  // of keys and values that may be int8
  std::vector<KvLayout> caches;
  std::vector<int64_t> windows;      // of each cache: most keys that a query sees, 0 for all
  std::vector<int> inputs, outputs;  // slots
  int logits_to_keep = -1;           // the place of that input in `inputs`, -1: the graph has none
  bool row_local = false;            // rows of several states may run as one sequence
  // Places in `symbols`, -1 for none: batch and sequence of the inputs, rows that Keep keeps, length of the caches.
  int batch_symbol = -1, sequence_symbol = -1, kept_symbol = -1, past_symbol = -1;
};

// A value during a run.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  int64_t count = 1;

  float* f32() const { return static_cast<float*>(data); }
  int64_t* i64() const { return static_cast<int64_t*>(data); }
  uint8_t* boolean() const { return static_cast<uint8_t*>(data); }
  int64_t columns() const { return rank ? shape[rank - 1] : 1; }
  int64_t rows() const { return count == 0 ? 0 : count / columns(); }
  // quant, quant64, quant128: int8 rows padded to whole blocks, then their XBlocks; span: columns that share a scale
  int64_t span() const { return dtype == DType::quant128 ? 128 : dtype == DType::quant64 ? 64 : kBlock; }
  int8_t* xq() const { return static_cast<int8_t*>(data); }
  XBlock* xb() const { return reinterpret_cast<XBlock*>(xq() + round_up(rows() * blocks_of(columns()) * kBlock, 64)); }
  size_t bytes() const;
};

}  // namespace edgeformer
