// Text in and out with a bundle's tokenizer, by ONNX Runtime GenAI's library (0.18 or newer).
//
// Only its tokenizer is used; the model runs in ONNX Runtime itself. The library is loaded while
// the program runs, so a product without text needs neither it nor its headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "loraport/error.hpp"
#include "loraport/onnxruntime_library.hpp"

namespace loraport {

class Tokenizer {
 public:
  // `library`: path of libonnxruntime-genai.so. It finds ONNX Runtime beside itself or by the
  // environment's ORT_LIB_PATH.
  Tokenizer(const std::string& library, const std::filesystem::path& bundle)
      : library_(library, "--genai") {
    check(call<Result*(const char*, void**)>("OgaCreateTokenizerFromPath")(
        bundle.u8string().c_str(), &tokenizer_));
    check(call<Result*(const void*, void**)>("OgaCreateTokenizerStream")(tokenizer_, &stream_));
  }

  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  ~Tokenizer() {
    if (stream_ != nullptr) call<void(void*)>("OgaDestroyTokenizerStream")(stream_);
    if (tokenizer_ != nullptr) call<void(void*)>("OgaDestroyTokenizer")(tokenizer_);
  }

  // What the user says, in the model's chat template.
  std::string chat(const std::string& prompt) const {
    const std::string messages = R"([{"role": "user", "content": )" + quoted(prompt) + "}]";
    const char* text = nullptr;
    check(call<Result*(const void*, const char*, const char*, const char*, bool, const char**)>(
        "OgaTokenizerApplyChatTemplate")(tokenizer_, nullptr, messages.c_str(), nullptr, true,
                                         &text));
    const std::string result = text;
    call<void(const char*)>("OgaDestroyString")(text);
    return result;
  }

  std::vector<std::int64_t> encode(const std::string& text) const {
    void* sequences = nullptr;
    check(call<Result*(void**)>("OgaCreateSequences")(&sequences));
    const std::unique_ptr<void, void (*)(void*)> owner(
        sequences, call<void(void*)>("OgaDestroySequences"));
    check(call<Result*(const void*, const char*, void*)>("OgaTokenizerEncode")(
        tokenizer_, text.c_str(), sequences));
    const std::size_t count =
        call<std::size_t(const void*, std::size_t)>("OgaSequencesGetSequenceCount")(sequences, 0);
    const std::int32_t* data = call<const std::int32_t*(const void*, std::size_t)>(
        "OgaSequencesGetSequenceData")(sequences, 0);
    return {data, data + count};
  }

  // The text that one more token completes; empty while a character is incomplete.
  std::string decode(std::int64_t token) {
    const char* text = nullptr;  // belongs to the stream
    check(call<Result*(void*, std::int32_t, const char**)>("OgaTokenizerStreamDecode")(
        stream_, static_cast<std::int32_t>(token), &text));
    return text;
  }

 private:
  struct Result;

  template <typename Function>
  Function* call(const char* name) const {
    return library_.function<Function>(name);
  }

  void check(Result* result) const {
    if (result == nullptr) return;
    const std::string reason = call<const char*(const Result*)>("OgaResultGetError")(result);
    call<void(Result*)>("OgaDestroyResult")(result);
    throw Error("tokenizer", "to be usable by ONNX Runtime GenAI", reason);
  }

  static std::string quoted(const std::string& text) {
    std::string result = "\"";
    for (const char c : text) {
      if (c == '"' || c == '\\') {
        result += std::string("\\") + c;
      } else if (static_cast<unsigned char>(c) < 0x20) {
        constexpr const char* kDigits = "0123456789abcdef";
        result += std::string("\\u00") + kDigits[c >> 4] + kDigits[c & 15];
      } else {
        result += c;
      }
    }
    return result + "\"";
  }

  SharedLibrary library_;
  void* tokenizer_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace loraport
