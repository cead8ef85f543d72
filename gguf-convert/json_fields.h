// Checked access to the members of a JSON object that came from a file: a missing or mistyped
// member is a FormatError that names the file and the key. null counts as absent, as in the files
// that transformers and PEFT write.
#pragma once

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "engine/error.h"

namespace nibble {

// Parses `text`, which must be one JSON object. Throws FormatError at the offending byte.
inline nlohmann::json parse_json_object(const std::string& text, const std::string& path) {
  nlohmann::json json;
  try {
    json = nlohmann::json::parse(text);
  } catch (const nlohmann::json::parse_error& e) {
    throw FormatError(path, std::min(e.byte, text.size()),
                      "this is not JSON: " + std::string(e.what()));
  } catch (const nlohmann::json::exception& e) {
    throw FormatError(path, 0, "this is not JSON: " + std::string(e.what()));
  }
  if (!json.is_object()) throw FormatError(path, 0, "the JSON value is not an object");
  return json;
}

class JsonFields {
 public:
  // Borrows both.
  JsonFields(const nlohmann::json& object, const std::string& path)
      : object_(object), path_(path) {}

  const nlohmann::json* find(const char* key) const {  // nullptr: absent or null
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  bool has(const char* key) const { return find(key) != nullptr; }

  std::int64_t integer(const char* key, std::optional<std::int64_t> fallback = {}) const {
    const auto* value = get(key, fallback.has_value());
    if (value == nullptr) return *fallback;
    if (value->is_number_unsigned() && value->get<std::uint64_t>() > INT64_MAX) fail(key, *value);
    if (!value->is_number_integer()) fail(key, *value);
    return value->get<std::int64_t>();
  }

  double real(const char* key, std::optional<double> fallback = {}) const {
    const auto* value = get(key, fallback.has_value());
    if (value == nullptr) return *fallback;
    if (!value->is_number()) fail(key, *value);
    return value->get<double>();
  }

  bool boolean(const char* key, bool fallback) const {
    const auto* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) fail(key, *value);
    return value->get<bool>();
  }

  std::string string(const char* key, std::optional<std::string> fallback = {}) const {
    const auto* value = get(key, fallback.has_value());
    if (value == nullptr) return *fallback;
    if (!value->is_string()) fail(key, *value);
    return value->get<std::string>();
  }

  const nlohmann::json* object(const char* key) const {  // nullptr: absent
    const auto* value = find(key);
    if (value != nullptr && !value->is_object()) fail(key, *value);
    return value;
  }

 private:
  const nlohmann::json* get(const char* key, bool optional) const {
    const auto* value = find(key);
    if (value == nullptr && !optional) {
      throw FormatError(path_, 0, "\"" + std::string(key) + "\" is missing");
    }
    return value;
  }

  [[noreturn]] void fail(const char* key, const nlohmann::json& value) const {
    using Json = nlohmann::json;
    std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
    if (text.size() > 40) text = text.substr(0, 40) + "...";
    throw FormatError(path_, 0,
                      "\"" + std::string(key) + "\" has a value of the wrong kind: " + text);
  }

  const nlohmann::json& object_;
  const std::string& path_;
};

}  // namespace nibble
