// Y(w) = A(w) X(w) at every frequency w, for spectra that lie sample by sample.
//
// A transform leaves each channel of each sample as one run of frequencies; a product wants all
// channels and samples of one frequency side by side. A few neighbouring frequencies at a time, one
// cache line of each run, are gathered, multiplied and put back, so nothing is reordered in memory.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "vectors.h"
#include "watch.h"

namespace {

#if defined(__AVX512F__)
constexpr int kRows = 4;  // 16 of 32 registers accumulate
#else
constexpr int kRows = 2;  // 8 of 16
#endif
constexpr int kVectors = 2;  // of samples
constexpr int kLineBytes = 64;

template <class T>
constexpr int64_t kSamples = kVectors * kLanes<T>;
template <class T>
constexpr int64_t kFrequencies = kLineBytes / (2 * sizeof(T));

// Rows i to i + R of A x, for one frequency; x and y hold real and imaginary parts of kSamples.
template <class T, int R>
inline void tile(const T* A, const T* x, int64_t c, T* y) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> real[R][kVectors] = {}, imaginary[R][kVectors] = {};
  for (int64_t j = 0; j < c; ++j) {
    Vec<T> a[kVectors], b[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      a[v] = *reinterpret_cast<const Vec<T>*>(x + (2 * j * kVectors + v) * lanes);
      b[v] = *reinterpret_cast<const Vec<T>*>(x + ((2 * j + 1) * kVectors + v) * lanes);
    }
    for (int r = 0; r < R; ++r) {
      const T s = A[2 * (r * c + j)], t = A[2 * (r * c + j) + 1];
      for (int v = 0; v < kVectors; ++v) {
        real[r][v] += s * a[v];
        real[r][v] -= t * b[v];
        imaginary[r][v] += s * b[v];
        imaginary[r][v] += t * a[v];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      *reinterpret_cast<Vec<T>*>(y + (2 * r * kVectors + v) * lanes) = real[r][v];
      *reinterpret_cast<Vec<T>*>(y + ((2 * r + 1) * kVectors + v) * lanes) = imaginary[r][v];
    }
  }
}

// The numbers I of a and b, one after the other.
template <class T, size_t... I>
inline Vec<T> shuffled(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Index Mask __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Mask{I...});
#endif
}

// Transposes a square of vectors: log N rounds of interleaving its upper half with its lower.
template <class T, size_t... I>
inline void transpose(Vec<T>* square, std::index_sequence<I...>) {
  constexpr int N = sizeof...(I);
  Vec<T> next[N];
  for (int round = 1; round < N; round *= 2) {
    for (int k = 0; k < N / 2; ++k) {
      const Vec<T> a = square[k], b = square[k + N / 2];
      next[2 * k] = shuffled<T>(a, b, std::index_sequence<(I / 2 + I % 2 * N)...>());
      next[2 * k + 1] = shuffled<T>(a, b, std::index_sequence<(N / 2 + I / 2 + I % 2 * N)...>());
    }
    for (int k = 0; k < N; ++k) square[k] = next[k];
  }
}

// One line of `width` frequencies of all channels of up to kSamples samples, both ways.
template <class T>
class Line {
 public:
  Line(int64_t c, int64_t frequencies, int64_t width)
      : c_(c), frequencies_(frequencies), width_(width) {}

  // Numbers that all samples of one frequency take.
  static int64_t plane(int64_t c) { return 2 * c * kSamples<T>; }

  void gather(const T* X, int64_t count, T* x) const {
    each(count, [&](int64_t j, int64_t s, int64_t k, int64_t samples, int64_t numbers) {
      Vec<T> square[N] = {};
      const T* run = X + 2 * (s * c_ + j) * frequencies_ + k;
      for (int64_t i = 0; i < samples; ++i, run += 2 * c_ * frequencies_) {
        copy(reinterpret_cast<T*>(&square[i]), run, numbers);
      }
      transpose<T>(square, std::make_index_sequence<N>());
      for (int64_t i = 0; i < numbers; ++i) *at(x, j, s, k + i) = square[i];
    });
  }

  // Asks for share `part` of `parts` of the line that follows, in X and Y, ahead of its use.
  void prefetch(const T* X, T* Y, int64_t count, int64_t part, int64_t parts) const {
    const int64_t runs = count * c_;
    for (int64_t run = runs * part / parts; run < runs * (part + 1) / parts; ++run) {
      const int64_t next = 2 * (run * frequencies_ + width_);
      __builtin_prefetch(X + next, 0, 2);
      __builtin_prefetch(Y + next, 1, 2);
    }
  }

  void scatter(T* y, int64_t count, T* Y) const {
    each(count, [&](int64_t j, int64_t s, int64_t k, int64_t samples, int64_t numbers) {
      Vec<T> square[N] = {};
      for (int64_t i = 0; i < numbers; ++i) square[i] = *at(y, j, s, k + i);
      transpose<T>(square, std::make_index_sequence<N>());
      T* run = Y + 2 * (s * c_ + j) * frequencies_ + k;
      for (int64_t i = 0; i < samples; ++i, run += 2 * c_ * frequencies_) {
        copy(run, reinterpret_cast<const T*>(&square[i]), numbers);
      }
    });
  }

 private:
  static constexpr int64_t N = kLanes<T>;

  static void copy(T* to, const T* from, int64_t numbers) {
    if (numbers == N) {
      std::memcpy(to, from, sizeof(Vec<T>));
    } else {
      for (int64_t i = 0; i < numbers; ++i) to[i] = from[i];
    }
  }

  // Calls act(channel, first sample, first number, samples, numbers) for every square.
  template <class Act>
  void each(int64_t count, const Act& act) const {
    for (int64_t j = 0; j < c_; ++j) {
      for (int64_t s = 0; s < kSamples<T>; s += N) {
        for (int64_t k = 0; k < 2 * width_; k += N) {
          act(j, s, k, std::max<int64_t>(0, std::min(N, count - s)), std::min(N, 2 * width_ - k));
        }
      }
    }
  }

  // Where number k of a run lies, for N samples from s.
  Vec<T>* at(T* x, int64_t j, int64_t s, int64_t k) const {
    T* part = x + k / 2 * plane(c_) + (2 * j + k % 2) * kSamples<T> + s;
    return reinterpret_cast<Vec<T>*>(part);
  }

  int64_t c_, frequencies_, width_;
};

template <class T>
int product(const T* A, const T* X, int64_t samples, int64_t c, int64_t frequencies,
            int64_t threads, T* Y) {
  constexpr int64_t S = kSamples<T>, F = kFrequencies<T>;
  const int64_t lines = (frequencies + F - 1) / F, plane = Line<T>::plane(c);
  int failed = 0;
  Watch watch;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Meter meter(watch);
    T* x = static_cast<T*>(std::aligned_alloc(kLineBytes, 2 * F * plane * sizeof(T)));
    T* y = x + F * plane;
    failed = x == nullptr;
#pragma omp for schedule(static) nowait
    for (int64_t index = 0; index < lines; ++index) {
      if (failed || meter.stopped()) continue;
      const int64_t first = index * F, width = std::min(F, frequencies - first);
      const Line<T> line(c, frequencies, width);
      for (int64_t from = 0; from < samples; from += S) {
        const int64_t count = std::min(S, samples - from), start = 2 * (from * c * frequencies + first);
        line.gather(X + start, count, x);
        for (int64_t f = 0; f < width; ++f) {
          if (meter.spend(4 * c * c * S)) break;
          const T* symbol = A + 2 * (first + f) * c * c;
          line.prefetch(X + start, Y + start, count, f, width);
          int64_t i = 0;
          for (; i + kRows <= c; i += kRows) {
            tile<T, kRows>(symbol + 2 * i * c, x + f * plane, c, y + f * plane + 2 * i * S);
          }
          for (; i < c; ++i) {
            tile<T, 1>(symbol + 2 * i * c, x + f * plane, c, y + f * plane + 2 * i * S);
          }
        }
        line.scatter(y, count, Y + start);
      }
    }
    std::free(x);
    watch.finish();
  }
  return failed;
}

}  // namespace

extern "C" {
int lben_spectral_float(const float* A, const float* X, int64_t samples, int64_t c, int64_t f,
                        int64_t threads, float* Y) {
  return product(A, X, samples, c, f, threads, Y);
}
int lben_spectral_double(const double* A, const double* X, int64_t samples, int64_t c, int64_t f,
                         int64_t threads, double* Y) {
  return product(A, X, samples, c, f, threads, Y);
}
}
