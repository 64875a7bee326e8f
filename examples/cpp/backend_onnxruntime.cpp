// ONNX Runtime on the CPU. Its Python wheel has the library and no header; take a release archive.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <stdexcept>
#include <thread>

#include "backend.hpp"

namespace hdrq {

namespace {

class OnnxRuntime : public Backend {
public:
    OnnxRuntime(const std::string& folder, const Manifest& manifest, const Options& options)
        : environment_(ORT_LOGGING_LEVEL_ERROR, "hdrq"),
          input_(manifest.inputs[0].name),
          output_(manifest.outputs[0].name) {
        Ort::SessionOptions settings;
        const unsigned cores = std::max(std::thread::hardware_concurrency(), 1u);
        settings.SetIntraOpNumThreads(options.threads ? options.threads : static_cast<int>(cores));
        settings.SetInterOpNumThreads(1);
        // The portable graph keeps int8 activations, which x86 fuses into slow kernels.
        if (manifest.engine == "onnx")
            settings.AddConfigEntry("session.disable_quant_qdq", "1");
        const std::string graph = folder + "/model.onnx";
#ifdef _WIN32
        session_ = Ort::Session(environment_, std::wstring(graph.begin(), graph.end()).c_str(),
                                settings);
#else
        session_ = Ort::Session(environment_, graph.c_str(), settings);
#endif
    }

    Tensor run(const Tensor& input) override {
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        Ort::Value given = std::visit(
            [&](const auto& values) {
                using T = typename std::decay_t<decltype(values)>::value_type;
                return Ort::Value::CreateTensor<T>(memory, const_cast<T*>(values.data()),
                                                   values.size(), input.shape.data(),
                                                   input.shape.size());
            },
            input.values);
        const char* inputs[] = {input_.c_str()};
        const char* outputs[] = {output_.c_str()};
        auto results = session_.Run(Ort::RunOptions{nullptr}, inputs, &given, 1, outputs, 1);
        const auto info = results[0].GetTensorTypeAndShapeInfo();
        Tensor result{info.GetShape(), {}};
        const std::size_t size = count(result.shape);
        switch (info.GetElementType()) {
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: {
                const float* values = results[0].GetTensorData<float>();
                result.values = std::vector<float>(values, values + size);
                break;
            }
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
                result.values = labels<std::int64_t>(results[0].GetTensorData<std::int64_t>(), size);
                break;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
                result.values = labels<std::int32_t>(results[0].GetTensorData<std::int32_t>(), size);
                break;
            default: throw std::runtime_error("found an output of a type that is not known");
        }
        return result;
    }

private:
    Ort::Env environment_;
    std::string input_, output_;
    Ort::Session session_{nullptr};
};

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(const std::string& folder, const Manifest& manifest,
                                          const Options& options) {
    return std::make_unique<OnnxRuntime>(folder, manifest, options);
}

}  // namespace hdrq
