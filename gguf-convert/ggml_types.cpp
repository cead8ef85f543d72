#include "gguf-convert/ggml_types.h"

#include <string_view>

namespace nibble {
namespace {

struct GgmlType {
  std::uint32_t id;
  std::string_view name;  // a DType's name where Nibble reads the type
};

// The numbers missing here were retired by ggml.
constexpr GgmlType kTypes[] = {
    {0, "F32"},     {1, "F16"},    {2, "Q4_0"},     {3, "Q4_1"},    {6, "Q5_0"},     {7, "Q5_1"},
    {8, "Q8_0"},    {9, "Q8_1"},   {10, "Q2_K"},    {11, "Q3_K"},   {12, "Q4_K"},    {13, "Q5_K"},
    {14, "Q6_K"},   {15, "Q8_K"},  {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"},
    {20, "IQ4_NL"}, {21, "IQ3_S"}, {22, "IQ2_S"},   {23, "IQ4_XS"}, {24, "I8"},      {25, "I16"},
    {26, "I32"},    {27, "I64"},   {28, "F64"},     {29, "IQ1_M"},  {30, "BF16"},    {34, "TQ1_0"},
    {35, "TQ2_0"},  {39, "MXFP4"}, {40, "NVFP4"},   {41, "Q1_0"},   {42, "Q2_0"},
};

}  // namespace

std::optional<DType> dtype_from_ggml(std::uint32_t id) {
  for (const GgmlType& type : kTypes) {
    if (type.id == id) return dtype_from_name(type.name);
  }
  return std::nullopt;
}

std::optional<std::uint32_t> ggml_from_dtype(DType dtype) {
  for (const GgmlType& type : kTypes) {
    if (type.name == name(dtype)) return type.id;
  }
  return std::nullopt;
}

std::string ggml_type_name(std::uint32_t id) {
  const std::string number = "type " + std::to_string(id);
  for (const GgmlType& type : kTypes) {
    if (type.id == id) return std::string(type.name) + " (" + number + ")";
  }
  return number;
}

std::string readable_ggml_types() {
  std::string list;
  for (const GgmlType& type : kTypes) {
    if (!dtype_from_name(type.name)) continue;
    if (!list.empty()) list += ", ";
    list += type.name;
  }
  return list;
}

}  // namespace nibble
