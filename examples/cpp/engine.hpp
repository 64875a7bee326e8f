// An engine folder of hdrq-export, opened and run: manifest, ports, preprocessing, labels.
//
//     hdrq::Engine engine("engine/");
//     hdrq::Prediction found = engine.predict(frame);   // an Image: rows of RGB or grey pixels
//
// Everything throws std::runtime_error with one line: what was found and what is needed.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "image.hpp"

namespace hdrq {

// An input or output; a side of 0 is free.
struct Port {
    std::string name;
    std::vector<std::int64_t> shape;
    std::string dtype;   // float, uint8, int32, int64
    std::string layout;  // NCHW, NHWC or empty
};

// From an image to the network's input: resize, scale to [0, 1], (x - mean) / std.
struct Preprocessing {
    int height = 0, width = 0, channels = 0;
    std::vector<float> mean, std;
    std::optional<std::pair<int, int>> resize;  // (height, width) that the input is cut out of
};

struct Manifest {
    std::string engine;  // ort, onnx, openvino, trt
    std::string model, precision, postprocess;
    std::vector<Port> inputs, outputs;
    std::optional<Preprocessing> preprocessing;
    std::vector<std::string> classes;

    // Reads manifest.json and looks whether all files are there, of the size that it says. Their
    // hashes are not computed: hdrq-verify does.
    static Manifest read(const std::string& folder);
};

// Values and their shape. Labels are int64 whatever the engine's type of them.
struct Tensor {
    std::vector<std::int64_t> shape;
    std::variant<std::vector<float>, std::vector<std::uint8_t>, std::vector<std::int64_t>> values;
};

struct Options {
    int threads = 0;    // of an engine on the CPU; 0, one per core
    std::string cache;  // folder in which OpenVINO keeps what it compiled; empty keeps nothing
};

// What runs a graph or a plan. There is one for each library that was found when this was built.
class Backend {
public:
    virtual ~Backend() = default;
    virtual Tensor run(const Tensor& input) = 0;
};

// What an engine says of one image.
struct Prediction {
    int index = -1;                   // the most likely class; -1 for a mask
    std::string label;                // its name, where the manifest has names
    std::vector<float> scores;        // probabilities; empty where the engine gives labels only
    Raster<std::int32_t> mask;        // class of every pixel, of a segmentation engine
};

// An engine that is loaded. One thread at a time may call it.
class Engine {
public:
    explicit Engine(const std::string& folder, const Options& options = {});

    const Manifest& manifest() const { return manifest_; }
    // One image of any size, of as many channels as the model reads.
    Prediction predict(const Image& image);
    // The image as the network takes it, batch of one.
    Tensor prepare(const Image& image) const;
    // The output for an input; a fixed batch is filled up with copies of the first row, and all
    // rows but those are returned.
    Tensor run(const Tensor& input);

private:
    Prediction answer(const Tensor& output, int height, int width) const;

    std::string folder_;
    Manifest manifest_;
    std::unique_ptr<Backend> backend_;
};

// Names of the engines that this build runs.
std::vector<std::string> backends();

}  // namespace hdrq
