// OpenVINO's CPU plugin, through its C interface, whose headers are small and whose names last.
#include <openvino/c/openvino.h>

#include <algorithm>
#include <stdexcept>
#include <thread>

#include "backend.hpp"

namespace hdrq {

namespace {

struct Free {
    void operator()(ov_core_t* it) const { ov_core_free(it); }
    void operator()(ov_model_t* it) const { ov_model_free(it); }
    void operator()(ov_compiled_model_t* it) const { ov_compiled_model_free(it); }
    void operator()(ov_infer_request_t* it) const { ov_infer_request_free(it); }
    void operator()(ov_tensor_t* it) const { ov_tensor_free(it); }
};
template <class T>
using Owned = std::unique_ptr<T, Free>;

class OpenVino : public Backend {
public:
    OpenVino(const std::string& folder, const Manifest& manifest, const Options& options)
        : folder_(folder), uint8_(manifest.inputs[0].dtype == "uint8") {
        core_ = made<ov_core_t>("start", [](auto** it) { return ov_core_create(it); });
        const std::string graph = folder + "/model.onnx";
        model_ = made<ov_model_t>("read", [&](auto** it) {
            return ov_core_read_model(core_.get(), graph.c_str(), nullptr, it);
        });
        // A free batch is compiled for one image: fixed shapes run up to a tenth faster.
        for (const std::int64_t side : manifest.inputs[0].shape) shape_.push_back(side);
        if (const auto& p = manifest.preprocessing; p && shape_.size() == 4) {
            const bool last = manifest.inputs[0].layout == "NHWC";
            const std::int64_t sides[] = {1, last ? p->height : p->channels,
                                          last ? p->width : p->height,
                                          last ? p->channels : p->width};
            for (int i = 0; i < 4; ++i)
                if (!shape_[i]) shape_[i] = sides[i];
            compile(options);
        }
        options_ = options;
    }

    Tensor run(const Tensor& input) override {
        if (!request_ || input.shape != shape_) {
            shape_ = input.shape;
            compile(options_);
        }
        ov_shape_t shape{static_cast<std::int64_t>(shape_.size()), shape_.data()};
        const bool bytes = std::holds_alternative<std::vector<std::uint8_t>>(input.values);
        if (bytes != uint8_) throw std::runtime_error(folder_ + ": found another type of input");
        const void* data = bytes ? static_cast<const void*>(
                                       std::get<std::vector<std::uint8_t>>(input.values).data())
                                 : std::get<std::vector<float>>(input.values).data();
        auto given = made<ov_tensor_t>("take", [&](auto** it) {
            return ov_tensor_create_from_host_ptr(bytes ? U8 : F32, shape, const_cast<void*>(data),
                                                  it);
        });
        check(ov_infer_request_set_input_tensor(request_.get(), given.get()), "feed");
        check(ov_infer_request_infer(request_.get()), "run");
        return output();
    }

private:
    void check(ov_status_e status, const char* what) const {
        if (status == OK) return;
        const char* text = ov_get_last_err_msg();
        throw std::runtime_error(folder_ + ": OpenVINO cannot " + what + " it (" +
                                 (text && *text ? text : ov_get_error_info(status)) + ")");
    }

    template <class T, class Make>
    Owned<T> made(const char* what, Make make) const {
        T* it = nullptr;
        check(make(&it), what);
        return Owned<T>(it);
    }

    void compile(const Options& options) {
        request_.reset();
        std::vector<ov_dimension_t> sides;
        for (const std::int64_t side : shape_) sides.push_back({side, side});
        ov_partial_shape_t shape{};
        check(ov_partial_shape_create(static_cast<std::int64_t>(sides.size()), sides.data(), &shape),
              "shape");
        const ov_status_e status = ov_model_reshape_single_input(model_.get(), shape);
        ov_partial_shape_free(&shape);
        check(status, "shape");
        const unsigned cores = std::max(std::thread::hardware_concurrency(), 1u);
        const std::string threads = std::to_string(options.threads ? options.threads : cores);
        // As the Python runtime sets it: float32 around the integers, no rounding of activations.
        const std::size_t given = options.cache.empty() ? 12 : 14;  // names and values
        compiled_ = made<ov_compiled_model_t>("compile", [&](auto** it) {
            return ov_core_compile_model(
                core_.get(), model_.get(), "CPU", given, it, "INFERENCE_PRECISION_HINT", "f32",
                "INFERENCE_NUM_THREADS", threads.c_str(), "PERFORMANCE_HINT", "LATENCY",
                "NUM_STREAMS", "1", "ENABLE_CPU_PINNING", "NO", "DYNAMIC_QUANTIZATION_GROUP_SIZE",
                "0", "CACHE_DIR", options.cache.c_str());
        });
        request_ = made<ov_infer_request_t>("prepare", [&](auto** it) {
            return ov_compiled_model_create_infer_request(compiled_.get(), it);
        });
    }

    Tensor output() const {
        auto tensor = made<ov_tensor_t>("answer", [&](auto** it) {
            return ov_infer_request_get_output_tensor(request_.get(), it);
        });
        ov_shape_t shape{};
        check(ov_tensor_get_shape(tensor.get(), &shape), "answer");
        Tensor result{{shape.dims, shape.dims + shape.rank}, {}};
        ov_shape_free(&shape);
        ov_element_type_e type{};
        void* data = nullptr;
        check(ov_tensor_get_element_type(tensor.get(), &type), "answer");
        check(ov_tensor_data(tensor.get(), &data), "answer");
        const std::size_t size = count(result.shape);
        if (type == F32) {
            const float* values = static_cast<const float*>(data);
            result.values = std::vector<float>(values, values + size);
        } else if (type == I64) {
            result.values = labels<std::int64_t>(data, size);
        } else if (type == I32) {
            result.values = labels<std::int32_t>(data, size);
        } else {
            throw std::runtime_error(folder_ + ": found an output of a type that is not known");
        }
        return result;
    }

    std::string folder_;
    bool uint8_;
    Options options_;
    std::vector<std::int64_t> shape_;
    Owned<ov_core_t> core_;
    Owned<ov_model_t> model_;
    Owned<ov_compiled_model_t> compiled_;
    Owned<ov_infer_request_t> request_;
};

}  // namespace

std::unique_ptr<Backend> open_openvino(const std::string& folder, const Manifest& manifest,
                                       const Options& options) {
    return std::make_unique<OpenVino>(folder, manifest, options);
}

}  // namespace hdrq
