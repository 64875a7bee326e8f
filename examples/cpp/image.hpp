// Images of 8 bits, and the resizing that calibration used.
#pragma once

#include <cstdint>
#include <istream>
#include <string>
#include <vector>

namespace hdrq {

// Rows of pixels, channels last: RGB, or grey with one channel.
template <class T>
struct Raster {
    int height = 0, width = 0, channels = 0;
    std::vector<T> pixels;

    Raster() = default;
    Raster(int h, int w, int c)
        : height(h), width(w), channels(c), pixels(static_cast<size_t>(h) * w * c) {}
    T& at(int y, int x, int c) {
        return pixels[(static_cast<size_t>(y) * width + x) * channels + c];
    }
    T at(int y, int x, int c) const {
        return pixels[(static_cast<size_t>(y) * width + x) * channels + c];
    }
};
using Image = Raster<std::uint8_t>;
using Plane = Raster<float>;

// Reads a binary PPM (P6) or PGM (P5) of 8 bits; throws std::runtime_error. A stream may hold
// several, one after the other; false at its end.
bool read_pnm(std::istream& from, Image& image, const std::string& name);

// Bilinear at another size, with Pillow's arithmetic: a triangle filter that widens where the image
// shrinks, rows first, 8-bit images rounded after each direction.
Image resized(const Image& image, int height, int width);
Plane resized(const Plane& plane, int height, int width);

// Brought to (resize_h, resize_w), and (height, width) cut out of the middle.
Image cut(const Image& image, int resize_h, int resize_w, int height, int width);

}  // namespace hdrq
