#include "tools/plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "engine/os.h"
#include "tools/font.h"
#include "tools/text.h"

#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STBI_WRITE_NO_STDIO
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#include <stb_image_write.h>
#pragma GCC diagnostic pop

namespace nibble {
namespace {

struct Color {
  std::uint8_t r, g, b;
};
constexpr Color kInk{40, 44, 52}, kGrid{228, 230, 234}, kTrain{158, 188, 226}, kSmooth{31, 97, 180},
    kHeldOut{214, 84, 20};

class Canvas {
 public:
  Canvas(int width, int height)
      : width_(width),
        height_(height),
        pixels_(static_cast<std::size_t>(3 * width * height), 255) {}

  void dot(int x, int y, Color c, double opacity = 1) {
    if (x < 0 || y < 0 || x >= width_ || y >= height_) return;
    std::uint8_t* p = &pixels_[static_cast<std::size_t>(3 * (y * width_ + x))];
    const std::array<std::uint8_t, 3> rgb = {c.r, c.g, c.b};
    for (std::size_t i = 0; i < 3; ++i) {
      p[i] = static_cast<std::uint8_t>(std::lround(p[i] + (rgb[i] - p[i]) * opacity));
    }
  }

  // A line `thickness` pixels wide with soft edges: each pixel near it is covered by its distance.
  void line(double x0, double y0, double x1, double y1, double thickness, Color c) {
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

  void disc(double cx, double cy, double radius, Color c) { line(cx, cy, cx, cy, 2 * radius, c); }

  // Text of the 5 x 7 font, `scale` pixels a dot, its top left corner at (x, y).
  void text(int x, int y, const std::string& text, int scale, Color c) {
    for (const char letter : text) {
      const std::array<std::uint8_t, 5>& columns = glyph(letter);
      for (int column = 0; column < 5; ++column) {
        for (int row = 0; row < 7; ++row) {
          if ((columns[static_cast<std::size_t>(column)] >> row & 1) == 0) continue;
          for (int i = 0; i < scale * scale; ++i) {
            dot(x + column * scale + i % scale, y + row * scale + i / scale, c);
          }
        }
      }
      x += 6 * scale;
    }
  }
  static int text_width(const std::string& text, int scale) {
    return 6 * scale * static_cast<int>(text.size()) - scale;
  }

  void save(const std::string& path) const {
    std::string png;
    stbi_write_png_to_func(
        [](void* to, void* data, int size) {
          static_cast<std::string*>(to)->append(static_cast<const char*>(data),
                                                static_cast<std::size_t>(size));
        },
        &png, width_, height_, 3, pixels_.data(), 3 * width_);
    os::write_file(path, png);
  }

 private:
  int width_, height_;
  std::vector<std::uint8_t> pixels_;
};

// A round distance between ticks that gives at most `most` of them.
double tick_step(double range, int most) {
  const double raw = std::max(range, 1e-12) / most;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= raw) return factor * power;
  }
  return 10 * power;
}

using Points = std::vector<std::pair<double, double>>;

Points finite(const Points& points) {
  Points kept;
  for (const auto& p : points) {
    if (std::isfinite(p.first) && std::isfinite(p.second)) kept.push_back(p);
  }
  return kept;
}

// A centred moving average over a fiftieth of the points, shorter at both ends, so that the curve
// neither lags nor is cut.
Points smooth(const Points& points) {
  const auto count = std::ssize(points);
  const auto reach = std::max<std::ptrdiff_t>(2, count / 100);
  if (count < 8) return points;
  Points result;
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    const auto side = std::min({reach, i, count - 1 - i});
    double sum = 0;
    for (auto k = i - side; k <= i + side; ++k) sum += points[static_cast<std::size_t>(k)].second;
    result.push_back(
        {points[static_cast<std::size_t>(i)].first, sum / static_cast<double>(2 * side + 1)});
  }
  return result;
}

class Axes {
 public:
  Axes(Canvas& canvas, const Points& train, const Points& held_out) : canvas_(canvas) {
    for (const Points* points : {&train, &held_out}) {
      for (const auto& [x, y] : *points) {
        x_most_ = std::max(x_most_, x);
        y_least_ = std::min(y_least_, y);
        y_most_ = std::max(y_most_, y);
      }
    }
    if (y_least_ > y_most_) y_least_ = 0, y_most_ = 1;
    // Relative as well: a constant added to a large loss would vanish, and the axis with it.
    const double margin = std::max({0.05 * (y_most_ - y_least_), 1e-3, 1e-6 * y_most_});
    y_least_ = std::max(0.0, y_least_ - margin);
    y_most_ += margin;
  }

  double x(double step) const { return kLeft + (kRight - kLeft) * step / x_most_; }
  double y(double loss) const {
    return kBottom - (kBottom - kTop) * (loss - y_least_) / (y_most_ - y_least_);
  }

  void draw() {
    const double dy = tick_step(y_most_ - y_least_, 8);
    const int digits = std::max(0, -static_cast<int>(std::floor(std::log10(dy) + 1e-9)));
    const double first = std::ceil(y_least_ / dy);
    for (int tick = 0; (first + tick) * dy <= y_most_; ++tick) {
      const double v = (first + tick) * dy;
      canvas_.line(kLeft, y(v), kRight, y(v), 1, kGrid);
      const std::string label = format("%.*f", digits, v);
      canvas_.text(kLeft - 10 - Canvas::text_width(label, 2), static_cast<int>(y(v)) - 7, label, 2,
                   kInk);
    }
    const double dx = std::max(1.0, tick_step(x_most_, 8));
    for (int tick = 0; tick * dx <= x_most_; ++tick) {
      const double v = tick * dx;
      canvas_.line(x(v), kBottom, x(v), kBottom + 6, 1, kInk);
      const std::string label = format("%.0f", v);
      canvas_.text(static_cast<int>(x(v)) - Canvas::text_width(label, 2) / 2, kBottom + 12, label,
                   2, kInk);
    }
    canvas_.line(kLeft, kTop, kLeft, kBottom, 1.5, kInk);
    canvas_.line(kLeft, kBottom, kRight, kBottom, 1.5, kInk);
    canvas_.text((kLeft + kRight) / 2 - Canvas::text_width("step", 2) / 2, kBottom + 40, "step", 2,
                 kInk);
    canvas_.text(kLeft - 10 - Canvas::text_width("loss", 2), kTop - 30, "loss", 2, kInk);
  }

  void curve(const Points& points, double thickness, Color c) {
    for (std::size_t i = 1; i < points.size(); ++i) {
      canvas_.line(x(points[i - 1].first), y(points[i - 1].second), x(points[i].first),
                   y(points[i].second), thickness, c);
    }
  }

  static constexpr int kLeft = 100, kRight = 930, kTop = 80, kBottom = 530;

 private:
  Canvas& canvas_;
  double x_most_ = 1, y_least_ = 1e300, y_most_ = -1e300;
};

void legend(Canvas& canvas, int y, const char* label, Color c, bool dots) {
  const int x = Axes::kRight - 200;
  canvas.line(x, y, x + 36, y, 2.5, c);
  if (dots) canvas.disc(x + 18, y, 4, c);
  canvas.text(x + 48, y - 7, label, 2, kInk);
}

}  // namespace

void write_loss_plot(const LossPlot& plot, const std::string& path) {
  Canvas canvas(960, 600);
  const Points train = finite(plot.train), held_out = finite(plot.held_out);
  Axes axes(canvas, train, held_out);
  canvas.text(Axes::kLeft, 20, plot.title, 3, kInk);
  axes.draw();
  axes.curve(train, 1, kTrain);
  axes.curve(smooth(train), 2.5, kSmooth);
  axes.curve(held_out, 2.5, kHeldOut);
  for (const auto& [step, loss] : held_out) canvas.disc(axes.x(step), axes.y(loss), 4, kHeldOut);
  legend(canvas, Axes::kTop + 14, "training", kSmooth, false);
  if (!held_out.empty()) legend(canvas, Axes::kTop + 40, "held out", kHeldOut, true);
  canvas.save(path);
}

}  // namespace nibble
