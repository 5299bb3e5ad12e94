// loraport-generate: continue a prompt with any of a bundle's adapters, greedily.

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <locale>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "loraport/bundle.hpp"
#include "loraport/decoder.hpp"
#include "loraport/lane.hpp"
#include "loraport/onnxruntime_library.hpp"
#include "loraport/text.hpp"

namespace {

using namespace loraport;

constexpr const char* kHelp =
    "Usage: loraport-generate BUNDLE --tokens 1,2,3 [options]\n"
    "       loraport-generate BUNDLE --prompt TEXT --genai PATH [options]\n\n"
    "Continues a prompt with the likeliest tokens and prints their ids, or text for text.\n\n"
    "  --tokens IDS    the prompt as token ids\n"
    "  --prompt TEXT   the prompt as text, put into the model's chat template\n"
    "  --raw           no chat template\n"
    "  --genai PATH    ONNX Runtime GenAI's library, for its tokenizer\n"
    "  --adapter NAME[=STRENGTH]   may be given several times; else the base\n"
    "  --max-new-tokens N          128 unless told\n";

Strengths take_adapters(Arguments& arguments) {
  Strengths strengths;
  for (std::string text; arguments.option("--adapter", text);) {
    const std::size_t sign = text.find('=');
    float strength = 1;
    if (sign != text.npos) {
      std::istringstream number(text.substr(sign + 1));
      number.imbue(std::locale::classic());
      if (!(number >> strength) || !number.eof() || !std::isfinite(strength)) {
        throw Error("--adapter", "NAME or NAME=STRENGTH", "\"" + text + "\"");
      }
    }
    if (!strengths.emplace(text.substr(0, sign), strength).second) {
      throw Error("--adapter", "each adapter once", "\"" + text + "\" twice");
    }
  }
  return strengths;
}

std::vector<Decoder::Token> split(const std::string& text) {
  std::vector<Decoder::Token> tokens;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    tokens.push_back(Arguments::parse<Decoder::Token>(word, "--tokens"));
  }
  return tokens;
}

int generate(Arguments arguments) {
  if (arguments.flag("--help")) {
    std::printf("%s%s", kHelp, kCommonHelp);
    return kDone;
  }
  const CommonOptions options(arguments);
  const Strengths strengths = take_adapters(arguments);
  std::string token_text, prompt, genai;
  std::size_t limit = 128;
  const bool has_tokens = arguments.option("--tokens", token_text);
  const bool has_prompt = arguments.option("--prompt", prompt);
  const bool raw = arguments.flag("--raw");
  arguments.option("--genai", genai);
  arguments.option("--max-new-tokens", limit);
  const std::string directory = arguments.positional("BUNDLE");
  if (has_tokens == has_prompt) {
    throw Error("prompt", "either --tokens or --prompt", has_tokens ? "both" : "neither");
  }
  if (has_prompt && genai.empty()) throw Error("--prompt", "--genai with it", "none");

  load_onnxruntime(options.onnxruntime);
  const Bundle bundle(directory, options.bundle);
  const Decoder decoder(bundle);
  std::unique_ptr<Tokenizer> tokenizer;
  std::vector<Decoder::Token> tokens;
  if (has_prompt) {
    tokenizer = std::make_unique<Tokenizer>(genai, directory);
    tokens = tokenizer->encode(raw ? prompt : tokenizer->chat(prompt));
  } else {
    tokens = split(token_text);
  }

  Lane lane(bundle);
  if (!strengths.empty()) lane.set_adapter(bundle.blend(strengths));
  std::size_t made = 0;
  const auto start = std::chrono::steady_clock::now();
  decoder.generate(lane, tokens, limit, [&](Decoder::Token token) {
    if (tokenizer != nullptr) {
      std::fputs(tokenizer->decode(token).c_str(), stdout);
    } else {
      std::printf("%s%lld", made == 0 ? "" : ",", static_cast<long long>(token));
    }
    std::fflush(stdout);
    ++made;
    return true;
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("\n");
  std::fprintf(stderr, "%zu tokens, %.1f tokens/s\n", made,
               static_cast<double>(made) / seconds.count());
  return kDone;
}

}  // namespace

int main(int argc, char** argv) {
  return loraport::run_program("loraport-generate", argc, argv, generate);
}
