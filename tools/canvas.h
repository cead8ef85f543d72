// Pixels to draw on: what the plots are made of, without any library but the PNG writer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace nibble {

struct Color {
  std::uint8_t r, g, b;
};
constexpr Color kInk{40, 44, 52}, kGrid{228, 230, 234};

// Starts white. What lies outside is not drawn.
class Canvas {
 public:
  Canvas(int width, int height);

  void dot(int x, int y, Color c, double opacity = 1);
  // Pixels left <= x < right, top <= y < bottom.
  void fill(int left, int top, int right, int bottom, Color c, double opacity = 1);
  // A line `thickness` pixels wide with soft edges: each pixel near it is covered by its distance.
  void line(double x0, double y0, double x1, double y1, double thickness, Color c);
  void disc(double cx, double cy, double radius, Color c) { line(cx, cy, cx, cy, 2 * radius, c); }

  // Text of the 5 x 7 font, `scale` pixels a dot, its top left corner at (x, y).
  void text(int x, int y, const std::string& text, int scale, Color c);
  static int text_width(const std::string& text, int scale) {
    return 6 * scale * static_cast<int>(text.size()) - scale;
  }

  // As a PNG. The file appears by rename.
  void save(const std::string& path) const;

 private:
  int width_, height_;
  std::vector<std::uint8_t> pixels_;
};

// A round distance between ticks that gives at most `most` of them, and the digits behind the point
// that it needs.
double tick_step(double range, int most);
int tick_digits(double step);

}  // namespace nibble
