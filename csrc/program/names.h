// The names that a lowered program uses, and the values that C++ computes with. A program carries names only; each is
// looked up once, when the engine is made. `_native.NAMES` exports the tables to Python.
//
// A new function of one of these kinds: add a value and its row here, then the name in
// edgeformer/engines/native/program/emit.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace edgeformer {

// A program that this build cannot run: an unknown operation or name.
struct UnknownName : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class T>
struct Named {
  const char* name;
  T value;
};

// The value called `name`. Throws UnknownName.
template <class T, size_t N>
T value_named(const Named<T> (&table)[N], const char* kind, const std::string& name) {
  for (const Named<T>& row : table) {
    if (name == row.name) return row.value;
  }
  throw UnknownName(std::string("the program has the ") + kind + " '" + name + "', which this build does not know");
}

template <class T, size_t N>
std::vector<std::string> names_of(const Named<T> (&table)[N]) {
  std::vector<std::string> names;
  for (const Named<T>& row : table) names.emplace_back(row.name);
  return names;
}

// What a slot holds. quant*: int8 rows with one scale for each 32, 64 or 128 columns.
enum class DType : int32_t { f32, i64, boolean, quant, quant64, quant128 };
constexpr Named<DType> kDTypes[] = {
    {"f32", DType::f32},     {"i64", DType::i64},         {"bool", DType::boolean},
    {"quant", DType::quant}, {"quant64", DType::quant64}, {"quant128", DType::quant128},
};

// The weight type with one of kWeightTypeNames. Throws UnknownName.
inline WeightType weight_type_named(const std::string& name) {
  for (int i = 0; i < kWeightTypes; ++i) {
    if (name == kWeightTypeNames[i]) return static_cast<WeightType>(i);
  }
  throw UnknownName("the program has the weight type '" + name + "', which this build does not know");
}

// Which rows of a packed weight a matrix fills: all in order, or the panels of gate and up, which alternate.
enum class PackRole : int32_t { all, gate, up };
constexpr Named<PackRole> kPackRoles[] = {{"all", PackRole::all}, {"gate", PackRole::gate}, {"up", PackRole::up}};

constexpr Named<Unary> kUnaryTable[] = {
    {"identity", Unary::identity},
    {"exp", Unary::exp},
    {"sigmoid", Unary::sigmoid},
    {"tanh", Unary::tanh},
    {"erf", Unary::erf},
    {"sqrt", Unary::sqrt},
    {"sin", Unary::sin},
    {"cos", Unary::cos},
    {"log", Unary::log},
    {"softplus", Unary::softplus},
    {"relu", Unary::relu},
    {"relu2", Unary::relu2},
    {"silu", Unary::silu},
    {"gelu", Unary::gelu},
    {"gelu_tanh", Unary::gelu_tanh},
    {"quick_gelu", Unary::quick_gelu},
    {"neg", Unary::neg},
    {"abs", Unary::abs},
    {"reciprocal", Unary::reciprocal},
    {"rsqrt", Unary::rsqrt},
};
static_assert(sizeof kUnaryTable / sizeof *kUnaryTable == static_cast<size_t>(Unary::count));

enum class Binary : int32_t {
  add,
  sub,
  mul,
  div,
  pow,
  min,
  max,
  mod,
  equal,
  less,
  less_equal,
  greater,
  greater_equal,
  logic_and,
  logic_or,
  logic_xor,
};
constexpr Named<Binary> kBinaries[] = {
    {"add", Binary::add},
    {"sub", Binary::sub},
    {"mul", Binary::mul},
    {"div", Binary::div},
    {"pow", Binary::pow},
    {"min", Binary::min},
    {"max", Binary::max},
    {"mod", Binary::mod},
    {"equal", Binary::equal},
    {"less", Binary::less},
    {"less_equal", Binary::less_equal},
    {"greater", Binary::greater},
    {"greater_equal", Binary::greater_equal},
    {"and", Binary::logic_and},
    {"or", Binary::logic_or},
    {"xor", Binary::logic_xor},
};

// Functions of one element with up to two numbers (the operator's alpha and beta, or gamma) and no fast path.
enum class Point : int32_t {
  floor,
  ceil,
  round,
  sign,
  leaky_relu,
  elu,
  selu,
  celu,
  hard_sigmoid,
  hard_swish,
  thresholded_relu,
  softsign,
  mish,
  swish,
  is_nan,
  is_inf,
};
constexpr Named<Point> kPoints[] = {
    {"floor", Point::floor},
    {"ceil", Point::ceil},
    {"round", Point::round},
    {"sign", Point::sign},
    {"leaky_relu", Point::leaky_relu},
    {"elu", Point::elu},
    {"selu", Point::selu},
    {"celu", Point::celu},
    {"hard_sigmoid", Point::hard_sigmoid},
    {"hard_swish", Point::hard_swish},
    {"thresholded_relu", Point::thresholded_relu},
    {"softsign", Point::softsign},
    {"mish", Point::mish},
    {"swish", Point::swish},
    {"is_nan", Point::is_nan},
    {"is_inf", Point::is_inf},
};

enum class Reduction : int32_t { mean, sum, max, min, prod, l2, sumsquare, l1 };
constexpr Named<Reduction> kReductions[] = {
    {"mean", Reduction::mean},
    {"sum", Reduction::sum},
    {"max", Reduction::max},
    {"min", Reduction::min},
    {"prod", Reduction::prod},
    {"l2", Reduction::l2},
    {"sumsquare", Reduction::sumsquare},
    {"l1", Reduction::l1},
};

// How ScatterElements joins an update with what is there.
enum class Scatter : int32_t { none, add, mul };
constexpr Named<Scatter> kScatters[] = {{"none", Scatter::none}, {"add", Scatter::add}, {"mul", Scatter::mul}};

// Normalization of a row, or of each head of queries and keys.
enum class NormKind : int32_t { none, rms, layer };
constexpr Named<NormKind> kNorms[] = {{"", NormKind::none}, {"rms", NormKind::rms}, {"layer", NormKind::layer}};

}  // namespace edgeformer
