// A bundle: its files checked, its model opened, its adapters read.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "loraport/adapter.hpp"
#include "loraport/error.hpp"
#include "loraport/manifest.hpp"
#include "loraport/tensor.hpp"

namespace loraport {

struct Options {
  bool cuda = false;
  int threads = 0;          // inside operators; 0 leaves it to ONNX Runtime
  bool check_files = true;  // compare every file with its hash first
};

// What ONNX Runtime says, without the stack traces that may follow.
inline std::string first_line(const Ort::Exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

// A checked bundle and its session. Constant: share it between threads.
class Bundle {
 public:
  explicit Bundle(std::filesystem::path directory, const Options& options = {})
      : directory_(std::move(directory)), manifest_(read_manifest(directory_)), cuda_(options.cuda) {
    if (options.check_files) check_files(manifest_, directory_);
    Ort::SessionOptions session_options;
    if (options.threads > 0) session_options.SetIntraOpNumThreads(options.threads);
    if (cuda_) append_cuda(session_options);
    const std::filesystem::path model = path(manifest_.model);
    try {
      session_ = Ort::Session(environment_, model.c_str(), session_options);
    } catch (const Ort::Exception& error) {
      throw Error(manifest_.model, "a model ONNX Runtime can open", first_line(error));
    }
    input_names_ = session_.GetInputNames();
    output_names_ = session_.GetOutputNames();
  }

  const Manifest& manifest() const { return manifest_; }
  // ONNX Runtime's sessions may run in several threads, though its C++ class says so nowhere.
  Ort::Session& session() const { return session_; }
  bool cuda() const { return cuda_; }
  // Of the model itself, without the slots.
  const std::vector<std::string>& input_names() const { return input_names_; }
  const std::vector<std::string>& output_names() const { return output_names_; }

  // `file` is a path inside the bundle, as the manifest gives it.
  std::filesystem::path path(const std::string& file) const {
    return directory_ / std::filesystem::u8path(file);
  }

  Tensors read_tensors(const std::string& file) const { return read_safetensors(path(file), file); }

  std::shared_ptr<const Adapter> adapter(const std::string& name) const {
    const std::string& file = manifest_.adapter(name).safetensors;
    return Adapter::make(read_tensors(file), manifest_.slots, file);
  }

  std::shared_ptr<const Adapter> blend(const Strengths& strengths) const {
    std::vector<std::pair<std::shared_ptr<const Adapter>, float>> parts;
    for (const auto& [name, strength] : strengths) parts.emplace_back(adapter(name), strength);
    return Adapter::blend(parts, manifest_.slots);
  }

  // The adapter as ONNX Runtime's own object, from the .onnx_adapter file. It is read into memory,
  // not mapped: a file that changes under a running program does no harm.
  std::shared_ptr<const Ort::LoraAdapter> onnx_adapter(const std::string& name) const {
    const std::string& file = manifest_.adapter(name).onnx_adapter;
    const std::vector<std::byte> bytes = read_file(path(file), file, std::uint64_t{4} << 30);
    try {
      return std::make_shared<const Ort::LoraAdapter>(
          Ort::LoraAdapter::CreateLoraAdapterFromArray(bytes.data(), bytes.size(), nullptr));
    } catch (const Ort::Exception& error) {
      throw Error(file, "an .onnx_adapter file", first_line(error), "fetch it again");
    }
  }

 private:
  static void append_cuda(Ort::SessionOptions& options) {
    try {
      Ort::CUDAProviderOptions cuda;
      cuda.Update({{"use_tf32", "0"}});  // TF32 has 10-bit mantissas: golden values would differ
      options.AppendExecutionProvider_CUDA_V2(*cuda);
    } catch (const Ort::Exception& error) {
      throw Error("--cuda", "ONNX Runtime's CUDA provider", first_line(error),
                  "use the GPU release, with CUDA and cuDNN where the loader finds them");
    }
  }

  std::filesystem::path directory_;
  Manifest manifest_;
  bool cuda_;
  // Every failure also comes as an exception; the log would say it twice, and at its usual level
  // it warns of each overridable initializer, which slots are on purpose.
  Ort::Env environment_{ORT_LOGGING_LEVEL_FATAL, "loraport"};
  mutable Ort::Session session_{nullptr};
  std::vector<std::string> input_names_;
  std::vector<std::string> output_names_;
};

}  // namespace loraport
