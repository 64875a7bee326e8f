#include "image.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <stdexcept>

namespace hdrq {

namespace {

constexpr int kBits = 32 - 8 - 2;  // of the whole-number weights that 8-bit pixels are summed with
constexpr int kLargestSide = 1 << 15;

// The pixels that one pixel of the new size is made of, and their weights.
struct Window {
    int first;
    std::vector<double> weights;
};

std::vector<Window> windows(int from, int to) {
    const double scale = static_cast<double>(from) / to;
    const double support = std::max(scale, 1.0);
    std::vector<Window> all;
    for (int i = 0; i < to; ++i) {
        const double center = (i + 0.5) * scale;
        const int first = std::max(static_cast<int>(center - support + 0.5), 0);
        const int last = std::min(static_cast<int>(center + support + 0.5), from);
        Window window{first, {}};
        double sum = 0;
        for (int x = first; x < last; ++x) {
            const double distance = std::abs((x - center + 0.5) * (1.0 / support));
            window.weights.push_back(distance < 1.0 ? 1.0 - distance : 0.0);
            sum += window.weights.back();
        }
        for (double& weight : window.weights)
            if (sum != 0) weight /= sum;
        all.push_back(std::move(window));
    }
    return all;
}

// Sums in whole numbers as Pillow's of 8-bit pixels, and in doubles as its of floats.
struct Bytes {
    static int weight(double w) { return static_cast<int>(w * (1 << kBits) + (w < 0 ? -0.5 : 0.5)); }
    static constexpr int start = 1 << (kBits - 1);
    static std::uint8_t end(int sum) {
        return static_cast<std::uint8_t>(std::clamp(sum >> kBits, 0, 255));
    }
    using Sum = int;
};
struct Floats {
    static double weight(double w) { return w; }
    static constexpr double start = 0;
    static float end(double sum) { return static_cast<float>(sum); }
    using Sum = double;
};

template <class Arithmetic, class T>
Raster<T> along(const Raster<T>& image, int size, bool rows) {
    Raster<T> out(rows ? image.height : size, rows ? size : image.width, image.channels);
    const auto all = windows(rows ? image.width : image.height, size);
    for (int i = 0; i < size; ++i) {
        std::vector<typename Arithmetic::Sum> weights;
        for (double weight : all[i].weights) weights.push_back(Arithmetic::weight(weight));
        for (int other = 0; other < (rows ? image.height : image.width); ++other)
            for (int c = 0; c < image.channels; ++c) {
                typename Arithmetic::Sum sum = Arithmetic::start;
                for (size_t k = 0; k < weights.size(); ++k) {
                    const int place = all[i].first + static_cast<int>(k);
                    sum += (rows ? image.at(other, place, c) : image.at(place, other, c)) * weights[k];
                }
                (rows ? out.at(other, i, c) : out.at(i, other, c)) = Arithmetic::end(sum);
            }
    }
    return out;
}

template <class Arithmetic, class T>
Raster<T> scaled(const Raster<T>& image, int height, int width) {
    if (image.height < 1 || image.width < 1)
        throw std::runtime_error("found an image without pixels");
    Raster<T> out = image;
    if (out.width != width) out = along<Arithmetic>(out, width, true);
    if (out.height != height) out = along<Arithmetic>(out, height, false);
    return out;
}

int header_number(std::istream& from, const std::string& name) {
    int c = from.get();
    while (std::isspace(c) || c == '#') {
        if (c == '#')
            while (c != '\n' && c != EOF) c = from.get();
        c = from.get();
    }
    int value = 0;
    if (!std::isdigit(c)) throw std::runtime_error(name + ": found no number in its header");
    for (; std::isdigit(c); c = from.get()) {
        value = value * 10 + (c - '0');
        if (value > kLargestSide) throw std::runtime_error(name + ": found a number too large");
    }
    return value;
}

}  // namespace

bool read_pnm(std::istream& from, Image& image, const std::string& name) {
    const int first = from.get();
    if (first == EOF) return false;
    const int kind = from.get();
    if (first != 'P' || (kind != '5' && kind != '6'))
        throw std::runtime_error(name + ": found another format; needed a binary PPM or PGM");
    const int width = header_number(from, name), height = header_number(from, name);
    if (header_number(from, name) != 255 || width < 1 || height < 1)
        throw std::runtime_error(name + ": found another header; needed pixels of 0 to 255");
    image = Image(height, width, kind == '6' ? 3 : 1);
    from.read(reinterpret_cast<char*>(image.pixels.data()),
              static_cast<std::streamsize>(image.pixels.size()));
    if (!from) throw std::runtime_error(name + ": found fewer pixels than its header says");
    return true;
}

Image resized(const Image& image, int height, int width) {
    return scaled<Bytes>(image, height, width);
}

Plane resized(const Plane& plane, int height, int width) {
    return scaled<Floats>(plane, height, width);
}

Image cut(const Image& image, int resize_h, int resize_w, int height, int width) {
    const int top = (resize_h - height) / 2, left = (resize_w - width) / 2;
    if (resize_h < height || resize_w < width)
        throw std::runtime_error("found a crop that is larger than the image");
    const Image whole = resized(image, resize_h, resize_w);
    Image part(height, width, image.channels);
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < image.channels; ++c)
                part.at(y, x, c) = whole.at(top + y, left + x, c);
    return part;
}

}  // namespace hdrq
