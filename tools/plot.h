// loss.png: training and held-out loss over the steps, drawn without any library but the PNG
// writer.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace nibble {

struct LossPlot {
  std::string title;
  std::vector<std::pair<double, double>> train, held_out;  // (step, loss)
};

// 960 x 600 pixels, with axes, ticks, labels and a legend. Points that are not finite are left
// out. The file appears by rename.
void write_loss_plot(const LossPlot& plot, const std::string& path);

}  // namespace nibble
