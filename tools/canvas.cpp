#include "tools/canvas.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "engine/os.h"
#include "tools/font.h"

#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STBI_WRITE_NO_STDIO
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#include <stb_image_write.h>
#pragma GCC diagnostic pop

namespace nibble {

Canvas::Canvas(int width, int height)
    : width_(width), height_(height), pixels_(static_cast<std::size_t>(3 * width * height), 255) {}

void Canvas::dot(int x, int y, Color c, double opacity) {
  if (x < 0 || y < 0 || x >= width_ || y >= height_) return;
  std::uint8_t* p = &pixels_[static_cast<std::size_t>(3 * (y * width_ + x))];
  const std::array<std::uint8_t, 3> rgb = {c.r, c.g, c.b};
  for (std::size_t i = 0; i < 3; ++i) {
    p[i] = static_cast<std::uint8_t>(std::lround(p[i] + (rgb[i] - p[i]) * opacity));
  }
}

void Canvas::fill(int left, int top, int right, int bottom, Color c, double opacity) {
  for (int y = top; y < bottom; ++y) {
    for (int x = left; x < right; ++x) dot(x, y, c, opacity);
  }
}

void Canvas::line(double x0, double y0, double x1, double y1, double thickness, Color c) {
  const double dx = x1 - x0, dy = y1 - y0, length = std::max(1e-9, dx * dx + dy * dy);
  const double reach = thickness / 2 + 1;
  for (int y = static_cast<int>(std::min(y0, y1) - reach); y <= std::max(y0, y1) + reach; ++y) {
    for (int x = static_cast<int>(std::min(x0, x1) - reach); x <= std::max(x0, x1) + reach; ++x) {
      const double t = std::clamp(((x - x0) * dx + (y - y0) * dy) / length, 0.0, 1.0);
      const double distance = std::hypot(x - x0 - t * dx, y - y0 - t * dy);
      const double cover = std::clamp(thickness / 2 + 0.5 - distance, 0.0, 1.0);
      if (cover > 0) dot(x, y, c, cover);
    }
  }
}

void Canvas::text(int x, int y, const std::string& text, int scale, Color c) {
  for (const char letter : text) {
    const std::array<std::uint8_t, 5>& columns = glyph(letter);
    for (int column = 0; column < 5; ++column) {
      for (int row = 0; row < 7; ++row) {
        if ((columns[static_cast<std::size_t>(column)] >> row & 1) == 0) continue;
        fill(x + column * scale, y + row * scale, x + (column + 1) * scale, y + (row + 1) * scale,
             c);
      }
    }
    x += 6 * scale;
  }
}

void Canvas::save(const std::string& path) const {
  std::string png;
  stbi_write_png_to_func(
      [](void* to, void* data, int size) {
        static_cast<std::string*>(to)->append(static_cast<const char*>(data),
                                              static_cast<std::size_t>(size));
      },
      &png, width_, height_, 3, pixels_.data(), 3 * width_);
  os::write_file(path, png);
}

double tick_step(double range, int most) {
  const double raw = std::max(range, 1e-12) / most;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= raw) return factor * power;
  }
  return 10 * power;
}

int tick_digits(double step) {
  return std::max(0, -static_cast<int>(std::floor(std::log10(step) + 1e-9)));
}

}  // namespace nibble
