// TensorRT 10 or 11: a plan on the first GPU, copies before and after it on one stream.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>

#include "backend.hpp"

namespace hdrq {

namespace {

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, const char* text) noexcept override {
        if (severity <= Severity::kERROR) std::cerr << text << "\n";
    }
};

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// GPU memory that grows.
class Buffer {
public:
    ~Buffer() { cudaFree(data_); }
    void* of(std::size_t bytes) {
        if (bytes > size_) {
            check(cudaFree(data_));
            data_ = nullptr;
            check(cudaMalloc(&data_, bytes));
            size_ = bytes;
        }
        return data_;
    }

private:
    void* data_ = nullptr;
    std::size_t size_ = 0;
};

class TensorRt : public Backend {
public:
    TensorRt(const std::string& folder, const Manifest& manifest)
        : folder_(folder), input_(manifest.inputs[0].name), output_(manifest.outputs[0].name) {
        std::ifstream file(folder + "/model.plan", std::ios::binary);
        const std::vector<char> plan((std::istreambuf_iterator<char>(file)), {});
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (runtime_) engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        if (engine_) context_.reset(engine_->createExecutionContext());
        if (!context_)
            throw std::runtime_error(folder + ": TensorRT does not load the plan, which may be of "
                                              "another version or GPU; export on this device");
        check(cudaStreamCreate(&stream_));
    }

    ~TensorRt() override { cudaStreamDestroy(stream_); }

    Tensor run(const Tensor& input) override {
        nvinfer1::Dims shape{};
        shape.nbDims = static_cast<int>(input.shape.size());
        for (int i = 0; i < shape.nbDims; ++i) shape.d[i] = input.shape[i];
        if (!context_->setInputShape(input_.c_str(), shape))
            throw std::runtime_error(folder_ + ": found a shape outside of the plan's profile");
        std::visit(
            [&](const auto& values) {
                const std::size_t bytes = values.size() * sizeof(values[0]);
                void* place = given_.of(bytes);
                check(cudaMemcpyAsync(place, values.data(), bytes, cudaMemcpyHostToDevice, stream_));
                context_->setTensorAddress(input_.c_str(), place);
            },
            input.values);
        const nvinfer1::Dims dims = context_->getTensorShape(output_.c_str());
        Tensor result{{dims.d, dims.d + dims.nbDims}, {}};
        const std::size_t size = count(result.shape);
        const nvinfer1::DataType type = engine_->getTensorDataType(output_.c_str());
        if (type == nvinfer1::DataType::kFLOAT) {
            std::vector<float> values(size);
            compute(values);
            result.values = std::move(values);
        } else if (type == nvinfer1::DataType::kINT64) {
            std::vector<std::int64_t> values(size);
            compute(values);
            result.values = std::move(values);
        } else if (type == nvinfer1::DataType::kINT32) {
            std::vector<std::int32_t> values(size);
            compute(values);
            result.values = labels<std::int32_t>(values.data(), size);
        } else {
            throw std::runtime_error(folder_ + ": found an output of a type that is not known");
        }
        return result;
    }

private:
    template <class T>
    void compute(std::vector<T>& values) {
        const std::size_t bytes = values.size() * sizeof(T);
        void* place = taken_.of(bytes);
        context_->setTensorAddress(output_.c_str(), place);
        if (!context_->enqueueV3(stream_))
            throw std::runtime_error(folder_ + ": TensorRT cannot run it");
        check(cudaMemcpyAsync(values.data(), place, bytes, cudaMemcpyDeviceToHost, stream_));
        check(cudaStreamSynchronize(stream_));
    }

    std::string folder_, input_, output_;
    Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    Buffer given_, taken_;
    cudaStream_t stream_ = nullptr;
};

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const std::string& folder, const Manifest& manifest,
                                       const Options&) {
    return std::make_unique<TensorRt>(folder, manifest);
}

}  // namespace hdrq
