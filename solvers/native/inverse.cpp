// Inverses of many small complex matrices, by Gauss-Jordan elimination without pivots.
//
// A few pivots at a time: the rows that hold them are eliminated among themselves, and all other
// rows pass through the registers once for all of them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vectors.h"
#include "watch.h"

namespace {

constexpr int kPivots = 4;

// One matrix, real and imaginary parts of each row one after the other, padded with zeros.
template <class T>
class Matrix {
 public:
  explicit Matrix(int64_t c)
      : c_(c), stride_((c + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        data_(static_cast<T*>(std::aligned_alloc(kVectorBytes, bytes()))) {
    if (data_ != nullptr) std::memset(data_, 0, bytes());
  }
  ~Matrix() { std::free(data_); }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  bool exists() const { return data_ != nullptr; }

  void read(const T* from) {
    for (int64_t i = 0; i < c_; ++i) {
      for (int64_t j = 0; j < c_; ++j, from += 2) {
        real(i)[j] = from[0];
        imaginary(i)[j] = from[1];
      }
    }
  }

  void write(T* to) {
    for (int64_t i = 0; i < c_; ++i) {
      for (int64_t j = 0; j < c_; ++j, to += 2) {
        to[0] = real(i)[j];
        to[1] = imaginary(i)[j];
      }
    }
  }

  void invert(Meter& meter) {
    int64_t k = 0;
    for (; k + kPivots <= c_ && !meter.spend(4 * kPivots * c_ * c_); k += kPivots) {
      eliminate<kPivots>(k);
    }
    for (; k < c_ && !meter.spend(4 * c_ * c_); ++k) eliminate<1>(k);
  }

 private:
  size_t bytes() const { return 2 * c_ * stride_ * sizeof(T); }
  T* real(int64_t row) { return data_ + 2 * row * stride_; }
  T* imaginary(int64_t row) { return real(row) + stride_; }
  static Vec<T>& at(T* row, int64_t column) { return *reinterpret_cast<Vec<T>*>(row + column); }

  // Pivots k to k + P.
  template <int P>
  void eliminate(int64_t k) {
    for (int64_t p = k; p < k + P; ++p) {
      normalize(p);
      for (int64_t q = k; q < k + P; ++q) {
        if (q != p) subtract<1>(q, p);
      }
    }
    for (int64_t q = 0; q < k; ++q) subtract<P>(q, k);
    for (int64_t q = k + P; q < c_; ++q) subtract<P>(q, k);
  }

  // Divides row p by its pivot, in whose place its inverse appears.
  void normalize(int64_t p) {
    T *re = real(p), *im = imaginary(p);
    // 1 / (a + ib) in a unit of its own, so that no square overflows or vanishes.
    const T unit = std::max(std::abs(re[p]), std::abs(im[p])), a = re[p] / unit, b = im[p] / unit;
    const T square = (a * a + b * b) * unit, x = a / square, y = -b / square;
    re[p] = 1;
    im[p] = 0;
    for (int64_t j = 0; j < c_; j += kLanes<T>) {
      const Vec<T> s = at(re, j), t = at(im, j);
      at(re, j) = x * s - y * t;
      at(im, j) = x * t + y * s;
    }
  }

  // Takes from row q what it has of the pivots k to k + P.
  template <int P>
  void subtract(int64_t q, int64_t k) {
    T *re = real(q), *im = imaginary(q), x[P], y[P];
    for (int p = 0; p < P; ++p) {
      x[p] = re[k + p];
      y[p] = im[k + p];
      re[k + p] = im[k + p] = 0;
    }
    for (int64_t j = 0; j < c_; j += kLanes<T>) {
      Vec<T> a = at(re, j), b = at(im, j);
      for (int p = 0; p < P; ++p) {
        const Vec<T> s = at(real(k + p), j), t = at(imaginary(k + p), j);
        a -= x[p] * s;
        a += y[p] * t;
        b -= x[p] * t;
        b -= y[p] * s;
      }
      at(re, j) = a;
      at(im, j) = b;
    }
  }

  int64_t c_, stride_;
  T* data_;
};

// Returns 0, or 1 when memory ran out.
template <class T>
int inverses(const T* A, int64_t c, int64_t count, int64_t threads, T* out) {
  int failed = 0;
  Watch watch;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Meter meter(watch);
    Matrix<T> matrix(c);
    failed = !matrix.exists();
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; ++i) {
      if (failed || meter.stopped()) continue;
      matrix.read(A + 2 * i * c * c);
      matrix.invert(meter);
      matrix.write(out + 2 * i * c * c);
    }
    watch.finish();
  }
  return failed;
}

}  // namespace

extern "C" {
int lben_inverses_float(const float* A, int64_t c, int64_t count, int64_t threads, float* out) {
  return inverses(A, c, count, threads, out);
}
int lben_inverses_double(const double* A, int64_t c, int64_t count, int64_t threads, double* out) {
  return inverses(A, c, count, threads, out);
}
}
