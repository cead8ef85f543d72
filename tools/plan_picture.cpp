// Programs have far more steps than the picture has columns. A pixel takes the colour of what fills
// most of it, never a mixture that the legend does not have, and is the paler the less of its time
// and its addresses are in use; anything at all leaves a visible tint.
#include "tools/plan_picture.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "engine/anatomy.h"
#include "tools/canvas.h"
#include "tools/text.h"

namespace nibble {
namespace {

struct Kind {
  const char* name;
  Color color;
};
// The colours of Okabe and Ito, which every kind of colour vision tells apart, and a grey.
constexpr std::array<Kind, kPurposes> kKinds = {{
    {"block inputs, stored", {0, 114, 178}},
    {"other activations, stored", {86, 180, 233}},
    {"activations, not stored", {176, 182, 192}},
    {"activations, recomputed", {0, 158, 115}},
    {"gradients of activations", {230, 159, 0}},
    {"copies from the host", {204, 121, 167}},
    {"kernel scratch", {213, 94, 0}},
}};
constexpr Color kPale{110, 116, 126}, kEvenBlock{226, 230, 236}, kOddBlock{200, 206, 215};
constexpr double kFaintest = 0.3;

constexpr int kWidth = 1600, kHeight = 900;
constexpr int kLeft = 100, kRight = 1570, kColumns = kRight - kLeft;
constexpr int kPasses = 94, kStripTop = 114, kStripBottom = 134, kLegend = 812;

// A stretch of the picture whose height stands for the bytes of the arena.
struct Panel {
  int top, bottom;
  const char* label;
};
constexpr Panel kLive{166, 286, "in use"}, kArena{326, 738, "address"};

struct ByteUnit {
  const char* name;
  double bytes;
};
ByteUnit unit_of(std::int64_t bytes) {
  if (bytes >= std::int64_t{1} << 30) return {"GiB", 1 << 30};
  if (bytes >= std::int64_t{1} << 20) return {"MiB", 1 << 20};
  return {"KiB", 1 << 10};
}

using ByPurpose = std::array<std::int64_t, kPurposes>;

std::int64_t sum(const ByPurpose& bytes) {
  return std::accumulate(bytes.begin(), bytes.end(), std::int64_t{0});
}

class Picture {
 public:
  Picture(const Plan& plan, std::int32_t loss)
      : plan_(plan),
        steps_(static_cast<int>(plan.steps.size())),
        loss_step_(step_of(loss)),
        blocks_(blocks(plan, loss)),
        purposes_(purposes(plan, loss)),
        canvas_(kWidth, kHeight) {
    find_live();
  }

  const Canvas& draw(const PictureText& words) {
    draw_heading(words);
    draw_blocks();
    for (const Panel& panel : {kLive, kArena}) draw_grid(panel, panel.top == kLive.top ? 4 : 8);
    draw_live();
    draw_peak();
    draw_arena();
    draw_outlines();
    draw_steps();
    draw_legend();
    return canvas_;
  }

 private:
  // Of the first step at or after a node.
  int step_of(std::int32_t node) const {
    return static_cast<int>(std::lower_bound(plan_.steps.begin(), plan_.steps.end(), node) -
                            plan_.steps.begin());
  }
  double x(double step) const { return kLeft + kColumns * step / std::max(1, steps_); }
  double y(const Panel& panel, double bytes) const {
    const auto all = static_cast<double>(std::max<std::int64_t>(plan_.arena_bytes, 1));
    return panel.bottom - (panel.bottom - panel.top) * bytes / all;
  }

  void find_live() {
    std::vector<ByPurpose> change(static_cast<std::size_t>(steps_) + 1);
    for (std::size_t i = 0; i < plan_.stays.size(); ++i) {
      const Plan::Stay& stay = plan_.stays[i];
      const auto purpose = static_cast<std::size_t>(purposes_[i]);
      change[static_cast<std::size_t>(step_of(stay.first))][purpose] += stay.bytes;
      change[static_cast<std::size_t>(step_of(stay.last + 1))][purpose] -= stay.bytes;
      has_[purpose] = true;
    }
    ByPurpose now{};
    for (int step = 0; step < steps_; ++step) {
      for (std::size_t p = 0; p < kPurposes; ++p)
        now[p] += change[static_cast<std::size_t>(step)][p];
      live_.push_back(now);
      if (sum(now) > sum(live_[static_cast<std::size_t>(peak_)])) peak_ = step;
    }
  }

  void draw_heading(const PictureText& words) {
    canvas_.text(kLeft, 20, one_line(words.title, 78), 3, kInk);
    const double ratio = static_cast<double>(plan_.arena_bytes) /
                         static_cast<double>(std::max<std::int64_t>(plan_.lower_bound_bytes, 1));
    canvas_.text(kLeft, 54,
                 one_line(words.details, 40) + ", arena " + size_text(plan_.arena_bytes) + ", " +
                     format("%.4f", ratio) + " of its lower bound, " +
                     size_text(plan_.unshared_bytes) + " without sharing",
                 2, kPale);
  }

  void centred(double from, double to, int top, const std::string& text, Color c) {
    const double middle = (from + to - Canvas::text_width(text, 2)) / 2;
    canvas_.text(static_cast<int>(std::lround(middle)), top, text, 2, c);
  }

  struct Run {
    int first, end, block;
  };
  std::vector<Run> runs() const {
    std::vector<Run> result;
    for (int step = 0; step < steps_; ++step) {
      const int block = blocks_[static_cast<std::size_t>(step)];
      if (result.empty() || result.back().block != block || step == loss_step_) {
        result.push_back({step, step, block});
      }
      result.back().end = step + 1;
    }
    return result;
  }

  // The smallest round distance between numbered blocks at which no two numbers touch.
  int numbered_every(const std::vector<Run>& runs) const {
    for (const int every : {1, 2, 5, 10, 20, 50, 100, 200, 500}) {
      double end = 0;
      bool fits = true;
      for (const Run& run : runs) {
        if (run.block < 0 || run.block % every != 0) continue;
        const double half = (Canvas::text_width(std::to_string(run.block), 2) + 10) / 2.0;
        const double middle = x((run.first + run.end) / 2.0);
        fits = fits && middle - half >= end;
        end = middle + half;
      }
      if (fits) return every;
    }
    return 1000;
  }

  void draw_blocks() {
    canvas_.text(kLeft - 24 - Canvas::text_width("block", 2), kStripTop + 3, "block", 2, kInk);
    centred(x(0), x(loss_step_), kPasses, "forward", kInk);
    centred(x(loss_step_), x(steps_), kPasses, "backward", kInk);
    const std::vector<Run> all = runs();
    const int every = numbered_every(all);
    for (const Run& run : all) {
      if (run.block < 0) continue;
      canvas_.fill(static_cast<int>(std::lround(x(run.first))), kStripTop,
                   static_cast<int>(std::lround(x(run.end))), kStripBottom,
                   run.block % 2 == 0 ? kEvenBlock : kOddBlock);
    }
    for (const Run& run : all) {
      if (run.block < 0 || run.block % every != 0) continue;
      centred(x(run.first), x(run.end), kStripTop + 3, std::to_string(run.block), kInk);
    }
  }

  void draw_grid(const Panel& panel, int ticks) {
    const ByteUnit unit = unit_of(plan_.arena_bytes);
    const double most = static_cast<double>(plan_.arena_bytes) / unit.bytes;
    const double step = tick_step(most, ticks);
    for (int tick = 0; tick * step <= most; ++tick) {
      const double at = y(panel, tick * step * unit.bytes);
      canvas_.line(kLeft, at, kRight, at, 1, kGrid);
      canvas_.line(kLeft - 6, at, kLeft, at, 1, kInk);
      const std::string label = format("%.*f", tick_digits(step), tick * step);
      canvas_.text(kLeft - 12 - Canvas::text_width(label, 2), static_cast<int>(at) - 7, label, 2,
                   kInk);
    }
    canvas_.text(kLeft, panel.top - 22, std::string(panel.label) + ", " + unit.name, 2, kInk);
  }

  // What is in use, stacked; each column shows the fullest of its steps.
  void draw_live() {
    for (int column = 0; column < kColumns && steps_ > 0; ++column) {
      const auto first = static_cast<std::size_t>(std::int64_t{column} * steps_ / kColumns);
      const auto end = std::max(
          first + 1, static_cast<std::size_t>((std::int64_t{column} + 1) * steps_ / kColumns));
      const ByPurpose& fullest =
          *std::max_element(live_.begin() + static_cast<std::ptrdiff_t>(first),
                            live_.begin() + static_cast<std::ptrdiff_t>(end),
                            [](const ByPurpose& a, const ByPurpose& b) { return sum(a) < sum(b); });
      double bytes = 0;
      for (std::size_t p = 0; p < kPurposes; ++p) {
        const auto bottom = static_cast<int>(std::lround(y(kLive, bytes)));
        bytes += static_cast<double>(fullest[p]);
        const auto top = static_cast<int>(std::lround(y(kLive, bytes)));
        canvas_.fill(kLeft + column, top, kLeft + column + 1, bottom, kKinds[p].color);
      }
    }
  }

  void draw_peak() {
    const double at = x(peak_ + 0.5);
    const int top = kLive.top - 9;
    for (int row = 0; row < 7; ++row) {
      canvas_.line(at - 6 + row, top + row, at + 6 - row, top + row, 1, kInk);
    }
    const std::string text = "peak, step " + count_text(peak_);
    const double room = kRight - Canvas::text_width(text, 2);
    canvas_.text(static_cast<int>(std::clamp(at + 14, kLeft + 150.0, room)), kLive.top - 22, text,
                 2, kInk);
  }

  // Left, right, top and bottom of a stay, in pixels.
  struct Box {
    double left, right, top, bottom;
  };
  Box box(const Plan::Stay& stay) const {
    return {x(step_of(stay.first)), x(step_of(stay.last + 1)),
            y(kArena, static_cast<double>(stay.offset + stay.bytes)),
            y(kArena, static_cast<double>(stay.offset))};
  }

  void draw_arena() {
    constexpr int rows = kArena.bottom - kArena.top;
    // By pixel: the share of it that each purpose fills.
    std::vector<std::array<float, kPurposes>> filled(static_cast<std::size_t>(rows * kColumns));
    for (std::size_t i = 0; i < plan_.stays.size(); ++i) {
      const Box b = box(plan_.stays[i]);
      const int end_row = std::min(rows, static_cast<int>(std::ceil(b.bottom)) - kArena.top);
      const int end_column = std::min(kColumns, static_cast<int>(std::ceil(b.right)) - kLeft);
      for (int row = std::max(0, static_cast<int>(b.top) - kArena.top); row < end_row; ++row) {
        const double top = kArena.top + row, left = kLeft;
        const double height = std::min(b.bottom, top + 1) - std::max(b.top, top);
        for (int column = static_cast<int>(b.left) - kLeft; column < end_column; ++column) {
          const double width =
              std::min(b.right, left + column + 1) - std::max(b.left, left + column);
          filled[static_cast<std::size_t>(row * kColumns + column)]
                [static_cast<std::size_t>(purposes_[i])] += static_cast<float>(width * height);
        }
      }
    }
    for (int row = 0; row < rows; ++row) {
      for (int column = 0; column < kColumns; ++column) {
        const auto& shares = filled[static_cast<std::size_t>(row * kColumns + column)];
        const double share = std::accumulate(shares.begin(), shares.end(), 0.0);
        if (share < 1e-6) continue;
        const auto most = std::max_element(shares.begin(), shares.end()) - shares.begin();
        canvas_.dot(kLeft + column, kArena.top + row, kKinds[static_cast<std::size_t>(most)].color,
                    std::min(1.0, kFaintest + (1 - kFaintest) * share));
      }
    }
  }

  // Light seams between rectangles that are large enough to be seen one by one.
  void draw_outlines() {
    constexpr Color seam{255, 255, 255};
    constexpr double strength = 0.55, kSmallestSeamed = 5;
    for (const Plan::Stay& stay : plan_.stays) {
      const Box b = box(stay);
      const auto left = static_cast<int>(std::lround(b.left)),
                 right = static_cast<int>(std::lround(b.right)),
                 top = static_cast<int>(std::lround(b.top)),
                 bottom = static_cast<int>(std::lround(b.bottom));
      if (b.right - b.left < kSmallestSeamed || b.bottom - b.top < kSmallestSeamed) continue;
      canvas_.fill(left, top, right, top + 1, seam, strength);
      canvas_.fill(right - 1, top + 1, right, bottom, seam, strength);
    }
  }

  void draw_steps() {
    for (const Panel& panel : {kLive, kArena}) {
      canvas_.line(kLeft, panel.top, kLeft, panel.bottom, 1.5, kInk);
      canvas_.line(kLeft, panel.bottom, kRight, panel.bottom, 1.5, kInk);
      // In dashes: at the loss much may be alive for a single step.
      for (int top = panel.top; top < panel.bottom; top += 10) {
        canvas_.line(x(loss_step_), top, x(loss_step_), std::min(top + 3, panel.bottom), 1.5, kInk);
      }
    }
    canvas_.line(x(loss_step_), kPasses, x(loss_step_), kStripBottom, 1.5, kInk);
    const double step = std::max(1.0, tick_step(steps_, 10));
    for (int tick = 0; tick * step <= steps_; ++tick) {
      const double at = x(tick * step);
      canvas_.line(at, kArena.bottom, at, kArena.bottom + 6, 1, kInk);
      centred(at, at, kArena.bottom + 12, count_text(std::llround(tick * step)), kInk);
    }
    const double per_column = static_cast<double>(steps_) / kColumns;
    centred(
        kLeft, kRight, kArena.bottom + 38,
        std::string("step of the program") +
            (per_column < 2 ? ""
                            : format(", %.0f a column, pale: in use for some of them", per_column)),
        kInk);
  }

  void draw_legend() {
    const int width = kColumns / 4;
    int place = 0;
    const auto entry = [&](const char* name, Color color, std::int64_t bytes) {
      const int left = kLeft + place % 4 * width, top = kLegend + place / 4 * 44;
      canvas_.fill(left, top, left + 20, top + 34, color);
      canvas_.text(left + 30, top, name, 2, kInk);
      canvas_.text(left + 30, top + 20, size_text(bytes) + " at the peak", 2, kPale);
      ++place;
    };
    for (std::size_t p = 0; p < kPurposes; ++p) {
      if (has_[p])
        entry(kKinds[p].name, kKinds[p].color, live_[static_cast<std::size_t>(peak_)][p]);
    }
  }

  const Plan& plan_;
  int steps_, loss_step_;
  std::vector<std::int32_t> blocks_;  // by step
  std::vector<Purpose> purposes_;     // by stay
  std::vector<ByPurpose> live_;       // by step
  std::array<bool, kPurposes> has_{};
  int peak_ = 0;
  Canvas canvas_;
};

}  // namespace

void write_plan_picture(const PictureText& words, const Plan& plan, std::int32_t loss,
                        const std::string& path) {
  Picture(plan, loss).draw(words).save(path);
}

}  // namespace nibble
