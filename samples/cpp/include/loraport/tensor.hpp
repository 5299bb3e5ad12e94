// Tensors in ordinary memory, and the .safetensors files they come from.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "loraport/error.hpp"
#include "loraport/file.hpp"
#include "loraport/json.hpp"

namespace loraport {

struct ElementType {
  ONNXTensorElementDataType onnx;
  std::string_view safetensors;  // what .safetensors calls it
  std::string_view manifest;     // what manifest.json calls it
  std::size_t size;
};

inline constexpr ElementType kElementTypes[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "F32", "FLOAT", 4},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "F16", "FLOAT16", 2},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, "BF16", "BFLOAT16", 2},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, "F64", "DOUBLE", 8},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, "I64", "INT64", 8},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, "I32", "INT32", 4},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, "BOOL", "BOOL", 1},
};

inline const ElementType& element_type(ONNXTensorElementDataType wanted, const std::string& name) {
  for (const ElementType& type : kElementTypes) {
    if (type.onnx == wanted) return type;
  }
  throw Error(name, "a known element type", "ONNX type " + std::to_string(wanted));
}

using Shape = std::vector<std::int64_t>;

inline std::string to_string(const Shape& shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// One element as a number, whatever its type. Bytes need no alignment.
inline double element(ONNXTensorElementDataType type, const std::byte* data, std::size_t index) {
  const auto load = [&](auto value) {
    std::memcpy(&value, data + index * sizeof value, sizeof value);
    return value;
  };
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return load(float{});
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return load(Ort::Float16_t{}).ToFloat();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return load(Ort::BFloat16_t{}).ToFloat();
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return load(double{});
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return static_cast<double>(load(std::int64_t{}));
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return load(std::int32_t{});
    default: return load(std::uint8_t{});  // BOOL, the last of kElementTypes
  }
}

struct Tensor {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  Shape shape;
  std::vector<std::byte> bytes;

  std::size_t count() const {
    return std::accumulate(shape.begin(), shape.end(), std::size_t{1}, [](auto product, auto size) {
      return product * static_cast<std::size_t>(size);
    });
  }

  void require_finite(const std::string& name) const {
    for (std::size_t i = 0, n = count(); i < n; ++i) {
      const double value = element(type, bytes.data(), i);
      if (!std::isfinite(value)) {
        throw Error(name, "finite numbers", std::to_string(value) + " at " + std::to_string(i));
      }
    }
  }

  // A view of this tensor for ONNX Runtime; this tensor must outlive it.
  Ort::Value view() const {
    static std::byte nothing{};  // a tensor without elements has no memory of its own
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    // ONNX Runtime's views of inputs are not const, but it only reads them.
    void* data = bytes.empty() ? &nothing : const_cast<std::byte*>(bytes.data());
    return Ort::Value::CreateTensor(memory, data, bytes.size(), shape.data(), shape.size(), type);
  }
};

using Tensors = std::map<std::string, Tensor>;

// Reads one entry of a .safetensors header; every size is checked before memory is taken.
inline Tensor read_tensor(const Json& entry, const std::string& name,
                          const std::vector<std::byte>& file, std::size_t data_start) {
  const std::string& dtype = entry.at("dtype", name).string(name + ": dtype");
  const ElementType* type = nullptr;
  for (const ElementType& known : kElementTypes) {
    if (known.safetensors == dtype) type = &known;
  }
  if (type == nullptr) throw Error(name, "a known dtype", "\"" + dtype + "\"");
  const std::uint64_t room = file.size() - data_start;
  Tensor tensor;
  tensor.type = type->onnx;
  std::uint64_t size = type->size;
  bool fits = true;
  for (const Json& item : entry.at("shape", name).array(name + ": shape")) {
    const std::uint64_t length = item.whole(name + ": shape");
    tensor.shape.push_back(static_cast<std::int64_t>(length));
    fits = fits && (length == 0 || size <= room / length || size == 0);
    size = fits ? size * length : 0;
  }
  const Json::Array& offsets = entry.at("data_offsets", name).array(name + ": data_offsets");
  if (offsets.size() != 2) throw Error(name, "two data_offsets", std::to_string(offsets.size()));
  const std::uint64_t begin = offsets[0].whole(name + ": data_offsets");
  const std::uint64_t end = offsets[1].whole(name + ": data_offsets");
  if (!fits || begin > end || end > room || end - begin != size) {
    throw Error(name, "data inside the file that fits its shape " + to_string(tensor.shape),
                "bytes " + std::to_string(begin) + " to " + std::to_string(end), "fetch it again");
  }
  const std::byte* data = file.data() + data_start;
  tensor.bytes.assign(data + begin, data + end);
  return tensor;
}

inline Tensors read_safetensors(const std::filesystem::path& path, const std::string& name) {
  constexpr std::uint64_t kLargest = std::uint64_t{4} << 30;  // of an adapter or a golden case
  const std::vector<std::byte> file = read_file(path, name, kLargest);
  std::uint64_t header_size = 0;
  for (std::size_t i = 8; i-- > 0 && file.size() >= 8;) {  // little-endian
    header_size = header_size << 8 | std::to_integer<std::uint64_t>(file[i]);
  }
  if (file.size() < 8 || header_size > file.size() - 8) {
    throw Error(name, "a .safetensors file with a whole header",
                std::to_string(file.size()) + " bytes", "fetch it again");
  }
  const std::string_view header(reinterpret_cast<const char*>(file.data()) + 8,
                                static_cast<std::size_t>(header_size));
  const Json document = Json::parse(header, name);
  Tensors tensors;
  for (const Json::Member& member : document.object(name)) {
    if (member.key == "__metadata__") continue;
    tensors[member.key] = read_tensor(member.value, name + ": " + member.key, file,
                                      static_cast<std::size_t>(8 + header_size));
  }
  return tensors;
}

}  // namespace loraport
