#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "backend.hpp"
#include "json.hpp"

namespace hdrq {

namespace {

constexpr std::int32_t kIgnore = 255;  // class of pixels outside of what the network sees
constexpr int kLargestSide = 1 << 15;

[[noreturn]] void fail(const std::string& where, const std::string& what) {
    throw std::runtime_error(where + ": " + what);
}

Port port_of(const Json& json) {
    Port port{json["name"].string(), {}, json["dtype"].string(), json["layout"].string()};
    for (const Json& side : json["shape"].array())
        port.shape.push_back(side.is_string() ? 0 : side.integer());
    return port;
}

std::vector<float> floats(const Json& json) {
    std::vector<float> values;
    for (const Json& value : json.array()) values.push_back(static_cast<float>(value.number()));
    return values;
}

int side_of(const Json& json) {
    const long long side = json.integer();
    if (side < 1 || side > kLargestSide) throw std::runtime_error("found a side out of range");
    return static_cast<int>(side);
}

Preprocessing preprocessing_of(const Json& json) {
    Preprocessing p;
    p.height = side_of(json["height"]);
    p.width = side_of(json["width"]);
    p.channels = side_of(json["channels"]);
    p.mean = floats(json["mean"]);
    p.std = floats(json["std"]);
    const auto size = static_cast<std::size_t>(p.channels);
    if (p.mean.size() != size || p.std.size() != size)
        throw std::runtime_error("found mean and std of other channels");
    const Json& resize = json.find("resize");
    if (!resize.is_null())
        p.resize = std::make_pair(side_of(resize.array().at(0)), side_of(resize.array().at(1)));
    return p;
}

Manifest manifest_of(const Json& json, const std::filesystem::path& folder) {
    if (json["kind"].string() != "hdrq-engine" || json["schema_version"].integer() != 1)
        throw std::runtime_error("found another kind or version; needed an engine of schema 1");
    Manifest m;
    m.engine = json["engine"].string();
    m.model = json["model"].string();
    m.precision = json["precision"].string();
    m.postprocess = json["postprocess"].string();
    for (const Json& port : json["inputs"].array()) m.inputs.push_back(port_of(port));
    for (const Json& port : json["outputs"].array()) m.outputs.push_back(port_of(port));
    if (m.inputs.size() != 1 || m.outputs.size() != 1)
        throw std::runtime_error("found several inputs or outputs; needed one of each");
    const Json& preprocessing = json["preprocessing"];
    if (!preprocessing.is_null()) m.preprocessing = preprocessing_of(preprocessing);
    const Json& classes = json["classes"];
    if (!classes.is_null())
        for (const Json& name : classes.array()) m.classes.push_back(name.string());
    for (const auto& [name, record] : json["files"].object()) {
        std::error_code error;
        const auto bytes = std::filesystem::file_size(folder / name, error);
        if (error || bytes != static_cast<std::uintmax_t>(record["bytes"].integer()))
            throw std::runtime_error(name + " is missing or of another size; export again");
    }
    return m;
}

// Probabilities along the classes.
std::vector<float> softmax(std::vector<float> scores) {
    const float most = *std::max_element(scores.begin(), scores.end());
    for (float& score : scores) score = std::exp(score - most);
    const float sum = std::accumulate(scores.begin(), scores.end(), 0.0f);
    for (float& score : scores) score /= sum;
    return scores;
}

// The mask of scores (classes, h, w), brought to a size.
Raster<std::int32_t> mask_of(const float* scores, int classes, int h, int w, int height,
                             int width) {
    Raster<std::int32_t> mask(height, width, 1);
    std::vector<float> best;
    for (int c = 0; c < classes; ++c) {
        Plane plane(h, w, 1);
        std::copy_n(scores + static_cast<std::size_t>(c) * h * w, plane.pixels.size(),
                    plane.pixels.begin());
        plane = resized(plane, height, width);
        if (c == 0) best = plane.pixels;
        for (std::size_t i = 0; i < best.size(); ++i)
            if (plane.pixels[i] > best[i]) best[i] = plane.pixels[i], mask.pixels[i] = c;
    }
    return mask;
}

// The nearest label, as Pillow finds it.
Raster<std::int32_t> mask_of(const std::int64_t* labels, int h, int w, int height, int width) {
    Raster<std::int32_t> mask(height, width, 1);
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x) {
            const int row = static_cast<int>((y + 0.5) * h / height);
            const int column = static_cast<int>((x + 0.5) * w / width);
            mask.at(y, x, 0) = static_cast<std::int32_t>(
                labels[static_cast<std::size_t>(row) * w + column]);
        }
    return mask;
}

}  // namespace

std::size_t count(const std::vector<std::int64_t>& shape) {
    std::size_t total = 1;
    for (std::int64_t side : shape) total *= static_cast<std::size_t>(side);
    return total;
}

Manifest Manifest::read(const std::string& folder) {
    const std::filesystem::path file = std::filesystem::path(folder) / "manifest.json";
    std::ifstream stream(file, std::ios::binary);
    std::stringstream text;
    text << stream.rdbuf();
    if (!stream) fail(folder, "found no manifest.json; needed an engine folder from hdrq-export");
    try {
        return manifest_of(Json::parse(text.str()), folder);
    } catch (const std::exception& error) {
        fail(file.string(), error.what());
    }
}

std::vector<std::string> backends() {
    std::vector<std::string> names;
#ifdef HDRQ_OPENVINO
    names.push_back("openvino");
#endif
#ifdef HDRQ_ONNXRUNTIME
    names.insert(names.end(), {"ort", "onnx"});
#endif
#ifdef HDRQ_TENSORRT
    names.push_back("trt");
#endif
    return names;
}

Engine::Engine(const std::string& folder, [[maybe_unused]] const Options& options)
    : folder_(folder), manifest_(Manifest::read(folder)) {
    const std::string& kind = manifest_.engine;
#ifdef HDRQ_OPENVINO
    if (kind == "openvino") backend_ = open_openvino(folder, manifest_, options);
#endif
#ifdef HDRQ_ONNXRUNTIME
    if (kind == "ort" || kind == "onnx") backend_ = open_onnxruntime(folder, manifest_, options);
#endif
#ifdef HDRQ_TENSORRT
    if (kind == "trt") backend_ = open_tensorrt(folder, manifest_, options);
#endif
    if (backend_) return;
    std::string known;
    for (const std::string& name : backends()) known += (known.empty() ? "" : ", ") + name;
    fail(folder, "found an engine of the kind " + kind + "; this build runs " +
                     (known.empty() ? "none: build it where a library is found" : known));
}

Tensor Engine::prepare(const Image& image) const {
    if (!manifest_.preprocessing)
        fail(folder_, "the manifest has no preprocessing; run the engine on network inputs");
    const Preprocessing& p = *manifest_.preprocessing;
    if (image.channels != p.channels || image.height < 1 || image.width < 1)
        fail(folder_, "found an image of " + std::to_string(image.channels) +
                          " channels; needed " + std::to_string(p.channels));
    const Image fitted = p.resize ? cut(image, p.resize->first, p.resize->second, p.height, p.width)
                                  : resized(image, p.height, p.width);
    if (manifest_.inputs[0].dtype == "uint8")
        return {{1, p.height, p.width, p.channels}, fitted.pixels};
    bool centred = false, scaled = false;
    for (float mean : p.mean) centred |= mean != 0;
    for (float std : p.std) scaled |= std != 1;
    std::vector<float> values(fitted.pixels.size());
    auto next = values.begin();
    for (int c = 0; c < p.channels; ++c)
        for (int y = 0; y < p.height; ++y)
            for (int x = 0; x < p.width; ++x) {
                float value = static_cast<float>(fitted.at(y, x, c)) / 255.0f;
                if (centred) value -= p.mean[c];
                if (scaled) value /= p.std[c];
                *next++ = value;
            }
    return {{1, p.channels, p.height, p.width}, values};
}

Tensor Engine::run(const Tensor& input) {
    const Port& port = manifest_.inputs[0];
    const std::int64_t fixed = port.shape.empty() ? 0 : port.shape[0];
    const std::int64_t given = input.shape.empty() ? 0 : input.shape[0];
    if (given < 1 || (fixed && given > fixed))
        fail(folder_, "found a batch of " + std::to_string(given) + "; the engine takes " +
                          (fixed ? std::to_string(fixed) : "1 or more"));
    if (!fixed || given == fixed) return backend_->run(input);
    Tensor whole = input;
    whole.shape[0] = fixed;
    std::visit(
        [&](auto& values) {
            const auto row = values.size() / static_cast<std::size_t>(given);
            for (auto i = given; i < fixed; ++i)
                for (std::size_t k = 0; k < row; ++k) values.push_back(values[k]);
        },
        whole.values);
    Tensor output = backend_->run(whole);
    output.shape[0] = given;
    std::visit([&](auto& values) { values.resize(count(output.shape)); }, output.values);
    return output;
}

Prediction Engine::predict(const Image& image) {
    return answer(run(prepare(image)), image.height, image.width);
}

Prediction Engine::answer(const Tensor& output, int height, int width) const {
    const auto* scores = std::get_if<std::vector<float>>(&output.values);
    const auto* labels = std::get_if<std::vector<std::int64_t>>(&output.values);
    const std::size_t rank = output.shape.size();
    Prediction found;
    if (scores && rank == 2 && output.shape[1] > 1) {
        found.index = static_cast<int>(std::max_element(scores->begin(), scores->end()) -
                                       scores->begin());
        found.scores = manifest_.postprocess == "softmax" ? *scores : softmax(*scores);
    } else if (labels && rank == 1) {
        found.index = static_cast<int>((*labels)[0]);
    } else if ((scores && rank == 4 && output.shape[1] > 1) || (labels && rank == 3)) {
        const Preprocessing& p = *manifest_.preprocessing;
        const int h = static_cast<int>(output.shape[rank - 2]);
        const int w = static_cast<int>(output.shape[rank - 1]);
        // What the network sees of the image; all of it where it is not cut.
        const auto seen = [](int side, int input, int resize) {
            return static_cast<int>(std::nearbyint(static_cast<double>(side) * input / resize));
        };
        const int rows = p.resize ? seen(height, p.height, p.resize->first) : height;
        const int columns = p.resize ? seen(width, p.width, p.resize->second) : width;
        const auto part = scores ? mask_of(scores->data(), static_cast<int>(output.shape[1]), h, w,
                                           rows, columns)
                                 : mask_of(labels->data(), h, w, rows, columns);
        found.mask = Raster<std::int32_t>(height, width, 1);
        std::fill(found.mask.pixels.begin(), found.mask.pixels.end(), kIgnore);
        const int top = (height - rows) / 2, left = (width - columns) / 2;
        for (int y = 0; y < rows; ++y)
            for (int x = 0; x < columns; ++x)
                found.mask.at(top + y, left + x, 0) = part.at(y, x, 0);
    } else {
        fail(folder_, "found an output that is no decision; needed labels or scores of classes");
    }
    if (found.index >= 0 && static_cast<std::size_t>(found.index) < manifest_.classes.size())
        found.label = manifest_.classes[static_cast<std::size_t>(found.index)];
    return found;
}

}  // namespace hdrq
