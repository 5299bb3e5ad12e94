// loraport-check: replay a bundle's golden cases on this machine.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "loraport/bundle.hpp"
#include "loraport/lane.hpp"
#include "loraport/onnxruntime_library.hpp"

namespace {

using namespace loraport;

// All outputs one after the other, in the order of their names.
using Numbers = std::vector<double>;

struct Golden {
  Strengths adapters;
  Tensors inputs;
  Tensors outputs;
  Numbers expected;
};

Golden read_golden(const Bundle& bundle, const GoldenCase& entry) {
  Golden golden;
  golden.adapters = entry.adapters;
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
    for (std::size_t i = 0, n = tensor.count(); i < n; ++i) {
      golden.expected.push_back(element(tensor.type, tensor.bytes.data(), i));
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

// The values of a run; none where one has another shape or is no finite number.
Numbers numbers_of(const Values& outputs, const Golden& golden) {
  Numbers found;
  for (const auto& [name, tensor] : golden.outputs) {
    const auto& value = outputs.at(name);
    const auto info = value.GetTensorTypeAndShapeInfo();
    if (info.GetShape() != tensor.shape) return {};
    const auto type = info.GetElementType();
    element_type(type, name);
    const auto* got = static_cast<const std::byte*>(value.GetTensorRawData());
    for (std::size_t i = 0, n = tensor.count(); i < n; ++i) {
      found.push_back(element(type, got, i));
      if (!std::isfinite(found.back())) return {};
    }
  }
  return found;
}

double largest_difference(const Numbers& here, const Numbers& expected) {
  if (here.size() != expected.size() || here.empty()) return HUGE_VAL;
  double largest = 0;
  for (std::size_t i = 0; i < here.size(); ++i) {
    largest = std::max(largest, std::abs(here[i] - expected[i]));
  }
  return largest;
}

// The product of two changes: of a from a0, and of b from b0.
double product(const Numbers& a, const Numbers& a0, const Numbers& b, const Numbers& b0) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - a0[i]) * (b[i] - b0[i]);
  return sum;
}

// The cosine of their angle; 0 where one is nothing, 1 where both are.
double cosine(const Numbers& a, const Numbers& a0, const Numbers& b, const Numbers& b0) {
  const double first = product(a, a0, a, a0);
  const double second = product(b, b0, b, b0);
  if (first == 0 && second == 0) return 1;
  const double both = product(a, a0, b, b0);
  return both == 0 ? 0 : both / std::sqrt(first * second);
}

class Replay {
 public:
  Replay(const Bundle& bundle, const std::map<std::string, Golden>& cases)
      : bundle_(bundle), cases_(cases), lane_(bundle) {
    for (const auto& [name, golden] : cases) {
      if (golden.adapters.empty()) base_ = &golden;
    }
    own_base_ = outputs_of(*base_, nullptr);
  }

  template <typename AdapterPointer>
  void run(const std::string& label, const Golden& golden, const AdapterPointer& adapter) {
    const Numbers here = outputs_of(golden, adapter);
    const double largest = largest_difference(here, golden.expected);
    const double tolerance = bundle_.manifest().tolerance;
    const bool near = largest <= tolerance;
    const bool changed = !near || golden.adapters.empty() || changes_the_base(golden, here);
    const bool passed = near && changed;
    std::printf("%-6s %-32s largest difference %.3g, allowed %.3g%s\n", passed ? "ok" : "FAILED",
                label.c_str(), largest, tolerance,
                changed ? "" : "; changes the base otherwise than its golden outputs do");
    passed_ = passed_ && passed;
  }

  bool passed() const { return passed_; }

 private:
  template <typename AdapterPointer>
  Numbers outputs_of(const Golden& golden, const AdapterPointer& adapter) {
    lane_.set_adapter(adapter);
    Values inputs;
    for (const auto& [name, tensor] : golden.inputs) inputs.emplace(name, tensor.view());
    std::vector<std::string> names;
    for (const auto& [name, tensor] : golden.outputs) names.push_back(name);
    return numbers_of(lane_.run(inputs, names), golden);
  }

  // Whether outputs lie from this runtime's base as the golden ones lie from theirs, and not as
  // another adapter's do: the proof of a swap where the tolerance is as wide as its effect.
  bool changes_the_base(const Golden& golden, const Numbers& here) const {
    const Numbers& base = base_->expected;
    if (own_base_.size() != here.size() || base.size() != here.size()) return false;
    const auto along = [&](const Golden& other) {
      return other.expected.size() == here.size()
                 ? cosine(here, own_base_, other.expected, base)
                 : -1.0;
    };
    const double direction = along(golden);
    const double effect = product(golden.expected, base, golden.expected, base);
    // The change is between two runs, each with its own rounding; squares here.
    if (effect <= 4 * product(own_base_, base, own_base_, base)) return direction != 0;
    if (direction <= 0) return false;
    // A blend lies between its adapters, so it is not asked to be told from them.
    if (golden.adapters.size() != 1) return true;
    return std::all_of(cases_.begin(), cases_.end(), [&](const auto& entry) {
      return entry.second.adapters.size() != 1 || along(entry.second) <= direction;
    });
  }

  const Bundle& bundle_;
  const std::map<std::string, Golden>& cases_;
  Lane lane_;
  const Golden* base_ = nullptr;
  Numbers own_base_;
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

  std::map<std::string, Golden> cases;
  for (const auto& [name, entry] : manifest.golden) cases[name] = read_golden(bundle, entry);
  Replay replay(bundle, cases);
  for (const auto& [name, golden] : cases) {
    if (golden.adapters.empty()) {
      replay.run(name, golden, nullptr);
    } else {
      replay.run(name, golden, bundle.blend(golden.adapters));
    }
    // The same adapter through ONNX Runtime's own format and functions.
    if (golden.adapters.size() == 1 && golden.adapters.begin()->second == 1.0F) {
      replay.run(name + " (.onnx_adapter)", golden,
                 bundle.onnx_adapter(golden.adapters.begin()->first));
    }
  }
  // An adapter must leave nothing behind.
  for (const auto& [name, golden] : cases) {
    if (golden.adapters.empty()) replay.run(name + " again", golden, nullptr);
  }
  return replay.passed() ? kDone : kMismatch;
}

}  // namespace

int main(int argc, char** argv) { return loraport::run_program("loraport-check", argc, argv, check); }
