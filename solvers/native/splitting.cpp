// One splitting iteration and its stopping rule for many samples, without leaving the cache.
//
//     x <- (1 - theta) x + theta (shift + rho(x) M),     z = prox(x),
//
// with rho(x) = 2 prox(x) - x (Peaceman-Rachford, Douglas-Rachford) or prox(x) (forward-backward).
// Samples are worked on in small groups that stay in the cache of one core. A sample that is done
// leaves its group, so each runs for about as many steps as it needs. Groups do not depend on the
// number of threads, so neither does the result.
//
// sigma is positively homogeneous here: each sample is solved in a unit of its own, the power of two
// below its largest |v|, so that no sum of squares overflows or vanishes.
//
// Built once per machine by solvers/native/library.py; plain C interface, no headers of torch.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "vectors.h"
#include "watch.h"

namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3;  // 24 of 32 registers accumulate
#elif defined(__AVX__)
constexpr int kRows = 4, kVectors = 3;  // 12 of 16
#else
constexpr int kRows = 4, kVectors = 2;  // 8 of 16 (SSE) or 32 (NEON)
#endif

template <class T>
int64_t padded(int64_t n) {
  int64_t stride = (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  if (stride * sizeof(T) % 4096 == 0) stride += kLanes<T>;  // keep rows out of one cache set
  return stride;
}

// Memory that a thread keeps from one call to the next: small problems would spend their time on
// fresh pages. It holds what the largest problem so far needed, a few rows per sample of a group.
class Arena {
 public:
  Arena() = default;
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Makes room; what was there before is gone. Returns whether there is memory.
  bool reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    std::free(data_);
    data_ = static_cast<char*>(std::aligned_alloc(kVectorBytes, bytes));
    size_ = data_ == nullptr ? 0 : bytes;
    if (data_ != nullptr) std::memset(data_, 0, bytes);  // rows beyond a group hold numbers
    return data_ != nullptr;
  }

  char* take(size_t bytes) {
    char* at = data_ + used_;
    used_ += bytes;
    return at;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// Aligned rows in an arena.
template <class T>
class Rows {
 public:
  static size_t bytes(int64_t rows, int64_t stride) { return rows * stride * sizeof(T); }

  Rows(Arena& arena, int64_t rows, int64_t stride)
      : data_(reinterpret_cast<T*>(arena.take(bytes(rows, stride)))), stride_(stride) {}
  T* operator[](int64_t row) { return data_ + row * stride_; }
  void swap(Rows& other) { std::swap(data_, other.data_); }

 private:
  T* data_;
  int64_t stride_;
};

// out[r][j] = scale * init[r][j] + theta * sum_k u[r][k] M[k][j] for kRows rows and V vectors of j.
template <class T, int V>
inline void tile(const T* u, int64_t stride, const T* panel, int64_t n, T* out, const T* init,
                 T theta) {
  Vec<T> sum[kRows][V] = {};
  for (int64_t k = 0; k < n; ++k) {
    Vec<T> row[V];
    for (int v = 0; v < V; ++v) {
      row[v] = *reinterpret_cast<const Vec<T>*>(panel + (k * V + v) * kLanes<T>);
    }
    for (int r = 0; r < kRows; ++r) {
      const T factor = u[r * stride + k];
      for (int v = 0; v < V; ++v) sum[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < V; ++v) {
      const int64_t at = r * stride + v * kLanes<T>;
      Vec<T>* target = reinterpret_cast<Vec<T>*>(out + at);
      const Vec<T> start = *reinterpret_cast<const Vec<T>*>(init + at);
      if (theta == T(1)) {
        *target = start + sum[r][v];
      } else {
        *target = (T(1) - theta) * *target + theta * (start + sum[r][v]);
      }
    }
  }
}

// out = (1 - theta) out + theta (init + u M) for `count` rows; M in panels of kVectors vectors.
// Part of it where the meter says stop: nothing is read of what a stopped computation leaves.
template <class T>
void product(const T* u, int64_t stride, const T* packed, int64_t n, int64_t count, T* out,
             const T* init, T theta, Meter& meter) {
  const int64_t vectors = (n + kLanes<T> - 1) / kLanes<T>;
  for (int64_t first = 0; first < vectors; first += kVectors) {
    if (meter.spend(n * kVectors * kLanes<T> * count)) return;
    const T* panel = packed + first * kLanes<T> * n;
    const int64_t column = first * kLanes<T>;
    const int64_t width = vectors - first;
    for (int64_t row = 0; row < count; row += kRows) {
      const T* from = u + row * stride;
      T* to = out + row * stride + column;
      const T* start = init + row * stride + column;
      if (width >= 3 && kVectors >= 3) {
        tile<T, (kVectors >= 3 ? 3 : 1)>(from, stride, panel, n, to, start, theta);
      } else if (width >= 2) {
        tile<T, 2>(from, stride, panel, n, to, start, theta);
      } else {
        tile<T, 1>(from, stride, panel, n, to, start, theta);
      }
    }
  }
}

}  // namespace

// The problem as solvers/backends/cpu.py passes it; the two must agree field by field.
template <class T>
struct Problem {
  int64_t n, samples;
  const T* map;        // packed M
  const float* rough;  // packed M in float for the inner iterations of a double problem, or null
  const T* weights;    // packed transpose of W
  const T* bias;       // samples x n: v
  const T* start;      // samples x n: z0, or null
  const T* alpha;      // n: step sizes
  const T* root;       // n: square root of the metric
  const T* slope;      // samples x n: d of sigma(v) = d v, or null for sigma(v) = max(v, negative v)
  double negative;
  int64_t reflected;   // whether rho is the reflected prox, and shift = (I + M) alpha v
  int64_t max_steps, threads;
  double theta, tol, noise;
  int64_t done;        // steps that were made before the first
  T* z;                // samples x n: prox(x) at the last check
  T* residual;         // samples
  int64_t* steps;      // samples: with those done before
  int64_t* checks;     // one number, of the sample with the most
};

namespace {

template <class T>
class Group {
 public:
  // What a group of `capacity` samples takes from its arena.
  static size_t bytes(const Problem<T>& p, int64_t capacity) {
    const int64_t factors = p.slope ? capacity : 1;
    return Rows<T>::bytes(7 * capacity + factors, padded<T>(p.n)) + Inner::bytes(p, capacity);
  }

  Group(const Problem<T>& p, int64_t capacity, Arena& arena, Watch& watch)
      : meter_(watch), p_(p), n_(p.n), stride_(padded<T>(p.n)), x_(arena, capacity, stride_),
        before_(arena, capacity, stride_), u_(arena, capacity, stride_),
        shift_(arena, capacity, stride_), factor_(arena, p.slope ? capacity : 1, stride_),
        point_(arena, capacity, stride_), image_(arena, capacity, stride_),
        zero_(arena, capacity, stride_), inner_(p, capacity, arena), rho_(n_), prox_(n_),
        gauge_(n_), slot_(capacity), order_(capacity), residual_(capacity), explained_(capacity),
        noisy_(capacity) {
    std::memset(zero_[0], 0, Rows<T>::bytes(capacity, stride_));
    for (int64_t i = 0; i < n_; ++i) {
      prox_[i] = shrink(static_cast<T>(p.negative), p.alpha[i]);
      rho_[i] = p.reflected ? 2 * prox_[i] - 1 : prox_[i];
      gauge_[i] = p.root[i] / (2 * p.alpha[i]);
    }
  }

  // Solves some samples; returns the most checks that one of them took.
  int64_t run(int64_t first, int64_t count) {
    begin(first, count);
    while (active_ > 0 && !meter_.stopped()) {
      const int64_t burst = plan();
      if (p_.rough && burst >= kInnerLeast) {
        advance(true);
        inner_.run(burst - 2, active_, *this);
        advance(true);
      } else {
        for (int64_t i = 0; i < burst && !meter_.stopped(); ++i) advance(i + 1 == burst);
      }
      for (int64_t s = 0; s < active_; ++s) slot_[s].steps += burst;
      measure();
      check();
    }
    return checks_;
  }

 private:
  struct Slot {
    int64_t sample;
    T unit;                        // what v, x and z are divided by
    int64_t steps = 0, checks = 0;
    double change = 0, scale = 0;  // |x' - x| / (2 alpha) and |z| in the metric, at last_steps
    int64_t last_steps = 0;
    double rate = 0;               // log of the change's factor per step; 0 while unknown
    double target = 0;             // change at which the next check is made; 0 while unknown
    double mark = std::numeric_limits<double>::infinity();
    int64_t mark_steps = 0;        // where stalling was last excluded, and the change there
    bool stalled = false;
    double size = 0;               // |v| in the metric
    double residual = std::numeric_limits<double>::infinity();  // at the last check
  };

  // The prox of slope a at step alpha, written without division by zero: a x / (a + alpha (1 - a)).
  static T shrink(T a, T alpha) { return a / (a + alpha * (1 - a)); }

  // A power of two whose inverse is a normal number too.
  static T unit_of(const T* v, int64_t n) {
    T largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(v[i]));
    if (!(largest > 0) || !std::isfinite(largest)) return 1;
    constexpr int most = std::numeric_limits<T>::max_exponent - 2;
    return std::ldexp(T(1), std::max(-most, std::min(most, std::ilogb(largest))));
  }

  void begin(int64_t first, int64_t count) {
    active_ = count;
    checks_ = 0;
    calibrated_ = false;
    ratio_ = 1;
    for (int64_t s = 0; s < count; ++s) {
      const T *v = p_.bias + (first + s) * n_, *alpha = p_.alpha;
      slot_[s] = Slot{first + s, unit_of(v, n_)};
      const T inverse = 1 / slot_[s].unit;
      T *u = u_[s], *x = x_[s], *shift = shift_[s], size = 0;
#pragma omp simd reduction(+ : size)
      for (int64_t i = 0; i < n_; ++i) {
        const T g = v[i] * inverse;
        shift[i] = x[i] = u[i] = alpha[i] * g;
        size += (p_.root[i] * g) * (p_.root[i] * g);
      }
      slot_[s].size = std::sqrt(static_cast<double>(size));
      if (p_.slope) {
        const T* d = p_.slope + (first + s) * n_;
        T* c = factor_[s];
        for (int64_t i = 0; i < n_; ++i) c[i] = shrink(d[i], alpha[i]);
      }
    }
    if (p_.reflected) product<T>(u_[0], stride_, p_.map, n_, count, shift_[0], u_[0], T(1), meter_);
    if (p_.start == nullptr) return;  // u = -alpha v has resolvent 0, so x = alpha v
    for (int64_t s = 0; s < count; ++s) {
      const T *start = p_.start + (first + s) * n_, inverse = 1 / slot_[s].unit;
      T* u = u_[s];
      for (int64_t i = 0; i < n_; ++i) u[i] = start[i] * inverse;
    }
    if (!p_.reflected) {
      product<T>(u_[0], stride_, p_.map, n_, count, x_[0], shift_[0], T(1), meter_);
      return;
    }
    // At the solution x = z + alpha (W z + v - z).
    product<T>(u_[0], stride_, p_.weights, n_, count, image_[0], zero_[0], T(1), meter_);
    for (int64_t s = 0; s < count; ++s) {
      const T *w = image_[s], *v = p_.bias + (first + s) * n_, *alpha = p_.alpha, *z = u_[s];
      const T inverse = 1 / slot_[s].unit;
      T* x = x_[s];
      for (int64_t i = 0; i < n_; ++i) x[i] = z[i] + alpha[i] * (w[i] + v[i] * inverse - z[i]);
    }
  }

  // Steps until the first sample may be worth a check.
  int64_t plan() const {
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int64_t s = 0; s < active_; ++s) {
      const Slot& slot = slot_[s];
      int64_t ahead = slot.steps < 4 ? 2 : std::max<int64_t>(1, slot.steps / 2);
      if (slot.steps >= 4 && slot.rate < 0) {
        // A rate is trusted for as long as it was observed.
        const double needed = std::ceil(std::log(goal(slot) / slot.change) / slot.rate);
        double most = slot.steps;
        if (p_.rough) most = std::min(most, std::max(1.0, kInnerGain / slot.rate));
        ahead = needed < 1 ? 1 : static_cast<int64_t>(std::min(needed, most));
      }
      least = std::min(least, std::min(ahead, p_.max_steps - slot.steps));
    }
    return std::max<int64_t>(1, least);
  }

  // The change at which a sample is expected to pass.
  double goal(const Slot& slot) const {
    return slot.target > 0 ? slot.target : p_.tol * slot.scale / ratio_;
  }

  void advance(bool keep) {
    for (int64_t s = 0; s < active_; ++s) {
      const T* x = x_[s];
      T* u = u_[s];
      if (p_.slope) {
        const T *c = factor_[s], twice = p_.reflected ? 2 : 1, less = p_.reflected ? 1 : 0;
        for (int64_t i = 0; i < n_; ++i) u[i] = (twice * c[i] - less) * x[i];
      } else {
        const T* c = rho_.data();
        for (int64_t i = 0; i < n_; ++i) u[i] = x[i] < 0 ? c[i] * x[i] : x[i];
      }
    }
    if (keep) {
      if (p_.theta == 1.0) {
        x_.swap(before_);
      } else {
        std::memcpy(before_[0], x_[0], active_ * stride_ * sizeof(T));
      }
    }
    product<T>(u_[0], stride_, p_.map, n_, active_, x_[0], shift_[0], static_cast<T>(p_.theta),
               meter_);
  }

  // Change and size of every sample from the last two iterates: no product.
  void measure() {
    for (int64_t s = 0; s < active_; ++s) {
      Slot& slot = slot_[s];
      const T *x = x_[s], *y = before_[s], *root = p_.root, *gauge = gauge_.data();
      const T* c = p_.slope ? factor_[s] : prox_.data();
      const bool linear = p_.slope != nullptr;
      T change = 0, scale = 0;
#pragma omp simd reduction(+ : change, scale)
      for (int64_t i = 0; i < n_; ++i) {
        const T e = gauge[i] * (x[i] - y[i]);
        const T z = root[i] * ((linear || x[i] < 0) ? c[i] * x[i] : x[i]);
        change += e * e;
        scale += z * z;
      }
      const double last = slot.change;
      slot.change = std::sqrt(static_cast<double>(change));
      slot.scale = std::sqrt(static_cast<double>(scale));
      if (last > 0 && slot.change > 0) {
        slot.rate = std::log(slot.change / last) / (slot.steps - slot.last_steps);
      }
      slot.last_steps = slot.steps;
      note_stalling(s);
    }
  }

  static constexpr double kRest = 1024 * static_cast<double>(std::numeric_limits<T>::epsilon());

  // |x| / (2 alpha) in the metric: what rounding of x is relative to.
  double reach(int64_t s) {
    const T *x = x_[s], *gauge = gauge_.data();
    double sum = 0;
    for (int64_t i = 0; i < n_; ++i) sum += (gauge[i] * x[i]) * static_cast<double>(gauge[i] * x[i]);
    return std::sqrt(sum);
  }

  // Frobenius' norm of W in the metric; asked for only where rounding may be what is left.
  double size_of_weights() {
    if (size_ >= 0) return size_;
    double sum = 0;
    const int64_t padded_columns = (n_ + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    for (int64_t first = 0; first < padded_columns; first += kVectors * kLanes<T>) {
      const int64_t width = std::min<int64_t>(kVectors * kLanes<T>, padded_columns - first);
      for (int64_t k = 0; k < n_; ++k) {
        const T* row = p_.weights + first * n_ + k * width;
        for (int64_t j = 0; j < std::min(width, n_ - first); ++j) {
          const double w = p_.root[first + j] * static_cast<double>(row[j]) / p_.root[k];
          sum += w * w;
        }
      }
    }
    return size_ = std::sqrt(sum);
  }

  // A change near the rounding of v, x or z that has not halved while the steps grew by a quarter
  // and 64 is at rest.
  void note_stalling(int64_t s) {
    Slot& slot = slot_[s];
    if (slot.change == 0) slot.stalled = true;
    if (slot.stalled || slot.steps < slot.mark_steps * 5 / 4 + 64) return;
    const double floor = kRest * std::max({slot.scale, slot.size, reach(s)});
    slot.stalled = slot.change > 0.5 * slot.mark && slot.change <= floor;
    slot.mark = slot.change;
    slot.mark_steps = slot.steps;
  }

  bool ends(const Slot& slot) const {
    return slot.steps >= p_.max_steps || slot.stalled || !std::isfinite(slot.change);
  }

  void check() {
    int64_t count = 0;
    for (int64_t s = 0; s < active_; ++s) {
      if (ends(slot_[s]) || slot_[s].change <= goal(slot_[s])) order_[count++] = s;
    }
    if (count == 0) {
      if (calibrated_) return;
      // One tile shows how the residual relates to the change, before all samples ask.
      count = std::min<int64_t>(active_, kRows);
      for (int64_t s = 0; s < count; ++s) order_[s] = s;
    }
    evaluate(count);
    // From the last slot to the first: one that leaves is replaced by the last.
    for (int64_t at = count - 1; at >= 0; --at) {
      Slot& slot = slot_[order_[at]];
      const double r = residual_[at];
      ++slot.checks;
      if (slot.stalled && r > p_.tol && slot.change > kRest * slot.scale && !explained_[at]) {
        slot.stalled = false;  // more is left than rounding explains, and z is far from its own
      } else if (slot.change > 0 && slot.scale > 0 && r > 0) {
        const double seen = r * slot.scale / slot.change;
        ratio_ = calibrated_ ? 0.5 * (ratio_ + seen) : seen;
        calibrated_ = true;
        slot.target = 0.95 * p_.tol * slot.change / r;  // its own ratio, for the next check
      }
      if (!(r > p_.tol) || noisy_[at] || ends(slot)) leave(order_[at], at, r);
    }
  }

  // The residual as Inclusion.relative_residual defines it, of z as it will be returned: its way
  // there and back rounds where it is subnormal.
  void evaluate(int64_t count) {
    const bool linear = p_.slope != nullptr;
    for (int64_t at = 0; at < count; ++at) {
      const T* x = x_[order_[at]];
      const T* c = linear ? factor_[order_[at]] : prox_.data();
      const T unit = slot_[order_[at]].unit, inverse = 1 / unit;
      T* z = point_[at];
      for (int64_t i = 0; i < n_; ++i) {
        z[i] = ((linear || x[i] < 0) ? c[i] * x[i] : x[i]) * unit * inverse;
      }
    }
    product<T>(point_[0], stride_, p_.weights, n_, count, image_[0], zero_[0], T(1), meter_);
    for (int64_t at = 0; at < count; ++at) {
      const int64_t row = slot_[order_[at]].sample * n_;
      const T *z = point_[at], *v = p_.bias + row, *w = image_[at], *root = p_.root;
      const T *d = linear ? p_.slope + row : nullptr, negative = static_cast<T>(p_.negative);
      const T inverse = 1 / slot_[order_[at]].unit;
      double gap = 0, size = 0, image = 0, active = 0;
#pragma omp simd reduction(+ : gap, size, image, active)
      for (int64_t i = 0; i < n_; ++i) {
        const T g = v[i] * inverse, y = w[i] + g;
        const T s = linear ? d[i] * y : (y < 0 ? negative * y : y);
        const double a = root[i] * (s - z[i]), b = root[i] * z[i], e = root[i] * s;
        gap += a * a;
        size += b * b;
        image += e * e;
        const double f = s != 0 || z[i] != 0 ? root[i] * g : T(0);
        active += f * f;
      }
      const double left = std::sqrt(gap), scale = std::sqrt(std::max(size, image));
      residual_[at] = left == 0 ? 0 : left / scale;  // NaN stays NaN
      // In float a sample leaves where 16 roundoffs of v are more than tol and explain what is
      // left, and it has not halved since the last check: double goes on from there.
      constexpr double roundoffs = 16 * static_cast<double>(std::numeric_limits<T>::epsilon());
      const double own = sizeof(T) == 4 ? roundoffs * std::sqrt(active) : 0, most = p_.tol * scale;
      Slot& slot = slot_[order_[at]];
      noisy_[at] = own > most && left - own <= most && residual_[at] > 0.5 * slot.residual;
      slot.residual = residual_[at];
      if (!slot.stalled) continue;
      const double all = slot.size + reach(order_[at]) + size_of_weights() * scale;
      explained_[at] = left - p_.noise * all <= p_.tol * scale;
    }
  }

  void leave(int64_t s, int64_t at, double r) {
    const Slot& slot = slot_[s];
    const size_t bytes = n_ * sizeof(T);
    T* z = p_.z + slot.sample * n_;
    for (int64_t i = 0; i < n_; ++i) z[i] = point_[at][i] * slot.unit;
    p_.residual[slot.sample] = static_cast<T>(r);
    p_.steps[slot.sample] = p_.done + slot.steps;
    checks_ = std::max(checks_, slot.checks);
    const int64_t last = --active_;
    if (last == s) return;
    std::memcpy(x_[s], x_[last], bytes);
    std::memcpy(shift_[s], shift_[last], bytes);
    if (p_.slope) std::memcpy(factor_[s], factor_[last], bytes);
    slot_[s] = slot_[last];
  }

  // Iterations in float around a double point b: with x = b + d,
  //     d <- (T(b) - b) + theta (rho(b + d) - rho(b)) M + (1 - theta) d,
  // whose rounding is relative to d, not to x.
  struct Inner {
    static int64_t rows(const Problem<T>& p, int64_t capacity) { return p.rough ? capacity : 1; }
    static size_t bytes(const Problem<T>& p, int64_t capacity) {
      return Rows<float>::bytes(5 * rows(p, capacity), padded<float>(p.n));
    }

    Inner(const Problem<T>& p, int64_t capacity, Arena& arena)
        : p(p), n(p.n), stride(padded<float>(p.n)), d(arena, rows(p, capacity), stride),
          base(arena, rows(p, capacity), stride), move(arena, rows(p, capacity), stride),
          u(arena, rows(p, capacity), stride), factor(arena, rows(p, capacity), stride) {}

    // From x' = T(x) with x kept in `before`, to x + d after `count` further steps.
    void run(int64_t count, int64_t active, Group& group) {
      const float theta = static_cast<float>(p.theta);
      for (int64_t s = 0; s < active; ++s) {
        const T *x = group.x_[s], *b = group.before_[s];
        const T *c = p.slope ? group.factor_[s] : group.rho_.data();
        float *ds = d[s], *bs = base[s], *ms = move[s], *fs = factor[s];
        for (int64_t i = 0; i < n; ++i) {
          bs[i] = static_cast<float>(b[i]);
          ds[i] = static_cast<float>(x[i] - b[i]);
          ms[i] = ds[i] / theta;
          fs[i] = static_cast<float>(p.slope && p.reflected ? 2 * c[i] - 1 : c[i]);
        }
      }
      const bool linear = p.slope != nullptr;
      for (int64_t step = 0; step < count && !group.meter_.stopped(); ++step) {
        for (int64_t s = 0; s < active; ++s) {
          const float *x = d[s], *b = base[s], *c = factor[s];
          float* out = u[s];
          if (linear) {
            for (int64_t i = 0; i < n; ++i) out[i] = c[i] * x[i];
          } else {
            for (int64_t i = 0; i < n; ++i) {  // without cancellation where the sign stays
              const float y = b[i] + x[i];
              const bool from = b[i] < 0, to = y < 0;
              const float across = (to ? c[i] * y : y) - (from ? c[i] * b[i] : b[i]);
              out[i] = from != to ? across : (to ? c[i] * x[i] : x[i]);
            }
          }
        }
        product<float>(u[0], stride, p.rough, n, active, d[0], move[0], theta,
                       group.meter_);
      }
      for (int64_t s = 0; s < active; ++s) {
        T* x = group.x_[s];
        const T* b = group.before_[s];
        const float* ds = d[s];
        for (int64_t i = 0; i < n; ++i) x[i] = b[i] + ds[i];
      }
    }

    const Problem<T>& p;
    const int64_t n, stride;
    Rows<float> d, base, move, u, factor;
  };

  // In float d is known to 1e-7 of its size when the burst began: a burst gains e^kInnerGain at
  // most, and one shorter than kInnerLeast does not repay the two steps in double around it.
  static constexpr double kInnerGain = -9;
  static constexpr int64_t kInnerLeast = 5;

  Meter meter_;
  const Problem<T>& p_;
  const int64_t n_, stride_;
  Rows<T> x_, before_, u_, shift_, factor_, point_, image_, zero_;
  Inner inner_;
  std::vector<T> rho_, prox_, gauge_;  // rho's and the prox's factor for x < 0; root / (2 alpha)
  std::vector<Slot> slot_;
  std::vector<int64_t> order_;
  std::vector<double> residual_;
  std::vector<char> explained_, noisy_;  // whether rounding may be what is left above tol
  int64_t active_ = 0, checks_ = 0;
  double size_ = -1;  // of W; negative while it is not known
  double ratio_ = 1;  // residual over change, as last seen
  bool calibrated_ = false;
};

// Returns 0, or 1 when memory ran out.
template <class T>
int run(const Problem<T>& p) {
  const int64_t size = p.samples <= 256 ? 32 : 64;
  const int64_t groups = (p.samples + size - 1) / size;
  std::atomic<int> failed{0};
  int64_t checks = 0;
  Watch watch;
#pragma omp parallel num_threads(std::min(p.threads, groups)) reduction(max : checks)
  {
    thread_local Arena arena;
    const bool ok = arena.reserve(Group<T>::bytes(p, size));
    if (!ok) failed = 1;
    std::optional<Group<T>> group;
    if (ok) group.emplace(p, size, arena, watch);
#pragma omp for schedule(dynamic) nowait
    for (int64_t g = 0; g < groups; ++g) {
      if (!ok || watch.stopped()) continue;
      checks = std::max(checks, group->run(g * size, std::min(size, p.samples - g * size)));
    }
    watch.finish();
  }
  *p.checks = checks;
  return failed;
}

// Lays the columns of a matrix out in the panels of kVectors vectors that `product` reads in order.
template <class T>
void pack(const T* matrix, int64_t row_stride, int64_t column_stride, int64_t n, int64_t threads,
          T* packed) {
  const int64_t vectors = (n + kLanes<T> - 1) / kLanes<T>;
  const int64_t panels = (vectors + kVectors - 1) / kVectors;
  Watch watch;
#pragma omp parallel num_threads(threads) if (n >= 256)
  {
    Meter meter(watch);
#pragma omp for nowait
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * kVectors * kLanes<T>;
      const int64_t width = std::min<int64_t>(kVectors, vectors - p * kVectors) * kLanes<T>;
      if (meter.spend(n * width)) continue;
      T* out = packed + first * n;
      for (int64_t k = 0; k < n; ++k) {
        const T* row = matrix + k * row_stride + first * column_stride;
        const int64_t count = std::min(width, n - first);
        for (int64_t j = 0; j < count; ++j) out[k * width + j] = row[j * column_stride];
        for (int64_t j = count; j < width; ++j) out[k * width + j] = 0;
      }
    }
    watch.finish();
  }
}

}  // namespace

extern "C" {
void lben_python(void* (*save)(), void (*restore)(void*), int (*check)()) {
  python = Python{save, restore, check};
}
void lben_pack_float(const float* m, int64_t r, int64_t c, int64_t n, int64_t t, float* out) {
  pack(m, r, c, n, t, out);
}
void lben_pack_double(const double* m, int64_t r, int64_t c, int64_t n, int64_t t, double* out) {
  pack(m, r, c, n, t, out);
}
int lben_solve_float(const Problem<float>* p) { return run(*p); }
int lben_solve_double(const Problem<double>* p) { return run(*p); }
int64_t lben_lanes_float() { return kLanes<float>; }
int64_t lben_lanes_double() { return kLanes<double>; }
}
