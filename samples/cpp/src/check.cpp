// loraport-check: replay a bundle's golden cases on this machine.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "loraport/bundle.hpp"
#include "loraport/lane.hpp"
#include "loraport/onnxruntime_library.hpp"

namespace {

using namespace loraport;

struct Golden {
  Tensors inputs;
  Tensors outputs;
};

Golden read_golden(const Bundle& bundle, const GoldenCase& entry) {
  Golden golden;
  for (auto& [name, tensor] : bundle.read_tensors(entry.file)) {
    tensor.require_finite(entry.file + ": " + name);
    if (name.rfind("input.", 0) == 0) golden.inputs[name.substr(6)] = tensor;
    if (name.rfind("output.", 0) == 0) golden.outputs[name.substr(7)] = tensor;
  }
  const auto& known = bundle.output_names();
  if (golden.outputs.empty()) throw Error(entry.file, "outputs", "none");
  for (const auto& [name, tensor] : golden.outputs) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw Error(entry.file, "outputs of the model", "\"" + name + "\"");
    }
  }
  return golden;
}

// Without a case of its own an adapter would be shipped unproved.
void require_cases(const Manifest& manifest) {
  Problems problems;
  const auto has = [&](const Strengths& wanted) {
    for (const auto& [name, entry] : manifest.golden) {
      if (entry.adapters == wanted) return true;
    }
    return false;
  };
  if (!has({})) problems.add("the base", "a golden case", "none");
  for (const auto& [name, files] : manifest.adapters) {
    if (!has({{name, 1.0F}})) problems.add("adapter " + name, "a golden case", "none");
  }
  problems.raise_if_any("the bundle cannot prove itself");
}

// The largest difference; infinite for another shape or anything that is no finite number.
double difference(const Tensor& expected, const Ort::Value& value, const std::string& name) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  if (info.GetShape() != expected.shape || expected.count() == 0) return HUGE_VAL;
  const auto type = info.GetElementType();
  element_type(type, name);
  const auto* got = static_cast<const std::byte*>(value.GetTensorRawData());
  double largest = 0;
  for (std::size_t i = 0, n = expected.count(); i < n; ++i) {
    const double found = element(type, got, i);
    if (!std::isfinite(found)) return HUGE_VAL;
    largest = std::max(largest,
                       std::abs(found - element(expected.type, expected.bytes.data(), i)));
  }
  return largest;
}

class Replay {
 public:
  explicit Replay(const Bundle& bundle) : bundle_(bundle), lane_(bundle) {}

  template <typename AdapterPointer>
  void run(const std::string& label, const Golden& golden, const AdapterPointer& adapter) {
    lane_.set_adapter(adapter);
    Values inputs;
    for (const auto& [name, tensor] : golden.inputs) inputs.emplace(name, tensor.view());
    std::vector<std::string> names;
    for (const auto& [name, tensor] : golden.outputs) names.push_back(name);
    const Values outputs = lane_.run(inputs, names);
    double largest = 0;
    for (const auto& [name, tensor] : golden.outputs) {
      largest = std::max(largest, difference(tensor, outputs.at(name), name));
    }
    const double tolerance = bundle_.manifest().tolerance;
    const bool passed = largest <= tolerance;
    std::printf("%-6s %-32s largest difference %.3g, allowed %.3g\n", passed ? "ok" : "FAILED",
                label.c_str(), largest, tolerance);
    passed_ = passed_ && passed;
  }

  bool passed() const { return passed_; }

 private:
  const Bundle& bundle_;
  Lane lane_;
  bool passed_ = true;
};

int check(Arguments arguments) {
  if (arguments.flag("--help")) {
    std::printf("Usage: loraport-check BUNDLE [options]\n\n"
                "Checks a bundle's files and replays its golden cases.\n"
                "Exit codes: 0 passed, 1 outputs differ, 2 the bundle is refused.\n\n%s",
                kCommonHelp);
    return kDone;
  }
  const CommonOptions options(arguments);
  const std::string directory = arguments.positional("BUNDLE");
  load_onnxruntime(options.onnxruntime);
  const Bundle bundle(directory, options.bundle);
  const Manifest& manifest = bundle.manifest();
  require_cases(manifest);

  Replay replay(bundle);
  for (const auto& [name, entry] : manifest.golden) {
    const Golden golden = read_golden(bundle, entry);
    if (entry.adapters.empty()) {
      replay.run(name, golden, nullptr);
    } else {
      replay.run(name, golden, bundle.blend(entry.adapters));
    }
    // The same adapter through ONNX Runtime's own format and functions.
    if (entry.adapters.size() == 1 && entry.adapters.begin()->second == 1.0F) {
      replay.run(name + " (.onnx_adapter)", golden,
                 bundle.onnx_adapter(entry.adapters.begin()->first));
    }
  }
  // An adapter must leave nothing behind.
  for (const auto& [name, entry] : manifest.golden) {
    if (entry.adapters.empty()) replay.run(name + " again", read_golden(bundle, entry), nullptr);
  }
  return replay.passed() ? kDone : kMismatch;
}

}  // namespace

int main(int argc, char** argv) { return loraport::run_program("loraport-check", argc, argv, check); }
