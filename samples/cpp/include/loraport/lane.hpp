// Running a bundle with one adapter after another, or a blend, without reloading anything.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "loraport/adapter.hpp"
#include "loraport/bundle.hpp"
#include "loraport/error.hpp"

namespace loraport {

using Values = std::map<std::string, Ort::Value>;

// For one thread at a time; any number of lanes may share a bundle, which must outlive them.
class Lane {
 public:
  explicit Lane(const Bundle& bundle) : bundle_(bundle), binding_(bundle.session()) {}

  // `adapter`: what to run with from now on, one or a blend; null for the base.
  void set_adapter(std::shared_ptr<const Adapter> adapter) {
    onnx_adapter_.reset();
    binding_.ClearBoundInputs();
    adapter_ = std::move(adapter);
    if (adapter_ == nullptr) return;
    for (const auto& [name, tensor] : adapter_->tensors()) {
      bind(name, tensor.view());  // on CUDA this copies to the device, once
    }
  }

  // The same through ONNX Runtime's own adapter functions.
  void set_adapter(std::shared_ptr<const Ort::LoraAdapter> adapter) {
    set_adapter(nullptr);
    onnx_adapter_ = std::move(adapter);
  }

  void set_adapter(std::nullptr_t) { set_adapter(std::shared_ptr<const Adapter>()); }

  // Runs once. `inputs`: every input of the model, without the slots. `on_device`: outputs that
  // may stay on the GPU, to be the inputs of a later run; the others are in ordinary memory.
  Values run(const Values& inputs, const std::vector<std::string>& outputs,
             const std::vector<std::string>& on_device = {}) {
    require_inputs(inputs);
    try {
      return onnx_adapter_ == nullptr ? run_bound(inputs, outputs, on_device)
                                      : run_with_onnx_adapter(inputs, outputs, on_device);
    } catch (const Ort::Exception& error) {
      throw Error("model", "to run with these inputs and adapters", first_line(error));
    }
  }

 private:
  void bind(const std::string& name, const Ort::Value& value) {
    try {
      binding_.BindInput(name.c_str(), value);
    } catch (const Ort::Exception& error) {
      throw Error("input " + name, "one the model takes", first_line(error));
    }
  }

  void require_inputs(const Values& inputs) const {
    const std::vector<std::string>& names = bundle_.input_names();
    Problems problems;
    for (const std::string& name : names) {
      if (inputs.count(name) == 0) problems.add("input " + name, "a tensor", "none");
    }
    for (const auto& [name, value] : inputs) {
      if (std::find(names.begin(), names.end(), name) == names.end()) {
        problems.add("input " + name, "one of the model's", "another");
      }
    }
    problems.raise_if_any("the model's inputs and those given differ");
  }

  Values run_bound(const Values& inputs, const std::vector<std::string>& outputs,
                   const std::vector<std::string>& on_device) {
    for (const auto& [name, value] : inputs) bind(name, value);
    const auto cpu = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    const auto device =
        bundle_.cuda() ? Ort::MemoryInfo("Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault)
                       : Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    binding_.ClearBoundOutputs();
    for (const std::string& name : outputs) binding_.BindOutput(name.c_str(), cpu);
    for (const std::string& name : on_device) binding_.BindOutput(name.c_str(), device);
    bundle_.session().Run(Ort::RunOptions(), binding_);
    return named(binding_.GetOutputValues(), outputs, on_device);
  }

  // Active adapters have no effect under IO binding, so these runs go without it.
  Values run_with_onnx_adapter(const Values& inputs, const std::vector<std::string>& outputs,
                               const std::vector<std::string>& on_device) {
    std::vector<const char*> input_names, output_names;
    std::vector<const OrtValue*> values;
    for (const auto& [name, value] : inputs) {
      input_names.push_back(name.c_str());
      values.push_back(value);
    }
    for (const auto* names : {&outputs, &on_device}) {
      for (const std::string& name : *names) output_names.push_back(name.c_str());
    }
    std::vector<Ort::Value> results;
    for (std::size_t i = 0; i < output_names.size(); ++i) results.emplace_back(nullptr);
    Ort::RunOptions options;
    options.AddActiveLoraAdapter(*onnx_adapter_);
    // Ort::Value is one pointer, and made to stand for OrtValue* in arrays.
    Ort::ThrowOnError(Ort::GetApi().Run(bundle_.session(), options, input_names.data(),
                                        values.data(), values.size(), output_names.data(),
                                        output_names.size(),
                                        reinterpret_cast<OrtValue**>(results.data())));
    return named(std::move(results), outputs, on_device);
  }

  static Values named(std::vector<Ort::Value> results, const std::vector<std::string>& outputs,
                      const std::vector<std::string>& on_device) {
    Values values;
    std::size_t index = 0;
    for (const auto* names : {&outputs, &on_device}) {
      for (const std::string& name : *names) values.emplace(name, std::move(results[index++]));
    }
    return values;
  }

  const Bundle& bundle_;
  std::shared_ptr<const Adapter> adapter_;  // kept alive: the binding only points at it
  std::shared_ptr<const Ort::LoraAdapter> onnx_adapter_;
  Ort::IoBinding binding_;
};

}  // namespace loraport
