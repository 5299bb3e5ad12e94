// Greedy decoding with the KV cache of a decoder language model.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "loraport/bundle.hpp"
#include "loraport/error.hpp"
#include "loraport/json.hpp"
#include "loraport/lane.hpp"
#include "loraport/tensor.hpp"

namespace loraport {

inline constexpr const char* kDecoderConfig = "genai_config.json";

// One pair of cache tensors: what a step gives is what the next one takes.
struct CacheName {
  std::string past;     // input
  std::string present;  // output
};

class Decoder {
 public:
  using Token = std::int64_t;

  explicit Decoder(const Bundle& bundle) : bundle_(bundle) {
    if (bundle.manifest().files.count(kDecoderConfig) == 0) {
      throw Error("bundle", std::string("a decoder language model with ") + kDecoderConfig,
                  "a bundle without it");
    }
    const auto file = read_file(bundle.path(kDecoderConfig), kDecoderConfig, 1 << 20);
    const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
    const Json document = Json::parse(text, kDecoderConfig);
    read(document.at("model", kDecoderConfig));
  }

  // Calls `on_token` with each new token; it returns false to stop. Ends before a stop token,
  // after `limit` tokens, or when the context is full. The lane's adapter stays as it is. Where a
  // longer text is rotated by other factors, the cache is computed anew once it is as long.
  void generate(Lane& lane, const std::vector<Token>& prompt, std::size_t limit,
                const std::function<bool(Token)>& on_token) const {
    require_prompt(prompt);
    std::vector<std::string> present;
    for (const CacheName& name : cache_) present.push_back(name.present);
    Values cache = empty_cache();
    std::vector<Token> text = prompt, step = prompt;
    std::size_t length = 0;  // tokens in the cache
    const std::uint64_t border = bundle_.manifest().long_rotations_after;
    limit = std::min(limit, context_length_ - prompt.size());
    for (std::size_t made = 0; made < limit; ++made) {
      const std::vector<Token> mask(length + step.size(), 1);
      std::vector<Token> positions(step.size());
      std::iota(positions.begin(), positions.end(), static_cast<Token>(length));
      Values inputs = std::move(cache);
      add(inputs, "input_ids", step);
      add(inputs, "attention_mask", mask);
      add(inputs, "position_ids", positions);
      Values outputs = lane.run(inputs, {logits_}, present);
      const Token token = likeliest(outputs.at(logits_));
      if (std::find(stop_.begin(), stop_.end(), token) != stop_.end() || !on_token(token)) return;
      length = text.size();
      text.push_back(token);
      if (length == border) {
        cache = empty_cache();
        length = 0;
        step = text;
        continue;
      }
      step = {token};
      cache.clear();
      for (const CacheName& name : cache_) {
        cache.emplace(name.past, std::move(outputs.at(name.present)));
      }
    }
  }

 private:
  void read(const Json& model) {
    const Json& decoder = model.at("decoder", "model");
    const Json& inputs = decoder.at("inputs", "decoder");
    const Json& outputs = decoder.at("outputs", "decoder");
    heads_ = static_cast<std::int64_t>(count(decoder, "num_key_value_heads"));
    head_size_ = static_cast<std::int64_t>(count(decoder, "head_size"));
    context_length_ = static_cast<std::size_t>(count(model, "context_length"));
    vocabulary_ = static_cast<Token>(count(model, "vocab_size"));
    logits_ = outputs.at("logits", "outputs").string("logits");
    const Json& stop = model.at("eos_token_id", "model");
    const Json::Array stops = stop.is_array() ? stop.array("eos_token_id") : Json::Array{stop};
    for (const Json& id : stops) stop_.push_back(static_cast<Token>(id.whole("eos_token_id")));
    for (std::uint64_t layer = 0; layer < count(decoder, "num_hidden_layers"); ++layer) {
      for (const std::string kind : {"key", "value"}) {
        CacheName name{layer_name(inputs, "past_" + kind + "_names", layer),
                       layer_name(outputs, "present_" + kind + "_names", layer)};
        if (has_input(name.past)) cache_.push_back(std::move(name));
      }
    }
  }

  static std::uint64_t count(const Json& object, const std::string& key) {
    const std::uint64_t value = object.at(key, kDecoderConfig).whole(key);
    constexpr std::uint64_t kLargest = 1 << 30;
    if (value == 0 || value > kLargest) throw Error(key, "a count", std::to_string(value));
    return value;
  }

  // The name for a layer of a pattern such as "present.%d.key".
  static std::string layer_name(const Json& names, const std::string& key, std::uint64_t layer) {
    std::string pattern = names.at(key, kDecoderConfig).string(key);
    const std::size_t place = pattern.find("%d");
    if (place == pattern.npos) throw Error(key, "a name with %d", "\"" + pattern + "\"");
    return pattern.replace(place, 2, std::to_string(layer));
  }

  bool has_input(const std::string& name) const {
    const std::vector<std::string>& names = bundle_.input_names();
    return std::find(names.begin(), names.end(), name) != names.end();
  }

  void require_prompt(const std::vector<Token>& prompt) const {
    if (prompt.empty() || prompt.size() >= context_length_) {
      throw Error("prompt", "1 to " + std::to_string(context_length_ - 1) + " tokens",
                  std::to_string(prompt.size()));
    }
    for (const Token token : prompt) {
      if (token < 0 || token >= vocabulary_) {
        throw Error("prompt", "tokens from 0 to " + std::to_string(vocabulary_ - 1),
                    std::to_string(token));
      }
    }
  }

  Values empty_cache() const {
    Values cache;
    for (const CacheName& name : cache_) cache.emplace(name.past, empty_cache(name.past));
    return cache;
  }

  // A part of it that holds no tokens yet, of the type that the model wants.
  Ort::Value empty_cache(const std::string& name) const {
    const std::vector<std::string>& names = bundle_.input_names();
    const auto index =
        static_cast<std::size_t>(std::find(names.begin(), names.end(), name) - names.begin());
    const auto info = bundle_.session().GetInputTypeInfo(index);
    const Shape shape = {1, heads_, 0, head_size_};
    Ort::AllocatorWithDefaultOptions allocator;
    return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(),
                                    info.GetTensorTypeAndShapeInfo().GetElementType());
  }

  // Adds tokens [1, n] under a name that the model has. The tokens must outlive the value.
  void add(Values& inputs, const std::string& name, const std::vector<Token>& tokens) const {
    if (!has_input(name)) return;
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    const Shape shape = {1, static_cast<std::int64_t>(tokens.size())};
    // ONNX Runtime's views of inputs are not const, but it only reads them.
    inputs.emplace(name, Ort::Value::CreateTensor<Token>(memory, const_cast<Token*>(tokens.data()),
                                                         tokens.size(), shape.data(), 2));
  }

  // The token with the largest logit after the last position of [1, n, vocabulary].
  Token likeliest(const Ort::Value& logits) const {
    const auto info = logits.GetTensorTypeAndShapeInfo();
    const Shape shape = info.GetShape();
    const auto type = info.GetElementType();
    if (shape.size() != 3 || shape[0] != 1 || shape[1] < 1 || shape[2] < 1) {
      throw Error(logits_, "a shape [1, n, vocabulary]", to_string(shape));
    }
    element_type(type, logits_);
    const auto* data = static_cast<const std::byte*>(logits.GetTensorRawData());
    const auto width = static_cast<std::size_t>(shape[2]);
    const std::size_t start = width * static_cast<std::size_t>(shape[1] - 1);
    std::size_t best = 0;
    double largest = -std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < width; ++i) {
      const double logit = element(type, data, start + i);
      if (std::isnan(logit)) throw Error(logits_, "numbers", "NaN");
      if (logit > largest) largest = logit, best = i;
    }
    return static_cast<Token>(best);
  }

  const Bundle& bundle_;
  std::vector<CacheName> cache_;
  std::vector<Token> stop_;
  std::string logits_;
  std::int64_t heads_ = 0;
  std::int64_t head_size_ = 0;
  std::size_t context_length_ = 0;
  Token vocabulary_ = 0;
};

}  // namespace loraport
