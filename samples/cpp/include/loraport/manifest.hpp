// manifest.json: what is in a bundle, and whether it is intact.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "loraport/error.hpp"
#include "loraport/file.hpp"
#include "loraport/json.hpp"

namespace loraport {

inline constexpr const char* kManifestFile = "manifest.json";
inline constexpr std::uint64_t kSchemaVersion = 1;

// A place in the graph where y += (x A) B is added.
struct Slot {
  std::string name;
  std::string input_a;  // graph input that takes A [in, r]
  std::string input_b;  // graph input that takes B [r, out], scaling folded in
  std::int64_t in_features = 0;
  std::int64_t out_features = 0;
  std::string dtype;  // e.g. "FLOAT"
};

struct AdapterFiles {
  std::string onnx_adapter;  // for ONNX Runtime's own adapter functions
  std::string safetensors;   // the same tensors, for blending
};

// Adapter name → strength; empty for the base.
using Strengths = std::map<std::string, float>;

struct GoldenCase {
  Strengths adapters;
  std::string file;
};

struct Manifest {
  std::string model;
  std::vector<Slot> slots;
  std::map<std::string, AdapterFiles> adapters;
  std::map<std::string, GoldenCase> golden;
  double tolerance = 0;
  // Tokens that a text may have before other factors rotate all of it, so that cached keys no
  // longer hold; 0 where there is one set of factors.
  std::uint64_t long_rotations_after = 0;
  std::map<std::string, std::string> files;  // path inside the bundle → sha256

  const AdapterFiles& adapter(const std::string& name) const {
    const auto found = adapters.find(name);
    if (found != adapters.end()) return found->second;
    std::string known;
    for (const auto& [other, files_] : adapters) known += (known.empty() ? "" : ", ") + other;
    throw Error("adapter \"" + name + "\"",
                "one of the bundle's (" + (known.empty() ? "none" : known) + ")", "another name");
  }
};

inline bool stays_inside(const std::string& path) {
  if (path.empty() || path.front() == '/' || path.find_first_of("\\:") != path.npos) return false;
  for (const auto& part : std::filesystem::path(path)) {
    if (part == "..") return false;
  }
  return path.find('\0') == path.npos;
}

// Reads the parts of a manifest that a runner needs, and refuses paths that leave the bundle or
// have no hash.
class ManifestReader {
 public:
  explicit ManifestReader(const Json& document) : document_(document) {}

  Manifest read() {
    require_version();
    for (const Json::Member& file : member("files").object("files")) {
      if (!stays_inside(file.key)) {
        problems_.add("\"" + file.key + "\"", "a path inside the bundle", "one that leaves it");
      }
      manifest_.files[file.key] = file.value.string(file.key);
    }
    manifest_.model = listed(member("model"), "model");
    for (const Json& slot : member("slots").array("slots")) read_slot(slot);
    for (const Json::Member& adapter : member("adapters").object("adapters")) {
      const std::string name = "adapters: " + adapter.key;
      manifest_.adapters[adapter.key] = {listed(adapter.value.at("file", name), name),
                                         listed(adapter.value.at("tensors", name), name)};
    }
    for (const Json::Member& golden : member("golden").object("golden")) read_golden(golden);
    manifest_.tolerance = member("tolerance").number("tolerance");
    if (manifest_.tolerance < 0) problems_.add("tolerance", "0 or more", "a negative number");
    const std::string border = "long_rotations_after";
    if (const Json* found = document_.find(border)) {
      manifest_.long_rotations_after = found->whole(border);
    }
    problems_.raise_if_any(std::string(kManifestFile) + " cannot be used");
    return std::move(manifest_);
  }

 private:
  void require_version() const {
    const double version = member("schema_version").number("schema_version");
    if (version != static_cast<double>(kSchemaVersion)) {
      std::ostringstream got;
      got << version;
      throw Error(kManifestFile, "schema version " + std::to_string(kSchemaVersion), got.str(),
                  "use a runner made for that version, or export the bundle again");
    }
  }

  const Json& member(const std::string& key) const { return document_.at(key, kManifestFile); }

  std::string listed(const Json& value, const std::string& name) {
    std::string path = value.string(name);
    if (manifest_.files.count(path) == 0) {
      problems_.add(name, "a path that \"files\" has a hash for", "\"" + path + "\"");
    }
    return path;
  }

  void read_slot(const Json& entry) {
    Slot slot;
    slot.name = entry.at("name", "slots").string("slots: name");
    const std::string where = "slots: " + slot.name;
    const Json& inputs = entry.at("inputs", where);
    slot.input_a = inputs.at("lora_A", where).string(where);
    slot.input_b = inputs.at("lora_B", where).string(where);
    slot.in_features = static_cast<std::int64_t>(entry.at("in_features", where).whole(where));
    slot.out_features = static_cast<std::int64_t>(entry.at("out_features", where).whole(where));
    slot.dtype = entry.at("dtype", where).string(where);
    manifest_.slots.push_back(std::move(slot));
  }

  void read_golden(const Json::Member& golden) {
    const std::string name = "golden: " + golden.key;
    GoldenCase entry;
    entry.file = listed(golden.value.at("file", name), name);
    for (const Json::Member& used : golden.value.at("adapters", name).object(name)) {
      if (manifest_.adapters.count(used.key) == 0) {
        problems_.add(name, "adapters of the bundle", "\"" + used.key + "\"");
      }
      entry.adapters[used.key] = static_cast<float>(used.value.number(name));
    }
    manifest_.golden[golden.key] = std::move(entry);
  }

  const Json& document_;
  Manifest manifest_;
  Problems problems_;
};

// The manifest ends with the sha256 of every byte before the digits of that.
inline void require_seal(std::string_view text) {
  constexpr std::string_view kMember = "\"manifest_sha256\": \"", kEnd = "\"\n}\n";
  constexpr std::size_t kDigits = 64, kTail = kDigits + kEnd.size();
  const char* const remedy = "it is damaged or was edited: copy the bundle again";
  if (text.size() < kMember.size() + kTail ||
      text.substr(text.size() - kTail - kMember.size(), kMember.size()) != kMember ||
      text.substr(text.size() - kEnd.size()) != kEnd) {
    throw Error(kManifestFile, "its own sha256 at its end", "none", remedy);
  }
  Sha256 hash;
  hash.update(text.data(), text.size() - kTail);
  const std::string got = hash.hex();
  const std::string expected(text.substr(text.size() - kTail, kDigits));
  if (got != expected) {
    throw Error(kManifestFile, "sha256 " + expected.substr(0, 12), got.substr(0, 12), remedy);
  }
}

inline Manifest read_manifest(const std::filesystem::path& bundle) {
  constexpr std::uint64_t kLargest = 64 << 20;
  const std::vector<std::byte> file = read_file(bundle / kManifestFile, kManifestFile, kLargest);
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  require_seal(text);
  const Json document = Json::parse(text, kManifestFile);
  return ManifestReader(document).read();
}

// Compares every listed file with its hash. Links are followed: what counts is the content.
inline void check_files(const Manifest& manifest, const std::filesystem::path& bundle) {
  Problems problems;
  for (const auto& [path, expected] : manifest.files) {
    const std::filesystem::path file = bundle / std::filesystem::u8path(path);
    std::error_code code;
    if (!std::filesystem::is_regular_file(file, code)) {
      problems.add(path, "the file the manifest lists", "no such file", "copy the bundle again");
      continue;
    }
    const std::string got = sha256_of_file(file, path);
    if (got != expected) {
      problems.add(path, "sha256 " + expected.substr(0, 12), got.substr(0, 12),
                   "copy the bundle again");
    }
  }
  problems.raise_if_any("bundle " + bundle.string() + " is not intact");
}

}  // namespace loraport
