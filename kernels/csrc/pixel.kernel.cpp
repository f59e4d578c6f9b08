#include "pixel.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace cohobate {
namespace COHOBATE_ISA {

// target = (byte - centre) * scale + offset, one of each for every byte of a strip. Subtracting the centre first makes the
// target of a constant channel exactly zero, whatever its scale.
struct Affine {
  std::vector<float> centre, scale, offset;
  explicit Affine(int64_t length) : centre(length), scale(length), offset(length) {}

  void set(int64_t channel, int64_t channels, double c, double s, double o) {
    for (size_t k = channel; k < centre.size(); k += channels) {
      centre[k] = static_cast<float>(c);
      scale[k] = static_cast<float>(s);
      offset[k] = static_cast<float>(o);
    }
  }
};

// Sums of the bytes of one patch and of their squares, by position inside the strip and then by channel: exact integers.
struct Sums {
  std::vector<int32_t> lane, lane_squares;
  std::vector<int64_t> channel, channel_squares;
  Sums(int64_t length, int64_t channels) : lane(length), lane_squares(length), channel(channels), channel_squares(channels) {}

  void read(const Patches& patches, const uint8_t* patch) {
    const int64_t length = strip_length(patches), strips = strip_count(patches), channels = patches.channels;
    int32_t* __restrict sum = lane.data();
    int32_t* __restrict squares = lane_squares.data();
    std::fill(channel.begin(), channel.end(), 0);
    std::fill(channel_squares.begin(), channel_squares.end(), 0);
    for (int64_t first = 0; first < strips; first += 32768) {  // 32768 * 255^2 still fits an int32
      std::fill_n(sum, length, 0);
      std::fill_n(squares, length, 0);
      for (int64_t s = first; s < std::min(strips, first + 32768); ++s) {
        const uint8_t* __restrict bytes = strip_bytes(patches, patch, s);
        for (int64_t k = 0; k < length; ++k) {
          const int32_t value = bytes[k];
          sum[k] += value;
          squares[k] += value * value;
        }
      }
      for (int64_t k = 0; k < length; k += channels)
        for (int64_t c = 0; c < channels; ++c) {
          channel[c] += sum[k + c];
          channel_squares[c] += squares[k + c];
        }
    }
  }
};

static void standardise(const Patches& patches, PixelTarget target, const double* mean, const double* std, double eps,
                        const Sums& sums, Affine& affine) {
  const int64_t channels = patches.channels, count = strip_count(patches) * patches.pw;  // count: values a channel
  const auto centre = [&](int64_t c) { return static_cast<double>(sums.channel[c]) / count; };
  const auto spread = [&](int64_t c) {  // sum of squared deviations, in bytes
    return static_cast<double>(count * sums.channel_squares[c] - sums.channel[c] * sums.channel[c]) / count;
  };
  if (target == PixelTarget::per_channel) {
    for (int64_t c = 0; c < channels; ++c)
      affine.set(c, channels, centre(c), 1 / (std::sqrt(spread(c) / (count - 1)) + 255 * eps), 0);
    return;
  }
  const auto level = [&](int64_t c) { return (centre(c) / 255 - mean[c]) / std[c]; };  // the channel's mean value
  double average = 0, total = 0;
  for (int64_t c = 0; c < channels; ++c) average += level(c) / channels;
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = 1 / (255 * std[c]), off = level(c) - average;
    total += scale * scale * spread(c) + count * off * off;
  }
  const double inverse = 1 / std::sqrt(total / (count * channels - 1) + eps);
  for (int64_t c = 0; c < channels; ++c)
    affine.set(c, channels, centre(c), inverse / (255 * std[c]), (level(c) - average) * inverse);
}

template <bool kError, class T>
static void loss(const Patches& patches, PixelTarget target, const double* mean, const double* std, double eps,
                 const T* prediction, int64_t prediction_stride_b, int64_t prediction_stride_n, T* error, double* partial) {
  const int64_t length = strip_length(patches), strips = strip_count(patches), rows = patches.batch * patches.count;
#pragma omp parallel
  {
    Affine affine(length);
    Sums sums(length, patches.channels);
    std::vector<float> lanes(length);
    if (target == PixelTarget::values)
      for (int64_t c = 0; c < patches.channels; ++c)
        affine.set(c, patches.channels, 255 * mean[c], 1 / (255 * std[c]), 0);
    const float* __restrict centre = affine.centre.data();
    const float* __restrict scale = affine.scale.data();
    const float* __restrict offset = affine.offset.data();
    float* __restrict lane = lanes.data();
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < (rows + kPixelChunk - 1) / kPixelChunk; ++chunk) {
      std::fill(lanes.begin(), lanes.end(), 0.0f);
      for (int64_t i = chunk * kPixelChunk; i < std::min(rows, (chunk + 1) * kPixelChunk); ++i) {
        const uint8_t* patch = patch_bytes(patches, i);
        if (target != PixelTarget::values) {
          sums.read(patches, patch);
          standardise(patches, target, mean, std, eps, sums, affine);
        }
        const T* row = prediction + i / patches.count * prediction_stride_b + i % patches.count * prediction_stride_n;
        for (int64_t s = 0; s < strips; ++s) {
          const uint8_t* __restrict bytes = strip_bytes(patches, patch, s);
          const T* __restrict from = row + s * length;
          T* __restrict to = error + (i * strips + s) * length;
          for (int64_t k = 0; k < length; ++k) {
            const float difference = load(from + k) - ((static_cast<float>(bytes[k]) - centre[k]) * scale[k] + offset[k]);
            lane[k] += difference * difference;
            if constexpr (kError) store(to + k, difference);
          }
        }
      }
      double sum = 0;
      for (int64_t k = 0; k < length; ++k) sum += lane[k];
      partial[chunk] = sum;
    }
  }
}

template <class T>
static void loss_of(const Patches& patches, PixelTarget target, const double* mean, const double* std, double eps,
                    const void* prediction, int64_t prediction_stride_b, int64_t prediction_stride_n, void* error,
                    double* partial) {
  if (error)
    loss<true>(patches, target, mean, std, eps, static_cast<const T*>(prediction), prediction_stride_b, prediction_stride_n,
               static_cast<T*>(error), partial);
  else
    loss<false>(patches, target, mean, std, eps, static_cast<const T*>(prediction), prediction_stride_b, prediction_stride_n,
                static_cast<T*>(nullptr), partial);
}

void pixel_loss(const Patches& patches, PixelTarget target, const double* mean, const double* std, double eps,
                const void* prediction, int64_t prediction_stride_b, int64_t prediction_stride_n, Dtype dtype, void* error,
                double* partial) {
  (dtype == Dtype::f32 ? loss_of<float> : loss_of<bf16>)(patches, target, mean, std, eps, prediction, prediction_stride_b,
                                                         prediction_stride_n, error, partial);
}

template <class T>
static void scale_of(const T* __restrict error, float factor, int64_t count, T* __restrict out) {
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < count; ++k) store(out + k, load(error + k) * factor);
}

void pixel_scale(const void* error, Dtype dtype, float factor, int64_t count, void* out) {
  if (dtype == Dtype::f32)
    scale_of(static_cast<const float*>(error), factor, count, static_cast<float*>(out));
  else
    scale_of(static_cast<const bf16*>(error), factor, count, static_cast<bf16*>(out));
}

}  // namespace COHOBATE_ISA
}  // namespace cohobate
