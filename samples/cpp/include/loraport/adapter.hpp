// An adapter's tensors, ready to be fed to a model's slots; and blends of several.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "loraport/error.hpp"
#include "loraport/manifest.hpp"
#include "loraport/tensor.hpp"

namespace loraport {

// Refuses tensors that find no slot, do not fit theirs, or are not finite.
inline void require_fit(const Tensors& tensors, const std::vector<Slot>& slots,
                        const std::string& name) {
  Problems problems;
  std::size_t claimed = 0;
  for (const Slot& slot : slots) {
    const auto a = tensors.find(slot.input_a), b = tensors.find(slot.input_b);
    claimed += static_cast<std::size_t>(a != tensors.end()) + (b != tensors.end());
    if (a == tensors.end() && b == tensors.end()) continue;
    if (a == tensors.end() || b == tensors.end()) {
      problems.add(slot.name, "both lora_A and lora_B", "one of them");
      continue;
    }
    const Shape &shape_a = a->second.shape, &shape_b = b->second.shape;
    if (shape_a.size() != 2 || shape_b.size() != 2 || shape_a[0] != slot.in_features ||
        shape_b[1] != slot.out_features || shape_a[1] != shape_b[0] || shape_a[1] < 1) {
      const std::string in = std::to_string(slot.in_features);
      const std::string out = std::to_string(slot.out_features);
      problems.add(slot.name, "[" + in + ", r] and [r, " + out + "]",
                   to_string(shape_a) + " and " + to_string(shape_b));
    }
    for (const auto& found : {a, b}) {
      const ElementType& type = element_type(found->second.type, found->first);
      if (type.manifest != slot.dtype) {
        problems.add(found->first, slot.dtype, std::string(type.manifest));
      }
    }
  }
  if (claimed != tensors.size()) {
    problems.add("its tensors", "slots of this bundle for all " + std::to_string(tensors.size()),
                 "slots for " + std::to_string(claimed),
                 "this program takes LoRA on linear layers alone");
  }
  problems.raise_if_any(name + " does not fit this bundle's base");
  for (const auto& [tensor_name, tensor] : tensors) {
    tensor.require_finite(name + ": " + tensor_name);
  }
}

// strength * B, rounded once to B's own type.
inline void scale(Tensor& b, float strength) {
  const auto each = [&](auto sample, auto to_float) {
    for (std::size_t at = 0; at < b.bytes.size(); at += sizeof sample) {
      std::memcpy(&sample, b.bytes.data() + at, sizeof sample);
      sample = decltype(sample)(to_float(sample) * strength);
      std::memcpy(b.bytes.data() + at, &sample, sizeof sample);
    }
  };
  if (b.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    each(float{}, [](float value) { return value; });
  } else if (b.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
    each(Ort::Float16_t{}, [](Ort::Float16_t value) { return value.ToFloat(); });
  } else if (b.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16) {
    each(Ort::BFloat16_t{}, [](Ort::BFloat16_t value) { return value.ToFloat(); });
  } else if (b.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE) {
    each(double{}, [](double value) { return value; });
  } else {
    throw Error("blend", "adapters of a floating-point type", "another element type");
  }
}

// Joins [n, r1] and [n, r2] to [n, r1 + r2].
inline Tensor concatenate_columns(const Tensor& left, const Tensor& right) {
  Tensor result{left.type, {left.shape[0], left.shape[1] + right.shape[1]}, {}};
  result.bytes.reserve(left.bytes.size() + right.bytes.size());
  const auto rows = static_cast<std::ptrdiff_t>(left.shape[0]);
  for (std::ptrdiff_t row = 0; row < rows; ++row) {
    for (const Tensor* part : {&left, &right}) {
      const auto width = static_cast<std::ptrdiff_t>(part->bytes.size()) / rows;
      const auto start = part->bytes.begin() + row * width;
      result.bytes.insert(result.bytes.end(), start, start + width);
    }
  }
  return result;
}

// Immutable once made: any number of threads may run with the same adapter.
class Adapter {
 public:
  static std::shared_ptr<const Adapter> make(Tensors tensors, const std::vector<Slot>& slots,
                                             const std::string& name) {
    require_fit(tensors, slots, name);
    return std::shared_ptr<const Adapter>(new Adapter(std::move(tensors)));
  }

  // The exact weighted sum of several adapters: A side by side, strength * B one below another.
  // Ranks may differ, and a slot may be in some adapters only.
  static std::shared_ptr<const Adapter> blend(
      const std::vector<std::pair<std::shared_ptr<const Adapter>, float>>& parts,
      const std::vector<Slot>& slots) {
    Tensors blended;
    for (const auto& [adapter, strength] : parts) {
      if (!std::isfinite(strength)) throw Error("strength", "a finite number", "another");
      for (const Slot& slot : slots) {
        const auto a = adapter->tensors_.find(slot.input_a);
        if (a == adapter->tensors_.end()) continue;
        Tensor b = adapter->tensors_.at(slot.input_b);
        scale(b, strength);
        const auto before = blended.find(slot.input_a);
        if (before == blended.end()) {
          blended[slot.input_a] = a->second;
          blended[slot.input_b] = std::move(b);
          continue;
        }
        before->second = concatenate_columns(before->second, a->second);
        Tensor& sum = blended.at(slot.input_b);
        sum.shape[0] += b.shape[0];
        sum.bytes.insert(sum.bytes.end(), b.bytes.begin(), b.bytes.end());
      }
    }
    for (const auto& [name, tensor] : blended) tensor.require_finite("blend: " + name);
    return std::shared_ptr<const Adapter>(new Adapter(std::move(blended)));
  }

  const Tensors& tensors() const { return tensors_; }

 private:
  explicit Adapter(Tensors tensors) : tensors_(std::move(tensors)) {}

  Tensors tensors_;
};

}  // namespace loraport
