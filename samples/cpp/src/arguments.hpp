// Command lines, and the exit codes that both programs share.
#pragma once

#include <charconv>
#include <cstdio>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "loraport/bundle.hpp"
#include "loraport/error.hpp"

namespace loraport {

enum ExitCode { kDone = 0, kMismatch = 1, kRefused = 2 };

// Takes options out of a command line, one by one; what is left are the positional arguments.
class Arguments {
 public:
  Arguments(int argc, char** argv) : words_(argv + 1, argv + argc) {}

  bool flag(const std::string& name) {
    for (auto word = words_.begin(); word != words_.end(); ++word) {
      if (*word != name) continue;
      words_.erase(word);
      return true;
    }
    return false;
  }

  // Takes `name VALUE`; false if it is not there. An option may be taken several times.
  bool option(const std::string& name, std::string& value) {
    for (auto word = words_.begin(); word != words_.end(); ++word) {
      if (*word != name) continue;
      if (word + 1 == words_.end()) throw Error(name, "a value", "none");
      value = *(word + 1);
      words_.erase(word, word + 2);
      return true;
    }
    return false;
  }

  template <typename Number>
  bool option(const std::string& name, Number& number) {
    std::string text;
    if (!option(name, text)) return false;
    number = parse<Number>(text, name);
    return true;
  }

  // The only positional argument. Call it last: whatever else is left is refused.
  std::string positional(const std::string& name) {
    for (const std::string& word : words_) {
      if (word.size() > 1 && word[0] == '-') throw Error(word, "a known option", "this", "--help");
    }
    if (words_.size() != 1) {
      throw Error(name, "one argument", std::to_string(words_.size()), "--help");
    }
    return words_[0];
  }

  template <typename Number>
  static Number parse(const std::string& text, const std::string& name) {
    Number number{};
    const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (code != std::errc() || end != text.data() + text.size() || number < 0) {
      throw Error(name, "a whole number of 0 or more", "\"" + text + "\"");
    }
    return number;
  }

 private:
  std::vector<std::string> words_;
};

struct CommonOptions {
  Options bundle;
  std::string onnxruntime;

  explicit CommonOptions(Arguments& arguments) {
    bundle.cuda = arguments.flag("--cuda");
    arguments.option("--threads", bundle.threads);
    arguments.option("--ort", onnxruntime);
  }
};

inline constexpr const char* kCommonHelp =
    "  --ort PATH      ONNX Runtime's library; else LORAPORT_ORT, else the system's\n"
    "  --cuda          run on the GPU\n"
    "  --threads N     inside operators\n"
    "  --help          this text\n";

// Runs a program's body and turns what it throws into one message and an exit code.
template <typename Body>
int run_program(const char* name, int argc, char** argv, Body body) {
  try {
    return body(Arguments(argc, argv));
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s: error: %s\n", name, error.what());
    return kRefused;
  }
}

}  // namespace loraport
