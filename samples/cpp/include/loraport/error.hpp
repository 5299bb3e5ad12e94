// The one exception of this library: a text that can be shown as it is.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace loraport {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;

  // "WHAT: expected EXPECTED, got GOT; REMEDY"
  Error(const std::string& what, const std::string& expected, const std::string& got,
        const std::string& remedy = "")
      : std::runtime_error(line(what, expected, got, remedy)) {}

  static std::string line(const std::string& what, const std::string& expected,
                          const std::string& got, const std::string& remedy = "") {
    return what + ": expected " + expected + ", got " + got + (remedy.empty() ? "" : "; " + remedy);
  }
};

// Collects everything that is wrong, so that one error names it all.
class Problems {
 public:
  void add(const std::string& what, const std::string& expected, const std::string& got,
           const std::string& remedy = "") {
    text_ += "\n  " + Error::line(what, expected, got, remedy);
  }

  void raise_if_any(const std::string& heading) const {
    if (!text_.empty()) throw Error(heading + ":" + text_);
  }

 private:
  std::string text_;
};

}  // namespace loraport
