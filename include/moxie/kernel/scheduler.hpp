// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <moxie/core/exec.hpp>
#include <moxie/kernel/task.hpp>
#include <thread>
#include <utility>
#include <vector>

/// The scheduler: which thread computes which task, and when. A task graph of products has no
/// barriers.
namespace moxie::inline MOXIE_NAMESPACE::kernel {

namespace detail {

/// The tasks of one product in one stage.
struct Part {
  const void* product = nullptr;
  const void* epilogue = nullptr;
  Index index = 0;         // of the product in its stage
  Index first_task = 0;    // of all tasks
  Index dependencies = 0;  // tasks of earlier stages of the same product
  Blocking blocking;
};

/// The type of products, behind functions: the scheduler is compiled once for all types.
struct ProductType {
  TileShape tile;
  ProductShape (*shape)(const void* product);
  void (*queue_first_panels)(PrefetchQueue& queue, const Part& part, Index task);
  /// Computes a task, and prefetches for `next` unless it is null.
  void (*run)(const Part& part, Index task, const Part* next, Index next_task, Buffer<std::byte>& memory);
};

template <class P, class Arch>
struct ProductTypeOf {
  using Scalar = typename P::Scalar;

  static ProductShape shape(const void* product) { return shape_of<Arch>(*static_cast<const P*>(product)); }
  static void queue_first(PrefetchQueue& queue, const Part& part, Index task) {
    queue_first_panels<Arch>(queue, *static_cast<const P*>(part.product), part.blocking, task);
  }
  static void run(const Part& part, Index task, const Part* next, Index next_task, Buffer<std::byte>& memory) {
    Task<P, Arch> computed(*static_cast<const P*>(part.product), part.index,
                           *static_cast<const Epilogue<Scalar>*>(part.epilogue), part.blocking, task, memory);
    computed.run([&](PrefetchQueue& queue) {
      if (next != nullptr) {
        queue_first(queue, *next, next_task);
      }
    });
  }
  static constexpr ProductType type{tile_shape<Scalar, Arch>(), shape, queue_first, run};
};

/// A stage: products that may run side by side.
struct StageOfParts {
  Buffer<std::byte> products;
  const void* epilogue = nullptr;
  Index halvings = 0;  // of its tasks
};

/// The memory of one task graph. A thread keeps it for later graphs, so that these allocate
/// nothing.
struct GraphMemory {
  static constexpr std::size_t most_stages = 4;
  std::array<StageOfParts, most_stages> stages;
  std::vector<Part> parts;
  std::vector<Index> tasks;     // of each product, in the stages so far
  std::vector<Index> finished;  // of each product
};

/// The engine's memory of a thread, for products of every type. It is freed when the thread ends. A
/// static destructor that computes later gets a new one.
struct ThreadMemory {
  Buffer<std::byte> task;
  std::unique_ptr<GraphMemory> graph;
};
[[gnu::noinline]] inline ThreadMemory& thread_memory() {
  thread_local ThreadMemory* memory = nullptr;
  struct Owner {
    ~Owner() { delete std::exchange(memory, nullptr); }
  };
  if (memory == nullptr) {
    memory = new ThreadMemory;
    thread_local const Owner owner;
  }
  return *memory;
}

/// Halves the tasks of a stage until the threads can share them evenly. Half the rows cost as much
/// packing as all of them. So if B has to be packed, rows are halved for a few tasks only.
inline void settle(StageOfParts& stage, Index count, std::size_t size, const ProductType& type, Index threads) {
  const Index wanted = threads > 1 ? 16 * threads : 1;
  for (stage.halvings = 0;; ++stage.halvings) {
    Index tasks = 0;
    bool smallest = true;
    bool only_rows = true;
    for (Index i = 0; i < count; ++i) {
      const ProductShape shape = type.shape(stage.products.data() + std::size_t(i) * size);
      const Blocking blocking = block(shape, type.tile, stage.halvings);
      tasks += blocking.tasks(shape);
      smallest = smallest && blocking.nc == 1 && blocking.mc <= 4 * type.tile.rows;
      only_rows = only_rows && blocking.nc == 1 && !shape.prepacked;
    }
    if (tasks >= (only_rows ? wanted / 4 : wanted) || smallest) {
      return;
    }
  }
}

/// Orders all tasks, each stage one product behind the stage before. So the tasks that a task
/// depends on were claimed long before it. Returns the number of tasks.
inline Index order_tasks(GraphMemory& graph, std::size_t stages, Index count, std::size_t size, const ProductType& type) {
  graph.parts.clear();
  graph.tasks.assign(std::size_t(count), 0);
  graph.finished.assign(std::size_t(count), 0);
  Index total = 0;
  for (Index i = 0; i < count + Index(stages) - 1; ++i) {
    for (std::size_t s = 0; s < stages; ++s) {
      const Index index = i - Index(s);
      if (index < 0 || index >= count) {
        continue;
      }
      const StageOfParts& stage = graph.stages[s];
      const void* const product = stage.products.data() + std::size_t(index) * size;
      const ProductShape shape = type.shape(product);
      const Blocking blocking = block(shape, type.tile, stage.halvings);
      Index& tasks = graph.tasks[std::size_t(index)];
      graph.parts.push_back({product, stage.epilogue, index, total, tasks, blocking});
      tasks += blocking.tasks(shape);
      total += blocking.tasks(shape);
    }
  }
  return total;
}

inline const Part& part_of(const std::vector<Part>& parts, Index task) {
  return *(std::upper_bound(parts.begin(), parts.end(), task, [](Index t, const Part& part) { return t < part.first_task; }) -
           1);
}

/// Counts a task as finished even if its epilogue throws. Otherwise other threads would wait for
/// ever.
struct CountAsFinished {
  std::atomic_ref<Index> finished;
  ~CountAsFinished() {
    end_streams();
    finished.fetch_add(1, std::memory_order_release);
  }
};

inline void run_tasks(GraphMemory& graph, Index total, const ProductType& type, const Exec& exec) {
  const Index threads = exec.thread_count();
  exec.parallel_for(total, [&](Index task) {
    const Part& part = part_of(graph.parts, task);
    const std::atomic_ref<Index> finished(graph.finished[std::size_t(part.index)]);
    for (Index spins = 0; finished.load(std::memory_order_acquire) < part.dependencies; ++spins) {
      if (spins > 1000) {
        std::this_thread::yield();
      }
    }
    const CountAsFinished count{finished};
    const Index after = task + threads;  // this thread's next task, most likely
    const Part* const next = after < total ? &part_of(graph.parts, after) : nullptr;
    type.run(part, task - part.first_task, next, next != nullptr ? after - next->first_task : 0, thread_memory().task);
  });
}

}  // namespace detail

/// Stages of equally many products, computed as one list of tasks that all threads share. Product i of a stage starts when
/// product i of every stage before it has ended; everything else runs side by side, without a barrier.
///
///     TaskGraph<float> graph;
///     graph.add(E, [&](Index e) { return first(e); }, epilogue);
///     graph.add(E, [&](Index e) { return second(e); });
///     graph.run(exec);
///
/// Products may differ in size; an empty one costs nothing. Products that may run side by side must not write the same
/// elements. The bits of an element do not depend on the number of threads, on blocking, or on other rows and columns: sums are
/// Scalars, one fused multiply-add a number (a multiply and an add where the instruction set has none), in order, in passes
/// whose depth follows from k and from whether A is transposed.
template <class Scalar, class Element = Scalar, class Arch = DefaultArch>
class TaskGraph {
 public:
  using P = Product<Scalar, Element>;

  TaskGraph() : memory_(std::move(detail::thread_memory().graph)) {
    if (memory_ == nullptr) {
      memory_ = std::make_unique<detail::GraphMemory>();
    }
  }
  TaskGraph(const TaskGraph&) = delete;
  TaskGraph& operator=(const TaskGraph&) = delete;
  ~TaskGraph() { detail::thread_memory().graph = std::move(memory_); }

  /// Appends a stage, at most four of them: `product_of(i)` for i = 0, ..., count - 1, stored as values.
  template <class ProductOf>
  void add(Index count, const ProductOf& product_of, const Epilogue<Scalar>& epilogue = {}) {
    MOXIE_ASSERT(stages_ < detail::GraphMemory::most_stages && (stages_ == 0 || count == count_));
    count_ = count;
    epilogues_[stages_] = epilogue;
    Buffer<std::byte>& products = memory_->stages[stages_++].products;
    products.resize(count * Index{sizeof(P)});
    for (Index i = 0; i < count; ++i) {
      new (products.data() + std::size_t(i) * sizeof(P)) P(product_of(i));
    }
  }

  void run(const Exec& exec) {
    const detail::ProductType& type = detail::ProductTypeOf<P, Arch>::type;
    for (std::size_t s = 0; s < stages_; ++s) {
      memory_->stages[s].epilogue = &epilogues_[s];
      detail::settle(memory_->stages[s], count_, sizeof(P), type, exec.thread_count());
    }
    detail::run_tasks(*memory_, detail::order_tasks(*memory_, stages_, count_, sizeof(P), type), type, exec);
  }

 private:
  std::unique_ptr<detail::GraphMemory> memory_;
  std::array<Epilogue<Scalar>, detail::GraphMemory::most_stages> epilogues_;
  std::size_t stages_ = 0;
  Index count_ = 0;
};

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel
