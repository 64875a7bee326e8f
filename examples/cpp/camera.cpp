// The camera loop: frames in, answers out, with the time that each took.
//
//     camera ENGINE FOLDER                 all .ppm and .pgm images of a folder, by name
//     camera ENGINE IMAGE.ppm ...          these images
//     camera ENGINE - 640x480              raw RGB (or grey) frames from standard input, such as
//         ffmpeg -f v4l2 -i /dev/video0 -f rawvideo -pix_fmt rgb24 - | camera engine/ - 640x480
//
// --threads N, --cache PATH, --json (one line of JSON a frame) may stand in front.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.hpp"

namespace {

using Clock = std::chrono::steady_clock;

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
        char code[8];
        if (static_cast<unsigned char>(c) < 0x20) {
            std::snprintf(code, sizeof code, "\\u%04x", c);
            out += code;
        } else {
            if (c == '"' || c == '\\') out += '\\';
            out += c;
        }
    }
    return out + '"';
}

// The answers of one run, printed one by one, and percentiles of their latency at the end.
class Show {
public:
    explicit Show(bool json) : json_(json) {}

    void operator()(const std::string& name, const hdrq::Prediction& found, double ms) {
        latencies_.push_back(ms);
        if (json_) {
            print_json(name, found, ms);
        } else if (found.index < 0) {
            std::printf("%s: mask of %dx%d  %.2f ms\n", name.c_str(), found.mask.height,
                        found.mask.width, ms);
        } else {
            const float score = found.scores.empty() ? 1.0f : found.scores[found.index];
            const std::string label =
                found.label.empty() ? "class " + std::to_string(found.index) : found.label;
            std::printf("%s: %s %.0f%%  %.2f ms\n", name.c_str(), label.c_str(), 100.0 * score, ms);
        }
    }

    ~Show() {
        if (latencies_.empty() || json_) return;
        std::sort(latencies_.begin(), latencies_.end());
        const auto at = [this](double share) {
            return latencies_[static_cast<std::size_t>(share * (latencies_.size() - 1))];
        };
        std::printf("%zu frames, p50 %.2f ms, p99 %.2f ms from frame to answer\n",
                    latencies_.size(), at(0.5), at(0.99));
    }

private:
    static void print_json(const std::string& name, const hdrq::Prediction& found, double ms) {
        std::printf("{\"name\": %s, \"index\": %d, \"label\": %s, \"ms\": %.4f, \"scores\": [",
                    quoted(name).c_str(), found.index, quoted(found.label).c_str(), ms);
        for (std::size_t i = 0; i < found.scores.size(); ++i)
            std::printf("%s%.9g", i ? ", " : "", static_cast<double>(found.scores[i]));
        std::printf("], \"mask\": [");
        for (std::size_t i = 0; i < found.mask.pixels.size(); ++i)
            std::printf("%s%d", i ? ", " : "", found.mask.pixels[i]);
        std::printf("]}\n");
    }

    bool json_;
    std::vector<double> latencies_;
};

void answer(hdrq::Engine& engine, Show& show, const std::string& name, const hdrq::Image& image) {
    const auto start = Clock::now();
    const hdrq::Prediction found = engine.predict(image);
    show(name, found,
         std::chrono::duration<double, std::milli>(Clock::now() - start).count());
}

void files(hdrq::Engine& engine, Show& show, const std::vector<std::string>& given) {
    std::vector<std::filesystem::path> paths(given.begin(), given.end());
    if (paths.size() == 1 && std::filesystem::is_directory(paths[0])) {
        const std::filesystem::path folder = paths[0];
        paths.clear();
        for (const auto& entry : std::filesystem::directory_iterator(folder)) {
            const std::string ending = entry.path().extension().string();
            if (ending == ".ppm" || ending == ".pgm") paths.push_back(entry.path());
        }
        std::sort(paths.begin(), paths.end());
        if (paths.empty())
            throw std::runtime_error(folder.string() + ": found no .ppm or .pgm images");
    }
    for (const auto& path : paths) {
        std::ifstream stream(path, std::ios::binary);
        hdrq::Image image;
        if (!stream || !hdrq::read_pnm(stream, image, path.string()))
            throw std::runtime_error(path.string() + ": found nothing to read");
        answer(engine, show, path.filename().string(), image);
    }
}

void raw(hdrq::Engine& engine, Show& show, const std::string& size) {
    int width = 0, height = 0;
    char more = 0;
    if (std::sscanf(size.c_str(), "%dx%d%c", &width, &height, &more) != 2 || width < 1 ||
        height < 1 || width > 1 << 15 || height > 1 << 15)
        throw std::runtime_error("found a size " + size + "; needed WIDTHxHEIGHT");
    const auto& p = engine.manifest().preprocessing;
    hdrq::Image image(height, width, p ? p->channels : 3);
    for (int frame = 0;; ++frame) {
        std::cin.read(reinterpret_cast<char*>(image.pixels.data()),
                      static_cast<std::streamsize>(image.pixels.size()));
        if (!std::cin) return;
        answer(engine, show, "frame " + std::to_string(frame), image);
    }
}

int run(std::vector<std::string> words) {
    hdrq::Options options;
    bool json = false;
    while (!words.empty() && words[0].rfind("--", 0) == 0) {
        const std::string flag = words[0];
        const std::size_t used = flag == "--json" ? 1 : 2;
        if (words.size() < used) throw std::runtime_error("found " + flag + " without its value");
        if (flag == "--json")
            json = true;
        else if (flag == "--threads")
            options.threads = std::stoi(words[1]);
        else if (flag == "--cache")
            options.cache = words[1];
        else
            throw std::runtime_error("found " + flag + "; needed --threads, --cache or --json");
        words.erase(words.begin(), words.begin() + static_cast<std::ptrdiff_t>(used));
    }
    if (words.size() < 2)
        throw std::runtime_error("usage: camera [--json] ENGINE FOLDER|IMAGE...|- [WIDTHxHEIGHT]");
    hdrq::Engine engine(words[0], options);
    Show show(json);
    if (words[1] == "-")
        raw(engine, show, words.size() > 2 ? words[2] : "");
    else
        files(engine, show, {words.begin() + 1, words.end()});
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run({argv + 1, argv + argc});
    } catch (const std::exception& error) {
        std::cerr << "camera: " << error.what() << "\n";
        return 2;
    }
}
