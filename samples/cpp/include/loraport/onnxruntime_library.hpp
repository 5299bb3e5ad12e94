// Loads ONNX Runtime from a path while the program runs, so that nothing links to it.
//
// Compile everything with ORT_API_MANUAL_INIT (the CMake target does).
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdlib>
#include <string>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include "loraport/error.hpp"

namespace loraport {

#if defined(_WIN32)
inline constexpr const char* kOnnxRuntimeLibrary = "onnxruntime.dll";
#elif defined(__APPLE__)
inline constexpr const char* kOnnxRuntimeLibrary = "libonnxruntime.dylib";
#else
inline constexpr const char* kOnnxRuntimeLibrary = "libonnxruntime.so";
#endif

// A shared library that stays loaded until the process ends.
class SharedLibrary {
 public:
  SharedLibrary(const std::string& path, const std::string& option) : path_(path) {
#ifdef _WIN32
    handle_ = LoadLibraryA(path.c_str());
    const std::string reason = "error " + std::to_string(GetLastError());
#else
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    const char* message = handle_ == nullptr ? dlerror() : nullptr;
    const std::string reason = message == nullptr ? "" : message;
#endif
    if (handle_ == nullptr) {
      throw Error("library " + path, "one that can be loaded", reason,
                  "give its path with " + option);
    }
  }

  template <typename Function>
  Function* function(const char* name) const {
#ifdef _WIN32
    void* symbol = reinterpret_cast<void*>(GetProcAddress(handle_, name));
#else
    void* symbol = dlsym(handle_, name);
#endif
    if (symbol == nullptr) {
      throw Error("library " + path_, std::string("a function ") + name, "none",
                  "use a newer release");
    }
    return reinterpret_cast<Function*>(symbol);
  }

 private:
  std::string path_;
#ifdef _WIN32
  HMODULE handle_ = nullptr;
#else
  void* handle_ = nullptr;
#endif
};

// Must have been called before anything of namespace Ort is used.
//
// `path`: the library; if empty, the environment's LORAPORT_ORT, else the system's.
inline void load_onnxruntime(std::string path = "") {
  const char* from_environment = std::getenv("LORAPORT_ORT");
  if (path.empty() && from_environment != nullptr) path = from_environment;
  if (path.empty()) path = kOnnxRuntimeLibrary;
  const SharedLibrary library(path, "--ort or LORAPORT_ORT");
  const OrtApiBase* base = library.function<const OrtApiBase* ORT_API_CALL()>("OrtGetApiBase")();
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    throw Error("library " + path,
                "ONNX Runtime 1." + std::to_string(ORT_API_VERSION) + " or newer, as the headers",
                base->GetVersionString());
  }
  Ort::InitApi(api);
}

}  // namespace loraport
