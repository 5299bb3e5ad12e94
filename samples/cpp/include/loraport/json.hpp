// A small strict JSON reader: enough for manifests, configurations and safetensors headers.
//
// Refuses what RFC 8259 refuses (NaN among it), keys that occur twice, and deep nesting.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <locale>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "loraport/error.hpp"

namespace loraport {

class Json {
 public:
  struct Member;
  using Array = std::vector<Json>;
  using Object = std::vector<Member>;  // sorted by key

  Json() = default;
  template <typename T>
  explicit Json(T value) : value_(std::move(value)) {}

  // `name` is what messages call the text.
  static Json parse(std::string_view text, const std::string& name);

  bool is_string() const { return std::holds_alternative<std::string>(value_); }
  bool is_array() const { return std::holds_alternative<Array>(value_); }

  const std::string& string(const std::string& name) const {
    return get<std::string>(name, "a string");
  }
  const Array& array(const std::string& name) const { return get<Array>(name, "a list"); }
  const Object& object(const std::string& name) const { return get<Object>(name, "an object"); }
  double number(const std::string& name) const { return get<double>(name, "a number"); }

  // A whole number from 0 to 2^53, so that a double holds it exactly.
  std::uint64_t whole(const std::string& name) const {
    const double value = number(name);
    if (!(value >= 0 && value <= 9007199254740992.0) || value != std::floor(value)) {
      throw Error(name, "a whole number", std::to_string(value));
    }
    return static_cast<std::uint64_t>(value);
  }

  const Json* find(const std::string& key) const;
  // The member `key` of the object that messages call `name`.
  const Json& at(const std::string& key, const std::string& name) const;

 private:
  class Parser;

  template <typename T>
  const T& get(const std::string& name, const char* expected) const {
    const T* value = std::get_if<T>(&value_);
    if (value == nullptr) throw Error(name, expected, "something else");
    return *value;
  }

  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value_ = nullptr;
};

struct Json::Member {
  std::string key;
  Json value;
};

inline const Json* Json::find(const std::string& key) const {
  const Object* object = std::get_if<Object>(&value_);
  if (object == nullptr) return nullptr;
  const auto found = std::lower_bound(
      object->begin(), object->end(), key,
      [](const Member& member, const std::string& wanted) { return member.key < wanted; });
  return found != object->end() && found->key == key ? &found->value : nullptr;
}

inline const Json& Json::at(const std::string& key, const std::string& name) const {
  const Json* found = find(key);
  if (found == nullptr) throw Error(name, "a member \"" + key + "\"", "none");
  return *found;
}

class Json::Parser {
 public:
  Parser(std::string_view text, const std::string& name) : text_(text), name_(name) {}

  Json document() {
    Json result = value(0);
    skip_space();
    if (at_ != text_.size()) fail("the end of the text");
    return result;
  }

 private:
  static constexpr int kDeepest = 64;

  [[noreturn]] void fail(const std::string& expected) const {
    const std::string got = at_ < text_.size() ? "something else" : "the end of the text";
    throw Error(name_ + ", byte " + std::to_string(at_), "JSON with " + expected + " here", got);
  }

  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != text_.npos) ++at_;
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(std::string_view wanted) {
    if (text_.substr(at_, wanted.size()) != wanted) return false;
    at_ += wanted.size();
    return true;
  }

  Json value(int depth) {
    if (depth > kDeepest) fail("less nesting");
    skip_space();
    if (take("{")) return object(depth);
    if (take("[")) return array(depth);
    if (take("\"")) return Json(string());
    if (take("true")) return Json(true);
    if (take("false")) return Json(false);
    if (take("null")) return Json(nullptr);
    return Json(number());
  }

  Json object(int depth) {
    Object members;
    skip_space();
    if (!take("}")) {
      do {
        skip_space();
        if (!take("\"")) fail("a key");
        std::string key = string();
        skip_space();
        if (!take(":")) fail("a colon");
        members.push_back({std::move(key), value(depth + 1)});
        skip_space();
      } while (take(","));
      if (!take("}")) fail("a comma or a brace");
    }
    std::sort(members.begin(), members.end(),
              [](const Member& a, const Member& b) { return a.key < b.key; });
    const auto twice =
        std::adjacent_find(members.begin(), members.end(),
                           [](const Member& a, const Member& b) { return a.key == b.key; });
    if (twice != members.end()) throw Error(name_, "each key once", "\"" + twice->key + "\" twice");
    return Json(std::move(members));
  }

  Json array(int depth) {
    Array items;
    skip_space();
    if (!take("]")) {
      do {
        items.push_back(value(depth + 1));
        skip_space();
      } while (take(","));
      if (!take("]")) fail("a comma or a bracket");
    }
    return Json(std::move(items));
  }

  std::string string() {
    std::string result;
    while (true) {
      const char c = peek();
      if (at_ >= text_.size() || static_cast<unsigned char>(c) < 0x20) fail("the end of a string");
      ++at_;
      if (c == '"') return result;
      if (c == '\\') {
        escape(result);
      } else {
        result += c;
      }
    }
  }

  void escape(std::string& result) {
    static constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const char c = peek();
    ++at_;
    if (c == 'u') {
      std::uint32_t code = hex4();
      if (code >= 0xD800 && code < 0xDC00) {  // the first half of a surrogate pair
        if (!take("\\u")) fail("the other half of a surrogate pair");
        const std::uint32_t low = hex4();
        if (low < 0xDC00 || low > 0xDFFF) fail("the other half of a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
      } else if (code >= 0xDC00 && code <= 0xDFFF) {
        fail("the first half of a surrogate pair");
      }
      append_utf8(code, result);
      return;
    }
    const std::size_t index = kNames.find(c);
    if (index == kNames.npos) fail("a known escape");
    result += kMeanings[index];
  }

  std::uint32_t hex4() {
    static constexpr std::string_view kDigits = "0123456789abcdef";
    std::uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const std::size_t digit = kDigits.find(c >= 'A' && c <= 'F' ? static_cast<char>(c + 32) : c);
      if (digit == kDigits.npos) fail("four hexadecimal digits");
      code = code * 16 + static_cast<std::uint32_t>(digit);
    }
    return code;
  }

  static void append_utf8(std::uint32_t code, std::string& result) {
    const auto tail = [&](int shift) {
      result += static_cast<char>(0x80 | ((code >> shift) & 0x3F));
    };
    if (code < 0x80) {
      result += static_cast<char>(code);
    } else if (code < 0x800) {
      result += static_cast<char>(0xC0 | (code >> 6));
      tail(0);
    } else if (code < 0x10000) {
      result += static_cast<char>(0xE0 | (code >> 12));
      tail(6), tail(0);
    } else {
      result += static_cast<char>(0xF0 | (code >> 18));
      tail(12), tail(6), tail(0);
    }
  }

  std::size_t digits() {
    const std::size_t start = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    return at_ - start;
  }

  double number() {
    const std::size_t start = at_;
    take("-");
    if (!take("0") && digits() == 0) fail("a value");
    if (take(".") && digits() == 0) fail("a digit");
    if (take("e") || take("E")) {
      if (!take("+")) take("-");
      if (digits() == 0) fail("a digit");
    }
    // A stream of its own, because the decimal point must not depend on the product's locale.
    std::istringstream stream{std::string(text_.substr(start, at_ - start))};
    stream.imbue(std::locale::classic());
    double result = 0;
    if (!(stream >> result) || !std::isfinite(result)) fail("a number in range");
    return result;
  }

  std::string_view text_;
  const std::string& name_;
  std::size_t at_ = 0;
};

inline Json Json::parse(std::string_view text, const std::string& name) {
  return Parser(text, name).document();
}

}  // namespace loraport
