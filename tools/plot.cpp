#include "tools/plot.h"

#include <algorithm>
#include <cmath>

#include "tools/canvas.h"
#include "tools/text.h"

namespace nibble {
namespace {

constexpr Color kTrain{158, 188, 226}, kSmooth{31, 97, 180}, kHeldOut{214, 84, 20};

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
    const int digits = tick_digits(dy);
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
