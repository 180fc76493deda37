// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <moxie/config.hpp>
#include <moxie/core/error.hpp>
#include <moxie/core/extent.hpp>
#include <moxie/core/layout.hpp>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__CUDACC__)
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <thrust/system/cuda/execution_policy.h>
#include <thrust/system_error.h>
/// Code that nvcc compiles and code that it does not are different entities of one program.
#define MOXIE_CUDA_BACKEND on_device
#else
#include <atomic>
#include <moxie/core/exec.hpp>
// Thrust's own choice is CUDA, whose headers it includes then, also where no policy of ours asks for it.
#if !defined(THRUST_DEVICE_SYSTEM) && !__has_include(<cuda_runtime_api.h>)
#define THRUST_DEVICE_SYSTEM THRUST_DEVICE_SYSTEM_CPP
#endif
#if defined(_OPENMP)
#include <thrust/system/omp/execution_policy.h>
#else
#include <thrust/system/cpp/execution_policy.h>
#endif
#define MOXIE_CUDA_BACKEND on_host
#endif
#include <thrust/for_each.h>
#include <thrust/iterator/counting_iterator.h>

/// The layers on a device: the same options, parameters and laws as on the CPU, memory and products by CUDA.
///
/// nvcc compiles these headers for a GPU. Any other compiler makes the *host build* of them: the same functions over memory of
/// the host, loops by Thrust's OpenMP system (or its C++ one), products by the CPU's kernels. It is how the backend is tested
/// where there is no GPU.
namespace moxie::inline MOXIE_NAMESPACE::cuda {

/// A call of CUDA, cuBLAS or Thrust failed; the message names it. Errors of kernels are those of an earlier call, too.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline namespace MOXIE_CUDA_BACKEND {

/// Of the host build: whether this is it.
#if defined(__CUDACC__)
inline constexpr bool host_build = false;
#else
inline constexpr bool host_build = true;
#endif

namespace detail {

using moxie::detail::expect_at_least;
using moxie::detail::expect_value;

// Constants that device code may read; it may not call the functions that they come from.
template <class T>
inline constexpr T infinity = std::numeric_limits<T>::infinity();
inline constexpr int largest_int = (std::numeric_limits<int>::max)();

#if defined(__CUDACC__)
inline void expect_success(cudaError_t error, const char* call) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would be taken for the culprit
    throw CudaError(std::string(call) + ": " + cudaGetErrorString(error));
  }
}
inline void expect_success(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw CudaError(std::string(call) + ": " + cublasGetStatusString(status));
  }
}
#endif

}  // namespace detail

/// The threads that share a row: a warp on the device, one on the host. They take elements `first()`, `first() + step()`, ...
class Lanes {
 public:
#if defined(__CUDA_ARCH__)
  static constexpr int count = 32;
  MOXIE_HOST_DEVICE int first() const { return int(threadIdx.x) % count; }
  MOXIE_HOST_DEVICE int step() const { return count; }
  /// Over all lanes, the same number for each of them, in an order that is always the same.
  template <class T>
  MOXIE_HOST_DEVICE T sum(T x) const {
    for (int other = 16; other > 0; other /= 2) {
      x += __shfl_xor_sync(0xffffffffU, x, other);
    }
    return x;
  }
  template <class T>
  MOXIE_HOST_DEVICE T largest(T x) const {
    for (int other = 16; other > 0; other /= 2) {
      const T y = __shfl_xor_sync(0xffffffffU, x, other);
      x = y > x ? y : x;
    }
    return x;
  }
  /// The largest value and its index, the lower one of equal values; an index below 0 stands for nothing.
  template <class T>
  MOXIE_HOST_DEVICE void best(T& value, int& index) const {
    for (int other = 16; other > 0; other /= 2) {
      const T v = __shfl_xor_sync(0xffffffffU, value, other);
      const int i = __shfl_xor_sync(0xffffffffU, index, other);
      if (i >= 0 && (index < 0 || v > value || (v == value && i < index))) {
        value = v;
        index = i;
      }
    }
  }
  /// What each lane wrote before, all may read after.
  MOXIE_HOST_DEVICE void sync() const { __syncwarp(); }
#else
  static constexpr int count = 1;
  MOXIE_HOST_DEVICE static int first() { return 0; }
  MOXIE_HOST_DEVICE static int step() { return count; }
  template <class T>
  MOXIE_HOST_DEVICE T sum(T x) const {
    return x;
  }
  template <class T>
  MOXIE_HOST_DEVICE T largest(T x) const {
    return x;
  }
  template <class T>
  MOXIE_HOST_DEVICE void best(T& /*value*/, int& /*index*/) const {}
  MOXIE_HOST_DEVICE void sync() const {}
#endif
};

/// The threads of one of several warps that share a row: they take elements as `Lanes` do, and know nothing of each other.
class Strip {
 public:
  MOXIE_HOST_DEVICE Strip(Index strip, Index strips) : strip_(strip), strips_(strips) {}
  MOXIE_HOST_DEVICE Index first() const { return strip_ * Lanes::count + Lanes().first(); }
  MOXIE_HOST_DEVICE Index step() const { return strips_ * Lanes::count; }

 private:
  Index strip_;
  Index strips_;
};

namespace detail {

/// *to = min(*to, x), by whoever comes.
MOXIE_HOST_DEVICE inline void atomic_min(int* to, int x) {
#if defined(__CUDA_ARCH__)
  atomicMin(to, x);
#elif defined(__CUDACC__)
  *to = x < *to ? x : *to;
#else
  const std::atomic_ref<int> shared(*to);
  for (int now = shared.load(); x < now && !shared.compare_exchange_weak(now, x);) {
  }
#endif
}

#if defined(__CUDACC__)
template <class F>
__global__ void __launch_bounds__(256) run_rows(Index rows, F f) {
  const Index warps = Index(gridDim.x) * (blockDim.x / 32);
  for (Index row = (Index(blockIdx.x) * blockDim.x + threadIdx.x) / 32; row < rows; row += warps) {
    f(row, Lanes());
  }
}
template <class F>
__global__ void __launch_bounds__(256) run_strips(Index rows, Index strips, F f) {
  const Index warps = Index(gridDim.x) * (blockDim.x / 32);
  for (Index i = (Index(blockIdx.x) * blockDim.x + threadIdx.x) / 32; i < rows * strips; i += warps) {
    f(i / strips, Strip(i % strips, strips));
  }
}
inline unsigned blocks_of(Index warps) {
  constexpr Index warps_of_block = 256 / 32;
  return unsigned(std::min<Index>((warps + warps_of_block - 1) / warps_of_block, 65535));
}
#endif

/// What the tensor at a position takes in a device's block, and where it begins there: after those that were added before it.
inline Index device_size(const Layout& layout, Index position) {
  const TensorInfo& t = layout.tensors()[std::size_t(position)];
  return (t.rows * t.cols + Layout::granularity - 1) / Layout::granularity * Layout::granularity;
}
inline Index device_offset(const Layout& layout, Index position) {
  Index offset = 0;
  for (Index i = 0; i < position; ++i) {
    offset += device_size(layout, i);
  }
  return offset;
}

}  // namespace detail

/// What calls cost, counted since `reset_counts`.
struct DeviceCounts {
  std::int64_t launches = 0;          ///< loops and sorts
  std::int64_t products = 0;          ///< calls of cuBLAS; in the host build one for all groups
  std::int64_t allocations = 0;       ///< of device memory
  std::int64_t bytes = 0;             ///< that these took, without scratch
  std::int64_t synchronizations = 0;  ///< waits of the host for the stream
};

/// Where device work runs: a stream and a cuBLAS handle, which are the caller's, and scratch memory, which all layers that use
/// one `DeviceExec` share. Calls on it must not overlap in time. In the host build it is made of an `Exec`.
///
/// Each needs a handle of its own, and the stream's device must be the current one. Nothing waits for the device but `read`,
/// the growth of memory, and `upload` once in 4 MiB; memory grows in the first step of a shape.
class DeviceExec {
#if defined(__CUDACC__)
  /// Thrust's temporary memory, from the scratch.
  struct Allocator {
    using value_type = char;
    DeviceExec* exec;
    char* allocate(std::ptrdiff_t n) const { return exec->scratch<char>(Index(n)); }
    void deallocate(char* /*data*/, std::size_t /*n*/) const {}
  };
  auto policy() { return thrust::cuda::par_nosync(Allocator{this}).on(stream_); }
  template <class Call>
  static void launched(Call&& call) {
    try {
      call();
    } catch (const thrust::system_error& error) {
      cudaGetLastError();
      throw CudaError(std::string("Thrust: ") + error.what());
    }
    detail::expect_success(cudaGetLastError(), "a kernel's launch");
  }
#else
  template <class F>
  struct RowLoop {
    F f;
    void operator()(Index row) const { f(row, Lanes()); }
  };
#if defined(_OPENMP)
  static auto policy() { return thrust::omp::par; }
#else
  static auto policy() { return thrust::cpp::par; }
#endif
  template <class Call>
  static void launched(Call&& call) {
    call();
  }
#endif

 public:
#if defined(__CUDACC__)
  /// Gives the handle the stream, and factors of products that are the host's. Throws CudaError.
  DeviceExec(cudaStream_t stream, cublasHandle_t handle) : stream_(stream), handle_(handle) {
    detail::expect_success(cublasSetStream(handle, stream), "cublasSetStream");
    detail::expect_success(cublasSetPointerMode(handle, CUBLAS_POINTER_MODE_HOST), "cublasSetPointerMode");
  }
  cudaStream_t stream() const { return stream_; }
  /// Throws CudaError if it has been given another stream meanwhile: then nothing would be in order.
  cublasHandle_t handle() const {
    cudaStream_t now = nullptr;
    detail::expect_success(cublasGetStream(handle_, &now), "cublasGetStream");
    if (now != stream_) {
      throw CudaError("DeviceExec: the cuBLAS handle has another stream; every DeviceExec needs a handle of its own");
    }
    return handle_;
  }
#else
  explicit DeviceExec(const Exec& exec = {}) : exec_(exec) {}
  const Exec& host() const { return exec_; }
#endif
  DeviceExec(const DeviceExec&) = delete;
  DeviceExec& operator=(const DeviceExec&) = delete;
  ~DeviceExec() {
    for (const Block& block : blocks_) {
      release(block.data);
    }
#if defined(__CUDACC__)
    cudaFreeHost(staging_);
#endif
  }

  /// Products of up to so many multiply-adds, in the mean of the experts, are one call of cuBLAS for all experts, where it has
  /// one. Larger products fill a device alone, and are a call each: cuBLAS is faster there (docs/cuda.md).
  static constexpr double default_group_up_to = 1 << 30;
  double group_up_to = default_group_up_to;

  const DeviceCounts& counts() const { return counts_; }
  void reset_counts() { counts_ = {}; }
  void count_product() { ++counts_.products; }

  /// `f(i)` for i = 0, ..., n-1.
  template <class F>
  void for_each(Index n, F f) {
    if (n > 0) {
      ++counts_.launches;
      launched([&] { thrust::for_each_n(policy(), thrust::counting_iterator<Index>(0), n, f); });
    }
  }
  /// `f(row, lanes)` for row = 0, ..., rows-1, lanes sharing a row.
  template <class F>
  void for_each_row(Index rows, F f) {
    if (rows <= 0) {
      return;
    }
    ++counts_.launches;
#if defined(__CUDACC__)
    launched([&] { detail::run_rows<<<detail::blocks_of(rows), 256, 0, stream_>>>(rows, f); });
#else
#if defined(MOXIE_CUDA_ROW_LOOP)  // a test's own lanes, several for a row as on a device
    MOXIE_CUDA_ROW_LOOP(rows, f);
#else
    thrust::for_each_n(policy(), thrust::counting_iterator<Index>(0), rows, RowLoop<F>{f});
#endif
#endif
  }
  /// The same where each of the row's `cols` elements is for itself: wide rows are shared by several warps.
  template <class F>
  void for_each_row(Index rows, Index cols, F f) {
#if defined(__CUDACC__)
    constexpr Index cols_of_strip = 128;
    if (rows > 0 && cols > cols_of_strip) {
      const Index strips = (cols + cols_of_strip - 1) / cols_of_strip;
      ++counts_.launches;
      launched([&] { detail::run_strips<<<detail::blocks_of(rows * strips), 256, 0, stream_>>>(rows, strips, f); });
      return;
    }
#else
    static_cast<void>(cols);
#endif
    for_each_row(rows, f);
  }
  /// Counts a call of an algorithm of Thrust: `exec.launch([&](const auto& policy) { thrust::sort(policy, ...); })`.
  template <class Call>
  void launch(Call&& call) {
    ++counts_.launches;
    launched([&] { call(policy()); });
  }

  /// Bytes of zero.
  template <class T>
  void zero(T* to, Index n) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (n > 0) {
      ++counts_.launches;
#if defined(__CUDACC__)
      detail::expect_success(cudaMemsetAsync(to, 0, std::size_t(n) * sizeof(T), stream_), "cudaMemsetAsync");
#else
      std::memset(static_cast<void*>(to), 0, std::size_t(n) * sizeof(T));
#endif
    }
  }
  /// Between two places of the device.
  template <class T>
  void copy(const T* from, T* to, Index n) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (n > 0) {
#if defined(__CUDACC__)
      detail::expect_success(cudaMemcpyAsync(to, from, std::size_t(n) * sizeof(T), cudaMemcpyDeviceToDevice, stream_),
                             "cudaMemcpyAsync");
#else
      std::memcpy(to, from, std::size_t(n) * sizeof(T));
#endif
    }
  }
  /// From the host, where what is there may change when the call returns. Goes by 4 MiB of pinned memory, and waits for the
  /// stream once in as many bytes.
  template <class T>
  void upload(const T* from, T* to, Index n) {
    static_assert(std::is_trivially_copyable_v<T>);
#if defined(__CUDACC__)
    constexpr std::size_t alignment_of_parts = 64;
    const std::size_t bytes = std::size_t(n) * sizeof(T);
    for (std::size_t done = 0; done < bytes;) {
      if (staged_ == staging_size) {
        synchronize();
      }
      const std::size_t left = staging_size - staged_;
      const std::size_t part = bytes - done < left ? bytes - done : left;
      char* const piece = staging() + staged_;
      std::memcpy(piece, reinterpret_cast<const char*>(from) + done, part);
      detail::expect_success(cudaMemcpyAsync(reinterpret_cast<char*>(to) + done, piece, part, cudaMemcpyHostToDevice, stream_),
                             "cudaMemcpyAsync");
      staged_ += (part + alignment_of_parts - 1) / alignment_of_parts * alignment_of_parts;
      done += part;
    }
#else
    if (n > 0) {
      std::memcpy(to, from, std::size_t(n) * sizeof(T));
    }
#endif
  }
  /// To the host, after all work before it: waits for the stream.
  template <class T>
  void read(const T* from, T* to, Index n) {
    static_assert(std::is_trivially_copyable_v<T>);
#if defined(__CUDACC__)
    const std::size_t bytes = std::size_t(n) * sizeof(T);
    std::size_t done = 0;
    do {
      const std::size_t part = bytes - done < staging_size ? bytes - done : staging_size;
      if (part > 0) {  // the stream has read by then what was staged before
        detail::expect_success(
            cudaMemcpyAsync(staging(), reinterpret_cast<const char*>(from) + done, part, cudaMemcpyDeviceToHost, stream_),
            "cudaMemcpyAsync");
      }
      synchronize();
      if (part > 0) {
        std::memcpy(reinterpret_cast<char*>(to) + done, staging(), part);
      }
      done += part;
    } while (done < bytes);
#else
    ++counts_.synchronizations;
    if (n > 0) {
      std::memcpy(to, from, std::size_t(n) * sizeof(T));
    }
#endif
  }

  /// Memory of the device, uninitialized. Throws CudaError, or std::bad_alloc in the host build.
  void* allocate(std::size_t bytes) {
    counts_.bytes += std::int64_t(bytes);
    return allocate_block(bytes);
  }
  /// What `allocate` returned, or null.
  static void release(void* data) noexcept {
#if defined(__CUDACC__)
    cudaFree(data);
#else
    ::operator delete (data, std::align_val_t{alignment});
#endif
  }

  /// Returns all scratch that was taken since it was opened.
  class Frame {
   public:
    explicit Frame(DeviceExec& exec) : exec_(exec), used_(exec.used_), blocks_(exec.blocks_.size()) {}
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;
    ~Frame() { exec_.close(used_, blocks_); }

   private:
    DeviceExec& exec_;
    std::size_t used_;
    std::size_t blocks_;
  };
  /// The most scratch that was taken at once, in bytes.
  std::int64_t scratch_bytes() const { return std::int64_t(peak_); }
  /// Uninitialized scratch, until the enclosing frame closes. Later work of the stream may get the same memory.
  template <class T>
  T* scratch(Index n) {
    return static_cast<T*>(take(std::size_t(n) * sizeof(T)));
  }

 private:
  static constexpr std::size_t alignment = 256;

  struct Block {
    void* data;
    std::size_t size;
  };

#if defined(__CUDACC__)
  static constexpr std::size_t staging_size = std::size_t{1} << 22;

  /// Pinned memory, which never grows.
  char* staging() {
    if (staging_ == nullptr) {
      detail::expect_success(cudaMallocHost(&staging_, staging_size), "cudaMallocHost");
    }
    return static_cast<char*>(staging_);
  }
  void synchronize() {
    ++counts_.synchronizations;
    detail::expect_success(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    staged_ = 0;
  }
#endif

  void* allocate_block(std::size_t bytes) {
    ++counts_.allocations;
    void* data = nullptr;
#if defined(__CUDACC__)
    detail::expect_success(cudaMalloc(&data, bytes), "cudaMalloc");
#else
    data = ::operator new (bytes, std::align_val_t{alignment});
#endif
    return data;
  }

  void* take(std::size_t bytes) {
    const std::size_t start = used_;
    const std::size_t end = used_ + (bytes + alignment - 1) / alignment * alignment;
    void* data = nullptr;
    if (blocks_.size() == 1 && end <= blocks_.front().size) {
      data = static_cast<char*>(blocks_.front().data) + start;
    } else {
      blocks_.reserve(blocks_.size() + 1);
      const std::size_t size = bytes > alignment ? bytes : alignment;
      data = allocate_block(size);
      blocks_.push_back({data, size});
    }
    used_ = end;
    peak_ = used_ > peak_ ? used_ : peak_;
    return data;
  }
  void close(std::size_t used, std::size_t blocks) noexcept {
    used_ = used;
    while (blocks_.size() > (blocks > 1 ? blocks : 1)) {
      release(blocks_.back().data);
      blocks_.pop_back();
    }
    if (used_ == 0 && !blocks_.empty() && blocks_.front().size < peak_) {
      release(blocks_.front().data);
      blocks_.clear();
      try {
        const std::size_t size = peak_ + peak_ / 8;  // what a sort takes changes a little with what it sorts
        blocks_.push_back({allocate_block(size), size});
      } catch (const std::exception&) {  // then the next step allocates, and finds out anew how much it needs
        peak_ = 0;
      }
    }
  }

#if defined(__CUDACC__)
  cudaStream_t stream_;
  cublasHandle_t handle_;
  void* staging_ = nullptr;
  std::size_t staged_ = 0;  // bytes that the stream may not have read yet
#else
  Exec exec_;
#endif
  DeviceCounts counts_;
  std::vector<Block> blocks_;
  std::size_t used_ = 0;
  std::size_t peak_ = 0;
};

/// Memory of the device that grows and keeps what it has, reused from step to step.
template <class T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceBuffer() { DeviceExec::release(data_); }

  /// n elements; what was there is lost where it grows. Where n changes from step to step, `room` is the most that it can be.
  T* resize(DeviceExec& exec, Index n, Index room = 0) {
    const Index most = room > n ? room : n;
    if (most > capacity_) {
      DeviceExec::release(data_);
      data_ = nullptr;
      size_ = 0;
      capacity_ = 0;
      data_ = static_cast<T*>(exec.allocate(std::size_t(most) * sizeof(T)));
      capacity_ = most;
    }
    size_ = n;
    return data_;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  Index size() const { return size_; }

 private:
  void swap(DeviceBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

  T* data_ = nullptr;
  Index size_ = 0;
  Index capacity_ = 0;
};

/// A view of rows of the device: what `RowView` is on the host.
template <class T>
struct DeviceRows {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index stride = 0;

  DeviceRows() = default;
  DeviceRows(T* first, Index height, Index width, Index distance) : data(first), rows(height), cols(width), stride(distance) {}
  DeviceRows(T* first, Index height, Index width) : DeviceRows(first, height, width, width) {}
  template <class U>
  requires std::is_same_v<const U, T> DeviceRows(const DeviceRows<U>& other)
      : DeviceRows(other.data, other.rows, other.cols, other.stride) {}

  MOXIE_HOST_DEVICE T* row(Index i) const { return data + i * stride; }
  MOXIE_HOST_DEVICE T& operator()(Index i, Index j) const { return data[i * stride + j]; }
  moxie::detail::Extent extent() const { return {data, rows, cols, stride}; }
  DeviceRows middle_rows(Index first, Index count) const { return {row(first), count, cols, stride}; }
  DeviceRows middle_cols(Index first, Index count) const { return {data + first, rows, count, stride}; }
};

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda
