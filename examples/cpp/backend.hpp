// The libraries that this build knows; each of these functions lies in a file of its own.
#pragma once

#include "engine.hpp"

namespace hdrq {

std::unique_ptr<Backend> open_openvino(const std::string& folder, const Manifest& manifest,
                                       const Options& options);
std::unique_ptr<Backend> open_onnxruntime(const std::string& folder, const Manifest& manifest,
                                          const Options& options);
std::unique_ptr<Backend> open_tensorrt(const std::string& folder, const Manifest& manifest,
                                       const Options& options);

// Number of values of a shape.
std::size_t count(const std::vector<std::int64_t>& shape);
// Labels of any whole type as int64.
template <class T>
std::vector<std::int64_t> labels(const void* data, std::size_t size) {
    const T* values = static_cast<const T*>(data);
    return std::vector<std::int64_t>(values, values + size);
}

}  // namespace hdrq
